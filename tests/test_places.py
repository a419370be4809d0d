"""Names and places: what is too long, elsewhere or in the way is known before anything is computed."""

import json
import os
import shutil
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from training import landscapes

from jaxspd import DiffGenerator
from jaxspd.calibrate import calibrate
from jaxspd.cli import main
from jaxspd.components.transformer import Transformer
from jaxspd.convert import orbax_store, pipeline_folder
from jaxspd.convert.pipeline_folder import convert_pipeline
from jaxspd.errors import UsageError
from jaxspd.families import open_family
from jaxspd.hub import fetch
from jaxspd.media.metadata import read_request
from jaxspd.media.output import FORMATS, check_writable, output_paths, poster_path, write_output

REQUEST = {"prompt": "a lake", "seed": 42}
SMALL = ["--height", "32", "--width", "32", "--num-inference-steps", "2"]


def frames(kind):
    return np.zeros((1 if kind == "png" else 2, 16, 16, 3), np.uint8)


# Names


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("letter", ["𒀀", "山", "e\u0301", "İ"])
def test_a_name_made_from_any_prompt_can_be_written(tmp_path, kind, letter):
    request = {"prompt": letter * 300, "seed": 2**64}
    paths = output_paths(str(tmp_path), None, [request, request], kind)
    check_writable(paths)
    for path in paths:
        write_output(path, frames(kind), request, 16)
        assert read_request(path) == request


def test_a_name_is_cut_between_characters():
    request = {"prompt": "a" + "𒀀" * 60, "seed": 42}
    (path,) = output_paths("out", None, [request], "mp4")
    slug = path.name.partition("_")[0]
    assert slug == "a" + "𒀀" * 44
    # A letter and its accent are one, however the prompt was typed.
    (path,) = output_paths("out", None, [{"prompt": unicodedata.normalize("NFD", "Höhe"), "seed": 1}], "png")
    assert path.name.startswith("höhe_1_")


def test_prompts_that_repeat_get_outputs_of_their_own():
    paths = output_paths("out", None, [REQUEST, {**REQUEST, "seed": 1}, REQUEST, REQUEST], "frames")
    first = paths[0].name
    assert [path.name for path in paths if path != paths[1]] == [first, f"{first}_2", f"{first}_3"]


def test_names_that_differ_in_case_only_do_not_clash():
    requests = [{**REQUEST, "prompt": prompt} for prompt in ("A Lake", "a lake")]
    assert len({path.name.casefold() for path in output_paths("out", None, requests, "png")}) == 2


@pytest.mark.parametrize("name", ["a\nb.png", "a\0.png", "a\x7f", "a\u2028b"])
def test_names_that_no_list_of_files_could_show(name):
    with pytest.raises(UsageError, match="plain file name"):
        output_paths("out", name, [REQUEST], "png")


@pytest.mark.parametrize("name", [".png", ".MP4", ".frames"])
def test_names_that_are_only_an_ending(name):
    with pytest.raises(UsageError, match="only an ending; put a name before it"):
        output_paths("out", name, [REQUEST], "png")
    assert output_paths("out", ".lake.png", [REQUEST], "png") == [Path("out/.lake.png")]
    assert output_paths("out", "👩‍🚀", [REQUEST], "png") == [Path("out/👩‍🚀.png")]


@pytest.mark.parametrize("folder", ["", "new/below"])
@pytest.mark.parametrize(
    ("kind", "longest"),
    # A video's poster has the longest name of all.
    [("png", 251), ("gif", 251), ("mp4", 255 - len(".poster.png")), ("frames", 255)],
)
def test_the_longest_names(tmp_path, kind, longest, folder):
    place = tmp_path / folder
    (path,) = output_paths(str(place), "é" * (longest // 2) + "n" * (longest % 2), [REQUEST], kind)
    check_writable([path])
    assert list(tmp_path.iterdir()) == []
    write_output(path, frames(kind), REQUEST, 16)
    (path,) = output_paths(str(place), "é" * (longest // 2) + "n" * (longest % 2 + 1), [REQUEST], kind)
    with pytest.raises(UsageError, match=r"\(File name too long\); choose another output_path or"):
        check_writable([path])


def test_a_path_that_is_too_long_as_a_whole(tmp_path):
    long = tmp_path.joinpath(*["n" * 200] * 20)
    with pytest.raises(UsageError, match="File name too long"):
        check_writable([long / "a.png"])


def test_too_long_a_name_is_refused_before_anything_is_computed(refused, flux1_folder):
    line = refused("--output-file-name", "n" * 252, *SMALL, model=flux1_folder)
    assert "File name too long" in line


# Places


def test_a_poster_leaves_the_picture_of_that_name(tmp_path):
    write_output(tmp_path / "boat.png", frames("png"), REQUEST)
    before = (tmp_path / "boat.png").read_bytes()
    write_output(tmp_path / "boat.mp4", frames("mp4") + 9, REQUEST, 16)
    assert (tmp_path / "boat.png").read_bytes() == before
    assert poster_path(tmp_path / "boat.mp4") == tmp_path / "boat.poster.png"


def test_what_is_in_the_way_of_frames(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    (tmp_path / "nowhere").symlink_to(tmp_path / "missing")
    for name in ("link", "nowhere"):  # which no folder can take the place of
        with pytest.raises(UsageError, match=f"{name} exists already"):
            check_writable([tmp_path / name])
    with pytest.raises(UsageError, match="nowhere is a link to nowhere, not a folder"):
        check_writable([tmp_path / "nowhere" / "a.png"])


def test_a_folder_that_may_not_be_looked_into(tmp_path, monkeypatch):
    (tmp_path / "closed").mkdir()
    access = os.access
    # Rights do not bind the superuser, as whom tests may run.
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path).name != "closed" and access(path, mode))
    with pytest.raises(UsageError, match="closed cannot be written; choose another output_path"):
        check_writable([tmp_path / "closed" / "new" / "a.png"])
    with pytest.raises(UsageError, match="closed cannot be read; change its permissions"):
        fetch(str(tmp_path / "closed"))


def test_a_current_folder_that_is_gone(tmp_path, monkeypatch):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    with pytest.raises(UsageError, match="No such file or directory"):
        check_writable([Path("a.png")])


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "home").mkdir()
    return tmp_path / "home"


def test_the_home_folder_in_every_path(home, flux1_folder, capsys):
    (home / "model").symlink_to(flux1_folder)
    (home / "prompts.txt").write_text("a lake")
    (home / "config.yaml").write_text("seed: 3")
    (home / "spectrum.json").write_text('{"amplitude": 20, "exponent": 3}')
    flags = ["--model-path", "~/model", "--prompt-path", "~/prompts.txt", "--config", "~/config.yaml"]
    flags += ["--spectrum", "~/spectrum.json", "--output-path", "~/out", "--output-file-name", "a", *SMALL]
    assert main(["generate", *flags]) == 0
    assert f"wrote {home / 'out' / 'a.png'}" in capsys.readouterr().out
    assert read_request(home / "out" / "a.png")["seed"] == 3
    (home / "images").mkdir()
    Image.fromarray(landscapes.sample(0, 64)[0]).save(home / "images" / "a.png")
    calibrate("~/model", images="~/images", output_path="~/measured.json", height=64, width=64)
    assert (home / "measured.plot.png").exists()
    assert main(["convert", "--model-path", "~/model", "--output-path", "~/converted"]) == 0
    assert (home / "converted" / "model_index.json").exists()
    assert [path.name for path in home.parent.iterdir()] == ["home"]


def test_a_picture_knows_its_model_wherever_it_is_read(flux1_folder, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    (tmp_path / "there").mkdir()
    (tmp_path / "here" / "model").symlink_to(flux1_folder)
    monkeypatch.chdir(tmp_path / "here")
    flags = ["--prompt", "a", "--output-file-name", "a", *SMALL]
    assert main(["generate", "--model-path", "model", *flags]) == 0
    picture = tmp_path / "here" / "outputs" / "a.png"
    assert read_request(picture)["model_path"] == str(tmp_path / "here" / "model")
    monkeypatch.chdir(tmp_path / "there")
    assert main(["generate", "--config", str(picture), "--output-file-name", "b"]) == 0
    again = tmp_path / "there" / "outputs" / "b.png"
    assert read_request(again) == read_request(picture)


def test_a_hub_id_stays_what_it_is(flux1_folder, monkeypatch):
    monkeypatch.setattr("jaxspd.generator.fetch", lambda *_, **__: open_family(flux1_folder))
    monkeypatch.setattr(Transformer, "_load", lambda *_: None)
    assert DiffGenerator.from_pretrained("owner/name").source.model_path == "owner/name"


def test_a_calibration_s_plot_leaves_the_picture_of_that_name(flux1_folder, tmp_path):
    (tmp_path / "images").mkdir()
    Image.fromarray(landscapes.sample(0, 64)[0]).save(tmp_path / "images" / "a.png")
    (tmp_path / "boat.png").write_text("a picture")
    result = calibrate(
        str(flux1_folder), images=tmp_path / "images", output_path=tmp_path / "boat.json", height=64, width=64
    )
    assert (tmp_path / "boat.png").read_text() == "a picture"
    assert result.plot_path == tmp_path / "boat.plot.png"


@pytest.mark.parametrize("name", ["n" * 251, "n" * 247])  # of the second, only the plot's is too long
def test_too_long_a_name_for_a_calibration(flux1_folder, tmp_path, name):
    with pytest.raises(UsageError, match="File name too long"):
        calibrate(str(flux1_folder), images=tmp_path, output_path=tmp_path / f"{name}.json")


# convert


@pytest.fixture
def model(flux1_folder, tmp_path):
    return shutil.copytree(flux1_folder, tmp_path / "model")


@pytest.fixture
def nothing_is_read(monkeypatch):
    def load_parameters(*_, **__):
        raise AssertionError("weights are read")

    monkeypatch.setattr(orbax_store, "load_parameters", load_parameters)


@pytest.mark.usefixtures("nothing_is_read")
def test_convert_into_the_models_own_folder(model, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    shutil.move(model / "transformer", elsewhere)
    (model / "transformer").symlink_to(elsewhere)
    (tmp_path / "link").symlink_to(model)
    family = open_family(model)
    before = sorted(tmp_path.rglob("*"))
    for place in ("model/new", "model/vae/a/b", "link/new", "model/transformer/new", "elsewhere/new"):
        with pytest.raises(UsageError, match="lies in the model's own folder; choose another output_path"):
            convert_pipeline(family, tmp_path / place)
    for place in ("model", "link"):
        with pytest.raises(UsageError, match="exists already"):
            convert_pipeline(family, tmp_path / place)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.usefixtures("nothing_is_read")
def test_convert_to_where_nothing_can_be(model, tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "dangling").symlink_to(tmp_path / "missing")
    for place, says in {
        "file/new": "file is a file, not a folder",
        "n" * 256: "File name too long",
        "dangling": "exists already",
        "missing/..": "names nothing new",
    }.items():
        with pytest.raises(UsageError, match=f"{says}.*; choose another output_path|{says}; choose"):
            convert_pipeline(open_family(model), tmp_path / place)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dangling", "file", "model"]


def test_convert_to_the_longest_name(model, tmp_path):
    convert_pipeline(open_family(model), tmp_path / "new" / ("n" * 255))
    assert open_family(tmp_path / "new" / ("n" * 255)).folder.is_dir()


@pytest.mark.parametrize(
    "error", [OSError(28, "disk full"), shutil.Error([("a", "b", "disk full"), ("c", "d", "disk full")])]
)
def test_convert_to_a_full_disk(model, tmp_path, monkeypatch, error):
    def full(*_, **__):
        raise error

    monkeypatch.setattr(pipeline_folder.shutil, "copytree", full)
    with pytest.raises(UsageError, match=r"new cannot be written \(disk full\)"):
        convert_pipeline(open_family(model), tmp_path / "new")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_request_keeps_no_other_path(flux1_folder, tmp_path):
    (tmp_path / "s.json").write_text('{"amplitude": 20, "exponent": 3}')
    result = DiffGenerator.from_pretrained(str(flux1_folder)).generate(
        {"prompt": "a", "height": 32, "width": 32, "num_inference_steps": 2}
        | {"spectrum": str(tmp_path / "s.json"), "output_path": str(tmp_path / "out")}
    )
    request = read_request(result.paths[0])
    assert request.pop("model_path") == str(flux1_folder)
    assert str(tmp_path) not in json.dumps(request)
