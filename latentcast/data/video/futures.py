"""Around a prediction: from a video file to the frames that are given, and from futures to what is shown of them."""

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from ...figures.sheets import (
    BORDER,
    LEGEND,
    TRUTH,
    frame_names,
    grid_size,
    labelled_sheet,
    labelled_size,
    labelled_videos,
)
from .folder import nearest_stride, read_places, sampled_places, sampled_rate, to_model
from .pictures import numbered_pictures, read_pictures
from .reader import DEFAULT_RATE, VideoError, VideoInfo, look, probe
from .writer import write_image

SMALLEST = 128  # frames are enlarged to about this many pixels
ROW = 8  # so many videos stand beside each other in one row
WIDEST = 2048  # pixels: larger pictures are enlarged less
SHEET_VIDEOS, SHEET_FUTURES, SHEET_FRAMES = 16, 8, 32  # most on the contact sheet: videos, futures and frames of each
SHEET_PIXELS = 1 << 26  # another video must not make it larger


Rows = Sequence[tuple[str, UInt8[Tensor, "T 3 H W"]]]  # names and frames, side by side


def read_context(
    path: str | Path,
    spec: dict,
    n_context: int,
    n_frames: int,
    multiplier: float = 1,
    *,
    start: int = 0,
    fps: float | None = None,
    frame_stride: int | None = None,
    image_fps: float | None = None,
    trained_fps: float | None = None,
    most: int | None = None,
    crop: str = "center",
) -> tuple:
    """The frames of a video that a prediction is given, and those that it predicts, where the video is long enough.

    Args:
        path: of a video file, or of a folder of numbered pictures.
        spec: the prior's ``latent_spec``.
        n_context: frames to give. n_frames: frames to predict, ``multiplier`` of them in an interval of the context's.
        start: number of the first frame given, counted at the rate of sampling.
        fps: resample the video to this rate. frame_stride: take every n-th frame; None: nearest to ``trained_fps``.
        image_fps: rate of pictures in a folder; None: ``trained_fps``.
        most: frames of the file that may be decoded; None: any number.
        crop: how the video gets to the shape of the model's frames, as in training: see ``fit_frames``.
    Returns:
        context (n_context, C, H, W) and truth (T, C, H, W) or None, in [-1, 1], and the rate of both, frames a second.
    Raises:
        VideoError: no readable video, too short a one, or one of which more than ``most`` frames would be decoded.
    """
    pictures, size, channels = None, (spec["frame_height"], spec["frame_width"]), spec["frame_channels"]
    if path.is_dir():
        pictures = numbered_pictures(path)
        info = VideoInfo(len(pictures), image_fps or trained_fps or DEFAULT_RATE, 0, 0)
    else:
        found = look(path)
        if found.times is None:  # ``probe`` decodes all of it
            _check_decoded(path, found.n_packets, most)
        info = probe(path, backend="packets")
    stride = frame_stride or nearest_stride(info, trained_fps)
    rate = (1, fps) if fps else (stride, None)
    available, fps = sampled_rate(info, *rate)
    end = start + n_context
    if available < end:
        raise VideoError(f"{path}: {end} frames are needed, {available} are there at {fps:.3g} frames per second")
    n_true = math.ceil(n_frames / multiplier)
    n_true = n_true if available >= end + n_true else 0
    places = sampled_places(info, range(start, end + n_true), *rate)
    _check_decoded(path, max(places) + 1, most)
    if pictures is not None:
        chosen = read_pictures([pictures[place] for place in places], size, crop=crop)
        frames = to_model(torch.cat(list(chosen)), channels)
    else:
        frames = read_places(path, places, size, channels, crop)
    return frames[:n_context], frames[n_context:] if n_true else None, fps


def _check_decoded(path, n_frames, most):
    if most is not None and n_frames > most:
        raise VideoError(f"{path}: expected at most {most} frames to be read, found {n_frames}")


def held(
    context: Float[Tensor, "T C H W"], truth: Float[Tensor, "_ C H W"] | None, n_frames: int, multiplier: float
) -> tuple[Float[Tensor, "_ C H W"], Float[Tensor, "_ C H W"] | None]:
    """Context and truth at ``multiplier`` times their rate, each frame staying until the next -> the same two."""
    last = len(context) - 1
    frames = context if truth is None else torch.cat([context, truth])
    times = torch.arange(-math.floor(last * multiplier), n_frames + 1) / multiplier + last
    places = (times + 1e-4).floor().long()  # 1e-4: times are rounded
    given = frames[places[:-n_frames]]
    return given, None if truth is None else frames[places[-n_frames:]]


def layout(n: int, height: int, width: int) -> tuple[int, int]:
    """(scale, columns) for ``n`` videos of ``height`` x ``width`` pixels: one row where they are few, nearly a square
    where many, and less enlarged where that would be too wide."""
    scale, columns = _enlarged(height, width), n if n <= ROW else math.ceil(math.sqrt(n))
    while scale > 1 and max(labelled_size(n, height, width, scale, columns)) > WIDEST:
        scale -= 1
    return scale, columns


def _enlarged(height, width):
    """By what frames are enlarged, of that size with their border."""
    return max(1, round(SMALLEST / (max(height, width) - 2 * BORDER)))


def labelled_futures(rows: Rows, n_frames: int, fps: float, scale: int, columns: int) -> UInt8[Tensor, "T 3 _ _"]:
    """One video of a truth and its futures side by side, named, under a title that counts frames and seconds.

    Args:
        rows: list of (name, (T, 3, H, W) uint8), as ``rows_of`` gives them.
        n_frames: how many of the T are predicted. fps: rate of the video.
        scale, columns: of ``layout``.
    Returns:
        (T, 3, H', W') uint8.
    """
    names = frame_names(len(rows[0][1]) - n_frames, n_frames, fps)
    return labelled_videos(rows, [f"frame {name}" for name in names], scale, min(columns, len(rows)))


class Sheet:
    """The contact sheet of the first videos, written anew with each.

    Args:
        path: of the picture.
        height, width: of the frames with their border, pixels.
    Attributes:
        outputs: [path] once it is written.
        n_videos, n_left_out: how many it shows, and for how many there was no room.
    """

    def __init__(self, path: str | Path, height: int, width: int) -> None:
        self.path, self.size, self.scale = path, (height, width), max(1, _enlarged(height, width) // 2)
        self.rows, self.n_videos, self.n_left_out, self.outputs = [], 0, 0, []

    def add(self, video: str, rows: Rows, n_context: int) -> None:
        """Show a video, where there is room.

        Args:
            video: its name; empty: the rows' own are enough.
            rows: list of (name, (T, 3, H, W) uint8 frames) of the truth and each future; the first are shown.
            n_context: how many of the frames are given.
        """
        rows = rows[: SHEET_FUTURES + (rows[0][0] == TRUTH)]
        n_frames = len(rows[0][1])
        places = torch.linspace(0, n_frames - 1, min(n_frames, SHEET_FRAMES)).round().long()
        rows = [*self.rows, *((f"{video}\n{name}".strip(), frames[places]) for name, frames in rows)]
        size = grid_size(len(rows) * len(places), *self.size, self.scale, len(places))
        if self.n_videos == SHEET_VIDEOS or (self.rows and math.prod(size) > SHEET_PIXELS):
            self.n_left_out += 1
            return
        self.rows, self.n_videos = rows, self.n_videos + 1
        names = frame_names(n_context, n_frames - n_context)
        write_image(self.path, labelled_sheet(rows, [names[place] for place in places], LEGEND, self.scale))
        self.outputs = [str(self.path)]
