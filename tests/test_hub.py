"""What comes from the hub: no more than a command needs, none of it before a pipeline is known to run."""

import json
import shutil

import huggingface_hub
import numpy as np
import pytest
from diffusers import DiffusionPipeline
from huggingface_hub import constants
from PIL import Image

from jaxspd.cli import main
from jaxspd.convert.checkpoint import weight_files
from jaxspd.errors import UsageError
from jaxspd.families import open_family
from jaxspd.hub import fetch
from tests.components import components
from tests.fake_hub import Hub
from tests.test_calibrate import drawings

FOLDERS = [
    "flux1_folder",
    "klein_folder",
    "flux2_dev_folder",
    "qwen_image_folder",
    "wan_folder",
    "z_image_folder",
]
# What real repositories hold beside, and nobody needs.
CLUTTER = [
    "LICENSE.txt",
    "README.md",
    "gallery.json",
    "model.safetensors",
    "vae/diffusion_pytorch_model.bin",
    "vae/diffusion_pytorch_model.fp16.safetensors",
    "vae/openvino_model.xml",
    "transformer/diffusion_pytorch_model.fp16.safetensors",
    "transformer/diffusion_pytorch_model.safetensors.index.fp16.json",
    "text_encoder/flax_model.msgpack",
    "text_encoder/model.fp16.safetensors",
    "text_encoder/model.onnx",
    "text_encoder/openvino_config.json",
    "text_encoder/generation_config.json",
    "text_encoder/pytorch_model.bin",
    "tokenizer/notes.md",
]
SMALL = ["--height", "64", "--width", "64", "--num-inference-steps", "2"]


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub and an empty cache; offline again at the end."""
    with Hub() as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
        template = hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", hub.endpoint)  # which diffusers asks
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        huggingface_hub.close_session()
        huggingface_hub.utils.disable_progress_bars()
        yield hub
    huggingface_hub.close_session()
    huggingface_hub.utils.enable_progress_bars()


@pytest.fixture
def line(capsys):
    """Runs a command that must fail, and returns its one line."""

    def run(*command):
        assert main([str(word) for word in command]) == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        (line,) = captured.err.splitlines()
        return line

    return run


def offline(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


def snapshot(folder):
    """All files of a folder by name."""
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def needed(folder):
    """Of the files that a pipeline's own save wrote, those that a picture takes."""
    return snapshot(folder) - {"text_encoder/generation_config.json"}


@pytest.mark.parametrize("folder", FOLDERS)
def test_all_that_a_pipeline_needs_and_nothing_else_is_fetched(hub, request, folder):
    folder = request.getfixturevalue(folder)
    hub.add("maker/model", folder, **dict.fromkeys(CLUTTER, b"clutter"))
    family, local = fetch("maker/model"), open_family(folder)
    components(family).check()
    assert weight_files(family.folder / "transformer")
    assert hub.names() == needed(folder)
    ours, theirs = (components(one).encode_text(["a lake"]) for one in (family, local))
    for name, value in theirs.items():
        np.testing.assert_array_equal(ours[name], value)


def test_weights_of_a_transformer_that_another_replaces_stay_away(hub, flux1_folder, tmp_path):
    hub.add("maker/model", flux1_folder)
    family = fetch("maker/model", transformer_weights_path=tmp_path / "other.safetensors")
    assert family.transformer_weights_path == tmp_path / "other.safetensors"
    assert hub.names() == {
        name for name in needed(flux1_folder) if not name.startswith("transformer/diffusion")
    }


def test_a_chat_template_comes_with_its_tokenizer(hub, klein_folder, tmp_path, capsys):
    commit = hub.add("maker/klein", klein_folder)
    assert "tokenizer/chat_template.jinja" in commit.files
    command = ["generate", "--model-path", "maker/klein", "--prompt", "a lake", *SMALL]
    assert main([*command, "--output-path", str(tmp_path), "--output-file-name", "hub"]) == 0
    command[2] = str(klein_folder)
    assert main([*command, "--output-path", str(tmp_path), "--output-file-name", "folder"]) == 0
    pictures = [np.asarray(Image.open(tmp_path / f"{name}.png")) for name in ("hub", "folder")]
    np.testing.assert_array_equal(*pictures)


def test_a_tokenizer_without_its_chat_template_is_named(klein_folder, tmp_path, line):
    folder = shutil.copytree(klein_folder, tmp_path / "model")
    (folder / "tokenizer" / "chat_template.jinja").unlink()
    said = line(
        "generate", "--model-path", folder, "--prompt", "a", *SMALL, "--output-path", tmp_path / "out"
    )
    assert "lacks a chat template" in said


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_plan_takes_configuration_alone(hub, request, folder, capsys):
    folder = request.getfixturevalue(folder)
    hub.add("maker/model", folder, **dict.fromkeys(CLUTTER, b"clutter"))
    assert main(["plan", "--model-path", "maker/model", "--json"]) == 0
    from_hub = capsys.readouterr().out
    assert main(["plan", "--model-path", str(folder), "--json"]) == 0
    assert capsys.readouterr().out == from_hub
    configurations = ("model_index.json", "config.json", "scheduler_config.json", "tokenizer_config.json")
    assert {name.rpartition("/")[2] for name in hub.names()} == set(configurations)


def test_a_spectrum_in_the_repository_is_used(hub, flux1_folder):
    spectrum = json.dumps({"amplitude": 7.0, "exponent": 1.5}).encode()
    hub.add("maker/model", flux1_folder, **{"spectrum.json": spectrum})
    assert fetch("maker/model", ()).spectrum.amplitude == 7


def test_calibration_takes_the_vae_of_all_weights(hub, flux1_folder, tmp_path, line):
    hub.add("maker/model", flux1_folder, **dict.fromkeys(CLUTTER, b"clutter"))
    command = ["calibrate", "--model-path", "maker/model", "--output-path", tmp_path / "spectrum.json"]
    command += ["--height", "64", "--width", "96", "--images"]
    assert "holds no pictures" in line(*command, tmp_path)
    assert not any(name.endswith(".safetensors") for name in hub.names())
    assert main([str(word) for word in [*command, drawings(tmp_path / "images")]]) == 0
    weights = {name for name in hub.names() if name.endswith((".safetensors", ".bin"))}
    assert weights == {"vae/diffusion_pytorch_model.safetensors"}


def test_a_conversion_takes_all(hub, flux1_folder, tmp_path, capsys, line):
    hub.add("maker/model", flux1_folder, **dict.fromkeys(CLUTTER, b"clutter"))
    command = ["convert", "--model-path", "maker/model", "--output-path"]
    assert "exists already" in line(*command, tmp_path)
    assert hub.asked == []
    assert main([*command, str(tmp_path / "new")]) == 0
    assert needed(flux1_folder) - snapshot(tmp_path / "new") == {
        "transformer/diffusion_pytorch_model.safetensors"
    }
    # And what is converted can be put on the hub itself.
    hub.add("maker/converted", tmp_path / "new")
    folder = fetch("maker/converted").folder
    assert snapshot(folder) == snapshot(tmp_path / "new")


def test_a_pipeline_that_is_not_supported_is_refused_at_its_index(hub, flux1_folder, line):
    index = json.dumps({"_class_name": "StableDiffusionPipeline"}).encode()
    hub.add("maker/other", flux1_folder, **{"model_index.json": index})
    assert "is a StableDiffusionPipeline pipeline" in line(
        "generate", "--model-path", "maker/other", "--prompt", "a"
    )
    assert hub.names() == {"model_index.json"}


def test_a_configuration_that_is_not_supported_is_refused_before_weights(hub, flux1_folder, line):
    vae = json.dumps({"latent_channels": 5}).encode()
    hub.add("maker/other", flux1_folder, **{"vae/config.json": vae})
    said = line("generate", "--model-path", "maker/other", "--prompt", "a")
    assert "do not belong together" in said
    assert all(name.endswith(".json") for name in hub.names())


def test_pickles_are_refused_before_anything_else_comes(hub, flux1_folder, tmp_path, line):
    folder = shutil.copytree(flux1_folder, tmp_path / "model")
    weights = folder / "vae" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_suffix(".bin"))
    hub.add("maker/model", folder)
    said = line("generate", "--model-path", "maker/model", "--prompt", "a")
    assert "maker/model/vae needs safetensors" in said
    assert "pickles are never loaded" in said
    assert all(name.endswith(".json") for name in hub.names())


def test_what_the_cache_holds_is_not_fetched_again(hub, flux1_folder):
    hub.add("maker/model", flux1_folder)
    fetch("maker/model", ("vae",))
    hub.fetched.clear()
    folder = fetch("maker/model").folder
    assert "vae/diffusion_pytorch_model.safetensors" not in hub.names()
    assert snapshot(folder) == needed(flux1_folder)
    hub.fetched.clear()
    fetch("maker/model")
    assert hub.fetched == []


REFUSALS = {
    "forbidden": (
        (
            403,
            "GatedRepo",
            "Access to model maker/model is restricted and you are not in the authorized list. "
            "Visit https://huggingface.co/maker/model to ask for access.",
        ),
        r"Visit https://huggingface.co/maker/model to ask for access",
    ),
    "anonymous": (
        (401, "GatedRepo", "Access to model maker/model is restricted."),
        "/maker/model; then log in",
    ),
    "unknown": ((401, "RepoNotFound", "Repository not found"), "check the spelling, or log in with `hf auth"),
    "gone": (
        (404, "RepoNotFound", "Repository not found"),
        "check the spelling, or log in with `hf auth login`",
    ),
    "token": ((401, "", "Invalid credentials in Authorization header"), r"answers 401 (Invalid cred"),
    "broken": ((500, "", "Internal Error - We're working hard"), "answers 500 (Internal Error"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_what_the_hub_refuses_is_said_in_one_line(hub, line, name):
    hub.refusals["maker/model"], says = REFUSALS[name]
    said = line("generate", "--model-path", "maker/model", "--prompt", "a")
    assert says in said
    assert "Request" not in said
    assert said.count("ask for access") == ("Gated" in hub.refusals["maker/model"][1])
    assert said.startswith("jaxspd: maker/model ")


@pytest.mark.parametrize("parts", [None, ()])
def test_files_that_are_gated_alone(hub, flux1_folder, line, parts):
    """The hub lists a gated repository's files to all."""
    hub.add("maker/model", flux1_folder)
    refusal, says = REFUSALS["forbidden"]
    hub.refusals["maker/model/resolve"] = refusal
    with pytest.raises(UsageError, match=says):
        fetch("maker/model", parts)
    hub.refusals.clear()
    fetch("maker/model", parts)
    hub.refusals["maker/model/resolve"] = refusal
    fetch("maker/model", parts)


def test_a_repository_that_is_no_pipeline(hub, line):
    hub.add("maker/model", {"config.json": b"{}", "model.safetensors": b""})
    said = line("plan", "--model-path", "maker/model")
    assert "holds no model_index.json; give the hub id of a pipeline" in said
    assert hub.names() == set()


def test_no_network(hub, line):
    hub.stop()
    said = line("plan", "--model-path", "maker/model")
    assert "is no local folder and cannot be downloaded: the hub cannot be reached" in said
    assert "check the network" in said


def test_an_id_that_cannot_be(hub, line):
    assert "maker/mo--del" in line("plan", "--model-path", "maker/mo--del")
    assert hub.asked == []


def test_downloads_that_are_switched_off(hub, line, monkeypatch):
    offline(monkeypatch)
    assert "unset HF_HUB_OFFLINE" in line("plan", "--model-path", "maker/model")
    assert hub.asked == []


@pytest.mark.parametrize("cause", ["offline", "network", "gated"])
def test_a_cache_that_diffusers_filled_suffices(hub, klein_folder, monkeypatch, cause):
    hub.add("maker/model", klein_folder, **dict.fromkeys(CLUTTER, b"clutter"))
    DiffusionPipeline.download("maker/model")
    assert not hub.names() & {"LICENSE.txt", "gallery.json"}
    hub.fetched.clear()
    if cause == "offline":
        offline(monkeypatch)
    elif cause == "network":
        hub.stop()
        huggingface_hub.close_session()
    else:
        hub.refusals["maker/model"] = REFUSALS["forbidden"][0]
    family = fetch("maker/model")
    components(family).check()
    assert components(family).encode_text(["a lake"])["text"].shape[0] == 1
    assert hub.fetched == []


@pytest.mark.parametrize(
    "lost",
    [
        "vae/diffusion_pytorch_model.safetensors",
        "transformer/diffusion_pytorch_model.safetensors",
        "text_encoder/model.safetensors",
        "scheduler/scheduler_config.json",
    ],
)
def test_a_cache_that_lacks_what_is_needed(hub, klein_folder, monkeypatch, lost):
    hub.add("maker/model", klein_folder)
    (fetch("maker/model").folder / lost).unlink()
    offline(monkeypatch)
    named = "scheduler" if lost.startswith("scheduler") else lost
    with pytest.raises(UsageError, match=rf"cache lacks {named} of maker/model: .* unset HF_HUB_OFFLINE"):
        fetch("maker/model")
    if named == lost:
        fetch("maker/model", ())  # which needs no weights


@pytest.fixture
def sharded(flux1_folder, tmp_path):
    from diffusers import FluxTransformer2DModel

    folder = shutil.copytree(flux1_folder, tmp_path / "sharded")
    model = FluxTransformer2DModel.from_pretrained(folder / "transformer")
    shutil.rmtree(folder / "transformer")
    model.save_pretrained(folder / "transformer", max_shard_size="20KB")
    return folder


def test_an_index_says_which_shards_come(hub, sharded, monkeypatch):
    shards = {f"transformer/{path.name}" for path in weight_files(sharded / "transformer")}
    assert len(shards) > 2
    old = "transformer/diffusion_pytorch_model-00001-of-00099.safetensors"
    hub.add("maker/model", sharded, **{old: b"of another release"})
    folder = fetch("maker/model").folder
    assert {name for name in hub.names() if "transformer/diffusion" in name} == shards | {
        "transformer/diffusion_pytorch_model.safetensors.index.json"
    }
    (folder / min(shards)).unlink()
    offline(monkeypatch)
    with pytest.raises(UsageError, match=f"lacks {min(shards)} of"):
        fetch("maker/model")


def test_a_shard_that_the_repository_lacks(hub, sharded):
    lost = min(weight_files(sharded / "transformer"))
    lost.unlink()
    hub.add("maker/model", sharded)
    with pytest.raises(UsageError, match=rf"maker/model lacks transformer/{lost.name}; its repository"):
        fetch("maker/model")


@pytest.fixture
def two_revisions(hub, schnell_folder, flux1_folder):
    """One repository whose branches hold different models."""
    hub.add("maker/model", schnell_folder)
    return hub.add("maker/model", flux1_folder, branch="v2")


def test_a_revision_is_fetched_kept_and_repeated(hub, two_revisions, tmp_path, capsys, monkeypatch):
    command = ["generate", "--output-path", str(tmp_path), "--output-file-name"]
    flags = [*SMALL, "--prompt", "a", "--model-path", "maker/model", "--revision", "v2"]
    assert main([*command, "one", *flags]) == 0
    request = json.loads(Image.open(tmp_path / "one.png").text["jaxspd"])
    assert (request["model_path"], request["revision"]) == ("maker/model", "v2")
    assert main([*command, "two", "--config", str(tmp_path / "one.png")]) == 0
    pictures = [np.asarray(Image.open(tmp_path / f"{name}.png")) for name in ("one", "two")]
    np.testing.assert_array_equal(*pictures)
    assert not any(word.startswith("main/") for word in hub.fetched)
    # Another model than the picture's takes no revision from it.
    capsys.readouterr()
    other = ["--config", str(tmp_path / "one.png"), "--model-path", "maker/other"]
    assert main([*command, "three", *other]) == 2
    assert "v2" not in capsys.readouterr().err
    # Offline, the cache knows the revision by name, by commit, and no other.
    offline(monkeypatch)
    assert fetch("maker/model", (), "v2").distilled is False
    assert fetch("maker/model", (), two_revisions.sha).distilled is False
    with pytest.raises(UsageError, match="unset HF_HUB_OFFLINE"):
        fetch("maker/model", ())


def test_every_command_takes_a_revision(hub, two_revisions, tmp_path, capsys):
    assert main(["plan", "--model-path", "maker/model", "--revision", two_revisions.sha, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["stages"][-1]["end"] == 50
    assert main(["plan", "--model-path", "maker/model", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["stages"][-1]["end"] == 4
    shared = ["--model-path", "maker/model", "--revision", "v2", "--output-path"]
    images = str(drawings(tmp_path / "images"))
    measure = ["--images", images, "--height", "64", "--width", "96"]
    assert main(["calibrate", *shared, str(tmp_path / "spectrum.json"), *measure]) == 0
    assert main(["convert", *shared, str(tmp_path / "new")]) == 0
    assert open_family(tmp_path / "new").distilled is False


def test_a_revision_that_is_not_there(hub, two_revisions, line):
    said = line("plan", "--model-path", "maker/model", "--revision", "v3")
    assert "it has no revision 'v3'; give one of its branches, tags or commits" in said


def test_what_has_no_revisions(hub, flux1_folder, line):
    assert "leave revision out" in line("plan", "--model-path", flux1_folder, "--revision", "v2")
    assert "the demo has no revisions" in line("plan", "--revision", "v2")
    assert "leave --revision out" in line("plan", "--family", "flux1", "--revision", "v2")
