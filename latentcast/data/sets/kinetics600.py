"""Kinetics-600: clips of human actions from the web, as mp4 files in folders of their class, and lists of them."""

import csv
import functools
import hashlib
import logging
from collections.abc import Sequence

import torch

from latentcast.config import one_line

from ...files import file_sha256
from ...sizes import as_size
from ...urls import Place
from ..base import SPLITS, Clip, unusual_fit
from ..video.folder import check_rate, check_whole
from ..video.reader import VideoError, check_crop, iter_clip
from .base import Benchmark

logger = logging.getLogger("latentcast")

N_CLASSES = 600
COLUMNS = ("label", "youtube_id", "time_start", "time_end")


class Kinetics600(Benchmark):
    """Kinetics-600 (Carreira et al., "A Short Note about Kinetics-600", 2018), as models of video use it: the central
    square, resized to 64 x 64 with a Lanczos filter; ``frame_size`` and ``crop`` say otherwise.

    Published are lists of 392,622 train, 30,000 val and 60,000 test clips of about 10 seconds; the videos themselves
    lie on the web and become fewer. The lists in ``source`` say what is expected here: a row whose video is missing is
    named. The condition ``label``, one int64 a video, is the class's place in the alphabet of all lists' labels:
    ``provenance["classes"]``.

    Args:
        source: folder that holds ``{train,val,test}.csv`` or ``kinetics_600_{train,val,test}.csv``, with the columns
            label, youtube_id, time_start, time_end (others are ignored), and
            ``{train,val,test}/LABEL/YOUTUBEID_SSSSSS_EEEEEE.mp4``, start and end in seconds with six digits. A split
            without list and folder is left out.
        protocol: "standard", the published split.
        fps: frames a second; files have various rates, and of each the frames nearest in time are taken. None: all
            frames of every file at its own rate; the set's ``fps`` is then nominal.
        max_frames: of a video, from its start; None: all.
        frame_size: H = W of the frames in pixels, or [H, W].
        crop: how pictures of another shape get to that: "center", "none" or "pad", see ``video.reader.fit_frames``.
    Raises:
        FileNotFoundError: no list, or a folder of videos without its list.
        ValueError: a wrong option; a list without its columns, or with a row that cannot be read; more than 600 labels.
    """

    name = "kinetics600"
    fps = 25.0
    conditions = {"label": {"shape": [], "dtype": "int64", "per": "video", "n_values": N_CLASSES}}  # noqa: RUF012
    shard_videos = 128

    def __init__(
        self,
        source: Place | None = None,
        protocol: str | None = None,
        *,
        fps: float | None = 25.0,
        max_frames: int | None = None,
        frame_size: int | Sequence[int] = 64,
        crop: str = "center",
    ) -> None:
        super().__init__(source, protocol)
        check_whole(max_frames=1 if max_frames is None else max_frames)
        check_rate(fps=Kinetics600.fps if fps is None else fps)
        self.resampled_fps, self.max_frames = fps, max_frames
        self.frame_size, self.crop = as_size(frame_size), check_crop(crop)
        self.fps = Kinetics600.fps if fps is None else float(fps)
        self.lists = {split: path for split in SPLITS if (path := self._list(split))}
        if not self.lists:
            raise FileNotFoundError(f"{self.source}: expected train.csv or kinetics_600_train.csv, found neither")
        classes = sorted({label for split in self.lists for _, label, _ in self._rows(split)})
        if len(classes) > N_CLASSES:
            raise ValueError(f"{self.source}: expected lists of at most {N_CLASSES} labels, found {len(classes)}")
        checksums = {path.name: file_sha256(path) for path in self.lists.values()}
        self.provenance = {"classes": classes, "lists": checksums}
        if fps is None:
            self.provenance["fps"] = "nominal: every video has its own rate"

    def videos(self) -> dict[str, list[str]]:
        splits = {}
        for split, path in self.lists.items():
            names = [name for _, _, name in self._rows(split)]
            splits[split] = list(dict.fromkeys(names))
            if len(splits[split]) < len(names):
                logger.warning("%s: %d rows repeat an earlier one", path, len(names) - len(splits[split]))
        return splits

    def expected_counts(self) -> dict[str, int]:
        return {split: len({name for _, _, name in self._rows(split)}) for split in self.lists}

    def read(self, split: str, name: str) -> Clip:
        path = self.source / split / f"{name}.mp4"
        if not path.is_file():
            found = "no such file" if path.parent.is_dir() else "no such class folder"
            row = self._row_numbers[split][name]
            raise VideoError(f"{self.lists[split]}: row {row}: expected {path}, found {found}")
        label = self.provenance["classes"].index(name.rpartition("/")[0])
        frames = iter_clip(path, self.frame_size, fps=self.resampled_fps, resample="lanczos", crop=self.crop)
        if self.max_frames is not None:
            frames = _first(frames, self.max_frames)
        return Clip(frames, {"label": torch.tensor(label)}, file_sha256(path))

    def describe(self) -> dict:
        return {
            "protocol": self.protocol,
            "frame_size": self.frame_size,
            "fps": self.resampled_fps,
            "max_frames": self.max_frames,
            "resample": "lanczos",
            # labels count classes: another list of classes would give another meaning to those stored
            "classes_sha256": hashlib.sha256("\n".join(self.provenance["classes"]).encode()).hexdigest(),
        } | unusual_fit(self)

    @functools.cached_property
    def _row_numbers(self):
        """split -> name of a video -> number of its row"""
        return {split: {name: number for number, _, name in self._rows(split)} for split in self.lists}

    def _list(self, split):
        """The csv file of a split, or None where there is neither list nor folder."""
        names = (f"{split}.csv", f"kinetics_600_{split}.csv")
        for name in names:
            if (self.source / name).is_file():
                return self.source / name
        if (self.source / split).is_dir():
            raise FileNotFoundError(f"{self.source / split}: expected its list {' or '.join(names)}, found neither")
        return None

    def _rows(self, split):
        """(number of the row, label, name of the video) of each row of a list; the columns' names are row 1."""
        path = self.lists[split]
        with open(path, newline="", encoding="utf-8-sig") as file:
            rows = csv.DictReader(file)
            try:
                missing = [column for column in COLUMNS if column not in (rows.fieldnames or ())]
                if missing:
                    found = one_line(list(rows.fieldnames)) if rows.fieldnames else "an empty file"
                    raise ValueError(f"{path}: expected the columns {', '.join(COLUMNS)}, found {found}")
                for number, row in enumerate(rows, 2):
                    try:
                        start, end = int(row["time_start"]), int(row["time_end"])
                    except (ValueError, TypeError):
                        found = f"{row['time_start']!r} and {row['time_end']!r}"
                        raise ValueError(
                            f"{path}: row {number}: expected whole seconds in time_start and time_end, found {found}"
                        ) from None
                    if not row["label"] or not row["youtube_id"]:
                        found = f"{row['label']!r} and {row['youtube_id']!r}"
                        raise ValueError(f"{path}: row {number}: expected a label and a youtube_id, found {found}")
                    if {"/", "\0"} & {*row["label"], *row["youtube_id"]} or row["label"] in (".", ".."):
                        found = f"{row['label']!r} and {row['youtube_id']!r}"
                        raise ValueError(f"{path}: row {number}: expected names of a folder and a file, found {found}")
                    yield number, row["label"], f"{row['label']}/{row['youtube_id']}_{start:06d}_{end:06d}"
            except (csv.Error, UnicodeDecodeError) as error:
                raise ValueError(f"{path}: not a readable csv file ({error})") from None


def _first(pieces, n_frames):
    """Pieces of a video up to ``n_frames`` frames; what follows is not decoded."""
    for piece in pieces:
        yield piece[:n_frames]
        n_frames -= len(piece)
        if n_frames <= 0:
            return
