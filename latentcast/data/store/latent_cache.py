"""The latents cache: what a tokenizer made of a data set, on disk, for training priors.

One folder of shards (see shards.py) holds one split; its manifest says who made it from what.
"""

import json
import random
from collections.abc import Iterable, Sequence
from typing import Literal

import torch
from jaxtyping import Float, Shaped
from pydantic import model_validator
from torch import Tensor
from torch.utils.data import Dataset

from ...command import named
from ...config import is_whole
from ...layers.gaussian import sample_moments
from ...schemas import LatentSpec, Number, Text
from ...sizes import Side
from ...urls import Place, folder_at
from ..base import FITTING, ClipWindows, VideoEntry, check_split
from . import shards


class CacheJob(shards.Job):
    """The manifest of a cache, or its plan; see LatentCacheWriter."""

    tokenizer: Text
    latent_spec: LatentSpec
    data: dict
    frame_size: list[Side]
    scaling_factor: Number
    store: Literal["codes", "latents", "posterior"]

    @model_validator(mode="after")
    def _is_of_its_spec(self):
        found = self.store, self.dtype, self.frame_shape
        expected = _layout(
            self.latent_spec.model_dump(), self.store, self.dtype if self.store != "codes" else "float32"
        )
        if found != expected:
            raise ValueError(f"store, dtype, frame_shape: expected {expected} by its latent_spec, found {found}")
        return self


KIND = shards.Kind(
    name="latents cache",
    version=2,
    job=CacheJob,
    made_by="encode_dataset",
    replace="set cache.overwrite=true to replace it, or use another run_dir or cache.root",
)
# What a prior accepts -> what a cache may store for it, the best first. Codes are looked up in the codebooks.
SERVING = {"codes": ("codes",), "latents": ("posterior", "latents", "codes")}
STORES = ("auto", "codes", "latents", "posterior")
LATENT_DTYPES = ("float32", "bfloat16", "float16")
# A shard is what a killed run may lose and what ranks take turns at; each is a file that training holds open.
MOST_VIDEOS, FRAMES_A_SHARD, LEAST_SHARDS = 64, 20_000, 8


class LatentCacheWriter(shards.ShardWriter):
    """Plans, writes and completes the cache of one split; see ShardWriter for how processes share the work.

    Args:
        root: folder of the cache, ``run_dir/latents/train`` say, or its URL.
        latent_spec: what ``FrameTokenizer.latent_spec`` returns.
        fingerprint: ``latentcast.modeling.fingerprint`` of the tokenizer.
        videos: list of VideoEntry.
        data: what ``VideoDataset.describe`` returns.
        fps: frames per second of the data set's clips.
        conditions: of the data set.
        store: "codes" (int), "latents" (float), "posterior" (float: mean and log-variance of the latents, stacked along
            the channels), or "auto": codes where the latent spec has them, else latents.
        dtype: of stored latents and posteriors, "float32", "bfloat16" or "float16". Codes take the smallest unsigned
            type that holds their codebooks.
        shard_videos: videos a shard; None: as in the cache that stands in ``root``, else by the videos' number and mean
            length: at most 64, about 20,000 frames, and few enough for eight shards.
        overwrite: replace a finished cache, and one of another tokenizer or data set, instead of keeping or refusing
            it.
        rank, world_size: this process among those that write.
    Raises:
        ValueError: another tokenizer, data set or setting made what stands in ``root`` (both sides are named).
    """

    def __init__(
        self,
        root: Place,
        latent_spec: dict,
        fingerprint: str,
        *,
        videos: Sequence[VideoEntry],
        data: dict,
        fps: float,
        conditions: dict[str, dict] | None = None,
        store: str = "auto",
        dtype: str = "float32",
        shard_videos: int | None = MOST_VIDEOS,
        overwrite: bool = False,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        store, dtype, frame_shape = _layout(latent_spec, store, dtype)
        if shard_videos is None:
            standing = None if overwrite else shards.standing_job(folder_at(root), KIND)
            kept = (standing or {}).get("shard_videos")
            shard_videos = kept if is_whole(kept, 1) else _shard_videos(videos)
        job = {
            "tokenizer": fingerprint,
            "latent_spec": latent_spec,
            "data": data,
            "frame_size": [latent_spec["frame_height"], latent_spec["frame_width"]],
            "fps": fps,
            "scaling_factor": latent_spec["scaling_factor"],
            "store": store,
            "dtype": dtype,
            "frame_shape": frame_shape,
            "conditions": conditions or {},
            "shard_videos": shard_videos,
            "videos": [{"name": v.name, "n_frames": v.n_frames, "fps": v.fps} for v in videos],
        }
        super().__init__(root, KIND, job, overwrite=overwrite, rank=rank, world_size=world_size)

    def n_frames(self, shards: Sequence[int]) -> int:
        """Frames in the given shards."""
        return sum(self.job["videos"][v]["n_frames"] for s in shards for v in self.shard_videos(s))

    def n_bytes(self, shards: Sequence[int]) -> int:
        """Bytes that the frames of the given shards take on disk."""
        frame_bytes = torch.Size(self.job["frame_shape"]).numel() * _itemsize(self.job["dtype"])
        return self.n_frames(shards) * frame_bytes


class LatentCacheDataset(Dataset):
    """Clips and whole videos out of a finished cache.

    ``dataset[i]`` is ``{"codes": (clip_length, h, w, n_codebooks) int64}`` or ``{"latents": (clip_length, D, h, w)
    float32}``, as the cache stores, with ``conditions`` beside it. Where it stores posteriors, the latents are drawn
    from them, by (seed, epoch, i) alone, so that the number of workers does not matter; ``sample_posterior=False``
    gives their means. Clips are taken as in VideoDataset. Videos shorter than a clip are counted, logged and left out.
    The data set pickles and works under spawn.

    Args:
        root: folder of one split, ``run_dir/latents/train``, or its URL (see ``latentcast.urls.folder_at``).
        clip_length: frames a clip.
        stride: take every ``stride``-th cached frame.
        split: "train" for random windows, "val" or "test" for fixed ones.
        seed: of the random windows, and of the draws from posteriors.
        sample_posterior: draw from stored posteriors, as Latent Diffusion trains; other caches have nothing to draw.
    Raises:
        FileNotFoundError: no manifest: not encoded yet, or not to the end; or a shard is missing.
        ValueError: a truncated shard, an unknown format, or no video as long as a clip.
    """

    epoch = 0

    def __init__(
        self,
        root: Place,
        clip_length: int,
        stride: int = 1,
        split: str = "train",
        seed: int = 0,
        sample_posterior: bool = True,
    ) -> None:
        check_split(split)
        for name, value in (("clip_length", clip_length), ("stride", stride)):
            if value < 1:
                raise ValueError(f"{name}: expected at least 1, found {value}")
        self.root, self.clip_length, self.stride = folder_at(root), clip_length, stride
        self.seed, self.sample_posterior = seed, sample_posterior
        self.manifest = read_manifest(self.root)
        self._reader = shards.ClipReader(self.root, self.manifest, clip_length, stride, f"latents cache {root}")
        self._windows = ClipWindows([video.n_frames for video in self.videos], clip_length, split, seed)

    @property
    def spec(self) -> dict:
        """The tokenizer's ``latent_spec``."""
        return self.manifest["latent_spec"]

    @property
    def space(self) -> str:
        """What the items hold, "codes" or "latents", in the terms of ``Prior.accepts``."""
        return "codes" if self.manifest["store"] == "codes" else "latents"

    @property
    def _dtype(self):
        """Of what is in ``space``, outside of files and loaders."""
        return torch.int64 if self.space == "codes" else torch.float32

    @property
    def fps(self) -> float:
        """Frames per second of the clips."""
        return self.manifest["fps"] / self.stride

    @property
    def conditions(self) -> dict[str, dict]:
        """Of the data set that was encoded; see VideoDataset."""
        return self.manifest["conditions"]

    @property
    def videos(self) -> list[VideoEntry]:
        """list of VideoEntry: those long enough for a clip, at this stride."""
        return self._reader.videos

    def expect(
        self, tokenizer_fingerprint: str | None = None, latent_spec: dict | None = None, data: dict | None = None
    ) -> "LatentCacheDataset":
        """Refuse a cache that was not made as the caller needs it; returns the data set.

        Args:
            tokenizer_fingerprint: ``latentcast.modeling.fingerprint`` of the tokenizer in use.
            latent_spec: of the tokenizer or prior in use.
            data: entries that ``VideoDataset.describe`` of the source must have had, ``{"size": 64}`` say.
        Raises:
            ValueError: names what differs, with both sides.
        """
        found, asked = {}, {}
        if tokenizer_fingerprint is not None:
            found["tokenizer"], asked["tokenizer"] = self.manifest["tokenizer"], tokenizer_fingerprint
        if latent_spec is not None:
            found["latent_spec"], asked["latent_spec"] = self.spec, latent_spec
        if data is not None:
            if "type" in data:  # whole: what it does not say of the fit is as usual
                data = FITTING | data
            found["data"] = {name: self.manifest["data"].get(name, FITTING.get(name)) for name in data}
            asked["data"] = data
        difference = shards.difference_of(found, json.loads(json.dumps(asked)))
        if difference:
            raise ValueError(
                f"latents cache {self.root}: {difference}; re-run {named('encode_dataset')} with cache.overwrite=true"
            )
        return self

    def set_epoch(self, epoch: int) -> None:
        """Move to another set of random windows, and of draws from posteriors."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self._windows)

    def __getitem__(self, index: int) -> dict:
        batch = self.fill(self.new_batch(1), [index])
        conditions = {name: values[0] for name, values in batch["conditions"].items()}
        return {self.space: batch[self.space][0].to(self._dtype), "conditions": conditions}

    def new_batch(self, n_items: int) -> dict:
        """Memory for a batch, of which ``fill`` makes one: what items hold, each (n_items, ...); codes in the small
        unsigned type that they are stored in."""
        shape, dtype = self.manifest["frame_shape"], self._dtype
        if self.space == "codes":
            dtype = shards.DTYPES[self.manifest["dtype"]][0]
        elif self.manifest["store"] == "posterior":
            shape = [shape[0] // 2, *shape[1:]]
        conditions = {}
        for name, spec in self.conditions.items():
            n_frames = (self.clip_length,) if spec["per"] == "frame" else ()
            conditions[name] = torch.empty(n_items, *n_frames, *spec["shape"], dtype=shards.DTYPES[spec["dtype"]][0])
        return {self.space: torch.empty(n_items, self.clip_length, *shape, dtype=dtype), "conditions": conditions}

    def fill(self, batch: dict, indices: Iterable[int]) -> dict:
        """Read items into the rows of a batch, each once and to its end before the next index is asked for; -> the
        batch."""
        clips, conditions, store = batch[self.space], batch["conditions"], self.manifest["store"]
        if store == "codes":
            clips = clips.numpy()  # to copy a slice into it takes a third of a tensor's time
        for row, index in enumerate(indices):
            window = self._windows.place(index, self.epoch)
            if store == "codes":
                clips[row] = self._reader.array(*window)
            elif store == "latents":
                clips[row] = self._reader.frames(*window)
            elif self.sample_posterior:
                seed = random.Random(f"posterior {self.seed} {self.epoch} {index}").getrandbits(63)
                clips[row] = sample_moments(self.read_posterior(*window), torch.Generator().manual_seed(seed))
            else:
                clips[row] = self._reader.frames(*window).chunk(2, dim=1)[0]
            if conditions:
                for name, value in self.read_conditions(*window).items():
                    conditions[name][row] = value
        return batch

    def item_name(self, index: int) -> str:
        """What ``dataset[index]`` reads, for messages."""
        video, start, stop = self._windows.place(index, self.epoch)
        return f"{self.root}: {self.videos[video].name}, frames {start} to {stop - 1}"

    def read_video(self, index: int, start: int = 0, stop: int | None = None) -> Shaped[Tensor, "T _ _ _"]:
        """Frames ``start:stop`` of video ``index`` -> (stop - start, ...), int64 codes or float32 latents (the means
        where the cache stores posteriors)."""
        if self.manifest["store"] == "posterior":
            return self.read_posterior(index, start, stop).chunk(2, dim=1)[0].contiguous()
        return self._reader.frames(index, start, stop).to(self._dtype, copy=True)

    def read_posterior(self, index: int, start: int = 0, stop: int | None = None) -> Float[Tensor, "T moments h w"]:
        """Mean and log-variance of the same frames, stacked along the channels -> (stop - start, 2 D, h, w) float32.

        Raises:
            ValueError: the cache stores codes or latents.
        """
        if self.manifest["store"] != "posterior":
            raise ValueError(f"latents cache {self.root}: expected posteriors, found {self.manifest['store']}")
        return self._reader.frames(index, start, stop).to(torch.float32, copy=True)

    def read_conditions(self, index: int, start: int = 0, stop: int | None = None) -> dict[str, Tensor]:
        """Conditions of the same frames; see VideoDataset."""
        return self._reader.conditions(index, start, stop)

    def shard_clips(self) -> list[tuple[int, int, int, int]]:
        """Which clips lie in which shard; see ClipReader."""
        return self._reader.shard_clips(self._windows)

    def prefetch(self, shards: Iterable[int]) -> None:
        """Fetch local copies of whole shards ahead; see ShardReader."""
        self._reader.prefetch(shards)

    def verify(self) -> int:
        """Compare every shard with its checksum; see ``verify_cache``."""
        return verify_cache(self.root)


def read_manifest(root: Place) -> dict:
    """The manifest of a finished cache; raises as ``shards.read_manifest`` does."""
    return shards.read_manifest(root, KIND)


def verify_cache(root: Place) -> int:
    """Compare every shard of a finished cache with its checksum; returns the number of shards, raises ValueError."""
    return shards.verify(root, KIND)


def choose_store(store: str, prior: object, tokenizer: object, root: Place, overwrite: bool = False) -> str:
    """What a cache in ``root`` is to store for a prior -> "codes", "latents" or "posterior".

    Args:
        store: what is asked for. "auto": what the cache that stands there stores, if that serves the prior; else what
            the prior accepts, latents as posteriors where the tokenizer has them.
        prior, tokenizer: the models; the prior is over codes or latents.
        overwrite: a cache that stands there does not count.
    Raises:
        ValueError: ``store`` does not serve the prior, or the tokenizer cannot.
    """
    serving, name = SERVING[prior.accepts], type(prior).__name__
    if prior.accepts == "codes" and not tokenizer.is_discrete:
        raise ValueError(
            f"prior: {name} takes codes, {type(tokenizer).__name__} has none; choose another by prior=NAME"
        )
    if store in serving or store not in STORES:
        return store
    if store != "auto":
        raise ValueError(
            f"cache.store: {name} takes {prior.accepts}; expected auto or {' or '.join(serving)}, found {store}"
        )
    standing = None if overwrite else shards.standing_job(folder_at(root), KIND)
    if standing is not None and standing.get("store") in serving:
        return standing["store"]
    return serving[0] if prior.accepts == "codes" or tokenizer.has_posterior else "latents"


def _layout(latent_spec, store, dtype):
    """-> (store, dtype name, shape of one frame's tensor)"""
    sizes = latent_spec["codebook_sizes"]
    if store not in STORES:
        raise ValueError(f"cache.store: expected one of {', '.join(STORES)}, found {store!r}")
    if dtype not in LATENT_DTYPES:
        raise ValueError(f"cache.dtype: expected one of {', '.join(LATENT_DTYPES)}, found {dtype!r}")
    if store == "codes" and not sizes:
        raise ValueError("cache.store: expected 'latents' or 'auto' (the tokenizer is continuous), found 'codes'")
    if store == "posterior" and sizes:
        raise ValueError(
            "cache.store: expected 'codes', 'latents' or 'auto' (the tokenizer is discrete), found 'posterior'"
        )
    grid = [latent_spec["height"], latent_spec["width"]]
    if store == "posterior":
        return store, dtype, [2 * latent_spec["channels"], *grid]
    if store == "latents" or not sizes:
        return "latents", dtype, [latent_spec["channels"], *grid]
    largest = max(sizes)
    return "codes", "uint8" if largest <= 2**8 else "uint16" if largest <= 2**16 else "uint32", [*grid, len(sizes)]


def _shard_videos(videos):
    n_frames = sum(video.n_frames for video in videos)
    return max(1, min(MOST_VIDEOS, FRAMES_A_SHARD * len(videos) // max(n_frames, 1), len(videos) // LEAST_SHARDS))


def _itemsize(dtype):
    return shards.DTYPES[dtype][0].itemsize
