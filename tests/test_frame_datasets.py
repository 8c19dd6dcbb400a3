"""Cityscapes, KITTI and plain folders on replicas with the published layout, and videos kept as pictures."""

import hashlib
import pickle
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from replica_files import cityscapes_sequence, kitti_drive, wide_frames, write_pictures
from video_files import counter_frames, cut_off, encode, read_counter

from latentcast import PreparedVideos, VideoFolder
from latentcast.data.sets.cityscapes import CITIES, Cityscapes
from latentcast.data.sets.folder import Folder
from latentcast.data.sets.kitti import KITTI
from latentcast.data.store.prepared import IncompleteError, prepare
from latentcast.data.video.pictures import numbered_pictures, read_pictures
from latentcast.data.video.reader import VideoError


def frames_of(benchmark, split, name):
    return torch.cat(list(benchmark.read(split, name).frames))


def all_of(videos):
    return [name for names in videos.values() for name in names]


def sha256(paths):
    return hashlib.sha256(b"".join(path.read_bytes() for path in paths)).hexdigest()


# -------------------------------------------------------------------------------------------------------- pictures


def test_pictures_are_read_in_pieces_as_pillow_reads_them(tmp_path):
    frames = wide_frames(21, 50, 66)
    write_pictures(tmp_path / "clip", frames, "frame{:d}.png")
    paths = numbered_pictures(tmp_path / "clip")
    assert [path.name for path in paths[8:12]] == ["frame8.png", "frame9.png", "frame10.png", "frame11.png"]
    whole = list(read_pictures(paths))
    assert [len(piece) for piece in whole] == [16, 5] and all(piece.is_contiguous() for piece in whole)
    assert torch.equal(torch.cat(whole).permute(0, 2, 3, 1), torch.from_numpy(frames))
    small = torch.cat(list(read_pictures(paths, size=32)))
    expected = [Image.fromarray(frame[:, 8:58]).resize((32, 32), Image.BILINEAR) for frame in frames]
    assert (small.permute(0, 2, 3, 1).int() - torch.from_numpy(np.stack(expected)).int()).abs().max() <= 1


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "1"])
def test_pictures_of_other_kinds_become_rgb(tmp_path, mode):
    Image.fromarray(counter_frames(1, 48, 64, 5)[0]).convert(mode).save(tmp_path / "7.png")
    assert read_counter(torch.cat(list(read_pictures([tmp_path / "7.png"])))) == [5]


TURNS = {  # EXIF orientation -> what brings the stored pixels upright
    1: lambda a: a,
    2: np.fliplr,
    3: lambda a: np.rot90(a, 2),
    4: np.flipud,
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: np.rot90(a, 2).swapaxes(0, 1),
    8: np.rot90,
}


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
@pytest.mark.parametrize("suffix", ["jpg", "png"])
def test_pictures_are_upright_as_their_exif_says(tmp_path, suffix):
    stored = Image.fromarray(wide_frames(1, 48, 64)[0])
    for orientation, turn in TURNS.items():
        exif = Image.Exif()
        exif[0x0112] = orientation
        stored.save(tmp_path / f"a.{suffix}", exif=exif)
        (frame,) = next(read_pictures([tmp_path / f"a.{suffix}"]))
        expected = turn(np.asarray(Image.open(tmp_path / f"a.{suffix}").convert("RGB")))
        assert np.array_equal(frame.permute(1, 2, 0).numpy(), expected), orientation
    damaged = exif.tobytes()[:-9]  # the pixels are whole
    stored.save(tmp_path / f"a.{suffix}", exif=damaged)
    assert next(read_pictures([tmp_path / f"a.{suffix}"])).shape == (1, 3, 48, 64)


def test_a_folder_of_a_phones_pictures_is_upright(tmp_path):
    """Stored lying, to be turned by a quarter to the right: the number reads from top to bottom in the file."""
    exif = Image.Exif()
    exif[0x0112] = 6
    (tmp_path / "DCIM").mkdir()
    for i, frame in enumerate(counter_frames(6, 64, 64, 40)):
        Image.fromarray(np.rot90(frame).copy()).save(tmp_path / f"DCIM/IMG_{i:04d}.JPG", exif=exif, quality=95)
    assert read_counter(frames_of(Folder(tmp_path), "train", "DCIM")) == list(range(40, 46))


def test_damaged_pictures_are_named(tmp_path):
    noise = wide_frames(1, 64, 200)[0]
    for name in ("cut.png", "cut.jpg", "flipped.png", "whole.png"):
        Image.fromarray(noise).save(tmp_path / name)
    for name in ("cut.png", "cut.jpg"):
        cut_off(tmp_path / name, tmp_path / name)
    content = bytearray((tmp_path / "flipped.png").read_bytes())
    content[len(content) // 2] ^= 255
    (tmp_path / "flipped.png").write_bytes(content)
    (tmp_path / "empty.png").touch()
    (tmp_path / "text.jpg").write_text("no picture")
    Image.fromarray(np.zeros((64, 200), np.uint16)).save(tmp_path / "deep.png")
    Image.fromarray(noise[:, :100]).save(tmp_path / "narrow.png")
    messages = {
        "cut.png": r"not a readable picture \(.+\)",
        "cut.jpg": r"not a readable picture \(.+\)",
        "flipped.png": r"not a readable picture \(.+\)",
        "empty.png": "not a picture",
        "text.jpg": "not a picture",
        "missing.png": r"not a readable picture \(No such file or directory\)",
        "deep.png": "expected a picture of 8 bits a channel, found mode I;16",
        "narrow.png": r"expected 64 x 200 pixels \(H x W\) as in whole.png, found 64 x 100",
    }
    for name, message in messages.items():
        with pytest.raises(VideoError, match=f"^{tmp_path / name}: {message}$") as caught:
            list(read_pictures([tmp_path / "whole.png", tmp_path / name], size=32))
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["0.png", "1.png", "3.png"], "expected 2.png after 1.png, found 3.png"),
        (["a008.jpg", "a010.jpg", "a012.jpg", "a013.jpg"], "expected a009.jpg after a008.jpg, found a010.jpg"),
        (["08.png", "10.png", "12.png", "16.png"], "expected 14.png after 12.png, found 16.png"),
        (["1.png", "01.jpg"], "two pictures have number 1: 01.jpg and 1.png"),
        (
            ["image-000_64x64.png", "image-002_64x64.png", "image-003_64x64.png"],
            "expected image-001_64x64.png after .*",
        ),
        (["a1_64x64.png", "a1_128x128.png"], "two pictures have number 1: a1_128x128.png and a1_64x64.png"),
        (["cover.png", "notes1.txt"], "no numbered pictures; expected .png, .jpg, .jpeg"),
    ],
)
def test_gaps_between_pictures_are_named(tmp_path, names, message):
    for name in names:
        (tmp_path / name).touch()
    with pytest.raises(VideoError, match=f"^{tmp_path}: {message}$"):
        numbered_pictures(tmp_path)


def test_numbers_may_be_evenly_spaced(tmp_path):
    for name in ("x_12.png", "x_4.PNG", "x_8.JPeG", ".x_5.png", "x_9.txt", "cover.png"):
        (tmp_path / name).touch()
    (tmp_path / "x_6.png").mkdir()
    assert [path.name for path in numbered_pictures(tmp_path)] == ["x_4.PNG", "x_8.JPeG", "x_12.png"]


@pytest.mark.parametrize("first", [0, 1])
def test_a_size_may_follow_the_number(tmp_path, first):
    """As in the pictures that SVG's scripts make of KTH."""
    frames = counter_frames(12, 64, 64, 7)
    write_pictures(tmp_path / "person01", frames, "image-{:03d}_64x64.png", range(first, first + 12))
    assert read_counter(frames_of(Folder(tmp_path), "train", "person01")) == list(range(7, 19))


# ------------------------------------------------------------------------------------------------------ Cityscapes


@pytest.fixture(scope="module")
def cityscapes(tmp_path_factory):
    root = tmp_path_factory.mktemp("cityscapes")
    cityscapes_sequence(root, "train", "aachen", 0, 0)
    cityscapes_sequence(root, "train", "aachen", 1, 0, first=30)
    # One recording with three sequences, two of which follow on each other, as in hamburg and frankfurt.
    for i, start in enumerate((275, 305, 997)):
        cityscapes_sequence(root, "train", "hamburg", 0, start, first=60 + 30 * i)
    cityscapes_sequence(root, "val", "frankfurt", 1, 2493, first=200)
    cityscapes_sequence(root, "test", "munich", 0, 0, first=220)
    folder = root / "leftImg8bit_sequence"
    (folder / "val" / "frankfurt" / "notes.txt").touch()
    (folder / "train" / "hamburg" / "hamburg_000000_000275_gtFine_color.png").touch()
    return root


def test_cityscapes_sequences_are_found_and_read(cityscapes):
    benchmark = pickle.loads(pickle.dumps(Cityscapes(cityscapes)))
    videos = benchmark.videos()
    assert videos == {
        "train": [
            "aachen/aachen_000000_000000",
            "aachen/aachen_000001_000000",
            "hamburg/hamburg_000000_000275",
            "hamburg/hamburg_000000_000305",
            "hamburg/hamburg_000000_000997",
        ],
        "val": ["frankfurt/frankfurt_000001_002493"],
        "test": ["munich/munich_000000_000000"],
    }
    assert Cityscapes(cityscapes / "leftImg8bit_sequence").videos() == videos
    for i, name in enumerate(videos["train"]):
        frames = frames_of(benchmark, "train", name)
        assert (frames.shape, frames.dtype) == ((30, 3, 128, 128), torch.uint8)
        assert read_counter(frames) == list(range(30 * i, 30 * i + 30))
    paths = sorted((cityscapes / "leftImg8bit_sequence" / "val" / "frankfurt").glob("*.png"))
    assert benchmark.read("val", videos["val"][0]).sha256 == sha256(paths)
    assert frames_of(Cityscapes(cityscapes, frame_size=64), "val", videos["val"][0]).shape == (30, 3, 64, 64)
    wide = frames_of(Cityscapes(cityscapes, frame_size=[64, 128]), "val", videos["val"][0])  # as the pictures are
    assert wide.shape == (30, 3, 64, 128) and read_counter(wide[..., 32:96]) == list(range(200, 230))
    padded = frames_of(Cityscapes(cityscapes, frame_size=64, crop="pad"), "val", videos["val"][0])
    assert not padded[:, :, :16].any() and not padded[:, :, -16:].any() and padded[:, :, 16:-16].any()
    assert (benchmark.fps, benchmark.expected_counts()) == (17, {"train": 2975, "val": 500, "test": 1525})
    assert [len(cities.split()) for cities in CITIES.values()] == [18, 3, 6]


def test_cityscapes_prepared_in_part_says_so(cityscapes, tmp_path, caplog):
    with pytest.raises(IncompleteError, match="train 2975, val 500, test 1525; found: train 5, val 1, test 1"):
        prepare(Cityscapes(cityscapes), tmp_path / "set")
    assert "leftImg8bit_sequence/train/bochum: no such folder; the published set has it" in caplog.text
    figures = prepare(Cityscapes(cityscapes), tmp_path / "set", partial=True)
    assert figures["counts"] == {"train": 5, "val": 1, "test": 1}
    dataset = PreparedVideos(tmp_path / "set", "train", 30, 128)
    assert read_counter(dataset.read_video(3, 10, 20)) == list(range(100, 110))


def test_cityscapes_damage_is_named(cityscapes, tmp_path, caplog):
    root = shutil.copytree(cityscapes, tmp_path / "copy")
    shutil.rmtree(root / "leftImg8bit_sequence" / "test")
    folder = root / "leftImg8bit_sequence" / "train"
    (folder / "aachen" / "aachen_000000_000012_leftImg8bit.png").unlink()
    (folder / "hamburg" / "hamburg_000000_000334_leftImg8bit.png").unlink()
    Image.new("RGB", (128, 60)).save(folder / "aachen" / "aachen_000001_000007_leftImg8bit.png")
    benchmark = Cityscapes(root)
    assert len(benchmark.videos()["train"]) == 5 and benchmark.videos()["test"] == []
    assert "leftImg8bit_sequence/test: no such folder" in caplog.text and "/test/munich" not in caplog.text
    for name, message in (
        (
            "aachen/aachen_000000_000000",
            "aachen_000000_000012_leftImg8bit.png: no such file; expected 30 consecutive frames from "
            "aachen_000000_000000_leftImg8bit.png, found 29",
        ),
        ("hamburg/hamburg_000000_000305", "hamburg_000000_000334_leftImg8bit.png: no such file; .* found 29"),
        ("aachen/aachen_000001_000000", r"000007_leftImg8bit.png: expected 64 x 128 pixels .* found 60 x 128"),
    ):
        with pytest.raises(VideoError, match=message):
            frames_of(benchmark, "train", name)
    assert len(frames_of(benchmark, "train", "hamburg/hamburg_000000_000275")) == 30
    shutil.rmtree(root / "leftImg8bit_sequence" / "train")
    shutil.rmtree(root / "leftImg8bit_sequence" / "val")
    with pytest.raises(
        FileNotFoundError, match=r"copy: expected leftImg8bit_sequence/\{train,val,test\}/CITY, found no"
    ):
        Cityscapes(root).videos()
    with pytest.raises(ValueError, match=r"frame_size: expected pixels, .* found 'big'"):
        Cityscapes(root, frame_size="big")


# ----------------------------------------------------------------------------------------------------------- KITTI

FIVE, SEVENTY, SIXTY, OTHER = (f"2011_09_26/2011_09_26_drive_{n:04d}_sync" for n in (5, 70, 60, 91))


@pytest.fixture(scope="module")
def kitti(tmp_path_factory):
    root = tmp_path_factory.mktemp("kitti")
    for i, number in enumerate((5, 60, 70, 91)):
        kitti_drive(root, "2011_09_26", number, 12 + i, first=20 * i, cameras=("image_02", "image_03"))
    kitti_drive(root, "2011_09_28", 53, 5)  # a person in front of a standing car: in no protocol
    return root


def test_kitti_protocols_are_the_published_lists(tmp_path):
    """Counts, and the drives that are held out, as their papers' code lists them."""
    prednet, wu = KITTI(tmp_path), KITTI(tmp_path, "wu2020")
    assert prednet.protocol == "prednet" and prednet.expected_counts() == {"train": 57, "val": 1, "test": 3}
    assert wu.expected_counts() == {"train": 24, "val": 0, "test": 4}
    (tmp_path / SIXTY).mkdir(parents=True)
    drives = {p: p.videos() for p in (prednet, wu)}
    held_out = {p: {s: [name[-9:-5] for name in drives[p][s]] for s in ("val", "test")} for p in drives}
    assert held_out[prednet] == {"val": ["0005"], "test": ["0070", "0079", "0104"]}
    assert held_out[wu] == {"val": [], "test": ["0060", "0084", "0093", "0096"]}
    for splits in drives.values():
        names = all_of(splits)
        assert len(set(names)) == len(names)
        assert all(name.split("/")[1].startswith(name.split("/")[0] + "_drive_") for name in names)
    assert set(all_of(drives[prednet])) > set(all_of(drives[wu]))


def test_kitti_drives_are_read(kitti):
    benchmark = pickle.loads(pickle.dumps(KITTI(kitti)))
    videos = benchmark.videos()
    assert videos["val"] == [FIVE] and SEVENTY in videos["test"] and {SIXTY, OTHER} < set(videos["train"])
    assert SIXTY in KITTI(kitti, "wu2020").videos()["test"]
    frames = frames_of(benchmark, "test", SEVENTY)
    assert (frames.shape, frames.dtype) == ((14, 3, 128, 128), torch.uint8)
    assert read_counter(frames) == list(range(40, 54))
    right = KITTI(kitti, camera="image_03", frame_size=64)
    assert read_counter(frames_of(right, "test", SEVENTY)) == list(range(140, 154))
    assert right.describe() != benchmark.describe()
    road = KITTI(kitti, frame_size=[32, 96], crop="none")
    assert frames_of(road, "test", SEVENTY).shape == (14, 3, 32, 96)
    assert (road.describe()["frame_size"], road.describe()["crop"]) == ([32, 96], "none")
    assert "crop" not in benchmark.describe()
    paths = sorted((kitti / FIVE / "image_02" / "data").iterdir())
    assert benchmark.read("val", FIVE).sha256 == sha256(paths) and benchmark.fps == 10


def test_kitti_prepared_in_part_names_a_missing_drive(kitti, tmp_path):
    message = r"train 57, test 3; found: train 2, test 1; 57 could not be read, first: .*_0001_sync.*no such folder"
    with pytest.raises(IncompleteError, match=message):
        prepare(KITTI(kitti), tmp_path / "set")
    figures = prepare(KITTI(kitti), tmp_path / "set", partial=True)
    assert figures["counts"] == {"train": 2, "val": 1, "test": 1} and figures["protocol"] == "prednet"
    assert read_counter(PreparedVideos(tmp_path / "set", "val", 9).read_video(0, 3, 12)) == list(range(3, 12))


def test_kitti_incomplete_drives_are_named(kitti, tmp_path):
    root = shutil.copytree(kitti, tmp_path / "copy")
    data = {name: root / name / "image_02" / "data" for name in (FIVE, SIXTY, SEVENTY, OTHER)}
    (data[FIVE] / "0000000004.png").unlink()  # a gap
    (data[SIXTY] / "0000000000.png").unlink()  # a late start
    (data[SEVENTY] / "0000000013.png").unlink()  # an early end, which timestamps.txt tells
    Image.new("RGB", (200, 65)).save(data[OTHER] / "0000000009.png")
    benchmark = KITTI(root)
    for split, name, message in (
        ("val", FIVE, "expected 0000000004.png after 0000000003.png, found 0000000005.png"),
        ("train", SIXTY, "incomplete drive: expected 13 frames, 0 to 12, found 12, 1 to 12"),
        ("test", SEVENTY, "incomplete drive: expected 14 frames, 0 to 13, found 13, 0 to 12"),
        ("train", OTHER, r"0000000009.png: expected 64 x 200 pixels \(H x W\) as in 0000000000.png, found 65 x 200"),
        ("test", FIVE.replace("0005", "0104"), "no such folder; the test split of 'prednet' has this drive"),
    ):
        with pytest.raises(VideoError, match=f"{name}.*{message}$"):
            frames_of(benchmark, split, name)
    (root / SEVENTY / "image_02" / "timestamps.txt").unlink()
    assert len(frames_of(benchmark, "test", SEVENTY)) == 13


def test_kitti_wrong_source_and_options(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"expected drives like 2011_09_26/2011_09_26_drive_0001_sync/image_02"):
        KITTI(tmp_path).videos()
    with pytest.raises(ValueError, match="--split: kitti has prednet, wu2020, found 'stdiff'"):
        KITTI(tmp_path, "stdiff")
    with pytest.raises(ValueError, match="camera: expected one of image_02, image_03, found 'image_00'"):
        KITTI(tmp_path, camera="image_00")


# ---------------------------------------------------------------------------------------------------------- folder


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """Videos of 25 frames a second and folders of pictures; numbers tell them apart."""
    root = tmp_path_factory.mktemp("tree")
    (root / "films").mkdir()
    encode(root / "films" / "a.mp4", counter_frames(24, 64, 64))
    encode(root / "b.mkv", counter_frames(20, 64, 64, 50))
    write_pictures(root / "shots" / "c", counter_frames(18, 64, 64, 100), "{:04d}.png")
    write_pictures(root / "shots" / "d", counter_frames(12, 64, 64, 150), "shot-{:d}.jpg", range(10, 34, 2))
    (root / "shots" / "poster.png").touch()
    (root / "notes.txt").touch()
    return root


NAMES = ["b.mkv", "films/a.mp4", "shots/c", "shots/d"]


def test_folder_finds_videos_and_folders_of_pictures(tree):
    benchmark = pickle.loads(pickle.dumps(Folder(tree, image_fps=25)))
    assert benchmark.protocol == "hash" and benchmark.expected_counts() == {}
    videos = benchmark.videos()
    assert sorted(all_of(videos)) == NAMES and set(videos) == {"train", "val", "test"}
    for name, first, n_frames in zip(NAMES, (50, 0, 100, 150), (20, 24, 18, 12)):
        clip = benchmark.read("train", name)
        frames = torch.cat(list(clip.frames))
        assert (frames.shape, frames.dtype) == ((n_frames, 3, 64, 64), torch.uint8)
        assert read_counter(frames) == list(range(first, first + n_frames))
        path = tree / name
        assert clip.sha256 == sha256(sorted(path.iterdir()) if path.is_dir() else [path])
    assert benchmark.fps == pytest.approx(25)


def test_folder_splits_by_hash_as_video_folder_does(tree, tmp_path):
    content = (tree / "b.mkv").read_bytes()
    for i in range(40):
        (tmp_path / f"{i}.mkv").write_bytes(content)
    options = {"val_fraction": 0.3, "test_fraction": 0.2, "seed": 4}
    videos = Folder(tmp_path, **options).videos()
    for split in ("train", "val", "test"):
        assert videos[split] == [v.name for v in VideoFolder(tmp_path, split, 4, 16, **options).videos]
        assert len(videos[split]) > 2
    assert Folder(tmp_path, **(options | {"seed": 5})).videos() != videos


def test_folder_takes_splits_from_folders(tree, tmp_path):
    for split, name in (("train", "b.mkv"), ("val", "shots/c"), ("test", "films"), ("other", "b.mkv")):
        target = tmp_path / split / name.replace("/", "-")
        copy = shutil.copytree if (tree / name).is_dir() else shutil.copy
        target.parent.mkdir()
        copy(tree / name, target)
    videos = {"train": ["train/b.mkv"], "val": ["val/shots-c"], "test": ["test/films/a.mp4"]}
    folders = Folder(tmp_path)
    assert folders.protocol == "folders" and folders.videos() == videos
    assert "seed" not in folders.describe() and Folder(tmp_path, "hash").describe()["seed"] == 0
    assert sorted(all_of(Folder(tmp_path, "hash").videos())) == sorted(["other/b.mkv", *all_of(videos)])
    shutil.rmtree(tmp_path / "val")
    for protocol in (None, "folders"):
        with pytest.raises(ValueError, match="expected the folders train, val, test, found train, test; --split hash"):
            Folder(tmp_path, protocol)
    with pytest.raises(ValueError, match="found none of them; --split hash"):
        Folder(tree, "folders")


def test_folder_stride_rate_and_grey(tree):
    strided = Folder(tree, frame_stride=3, image_fps=25)
    assert strided.fps == pytest.approx(25 / 3)
    assert read_counter(frames_of(strided, "train", "films/a.mp4")) == list(range(0, 24, 3))
    assert read_counter(frames_of(strided, "train", "shots/c")) == list(range(100, 118, 3))
    resampled = Folder(tree, fps=5)  # pictures at 10 a second, videos at 25
    assert resampled.fps == 5
    assert read_counter(frames_of(resampled, "train", "films/a.mp4")) == list(range(0, 24, 5))
    assert read_counter(frames_of(resampled, "train", "shots/c")) == list(range(100, 118, 2))
    colours = Folder(tree, frame_size=32)
    for name in NAMES:
        grey = frames_of(Folder(tree, frame_size=32, channels=1), "train", name)
        red, green, blue = frames_of(colours, "train", name).double().unbind(1)
        assert grey.dtype == torch.uint8 and grey.shape[1:] == (1, 32, 32)
        assert (grey[:, 0] - (0.299 * red + 0.587 * green + 0.114 * blue)).abs().max() <= 0.5 + 1e-4


def test_folder_serves_the_frames_of_video_folder(tree, tmp_path):
    """The same clips whether videos are read from their files or prepared before."""
    shutil.copy(tree / "b.mkv", tmp_path)
    options = {"val_fraction": 0.0, "test_fraction": 0.0, "frame_stride": 2}
    prepare(Folder(tmp_path, frame_size=48, **options), tmp_path / "set")
    prepared = PreparedVideos(tmp_path / "set", "train", 5)
    original = VideoFolder(tmp_path, "train", 5, 48, backend="pyav", **options)
    assert prepared.videos == original.videos and len(prepared) == len(original)
    for i in range(len(original)):
        assert torch.allclose(prepared[i]["frames"], original[i]["frames"], atol=1e-6)


def test_folder_brings_a_mixture_of_rates_to_the_most_common_one(tree, tmp_path, caplog):
    mixed = Folder(tree)  # two at 25, two at 10: the lower rate, for which no frame is repeated
    assert mixed.fps == 10 and mixed.describe()["fps"] == 10 and mixed.describe()["frame_stride"] == 1
    said = [record.message for record in caplog.records if "different frame rates" in record.message]
    assert len(said) == 1 and "all are read at 10 frames a second, as 2 of 4 are" in said[0]
    assert said[0].endswith("the others: b.mkv (25), films/a.mp4 (25)")
    assert read_counter(frames_of(mixed, "train", "films/a.mp4")) == [round(2.5 * i - 1e-3) for i in range(10)]
    assert read_counter(frames_of(mixed, "train", "shots/d")) == list(range(150, 162))
    assert Folder(tree, frame_stride=2).fps == 5 and Folder(tree, fps=8).fps == 8
    assert Folder(tree, image_fps=25).describe()["fps"] is None
    (tmp_path / "broken.mp4").write_text("no video")
    shutil.copy(tree / "b.mkv", tmp_path / "fine.mkv")
    assert Folder(tmp_path).fps == pytest.approx(25)


def test_folder_names_what_cannot_be_read(tree, tmp_path):
    root = shutil.copytree(tree, tmp_path / "copy")
    cut_off(root / "films" / "a.mp4", root / "films" / "a.mp4")
    (root / "shots" / "c" / "0005.png").unlink()
    (root / "shots" / "d" / "shot-12.jpg").write_text("no picture")
    benchmark = Folder(root, image_fps=25)
    benchmark.videos()
    (root / "b.mkv").unlink()
    for name, message in (
        ("films/a.mp4", "films/a.mp4: not a readable video"),
        ("shots/c", "shots/c: expected 0005.png after 0004.png, found 0006.png"),
        ("shots/d", "shots/d/shot-12.jpg: not a picture"),
        ("b.mkv", "b.mkv: no such file or folder"),
    ):
        with pytest.raises(VideoError, match=message):
            frames_of(benchmark, "train", name)
    (tmp_path / "empty").mkdir()
    with pytest.raises(
        ValueError, match=r"empty: expected videos \(\.mp4, .*\) or folders of numbered pictures, found"
    ):
        Folder(tmp_path / "empty").videos()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"frame_size": 0}, "frame_size: expected pixels, .* found 0"),
        ({"frame_stride": 1.5}, "frame_stride: expected at least 1, found 1.5"),
        ({"channels": 4}, "channels: expected 1"),
        ({"fps": 0.0}, "fps: expected a rate above 0, found 0.0"),
        ({"fps": 5, "frame_stride": 2}, "fps: expected frame_stride=1 beside it, found 2"),
        ({"image_fps": -1}, "image_fps: expected a rate above 0, found -1"),
        ({"val_fraction": 0.8, "test_fraction": 0.3}, "val_fraction, test_fraction: not shares of one whole"),
        ({"protocol": "random"}, "--split: folder has folders, hash, found 'random'"),
    ],
)
def test_folder_wrong_options(tree, options, message):
    with pytest.raises(ValueError, match=message):
        Folder(tree, **options)
