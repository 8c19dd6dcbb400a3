"""Checking data on disk before days of training rest on it."""

import hashlib
import logging
import tempfile

from ..files import file_sha256, told
from ..progress import Bar
from ..urls import Place, Url, folder_at
from .base import SPLITS
from .sets.prepared_videos import prepared_videos
from .store import prepared, shards
from .video.folder import build_index

logger = logging.getLogger("latentcast")


def check_folder(root: Place, clip_length: int = 1) -> dict:
    """Verify a prepared set, or any folder of videos: every file is read.

    Args:
        root: the folder, or the URL of a prepared set.
        clip_length: videos with fewer frames are named as too short.
    Returns:
        dict of ``counts`` (split -> videos; for a plain folder ``videos``), ``frames``, and ``problems``: a line for
        each damaged file, duplicate and too short video; each is logged too.
    Raises:
        FileNotFoundError: no such folder.
        EmptySplitError: a folder without a single video.
    """
    root = folder_at(root)
    if not root.is_dir():
        raise FileNotFoundError(f"{root}: no such folder")
    is_set = (root / prepared.MANIFEST).is_file() or any((root / split / shards.PLAN).is_file() for split in SPLITS)
    if isinstance(root, Url) and not is_set:
        raise ValueError(
            f"{root}: expected a prepared set, found no {prepared.MANIFEST}; videos are checked in folders"
        )
    figures = check_set(root, clip_length) if is_set else check_videos(root, clip_length)
    for problem in figures["problems"]:
        logger.warning("%s", problem)
    return figures


def check_set(root: Place, clip_length: int = 1) -> dict:
    """``check_folder`` of a prepared set: checksums, counts, lengths and equal videos within and across splits."""
    manifest = prepared.read_set_manifest(root)
    problems, counts, seen, n_frames = [], {}, {}, 0
    for split, expected in manifest["counts"].items():
        if split in manifest["generated"]:
            counts[split] = expected
            try:
                prepared_videos(root, split, 1)  # compares its sources with their checksums
            except OSError as error:
                problems.append(str(error))
            continue
        if not (root / split / shards.MANIFEST).is_file():
            problems.append(f"{root / split}: unfinished or gone; re-run {prepared.KIND.tool}")
            continue
        stored = shards.load_manifest(root / split, prepared.KIND)
        prepared.check_split_of(root, manifest, stored)
        damaged = list(shards.damage(root / split, stored["shards"]))
        problems += [f"{line}; delete it and re-run {prepared.KIND.tool}" for line in damaged]
        reader = shards.ShardReader(root / split, stored)
        counts[split] = len(reader.videos)
        if counts[split] != expected:
            problems.append(f"{root / split}: expected {expected} videos, found {counts[split]}")
        for video in Bar(reader.videos, f"check {split}", unit="video"):
            name, length = f"{split}: {stored['videos'][video]['name']}", reader.length(video)
            n_frames += length
            if length < clip_length:
                problems.append(f"{name}: {length} frames are fewer than clip_length={clip_length}")
            path = root / split / reader.file_name(video)
            if not any(line.startswith(f"{path}: ") for line in damaged):
                digest = _digest(reader, video)
                if digest in seen:
                    problems.append(f"{name}: the same frames as {seen[digest]}")
                seen.setdefault(digest, name)
    return {"counts": counts, "frames": n_frames, "complete": manifest["complete"], "problems": problems}


def _digest(reader, video, piece=256):
    """Of a video's frames, read ``piece`` at a time: drives and films are long."""
    digest = hashlib.sha256()
    for start in range(0, reader.length(video), piece):
        digest.update(reader.frames(video, start, start + piece).numpy())
    return digest.digest()


def check_videos(root: Place, clip_length: int = 1) -> dict:
    """``check_folder`` of video files: each is decoded; equal files are found by their bytes."""
    problems, seen, usable, n_frames = [], {}, 0, 0
    with tempfile.TemporaryDirectory() as folder:  # an index kept from earlier would hide damage since
        index = build_index(root, folder)
    for name, record in Bar(sorted(index.items()), "check", unit="file"):
        if "error" in record:
            problems.append(f"{name}: {record['error']}")
            continue
        length = record["info"]["n_frames"]
        usable, n_frames = usable + 1, n_frames + length
        if length < clip_length:
            problems.append(f"{name}: {length} frames are fewer than clip_length={clip_length}")
        try:
            digest = file_sha256(root / name)
        except OSError as error:
            problems.append(told(error, name))
            continue
        if digest in seen:
            problems.append(f"{name}: the same file as {seen[digest]}")
        seen.setdefault(digest, name)
    return {"counts": {"videos": usable}, "frames": n_frames, "problems": problems}
