"""BAIR and the TFRecord reader: real files written by another implementation (tfrecord_files.py), in a folder and in a
tar, and every kind of damage."""

import hashlib
import io
import pickle
import shutil
import struct
import tarfile

import pytest
import torch
from tfrecord_files import (
    bair_clip,
    bair_features,
    crc32c,
    example,
    framed,
    masked,
    write_records,
)

from latentcast.data.sets.bair import BAIR
from latentcast.data.sets.tfrecord import RecordFile, feature_values, masked_crc, parse_example
from latentcast.data.store.prepared import IncompleteError, PreparedVideos, prepare
from latentcast.data.video.reader import VideoError

# split -> files -> seeds of their records; as text, 10 stands before 2
LAYOUT = {
    "train": {"traj_0_to_1": [1, 2], "traj_2_to_2": [3], "traj_10_to_10": [4]},
    "test": {"traj_0_to_0": [5]},
}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A folder as the published archive extracts to."""
    root = tmp_path_factory.mktemp("bair")
    for split, files in LAYOUT.items():
        for stem, seeds in files.items():
            records = [example(bair_features(bair_clip(seed))) for seed in seeds]
            write_records(root / "softmotion30_44k" / split / f"{stem}.tfrecords", records)
    return root


@pytest.fixture(scope="module")
def archive(source):
    path = source.parent / "bair_robot_pushing_dataset_v0.tar"
    with tarfile.open(path, "w") as file:
        file.add(source / "softmotion30_44k", "./softmotion30_44k")
        note = tarfile.TarInfo("./softmotion30_44k/train/._traj_0_to_1.tfrecords")
        note.size = 5
        file.addfile(note, io.BytesIO(b"notes"))
    return path


def one_file(folder, content):
    """A source whose train split is one file with these bytes; its test file holds nothing."""
    for split, data in (("train", content), ("test", b"")):
        path = folder / "softmotion30_44k" / split / "traj_0_to_1.tfrecords"
        path.parent.mkdir(parents=True)
        path.write_bytes(data)
    return folder


def read(source, name="traj_0_to_1/000", split="train", **options):
    return BAIR(source, **options).read(split, name)


def equals(clip, seed, view="aux1"):
    expected = bair_clip(seed)
    (frames,) = clip.frames
    assert frames.shape == (30, 3, 64, 64) and frames.dtype == torch.uint8
    led = torch.cat([torch.zeros(1, 4), torch.from_numpy(expected["actions"])[:-1]])  # published: what leads on
    for name, numbers in (("action", led), ("state", torch.from_numpy(expected["states"]))):
        assert clip.conditions[name].dtype == torch.float32 and torch.equal(clip.conditions[name], numbers)
    assert set(clip.conditions) == {"action", "state"}
    return torch.equal(frames, torch.from_numpy(expected[view]).permute(0, 3, 1, 2))


def test_checksums_are_those_of_the_standard():
    assert crc32c(b"123456789") == 0xE3069283 and crc32c(bytes(32)) == 0x8A9136AA  # RFC 3720, B.4
    for data in (b"", b"\0", b"123456789", bytes(range(256)) * 5):
        assert masked_crc(data) == masked(crc32c(data))


def test_videos_are_listed_in_the_order_of_their_numbers(source, archive):
    names = {
        "train": ["traj_0_to_1/000", "traj_0_to_1/001", "traj_2_to_2/000", "traj_10_to_10/000"],
        "test": ["traj_0_to_0/000"],
    }
    for place in (source, source / "softmotion30_44k", archive):
        assert BAIR(place).videos() == names


@pytest.mark.parametrize("place", ["source", "archive"])
def test_frames_and_conditions_are_the_published_bytes(place, request):
    benchmark = pickle.loads(pickle.dumps(BAIR(request.getfixturevalue(place))))
    for split, names in benchmark.videos().items():
        seeds = [seed for records in LAYOUT[split].values() for seed in records]
        for name, seed in zip(names, seeds, strict=True):
            clip = benchmark.read(split, name)
            assert equals(clip, seed)
            assert clip.sha256 == hashlib.sha256(example(bair_features(bair_clip(seed)))).hexdigest()


def test_the_other_camera(source):
    assert equals(read(source, view="main"), 1, "main") and not equals(read(source, view="aux1"), 1, "main")
    assert BAIR(source, view="main").describe() == {"protocol": "standard", "view": "main", "frame_size": 64}


def test_what_the_set_declares(source):
    benchmark = BAIR(source)
    assert benchmark.conditions == {
        "action": {"shape": [4], "dtype": "float32", "per": "frame"},
        "state": {"shape": [3], "dtype": "float32", "per": "frame"},
    }
    assert benchmark.expected_counts() == {"train": 43264, "test": 256} and 43264 == 169 * 256


def test_listing_reads_no_data(tmp_path):
    """Two records of 8 GB each, holes in a file: listing them by reading would take minutes, and the memory too."""
    path, length = tmp_path / "holes.tfrecords", 2**33
    header = struct.pack("<Q", length)
    header += struct.pack("<I", masked(crc32c(header)))
    with open(path, "wb") as file:
        for i in range(2):
            file.seek(i * (length + 16))
            file.write(header)
        file.truncate(2 * (length + 16))
    assert RecordFile(path, path.stat().st_size).offsets() == [0, length + 16]


def test_all_kinds_of_values_are_read():
    features = {"floats": [0.5, -2.0], "bytes": [b"a", b""], "ints": [3, 2**40]}
    for packed in (True, False):
        parsed = parse_example(example(features, packed), "here")
        for name, kind in (("floats", "float"), ("bytes", "bytes"), ("ints", "int64")):
            assert list(feature_values(parsed, name, kind, "here")) == features[name]
    with pytest.raises(VideoError, match="here: expected the feature 'ints' with float values, found int64_list"):
        feature_values(parsed, "ints", "float", "here")


# ----------------------------------------------------------------------------------------------------------- damage


def small_records():
    return [framed(bytes([i]) * 50) for i in range(3)]  # 66 bytes each


@pytest.mark.parametrize(
    ("cut", "message"),
    [
        (2 * 66 + 5, "cut off: expected a record's 12-byte header at byte 132, found the end of the file at byte 137"),
        (2 * 66 + 40, "cut off: expected 50 bytes of data in the record at byte 132, found the end .* at byte 172"),
        (3 * 66 - 1, "cut off: expected 50 bytes of data in the record at byte 132, found the end .* at byte 197"),
    ],
)
def test_a_truncated_file_keeps_the_records_before_the_cut(tmp_path, cut, message):
    path = tmp_path / "short.tfrecords"
    path.write_bytes(b"".join(small_records())[:cut])
    file = RecordFile(path, cut)
    assert file.offsets() == [0, 66, 132]
    assert [file.read(offset) for offset in (0, 66)] == [b"\0" * 50, b"\1" * 50]
    with pytest.raises(VideoError, match=f"^{path}: {message}$"):
        file.read(132)


def test_wrong_crc_of_data_costs_one_record(tmp_path):
    content = bytearray(b"".join(small_records()))
    content[66 + 20] ^= 4
    path = tmp_path / "flipped.tfrecords"
    path.write_bytes(content)
    file = RecordFile(path, len(content))
    assert file.offsets() == [0, 66, 132] and file.read(132) == b"\2" * 50
    damaged = bytes(content[66 + 12 : 66 + 62])
    expected, found = masked(crc32c(damaged)), masked(crc32c(b"\1" * 50))
    message = f"damaged: wrong CRC of the data of the record at byte 66: expected {expected:08x} .*, found {found:08x}$"
    with pytest.raises(VideoError, match=message):
        file.read(66)


def test_wrong_crc_of_a_length_ends_the_file(tmp_path):
    content = bytearray(b"".join(small_records()))
    content[66] ^= 1
    path = tmp_path / "flipped.tfrecords"
    path.write_bytes(content)
    file = RecordFile(path, len(content))
    assert file.offsets() == [0, 66] and file.read(0) == b"\0" * 50
    with pytest.raises(VideoError, match="wrong CRC of the length of the record at byte 66"):
        file.read(66)


def without(features, *names):
    return {name: values for name, values in features.items() if name not in names}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: b"\xff" * 300, "expected a tensorflow.Example, found 300 bytes that are none"),
        (lambda f: example(f)[:-7], "expected a tensorflow.Example, found .* bytes that are none"),
        (
            lambda f: example(without(f, "7/action")),
            "expected the feature '7/action' with float values, found no values of that name among its 89 features, "
            r"\['0/action', '0/endeffector_pos', '0/image_aux1/encoded', .*\.\.\.",
        ),
        (lambda f: example({}), r"expected the feature '0/image_aux1/encoded' .* among its 0 features, \[\]"),
        (lambda f: example({"a\nb": [1.0]}), r"expected the feature '0/image_aux1/encoded' .* features, \['a\\nb'\]"),
        (
            lambda f: example(f | {"3/image_aux1/encoded": bytes(48 * 64 * 3)}),
            r"3/image_aux1/encoded: expected 12288 bytes \(RGB of 64 x 64 pixels\), found 9216 bytes",
        ),
        (lambda f: example(f | {"2/action": [1.0, 2.0]}), "2/action: expected 4 numbers, found 2"),
        (lambda f: example(f | {"2/action": [1, 2, 3, 4]}), "'2/action' with float values, found int64_list"),
    ],
)
def test_a_record_of_another_kind_is_named(tmp_path, change, message):
    """Its CRCs are right: something else was written."""
    features = bair_features(bair_clip(1), views=["aux1"])
    folder = one_file(tmp_path, framed(example(features)) + framed(change(features)))
    benchmark = BAIR(folder)
    assert benchmark.videos() == {split: ["traj_0_to_1/000", "traj_0_to_1/001"] for split in LAYOUT}
    assert equals(benchmark.read("train", "traj_0_to_1/000"), 1)
    start = len(framed(example(features)))
    with pytest.raises(VideoError, match=rf"traj_0_to_1.tfrecords: record 1 at byte {start}: .*{message}") as caught:
        benchmark.read("train", "traj_0_to_1/001")
    assert "\n" not in str(caught.value)


def test_a_truncated_file_is_told_and_mended_in_a_second_run(source, tmp_path):
    root, output = tmp_path / "bair", tmp_path / "prepared"
    shutil.copytree(source, root)
    path = root / "softmotion30_44k/train/traj_0_to_1.tfrecords"
    whole = path.read_bytes()
    path.write_bytes(whole[:1000])
    message = "train 43264, test 256; found: train 2, test 1; 2 could not be read, first: .*cut off: expected .* bytes"
    with pytest.raises(IncompleteError, match=f"^bair: expected videos: {message}"):
        prepare(BAIR(root), output)
    with pytest.raises(VideoError, match=r"expected 2 records by its name, found its end or damage after 1$"):
        BAIR(root).read("train", "traj_0_to_1/001")
    path.write_bytes(whole)
    with pytest.raises(IncompleteError, match="found: train 4, test 1; mend"):  # a replica stays smaller than the set
        prepare(BAIR(root), output)
    assert prepare(BAIR(root), output, partial=True)["counts"] == {"train": 4, "test": 1}
    videos = PreparedVideos(output, "train", clip_length=30)
    clip = bair_clip(2)
    assert videos.videos[1].name == "traj_0_to_1/001"
    assert torch.equal(videos[1]["conditions"]["action"][1:], torch.from_numpy(clip["actions"])[:-1])
    frames = torch.from_numpy(clip["aux1"]).permute(0, 3, 1, 2) / 127.5 - 1
    assert torch.allclose(videos[1]["frames"], frames, atol=1e-6)


def test_damage_in_the_archive_is_named_with_its_member(source, tmp_path):
    folder = tmp_path / "softmotion30_44k"
    shutil.copytree(source / "softmotion30_44k", folder)
    path = folder / "train" / "traj_2_to_2.tfrecords"
    path.write_bytes(path.read_bytes()[:1000])
    archive = tmp_path / "damaged.tar"
    with tarfile.open(archive, "w") as file:
        file.add(folder, "softmotion30_44k")
    benchmark = BAIR(archive)
    assert len(benchmark.videos()["train"]) == 4
    assert equals(benchmark.read("train", "traj_10_to_10/000"), 4)
    message = f"^{archive}: softmotion30_44k/train/traj_2_to_2.tfrecords: cut off: .* end of the file at byte 1000$"
    with pytest.raises(VideoError, match=message):
        benchmark.read("train", "traj_2_to_2/000")


def test_a_source_that_is_something_else_is_refused_in_one_line(source, archive, tmp_path):
    zipped = tmp_path / "bair.tar.gz"
    with tarfile.open(zipped, "w:gz", compresslevel=1) as file:
        file.add(source / "softmotion30_44k" / "test", "softmotion30_44k/test")
    with pytest.raises(OSError, match=f"^{zipped}: expected an uncompressed tar, found gzip; decompress it, or give"):
        BAIR(zipped).videos()
    short = tmp_path / "short.tar"
    short.write_bytes(archive.read_bytes()[: archive.stat().st_size // 2])
    with pytest.raises(OSError, match=f"^{short}: expected an uncompressed tar, found none, or one cut off"):
        BAIR(short).videos()
    with pytest.raises(FileNotFoundError, match=r"expected softmotion30_44k/train/traj_A_to_B.tfrecords, found none"):
        BAIR(tmp_path).videos()
    shutil.copytree(source / "softmotion30_44k/train", tmp_path / "half/softmotion30_44k/train")
    with pytest.raises(FileNotFoundError, match=r"expected softmotion30_44k/test/traj_A_to_B.tfrecords, found none"):
        BAIR(tmp_path / "half").videos()


def test_bad_arguments(source):
    with pytest.raises(ValueError, match="view: expected one of aux1, main, found 'side'"):
        BAIR(source, view="side")
    with pytest.raises(ValueError, match="frame_size: the frames of bair are 64 x 64 pixels, found 128"):
        BAIR(source, frame_size=128)
    with pytest.raises(ValueError, match="--split"):
        BAIR(source, "svg")


def test_a_tar_whose_header_promises_more_than_it_holds_is_not_read_into_memory(source, tmp_path):
    (tmp_path / "a.tar").write_bytes(bytes(1000))
    file = RecordFile(tmp_path / "a.tar", size=10**15, start=512, member="a")
    with pytest.raises(VideoError, match="cut off: expected 1000000000000 bytes at byte 12, found 476"):
        with open(file.path, "rb", buffering=0) as opened:
            file._bytes(opened, 12, 10**12)
