"""Kinetics-600 on a replica with the published layout: lists, labels, the Lanczos crop, rates, and bad input."""

import hashlib
import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from replica_files import kinetics_videos
from video_files import cut_off, read_counter

from latentcast import PreparedVideos, read_clip
from latentcast.data.sets.kinetics600 import Kinetics600
from latentcast.data.store.prepared import IncompleteError, prepare
from latentcast.data.video.reader import VideoError

TRAIN = [("zumba", "-3B32lodo2M", 59), ("abseiling", "0wR5jVB-WPk", 417), ("pulling, as a game", "__NrybzYzUg", 1203)]
VAL = [("abseiling", "3caPS4FHFF8", 36), ("burping", "3yaoNwz99xM", 0)]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    root = tmp_path_factory.mktemp("kinetics")
    kinetics_videos(root, "train", TRAIN)
    kinetics_videos(root, "val", VAL, first=100, fps=50, list_name="kinetics_600_{}.csv")
    return root


@pytest.fixture
def copy(tmp_path):
    """A replica of one split that a test may damage."""
    kinetics_videos(tmp_path, "val", VAL)
    return tmp_path


def frames_of(benchmark, split, name):
    return torch.cat(list(benchmark.read(split, name).frames))


def test_lists_say_what_is_there(source):
    benchmark = pickle.loads(pickle.dumps(Kinetics600(source)))
    videos = benchmark.videos()
    assert videos == {
        "train": [
            "zumba/-3B32lodo2M_000059_000069",
            "abseiling/0wR5jVB-WPk_000417_000427",
            "pulling, as a game/__NrybzYzUg_001203_001213",
        ],
        "val": ["abseiling/3caPS4FHFF8_000036_000046", "burping/3yaoNwz99xM_000000_000010"],
    }
    assert benchmark.expected_counts() == {"train": 3, "val": 2}
    classes = benchmark.provenance["classes"]
    assert classes == ["abseiling", "burping", "pulling, as a game", "zumba"]
    for split, names in videos.items():
        for i, name in enumerate(names):
            clip = benchmark.read(split, name)
            label = clip.conditions["label"]
            assert (label.dtype, label.shape) == (torch.int64, ())
            assert classes[label] == (TRAIN if split == "train" else VAL)[i][0]
            assert clip.sha256 == hashlib.sha256((source / split / f"{name}.mp4").read_bytes()).hexdigest()
    lists = benchmark.provenance["lists"]
    assert lists["train.csv"] == hashlib.sha256((source / "train.csv").read_bytes()).hexdigest()
    assert set(lists) == {"train.csv", "kinetics_600_val.csv"}


def test_frames_are_central_squares_resized_by_lanczos(source):
    """Against Pillow on the frames as they are; bilinear differs visibly."""
    name = Kinetics600(source).videos()["train"][1]
    whole = read_clip(source / "train" / f"{name}.mp4", range(20), backend="pyav")
    expected, bilinear = [], []
    for frame in whole:
        square = Image.fromarray(frame.permute(1, 2, 0).numpy()).crop((12, 0, 84, 72))
        for resized, how in ((expected, Image.LANCZOS), (bilinear, Image.BILINEAR)):
            picture = square.resize((64, 64), how)
            resized.append(torch.tensor(list(picture.tobytes()), dtype=torch.uint8).view(64, 64, 3).permute(2, 0, 1))
    pieces = list(Kinetics600(source).read("train", name).frames)
    assert [len(piece) for piece in pieces] == [16, 4] and all(piece.is_contiguous() for piece in pieces)
    frames = torch.cat(pieces)
    assert frames.dtype == torch.uint8 and torch.equal(frames, torch.stack(expected))
    assert (frames.float() - torch.stack(bilinear).float()).abs().max() > 10
    assert read_counter(frames) == list(range(20, 40))
    assert frames_of(Kinetics600(source, frame_size=48), "train", name).shape == (20, 3, 48, 48)
    wide = Kinetics600(source, frame_size=[48, 64], crop="none")
    frames = frames_of(wide, "train", name)
    squashed = [Image.fromarray(frame.permute(1, 2, 0).numpy()).resize((64, 48), Image.LANCZOS) for frame in whole]
    assert torch.equal(frames, torch.stack([torch.from_numpy(np.array(one)).permute(2, 0, 1) for one in squashed]))
    assert (wide.describe()["frame_size"], wide.describe()["crop"]) == ([48, 64], "none")


def test_every_file_is_brought_to_one_rate(source):
    name = Kinetics600(source).videos()["val"][0]  # 20 frames at 50 a second, from number 100 on
    assert read_counter(frames_of(Kinetics600(source), "val", name)) == list(range(100, 120, 2))
    assert Kinetics600(source).fps == 25
    slow = Kinetics600(source, fps=10)
    assert read_counter(frames_of(slow, "val", name)) == list(range(100, 120, 5)) and slow.fps == 10
    native = Kinetics600(source, fps=None)
    assert read_counter(frames_of(native, "val", name)) == list(range(100, 120))
    assert "nominal" in native.provenance["fps"] and "fps" not in slow.provenance
    assert len({str(benchmark.describe()) for benchmark in (Kinetics600(source), slow, native)}) == 3


@pytest.mark.parametrize(("max_frames", "n_frames"), [(1, 1), (7, 7), (16, 16), (19, 19), (20, 20), (50, 20)])
def test_only_the_first_frames_are_taken(source, max_frames, n_frames):
    benchmark = Kinetics600(source, max_frames=max_frames)
    name = benchmark.videos()["train"][0]
    assert read_counter(frames_of(benchmark, "train", name)) == list(range(n_frames))


def test_prepared_set_holds_frames_and_labels(source, tmp_path):
    figures = prepare(Kinetics600(source), tmp_path / "set")
    assert figures["counts"] == {"train": 3, "val": 2}
    dataset = PreparedVideos(tmp_path / "set", "val", 8)
    assert dataset.conditions["label"]["n_values"] == 600
    labels = [int(dataset.read_conditions(i, 0, 8)["label"]) for i in range(2)]
    assert labels == [0, 1] and [video.n_frames for video in dataset.videos] == [10, 10]
    assert read_counter(dataset.read_video(1, 2, 10)) == list(range(124, 140, 2))


def test_row_without_its_video_is_named(copy, tmp_path):
    path = copy / "val" / "burping" / "3yaoNwz99xM_000000_000010.mp4"
    path.unlink()
    benchmark = Kinetics600(copy)
    assert len(benchmark.videos()["val"]) == 2
    with pytest.raises(VideoError) as caught:
        benchmark.read("val", "burping/3yaoNwz99xM_000000_000010")
    assert str(caught.value) == f"{copy / 'val.csv'}: row 3: expected {path}, found no such file"
    path.parent.rmdir()
    with pytest.raises(VideoError, match=r"val.csv: row 3: expected .*000010.mp4, found no such class folder$"):
        benchmark.read("val", "burping/3yaoNwz99xM_000000_000010")
    with pytest.raises(IncompleteError, match=r"expected videos: val 2; found: val 1; .*val.csv: row 3: "):
        prepare(benchmark, tmp_path / "set")
    assert prepare(benchmark, tmp_path / "set", partial=True)["counts"] == {"val": 1}


def test_damaged_video_is_named(copy):
    path = copy / "val" / "burping" / "3yaoNwz99xM_000000_000010.mp4"
    cut_off(path, path)
    with pytest.raises(VideoError, match=r"3yaoNwz99xM_000000_000010.mp4: not a readable video \(.*\)$"):
        frames_of(Kinetics600(copy), "val", "burping/3yaoNwz99xM_000000_000010")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "expected the columns label, youtube_id, time_start, time_end, found an empty file"),
        (
            "youtube_id,time_start,time_end\n",
            r"expected the columns label.*found \['youtube_id', 'time_start', 'time_end'\]",
        ),
        (
            "label,youtube_id,time_start,time_end\na,b,0,10\na,b,0.5,10\n",
            "row 3: expected whole seconds.*'0.5' and '10'",
        ),
        ("label,youtube_id,time_start,time_end\na,b\n", "row 2: expected whole seconds.*None and None"),
        (
            "label,youtube_id,time_start,time_end\n,b,0,10\n",
            "row 2: expected a label and a youtube_id, found '' and 'b'",
        ),
        (b"label,youtube_id,time_start,time_end\n\xff,b,0,10\n", "not a readable csv file"),
    ],
)
def test_list_that_cannot_be_read_is_named(copy, content, message):
    (copy / "val.csv").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=rf"val\.csv: {message}") as caught:
        Kinetics600(copy)
    assert "\n" not in str(caught.value)


def test_a_set_does_not_go_on_with_other_classes(copy):
    """Labels count classes, so those that are stored would come to mean others."""
    prepare(Kinetics600(copy), copy / "set")
    kinetics_videos(copy, "train", [("aardvark", "3caPS4FHFF8", 0)])
    with pytest.raises(ValueError, match=r"made with protocol.classes_sha256 .*; prepare it into another --output"):
        prepare(Kinetics600(copy), copy / "set")


def test_missing_list_is_named(copy, tmp_path):
    (copy / "train").mkdir()
    with pytest.raises(FileNotFoundError, match=r"train: expected its list train.csv or kinetics_600_train.csv"):
        Kinetics600(copy)
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"empty: expected train.csv or kinetics_600_train.csv, found neither"):
        Kinetics600(tmp_path / "empty")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        Kinetics600(tmp_path / "nowhere")


def test_repeated_rows_count_once(copy, caplog):
    text = (copy / "val.csv").read_text()
    (copy / "val.csv").write_text(text + text.splitlines()[1] + "\n")
    benchmark = Kinetics600(copy)
    assert len(benchmark.videos()["val"]) == benchmark.expected_counts()["val"] == 2
    assert "val.csv: 1 rows repeat an earlier one" in caplog.text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fps": 0}, "fps: expected a rate above 0, found 0"),
        ({"fps": "fast"}, "fps: expected a rate above 0, found 'fast'"),
        ({"max_frames": 0}, "max_frames: expected at least 1, found 0"),
        ({"frame_size": 0}, "frame_size: expected pixels, .* found 0"),
        ({"protocol": "mini"}, "--split: kinetics600 has standard, found 'mini'"),
    ],
)
def test_wrong_options(source, options, message):
    with pytest.raises(ValueError, match=message):
        Kinetics600(source, **options)
