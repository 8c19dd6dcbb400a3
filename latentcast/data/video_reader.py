"""Reading frames from video files, through decord or PyAV, with the same frames from both.

A frame's index counts the frames that decode, in the order they are shown. Containers often state another number, so
``probe`` decodes the whole file.
"""

import functools
from bisect import bisect_right
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import av
import numpy as np
import torch
import torch.nn.functional as F

CHUNK = 16  # frames held at their full size at once
SEEK_FROM = 48  # an earlier frame is reached faster by decoding from the start than through a table of timestamps


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

    Raises:
        VideoError: the file is missing, is no video, or is damaged anywhere.
    """
    return _backend(PROBES, "pyav" if backend == "auto" else backend)(_existing(path))


def read_clip(path, indices, size=None, backend="auto", info=None):
    """Read single frames of a video.

    Args:
        path: any file that decord or FFmpeg opens: mp4, avi, mov, mkv, webm, ogv, gif, ...
        indices: frame numbers >= 0 in any order, repeats allowed.
        size: cut out the central square and resize it (antialiased) to ``size`` x ``size`` pixels; None: as they are.
        backend: ``decord``, ``pyav``, or ``auto``: decord, and PyAV for what decord cannot read or finds wrongly.
        info: what ``probe`` said of the file; saves a look at its packets.
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
    convert = functools.partial(_fit, size=size)
    if backend == "auto":
        try:
            frames = _read_decord(path, wanted, convert, info)
        except VideoError:
            frames = _read_pyav(path, wanted, convert, info)
    else:
        frames = _backend(READERS, backend)(path, wanted, convert, info)
    place = {index: i for i, index in enumerate(wanted)}
    return frames[[place[index] for index in indices]]


def _fit(frames, size):
    """(n, H, W, 3) uint8 array -> (n, 3, H, W) or, central square resized, (n, 3, size, size) uint8 tensor."""
    frames = torch.from_numpy(np.ascontiguousarray(frames)).permute(0, 3, 1, 2)
    if size is None:
        return frames
    height, width = frames.shape[2:]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    frames = frames[:, :, top : top + side, left : left + side]
    if side != size:
        frames = F.interpolate(frames, size=(size, size), mode="bilinear", antialias=True)
    return frames


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
            self.container = av.open(str(path))
        except (av.FFmpegError, ValueError) as error:
            raise VideoError(f"{path}: not a readable video ({_reason(error)})") from None
        self.stream = self.container.streams.best("video")
        if self.stream is None:
            self.container.close()
            raise VideoError(f"{path}: holds no video stream")
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


def _scan(path):
    """Read packets without decoding -> (kind of seek, sorted presentation times, of those the keyframes')."""
    with _Video(path) as (container, stream):
        packets = [(p.pts, p.is_keyframe, p.is_discard) for p in container.demux(stream) if p.size]
        kind = _seek_kind(container, stream, packets)
    if kind == "start":
        return kind, None, None
    shown = [(pts, key) for pts, key, discard in packets if not discard]
    return kind, sorted(pts for pts, _ in shown), sorted(pts for pts, key in shown if key)


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
    times, shapes, packets = [], set(), []
    with _Video(path, strict=True) as (container, stream):
        rate = float(stream.average_rate or stream.guessed_rate or 0)
        for packet in container.demux(stream):
            if packet.is_corrupt:
                raise VideoError(f"{path}: damaged or cut off after frame {len(times)}")
            if packet.size:
                packets.append((packet.pts, packet.is_keyframe, packet.is_discard))
            for frame in packet.decode():
                if frame.is_corrupt:
                    raise VideoError(f"{path}: damaged at frame {len(times)}")
                turned = round(frame.rotation / 90) % 2
                shapes.add((frame.width, frame.height) if turned else (frame.height, frame.width))
                times.append(frame.time)
                end = (frame.time or 0) + (frame.duration or 0) * frame.time_base
        seek = _seek_kind(container, stream, packets)
        # A packet that is cut in two shows; a Matroska file that ends between two shows by its stated duration.
        stated = container.duration / av.time_base if container.duration else 0
        if "matroska" in container.format.name and len(container.streams) == 1 and times and stated > end + 1:
            raise VideoError(f"{path}: cut off after {float(end):.1f} of {stated:.1f} seconds")
    if not times:
        raise VideoError(f"{path}: holds no frame that can be decoded")
    if len(shapes) > 1:
        raise VideoError(f"{path}: the frame size changes within the video")
    (height, width), n = shapes.pop(), len(times)
    if None in times or any(later <= earlier for earlier, later in pairwise(times)):
        seek = "start"
    if seek == "start":
        times = None
    else:
        rate = (n - 1) / (times[-1] - times[0]) if n > 1 else rate
        times = tuple(round(t - times[0], 6) for t in times)
        if all(abs(t * rate - i) < 0.5 for i, t in enumerate(times)):
            times = None
    return VideoInfo(n, rate or 25.0, height, width, times, seek)


# ----------------------------------------------------------------------------------------------------------------

READERS = {"decord": _read_decord, "pyav": _read_pyav}
PROBES = {"decord": _probe_decord, "pyav": _probe_pyav}


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
