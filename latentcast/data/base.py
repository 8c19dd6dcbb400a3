"""The interface of a data set of videos, shared by folders of files, synthetic sets and prepared benchmarks."""

import bisect
import functools
import hashlib
import itertools
import random
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, UInt8
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from ..sizes import sides

SPLITS = ("train", "val", "test")
FLIPS = {None: (), "horizontal": (-1,), "vertical": (-2,), "both": (-1, -2)}  # axes of (T, C, H, W), each for itself
# What brings frames to their size, as usual; descriptions name what is otherwise, so those without a key mean this.
FITTING = {"square_pixels": False, "crop": "center"}


class EmptySplitError(ValueError):
    """A split without a single usable video; the message counts what fell out and why."""


@dataclass(frozen=True)
class VideoEntry:
    """One whole video as a data set serves it: after frame stride or resampling, so ``n_frames`` counts those."""

    name: str
    n_frames: int
    fps: float


@dataclass(frozen=True)
class Clip:
    """One video out of a source, as ``Benchmark.read`` gives it.

    Attributes:
        frames: pieces of the video in order; an iterator keeps memory flat on long videos.
        conditions: for each of ``Benchmark.conditions``: (n_frames, *shape) or, per video, (*shape).
        sha256: of the bytes in the source that the video came from; None for videos that were made, not read.
    """

    frames: Iterable[UInt8[Tensor, "t C H W"]]
    conditions: dict[str, Tensor] = field(default_factory=dict)
    sha256: str | None = None


class VideoDataset(Dataset):
    """Clips for training, whole videos for caching latents.

    ``dataset[i]`` is ``{"frames": (clip_length, C, H, W) float32 in [-1, 1], "conditions": {name: tensor}}``. An epoch
    takes ``n_frames // clip_length`` clips of each video: at random places in the train split (fresh ones each epoch,
    the same for any number of workers: see ``set_epoch``), side by side in the others. Whole videos are read in pieces,
    so that long ones never sit in memory.

    Attributes: ``split``, ``clip_length``, ``size`` (H = W in pixels, or [H, W]), ``channels`` (3: RGB, 1: grey, or any
    number of other data), ``crop`` (how videos of another shape get to ``size``, see ``video.reader.fit_frames``),
    ``fps`` (frames per second of the clips, for writing previews), ``seed`` (of the random windows), ``flip`` (of
    FLIPS: the train split's clips are mirrored so every other time, but not their conditions), ``actions`` (whether
    priors that train on it are told the condition ``action``), and ``conditions``: what is known of each frame or video
    beside its pixels, name -> ``{"shape": list, "dtype": "float32" or "int64", "per": "frame" or "video"}``, with
    ``"n_values"`` where they are whole numbers from 0 to below that, and ``"names"`` where these have some. What is
    known of frame t is what led to it: an action of frame t was taken between frames t - 1 and t, and that of a video's
    first frame says nothing.
    """

    split: str
    clip_length: int
    size: int | list
    channels: int
    fps: float
    seed = 0
    flip: str | None = None
    crop = FITTING["crop"]
    conditions: dict = {}  # noqa: RUF012
    actions = False  # priors that are trained on it are told of its condition "action"

    epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Move to another set of random windows."""
        self.epoch = epoch

    @property
    def videos(self) -> list[VideoEntry]:
        """In a stable order."""
        raise NotImplementedError

    @property
    def frame_shape(self) -> tuple[int, ...]:
        """(C, H, W) of the frames."""
        return (self.channels, *sides(self.size))

    def read_video(self, index: int, start: int, stop: int) -> Float[Tensor, "{stop}-{start} C H W"]:
        """Frames ``start:stop`` of video ``index``, float32 in [-1, 1].

        Raises VideoError (see ``video.reader``) when the video turns out to be unreadable."""
        raise NotImplementedError

    def read_conditions(self, index: int, start: int, stop: int) -> dict[str, Tensor]:
        """(stop - start, *shape) of conditions per frame, (*shape) of those per video."""
        return {}

    def describe(self) -> dict:
        """JSON-able description of everything that shapes the frames (source, split, size, stride, fps, ...).

        Kept in the manifest of a latents cache; two data sets with equal descriptions serve equal videos."""
        raise NotImplementedError

    @functools.cached_property
    def _windows(self):
        return ClipWindows([video.n_frames for video in self.videos], self.clip_length, self.split, self.seed)

    def video_of(self, index: int) -> int:
        """Which of ``videos`` clip ``index`` is cut from."""
        return self._windows.place(index, self.epoch)[0]

    def __len__(self) -> int:
        return len(self._windows)

    def __getitem__(self, index: int) -> dict:
        window = self._windows.place(index, self.epoch)
        frames, conditions = self.read_video(*window), self.read_conditions(*window)
        if self.flip is not None and self.split == "train":
            chance = random.Random(f"flip {self.seed} {self.epoch} {index}")
            frames = frames.flip([axis for axis in FLIPS[self.flip] if chance.random() < 0.5])
        return {"frames": frames, "conditions": conditions}

    def spread(self, n: int) -> list[int]:
        """Numbers of ``n`` clips, or of all there are, of as many videos as can be: the first of each, then the second
        of each, and so on."""
        return self._windows.spread(n)

    def item_name(self, index: int) -> str:
        """What ``dataset[index]`` reads, for messages."""
        video, start, stop = self._windows.place(index, self.epoch)
        return f"{self.videos[video].name}, frames {start} to {stop - 1}"


@dataclass
class ShownClips:
    """What previews and figures show: ``frames`` (N, T, C, H, W) in [-1, 1], their rate, the names of their videos, and
    whether, as there are no others, these are trained on; ``conditions``, name -> (N, T, *shape) or (N, *shape)."""

    frames: Float[Tensor, "N T C H W"]
    fps: float
    videos: list[str]
    trained_on: bool = False
    conditions: dict[str, Tensor] = field(default_factory=dict)

    def told(self, declared: dict[str, dict], n_clips: int, n_frames: int) -> dict[str, Tensor] | None:
        """Conditions of the first clips' first frames, for a prior that takes those ``declared``; None where one lacks,
        or where there are fewer frames."""
        if not declared or not declared.keys() <= self.conditions.keys() or n_frames > self.frames.shape[1]:
            return None
        found = {name: self.conditions[name][:n_clips] for name in declared}
        return {n: value[:, :n_frames] if declared[n]["per"] == "frame" else value for n, value in found.items()}

    @property
    def names(self) -> list[str]:
        """A name for each clip: that of its video, with a number where there are several of one."""
        return [
            video if self.videos.count(video) == 1 else f"{video} #{self.videos[: n + 1].count(video)}"
            for n, video in enumerate(self.videos)
        ]

    @property
    def video_numbers(self) -> list[int]:
        """A number for each clip, the same for all of one video."""
        return [self.videos.index(video) for video in self.videos]

    @classmethod
    def of(cls, dataset: VideoDataset, n_clips: int, trained_on: bool = False) -> "ShownClips":
        """Clips of as many of a data set's videos as can be."""
        chosen = dataset.spread(n_clips)
        items = default_collate([dataset[index] for index in chosen])
        names = [dataset.videos[dataset.video_of(index)].name for index in chosen]
        return cls(items["frames"], dataset.fps, names, trained_on, items.get("conditions", {}))

    @classmethod
    def beginnings(cls, dataset: VideoDataset, n_clips: int, n_frames: int, trained_on: bool = False) -> "ShownClips":
        """The first ``n_frames`` of the first videos that have as many; where none has, of the longest ones as many as
        all of those have."""
        lengths = {index: min(video.n_frames, n_frames) for index, video in enumerate(dataset.videos)}
        longest = sorted(lengths, key=lengths.get, reverse=True)[:n_clips]  # the first ones of equals
        chosen = sorted(index for index in longest if lengths[index] == n_frames) or sorted(longest)
        length = min(lengths[index] for index in chosen)
        frames = torch.stack([dataset.read_video(index, 0, length) for index in chosen])
        conditions = default_collate([dataset.read_conditions(index, 0, length) for index in chosen])
        return cls(frames, dataset.fps, [dataset.videos[index].name for index in chosen], trained_on, conditions)


class ClipWindows:
    """Where the clips of an epoch lie in videos of the given lengths; see VideoDataset."""

    def __init__(self, lengths: Iterable[int], clip_length: int, split: str, seed: int) -> None:
        self.lengths, self.clip_length, self.split, self.seed = lengths, clip_length, split, seed
        self._ends = list(itertools.accumulate(n // clip_length for n in lengths))  # of each video's clips
        self._numbers = range(self._ends[-1] if self._ends else 0)

    def __len__(self) -> int:
        return len(self._numbers)

    def spans(self) -> Iterable[tuple[int, int]]:
        """Of each video its first clip, and the end of its clips."""
        return itertools.pairwise([0, *self._ends])

    def spread(self, n: int) -> list[int]:
        """See VideoDataset."""
        spans = list(self.spans())
        turns = range(max((stop - start for start, stop in spans), default=0))
        clips = (start + turn for turn in turns for start, stop in spans if start + turn < stop)
        return list(itertools.islice(clips, n))

    def place(self, index: int, epoch: int) -> tuple[int, int, int]:
        """Clip number ``index`` -> (video, start, stop)"""
        index = self._numbers[index]  # from the end where it is negative; raises IndexError
        video = bisect.bisect_right(self._ends, index)
        start = (index - (self._ends[video - 1] if video else 0)) * self.clip_length
        if self.split == "train":
            start = window_start(self.seed, epoch, index, self.lengths[video] - self.clip_length + 1)
        return video, start, start + self.clip_length


def unusual_fit(dataset: object) -> dict:
    """What of FITTING is not as usual with a data set, for its description."""
    found = {name: getattr(dataset, name, usual) for name, usual in FITTING.items()}
    return {name: value for name, value in found.items() if value != FITTING[name]}


def check_split(split: str) -> None:
    if split not in SPLITS:
        raise ValueError(f"split: expected one of {', '.join(SPLITS)}, found {split!r}")


def check_flip(flip: str | None) -> str | None:
    """``flip`` itself, one of FLIPS."""
    if not (flip is None or isinstance(flip, str)) or flip not in FLIPS:
        raise ValueError(f"flip: expected horizontal, vertical, both or null, found {flip!r}")
    return flip


def window_start(seed: int, epoch: int, index: int, n_starts: int) -> int:
    """A random start in [0, n_starts) for item ``index``, the same in every process, worker and Python."""
    digest = hashlib.sha256(f"{seed} {epoch} {index}".encode()).digest()  # a fifth of the time of a new random.Random
    return int.from_bytes(digest[:8], "big") % n_starts


def conditions_by_name(names: Iterable[str], dataset: VideoDataset) -> dict[str, dict]:
    """What a prior is told: those of a data set's conditions that an experiment names, and its actions where the data
    set is opened with them -> name -> declaration.

    Raises:
        ValueError: the data set has no such condition.
    """
    wanted = [*names, "action"] if dataset.actions else [*names]
    for name in wanted:
        if name not in dataset.conditions:
            known = ", ".join(dataset.conditions) or "no conditions"
            raise ValueError(f"conditions: expected some that the data set has, {known}, found {name!r}")
    return {name: dataset.conditions[name] for name in wanted}


def match_conditions(needed: dict[str, dict], model: str, offered: dict[str, dict], source: str) -> None:
    """Refuse to train a model on data without what it is conditioned on.

    Args:
        needed: ``conditions`` of the model; ``offered``: of the data set or latents cache.
        model, source: what to call the two sides in the error.
    Raises:
        ValueError: names the condition, and both sides.
    """
    for name, spec in needed.items():
        if offered.get(name) != spec:
            found = f"has {name} {offered[name]}" if name in offered else f"has {', '.join(offered) or 'no conditions'}"
            raise ValueError(f"conditions: {model} needs {name} {spec}, {source} {found}")
