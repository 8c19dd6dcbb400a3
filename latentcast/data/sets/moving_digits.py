"""Handwritten digits that move over a black square and bounce off its edges, made as they are asked for."""

import functools
import random
from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from ...config import check_counts
from ...sizes import as_square
from ...urls import Place
from ..base import VideoDataset, VideoEntry, check_split
from ..store.prepared import MAX_SPEED, MOTIONS
from .digits import MNIST_URL, mnist_digits, sklearn_digits

FPS = 10.0
# Each frame is made from those before it, and the videos are listed: beyond these, nothing would come to an end.
MOST_DIGITS, MOST_VIDEOS, MOST_FRAMES, MOST_PIXELS = 1000, 10_000_000, 100_000, 4096


class MovingDigits(VideoDataset):
    """Digits on straight lines that bounce off the edges; video ``i`` of a split is always the same (see ``fresh``).

    Where digits overlap their brightness adds up to white. The splits share no digit image. ``motion`` is one of

    - "lattice": each axis has a speed drawn from ``speeds`` with a random sign, and a start that is a multiple of
      ``lattice``; the position is a triangle wave of time between 0 and ``size - digit_size``.
    - "deterministic" (Moving MNIST) and "stochastic" (SM-MNIST): as the generator does that was published with SVG
      (Denton and Fergus, Stochastic Video Generation with a Learned Prior, 2018, section 5.1). The start is uniform
      over 0 .. ``size - digit_size`` - 1 on each axis, the velocity uniform over the whole numbers -4 .. 4 (or
      ``max_speed``; a digit may stand still). Before each frame, first the row and then the column is checked: outside
      of that range it is set to the nearer end, and the digit bounces. Deterministic: that axis's velocity changes its
      sign. Stochastic: it is drawn anew from 1 .. 4 away from the wall, and the other axis's from -4 .. 4.

    Args:
        split: "train", "val" or "test".
        clip_length: frames a clip, no more than a video has after ``frame_stride``.
        size: H = W of the frames, pixels.
        channels: 1, or 3 equal ones.
        n_digits: digits a video.
        digit_size: H = W of a digit, pixels; None: 24 for "sklearn" and 28 for "mnist" on the lattice, else 32.
        motion: "lattice", "deterministic" or "stochastic".
        speeds: pixels a frame that an axis may have; None: (4,). Of the lattice only.
        lattice: starting positions are multiples of this, pixels; None: 4. Of the lattice only.
        max_speed: largest speed on an axis, pixels a frame; None: 4. Not of the lattice.
        source: "sklearn" (the 1,797 8x8 digits that scikit-learn brings) or "mnist".
        mnist_dir: folder with MNIST's IDX files, gzipped or not; None: downloaded once into the user's cache.
        mnist_url: where they are downloaded from.
        n_videos, n_heldout_videos: videos in train, and in each of val and test.
        video_length: frames a video, before ``frame_stride``.
        frame_stride: take every ``frame_stride``-th frame.
        seed: of everything random, but not of the splits.
        fresh: draw the train split's videos anew in every epoch, as SVG's generator never shows one twice.
    Raises:
        OSError: MNIST's files are missing, damaged or out of reach.
    """

    def __init__(
        self,
        split: str,
        clip_length: int,
        size: int = 64,
        channels: int = 1,
        n_digits: int = 1,
        digit_size: int | None = None,
        motion: str = "lattice",
        speeds: Sequence[int] | None = None,
        lattice: int | None = None,
        max_speed: int | None = None,
        source: str = "sklearn",
        mnist_dir: Place | None = None,
        mnist_url: str = MNIST_URL,
        n_videos: int = 2000,
        n_heldout_videos: int = 256,
        video_length: int = 16,
        frame_stride: int = 1,
        seed: int = 0,
        fresh: bool = False,
    ) -> None:
        check_split(split)
        if motion not in MOTIONS:
            raise ValueError(f"motion: expected one of {', '.join(MOTIONS)}, found {motion!r}")
        if source not in ("sklearn", "mnist"):
            raise ValueError(f"source: expected sklearn or mnist, found {source!r}")
        if channels not in (1, 3):
            raise ValueError(f"channels: expected 1 or 3, found {channels}")
        size = as_square(size, "size", "frames of moving digits")
        check_counts(frame_stride=frame_stride, clip_length=clip_length, n_digits=n_digits)
        check_counts(n_videos=n_videos, n_heldout_videos=n_heldout_videos, video_length=video_length)
        for name, value, most in (
            ("n_digits", n_digits, MOST_DIGITS),
            ("n_videos", n_videos, MOST_VIDEOS),
            ("n_heldout_videos", n_heldout_videos, MOST_VIDEOS),
            ("video_length", video_length, MOST_FRAMES),
            ("size", size, MOST_PIXELS),
        ):
            if value > most:
                raise ValueError(f"{name}: expected at most {most}, found {value}")
        n_frames = (video_length - 1) // frame_stride + 1
        if not 1 <= clip_length <= n_frames:
            raise ValueError(
                f"clip_length: expected 1 to {n_frames}, the frames of a video (video_length={video_length}, "
                f"frame_stride={frame_stride}), found {clip_length}"
            )
        if motion == "lattice":
            speeds, lattice = [4] if speeds is None else list(speeds), 4 if lattice is None else lattice
            if not speeds or min(speeds) < 0:
                raise ValueError(f"speeds: expected pixels a frame, at least 0, found {speeds}")
            if lattice < 1:
                raise ValueError(f"lattice: expected at least 1, found {lattice}")
            if max_speed is not None:
                raise ValueError(f"max_speed: expected null, for motion=lattice has speeds, found {max_speed}")
            digit_size = digit_size or (24 if source == "sklearn" else 28)
        else:
            for name, value in (("speeds", speeds), ("lattice", lattice)):
                if value is not None:
                    raise ValueError(f"{name}: expected null, for motion={motion} fixes it, found {value}")
            max_speed = MAX_SPEED if max_speed is None else max_speed
            check_counts(max_speed=max_speed)
            digit_size = digit_size or 32
        if not 0 < digit_size < size:
            raise ValueError(f"digit_size: expected 1 to {size - 1} for frames of {size}, found {digit_size}")
        self.split, self.clip_length, self.size, self.channels, self.seed = split, clip_length, size, channels, seed
        self.n_digits, self.digit_size, self.motion, self.source = n_digits, digit_size, motion, source
        self.speeds, self.lattice, self.max_speed, self.video_length = speeds, lattice, max_speed, video_length
        self.fresh = fresh and split == "train"
        self.frame_stride, self.n_frames, self.fps = frame_stride, n_frames, FPS / frame_stride
        self.n_videos = n_videos if split == "train" else n_heldout_videos
        if source == "sklearn":
            self._digits = sklearn_digits(split, digit_size)
        else:
            self._digits = mnist_digits(split, digit_size, mnist_dir, mnist_url)

    @functools.cached_property
    def videos(self) -> list[VideoEntry]:
        return [VideoEntry(f"{self.split}-{i:06d}", self.n_frames, self.fps) for i in range(self.n_videos)]

    def read_video(self, index: int, start: int, stop: int) -> Float[Tensor, "{stop}-{start} C H W"]:
        return self.draw(index, start, stop).float() / 255 * 2 - 1

    def draw(self, index: int, start: int, stop: int) -> UInt8[Tensor, "{stop}-{start} C H W"]:
        """Frames ``start:stop`` of video ``index`` before they are scaled to [-1, 1]: (stop - start, C, size, size)
        uint8."""
        frames = np.zeros((stop - start, self.size, self.size), np.int32)
        for digit, places in self.trajectories(index, start, stop):
            image = self._digits[digit].numpy()
            for frame, (row, column) in zip(frames, places):
                frame[row : row + self.digit_size, column : column + self.digit_size] += image
        frames = torch.from_numpy(np.minimum(frames, 255).astype(np.uint8))
        return frames[:, None].repeat(1, self.channels, 1, 1)

    def trajectories(self, index: int, start: int, stop: int) -> list[tuple]:
        """For each digit of video ``index``: its number among the split's digits, and a list of the row and column of
        its upper left corner in frames ``start:stop``."""
        if not 0 <= start < stop <= self.n_frames:
            raise ValueError(f"video {index}: expected 0 <= start < stop <= {self.n_frames}, found {start}:{stop}")
        if not 0 <= index < self.n_videos:
            raise IndexError(f"video {index}: expected 0 to {self.n_videos - 1}")
        drawn = f" {self.epoch}" if self.fresh and self.epoch else ""
        rng = random.Random(f"{self.seed} {self.split} {index}{drawn}")
        wall = self.size - self.digit_size
        times = range(start * self.frame_stride, stop * self.frame_stride, self.frame_stride)
        trajectories = []
        for _ in range(self.n_digits):
            digit = rng.randrange(len(self._digits))
            if self.motion == "lattice":
                rows, columns = (_triangle_wave(rng, wall, self.speeds, self.lattice, times) for _ in range(2))
                places = list(zip(rows, columns))
            else:
                path = _bouncing_line(rng, wall - 1, times[-1] + 1, self.max_speed, self.motion == "stochastic")
                places = [path[time] for time in times]
            trajectories.append((digit, places))
        return trajectories

    def describe(self) -> dict:
        names = ("split", "size", "channels", "n_digits", "digit_size", "motion", "speeds", "lattice", "max_speed")
        names += ("source", "n_videos", "video_length", "frame_stride", "seed")
        return {"type": "MovingDigits"} | {name: getattr(self, name) for name in names}


def _triangle_wave(rng, wall, speeds, lattice, times):
    """Positions along one axis: constant speed, reflected at 0 and at ``wall``."""
    origin = lattice * rng.randrange(wall // lattice + 1)
    speed = rng.choice(speeds) * rng.choice((-1, 1))
    unfolded = [(origin + speed * t) % (2 * wall) for t in times]
    return [min(x, 2 * wall - x) for x in unfolded]


def _bouncing_line(rng, last, n_frames, max_speed, stochastic):
    """(row, column) in each frame, both in 0..last, by the rules of SVG's generator (see MovingDigits)."""
    position = [rng.randint(0, last), rng.randint(0, last)]
    velocity = [rng.randint(-max_speed, max_speed), rng.randint(-max_speed, max_speed)]
    # Bounces draw from a stream of their own: how far this digit is followed must not change the next one.
    bounces = random.Random(rng.getrandbits(64))
    path = []
    for _ in range(n_frames):
        for axis in range(2):
            if 0 <= position[axis] <= last:
                continue
            inwards = 1 if position[axis] < 0 else -1
            position[axis] = 0 if inwards == 1 else last
            if stochastic:
                velocity[axis] = inwards * bounces.randint(1, max_speed)
                velocity[1 - axis] = bounces.randint(-max_speed, max_speed)
            else:
                velocity[axis] = -velocity[axis]
        path.append(tuple(position))
        position = [x + v for x, v in zip(position, velocity)]
    return path
