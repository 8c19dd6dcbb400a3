"""Files that appear whole or not at all, their checksums, and where downloads and indices are kept."""

import contextlib
import hashlib
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
