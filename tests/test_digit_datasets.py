"""MNIST's IDX files and their errors; the data sets moving_mnist and smmnist made from them."""

import gzip
import hashlib
import json
import pickle
import tracemalloc
import zlib

import numpy as np
import pytest
import torch
from digit_files import TRAIN, idx, small_mnist
from PIL import Image

from latentcast import MovingDigits, prepared_videos
from latentcast.data.checking import check_folder
from latentcast.data.sets import digits as module
from latentcast.data.sets.moving_mnist import MovingMNIST, StochasticMovingMNIST
from latentcast.data.store.prepared import prepare


@pytest.fixture
def idx_files(tmp_path, monkeypatch):
    return small_mnist(tmp_path / "mnist", monkeypatch)


def images_of(folder):
    content = gzip.decompress((folder / f"{TRAIN}.gz").read_bytes())
    return np.frombuffer(content[16:], np.uint8).reshape(-1, 28, 28)


def test_mnist_from_a_folder(idx_files, monkeypatch):
    pools = [module.mnist_digits(split, 28, idx_files) for split in ("train", "val", "test")]
    assert [tuple(pool.shape) for pool in pools] == [(33, 28, 28), (7, 28, 28), (9, 28, 28)]
    assert np.array_equal(torch.cat(pools[:2]).numpy(), images_of(idx_files))
    dataset = MovingDigits("train", 10, source="mnist", mnist_dir=idx_files, digit_size=20)
    assert dataset[0]["frames"].shape == (10, 1, 64, 64)
    monkeypatch.chdir(idx_files.parent)
    idx_files.rename("2024")
    assert len(module.mnist_digits("test", 28, 2024)) == 9


@pytest.mark.parametrize("size", [20, 32])
def test_mnist_is_resized_as_pillow_does(idx_files, size):
    resized = module.mnist_digits("train", size, idx_files).numpy().astype(int)
    for ours, image in zip(resized, images_of(idx_files)):
        theirs = np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling.BILINEAR)).astype(int)
        assert np.abs(ours - theirs).max() <= 1


def test_mnist_is_downloaded_once(idx_files, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    expected = module.mnist_digits("train", 28, idx_files)
    assert torch.equal(module.mnist_digits("train", 28, url=idx_files.as_uri()), expected)
    (idx_files / f"{TRAIN}.gz").unlink()
    assert torch.equal(module.mnist_digits("train", 28, url=idx_files.as_uri()), expected)
    with pytest.raises(OSError, match=r"cannot be downloaded from file://.*t10k.*; give data.mnist_dir=FOLDER"):
        module.mnist_digits("test", 28, url=idx_files.as_uri())
    assert [p.name for p in (tmp_path / "cache" / "latentcast" / "mnist").iterdir()] == [f"{TRAIN}.gz"]


def test_wrong_mnist_files_are_refused_in_one_line(idx_files, tmp_path):
    path = idx_files / f"{TRAIN}.gz"
    zipped, images = path.read_bytes(), images_of(idx_files)
    changed = images.copy()
    changed[3, 4, 5] ^= 1
    md5 = [hashlib.md5(idx(part)).hexdigest() for part in (images, changed)]
    cases = {
        "expected magic 0x00000803 (an IDX file of images), found 0x00000801": idx(images, 0x801),
        "expected 40 images of 28x28, found 39 of 28x28": idx(images[1:]),
        "expected 40 images of 28x28, found 40 of 28x27": idx(images[:, :, 1:]),
        "expected 31376 bytes unzipped, found 31375": idx(images)[:-1],
        "expected the 16 bytes of an IDX header, found 7": idx(images)[:7],
        f"not MNIST's {TRAIN}: expected md5 {md5[0]} of the unzipped content, found {md5[1]}": idx(changed),
    }
    cases = {message: gzip.compress(content) for message, content in cases.items()}
    cases["damaged gzip file (Compressed file ended"] = zipped[:-300]
    cases["damaged gzip file (Error -3"] = zipped[:10] + b"\xff" + zipped[11:]
    cases["damaged gzip file (CRC check failed"] = zipped[:-8] + bytes(4) + zipped[-4:]
    bomb = zlib.compressobj(1, wbits=31)
    parts = [bomb.compress(idx(images)), *(bomb.compress(bytes(10**6)) for _ in range(200)), bomb.flush()]
    cases["expected 31376 bytes unzipped, found more"] = b"".join(parts)
    for message, content in cases.items():
        path.write_bytes(content)
        tracemalloc.start()
        with pytest.raises(OSError) as error:
            MovingMNIST(idx_files)
        assert tracemalloc.get_traced_memory()[1] < 10**7
        tracemalloc.stop()
        assert str(error.value).startswith(f"{path}: {message}") and "\n" not in str(error.value)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=rf"mnist: expected MNIST's {TRAIN}.gz or {TRAIN}, found neither"):
        MovingMNIST(idx_files)


# A video of each kind, its test set kept small.
KINDS = [(MovingMNIST, "moving_mnist", "deterministic", 20), (StochasticMovingMNIST, "smmnist", "stochastic", 30)]
FEW = {"n_train": 6, "n_val": 3, "n_test": 5}


def whole(benchmark, split, name):
    frames = torch.cat(list(benchmark.read(split, name).frames))
    assert frames.dtype == torch.uint8
    return frames


@pytest.mark.parametrize(("kind", "name", "motion", "length"), KINDS)
def test_defaults_follow_the_protocol(idx_files, kind, name, motion, length):
    benchmark = kind(idx_files)
    assert (benchmark.name, benchmark.frame_size, benchmark.channels) == (name, 64, 1)
    assert benchmark.expected_counts() == {"val": 256, "test": 1000 if name == "moving_mnist" else 256}
    description = benchmark.describe()
    assert json.loads(json.dumps(description)) == description
    assert description == {
        "protocol": "svg",
        "motion": motion,
        "n_digits": 2,
        "length": length,
        "n_train": 60000,
        "n_val": 256,
        "n_test": benchmark.expected_counts()["test"],
        "frame_size": 64,
        "digit_size": 32,
        "max_speed": 4,
        "seed": 0,
    }
    assert benchmark.provenance["mnist_md5"] == {name: md5 for name, (_, md5) in module.MNIST_FILES.items()}


@pytest.mark.parametrize("n_digits", [2, 3])
@pytest.mark.parametrize(("kind", "name", "motion", "length"), KINDS)
def test_val_and_test_are_fixed_sets_of_moving_digits(idx_files, kind, name, motion, length, n_digits):
    benchmark = kind(idx_files, n_digits=n_digits, **FEW)
    videos = benchmark.videos()
    assert (
        {split: len(names) for split, names in videos.items()} == benchmark.expected_counts() == {"val": 3, "test": 5}
    )
    in_a_worker = pickle.loads(pickle.dumps(benchmark))
    for split, names in videos.items():
        options = {"source": "mnist", "mnist_dir": idx_files, "video_length": length, "n_heldout_videos": 5}
        dataset = MovingDigits(split, length, motion=motion, n_digits=n_digits, digit_size=32, **options)
        for index, video in enumerate(names):
            frames = whole(benchmark, split, video)
            assert frames.shape == (length, 1, 64, 64)
            assert torch.equal(frames.float() / 255 * 2 - 1, dataset.read_video(index, 0, length))
            assert torch.equal(frames, whole(in_a_worker, split, video))
    assert not torch.equal(whole(kind(idx_files, seed=1, **FEW), "test", names[0]), whole(benchmark, "test", names[0]))


@pytest.mark.parametrize(("kind", "name", "motion", "length"), KINDS)
def test_train_is_made_from_the_prepared_set_alone(idx_files, tmp_path, kind, name, motion, length):
    benchmark = kind(idx_files, n_digits=3, seed=4, **FEW)
    for target, path in benchmark.files().items():
        (tmp_path / "set" / target).parent.mkdir(parents=True)
        (tmp_path / "set" / target).write_bytes(path.read_bytes())
    assert list(benchmark.files()) == [f"mnist/{TRAIN}.gz"] and list(benchmark.generated()) == ["train"]
    arguments = json.loads(json.dumps(benchmark.generated()["train"]))
    dataset = MovingDigits("train", 10, size=64, channels=1, mnist_dir=tmp_path / "set" / "mnist", **arguments)
    assert len(dataset.videos) == 6 and dataset.videos[0].n_frames == length
    described = {"motion": motion, "n_digits": 3, "digit_size": 32, "seed": 4, "source": "mnist"}
    assert described.items() <= dataset.describe().items()
    assert dataset._digits.shape == (33, 32, 32)


def test_every_split_of_a_set_takes_a_stride(idx_files, tmp_path):
    prepare(MovingMNIST(idx_files, **FEW), tmp_path / "set")
    for split in ("train", "val"):
        dataset = prepared_videos(tmp_path / "set", split, 10, frame_stride=2)
        assert dataset.fps == 5 and dataset.videos[0].n_frames == 10
        assert torch.equal(dataset[0]["frames"], prepared_videos(tmp_path / "set", split, 20)[0]["frames"][::2])
        with pytest.raises(ValueError, match="clip_length"):
            prepared_videos(tmp_path / "set", split, 11, frame_stride=2)


def test_a_set_that_makes_its_videos_makes_fresh_ones_by_option(idx_files, tmp_path):
    prepare(StochasticMovingMNIST(idx_files, max_speed=1, length=8, **FEW), tmp_path / "set")
    fresh, usual = (prepared_videos(tmp_path / "set", "train", 8, fresh=fresh) for fresh in (True, False))
    assert torch.equal(fresh[2]["frames"], usual[2]["frames"])
    fresh.set_epoch(1)
    assert fresh.max_speed == 1 and not torch.equal(fresh[2]["frames"], usual[2]["frames"])
    held_out = prepared_videos(tmp_path / "set", "test", 8, fresh=True)
    assert torch.equal(held_out[1]["frames"], prepared_videos(tmp_path / "set", "test", 8)[1]["frames"])
    manifest = json.loads((tmp_path / "set" / "manifest.json").read_text())
    for kind in ("counts", "expected_counts"):
        manifest[kind].pop("train", None)
    (tmp_path / "set" / "manifest.json").write_text(json.dumps(manifest | {"generated": {}}))
    with pytest.raises(ValueError, match="fresh: expected false, for smmnist stores its training videos"):
        prepared_videos(tmp_path / "set", "train", 8, fresh=True)


def test_a_re_run_mends_the_copy_of_mnist_in_a_set(idx_files, tmp_path):
    prepare(MovingMNIST(idx_files, **FEW), tmp_path / "set")
    copy = tmp_path / "set" / "mnist" / f"{TRAIN}.gz"
    copy.write_bytes(b"")
    (problem,) = check_folder(tmp_path / "set")["problems"]
    assert problem.startswith(f"{copy}: expected the 16 bytes of an IDX header")
    prepare(MovingMNIST(idx_files, **FEW), tmp_path / "set")
    assert not check_folder(tmp_path / "set")["problems"]


def test_splits_share_no_digit(idx_files):
    pools = {split: module.mnist_digits(split, 32, idx_files) for split in ("train", "val", "test")}
    images = {split: {image.numpy().tobytes() for image in pool} for split, pool in pools.items()}
    assert sum(map(len, images.values())) == len(set().union(*images.values())) == 49
    benchmark = MovingMNIST(idx_files, n_digits=1, **FEW)
    for split, names in benchmark.videos().items():
        for name in names:
            first = whole(benchmark, split, name)[0, 0]
            windows = first.unfold(0, 32, 1).unfold(1, 32, 1)
            shown = {s for s, pool in pools.items() for d in pool if (windows == d).all(-1).all(-1).any()}
            assert shown == {split}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_digits": 0}, "n_digits: expected a whole number of at least 1, found 0"),
        ({"length": 2.5}, "length: expected a whole number of at least 1, found 2.5"),
        ({"n_test": "many"}, "n_test: expected a whole number of at least 1, found 'many'"),
        ({"digit_size": 64}, "digit_size: expected 1 to 63 for frames of 64, found 64"),
        ({"protocol": "kth"}, "--split: moving_mnist has svg, found 'kth'"),
    ],
)
def test_bad_options(idx_files, options, message):
    with pytest.raises(ValueError, match=message):
        MovingMNIST(idx_files, **options)
