"""Writing videos (mp4, GIF) and pictures (PNG). A file appears whole or not at all."""

import logging
import math
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import torch
from PIL import Image

from ..files import replacing
from .video_reader import file_url

logger = logging.getLogger("latentcast")

RATES = (0.1, 240.0)  # frames per second that players cope with


def write_video(path, frames, fps):
    """Write a video whose kind follows from the suffix.

    ``.mp4`` is h264 in yuv420p, which every browser plays; odd heights and widths gain one pixel that repeats the edge.
    ``.gif`` loops for ever; GIF counts hundredths of a second, so durations are rounded without
    letting the error build up, and equal neighbours become one longer frame.

    Args:
        path: ends in .mp4 or .gif; missing folders are made.
        frames: (T, C, H, W), float in [-1, 1] or uint8; C is 1 (grey) or 3 (RGB).
        fps: frames per second, fractions kept (30000/1001, say); rates beyond 0.1 to 240 become these, with a warning.
    Raises:
        ValueError: wrong shape, type, suffix or rate.
        OSError: the file cannot be written.
    """
    path = Path(path)
    if path.suffix.lower() not in VIDEO_WRITERS:
        raise ValueError(f"{path}: cannot write this kind of video; expected one of {', '.join(VIDEO_WRITERS)}")
    if not 0 < fps < math.inf:
        raise ValueError(f"fps: expected a rate above 0, found {fps}")
    limited = min(max(fps, RATES[0]), RATES[1])
    if limited != fps:
        logger.warning("%s: %g frames a second are written as %g", path, fps, limited)
    frames = to_uint8(frames, n_dims=4)
    try:
        with replacing(path) as temporary:
            VIDEO_WRITERS[path.suffix.lower()](temporary, frames, limited)
    except av.FFmpegError as error:
        raise OSError(f"{path}: cannot be written ({error})") from None


def write_image(path, frame):
    """Write one frame (C, H, W), float in [-1, 1] or uint8, grey or RGB, as PNG; raises as ``write_video`` does."""
    path = Path(path)
    if path.suffix.lower() != ".png":
        raise ValueError(f"{path}: cannot write this kind of picture; expected .png")
    frame = to_uint8(frame, n_dims=3)
    with replacing(path) as temporary:
        Image.fromarray(frame).save(temporary, format="PNG")


def to_uint8(frames, n_dims):
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


def _write_mp4(path, frames, fps):
    height, width = frames.shape[1:3]
    frames = np.pad(frames, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), mode="edge")
    with av.open(file_url(path), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001))
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        stream.options = {"crf": "16"}
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))


def _write_gif(path, frames, fps):
    ends = np.round(np.arange(len(frames) + 1) * 100 / fps)
    durations = [int(10 * ticks) for ticks in np.maximum(np.diff(ends), 1)]  # ms
    pictures = [Image.fromarray(frame) for frame in frames]
    pictures[0].save(
        path, format="GIF", save_all=True, append_images=pictures[1:], duration=durations, loop=0, disposal=1
    )


VIDEO_WRITERS = {".mp4": _write_mp4, ".gif": _write_gif}
