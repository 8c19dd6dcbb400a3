"""Means with confidence intervals, over ranks too, the paired bootstrap, and bits per dimension."""

import itertools
import json
import math

import numpy as np
import pytest
import scipy.stats
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from latentcast.metrics import BestOfN, bits_per_dim
from latentcast.metrics.statistics import ClipValues, paired_bootstrap, summarize

N_CLIPS, N_SAMPLES, N_FRAMES = 11, 4, 5
# Uneven shares, and clip 9 twice, as DistributedSampler repeats clips.
SHARES = [[0, 2, 4, 6, 8, 10, 9], [1, 3, 5, 7, 9]]


def scores(*shape, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).gamma(2.0, size=shape))


@pytest.mark.parametrize("n_clips", [2, 5, 40])
def test_interval_of_independent_clips_is_students(n_clips):
    values = scores(n_clips, N_FRAMES).numpy()
    summary = summarize(values)
    by_clip = values.mean(1)
    assert summary["mean"] == pytest.approx(by_clip.mean())
    low, high = scipy.stats.t.interval(0.95, n_clips - 1, by_clip.mean(), scipy.stats.sem(by_clip))
    assert summary["ci95"] == pytest.approx([low, high])
    assert summary["n_clips"] == summary["n_videos"] == n_clips
    assert summary["per_frame"] == pytest.approx(values.mean(0))
    low, high = scipy.stats.t.interval(0.95, n_clips - 1, values.mean(0), scipy.stats.sem(values))
    np.testing.assert_allclose(summary["per_frame_ci95"], np.stack([low, high], 1))
    assert json.loads(json.dumps(summary)) == summary


def test_interval_of_clips_of_few_videos_is_that_of_a_clustered_regression():
    """The sandwich (X'X)^-1 (sum of X_g' u_g u_g' X_g) (X'X)^-1 of a regression on a constant, times G / (G - 1)."""
    videos = [7, 3, 3, 7, 7, 9, 3, 9, 7, 1]
    values = scores(len(videos), N_FRAMES).numpy()
    summary = summarize(values, videos)

    def by_regression(y):
        x = np.ones((len(y), 1))
        bread = np.linalg.inv(x.T @ x)
        residuals = y - x @ (bread @ x.T @ y)
        meat = np.zeros((1, 1))
        for video in set(videos):
            rows = np.array(videos) == video
            meat += x[rows].T @ np.outer(residuals[rows], residuals[rows]) @ x[rows]
        error = np.sqrt(4 / 3 * (bread @ meat @ bread).item())
        return scipy.stats.t.interval(0.95, 3, y.mean(), error)

    assert summary["ci95"] == pytest.approx(by_regression(values.mean(1)))
    np.testing.assert_allclose(summary["per_frame_ci95"], [by_regression(column) for column in values.T])
    assert (summary["n_clips"], summary["n_videos"]) == (10, 4)


def test_more_clips_of_the_same_videos_that_say_the_same_say_no_more():
    values = scores(6, N_FRAMES).numpy()
    repeated = summarize(np.repeat(values, 5, 0), np.repeat(np.arange(6), 5))
    assert repeated["ci95"] == pytest.approx(summarize(values)["ci95"])
    assert summarize(values, [4] * 6)["ci95"] is None and summarize(values, [4] * 6)["per_frame_ci95"] is None
    with pytest.raises(ValueError, match="videos: expected one for each of 6 clips, found 5"):
        summarize(values, [0] * 5)


def test_intervals_by_video_hold_the_true_mean_where_intervals_by_clip_do_not():
    rng = np.random.default_rng(0)
    videos = np.repeat(np.arange(6), 8)
    draws = rng.normal(size=(2000, 6)).repeat(8, axis=1) + rng.normal(size=(2000, 48))
    for given, least, most in ((videos, 0.935, 0.965), (None, 0.5, 0.7)):
        intervals = [summarize(draw, given)["ci95"] for draw in draws]
        assert least < np.mean([low <= 0 <= high for low, high in intervals]) < most


def test_interval_holds_the_true_mean_in_95_of_100_experiments():
    draws = np.random.default_rng(0).exponential(size=(2000, 100))
    inside = [low <= 1 <= high for low, high in (summarize(draw)["ci95"] for draw in draws)]
    assert np.mean(inside) == pytest.approx(0.94, abs=0.015)  # .94 for skewed values at this n


def test_one_clip_has_no_interval():
    assert summarize([[1.0, 2.0]]) == {
        "mean": 1.5,
        "ci95": None,
        "n_clips": 1,
        "n_videos": 1,
        "per_frame": [1, 2],
        "per_frame_ci95": None,
    }


@pytest.mark.parametrize("split", [[N_CLIPS], [1] * N_CLIPS, [4, 6, 1]])
def test_any_batch_split_gives_identical_figures(split):
    everything = ClipValues()
    everything.update(scores(N_CLIPS, N_FRAMES))
    expected = everything.compute()
    assert expected["clips"] == list(range(N_CLIPS))
    assert expected["videos"] == expected["clips"]
    assert expected["per_clip"] == pytest.approx(scores(N_CLIPS, N_FRAMES).mean(1).tolist())

    batched, shuffled = ClipValues(), ClipValues()
    order = torch.from_numpy(np.random.default_rng(1).permutation(N_CLIPS))
    for batch in scores(N_CLIPS, N_FRAMES).split(split):
        batched.update(batch)
    for clips in order.split(split):
        shuffled.update(scores(N_CLIPS, N_FRAMES)[clips], clips)
    assert batched.compute() == expected
    assert shuffled.compute() == expected


@pytest.mark.parametrize(
    ("values", "clips", "message"),
    [
        ([[1.0, torch.nan]], [5], "finite values of every clip, found NaN"),
        ([[1.0, 2.0]], [3], "each clip once, found clip 3 again"),
        ([[1.0, 2.0]] * 2, [6, 6], "each clip once, found clip 6 again"),
        ([[1.0, 2.0]] * 2, [5], "an index for each of 2 clips, found 1"),
        ([[1.0, 2.0]], None, "indices of all clips or of none"),
        ([[1.0, 2.0, 3.0]], [5], r"values of shape \(2,\) for each clip, found \(3,\)"),
    ],
)
def test_clip_values_refuse_what_does_not_fit_and_keep_the_rest(values, clips, message):
    kept = ClipValues()
    kept.update(torch.tensor([[1.0, 2.0]]), [3])
    with pytest.raises(ValueError, match=message):
        kept.update(torch.tensor(values), clips)
    assert kept.clips == [3] and len(kept) == 1


def test_clips_are_grouped_by_the_video_that_they_come_from():
    clips, video_of = [8, 2, 5, 3], {2: 0, 3: 0, 5: 1, 8: 2}
    by_sample = scores(4, N_SAMPLES, N_FRAMES)
    values, best = ClipValues(), BestOfN(["psnr"], counts=[2])
    values.update(by_sample[:, 0], clips)
    best.add({"psnr": by_sample}, clips)
    found, of_best = values.compute(video_of), best.compute(video_of)["psnr"]
    for entry in (found, of_best):
        assert (entry["clips"], entry["videos"]) == ([2, 3, 5, 8], [0, 0, 1, 2])
        assert entry["ci95"] == summarize(entry["per_clip"], entry["videos"])["ci95"] != summarize(entry["per_clip"])
    ordered = by_sample[[1, 3, 2, 0]]
    assert of_best["mean_of_samples"] == summarize(ordered.mean(1), [0, 0, 1, 2])
    assert of_best["best_of"]["2"]["n_videos"] == 3


def test_clip_values_keep_a_copy():
    kept, values = ClipValues(), scores(3, 2)
    kept.update(values)
    expected = kept.compute()
    values.zero_()
    assert kept.compute() == expected


def test_no_clips_are_refused():
    with pytest.raises(ValueError, match="at least one clip, found none"):
        ClipValues().compute()


def run_rank(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    values, counted, lonely = ClipValues(), ClipValues(), ClipValues()
    best = BestOfN(["psnr", "lpips"], counts=[2])
    for clips in torch.tensor(SHARES[rank]).split(3):
        values.update(scores(N_CLIPS, N_FRAMES)[clips], clips)
        by_sample = scores(N_CLIPS, N_SAMPLES, N_FRAMES)[clips]
        best.add({"psnr": by_sample, "lpips": by_sample}, clips)
        counted.update(scores(N_CLIPS, N_FRAMES)[clips])
    if rank == 1:
        lonely.update(scores(N_CLIPS, N_FRAMES))
    results = {
        "values": values.compute(),
        "counted": counted.compute(),
        "lonely": lonely.compute(),
        "best": best.compute(),
    }
    with open(f"{folder}/{rank}.json", "w") as file:
        json.dump(results, file)
    dist.destroy_process_group()


def test_two_ranks_with_uneven_shares_agree_with_one_process(tmp_path):
    mp.start_processes(run_rank, args=(str(tmp_path),), nprocs=2, start_method="forkserver")
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert first == second

    alone, best = ClipValues(), BestOfN(["psnr", "lpips"], counts=[2])
    alone.update(scores(N_CLIPS, N_FRAMES))
    by_sample = scores(N_CLIPS, N_SAMPLES, N_FRAMES)
    best.add({"psnr": by_sample, "lpips": by_sample})
    assert first["values"] == alone.compute()
    assert first["lonely"] == alone.compute()
    assert first["best"] == best.compute()
    # Without indices the repeated clip cannot be told.
    order = SHARES[0] + SHARES[1]
    assert first["counted"]["n_clips"] == len(order)
    assert first["counted"]["per_clip"] == pytest.approx(scores(N_CLIPS, N_FRAMES)[order].mean(1).tolist())


def test_paired_bootstrap_agrees_with_scipy():
    rng = np.random.default_rng(0)
    first = rng.normal(size=60)
    second = first - 0.3 + rng.normal(size=60)
    result = paired_bootstrap(first, second, n_resamples=100_000)
    reference = scipy.stats.bootstrap(
        (first - second,), np.mean, n_resamples=100_000, method="percentile", rng=np.random.default_rng(1)
    )
    assert result["difference"] == pytest.approx((first - second).mean())
    assert result["ci95"] == pytest.approx(list(reference.confidence_interval), abs=0.005)
    p_value = 2 * (reference.bootstrap_distribution <= 0).mean()
    assert result["p_value"] == pytest.approx(p_value, abs=0.008) and 0.02 < p_value < 0.2
    assert result["n_clips"] == 60
    mirrored = paired_bootstrap(second, first, n_resamples=100_000)
    assert mirrored["difference"] == -result["difference"] and mirrored["p_value"] == result["p_value"]


def test_paired_bootstrap_draws_videos_with_all_their_clips():
    """Against every draw of four videos out of four, with the weighted mean of each by hand."""
    rng = np.random.default_rng(3)
    videos = np.array([2, 0, 0, 5, 2, 2, 9, 0, 2])
    differences = rng.normal(0.4, 1, len(videos))
    of_video = [differences[videos == video] for video in (0, 2, 5, 9)]
    exact = [np.concatenate(drawn).mean() for drawn in itertools.product(of_video, repeat=4)]
    result = paired_bootstrap(differences, np.zeros(len(videos)), n_resamples=100_000, videos=videos)
    assert result["difference"] == pytest.approx(differences.mean())
    drawn = np.random.default_rng(0).choice(exact, 100_000)
    assert result["ci95"] == pytest.approx(np.percentile(drawn, [2.5, 97.5]).tolist(), abs=0.02)
    tail = min(np.mean(np.array(exact) <= 0), np.mean(np.array(exact) >= 0))
    assert result["p_value"] == pytest.approx(max(2 * tail, 0.125), abs=0.006)
    assert (result["n_clips"], result["n_videos"]) == (9, 4)
    by_clip = paired_bootstrap(differences, np.zeros(len(videos)), n_resamples=100_000)
    assert np.ptp(result["ci95"]) != pytest.approx(np.ptp(by_clip["ci95"]), rel=0.05)


def test_paired_bootstrap_of_few_videos_is_no_surer_than_their_signs():
    differences = np.linspace(1, 2, 60)
    result = paired_bootstrap(differences, np.zeros(60), videos=np.repeat([0, 1, 2], 20))
    assert result["p_value"] == 0.25  # 2 of 8 signs
    with pytest.raises(ValueError, match="expected clips of two or more videos, found one"):
        paired_bootstrap(differences, np.zeros(60), videos=[0] * 60)


def test_paired_bootstrap_is_seeded():
    first, second = scores(2, 20).numpy()
    result = paired_bootstrap(first, second, n_resamples=2500)
    assert result == paired_bootstrap(first.tolist(), second.tolist(), n_resamples=2500)
    assert result != paired_bootstrap(first, second, n_resamples=2500, seed=1)


def test_paired_bootstrap_pairs_the_clips():
    clips = np.random.default_rng(0).normal(size=50)  # clips differ far more than the runs do
    result = paired_bootstrap(clips + 0.01, clips, n_resamples=2500)
    assert result["ci95"] == pytest.approx([0.01, 0.01])
    assert result["p_value"] == pytest.approx(2 / 2501)


@pytest.mark.parametrize("n_clips", [2, 3, 6, 12])
def test_paired_bootstrap_of_few_clips_is_no_surer_than_their_signs(n_clips):
    """The least p-value of an exact test, by brute force: the share of all signs that give a mean as far from zero."""
    differences = np.linspace(1, 2, n_clips)
    means = [np.mean(signs * differences) for signs in itertools.product((-1, 1), repeat=n_clips)]
    exact = np.mean(np.abs(means) >= differences.mean())
    assert paired_bootstrap(differences, np.zeros(n_clips))["p_value"] == exact


def test_paired_bootstrap_of_equal_runs_finds_nothing():
    values = np.arange(5.0)
    nothing = {"difference": 0, "ci95": [0, 0], "p_value": 1, "n_clips": 5, "n_videos": 5}
    assert paired_bootstrap(values, values) == nothing


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        ([1, 2, 3], [1, 2], r"same two or more clips, found \(3,\) and \(2,\)"),
        ([1], [2], r"same two or more clips, found \(1,\)"),
        ([[1, 2]] * 2, [[1, 2]] * 2, r"one value for each .* found \(2, 2\)"),
        ([1, math.nan], [1, 2], "finite values, found NaN"),
    ],
)
def test_paired_bootstrap_refuses_what_is_not_paired(first, second, message):
    with pytest.raises(ValueError, match=message):
        paired_bootstrap(first, second)


def test_bits_per_dim_of_uniform_codes_is_the_logarithm_of_their_number():
    shape = (11, 16, 16, 4)
    nats = torch.full((3,), -math.prod(shape) * math.log(512))
    torch.testing.assert_close(bits_per_dim(nats, shape), torch.full((3,), 9.0))
    with pytest.raises(ValueError, match="expected predicted dimensions"):
        bits_per_dim(nats, (0, 16, 16, 4))
