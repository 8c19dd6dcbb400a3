"""Folders of safetensors shards: many videos a file, one tensor a video, streamed, resumable and checked.

The latents cache and the prepared data sets are stored this way. A shard is written to a temporary file and renamed, so
a run that was killed resumes by skipping the shards that stand. While a folder is unfinished it holds ``plan.json`` and
a small JSON note beside each shard; ``manifest.json`` replaces them in the end: a folder with a manifest is complete.

A folder is a Path or a Url (``urls.py``). Behind a URL lie the same files: a shard is written here and then uploaded,
and read by a local copy. A store that shows files before they are whole does no harm: the note comes after its shard
and says how large that is, and JSON that was cut short counts as none (``_stands``).
"""

import collections
import contextlib
import itertools
import json
import logging
import math
import os
import queue
import struct
import threading
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
from jaxtyping import Shaped
from pydantic import Field
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ...command import named
from ...copies import local_copy
from ...files import (
    MANIFEST_MB,
    file_sha256,
    link_outside,
    parse_json,
    put,
    read_json,
    sweep,
    temporary_path,
    write_json,
    writing,
)
from ...schemas import Count, Digest, FileText, Rate, Schema, Text, Whole, check, one_line, short
from ...urls import Place, Url, folder_at, unlink_all
from ..base import ClipWindows, EmptySplitError, VideoEntry

logger = logging.getLogger("latentcast")

MANIFEST, PLAN = "manifest.json", "plan.json"
# name in the manifest -> torch's type and the name that safetensors gives it
DTYPES = {
    "uint8": (torch.uint8, "U8"),
    "uint16": (torch.uint16, "U16"),
    "uint32": (torch.uint32, "U32"),
    "int64": (torch.int64, "I64"),
    "float16": (torch.float16, "F16"),
    "bfloat16": (torch.bfloat16, "BF16"),
    "float32": (torch.float32, "F32"),
}
UNKNOWN_LENGTH = 10**10  # frames that room is kept for in a header when a video's length is not known beforehand
OPEN_FILES = 1024  # mapped by one reader at a time
OPEN_BYTES = 512e6  # the same of local copies
FETCHING = 4  # copies that one reader fetches ahead at a time
KEPT = "; finished shards are kept, a re-run resumes"
ALIGNMENT = 8  # bytes; mapped tensors of any type start at multiples of their items

Shape = Annotated[list[Count], Field(max_length=8)]
DType = Literal[tuple(DTYPES)]


class Condition(Schema):
    """Of a data set; see VideoDataset."""

    shape: Shape
    dtype: DType
    per: Literal["frame", "video"]
    n_values: Count = None
    names: list[Text] = None


class Video(Schema):
    """What is known of a video beforehand."""

    name: FileText
    n_frames: Count = None
    fps: Rate = None


class Job(Schema):
    """What a plan holds, and a manifest beside its notes."""

    fps: Rate
    frame_shape: Shape
    dtype: DType
    conditions: dict[Text, Condition]
    shard_videos: Count
    videos: list[Video]


class Facts(Schema):
    """What a note says of a video that stands in its shard."""

    n_frames: Count
    source_sha256: Text | None = None


class Note(Schema):
    """Of one shard; the videos' numbers are strings, as keys are in JSON."""

    file: Text
    bytes: Whole
    sha256: Digest
    videos: dict[Text, Facts]
    skipped: dict[Text, FileText]
    away: list[Whole] = []  # noqa: RUF012  # of those skipped, the ones to be tried again


class Notes(Schema):
    """What a manifest holds beside its job."""

    shards: list[Note]


@dataclass(frozen=True)
class Kind:
    """What a folder of shards is, for error messages.

    Attributes: ``name``; ``version`` of its manifest; ``job``: schema of plan and manifest; ``made_by``: file of the
    tool that makes it; ``replace``: how to make it anew.
    """

    name: str
    version: int
    job: type[Job]
    made_by: str
    replace: str

    @property
    def tool(self) -> str:
        """What texts call the tool."""
        return named(self.made_by)


class ShardWriter:
    """Plans, writes and completes one folder.

    The caller keeps other runs out of the folder (``files.locked``). Several processes may share the work: each takes
    the shards with ``shard % world_size == rank``. Rank 0 must be constructed before the others (it prepares the
    folder), and calls ``finish`` after all have written theirs. The files do not depend on how many processes wrote
    them.

    Args:
        root: the folder: a Path, a Url or text that names one.
        kind: a Kind.
        job: JSON-able dict that identifies the work. Needs ``frame_shape``, ``dtype``, ``conditions`` (see
            VideoDataset), ``shard_videos`` and ``videos``: a list of dicts with ``name`` and, where they are known
            beforehand, ``n_frames``.
        overwrite: replace what another job left in ``root``, instead of refusing to go on.
        growing: ``extend`` may be called: a folder whose videos begin with those of ``job`` is gone on with as it is.
        rank, world_size: this process among those that write.
    Raises:
        ValueError: another job made what stands in ``root`` (both sides are named).
    """

    def __init__(
        self,
        root: Place,
        kind: Kind,
        job: dict,
        *,
        overwrite: bool = False,
        growing: bool = False,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.root, self.kind = folder_at(root), kind
        self.rank, self.world_size, self.growing = rank, world_size, growing
        self._again = set()
        if job["shard_videos"] < 1:
            raise ValueError(f"shard_videos: expected at least 1, found {job['shard_videos']}")
        job = {"format": kind.version} | job
        self.job = json.loads(json.dumps(job))  # tuples become lists, as they will be when the manifest is read back
        if rank == 0:
            self._prepare(overwrite)

    @property
    def n_shards(self) -> int:
        return -(-len(self.job["videos"]) // self.job["shard_videos"])

    @property
    def finished(self) -> bool:
        """The manifest stands: nothing is left to do."""
        return _stands(self.root / MANIFEST)

    def shard_videos(self, shard: int) -> range:
        """The indices of the videos that shard number ``shard`` holds."""
        size = self.job["shard_videos"]
        return range(shard * size, min((shard + 1) * size, len(self.job["videos"])))

    def pending(self, every_rank: bool = False) -> list[int]:
        """Numbers of the shards still to be written: this rank's, or those of all ranks."""
        if self.finished:
            return []
        shards = [s for s in range(self.n_shards) if every_rank or s % self.world_size == self.rank]
        return [s for s, note in zip(shards, self._notes(shards)) if s in self._again or note is None]

    def open_shard(self, shard: int) -> "ShardFile":
        """A ShardFile that takes the videos of one shard; use it in a ``with`` block."""
        entries = {v: self.job["videos"][v].get("n_frames") for v in self.shard_videos(shard)}
        standing = self._notes([shard])[0] if shard in self._again else None
        layout = (self.job["frame_shape"], self.job["dtype"], self.job["conditions"])
        return ShardFile(self.root, shard, entries, *layout, keep=standing["videos"] if standing else ())

    def notes(self) -> list[dict | None]:
        """What is known of each shard: file, bytes, sha256, videos and skipped; None for one that is not written."""
        if self.finished:
            return load_manifest(self.root, self.kind)["shards"]
        return self._notes(range(self.n_shards))

    def away(self) -> dict[int, list[int]]:
        """Shard -> its videos that were left out for what may have passed since: see ``ShardFile.skip``."""
        notes = enumerate(self.notes())
        return {shard: note["away"] for shard, note in notes if note and note.get("away")}

    def redo(self, shards: Iterable[int], keep: bool = False) -> None:
        """Make these shards pending again, in a finished folder too.

        With ``keep`` they stand until others take their place, which must hold all of their videos."""
        if shards and self.finished:
            for shard, note in enumerate(self.notes()):
                write_json(_note_path(self.root, shard), note)
            write_json(self.root / PLAN, self.job)
            (self.root / MANIFEST).unlink()
        if keep:
            self._again.update(shards)
            return
        unlink_all(_note_path(self.root, shard) for shard in shards)
        unlink_all(self.root / _shard_name(shard) for shard in shards)

    def extend(self, videos: Sequence) -> None:
        """Add videos to a folder that is not finished; a last shard that has room for some is written anew."""
        last, room = divmod(len(self.job["videos"]), self.job["shard_videos"])
        if room:
            self.redo([last])
        self.job["videos"] += videos
        write_json(self.root / PLAN, self.job)

    def finish(self) -> None:
        """Write the manifest, once every shard stands."""
        notes = self.notes()
        missing = [_shard_name(s) for s, note in enumerate(notes) if note is None]
        if missing:
            raise ValueError(f"{self.kind.name} {self.root}: {missing[0]} is not written; re-run {self.kind.tool}")
        reasons = [reason for note in notes for reason in note["skipped"].values()]
        if len(reasons) == len(self.job["videos"]):
            self._clear()  # a re-run tries them again
            raise ValueError(
                f"{self.kind.name} {self.root}: none of {len(reasons)} videos could be written "
                f"({next(iter(reasons), 'the data set is empty')})"
            )
        write_json(self.root / MANIFEST, self.job | {"shards": notes})
        self._tidy()

    def _prepare(self, overwrite):
        """Make ``root`` ready to be continued: refuse or clear what does not belong to this job."""
        self.root.mkdir(parents=True, exist_ok=True)
        if not isinstance(self.root, Url):
            sweep(self.root)  # not what other shares are writing
        try:
            standing = standing_job(self.root, self.kind)
        except ValueError:
            if not overwrite:
                raise
            standing = {}
        if standing is not None:
            if self.growing and standing.get("videos", [])[: len(self.job["videos"])] == self.job["videos"]:
                self.job["videos"] = standing["videos"]
            difference = difference_of({k: v for k, v in standing.items() if k in self.job}, self.job)
            if difference and not overwrite:
                raise ValueError(f"{self.kind.name} {self.root}: {difference}; {self.kind.replace}")
            if difference or (overwrite and self.finished):
                self._clear()
            elif self.finished:
                self._tidy()
                self._redo_damaged()
        else:
            self._clear()
        if not self.finished and standing != self.job:
            write_json(self.root / PLAN, self.job)

    def _redo_damaged(self):
        notes = self.notes()
        errors = _size_errors(self.root, notes)
        damaged = [shard for shard, error in enumerate(errors) if error]
        for shard in damaged:
            logger.warning("%s; writing it again", errors[shard])
        if damaged:
            self.redo(damaged)

    def _notes(self, shards):
        """Their notes; None for a shard that is not written."""
        shards = list(shards)
        notes = _read_notes(self.root, [_note_path(self.root, shard) for shard in shards])
        for shard, note in zip(shards, notes):
            if note is not None:
                path = _note_path(self.root, shard)
                _check_note(path, self.job, shard, check(path, Note, note))
        written = [note for note in notes if note is not None]
        errors = iter(_size_errors(self.root, written))
        return [None if note is None or next(errors) else note for note in notes]

    def _tidy(self):
        unlink_all(self.root.glob("shard-*.json"))
        (self.root / PLAN).unlink(missing_ok=True)

    def _clear(self):
        # The notes go first and the manifest last: a crash in between never leaves old shards that pass for new ones.
        unlink_all(self.root.glob("shard-*.json"))
        unlink_all(self.root.glob("shard-*.safetensors"))
        for name in (PLAN, MANIFEST):
            (self.root / name).unlink(missing_ok=True)


def _stands(path):
    """Whether a JSON file of ours does. Here they appear whole; a store may show one that a killed run was writing, and
    only whole ones end in a line of one brace."""
    if not isinstance(path, Url):
        return path.is_file()
    try:
        return path.read_text(last=3) == "\n}\n"
    except FileNotFoundError:
        return False


def _read_notes(root, paths):
    """What stands in notes, which may be many; None for one that is not there."""
    if not isinstance(root, Url):
        return [read_json(path) if path.is_file() else None for path in paths]
    known = root.sizes()
    there = [path for path in paths if path.name in known]
    texts = dict(zip(there, root.read_texts([path.name for path in there])))
    return [parse_json(path, texts[path]) if texts.get(path, "").endswith("\n}\n") else None for path in paths]


def standing_job(root: Place, kind: Kind) -> dict | None:
    """The job that a folder's manifest or plan names, as a dict; None where neither is. Raises as ``read_manifest``,
    except that one of another format is returned as it is."""
    if _stands(root / MANIFEST):
        found = read_json(root / MANIFEST, MANIFEST_MB)
        return load_manifest(root, kind) if found.get("format") == kind.version else found
    if _stands(root / PLAN):
        found = read_json(root / PLAN, MANIFEST_MB)
        return check(root / PLAN, kind.job, found) if found.get("format") == kind.version else found
    return None


class ShardFile:
    """One safetensors file, streamed: memory does not grow with the length of the videos.

    The header comes first in the file and holds every length, so room is kept for it and it is filled in last; a video
    that turns out unreadable is cut out of the stream. Conditions follow the frames of all videos. Leaving the ``with``
    block by an exception leaves nothing, and so does one that lost a video of ``keep``: the numbers, as strings, of
    those in the shard that stands.
    """

    def __init__(
        self,
        root: Path | Url,
        shard: int,
        entries: Mapping[int, object],
        frame_shape: Sequence[int],
        dtype: str,
        conditions: dict[str, dict],
        keep: Collection = (),
    ) -> None:
        self.path, self.note_path = root / _shard_name(shard), _note_path(root, shard)
        self.temporary = temporary_path(self.path)
        self.entries, self.frame_shape = entries, tuple(frame_shape)
        self.dtype, self.dtype_name = DTYPES[dtype]
        self.condition_specs, self.keep = conditions, keep
        longest = {video: UNKNOWN_LENGTH if n is None else n for video, n in entries.items()}
        self.header_bytes = -(-len(self._header(longest)[0]) // 8) * 8
        self.written = {}  # video -> frames written
        self.conditions = {}  # video -> name -> tensor
        self.facts = {}  # video -> what the note says of it beside its length
        self.skipped = {}  # video -> reason
        self.away = []  # of these, the videos that may be read at another time

    def __enter__(self):
        with writing(self.path, KEPT):
            self.file = open(self.temporary, "wb")
        self.start = self.file.seek(8 + self.header_bytes)
        return self

    def append(self, video: int, frames: Shaped[Tensor, "t ..."]) -> None:
        """Write the next frames of a video, a tensor of shape (t, *frame_shape). Videos come one after another."""
        if self.skipped.get(video) is not None:
            return
        if tuple(frames.shape[1:]) != self.frame_shape:
            raise ValueError(f"{self.path}: expected frames of {self.frame_shape}, found {tuple(frames.shape[1:])}")
        if video not in self.written:
            self.written[video] = 0
            self.start = self.file.tell()
        self.written[video] += len(frames)
        with writing(self.path, KEPT):
            self.file.write(_raw(frames.to(self.dtype)))

    def describe(self, video: int, conditions: Mapping[str, Tensor], **facts: object) -> None:
        """Keep a video's conditions, name -> tensor, and JSON-able facts for the manifest."""
        self.conditions[video] = conditions
        self.facts[video] = facts

    def skip(self, video: int, reason: str, away: bool = False) -> None:
        """Leave a video out, also one whose first frames were written already.

        ``away``: for what says nothing of it (no permission, a share not mounted), so that a later run tries again."""
        if video in self.written:
            del self.written[video]
            self.file.seek(self.start)
        if away and video not in self.skipped:
            self.away.append(video)
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
        expected = {
            v: self.written.get(v) if n is None else n for v, n in self.entries.items() if v not in self.skipped
        }
        if self.written != expected:
            raise ValueError(f"{self.path}: expected frames per video {expected}, found {self.written}")
        if any(int(video) not in self.written for video in self.keep):
            return
        header, padding = self._header(self.written)
        with writing(self.path, KEPT):
            self.file.write(bytes(padding))
            for video, name, shape in self._condition_shapes(self.written):
                self.file.write(_raw(self._condition(video, name, shape)))
            self.file.truncate()
            self.file.seek(0)
            self.file.write(struct.pack("<Q", self.header_bytes))
            self.file.write(header.ljust(self.header_bytes))
            self.file.flush()
            os.fsync(self.file.fileno())
            note = {
                "file": self.path.name,
                "bytes": self.temporary.stat().st_size,
                "sha256": file_sha256(self.temporary),
            }
            put(self.temporary, self.path)
        videos = {str(v): {"n_frames": n} | self.facts.get(v, {}) for v, n in self.written.items()}
        skipped = {str(video): reason for video, reason in self.skipped.items()}
        away = {"away": self.away} if self.away else {}
        write_json(self.note_path, note | {"videos": videos, "skipped": skipped} | away)

    def _condition(self, video, name, shape):
        tensor = self.conditions.get(video, {}).get(name)
        found = None if tensor is None else tuple(tensor.shape)
        if found != shape:
            raise ValueError(f"{self.path}: video {video}: expected condition {name} of shape {shape}, found {found}")
        return tensor.to(DTYPES[self.condition_specs[name]["dtype"]][0])

    def _condition_shapes(self, lengths):
        """(video, name, shape) of every condition in the order of the file: large items first, for alignment."""
        by_size = sorted(self.condition_specs.items(), key=lambda item: -DTYPES[item[1]["dtype"]][0].itemsize)
        for name, spec in by_size:
            for video, n_frames in lengths.items():
                per_frame = (n_frames,) if spec["per"] == "frame" else ()
                yield video, name, (*per_frame, *spec["shape"])

    def _header(self, lengths):
        """-> the header's bytes, and how many bytes of padding lie between frames and conditions"""
        tensors = [(_key(v), (n, *self.frame_shape), self.dtype, self.dtype_name) for v, n in lengths.items()]
        n_bytes = sum(torch.Size(shape).numel() for _, shape, *_ in tensors) * self.dtype.itemsize
        padding = -n_bytes % ALIGNMENT if self.condition_specs else 0
        if padding:
            tensors.append(("padding", (padding,), *DTYPES["uint8"]))
        for video, name, shape in self._condition_shapes(lengths):
            tensors.append((_key(video, name), shape, *DTYPES[self.condition_specs[name]["dtype"]]))
        header, offset = {}, 0
        for key, shape, dtype, dtype_name in tensors:
            end = offset + torch.Size(shape).numel() * dtype.itemsize
            header[key] = {"dtype": dtype_name, "shape": list(shape), "data_offsets": [offset, end]}
            offset = end
        return json.dumps(header, separators=(",", ":")).encode(), padding


class ShardReader:
    """Reads videos and conditions out of a finished folder; behind a URL by local copies of its shards.

    Files open in the process that reads them, so a reader pickles and works under spawn."""

    def __init__(self, root: Place, manifest: dict) -> None:
        self.root, self.manifest = folder_at(root), manifest
        self._ahead = None  # shards to be fetched
        self.facts = {int(v): facts for note in manifest["shards"] for v, facts in note["videos"].items()}
        self._open = collections.OrderedDict()  # shard -> (its file, key -> tensor that was asked for, path)

    @property
    def videos(self) -> list[int]:
        """Indices of the videos that were not skipped."""
        return list(self.facts)

    def length(self, video: int) -> int:
        """Frames of a video."""
        return self.facts[video]["n_frames"]

    def file_name(self, video: int) -> str:
        """The shard that holds a video."""
        return self.manifest["shards"][self.shard_of(video)]["file"]

    def frames(self, video: int, start: int, stop: int, stride: int = 1) -> Shaped[Tensor, "T ..."]:
        """Frames ``start:stop:stride`` -> a view of the mapped file: to be copied, into another type say, before it is
        changed, kept or sent to another process."""
        return self._tensor(video)[start:stop:stride]

    def array(self, video: int, start: int, stop: int, stride: int = 1) -> Shaped[np.ndarray, "T ..."]:
        """The same as an array, where NumPy has the type; costs a fifth of that."""
        return self._tensor(video, as_array=True)[start:stop:stride]

    def conditions(self, video: int, start: int, stop: int, stride: int = 1) -> dict[str, Tensor]:
        """name -> tensor: frames ``start:stop:stride`` of conditions per frame, the whole of others."""
        found = {}
        for name, spec in self.manifest["conditions"].items():
            stored = self._tensor(video, name)
            found[name] = (stored[start:stop:stride] if spec["per"] == "frame" else stored).clone()
        return found

    def _tensor(self, video, condition=None, as_array=False):
        """A video's frames, or one of its conditions: mapped, of the shape and type which the manifest says."""
        file, tensors, _ = self._file(video)
        found = tensors.get((video, condition, as_array))
        if found is None:
            found = self._map(file, video, condition)
            found = tensors[video, condition, as_array] = found.numpy() if as_array else found
        return found

    def _map(self, file, video, condition):
        key, length = _key(video, condition), self.length(video)
        shape, dtype = (length, *self.manifest["frame_shape"]), self.manifest["dtype"]
        if condition is not None:
            spec = self.manifest["conditions"][condition]
            shape, dtype = (*[length] * (spec["per"] == "frame"), *spec["shape"]), spec["dtype"]
        try:
            stored = file.get_slice(key)
            found = tuple(stored.get_shape()), stored.get_dtype()
        except SafetensorError:
            found = "none"
        if found != (shape, DTYPES[dtype][1]):
            path = self.root / self.file_name(video)
            raise ValueError(f"{path}: tensor {key}: expected {(shape, DTYPES[dtype][1])}, found {found}")
        return file.get_tensor(key)

    def _file(self, video):
        shard = self.shard_of(video)
        if shard not in self._open:
            self._make_way(shard)
            try:
                self._open[shard] = self._opened(shard)
            except SafetensorError as error:
                path, advice = self.root / self.file_name(video), "delete it and re-run the tool that wrote it"
                raise ValueError(
                    f"{path}: not a readable safetensors file ({one_line(error, 200)}); {advice}"
                ) from None
        self._open.move_to_end(shard)
        return self._open[shard]

    def _make_way(self, shard):
        """Close files before another shard's is opened: the ones not used for longest, and copies that have no name any
        more, whose room on the disk is free when nobody has them open."""
        if isinstance(self.root, Url):
            for other in [other for other, (*_, copy) in self._open.items() if not copy.exists()]:
                del self._open[other]
            sizes = [self.manifest["shards"][other]["bytes"] for other in (shard, *reversed(self._open))]
            n_kept = sum(taken <= OPEN_BYTES for taken in itertools.accumulate(sizes)) - 1
        else:
            n_kept = OPEN_FILES - 1
        while len(self._open) > max(0, n_kept):
            self._open.popitem(last=False)

    def _opened(self, shard):
        while True:
            path = self._copy(shard)
            try:
                return safe_open(path, framework="pt"), {}, path
            except FileNotFoundError:
                if not isinstance(self.root, Url):
                    raise
                # It made way for another process's copy before it was open.

    def _copy(self, shard):
        note = self.manifest["shards"][shard]
        return local_copy(self.root / note["file"], note["bytes"], note["sha256"])

    def shard_of(self, video: int) -> int:
        """The number of the shard that holds a video."""
        return video // self.manifest["shard_videos"]

    def prefetch(self, shards: Iterable[int]) -> None:
        """Fetch local copies of whole shards, in this order, while the process does other things; those that were asked
        for before are no more. Nothing to do for those of a local folder."""
        if not isinstance(self.root, Url):
            return
        if self._ahead is None:
            self._ahead = queue.SimpleQueue()
            for _ in range(FETCHING):
                threading.Thread(target=self._fetch, args=(self._ahead,), daemon=True).start()
        with contextlib.suppress(queue.Empty):
            while True:
                self._ahead.get_nowait()
        for shard in shards:
            self._ahead.put(shard)

    def _fetch(self, ahead):
        while True:
            with contextlib.suppress(OSError):  # who reads the shard meets it too, and says so
                self._copy(ahead.get())

    def __getstate__(self):
        return self.__dict__ | {"_open": collections.OrderedDict(), "_ahead": None}


class ClipReader:
    """The videos of a finished folder that are long enough for a clip, at every ``stride``-th frame, numbered anew.

    Shorter ones are counted, logged and left out. Pickles as ShardReader does.

    Args:
        root, manifest: see ShardReader.
        clip_length, stride: at least 1.
        name: of the folder, for errors.
    Attributes:
        videos: list of VideoEntry; ``n_frames`` counts after the stride, ``fps`` is the manifest's over the stride.
    Raises:
        EmptySplitError: no video is long enough.
    """

    def __init__(self, root: Place, manifest: dict, clip_length: int, stride: int, name: str) -> None:
        self._reader, self._stride = ShardReader(root, manifest), stride
        lengths = {v: (self._reader.length(v) - 1) // stride + 1 for v in self._reader.videos}
        self._numbers = [v for v, n in lengths.items() if n >= clip_length]
        if not self._numbers:
            raise EmptySplitError(
                f"{name}: no video has clip_length={clip_length} frames at stride {stride}; "
                f"the longest of {len(lengths)} has {max(lengths.values(), default=0)}"
            )
        left_out = len(lengths) - len(self._numbers)
        if left_out:
            logger.info("%s: %d of %d videos are shorter than a clip and left out", name, left_out, len(lengths))
        fps, known = manifest["fps"], manifest["videos"]
        self.videos = [
            VideoEntry(known[v]["name"], lengths[v], known[v].get("fps", fps) / stride) for v in self._numbers
        ]

    def frames(self, index: int, start: int = 0, stop: int | None = None) -> Shaped[Tensor, "T ..."]:
        """Frames ``start:stop`` of video ``index`` -> (stop - start, *frame_shape), as ShardReader gives them."""
        return self._reader.frames(*self._place(index, start, stop))

    def array(self, index: int, start: int = 0, stop: int | None = None) -> Shaped[np.ndarray, "T ..."]:
        """The same as an array; see ShardReader."""
        return self._reader.array(*self._place(index, start, stop))

    def conditions(self, index: int, start: int = 0, stop: int | None = None) -> dict[str, Tensor]:
        """Conditions of the same frames; see VideoDataset."""
        return self._reader.conditions(*self._place(index, start, stop))

    def shard_clips(self, windows: ClipWindows) -> list[tuple[int, int, int, int]]:
        """Which clips lie in which shard -> (shard, first clip, its end, bytes of the shard), of ClipWindows over the
        videos."""
        notes, found = self._reader.manifest["shards"], []
        for video, (start, stop) in zip(self._numbers, windows.spans()):
            shard = self._reader.shard_of(video)
            if found and found[-1][0] == shard:
                start = found.pop()[1]
            found.append((shard, start, stop, notes[shard]["bytes"]))
        return found

    def prefetch(self, shards: Iterable[int]) -> None:
        """See ShardReader."""
        self._reader.prefetch(shards)

    def _place(self, index, start, stop):
        """-> (video, start, stop, stride) in stored frames"""
        length = self.videos[index].n_frames
        stop = length if stop is None else stop
        if not 0 <= start < stop <= length:
            name = self.videos[index].name
            raise ValueError(f"video {index} ({name}): expected 0 <= start < stop <= {length}, found {start}:{stop}")
        return self._numbers[index], start * self._stride, (stop - 1) * self._stride + 1, self._stride


def read_manifest(root: Place, kind: Kind) -> dict:
    """The manifest of a finished folder, after a check that every shard has its full size.

    Raises:
        FileNotFoundError: no manifest, or a shard is missing.
        ValueError: not a manifest of this format, or a shard of another size (names it, with both sizes).
    """
    root = folder_at(root)
    if not _stands(root / MANIFEST):
        state = "unfinished" if _stands(root / PLAN) else "not there"
        raise FileNotFoundError(f"{kind.name} {root}: {state}; run {kind.tool}, which resumes")
    manifest = load_manifest(root, kind)
    for error in _size_errors(root, manifest["shards"]):
        if error:
            raise ValueError(f"{error}; re-run {kind.tool}, which writes it again")
    return manifest


def load_manifest(root: Place, kind: Kind) -> dict:
    """The manifest of a finished folder, whether or not its shards stand; raises ValueError as ``read_manifest``."""
    path = folder_at(root) / MANIFEST
    manifest = read_json(path, MANIFEST_MB)
    if manifest.get("format") != kind.version:
        raise ValueError(f"{path}: expected format {kind.version}, found {short(manifest.get('format'))}")
    check(path, kind.job, manifest)
    notes, n_shards = manifest.get("shards"), -(-len(manifest["videos"]) // manifest["shard_videos"])
    check(path, Notes, manifest)
    if len(notes) != n_shards:
        raise ValueError(f"{path}: shards: expected {n_shards} of {len(manifest['videos'])} videos, found {len(notes)}")
    for shard, note in enumerate(notes):
        _check_note(f"{path}: shards[{shard}]", manifest, shard, note)
    return manifest


def _check_note(where, job, shard, note):
    """Refuse a note that names another file than its shard's, other videos, or more frames than its bytes hold."""
    if note["file"] != _shard_name(shard):
        raise ValueError(f"{where}: file: expected {_shard_name(shard)}, found {short(note['file'])}")
    first = shard * job["shard_videos"]
    expected = {str(v) for v in range(first, min(first + job["shard_videos"], len(job["videos"])))}
    if note["videos"].keys() | note["skipped"].keys() != expected or note["videos"].keys() & note["skipped"].keys():
        raise ValueError(
            f"{where}: expected each of the videos {first} to {first + len(expected) - 1} once, in videos or skipped"
        )
    n_frames = sum(facts["n_frames"] for facts in note["videos"].values())
    if (n_bytes := n_frames * math.prod(job["frame_shape"]) * DTYPES[job["dtype"]][0].itemsize) > note["bytes"]:
        raise ValueError(
            f"{where}: n_frames: expected as many as {note['bytes']} bytes hold, found {n_frames}, of {n_bytes}"
        )


def verify(root: Place, kind: Kind) -> int:
    """Compare every shard of a finished folder with its checksum; returns the number of shards.

    Raises:
        ValueError: names the first shard that differs, with both checksums.
    """
    notes = read_manifest(root, kind)["shards"]
    for problem in damage(root, notes):
        raise ValueError(f"{problem}; delete it and re-run {kind.tool}, which writes it again")
    return len(notes)


def damage(root: Place, notes: Iterable[dict]) -> Iterator[str]:
    """Yield a line for each shard that is missing, or differs in size or checksum from its note."""
    root = folder_at(root)
    for note, error in zip(notes, _size_errors(root, notes)):
        path = root / note["file"]
        if error is None and (found := file_sha256(path)) != note["sha256"]:
            error = f"{path}: expected sha256 {note['sha256']}, found {found}"
        if error:
            yield error


def difference_of(found: Mapping, asked: Mapping) -> str:
    """The first entries that differ, with both sides, as one line; empty when there are none."""
    lines = itertools.islice(_differences(found, asked, ""), 3)
    return "; ".join("made with {} {}, asked for {}".format(*map(one_line, line)) for line in lines)


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


def _size_errors(root, notes):
    """For each note a line about its shard where that is missing or of another size, else None."""
    sizes = root.sizes() if isinstance(root, Url) and notes else {}
    return [_size_error(root / note["file"], note, sizes) for note in notes]


def _size_error(path, note, sizes):
    if isinstance(path, Url):
        found = sizes.get(path.name)
    else:
        if path.is_symlink() and (link := link_outside(path, path.parent)):
            return link
        found = path.stat().st_size if path.is_file() else None
    if found == note["bytes"]:
        return None
    return f"{path}: expected {note['bytes']} bytes, found {'no file' if found is None else found}"


def _raw(tensor):
    return tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy()


def _key(video, condition=None):
    return f"{video:08d}" if condition is None else f"{video:08d}.{condition}"


def _shard_name(shard):
    return f"shard-{shard:05d}.safetensors"


def _note_path(root, shard):
    return root / f"shard-{shard:05d}.json"
