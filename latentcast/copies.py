"""Local copies of files behind URLs, in a folder of bounded size that processes share.

A copy is called by what it holds, its SHA-256, so a file that was written anew is another one. It appears whole, by a
rename. Beyond the bound the least recently opened go first, and nobody is asked: a process that reads one goes on with
it, for on POSIX systems a file whose name is removed lives until it is closed and mapped no more (Windows refuses to
remove such a file, and it stays). What is being fetched counts as if it were there already.
"""

import contextlib
import hashlib
import logging
import os
import re
import time
from pathlib import Path

from .files import TEMPORARY, fcntl, local_folder, sweep, temporary_path, writing
from .urls import Url

logger = logging.getLogger("latentcast")

POLL = 0.1  # seconds, while what others fetch takes all the room
ROOM = "room"  # the lock of who counts
COPY = re.compile(r"[0-9a-f]{64}(\.\w+)?")  # other files in the folder are not ours


def local_copy(path: Path | Url, n_bytes: int | None = None, sha256: str | None = None) -> Path:
    """A local file with what stands at ``path``: the file itself where that is a Path.

    Args:
        path: a Path or Url.
        n_bytes, sha256: of the file, where they are known; what is fetched is compared with them, and a copy that is
            there already spares any question to the store.
    Returns:
        its Path; another process may have removed it by the time that it is opened, who then asks once more.
    Raises:
        OSError: it cannot be fetched, or is larger than the room for copies; one line, as Url's.
    """
    if not isinstance(path, Url):
        return path
    key = sha256
    if n_bytes is None:
        n_bytes = path.size()
        if n_bytes is None:
            raise FileNotFoundError(f"{path}: no such file")
    if key is None:
        key = hashlib.sha256(f"{path} {n_bytes} {path.version()}".encode()).hexdigest()
    limit = int(path.cache_gigabytes * 1e9)
    if n_bytes > limit:
        raise OSError(f"{path}: {n_bytes} bytes are more than cache_gigabytes={path.cache_gigabytes:g} has room for")
    folder = local_folder(path)
    copy = folder / f"{key}{path.suffix}"
    with writing(copy):
        if _used(copy, n_bytes):
            return copy
        (folder / "fetching").mkdir(parents=True, exist_ok=True)
        with _alone(folder, key[:2]):
            if _used(copy, n_bytes):  # another process has fetched it meanwhile
                return copy
            held = temporary_path(copy)
            temporary = temporary_path(folder / "fetching" / copy.name)
            try:
                while not _has_room(folder, n_bytes, limit, held):
                    time.sleep(POLL)
                path.download(temporary, n_bytes, sha256)
                with _alone(folder, ROOM):
                    os.replace(temporary, copy)
                    held.unlink()
            finally:
                for left in (held, temporary):
                    left.unlink(missing_ok=True)
    return copy


def _used(copy, n_bytes):
    """Whether the copy is there; it counts as used now."""
    with contextlib.suppress(FileNotFoundError):
        if copy.stat().st_size == n_bytes:
            with contextlib.suppress(PermissionError):  # another user's
                os.utime(copy)
            return True
    return False


def _has_room(folder, n_bytes, limit, held):
    """Whether there is so much room, now that older copies have made way; then ``held``, a file of that size without
    content, keeps it."""
    with _alone(folder, ROOM):
        for place in (folder, folder / "fetching"):
            sweep(place)
        taken, copies = 0, []
        with os.scandir(folder) as entries:
            for entry in entries:
                is_copy = COPY.fullmatch(entry.name)
                if is_copy or TEMPORARY.fullmatch(entry.name):
                    with contextlib.suppress(FileNotFoundError):
                        found = entry.stat()
                        taken += found.st_size
                        if is_copy:
                            copies.append((found.st_mtime_ns, found.st_size, entry.path))
        for _, size, path in sorted(copies):
            if taken + n_bytes <= limit:
                break
            with contextlib.suppress(PermissionError):  # open, on Windows
                Path(path).unlink(missing_ok=True)
                taken -= size
        if taken + n_bytes > limit:
            return False
        with open(held, "wb") as file:
            file.truncate(n_bytes)
        return True


@contextlib.contextmanager
def _alone(folder, name):
    """One thread or process at a time is in a block of this name, where the disk has locks; else some work is done
    twice."""
    (folder / "locks").mkdir(parents=True, exist_ok=True)
    with open(folder / "locks" / name, "a") as file:
        with contextlib.suppress(AttributeError, OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
