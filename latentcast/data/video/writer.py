"""Writing videos (mp4, GIF) and pictures (PNG). A file appears whole or not at all."""

import io
import logging
import math
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING

import av
import numpy as np
import torch
from jaxtyping import Shaped, UInt8
from PIL import Image
from torch import Tensor

from ...files import replacing
from ...urls import Place, folder_at

if TYPE_CHECKING:  # a video needs no figures
    from latentcast.figures import Drawing

logger = logging.getLogger("latentcast")

RATES = (0.1, 240.0)  # frames per second that players cope with
SIDES = {".mp4": 16384, ".gif": 65535}  # largest heights and widths: libx264's and the format's
LARGEST = 139_264 * 256  # pixels a frame, in h264's highest level, 6.2
GIF_RATE = 10.0  # frames per second of a GIF that is to be watched: clips are short, and loop
HOLD = 1.0  # seconds for which its last picture stays longer
# What x264 computes with AVX-512 is not the same each time; all who have that have AVX2.
REPEATABLE = {"x264-params": "asm=AVX2"} if torch.backends.cpu.get_cpu_capability() == "AVX512" else {}
LONGEST = 65535  # hundredths of a second for which a GIF can show one picture


def write_both(stem: str | Path, frames: Shaped[Tensor, "T C H W"], fps: float) -> list[Path]:
    """Write ``stem``.mp4 at its own rate, and ``stem``.gif so that it can be watched as it loops: at ``GIF_RATE`` at
    most, with a rest at its end -> [path, path]. Arguments and errors: see ``write_video``."""
    stem = Path(stem)
    files = [stem.with_name(stem.name + suffix) for suffix in (".mp4", ".gif")]
    write_video(files[0], frames, fps)
    write_video(files[1], frames, min(fps, GIF_RATE), HOLD)
    return files


def write_drawing(stem: str | Path, drawing: "Drawing", gif: bool = False) -> dict[str, Path]:
    """Write a figure's picture as ``stem``.png and its frames, where it has any, as ``stem``.mp4 -> suffix -> path.

    Args:
        drawing: of ``latentcast/figures``.
        gif: also write ``stem``.gif, see ``write_both``.
    """
    stem = Path(stem)
    files = {".png": drawing.save(stem.with_name(f"{stem.name}.png"))}
    if drawing.frames is not None:
        path = stem.with_name(f"{stem.name}.mp4")
        written = write_both(stem, drawing.frames, drawing.fps) if gif else [path]
        if not gif:
            write_video(path, drawing.frames, drawing.fps)
        files |= {path.suffix: path for path in written}
    return files


def write_video(path: Place, frames: Shaped[Tensor, "T C H W"], fps: float, hold: float = 0.0) -> None:
    """Write a video whose kind follows from the suffix.

    ``.mp4`` is h264 in yuv420p, which every browser plays; odd heights and widths gain one pixel that repeats the edge.
    ``.gif`` loops for ever; GIF counts hundredths of a second, so durations are rounded without
    letting the error build up, and equal neighbours become one longer frame.

    Args:
        path: ends in .mp4 or .gif; missing folders are made.
        frames: (T, C, H, W), float in [-1, 1] or uint8; C is 1 (grey) or 3 (RGB).
        fps: frames per second, fractions kept (30000/1001, say). Slower and faster ones than can be watched are written
            at the nearest of ``RATES``, which the log says.
        hold: seconds for which the last picture of a GIF stays longer, before it begins again.
    Raises:
        ValueError: wrong shape, type, suffix or rate, or frames too large (see ``check_video``).
        OSError: the file cannot be written.
    """
    path = Path(path)
    if path.suffix.lower() not in VIDEO_WRITERS:
        raise ValueError(f"{path}: cannot write this kind of video; expected one of {', '.join(VIDEO_WRITERS)}")
    if not 0 < fps < math.inf:
        raise ValueError(f"fps: expected a rate above 0, found {fps}")
    frames = to_uint8(frames, n_dims=4)
    check_video(path, *frames.shape[1:3])
    written = min(max(fps, RATES[0]), RATES[1])
    if written != fps:
        logger.warning("%s: %g frames a second are written as %g", path, fps, written)
    with replacing(path) as temporary:
        VIDEO_WRITERS[path.suffix.lower()](temporary, frames, written, hold)


def check_video(path: Place, height: int, width: int) -> None:
    """Refuse frames that are larger, in pixels, than ``write_video`` can write them to ``path``, with a ValueError."""
    longest = SIDES[Path(path).suffix.lower()]
    if max(height, width) > longest or height * width > LARGEST:
        raise ValueError(
            f"{path}: frames of {height} x {width} pixels (H x W) are too large; expected at most {longest} a side and "
            f"{LARGEST} in all"
        )


def write_image(path: Place, frame: Shaped[Tensor, "C H W"]) -> None:
    """Write one frame (C, H, W), float in [-1, 1] or uint8, grey or RGB, as PNG; raises as ``write_video`` does."""
    path = folder_at(path)
    if path.suffix.lower() != ".png":
        raise ValueError(f"{path}: cannot write this kind of picture; expected .png")
    frame = to_uint8(frame, n_dims=3)
    with replacing(path) as temporary:
        Image.fromarray(frame).save(temporary, format="PNG")


def to_uint8(frames: Shaped[Tensor, "*frames C H W"], n_dims: int) -> UInt8[np.ndarray, "*frames H W 3"]:
    """(..., C, H, W) float in [-1, 1] or uint8, C = 1 or 3 -> (..., H, W, 3) uint8 array."""
    frames = torch.as_tensor(frames).detach().cpu()
    if frames.ndim != n_dims or frames.shape[-3] not in (1, 3) or 0 in frames.shape:
        expected = "(T, C, H, W)" if n_dims == 4 else "(C, H, W)"
        raise ValueError(f"frames: expected {expected} with 1 or 3 channels, found {tuple(frames.shape)}")
    if frames.is_floating_point():
        frames = ((frames.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    elif frames.dtype != torch.uint8:
        raise ValueError(f"frames: expected float in [-1, 1] or uint8, found {frames.dtype}")
    frames = frames.movedim(-3, -1)
    return np.ascontiguousarray(frames.expand(*frames.shape[:-1], 3).numpy())


def _write_mp4(path, frames, fps, hold):
    height, width = frames.shape[1:3]
    frames = np.pad(frames, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), mode="edge")
    file = io.BytesIO()  # FFmpeg would take some names for an address, and refuse others
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001))
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        stream.options = {"crf": "16"} | REPEATABLE
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))
    path.write_bytes(file.getbuffer())


def _write_gif(path, frames, fps, hold):
    ends = np.round(np.arange(len(frames) + 1) * 100 / fps)
    ticks = np.maximum(np.diff(ends), 1)
    ticks[-1] += round(100 * hold)
    new = [0, *(i for i in range(1, len(frames)) if not np.array_equal(frames[i], frames[i - 1]))]
    durations = [int(10 * min(shown, LONGEST)) for shown in np.add.reduceat(ticks, new)]  # ms
    pictures = [Image.fromarray(frames[i]) for i in new]
    pictures[0].save(
        path, format="GIF", save_all=True, append_images=pictures[1:], duration=durations, loop=0, disposal=1
    )


VIDEO_WRITERS = {".mp4": _write_mp4, ".gif": _write_gif}
