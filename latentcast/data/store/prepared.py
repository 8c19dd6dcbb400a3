"""Prepared data sets: a benchmark's videos cropped, resized and stored once, then read at random at a disk's speed.

A set is a folder with one folder of shards (see shards.py) for each split, uint8 frames and conditions, and a
``manifest.json`` that says what it is: name, protocol, counts, frame size, provenance. It is written last, so a set
with a manifest is complete. ``preview.png`` shows a few of its videos.
"""

import collections
import contextlib
import hashlib
import logging
import shutil
import signal
import threading
from collections.abc import Iterable, Sequence
from multiprocessing import connection
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from jaxtyping import Float
from pydantic import Field, model_validator
from torch import Tensor

from ...command import named
from ...figures.sheets import labelled_sheet, scale_for
from ...files import file_sha256, locked, read_json, replacing, told, write_json
from ...progress import Bar
from ...schemas import Count, Digest, FileText, Rate, Schema, Text, Whole, check, short
from ...shares import Share, turn
from ...sizes import Side, as_size, as_square, sides
from ...urls import GIGABYTES, Place, folder_at
from ..base import FITTING, SPLITS, Clip, EmptySplitError, VideoDataset, VideoEntry, check_split
from ..loading import end_with_parent, worker_context
from ..video.folder import luma
from ..video.reader import VideoAwayError, VideoError, check_crop, is_away
from ..video.writer import write_image
from . import shards

logger = logging.getLogger("latentcast")

FORMAT = 1
MANIFEST = "manifest.json"
MOTIONS = ("lattice", "deterministic", "stochastic")  # of MovingDigits
MAX_SPEED = 4  # of SVG's generator, pixels a frame on each axis
Split = Literal[SPLITS]


class SplitJob(shards.Job):
    """The manifest of a split's folder, or its plan."""

    name: Text
    protocol: dict[Text, Any]
    split: Split
    dtype: Literal["uint8"]
    frame_shape: Annotated[list[Count], Field(min_length=3, max_length=3)]


class Generator(Schema, extra="forbid"):
    """Arguments of MovingDigits that make a split, beside those which the manifest of the set gives."""

    n_digits: Count
    digit_size: Count
    max_speed: Count = MAX_SPEED  # of sets from before it was an option
    seed: int
    motion: Literal[MOTIONS]
    source: Literal["mnist"]
    video_length: Count
    n_videos: Count


class SetManifest(Schema):
    """The manifest of a set."""

    name: Text
    protocol: dict[Text, Any]
    counts: Annotated[dict[Split, Whole], Field(min_length=1)]
    expected_counts: dict[Split, Whole]
    complete: bool
    frame_size: Annotated[list[Side], Field(min_length=2, max_length=2)]
    channels: Count
    fps: Rate
    conditions: dict[Text, shards.Condition]
    generated: dict[Split, Generator]
    sha256: dict[Split, Digest]
    source: FileText | None
    source_sha256: dict[Split, Digest | None]

    @model_validator(mode="after")
    def _describes_each_split(self):
        known = self.generated.keys() | self.sha256.keys()
        if self.counts.keys() != known:
            found = ", ".join(sorted(known)) or "none"
            raise ValueError(f"generated, sha256: expected the splits {', '.join(sorted(self.counts))}, found {found}")
        if self.generated:
            as_square(self.frame_size, "frame_size", "frames that are generated")
        return self


KIND = shards.Kind(
    name="prepared set",
    version=1,
    job=SplitJob,
    made_by="prepare_dataset",
    replace="prepare it into another --output, or delete this one",
)


class IncompleteError(ValueError):
    """The source does not hold all that the published set should; what it holds is written and kept."""


def prepare(
    benchmark: object, output: Place, *, workers: int = 0, partial: bool = False, share: Share | None = None
) -> dict:
    """Prepare a data set; continues what an earlier run left in ``output``.

    Args:
        benchmark: a Benchmark.
        output: folder of the prepared set, or its URL.
        workers: processes that read and write beside this one, a shard at a time; 0: this one does it all. A video
            that one of them is lost over (a crash in native code, out of memory) is left out.
        partial: accept a set with fewer videos than published; the manifest then says ``complete: false``. A later
            run without it adds what can be read by then, and keeps the set even if more is still missing; one with it
            adds what could not be reached (no permission, a share that was not mounted), not what was damaged.
        share: a ``latentcast.shares.Share``: its shards alone, while others may write theirs.
    Returns:
        dict of ``name``, ``protocol``, ``counts``, ``skipped`` (split -> videos), ``bytes`` and the benchmark's own
        figures; of a share that leaves shards to others, of ``pending_shards``.
    Raises:
        ValueError: ``output`` holds another set, or one of another protocol, or shares of a set that grows by what it
            has recorded.
        IncompleteError: counts differ from ``Benchmark.expected_counts``, without ``partial``.
        OSError: the source cannot be listed, the disk is full, or another run prepares into ``output``.
    """
    output = folder_at(output)
    if share is None:
        with locked(output, KIND.tool):
            videos, writers = _open(benchmark, output)
            return _prepare(benchmark, output, workers, partial, videos, writers)
    if benchmark.growing:
        raise ValueError(
            f"--shards {share}: {benchmark.name} records until it has enough, which one process counts; leave it out"
        )
    with turn(output, KIND.tool):
        videos, writers = _open(benchmark, output)
    for writer in writers.values():
        share.over(writer)
    _write_shards(benchmark, writers, workers)
    with turn(output, KIND.tool):
        if pending := sum(len(writer.pending(every_rank=True)) for writer in writers.values()):
            logger.info("%s: share %s is done; %d shards are others'", output, share, pending)
            return {"pending_shards": pending}
        for writer in writers.values():
            Share(0, 1).over(writer)  # what is left is to be completed
        return _prepare(benchmark, output, workers, partial, videos, writers)


def _open(benchmark, output):
    """-> the videos of each split, and a ShardWriter of those that have some."""
    videos = benchmark.videos()
    writers = {
        split: shards.ShardWriter(output / split, KIND, _job(benchmark, split, names), growing=benchmark.growing)
        for split, names in videos.items()
        if names
    }
    if not writers:
        raise ValueError(f"{benchmark.name}: no videos found in {benchmark.source}")
    return videos, writers


def _prepare(benchmark, output, workers, partial, videos, writers):
    accepted = _accepted(output)
    for split, writer in writers.items():  # try again what an earlier run could not read
        gaps = [shard for shard, note in enumerate(writer.notes()) if note and note["skipped"]]
        if partial:
            gaps = [shard for shard, away in writer.away().items() if _any_is_back(benchmark, split, writer, away)]
        writer.redo(gaps, keep=True)
    _write_shards(benchmark, writers, workers)
    while _extend(benchmark, writers):
        _write_shards(benchmark, writers, workers)
    for name, source in benchmark.files().items():
        path = output / name
        if not (path.is_file() and file_sha256(path) == file_sha256(source)):
            with replacing(path) as temporary:
                shutil.copyfile(source, temporary)

    notes = {split: writer.notes() for split, writer in writers.items()}
    counts = {split: sum(len(note["videos"]) for note in written) for split, written in notes.items()}
    skipped = {split: [r for note in written for r in note["skipped"].values()] for split, written in notes.items()}
    expected = dict.fromkeys(videos, 0) | {split: len(writer.job["videos"]) for split, writer in writers.items()}
    expected |= benchmark.expected_counts()
    wrong = [split for split in expected if counts.get(split, 0) != expected[split] or skipped.get(split)]
    incomplete = None
    if wrong and not partial:
        reasons = [reason for split in wrong for reason in skipped.get(split, [])]
        because = f"; {len(reasons)} could not be read, first: {reasons[0]}" if reasons else ""
        asked = ", ".join(f"{split} {expected[split]}" for split in wrong)
        found = ", ".join(f"{split} {counts.get(split, 0)}" for split in wrong)
        incomplete = IncompleteError(
            f"{benchmark.name}: expected videos: {asked}; found: {found}{because}; mend the source and run again, "
            "or accept what there is with --partial"
        )
    if incomplete and not accepted:
        raise incomplete
    if not any(counts.values()):
        raise ValueError(f"{benchmark.name}: not one video could be read, first: {next(iter(skipped.values()))[0]}")
    counts = {split: n for split, n in counts.items() if n}  # a split without videos is left out
    for split in counts:
        if not writers[split].finished:
            writers[split].finish()
    stored, generated = list(counts), benchmark.generated()
    counts |= {split: generator["n_videos"] for split, generator in generated.items()}
    write_json(
        output / MANIFEST,
        {
            "format": FORMAT,
            "name": benchmark.name,
            "protocol": benchmark.describe(),
            "counts": counts,
            "expected_counts": expected,
            "complete": not wrong,
            "frame_size": list(sides(benchmark.frame_size)),
            "channels": benchmark.channels,
            "fps": benchmark.fps,
            "conditions": benchmark.conditions,
            "generated": generated,
            "sha256": {split: _contents(notes[split]) for split in stored},
            "source": None if benchmark.source is None else benchmark.source.name,
            "source_sha256": {split: _sources(notes[split]) for split in stored},
            "provenance": benchmark.provenance,
        },
    )
    write_image(output / "preview.png", _preview(output, stored[-1]))
    if incomplete:
        raise incomplete
    return {
        "name": benchmark.name,
        "protocol": benchmark.protocol,
        "counts": counts,
        "skipped": {split: len(reasons) for split, reasons in skipped.items()},
        "bytes": sum(note["bytes"] for written in notes.values() for note in written),
        "output": str(output),
    } | benchmark.figures(output)


def _extend(benchmark, writers):
    """Plan what ``Benchmark.more`` asks for -> whether there is any; not beyond videos that are missing."""
    extended = False
    for split, writer in writers.items():
        notes = writer.notes()
        lengths = [facts["n_frames"] for note in notes for facts in note["videos"].values()]
        if len(lengths) == len(writer.job["videos"]) and (names := benchmark.more(split, len(lengths), sum(lengths))):
            writer.extend([{"name": name} for name in names])
            extended = True
    return extended


def _accepted(output):
    """Whether an earlier run completed this set with ``partial``."""
    try:
        return not read_set_manifest(output)["complete"]
    except (OSError, ValueError):  # none, or a damaged one, which is written again
        return False


def _job(benchmark, split, names):
    return {
        "name": benchmark.name,
        "protocol": benchmark.describe(),
        "split": split,
        "fps": benchmark.fps,
        "frame_shape": [benchmark.channels, *sides(benchmark.frame_size)],
        "dtype": "uint8",
        "conditions": benchmark.conditions,
        "shard_videos": benchmark.shard_videos,
        "videos": [{"name": name} for name in names],
    }


def _preview(root, split, n_rows=4, n_columns=8, longest=32):
    """A sheet of the first videos of a split, a row each, frames evenly spaced over the first ``longest``."""
    data = PreparedVideos(root, split, 1)
    rows = []
    for video, entry in enumerate(data.videos[:n_rows]):
        frames = data.read_video(video, 0, min(entry.n_frames, longest))
        places = torch.linspace(0, len(frames) - 1, n_columns).round().long()
        rows.append((f"{entry.name}\nframes 1 to {len(frames)}", frames[places]))
    return labelled_sheet(rows, title=f"{split}: frames evenly spaced", scale=scale_for(frames.shape[-2], 64))


def _contents(notes):
    """One checksum over those of a split's shards."""
    return hashlib.sha256("".join(note["sha256"] for note in notes).encode()).hexdigest()


def _sources(notes):
    """One checksum over those of a split's source files; None for videos that were made, not read."""
    sums = [facts.get("source_sha256") for note in notes for facts in note["videos"].values()]
    return hashlib.sha256("".join(sums).encode()).hexdigest() if all(sums) else None


def _write_shards(benchmark, writers, workers):
    """Write every pending shard, with a progress bar over videos."""
    work = [(split, shard) for split, writer in writers.items() for shard in writer.pending()]
    n_videos = {(split, shard): len(writers[split].shard_videos(shard)) for split, shard in work}
    with Bar(total=sum(n_videos.values()), desc=f"prepare {benchmark.name}", unit="video") as bar:
        if workers == 0:
            for split, shard in work:
                _report(_write_shard(benchmark, writers[split], split, shard, progress=bar.update))
            return
        with contextlib.closing(_written_by_processes(benchmark, writers, work, min(workers, len(work)))) as written:
            for item, skipped in written:
                _report(skipped)
                bar.update(n_videos[item])


def _report(skipped):
    for reason in skipped:
        logger.warning("skipped: %s", reason)


def _written_by_processes(benchmark, writers, work, n_processes):
    """Write shards in processes -> iterator of (split and number, reasons for which videos were left out).

    A process that is lost over a video costs that video alone: another one writes its shard anew without it.
    """
    context = worker_context(__name__, type(benchmark).__module__)
    work, lost, running = collections.deque(work), collections.defaultdict(dict), {}

    def start():
        ours, theirs = context.Pipe()
        process = context.Process(target=_write_as_told, args=(benchmark, writers, theirs))
        process.start()
        theirs.close()  # so that ours ends with the process
        running[ours] = [process, None, None]  # the shard that it writes, the video that it reads
        give(ours)

    def give(pipe):
        process = running[pipe][0]
        if not work:
            del running[pipe]
            pipe.close()
            process.join()
            return
        item = work.popleft()
        running[pipe] = [process, item, None]
        with contextlib.suppress(OSError):  # lost already, which shows when it is heard
            pipe.send((*item, lost[item]))

    try:
        for _ in range(n_processes):
            start()
        while running:
            for pipe in connection.wait(list(running)):
                process, item, video = running[pipe]
                try:
                    kind, said = pipe.recv()
                except (EOFError, ConnectionError):
                    del running[pipe]
                    process.join()
                    status = process.exitcode
                    why = signal.strsignal(-status) if status < 0 else f"status {status}"
                    if video is None:
                        raise OSError(f"a process that was to write videos of {item[0]} was lost ({why})") from None
                    name = writers[item[0]].job["videos"][video]["name"]
                    lost[item][video] = f"{name}: the process that read it was lost ({why}; out of memory, maybe)"
                    work.appendleft(item)
                    start()
                    continue
                if kind == "reads":
                    running[pipe][2] = said
                elif kind == "failed":
                    raise said
                else:
                    yield item, said
                    give(pipe)
    finally:
        for process, *_ in running.values():  # a shard may take minutes; those begun are lost anyway
            process.kill()
            process.join()


def _write_as_told(benchmark, writers, pipe):
    """What a process of ``_written_by_processes`` does."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of a terminal; the main process ends it
    # One that outlives a killed run would wait for ever, or write into the folder that the next run continues.
    threading.Thread(target=end_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    with contextlib.suppress(EOFError):
        while True:
            split, shard, lost = pipe.recv()
            try:
                skipped = _write_shard(
                    benchmark, writers[split], split, shard, lost, lambda video: pipe.send(("reads", video))
                )
            except (OSError, ValueError) as error:
                pipe.send(("failed", error))
            except Exception as error:  # that may not pickle
                pipe.send(("failed", RuntimeError(f"{type(error).__name__}: {error}")))
            else:
                pipe.send(("written", skipped))


def _write_shard(benchmark, writer, split, shard, lost=(), begins=lambda video: None, progress=lambda n: None):
    """Write one shard -> the reasons for which videos were left out

    ``lost``: video -> reason, of those not to be read. ``begins``, ``progress``: called before and after each video."""
    with writer.open_shard(shard) as file:
        for video in writer.shard_videos(shard):
            name = writer.job["videos"][video]["name"]
            begins(video)
            try:
                if video in lost:
                    raise VideoError(lost[video])
                for part in _read(benchmark, split, name):
                    if isinstance(part, Clip):
                        if video not in file.written:
                            raise VideoError(f"{name}: no frames")
                        facts = {} if part.sha256 is None else {"source_sha256": part.sha256}
                        file.describe(video, part.conditions, **facts)
                    else:
                        file.append(video, part)
            except VideoError as error:
                file.skip(video, str(error), is_away(error))
            progress(1)
        begins(None)
        return list(file.skipped.values())


def _read(benchmark, split, name):
    """The pieces of a video, then its Clip. Whatever goes wrong with it is a VideoError, for it is one of many."""
    try:
        clip = benchmark.read(split, name)
        yield from clip.frames
        yield clip
    except VideoError:
        raise
    except Exception as error:
        raise (VideoAwayError if is_away(error) else VideoError)(told(error, name)) from error


def _any_is_back(benchmark, split, writer, videos):
    """Whether one of these videos, which could not be reached before, can be now; its first frames are read."""
    for video in videos:
        with contextlib.suppress(VideoError):
            next(_read(benchmark, split, writer.job["videos"][video]["name"]))
            return True
    return False


class PreparedVideos(VideoDataset):
    """Clips and whole videos out of a prepared set.

    Args:
        root: folder of the set, or its URL.
        split: "train", "val" or "test".
        clip_length: frames a clip. Shorter videos are counted, logged and left out.
        size: H = W that is expected in pixels, or [H, W]; None: as prepared. Frames are not resized again.
        channels: 1 (grey frames; colour ones turn grey by BT.601) or 3 (grey ones are repeated); None: as prepared.
            Other numbers of channels are as prepared.
        name: of the set that is expected, "bair" say; None: any.
        frame_stride: take every ``frame_stride``-th frame (and condition).
        seed: of the random windows.
        cache_dir, cache_gigabytes: of local copies of what is behind a URL, see ``latentcast.urls.folder_at``.
    Raises:
        FileNotFoundError: no finished set there.
        ValueError: another set, another frame size, no video as long as a clip.
        EmptySplitError: the set has no such split.
    """

    def __init__(
        self,
        root: Place,
        split: str,
        clip_length: int,
        size: int | Sequence[int] | None = None,
        channels: int | None = None,
        *,
        name: str | None = None,
        frame_stride: int = 1,
        seed: int = 0,
        cache_dir: str | Path | None = None,
        cache_gigabytes: float = GIGABYTES,
    ) -> None:
        check_split(split)
        for argument, value in (("clip_length", clip_length), ("frame_stride", frame_stride)):
            if value < 1:
                raise ValueError(f"{argument}: expected at least 1, found {value}")
        self.root, self.seed = folder_at(root, cache_dir, cache_gigabytes), seed
        self.split, self.clip_length, self.frame_stride = split, clip_length, frame_stride
        self.manifest = read_set_manifest(self.root, name)
        check_size(root, self.manifest, size)
        self.size, self.stored_channels = as_size(self.manifest["frame_size"]), self.manifest["channels"]
        self.channels, self.crop = channels or self.stored_channels, crop_of(self.manifest["protocol"])
        known = {1, 3} if self.stored_channels in (1, 3) else {self.stored_channels}
        if self.channels not in known:
            expected = "1 (grey) or 3 (RGB)" if len(known) > 1 else f"{self.stored_channels}, as prepared"
            raise ValueError(f"channels: expected {expected}, found {channels}")
        self.fps, self.conditions = self.manifest["fps"] / frame_stride, self.manifest["conditions"]
        if split not in self.manifest["counts"]:
            found = ", ".join(self.manifest["counts"])
            raise EmptySplitError(f"{root}: {self.manifest['name']} has no split {split!r}; it has {found}")
        stored = shards.read_manifest(self.root / split, KIND)
        check_split_of(self.root, self.manifest, stored)
        self._reader = shards.ClipReader(self.root / split, stored, clip_length, frame_stride, f"{root}: {split}")

    @property
    def videos(self) -> list[VideoEntry]:
        """list of VideoEntry; ``n_frames`` and ``fps`` after the stride."""
        return self._reader.videos

    def read_video(self, index: int, start: int, stop: int) -> Float[Tensor, "{stop}-{start} C H W"]:
        frames = self._reader.frames(index, start, stop).to(torch.float32, copy=True)
        if self.channels < self.stored_channels:
            frames = luma(frames)
        frames = frames.div_(127.5).sub_(1).clamp_(-1, 1)
        return frames.repeat(1, self.channels // frames.shape[1], 1, 1)

    def read_conditions(self, index: int, start: int, stop: int) -> dict[str, Tensor]:
        return self._reader.conditions(index, start, stop)

    def shard_clips(self) -> list[tuple[int, int, int, int]]:
        """Which clips lie in which shard; see ClipReader."""
        return self._reader.shard_clips(self._windows)

    def prefetch(self, shards: Iterable[int]) -> None:
        """Fetch local copies of whole shards ahead; see ShardReader."""
        self._reader.prefetch(shards)

    def describe(self) -> dict:
        return {
            "type": "PreparedVideos",
            "name": self.manifest["name"],
            "protocol": self.manifest["protocol"],
            "split": self.split,
            "sha256": self.manifest["sha256"][self.split],
            "size": self.size,
            "channels": self.channels,
            "frame_stride": self.frame_stride,
        }


def read_set_manifest(root: Place, name: str | None = None) -> dict:
    """The manifest of a finished set.

    Raises:
        FileNotFoundError: none there.
        ValueError: not such a manifest, or one of another set than ``name``.
    """
    path = folder_at(root) / MANIFEST
    if not path.is_file():
        command = f"{named('prepare_dataset')} {name or 'NAME'} --output {root}"
        raise FileNotFoundError(f"{root}: no finished set here; run {command}, or give data.root=FOLDER")
    manifest = read_json(path)
    if manifest.get("format") != FORMAT:
        raise ValueError(f"{path}: expected format {FORMAT} of prepared sets, found {short(manifest.get('format'))}")
    check(path, SetManifest, manifest)
    if name is not None and manifest["name"] != name:
        raise ValueError(f"{root}: expected the set {name}, found {manifest['name']}")
    return manifest


def check_split_of(root: Place, manifest: dict, stored: dict) -> None:
    """Refuse a split whose frames or conditions are not what the set's manifest says."""
    size, frames = manifest["frame_size"], stored["frame_shape"]
    if frames != [manifest["channels"], *size] or stored["conditions"] != manifest["conditions"]:
        path = root / stored["split"] / shards.MANIFEST
        raise ValueError(
            f"{path}: expected frames of {[manifest['channels'], *size]} and the conditions of the set, found {frames} "
            f"and {short(stored['conditions'])}"
        )


def crop_of(protocol: dict) -> str:
    """How the videos of a set were brought to its shape, by its description: of CROPS."""
    crop = "none" if protocol.get("resize") == "squeeze" else protocol.get("crop")  # KTH's own word
    return FITTING["crop"] if crop is None else check_crop(crop)


def check_size(root: Place, manifest: dict, size: int | Sequence[int] | None) -> None:
    found = as_size(manifest["frame_size"])
    if size is not None and as_size(size, "size") != found:
        found, asked = (str(value).replace(" ", "") for value in (found, as_size(size)))  # as on the command line
        raise ValueError(
            f"{root}: {manifest['name']} holds frames of {found} pixels, asked for {asked}: set frame_size={found}, or "
            f"prepare it again with frame_size={asked}"
        )
