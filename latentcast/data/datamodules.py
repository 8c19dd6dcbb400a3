"""Data sets as LightningDataModules: what a Trainer needs to feed a model clips of video or of latents."""

import hashlib
import itertools
import logging
from collections.abc import Callable

import pytorch_lightning as pl
import torch
from torch.utils.data import DistributedSampler

from ..command import named
from ..sizes import is_whole
from ..urls import Place, Url, folder_at
from .base import EmptySplitError, VideoDataset
from .loading import Loader, end_workers, open_loader
from .store.latent_cache import LatentCacheDataset

logger = logging.getLogger("latentcast")

SHUFFLED = 10_000  # clips that are shuffled together where shards have to be fetched


class _EpochSampler(DistributedSampler):
    """Shuffles by (seed, epoch), a share for each rank; a pass leaves out the first ``skip`` clips.

    Lightning keeps a DistributedSampler as it is."""

    skip, buffer = 0, None

    def __iter__(self):
        return itertools.islice(super().__iter__(), self.skip, None)


class _ShardSampler(_EpochSampler):
    """Shuffles the shards, and then the clips of as many of them as hold ``buffer``, by (seed, epoch): a pass needs
    each shard once and not for long. While such a block is read the next one is fetched.

    Ranks take turns at the clips of this one order, as with DistributedSampler. Its memory is a block's clips."""

    def __init__(self, dataset, world_size, rank, seed, buffer):
        super().__init__(dataset, world_size, rank, shuffle=True, seed=seed)
        self.shards, self.buffer = dataset.shard_clips(), buffer

    def __iter__(self):
        first, start, blocks = self.skip * self.num_replicas + self.rank, 0, self._blocks(self.epoch)
        for number in itertools.cycle(range(len(blocks))):  # ranks may need some of the first clips once more
            n_clips = sum(stop - begin for _, begin, stop, _ in blocks[number])
            if start + n_clips > first:
                following = blocks[number + 1] if number + 1 < len(blocks) else self._blocks(self.epoch + 1)[0]
                self.dataset.prefetch(shard for shard, *_ in (*blocks[number], *following))
                clips = torch.cat([torch.arange(begin, stop) for _, begin, stop, _ in blocks[number]])
                clips = clips[_order(n_clips, f"clips {self.seed} {self.epoch} {number}")]
                offset = first - start if first >= start else (first - start) % self.num_replicas
                yield from clips[offset : self.total_size - start : self.num_replicas].tolist()
            start += n_clips
            if start >= self.total_size:
                return

    def _blocks(self, epoch):
        """An epoch's shards, in its order, as lists of what ``ClipReader.shard_clips`` says of each."""
        blocks, room = [], 0
        for place in _order(len(self.shards), f"shards {self.seed} {epoch}").tolist():
            if room <= 0:
                blocks.append([])
                room = self.buffer
            blocks[-1].append(self.shards[place])
            room -= self.shards[place][2] - self.shards[place][1]
        return blocks

    def check_room(self, root):
        """Say so where two blocks do not fit into the room for local copies: each shard is then fetched many times."""
        sizes = sorted(sum(n_bytes for *_, n_bytes in block) for block in self._blocks(0))
        needed = sum(sizes[-2:]) / 1e9
        if needed > root.cache_gigabytes:
            logger.warning(
                "%s: shuffle_buffer=%d asks for copies of %.3g GB at a time, cache_gigabytes=%g has no room for them: "
                "shards will be fetched again and again; change one of the two",
                *(root, self.buffer, needed, root.cache_gigabytes),
            )


def _order(n, what):
    digest = hashlib.sha256(what.encode()).digest()
    return torch.randperm(n, generator=torch.Generator().manual_seed(int.from_bytes(digest[:8], "big")))


class _ResumableLoader(Loader):
    """A train loader whose state Lightning saves and restores, so that a resumed run sees the right batches.

    It counts its own epochs, because Lightning's count jumps when ``max_steps`` ends a run inside an epoch; a pass that
    was left early goes on where it stopped, also with another batch size or number of processes."""

    _epoch, _n_done = 0, 0  # clips of the epoch that this process was served

    def __iter__(self):
        if len(self.sampler) - self._n_done < (self.batch_size if self.drop_last else 1):
            self._epoch, self._n_done = self._epoch + 1, 0
        self.dataset.set_epoch(self._epoch)
        self.sampler.set_epoch(self._epoch)
        self.sampler.skip = self._n_done
        for batch in super().__iter__():
            self._n_done += self.batch_size
            yield batch

    def state_dict(self):
        n_processes = self.sampler.num_replicas
        return {
            "epoch": self._epoch,
            "n_clips": self._n_done * n_processes,
            "batch_clips": self.batch_size * n_processes,
            "shuffle_buffer": self.sampler.buffer,
        }

    def load_state_dict(self, state):
        before, now = (str(buffer or "null") for buffer in (state.get("shuffle_buffer"), self.sampler.buffer))
        if before != now:
            raise ValueError(
                f"shuffle_buffer: the clips' order was that of {before}, and an epoch cannot go on in that of {now}; "
                f"resume with shuffle_buffer={before}"
            )
        self._epoch, self._n_done = state["epoch"], state["n_clips"] // self.sampler.num_replicas


class _ClipDataModule(pl.LightningDataModule):
    """Loaders over ``open_split(split)``; subclasses say what that is. ``train_set``, ``val_set``: the data sets."""

    def __init__(self, batch_size, num_workers=0, seed=0, read_timeout=0, shuffle_buffer=None):
        super().__init__()
        if not (shuffle_buffer is None or is_whole(shuffle_buffer, 1)):
            raise ValueError(f"shuffle_buffer: expected null or a whole number of at least 1, found {shuffle_buffer!r}")
        for name, value, least in (
            ("batch_size", batch_size, 1),
            ("num_workers", num_workers, 0),
            ("read_timeout", read_timeout, 0),
        ):
            if value < least:
                raise ValueError(f"{name}: expected at least {least}, found {value}")
        self.batch_size, self.num_workers, self.seed, self.read_timeout = batch_size, num_workers, seed, read_timeout
        self.shuffle_buffer, self._sets, self._train_loader = shuffle_buffer, {}, None

    def open_split(self, split):
        raise NotImplementedError

    @property
    def train_set(self):
        return self._set("train")

    @property
    def val_set(self):
        """The val split's data set, or None if there is nothing in it."""
        return self._set("val")

    @property
    def test_set(self):
        return self._set("test")

    def _set(self, split):
        if split not in self._sets:
            self._sets[split] = self.open_split(split)
        return self._sets[split]

    def describe(self):
        """What the train split is, JSON-able: of a latents cache the tokenizer and what was encoded."""
        return self.train_set.describe()

    def setup(self, stage):
        for split in {"fit": ("train", "val"), "validate": ("val",), "test": ("test",)}.get(stage, ()):
            self._set(split)

    def train_dataloader(self):
        if self.trainer and self.trainer.overfit_batches:  # the same batches in every epoch
            self.train_set.set_epoch(0)
            return self._loader(self.train_set)
        world = (self.trainer.world_size, self.trainer.global_rank) if self.trainer else (1, 0)
        sampler = self._sampler(*world)
        if len(sampler) < self.batch_size:
            logger.warning("train: %d clips a process are fewer than batch_size=%d", len(sampler), self.batch_size)
        drop_last = len(sampler) >= self.batch_size
        loader = self._loader(self.train_set, _ResumableLoader, sampler=sampler, drop_last=drop_last)
        if self._train_loader is not None:  # trainer.reload_dataloaders_every_n_epochs
            loader.load_state_dict(self._train_loader.state_dict())
        self._train_loader = loader
        return loader

    def _sampler(self, *world):
        root = getattr(self.train_set, "root", None)
        buffer = self.shuffle_buffer or (SHUFFLED if isinstance(root, Url) else None)
        if buffer is None or not hasattr(self.train_set, "shard_clips"):
            return _EpochSampler(self.train_set, *world, shuffle=True, seed=self.seed)
        sampler = _ShardSampler(self.train_set, *world, self.seed, buffer)
        if isinstance(root, Url):
            sampler.check_room(root)
        return sampler

    def val_dataloader(self):
        return [] if self.val_set is None else self._loader(self.val_set)

    def test_dataloader(self):
        return self._loader(self.test_set)

    def _loader(self, dataset, kind=Loader, **kwargs):
        return open_loader(
            dataset,
            kind,
            self.num_workers,
            self.read_timeout,
            batch_size=self.batch_size,
            persistent_workers=self.num_workers > 0,
            pin_memory=torch.cuda.is_available(),
            **kwargs,
        )

    def on_exception(self, exception):
        """Nobody waits for a worker that hangs."""
        end_workers()


class VideoDataModule(_ClipDataModule):
    """Batches ``{"frames": (B, T, C, H, W)}`` of a video data set.

    Args:
        dataset: called with ``split="train"`` and so on, gives a VideoDataset: a class with its other arguments bound.
        batch_size: clips a batch and process. The train loader drops the last, smaller batch of an epoch unless it is
            the only one.
        num_workers: loader processes; the data set must pickle for them.
        seed: of the order of clips.
        read_timeout: seconds that a loader process may take for a clip, see ``open_loader``.
        shuffle_buffer: clips that are shuffled together, of data in shards: those of whole shards, which are shuffled
            before. None: all clips of a folder, 10,000 of a URL. The order depends on neither processes nor ranks.
    Raises:
        EmptySplitError: nothing in the train split. An empty val split is logged and leaves out validation.
    """

    def __init__(
        self,
        dataset: Callable[..., VideoDataset],
        batch_size: int,
        num_workers: int = 0,
        seed: int = 0,
        read_timeout: float = 0,
        shuffle_buffer: int | None = None,
    ) -> None:
        super().__init__(batch_size, num_workers, seed, read_timeout, shuffle_buffer)
        self.dataset = dataset

    def open_split(self, split: str) -> VideoDataset | None:
        try:
            return self.dataset(split=split)
        except EmptySplitError as error:
            if split != "val":
                raise
            logger.warning("no validation: %s", error)
            return None


class LatentDataModule(_ClipDataModule):
    """Batches ``{"codes": (B, T, h, w, n)}``, in the small unsigned type that the cache stores them in and which
    PriorModule widens on its device, or ``{"latents": (B, T, D, h, w)}`` of a latents cache.

    Args:
        cache_root: folder, or its URL, that holds ``train/`` and, unless validation is to be left out, ``val/``.
        clip_length, stride, sample_posterior: see LatentCacheDataset.
        batch_size, num_workers, seed, read_timeout, shuffle_buffer: as for VideoDataModule; ``seed`` also sets the
            random windows.
        expect: keyword arguments for ``LatentCacheDataset.expect``, checked on every split.
        has_val: whether there are videos in the val split; without ``val/`` it is then logged that it is left out.
    """

    def __init__(
        self,
        cache_root: Place,
        clip_length: int,
        batch_size: int,
        stride: int = 1,
        num_workers: int = 0,
        seed: int = 0,
        sample_posterior: bool = True,
        expect: dict | None = None,
        read_timeout: float = 0,
        has_val: bool = True,
        shuffle_buffer: int | None = None,
    ) -> None:
        super().__init__(batch_size, num_workers, seed, read_timeout, shuffle_buffer)
        self.cache_root, self.clip_length, self.stride = folder_at(cache_root), clip_length, stride
        self.sample_posterior, self.expect, self.has_val = sample_posterior, expect or {}, has_val

    def describe(self) -> dict:
        manifest = self.train_set.manifest
        return {"tokenizer": manifest["tokenizer"], "data": manifest["data"]}

    def open_split(self, split: str) -> LatentCacheDataset | None:
        folder = self.cache_root / split
        if split == "val" and not folder.is_dir():
            if self.has_val:
                logger.warning("no validation: %s: no such folder; %s makes it", folder, named("encode_dataset"))
            return None
        dataset = LatentCacheDataset(
            folder,
            self.clip_length,
            stride=self.stride,
            split=split,
            seed=self.seed,
            sample_posterior=self.sample_posterior,
        )
        return dataset.expect(**self.expect)
