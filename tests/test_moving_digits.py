"""MovingDigits: determinism, motion against a step-by-step simulation, disjoint splits, MNIST files and download."""

import gzip
import hashlib
import json

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from latentcast import MovingDigits, instantiate
from latentcast.data import moving_digits as module
from latentcast.data.base import VideoDataset

SMALL = {"n_videos": 12, "n_heldout_videos": 5, "video_length": 30}


def digits(split="train", clip_length=10, **kwargs):
    return MovingDigits(split, clip_length, **(SMALL | kwargs))


def corner(frame, digit):
    """Where the digit lies in a frame: the place of the best match, by brute force."""
    side = digit.shape[-1]
    windows = frame.unfold(0, side, 1).unfold(1, side, 1)
    error = (windows - digit).pow(2).sum((-1, -2))
    assert error.min() < 1e-6
    return divmod(int(error.argmin()), error.shape[1])


def test_shapes_and_ranges():
    for split, n in (("train", 12), ("val", 5), ("test", 5)):
        dataset = digits(split, channels=3, size=48)
        assert isinstance(dataset, VideoDataset)
        assert len(dataset) == len(dataset.videos) == n
        frames = dataset[2]["frames"]
        assert frames.shape == (10, 3, 48, 48) and frames.dtype == torch.float32
        assert frames.min() == -1 and 0.5 < frames.max() <= 1 and torch.equal(frames[:, 0], frames[:, 2])
    assert dataset.videos[0].n_frames == 30


@pytest.mark.parametrize(("size", "speeds", "lattice"), [(64, (4,), 4), (64, (1, 2, 3, 7), 1), (30, (5,), 2)])
def test_motion_is_a_reflected_straight_line(size, speeds, lattice):
    dataset = digits(size=size, speeds=speeds, lattice=lattice)
    wall = size - 24
    seen = set()
    for index in range(6):
        frames = (dataset.read_video(index, 0, 30)[:, 0] + 1) / 2
        digit = next(d for d in dataset._digits.float() / 255 if _holds(frames[0], d))
        places = [corner(frame, digit) for frame in frames]
        for axis in range(2):
            x = places[0][axis]
            assert x % lattice == 0 and 0 <= x <= wall
            expected = {}
            for speed in [s * sign for s in speeds for sign in (-1, 1)]:
                position, velocity, path = x, speed, []
                for _ in range(30):
                    path.append(position)
                    position += velocity
                    while not 0 <= position <= wall:
                        position = -position if position < 0 else 2 * wall - position
                        velocity = -velocity
                expected[speed] = path
            matching = [speed for speed, path in expected.items() if path == [p[axis] for p in places]]
            assert matching
            seen.update(matching if len(matching) == 1 else [])
    assert len(seen) > 1  # signs differ between videos


def _holds(frame, digit):
    """Whether a frame shows this digit and nothing else."""
    if abs(frame.sum() - digit.sum()) > 1e-2:
        return False
    side = digit.shape[-1]
    windows = frame.unfold(0, side, 1).unfold(1, side, 1)
    return bool(((windows - digit).abs().amax((-1, -2)) < 1e-6).any())


def test_quickstart_setting_stays_on_its_lattice():
    dataset = digits(clip_length=15, video_length=15)
    digit_pool = dataset._digits.float() / 255
    for index in range(4):
        frames = (dataset[index]["frames"][:, 0] + 1) / 2
        digit = next(d for d in digit_pool if _holds(frames[0], d))
        for frame in frames:
            assert all(x % 4 == 0 and 0 <= x <= 40 for x in corner(frame, digit))


def test_videos_are_the_same_everywhere():
    dataset = digits()
    again = digits()
    alone = torch.stack([dataset[i]["frames"] for i in range(12)])
    assert torch.equal(alone, torch.stack([again[i]["frames"] for i in reversed(range(12))]).flip(0))
    loader = DataLoader(dataset, batch_size=5, num_workers=2)
    assert torch.equal(torch.cat([batch["frames"] for batch in loader]), alone)
    assert len({hashlib.md5(clip.numpy().tobytes()).hexdigest() for clip in alone}) == 12
    assert not torch.equal(digits(seed=1)[0]["frames"], alone[0])
    whole = dataset.read_video(3, 0, 30)
    assert torch.equal(torch.cat([dataset.read_video(3, 0, 11), dataset.read_video(3, 11, 30)]), whole)


def test_windows_change_with_the_epoch_in_train_only():
    train, val = digits(), digits("val")
    whole = train.read_video(4, 0, 30)
    starts = set()
    for epoch in range(8):
        train.set_epoch(epoch)
        val.set_epoch(epoch)
        frames = train[4]["frames"]
        starts.update(s for s in range(21) if torch.equal(whole[s : s + 10], frames))
        assert torch.equal(val[1]["frames"], val.read_video(1, 0, 10))
    assert len(starts) > 3


def test_overlapping_digits_add_up():
    one = digits(n_digits=1, size=26, seed=5)
    many = digits(n_digits=8, size=26, seed=5)
    assert many.read_video(0, 0, 5).mean() > one.read_video(0, 0, 5).mean() + 0.3
    assert many.read_video(0, 0, 5).max() == 1


def test_splits_share_no_digit_whatever_the_seed():
    from sklearn.datasets import load_digits

    pools = {split: digits(split, seed=seed)._digits for seed, split in enumerate(("train", "val", "test"))}
    images = {split: {image.numpy().tobytes() for image in pool} for split, pool in pools.items()}
    assert sum(map(len, pools.values())) == len(load_digits().images)
    assert not images["train"] & images["val"] and not images["train"] & images["test"]
    assert not images["val"] & images["test"]
    assert torch.equal(digits(seed=9)._digits, pools["train"])


def test_sklearn_digits_have_the_stated_contrast():
    """Bilinear values at half-pixel centres by hand, for one digit."""
    from sklearn.datasets import load_digits

    image = load_digits().images[0] / 16
    at = np.clip((np.arange(24) + 0.5) / 3 - 0.5, 0, 7)
    low = np.minimum(np.floor(at).astype(int), 6)
    weight = at - low
    rows = image[low] * (1 - weight)[:, None] + image[low + 1] * weight[:, None]
    full = rows[:, low] * (1 - weight) + rows[:, low + 1] * weight
    expected = np.clip((full - 0.15) / 0.6, 0, 1)
    pool = torch.cat([digits(split)._digits for split in ("train", "val", "test")]).float() / 255
    assert (pool - torch.from_numpy(expected)).abs().amax((1, 2)).min() < 0.5 / 255 + 1e-6


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"clip_length": 31}, "clip_length: expected 1 to video_length=30, found 31"),
        ({"source": "svhn"}, "source"),
        ({"channels": 2}, "channels"),
        ({"digit_size": 64}, "digit_size: expected 1 to 63"),
        ({"n_digits": 0}, "n_digits"),
        ({"speeds": []}, "speeds"),
        ({"split": "dev"}, "split"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        digits(**arguments)
    with pytest.raises(ValueError, match="expected 0 <= start < stop <= 30"):
        digits().read_video(0, 25, 31)


# ----------------------------------------------------------------------------------------------------------- MNIST


@pytest.fixture
def idx_files(tmp_path, monkeypatch):
    """Two small IDX files, one gzipped, accepted as MNIST's by their md5."""
    folder = tmp_path / "mnist"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for name, n, zipped in (("train-images-idx3-ubyte", 40, True), ("t10k-images-idx3-ubyte", 9, False)):
        header = np.array([0x803, n, 28, 28], ">i4").tobytes()
        content = header + rng.integers(0, 256, (n, 28, 28), np.uint8).tobytes()
        monkeypatch.setitem(module.MNIST_FILES, name, hashlib.md5(content).hexdigest())
        if zipped:
            (folder / f"{name}.gz").write_bytes(gzip.compress(content))
        else:
            (folder / name).write_bytes(content)
    monkeypatch.setattr(module, "MNIST_VAL", 7)
    return folder


def test_mnist_from_a_folder(idx_files):
    pools = [digits(s, source="mnist", mnist_dir=idx_files)._digits for s in ("train", "val", "test")]
    assert [tuple(pool.shape) for pool in pools] == [(33, 28, 28), (7, 28, 28), (9, 28, 28)]
    images = np.frombuffer(gzip.decompress((idx_files / "train-images-idx3-ubyte.gz").read_bytes())[16:], np.uint8)
    assert np.array_equal(torch.cat(pools[:2]).numpy().ravel(), images)
    smaller = digits(source="mnist", mnist_dir=idx_files, digit_size=20)
    assert smaller._digits.shape == (33, 20, 20) and smaller[0]["frames"].shape == (10, 1, 64, 64)


def test_mnist_is_downloaded_once(idx_files, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    options = {"source": "mnist", "mnist_url": idx_files.as_uri()}
    expected = digits(source="mnist", mnist_dir=idx_files)[0]["frames"]
    assert torch.equal(digits(**options)[0]["frames"], expected)
    (idx_files / "train-images-idx3-ubyte.gz").unlink()
    assert torch.equal(digits(**options)[0]["frames"], expected)
    with pytest.raises(OSError, match=r"cannot be downloaded from file://.*t10k.*; give data.mnist_dir=FOLDER"):
        digits("test", **options)
    assert [p.name for p in (tmp_path / "cache" / "latentcast" / "mnist").iterdir()] == ["train-images-idx3-ubyte.gz"]


def test_wrong_mnist_files_are_refused(idx_files, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"neither train-images-idx3-ubyte nor .*gz is here"):
        digits(source="mnist", mnist_dir=tmp_path)
    path = idx_files / "train-images-idx3-ubyte.gz"
    content = path.read_bytes()
    path.write_bytes(content[:-300])
    with pytest.raises(OSError, match="damaged gzip file"):
        digits(source="mnist", mnist_dir=idx_files)
    path.write_bytes(gzip.compress(gzip.decompress(content)[:-1]))
    with pytest.raises(OSError, match="not MNIST's train-images-idx3-ubyte: md5"):
        digits(source="mnist", mnist_dir=idx_files)


def test_describe_and_instantiate():
    description = digits().describe()
    assert json.loads(json.dumps(description)) == description == digits(clip_length=3).describe()
    for change in ({"speeds": (2,)}, {"n_digits": 2}, {"seed": 3}, {"size": 60}, {"lattice": 1}, {"video_length": 20}):
        assert digits(**change).describe() != description
    make = instantiate({"_target_": "latentcast.MovingDigits", "_partial_": True, "clip_length": 4, "speeds": [2]})
    assert make(split="val").describe()["speeds"] == [2]
