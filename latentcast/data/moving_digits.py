"""Handwritten digits that move over a black square and bounce off its edges, made as they are asked for."""

import gzip
import hashlib
import random
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from ..files import replacing, user_cache
from .base import SPLITS, VideoDataset, VideoEntry, check_split, window_start

MNIST_URL = "https://ossci-datasets.s3.amazonaws.com/mnist/"
# file -> md5 of its unzipped content
MNIST_FILES = {
    "train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
    "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
}
MNIST_VAL = 5000  # digits at the end of MNIST's training file that form the val split


class MovingDigits(VideoDataset):
    """Digits on straight lines, reflected at the edges; video ``i`` of a split is always the same.

    Each axis has a speed drawn from ``speeds`` with a random sign, and a start on a lattice; the position is a triangle
    wave of time. Where digits overlap their brightness adds up to white. The splits share no digit image.

    Args:
        split: "train", "val" or "test".
        clip_length: frames a clip, at most ``video_length``.
        size: H = W of the frames, pixels.
        channels: 1, or 3 equal ones.
        n_digits: digits a video.
        digit_size: H = W of a digit, pixels; None: 24 for "sklearn", 28 for "mnist".
        speeds: pixels a frame that an axis may have.
        lattice: starting positions are multiples of this, pixels.
        source: "sklearn" (the 1,797 8x8 digits that scikit-learn brings) or "mnist".
        mnist_dir: folder with MNIST's IDX files, gzipped or not; None: downloaded once into the user's cache.
        mnist_url: where they are downloaded from.
        n_videos, n_heldout_videos: videos in train, and in each of val and test.
        video_length: frames a video.
        seed: of everything random, but not of the splits.
    Raises:
        OSError: MNIST's files are missing, damaged or out of reach.
    """

    fps = 10.0

    def __init__(
        self,
        split,
        clip_length,
        size=64,
        channels=1,
        n_digits=1,
        digit_size=None,
        speeds=(4,),
        lattice=4,
        source="sklearn",
        mnist_dir=None,
        mnist_url=MNIST_URL,
        n_videos=2000,
        n_heldout_videos=256,
        video_length=16,
        seed=0,
    ):
        check_split(split)
        if source not in ("sklearn", "mnist"):
            raise ValueError(f"source: expected sklearn or mnist, found {source!r}")
        if channels not in (1, 3):
            raise ValueError(f"channels: expected 1 or 3, found {channels}")
        if not 1 <= clip_length <= video_length:
            raise ValueError(f"clip_length: expected 1 to video_length={video_length}, found {clip_length}")
        digit_size = digit_size or (24 if source == "sklearn" else 28)
        if not 0 < digit_size < size:
            raise ValueError(f"digit_size: expected 1 to {size - 1} for frames of {size}, found {digit_size}")
        for name, value in (("n_digits", n_digits), ("lattice", lattice), ("n_videos", n_videos)):
            if value < 1:
                raise ValueError(f"{name}: expected at least 1, found {value}")
        if not speeds or min(speeds) < 0:
            raise ValueError(f"speeds: expected pixels a frame, at least 0, found {list(speeds)}")
        self.split, self.clip_length, self.size, self.channels, self.seed = split, clip_length, size, channels, seed
        self.n_digits, self.digit_size, self.speeds, self.lattice = n_digits, digit_size, list(speeds), lattice
        self.source, self.video_length = source, video_length
        self.n_videos = n_videos if split == "train" else n_heldout_videos
        if source == "sklearn":
            self._digits = _sklearn_digits(split, digit_size)
        else:
            self._digits = _mnist_digits(split, digit_size, mnist_dir, mnist_url)

    @property
    def videos(self):
        """list of VideoEntry."""
        return [VideoEntry(f"{self.split}-{i:06d}", self.video_length, self.fps) for i in range(self.n_videos)]

    def __len__(self):
        return self.n_videos

    def __getitem__(self, index):
        start = 0
        if self.split == "train":
            start = window_start(self.seed, self.epoch, index, self.video_length - self.clip_length + 1)
        return {"frames": self.read_video(index, start, start + self.clip_length)}

    def read_video(self, index, start, stop):
        if not 0 <= start < stop <= self.video_length:
            raise ValueError(f"video {index}: expected 0 <= start < stop <= {self.video_length}, found {start}:{stop}")
        if not 0 <= index < self.n_videos:
            raise IndexError(f"video {index}: expected 0 to {self.n_videos - 1}")
        rng = random.Random(f"{self.seed} {self.split} {index}")
        frames = torch.zeros(stop - start, self.size, self.size)
        for _ in range(self.n_digits):
            digit = self._digits[rng.randrange(len(self._digits))].float() / 255
            rows, columns = self._path(rng, start, stop), self._path(rng, start, stop)
            for frame, row, column in zip(frames, rows, columns):
                frame[row : row + self.digit_size, column : column + self.digit_size] += digit
        frames = frames.clamp_(max=1) * 2 - 1
        return frames[:, None].repeat(1, self.channels, 1, 1)

    def _path(self, rng, start, stop):
        """Positions along one axis at times start..stop-1: constant speed, reflected at 0 and at the far wall."""
        wall = self.size - self.digit_size
        origin = self.lattice * rng.randrange(wall // self.lattice + 1)
        speed = rng.choice(self.speeds) * rng.choice((-1, 1))
        unfolded = [(origin + speed * t) % (2 * wall) for t in range(start, stop)]
        return [min(x, 2 * wall - x) for x in unfolded]

    def describe(self):
        names = ("split", "size", "channels", "n_digits", "digit_size", "speeds", "lattice", "source")
        names += ("n_videos", "video_length", "seed")
        return {"type": "MovingDigits"} | {name: getattr(self, name) for name in names}


def _sklearn_digits(split, digit_size):
    """(N, digit_size, digit_size) uint8, bilinear from 8x8 with the contrast raised."""
    from sklearn.datasets import load_digits

    images = torch.from_numpy(load_digits().images).float()[:, None] / 16
    images = F.interpolate(images, size=(digit_size, digit_size), mode="bilinear", align_corners=False)[:, 0]
    images = (((images - 0.15) / 0.6).clamp(0, 1) * 255).round().to(torch.uint8)
    order = list(range(len(images)))
    random.Random("sklearn digits").shuffle(order)  # fixed, so that no seed ever mixes the splits
    held_out = len(order) // 10
    test, val, train = order[:held_out], order[held_out : 2 * held_out], order[2 * held_out :]
    return images[dict(zip(SPLITS, (train, val, test)))[split]]


def _mnist_digits(split, digit_size, folder, url):
    """(N, digit_size, digit_size) uint8."""
    name = "t10k-images-idx3-ubyte" if split == "test" else "train-images-idx3-ubyte"
    content = _read_mnist(name, folder, url)
    images = torch.from_numpy(np.frombuffer(content, np.uint8, offset=16).reshape(-1, 28, 28).copy())
    if split != "test":
        images = images[-MNIST_VAL:] if split == "val" else images[:-MNIST_VAL]
    if digit_size != 28:
        images = F.interpolate(images[:, None], size=(digit_size, digit_size), mode="bilinear", antialias=True)[:, 0]
    return images


def _read_mnist(name, folder, url):
    if folder is None:
        folder = user_cache() / "mnist"
        if not (folder / f"{name}.gz").is_file():
            _download(f"{url.rstrip('/')}/{name}.gz", folder / f"{name}.gz")
    paths = [path for path in (Path(folder, f"{name}.gz"), Path(folder, name)) if path.is_file()]
    if not paths:
        raise FileNotFoundError(f"mnist_dir {folder}: neither {name} nor {name}.gz is here")
    try:
        content = paths[0].read_bytes()
        content = gzip.decompress(content) if paths[0].suffix == ".gz" else content
    except (gzip.BadGzipFile, EOFError, ValueError) as error:
        raise OSError(f"{paths[0]}: damaged gzip file ({error}); delete it and fetch it again") from None
    digest = hashlib.md5(content).hexdigest()
    if digest != MNIST_FILES[name]:
        raise OSError(f"{paths[0]}: not MNIST's {name}: md5 of the content is {digest}, not {MNIST_FILES[name]}")
    return content


def _download(url, path):
    try:
        with urllib.request.urlopen(url, timeout=60) as response:
            content = response.read()
    except (urllib.error.URLError, OSError) as error:
        reason = getattr(error, "reason", error)
        raise OSError(f"MNIST cannot be downloaded from {url} ({reason}); give data.mnist_dir=FOLDER") from None
    with replacing(path) as temporary:
        temporary.write_bytes(content)
