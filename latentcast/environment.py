"""What latentcast finds on a machine.

Nothing is downloaded, written or changed, and nothing raises: what cannot be found out says why in its place.
"""

import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import latentcast
from latentcast.cli import error_line
from latentcast.command import HERE, IN_CHECKOUT, typed
from latentcast.files import printable, user_cache

GB = 1e9
DECODERS = ("h264", "hevc", "mpeg4", "mpeg2video", "vp8", "vp9", "av1", "mjpeg", "gif", "wmv2")
ENCODERS = ("libx264", "gif")  # what videos are written with
SCRIPTED = "i3d_torchscript"  # weights that are nowhere to be fetched, and whose place others take
LEAST_GB = 2  # below which a disk is a problem: caches and checkpoints are larger


def examine():
    """-> what was asked -> its answer, JSON-able; ``problems``: what is missing, as sentences."""
    found = {name: _answer(question) for name, question in QUESTIONS.items()}
    return found | {"problems": list(_problems(found))}


def hardware(device):
    """What an evaluation ran on."""
    import torch

    name = torch.cuda.get_device_name(device) if torch.device(device).type == "cuda" else platform.machine()
    return {"device": name, "threads": torch.get_num_threads(), "torch": torch.__version__}


def git_commit():
    """The commit that this code is at, with "+" if files were changed; None where it is no checkout (what an
    environment lies in may be a repository of another project)."""
    if not IN_CHECKOUT:
        return None
    git = ["git", "-C", str(HERE.parent)]
    try:
        commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        changed = subprocess.run([*git, "diff", "--quiet", "HEAD"], capture_output=True).returncode
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit + "+" * bool(changed)


def _answer(question, *args):
    try:
        return question(*args)
    except Exception as error:  # a broken driver or package is what is looked for here
        return {"error": error_line(error)}


def _program():
    return {
        "version": latentcast.__version__,
        "from": f"{'checkout' if IN_CHECKOUT else 'package'} {HERE}",
        "python": f"{platform.python_version()} {sys.executable}",
        "system": platform.platform(),
    }


def _requirements():
    """(Requirement, its extra or None) of every package that is of use here."""
    from packaging.requirements import Requirement

    if _version("latentcast") is None:
        raise ValueError("latentcast is on the path, but not installed: what it needs is not known")
    for text in importlib.metadata.requires("latentcast"):
        needed = Requirement(text)
        named = str(needed.marker or "").partition("extra == ")[2].strip('"') or None
        if named != "dev" and (needed.marker is None or needed.marker.evaluate({"extra": named or ""})):
            yield needed, named


def _packages():
    return {needed.name: _version(needed.name) for needed, _ in _requirements()}


def _version(name):
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu():
    import torch

    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "kind": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "usable": usable,
        "threads": torch.get_num_threads(),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS"),
        "memory_gb": _gb(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")) if hasattr(os, "sysconf") else None,
    }


def _gpu():
    import torch

    found = {"cuda": torch.version.cuda, "mps": torch.backends.mps.is_available(), "devices": []}
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        bfloat16 = torch.cuda.get_device_capability(index) >= (8, 0)
        text = f"{torch.cuda.get_device_name(index)}, {_gb(free)} of {_gb(total)} GB free"
        found["devices"].append(text + ", bfloat16" * bfloat16)
    return found


def _video():
    return {"PyAV": _answer(_pyav), "decord": _answer(_decord), "ffmpeg": shutil.which("ffmpeg")}


def _pyav():
    import av

    def has(codec, mode):
        try:
            return bool(av.Codec(codec, mode))
        except ValueError:  # unknown to this build
            return False

    return {
        "version": av.__version__,
        "libavcodec": ".".join(map(str, av.library_versions["libavcodec"])),
        "decoders": " ".join(codec for codec in DECODERS if has(codec, "r")),
        "encoders": " ".join(codec for codec in ENCODERS if has(codec, "w")),
    }


def _decord():
    import decord

    return decord.__version__


def _weights():
    from latentcast.metrics.weights import SOURCES, find_weights

    found = {}
    for name in (*SOURCES, SCRIPTED):
        try:
            found[name] = str(find_weights(name))
        except FileNotFoundError:
            found[name] = None
    return found


def _wandb():
    from latentcast.training.trackers import logged_in

    return {"version": _version("wandb"), "logged_in": logged_in(), "WANDB_MODE": os.environ.get("WANDB_MODE")}


def _disk():
    return {"cache": _answer(_space, user_cache), "current_folder": _answer(_space, Path.cwd)}


def _space(where):
    folder = where()
    there = next(place for place in (folder, *folder.parents) if place.is_dir())
    space = shutil.disk_usage(there)
    return {
        "path": printable(str(folder)),
        "free_gb": _gb(space.free),
        "total_gb": _gb(space.total),
        "writable": os.access(there, os.W_OK),
    }


def _gb(n_bytes):
    return round(n_bytes / GB, 1)


QUESTIONS = {
    "latentcast": _program,
    "packages": _packages,
    "cpu": _cpu,
    "gpu": _gpu,
    "video": _video,
    "weights": _weights,
    "wandb": _wandb,
    "disk": _disk,
}


def _problems(found):
    """What is to be mended, a sentence each."""
    if "error" not in found["packages"]:
        for needed, extra in _requirements():
            version, expected = found["packages"][needed.name], f"expected {needed.name}{needed.specifier}"
            if version is None and extra is None:
                yield f"{needed.name}: not installed; {expected}"
            elif version is not None and not needed.specifier.contains(version, prereleases=True):
                yield f"{needed.name} {version}: {expected}" + (f" by the extra {extra}" if extra else "")
    for name, place in found["disk"].items():
        if not place.get("writable", True):
            yield f"disk.{name} {place['path']}: not writable"
        elif place.get("free_gb", LEAST_GB) < LEAST_GB:
            yield f"disk.{name} {place['path']}: {place['free_gb']} GB free"
    missing = [name for name, path in found["weights"].items() if path is None and name != SCRIPTED]
    if missing:
        yield f"no weights of {', '.join(missing)}, which metrics need; get them by {typed('fetch_weights')}"
    yield from (f"{name}: {text}" for name, text in _errors(found))


def _errors(found, above=""):
    """-> what could not be found out, by dotted name, and why."""
    for name, answer in found.items():
        if isinstance(answer, dict):
            if answer.keys() == {"error"}:
                yield above + name, answer["error"]
            else:
                yield from _errors(answer, f"{above}{name}.")
