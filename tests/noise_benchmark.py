"""A real Benchmark whose videos are noise, for tests of what is done with prepared sets."""

import os
import signal

import torch

from latentcast.data.base import Clip
from latentcast.data.sets.base import Benchmark
from latentcast.data.video.reader import VideoError
from latentcast.sizes import sides

LENGTHS = {"train": (5, 12, 9, 3, 7), "test": (8, 6)}


class Noise(Benchmark):
    """Videos of noise. ``missing`` ones break off, reading ``kill_at`` ends the process, ``twin`` copies another."""

    protocols, needs_source, fps, shard_videos = ("standard", "other"), False, 5.0, 2
    conditions = {  # noqa: RUF012
        "actions": {"shape": [4], "dtype": "float32", "per": "frame"},
        "label": {"shape": [], "dtype": "int64", "per": "video"},
    }

    def __init__(self, protocol=None, missing=(), kill_at=None, twin=None, name="noise", frame_size=15, channels=3):
        super().__init__(None, protocol)
        self.missing, self.kill_at, self.twin = missing, kill_at, twin or {}
        self.name, self.frame_size, self.channels = name, frame_size, channels

    def videos(self):
        return {split: [f"{split}-{i}" for i in range(len(lengths))] for split, lengths in LENGTHS.items()}

    def expected_counts(self):
        return {split: len(lengths) for split, lengths in LENGTHS.items()}

    def describe(self):
        return {"split": self.protocol}

    def read(self, split, name):
        if name == self.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        frames = noise(split, self.twin.get(name, name), self.frame_size, self.channels)
        label = torch.tensor(int(name[-1]))
        return Clip(self._pieces(name, frames), {"actions": actions(frames), "label": label}, sha256=name * 8)

    def _pieces(self, name, frames):
        yield frames[:2]
        if name in self.missing:
            raise VideoError(f"{name}.avi: expected 9 frames, found 2")
        yield frames[2:]


def noise(split, name, size=15, channels=3):
    """(n_frames, channels, *size) uint8"""
    n_frames = LENGTHS[split][int(name[-1])]
    seed = torch.Generator().manual_seed(100 * len(split) + int(name[-1]))
    return torch.randint(256, (n_frames, channels, *sides(size)), generator=seed, dtype=torch.uint8)


def actions(frames):
    return frames[:, 0, 0, :4].float()
