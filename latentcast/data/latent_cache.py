"""The latents cache: what a tokenizer made of a data set, on disk, for training priors.

One folder holds one split: safetensors shards of many videos each, one tensor a video, and a JSON manifest that says
who made them from what. A shard is streamed to a temporary file and renamed, so a run that was killed resumes by
skipping the shards that stand. While it is unfinished the folder holds ``plan.json`` and a small JSON note beside each
shard; ``manifest.json`` replaces them in the end, so a cache with a manifest is complete.
"""

import contextlib
import hashlib
import itertools
import json
import logging
import os
import struct
from pathlib import Path

import torch
from safetensors import safe_open
from torch.utils.data import Dataset

from ..files import replacing
from .base import VideoEntry, check_split, window_start

logger = logging.getLogger("latentcast")

FORMAT = 1
MANIFEST, PLAN = "manifest.json", "plan.json"
STORES = ("auto", "codes", "latents")
# name in the manifest -> torch's type and the name that safetensors gives it
DTYPES = {
    "uint8": (torch.uint8, "U8"),
    "uint16": (torch.uint16, "U16"),
    "uint32": (torch.uint32, "U32"),
    "float16": (torch.float16, "F16"),
    "bfloat16": (torch.bfloat16, "BF16"),
    "float32": (torch.float32, "F32"),
}
LATENT_DTYPES = ("float32", "bfloat16", "float16")


class LatentCacheWriter:
    """Plans, writes and completes the cache of one split.

    Several processes may share the work: each takes the shards with ``shard % world_size == rank``. Rank 0 must be
    constructed before the others (it prepares the folder), and calls ``finish`` after all have written theirs. The
    files do not depend on how many processes wrote them.

    Args:
        root: folder of the cache, ``run_dir/latents/train`` say.
        latent_spec: what ``FrameTokenizer.latent_spec`` returns.
        fingerprint: ``latentcast.modeling.fingerprint`` of the tokenizer.
        videos: list of VideoEntry.
        data: what ``VideoDataset.describe`` returns.
        fps: frames per second of the data set's clips.
        store: "codes" (int), "latents" (float), or "auto": codes where the tokenizer has them.
        dtype: of stored latents, "float32", "bfloat16" or "float16". Codes take the smallest unsigned type that holds
            their codebooks.
        shard_videos: videos a shard.
        overwrite: replace a finished cache, and one of another tokenizer or data set, instead of keeping or refusing
            it.
        rank, world_size: this process among those that write.
    Raises:
        ValueError: another tokenizer, data set or setting made what stands in ``root`` (both sides are named).
    """

    def __init__(
        self,
        root,
        latent_spec,
        fingerprint,
        *,
        videos,
        data,
        fps,
        store="auto",
        dtype="float32",
        shard_videos=64,
        overwrite=False,
        rank=0,
        world_size=1,
    ):
        self.root = Path(root)
        self.rank, self.world_size = rank, world_size
        store, dtype, frame_shape = _layout(latent_spec, store, dtype)
        if shard_videos < 1:
            raise ValueError(f"shard_videos: expected at least 1, found {shard_videos}")
        job = {
            "format": FORMAT,
            "tokenizer": fingerprint,
            "latent_spec": latent_spec,
            "data": data,
            "frame_size": [latent_spec["frame_height"], latent_spec["frame_width"]],
            "fps": fps,
            "scaling_factor": latent_spec["scaling_factor"],
            "store": store,
            "dtype": dtype,
            "frame_shape": frame_shape,
            "shard_videos": shard_videos,
            "videos": [{"name": v.name, "n_frames": v.n_frames, "fps": v.fps} for v in videos],
        }
        self.job = json.loads(json.dumps(job))  # tuples become lists, as they will be when the manifest is read back
        self.n_shards = -(-len(videos) // shard_videos)
        if rank == 0:
            self._prepare(overwrite)

    @property
    def finished(self):
        """The manifest stands: nothing is left to do."""
        return (self.root / MANIFEST).is_file()

    def shard_videos(self, shard):
        """The indices of the videos that shard number ``shard`` holds."""
        size = self.job["shard_videos"]
        return range(shard * size, min((shard + 1) * size, len(self.job["videos"])))

    def pending(self, every_rank=False):
        """Numbers of the shards still to be written: this rank's, or those of all ranks."""
        shards = [s for s in range(self.n_shards) if every_rank or s % self.world_size == self.rank]
        return [] if self.finished else [s for s in shards if self._note(s) is None]

    def n_frames(self, shards):
        """Frames in the given shards."""
        return sum(self.job["videos"][v]["n_frames"] for s in shards for v in self.shard_videos(s))

    def n_bytes(self, shards):
        """Bytes that the tensors of the given shards take on disk."""
        return self.n_frames(shards) * _frame_bytes(self.job)

    def open_shard(self, shard):
        """A ShardFile that takes the videos of one shard; use it in a ``with`` block."""
        entries = {v: self.job["videos"][v]["n_frames"] for v in self.shard_videos(shard)}
        return ShardFile(self.root, shard, entries, self.job["frame_shape"], self.job["dtype"])

    def finish(self):
        """Write the manifest, once every shard stands."""
        notes = [self._note(shard) for shard in range(self.n_shards)]
        missing = [_shard_name(s) for s, note in enumerate(notes) if note is None]
        if missing:
            raise ValueError(f"latents cache {self.root}: {missing[0]} is not written; re-run tools/encode_dataset.py")
        skipped = {video: reason for note in notes for video, reason in note.pop("skipped").items()}
        if len(skipped) == len(self.job["videos"]):
            self._clear()  # a re-run tries them again
            reason = next(iter(skipped.values()), "the data set is empty")
            raise ValueError(f"latents cache {self.root}: none of {len(skipped)} videos could be encoded ({reason})")
        _write_json(self.root / MANIFEST, self.job | {"skipped": skipped, "shards": notes})
        self._tidy()

    def _prepare(self, overwrite):
        """Make ``root`` ready to be continued: refuse or clear what does not belong to this job."""
        self.root.mkdir(parents=True, exist_ok=True)
        for leftover in self.root.glob("*.tmp"):
            leftover.unlink()
        standing = self.root / (MANIFEST if self.finished else PLAN)
        if standing.is_file():
            difference = _difference({k: v for k, v in _read_json(standing).items() if k in self.job}, self.job)
            if difference and not overwrite:
                raise ValueError(
                    f"latents cache {self.root}: {difference}; "
                    "set cache.overwrite=true to replace it, or use another run_dir"
                )
            if difference or (overwrite and self.finished):
                self._clear()
            elif self.finished:
                self._tidy()
                self._reopen_if_damaged()
        else:
            self._clear()
        if not self.finished:
            _write_json(self.root / PLAN, self.job)

    def _reopen_if_damaged(self):
        """A finished cache with a missing or truncated shard becomes an unfinished one that lacks that shard."""
        manifest = _read_json(self.root / MANIFEST)
        damage = [_size_error(self.root, note) for note in manifest["shards"]]
        if not any(damage):
            return
        for shard, (note, error) in enumerate(zip(manifest["shards"], damage)):
            if error:
                logger.warning("%s; encoding it again", error)
                (self.root / note["file"]).unlink(missing_ok=True)
            else:
                skipped = {v: r for v, r in manifest["skipped"].items() if int(v) in self.shard_videos(shard)}
                _write_json(_note_path(self.root, shard), note | {"skipped": skipped})
        _write_json(self.root / PLAN, self.job)
        (self.root / MANIFEST).unlink()

    def _note(self, shard):
        """What ``ShardFile`` noted of a finished shard, or None."""
        path = _note_path(self.root, shard)
        if not path.is_file():
            return None
        note = _read_json(path)
        return None if _size_error(self.root, note) else note

    def _tidy(self):
        for path in [*self.root.glob("shard-*.json"), self.root / PLAN]:
            path.unlink(missing_ok=True)

    def _clear(self):
        # The notes go first and the manifest last: a crash in between never leaves old shards that pass for new ones.
        for path in [*self.root.glob("shard-*.json"), *self.root.glob("shard-*.safetensors")]:
            path.unlink()
        for name in (PLAN, MANIFEST):
            (self.root / name).unlink(missing_ok=True)


class ShardFile:
    """One safetensors file, streamed: memory does not grow with the length of the videos.

    The header comes first in the file and holds every length, so room is kept for it and it is filled in last; a video
    that turns out unreadable is cut out of the stream. Leaving the ``with`` block by an exception leaves nothing.
    """

    def __init__(self, root, shard, entries, frame_shape, dtype):
        self.path, self.note_path = root / _shard_name(shard), _note_path(root, shard)
        self.temporary = self.path.with_name(self.path.name + ".tmp")
        self.entries, self.frame_shape = entries, tuple(frame_shape)
        self.dtype, self.dtype_name = DTYPES[dtype]
        self.header_bytes = -(-len(self._header(entries)) // 8) * 8
        self.written = {}  # video -> frames written
        self.skipped = {}  # video -> reason

    def __enter__(self):
        self.file = open(self.temporary, "wb")
        self.start = self.file.seek(8 + self.header_bytes)
        return self

    def append(self, video, frames):
        """Write the next frames of a video, a tensor of shape (t, *frame_shape). Videos come one after another."""
        if self.skipped.get(video) is not None:
            return
        if tuple(frames.shape[1:]) != self.frame_shape:
            raise ValueError(f"{self.path}: expected frames of {self.frame_shape}, found {tuple(frames.shape[1:])}")
        if video not in self.written:
            self.written[video] = 0
            self.start = self.file.tell()
        self.written[video] += len(frames)
        raw = frames.to(self.dtype).cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        with _writing(self.path):
            self.file.write(raw)

    def skip(self, video, reason):
        """Leave a video out, also one whose first frames were written already."""
        if video in self.written:
            del self.written[video]
            self.file.seek(self.start)
        self.skipped.setdefault(video, reason)

    def __exit__(self, kind, *_):
        try:
            if kind is None:
                self._complete()
        finally:
            with contextlib.suppress(OSError):  # a full disk refuses the rest of the buffer once more
                self.file.close()
            self.temporary.unlink(missing_ok=True)

    def _complete(self):
        expected = {video: n for video, n in self.entries.items() if video not in self.skipped}
        if self.written != expected:
            raise ValueError(f"{self.path}: expected frames per video {expected}, found {self.written}")
        with _writing(self.path):
            self.file.truncate()
            self.file.seek(0)
            self.file.write(struct.pack("<Q", self.header_bytes))
            self.file.write(self._header(self.written).ljust(self.header_bytes))
            self.file.flush()
            os.fsync(self.file.fileno())
            note = {"file": self.path.name, "bytes": self.temporary.stat().st_size, "sha256": _sha256(self.temporary)}
            os.replace(self.temporary, self.path)
        _write_json(self.note_path, note | {"skipped": {str(v): reason for v, reason in self.skipped.items()}})

    def _header(self, lengths):
        header, offset = {}, 0
        frame_bytes = _numel(self.frame_shape) * self.dtype.itemsize
        for video, n_frames in lengths.items():
            end = offset + n_frames * frame_bytes
            shape = [n_frames, *self.frame_shape]
            header[_key(video)] = {"dtype": self.dtype_name, "shape": shape, "data_offsets": [offset, end]}
            offset = end
        return json.dumps(header, separators=(",", ":")).encode()


class LatentCacheDataset(Dataset):
    """Clips and whole videos out of a finished cache.

    ``dataset[i]`` is ``{"codes": (clip_length, h, w, n_codebooks) int64}`` or ``{"latents": (clip_length, D, h, w)
    float32}``, as the cache stores. An epoch takes ``n_frames // clip_length`` clips of each video: in the train split
    at random places, the same for a given (seed, epoch, i) whatever the workers; elsewhere side by side. Videos shorter
    than a clip are counted, logged and left out. Files open in the process that reads them, so the data set pickles and
    works under spawn.

    Args:
        root: folder of one split, ``run_dir/latents/train``.
        clip_length: frames a clip.
        stride: take every ``stride``-th cached frame.
        split: "train" for random windows, "val" or "test" for fixed ones.
        seed: of the random windows.
    Raises:
        FileNotFoundError: no manifest: not encoded yet, or not to the end; or a shard is missing.
        ValueError: a truncated shard, an unknown format, or no video as long as a clip.
    """

    epoch = 0

    def __init__(self, root, clip_length, stride=1, split="train", seed=0):
        check_split(split)
        for name, value in (("clip_length", clip_length), ("stride", stride)):
            if value < 1:
                raise ValueError(f"{name}: expected at least 1, found {value}")
        self.root, self.clip_length, self.stride, self.split, self.seed = Path(root), clip_length, stride, split, seed
        self.manifest = read_manifest(root)
        present = [i for i in range(len(self.manifest["videos"])) if str(i) not in self.manifest["skipped"]]
        self._index = [i for i in present if self._length(i) >= clip_length]
        if not self._index:
            longest = max(map(self._length, present))
            raise ValueError(
                f"latents cache {root}: no video has clip_length={clip_length} frames at stride={stride}; "
                f"the longest of {len(present)} has {longest}"
            )
        if len(self._index) < len(present):
            n = len(present) - len(self._index)
            logger.info("latents cache %s: %d of %d videos are shorter than a clip and left out", root, n, len(present))
        self._clips = [
            (n, k * clip_length) for n, i in enumerate(self._index) for k in range(self._length(i) // clip_length)
        ]
        self._handles = {}

    @property
    def spec(self):
        """The tokenizer's ``latent_spec``."""
        return self.manifest["latent_spec"]

    @property
    def fps(self):
        """Frames per second of the clips."""
        return self.manifest["fps"] / self.stride

    @property
    def videos(self):
        """list of VideoEntry: those long enough for a clip, at this stride."""
        entries = [(self.manifest["videos"][i], self._length(i)) for i in self._index]
        return [VideoEntry(video["name"], length, video["fps"] / self.stride) for video, length in entries]

    @property
    def n_videos(self):
        return len(self._index)

    def expect(self, tokenizer_fingerprint=None, latent_spec=None, data=None):
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
            found["data"] = {name: self.manifest["data"].get(name) for name in data}
            asked["data"] = data
        difference = _difference(found, json.loads(json.dumps(asked)))
        if difference:
            raise ValueError(
                f"latents cache {self.root}: {difference}; re-run tools/encode_dataset.py with cache.overwrite=true"
            )
        return self

    def set_epoch(self, epoch):
        """Move to another set of random windows."""
        self.epoch = epoch

    def __len__(self):
        return len(self._clips)

    def __getitem__(self, index):
        video, start = self._clips[index]
        if self.split == "train":
            n_starts = self._length(self._index[video]) - self.clip_length + 1
            start = window_start(self.seed, self.epoch, index, n_starts)
        return {self.manifest["store"]: self.read_video(video, start, start + self.clip_length)}

    def read_video(self, index, start=0, stop=None):
        """Frames ``start:stop`` of video ``index`` -> (stop - start, ...), int64 codes or float32 latents."""
        video = self._index[index]
        length = self._length(video)
        stop = length if stop is None else stop
        if not 0 <= start < stop <= length:
            raise ValueError(f"video {index}: expected 0 <= start < stop <= {length}, found {start}:{stop}")
        frames = self._tensor(video)[start * self.stride : (stop - 1) * self.stride + 1]
        dtype = torch.int64 if self.manifest["store"] == "codes" else torch.float32
        return frames[:: self.stride].to(dtype, copy=True)  # a copy: the file stays mapped, its pages do not travel

    def verify(self):
        """Compare every shard with its checksum; see ``verify_cache``."""
        return verify_cache(self.root)

    def _length(self, video):
        return (self.manifest["videos"][video]["n_frames"] - 1) // self.stride + 1

    def _tensor(self, video):
        shard = video // self.manifest["shard_videos"]
        if shard not in self._handles:
            self._handles[shard] = safe_open(self.root / self.manifest["shards"][shard]["file"], framework="pt")
        return self._handles[shard].get_slice(_key(video))

    def __getstate__(self):
        return self.__dict__ | {"_handles": {}}


def read_manifest(root):
    """The manifest of a finished cache, after a check that every shard has its full size.

    Raises:
        FileNotFoundError: no manifest, or a shard is missing.
        ValueError: not a manifest of this format, or a shard of another size (names it, with both sizes).
    """
    root = Path(root)
    if not (root / MANIFEST).is_file():
        state = "unfinished" if (root / PLAN).is_file() else "not there"
        raise FileNotFoundError(f"latents cache {root}: {state}; run tools/encode_dataset.py, which resumes")
    manifest = _read_json(root / MANIFEST)
    if manifest.get("format") != FORMAT:
        raise ValueError(f"{root / MANIFEST}: expected format {FORMAT}, found {manifest.get('format')!r}")
    for note in manifest["shards"]:
        error = _size_error(root, note)
        if error:
            raise ValueError(f"{error}; re-run tools/encode_dataset.py, which encodes it again")
    return manifest


def verify_cache(root):
    """Compare every shard of a finished cache with its checksum; returns the number of shards.

    Raises:
        ValueError: names the first shard that differs, with both checksums.
    """
    shards = read_manifest(root)["shards"]
    for note in shards:
        found = _sha256(Path(root) / note["file"])
        if found != note["sha256"]:
            raise ValueError(
                f"{Path(root) / note['file']}: expected sha256 {note['sha256']}, found {found}; "
                "delete it and re-run tools/encode_dataset.py, which encodes it again"
            )
    return len(shards)


def _layout(latent_spec, store, dtype):
    """-> (store, dtype name, shape of one frame's tensor)"""
    sizes = latent_spec["codebook_sizes"]
    if store not in STORES:
        raise ValueError(f"cache.store: expected one of {', '.join(STORES)}, found {store!r}")
    if dtype not in LATENT_DTYPES:
        raise ValueError(f"cache.dtype: expected one of {', '.join(LATENT_DTYPES)}, found {dtype!r}")
    if store == "codes" and not sizes:
        raise ValueError("cache.store: expected 'latents' or 'auto' (the tokenizer is continuous), found 'codes'")
    grid = [latent_spec["height"], latent_spec["width"]]
    if store == "latents" or not sizes:
        return "latents", dtype, [latent_spec["channels"], *grid]
    largest = max(sizes)
    return "codes", "uint8" if largest <= 2**8 else "uint16" if largest <= 2**16 else "uint32", [*grid, len(sizes)]


def _difference(found, asked):
    """The first entries that differ, with both sides, as one line; empty when there are none."""
    lines = itertools.islice(_differences(found, asked, ""), 3)
    return "; ".join(f"made with {name} {one}, asked for {other}" for name, one, other in lines)


def _differences(found, asked, name):
    if isinstance(found, dict) and isinstance(asked, dict):
        for key in [*asked, *(key for key in found if key not in asked)]:
            yield from _differences(found.get(key), asked.get(key), f"{name}.{key}" if name else key)
    elif isinstance(found, list) and isinstance(asked, list) and len(found) != len(asked):
        yield name, f"of {len(found)} entries", f"{len(asked)}"
    elif isinstance(found, list) and isinstance(asked, list):
        for i, (one, other) in enumerate(zip(found, asked)):
            yield from _differences(one, other, f"{name}[{i}]")
    elif found != asked:
        yield name, found, asked


def _size_error(root, note):
    path = root / note["file"]
    found = path.stat().st_size if path.is_file() else None
    if found == note["bytes"]:
        return None
    return f"{path}: expected {note['bytes']} bytes, found {'no file' if found is None else found}"


@contextlib.contextmanager
def _writing(path):
    try:
        yield
    except OSError as error:
        message = f"{path}: cannot be written ({error.strerror}); finished shards are kept, a re-run resumes"
        raise OSError(message) from None


def _numel(shape):
    return torch.Size(shape).numel()


def _frame_bytes(job):
    return _numel(job["frame_shape"]) * DTYPES[job["dtype"]][0].itemsize


def _key(video):
    return f"{video:08d}"


def _shard_name(shard):
    return f"shard-{shard:05d}.safetensors"


def _note_path(root, shard):
    return root / f"shard-{shard:05d}.json"


def _sha256(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read_json(path):
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON ({error})") from None


def _write_json(path, content):
    """Write all or nothing: to a temporary file, renamed when it is on the disk."""
    with _writing(path):
        with replacing(path) as temporary, open(temporary, "w") as file:
            json.dump(content, file, indent=1)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # makes this rename, and a shard's before it, last through a power cut
        finally:
            os.close(folder)
