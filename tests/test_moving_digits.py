"""MovingDigits: determinism, each motion against brute-force simulations, disjoint splits."""

import hashlib
import itertools
import json
from collections import Counter

import numpy as np
import pytest
import torch
from scipy.stats import chisquare
from torch.utils.data import DataLoader

from latentcast import MovingDigits, instantiate
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
        assert len(dataset.videos) == n and len(dataset) == 3 * n
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


@pytest.mark.parametrize("motion", ["lattice", "deterministic", "stochastic"])
def test_stride_takes_every_nth_frame_of_the_same_videos(motion):
    whole, strided = digits(motion=motion), digits(motion=motion, frame_stride=3)
    assert strided.videos[0].n_frames == 10 and strided.fps == strided.videos[0].fps == pytest.approx(10 / 3)
    for index in range(3):
        expected = whole.read_video(index, 0, 30)[::3]
        assert torch.equal(strided.read_video(index, 0, 10), expected)
        assert torch.equal(strided.read_video(index, 4, 7), expected[4:7])
    assert strided[0]["frames"].shape == (10, 1, 64, 64) and len(strided) == 12
    assert strided.describe() != whole.describe()


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
    alone = torch.stack([dataset[i]["frames"] for i in range(36)])
    assert torch.equal(alone, torch.stack([again[i]["frames"] for i in reversed(range(36))]).flip(0))
    loader = DataLoader(dataset, batch_size=5, num_workers=2, multiprocessing_context="forkserver")
    assert torch.equal(torch.cat([batch["frames"] for batch in loader]), alone)
    assert len({hashlib.md5(clip.numpy().tobytes()).hexdigest() for clip in alone[::3]}) == 12
    assert not torch.equal(digits(seed=1)[0]["frames"], alone[0])
    whole = dataset.read_video(3, 0, 30)
    assert torch.equal(torch.cat([dataset.read_video(3, 0, 11), dataset.read_video(3, 11, 30)]), whole)


def test_windows_change_with_the_epoch_in_train_only():
    train, val = digits(), digits("val")
    whole = train.read_video(1, 0, 30)
    starts = set()
    for epoch in range(8):
        train.set_epoch(epoch)
        val.set_epoch(epoch)
        frames = train[4]["frames"]
        starts.update(s for s in range(21) if torch.equal(whole[s : s + 10], frames))
        assert torch.equal(val[4]["frames"], val.read_video(1, 10, 20))
    assert len(starts) > 3


# SVG's generator: digits of 32 pixels on 64, so positions 0..31.


def svg_digits(motion, n_videos, **kwargs):
    kwargs = {"n_digits": 2, "video_length": 40} | kwargs
    return MovingDigits("train", 10, motion=motion, n_videos=n_videos, **kwargs)


def all_places(dataset):
    """Every digit's (row, column) in each frame: (N, T, 2)."""
    paths = [dataset.trajectories(i, 0, dataset.video_length) for i in range(dataset.n_videos)]
    return np.array([places for path in paths for _, places in path])


def uniform(values, expected):
    """Whether the values are exactly those expected, and equally frequent."""
    counts = Counter(int(value) for value in values)
    return set(counts) == set(expected) and chisquare(list(counts.values())).pvalue > 1e-3


@pytest.mark.parametrize("motion", ["deterministic", "stochastic"])
def test_starts_and_velocities_are_uniform(motion):
    places = all_places(svg_digits(motion, 1500))
    assert places.min() == 0 and places.max() == 31
    assert np.abs(np.diff(places, axis=1)).max() == 4
    for axis in range(2):
        start, velocity = places[:, 0, axis], places[:, 1, axis] - places[:, 0, axis]
        assert uniform(start, range(32))
        assert uniform(velocity[(start >= 4) & (start <= 27)], range(-4, 5))


@pytest.mark.parametrize("motion", ["deterministic", "stochastic"])
def test_max_speed_bounds_every_step_and_is_reached(motion):
    steps = np.diff(all_places(svg_digits(motion, 400, max_speed=2)), axis=1)
    assert set(np.unique(steps)) == set(range(-2, 3))
    usual = svg_digits(motion, 3)
    assert torch.equal(svg_digits(motion, 3, max_speed=4).read_video(2, 0, 40), usual.read_video(2, 0, 40))
    assert svg_digits(motion, 3, max_speed=3).describe() != usual.describe()


def test_fresh_training_videos_are_new_in_every_epoch():
    fresh, held_out = svg_digits("stochastic", 5, fresh=True), digits("val", fresh=True)
    clips = []
    for epoch in range(3):
        fresh.set_epoch(epoch)
        held_out.set_epoch(epoch)
        clips += [fresh.read_video(i, 0, 10) for i in range(5)]
        assert torch.equal(clips[-1], fresh.read_video(4, 0, 10))
        assert torch.equal(held_out.read_video(1, 0, 30), digits("val").read_video(1, 0, 30))
    assert len({clip.numpy().tobytes() for clip in clips}) == 15
    assert torch.equal(clips[0], svg_digits("stochastic", 5).read_video(0, 0, 10))  # the first epoch is the usual one


def test_deterministic_digits_stop_at_the_edge_and_turn_back():
    starts, turns = set(), 0
    for path in all_places(svg_digits("deterministic", 150, video_length=60)):
        for x in path.T:
            matching = []
            for first in range(-4, 5):
                place, velocity, simulated = int(x[0]), first, []
                for _ in x:
                    if place < 0 or place > 31:
                        place, velocity = min(max(place, 0), 31), -velocity
                        turns += 1
                    simulated.append(place)
                    place += velocity
                if simulated == x.tolist():
                    matching.append(first)
            assert len(matching) == 1
            starts.update(matching)
    assert starts == set(range(-4, 5)) and turns > 1000


def test_stochastic_digits_go_only_where_the_rule_lets_them():
    """The velocities that a digit may have, followed frame by frame: none left means a step outside the rule."""
    anything, double_bounces = range(-4, 5), 0
    inwards = {-1: range(1, 5), 1: range(-4, 0)}
    for path in all_places(svg_digits("stochastic", 400)).tolist():
        possible = set(itertools.product(anything, anything))
        for (y, x), seen in itertools.pairwise(path):
            after, corner_only = set(), True
            for dy, dx in possible:
                row, column = y + dy, x + dx
                if [min(max(row, 0), 31), min(max(column, 0), 31)] != seen:
                    continue
                beyond_row, beyond_column = (row > 31) - (row < 0), (column > 31) - (column < 0)
                if beyond_column:  # checked last: what the row's bounce drew is drawn again
                    after.update(itertools.product(anything, inwards[beyond_column]))
                elif beyond_row:
                    after.update(itertools.product(inwards[beyond_row], anything))
                else:
                    after.add((dy, dx))
                corner_only &= bool(beyond_row and beyond_column)
            assert after
            double_bounces += corner_only
            possible = after
    assert double_bounces > 10


def test_stochastic_bounces_draw_both_velocities_anew():
    normal, other = {wall: [] for wall in ("top", "left", "bottom", "right")}, []
    for path in all_places(svg_digits("stochastic", 1500)):
        for t in range(2, len(path) - 1):
            if path[t - 1].min() == 0 or path[t - 1].max() == 31:
                continue  # inside, nothing has bounced, so the last step was the velocity
            beyond = 2 * path[t - 1] - path[t - 2]
            for axis in range(2):
                # Only bounces after which no second one can hide what was drawn.
                if not 0 <= beyond[axis] <= 31 and 4 <= beyond[1 - axis] <= 27:
                    velocity = path[t + 1] - path[t]
                    wall = list(normal)[axis + 2 * int(beyond[axis] > 31)]
                    normal[wall].append(velocity[axis])
                    other.append(velocity[1 - axis])
    assert len(other) > 3000
    for wall, velocities in normal.items():
        assert uniform(velocities, range(1, 5) if wall in ("top", "left") else range(-4, 0)), wall
    assert uniform(other, range(-4, 5))


@pytest.mark.parametrize("n_digits", [2, 3])
@pytest.mark.parametrize("motion", ["lattice", "deterministic", "stochastic"])
def test_frames_show_the_digits_where_the_trajectories_say(motion, n_digits):
    dataset = svg_digits(motion, 3, n_digits=n_digits, digit_size=32)
    overlaps = 0
    for index in range(3):
        trajectories = dataset.trajectories(index, 0, 40)
        assert len(trajectories) == n_digits
        expected = np.zeros((40, 64, 64))
        for digit, places in trajectories:
            for t, (row, column) in enumerate(places):
                image = dataset._digits[digit].numpy() / 255
                expected[t] += np.pad(image, ((row, 32 - row), (column, 32 - column)))
        overlaps += (expected > 1).sum()
        frames = dataset.read_video(index, 0, 40)
        assert (frames[:, 0] - (np.minimum(expected, 1) * 2 - 1)).abs().max() < 1e-6
        assert torch.equal(frames, dataset.draw(index, 0, 40).float() / 255 * 2 - 1)
    assert overlaps > 100


@pytest.mark.parametrize("motion", ["deterministic", "stochastic"])
def test_a_window_is_a_slice_of_its_video(motion):
    dataset = svg_digits(motion, 20, n_digits=3)
    shorter = svg_digits(motion, 20, n_digits=3, video_length=12)
    for index in range(20):
        whole = dataset.read_video(index, 0, 40)
        assert torch.equal(torch.cat([dataset.read_video(index, *w) for w in ((0, 1), (1, 25), (25, 40))]), whole)
        assert torch.equal(shorter.read_video(index, 0, 12), whole[:12])


def test_stochastic_clips_are_the_same_in_workers():
    dataset = svg_digits("stochastic", 10)
    alone = torch.stack([dataset[i]["frames"] for i in range(len(dataset))])
    loader = DataLoader(dataset, batch_size=7, num_workers=2, multiprocessing_context="forkserver")
    assert torch.equal(torch.cat([batch["frames"] for batch in loader]), alone)
    assert len({hashlib.md5(clip.numpy().tobytes()).hexdigest() for clip in alone[::4]}) == 10
    assert not torch.equal(svg_digits("stochastic", 10, seed=1)[0]["frames"], alone[0])


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
        ({"clip_length": 31}, "clip_length: expected 1 to 30, the frames of a video"),
        ({"frame_stride": 3, "clip_length": 11}, r"\(video_length=30, frame_stride=3\), found 11"),
        ({"frame_stride": 0}, "frame_stride: expected a whole number of at least 1, found 0"),
        ({"video_length": 10**12}, "video_length: expected at most 100000, found 1000000000000"),
        ({"n_videos": 10**12}, "n_videos: expected at most 10000000, found 1000000000000"),
        ({"size": 10**6}, "size: expected pixels, .* found 1000000"),
        ({"video_length": "x"}, "video_length: expected a whole number of at least 1, found 'x'"),
        ({"source": "svhn"}, "source"),
        ({"channels": 2}, "channels"),
        ({"digit_size": 64}, "digit_size: expected 1 to 63"),
        ({"n_digits": 0}, "n_digits"),
        ({"speeds": []}, "speeds"),
        ({"lattice": 0}, "lattice: expected at least 1, found 0"),
        ({"motion": "brownian"}, "motion: expected one of lattice, deterministic, stochastic, found 'brownian'"),
        (
            {"motion": "stochastic", "speeds": [2]},
            r"speeds: expected null, for motion=stochastic fixes it, found \[2\]",
        ),
        ({"motion": "deterministic", "lattice": 4}, "lattice: expected null"),
        ({"max_speed": 2}, "max_speed: expected null, for motion=lattice has speeds, found 2"),
        ({"motion": "stochastic", "max_speed": 0}, "max_speed: expected a whole number of at least 1, found 0"),
        ({"split": "dev"}, "split"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        digits(**arguments)
    with pytest.raises(ValueError, match="expected 0 <= start < stop <= 30"):
        digits().read_video(0, 25, 31)


def test_describe_and_instantiate():
    description = digits().describe()
    assert json.loads(json.dumps(description)) == description == digits(clip_length=3).describe()
    for change in (
        {"speeds": (2,)},
        {"n_digits": 2},
        {"seed": 3},
        {"size": 60},
        {"lattice": 1},
        {"motion": "stochastic"},
    ):
        assert digits(**change).describe() != description
    make = instantiate({"_target_": "latentcast.MovingDigits", "_partial_": True, "clip_length": 4, "speeds": [2]})
    assert make(split="val").describe()["speeds"] == [2]
