"""`jaxspd calibrate` as people run it: files in, spectrum and plot out, or one line that says why not."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from training import landscapes

from jaxspd.calibrate import calibrate, fit, read_picture, read_video
from jaxspd.cli import main
from jaxspd.components.pipeline import Components
from jaxspd.families import open_family
from jaxspd.media.video import write_mp4
from jaxspd.spectral.calibration import PowerMeter, fit_spectrum
from jaxspd.spectral.spectrum import Spectrum
from tests.components import components

SMALL = ["--height", "64", "--width", "96"]


def drawings(folder, count=3, size=128):
    folder.mkdir(parents=True, exist_ok=True)
    for seed in range(count):
        Image.fromarray(landscapes.sample(seed, size)[0]).save(folder / f"{seed}.png")
    return folder


def videos(folder, count=2, frames=9):
    """Clips that pan across a drawing."""
    folder.mkdir(parents=True, exist_ok=True)
    for seed in range(count):
        image = landscapes.sample(seed, 128)[0]
        pan = np.stack([image[:96, number : number + 96] for number in range(frames)])
        write_mp4(folder / f"{seed}.mp4", pan, 16, "")
    return folder


def run(model, images, out, *flags):
    return main(
        ["calibrate", "--model-path", str(model), "--images", str(images), "--output-path", str(out), *flags]
    )


@pytest.fixture
def out(tmp_path):
    """Where a run writes: a folder with nothing else in it."""
    (tmp_path / "out").mkdir()
    return tmp_path / "out" / "measured.json"


def refusal(capsys, out):
    """The one line of a refusal that wrote nothing."""
    captured = capsys.readouterr()
    assert captured.out == ""
    assert not list(out.parent.glob("*"))
    (line,) = captured.err.splitlines()
    return line


def test_pictures_become_a_spectrum_and_a_plot(flux1_folder, tmp_path, out, capsys):
    images = drawings(tmp_path / "images")
    drawings(images / "below", count=2)
    (images / "0.txt").write_text("a caption, which is no picture")
    assert run(flux1_folder, images, out, *SMALL) == 0
    values = json.loads(out.read_text())
    family = open_family(flux1_folder)
    # The same by hand: files one by one, all at once into the meter.
    files = [*sorted(images.glob("*.png")), *sorted(images.glob("below/*.png"))]
    pixels = np.stack([fit(Image.open(path), (64, 96)) for path in files])
    meter = PowerMeter((8, 12))
    meter.add(components(family).encode(pixels[:, None]))
    wanted = fit_spectrum(meter.power())
    assert Spectrum.from_file(out).amplitude == pytest.approx(wanted.spectrum.amplitude, rel=1e-6)
    assert Spectrum.from_file(out).exponent == pytest.approx(wanted.spectrum.exponent, rel=1e-6)
    assert values["rings"]["omega"] == [1, 2, 3, 4]
    assert values["rings"]["power"] == pytest.approx(wanted.power, rel=1e-6)
    facts = {"family": "flux1", "height": 64, "width": 96, "num_frames": 1, "latent": [8, 12], "files": 5}
    assert {name: values[name] for name in facts} == facts
    with Image.open(out.with_suffix(".plot.png")) as plot:
        assert plot.format == "PNG"
        colours = np.asarray(plot.convert("RGB")).reshape(-1, 3)
    assert len(np.unique(colours, axis=0)) > 50  # marks, lines and letters
    assert sorted(path.name for path in out.parent.iterdir()) == ["measured.json", "measured.plot.png"]
    captured = capsys.readouterr()
    printed = captured.out
    assert f"A = {wanted.spectrum.amplitude:.6f}, β = {wanted.spectrum.exponent:.6f}" in printed
    assert "5 files" in printed
    for delta in (0.01, 0.05, 0.1, 0.2):
        assert f"σ = {wanted.spectrum.activation_time(2, delta):.6f} for δ = {delta}" in printed
    assert "5/5" in captured.err
    # `plan` goes by it.
    flags = ["--height", "64", "--width", "96", "--num-inference-steps", "40", "--spectrum", str(out)]
    flags += ["--progressive-mode", "dct", "--progressive-delta", "0.3", "--json"]
    assert main(["plan", "--model-path", str(flux1_folder), *flags]) == 0
    threshold = wanted.spectrum.activation_time(2, 0.3)
    assert json.loads(capsys.readouterr().out)["stages"][1]["start"] == int(
        np.argmax(family.sigmas(40, 24) <= threshold)
    )


def test_the_result_is_the_checkpoint_s_own_once_it_lies_there(flux1_folder, tmp_path):
    result = calibrate(
        str(flux1_folder),
        images=drawings(tmp_path / "images", 2),
        output_path=tmp_path / "spectrum.json",
        height=64,
        width=64,
    )
    copy = tmp_path / "model"
    copy.mkdir()
    for part in flux1_folder.iterdir():
        (copy / part.name).symlink_to(part)
    assert open_family(copy).spectrum != result.calibration.spectrum
    (copy / "spectrum.json").write_bytes(result.path.read_bytes())
    assert open_family(copy).spectrum == result.calibration.spectrum


def test_a_second_run_gives_the_same_and_does_not_measure_its_plot(flux1_folder, tmp_path, monkeypatch):
    images = drawings(tmp_path / "images", 2)
    monkeypatch.chdir(images)
    command = ["calibrate", "--model-path", str(flux1_folder), "--images", str(images), *SMALL]
    assert main(command) == 0
    first = (images / "spectrum.json").read_text()
    assert (images / "spectrum.plot.png").exists()
    assert main(command) == 0
    assert (images / "spectrum.json").read_text() == first


def test_videos_become_a_spectrum(wan_folder, tmp_path, out, capsys):
    clips = videos(tmp_path / "clips")
    drawings(clips, 3)
    write_mp4(clips / "short.mp4", np.zeros((4, 96, 96, 3), np.uint8), 16, "")
    assert run(wan_folder, clips, out, "--height", "64", "--width", "64", "--num-frames", "5") == 0
    values = json.loads(out.read_text())
    assert [values[name] for name in ("family", "num_frames", "latent", "files")] == ["wan", 5, [8, 8], 2]
    meter = PowerMeter((8, 8))
    opened = components(wan_folder)
    for number in range(2):
        latents = opened.encode(read_video(clips / f"{number}.mp4", (64, 64), 5)[None])
        assert latents.shape == (1, 4, 2, 8, 8)
        meter.add(latents)
    assert values["amplitude"] == pytest.approx(fit_spectrum(meter.power()).spectrum.amplitude, rel=1e-6)
    errors = capsys.readouterr().err
    assert "Wan 2.1 is measured on videos; 3 pictures are left out" in errors
    assert f"{clips / 'short.mp4'} is left out: it has 4 of 5 frames" in errors


def test_seventeen_frames_by_default(wan_folder, tmp_path, out):
    assert run(wan_folder, videos(tmp_path / "clips", 1, 18), out, "--height", "32", "--width", "32") == 0
    assert json.loads(out.read_text())["num_frames"] == 17


def test_a_model_of_videos_measures_pictures_as_single_frames(wan_folder, tmp_path, out):
    images = drawings(tmp_path / "images")
    assert run(wan_folder, images, out, "--height", "64", "--width", "64", "--num-frames", "1") == 0
    assert json.loads(out.read_text())["files"] == 3


def test_unreadable_files_are_named_and_passed_over(flux1_folder, tmp_path, out, capsys):
    images = drawings(tmp_path / "images")
    (images / "text.png").write_text("no picture")
    whole = (images / "0.png").read_bytes()
    (images / "cut.png").write_bytes(whole[: len(whole) // 2])
    Image.new("RGB", (90, 200)).save(images / "narrow.jpg")
    assert run(flux1_folder, images, out, *SMALL) == 0
    assert json.loads(out.read_text())["files"] == 3
    errors = capsys.readouterr().err
    for name in ("text.png", "cut.png", "narrow.jpg"):
        assert errors.count(str(images / name)) == (2 if name == "text.png" else 1)  # Pillow names it, too
        assert f"{images / name} is left out: " in errors
    assert "its 90×200 pixels are less than 96×64" in errors


def test_all_files_unreadable_is_refused(flux1_folder, tmp_path, out, capsys):
    images = tmp_path / "images"
    images.mkdir()
    (images / "text.png").write_text("no picture")
    assert run(flux1_folder, images, out, *SMALL) == 2
    assert capsys.readouterr().err.splitlines()[-1] == (
        f"jaxspd: none of the 1 files in {images} can be used"
    )
    assert not list(out.parent.iterdir())


@pytest.fixture
def nothing_is_encoded(monkeypatch):
    def encode(self, pixels):
        raise AssertionError("encoding began")

    monkeypatch.setattr(Components, "encode", encode)


@pytest.mark.usefixtures("nothing_is_encoded")
class TestRefusedBeforeAnythingIsEncoded:
    def test_an_empty_folder(self, flux1_folder, tmp_path, out, capsys):
        (tmp_path / "images").mkdir()
        assert run(flux1_folder, tmp_path / "images", out, *SMALL) == 2
        assert "holds no pictures" in refusal(capsys, out)

    def test_no_folder(self, flux1_folder, tmp_path, out, capsys):
        assert run(flux1_folder, tmp_path / "images", out, *SMALL) == 2
        assert "images is no folder" in refusal(capsys, out)

    def test_pictures_alone_for_a_model_of_videos(self, wan_folder, tmp_path, out, capsys):
        assert run(wan_folder, drawings(tmp_path / "images", 1), out, *SMALL) == 2
        assert "use --num-frames 1" in refusal(capsys, out)

    @pytest.mark.parametrize(
        ("flags", "reason"),
        [
            (["--height", "60", "--width", "64"], "multiples of 16"),
            (["--height", "16", "--width", "64"], "latent grid"),
            (["--height", "-64"], "height must be 1 or more"),
            (["--num-frames", "5"], "makes pictures"),
            (["--num-frames", "0"], "--num-frames must be 1 or more"),
            (["--height", "tall"], "invalid int value"),
        ],
    )
    def test_an_impossible_size(self, flux1_folder, tmp_path, out, capsys, flags, reason):
        assert run(flux1_folder, drawings(tmp_path / "images", 1), out, *flags) == 2
        assert reason in refusal(capsys, out)

    def test_a_missing_output_folder(self, flux1_folder, tmp_path, out, capsys):
        target = out.parent / "missing" / "spectrum.json"
        assert run(flux1_folder, drawings(tmp_path / "images", 1), target, *SMALL) == 2
        assert "missing is no folder" in refusal(capsys, out)

    def test_an_unwritable_output_folder(self, flux1_folder, tmp_path, out, capsys, monkeypatch):
        # Rights do not bind the superuser, as whom tests may run.
        monkeypatch.setattr(os, "access", lambda path, mode: not str(path).endswith("/out"))
        assert run(flux1_folder, drawings(tmp_path / "images", 1), out, *SMALL) == 2
        assert "cannot be written" in refusal(capsys, out)

    @pytest.mark.parametrize("name", ["spectrum.txt", "spectrum"])
    def test_a_name_that_is_not_json(self, flux1_folder, tmp_path, out, capsys, name):
        assert run(flux1_folder, drawings(tmp_path / "images", 1), out.parent / name, *SMALL) == 2
        assert "ends in .json" in refusal(capsys, out)

    @pytest.mark.parametrize("name", ["a.json", "a.plot.png"])
    def test_a_folder_in_the_way(self, flux1_folder, tmp_path, capsys, name):
        (tmp_path / name).mkdir()
        assert run(flux1_folder, drawings(tmp_path / "images", 1), tmp_path / "a.json", *SMALL) == 2
        assert f"{name} is a folder" in capsys.readouterr().err


def test_a_rising_spectrum_is_refused(flux1_folder, tmp_path, out, capsys, monkeypatch):
    """It gives no step from which the coarse grid misses something."""
    noise = np.random.default_rng(0).standard_normal((1, 4, 8, 14))
    rising = np.diff(noise, n=2).astype(np.float32)
    monkeypatch.setattr(Components, "encode", lambda self, pixels: rising)
    assert run(flux1_folder, drawings(tmp_path / "images", 1), out, *SMALL) == 2
    assert "does not fall with frequency" in capsys.readouterr().err.splitlines()[-1]
    assert not list(out.parent.iterdir())


@pytest.mark.parametrize("culprit", ["draw", "json.dumps", "os.replace"])
def test_a_failure_while_writing_leaves_nothing(flux1_folder, tmp_path, out, capsys, monkeypatch, culprit):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    images = drawings(tmp_path / "images", 1)
    monkeypatch.setattr(f"jaxspd.calibrate.{culprit}", full)
    assert run(flux1_folder, images, out, *SMALL) == 2
    assert "cannot be written (No space left on device)" in capsys.readouterr().err.splitlines()[-1]
    assert not list(out.parent.iterdir())


def test_the_middle_is_cut_out_and_made_smaller():
    """A 2:1 picture, of which a square takes the middle half."""
    wide = np.zeros((64, 128, 3), np.uint8)
    wide[:, 32:96] = (10, 200, 30)
    fitted = fit(Image.fromarray(wide), (32, 32))
    assert fitted.shape == (32, 32, 3)
    assert (fitted[:, 3:-3] == (10, 200, 30)).all()  # the filter reaches beyond the cut
    grey = fit(Image.fromarray(wide[..., 1]), (64, 128))
    assert (grey == wide[..., 1:2]).all()


def test_pictures_are_upright(tmp_path):
    image = Image.fromarray(landscapes.sample(0, 64)[0])
    turned = Image.Exif()
    turned[0x0112] = 6  # to be turned a quarter clockwise
    image.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned.png", exif=turned)
    assert (read_picture(tmp_path / "turned.png", (64, 64))[0] == np.asarray(image)).all()


def test_help_imports_neither_jax_nor_torch():
    code = (
        "import sys\n"
        "from jaxspd.cli import main\n"
        "try:\n    main(['calibrate', '--help'])\n"
        "except SystemExit as end:\n    assert end.code == 0\n"
        "heavy = {'jax', 'torch', 'numpy', 'matplotlib', 'scipy'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--images" in done.stdout


def test_drawings_are_written_by_their_seeds(tmp_path, monkeypatch):
    flags = ["--out", str(tmp_path / "drawn"), "--count", "2", "--first-seed", "11"]
    monkeypatch.setattr(sys, "argv", ["landscapes", *flags])
    landscapes.main()
    files = sorted((tmp_path / "drawn").iterdir())
    assert [path.name for path in files] == ["000011.png", "000012.png"]
    assert (np.asarray(Image.open(files[1])) == landscapes.sample(12)[0]).all()
