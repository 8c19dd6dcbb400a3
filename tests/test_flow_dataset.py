"""The simulated flow: its Strouhal number, what differs between its videos, normalisation, one-line errors."""

import json
import pickle

import pytest
import torch

from latentcast.data.sets import flow as module
from latentcast.data.sets.flow import Flow, Stream
from latentcast.data.video.reader import VideoError


@pytest.fixture
def tiny(monkeypatch):
    """A stream of 64 x 64 cells in the place of the smoke one: a frame takes 20 ms."""
    stream = Stream(64, 5, 16, 0.05, 256, 2, 5, 4, {1: 11.0})
    monkeypatch.setitem(module.STREAMS, "smoke", stream)
    monkeypatch.setattr(module, "FRAME_SIZES", (64,))

    def make(**options):
        return Flow(protocol="smoke", **({"frame_size": 64, "reynolds": (100, 140)} | options))

    make.stream = stream
    return make


def video(flow, split="train", name="run0"):
    return torch.cat(list(flow.read(split, name).frames))


def far_from(others, frames):
    """Distance of each frame to the nearest of the others, over their mean distance from the mean."""
    others, frames = others.flatten(1).float(), frames.flatten(1).float()
    return torch.cdist(frames, others).min(1).values / (others - others.mean(0)).norm(dim=1).mean()


def test_strouhal_number_is_the_literatures():
    """The smoke set's own run. Williamson (1988) measured .164 at Reynolds 100 in an unbounded stream."""
    figures = Flow(protocol="smoke").figures()
    assert figures["reynolds"] == 100 and figures["blockage"] == 8 / 128
    assert figures["strouhal_literature"] == pytest.approx(0.164, abs=1e-3)
    # A blocked stream sheds faster, by the speed-up in the gaps at most; the fit's own scatter is 1 %.
    low, high = 0.99, 1.01 / (1 - figures["blockage"])
    assert low < figures["strouhal"] / figures["strouhal_literature"] < high < 1.1
    assert figures["mlups"] > 0


def test_videos_are_named_and_have_the_asked_length(tiny):
    flow = tiny(n_runs=3, train_frames=18, test_frames=2, ticks=3)
    assert flow.videos() == {"train": ["run0", "run1", "run2"], "test": ["run0", "run1", "run2"]}
    assert flow.expected_counts() == {"train": 3, "test": 3}
    pieces = list(flow.read("train", "run2").frames)
    assert [tuple(piece.shape) for piece in pieces] == [(16, 1, 64, 64), (2, 1, 64, 64)]
    assert all(piece.dtype == torch.uint8 for piece in pieces)
    assert video(flow, "test").shape == (2, 1, 64, 64)


def test_the_standard_set_is_the_papers():
    flow = Flow()
    assert flow.protocol == "standard" and flow.frame_size == 128 and flow.ticks == 128 and flow.channels == 1
    assert flow.describe()["normalisation"] == "minmax"
    assert {split: len(names) for split, names in flow.videos().items()} == {"train": 8, "test": 8}
    assert (flow.describe()["train_frames"], flow.describe()["test_frames"]) == (1000, 250)
    runs = flow.provenance["runs"]
    assert [run["reynolds"] for run in runs] == [106.25 + 12.5 * i for i in range(8)]
    assert len({run["cylinder_y"] for run in runs}) == 8
    for run in runs:
        assert run["viscosity"] == pytest.approx(0.07 * 20 / run["reynolds"])
        assert abs(run["cylinder_y"] - 127.5) <= 2


def test_a_seed_always_gives_the_same_video_also_in_another_process(tiny):
    first, again = tiny(), pickle.loads(pickle.dumps(tiny()))
    assert torch.equal(video(first), video(again))
    assert first.describe() == again.describe() and first.provenance == again.provenance
    assert json.loads(json.dumps(first.describe())) == first.describe()
    assert json.loads(json.dumps(first.provenance)) == first.provenance
    assert not torch.equal(video(first), video(tiny(seed=1)))


def test_runs_and_splits_differ(tiny):
    flow = tiny(train_frames=4)
    train, other, test = video(flow), video(flow, name="run1"), video(flow, "test")
    assert not torch.equal(train, other) and not torch.equal(train, test) and not torch.equal(other, test)


def test_inflow_noise_keeps_test_frames_away_from_training_frames(tiny, monkeypatch):
    monkeypatch.setitem(module.STREAMS, "smoke", Stream(64, 5, 16, 0.05, 3500, 1, 32, 6, {1: 11.0}))
    nearest = {}
    for noise in (0.0, module.GUSTS):
        monkeypatch.setattr(module, "GUSTS", noise)
        flow = tiny(reynolds=(130, 130))
        train = video(flow)
        nearest[noise] = far_from(train, video(flow, "test"))
        assert (train[1:] != train[:-1]).float().mean() > 0.01, "nothing is shed"
    clean, noisy = nearest.values()
    assert clean.max() < 0.12, "a clean stream repeats itself, but for the phase at which frames fall"
    assert noisy.min() > 0.25


def test_normalisations_are_two_scales_of_one_vorticity(tiny):
    fields = {}
    for normalisation in module.NORMALISATIONS:
        flow = tiny(normalisation=normalisation)
        low, high = flow.provenance["vorticity_bounds"]
        assert low == -high
        fields[normalisation] = (video(flow) / 255 * (high - low) + low, high, (high - low) / 255)
    wide, narrow = fields["minmax"], fields["clipped"]
    unit = tiny.stream.speed / tiny.stream.diameter
    assert wide[1] == pytest.approx(11 * unit) and narrow[1] == pytest.approx(4 * unit)
    error = (wide[0].clamp(-narrow[1], narrow[1]) - narrow[0]).abs().max()
    assert error < 0.51 * (wide[2] + narrow[2])
    assert (wide[0].abs() > narrow[1]).any() and wide[0].abs().max() < wide[1]


def test_small_frames_are_averages_of_large_ones(monkeypatch):
    stream = Stream(128, 8, 32, 0.05, 64, 1, 2, 1, {1: 11.0, 2: 11.0})
    monkeypatch.setitem(module.STREAMS, "smoke", stream)
    large, small = (video(Flow(protocol="smoke", frame_size=size)) for size in (128, 64))
    assert small.float().std() > 1
    squares = large.float().reshape(2, 1, 64, 2, 64, 2).mean((3, 5))
    assert (squares - small).abs().max() <= 1


def test_vorticity_turns_away_from_the_cylinder_on_both_sides(tiny):
    """Fluid that moves to the right past a wall turns against it: clockwise above, counter-clockwise below."""
    frames = video(tiny(train_frames=1)).float()[0, 0] - 127.5
    x, y = 16, tiny().provenance["runs"][0]["cylinder_y"]
    lower_rows, higher_rows = frames[int(y) - 4 : int(y) - 1, x], frames[int(y) + 2 : int(y) + 5, x]
    assert lower_rows.max() > 20 and higher_rows.min() < -20
    assert frames[:8].abs().max() < 8, "the stream far from the cylinder is still"


def test_the_inflow_wavers_by_as_much_and_as_long_as_stated():
    gusts = module._Gusts(32, deviation=0.004, memory=50, generator=torch.Generator().manual_seed(0))
    velocity = torch.cat([gusts.advance(1000, speed=0.05) for _ in range(60)])
    noise = velocity - torch.tensor([0.05, 0])[:, None]
    assert noise.mean((0, 2)).abs().max() < 1e-9 + 0.1 * 0.004
    torch.testing.assert_close(noise.std((0, 2)), torch.tensor([0.004, 0.004]), rtol=0.05, atol=0)
    for lag in (1, 50, 100):
        correlation = (noise[lag:] * noise[:-lag]).mean() / noise.square().mean()
        assert correlation == pytest.approx(torch.exp(torch.tensor(-lag / 50)).item(), abs=0.05)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"protocol": "large"}, "--split: flow has standard, smoke, found 'large'"),
        ({"frame_size": 96}, "frame_size: expected 128 or 64, found 96"),
        ({"frame_size": 64.0}, "frame_size: expected 128 or 64, found 64.0"),
        ({"source": "files"}, "--source: flow is made without one, found files"),
        ({"normalisation": "zscore"}, "normalisation: expected minmax or clipped, found 'zscore'"),
        ({"ticks": 0}, "ticks: expected a whole number, at least 1, found 0"),
        ({"n_runs": 2.5}, "n_runs: expected a whole number, at least 1, found 2.5"),
        ({"test_frames": -1}, "test_frames: expected a whole number, at least 1, found -1"),
        ({"reynolds": (100, 1000)}, r"reynolds: expected two numbers from 60 to 200 in order, found \(100, 1000\)"),
        ({"reynolds": [150, 100]}, r"reynolds: expected .* found \[150, 100\]"),
        ({"reynolds": 100}, "reynolds: expected .* found 100"),
        ({"device": "abacus"}, "device: "),
    ],
)
def test_bad_options_end_in_one_line(options, message):
    with pytest.raises(ValueError, match=message) as error:
        Flow(**options)
    assert "\n" not in str(error.value)


def test_a_simulation_that_blows_up_names_run_and_tick(tiny, monkeypatch):
    monkeypatch.setattr(module, "KICK", 1e4)
    with pytest.raises(VideoError, match=r"^flow test/run1: tick 128: the flow blew up"):
        video(tiny(), "test", "run1")
