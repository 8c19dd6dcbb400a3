"""The Frechet distance against closed forms and SciPy, and FVD over batches, samples and ranks."""

import numpy as np
import pytest
import scipy.linalg
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from metric_files import moving_squares, weights_or_skip
from tiny_experiment import free_port

from latentcast.data.sets.moving_digits import MovingDigits
from latentcast.metrics import FVD, I3D, frechet_distance


class Pooled(torch.nn.Module):
    """A detector of 20 features: means over parts of the clip, and of its changes."""

    fingerprint = "pooled"

    def forward(self, videos):
        parts = torch.nn.functional.adaptive_avg_pool3d(videos.mean(2), (2, 2, 2)).flatten(1)
        change = (videos[:, 1:] - videos[:, :-1]).abs().mean((1, 2))
        return torch.cat([parts, torch.nn.functional.adaptive_avg_pool2d(change, (3, 4)).flatten(1)], 1)


def random_covariance(n, rank=None, seed=0):
    factor = np.random.default_rng(seed).standard_normal((n, rank or n))
    return factor @ factor.T / n


def plain_fvd(real, fake):
    """By SciPy's matrix square root, from features (n, D)."""
    (mu1, sigma1), (mu2, sigma2) = ((x.mean(0), np.cov(x, rowvar=False)) for x in (real, fake))
    root = scipy.linalg.sqrtm(sigma1 @ sigma2).real
    return ((mu1 - mu2) ** 2).sum() + np.trace(sigma1 + sigma2 - 2 * root)


def gaussian_features(n, variances, mean=0.0, seed=0):
    noise = torch.randn(n, len(variances), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return noise * torch.tensor(variances).sqrt() + mean


def test_frechet_distance_of_diagonal_gaussians_has_a_closed_form():
    rng = np.random.default_rng(0)
    mu1, mu2, first, second = rng.uniform(0, 3, (4, 30))
    first[:5], second[3:9] = 0, 0  # singular ones too
    expected = ((mu1 - mu2) ** 2).sum() + ((np.sqrt(first) - np.sqrt(second)) ** 2).sum()
    rotation = np.linalg.qr(rng.standard_normal((30, 30)))[0]
    moments = [rotation @ mu1, rotation * first @ rotation.T, rotation @ mu2, rotation * second @ rotation.T]
    found = frechet_distance(*map(torch.tensor, moments))
    assert found.dtype == torch.float64 and found.shape == ()
    assert found.item() == pytest.approx(expected, rel=1e-12)
    assert frechet_distance(*moments) == found


def test_frechet_distance_of_covariances_that_do_not_commute():
    a, b = np.array([[2.0, 0.7], [0.7, 1.0]]), np.array([[0.5, -0.4], [-0.4, 3.0]])
    # In two dimensions tr sqrt(M) = sqrt(tr M + 2 sqrt(det M)).
    root = np.sqrt(np.trace(a @ b) + 2 * np.sqrt(np.linalg.det(a) * np.linalg.det(b)))
    expected = 1 + np.trace(a) + np.trace(b) - 2 * root
    assert frechet_distance(np.zeros(2), a, np.array([0.0, 1]), b).item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("n", [3, 40])
def test_frechet_distance_against_scipy(n):
    a, b = random_covariance(n), random_covariance(n, seed=1)
    expected = np.trace(a + b - 2 * scipy.linalg.sqrtm(a @ b).real)
    assert frechet_distance(np.zeros(n), a, np.zeros(n), b).item() == pytest.approx(expected, rel=1e-8)


def test_frechet_distance_of_equal_gaussians_is_zero_and_never_below():
    for rank in (3, 200, 400):
        sigma = random_covariance(400, rank) * 1000
        mu = np.arange(400.0)
        assert 0 <= frechet_distance(mu, sigma, mu, sigma).item() < 1e-6 * np.trace(sigma)
    nearly = sigma + 1e-9 * random_covariance(400, 5, seed=1)
    assert frechet_distance(mu, sigma, mu, nearly).item() >= 0


def test_frechet_distance_refuses_what_is_no_gaussian():
    eye, mu = torch.eye(3), torch.zeros(3)
    cases = [
        (
            (mu, eye, torch.zeros(2), torch.eye(2)),
            r"means \(D,\) and covariances \(D, D\), found \(3,\), \(3, 3\), \(2,\)",
        ),
        ((mu, eye, mu, -eye), "sigma2 is not symmetric and positive semi-definite"),
        ((mu, eye + torch.eye(3).roll(1, 0), mu, eye), "sigma1 is not symmetric and positive semi-definite"),
        ((mu, eye, mu, eye * torch.nan), "expected a finite sigma2, found NaN or infinity"),
        ((mu, eye, mu + torch.inf, eye), "expected finite means and covariances, found NaN or infinity"),
    ]
    for moments, message in cases:
        with pytest.raises(ValueError, match=message):
            frechet_distance(*moments)


def test_fvd_against_scipy_in_any_batches():
    real, fake = moving_squares(31), moving_squares(40, seed=1, speed=3)
    expected = plain_fvd(*(Pooled()(videos).numpy().astype(np.float64) for videos in (real, fake)))
    values = []
    for size in (1, 7, 40):
        fvd = FVD(Pooled())
        for chunk in real.split(size):
            fvd.update(real=chunk)
        for chunk in fake.split(size):
            fvd.update(fake=chunk)
        assert fvd.n_videos == {"real": 31, "fake": 40}
        values.append(fvd.compute())
    assert isinstance(values[0], float) and values[0] == pytest.approx(expected, rel=1e-5)
    assert values == pytest.approx([values[0]] * 3, rel=1e-6)


def test_fvd_of_equal_sets_is_zero():
    for n in (2, 12, 60):
        videos = moving_squares(n)
        fvd = FVD(Pooled())
        fvd.update(real=videos, fake=videos.flip(0))
        assert 0 <= fvd.compute() < 1e-9
    fvd.reset()
    assert fvd.n_videos == {"real": 0, "fake": 0} and fvd.fingerprint == "pooled"


def test_all_samples_of_a_clip_count():
    real, fake = moving_squares(12), moving_squares(36, seed=1)
    flat, stacked = FVD(Pooled()), FVD(Pooled())
    flat.update(real=real, fake=fake)
    stacked.update(real=real, fake=fake.unflatten(0, (12, 3)), clips=range(12))
    assert stacked.n_videos == {"real": 12, "fake": 36}
    assert stacked.compute() == pytest.approx(flat.compute(), rel=1e-6)


def test_features_can_be_kept_and_added_again():
    real, fake = moving_squares(10), moving_squares(10, seed=1)
    fvd, resumed = FVD(Pooled()), FVD(Pooled())
    fvd.update(real=real, fake=fake, clips=range(10))
    resumed.update(real=real[6:], fake=fake[6:], clips=range(6, 10))
    features = {"real": resumed.features(real[:6]), "fake": resumed.features(fake[:6])}
    resumed.add(**features, clips=range(6))
    assert resumed.compute() == pytest.approx(fvd.compute(), rel=1e-6)
    with pytest.raises(ValueError, match="found clip 0 again"):
        resumed.add(**features, clips=range(6))


def test_extrapolation_removes_most_of_the_bias_of_few_videos():
    variances = (10 / np.arange(1, 41)).tolist()
    for mean in (0.0, 1.0):
        truth = 40 * mean**2  # equal covariances
        fvd = FVD(Pooled())
        fvd.add(real=gaussian_features(200, variances), fake=gaussian_features(150, variances, mean, seed=1))
        plain, extrapolated = fvd.compute(), fvd.compute(extrapolate=True)
        assert plain > truth + 3
        assert extrapolated >= 0 and abs(extrapolated - truth) < 0.4 * (plain - truth)
        assert fvd.compute(extrapolate=True) == extrapolated


def test_bad_input_is_one_line():
    videos = moving_squares(4)
    fvd = FVD(Pooled())
    fvd.update(real=videos)
    cases = [
        ({"fake": videos * torch.nan}, r"^FVD: fake: expected values in \[-1, 1\], found NaN$"),
        ({"real": (videos + 1) * 127}, r"^FVD: real: expected values in \[-1, 1\], found \[0\.\d+, 241"),
        ({"fake": videos[:, 1:]}, r"^FVD: fake: expected \(T, C, H, W\) = \(10, 1, 32, 32\) as before, found \(9, 1"),
        ({"fake": videos[0]}, r"^FVD: fake: expected a tensor of shape \(B, T, C, H, W\), found \(10, 1, 32, 32\)$"),
    ]
    for arguments, message in cases:
        with pytest.raises(ValueError, match=message):
            fvd.update(**arguments)
    assert fvd.n_videos == {"real": 4, "fake": 0}
    fvd.update(fake=videos[:1])
    with pytest.raises(ValueError, match=r"^FVD: expected at least 2 real and 2 fake videos, found 4 and 1$"):
        fvd.compute()
    fvd.update(fake=videos[1:])
    assert fvd.compute() < 1e-9
    with pytest.raises(ValueError, match="at least 100 real and 100 fake videos to extrapolate, found 4 and 4"):
        fvd.compute(extrapolate=True)


def _rank_computes(rank, port, results):
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    real, fake = moving_squares(9), moving_squares(9, seed=1, speed=3)
    shared, counted, lopsided = FVD(Pooled()), FVD(Pooled()), FVD(Pooled())
    clips = [0, 2, 4, 6, 8] if rank == 0 else [1, 3, 5, 7, 0]  # as DistributedSampler: clip 0 fills the last batch
    for clip in clips:
        shared.update(real=real[[clip]], fake=fake[[clip]], clips=[clip])
    part = slice(0, 2) if rank == 0 else slice(2, 9)
    counted.update(real=real[part], fake=fake[part])
    if rank == 1:
        lopsided.update(real=real, fake=fake)
    results[rank] = (shared.compute(), counted.compute(), lopsided.compute())
    dist.destroy_process_group()


def test_two_processes_give_the_figure_of_one():
    alone = FVD(Pooled())
    alone.update(real=moving_squares(9), fake=moving_squares(9, seed=1, speed=3))
    expected = alone.compute()
    with mp.get_context("forkserver").Manager() as manager:
        results = manager.dict()
        mp.start_processes(_rank_computes, (free_port(), results), nprocs=2, start_method="forkserver")
        assert sorted(results.keys()) == [0, 1]
        for values in results.values():
            assert values == pytest.approx((expected,) * 3, rel=1e-6)


def test_i3d_sets_two_halves_of_one_set_far_below_other_sets():
    weights_or_skip("i3d_k400")
    fvd = FVD(I3D())
    digits = MovingDigits("train", 10, size=32, digit_size=14, n_digits=2)
    videos = torch.stack([digits.read_video(i, 0, 10) for i in range(10)])
    first, second = (fvd.features(half) for half in videos.split(5))
    frozen = fvd.features(videos[5:, :1].expand(-1, 10, -1, -1, -1))
    squares = fvd.features(moving_squares(5))

    def distance(real, fake):
        fvd.reset()
        fvd.add(real=real, fake=fake)
        return fvd.compute()

    halves = distance(first, second)
    assert distance(first, first) < 1e-3
    assert distance(first, frozen) > 1.5 * halves and distance(first, squares) > 4 * halves
