"""Kinds of video file that other readers get wrong: each is read frame by frame as it decodes, or named."""

import json
import os
import random
import shutil
import subprocess
import sys
from dataclasses import replace
from fractions import Fraction
from itertools import pairwise

import av
import numpy as np
import pytest
import torch
from av.bitstream import BitStreamFilterContext
from av.stream import Disposition
from PIL import Image
from video_files import counter_frames, encode, read_counter

from latentcast import VideoFolder, probe, read_clip
from latentcast.data.sets.folder import Folder
from latentcast.data.video.folder import build_index
from latentcast.data.video.reader import VideoAwayError, VideoError, fit_frames, iter_clip, look

N = 60
B_FRAMES = {"crf": "12", "x264-params": "keyint=20:scenecut=0:bframes=3"}
HEVC = {
    "x265-params": "keyint=20:crf=12:scenecut=0:log-level=none",
    "preset": "ultrafast",
}
MPEG = {"g": "12", "bf": "2", "b": "6000000"}
# name -> arguments of encode; none of them is one that decord was shown to read rightly
KINDS = {
    "b.ts": {"options": B_FRAMES},
    "ts_as.mp4": {"options": B_FRAMES, "format": "mpegts"},
    "open.ts": {"options": B_FRAMES | {"x264-params": "keyint=20:scenecut=0:bframes=3:open-gop=1"}},
    "long_gop.ts": {"options": {"crf": "12"}},
    "mpeg2.ts": {"codec": "mpeg2video", "options": MPEG},
    "ps.mpg": {"codec": "mpeg2video", "options": MPEG, "format": "mpeg"},
    "ps_as.mp4": {"codec": "mpeg2video", "options": MPEG, "format": "mpeg"},
    "mpeg1.mpg": {"codec": "mpeg1video", "options": MPEG, "format": "mpeg"},
    "asf.wmv": {"codec": "wmv2", "options": {"g": "12", "b": "6000000"}},
    "asf_as.mp4": {"codec": "wmv2", "options": {"g": "12", "b": "6000000"}, "format": "asf"},
    "h264.flv": {"options": B_FRAMES},
    "raw.h264": {"options": B_FRAMES},
    "raw.m4v": {"codec": "mpeg4", "options": MPEG, "format": "m4v"},
    "hevc.ts": {"codec": "libx265", "options": HEVC},
    "b.avi": {"codec": "mpeg4", "options": MPEG},
    "b.nut": {"options": B_FRAMES},
}


def check(path, shown, **expected):
    """Every way to read gives the frames that show these numbers."""
    info = probe(path)
    for key, value in expected.items():
        assert getattr(info, key) == value, key
    assert info.n_frames == len(shown)
    assert replace(probe(path, "packets"), reader=info.reader) == info
    assert read_counter(torch.cat(list(iter_clip(path)))) == shown
    places = range(info.n_frames)
    for window in (places, places[-3:], places[len(places) // 2 :: 5], places[9:13], [places[-1], 0]):
        numbers = [shown[place] for place in window]
        for arguments in ({}, {"info": info}, {"info": info, "backend": "pyav"}):
            assert read_counter(read_clip(path, window, **arguments)) == numbers, arguments
    return info


def remux(source, target, packets=list, bitstream=None, **options):
    """Copy the packets of a file's video stream, as ``packets`` (list -> list) changes them."""
    with av.open(str(source)) as old, av.open(str(target), "w", options=options) as new:
        stream = new.add_stream_from_template(old.streams.video[0])
        kept = packets([packet for packet in old.demux(video=0) if packet.size])
        change = BitStreamFilterContext(bitstream, old.streams.video[0]) if bitstream else None
        if change:
            kept = [filtered for packet in kept for filtered in change.filter(packet)]
        for packet in kept:
            packet.stream = stream
            new.mux(packet)
    return target


@pytest.mark.parametrize("name", KINDS)
def test_frame_k_is_the_kth_that_decodes(tmp_path, name):
    info = check(encode(tmp_path / name, counter_frames(N), **KINDS[name]), list(range(N)), reader="pyav", cuts=())
    assert info.fps == pytest.approx(25, rel=1e-4) and look(tmp_path / name).rate == pytest.approx(25, rel=1e-4)
    with pytest.raises(VideoError, match="decord does not find the frames of this file exactly"):
        read_clip(tmp_path / name, [0], backend="decord")


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("late.mkv", {"options": {"crf": "12", "x264-params": "keyint=20:scenecut=0:bframes=0"}}),
        ("late.mp4", {"codec": "libx265", "options": HEVC | {"x265-params": HEVC["x265-params"] + ":bframes=0"}}),
        ("late.webm", {"codec": "libvpx-vp9", "options": {"g": "20", "b": "2000000", "cpu-used": "8"}}),
        ("late.avi", {"codec": "mpeg4", "options": {"g": "20", "b": "6000000"}}),
        ("late.ts", {"codec": "mpeg2video", "options": {"g": "20", "b": "6000000"}}),
    ],
)
def test_a_stream_cut_in_its_middle_begins_at_its_first_keyframe(tmp_path, name, arguments):
    source = encode(tmp_path / f"whole{name[4:]}", counter_frames(N), **arguments)
    path = remux(source, tmp_path / name, lambda packets: packets[7:])
    assert check(path, list(range(20, N)), reader="pyav").late


def test_transport_streams_one_after_the_other(tmp_path):
    path = tmp_path / "both.ts"
    parts = [encode(tmp_path / f"{i}.ts", counter_frames(48, first=48 * i), options=B_FRAMES) for i in (0, 1)]
    path.write_bytes(b"".join(part.read_bytes() for part in parts))
    info = check(path, list(range(96)), cuts=(), times=None)
    assert info.fps == pytest.approx(25)
    path.write_bytes(parts[0].read_bytes()[20 * 188 + 100 :])  # from somewhere on
    assert read_counter(read_clip(path, [0])) == [20] and probe(path).n_frames == 28
    noise = np.random.default_rng(0).integers(0, 256, (48, 48, 64, 3), np.uint8)
    content = encode(tmp_path / "noise.ts", noise, options=B_FRAMES).read_bytes()
    packets = [content[i : i + 188] for i in range(0, len(content), 188)]
    amid = [i for i, packet in enumerate(packets) if packet[1:3] == b"\x01\x00"]  # a picture of the video
    packets.pop(amid[len(amid) // 2])
    path.write_bytes(b"".join(packets))
    with pytest.raises(VideoError, match=r"both\.ts: damaged"):
        probe(path)


def test_keyframes_that_are_none(tmp_path):
    """An index that calls every frame one."""
    path = encode(tmp_path / "a.avi", counter_frames(N), codec="wmv2", options={"g": "20", "b": "6000000"})
    content = bytearray(path.read_bytes())
    entries = content.index(b"idx1") + 8
    content[entries + 4 :: 16] = bytes(value | 16 for value in content[entries + 4 :: 16])
    path.write_bytes(content)
    with av.open(str(path)) as file:
        assert all(packet.is_keyframe for packet in file.demux(video=0) if packet.size)
    assert check(path, list(range(N)), reader="pyav").keys == ()


def test_times_that_are_those_of_decoding(tmp_path):
    """As some muxers write them: with B-frames they then run backwards."""

    def decoding_times(packets):
        start = packets[0].dts
        for packet in packets:
            packet.pts = packet.dts = packet.dts - start
        return packets

    source = encode(tmp_path / "true.mp4", counter_frames(N), options=B_FRAMES)
    info = check(remux(source, tmp_path / "false.mp4", decoding_times), list(range(N)), reader="pyav", times=None)
    assert info.fps == 25


def test_times_that_repeat(tmp_path):
    def repeated(packets):
        for before, packet in pairwise(packets):
            if packet.pts == 800:
                packet.pts = packet.dts = before.pts
        return packets

    source = encode(tmp_path / "true.mkv", counter_frames(N), options={"crf": "12", "bf": "0", "g": "12"})
    info = check(remux(source, tmp_path / "false.mkv", repeated), list(range(N)), reader="pyav", times=None)
    assert info.fps == 25


# ------------------------------------------------------------------------------------------- which stream is the video


def two_streams(path, sizes, dispositions=(None, None)):
    """Of the stream number i every frame shows its number plus 100 i."""
    with av.open(str(path), "w") as file:
        streams = []
        for (height, width), disposition in zip(sizes, dispositions, strict=True):
            stream = file.add_stream("libx264", rate=25)
            stream.height, stream.width, stream.pix_fmt, stream.options = height, width, "yuv420p", {"crf": "12"}
            if disposition is not None:
                stream.disposition = disposition
            streams.append(stream)
        for number in range(30):
            for i, (stream, size) in enumerate(zip(streams, sizes, strict=True)):
                picture = counter_frames(1, *size, first=number + 100 * i)[0]
                file.mux(stream.encode(av.VideoFrame.from_ndarray(picture, "rgb24")))
        for stream in streams:
            file.mux(stream.encode(None))
    return path


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "ts"])
def test_the_default_stream_is_read_by_all(tmp_path, suffix):
    large, small = (96, 128), (48, 64)
    check(two_streams(tmp_path / f"a.{suffix}", [small, large]), list(range(30)), height=48, reader="pyav")
    if suffix == "mkv":
        flags = (Disposition(0), Disposition.default)
        check(two_streams(tmp_path / "b.mkv", [large, small], flags), list(range(100, 130)), height=48)


def with_cover(path, video=None):
    """A second of sound with a cover, and the video stream of another file behind the cover."""
    with av.open(str(path), "w") as file:
        sound = file.add_stream("aac", rate=8000, layout="mono")
        cover = file.add_stream("mjpeg", rate=1)
        cover.height, cover.width, cover.pix_fmt, cover.disposition = 48, 64, "yuvj420p", Disposition.attached_pic
        source = av.open(str(video)) if video else None
        copy = file.add_stream_from_template(source.streams.video[0]) if video else None
        tone = av.AudioFrame.from_ndarray(np.zeros((1, 8000), np.float32), format="fltp", layout="mono")
        tone.sample_rate = 8000
        file.mux(cover.encode(av.VideoFrame.from_ndarray(counter_frames(1, first=200)[0], "rgb24")))
        file.mux(cover.encode(None))
        file.mux([*sound.encode(tone), *sound.encode(None)])
        for packet in source.demux(video=0) if video else ():
            if packet.size:
                packet.stream = copy
                file.mux(packet)
        if source:
            source.close()
    return path


def test_a_cover_is_no_video(tmp_path):
    video = encode(tmp_path / "video.mp4", counter_frames(30))
    song = with_cover(tmp_path / "song.mp4")
    for call in (probe, look, lambda path: read_clip(path, [0]), lambda path: list(iter_clip(path))):
        with pytest.raises(VideoError, match=r"song\.mp4: holds pictures only"):
            call(song)
    check(with_cover(tmp_path / "film.mp4", video), list(range(30)), reader="pyav")
    data = VideoFolder(tmp_path, "train", 8, 48, val_fraction=0, test_fraction=0)
    assert [entry.name for entry in data.videos] == ["film.mp4", "video.mp4"]
    assert Folder(tmp_path).fps == 25


def test_pictures_and_lists_of_files_are_no_videos(tmp_path):
    encode(tmp_path / "good.ts", counter_frames(30))
    Image.fromarray(counter_frames(1)[0]).save(tmp_path / "picture.png")
    (tmp_path / "picture.png").rename(tmp_path / "picture.mp4")
    # Without its end FFmpeg waits for ever for such a list to grow.
    head = "#EXTM3U\n#EXT-X-VERSION:3\n#EXT-X-TARGETDURATION:2\n#EXT-X-MEDIA-SEQUENCE:0\n"
    (tmp_path / "live.mp4").write_text(f"{head}#EXTINF:1.2,\ngood.ts\n")
    (tmp_path / "list.mp4").write_text("ffconcat version 1.0\nfile good.ts\n")
    for name in ("picture.mp4", "live.mp4", "list.mp4"):
        with pytest.raises(VideoError, match=f"{name}: not a readable video"):
            probe(tmp_path / name)


# ------------------------------------------------------------------------------------------------ how it is to be shown


def cornered(n, height=48, width=96):
    """Red, green, blue and white corners."""
    frames = np.full((n, height, width, 3), 128, np.uint8)
    frames[:, :16, :16], frames[:, :16, -16:] = (255, 0, 0), (0, 255, 0)
    frames[:, -16:, :16], frames[:, -16:, -16:] = (0, 0, 255), (255, 255, 255)
    return frames


def corners(frames):
    """Colours of the corners of (n, 3, H, W) frames, the same in all: of the upper left and right, then the lower."""
    names = {(True, False, False): "r", (False, True, False): "g", (False, False, True): "b", (True,) * 3: "w"}
    found = {
        "".join(names[tuple((frame[:, y, x] > 128).tolist())] for y in (6, -7) for x in (6, -7)) for frame in frames
    }
    assert len(found) == 1, found
    return found.pop()


ONE = 1 << 16
MATRICES = [  # (a, b, c, d): x' = a x + c y, y' = b x + d y, y downwards
    ((ONE, 0, 0, ONE), "rgbw"),
    ((-ONE, 0, 0, ONE), "grwb"),
    ((ONE, 0, 0, -ONE), "bwrg"),
    ((-ONE, 0, 0, -ONE), "wbgr"),
    ((0, ONE, ONE, 0), "rbgw"),
    ((0, ONE, -ONE, 0), "brwg"),
    ((0, -ONE, ONE, 0), "gwrb"),
    ((0, -ONE, -ONE, 0), "wgbr"),
    ((0, 0, 0, 0), "rgbw"),
]


@pytest.mark.parametrize(("matrix", "shown"), MATRICES)
def test_turned_and_mirrored(tmp_path, matrix, shown):
    path = tmp_path / "a.mp4"
    a, b, c, d = matrix
    with av.open(str(path), "w") as file:
        stream = file.add_stream("libx264", rate=25)
        stream.height, stream.width, stream.pix_fmt, stream.options = 48, 96, "yuv420p", {"crf": "12", "g": "5"}
        stream.set_display_matrix([a, b, 0, c, d, 0, 0, 0, 1 << 30])
        for picture in cornered(12):
            file.mux(stream.encode(av.VideoFrame.from_ndarray(picture, "rgb24")))
        file.mux(stream.encode(None))
    info = probe(path)
    assert (info.height, info.width) == ((96, 48) if b else (48, 96))
    for frames in (read_clip(path, range(12)), read_clip(path, range(12), info=info), *iter_clip(path)):
        assert corners(frames) == shown and frames.shape[2:] == (info.height, info.width)


@pytest.mark.parametrize("suffix", ["mp4", "ts", "mkv"])
@pytest.mark.parametrize(("orientation", "shown"), [("rotate=180", "wbgr"), ("flip=horizontal", "grwb")])
def test_orientation_in_the_stream_is_that_of_the_file(tmp_path, suffix, orientation, shown):
    """A message that stands at keyframes alone."""
    source = encode(tmp_path / "plain.ts", cornered(30), options={"crf": "12", "x264-params": "keyint=10:scenecut=0"})
    change = f"h264_metadata=display_orientation=insert:{orientation}"
    path = remux(source, tmp_path / f"turned.{suffix}", bitstream=change)
    info = probe(path)
    for frames in (read_clip(path, [3, 4, 10, 25]), read_clip(path, [25], info=info), *iter_clip(path)):
        assert corners(frames) == shown


def oblong(path, aspect):
    with av.open(str(path), "w") as file:
        stream = file.add_stream("libx264", rate=25)
        stream.height, stream.width, stream.pix_fmt = 48, 96, "yuv420p"
        stream.codec_context.sample_aspect_ratio = aspect
        for picture in counter_frames(12, 48, 96):
            file.mux(stream.encode(av.VideoFrame.from_ndarray(picture, "rgb24")))
        file.mux(stream.encode(None))
    return path


def test_oblong_pixels_are_named_and_squared_on_demand(tmp_path, caplog):
    path = oblong(tmp_path / "dv.mp4", Fraction(4, 3))
    assert probe(path).pixel_aspect == pytest.approx(4 / 3)
    assert read_clip(path, [0], square_pixels=True).shape == (1, 3, 48, 128)
    square, kept = read_clip(path, [0], 48, square_pixels=True), read_clip(path, [0], 48)
    assert square.shape == kept.shape == (1, 3, 48, 48) and not torch.equal(square, kept)
    arguments = {"val_fraction": 0, "test_fraction": 0}
    VideoFolder(tmp_path, "train", 8, 48, **arguments)
    assert torch.equal(
        VideoFolder(tmp_path, "train", 8, 48, square_pixels=True, **arguments).read_video(0, 0, 1)[0],
        square[0].float() / 127.5 - 1,
    )
    assert "1 videos have oblong pixels" in caplog.text and "dv.mp4 (1.333 : 1)" in caplog.text
    name = "dv.mp4"
    assert torch.equal(
        torch.cat(list(Folder(tmp_path, frame_size=48, square_pixels=True).read("train", name).frames))[:1], square
    )
    caplog.clear()
    assert torch.equal(torch.cat(list(Folder(tmp_path, frame_size=48).read("train", name).frames))[:1], kept)
    assert "dv.mp4: pixels are not square (1.333 : 1)" in caplog.text


def test_the_square_is_cut_as_shown():
    y, x = np.mgrid[:40, :90]
    frame = np.stack([128 + 99 * np.sin(x / 6), 128 + 99 * np.cos(y / 4), x + y], -1).astype(np.uint8)
    for aspect in (2.0, 0.5):
        wide = Image.fromarray(frame).resize((round(90 * aspect), 40), Image.Resampling.BILINEAR)
        for resample in ("bilinear", "lanczos"):
            found = fit_frames(frame[None], 20, resample, aspect).int()
            assert (found - fit_frames(np.asarray(wide)[None], 20, resample).int()).abs().float().mean() < 4
            assert (found - fit_frames(frame[None], 20, resample).int()).abs().float().mean() > 12


# ----------------------------------------------------------------------------------------------------------------- time


def test_a_rate_that_is_none_is_measured(tmp_path):
    """As browsers record: no rate is stated, so FFmpeg gives its clock's."""
    pts = [int(i * 1000 / 29.2) for i in range(48)]
    options = {"b": "2000000", "g": "20"}
    path = encode(tmp_path / "a.webm", counter_frames(48), fps=1000, codec="libvpx", pts=pts, options=options)
    info = check(path, list(range(48)))
    assert info.fps == pytest.approx(29.2, rel=0.01) and look(path).rate == info.fps == Folder(tmp_path).fps


def gapped(path, seconds, n=48):
    """Time jumps by that much after half of the frames."""
    pts = [i + (25 * seconds if i >= n // 2 else 0) for i in range(n)]
    return encode(path, counter_frames(n, 64, 64), pts=pts, options={"crf": "12", "g": "12", "bf": "0"})


@pytest.mark.parametrize("seconds", [60, 95443])
def test_no_clip_crosses_a_jump_in_time(tmp_path, caplog, seconds):
    path = gapped(tmp_path / "wrap.mkv", seconds)
    info = probe(path)
    assert info.cuts == (24,) and info.fps == pytest.approx(25, rel=1e-3) and look(path).rate == pytest.approx(info.fps)
    for fps, n_frames in ((None, 24), (25, 24), (50, 47)):
        data = VideoFolder(tmp_path, "train", 8, 64, fps=fps, val_fraction=0, test_fraction=0)
        assert [(v.name, v.n_frames) for v in data.videos] == [
            ("wrap.mkv 0-23", n_frames),
            ("wrap.mkv 24-47", n_frames),
        ]
        assert "wrap.mkv: time jumps before frame 24" in caplog.text and data.fps == pytest.approx(fps or 25)
        for item in data:
            numbers = read_counter(item["frames"])
            assert max(numbers) < 24 or min(numbers) >= 24
            assert numbers[-1] - numbers[0] >= (3 if fps == 50 else 7)
    assert read_counter(data.read_video(1, 0, 47))[::2] == list(range(24, 48))
    for arguments in ({}, {"fps": 25}):
        with pytest.raises(VideoError, match=rf"wrap\.mkv: time jumps by {seconds} s before frame 24"):
            list(iter_clip(path, **arguments))


def test_a_still_is_no_gap_and_slow_series_are_named(tmp_path, caplog):
    pts = [0, 25, 50, 275, 300, 325]  # nine seconds of a still
    path = encode(tmp_path / "screen.mkv", counter_frames(6, 64, 64), pts=pts, options={"crf": "12", "bf": "0"})
    assert probe(path).cuts == () and len(torch.cat(list(iter_clip(path, fps=1)))) == 14
    lapse = encode(tmp_path / "lapse.mp4", counter_frames(20, 64, 64), fps=Fraction(1, 60))
    assert probe(lapse).cuts == () and probe(lapse).fps == pytest.approx(1 / 60)
    data = VideoFolder(tmp_path, "train", 8, 64, fps=25, val_fraction=0, test_fraction=0)
    assert [entry.name for entry in data.videos] == ["screen.mkv"]
    assert "left out 1 too slow for data.fps=25: lapse.mp4 (60 s a frame)" in caplog.text
    with pytest.raises(VideoError, match=r"lapse\.mp4: frames lie 60 s apart, too slow for fps=25"):
        list(iter_clip(lapse, fps=25))
    assert read_counter(torch.cat(list(iter_clip(lapse, fps=1 / 120)))) == list(range(0, 20, 2))


# ------------------------------------------------------------------------------------------------ names and the machine

NAMES = [
    "http:x.mp4",
    "take: 2.mp4",
    "concat:a|b.mp4",
    "-.mp4",
    "a%03d.gif",
    "new\nline.mkv",
    "#1?.mp4",
    "x" * 251 + ".mp4",
]
NAMES += ["pipe:.mp4", os.fsdecode(b"caf\xe9.mp4"), os.fsdecode(b"\xff.avi")]


def test_any_name_is_a_file(tmp_path, monkeypatch):
    for i, name in enumerate(NAMES):
        path = tmp_path / "2024-05-01T12:30" / name
        path.parent.mkdir(exist_ok=True)
        codec = {"codec": "gif", "pix_fmt": "rgb8"} if name.endswith("gif") else {}
        shutil.move(
            encode(tmp_path / f"a{os.path.splitext(name)[1]}", counter_frames(12, 64, 64, first=i), **codec), path
        )
    monkeypatch.chdir(tmp_path)
    for _ in range(2):  # the second time out of the index
        data = VideoFolder("2024-05-01T12:30", "train", 8, 64, val_fraction=0, test_fraction=0)
        assert {v.name: v.n_frames for v in data.videos} == dict.fromkeys(NAMES, 12)
        for index, entry in enumerate(data.videos):
            assert read_counter(data.read_video(index, 0, 1)) == [NAMES.index(entry.name)]
        assert json.loads(json.dumps(data.describe())) == data.describe()
    for name in NAMES:
        assert read_counter(torch.cat(list(iter_clip(f"2024-05-01T12:30/{name}")))[:1]) == [NAMES.index(name)]


FULL = """
import json, resource, sys
from latentcast import VideoFolder, probe, read_clip
import av
from tqdm import tqdm
root = sys.argv[1]
read_clip(f"{root}/0.mp4", [0])  # loads what is loaded late
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
held = []
try:
    while True:
        held.append(open("/dev/null"))
except OSError:
    pass
for _ in range(2):  # free ones for the index and its lock, not for the videos
    held.pop().close()
try:
    VideoFolder(root, "train", 8, 48, val_fraction=0, test_fraction=0, backend="pyav")
except ValueError as error:
    print(error)
"""


def test_what_is_no_property_of_the_file_is_tried_again(tmp_path):
    root = tmp_path / "videos"
    root.mkdir()
    for i in range(4):
        encode(root / f"{i}.mp4", counter_frames(12))
    (root / "text.mp4").write_text("no video\n" * 50)
    run = subprocess.run([sys.executable, "-c", FULL, str(root)], capture_output=True, text=True, timeout=120)
    assert "not readable now" in run.stdout + run.stderr and "Too many open files" in run.stdout + run.stderr, (
        run.stderr
    )
    data = VideoFolder(root, "train", 8, 48, val_fraction=0, test_fraction=0)
    assert len(data.videos) == 4
    kept = json.loads((root / ".latentcast-index.json").read_text())["files"]
    assert sorted(kept) == ["0.mp4", "1.mp4", "2.mp4", "3.mp4", "text.mp4"] and "error" in kept["text.mp4"]


FAULT = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
ssize_t read(int file, void *buffer, size_t n) {
    char link[64], path[4096] = "";
    off_t end = atol(getenv("FAULT")), at = lseek(file, 0, SEEK_CUR);
    snprintf(link, sizeof link, "/proc/self/fd/%d", file);
    if (readlink(link, path, sizeof path - 1) > 0 && strstr(path, "/shared/")) {
        if (at >= end) { errno = ESTALE; return -1; }
        if (at + (off_t)n > end) n = end - at;
    }
    return ((ssize_t (*)(int, void *, size_t))dlsym(RTLD_NEXT, "read"))(file, buffer, n);
}
"""
LISTING = """
import json, sys
from latentcast.data.video.folder import build_index
for root in sys.argv[1:]:
    print(json.dumps({name: record.get("error") for name, record in build_index(root).items()}))
"""


@pytest.mark.skipif(
    shutil.which("cc") is None, reason="needs a C compiler, to let a share fail in the middle of a file"
)
def test_a_share_that_fails_in_the_middle_of_a_file_says_nothing_of_it(tmp_path):
    """Of its index at the end of an mp4, of a Matroska file without a stated duration, of a stream without any."""
    (tmp_path / "shared").mkdir()
    (tmp_path / "fault.c").write_text(FAULT)
    library = tmp_path / "fault.so"
    subprocess.run(["cc", "-shared", "-fPIC", "-o", library, tmp_path / "fault.c", "-ldl"], check=True)
    noise = np.random.default_rng(0).integers(0, 256, (30, 96, 128, 3), np.uint8)
    for name in ("a.mp4", "a.mkv", "a.avi", "a.ts", "a.flv", "a.mpg"):
        old = name in ("a.avi", "a.mpg")
        codec = {"codec": "mpeg1video" if old else "libx264", "options": {"b": "4000000", "g": "10"}}
        assert encode(tmp_path / "shared" / name, noise, **codec).stat().st_size > 150_000
    run = subprocess.run(
        [sys.executable, "-c", LISTING, tmp_path / "shared"],
        env=os.environ | {"LD_PRELOAD": str(library), "FAULT": "100000"},
        capture_output=True,
        text=True,
        timeout=200,
    )
    (line,) = run.stdout.splitlines()
    assert len(json.loads(line)) == 6
    assert set(json.loads(line).values()) == {"cannot be read at the moment (Stale file handle)"}
    assert json.loads((tmp_path / "shared/.latentcast-index.json").read_text())["files"] == {}


def test_an_index_that_came_with_the_files_or_was_damaged_counts_for_nothing(tmp_path):
    """Whatever stands in it: what is taken is what can be so."""
    encode(tmp_path / "a.mp4", counter_frames(30), pts=[*range(20), *range(30, 40)])
    gapped(tmp_path / "b.mkv", 60)
    (tmp_path / "text.mp4").write_text("no video")
    expected = json.loads(json.dumps(build_index(tmp_path)))
    path = tmp_path / ".latentcast-index.json"
    document = json.loads(path.read_text())
    rng = random.Random(0)
    for junk in (None, [], {}, -1, 0, "x", 10**30, 1.5, True, [[]], {"a": 1}, [1e300], float("nan")):
        for _ in range(4):
            changed = inner = json.loads(json.dumps(document))
            while inner:
                key = rng.choice([*inner] if isinstance(inner, dict) else range(len(inner)))
                if not isinstance(inner[key], (dict, list)) or rng.random() < 0.3:
                    break
                inner = inner[key]
            if inner:
                inner[key] = junk
            path.write_text(json.dumps(changed))
            for record in build_index(tmp_path).values():
                assert "error" in record or record["info"].keys() == expected["a.mp4"]["info"].keys()
            VideoFolder(tmp_path, "train", 2, 16, fps=25, val_fraction=0, test_fraction=0)
    huge = json.loads(json.dumps(document))
    huge["files"]["a.mp4"]["info"] |= {"n_frames": 10**12, "times": None, "cuts": []}
    for content in ("[" * 100_000, "[1]", "", json.dumps(huge)):
        path.write_text(content)
        assert json.loads(json.dumps(build_index(tmp_path))) == expected


def test_a_file_that_is_gone_is_not_called_damaged(tmp_path):
    with pytest.raises(VideoAwayError, match="no such file"):
        probe(tmp_path / "a.mp4")
    (tmp_path / "b.mp4").write_text("no video\n" * 50)
    with pytest.raises(VideoError) as caught:
        probe(tmp_path / "b.mp4")
    assert not isinstance(caught.value, VideoAwayError)
