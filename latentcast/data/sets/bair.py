"""BAIR robot pushing: 44 thousand clips of a robot arm, from the published TFRecords."""

import functools
import hashlib
import re
from collections.abc import Sequence
from pathlib import PurePosixPath

import numpy as np
import torch

from ...sizes import as_size
from ...urls import Place
from ..base import Clip
from ..video.reader import VideoError
from .action_tables import led_to
from .base import Benchmark
from .tfrecord import RecordFile, feature_values, parse_example, tar_members

FOLDER = "softmotion30_44k"
SPLITS = ("train", "test")
SIZE = 64  # H = W of the published frames, pixels
N_FRAMES = 30
FILE = re.compile(r"traj_(\d+)_to_(\d+)")
VIEWS = ("aux1", "main")
STATES = {"action": ("action", 4), "state": ("endeffector_pos", 3)}  # condition -> (feature, numbers a frame)


class BAIR(Benchmark):
    """The BAIR robot pushing data set (Ebert et al., "Self-Supervised Visual Planning with Temporal Skip Connections",
    CoRL 2017): 43,264 training and 256 test clips of 30 RGB frames of 64 x 64 pixels.

    A video is one record; a file holds as many as its name says (``traj_256_to_511``). Frames are stored as published.
    Conditions, each a row of float32 a frame: ``action``, the 4 numbers of the commanded action that led to the frame
    (published is the one that leads on from it), and ``state``, the 3 of the end effector's position in the frame, both
    in the units of the publication. No frame rate is published: ``fps`` is nominal.

    Args:
        source: ``bair_robot_pushing_dataset_v0.tar``, which is read in place, or the folder it was extracted to: the
            one that holds ``softmotion30_44k/{train,test}/traj_A_to_B.tfrecords``, or ``softmotion30_44k`` itself.
        protocol: "standard", the published split.
        view: the camera. "aux1" is the one that papers on video prediction use (SVG, SRVP and their successors).
        frame_size: 64; frames are not resized.
    Raises:
        ValueError: an unknown view, or another frame size.
    """

    name = "bair"
    frame_size = SIZE
    channels = 3
    fps = 10.0
    conditions = {name: {"shape": [n], "dtype": "float32", "per": "frame"} for name, (_, n) in STATES.items()}  # noqa: RUF012
    shard_videos = 256

    def __init__(
        self,
        source: Place | None = None,
        protocol: str | None = None,
        *,
        view: str = "aux1",
        frame_size: int | Sequence[int] = SIZE,
    ) -> None:
        super().__init__(source, protocol)
        if view not in VIEWS:
            raise ValueError(f"view: expected one of {', '.join(VIEWS)}, found {view!r}")
        if as_size(frame_size) != SIZE:
            raise ValueError(f"frame_size: the frames of {self.name} are {SIZE} x {SIZE} pixels, found {frame_size}")
        self.view = view
        self.provenance = {"fps": "nominal: none is published"}

    def videos(self) -> dict[str, list[str]]:
        return {
            split: [f"{stem}/{i:03d}" for stem in files for i in range(_n_records(stem))]
            for split, files in self._files.items()
        }

    def expected_counts(self) -> dict[str, int]:
        return {"train": 43264, "test": 256}

    def read(self, split: str, name: str) -> Clip:
        stem, _, number = name.rpartition("/")
        file, number = self._files[split][stem], int(number)
        offsets = _offsets(file)
        if number >= len(offsets):
            n = _n_records(stem)
            raise VideoError(f"{file}: expected {n} records by its name, found its end or damage after {len(offsets)}")
        data = file.read(offsets[number])
        where = f"{file}: record {number} at byte {offsets[number]}"
        features = parse_example(data, where)
        frames = [self._frame(features, f"{i}/image_{self.view}/encoded", where) for i in range(N_FRAMES)]
        conditions = {
            condition: torch.tensor(
                [_numbers(features, f"{i}/{key}", n, where) for i in range(N_FRAMES)], dtype=torch.float32
            )
            for condition, (key, n) in STATES.items()
        }
        conditions["action"] = led_to(conditions["action"], N_FRAMES)
        return Clip([torch.stack(frames)], conditions, hashlib.sha256(data).hexdigest())

    def describe(self) -> dict:
        return {"protocol": self.protocol, "view": self.view, "frame_size": self.frame_size}

    @functools.cached_property
    def _files(self):
        """split -> name of a TFRecord file without its suffix -> RecordFile, in the order of their numbers."""
        return {split: dict(sorted(self._find(split), key=lambda item: _ends(item[0]))) for split in SPLITS}

    def _find(self, split):
        """(name, RecordFile) of each TFRecord file of a split."""
        if self.source.is_dir():
            root = self.source if self.source.name == FOLDER else self.source / FOLDER
            files = {path: RecordFile(path, path.stat().st_size) for path in (root / split).glob("*.tfrecords")}
        else:
            members = {PurePosixPath(name): file for name, file in self._members.items()}
            files = {path: file for path, file in members.items() if path.match(f"{FOLDER}/{split}/*.tfrecords")}
        found = [(path.stem, file) for path, file in files.items() if FILE.fullmatch(path.stem)]
        if not found:
            raise FileNotFoundError(f"{self.source}: expected {FOLDER}/{split}/traj_A_to_B.tfrecords, found none")
        return found

    @functools.cached_property
    def _members(self):
        return tar_members(self.source)

    def _frame(self, features, key, where):
        """One frame -> (3, 64, 64) uint8."""
        values = feature_values(features, key, "bytes", where)
        n_bytes = SIZE * SIZE * 3
        if [len(value) for value in values] != [n_bytes]:
            found = " and ".join(str(len(value)) for value in values) or "no"
            raise VideoError(
                f"{where}: {key}: expected {n_bytes} bytes (RGB of {SIZE} x {SIZE} pixels), found {found} bytes"
            )
        pixels = np.frombuffer(values[0], np.uint8).reshape(SIZE, SIZE, 3)
        return torch.tensor(pixels).permute(2, 0, 1)


@functools.lru_cache(maxsize=8)
def _offsets(file):
    """Where the records of a file begin. Videos are read in order, so the files in use are few."""
    return file.offsets()


def _numbers(features, key, n, where):
    values = feature_values(features, key, "float", where)
    if len(values) != n:
        raise VideoError(f"{where}: {key}: expected {n} numbers, found {len(values)}")
    return list(values)


def _ends(stem):
    """traj_256_to_511 -> (256, 511)"""
    return tuple(map(int, FILE.fullmatch(stem).groups()))


def _n_records(stem):
    first, last = _ends(stem)
    return last - first + 1
