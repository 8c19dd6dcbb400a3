"""Files that appear whole or not at all, JSON, checksums, and where downloads and indices are kept."""

import contextlib
import hashlib
import json
import os
import uuid
from pathlib import Path


@contextlib.contextmanager
def replacing(path):
    """Give a temporary path beside ``path`` (folders are made) that takes its place when the block ends well."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def writing(path, advice=""):
    """Name ``path`` in the error of what cannot be written there; ``advice`` ends the line."""
    try:
        yield
    except OSError as error:
        raise OSError(f"{path}: cannot be written ({error.strerror}){advice}") from None


def read_json(path):
    """The dict in a JSON file; raises ValueError when it holds anything else."""
    try:
        found = json.loads(Path(path).read_text())
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path}: expected a JSON object, found {type(found).__name__}")
    return found


def write_json(path, content):
    """Write all or nothing: to a temporary file, renamed when it is on the disk. Raises OSError, which names it."""
    path = Path(path)
    with writing(path):
        with replacing(path) as temporary, open(temporary, "w") as file:
            json.dump(content, file, indent=1)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # makes this rename, and those before it, last through a power cut
        finally:
            os.close(folder)


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


def printable(text):
    """``text`` on one line, for logs: line breaks, other control characters and bytes that are no UTF-8 are escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text)


def user_cache():
    """``$XDG_CACHE_HOME/latentcast`` or ``~/.cache/latentcast``; not created here."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "latentcast"


def file_sha256(*paths):
    """SHA-256 of the files' bytes, one after another."""
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
