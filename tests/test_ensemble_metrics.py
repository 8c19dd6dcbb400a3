"""CRPS, iLPIPS and best of N against closed forms and brute force."""

import json
import math
from itertools import combinations

import numpy as np
import pytest
import torch

from latentcast.metrics import BestOfN, crps, ilpips, psnr, ssim
from latentcast.metrics import ensemble as ensemble_module


def random_videos(*shape, seed=0, levels=None):
    """Frames in [-1, 1]; of ``levels`` equally spaced values if given."""
    frames = torch.rand(*shape, generator=torch.Generator().manual_seed(seed))
    if levels:
        frames = (frames * levels).floor().clamp(max=levels - 1) / (levels - 1)
    return frames * 2 - 1


def of_pixel_levels(levels, truth):
    """One clip of one pixel: samples at ``levels``, the truth at ``truth``, all from 0 to 255; float64."""
    levels = torch.as_tensor(levels, dtype=torch.float64).view(1, -1, 1, 1, 1, 1)
    truth = torch.tensor(truth, dtype=torch.float64).view(1, 1, 1, 1, 1)
    return levels / 127.5 - 1, truth / 127.5 - 1


def test_crps_of_frames_is_the_papers_sum_over_256_levels():
    samples = random_videos(2, 5, 3, 2, 4, 6, levels=256)
    target = random_videos(2, 3, 2, 4, 6, seed=1, levels=256)
    levels = torch.arange(256).view(-1, 1, 1, 1, 1, 1)
    x = ((samples + 1) * 127.5).round()
    y = ((target + 1) * 127.5).round()
    cdf = (x[None] <= levels[:, None]).double().mean(2)
    expected = (cdf - (y[None] <= levels).double()).square().sum(0)

    scores = crps(samples, target, reduction="none")
    assert scores.shape == target.shape
    torch.testing.assert_close(scores.double(), expected, atol=1e-3, rtol=0)
    mean = crps(samples, target)
    assert mean.shape == (2, 3)
    torch.testing.assert_close(mean.double(), expected.mean((-3, -2, -1)), atol=1e-3, rtol=0)


@pytest.mark.parametrize("estimator", ["standard", "fair"])
def test_crps_is_the_error_less_half_the_spread_over_pairs(estimator):
    samples, target = random_videos(2, 7, 3, 1, 4, 4).double(), random_videos(2, 3, 1, 4, 4, seed=1).double()
    n_pairs = 49 if estimator == "standard" else 42
    spread = (samples[:, :, None] - samples[:, None]).abs().sum((1, 2)) / n_pairs
    expected = 127.5 * ((samples - target[:, None]).abs().mean(1) - spread / 2)
    torch.testing.assert_close(crps(samples, target, estimator, reduction="none"), expected)


@pytest.mark.parametrize("truth", [40.0, 100.0, 230.0])
def test_crps_of_two_points(truth):
    # F is 1/2 between the two points: a quarter of their distance, if the truth lies between.
    low, high = 60.0, 200.0
    outside = max(low - truth, 0) + max(truth - high, 0)
    expected = (high - low) / 4 + outside
    assert crps(*of_pixel_levels([low, high], truth)).item() == pytest.approx(expected)
    assert crps(*of_pixel_levels([high, low], truth), "fair").item() == pytest.approx(expected - (high - low) / 4)


def test_crps_of_a_uniform_grid_is_that_of_the_uniform_distribution():
    # Uniform on [a, b], y inside: ((y - a)^3 + (b - y)^3) / (3 (b - a)^2)
    low, high, truth, n = 50.0, 150.0, 80.0, 2000
    grid = low + (high - low) * (torch.arange(n, dtype=torch.float64) + 0.5) / n
    expected = ((truth - low) ** 3 + (high - truth) ** 3) / (3 * (high - low) ** 2)
    assert crps(*of_pixel_levels(grid, truth)).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("truth", [128.0, 150.0])
def test_crps_of_gaussian_quantiles_is_the_closed_form(truth):
    # sigma (z (2 Phi(z) - 1) + 2 phi(z) - 1 / sqrt(pi)), Gneiting and Raftery 2007
    mean, sigma, n = 128.0, 12.0, 20_000
    normal = torch.distributions.Normal(torch.tensor(0.0).double(), 1)
    quantiles = mean + sigma * normal.icdf((torch.arange(n, dtype=torch.float64) + 0.5) / n)
    z = torch.tensor((truth - mean) / sigma).double()
    expected = sigma * (z * (2 * normal.cdf(z) - 1) + 2 * normal.log_prob(z).exp() - 1 / math.sqrt(math.pi))
    assert crps(*of_pixel_levels(quantiles, truth)).item() == pytest.approx(expected.item(), rel=1e-4)


def test_fair_crps_is_unbiased_and_the_standard_one_favours_large_ensembles():
    rng = np.random.default_rng(0)
    n, expected = 200_000, 12 / math.sqrt(math.pi)  # E|x - y| - E|x - x'| / 2 of Gaussians of sigma 12
    samples, truth = rng.normal(128, 12, (n, 4)), rng.normal(128, 12, n)
    samples = torch.from_numpy(samples / 127.5 - 1).T.reshape(1, 4, 1, 1, 1, n)
    target = torch.from_numpy(truth / 127.5 - 1).view(1, 1, 1, 1, n)
    assert crps(samples, target, "fair").item() == pytest.approx(expected, rel=0.01)
    # The standard one lacks E|x - x'| / (2 S) of the spread.
    assert crps(samples, target).item() == pytest.approx(expected * (1 + 1 / 4), rel=0.01)


def test_crps_of_one_sample_is_the_absolute_error():
    samples, target = random_videos(2, 1, 3, 2, 4, 4), random_videos(2, 3, 2, 4, 4, seed=1)
    torch.testing.assert_close(crps(samples, target, reduction="none"), 127.5 * (samples[:, 0] - target).abs())


def test_crps_of_samples_that_are_all_the_truth_is_zero():
    target = random_videos(1, 2, 1, 4, 4)
    torch.testing.assert_close(crps(target[:, None].expand(-1, 9, -1, -1, -1, -1), target), torch.zeros(1, 2))


def test_crps_does_not_depend_on_the_size_of_its_chunks(monkeypatch):
    samples, target = random_videos(2, 6, 5, 1, 4, 4), random_videos(2, 5, 1, 4, 4, seed=1)
    whole = crps(samples, target, reduction="none")
    for n_values in (1, 6 * 7, 6 * 16, 6 * 33):
        monkeypatch.setattr(ensemble_module, "CHUNK", n_values)
        assert torch.equal(crps(samples, target, reduction="none"), whole)


def test_crps_of_videos_that_are_not_contiguous():
    samples, target = random_videos(2, 3, 6, 4, 4, 2), random_videos(4, 2, 3, 1, 4, seed=1)
    samples, target = samples.permute(0, 2, 1, 5, 3, 4)[..., :1, :, :], target.permute(1, 2, 3, 4, 0)
    expected = crps(samples.contiguous(), target.contiguous(), reduction="none")
    assert torch.equal(crps(samples, target, reduction="none"), expected)


def test_crps_leaves_its_arguments_alone_and_takes_half_precision_and_gradients():
    samples, target = random_videos(1, 4, 2, 1, 4, 4).requires_grad_(), random_videos(1, 2, 1, 4, 4, seed=1)
    copies = samples.detach().clone(), target.clone()
    score = crps(samples, target)
    assert torch.equal(samples.detach(), copies[0]) and torch.equal(target, copies[1])
    assert not score.requires_grad
    halved = crps(samples.bfloat16(), target.bfloat16())
    assert halved.dtype == torch.float32
    torch.testing.assert_close(halved, crps(samples.bfloat16().float(), target.bfloat16().float()))


class SquareDistance:
    """A distance with the two halves of LPIPS: features of each frame, and a distance of features -> (B, T)."""

    def __init__(self):
        self.n_features = 0

    def features(self, frames):
        self.n_features += 1
        return [frames.mean(-1), frames.mean(-2)]

    def distance(self, first, second):
        return sum((x - y).square().mean((-2, -1)) for x, y in zip(first, second))

    def __call__(self, prediction, target):
        return self.distance(self.features(prediction), self.features(target))


@pytest.mark.parametrize("n_samples", [2, 3, 5])
def test_ilpips_is_the_papers_mean_over_a_ring_of_pairs(n_samples):
    samples = random_videos(2, n_samples, 3, 1, 4, 6)
    distance = SquareDistance()
    ring = [(s, s + 1) for s in range(n_samples - 1)] + [(0, n_samples - 1)]
    expected = sum(distance(samples[:, i], samples[:, j]) for i, j in ring) / n_samples
    counter = SquareDistance()
    found = ilpips(samples, counter)
    assert found.shape == (2, 3)
    torch.testing.assert_close(found, expected)
    assert counter.n_features == n_samples


def test_ilpips_over_all_pairs():
    samples = random_videos(2, 4, 3, 1, 4, 6)
    distance = SquareDistance()
    expected = sum(distance(samples[:, i], samples[:, j]) for i, j in combinations(range(4), 2)) / 6
    counter = SquareDistance()
    torch.testing.assert_close(ilpips(samples, counter, pairs="all"), expected)
    assert counter.n_features == 4
    assert not torch.allclose(ilpips(samples, counter), expected)


def test_ilpips_of_equal_samples_is_zero():
    samples = random_videos(1, 1, 2, 1, 4, 4).expand(-1, 3, -1, -1, -1, -1)
    assert ilpips(samples, SquareDistance()).tolist() == [[0, 0]]


def test_ilpips_and_best_of_n_with_the_true_lpips():
    from latentcast.metrics import LPIPS

    try:
        distance = LPIPS("alex")
    except OSError as error:
        pytest.skip(str(error))
    samples, target = random_videos(1, 3, 2, 3, 64, 64), random_videos(1, 2, 3, 64, 64, seed=1)
    pairs = [(0, 1), (1, 2), (0, 2)]
    with torch.no_grad():
        expected = sum(distance(samples[:, i], samples[:, j]) for i, j in pairs) / 3
        by_sample = torch.stack([distance(sample, target) for sample in samples.unbind(1)], 1)
    assert (expected > 0.01).all()
    torch.testing.assert_close(ilpips(samples), expected)
    best = BestOfN(["lpips"])
    best.update(samples, target)
    result = best.compute()["lpips"]
    assert result["best"] == by_sample.mean(-1).argmin(1).tolist()
    assert result["mean"] == pytest.approx(by_sample.mean(-1).min(1).values.item(), rel=1e-5)


def brute_force_best(metric, samples, target, better):
    """(index, curve) of each clip's best sample, one video at a time."""
    picks = []
    for clip, truth in zip(samples, target):
        curves = [metric(sample[None], truth[None])[0] for sample in clip]
        index = better(range(len(curves)), key=lambda s: curves[s].mean().item())
        picks.append((index, curves[index]))
    return picks


def test_best_of_n_picks_by_each_metric_on_its_own():
    target = 0.6 * random_videos(4, 3, 1, 16, 16, seed=1)
    amplitudes = 0.3 + 0.1 * (torch.arange(20) * 7 % 20).view(4, 5, 1, 1, 1, 1) / 20
    samples = target[:, None] + amplitudes * random_videos(4, 5, 3, 1, 16, 16)
    samples[:3, 1] = target[:3] + 0.35  # all of the structure, but too bright
    metrics = {"ssim": ssim, "psnr": psnr, "lpips_stand_in": SquareDistance()}
    best = BestOfN(metrics, counts=[2, 5])
    for clips in (slice(0, 3), slice(3, 4)):
        best.update(samples[clips], target[clips])
    results = best.compute()

    for name, better in (("ssim", max), ("psnr", max), ("lpips_stand_in", min)):
        result, worse = results[name], {max: min, min: max}[better]
        picks = brute_force_best(metrics[name], samples, target, better)
        curves = torch.stack([curve for _, curve in picks])
        assert result["best"] == [index for index, _ in picks]
        assert result["worst"] == [index for index, _ in brute_force_best(metrics[name], samples, target, worse)]
        assert result["per_frame"] == pytest.approx(curves.mean(0).tolist(), rel=1e-5)
        assert result["mean"] == pytest.approx(curves.mean().item(), rel=1e-5)
        assert result["per_clip"] == pytest.approx(curves.mean(1).tolist(), rel=1e-5)
        half = 3.182446 * curves.mean(1).double().std().item() / 2  # t of 3 degrees of freedom; sqrt(4 clips)
        assert result["ci95"] == pytest.approx([result["mean"] - half, result["mean"] + half], rel=1e-5)
        assert (result["n_clips"], result["n_samples"], result["clips"]) == (4, 5, [0, 1, 2, 3])

        first_two = brute_force_best(metrics[name], samples[:, :2], target, better)
        expected = torch.stack([curve for _, curve in first_two]).mean(0)
        assert result["best_of"]["2"]["per_frame"] == pytest.approx(expected.tolist(), rel=1e-5)
        assert result["best_of"]["5"]["per_frame"] == result["per_frame"]
        everything = torch.stack([metrics[name](sample, target) for sample in samples.unbind(1)])
        assert result["mean_of_samples"]["mean"] == pytest.approx(everything.mean().item(), rel=1e-5)
    assert results["ssim"]["best"] != results["psnr"]["best"]
    assert json.loads(json.dumps(results)) == results


def test_best_of_n_of_samples_drawn_in_chunks():
    samples, target = random_videos(3, 4, 2, 1, 16, 16), random_videos(3, 2, 1, 16, 16, seed=1)
    whole, chunked = BestOfN(["ssim", "psnr"]), BestOfN(["ssim", "psnr"])
    whole.update(samples, target, clips=[4, 0, 2])
    chunks = [chunked.score(chunk, target) for chunk in samples.split(3, dim=1)]
    chunked.add({name: torch.cat([chunk[name] for chunk in chunks], 1) for name in chunks[0]}, clips=[4, 0, 2])
    assert whole.compute() == chunked.compute()
    assert whole.compute()["ssim"]["clips"] == [0, 2, 4]


FINE, TRUTH = torch.zeros(2, 3, 4, 1, 16, 16), torch.zeros(2, 4, 1, 16, 16)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: crps(FINE[:, :1], TRUTH, "fair"), "crps: expected at least 2 samples a clip for the fair estimator"),
        (lambda: crps(FINE, TRUTH, "best"), "crps: expected an estimator of .* found 'best'"),
        (lambda: crps(FINE, TRUTH, reduction="sum"), "crps: expected a reduction of .* found 'sum'"),
        (lambda: crps(TRUTH, TRUTH), r"crps: samples: expected a tensor of shape \(B, S, T, C, H, W\), found"),
        (lambda: crps(FINE, TRUTH[:, :3]), r"crps: expected samples \(B, S, .* found \(2, 3, 4, 1.* and \(2, 3, 1"),
        (lambda: crps(FINE, TRUTH + 1.1), r"crps: target: expected values in \[-1, 1\], found \[1.1, 1.1\]"),
        (lambda: crps(FINE * torch.nan, TRUTH), r"crps: samples: expected values in \[-1, 1\], found NaN"),
        (lambda: ilpips(FINE[:, :1], SquareDistance()), "ilpips: expected at least 2 samples a clip, found 1"),
        (lambda: ilpips(FINE, SquareDistance(), "some"), "ilpips: expected pairs of .* found 'some'"),
        (lambda: ilpips(FINE * torch.nan, SquareDistance()), r"ilpips: samples: expected values in .* found NaN"),
        (lambda: BestOfN(["ssim", "fvd"]), "best of N: expected metrics of .* found 'fvd'"),
        (lambda: BestOfN({"sharpness": ssim}), "best of N: expected metrics of .* found 'sharpness'"),
        (lambda: BestOfN(["ssim"], counts=[0, 5]), "best of N: expected positive counts of samples, found 0"),
        (lambda: BestOfN(["ssim"], [5]).update(FINE, TRUTH), "best of N: expected at least 5 samples a clip, found 3"),
        (lambda: BestOfN(["ssim"]).update(FINE, TRUTH[:1]), r"best of N: expected samples .* and \(1, 4, 1"),
        (lambda: BestOfN(["ssim"]).update(FINE - 2, TRUTH), r"best of N: samples: expected values in \[-1, 1\]"),
    ],
)
def test_bad_input_is_refused_in_one_line(call, message):
    with pytest.raises(ValueError, match=f"^{message}") as error:
        call()
    assert "\n" not in str(error.value)
