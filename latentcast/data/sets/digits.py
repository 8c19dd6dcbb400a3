"""Images of handwritten digits: those that scikit-learn brings, and MNIST from its IDX files."""

import functools
import gzip
import hashlib
import random
import struct
import urllib.error
import urllib.request
import zlib
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import UInt8
from torch import Tensor

from ...copies import local_copy
from ...files import replacing, user_cache
from ...urls import Place, Url, folder_at
from ..base import SPLITS

MNIST_URL = "https://ossci-datasets.s3.amazonaws.com/mnist/"
# file -> number of images, md5 of the unzipped content
MNIST_FILES = {
    "train-images-idx3-ubyte": (60000, "6bbc9ace898e44ae57da46a324031adb"),
    "t10k-images-idx3-ubyte": (10000, "2646ac647ad5339dbf082846283269ea"),
}
MNIST_VAL = 5000  # digits at the end of MNIST's training file that form the val split
IDX_IMAGES = 0x803  # magic number of an IDX file: unsigned bytes (08) in three dimensions (03)


def sklearn_digits(split: str, size: int) -> UInt8[Tensor, "N {size} {size}"]:
    """scikit-learn's 1,797 8x8 digits: (N, size, size) uint8, bilinear with the contrast raised.

    A tenth of them each is val and test.
    """
    images = F.interpolate(_sklearn_images(), size=(size, size), mode="bilinear", align_corners=False)[:, 0]
    images = (((images - 0.15) / 0.6).clamp(0, 1) * 255).round().to(torch.uint8)
    order = list(range(len(images)))
    random.Random("sklearn digits").shuffle(order)  # fixed, so that no seed ever mixes the splits
    held_out = len(order) // 10
    test, val, train = order[:held_out], order[held_out : 2 * held_out], order[2 * held_out :]
    return images[dict(zip(SPLITS, (train, val, test)))[split]]


@functools.cache  # half a MB, which comes as a packed table of text
def _sklearn_images():
    """(1797, 1, 8, 8) in [0, 1]."""
    from sklearn.datasets import load_digits

    return torch.from_numpy(load_digits().images).float()[:, None] / 16


def mnist_digits(
    split: str, size: int, folder: Place | None = None, url: str = MNIST_URL
) -> UInt8[Tensor, "N {size} {size}"]:
    """MNIST's digits: (N, size, size) uint8, bilinear with antialiasing where ``size`` is not 28.

    Test is the t10k file; val is the last 5,000 images of the training file, train the other 55,000.

    Args:
        folder: where the IDX files of images are, gzipped or not; None: downloaded once into the user's cache.
        url: where they are downloaded from.
    Raises:
        OSError: a file is missing, damaged, not MNIST's, or out of reach; names it, what was expected and found.
    """
    name = "t10k-images-idx3-ubyte" if split == "test" else "train-images-idx3-ubyte"
    if folder is None:
        folder = user_cache() / "mnist"
        if not (folder / f"{name}.gz").is_file():
            _download(f"{url.rstrip('/')}/{name}.gz", folder / f"{name}.gz")
    images = _read_mnist(name, local_copy(mnist_file(name, folder)))
    if split != "test":
        images = images[-MNIST_VAL:] if split == "val" else images[:-MNIST_VAL]
    if size != 28:
        images = F.interpolate(images[:, None], size=(size, size), mode="bilinear", antialias=True)[:, 0]
    return images


def mnist_file(name: str, folder: Place) -> Path | Url:
    """Path of ``name`` or ``name.gz`` in ``folder``.

    Raises:
        FileNotFoundError: neither is there.
    """
    folder = folder_at(folder)
    for path in (folder / f"{name}.gz", folder / name):
        if path.is_file():
            return path
    raise FileNotFoundError(f"{folder}: expected MNIST's {name}.gz or {name}, found neither")


def _read_mnist(name, path):
    """The images of an IDX file, (N, 28, 28) uint8."""
    n_images, md5 = MNIST_FILES[name]
    n_bytes = 16 + n_images * 28 * 28
    try:
        with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as file:
            content = file.read(n_bytes + 1)  # no more, however much it would unzip to
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise OSError(f"{path}: damaged gzip file ({error}); delete it and fetch it again") from None
    if len(content) < 16:
        raise OSError(f"{path}: expected the 16 bytes of an IDX header, found {len(content)}")
    magic, *shape = struct.unpack(">4I", content[:16])
    if magic != IDX_IMAGES:
        raise OSError(f"{path}: expected magic 0x{IDX_IMAGES:08x} (an IDX file of images), found 0x{magic:08x}")
    if shape != [n_images, 28, 28]:
        raise OSError(f"{path}: expected {n_images} images of 28x28, found {shape[0]} of {shape[1]}x{shape[2]}")
    if len(content) != n_bytes:
        found = f"{len(content)}" if len(content) < n_bytes else "more"
        raise OSError(f"{path}: expected {n_bytes} bytes unzipped, found {found}")
    found = hashlib.md5(content).hexdigest()
    if found != md5:
        raise OSError(f"{path}: not MNIST's {name}: expected md5 {md5} of the unzipped content, found {found}")
    return torch.from_numpy(np.frombuffer(content, np.uint8, offset=16).reshape(shape).copy())


def _download(url, path):
    try:
        with urllib.request.urlopen(url, timeout=60) as response:
            content = response.read()
    except (urllib.error.URLError, OSError) as error:
        reason = getattr(error, "reason", error)
        raise OSError(f"MNIST cannot be downloaded from {url} ({reason}); give data.mnist_dir=FOLDER") from None
    with replacing(path) as temporary:
        temporary.write_bytes(content)
