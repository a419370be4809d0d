"""`jaxspd calibrate` measures the power spectrum of a model's clean latents on a folder of files."""

import json
import logging
import os
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import av
import jax.numpy as jnp
import numpy as np
from PIL import Image, ImageOps
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from jaxspd.components.pipeline import Components
from jaxspd.convert.places import check_place
from jaxspd.errors import UsageError, first_line
from jaxspd.files import user_path
from jaxspd.hub import fetch
from jaxspd.request import SamplingParams
from jaxspd.resolving import frames, pixel_size
from jaxspd.spectral.calibration import Calibration, PowerMeter, fit_spectrum
from jaxspd.spectral.levels import Level, halvings

log = logging.getLogger("jaxspd")

# A file's ending says what it holds. Files with other endings, such as captions, are ignored.
PICTURES = {".png", ".jpg", ".jpeg", ".webp", ".avif", ".bmp", ".tif", ".tiff"}
VIDEOS = {".mp4", ".mov", ".mkv", ".webm", ".avi", ".m4v", ".gif"}
# How many frames of a video are measured by default. The spectrum is one over rows and columns, and hardly
# needs more frames.
DEFAULT_FRAMES = 17
# The δ for which the σ at which the grid grows is shown.
DELTAS = (0.01, 0.05, 0.1, 0.2)


@dataclass(frozen=True)
class Measurement:
    """A calibration, how it was measured, and where it was written."""

    family: str
    title: str
    height: int
    width: int
    num_frames: int
    latent: tuple[int, int]
    files: int
    calibration: Calibration
    path: Path

    @property
    def plot_path(self) -> Path:
        return plot_path(self.path)

    @property
    def coarse(self) -> Level:
        """The level of half the grid, on which a plan with one halving starts."""
        return halvings(self.latent, 1)[0]

    def transitions(self) -> dict[float, float]:
        """For each δ, the σ at which the grid grows from half to full size."""
        return {d: self.calibration.spectrum.activation_time(self.coarse.nyquist, d) for d in DELTAS}

    def report(self) -> dict:
        """The contents of the JSON file: the spectrum, and how it was measured."""
        spectrum = self.calibration.spectrum
        return {
            "amplitude": spectrum.amplitude,
            "exponent": spectrum.exponent,
            "family": self.family,
            "height": self.height,
            "width": self.width,
            "num_frames": self.num_frames,
            "latent": list(self.latent),
            "files": self.files,
            "rings": {"omega": list(self.calibration.omega), "power": list(self.calibration.power)},
        }

    def summary(self) -> str:
        """The measurement in lines for people to read."""
        spectrum, (h, w), (ch, cw) = self.calibration.spectrum, self.latent, self.coarse.latent
        length = f", {self.num_frames} frames" if self.num_frames > 1 else ""
        lines = [
            f"{self.title}, {self.width}×{self.height} pixels{length}, latent {h}×{w}: {self.files} files",
            f"A = {spectrum.amplitude:.6f}, β = {spectrum.exponent:.6f}",
            f"the grid grows from {ch}×{cw} at",
        ]
        lines += [f"  σ = {sigma:.6f} for δ = {delta:g}" for delta, sigma in self.transitions().items()]
        return "\n".join([*lines, f"wrote {self.path} and {self.plot_path}"])


def calibrate(
    model_path: str | None = None,
    *,
    images: str | Path,
    output_path: str | Path = "spectrum.json",
    height: int | None = None,
    width: int | None = None,
    num_frames: int | None = None,
    revision: str | None = None,
) -> Measurement:
    """Measures the spectrum of a model's latents on the files below the folder `images`.

    The spectrum is written to the JSON file `output_path`, and its plot to `plot_path`. `height` and `width`
    are in pixels. Picture models are measured on pictures. Video models are measured on videos, or on
    pictures if `num_frames` is 1. `revision` is a hub id's branch, tag or commit. Raises UsageError, before
    anything is encoded, if something cannot be read, written or measured.
    """
    target, folder = user_path(output_path), user_path(images)
    check_target(target)
    family = fetch(model_path, (), revision)
    if num_frames is None and family.default_fps:
        num_frames = DEFAULT_FRAMES
    asked = SamplingParams(height=height, width=width, num_frames=num_frames)
    size, count = pixel_size(family, asked), frames(family, asked)
    latent = size[0] // family.pixels_per_latent, size[1] // family.pixels_per_latent
    halvings(latent, 1)  # refuses a grid that is too small to grow into
    files = find_files(folder, family, count, plot_path(target))
    # The weights are downloaded only after everything else has been checked.
    family = fetch(model_path, ("vae",), revision)
    meter = PowerMeter(latent)
    # The encoder works in float32, because its rounding would be measured too.
    components = Components(family, jnp.float32)
    with logging_redirect_tqdm([log]), tqdm(files, unit="file", file=sys.stderr) as bar:
        for pixels in readable_files(bar, size, count):
            meter.add(components.encode(pixels[None]))
    if not meter.samples:
        raise UsageError(f"none of the {len(files)} files in {folder} can be used")
    calibration = fit_spectrum(meter.power())
    if calibration.spectrum.exponent <= 0:
        raise UsageError(
            f"the latents' power does not fall with frequency (β = {calibration.spectrum.exponent:.3f}), as "
            f"that of natural pictures does; use other pictures"
        )
    result = Measurement(family.name, family.title, *size, count, latent, meter.samples, calibration, target)
    write(result)
    return result


def plot_path(target: Path) -> Path:
    """The path of the plot of the JSON file `target`. No picture of that name has the same path."""
    return target.with_suffix(".plot.png")


def check_target(target: Path) -> None:
    """Raises UsageError unless the JSON file `target` and its plot can be written. Creates nothing."""
    if target.suffix.lower() != ".json":
        raise UsageError(f"output_path names a file that ends in .json, not {target}")
    if not os.path.isdir(target.parent):
        raise UsageError(f"{target.parent} is no folder; create it or choose another output_path")
    for path in (target, plot_path(target)):
        check_place(path, "choose another output_path")
        if os.path.isdir(path):
            raise UsageError(f"{path} is a folder; choose another output_path")


def find_files(folder: Path, family, count: int, plot: Path) -> list[Path]:
    """The sorted files below `folder` to read samples of `count` frames from.

    They are videos, or pictures if `count` is 1. `plot` is never among them, as an earlier run may have left
    it there. A warning counts the files of the other kind. Raises UsageError if there are no files to read.
    """
    if not os.path.isdir(folder):
        raise UsageError(f"{folder} is no folder; give images, a folder of pictures or videos")
    kinds = {"pictures": PICTURES, "videos": VIDEOS}
    found: dict[str, list[Path]] = {kind: [] for kind in kinds}
    for path in sorted(folder.rglob("*")):
        for kind, endings in kinds.items():
            if path.suffix.lower() in endings and os.path.isfile(path) and path.resolve() != plot.resolve():
                found[kind].append(path)
    wanted, other = ("pictures", "videos") if count == 1 else ("videos", "pictures")
    if not os.access(folder, os.R_OK | os.X_OK):
        raise UsageError(f"{folder} cannot be read; change its permissions or give another folder of images")
    if not found[wanted]:
        cure = " (or use num_frames 1 to measure on pictures)" if count > 1 and found[other] else ""
        raise UsageError(f"{folder} holds no {wanted}, which {family.title} is measured on{cure}")
    if found[other]:
        log.warning(
            "%s is measured on %s; %d %s are left out", family.title, wanted, len(found[other]), other
        )
    return found[wanted]


def readable_files(paths, size: tuple[int, int], count: int) -> Iterator[np.ndarray]:
    """Yields the pixels `[count, H, W, 3]`, uint8, of each readable file. A warning names each other file."""
    for path in paths:
        try:
            pixels = read_picture(path, size) if count == 1 else read_video(path, size, count)
        except Exception as error:  # each format's reader raises its own
            line = first_line(error)
            log.warning("%s is left out: %s", path, line)
        else:
            yield pixels


def read_picture(path: Path, size: tuple[int, int]) -> np.ndarray:
    """The pixels `[1, H, W, 3]`, uint8, of a picture file, turned upright."""
    with Image.open(path) as image:
        return fit(ImageOps.exif_transpose(image), size)[None]


def read_video(path: Path, size: tuple[int, int], count: int) -> np.ndarray:
    """The pixels `[count, H, W, 3]`, uint8, of a video's first frames. Raises ValueError if it has fewer."""
    with av.open(str(path)) as file:
        pixels = [fit(frame.to_image(), size) for frame in islice(file.decode(video=0), count)]
    if len(pixels) < count:
        raise ValueError(f"it has {len(pixels)} of {count} frames")
    return np.stack(pixels)


def fit(image: Image.Image, size: tuple[int, int]) -> np.ndarray:
    """`image` cropped about its centre to the shape of `size` `(H, W)`, and shrunk to it: `[H, W, 3]`, uint8.

    Raises ValueError if the image would have to be enlarged. The detail that it lacks would otherwise count
    as missing from all pictures.
    """
    height, width = size
    if image.width < width or image.height < height:
        raise ValueError(f"its {image.width}×{image.height} pixels are less than {width}×{height}")
    fitted = ImageOps.fit(image.convert("RGB"), (width, height), Image.Resampling.LANCZOS)
    return np.asarray(fitted)


def write(result: Measurement) -> None:
    """Writes the JSON file and the plot of `result`, each whole or not at all."""
    path = result.path
    try:
        # The folder is removed whatever happens, so an interrupt leaves nothing behind either.
        with tempfile.TemporaryDirectory(prefix=".", suffix=".part", dir=path.parent) as folder:
            part, plot = Path(folder) / path.name, Path(folder) / result.plot_path.name
            part.write_text(json.dumps(result.report(), indent=2) + "\n")
            draw(result, plot)
            os.replace(plot, result.plot_path)
            os.replace(part, path)
    except OSError as error:
        raise UsageError(f"{path} cannot be written ({error.strerror or error})") from None


def draw(result: Measurement, path: Path) -> None:
    """Draws a PNG of the measured power, its fit, and the half grid's limit, with the σ at which it grows."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    calibration, spectrum, coarse = result.calibration, result.calibration.spectrum, result.coarse
    figure = Figure(figsize=(7, 5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.loglog(calibration.omega, calibration.power, "o", markersize=4, label="measured")
    fitted = [spectrum.power(omega) for omega in calibration.omega]
    axes.loglog(calibration.omega, fitted, label=f"{spectrum.amplitude:.2f} · ω^-{spectrum.exponent:.3f}")
    h, w = coarse.latent
    axes.axvline(coarse.nyquist, color="0.5", linestyle="--", label=f"limit of the {h}×{w} grid, left at")
    for delta, sigma in result.transitions().items():
        axes.plot([], [], " ", label=f"σ = {sigma:.3f} for δ = {delta:g}")
    axes.set_xlabel("ω, cycles per image")
    axes.set_ylabel("power of normalised latents")
    axes.set_title(f"{result.title}, latent {result.latent[0]}×{result.latent[1]}, {result.files} files")
    axes.legend()
    figure.savefig(path, format="png")
