"""Folders and files behind a URL (``s3://``, ``gs://``, ``hf://``: all that fsspec knows), by the methods of a Path.

Such a store has neither rename nor mmap: a file is written whole, under its name, and read whole. Where a killed run
may leave one that was cut short, its reader has to see that (``shards.py``). What fails is tried again, ever later, and
then named. ``copies.py`` has the local copies that are read in a file's place.
"""

import dataclasses
import errno
import fnmatch
import functools
import hashlib
import logging
import os
import random
import re
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

logger = logging.getLogger("latentcast")

SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+)://")  # a single letter is a drive
TRIES, PAUSE = 5, 0.5  # seconds before the second try; twice as long before each one after
AT_ONCE = 16  # small files
GIGABYTES = 50  # of local copies
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
_chance = random.Random()  # its own: training's random numbers must not depend on a store's failures


def folder_at(
    location: "Place", cache_dir: str | Path | None = None, cache_gigabytes: float = GIGABYTES
) -> "Path | Url":
    """A folder as a Path, or where ``location`` is a URL as a Url.

    Args:
        location: text or a Path; a Url stays as it is.
        cache_dir: local folder of the copies that are read; None: the user's cache.
        cache_gigabytes: 1e9 bytes that they take at most.
    Raises:
        ValueError: no file system of fsspec's is called so, the package that has it is missing (it is named), several
            are chained, or no room for copies.
    """
    if isinstance(location, Url):
        return location
    text = str(location)
    if "::" in text and "://" in text:
        raise ValueError(f"{text}: expected the URL of one store, found several, chained by '::'")
    if not (found := SCHEME.match(text)):
        return Path(text)
    number = isinstance(cache_gigabytes, int | float) and not isinstance(cache_gigabytes, bool)
    if not (number and cache_gigabytes > 0):
        raise ValueError(f"cache_gigabytes: expected more than 0, found {cache_gigabytes}")
    from fsspec import get_filesystem_class  # here: most tools need none

    try:
        get_filesystem_class(found[1])
    except ImportError as error:
        missing = getattr(error.__cause__, "name", None) or "fsspec"
        raise ValueError(f"{text}: {found[0]} needs the package {missing}; pip install {missing}") from None
    except ValueError:
        raise ValueError(f"{text}: expected a kind of URL that fsspec knows, found {found[0]}") from None
    return Url(text.rstrip("/"), None if cache_dir is None else Path(cache_dir), float(cache_gigabytes))


@dataclasses.dataclass(frozen=True)
class Url:
    """A folder or file of a store. Pickles; made by ``folder_at``, which says what the attributes are.

    Methods raise FileNotFoundError or another OSError, in one line that begins with the URL."""

    text: str
    cache_dir: Path | None = None
    cache_gigabytes: float = GIGABYTES

    def __str__(self):
        return self.text

    def __truediv__(self, name):
        return dataclasses.replace(self, text=f"{self.text}/{name}")

    @property
    def name(self):
        return self.text.rpartition("/")[2]

    @property
    def suffix(self):
        return os.path.splitext(self.name)[1]

    def is_file(self):
        return self._info().get("type") == "file"

    def is_dir(self):
        return self._info().get("type") == "directory"

    def size(self):
        """Bytes of a file; None where there is none."""
        info = self._info()
        return info.get("size") if info.get("type") == "file" else None

    def version(self):
        """Text that is another one when the file has changed."""
        return self._do("read", lambda fs, path: str(fs.ukey(path)))

    def mkdir(self, parents=True, exist_ok=True):
        """Nothing: folders are there when they have files."""

    def sizes(self):
        """name -> bytes of each file in a folder, by one listing."""

        def listed(fs, path):
            fs.invalidate_cache()  # what others have written meanwhile counts
            return fs.ls(path, detail=True)

        try:
            found = self._do("listed", listed)
        except FileNotFoundError:
            return {}
        return {entry["name"].rpartition("/")[2]: entry["size"] for entry in found if entry["type"] == "file"}

    def glob(self, pattern):
        """The files of a folder whose names fit."""
        return [self / name for name in sorted(self.sizes()) if fnmatch.fnmatchcase(name, pattern)]

    def read_text(self, last=None):
        """The UTF-8 of a file, or of its ``last`` bytes."""

        def read(fs, path):
            found, size = fs.cat_file(path, start=last and -last), fs.info(path)["size"]
            _whole(len(found), size if last is None or size is None else min(last, size))
            return found

        return self._do("read", read).decode("utf-8", "surrogateescape")

    def read_texts(self, names):
        """``read_text`` of files of this folder, several at once."""
        return _all_of(lambda name: (self / name).read_text(), names)

    def sha256(self):
        """SHA-256 of a file's bytes, none of which is kept."""

        def read(fs, path):
            digest, n_bytes = hashlib.sha256(), 0
            with fs.open(path, "rb") as file:
                while block := file.read(1 << 20):
                    digest.update(block)
                    n_bytes += len(block)
            _whole(n_bytes, fs.info(path)["size"])
            return digest.hexdigest()

        return self._do("read", read)

    def download(self, local, n_bytes, sha256=None):
        """Copy the file, of which these things are known, to a local one."""

        def fetch(fs, path):
            fs.get_file(path, str(local))
            _whole(os.path.getsize(local), n_bytes)
            if sha256 is not None:
                with open(local, "rb") as file:
                    found = hashlib.file_digest(file, "sha256").hexdigest()
                if found != sha256:
                    raise OSError(f"expected sha256 {sha256}, found {found}")

        self._do("read", fetch)

    def upload(self, local):
        """Let the file be what a local one is."""

        def send(fs, path):
            try:
                fs.put_file(str(local), path)
            except FileNotFoundError:  # a store with real folders
                fs.makedirs(path.rpartition("/")[0], exist_ok=True)
                fs.put_file(str(local), path)
            fs.invalidate_cache()
            _whole(fs.info(path)["size"], os.path.getsize(local))

        self._do("written", send)

    def unlink(self, missing_ok=False):
        try:
            self._do("removed", lambda fs, path: fs.rm_file(path))
        except FileNotFoundError:
            if not missing_ok:
                raise

    def _info(self):
        def look(fs, path):
            fs.invalidate_cache()
            return fs.info(path)  # not fs.isfile, to which every failure means that nothing is there

        try:
            return self._do("read", look)
        except FileNotFoundError:
            return {}

    def _do(self, what, function):
        """``function(file system, path in it)``, tried again where it fails for what may pass; ``what`` failed, in the
        error: "read", "written"."""
        fs = _filesystem("/".join(self.text.split("/", 3)[:3]), os.getpid())
        path = fs._strip_protocol(self.text)
        for attempt in range(1, TRIES + 1):
            try:
                return function(fs, path)
            except FileNotFoundError:
                raise FileNotFoundError(f"{self}: no such file or folder") from None
            except Exception as error:  # of OSError's kind and of the libraries below
                if getattr(error, "errno", None) in FULL and what == "read":
                    raise  # the local disk
                text = " ".join(str(error).split())[:200]
                reason = text if text and isinstance(error, OSError) else f"{type(error).__name__}: {text}"
                if isinstance(error, (PermissionError, NotImplementedError)) or getattr(error, "errno", None) in FULL:
                    raise OSError(f"{self}: cannot be {what} ({reason})") from error
                if attempt == TRIES:
                    raise OSError(f"{self}: cannot be {what}, tried {TRIES} times ({reason})") from error
                pause = PAUSE * 2 ** (attempt - 1) * _chance.uniform(0.75, 1.25)
                logger.warning("%s: could not be %s (%s); once more in %.1f s", self, what, reason, pause)
                time.sleep(pause)


Place = str | int | Path | Url  # what names a folder; one called 2024 is a number to YAML


def unlink_all(paths):
    """Remove files, whether or not they are there, several at once where they are behind a URL."""
    paths = list(paths)
    if paths and isinstance(paths[0], Url):
        _all_of(lambda path: path.unlink(missing_ok=True), paths)
        return
    for path in paths:
        path.unlink(missing_ok=True)


def _all_of(function, items):
    with ThreadPoolExecutor(AT_ONCE) as threads:
        return list(threads.map(function, items))


def _whole(found, expected):
    if expected is not None and found != expected:
        raise OSError(f"expected {expected} bytes, found {found}")


@functools.lru_cache(maxsize=64)
def _filesystem(root, process):
    """fsspec's object for a store, one a process: its own cache has one a thread, and keeps each for ever."""
    from fsspec.core import url_to_fs

    return url_to_fs(root)[0]
