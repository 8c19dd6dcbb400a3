"""Open a prepared set, whether its videos are stored or made as they are asked for."""

import logging
from collections.abc import Sequence
from pathlib import Path

from ...urls import GIGABYTES, Place, folder_at
from ..base import VideoDataset, check_flip, check_split
from ..store.prepared import PreparedVideos, check_size, read_set_manifest
from .moving_digits import MovingDigits

logger = logging.getLogger("latentcast")


def prepared_videos(
    root: Place,
    split: str,
    clip_length: int,
    size: int | Sequence[int] | None = None,
    channels: int | None = None,
    *,
    name: str | None = None,
    frame_stride: int = 1,
    seed: int = 0,
    fresh: bool = False,
    flip: str | None = None,
    actions: bool = False,
    cache_dir: str | Path | None = None,
    cache_gigabytes: float = GIGABYTES,
) -> VideoDataset:
    """A split of a prepared set as a VideoDataset: PreparedVideos, or MovingDigits where the set makes its videos.

    Args:
        root, split, clip_length, size, channels, name, frame_stride, seed: see PreparedVideos; videos that are made
            keep the set's own seed.
        fresh: draw the train split's videos anew in every epoch, of sets that make them.
        flip: see VideoDataset.
        actions: priors are told the condition ``action``; clips are then not mirrored, for in a mirror an action leads
            elsewhere.
        cache_dir, cache_gigabytes: see PreparedVideos.
    Raises:
        ValueError: also for ``actions`` of a set without them, or of some frames only (``frame_stride``).
    """
    check_split(split)
    if not isinstance(actions, bool):
        raise ValueError(f"actions: expected true or false, found {actions!r}")
    root = folder_at(root, cache_dir, cache_gigabytes)
    dataset = _open(root, split, clip_length, size, channels, name, frame_stride, seed, fresh)
    dataset.flip, dataset.actions = check_flip(flip), actions
    if actions:
        _check_actions(root, dataset, frame_stride)
        if flip is not None:
            logger.warning("flip: %s is left out with actions: in a mirror an action leads elsewhere", flip)
            dataset.flip = None
    return dataset


def _check_actions(root, dataset, frame_stride):
    if "action" not in dataset.conditions:
        name, found = read_set_manifest(root)["name"], ", ".join(dataset.conditions) or "no conditions"
        again = "; it was prepared when they had another name: prepare it again" if "actions" in found else ""
        raise ValueError(f"actions: {root}: {name} has no condition 'action', found {found}{again}")
    if frame_stride != 1:
        raise ValueError(
            f"frame_stride: expected 1 with actions, as those of frames between would be lost, found {frame_stride}"
        )


def _open(root, split, clip_length, size, channels, name, frame_stride, seed, fresh):
    manifest = read_set_manifest(root, name)
    if fresh and "train" not in manifest["generated"]:
        raise ValueError(f"fresh: expected false, for {manifest['name']} stores its training videos, found {fresh}")
    if split not in manifest["generated"]:
        return PreparedVideos(root, split, clip_length, size, channels, name=name, frame_stride=frame_stride, seed=seed)
    check_size(root, manifest, size)
    return MovingDigits(
        split,
        clip_length,
        size=manifest["frame_size"][0],
        channels=channels or manifest["channels"],
        mnist_dir=root / "mnist",
        frame_stride=frame_stride,
        fresh=fresh,
        **manifest["generated"][split],
    )
