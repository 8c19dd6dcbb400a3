"""Reading frames from video files, through decord or PyAV, with the same frames from both.

A frame's index counts the frames that decode, in the order they are shown, from the first keyframe on. Containers often
state another number, so ``probe`` decodes the whole file. What a file's stream, orientation, rate and pixels are is
decided once, in ``look``; every way to read goes by that. PyAV reads, and decord where ``probe`` has shown that it
gives the same.
"""

import contextlib
import errno
import functools
import logging
import os
import statistics
import struct
from array import array
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import chain, dropwhile, islice, pairwise
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np
import torch
import torch.nn.functional as F
from av.stream import Disposition
from jaxtyping import UInt8
from PIL import Image
from torch import Tensor

from ...sizes import sides

logger = logging.getLogger("latentcast")

CHUNK = 16  # frames held at their full size at once
KEY_DISTANCE = 12  # packets between keyframes that are kept to seek to
RESAMPLE = ("bilinear", "lanczos")
CROPS = ("center", "none", "pad")  # how pictures get to another shape, see ``fit_frames``
SEAM = 4  # packets, from one that FFmpeg calls corrupt to where a second MPEG-TS follows on a first
FIRST_FRAMES = 16  # decoded to see whether time runs forward
DEFAULT_RATE = 25.0  # of files that state none
MAX_RATE = 1000.0  # frames per second; this and more is a clock's rate, not a video's
GAP = 10.0  # seconds between two frames, and 20 times the usual step, past which time jumps; also the longest still
HELD = 1 << 23  # bytes of packets that are kept to be decoded; larger files are read a second time
MOST_PIXELS = 1 << 26  # of a frame, twice those of 8K film: a file of some kilobytes may state billions
FEW_PACKETS, LEAST_PACKET = 1000, 8  # beyond so many packets each has so many bytes, on average
MANY_FRAMES = 10**6  # that decord may make room for in vain
PARENTS = (b"moov", b"trak", b"mdia", b"minf", b"stbl", b"moof", b"traf")  # boxes of an MP4 that hold boxes
SAMPLE_COUNTS = {b"stsz": 8, b"stz2": 8, b"trun": 4}  # box -> where in it the number of samples stands
KEPT_LOOKS = 64  # files whose packet tables are kept: 8 bytes a frame
# Lists of other files (of which some never end), devices, and single pictures are no video files.
NOT_VIDEOS = ("applehttp", "concat", "dash", "hls", "image2", "imf", "lavfi", "rtp", "rtsp", "sap", "sdp", "tty")
BY_TIME = ("mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm")  # containers that find packets by the time of showing
TABLED = (*BY_TIME, "avi")  # containers whose packets are frames
COUNTED = ("av1", "dnxhd", "ffv1", "h264", "hevc", "mjpeg", "png", "prores", "vp9")  # one packet in these: one frame
DECORD = ("ffv1", "h264", "hevc", "mjpeg", "mpeg4", "vp8", "vp9")
STILL = Disposition.attached_pic | Disposition.timed_thumbnails | Disposition.still_image
# Errors of the machine or the moment, not of the file.
AWAY = {
    getattr(errno, name)
    for name in "EACCES EAGAIN EBUSY ECONNRESET EHOSTDOWN EHOSTUNREACH EINTR EIO ELOOP EMFILE ENETDOWN ENETUNREACH "
    "ENFILE ENODEV ENOENT ENOMEM ENOTCONN ENOTDIR ENXIO EPERM ESTALE ETIMEDOUT".split()
    if hasattr(errno, name)
}


class VideoError(OSError):
    """A file that is no readable video; the message is one line with the file and the reason."""


class VideoAwayError(VideoError):
    """A file that cannot be read at the moment (gone, no permission, no free file descriptor); says nothing of it."""


def is_away(error: BaseException) -> bool:
    """Whether an error, VideoError or not, says nothing of the file that was read: it may be fine at the next try."""
    of_the_system = isinstance(error, OSError) and not isinstance(error, VideoError)
    known = isinstance(error, (VideoAwayError, MemoryError))
    return known or (of_the_system and error.errno in AWAY)


@dataclass(frozen=True)
class Look:
    """What a file's packets and its first frame say; the one decision on how it is to be read.

    Attributes:
        stream: index of the video stream: the default one, else the first; pictures attached to a song are none.
        late: packets before the first keyframe are there, and are not decoded.
        orientation: bits of the display matrix of the first keyframe: 4 rows and columns change places, then 2 upside
            down, then 1 left to right.
        height, width: pixels, as shown.
        pixel_aspect: width of a pixel over its height, as shown.
        rate: frames per second, as ``VideoInfo.fps``.
        step, gap: the usual seconds from a frame to the next; more than ``gap`` is no step but a jump in time.
        even: timestamps are missing, repeat or are guesses: frames are taken to be evenly spaced at ``rate``.
        times: the frames' presentation times in seconds; None where they cannot be told from the packets.
        keys: as ``VideoInfo.keys``; empty without ``times``.
        starts: (presentation time, time to seek to) of keyframes that may serve as ``keys``.
        plain: nothing is known against reading with decord.
        n_packets: from the first keyframe on; about as many as there are frames.
    """

    stream: int
    late: bool
    orientation: int
    height: int
    width: int
    pixel_aspect: float
    rate: float
    step: float
    gap: float
    even: bool
    times: array | None
    keys: tuple
    starts: tuple
    plain: bool
    n_packets: int


@dataclass(frozen=True)
class VideoInfo:
    """What a video file really holds.

    Attributes:
        n_frames: frames that decode.
        fps: mean frame rate over the whole file, jumps in time left out.
        height, width: pixels, as shown (after the file's rotation).
        times: each frame's time in seconds from the first, jumps in time left out; None where frames are evenly spaced
            at ``fps``.
        cuts: numbers of the frames before which time jumps (see ``Look.gap``); clips should not cross these.
        reader: the backend that ``auto`` takes: "decord" where it was shown to give this file's frames, else "pyav".
        keys: keyframes from which decoding gives the same frames as from the start: (number of the frame, its
            presentation time, the time to seek to), the last two in the stream's time base.
        stream, late, orientation, pixel_aspect: see ``Look``.
    """

    n_frames: int
    fps: float
    height: int
    width: int
    times: Sequence[float] | None = None
    cuts: Sequence[int] = ()
    reader: str = "pyav"
    keys: Sequence = ()
    stream: int = 0
    late: bool = False
    orientation: int = 0
    pixel_aspect: float = 1.0


def probe(path: str | Path, backend: str = "auto") -> VideoInfo:
    """Count, time and measure the frames of a video by decoding all of them -> VideoInfo.

    ``auto`` and ``pyav`` decode. ``packets`` says the same of a sound file after decoding its first frame alone, but
    for ``reader``; files whose packets do not tell their frames are decoded.

    Raises:
        VideoError: the file is missing, is no video, or is damaged anywhere; VideoAwayError: it may be sound.
    """
    return _backend(PROBES, "pyav" if backend == "auto" else backend)(_existing(path))


def read_clip(
    path: str | Path,
    indices: Sequence[int],
    size: int | Sequence[int] | None = None,
    backend: str = "auto",
    info: VideoInfo | None = None,
    resample: str = "bilinear",
    square_pixels: bool = False,
    crop: str = "center",
) -> UInt8[Tensor, "T 3 H W"]:
    """Read single frames of a video.

    Args:
        path: any file that FFmpeg opens: mp4, avi, mov, mkv, webm, ts, mpg, wmv, ogv, gif, ...
        indices: frame numbers >= 0 in any order, repeats allowed.
        size: H = W of the result in pixels, or [H, W], resized with antialiasing; None: as they are.
        backend: ``pyav``; ``decord``, which refuses files that ``probe`` does not find it to read exactly; or ``auto``:
            decord where ``info`` says so, else PyAV.
        info: what ``probe`` said of the file; without it PyAV looks at the file's packets, and decord decodes it first.
        resample: "bilinear" or "lanczos".
        square_pixels: stretch pictures whose pixels are not square (see ``fit_frames``).
        crop: how pictures of another shape get to that of ``size`` (see ``fit_frames``).
    Returns:
        (len(indices), 3, H, W) uint8 tensor, RGB.
    Raises:
        VideoError: the file is missing, cannot be decoded or has too few frames.
    """
    path = _existing(path)
    indices = [int(i) for i in indices]
    if not indices or min(indices) < 0:
        raise ValueError(f"indices: expected frame numbers >= 0, found {indices}")
    if backend == "auto":
        backend = info.reader if info else "pyav"
        readers = (backend,) if backend == "pyav" else (backend, "pyav")
    else:
        readers = (backend,)
    wanted = sorted(set(indices))
    for i, reader in enumerate(readers):
        try:
            read = _backend(READERS, reader)
            info = info or (look(path) if reader == "pyav" else probe(path))
            aspect = info.pixel_aspect if square_pixels else 1
            fit = {"size": size, "resample": resample, "pixel_aspect": aspect, "crop": crop}
            convert = functools.partial(fit_frames, **fit)
            frames = read(path, wanted, convert, info)
            break
        except VideoError:
            if i == len(readers) - 1:
                raise
    place = {index: i for i, index in enumerate(wanted)}
    return frames[[place[index] for index in indices]]


def iter_clip(
    path: str | Path,
    size: int | Sequence[int] | None = None,
    frame_stride: int = 1,
    fps: float | None = None,
    resample: str = "bilinear",
    chunk: int = CHUNK,
    square_pixels: bool = False,
    crop: str = "center",
) -> Iterator[UInt8[Tensor, "_ 3 H W"]]:
    """Decode a video once, from its start to its end, without knowing or holding its length.

    The frames are those that ``read_clip`` gives through PyAV. Damage is an error as in ``probe``, which may come after
    the pieces before it have been given; so is a jump in time (see ``Look.gap``).

    Args:
        path, size, resample, square_pixels, crop: as for ``read_clip``.
        frame_stride: take every ``frame_stride``-th frame.
        fps: take the frames nearest in time to this rate instead (the earlier of two that are equally near); slower
            videos then repeat frames.
        chunk: frames a piece; the last piece may be shorter.
    Yields:
        (<= chunk, 3, H, W) uint8 tensors, RGB.
    Raises:
        VideoError: the file is missing, is no video, is damaged, jumps in time, or is too slow for ``fps``.
    """
    path = _existing(path)
    found = look(path)
    if fps is not None and too_slow(found.rate, fps):
        raise VideoError(f"{path}: frames lie {1 / found.rate:.0f} s apart, too slow for fps={fps:g}")
    if found.pixel_aspect != 1 and not square_pixels:
        logger.warning("%s: pixels are not square (%.3f : 1), kept as they are", path, found.pixel_aspect)
    with _Video(path, found, strict=True) as video:
        frames = _timed(path, video.decode(), found)
        if fps is not None:
            frames = _nearest_in_time(frames, fps)
        elif frame_stride > 1:
            frames = islice(frames, 0, None, frame_stride)
        shown = (video.shown(frame) for _, frame in frames)
        yield from fit_pieces(shown, size, resample, chunk, found.pixel_aspect if square_pixels else 1, crop)


def neat_rate(rate: float) -> float:
    """A frame rate without the last digits that measuring and dividing leave: 25 for 24.999999999999996."""
    neat = float(Fraction(rate).limit_denominator(1001))
    return neat if abs(neat - rate) < 1e-7 * rate else round(rate, 9)


def too_slow(rate: float, fps: float) -> bool:
    """Whether a video of that rate is a series of stills to who asks for ``fps`` frames a second."""
    return rate * GAP < 1 and fps > 2 * rate


def look(path: str | Path) -> Look:
    """What a file's packets and its first frame say -> Look. It is kept for the last files looked at.

    Raises:
        VideoError: the file is missing or is no video.
    """
    path = _existing(path)
    status = path.stat()
    return _look(path, status.st_size, status.st_mtime_ns)


class Fit(NamedTuple):
    """How a picture gets to a size: what is cut out of it, what that is resized to, and the black around it.

    top, left, rows, columns: of the part that is kept, pixels. size: (H, W) that it becomes. around: black pixels to
    the left, right, above and below, as ``torch.nn.functional.pad`` takes them.
    """

    top: int
    left: int
    rows: int
    columns: int
    size: tuple
    around: tuple = (0, 0, 0, 0)


def fit_of(
    height: int, width: int, size: int | Sequence[int] | None, crop: str = "center", pixel_aspect: float = 1.0
) -> Fit:
    """The Fit of pictures of ``height`` x ``width`` pixels to a size; arguments: see ``fit_frames``."""
    rows, columns = sides(size)
    aspect = columns / rows
    if check_crop(crop) == "none":
        return Fit(0, 0, height, width, (rows, columns))
    if crop == "pad":
        shown = width * pixel_aspect / height  # its width over its height, as it is shown
        high = max(1, min(rows, round(columns / shown)))
        wide = max(1, min(columns, round(rows * shown)))
        top, left = (rows - high) // 2, (columns - wide) // 2
        return Fit(0, 0, height, width, (high, wide), (left, columns - wide - left, top, rows - high - top))
    side = min(height, width * pixel_aspect / aspect)  # the part's height
    kept = max(1, round(side)), max(1, round(side * aspect / pixel_aspect))
    return Fit((height - kept[0]) // 2, (width - kept[1]) // 2, *kept, (rows, columns))


def check_crop(crop: str) -> str:
    """``crop`` itself, one of CROPS."""
    if crop not in CROPS:
        raise ValueError(f"crop: expected one of {', '.join(CROPS)}, found {crop!r}")
    return crop


def fit_frames(
    frames: UInt8[np.ndarray, "n H W C"],
    size: int | Sequence[int] | None = None,
    resample: str = "bilinear",
    pixel_aspect: float = 1.0,
    crop: str = "center",
) -> UInt8[Tensor, "n C _ _"]:
    """Bring pictures to a size, with antialiasing.

    Args:
        frames: (n, H, W, 3) uint8 array.
        size: H = W of the result in pixels, or [H, W]; None: nothing is cut or resized.
        resample: "bilinear" or "lanczos".
        pixel_aspect: width of a pixel over its height: pictures are cut and padded as they would be shown, and those
            that keep their size are made wider or higher until their pixels are square.
        crop: how those of another shape get to it. "center": the largest part of that shape in the middle is resized;
            "pad": the whole is, and black fills what is left on both sides; "none": the whole is, and is squashed.
    Returns:
        (n, 3, *size) or (n, 3, H, W) uint8 tensor.
    """
    if resample not in RESAMPLE:
        raise ValueError(f"resample: expected one of {', '.join(RESAMPLE)}, found {resample!r}")
    height, width = target = frames.shape[1:3]
    around = ()
    if size is not None:
        top, left, rows, columns, target, around = fit_of(height, width, size, crop, pixel_aspect)
        frames = frames[:, top : top + rows, left : left + columns]
    elif pixel_aspect != 1:
        target = (height, round(width * pixel_aspect)) if pixel_aspect > 1 else (round(height / pixel_aspect), width)
    if frames.shape[1:3] != target and resample == "lanczos":
        resized = [Image.fromarray(frame).resize(target[::-1], Image.Resampling.LANCZOS) for frame in frames]
        frames = np.stack([np.asarray(picture) for picture in resized])
    pictures = torch.from_numpy(np.ascontiguousarray(frames)).permute(0, 3, 1, 2)
    if pictures.shape[2:] != target:
        pictures = F.interpolate(pictures, size=target, mode="bilinear", antialias=True)
    return F.pad(pictures, around) if any(around) else pictures


def fit_pieces(
    frames: Iterable[UInt8[np.ndarray, "H W 3"]],
    size: int | Sequence[int] | None = None,
    resample: str = "bilinear",
    chunk: int = CHUNK,
    pixel_aspect: float = 1.0,
    crop: str = "center",
) -> Iterator[UInt8[Tensor, "_ 3 H W"]]:
    """Iterator of (H, W, 3) uint8 arrays -> iterator of (<= chunk, 3, *size) tensors; see ``fit_frames``."""
    while piece := [fit_frames(frame[None], size, resample, pixel_aspect, crop) for frame in islice(frames, chunk)]:
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
        return decord.VideoReader(file_url(path), num_threads=1)
    except (decord.DECORDError, RuntimeError, UnicodeEncodeError) as error:
        raise VideoError(f"{path}: decord cannot open it ({_reason(error)})") from None


def _read_decord(path, wanted, convert, info):
    if info.reader != "decord":
        raise VideoError(f"{path}: decord does not find the frames of this file exactly; use backend=pyav")
    # Opened for each call and closed after it: a reader neither pickles nor survives a fork.
    reader = _open_decord(path)
    _check_range(path, wanted, len(reader))
    if len(reader) != info.n_frames:
        raise VideoError(f"{path}: expected {info.n_frames} frames, decord finds {len(reader)}")
    with _decord_errors(path):
        return torch.cat(
            [
                convert(reader.get_batch(wanted[start : start + CHUNK]).asnumpy())
                for start in range(0, len(wanted), CHUNK)
            ]
        )


@contextlib.contextmanager
def _decord_errors(path):
    try:
        yield
    except (_decord().DECORDError, RuntimeError) as error:
        raise VideoError(f"{path}: decord cannot decode it ({_reason(error)})") from None


def _decord_agrees(path, times, samples):
    """Whether decord has the same frames at the same times; ``samples``: number of a frame -> a few of its pixels."""
    try:
        reader = _open_decord(path)
        if len(reader) != len(times):
            return False
        with _decord_errors(path):
            found = reader.get_frame_timestamp(list(range(len(times))))[:, 0]
            frames = reader.get_batch(list(samples)).asnumpy()
    except VideoError:
        _Bytes(path).close()  # else it may be for lack of descriptors, which says nothing of the file
        return False
    half_step = (times[-1] - times[0]) / max(1, len(times) - 1) / 2
    if np.abs(found - found[0] - np.array(times) + times[0]).max() > max(half_step, 1e-3):
        return False
    pairs = [(_thumbnail(frame), sample) for frame, sample in zip(frames, samples.values(), strict=True)]
    return all(one.shape == other.shape and np.abs(one - other).mean() < 1 for one, other in pairs)


# ------------------------------------------------------------------------------------------------------------ PyAV


class _Bytes:
    """What FFmpeg reads of a file. It takes many an error of the disk, the share or the system for the end of the file,
    or for damage; here it is a VideoAwayError, on opening or on closing."""

    def __init__(self, path):
        self.path, self.name, self.fault = path, file_url(path), None
        try:
            self._file = open(path, "rb", buffering=0)
        except OSError as error:
            raise _away(path, error) from None
        self.tell = self._file.tell

    def close(self):
        self._file.close()
        if self.fault:
            raise _away(self.path, self.fault)

    def read(self, n_bytes):
        try:
            return self._file.read(n_bytes)
        except OSError as error:
            self.fault = error
            return b""

    def seek(self, offset, whence):
        try:
            return self._file.seek(offset, whence)
        except OSError:  # before the start, where damage points
            return -errno.EINVAL


def _check_tables(path):
    """Refuse an MP4 or QuickTime file whose tables state more samples than it has bytes: FFmpeg makes room for all of
    them, gigabytes for a file of some kilobytes, before it looks for the first."""
    n_bytes, n_samples = path.stat().st_size, 0
    spans = [(0, n_bytes)]
    with contextlib.closing(_Bytes(path)) as file:
        while spans:
            start, end = spans.pop()
            if start + 8 > end:
                continue
            file.seek(start, os.SEEK_SET)
            header = file.read(28).ljust(28, b"\0")
            size, kind, long = struct.unpack(">I4sQ", header[:16])
            begin, size = (16, long) if size == 1 else (8, size or end - start)
            if size < begin:
                continue
            stop = min(start + size, end)
            spans.append((stop, end))
            if kind in PARENTS:
                spans.append((start + begin, stop))
            elif kind in SAMPLE_COUNTS:
                place = begin + SAMPLE_COUNTS[kind]
                n_samples += int.from_bytes(header[place : place + 4], "big")
            elif kind == b"cmov":
                raise VideoError(f"{path}: its header is compressed, as QuickTime's once were; convert it")
            if n_samples > n_bytes:
                raise VideoError(f"{path}: damaged, states more samples than its {n_bytes} bytes hold")


class _Video:
    """An opened file with its video stream; a context manager that turns FFmpeg's errors into VideoError.

    ``how``: what ``look`` or ``probe`` said of the file; None: the stream is chosen here, for ``look``.
    """

    def __init__(self, path, how=None, strict=False):
        self.path, self.how, self.strict = path, how, strict
        self._index, self._held = how and how.stream, None
        if how is None:
            _check_tables(path)
        self._open()

    def _open(self):
        self.bytes, self.container = _Bytes(self.path), None
        try:
            self.container = av.open(
                self.bytes,
                metadata_errors="replace",  # a title in Latin-1 is no damage
                options={"format_whitelist": _formats(), "protocol_whitelist": "file"},
            )
            streams = self.container.streams
            self.stream = self._choose_stream() if self._index is None else streams[self._index]
            self._index = self.stream.index
        except (av.FFmpegError, ValueError, IndexError, VideoError) as error:
            self._close()
            if isinstance(error, VideoError):
                raise
            raise _failure(self.path, error, "not a readable video") from None
        context = self.stream.codec_context
        if context.width * context.height > MOST_PIXELS:
            self._close()
            raise VideoError(
                f"{self.path}: expected at most {MOST_PIXELS} pixels a frame, found {context.width} x {context.height}"
            )
        context.thread_count = 1
        # Frames may be larger than the file says.
        context.options = {"max_pixels": str(MOST_PIXELS)} | ({"err_detect": "explode"} if self.strict else {})

    def _close(self):
        if self.container is not None:
            self.container.close()
        self.bytes.close()

    def scan(self):
        """What the packets say -> _Scan. They are kept, for ``restart``; those of a large file are read again."""
        packets, held, size = [], [], 0
        most = FEW_PACKETS + self.path.stat().st_size // LEAST_PACKET
        for packet in self.container.demux(self.stream):
            size += packet.size
            if packet.size:
                packets.append((packet.pts, packet.dts, packet.is_keyframe, packet.is_discard))
            if len(packets) > most:
                raise VideoError(f"{self.path}: damaged, has more packets than its bytes hold")
            if size <= HELD:
                held.append(packet)
        self._held = held if size <= HELD else None
        return _Scan(self.container, self.stream, packets)

    def restart(self, how):
        """After ``scan``: decode from the start, as ``how`` says."""
        self.how = how
        if self._held is None:
            self._close()
            self._open()

    def _choose_stream(self):
        streams = [stream for stream in self.container.streams.video if not stream.disposition & STILL]
        if not streams:
            still = "pictures only" if self.container.streams.video else "no video stream"
            raise VideoError(f"{self.path}: holds {still}")
        known = [stream for stream in streams if stream.codec_context is not None]
        if not known:
            raise VideoError(f"{self.path}: FFmpeg has no decoder for its video stream")
        known = [stream for stream in known if stream.codec_context.width] or known
        return min(known, key=lambda stream: not stream.disposition & Disposition.default)

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        try:
            self._close()
        except VideoAwayError as away:  # whatever else came of it
            raise away from None
        if isinstance(error, av.FFmpegError):
            raise _failure(self.path, error, "damaged, FFmpeg cannot decode it") from None

    def packets(self):
        """Packets from the first keyframe on: what hangs on a picture before it decodes to grey, or not at all."""
        packets = self.container.demux(self.stream) if self._held is None else iter(self._held)
        return dropwhile(lambda packet: packet.size and not packet.is_keyframe, packets) if self.how.late else packets

    def frames(self):
        for packet in self.packets():
            yield from packet.decode()

    def decode(self):
        """Decode all packets -> iterator of frames in the order shown; damage anywhere is a VideoError."""
        n, size, frame = 0, None, None
        # Where two MPEG-TS follow one another FFmpeg calls a packet corrupt, or one just before it; there time jumps.
        doubt, before = 0, None  # packets until it has to
        for packet in self.packets():
            jumps = (doubt or packet.is_corrupt) and before is not None and self._jumps(before, packet)
            doubt = 0 if jumps else doubt
            if doubt == 1 or (packet.is_corrupt and self.container.format.name != "mpegts"):
                raise VideoError(f"{self.path}: damaged or cut off after frame {n}")
            doubt = SEAM if packet.is_corrupt and not jumps else max(0, doubt - 1)
            before = packet
            for frame in packet.decode():
                if frame.is_corrupt:
                    raise VideoError(f"{self.path}: damaged at frame {n}")
                size = size or (frame.height, frame.width)
                if (frame.height, frame.width) != size:
                    raise VideoError(f"{self.path}: the frame size changes within the video")
                n += 1
                yield frame
        if doubt:
            raise VideoError(f"{self.path}: damaged or cut off after frame {n}")
        # A packet that is cut in two shows; a Matroska file that ends between two shows by its stated duration.
        if frame is None:
            raise VideoError(f"{self.path}: holds no frame that can be decoded")
        stated = self.container.duration / av.time_base if self.container.duration else 0
        end = float((frame.time or 0) + (frame.duration or 0) * frame.time_base)
        if "matroska" in self.container.format.name and len(self.container.streams) == 1 and stated > end + 1:
            raise VideoError(f"{self.path}: cut off after {end:.1f} of {stated:.1f} seconds")

    def _jumps(self, before, packet):
        """Whether time does between two packets, as where two MPEG-TS follow one another."""
        known = packet.dts is not None and before.dts is not None
        return known and not 0 < (packet.dts - before.dts) * packet.time_base <= self.how.gap

    def frames_from(self, key):
        """Frames from a keyframe of ``VideoInfo.keys`` on; none where the container does not find it."""
        _, pts, seek_to = key
        try:
            self.container.seek(seek_to, stream=self.stream)
        except av.FFmpegError:
            return
        packets = self.container.demux(self.stream)
        first = next((p for p in packets if p.is_keyframe and p.pts is not None and p.pts >= pts), None)
        if first is None or first.pts != pts:
            return
        shown = False
        for packet in chain((first,), packets):
            for frame in packet.decode():
                # Before the keyframe come pictures of an open group, which hang on one that was not decoded.
                shown = shown or frame.pts == pts
                if shown:
                    yield frame
                elif frame.pts is None or frame.pts > pts:
                    return

    def shown(self, frame):
        """A decoded frame as it is to be shown -> (H, W, 3) uint8 array."""
        picture = frame.to_ndarray(format="rgb24")
        if self.how.orientation & 4:
            picture = picture.swapaxes(0, 1)
        if self.how.orientation & 2:
            picture = picture[::-1]
        return picture[:, ::-1] if self.how.orientation & 1 else picture


@functools.lru_cache(KEPT_LOOKS)
def _look(path, size, mtime):
    with _Video(path) as video:
        scan = video.scan()
        video.restart(scan.look())
        for frame in video.frames():
            if scan.saw(frame):
                break
    if scan.first is None:
        raise VideoError(f"{path}: holds no frame that can be decoded")
    return scan.look()


class _Scan:
    """What a file's packets say, and the frames that ``saw`` is given, from the first on."""

    def __init__(self, container, stream, packets):
        self.format, self.index, self.base = container.format.name, stream.index, float(stream.time_base)
        self.alone = len(container.streams.video) == 1
        # Decord makes room for as many frames as are stated, or else follow from the duration, and ends the process
        # where there is none.
        timed = (container.duration or 0) / av.time_base * float(stream.average_rate or 0)
        most = 2 * len(packets) + FEW_PACKETS
        self.counted = 0 < stream.frames <= most or (stream.frames == 0 and 0 <= timed <= most + MANY_FRAMES)
        self.codec, reorders = stream.codec_context.name, stream.codec_context.has_b_frames
        aspect = stream.sample_aspect_ratio or stream.codec_context.sample_aspect_ratio or 1
        self.aspect = float(aspect) if 1 / 16 < aspect < 16 else 1.0
        stated = float(stream.average_rate or stream.guessed_rate or 0)
        self.stated = stated if 0 < stated < MAX_RATE else DEFAULT_RATE
        first_key = next((i for i, packet in enumerate(packets) if packet[2]), 0)
        self.late, self.packets = first_key > 0, packets[first_key:]
        self.shown = [pts for pts, _, _, discard in self.packets if not discard]
        # AVI has no presentation times; with B-frames FFmpeg guesses them, often wrongly.
        repeat = None in self.shown or len(set(self.shown)) < len(self.shown)
        self.even = (self.format == "avi" and reorders) or repeat
        # Where frames change places and these do not, they may be times of decoding.
        self.least = FIRST_FRAMES if reorders and not self.even and self.shown == sorted(self.shown) else 1
        self.first, self.times, self.n_seen = None, [], 0  # ``first``: keyframe, or frame where there is none

    def saw(self, frame):
        """Take note of the next frame -> whether enough are known."""
        self.n_seen += 1
        if self.first is None or (self.n_seen <= 4 * FIRST_FRAMES and frame.key_frame > self.first.key_frame):
            self.first = frame
        if len(self.times) < self.least:
            self.times.append(frame.pts)
        return self.n_seen >= (self.least if self.first.key_frame else 4 * FIRST_FRAMES)

    def look(self):
        """-> Look; before frames were seen it holds but for what only these say: orientation, size, and ``even``."""
        even = self.even or not (None in self.times or self.times == sorted(self.times))
        first, packets, shown = self.first, self.packets, self.shown
        orientation = _orientation(first) if first else 0
        height, width = (first.height, first.width) if first else (0, 0)
        begins = bool(packets) and packets[0][2] and not even and min(shown, default=0) >= packets[0][0]
        times = sorted(shown) if self.format in TABLED and self.codec in COUNTED and begins and not self.late else None
        decoded = times or [dts for _, dts, _, _ in packets if dts is not None]
        steps = [(later - earlier) * self.base for earlier, later in pairwise(decoded)]
        step = statistics.median([step for step in steps if step > 0] or [1 / self.stated])
        gap = max(GAP, 20 * step)
        span = sum(s if 0 < s <= gap else step for s in steps)
        if steps and not even and all(0 < s <= gap for s in steps):
            span = (max(shown) - min(shown)) * self.base * len(steps) / max(1, len(shown) - 1)
        rate = neat_rate(len(steps) / span) if span > 0 else self.stated
        if even or rate >= MAX_RATE:
            even, rate = True, self.stated
        starts = () if even else _starts(packets, self.format in BY_TIME)
        known = self.format in TABLED and self.codec in DECORD and self.alone and self.counted
        plain = known and not (self.late or even or orientation)
        return Look(
            stream=self.index,
            late=self.late,
            orientation=orientation,
            height=width if orientation & 4 else height,
            width=height if orientation & 4 else width,
            pixel_aspect=1 / self.aspect if orientation & 4 else self.aspect,
            rate=rate,
            step=step,
            gap=gap,
            even=even,
            times=None if even or times is None else array("d", (pts * self.base for pts in times)),
            keys=() if even or times is None else tuple((bisect_left(times, start[0]), *start) for start in starts),
            starts=starts,
            plain=plain and _closed(packets),
            n_packets=len(packets),
        )


def _orientation(frame):
    """``Look.orientation`` from the frame's display matrix; turns by odd angles are rounded to right ones."""
    matrix = frame.side_data.get("DISPLAYMATRIX")
    if matrix is None:
        return 0
    a, b, _, c, d = struct.unpack("5i", bytes(matrix)[:20])  # x' = a x + c y, y' = b x + d y
    if a * d == b * c:  # zeros, or nothing that a picture could be seen through
        return 0
    if abs(b * c) > abs(a * d):
        return 4 + 2 * (b < 0) + (c < 0)
    return 2 * (d < 0) + (a < 0)


def _starts(packets, by_time):
    """``Look.starts`` from (pts, dts, is keyframe, is discarded) of the packets, but for the first keyframe."""
    counts = Counter(pts for pts, _, _, _ in packets)
    starts, last = [], 0
    for i, (pts, dts, is_key, discard) in enumerate(packets):
        if is_key and not discard and i >= last + KEY_DISTANCE and counts[pts] == 1:
            starts.append((pts, pts if by_time or dts is None else dts))
            last = i
    return tuple(starts)


def _closed(packets):
    """Whether no picture is left out and none is shown before the keyframe that precedes it in the file."""
    keyframe = None
    for pts, _, is_key, discard in packets:
        keyframe = pts if is_key else keyframe
        if discard or keyframe is None or pts < keyframe:
            return False
    return True


def _timed(path, frames, found):
    """Frames -> (seconds from the first, frame) on the clock of ``_timeline``; VideoError where time jumps."""
    clock = _Clock(found)
    for i, frame in enumerate(frames):
        time = clock(frame.time)
        if clock.jumped:
            raise VideoError(f"{path}: time jumps by {clock.jumped:.0f} s before frame {i}; cut it in two there")
        yield time, frame


class _Clock:
    """Seconds from the first frame. Time that stands, runs back or jumps counts as one usual step; a jump shows."""

    def __init__(self, found):
        self.found, self.jumped = found, 0.0
        self.before, self.now, self.n = None, 0.0, 0

    def __call__(self, time):
        self.jumped, before, self.before, self.n = 0.0, self.before, time, self.n + 1
        if self.n == 1:
            return 0.0
        if self.found.even:
            self.now = (self.n - 1) / self.found.rate
            return self.now
        step = -1.0 if time is None or before is None else time - before
        if step > self.found.gap:
            self.jumped = step
        self.now += step if 0 < step <= self.found.gap else self.found.step
        return self.now


def _timeline(seconds, found):
    """Times of all frames -> (``fps``, ``times``, ``cuts``) of VideoInfo."""
    clock, times, cuts = _Clock(found), [], []
    for i, time in enumerate(seconds):
        times.append(clock(time))
        if clock.jumped:
            cuts.append(i)
    n = len(times)
    if found.even or n < 2:
        return found.rate, None, ()
    rate = neat_rate((n - 1) / times[-1])  # else it would hang on where a clock began
    even = all(abs(t * rate - i) < 0.5 for i, t in enumerate(times))
    return rate, None if even else tuple(round(t, 6) for t in times), tuple(cuts)


def _nearest_in_time(frames, fps):
    """Those of the (seconds, frame) that lie nearest to 0, 1 / fps, 2 / fps, ... seconds, up to the last."""
    n, before = 0, None
    for time, frame in frames:
        while n / fps <= time + 1e-6:
            asked = n / fps
            yield before if before is not None and asked - before[0] <= time - asked + 1e-6 else (time, frame)
            n += 1
        before = time, frame


def _read_pyav(path, wanted, convert, info):
    keys = info.keys[: bisect_right(info.keys, wanted[0], key=lambda key: key[0])]
    frames = _chosen(path, info, keys[-1], wanted, convert) if keys else None
    if frames is None:
        frames = _chosen(path, info, None, wanted, convert)
    if len({frame.shape for frame in frames}) > 1:
        raise VideoError(f"{path}: the frame size changes within the video")
    return torch.cat(frames)


def _chosen(path, how, key, wanted, convert):
    """The wanted frames, decoded from a keyframe on, or None where it is not found; key None: from the start."""
    frames, first, position = [], key[0] if key else 0, -1
    with _Video(path, how) as video:
        for position, frame in enumerate(video.frames_from(key) if key else video.frames(), first):
            if position == wanted[len(frames)]:
                frames.append(convert(video.shown(frame)[None]))
                if len(frames) == len(wanted):
                    return frames
    if key is None:
        _check_range(path, wanted, position + 1)
    return None


def _thumbnail(picture):
    """A few pixels of a (H, W, 3) picture, to know it by."""
    step = max(1, min(picture.shape[:2]) // 16)
    return picture[::step, ::step].astype(np.int16)


def _probe_pyav(path):
    with _Video(path, strict=True) as video:
        scan = video.scan()
        video.restart(found := scan.look())
        seek_to, keys, seconds, samples = dict(found.starts), [], [], {}
        for n, frame in enumerate(video.decode()):
            scan.saw(frame)
            seconds.append(frame.time)
            if frame.pts in seek_to:
                keys.append((n, frame.pts, seek_to.pop(frame.pts)))
            if (n == 2 and found.plain) or (keys and n == keys[-1][0] + 2):
                samples[n] = _thumbnail(frame.to_ndarray(format="rgb24"))
    found = scan.look()
    info = _info(found, seconds, tuple(keys) if found.starts else ())
    shown = [key for key in info.keys if key[0] + 2 in samples]
    checked = {key[0]: key for key in (*shown[:1], *shown[len(shown) // 2 :][:1], *shown[-1:])}
    if checked:
        with _Video(path, found) as video:  # anew: one that has been read through finds more
            for number, key in checked.items():
                frames = list(islice(video.frames_from(key), 3))
                same = len(frames) == 3 and np.array_equal(
                    _thumbnail(frames[2].to_ndarray(format="rgb24")), samples[number + 2]
                )
                if not same:
                    return replace(info, keys=())
    compared = {number: samples[number] for number in sorted({2, *(n + 2 for n in checked)} & samples.keys())}
    if found.plain and compared and _decord_agrees(path, seconds, compared):
        return replace(info, reader="decord")
    return info


def _probe_packets(path):
    found = look(path)
    if found.times is None:
        return _probe_pyav(path)
    return _info(found, found.times, found.keys)


def _info(found, seconds, keys):
    rate, times, cuts = _timeline(seconds, found)
    return VideoInfo(
        n_frames=len(seconds),
        fps=rate,
        height=found.height,
        width=found.width,
        times=times,
        cuts=cuts,
        keys=keys,
        stream=found.stream,
        late=found.late,
        orientation=found.orientation,
        pixel_aspect=found.pixel_aspect,
    )


# ----------------------------------------------------------------------------------------------------------------

READERS = {"decord": _read_decord, "pyav": _read_pyav}
PROBES = {"pyav": _probe_pyav, "packets": _probe_packets}


def _backend(table, name):
    if name not in table:
        raise ValueError(f"backend: expected auto or one of {', '.join(table)}, found {name!r}")
    return table[name]


def _existing(path):
    if not Path(path).is_file():
        raise VideoAwayError(f"{path}: no such file")
    return Path(path)


def file_url(path: str | Path) -> str:
    """What FFmpeg takes for this file and nothing else, whatever its name: "http:x.mp4" and "-" are files too."""
    return f"file:{os.path.abspath(path)}"


@functools.cache
def _formats():
    """Names of the formats that are read as videos, as FFmpeg's option wants them."""
    names = {name for entry in av.formats_available for name in entry.split(",")}
    return ",".join(sorted(n for n in names if n not in NOT_VIDEOS and not n.endswith("_pipe")))


def _check_range(path, wanted, n_frames):
    if wanted[-1] >= n_frames:
        raise VideoError(f"{path}: frame {wanted[-1]} asked for, but only {n_frames} can be read")


def _failure(path, error, what):
    """FFmpeg's error as a VideoError: of the file, or of the moment."""
    if getattr(error, "errno", None) == errno.ENOMEM and not _has_memory():
        return _away(path, error)
    return VideoError(f"{path}: {what} ({_reason(error)})")


def _has_memory():
    """Whether there is memory: FFmpeg says that there is none also where a damaged file states gigabytes."""
    try:
        return bool(bytearray(1 << 26))
    except MemoryError:
        return False


def _away(path, error):
    return VideoAwayError(f"{path}: cannot be read at the moment ({_reason(error)})")


def _reason(error):
    """An error of decord or FFmpeg without its numbers, paths and line breaks."""
    text = getattr(error, "strerror", None) or (str(error).splitlines() or [type(error).__name__])[0]
    return text.rpartition("] ")[2]
