"""Reading frames from video files, through decord or PyAV, with the same frames from both.

A frame's index counts the frames that decode, in the order they are shown. Containers often state another number, so
``probe`` decodes the whole file.
"""

import functools
from array import array
from bisect import bisect_right
from dataclasses import dataclass
from itertools import islice, pairwise
from pathlib import Path

import av
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

CHUNK = 16  # frames held at their full size at once
SEEK_FROM = 48  # an earlier frame is reached faster by decoding from the start than through a table of timestamps
RESAMPLE = ("bilinear", "lanczos")
DEFAULT_RATE = 25.0  # of files that state none
KEPT_TABLES = 64  # of timestamps, one a file: 8 bytes a frame


class VideoError(OSError):
    """A file that is no readable video; the message is one line with the file and the reason."""


@dataclass(frozen=True)
class VideoInfo:
    """What a video file really holds.

    Attributes:
        n_frames: frames that decode.
        fps: mean frame rate over the whole file.
        height, width: pixels, as shown (after the file's rotation).
        times: each frame's time in seconds from the first; None where frames are evenly spaced at ``fps``.
        seek: how a frame in the middle can be found exactly. "any": through any backend; "pyav": by timestamp only,
            since pictures before a keyframe depend on it (open GOPs), where decord is wrong; "start": by decoding from
            the start, since timestamps are missing or run backwards (B-frames in an AVI).
    """

    n_frames: int
    fps: float
    height: int
    width: int
    times: tuple | None = None
    seek: str = "any"


def probe(path, backend="auto"):
    """Count, time and measure the frames of a video by decoding all of them -> VideoInfo.

    ``auto`` is PyAV, the one backend that reports damage; ``decord`` is faster and takes the file's word for it.
    ``packets`` says what PyAV says of a sound file after decoding its first frame alone; files whose packets do not
    tell their frames are decoded.

    Raises:
        VideoError: the file is missing, is no video, or is damaged anywhere.
    """
    return _backend(PROBES, "pyav" if backend == "auto" else backend)(_existing(path))


def read_clip(path, indices, size=None, backend="auto", info=None, resample="bilinear"):
    """Read single frames of a video.

    Args:
        path: any file that decord or FFmpeg opens: mp4, avi, mov, mkv, webm, ogv, gif, ...
        indices: frame numbers >= 0 in any order, repeats allowed.
        size: cut out the central square and resize it (antialiased) to ``size`` x ``size`` pixels; None: as they are.
        backend: ``decord``, ``pyav``, or ``auto``: decord, and PyAV for what decord cannot read or finds wrongly.
        info: what ``probe`` said of the file; saves a look at its packets.
        resample: "bilinear" or "lanczos".
    Returns:
        (len(indices), 3, H, W) uint8 tensor, RGB.
    Raises:
        VideoError: the file is missing, cannot be decoded or has too few frames.
    """
    path = _existing(path)
    indices = [int(i) for i in indices]
    if not indices or min(indices) < 0:
        raise ValueError(f"indices: expected frame numbers >= 0, found {indices}")
    wanted = sorted(set(indices))
    convert = functools.partial(fit_frames, size=size, resample=resample)
    if backend == "auto":
        try:
            frames = _read_decord(path, wanted, convert, info)
        except VideoError:
            frames = _read_pyav(path, wanted, convert, info)
    else:
        frames = _backend(READERS, backend)(path, wanted, convert, info)
    place = {index: i for i, index in enumerate(wanted)}
    return frames[[place[index] for index in indices]]


def iter_clip(path, size=None, frame_stride=1, fps=None, resample="bilinear", chunk=CHUNK):
    """Decode a video once, from its start to its end, without knowing or holding its length.

    The frames are those that ``read_clip`` gives through PyAV. Damage is an error as in ``probe``, which may come after
    the pieces before it have been given.

    Args:
        path, size, resample: as for ``read_clip``.
        frame_stride: take every ``frame_stride``-th frame.
        fps: take the frames nearest in time to this rate instead (the earlier of two that are equally near); slower
            videos then repeat frames.
        chunk: frames a piece; the last piece may be shorter.
    Yields:
        (<= chunk, 3, H, W) uint8 tensors, RGB.
    Raises:
        VideoError: the file is missing, is no video, or is damaged.
    """
    path = _existing(path)
    timed = fps is not None and _scan(path)[0] != "start"
    with _Video(path, strict=True) as (container, stream):
        frames = _decode(path, container, stream, container.demux(stream))
        if fps is not None:
            frames = _nearest_in_time(frames, fps, None if timed else _stated_rate(stream))
        elif frame_stride > 1:
            frames = islice(frames, 0, None, frame_stride)
        yield from fit_pieces(map(_shown, frames), size, resample, chunk)


def stated_rate(path):
    """Frames per second that a video file claims to have; no frame is decoded.

    Raises:
        VideoError: the file is missing or is no video.
    """
    with _Video(_existing(path)) as (_, stream):
        return _stated_rate(stream)


def fit_frames(frames, size=None, resample="bilinear"):
    """Cut out the central square of pictures and resize it (antialiased).

    Args:
        frames: (n, H, W, 3) uint8 array.
        size: H = W of the result in pixels; None: nothing is cut or resized.
        resample: "bilinear" or "lanczos".
    Returns:
        (n, 3, size, size) or (n, 3, H, W) uint8 tensor.
    """
    if resample not in RESAMPLE:
        raise ValueError(f"resample: expected one of {', '.join(RESAMPLE)}, found {resample!r}")
    if size is not None:
        height, width = frames.shape[1:3]
        side = min(height, width)
        top, left = (height - side) // 2, (width - side) // 2
        frames = frames[:, top : top + side, left : left + side]
        if side != size and resample == "lanczos":
            pictures = [Image.fromarray(frame).resize((size, size), Image.Resampling.LANCZOS) for frame in frames]
            frames = np.stack([np.asarray(picture) for picture in pictures])
    frames = torch.from_numpy(np.ascontiguousarray(frames)).permute(0, 3, 1, 2)
    if size is not None and frames.shape[2] != size:
        frames = F.interpolate(frames, size=(size, size), mode="bilinear", antialias=True)
    return frames


def fit_pieces(frames, size=None, resample="bilinear", chunk=CHUNK):
    """Iterator of (H, W, 3) uint8 arrays -> iterator of (<= chunk, 3, size, size) tensors; see ``fit_frames``."""
    while piece := [fit_frames(frame[None], size, resample) for frame in islice(frames, chunk)]:
        yield torch.cat(piece).contiguous()


# ---------------------------------------------------------------------------------------------------------- decord


@functools.cache
def _decord():
    """The decord module, silenced, or None where it has no wheel."""
    try:
        import decord
    except (ImportError, OSError):
        return None
    decord.logging.set_level(decord.logging.QUIET)
    return decord


def _open_decord(path):
    decord = _decord()
    if decord is None:
        raise VideoError(f"{path}: decord is not installed")
    try:
        return decord.VideoReader(str(path), num_threads=1)
    except (decord.DECORDError, RuntimeError) as error:
        raise VideoError(f"{path}: decord cannot open it ({_reason(error)})") from None


def _read_decord(path, wanted, convert, info=None):
    kind = info.seek if info else _scan(path)[0]
    if kind != "any":
        raise VideoError(f"{path}: decord does not find single frames of this file exactly; use backend=pyav")
    # Opened for each call and closed after it: a reader neither pickles nor survives a fork.
    reader = _open_decord(path)
    _check_range(path, wanted, len(reader))
    frames = []
    try:
        for start in range(0, len(wanted), CHUNK):
            frames.append(convert(reader.get_batch(wanted[start : start + CHUNK]).asnumpy()))
    except (_decord().DECORDError, RuntimeError) as error:
        raise VideoError(f"{path}: decord cannot decode it ({_reason(error)})") from None
    return torch.cat(frames)


def _probe_decord(path):
    kind, reader = _scan(path)[0], _open_decord(path)
    try:
        height, width = reader.get_batch([0]).shape[1:3]
    except (_decord().DECORDError, RuntimeError) as error:
        raise VideoError(f"{path}: decord cannot decode it ({_reason(error)})") from None
    return VideoInfo(len(reader), float(reader.get_avg_fps()), height, width, seek=kind)


# ------------------------------------------------------------------------------------------------------------ PyAV


class _Video:
    """An opened container with its main video stream; a context manager that turns FFmpeg's errors into VideoError."""

    def __init__(self, path, strict=False):
        self.path = path
        try:
            self.container = av.open(str(path), metadata_errors="replace")  # a title in Latin-1 is no damage
        except (av.FFmpegError, ValueError) as error:
            raise VideoError(f"{path}: not a readable video ({_reason(error)})") from None
        self.stream = self.container.streams.best("video")
        if self.stream is None:
            self.container.close()
            raise VideoError(f"{path}: holds no video stream")
        if self.stream.codec_context is None:
            self.container.close()
            raise VideoError(f"{path}: FFmpeg has no decoder for its video stream")
        self.stream.codec_context.thread_count = 1
        if strict:
            self.stream.codec_context.options = {"err_detect": "explode"}

    def __enter__(self):
        return self.container, self.stream

    def __exit__(self, kind, error, trace):
        self.container.close()
        if isinstance(error, av.FFmpegError):
            raise VideoError(f"{self.path}: damaged, FFmpeg cannot decode it ({_reason(error)})") from None


def _shown(frame):
    """A decoded frame as it is to be shown -> (H, W, 3) uint8 array."""
    return np.rot90(frame.to_ndarray(format="rgb24"), round(frame.rotation / 90) % 4)


def _shown_size(frame):
    """(height, width) of a decoded frame as it is to be shown."""
    turned = round(frame.rotation / 90) % 2
    return (frame.width, frame.height) if turned else (frame.height, frame.width)


def _stated_rate(stream):
    return float(stream.average_rate or stream.guessed_rate or 0) or DEFAULT_RATE


def _decode(path, container, stream, packets):
    """Decode all packets -> iterator of frames in the order shown; damage anywhere is a VideoError."""
    n, first, end = 0, None, 0
    for packet in packets:
        if packet.is_corrupt:
            raise VideoError(f"{path}: damaged or cut off after frame {n}")
        for frame in packet.decode():
            if frame.is_corrupt:
                raise VideoError(f"{path}: damaged at frame {n}")
            first = first or _shown_size(frame)
            if _shown_size(frame) != first:
                raise VideoError(f"{path}: the frame size changes within the video")
            end = (frame.time or 0) + (frame.duration or 0) * frame.time_base
            n += 1
            yield frame
    # A packet that is cut in two shows; a Matroska file that ends between two shows by its stated duration.
    stated = container.duration / av.time_base if container.duration else 0
    if "matroska" in container.format.name and len(container.streams) == 1 and n and stated > end + 1:
        raise VideoError(f"{path}: cut off after {float(end):.1f} of {stated:.1f} seconds")
    if not n:
        raise VideoError(f"{path}: holds no frame that can be decoded")


def _nearest_in_time(frames, fps, rate=None):
    """Those of the frames that lie nearest to 0, 1 / fps, 2 / fps, ... seconds after the first, up to the last.

    ``rate``: of frames without timestamps, which are taken to be evenly spaced.
    """
    n, start, before = 0, None, None
    for i, frame in enumerate(frames):
        time = i / rate if rate else frame.time
        start = time if start is None else start
        while n / fps <= time - start + 1e-6:
            asked = start + n / fps
            earlier = before is not None and asked - before[0] <= time - asked + 1e-6
            yield before[1] if earlier else frame
            n += 1
        before = time, frame


def _scan(path):
    """Read packets without decoding -> (kind of seek, sorted presentation times, of those the keyframes')."""
    status = path.stat()
    return _scan_packets(path, status.st_size, status.st_mtime_ns)


@functools.lru_cache(KEPT_TABLES)
def _scan_packets(path, size, mtime):
    with _Video(path) as (container, stream):
        packets = [(p.pts, p.is_keyframe, p.is_discard) for p in container.demux(stream) if p.size]
        kind = _seek_kind(container, stream, packets)
    if kind == "start":
        return kind, None, None
    shown = [(pts, key) for pts, key, discard in packets if not discard]
    return kind, array("q", sorted(pts for pts, _ in shown)), array("q", sorted(pts for pts, key in shown if key))


def _seek_kind(container, stream, packets):
    """``VideoInfo.seek`` from (pts, is keyframe, is discarded) of all packets in decoding order."""
    times = [pts for pts, _, _ in packets]
    # AVI has no presentation times; with B-frames FFmpeg guesses them, often wrongly.
    guessed = container.format.name == "avi" and stream.codec_context.has_b_frames
    if guessed or None in times or len(set(times)) < len(times):
        return "start"
    keyframe = None
    for pts, is_key, discard in packets:
        keyframe = pts if is_key else keyframe
        if discard or (keyframe is not None and pts < keyframe):
            return "pyav"
    return "any"


def _read_pyav(path, wanted, convert, info=None):
    frames = None
    if wanted[0] >= SEEK_FROM and (info is None or info.seek != "start"):
        kind, times, keys = _scan(path)
        if kind != "start":
            frames = _decode_from_keyframe(path, wanted, convert, times, keys)
    if frames is None:
        frames = _decode_from_start(path, wanted, convert)
    if len({frame.shape for frame in frames}) > 1:
        raise VideoError(f"{path}: the frame size changes within the video")
    return torch.cat(frames)


def _decode_from_start(path, wanted, convert):
    frames, position = [], -1
    with _Video(path) as (container, stream):
        for position, frame in enumerate(container.decode(stream)):
            if position == wanted[len(frames)]:
                frames.append(convert(_shown(frame)[None]))
                if len(frames) == len(wanted):
                    break
    _check_range(path, wanted, position + 1)
    return frames


def _decode_from_keyframe(path, wanted, convert, times, keys):
    """Frames after a seek, or None if the decoder does not deliver the frames that the packets promised."""
    _check_range(path, wanted, len(times))
    keys = keys[: bisect_right(keys, times[wanted[0]])]
    if len(keys) < 2:
        return None
    frames = []
    with _Video(path) as (container, stream):
        container.seek(keys[-1], stream=stream)
        for frame in container.decode(stream):
            target = times[wanted[len(frames)]]
            if frame.pts is None or frame.pts > target:
                return None
            if frame.pts == target:
                frames.append(convert(_shown(frame)[None]))
                if len(frames) == len(wanted):
                    return frames
    return None


def _probe_pyav(path):
    times, packets = [], []

    def noted(demuxed):
        for packet in demuxed:
            if packet.size:
                packets.append((packet.pts, packet.is_keyframe, packet.is_discard))
            yield packet

    with _Video(path, strict=True) as (container, stream):
        rate = _stated_rate(stream)
        for frame in _decode(path, container, stream, noted(container.demux(stream))):
            height, width = _shown_size(frame)
            times.append(frame.time)
        seek = _seek_kind(container, stream, packets)
    return _info(times, rate, height, width, seek)


def _probe_packets(path):
    seek, times, keys = _scan(path)
    with _Video(path, strict=True) as (container, stream):
        # Frames before the first keyframe are not decoded, and a VP8 packet may hold a frame that is not shown.
        if seek == "start" or not keys or times[0] < keys[0] or stream.codec_context.name == "vp8":
            return _probe_pyav(path)
        first = next(_decode(path, container, stream, container.demux(stream)))
        seconds = [float(pts * stream.time_base) for pts in times]
        return _info(seconds, _stated_rate(stream), *_shown_size(first), seek)


def _info(times, rate, height, width, seek):
    n = len(times)
    if None in times or any(later <= earlier for earlier, later in pairwise(times)):
        seek = "start"
    if seek == "start":
        times = None
    else:
        rate = (n - 1) / (times[-1] - times[0]) if n > 1 else rate
        times = tuple(round(t - times[0], 6) for t in times)
        if all(abs(t * rate - i) < 0.5 for i, t in enumerate(times)):
            times = None
    return VideoInfo(n, rate, height, width, times, seek)


# ----------------------------------------------------------------------------------------------------------------

READERS = {"decord": _read_decord, "pyav": _read_pyav}
PROBES = {"decord": _probe_decord, "pyav": _probe_pyav, "packets": _probe_packets}


def _backend(table, name):
    if name not in table:
        raise ValueError(f"backend: expected auto or one of {', '.join(table)}, found {name!r}")
    return table[name]


def _existing(path):
    if not Path(path).is_file():
        raise VideoError(f"{path}: no such file")
    return Path(path)


def _check_range(path, wanted, n_frames):
    if wanted[-1] >= n_frames:
        raise VideoError(f"{path}: frame {wanted[-1]} asked for, but only {n_frames} can be read")


def _reason(error):
    """An error of decord or FFmpeg without its numbers, paths and line breaks."""
    text = getattr(error, "strerror", None) or (str(error).splitlines() or [type(error).__name__])[0]
    return text.rpartition("] ")[2]
