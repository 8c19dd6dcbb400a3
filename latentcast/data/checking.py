"""Checking data on disk before days of training rest on it."""

import hashlib
import logging
from pathlib import Path

from tqdm import tqdm

from . import prepared, shards
from .base import SPLITS
from .benchmarks.base import file_sha256
from .video_folder import build_index

logger = logging.getLogger("latentcast")


def check_folder(root, clip_length=1):
    """Verify a prepared set, or any folder of videos: every file is read.

    Args:
        root: the folder.
        clip_length: videos with fewer frames are named as too short.
    Returns:
        dict of ``counts`` (split -> videos; for a plain folder ``videos``), ``frames``, and ``problems``: a line for
        each damaged file, duplicate and too short video; each is logged too.
    Raises:
        FileNotFoundError: no such folder.
        EmptySplitError: a folder without a single video.
    """
    root = Path(root)
    if not root.is_dir():
        raise FileNotFoundError(f"{root}: no such folder")
    is_set = (root / prepared.MANIFEST).is_file() or any((root / split / shards.PLAN).is_file() for split in SPLITS)
    figures = check_set(root, clip_length) if is_set else check_videos(root, clip_length)
    for problem in figures["problems"]:
        logger.warning("%s", problem)
    return figures


def check_set(root, clip_length=1):
    """``check_folder`` of a prepared set: checksums, counts, lengths and equal videos within and across splits."""
    manifest = prepared.read_set_manifest(root)
    problems, counts, seen, n_frames = [], {}, {}, 0
    for split, expected in manifest["counts"].items():
        if split in manifest["generated"]:
            prepared.prepared_videos(root, split, 1)  # compares its sources with their checksums
            counts[split] = expected
            continue
        stored = shards.read_json(root / split / shards.MANIFEST)
        damaged = list(shards.damage(root / split, stored["shards"]))
        problems += damaged
        reader = shards.ShardReader(root / split, stored)
        counts[split] = len(reader.videos)
        if counts[split] != expected:
            problems.append(f"{root / split}: expected {expected} videos, found {counts[split]}")
        bad = {line.partition(": ")[0] for line in damaged}
        for video in tqdm(reader.videos, f"check {split}", unit="video"):
            name, length = f"{split}: {stored['videos'][video]['name']}", reader.length(video)
            n_frames += length
            if length < clip_length:
                problems.append(f"{name}: {length} frames are fewer than clip_length={clip_length}")
            if str(root / split / reader.file_name(video)) not in bad:
                digest = hashlib.sha256(reader.frames(video, 0, length).numpy()).digest()
                if digest in seen:
                    problems.append(f"{name}: the same frames as {seen[digest]}")
                seen.setdefault(digest, name)
    return {"counts": counts, "frames": n_frames, "complete": manifest["complete"], "problems": problems}


def check_videos(root, clip_length=1):
    """``check_folder`` of video files: each is decoded; equal files are found by their bytes."""
    problems, seen, usable, n_frames = [], {}, 0, 0
    for name, record in tqdm(sorted(build_index(root).items()), "check", unit="file"):
        if "error" in record:
            problems.append(f"{name}: {record['error']}")
            continue
        length = record["info"]["n_frames"]
        usable, n_frames = usable + 1, n_frames + length
        if length < clip_length:
            problems.append(f"{name}: {length} frames are fewer than clip_length={clip_length}")
        digest = file_sha256(root / name)
        if digest in seen:
            problems.append(f"{name}: the same file as {seen[digest]}")
        seen.setdefault(digest, name)
    return {"counts": {"videos": usable}, "frames": n_frames, "problems": problems}
