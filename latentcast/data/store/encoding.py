"""Encode whole data sets: frames through a tokenizer into a latents cache."""

import contextlib
import logging
import math
import shutil
import time
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import nn
from torch.utils.data import Dataset

from latentcast.command import named
from latentcast.distributed import barrier, default_device, rank_and_world, rank_zero_first
from latentcast.files import locked
from latentcast.progress import Bar
from latentcast.shares import Share, turn
from latentcast.urls import Place, Url, folder_at

from ..base import VideoDataset
from ..loading import open_loader
from ..video.reader import VideoError, is_away
from .latent_cache import LatentCacheWriter, read_manifest

logger = logging.getLogger("latentcast")

CPU_CHUNK = 16  # frames at once through a network on a CPU: what fits in its cache; more are slower


@torch.no_grad()
def encode_dataset(
    dataset: VideoDataset,
    tokenizer: nn.Module,
    root: Place,
    *,
    store: str = "auto",
    dtype: str = "float32",
    batch_frames: int = 256,
    shard_videos: int | None = None,
    num_workers: int = 0,
    read_timeout: float = 0,
    overwrite: bool = False,
    device: torch.device | str | None = None,
    share: Share | None = None,
) -> dict:
    """Encode every video of a VideoDataset into the cache at ``root``; continues what an earlier run left there.

    Reading (``num_workers`` processes), encoding and writing (a thread) overlap. A batch is ``batch_frames`` frames of
    one shard: short videos share it, long ones are spread over several, so memory depends on neither the videos'
    lengths nor their number. The network always sees groups of one size (``encode_chunked``: 16 frames on a CPU,
    ``batch_frames`` on a GPU), so that the cache's bits do not depend on how videos share shards, batches and
    processes. A video that cannot be read is named and skipped. ``store="auto"`` means codes for a discrete tokenizer,
    posteriors for one that has them, else latents.

    Args:
        dataset: a VideoDataset.
        tokenizer: a FrameTokenizer; its weights stay as they are.
        root: folder of the cache, or its URL.
        store, dtype, shard_videos, overwrite: see LatentCacheWriter.
        batch_frames: frames encoded at once.
        read_timeout: seconds that a process may take to read so many, see ``open_loader``.
        device: default: a GPU when there is one.
        share: a ``latentcast.shares.Share``: its shards alone, while others may write theirs.
    Returns:
        dict of ``videos``, ``frames``, ``bytes``, ``skipped`` of the whole cache and ``frames_per_s`` of this run (None
        when nothing was left to do); of a share that leaves shards to others ``pending_shards`` and ``frames_per_s``.
    Raises:
        ValueError: frames of another size than the tokenizer's, a cache of another tokenizer or data set, no videos,
            or posteriors asked of a tokenizer that has none.
        OSError: not enough space (needed and free are named), the folder cannot be written, or another run encodes into
            it.
    """
    if batch_frames < 1:
        raise ValueError(f"cache.batch_frames: expected at least 1, found {batch_frames}")
    rank, world_size = rank_and_world()
    if device is None:
        device = default_device()
    spec = tokenizer.latent_spec
    expected = (spec["frame_channels"], spec["frame_height"], spec["frame_width"])
    if dataset.frame_shape != expected:
        raise ValueError(
            f"frames: the tokenizer takes (C, H, W) = {expected}, the data set serves {dataset.frame_shape}"
        )
    if store == "posterior" and not tokenizer.has_posterior:
        raise ValueError(f"cache.store: {type(tokenizer).__name__} has no posterior; expected auto, codes or latents")
    if store == "auto" and tokenizer.has_posterior:
        store = "posterior"
    videos, root = dataset.videos, folder_at(root)
    from latentcast.modeling import fingerprint  # here: the loader's processes do without diffusers

    identity = fingerprint(tokenizer)
    alone = locked if share is None else turn  # to prepare the folder, and to complete it
    with contextlib.ExitStack() as lock:
        lock.enter_context(alone(root, named("encode_dataset")))
        with rank_zero_first():
            writer = LatentCacheWriter(
                root,
                spec,
                identity,
                videos=videos,
                data=dataset.describe(),
                fps=dataset.fps,
                conditions=dataset.conditions,
                store=store,
                dtype=dtype,
                shard_videos=shard_videos,
                overwrite=overwrite,
                rank=rank,
                world_size=world_size,
            )
            if share is None:
                writer.redo(writer.away(), keep=True)
        if share is not None:
            share.over(writer)
            lock.close()
        if writer.finished:
            logger.info("latents cache %s: finished before, nothing to do", root)
            return _figures(root, None)

        n_frames = writer.n_frames(writer.pending(every_rank=share is None))
        if rank == 0:
            _check_space(writer)
        work = writer.pending()
        batches = [(s, segments) for s in work for segments in _batches(videos, writer.shard_videos(s), batch_frames)]
        on_gpu = torch.device(device).type == "cuda"
        reader = open_loader(
            _Reader(dataset, batches),
            num_workers=num_workers,
            read_timeout=read_timeout,
            batch_size=None,
            pin_memory=on_gpu,
        )
        tokenizer = tokenizer.eval().to(device)
        chunk = batch_frames if on_gpu else CPU_CHUNK
        began = time.perf_counter()
        bar = Bar(total=writer.n_frames(work), desc=f"encode {dataset.split}", unit="frame", disable=rank > 0)
        # Fixed algorithms: the same batch gives the same bits on every rank and in every run.
        with (
            bar,
            torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True),
            _writing_behind(writer) as write,
        ):
            for (shard, segments), (frames, unreadable, conditions) in zip(batches, reader):
                pieces = {}
                kept = [segment for segment in segments if segment[0] not in unreadable]
                if kept:
                    frames = frames.to(device, non_blocking=True)
                    encoded = tokenizer.encode_chunked(frames[None], chunk)[writer.job["store"]][0]
                    pieces = dict(zip(kept, encoded.split([stop - start for _, start, stop in kept])))
                write(shard, pieces, unreadable, conditions)
                bar.update(sum(stop - start for _, start, stop in segments))
        barrier()
        seconds = time.perf_counter() - began
        if fingerprint(tokenizer) != identity:
            raise RuntimeError(f"{type(tokenizer).__name__}: encoding changed its weights; the cache is not completed")
        if share is not None:
            lock.enter_context(alone(root, named("encode_dataset")))
            if pending := len(writer.pending(every_rank=True)):
                logger.info("latents cache %s: share %s is done; %d shards are others'", root, share, pending)
                return {"pending_shards": pending, "frames_per_s": round(n_frames / seconds, 1)}
            if writer.finished:
                return _figures(root, n_frames / seconds)
        with rank_zero_first():
            if rank == 0:
                writer.finish()
        return _figures(root, n_frames / seconds)


@contextlib.contextmanager
def _writing_behind(writer):
    """Gives ``write(shard, pieces, unreadable, conditions)``, which returns while a thread opens, fills and completes
    shards, one batch behind; ``pieces`` are (video, start, stop) -> encoded frames, the others as ``_Reader`` gives
    them. What the thread raises, the next call raises, or the end of the block. A block that ends by an exception
    leaves nothing of the shard at hand.
    """
    file = current = job = None

    def add(shard, pieces, unreadable, conditions):
        nonlocal file, current
        if shard != current:
            shards.close()  # completes the one before
            file, current = shards.enter_context(writer.open_shard(shard)), shard
        for video, (reason, away) in unreadable.items():
            if video not in file.skipped:
                logger.warning("%s: skipped (%s)", writer.job["videos"][video]["name"], reason)
                file.skip(video, reason, away)
        for (video, _, _), encoded in pieces.items():
            file.append(video, encoded)
        for video, found in conditions.items():
            file.describe(video, found)

    def write(*batch):
        nonlocal job
        if job is not None:
            job.result()
        job = thread.submit(add, *batch)

    with contextlib.ExitStack() as shards, ThreadPoolExecutor(1) as thread:
        yield write
        if job is not None:
            job.result()


class _Reader(Dataset):
    """Batches of frames, read in the loader's processes."""

    def __init__(self, dataset, batches):
        self.dataset, self.batches = dataset, batches

    def __len__(self):
        return len(self.batches)

    def item_name(self, index):
        return ", ".join(self.dataset.videos[video].name for video, _, _ in self.batches[index][1])

    def __getitem__(self, index):
        """-> frames (N, C, H, W) of the readable segments, None if there are none; {video: (reason, may pass)} of the
        others; and {video: conditions} of the videos that begin in this batch"""
        frames, unreadable, conditions = [], {}, {}
        for video, start, stop in self.batches[index][1]:
            try:
                piece = self.dataset.read_video(video, start, stop)
                if len(piece) != stop - start:
                    raise VideoError(f"expected {stop - start} frames from {start} on, found {len(piece)}")
                frames.append(piece)
            except VideoError as error:
                unreadable[video] = str(error), is_away(error)
            else:
                if start == 0:
                    conditions[video] = self.dataset.read_conditions(video, 0, self.dataset.videos[video].n_frames)
        return torch.cat(frames) if frames else None, unreadable, conditions


def _batches(videos, indices, batch_frames):
    """Cut the videos of a shard into lists of (video, start, stop) of ``batch_frames`` frames in all."""
    batch, room = [], batch_frames
    for video in indices:
        start = 0
        while start < videos[video].n_frames:
            stop = min(start + room, videos[video].n_frames)
            batch.append((video, start, stop))
            room -= stop - start
            start = stop
            if room == 0:
                yield batch
                batch, room = [], batch_frames
    if batch:
        yield batch


def _check_space(writer):
    work = writer.pending(every_rank=True)
    needed, away = writer.n_bytes(work), isinstance(writer.root, Url)  # of a store nobody knows what is free
    free = math.inf if away else shutil.disk_usage(writer.root).free
    logger.info(
        "latents cache %s: %d of %d shards to write, %d frames as %s %s, %s%s",
        writer.root,
        len(work),
        writer.n_shards,
        writer.n_frames(work),
        writer.job["dtype"],
        writer.job["store"],
        _size(needed),
        "" if away else f" ({_size(free)} free)",
    )
    if needed > free:
        raise OSError(f"latents cache {writer.root}: needs {_size(needed)}, but {_size(free)} are free")


def _figures(root, frames_per_s):
    notes = read_manifest(root)["shards"]
    return {
        "videos": sum(len(note["videos"]) for note in notes),
        "frames": sum(video["n_frames"] for note in notes for video in note["videos"].values()),
        "bytes": sum(note["bytes"] for note in notes),
        "frames_per_s": frames_per_s and round(frames_per_s, 1),
        "skipped": sum(len(note["skipped"]) for note in notes),
    }


def _size(n_bytes):
    for unit in ("B", "kB", "MB", "GB"):
        if n_bytes < 1000:
            return f"{n_bytes:.3g} {unit}"
        n_bytes /= 1000
    return f"{n_bytes:.3g} TB"
