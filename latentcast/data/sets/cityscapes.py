"""Cityscapes: 30-frame sequences of street scenes from fifty cities, one PNG a frame."""

import logging
import re
from collections.abc import Sequence

from ...files import file_sha256
from ...sizes import as_size
from ...urls import Place
from ..base import SPLITS, Clip, unusual_fit
from ..video.pictures import read_pictures
from ..video.reader import VideoError, check_crop
from .base import Benchmark

logger = logging.getLogger("latentcast")

FOLDER = "leftImg8bit_sequence"
SUFFIX = "_leftImg8bit.png"
N_FRAMES = 30
CITIES = {
    "train": "aachen bochum bremen cologne darmstadt dusseldorf erfurt hamburg hanover jena krefeld monchengladbach "
    "strasbourg stuttgart tubingen ulm weimar zurich",
    "val": "frankfurt lindau munster",
    "test": "berlin bielefeld bonn leverkusen mainz munich",
}


class Cityscapes(Benchmark):
    """The sequences of Cityscapes (Cordts et al., "The Cityscapes Dataset for Semantic Urban Scene Understanding", CVPR
    2016): 2,975 train, 500 val and 1,525 test sequences of 30 frames of 2048 x 1024 pixels, 17 frames a second.

    The central square is resized to 128 x 128 (or as ``frame_size`` and ``crop`` say), bilinear with antialiasing. A
    video is named after its first frame, ``aachen/aachen_000000_000000``: in some cities one recording (the first
    number) holds many sequences, so a sequence starts at the first frame that is not among the 30 of the one before it.

    Args:
        source: folder that holds ``leftImg8bit_sequence/{train,val,test}/CITY/CITY_RRRRRR_FFFFFF_leftImg8bit.png``
            (recording and frame with six digits), or ``leftImg8bit_sequence`` itself. Missing cities are named in the
            log.
        protocol: "standard", the published split.
        frame_size: H = W of the frames in pixels, or [H, W].
        crop: how pictures of another shape get to that: "center", "none" or "pad", see ``video.reader.fit_frames``.
    Raises:
        ValueError: a wrong option.
    """

    name = "cityscapes"
    fps = 17.0

    def __init__(
        self,
        source: Place | None = None,
        protocol: str | None = None,
        *,
        frame_size: int | Sequence[int] = 128,
        crop: str = "center",
    ) -> None:
        super().__init__(source, protocol)
        self.frame_size, self.crop = as_size(frame_size), check_crop(crop)
        self.root = self.source / FOLDER if (self.source / FOLDER).is_dir() else self.source

    def videos(self) -> dict[str, list[str]]:
        if not any((self.root / split).is_dir() for split in SPLITS):
            raise FileNotFoundError(f"{self.source}: expected {FOLDER}/{{train,val,test}}/CITY, found no such folder")
        return {split: self._sequences(self.root / split, CITIES[split].split()) for split in SPLITS}

    def expected_counts(self) -> dict[str, int]:
        return {"train": 2975, "val": 500, "test": 1525}

    def read(self, split: str, name: str) -> Clip:
        start, first = name[:-6], int(name[-6:])
        paths = [self.root / split / f"{start}{first + i:06d}{SUFFIX}" for i in range(N_FRAMES)]
        missing = [path for path in paths if not path.is_file()]
        if missing:
            raise VideoError(
                f"{missing[0]}: no such file; expected {N_FRAMES} consecutive frames from {paths[0].name}, found "
                f"{N_FRAMES - len(missing)}"
            )
        return Clip(read_pictures(paths, self.frame_size, crop=self.crop), sha256=file_sha256(*paths))

    def describe(self) -> dict:
        described = {"protocol": self.protocol, "frame_size": self.frame_size, "resample": "bilinear"}
        return described | unusual_fit(self)

    def _sequences(self, folder, cities):
        """Names of a split's sequences."""
        if not folder.is_dir():
            logger.warning("%s: no such folder; the published set has it", folder)
            return []
        names = []
        for city in sorted({*cities, *(path.name for path in folder.glob("*") if path.is_dir())}):
            if not (folder / city).is_dir():
                logger.warning("%s: no such folder; the published set has it", folder / city)
                continue
            pattern = re.compile(rf"({re.escape(city)}_\d{{6}})_(\d{{6}}){SUFFIX}")
            found = (pattern.fullmatch(path.name) for path in (folder / city).iterdir())
            last = (None, 0)
            for recording, frame in sorted(match.groups() for match in found if match):
                if recording != last[0] or int(frame) >= last[1] + N_FRAMES:
                    last = recording, int(frame)
                    names.append(f"{city}/{recording}_{frame}")
        return names
