"""Moving MNIST and Stochastic Moving MNIST (SM-MNIST), made from MNIST's IDX files."""

from collections.abc import Sequence

from latentcast.config import check_counts
from latentcast.copies import local_copy
from latentcast.sizes import as_square

from ...urls import Place
from ..base import Clip
from .base import Benchmark
from .digits import MNIST_FILES, mnist_file
from .moving_digits import FPS, MAX_SPEED, MOST_VIDEOS, MovingDigits

TRAIN_FILE = "train-images-idx3-ubyte"


class MovingMNIST(Benchmark):
    """MNIST digits that bounce off the edges by the deterministic rule of SVG's generator (see MovingDigits).

    Training videos are made as they are asked for, of the first 55,000 digits of the training file; val (of its last
    5,000) and test (of the t10k file) are stored. The data set that Srivastava et al. (2015) published moves 28-pixel
    digits by other rules; its test file is not this one.

    Args:
        source: folder with MNIST's two IDX files of images, gzipped or not.
        n_digits: digits a video; 2 and 3 are in use.
        length: frames a video; None: 20 (10 -> 10), and 30 (5 -> 25) for SM-MNIST.
        n_train, n_val, n_test: videos; ``n_test`` None: 1,000, and 256 for SM-MNIST, as in SVG's evaluation.
        seed: of everything random, but not of the splits.
        frame_size, digit_size: H = W, pixels.
        max_speed: largest speed on an axis, pixels a frame.
    Raises:
        ValueError: an option is out of range.
        OSError: an IDX file is missing, damaged or not MNIST's.
    """

    name = "moving_mnist"
    protocols = ("svg",)
    channels = 1
    fps = FPS
    motion = "deterministic"
    usual_length, usual_n_test = 20, 1000

    def __init__(
        self,
        source: Place | None = None,
        protocol: str | None = None,
        *,
        n_digits: int = 2,
        length: int | None = None,
        n_train: int = 60000,
        n_val: int = 256,
        n_test: int | None = None,
        seed: int = 0,
        frame_size: int | Sequence[int] = 64,
        digit_size: int = 32,
        max_speed: int = MAX_SPEED,
    ) -> None:
        super().__init__(source, protocol)
        self.options = {
            "n_digits": n_digits,
            "length": self.usual_length if length is None else length,
            "n_train": n_train,
            "n_val": n_val,
            "n_test": self.usual_n_test if n_test is None else n_test,
            "frame_size": frame_size,
            "digit_size": digit_size,
            "max_speed": max_speed,
        }
        self.options["frame_size"] = as_square(frame_size, "frame_size", f"frames of {self.name}")
        check_counts(**self.options)
        if n_train > MOST_VIDEOS:  # the other splits are refused by MovingDigits
            raise ValueError(f"n_train: expected at most {MOST_VIDEOS}, found {n_train}")
        self.options["seed"] = seed
        self.frame_size = self.options["frame_size"]
        self._videos = {split: self._generator(split) for split in ("val", "test")}
        self.provenance = {"mnist_md5": {name: md5 for name, (_, md5) in MNIST_FILES.items()}}

    def videos(self) -> dict[str, list[str]]:
        return {split: [entry.name for entry in made.videos] for split, made in self._videos.items()}

    def expected_counts(self) -> dict[str, int]:
        return {split: self.options[f"n_{split}"] for split in self._videos}

    def generated(self) -> dict[str, dict]:
        return {"train": self._arguments() | {"n_videos": self.options["n_train"]}}

    def files(self) -> dict:
        path = mnist_file(TRAIN_FILE, self.source)
        return {f"mnist/{path.name}": local_copy(path)}

    def read(self, split: str, name: str) -> Clip:
        index = int(name.rpartition("-")[2])
        return Clip([self._videos[split].draw(index, 0, self.options["length"])])

    def describe(self) -> dict:
        return {"protocol": self.protocol, "motion": self.motion} | self.options

    def _generator(self, split):
        arguments = self._arguments() | {"n_heldout_videos": self.options[f"n_{split}"], "mnist_dir": self.source}
        length, size = self.options["length"], self.options["frame_size"]
        return MovingDigits(split, clip_length=length, size=size, channels=self.channels, **arguments)

    def _arguments(self):
        """Of MovingDigits, whatever the split."""
        options = {name: self.options[name] for name in ("n_digits", "digit_size", "max_speed", "seed")}
        return options | {"motion": self.motion, "source": "mnist", "video_length": self.options["length"]}


class StochasticMovingMNIST(MovingMNIST):
    """SM-MNIST: as MovingMNIST, with velocities drawn anew at each bounce; videos of 30 frames, 256 in test."""

    name = "smmnist"
    motion = "stochastic"
    usual_length, usual_n_test = 30, 256
