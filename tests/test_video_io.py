"""Reading with both backends against the frame numbers drawn into the pictures, damage, writing, and picture layout."""

import os
import random
import shutil
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image
from video_files import counter_frames, cut_off, encode, overwrite_middle, read_counter

from latentcast import VideoFolder, probe, read_clip, write_video
from latentcast.data.video.folder import sampled_places, sampled_rate
from latentcast.data.video.reader import VideoError, _look, fit_frames, iter_clip, look
from latentcast.data.video.writer import write_image
from latentcast.figures.sheets import (
    BORDER,
    GAP,
    GIVEN,
    LINE,
    PREDICTED,
    contact_sheet,
    cut_name,
    frame_names,
    grid_size,
    labelled_sheet,
    labelled_size,
    labelled_videos,
    rows_of,
    side_by_side,
)

# name -> (arguments of encode, whether decord finds single frames exactly)
ENCODINGS = {
    "closed_gop.mp4": ({}, True),
    "faststart.mov": ({"movflags": "faststart"}, True),
    "closed_gop.mkv": ({}, True),
    "odd.mkv": ({"pix_fmt": "yuv444p"}, True),
    "open_gop.mp4": ({"options": {"crf": "12", "x264-params": "open-gop=1:keyint=12:scenecut=0:bframes=3"}}, False),
    "guessed_times.avi": ({}, False),
    "no_b_frames.avi": ({"codec": "mpeg4", "options": {"g": "12", "b": "4000000"}}, True),
    "packed.avi": ({"codec": "mpeg4", "options": {"g": "12", "b": "4000000", "bf": "2"}}, False),
    "pictures.avi": ({"codec": "mjpeg", "pix_fmt": "yuvj420p", "options": {"q": "2"}}, True),
    "hidden_frames.webm": (
        {"codec": "libvpx", "options": {"g": "20", "b": "4000000", "auto-alt-ref": "1", "lag-in-frames": "16"}},
        True,
    ),
    "loop.gif": ({"codec": "gif", "pix_fmt": "rgb8"}, None),  # decord does not open it
}
N_FRAMES = 96


IO_COUNTER = Path("/proc/self/io")


def bytes_read(call, *args, **kwargs):
    """By this process, while it makes the call."""

    def so_far():
        return int(IO_COUNTER.read_text().split()[1])  # rchar

    before = so_far()
    call(*args, **kwargs)
    return so_far() - before


@pytest.fixture(scope="module")
def encoded(tmp_path_factory):
    folder = tmp_path_factory.mktemp("encodings")
    for name, (arguments, _) in ENCODINGS.items():
        size = (49, 67) if name.startswith("odd") else (48, 64)
        encode(folder / name, counter_frames(N_FRAMES, *size), **arguments)
    return folder


@pytest.mark.parametrize("name", ENCODINGS)
def test_every_backend_gives_the_frames_asked_for(encoded, name):
    info = probe(encoded / name)
    assert (info.n_frames, info.fps, info.times) == (N_FRAMES, pytest.approx(25), None)
    assert (info.height, info.width) == ((49, 67) if name.startswith("odd") else (48, 64))
    windows = [[s, s + 1, s + 2, s + 7] for s in random.Random(0).choices(range(N_FRAMES - 7), k=8)]
    windows += [[0], [N_FRAMES - 1], [80, 3, 80, 51]]
    assert replace(probe(encoded / name, backend="packets"), reader=info.reader) == info
    exact = ENCODINGS[name][1]
    for window in windows:
        by_pyav = read_clip(encoded / name, window, backend="pyav")
        assert by_pyav.dtype == torch.uint8 and by_pyav.shape == (len(window), 3, info.height, info.width)
        assert read_counter(by_pyav) == window
        assert read_counter(read_clip(encoded / name, window)) == window
        assert read_counter(read_clip(encoded / name, window, info=info)) == window
        if exact:
            by_decord = read_clip(encoded / name, window, backend="decord")
            assert (by_decord.float() - by_pyav.float()).abs().mean() < 0.5
        else:
            with pytest.raises(VideoError, match="decord"):
                read_clip(encoded / name, window, backend="decord")
    assert info.reader == ("decord" if exact else "pyav")


@pytest.mark.parametrize("backend", ["pyav", "packets"])
def test_uneven_times_are_told(tmp_path, backend):
    pts = [i + i * i // 4 for i in range(20)]
    info = probe(encode(tmp_path / "uneven.mkv", counter_frames(20), fps=10, pts=pts), backend)
    assert info.n_frames == 20 and info.fps == pytest.approx(19 / (pts[-1] / 10), rel=1e-3)
    assert info.times == pytest.approx([p / 10 for p in pts], abs=2e-3)


def test_fractional_rate(tmp_path):
    info = probe(encode(tmp_path / "ntsc.mp4", counter_frames(10), fps=Fraction(30000, 1001)))
    assert info.fps == pytest.approx(30000 / 1001, abs=1e-6) and info.times is None


@pytest.mark.parametrize(("backend", "height"), [("pyav", 48), ("auto", 48), ("pyav", 64)])
def test_rotated_video_is_shown_upright(tmp_path, backend, height):
    frames = np.zeros((4, height, 96, 3), np.uint8)
    frames[:, :, :48] = 255  # stored: left half white
    path = encode(tmp_path / "phone.mp4", frames, rotation=90)  # shown: turned counter-clockwise
    info = probe(path)
    assert probe(path, backend="packets") == info
    clip = read_clip(path, [2], backend=backend)
    assert clip.shape == (1, 3, info.height, info.width) == (1, 3, 96, height)
    assert clip[0, :, 56:].min() > 240 and clip[0, :, :40].max() < 15


@pytest.mark.parametrize("backend", ["pyav", "decord"])
@pytest.mark.parametrize("size", [16, 37, 80])
def test_central_square_is_resized_as_pillow_does(encoded, backend, size):
    path = encoded / "odd.mkv"
    whole = read_clip(path, [5], backend=backend)[0].permute(1, 2, 0).numpy()
    square = Image.fromarray(whole[:, (67 - 49) // 2 :][:, :49])
    expected = torch.from_numpy(np.array(square.resize((size, size), Image.BILINEAR))).permute(2, 0, 1)
    found = read_clip(path, [5], size=size, backend=backend)[0]
    assert (found.int() - expected.int()).abs().max() <= 1


def test_trimmed_video_shows_only_what_its_edit_list_keeps(tmp_path):
    """As phones trim: the first frames stay in the file, marked as not to be shown."""
    whole = encode(tmp_path / "whole.mp4", counter_frames(60), options={"crf": "12", "g": "30"})
    with (
        av.open(str(whole)) as source,
        av.open(str(tmp_path / "trimmed.mp4"), "w", options={"avoid_negative_ts": "disabled"}) as target,
    ):
        stream = target.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.size:
                shift = round(10 / 25 / packet.time_base)
                packet.pts, packet.dts, packet.stream = packet.pts - shift, packet.dts - shift, stream
                target.mux(packet)
    assert probe(tmp_path / "trimmed.mp4").n_frames == probe(tmp_path / "trimmed.mp4", "packets").n_frames == 50
    assert read_counter(read_clip(tmp_path / "trimmed.mp4", range(50))) == list(range(10, 60))
    for backend in ("auto", "pyav"):
        assert read_counter(read_clip(tmp_path / "trimmed.mp4", [49, 48], backend=backend)) == [59, 58]


def test_wrong_requests(encoded):
    path = encoded / "closed_gop.mp4"
    for indices in ([], [-1]):
        with pytest.raises(ValueError, match="indices"):
            read_clip(path, indices)
    with pytest.raises(ValueError, match="backend: expected auto or one of decord, pyav, found 'opencv'"):
        read_clip(path, [0], backend="opencv")
    for backend in ("auto", "decord", "pyav"):
        for wanted in ([N_FRAMES], [3, N_FRAMES + 10]):
            with pytest.raises(VideoError, match=f"closed_gop.mp4: frame {wanted[-1]} asked for, but only {N_FRAMES}"):
                read_clip(path, wanted, backend=backend)


def test_damage_is_found_and_named(tmp_path, encoded):
    (tmp_path / "text.mp4").write_text("not a video\n" * 100)
    (tmp_path / "empty.mp4").touch()
    broken = [
        tmp_path / "text.mp4",
        tmp_path / "empty.mp4",
        tmp_path / "missing.mp4",
        cut_off(encoded / "closed_gop.mp4", tmp_path / "headless.mp4"),
        cut_off(encoded / "faststart.mov", tmp_path / "cut.mov"),
        cut_off(encoded / "closed_gop.mkv", tmp_path / "cut.mkv"),
        cut_off(encoded / "pictures.avi", tmp_path / "cut.avi"),
        overwrite_middle(encoded / "closed_gop.mp4", tmp_path / "zeros.mp4"),
        overwrite_middle(encoded / "pictures.avi", tmp_path / "zeros.avi", 2000),
    ]
    with av.open(str(tmp_path / "sound.mkv"), "w") as file:
        stream = file.add_stream("pcm_s16le", rate=8000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 8000), np.int16), format="s16", layout="mono")
        frame.sample_rate = 8000
        file.mux(stream.encode(frame))
        file.mux(stream.encode(None))
    for path in [*broken, tmp_path / "sound.mkv"]:
        with pytest.raises(VideoError) as caught:
            probe(path)
        assert str(caught.value).startswith(f"{path}: ") and "\n" not in str(caught.value)
    for path in [*broken[:4], tmp_path / "sound.mkv"]:
        with pytest.raises(VideoError, match=path.name):
            probe(path, backend="packets")
    for path in broken[:4]:
        for backend in ("auto", "pyav", "decord"):
            with pytest.raises(VideoError, match=path.name):
                read_clip(path, [0], backend=backend)


@pytest.mark.skipif(not IO_COUNTER.is_file(), reason="counts the bytes read as Linux tells them")
def test_packets_are_looked_through_once(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (150, 240, 320, 3), np.uint8)
    path = encode(tmp_path / "noise.avi", noise, codec="mjpeg", pix_fmt="yuvj420p", options={"q": "2"})
    first, *later = (bytes_read(read_clip, path, range(start, start + 4), backend="pyav") for start in (90, 120, 60))
    assert first > path.stat().st_size > 3 * max(later)
    dataset = VideoFolder(tmp_path, "train", 4, 64, val_fraction=0, test_fraction=0)
    _look.cache_clear()
    assert bytes_read(dataset.read_video, 0, 90, 94) < 1.5 * path.stat().st_size


def test_a_file_that_is_replaced_is_looked_through_again(tmp_path):
    for first in (0, 5):
        path = encode(tmp_path / "a.mp4", counter_frames(80, first=first), pts=[(first + 1) * i for i in range(80)])
        assert read_counter(read_clip(path, [70], backend="pyav")) == [70 + first]


def replace_bytes(path, old, new):
    content = path.read_bytes()
    assert old in content and len(old) == len(new)
    path.write_bytes(content.replace(old, new))
    return path


def test_a_stream_without_a_decoder_is_named(tmp_path, encoded):
    path = shutil.copy(encoded / "pictures.avi", tmp_path / "unknown.avi")
    replace_bytes(path, b"MJPG", b"ZZZZ")
    for call in (probe, look, lambda path: read_clip(path, [0]), lambda path: list(iter_clip(path))):
        with pytest.raises(VideoError, match=r"unknown\.avi: FFmpeg has no decoder for its video stream"):
            call(path)


@pytest.mark.parametrize("name", ["tagged.mp4", "tagged.mkv", "tagged.avi"])
def test_a_title_that_is_not_utf8_is_no_damage(tmp_path, name):
    options = {"codec": "mpeg4", "options": {"b": "4000000"}}
    path = replace_bytes(encode(tmp_path / name, counter_frames(60), title="caXX", **options), b"caXX", b"ca\xe9\xff")
    assert probe(path).n_frames == 60 and look(path).rate == 25
    assert read_counter(read_clip(path, [1, 50])) == [1, 50]
    assert read_counter(torch.cat(list(iter_clip(path)))) == list(range(60))


# ------------------------------------------------------------------------------------------------------- streaming


@pytest.mark.parametrize("name", ENCODINGS)
@pytest.mark.parametrize("size", [None, 40])
def test_streamed_pieces_are_the_frames_of_read_clip(encoded, name, size):
    pieces = list(iter_clip(encoded / name, size, chunk=40))
    assert [len(piece) for piece in pieces] == [40, 40, 16] and all(piece.is_contiguous() for piece in pieces)
    assert torch.equal(torch.cat(pieces), read_clip(encoded / name, range(N_FRAMES), size, backend="pyav"))
    strided = torch.cat(list(iter_clip(encoded / name, size, frame_stride=7)))
    assert torch.equal(strided, torch.cat(pieces)[::7])
    assert look(encoded / name).rate == pytest.approx(25)


@pytest.mark.parametrize("name", ENCODINGS)
@pytest.mark.parametrize("fps", [12, 40, 60])
def test_streamed_resampling_takes_the_frames_that_a_probe_finds(encoded, name, fps):
    info = probe(encoded / name)
    places = sampled_places(info, range(sampled_rate(info, fps=fps)[0]), fps=fps)
    found = read_counter(torch.cat(list(iter_clip(encoded / name, fps=fps))))
    expected = read_counter(read_clip(encoded / name, places))
    for i, (one, other) in enumerate(zip(found, expected, strict=True)):
        if i * 25 / fps % 1 != 0.5:
            assert one == other
        else:  # equally near: the earlier one, where the probe's way takes the even one
            assert one == i * 25 // fps


def test_streamed_resampling_goes_by_time(tmp_path):
    """Uneven times against brute force."""
    pts = [i + i * i // 4 for i in range(20)]
    path = encode(tmp_path / "uneven.mkv", counter_frames(20), fps=10, pts=pts)
    for fps in (3.7, 9, 23):
        asked = np.arange(0, pts[-1] / 10 + 1e-6, 1 / fps)
        nearest = np.abs(np.array(pts)[None] / 10 - asked[:, None]).argmin(1)
        assert read_counter(torch.cat(list(iter_clip(path, fps=fps)))) == nearest.tolist()


def test_rotated_video_is_streamed_upright(tmp_path):
    frames = counter_frames(5, 64, 96)
    path = encode(tmp_path / "phone.mp4", frames, rotation=90)
    for size in (None, 32):
        for resample in ("bilinear", "lanczos"):
            streamed = torch.cat(list(iter_clip(path, size, resample=resample)))
            assert torch.equal(streamed, read_clip(path, range(5), size, backend="pyav", resample=resample))


def test_streaming_names_damage(tmp_path, encoded):
    damaged = [
        *(cut_off(encoded / name, tmp_path / name) for name in ("closed_gop.mkv", "pictures.avi", "faststart.mov")),
        overwrite_middle(encoded / "closed_gop.mp4", tmp_path / "zeros.mp4"),
        overwrite_middle(encoded / "pictures.avi", tmp_path / "zeros.avi", 2000),
    ]
    for path in damaged:
        with pytest.raises(VideoError) as by_probe:
            probe(path)
        pieces = iter_clip(path, 16)
        with pytest.raises(VideoError) as caught:
            for piece in pieces:
                assert piece.shape[1:] == (3, 16, 16)
        assert str(caught.value) == str(by_probe.value)
    for call in (look, lambda path: list(iter_clip(path))):
        with pytest.raises(VideoError, match=r"missing.mp4: no such file"):
            call(tmp_path / "missing.mp4")


def test_streaming_stops_where_the_reader_stops(encoded):
    pieces = iter_clip(encoded / "closed_gop.mp4", chunk=4)
    assert read_counter(next(pieces)) == [0, 1, 2, 3]
    pieces.close()


def lanczos_by_hand(line, size):
    """Resize a line of values with a Lanczos-3 kernel stretched to the ratio, as for antialiasing."""
    scale = len(line) / size
    stretch = max(scale, 1)
    at = np.arange(len(line)) + 0.5
    result = []
    for i in range(size):
        x = (at - (i + 0.5) * scale) / stretch
        weights = np.where(np.abs(x) < 3, np.sinc(x) * np.sinc(x / 3), 0)
        result.append((weights * line).sum() / weights.sum())
    return np.clip(result, 0, 255)


@pytest.mark.parametrize(("side", "size"), [(90, 32), (31, 47)])
def test_lanczos_is_the_windowed_sinc(side, size):
    line = np.random.default_rng(0).integers(0, 256, side)
    frame = np.broadcast_to(line[None, :, None], (side, side, 3)).astype(np.uint8)
    found = fit_frames(np.pad(frame, ((0, 0), (5, 5), (0, 0)))[None], size, "lanczos")
    assert found.shape == (1, 3, size, size) and found.dtype == torch.uint8
    assert np.abs(found[0, 1].numpy() - lanczos_by_hand(line, size)).max() <= 1
    with pytest.raises(ValueError, match="resample: expected one of bilinear, lanczos, found 'nearest'"):
        fit_frames(frame[None], size, "nearest")


# --------------------------------------------------------------------------------------------------------- writing


@pytest.fixture(scope="module")
def clip():
    """(12, 3, 33, 47) in [-1, 1], smooth, with odd sides."""
    t, y, x = torch.meshgrid(torch.arange(12.0), torch.arange(33.0), torch.arange(47.0), indexing="ij")
    return torch.stack([torch.sin((y + t) / 9), torch.cos((x - t) / 11), torch.sin((x + y) / 15)], 1)


@pytest.mark.parametrize("fps", [10, 24000 / 1001, Fraction(30000, 1001), 12.5])
def test_mp4_keeps_rate_frames_and_colours(tmp_path, clip, fps):
    write_video(tmp_path / "new" / "clip.mp4", clip, fps)
    with av.open(str(tmp_path / "new" / "clip.mp4")) as file:
        stream = file.streams.video[0]
        assert (stream.codec_context.name, stream.codec_context.pix_fmt) == ("h264", "yuv420p")
        assert float(stream.average_rate) == pytest.approx(float(fps), rel=1e-9)
        assert stream.duration * stream.time_base == pytest.approx(12 / float(fps), rel=1e-3)
    read = read_clip(tmp_path / "new" / "clip.mp4", range(12)).float() / 127.5 - 1
    assert read.shape == (12, 3, 34, 48)
    assert (read[..., :33, :47] - clip).abs().mean() < 0.03
    assert (read[..., 33, :] - read[..., 32, :]).abs().mean() < 0.05  # the edge repeats
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["clip.mp4"]


def test_grey_and_uint8_and_out_of_range(tmp_path, clip):
    write_video(tmp_path / "grey.mp4", clip[:, :1], 10)
    grey = read_clip(tmp_path / "grey.mp4", [3])
    assert (grey[0, 0].int() - grey[0, 2].int()).abs().max() <= 3
    write_image(tmp_path / "uint8.png", torch.full((1, 4, 5), 7, dtype=torch.uint8))
    assert np.array(Image.open(tmp_path / "uint8.png")).tolist() == [[[7, 7, 7]] * 5] * 4
    write_image(tmp_path / "range.png", torch.tensor([-3.0, -1.0, 0.0, 1.0, 2.0]).view(1, 1, 5))
    assert np.array(Image.open(tmp_path / "range.png"))[0, :, 0].tolist() == [0, 0, 128, 255, 255]


@pytest.mark.parametrize("fps", [10, 7, 30])
def test_gif_loops_with_true_durations(tmp_path, clip, fps):
    write_video(tmp_path / "clip.gif", clip[[0, 1, 1, 2, 3]], fps)  # equal neighbours become one longer frame
    with Image.open(tmp_path / "clip.gif") as picture:
        assert picture.info["loop"] == 0
        ends = [0]
        for i in range(picture.n_frames):
            picture.seek(i)
            ends.append(ends[-1] + picture.info["duration"])
    assert ends == pytest.approx([1000 * i / fps for i in (0, 1, 3, 4, 5)], abs=5)  # hundredths of a second, no drift
    read = read_clip(tmp_path / "clip.gif", range(4)).float() / 127.5 - 1
    assert read.shape == (4, 3, 33, 47) and (read - clip[:4]).abs().mean() < 0.1


@pytest.mark.parametrize("suffix", ["mp4", "gif"])
@pytest.mark.parametrize(("fps", "written"), [(0.0005, 0.1), (90000, 240)])
def test_rates_that_no_player_copes_with_are_limited(tmp_path, clip, suffix, fps, written, caplog):
    path = tmp_path / f"a.{suffix}"
    write_video(path, clip[:4], fps)
    assert f"a.{suffix}: {fps:g} frames a second are written as {written:g}" in caplog.text
    if suffix == "mp4":
        assert probe(path).fps == pytest.approx(written, rel=0.01)
    else:
        with Image.open(path) as picture:
            assert picture.info["duration"] == max(1000 / written, 10)


def test_nothing_is_written_for_bad_input(tmp_path, clip):
    target = tmp_path / "clip.mp4"
    target.write_bytes(b"precious")
    for frames, fps in (
        (clip[0], 10),
        (clip[:, :2], 10),
        (clip[:0], 10),
        (clip.int(), 10),
        (clip, 0),
        (clip, -5),
        (clip, float("nan")),
        (clip, float("inf")),
    ):
        with pytest.raises(ValueError, match=r"frames|fps"):
            write_video(target, frames, fps)
    with pytest.raises(ValueError, match=r"expected one of \.mp4, \.gif"):
        write_video(tmp_path / "clip.webp", clip, 10)
    with pytest.raises(ValueError, match=r"\.png"):
        write_image(tmp_path / "clip.jpg", clip[0])
    (tmp_path / "taken.gif").mkdir()
    with pytest.raises(OSError, match="taken"):
        write_video(tmp_path / "taken.gif", clip, 10)
    assert target.read_bytes() == b"precious"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["clip.mp4", "taken.gif"]


@pytest.mark.parametrize("name", ["http:x.mp4", "two\nlines.mp4", os.fsdecode(b"caf\xe9.mp4"), "-.mp4"])
def test_any_name_is_written(tmp_path, clip, name, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_video(name, clip, 10)
    assert os.listdir() == [name] and probe(tmp_path / name).n_frames == 12


def test_a_still_may_be_longer_than_a_gif_counts(tmp_path):
    still = torch.zeros(80, 1, 8, 8)
    still[70:] = 1
    write_video(tmp_path / "a.gif", still, 0.1)
    with Image.open(tmp_path / "a.gif") as picture:
        durations = [picture.seek(i) or picture.info["duration"] for i in range(picture.n_frames)]
    assert durations == [655_350, 100_000]


@pytest.mark.parametrize(
    ("suffix", "height", "width"), [(".mp4", 2, 16386), (".mp4", 6000, 6000), (".gif", 2, 65536), (".gif", 6000, 6000)]
)
def test_frames_that_are_too_large_are_refused(tmp_path, suffix, height, width):
    with pytest.raises(ValueError, match=rf"a{suffix}: frames of {height} x {width} pixels .* are too large"):
        write_video(tmp_path / f"a{suffix}", torch.zeros(1, 1, 1, 1, dtype=torch.uint8).expand(1, 3, height, width), 10)
    assert not list(tmp_path.iterdir())


# -------------------------------------------------------------------------------------------------------- pictures


def test_contact_sheet_places_every_frame():
    rows = torch.rand(2, 3, 1, 4, 5)
    sheet = contact_sheet(rows, value=-1.0)
    assert sheet.shape == (1, 4 + 2 + 4, 5 + 2 + 5 + 2 + 5)
    for r in range(2):
        for n in range(3):
            assert torch.equal(sheet[:, 6 * r : 6 * r + 4, 7 * n : 7 * n + 5], rows[r, n])
    assert (sheet[:, 4:6] == -1).all() and (sheet[:, :, 5:7] == -1).all()


def test_a_labelled_sheet_has_its_frames_and_words_for_them():
    rows = [
        (name, torch.full((3, 1, 20, 30), level)) for name, level in (("clip 1\ntruth", -0.2), ("caf\udce9 \x07", 0.6))
    ]
    sheet = labelled_sheet(rows, ["frame 1", "frame 2", "frame 3"], "step 500", scale=2)
    height, width = 2 * 40 + GAP, 3 * 60 + 2 * GAP
    left = sheet.shape[2] - width
    assert sheet.dtype == torch.uint8 and sheet.shape[:2] == (3, 2 * LINE + height) and left > 30
    frames = sheet[:, 2 * LINE :, left:]
    assert torch.equal(
        frames, contact_sheet([((row + 1) * 127.5).round().byte().expand(-1, 3, -1, -1) for _, row in rows], 2, 255)
    )
    dark = sheet.amin(0) < 100
    assert dark[:LINE].any() and all(dark[LINE : 2 * LINE, left + 60 * i : left + 60 * (i + 1)].any() for i in range(3))
    names = dark[2 * LINE :, :left]
    assert names[:20].any() and names[20:40].any() and names[42:].any()  # two lines, and one
    plain = labelled_sheet([("", rows[0][1])])
    assert plain.shape == (3, 20, 3 * 30 + 2 * GAP)  # nothing to say takes no room


def test_words_that_do_not_fit_are_left_out_and_not_written_over_each_other():
    narrow = labelled_sheet([("", torch.zeros(12, 1, 8, 8))], [f"frame {n:+d}" for n in range(12)])
    heads = (narrow[:, :LINE].amin(0) < 100).any(0)
    gaps = [len(run) for run in "".join("x" if column else " " for column in heads).split("x")]
    assert max(gaps) >= 2 * GAP and heads.any()
    assert cut_name("a" * 40) == "a" * 12 + "..." + "a" * 9 and cut_name("a" * 24) == "a" * 24


def test_labelled_videos_have_names_and_a_title_that_follows_the_frames():
    videos = [(name, torch.zeros(2, 3, 20, 60, dtype=torch.uint8)) for name in ("truth", "sample 1", "sample 2")]
    shown = labelled_videos(videos, ["frame 0", "frame +1"], scale=2, columns=2)
    height, width = labelled_size(3, 20, 60, 2, 2)
    assert shown.shape == (2, 3, height, width) == (2, 3, LINE + 2 * (LINE + 40) + GAP, 2 * 120 + GAP)
    assert (shown[0, :, :LINE] != shown[1, :, :LINE]).any() and torch.equal(shown[0, :, LINE:], shown[1, :, LINE:])
    assert (shown[:, :, LINE : 2 * LINE, :120] < 100).any() and (shown[:, :, LINE : 2 * LINE, 122:] < 100).any()
    narrow = labelled_videos([("a long name of a clip", videos[0][1])], ["a title that is wider than all"] * 2)
    assert (narrow[:, :, : 2 * LINE, -2:] == 255).all() and (narrow[:, :, :LINE] < 100).any()  # cut to fit
    assert (shown[0, :, -40:, :120] == 0).all() and (shown[0, :, -40:, 122:] == 255).all()  # an empty place


def test_given_frames_are_green_and_predicted_ones_orange():
    context, future = torch.zeros(2, 1, 4, 6), torch.zeros(2, 3, 1, 4, 6)
    rows = rows_of(context, future[0], future)
    assert list(rows) == ["truth", "sample 1", "sample 2"]
    assert list(rows_of(context, None, future)) == ["sample 1", "sample 2"]
    corner = (torch.tensor([GIVEN, PREDICTED]) + 1) * 127.5
    sample = rows["sample 2"]
    assert sample.shape == (5, 3, 4 + 2 * BORDER, 6 + 2 * BORDER)
    assert torch.equal(sample[:2, :, 0, 0], corner[0].round().byte().expand(2, 3))
    assert torch.equal(sample[2:, :, 0, 0], corner[1].round().byte().expand(3, 3))
    assert (sample[:, :, BORDER:-BORDER, BORDER:-BORDER] == 128).all()
    assert frame_names(2, 2, 4.0) == ["-1 (-0.25 s)", "0", "+1 (+0.25 s)", "+2 (+0.50 s)"]


def test_side_by_side_enlarges():
    videos = torch.rand(2, 6, 3, 4, 5)
    wide = side_by_side(videos, scale=3)
    assert wide.shape == (6, 3, 12, 15 + 2 + 15)
    assert torch.equal(wide[:, :, ::3, :15:3], videos[0]) and torch.equal(wide[:, :, 2::3, 17 + 2 :: 3], videos[1])


def test_many_videos_stand_in_rows_and_columns():
    videos = torch.randint(256, (5, 6, 3, 4, 7), dtype=torch.uint8)
    grid = side_by_side(videos, scale=2, value=9, columns=3)
    assert grid.shape[2:] == grid_size(5, 4, 7, scale=2, columns=3) == (8 + 2 + 8, 14 + 2 + 14 + 2 + 14)
    for i, video in enumerate(videos):
        top, left = (i // 3) * 10, (i % 3) * 16
        assert torch.equal(grid[:, :, top : top + 8 : 2, left : left + 14 : 2], video)
    assert (grid[:, :, 10:, 32:] == 9).all() and (grid[:, :, 8:10] == 9).all()
