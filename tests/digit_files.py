"""MNIST's IDX files, small."""

import gzip
import hashlib

import numpy as np

from latentcast.data.sets import digits

TRAIN, TEST = "train-images-idx3-ubyte", "t10k-images-idx3-ubyte"
N_TRAIN, N_VAL, N_TEST = 40, 7, 9  # the train file holds the digits of the validation, too


def idx(images, magic=0x803):
    return np.array([magic, *images.shape], ">u4").tobytes() + images.tobytes()


def small_mnist(folder, monkeypatch):
    """Two small IDX files, one gzipped, accepted as MNIST's by their size and md5."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for name, n, zipped in ((TRAIN, N_TRAIN, True), (TEST, N_TEST, False)):
        content = idx(rng.integers(0, 256, (n, 28, 28), np.uint8))
        monkeypatch.setitem(digits.MNIST_FILES, name, (n, hashlib.md5(content).hexdigest()))
        if zipped:
            (folder / f"{name}.gz").write_bytes(gzip.compress(content))
        else:
            (folder / name).write_bytes(content)
    monkeypatch.setattr(digits, "MNIST_VAL", N_VAL)
    return folder
