"""The interface of a data set of videos, shared by folders of files, synthetic sets and prepared benchmarks."""

import random
from dataclasses import dataclass

from torch.utils.data import Dataset

SPLITS = ("train", "val", "test")


class EmptySplitError(ValueError):
    """A split without a single usable video; the message counts what fell out and why."""


@dataclass(frozen=True)
class VideoEntry:
    """One whole video as a data set serves it: after frame stride or resampling, so ``n_frames`` counts those."""

    name: str
    n_frames: int
    fps: float


class VideoDataset(Dataset):
    """Clips for training, whole videos for caching latents.

    ``dataset[i]`` is ``{"frames": (clip_length, C, size, size) float32 in [-1, 1]}``. In the train split a clip is a
    random window of a video (a fresh one each epoch, the same for any number of workers: see ``set_epoch``); in the
    other splits the window is fixed. Whole videos are read in pieces, so that long ones never sit in memory.

    Attributes: ``split``, ``clip_length``, ``size`` (H = W, pixels), ``channels`` (1 or 3), ``fps`` (frames per second
    of the clips, for writing previews).
    """

    split: str
    clip_length: int
    size: int
    channels: int
    fps: float

    epoch = 0

    def set_epoch(self, epoch):
        """Move to another set of random windows."""
        self.epoch = epoch

    @property
    def videos(self):
        """list of VideoEntry, in a stable order."""
        raise NotImplementedError

    def read_video(self, index, start, stop):
        """Frames ``start:stop`` of video ``index`` -> (stop - start, C, size, size) float32 in [-1, 1].

        Raises VideoError (see video_reader) when the video turns out to be unreadable."""
        raise NotImplementedError

    def describe(self):
        """JSON-able description of everything that shapes the frames (source, split, size, stride, fps, ...).

        Kept in the manifest of a latents cache; two data sets with equal descriptions serve equal videos."""
        raise NotImplementedError


def check_split(split):
    if split not in SPLITS:
        raise ValueError(f"split: expected one of {', '.join(SPLITS)}, found {split!r}")


def window_start(seed, epoch, index, n_starts):
    """A random start in [0, n_starts) for item ``index``, the same in every process, worker and Python."""
    return random.Random(f"{seed} {epoch} {index}").randrange(n_starts)
