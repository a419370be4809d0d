"""Pictures and videos on disk: what was written is read back, and nothing is left half done."""

import json
import os
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from jaxspd.errors import UsageError
from jaxspd.media import output, video
from jaxspd.media.metadata import read_request
from jaxspd.media.output import (
    FORMATS,
    check_writable,
    output_format,
    output_paths,
    poster_path,
    write_output,
)
from jaxspd.request_files import read_config_file

LONG = 'mountains at dawn, 山と湖, gölden höur 🌄; "quoted" \\ and\na second line. ' * 100
REQUEST = {"prompt": LONG, "seed": 42, "guidance_scale": 5.0, "fps": 16}
NAMES = {"png": "a.png", "mp4": "a.mp4", "gif": "a.gif", "frames": "a"}
COLOURS = [
    (255, 0, 0),
    (0, 255, 0),
    (0, 0, 255),
    (128, 128, 128),
    (255, 255, 255),
    (0, 0, 0),
    (230, 170, 60),
    (40, 90, 160),
]


def patches(count, height=64, width=96):
    """Frames [count, height, width, 3]: eight flat colours side by side, and a growing bar below."""
    row = np.array(COLOURS, np.uint8)[np.arange(width) * len(COLOURS) // width]
    frames = np.broadcast_to(row, (count, height, width, 3)).copy()
    for number in range(count):
        frames[number, -8:, : number + 1] = (255, 0, 255)
    return frames


def written(folder, kind, frames, fps=16.0, request=REQUEST):
    path = folder / NAMES[kind]
    write_output(path, frames, request, fps)
    return path


def decoded(path):
    """Frames of an MP4 [F, H, W, 3], uint8, by FFmpeg's conversion, which follows the file's tags."""
    with av.open(str(path)) as file:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)])


def played(path):
    """Frames [F, H, W, 3] of a GIF and each one's milliseconds."""
    with Image.open(path) as image:
        frames, durations = [], []
        for number in range(image.n_frames):
            image.seek(number)
            durations.append(image.info["duration"])
            frames.append(np.asarray(image.convert("RGB")))
    return np.stack(frames), durations


def test_a_png_holds_exactly_its_pixels_and_request(tmp_path):
    frames = np.random.default_rng(0).integers(0, 256, (1, 48, 32, 3), np.uint8)
    path = written(tmp_path, "png", frames)
    with Image.open(path) as image:
        assert (np.asarray(image) == frames[0]).all()
        assert json.loads(image.info["jaxspd"]) == REQUEST
    assert [file.name for file in tmp_path.iterdir()] == ["a.png"]


@pytest.mark.parametrize(
    ("height", "width", "pix_fmt"), [(64, 96, "yuv420p"), (63, 95, "yuv444p"), (64, 95, "yuv444p")]
)
def test_an_mp4_is_h264_of_the_right_size_and_rate(tmp_path, height, width, pix_fmt):
    path = written(tmp_path, "mp4", patches(9, height, width))
    with av.open(str(path)) as file:
        (stream,) = file.streams
        codec = stream.codec_context
        assert (codec.name, codec.pix_fmt) == ("h264", pix_fmt)
        assert (stream.frames, codec.height, codec.width) == (9, height, width)
        assert (stream.average_rate, stream.duration * stream.time_base) == (16, 9 / 16)
        # BT.709 in limited range, which is how the pixels were converted.
        assert [codec.color_primaries, codec.color_trc, codec.colorspace, codec.color_range] == [1, 1, 1, 1]
    assert decoded(path).shape == (9, height, width, 3)
    content = path.read_bytes()
    assert content.index(b"moov") < content.index(b"mdat")  # the index first


def test_a_fractional_rate(tmp_path):
    path = written(tmp_path, "mp4", patches(5), fps=12.5)
    with av.open(str(path)) as file:
        assert file.streams[0].average_rate == 12.5


@pytest.mark.parametrize("kind", ["mp4", "gif"])
def test_colours_survive(tmp_path, kind):
    frames = patches(5)
    path = written(tmp_path, kind, frames)
    seen = decoded(path) if kind == "mp4" else played(path)[0]
    # Amid each patch, away from the edges where neighbours share a chroma sample.
    centres = (np.arange(8) * 12 + 6, slice(8, 48))
    difference = seen[:, centres[1], centres[0]].astype(int) - frames[:, centres[1], centres[0]]
    assert abs(difference).max() <= 6


def test_chroma_is_not_shifted(tmp_path):
    """A patch of colour begins where it should: its edge is as steep on the left as on the right."""
    frames = np.full((1, 64, 64, 3), 128, np.uint8)
    frames[:, :, 22:42] = (200, 100, 60)
    planes = video._yuv(frames[0], "yuv420p").to_ndarray()
    blue = planes[64:80].reshape(32, 32)[16].astype(int)
    assert (blue == blue[::-1]).all()


@pytest.mark.parametrize(("count", "fps"), [(81, 16), (49, 24), (10, 12.5)])
def test_a_gif_lasts_as_long_as_the_video(tmp_path, count, fps):
    path = written(tmp_path, "gif", patches(count), fps)
    frames, durations = played(path)
    assert len(frames) == count
    assert sum(durations) == pytest.approx(1000 * count / fps, rel=0.01)
    assert max(durations) - min(durations) <= 10
    with Image.open(path) as image:
        assert image.info["loop"] == 0


def test_a_gif_of_equal_frames_lasts_as_long(tmp_path):
    _, durations = played(written(tmp_path, "gif", np.repeat(patches(1), 16, axis=0)))
    assert sum(durations) == 1000


def test_frames_are_a_folder_of_pngs(tmp_path):
    frames = patches(12)
    folder = tmp_path / "new" / "a"
    write_output(folder, frames, REQUEST)
    files = sorted(folder.iterdir())
    assert [file.name for file in files] == [f"{number:04d}.png" for number in range(12)]
    for file, pixels in zip(files, frames, strict=True):
        with Image.open(file) as image:
            assert (np.asarray(image) == pixels).all()
        assert read_request(file) == REQUEST


def test_an_mp4_has_its_first_frame_as_poster(tmp_path):
    frames = patches(5)
    path = written(tmp_path, "mp4", frames)
    assert sorted(tmp_path.iterdir()) == [path, tmp_path / "a.poster.png"]
    with Image.open(poster_path(path)) as image:
        assert (np.asarray(image) == frames[0]).all()
    assert read_request(poster_path(path)) == REQUEST


@pytest.mark.parametrize("kind", FORMATS)
def test_the_request_is_read_back(tmp_path, kind):
    path = written(tmp_path, kind, patches(1 if kind == "png" else 3))
    assert read_request(path) == REQUEST
    assert read_config_file(path) == REQUEST


@pytest.mark.parametrize("kind", FORMATS)
def test_equal_input_gives_equal_bytes(tmp_path, kind):
    noise = np.random.default_rng(0).normal(0, 8, (64, 96, 1))
    frames = np.clip(patches(9) + noise, 0, 255).astype(np.uint8)[: 1 if kind == "png" else 9]
    contents = []
    for again in "ab":
        path = written(tmp_path / again, kind, frames)
        files = sorted(path.iterdir()) if path.is_dir() else [path]
        contents.append([file.read_bytes() for file in files])
    assert contents[0] == contents[1]


@pytest.mark.parametrize("kind", FORMATS)
def test_an_array_laid_out_otherwise(tmp_path, kind):
    """A decoder may return a transposed view."""
    frames = patches(1 if kind == "png" else 3)
    view = np.ascontiguousarray(frames.transpose(0, 3, 1, 2)).transpose(0, 2, 3, 1)
    paths = [written(tmp_path / name, kind, array) for name, array in (("a", frames), ("b", view))]
    first, second = (path / "0002.png" if kind == "frames" else path for path in paths)
    assert first.read_bytes() == second.read_bytes()


@pytest.mark.skipif(os.name != "posix", reason="file modes are POSIX's")
@pytest.mark.parametrize("kind", FORMATS)
def test_files_have_the_usual_mode(tmp_path, kind):
    path = written(tmp_path, kind, patches(1 if kind == "png" else 3))
    plain = tmp_path / "plain"
    plain.mkdir() if kind == "frames" else plain.touch()
    assert path.stat().st_mode == plain.stat().st_mode


def test_an_output_replaces_an_earlier_one(tmp_path):
    for count in (3, 5):
        path = written(tmp_path, "mp4", patches(count))
    assert len(decoded(path)) == 5
    (tmp_path / "a").mkdir()
    check_writable([tmp_path / "a"])  # an empty folder holds nothing to lose
    assert len(list(written(tmp_path, "frames", patches(3)).iterdir())) == 3


# What each encoder calls for every frame, or for every file.
INNER = {
    "png": (output, "write_png"),
    "mp4": (video, "_yuv"),
    "gif": (Image.Image, "quantize"),
    "frames": (output, "write_png"),
}


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("encoder"), OSError(28, "disk full")])
def test_nothing_is_left_behind(tmp_path, monkeypatch, kind, error):
    module, name = INNER[kind]
    inner, calls = getattr(module, name), []

    def fails_midway(*arguments, **keywords):
        calls.append(0)
        if len(calls) == (1 if kind == "png" else 3):
            raise error
        return inner(*arguments, **keywords)

    monkeypatch.setattr(module, name, fails_midway)
    with pytest.raises(UsageError if isinstance(error, OSError) else type(error)) as raised:
        written(tmp_path, kind, patches(1 if kind == "png" else 5))
    if isinstance(error, OSError):
        assert "cannot be written (disk full)" in str(raised.value)
    assert list(tmp_path.iterdir()) == []


def test_a_failing_poster_leaves_no_video(tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(output, "write_png", interrupted)
    with pytest.raises(KeyboardInterrupt):
        written(tmp_path, "mp4", patches(3))
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_vanishes_into_a_file(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="cannot be written"):
        write_output(tmp_path / "file" / "a.png", patches(1), REQUEST)


@pytest.mark.parametrize(
    ("asked", "name", "frames", "kind"),
    [
        (None, None, 1, "png"),
        (None, None, 81, "mp4"),
        (None, "a", 81, "mp4"),
        (None, "a.gif", 81, "gif"),
        (None, "a.PNG", 1, "png"),
        ("mp4", "a.MP4", 81, "mp4"),
        ("gif", "a", 81, "gif"),
        ("frames", "a", 81, "frames"),
        ("frames", None, 1, "frames"),
    ],
)
def test_the_format(asked, name, frames, kind):
    assert output_format(asked, name, frames) == kind


@pytest.mark.parametrize(
    ("asked", "name", "frames", "says"),
    [
        ("avi", None, 81, "use one of png, mp4, gif, frames"),
        (None, "a.avi", 81, "end it in .png, .mp4 or .gif"),
        (None, "a.frames", 81, "end it in .png, .mp4 or .gif"),
        ("gif", "a.mp4", 81, "leave .mp4 out or change output_format"),
        ("frames", "a.png", 81, "leave .png out or change output_format"),
        ("png", None, 81, "write mp4, gif or frames"),
        (None, "a.png", 81, "write mp4, gif or frames"),
        ("mp4", None, 1, "write png instead of mp4"),
        (None, "a.gif", 1, "write png instead of gif"),
    ],
)
def test_formats_that_do_not_fit(asked, name, frames, says):
    with pytest.raises(UsageError, match=says):
        output_format(asked, name, frames)


@pytest.mark.parametrize("kind", FORMATS)
def test_paths(kind):
    ending = "" if kind == "frames" else f".{kind}"
    one, two = {**REQUEST, "prompt": "A lake, at dawn!"}, {**REQUEST, "prompt": "山"}
    name = f"lake{ending}"
    assert output_paths("out", name, [one], kind) == [Path("out") / name]
    assert output_paths("out", "lake", [one, two], kind) == [Path(f"out/lake_{i}{ending}") for i in (0, 1)]
    default = output_paths("out", None, [one, two, {**one, "seed": 7}], kind)
    assert default[0].name.startswith("a-lake-at-dawn_42_")
    assert default[1].name.startswith("山_42_")
    assert len(set(default)) == 3
    assert all(path.suffix == ending for path in default)


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "/a", "a/"])
def test_names_that_are_no_plain_file_names(name):
    with pytest.raises(UsageError, match="plain file name"):
        output_paths("out", name, [REQUEST], "frames")


def test_what_cannot_be_written_is_refused_beforehand(tmp_path):
    for name in ("a.png", "b.poster.png", "full"):
        (tmp_path / name).mkdir()
    (tmp_path / "full" / "0000.png").touch()
    (tmp_path / "file").touch()
    for name, says in {
        "a.png": "a.png is a folder; choose another output_file_name",
        "b.mp4": "b.poster.png is a folder; choose another output_file_name",
        "full": "full exists already; choose another output_file_name",
        "file": "file exists already; choose another output_file_name",
        "file/a.gif": "file is a file, not a folder; choose another output_path",
    }.items():
        with pytest.raises(UsageError, match=says):
            check_writable([tmp_path / name])
    before = sorted(tmp_path.rglob("*"))
    check_writable([tmp_path / "a.mp4", tmp_path / "new" / "folder" / "c", tmp_path / "d.gif"])
    assert sorted(tmp_path.rglob("*")) == before


def test_files_of_other_programs(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    Image.new("RGB", (4, 4)).save(tmp_path / "a.gif", comment="made elsewhere")
    Image.new("RGB", (4, 4)).save(tmp_path / "b.gif", comment="[1]")
    video.write_mp4(tmp_path / "a.mp4", patches(2), 16, "")
    (tmp_path / "folder").mkdir()
    (tmp_path / "a.txt").touch()
    for path in tmp_path.iterdir():
        with pytest.raises(UsageError, match="was not written by jaxspd"):
            read_request(path)


@pytest.mark.parametrize("kind", ["png", "mp4", "gif"])
def test_damaged_and_missing_files(tmp_path, kind):
    path = tmp_path / NAMES[kind]
    with pytest.raises(UsageError, match=r"cannot read the parameters in .* \(.+\)") as missing:
        read_request(path)
    path.write_bytes(b"not at all")
    with pytest.raises(UsageError, match=r"cannot read the parameters in .* \(.+\)") as damaged:
        read_request(path)
    assert "\n" not in f"{missing.value}{damaged.value}"
