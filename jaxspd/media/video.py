"""Encoders of frames `[F, H, W, 3]`, uint8, as H.264 in MP4 and as GIF. Equal input gives equal bytes."""

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from av.video.reformatter import ColorRange, Colorspace, Interpolation
from PIL import Image

BT709 = 1  # H.264's number for its primaries, its transfer function and its matrix


def write_mp4(path: Path, frames: np.ndarray, fps: float, comment: str) -> None:
    """Writes frames `[F, H, W, 3]`, uint8, as H.264 at `fps` frames per second, with `comment` as metadata.

    The index comes first, so that a browser can play the file while it loads. Even sizes are stored as
    yuv420p, which every player shows. An odd height or width needs yuv444p, which some players do not show.
    """
    _, height, width, _ = frames.shape
    rate = Fraction(fps).limit_denominator(10_000)
    # On CPUs with AVX-512, x264's "mbtree" reads memory that it has not written, and its result varies.
    x264 = "no-mbtree=1"
    if height % 2 or width % 2:
        pix_fmt = "yuv444p"
    else:
        pix_fmt = "yuv420p"
        x264 += ":chromaloc=1"  # chroma is at the centre of the 2×2 pixels that `_yuv` averages
    options = {"crf": "18", "preset": "medium", "x264-params": x264}
    with av.open(str(path), "w", format="mp4", container_options={"movflags": "+faststart"}) as file:
        file.metadata["comment"] = comment
        stream = file.add_stream("libx264", rate=rate, options=options)
        stream.width, stream.height, stream.pix_fmt = width, height, pix_fmt
        encoder = stream.codec_context
        encoder.thread_count = 4  # fixed for all machines, since x264's result depends on it
        encoder.color_range = ColorRange.MPEG
        encoder.color_primaries = encoder.color_trc = encoder.colorspace = BT709
        for number, pixels in enumerate(frames):
            frame = _yuv(pixels, pix_fmt)
            frame.pts, frame.time_base = number, 1 / rate
            file.mux(stream.encode(frame))
        file.mux(stream.encode())


def _yuv(pixels: np.ndarray, pix_fmt: str) -> av.VideoFrame:
    """One frame `[H, W, 3]`, uint8, converted to BT.709 with limited range, as the file's tags say.

    By default swscale would use BT.601. The flags make it round to the nearest level and average all four
    pixels of a chroma sample.
    """
    return av.VideoFrame.from_ndarray(pixels, format="rgb24").reformat(
        format=pix_fmt,
        src_color_range=ColorRange.JPEG,
        dst_color_range=ColorRange.MPEG,
        dst_colorspace=Colorspace.ITU709,
        interpolation=Interpolation.BILINEAR | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INP,
    )


def write_gif(path: Path, frames: np.ndarray, fps: float, comment: str) -> None:
    """Writes frames `[F, H, W, 3]`, uint8, as a GIF that repeats for ever, with `comment` inside.

    `fps` is frames per second. All frames share one palette and are dithered, so that still areas do not
    flicker. A frame equal to the one before only lengthens it.
    """
    sample = np.concatenate(frames[:, ::4, ::4])
    palette = Image.fromarray(sample).quantize(256)
    first, *rest = (
        Image.fromarray(pixels).quantize(palette=palette, dither=Image.Dither.FLOYDSTEINBERG)
        for pixels in frames
    )
    # GIF counts hundredths of a second. Each frame ends at the hundredth nearest to its time, so rounding
    # errors never add up. Pillow takes milliseconds.
    ends = [round(100 * number / fps) for number in range(len(frames) + 1)]
    durations = [10 * hundredths for hundredths in np.diff(ends).tolist()]
    first.save(path, "GIF", save_all=True, append_images=rest, duration=durations, loop=0, comment=comment)
