"""KITTI: drives through a city and its surroundings, recorded from a car, one PNG a frame."""

from collections.abc import Sequence

from ...files import file_sha256
from ...sizes import as_size
from ...urls import Place
from ..base import SPLITS, Clip, unusual_fit
from ..video.pictures import frame_number, numbered_pictures, read_pictures
from ..video.reader import VideoError, check_crop
from .base import Benchmark

# category -> date -> numbers of the drives
DRIVES = {
    "city": {
        "2011_09_26": "1 2 5 9 11 13 14 17 18 48 51 56 57 59 60 84 91 93 95 96 104 106 113 117",
        "2011_09_28": "1 2",
        "2011_09_29": "26 71",
    },
    "residential": {
        "2011_09_26": "19 20 22 23 35 36 39 46 61 64 79 86 87",
        "2011_09_30": "18 20 27 28 33 34",
        "2011_10_03": "27 34",
    },
    "road": {
        "2011_09_26": "15 27 28 29 32 52 70 101",
        "2011_09_29": "4",
        "2011_09_30": "16",
        "2011_10_03": "42 47",
    },
}
# protocol -> (categories, drives of 2011_09_26 that are not for training)
PROTOCOLS = {
    "prednet": (("city", "residential", "road"), {"val": (5,), "test": (70, 79, 104)}),
    "wu2020": (("city",), {"test": (60, 84, 93, 96)}),
}
CAMERAS = ("image_02", "image_03")


class KITTI(Benchmark):
    """Raw drives of KITTI (Geiger et al., "Vision meets Robotics: The KITTI Dataset", IJRR 2013), synchronised and
    rectified: a drive is a video of 10 frames a second, of about 1242 x 375 pixels.

    The central square is resized to 128 x 128 (or as ``frame_size`` and ``crop`` say), bilinear with antialiasing;
    papers on video prediction give 4 frames and ask for 5. KITTI has no split for video prediction, so each is named
    after the work whose list it is:

    ========= ============================ ===== === ==== ==============================================================
    protocol  drives of                    train val test list of
    ========= ============================ ===== === ==== ==============================================================
    "prednet" city, residential and road      57   1    3 PredNet (Lotter, Kreiman and Cox 2017), released code
    "wu2020"  city                            24   0    4 Wu et al., "Future Video Synthesis with Object Motion
                                                          Prediction" (CVPR 2020), released code; 4 -> 5 frames
    ========= ============================ ===== === ==== ==============================================================

    STDiff (2024) states 4 -> 5 frames of 128 x 128, but not its drives: none of these is known to be its split.

    Args:
        source: folder that holds ``DATE/DATE_drive_NNNN_sync/CAMERA/data/NNNNNNNNNN.png``. Drives outside the protocol
            are left alone.
        protocol: "prednet" or "wu2020".
        camera: "image_02" (left colour camera) or "image_03" (right).
        frame_size: H = W of the frames in pixels, or [H, W].
        crop: how pictures of another shape get to that: "center", "none" or "pad", see ``video.reader.fit_frames``.
    Raises:
        ValueError: a wrong option.
    """

    name = "kitti"
    protocols = tuple(PROTOCOLS)
    fps = 10.0
    shard_videos = 4  # drives are long

    def __init__(
        self,
        source: Place | None = None,
        protocol: str | None = None,
        *,
        camera: str = "image_02",
        frame_size: int | Sequence[int] = 128,
        crop: str = "center",
    ) -> None:
        super().__init__(source, protocol)
        if camera not in CAMERAS:
            raise ValueError(f"camera: expected one of {', '.join(CAMERAS)}, found {camera!r}")
        self.camera, self.frame_size, self.crop = camera, as_size(frame_size), check_crop(crop)

    def videos(self) -> dict[str, list[str]]:
        drives = self._drives()
        if not any((self.source / name).is_dir() for names in drives.values() for name in names):
            example = drives["train"][0]
            raise FileNotFoundError(f"{self.source}: expected drives like {example}/{self.camera}/data, found none")
        return drives

    def expected_counts(self) -> dict[str, int]:
        return {split: len(names) for split, names in self._drives().items()}

    def read(self, split: str, name: str) -> Clip:
        folder = self.source / name / self.camera / "data"
        if not folder.is_dir():
            raise VideoError(f"{folder}: no such folder; the {split} split of {self.protocol!r} has this drive")
        paths = numbered_pictures(folder)
        first, last = frame_number(paths[0].name), frame_number(paths[-1].name)
        times = folder.parent / "timestamps.txt"
        n_frames = len(times.read_text().split()) // 2 if times.is_file() else last + 1  # a line: date and time
        if (first, last, len(paths)) != (0, n_frames - 1, n_frames):
            raise VideoError(
                f"{folder}: incomplete drive: expected {n_frames} frames, 0 to {n_frames - 1}, found {len(paths)}, "
                f"{first} to {last}"
            )
        return Clip(read_pictures(paths, self.frame_size, crop=self.crop), sha256=file_sha256(*paths))

    def describe(self) -> dict:
        return {
            "protocol": self.protocol,
            "camera": self.camera,
            "frame_size": self.frame_size,
            "resample": "bilinear",
        } | unusual_fit(self)

    def _drives(self):
        """split -> names of its drives"""
        categories, held_out = PROTOCOLS[self.protocol]
        split_of = {_name("2011_09_26", number): split for split in held_out for number in held_out[split]}
        dates = (item for category in categories for item in DRIVES[category].items())
        names = sorted(_name(date, int(number)) for date, numbers in dates for number in numbers.split())
        return {split: [name for name in names if split_of.get(name, "train") == split] for split in SPLITS}


def _name(date, number):
    return f"{date}/{date}_drive_{number:04d}_sync"
