"""Any folder tree of video files and of folders of pictures."""

import contextlib
import functools
import logging
from collections.abc import Sequence

import torch

from ...files import file_sha256
from ...sizes import as_size
from ...urls import Place
from ..base import SPLITS, Clip, unusual_fit
from ..video.folder import (
    SUFFIXES,
    check_options,
    check_rate,
    check_whole,
    list_videos,
    luma,
    rate_for_all,
    sampled_places,
    sampled_rate,
    splits_of,
)
from ..video.pictures import is_sequence, numbered_pictures, read_pictures
from ..video.reader import VideoAwayError, VideoInfo, check_crop, iter_clip, look, neat_rate
from .action_tables import ActionTables
from .base import Benchmark

NO_ACTIONS = "expected one frame rate, that of all videos, with --actions: frames left out or repeated have none"


class Folder(Benchmark):
    """Every video below a folder: files (see ``list_videos``), and folders without any whose png or jpg files, two at
    least, end in evenly spaced numbers (a size may follow: ``image-007_64x64.png``), which are frames in the order of
    these, upright as EXIF says. They are resized bilinear with antialiasing.

    Args:
        source: the folder.
        protocol: "folders": the splits are the folders ``train``, ``val`` and ``test`` below ``source``; "hash": a
            video's split follows from a hash of its path below ``source``, as in VideoFolder. None: "folders" where all
            three are there, "hash" where none is.
        frame_size: H = W of the frames in pixels, or [H, W].
        crop: how pictures of another shape get to that: "center", "none" or "pad", see ``video.reader.fit_frames``.
        channels: 3 (RGB) or 1 (grey, BT.601 luma).
        frame_stride: take every ``frame_stride``-th frame.
        fps: take the frames nearest in time to this rate instead (slower videos then repeat frames). None: as the
            videos are, and where they differ as in VideoFolder.
        image_fps: rate at which the pictures in folders were taken.
        val_fraction, test_fraction: share of the videos in these splits, for "hash".
        seed: of the hash.
        square_pixels: stretch files whose pixels are not square, as players do; else they are named in the log.
        actions: pattern of the path of each video's table of actions, a csv, npy or parquet file (see ActionTables),
            which become the condition ``action``. Needs videos of one frame rate.
        action_rows, action_columns, action_dtype, action_values: see ActionTables, whose defaults None stands for.
    Raises:
        ValueError: options that make no sense; no videos; one or two of the split's folders only; tables of
            which not one can be read, or not one that may hold the largest whole number.
    """

    name = "folder"
    protocols = ("folders", "hash")

    def __init__(
        self,
        source: Place | None = None,
        protocol: str | None = None,
        *,
        frame_size: int | Sequence[int] = 64,
        channels: int = 3,
        frame_stride: int = 1,
        fps: float | None = None,
        image_fps: float = 10.0,
        val_fraction: float = 0.05,
        test_fraction: float = 0.05,
        seed: int = 0,
        square_pixels: bool = False,
        actions: str | None = None,
        action_rows: str | None = None,
        action_columns: str | Sequence[str] | None = None,
        action_dtype: str | None = None,
        action_values: int | None = None,
        crop: str = "center",
    ) -> None:
        super().__init__(source, protocol)
        check_whole(frame_stride=frame_stride)
        check_options(channels, frame_stride, fps, val_fraction, test_fraction)
        check_rate(image_fps=image_fps)
        self.frame_size, self.crop = as_size(frame_size), check_crop(crop)
        self.channels, self.frame_stride = channels, frame_stride
        self.asked_fps, self.image_fps = fps, image_fps
        self.val_fraction, self.test_fraction, self.seed = val_fraction, test_fraction, seed
        self.square_pixels = square_pixels
        options = {"rows": action_rows, "columns": action_columns, "dtype": action_dtype, "values": action_values}
        given = {name: value for name, value in options.items() if value is not None}
        self.tables = None
        if actions is not None:
            if fps is not None:
                raise ValueError(f"fps: {NO_ACTIONS}, found fps={fps}")
            self.tables = ActionTables(self.source, self._names, actions, frame_stride, **given)
        elif given:
            raise ValueError(f"action_{next(iter(given))}: expected --actions beside it, found none")
        there = [split for split in SPLITS if (self.source / split).is_dir()]
        if protocol is None and not there:
            self.protocol = "hash"
        elif self.protocol == "folders" and len(there) < len(SPLITS):
            found = ", ".join(there) or "none of them"
            raise ValueError(
                f"{self.source}: expected the folders {', '.join(SPLITS)}, found {found}; --split hash divides the "
                "videos by a hash of their names"
            )

    def videos(self) -> dict[str, list]:
        if self.protocol == "hash":
            chosen = splits_of(self._names, self.val_fraction, self.test_fraction, self.seed)
        else:
            chosen = {name: name.partition("/")[0] for name in self._names}
        return {split: [name for name in self._names if chosen[name] == split] for split in SPLITS}

    @functools.cached_property
    def _rates(self):
        """Video -> its own frames per second; those that cannot be read, which will be named then, are left out."""
        rates = {}
        for name in self._names:
            with contextlib.suppress(Exception):
                rates[name] = self._rate(name)
        return rates

    @functools.cached_property
    def _sampling(self):
        """(frame_stride, fps) by which frames are taken; fps is None where videos are read at their own rate."""
        level = logging.WARNING if self.tables is None else logging.DEBUG
        rate = None if self.asked_fps else rate_for_all(self._rates, self.source, level=level)
        if rate is not None and self.tables is not None:
            low, high = min(self._rates.values()), max(self._rates.values())
            raise ValueError(f"{self.source}: {NO_ACTIONS}, found {low:g} to {high:g} frames per second")
        if rate is not None:
            return 1, neat_rate(rate / self.frame_stride)
        return self.frame_stride, self.asked_fps

    @property
    def fps(self) -> float:
        """Frames per second of the set."""
        stride, fps = self._sampling
        return float(fps or neat_rate(next(iter(self._rates.values()), self.image_fps) / stride))

    def read(self, split: str, name: str) -> Clip:
        path, conditions, table = self.source / name, {}, None
        sampling = self._sampling
        if self.tables is not None:
            sampling, table = (1, None), self.tables.read(name)
        if path.is_dir():
            paths = numbered_pictures(path)
            info = VideoInfo(len(paths), self.image_fps, 0, 0)
            n_frames, _ = sampled_rate(info, *sampling)
            places = sampled_places(info, range(n_frames), *sampling)
            frames, files = read_pictures((paths[place] for place in places), self.frame_size, crop=self.crop), paths
        elif path.is_file():
            fit = {"square_pixels": self.square_pixels, "crop": self.crop}
            frames, files = iter_clip(path, self.frame_size, *sampling, **fit), [path]
        else:
            raise VideoAwayError(f"{path}: no such file or folder; it was there when the videos were listed")
        if table is not None:
            frames, files = table.along(frames, conditions), [*files, table.path]
        if self.channels == 1:
            frames = (luma(piece).round().to(torch.uint8) for piece in frames)
        return Clip(frames, conditions, file_sha256(*files))

    def describe(self) -> dict:
        split = unusual_fit(self)
        if self.protocol == "hash":
            split |= {"val_fraction": self.val_fraction, "test_fraction": self.test_fraction, "seed": self.seed}
        if self.tables is not None:
            split["actions"] = self.tables.describe()
        return {
            "protocol": self.protocol,
            "frame_size": self.frame_size,
            "channels": self.channels,
            "frame_stride": self._sampling[0],
            "fps": self._sampling[1],
            "image_fps": self.image_fps,
            "resample": "bilinear",
        } | split

    @functools.cached_property
    def _names(self):
        """Paths of all videos below the source, sorted."""
        names = list_videos(self.source, is_sequence)
        if not names:
            raise ValueError(
                f"{self.source}: expected videos ({', '.join(SUFFIXES)}) or folders of numbered pictures, found neither"
            )
        return names

    @property
    def conditions(self) -> dict[str, dict]:
        """Those of ``--actions``."""
        return {} if self.tables is None else {"action": self.tables.condition}

    def _rate(self, name):
        return self.image_fps if (self.source / name).is_dir() else look(self.source / name).rate
