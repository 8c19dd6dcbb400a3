"""A folder tree of video files as a data set, with an index of what each file really holds."""

import contextlib
import hashlib
import itertools
import json
import logging
import os
import statistics
import time
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import torch
from jaxtyping import Float, Shaped, UInt8
from pydantic import Field, model_validator
from torch import Tensor

from ...command import named
from ...files import read_json, replacing, shortened, told, user_cache
from ...progress import Bar
from ...schemas import Count, FileText, Number, Rate, Schema, Whole, check, short
from ...sizes import as_size
from ..base import SPLITS, EmptySplitError, VideoDataset, VideoEntry, check_flip, check_split, unusual_fit
from .reader import (
    VideoAwayError,
    VideoError,
    VideoInfo,
    check_crop,
    iter_clip,
    neat_rate,
    probe,
    read_clip,
    too_slow,
)

try:
    import fcntl
except ImportError:  # Windows: several processes then index the same files, which costs time only
    fcntl = None

logger = logging.getLogger("latentcast")

SUFFIXES = tuple(".mp4 .m4v .mov .avi .mkv .webm .ogv .ogg .gif .ts .mts .m2ts .mpg .mpeg .vob .wmv .3gp .flv".split())
PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg")
# Folders in which systems and network drives keep thumbnails and what was deleted. Hidden ones are left out anyway.
SYSTEM_FOLDERS = {
    "@eadir",
    "@recycle",
    "#recycle",
    "$recycle.bin",
    "system volume information",
    "__macosx",
    "lost+found",
}
INDEX_NAME = ".latentcast-index.json"
INDEX_FORMAT = 3
INDEX_MB = 4096  # of a million videos whose frames are unevenly spaced
SLOW_START = 250  # frames: longer files that are decoded from their start are named
DAMAGED, AWAY, SHORT = "damaged", "not readable now", "too short"  # why files are left out
SAVE_EVERY = 30  # seconds between saves of an index that is being built
SAME_RATE = 0.01  # relative difference of frame rates that is let pass
FEWEST = 3  # videos that can be divided into splits
LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601


class VideoFolder(VideoDataset):
    """Clips and whole videos of every video file under a folder: see ``list_videos``.

    A file's split follows from a hash of its path below ``root``, so adding files moves no other file (but see
    ``splits_of`` about few files). Where ``root`` holds a folder ``val`` or ``test`` beside ``train``, these are the
    splits and other files are left out; of ``val`` and ``test`` the one without a folder takes its share of the files
    in ``train``, by the hash.

    The first use decodes each file once, with a progress bar, and keeps what it found in an index; later uses look only
    at new and changed files. Damaged and too short files are counted and left out. What is odd about the files is said
    when it is found, and by later uses at the level DEBUG. Where time jumps within a file by more than a still would
    last, it becomes several videos: no clip crosses the jump.

    Args:
        root: the folder.
        split: "train", "val" or "test".
        clip_length: frames a clip.
        size: H = W of the frames in pixels, or [H, W].
        crop: how videos of another shape get to that: "center", "none" or "pad", see ``video.reader.fit_frames``.
        channels: 3 (RGB) or 1 (grey, BT.601 luma).
        frame_stride: take every ``frame_stride``-th frame.
        fps: take the frames nearest in time to this rate instead (slower videos then repeat frames). None: as the
            videos are; where they differ, the rate that most files have (over ``frame_stride``), which the log says.
        val_fraction, test_fraction: share of the files in these splits; of three files or more each split with a share
            has one at least.
        seed: of the split and of the random windows.
        index_dir: folder for the index; default: a hidden file in ``root``, or in the user's cache if ``root`` is
            read-only.
        backend: see ``read_clip``.
        flip: see VideoDataset.
        square_pixels: stretch videos whose pixels are not square, as players do; else they are named in the log.
    Raises:
        FileNotFoundError: no such folder.
        ValueError: a folder ``val`` or ``test`` without ``train``.
        EmptySplitError: no usable video in this split; counts what fell out and why.
    """

    def __init__(
        self,
        root: str | Path,
        split: str,
        clip_length: int,
        size: int | Sequence[int],
        channels: int = 3,
        frame_stride: int = 1,
        fps: float | None = None,
        val_fraction: float = 0.05,
        test_fraction: float = 0.05,
        seed: int = 0,
        index_dir: str | Path | None = None,
        backend: str = "auto",
        flip: str | None = None,
        square_pixels: bool = False,
        crop: str = "center",
    ) -> None:
        check_split(split)
        self.flip = check_flip(flip)
        check_whole(clip_length=clip_length, frame_stride=frame_stride)
        check_options(channels, frame_stride, fps, val_fraction, test_fraction)
        self.root, self.split, self.clip_length, self.size, self.channels = (
            Path(str(root)),  # 2024 in a config is a number
            split,
            clip_length,
            as_size(size, "size"),
            channels,
        )
        self.frame_stride, self.target_fps, self.seed, self.backend = frame_stride, fps, seed, backend
        self.square_pixels, self.crop = square_pixels, check_crop(crop)
        self.val_fraction, self.test_fraction = val_fraction, test_fraction
        self._folders = _split_folders(self.root)
        index, changed = update_index(self.root, index_dir)
        news = logging.WARNING if changed else logging.DEBUG
        if fps is None:
            rates = {name: record["info"]["fps"] for name, record in index.items() if "info" in record}
            rate = rate_for_all(rates, self.root, "data.fps", news)
            if rate is not None:
                self.target_fps, self.frame_stride = neat_rate(rate / frame_stride), 1
        self._tell(index, news)
        self._files = self._choose(index)
        self._videos = [VideoEntry(part.name, *self._rate(part.info)) for part in self._files]
        self.fps = neat_rate(statistics.median(entry.fps for entry in self._videos))

    @property
    def videos(self) -> list[VideoEntry]:
        """Sorted by path; ``n_frames`` and ``fps`` after stride or resampling."""
        return self._videos

    def read_video(self, index: int, start: int, stop: int) -> Float[Tensor, "{stop}-{start} C H W"]:
        entry, part = self._videos[index], self._files[index]
        if not 0 <= start < stop <= entry.n_frames:
            raise ValueError(f"{part.name}: expected 0 <= start < stop <= {entry.n_frames}, found {start}:{stop}")
        places = sampled_places(part.info, range(start, stop), self.frame_stride, self.target_fps)
        places = [part.first + place for place in places]
        path = self.root / part.file
        fit = {"square_pixels": self.square_pixels, "crop": self.crop}
        return load_frames(path, places, self.size, self.channels, self.backend, part.whole, **fit)

    def describe(self) -> dict:
        files = [[part.name, part.size, part.info.n_frames] for part in self._files]
        return {
            "type": "VideoFolder",
            "source": hashlib.sha256(json.dumps(files).encode()).hexdigest()[:16],
            "n_videos": len(files),
            "split": self.split,
            "size": self.size,
            "channels": self.channels,
            "frame_stride": self.frame_stride,
            "fps": self.target_fps,
            "val_fraction": self.val_fraction,
            "test_fraction": self.test_fraction,
            "seed": self.seed,
        } | unusual_fit(self)

    def _rate(self, info):
        return sampled_rate(info, self.frame_stride, self.target_fps)

    def _splits(self, names, **shares):
        """File -> its split, the folder's name for one that is in none; ``shares``: in the place of the split's own."""
        shares = {"val": self.val_fraction, "test": self.test_fraction} | shares
        if not self._folders:
            return splits_of(names, **shares, seed=self.seed)
        folders = {name: name.partition("/")[0] for name in names}
        shares |= dict.fromkeys(self._folders[1:], 0)
        return folders | splits_of([name for name in names if folders[name] == "train"], **shares, seed=self.seed)

    def _tell(self, index, level):
        """Log what is odd about the files, whatever their split."""
        if not logger.isEnabledFor(level):
            return
        infos = {name: VideoInfo(**record["info"]) for name, record in sorted(index.items()) if "info" in record}
        broken = [f"{name} ({record['error']})" for name, record in sorted(index.items()) if _is_damaged(record)]
        oblong = [f"{name} ({info.pixel_aspect:.3f} : 1)" for name, info in infos.items() if info.pixel_aspect != 1]
        unindexed = [
            name
            for name, info in infos.items()
            if len(info.keys) == 0 and info.reader == "pyav" and info.n_frames > SLOW_START
        ]
        if broken:
            logger.log(level, "%s: left out %d damaged%s", self.root, len(broken), _listed(broken))
        for name, info in infos.items():
            if info.cuts:
                cuts = _listed(list(map(str, info.cuts)))[2:]
                logger.log(level, "%s: %s: time jumps before frame %s", self.root, name, cuts)
        if oblong:
            done = "stretched" if self.square_pixels else "kept as they are; data.square_pixels=true stretches them"
            logger.log(level, "%s: %d videos have oblong pixels, %s%s", self.root, len(oblong), done, _listed(oblong))
        if unindexed:
            logger.log(
                min(level, logging.INFO),
                "%s: no way to find single frames exactly, decoded from the start%s",
                *(self.root, _listed(unindexed)),
            )

    def _judge(self, name, record):
        """The parts of a file that are long enough, and why -> name -> what is the matter, of those that are not."""
        if "error" in record:
            return [], {DAMAGED if _is_damaged(record) else AWAY: {name: record["error"]}}
        whole = VideoInfo(**record["info"])
        if self.target_fps and too_slow(whole.fps, self.target_fps):
            return [], {f"too slow for data.fps={self.target_fps:g}": {name: f"{1 / whole.fps:.0f} s a frame"}}
        parts, short = [], {}
        for part in _parts(name, record["size"], whole):
            n_frames, _ = self._rate(part.info)
            if n_frames < self.clip_length:
                short[part.name] = n_frames
            else:
                parts.append(part)
        return parts, {SHORT: short}

    def _choose(self, index):
        """The usable files of this split, as ``_Part`` s."""
        splits, usable, lost = self._splits(sorted(index)), [], {DAMAGED: {}, AWAY: {}, SHORT: {}}
        own = [name for name, split in splits.items() if split == self.split]
        for name in own:
            parts, why = self._judge(name, index[name])
            usable += parts
            for reason, names in why.items():
                lost.setdefault(reason, {}).update(names)
        lost = {reason: names for reason, names in lost.items() if names}
        if not usable:
            counts = [self._counted(reason, names) for reason, names in lost.items()]
            counts.append(f"{len(index) - len(own)} in other splits")
            raise EmptySplitError(
                f"{self.root}: no usable video in split {self.split!r}: of {len(index)} files, {'; '.join(counts)}. "
                f"What helps: {' or '.join(self._advice(index, lost.get(SHORT)))}"
            )
        rate = f" at {self.target_fps:g} frames a second" if self.target_fps else ""
        slow = {part.file for part in usable if self.target_fps and part.whole.fps < 0.99 * self.target_fps}
        if slow:
            rate += f" ({len(slow)} are slower: their frames repeat)"
        damaged = lost.pop(DAMAGED, {})  # which _tell has named
        counts = [f"{len(damaged)} {DAMAGED}"] if damaged else []
        counts += [self._counted(reason, names) for reason, names in lost.items()]
        n_files = len({part.file for part in usable})
        logger.log(
            logging.WARNING if lost else logging.INFO,
            "%s: %s: %d of %d files%s%s",
            *(self.root, self.split, n_files, len(index), rate),
            f"; left out {'; '.join(counts)}" if counts else "",
        )
        return usable

    def _counted(self, reason, names):
        """How many are left out for a reason, and which."""
        listed = _listed([f"{name} ({what})" for name, what in names.items()])
        if reason == SHORT:
            stride = f" at data.frame_stride={self.frame_stride}" if self.frame_stride > 1 else ""
            found = " to ".join(map(str, sorted({min(names.values()), max(names.values())})))
            reason = f"shorter than clip_length={self.clip_length}{stride} ({found} frames)"
        return f"{len(names)} {reason}{listed}"

    def _advice(self, index, short):
        """What can be done about a split without a usable video."""
        advice = [f"shorter clips (clip_length={max(short.values())} at most)"] if short else []
        if self.split in ("train", *self._folders):
            return [*advice, "more files"]
        usable = [name for name in index if self._judge(name, index[name])[0]]
        for share in (percent / 100 for percent in range(1, 100)):
            splits = self._splits(index, **{self.split: share})
            if {"train", self.split} <= {splits[name] for name in usable}:
                advice.append(f"data.{self.split}_fraction={share:g}")
                break
        return [*advice, f"folders train and {self.split} with videos in {self.root}"]


def _is_damaged(record):
    return "error" in record and "away" not in record


@dataclass(frozen=True)
class _Part:
    """A file, or what lies in it between two jumps in time.

    ``info``: of the part; ``whole``: of the file; ``first``: number in the file of the part's first frame.
    """

    name: str
    file: str
    size: int
    info: VideoInfo
    whole: VideoInfo
    first: int


def _parts(name, size, whole):
    if not whole.cuts:
        return [_Part(name, name, size, whole, whole, 0)]
    parts = []
    for first, stop in itertools.pairwise([0, *whole.cuts, whole.n_frames]):
        own = tuple(t - whole.times[first] for t in whole.times[first:stop]) if whole.times else None
        rate = neat_rate((len(own) - 1) / own[-1]) if own and own[-1] > 0 else whole.fps
        info = replace(whole, n_frames=stop - first, fps=rate, times=own, cuts=())
        parts.append(_Part(f"{name} {first}-{stop - 1}", name, size, info, whole, first))
    return parts


def _split_folders(root):
    """Those of train/, val/ and test/ that hold the splits of a folder of videos."""
    folders = [split for split in SPLITS if (root / split).is_dir()]
    if folders and folders[0] != "train":
        raise ValueError(f"{root}: expected a folder train beside {' and '.join(folders)}, found none")
    return folders if len(folders) > 1 else []  # train alone sets nothing apart


def check_whole(**values: object) -> None:
    for name, value in values.items():
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name}: expected at least 1, found {value!r}")


def check_rate(**values: object) -> None:
    for name, value in values.items():
        if not isinstance(value, int | float) or not value > 0:
            raise ValueError(f"{name}: expected a rate above 0, found {value!r}")


def check_options(
    channels: int, frame_stride: int, fps: float | None, val_fraction: float, test_fraction: float
) -> None:
    """Refuse options of a folder of videos that make no sense together."""
    if channels not in (1, 3):
        raise ValueError(f"channels: expected 1 (grey) or 3 (RGB), found {channels}")
    if fps is not None:
        check_rate(fps=fps)
        if frame_stride != 1:
            raise ValueError(f"fps: expected frame_stride=1 beside it, found {frame_stride}")
    if min(val_fraction, test_fraction) < 0 or val_fraction + test_fraction > 1:
        raise ValueError(f"val_fraction, test_fraction: not shares of one whole: {val_fraction}, {test_fraction}")


def splits_of(names: Iterable[str], val: float, test: float, seed: int = 0) -> dict[str, str]:
    """Video -> its split, from a hash of its name, so that adding videos moves no other; ``val``, ``test``: shares.

    Of three videos or more, a split with a share has one at least: where the hash gives it none it borrows one of
    train, until a video is added that the hash gives it. So adding videos never moves one out of train.
    """
    places, splits = {}, {}
    for name in names:
        digest = hashlib.sha256(f"{seed} {name}".encode("utf-8", "surrogateescape")).digest()
        place = places[name] = int.from_bytes(digest[:8], "big") / 2**64
        splits[name] = "test" if place < test else "val" if place < test + val else "train"
    if len(splits) < FEWEST:
        return splits
    train = sorted((name for name in splits if splits[name] == "train"), key=places.get)
    held_out = {*splits.values()}
    for split, share, end in (("val", val, 0), ("test", test, -1)):
        if share > 0 and split not in held_out and len(train) > 1:
            splits[train.pop(end)] = split
    return splits


def luma(frames: Shaped[Tensor, "*frames 3 H W"]) -> Float[Tensor, "*frames 1 H W"]:
    """RGB to grey, in the range of the frames (BT.601)."""
    return (frames.float() * torch.tensor(LUMA).view(3, 1, 1)).sum(-3, keepdim=True)


def rate_for_all(
    rates: Mapping[str, float], source: str | Path, option: str = "fps", level: int = logging.WARNING
) -> float | None:
    """The one frame rate for videos of different ones: that of most, and of several such the lowest, as frames are then
    left out rather than repeated. None where they agree.

    Args:
        rates: name -> frames per second.
        source: where they lie; option: what chooses another rate; level: for the log, which says what was chosen.
    """
    ordered = sorted(rates.values())
    if not ordered or ordered[-1] <= (1 + SAME_RATE) * ordered[0]:
        return None

    def n_alike(rate):
        return bisect_right(ordered, (1 + SAME_RATE) * rate) - bisect_left(ordered, (1 - SAME_RATE) * rate)

    chosen = max(ordered, key=n_alike)
    others = [f"{name} ({rate:g})" for name, rate in rates.items() if abs(rate - chosen) > SAME_RATE * chosen]
    logger.log(
        level,
        "%s: videos of different frame rates: all are read at %g frames a second, as %d of %d are; %s=RATE chooses "
        "another; the others%s",
        *(source, chosen, len(rates) - len(others), len(rates), option, _listed(others)),
    )
    return chosen


def nearest_stride(info: VideoInfo, fps: float | None) -> int:
    """Every how many-th frame of a file comes nearest to a rate; None: every frame."""
    return max(1, round(info.fps / fps)) if fps else 1


def sampled_rate(info: VideoInfo, frame_stride: int = 1, fps: float | None = None) -> tuple[int, float]:
    """(frames, frames per second) that a file gives at a stride, or resampled to a rate."""
    if fps is None:
        return (info.n_frames - 1) // frame_stride + 1, neat_rate(info.fps / frame_stride)
    last = info.times[-1] if info.times else (info.n_frames - 1) / info.fps
    return int(last * fps + 1e-6) + 1, fps


def sampled_places(
    info: VideoInfo, frames: Sequence[int], frame_stride: int = 1, fps: float | None = None
) -> list[int]:
    """Numbers of frames at that stride or rate -> numbers of the file's frames."""
    if fps is None:
        return [i * frame_stride for i in frames]
    if info.times is None:
        return [min(round(i * info.fps / fps), info.n_frames - 1) for i in frames]
    times = torch.tensor(info.times, dtype=torch.float64)
    asked = torch.tensor([i / fps for i in frames], dtype=torch.float64)
    return (times[None] - asked[:, None]).abs().argmin(1).tolist()


def load_frames(
    path: str | Path,
    places: Sequence[int],
    size: int | Sequence[int] | None,
    channels: int = 3,
    backend: str = "auto",
    info: VideoInfo | None = None,
    square_pixels: bool = False,
    crop: str = "center",
) -> Float[Tensor, "T C H W"]:
    """The file's frames numbered ``places`` -> (len(places), channels, *size) in [-1, 1].

    Arguments: see ``read_clip``."""
    return to_model(read_clip(path, places, size, backend, info, square_pixels=square_pixels, crop=crop), channels)


def read_places(
    path: str | Path, places: Sequence[int], size: int | Sequence[int] | None, channels: int = 3, crop: str = "center"
) -> Float[Tensor, "T C H W"]:
    """``load_frames`` that decodes from the start, so that damage is named, which reading single frames conceals."""
    kept, n_decoded, wanted = {}, 0, set(places)
    for frame in itertools.islice(iter_clip(path, size, chunk=1, crop=crop), max(places) + 1):
        if n_decoded in wanted:
            kept[n_decoded] = frame
        n_decoded += 1
    if n_decoded <= max(places):
        raise VideoError(f"{path}: {max(places) + 1} frames are needed, {n_decoded} can be decoded")
    return to_model(torch.cat([kept[place] for place in places]), channels)


def to_model(frames: UInt8[Tensor, "T 3 H W"], channels: int = 3) -> Float[Tensor, "T {channels} H W"]:
    """(T, 3, H, W) uint8 -> (T, channels, H, W) in [-1, 1]; a ValueError for channels that a video has not."""
    if channels not in (1, 3):
        raise ValueError(f"channels: a video has 1 (grey) or 3 (RGB), found {channels} asked for")
    frames = luma(frames) if channels == 1 else frames.float()
    return (frames / 127.5 - 1).clamp_(-1, 1)


def build_index(root: str | Path, index_dir: str | Path | None = None) -> dict[str, dict]:
    """What every video file under ``root`` holds, from the index on disk, brought up to date.

    Returns:
        path below root -> {"size", "mtime", and "info": fields of VideoInfo, or "error": why it cannot be read, with
        "away" where that is no property of the file: it is not kept on disk, and the file is tried again next time}.
    """
    return update_index(root, index_dir)[0]


def update_index(root: str | Path, index_dir: str | Path | None = None) -> tuple[dict[str, dict], bool]:
    """``build_index``, and whether there were files to look at."""
    root = Path(root)
    if not root.is_dir():
        raise FileNotFoundError(f"{root}: no such folder of videos")
    names, remarks = _listing(root)
    found = {}
    for name in names:
        with contextlib.suppress(OSError):  # gone since
            status = (root / name).stat()
            found[name] = {"size": status.st_size, "mtime": status.st_mtime_ns}
    if not found:
        _log(remarks)
        raise EmptySplitError(no_videos(root))
    path = _index_path(root, index_dir)
    index = _load(path, found)
    known = len(index) == len(found)
    _log(remarks, said=known)
    if known:
        return index, False
    with _locked(path):  # another rank may have done the work meanwhile
        index = _load(path, found)
        missing = [name for name in found if name not in index]
        saved = time.monotonic()
        with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
            jobs = {pool.submit(_examine, root / name): name for name in missing}
            try:
                for job in Bar(as_completed(jobs), "indexing videos", len(jobs), unit="file"):
                    index[jobs[job]] = found[jobs[job]] | job.result()
                    if time.monotonic() - saved > SAVE_EVERY:
                        _save(path, index)
                        saved = time.monotonic()
            finally:
                pool.shutdown(cancel_futures=True)
                _save(path, index)
    return index, bool(missing)


def _examine(path):
    try:
        return {"info": asdict(probe(path))}
    except (VideoAwayError, MemoryError) as error:
        return {"error": str(error).removeprefix(f"{path}: ") or "out of memory", "away": True}
    except VideoError as error:
        return {"error": str(error).removeprefix(f"{path}: ")}
    except Exception as error:  # of one file among many; whether it lies in the file is not known
        return {"error": f"{type(error).__name__}: {error}", "away": True}


def no_videos(root: str | Path) -> str:
    """The error about a folder without video files; where it has pictures, it says what makes videos of them."""
    n_pictures = sum(name.lower().endswith(PICTURE_SUFFIXES) for _, names in _walk(Path(root)) for name in names)
    hint = f"; expected any of {', '.join(SUFFIXES)}"
    if n_pictures:
        hint = (
            f", but {n_pictures} pictures: numbered ones become videos by {named('prepare_dataset')} folder "
            f"--source {root} --output DIR, and are trained on with data=folder data.root=DIR"
        )
    return f"{root}: no video files here{hint}"


def list_videos(root: str | Path, is_sequence: Callable[[list[str]], bool] | None = None) -> list[str]:
    """What training and all tools take for the videos below a folder.

    These are files with one of ``SUFFIXES``, in any case, in folders down from ``root``. Links are followed; a folder
    that is reached twice counts once, and links back end. Hidden files and folders are left out, and so are those of
    ``SYSTEM_FOLDERS``. What else is left out is counted in the log, by suffix.

    Args:
        root: the folder.
        is_sequence: says of the names of a folder's files whether they are the frames of a video, which the folder then
            is; a folder with a video file is none (pictures beside videos are thumbnails). None: no folder is a video.
    Returns:
        paths below ``root`` with "/" between folders, sorted.
    """
    found, remarks = _listing(Path(root), is_sequence)
    _log(remarks)
    return found


def _log(remarks, said=False):
    for level, *message in remarks:
        logger.log(logging.DEBUG if said else level, *message)


def _listing(root, is_sequence=None):
    """What ``list_videos`` returns, and (level, format, values ...) of what is to be said of the others."""
    found, left_out, broken, remarks = [], Counter(), [], []
    for folder, names in _walk(root):
        where = folder.relative_to(root)
        videos = [name for name in names if name.lower().endswith(SUFFIXES)]
        others = [name for name in names if not name.lower().endswith(SUFFIXES)]
        if is_sequence and not videos and is_sequence(others):
            found.append(where.as_posix())
        else:
            left_out.update(os.path.splitext(name)[1].lower() or "without suffix" for name in others)
        for name in videos:
            (found if os.path.isfile(folder / name) else broken).append((where / name).as_posix())
    if left_out:
        kinds = ", ".join(f"{n} {kind}" for kind, n in left_out.most_common(20))
        more = f" and {len(left_out) - 20} more kinds" if len(left_out) > 20 else ""
        remarks.append((logging.INFO, "%s: left out by suffix: %s%s", root, kinds, more))
    if broken:
        names = _listed(sorted(broken))
        remarks.append((logging.WARNING, "%s: left out %d that lead to no file%s", root, len(broken), names))
    return sorted(found), remarks


def _walk(root):
    """Every folder from ``root`` down, links followed, none of them twice -> (folder, names of its files), sorted."""
    seen, folders = set(), [root]
    while folders:
        folder = folders.pop()
        try:
            status, (inner, names) = os.stat(folder), visible(folder)
        except OSError as error:
            if folder == root:
                raise
            logger.warning("%s: left out, it cannot be read (%s)", folder, error.strerror)
            continue
        if (status.st_dev, status.st_ino) not in seen:
            seen.add((status.st_dev, status.st_ino))
            yield folder, names
            folders += [folder / name for name in reversed(inner) if name.lower() not in SYSTEM_FOLDERS]


def visible(folder: str | Path) -> tuple[list[str], list[str]]:
    """Names of the folders and of the other entries in a folder, links followed, without the hidden ones; sorted."""
    folders, names = [], []
    with os.scandir(folder) as entries:
        for entry in entries:
            if not entry.name.startswith("."):
                (folders if _is_folder(entry) else names).append(entry.name)
    return sorted(folders), sorted(names)


def _is_folder(entry):
    try:
        return entry.is_dir()
    except OSError:  # a link that leads to itself, or to where we may not look
        return False


def _index_path(root, index_dir):
    digest = hashlib.sha256(os.fsencode(root.resolve())).hexdigest()
    unique = f"{shortened(root.name)}-{digest[:12]}.json"
    if index_dir is not None:
        return Path(str(index_dir)) / unique
    return root / INDEX_NAME if os.access(root, os.W_OK) else user_cache() / "indices" / unique


class _Info(Schema, extra="forbid"):
    """VideoInfo in an index."""

    n_frames: Count
    fps: Rate
    height: Count
    width: Count
    times: list[Number] | None
    cuts: list[Count]
    reader: Literal["decord", "pyav"]
    keys: list[Annotated[list[int], Field(min_length=3, max_length=3)]]
    stream: Whole
    late: bool
    orientation: Annotated[int, Field(ge=0, le=7)]
    pixel_aspect: Rate

    @model_validator(mode="after")
    def _is_one(self):
        times = self.times
        if times is not None and (len(times) != self.n_frames or times != sorted(times) or times[0] != 0):
            raise ValueError(f"times: expected {self.n_frames} from 0 on, found {len(times)}, {short(times)}")
        if times is not None and times[-1] * self.fps > self.n_frames + 1:
            raise ValueError(f"times: expected an end by fps={self.fps}, found {times[-1]}")
        if self.cuts != sorted({*self.cuts}) or self.cuts[-1:] >= [self.n_frames]:
            raise ValueError(f"cuts: expected numbers of frames in order, found {short(self.cuts)}")
        return self


class _Record(Schema):
    """Of a file in an index."""

    size: Whole
    mtime: int
    info: _Info = None
    error: FileText = None

    @model_validator(mode="after")
    def _holds(self):
        if (self.info is None) == (self.error is None):
            raise ValueError("expected either info or error")
        if self.info and self.info.n_frames > self.size:  # of a byte at least
            raise ValueError(f"n_frames: expected as many as {self.size} bytes hold, found {self.info.n_frames}")
        return self


class _Index(Schema):
    files: dict[FileText, _Record]


def _load(path, found):
    """Entries of the index on disk that still hold; one that cannot be read, or came with a stranger's files and is no
    index, counts for nothing."""
    try:
        content = read_json(path, INDEX_MB)
        if content.get("format") != INDEX_FORMAT:
            return {}
        check(path, _Index, content)
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        logger.warning("%s; indexing again", told(error, path))
        return {}
    stamp = ("size", "mtime")
    return {
        name: record
        for name, record in content["files"].items()
        if name in found and all(record[key] == found[name][key] for key in stamp)
    }


def _save(path, index):
    kept = {name: record for name, record in index.items() if "away" not in record}
    try:
        with replacing(path) as temporary:
            temporary.write_text(json.dumps({"format": INDEX_FORMAT, "files": kept}))
    except OSError as error:
        logger.warning("%s; the next run indexes again", error)


@contextlib.contextmanager
def _locked(path):
    """Let one process at a time build an index; without file locks all build it, to the same end."""
    with contextlib.ExitStack() as stack:
        if fcntl is not None:
            with contextlib.suppress(OSError):
                path.parent.mkdir(parents=True, exist_ok=True)
                lock = stack.enter_context(open(path.with_suffix(".lock"), "w"))
                fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _listed(names, limit=20):
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return f": {', '.join(names[:limit])}{more}" if names else ""
