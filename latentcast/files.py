"""Files that appear whole or not at all, folders that one run at a time works in, JSON, checksums, and where downloads
and indices are kept. What is written whole, read whole or locked may be behind a URL as well (``urls.py``)."""

import contextlib
import functools
import hashlib
import json
import os
import re
import socket
import sys
import threading
import time
import uuid
from pathlib import Path

from .urls import Url

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None

LOCK = ".lock"
BEAT, SILENCE = 30, 300  # seconds: a lock's owner touches it this often; untouched for so long, it has none
TEMPORARY = re.compile(r"\.([0-9a-f]{8})-(\d+)-[0-9a-f]{8}\.tmp")
MANIFEST_MB = 512  # the largest manifest: of half a million videos
DEEPEST = 50  # levels of objects and lists in a JSON file
ABANDONED = 24 * 3600  # seconds: an older temporary file is of no process, wherever that ran


class InUseError(OSError):
    """Another run works in a folder; the message names folder, process, host and what it does."""


def temporary_path(path):
    """A new name beside ``path`` for a file that is to take its place; ``sweep`` removes it when its process died. Of a
    Url it is in a local folder."""
    if isinstance(path, Url):
        path = local_folder(path) / "uploads" / path.name
        path.parent.mkdir(parents=True, exist_ok=True)
        _sweep_once(path.parent)
    return Path(path).with_name(f".{_machine()}-{os.getpid()}-{uuid.uuid4().hex[:8]}.tmp")


def put(temporary, path):
    """Let a complete file take the place of ``path``, as a whole: by a rename, or uploaded where that is a Url."""
    if isinstance(path, Url):
        path.upload(temporary)
    else:
        os.replace(temporary, path)


def local_folder(url):
    """Where copies of what a Url names are kept, and what is about to be uploaded."""
    return url.cache_dir or user_cache() / "copies"


def sweep(folder):
    """Remove the temporary files that killed processes left in a folder: ended ones on this machine, and those of any
    machine that nobody has written to for a day."""
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            if found := TEMPORARY.fullmatch(entry.name):
                machine, pid = found.groups()
                dead = machine == _machine() and not _alive(int(pid))
                with contextlib.suppress(OSError):  # its process has renamed it, or another one swept here too
                    if dead or time.time() - entry.stat().st_mtime > ABANDONED:
                        os.unlink(entry.path)


_sweep_once = functools.cache(sweep)  # a folder of thousands of files is written one by one


@contextlib.contextmanager
def replacing(path, advice="", durable=False):
    """Give a temporary path beside ``path`` (folders are made) that takes its place when the block ends well.

    What killed processes left in the folder goes. Errors of writing name ``path``, see ``writing``. ``durable``: the
    file is on the disk before it takes the place, and has it after a power cut.
    """
    away = isinstance(path, Url)
    path = path if away else Path(path)
    with writing(path, advice):
        if not away:
            path.parent.mkdir(parents=True, exist_ok=True)
            _sweep_once(path.parent)
        temporary = temporary_path(path)
        try:
            yield temporary
            if durable and not away:
                _to_disk(temporary)
            put(temporary, path)
            if durable and not away:
                _to_disk(path.parent)
        finally:
            temporary.unlink(missing_ok=True)


def _to_disk(path):
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def writing(path, advice=""):
    """Name ``path`` in the error of what cannot be written there, one line; ``advice`` ends it.

    Raises:
        OSError: in the place of what the system, safetensors, FFmpeg or torch.save raised. Errors about files elsewhere
            pass.
    """
    path = local_folder(path) / "uploads" if isinstance(path, Url) else Path(path)
    try:
        yield
    except Exception as error:
        reason = _reason(error)
        named = {getattr(error, name, None) for name in ("filename", "filename2")} - {None}
        places = [Path(os.fsdecode(name)) for name in named] or [path]
        # Ours is also a folder that was to be made; what is copied to the path is named by its own error.
        if reason is None or not any(p in (path, *path.parents) or TEMPORARY.fullmatch(p.name) for p in places):
            raise
        named = OSError(f"{path}: cannot be written ({reason}){advice}")
        named.errno = getattr(error, "errno", None)
        raise named from None


def _reason(error):
    """Why the system refused, from an error of any library that writes files; None where it was something else."""
    if getattr(error, "strerror", None):
        return error.strerror
    if type(error).__name__ == "SafetensorError" and (found := re.search(r"os error (\d+)", str(error))):
        return os.strerror(int(found[1]))
    if isinstance(error, RuntimeError):  # torch.save
        if isinstance(error.__context__, OSError):  # into an open file; torch's own message hides the system's
            return error.__context__.strerror
        if "inline_container" in str(error):
            return "no space left, or the file too large"
    return None


@contextlib.contextmanager
def locked(folder, what):
    """Keep other runs out of ``folder`` (made where it is missing) while the block runs.

    A file in the folder says who is there: the kernel holds a lock on it for the process, so that one which was killed
    frees it at once; another machine's counts for as long as it is touched, ``SILENCE`` seconds at most. Of the ranks
    of one job the first has the lock, for all of them. A Url is locked for the runs of this machine and user.

    Args:
        folder: a Path or Url.
        what: what this run does there, for the message that another one gets.
    Raises:
        InUseError: another run is there; one line names it.
        OSError: the lock cannot be written.
    """
    if isinstance(folder, Url):
        place = local_folder(folder) / "locks" / hashlib.sha256(str(folder).encode()).hexdigest()
    else:
        place = Path(folder)
    path = place.resolve() / LOCK
    if later_rank():
        yield
        return
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        writable = os.access(path.parent, os.W_OK)
        file = _take(path, folder) if writable else None
    if file is None:  # nobody can change such a folder
        yield
        return
    ended = threading.Event()
    _locks.add(file)
    try:
        with writing(path):
            holder = {"pid": os.getpid(), "host": socket.gethostname(), "kernel": _kernel(), "machine": _machine()}
            file.seek(0)
            file.truncate()
            json.dump(holder | {"what": what, "since": time.strftime("%Y-%m-%d %H:%M:%S")}, file)
            file.flush()
        threading.Thread(target=_beat, args=(path, ended), daemon=True).start()
        yield
    finally:
        ended.set()
        path.unlink(missing_ok=True)  # before others can have the lock, who would lose theirs
        _locks.discard(file)
        file.close()


_locks = set()  # open files


def _leave_locks():
    while _locks:
        _locks.pop().close()


if hasattr(os, "register_at_fork"):  # else a loader's workers would keep the lock when this process was killed
    os.register_at_fork(after_in_child=_leave_locks)


def _take(path, folder):
    """The lock's file, open and locked; its content is that of the holder before."""
    with contextlib.ExitStack() as stack:
        while True:
            new = True
            try:
                descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
            except FileExistsError:
                new = False
                try:
                    descriptor = os.open(path, os.O_RDWR)
                except FileNotFoundError:  # its owner ended between the two
                    continue
            file = stack.enter_context(open(descriptor, "r+"))
            supported = True
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                until = time.monotonic() + 2
                while not (holder := _holder(file)) and time.monotonic() < until:  # who has it is about to say so
                    time.sleep(0.02)
                raise InUseError(_refusal(folder, holder)) from None
            except (AttributeError, OSError):  # no fcntl; a file system without locks
                supported = False
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(descriptor), path.stat()):
                    break  # else the one before has ended, and removed what we have just locked
        holder = _holder(file)
        if holder.get("kernel") == _kernel():
            gone = supported or (holder["machine"] == _machine() and not _alive(holder["pid"]))
        else:
            gone = new or (supported and not holder)
        if not gone and _now(path.parent) - path.stat().st_mtime < SILENCE:
            raise InUseError(_refusal(folder, holder))
        stack.pop_all()
        return file


def _refusal(folder, holder):
    who = "another run works here"
    if holder:
        who += f": {holder['what']}, process {holder['pid']} on {holder['host']} since {holder['since']}"
    return f"{folder}: {who}; wait for its end, or use another folder"


def _holder(file):
    """What the lock says; empty where its owner has not written it yet, or died before."""
    with contextlib.suppress(OSError, ValueError):
        file.seek(0)
        found = json.load(file)
        if isinstance(found, dict) and found.keys() >= {"pid", "host", "kernel", "machine", "what", "since"}:
            return found
    return {}


def _beat(path, ended):
    while not ended.wait(BEAT):
        with contextlib.suppress(OSError):
            os.utime(path)


def _now(folder):
    """The time by the clock that stamps the files of this folder, which may be a server's."""
    probe = temporary_path(folder / LOCK)
    try:
        probe.touch()
        return probe.stat().st_mtime
    finally:
        probe.unlink(missing_ok=True)


def later_rank():
    """Whether this process is one of a job's other ranks, started by torchrun, Lightning or Slurm."""
    names = ("RANK", "LOCAL_RANK", "NODE_RANK", "SLURM_PROCID")
    if any(os.environ.get(name, "0") not in ("", "0") for name in names):
        return True
    if "torch" not in sys.modules:  # which takes seconds to load
        return False
    from .distributed import rank_and_world

    return rank_and_world()[0] > 0


@functools.cache
def _kernel():
    """Which running system this is: containers on it share the kernel's locks, whatever they call themselves."""
    with contextlib.suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return socket.gethostname()


@functools.cache
def _machine():
    """Which processes' numbers mean the same here: eight hex digits for a kernel and its space of processes."""
    space = ""
    with contextlib.suppress(OSError):
        space = os.readlink("/proc/self/ns/pid")
    return hashlib.sha256(f"{_kernel()} {space}".encode()).hexdigest()[:8]


def _alive(pid):
    """Whether a process of this machine runs."""
    if fcntl is None:  # os.kill would end it
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):  # another user's
        return True
    return True


def read_json(path, limit=64):
    """The dict in a JSON file of at most ``limit`` MB; raises ValueError when it holds anything else, or NaN."""
    path = path if isinstance(path, Url) else Path(path)
    size = path.size() if isinstance(path, Url) else path.stat().st_size
    if size is not None and size > limit * 10**6:
        raise ValueError(f"{path}: expected at most {limit} MB of JSON, found {size / 10**6:.0f} MB")
    try:
        text = path.read_text()
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON ({error})") from None
    return parse_json(path, text)


def parse_json(path, text):
    """The dict in the text of a JSON file; raises as ``read_json``."""
    try:
        found = json.loads(text, parse_constant=_no_number)
        if _depth(found) > DEEPEST:
            raise ValueError(f"more than {DEEPEST} levels")
    except RecursionError:
        raise ValueError(f"{path}: not valid JSON (more than {DEEPEST} levels)") from None
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path}: expected a JSON object, found {type(found).__name__}")
    return found


def _no_number(name):
    raise ValueError(f"{name} is no number")


def _depth(value):
    """Levels of dicts and lists, counted no further than is needed."""
    depth, level = 0, [value]
    while level and depth <= DEEPEST:
        inner = (item.values() if isinstance(item, dict) else item for item in level if isinstance(item, (dict, list)))
        level, depth = [item for items in inner for item in items], depth + 1
    return depth


def write_json(path, content):
    """Write all or nothing: to a temporary file, renamed when it is on the disk. Raises OSError, which names it."""
    with replacing(path, durable=True) as temporary, open(temporary, "w") as file:
        json.dump(content, file, indent=1)
        file.write("\n")


def write_text(path, text):
    """Write UTF-8, all or nothing; bytes of file names that are no text are escaped. Raises OSError, which names it."""
    with replacing(path) as temporary:
        temporary.write_bytes(text.encode("utf-8", "backslashreplace"))


def link_outside(path, root):
    """What is wrong with a path below ``root`` that leads out of it over a link, as one line; None where none does."""
    found = Path(path).resolve()
    if found.is_relative_to(Path(root).resolve()):
        return None
    return f"{path}: expected a file in this folder, found a link to {found}"


def error_numbers(error):
    """The system's numbers (``errno``) of an error and of those that led to it."""
    numbers = set()
    while error is not None:
        numbers.add(getattr(error, "errno", None))
        error = error.__context__
    return numbers - {None}


def told(error, name):
    """What happened to a file in one line that names it, whatever the error."""
    if getattr(error, "strerror", None):
        return f"{name if error.filename is None else os.fsdecode(error.filename)}: {error.strerror}"
    text = str(error) if isinstance(error, (OSError, ValueError)) else f"{type(error).__name__}: {error}"
    return text if str(name) in text else f"{name}: {text}"


def shortened(name, limit=200):
    """A file's name of ``limit`` bytes at most, for disks that take 255: the end of a longer one is replaced by a
    checksum of all of it, so that names that differ stay different."""
    if len(os.fsencode(name)) <= limit:
        return name
    digest = hashlib.sha256(os.fsencode(name)).hexdigest()[:12]
    while len(os.fsencode(name)) > limit - 1 - len(digest):
        name = name[:-1]
    return f"{name}-{digest}"


def telling_names(parts):
    """A name for each path, given as its parts: the last of them, as many as tell the paths apart, with "/" between;
    None where two are equal."""
    for n in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-n:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    return None


def printable(text):
    """``text`` on one line, for logs: line breaks, other control characters and bytes that are no UTF-8 are escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text)


def user_cache():
    """``$XDG_CACHE_HOME/latentcast`` or ``~/.cache/latentcast``; not created here."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "latentcast"


def file_sha256(*paths):
    """SHA-256 of the files' bytes, one after another; of a Url alone, or of Paths."""
    if isinstance(paths[0], Url):
        return paths[0].sha256()
    digest = hashlib.sha256()
    for path in paths:
        with open(path, "rb") as file:
            for block in iter(lambda: file.read(1 << 20), b""):
                digest.update(block)
    return digest.hexdigest()


def update_digest(digest, tensors, end=""):
    """Feed a hash with name, type, shape and bytes of each of ``tensors``, a dict, in the order of their names.

    ``end`` closes the line that goes before the bytes.
    """
    import torch  # here, because tools that hash no tensors start faster without it

    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}{end}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
