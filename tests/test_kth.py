"""KTH on a replica with the published layout: real avi files that show their frames' numbers, and the list in its
published form."""

import hashlib
import pickle
import shutil

import pytest
import torch
from PIL import Image
from video_files import counter_frames, cut_off, encode, overwrite_middle, read_counter

from latentcast.data.sets.kth import CLASSES, KTH, read_sequences
from latentcast.data.store.prepared import IncompleteError, PreparedVideos, crop_of, prepare
from latentcast.data.video.reader import CROPS, VideoError, probe, read_clip

HEADING = """
This database contains sequences of six classes of actions performed by
25 subjects in four different conditions (see below).

Training:   person11, 12, 13, 14, 15, 16, 17, 18
Validation: person19, 20, 21, 23, 24, 25, 01, 04
Test:       person22, 02, 03, 05, 06, 07, 08, 09, 10


"""
PERSONS = (1, 12, 17, 19, 22)
N_FRAMES = 24
RANGES = ((1, 5), (6, 11), (15, 24), (12, 17))  # a gap, an overlap, and not ascending: all are in the published list
THREE = ("person11_boxing_d4", "person13_handwaving_d3", "person14_handwaving_d3", "person15_boxing_d4")
THREE = (*THREE, "person22_boxing_d1")


def first_number(person, action):
    """The number that the first frame of a file of the replica shows, and by which it is known."""
    return (31 * person + 7 * CLASSES.index(action)) % 200


def video(path, number, n_frames=N_FRAMES, height=120, width=160, **options):
    """DivX in an avi, packed B-frames included, as the published files are."""
    path.parent.mkdir(parents=True, exist_ok=True)
    options = {"g": "12", "b": "4000000", "bf": "2"} | options
    return encode(path, counter_frames(n_frames, height, width, number), codec="mpeg4", options=options)


def write_list(path, rows):
    """Rows of (file, ranges or None), with the blanks and tabs of the published list."""
    lines = []
    for file, ranges in rows:
        listed = ", ".join(f"{first}-{last}" for first, last in ranges or ())
        lines.append(f"{file}    \t\tframes\t{listed}" if ranges else f"{file}\t*missing*")
        lines += [""] * file.endswith("walking_d4")
    path.write_text(HEADING + "\n".join(lines) + "\n")
    return path


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    root = tmp_path_factory.mktemp("kth")
    rows = []
    for person in PERSONS:
        for action in CLASSES:
            file = f"person{person:02d}_{action}_d2"
            video(root / action / f"{file}_uncomp.avi", first_number(person, action))
            rows.append((file, RANGES))
    write_list(root / "00sequences.txt", rows)
    return root


@pytest.fixture
def copy(source, tmp_path):
    """A replica to damage."""
    shutil.copytree(source, tmp_path / "kth")
    return tmp_path / "kth"


def avi(root, person=12, action="jogging"):
    return root / action / f"person{person:02d}_{action}_d2_uncomp.avi"


def test_persons_fall_into_the_splits_of_each_protocol(source):
    persons = {
        "svg": {"train": {1, 12, 17, 19}, "test": {22}},
        "stdiff": {"train": {1, 12}, "test": {17, 19, 22}},
        "official": {"train": {12, 17}, "val": {1, 19}, "test": {22}},
    }
    for protocol, splits in persons.items():
        videos = KTH(source, protocol).videos()
        assert {split: {int(name[6:8]) for name in names} for split, names in videos.items()} == splits
        assert all(len(names) == len(set(names)) == 24 * len(splits[split]) for split, names in videos.items())
    assert KTH(source).protocol == "svg"


def test_counts_are_those_of_the_published_list(tmp_path):
    """599 files with 4 sequences each but for five: 2,391. The official split is that of the list's own heading."""
    rows = []
    for person in range(1, 26):
        for action in CLASSES:
            (tmp_path / action).mkdir(exist_ok=True)
            for scene in range(1, 5):
                file = f"person{person:02d}_{action}_d{scene}"
                ranges = RANGES[:3] if file in THREE else RANGES
                rows.append((file, None if file == "person13_handclapping_d3" else ranges))
    write_list(tmp_path / "00sequences.txt", rows)
    expected = {
        "svg": {"train": 1912, "test": 479},
        "stdiff": {"train": 1528, "test": 863},
        "official": {"train": 760, "val": 768, "test": 863},
    }
    for protocol, counts in expected.items():
        benchmark = KTH(tmp_path, protocol)
        assert benchmark.expected_counts() == counts and sum(counts.values()) == 2391
        assert {split: len(names) for split, names in benchmark.videos().items()} == counts


def test_a_video_holds_the_frames_of_its_range(source):
    benchmark = pickle.loads(pickle.dumps(KTH(source)))
    names = benchmark.videos()["train"]
    assert names[:4] == [f"person01_boxing_d2_{first}-{last}" for first, last in RANGES]
    for name in names[::5]:
        action = name.split("_")[1]
        start, (first, last) = first_number(int(name[6:8]), action), map(int, name.rpartition("_")[2].split("-"))
        clip = benchmark.read("train", name)
        (frames,) = clip.frames
        assert frames.shape == (last - first + 1, 1, 64, 64) and frames.dtype == torch.uint8
        assert read_counter(frames) == list(range(start + first - 1, start + last))
        assert clip.conditions["label"].dtype == torch.int64 and clip.conditions["label"].shape == ()
        assert benchmark.provenance["classes"][clip.conditions["label"]] == action
        path = avi(source, int(name[6:8]), action)
        assert clip.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("frame_size", [64, 128])
@pytest.mark.parametrize("protocol", ["svg", "stdiff", "official"])
def test_frames_become_square_as_pillow_does_it(source, protocol, frame_size):
    whole = read_clip(avi(source), range(14, 24)).permute(0, 2, 3, 1).numpy()
    box = (20, 0, 140, 120) if protocol == "stdiff" else (0, 0, 160, 120)
    benchmark = KTH(source, protocol, frame_size=frame_size)
    assert benchmark.crop == ("center" if protocol == "stdiff" else "none")
    (frames,) = benchmark.read("train", "person12_jogging_d2_15-24").frames
    for frame, picture in zip(frames, whole, strict=True):
        grey = Image.fromarray(picture).convert("L")  # Pillow's is BT.601 luma too
        small = grey.crop(box).resize((frame_size, frame_size), Image.BILINEAR)
        expected = torch.frombuffer(bytearray(small.tobytes()), dtype=torch.uint8).view(frame_size, frame_size)
        error = frame[0].float() - expected.float()
        assert error.abs().max() <= 1 and error.mean().abs() < 0.1  # the mean tells rounding from truncation


def test_any_shape_by_any_crop(source):
    name = "person12_jogging_d2_15-24"
    whole = [KTH(source, frame_size=[48, 64], crop=crop).read("train", name).frames[0] for crop in CROPS]
    assert whole[0].shape == (10, 1, 48, 64) and all(torch.equal(frames, whole[0]) for frames in whole)
    padded = KTH(source, "stdiff", crop="pad")
    (frames,) = padded.read("train", name).frames
    assert frames.shape == (10, 1, 64, 64) and not frames[:, :, :8].any() and not frames[:, :, -8:].any()
    assert torch.equal(frames[:, :, 8:-8], whole[0]) and padded.describe()["crop"] == "pad"
    for crop, resize in (("none", "squeeze"), ("center", "crop")):  # two words for one thing
        described = KTH(source, resize=resize).describe()
        assert KTH(source, crop=crop).describe() == described and crop_of(described) == crop
    assert crop_of(padded.describe()) == "pad" and crop_of({"protocol": "standard"}) == "center"
    with pytest.raises(ValueError, match="crop: expected null beside resize=crop, found 'pad'"):
        KTH(source, crop="pad", resize="crop")


def test_resize_is_an_option_and_is_described(source):
    found = {}
    for protocol, resize in (("svg", "crop"), ("stdiff", None)):
        benchmark = KTH(source, protocol, resize=resize)
        assert benchmark.describe() == {"protocol": protocol, "resize": "crop", "frame_size": 64}
        (found[protocol],) = benchmark.read("train", "person12_boxing_d2_1-5").frames
    assert torch.equal(found["svg"], found["stdiff"])


def test_the_list_may_lie_elsewhere(copy, tmp_path):
    moved = (copy / "00sequences.txt").rename(tmp_path / "ranges.txt")
    benchmark = KTH(copy, sequences=moved)
    assert len(benchmark.videos()["test"]) == 24
    assert benchmark.provenance["sequences_sha256"] == hashlib.sha256(moved.read_bytes()).hexdigest()
    with pytest.raises(
        FileNotFoundError, match=r"00sequences.txt: no such file; .* published at https://www.csc.kth.se"
    ):
        KTH(copy)


def test_the_file_that_was_published_cut_off_gives_its_304_frames(tmp_path):
    whole = video(tmp_path / "whole.avi", 0, n_frames=320)
    path = tmp_path / "boxing" / "person01_boxing_d4_uncomp.avi"
    path.parent.mkdir()
    cut_off(whole, path, 0.95)
    with pytest.raises(VideoError, match=r"cut off after frame 3[01]\d"):
        probe(path)
    write_list(tmp_path / "00sequences.txt", [("person01_boxing_d4", [(171, 245), (246, 370)])])
    for name, first, last in (("171-245", 170, 245), ("246-370", 245, 304)):
        (frames,) = KTH(tmp_path).read("train", f"person01_boxing_d4_{name}").frames
        assert read_counter(frames) == [i % 256 for i in range(first, last)]
    cut_off(whole, path, 0.8)
    with pytest.raises(VideoError, match=r"person01_boxing_d4_uncomp.avi: frame 303 asked for, but only 2"):
        KTH(tmp_path).read("train", "person01_boxing_d4_246-370")


# ----------------------------------------------------------------------------------------------------------- damage


def test_missing_class_folders_are_named(copy):
    shutil.rmtree(copy / "running")
    shutil.rmtree(copy / "boxing")
    folders = "boxing, handclapping, handwaving, jogging, running, walking"
    with pytest.raises(FileNotFoundError, match=f"^{copy}: expected the folders {folders}, found no boxing, running$"):
        KTH(copy).videos()
    (copy / "boxing.zip").touch()
    with pytest.raises(
        FileNotFoundError, match=r"found no boxing, running; unzip boxing.zip, each into a folder of its"
    ):
        KTH(copy).videos()


def test_a_missing_file_stays_on_the_list(copy):
    names = KTH(copy).videos()
    avi(copy).unlink()
    assert KTH(copy).videos() == names
    with pytest.raises(VideoError, match=r"person12_jogging_d2_uncomp.avi: no such file$"):
        KTH(copy).read("train", "person12_jogging_d2_1-5")


def test_a_missing_file_is_told_and_added_in_a_second_run(copy, tmp_path):
    avi(copy).rename(tmp_path / "elsewhere.avi")
    message = "train 1912, test 479; found: train 92, test 24; 4 could not be read, first: .*jogging_d2_uncomp.avi: no"
    with pytest.raises(IncompleteError, match=f"^kth: expected videos: {message} such file"):
        prepare(KTH(copy), tmp_path / "prepared")
    (tmp_path / "elsewhere.avi").rename(avi(copy))
    with pytest.raises(IncompleteError, match="found: train 96, test 24; mend"):  # a replica stays smaller than the set
        prepare(KTH(copy), tmp_path / "prepared")
    assert prepare(KTH(copy), tmp_path / "prepared", partial=True)["counts"] == {"train": 96, "test": 24}
    videos = PreparedVideos(tmp_path / "prepared", "test", clip_length=5)
    assert videos.fps == 25 and videos[0]["frames"].shape == (5, 1, 64, 64)
    assert videos.conditions["label"]["n_values"] == 6
    labels = [int(videos.read_conditions(i, 0, 5)["label"]) for i in range(24)]
    assert labels == [label for label in range(6) for _ in RANGES]
    start = first_number(22, "boxing") + RANGES[2][0] - 1
    assert read_counter(videos.read_video(2, 0, 5)) == list(range(start, start + 5))


@pytest.mark.parametrize("damage", [cut_off, overwrite_middle])
def test_a_damaged_file_is_named(copy, damage):
    damage(avi(copy), avi(copy))
    for first, last in RANGES:
        with pytest.raises(VideoError, match=r"person12_jogging_d2_uncomp.avi: damaged"):
            KTH(copy).read("train", f"person12_jogging_d2_{first}-{last}")


def test_a_range_past_the_end_of_its_file_is_named(copy):
    message = "person12_jogging_d2_uncomp.avi: expected the frames 20-25 of 00sequences.txt, found 24 frames$"
    with pytest.raises(VideoError, match=message):
        KTH(copy).read("train", "person12_jogging_d2_20-25")


def test_frames_of_another_size_are_named(copy):
    video(avi(copy), 0, height=144, width=176)
    with pytest.raises(VideoError, match=r"jogging_d2_uncomp.avi: expected 160 x 120 pixels, found 176 x 144$"):
        KTH(copy).read("train", "person12_jogging_d2_1-5")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("person01_boxing_d1\t\tframes\t1-95, 96", "expected personPP_CLASS_dD frames A-B, C-D, ..., found 'person01_"),
        ("person01_boxing_d1\t\t1-95", "expected personPP_CLASS_dD frames"),
        ("person01_dancing_d1\t\tframes\t1-95", "expected personPP_CLASS_dD frames"),
        ("person26_boxing_d1\t\tframes\t1-95", "expected personPP_CLASS_dD frames"),
        ("person01_boxing_d1\t\tframes\t95-1", "expected ranges A-B with 1 <= A <= B, found 'person01_boxing_d1"),
        ("person01_boxing_d1\t\tframes\t0-95", "expected ranges A-B with 1 <= A <= B"),
        ("person02_boxing_d1\t\tframes\t5-9", "expected each file once, found person02_boxing_d1 again"),
    ],
)
def test_a_bad_row_of_the_list_is_named(tmp_path, row, message):
    path = write_list(tmp_path / "list.txt", [("person02_boxing_d1", RANGES), ("person03_boxing_d1", None)])
    assert read_sequences(path) == {"person02_boxing_d1": (2, list(RANGES)), "person03_boxing_d1": (3, [])}
    path.write_text(path.read_text() + row + "\n")
    with pytest.raises(ValueError, match=f"^{path}: row 12: {message}"):
        read_sequences(path)


def test_bad_arguments(source):
    for arguments, message in (
        ({"protocol": "srvp"}, "--split: kth has svg, stdiff, official, found 'srvp'"),
        ({"resize": "pad"}, "resize: expected one of squeeze, crop, found 'pad'"),
        ({"frame_size": 0}, "frame_size: expected pixels, .* found 0"),
        ({"frame_size": "small"}, "frame_size: .* found 'small'"),
    ):
        with pytest.raises(ValueError, match=message):
            KTH(source, **arguments)
