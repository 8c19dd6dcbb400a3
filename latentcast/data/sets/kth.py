"""KTH actions: 25 persons, six actions, four scenes, cut into 2,391 sequences by the published list."""

import functools
import re
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F

from ...files import file_sha256
from ...sizes import as_size
from ...urls import Place
from ..base import Clip
from ..video.folder import luma
from ..video.reader import VideoError, check_crop, fit_of, probe, read_clip
from .base import Benchmark

CLASSES = ("boxing", "handclapping", "handwaving", "jogging", "running", "walking")
HEIGHT, WIDTH = 120, 160
RESIZES = {"squeeze": "none", "crop": "center"}  # the papers' words -> of CROPS
HOME = "https://www.csc.kth.se/cvap/actions/"
LIST = "00sequences.txt"

# protocol -> (split -> persons, resize)
PROTOCOLS = {
    "svg": ({"train": range(1, 21), "test": range(21, 26)}, "squeeze"),
    "stdiff": ({"train": range(1, 17), "test": range(17, 26)}, "crop"),
    "official": (
        {"train": range(11, 19), "val": (19, 20, 21, 23, 24, 25, 1, 4), "test": (22, 2, 3, 5, 6, 7, 8, 9, 10)},
        "squeeze",
    ),
}
# Sequences that the published list has for each person: 4 a file, but 3 in one file of persons 11, 13, 14, 15 and 22,
# and person13_handclapping_d3 is missing.
N_SEQUENCES = dict.fromkeys(range(1, 26), 96) | {11: 95, 13: 91, 14: 95, 15: 95, 22: 95}
# The published file ends early; its last range, 246-370, becomes 246-304.
CUT_OFF = {"person01_boxing_d4": 304}

LINE = re.compile(r"(person(\d\d)_([a-z]+)_d[1-4])\s+(?:frames\s+(\d+-\d+(?:\s*,\s*\d+-\d+)*)|\*missing\*)")
NAME = re.compile(r"(person\d\d_([a-z]+)_d\d)_(\d+)-(\d+)")


class KTH(Benchmark):
    """The KTH human actions (Schuldt, Laptev and Caputo, "Recognizing Human Actions: A Local SVM Approach", ICPR 2004).

    A video is one of the 2,391 sequences that the published list cuts out of 599 files of 160 x 120 pixels, 25 frames
    a second; its name ends in its first and last frame, counted from 1. Some are shorter than 30 frames. Frames are
    grey (BT.601 luma). The condition ``label``, one int64 a video, is the action's place in the alphabet:
    ``provenance["classes"]``.

    Papers disagree on the persons of each split and on how the frame becomes square:

    ========== ======================== ==================== ===================== ======== =====================
    protocol   train                    val                  test                  resize   used by
    ========== ======================== ==================== ===================== ======== =====================
    "svg"      1-20                                          21-25                 squeeze  SVG, SRVP, MCVD
    "stdiff"   1-16                                          17-25                 crop     STDiff, NPVP
    "official" 11-18                    1, 4, 19-21, 23-25   2, 3, 5-10, 22        squeeze  the data set's, RVD
    ========== ======================== ==================== ===================== ======== =====================

    "squeeze" resizes the whole frame to a square (or to the shape of ``frame_size``), which narrows persons by a
    quarter; "crop" cuts out the central 120 x 120 pixels first. Resizing is bilinear with antialiasing. Sequences
    are those of the list under every protocol; SRVP takes the whole files instead, with the frames between the
    sequences, in which often no one is to be seen.

    The published ``person01_boxing_d4`` is cut off after 304 of 370 frames: its last sequence is the shorter for it.
    Any other range that its file does not hold is an error.

    Args:
        source: the folder with the six class folders (boxing, handclapping, handwaving, jogging, running, walking) of
            ``personPP_CLASS_dD_uncomp.avi``, each the content of the published zip file of its name.
        protocol: "svg", "stdiff" or "official".
        resize: "squeeze" or "crop"; default: the protocol's.
        frame_size: H = W of the prepared frames in pixels, or [H, W].
        crop: the same in the words of other sets: "none" (squeeze), "center" (crop), or "pad"; see
            ``video.reader.fit_frames``.
        sequences: the list; default: ``00sequences.txt`` in the source.
    Raises:
        ValueError: an unknown resize or crop, both, or a frame size below 1.
        FileNotFoundError: no list.
    """

    name = "kth"
    protocols = tuple(PROTOCOLS)
    channels = 1
    fps = 25.0
    conditions = {"label": {"shape": [], "dtype": "int64", "per": "video", "n_values": len(CLASSES)}}  # noqa: RUF012

    def __init__(
        self,
        source: Place | None = None,
        protocol: str | None = None,
        *,
        resize: str | None = None,
        frame_size: int | Sequence[int] = 64,
        crop: str | None = None,
        sequences: Place | None = None,
    ) -> None:
        super().__init__(source, protocol)
        self.persons, default = PROTOCOLS[self.protocol]
        if resize is not None and resize not in RESIZES:
            raise ValueError(f"resize: expected one of {', '.join(RESIZES)}, found {resize!r}")
        if resize is not None and crop is not None:
            raise ValueError(f"crop: expected null beside resize={resize}, found {crop!r}")
        self.crop = RESIZES[resize or default] if crop is None else check_crop(crop)
        self.frame_size = as_size(frame_size)
        self.sequences = self.source / LIST if sequences is None else Path(sequences)
        if not self.sequences.is_file():
            raise FileNotFoundError(
                f"{self.sequences}: no such file; expected the list of frame ranges, published at {HOME}{LIST}"
            )
        self.provenance = {"classes": list(CLASSES), "sequences_sha256": file_sha256(self.sequences)}

    def videos(self) -> dict[str, list[str]]:
        missing = [name for name in CLASSES if not (self.source / name).is_dir()]
        if missing:
            zipped = [f"{name}.zip" for name in missing if (self.source / f"{name}.zip").is_file()]
            advice = f"; unzip {', '.join(zipped)}, each into a folder of its name" if zipped else ""
            raise FileNotFoundError(
                f"{self.source}: expected the folders {', '.join(CLASSES)}, found no {', '.join(missing)}{advice}"
            )
        listed = read_sequences(self.sequences)
        return {
            split: [
                f"{stem}_{first}-{last}"
                for stem, (person, ranges) in listed.items()
                if person in persons
                for first, last in ranges
            ]
            for split, persons in self.persons.items()
        }

    def expected_counts(self) -> dict[str, int]:
        return {split: sum(N_SEQUENCES[p] for p in persons) for split, persons in self.persons.items()}

    def read(self, split: str, name: str) -> Clip:
        stem, action, first, last = NAME.fullmatch(name).groups()
        first, last = int(first), int(last)
        path = self.source / action / f"{stem}_uncomp.avi"
        if stem in CUT_OFF:
            info, last = None, min(last, CUT_OFF[stem])
        else:
            info = _probe(path)
            if last > info.n_frames:
                raise VideoError(f"{path}: expected the frames {first}-{last} of {LIST}, found {info.n_frames} frames")
        frames = read_clip(path, range(first - 1, last), info=info)
        if frames.shape[2:] != (HEIGHT, WIDTH):
            raise VideoError(f"{path}: expected {WIDTH} x {HEIGHT} pixels, found {frames.shape[3]} x {frames.shape[2]}")
        label = torch.tensor(CLASSES.index(action))
        return Clip([self._prepare(frames)], {"label": label}, _sha256(path))

    def describe(self) -> dict:
        resize = {crop: resize for resize, crop in RESIZES.items()}.get(self.crop)
        fit = {"crop": self.crop} if resize is None else {"resize": resize}
        return {"protocol": self.protocol} | fit | {"frame_size": self.frame_size}

    def _prepare(self, frames):
        """(T, 3, 120, 160) -> (T, 1, *frame_size) uint8."""
        grey = luma(frames)
        top, left, rows, columns, size, around = fit_of(HEIGHT, WIDTH, self.frame_size, self.crop)
        grey = grey[..., top : top + rows, left : left + columns]
        grey = F.pad(F.interpolate(grey, size=size, mode="bilinear", antialias=True), around)
        return grey.round().clamp(0, 255).to(torch.uint8)


def read_sequences(path: Place) -> dict[str, tuple[int, list[tuple[int, int]]]]:
    """The published list -> name of a file without "_uncomp.avi" -> (person, [(first, last frame), ...]).

    Frames are counted from 1, ends included. Ranges may overlap and need not ascend: in the published list some do not.

    Raises:
        ValueError: a line that names a file and is not understood, or a file named twice.
    """
    found = {}
    for row, line in enumerate(Path(path).read_text(encoding="utf-8", errors="replace").splitlines(), 1):
        line = line.strip()
        if not re.match(r"person\d+_", line):
            continue  # the heading
        match = LINE.fullmatch(line)
        if not match or match[3] not in CLASSES or int(match[2]) not in N_SEQUENCES:
            raise ValueError(f"{path}: row {row}: expected personPP_CLASS_dD frames A-B, C-D, ..., found {line!r}")
        if match[1] in found:
            raise ValueError(f"{path}: row {row}: expected each file once, found {match[1]} again")
        ranges = [tuple(map(int, ends.split("-"))) for ends in (match[4] or "").split(",") if ends]
        if any(not 1 <= first <= last for first, last in ranges):
            raise ValueError(f"{path}: row {row}: expected ranges A-B with 1 <= A <= B, found {line!r}")
        found[match[1]] = (int(match[2]), ranges)
    return found


# The sequences of a file are read one after another.


@functools.lru_cache(maxsize=4)
def _probe(path):
    return probe(path)


@functools.lru_cache(maxsize=4)
def _sha256(path):
    return file_sha256(path)
