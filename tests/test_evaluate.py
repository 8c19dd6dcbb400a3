"""Evaluation: figures that follow from the definitions, resumed and shared among processes without a difference."""

import argparse
import hashlib
import json
import re
import resource
import runpy
import sys
from pathlib import Path

import pytest
import torch
from metric_files import save_scripted, weights_or_skip
from noise_benchmark import Noise
from safetensors import safe_open
from tiny import SMALL_RECURRENT_VAE, SMALL_SDE_DIFFUSION, SMALL_VQVAE
from tiny_experiment import TOOLS, call_tool, run_ranks, write_experiment

from latentcast import (
    VQVAE,
    MovingDigits,
    PixelTokenizer,
    Protocol,
    RecurrentVAE,
    SDEDiffusion,
    VideoPredictionPipeline,
    VideoTransformer,
)
from latentcast.data.store.prepared import PreparedVideos, prepare
from latentcast.evaluation import report
from latentcast.evaluation.choice import fitting_futures
from latentcast.evaluation.comparison import paired
from latentcast.evaluation.evaluator import Evaluation, _seed
from latentcast.evaluation.results import read_result
from latentcast.metrics import FVD, I3D, LPIPS, bits_per_dim, crps, ilpips, mse, psnr, ssim
from latentcast.metrics.baselines import copy_last_frame

PROTOCOL = {"n_context": 2, "n_predicted": 4, "n_samples": 3, "n_clips": 5, "frame_size": 16}
PROTOCOL |= {"metrics": ["mse", "psnr", "ssim", "crps", "bits"], "best_of": [1, 2]}


def protocol(**changes):
    return Protocol(name="tiny", **(PROTOCOL | changes))


def dataset(n_frames=6):
    return MovingDigits("test", n_frames, size=16, digit_size=12, n_heldout_videos=8, video_length=6, lattice=1)


@pytest.fixture(scope="module")
def pipe():
    torch.manual_seed(0)
    tokenizer = PixelTokenizer(1, 16, 16, levels=256)
    prior = VideoTransformer(
        tokenizer.latent_spec, n_frames=6, subscale=[1, 4, 4], dim=16, embed_dim=8, n_heads=2, head_dim=8, n_layers=1
    )
    return VideoPredictionPipeline(prior.eval(), tokenizer)


def evaluation(pipe, folder, **changes):
    options = {
        name: changes.pop(name)
        for name in ("sampler", "futures", "baselines", "weights", "references")
        if name in changes
    }
    return Evaluation(pipe, dataset(), protocol(**changes), folder, **({"futures": 6} | options))


def test_figures_are_what_the_metrics_give(pipe, tmp_path):
    found = evaluation(pipe, tmp_path)
    assert found.groups == [[0, 1], [3, 4], [6]]  # five of eight clips, spread; two a group of six futures
    found.run()
    results = found.finish()
    data, values = dataset(), {"psnr": [], "ssim": [], "crps": [], "mean_psnr": [], "first": []}
    for group, clips in enumerate(found.groups):
        frames = torch.stack([data[i]["frames"] for i in clips])
        context, target = frames[:, :2], frames[:, 2:]
        samples = found._draw(context, group)
        for name, metric in (("psnr", psnr), ("ssim", ssim)):
            scores = torch.stack([metric(sample, target).mean(1) for sample in samples.unbind(1)], 1)
            values[name] += scores.amax(1).tolist()
            if name == "psnr":
                values["mean_psnr"] += scores.mean(1).tolist()
                values["first"] += scores[:, 0].tolist()
        values["crps"] += crps(samples, target).mean(1).tolist()
    metrics = results["metrics"]
    mean = {name: sum(rows) / len(rows) for name, rows in values.items()}
    assert list(metrics) == ["mse", "psnr", "ssim", "crps", "bits"]
    for name in ("psnr", "ssim", "crps"):
        assert metrics[name]["mean"] == pytest.approx(mean[name], rel=1e-5)
        assert metrics[name]["per_clip"] == pytest.approx(values[name], rel=1e-5)
        assert metrics[name]["n_clips"] == 5 and len(metrics[name]["per_frame"]) == 4
    assert metrics["psnr"]["mean_of_samples"]["mean"] == pytest.approx(mean["mean_psnr"], rel=1e-5)
    assert metrics["psnr"]["best_of"]["1"]["mean"] == pytest.approx(mean["first"], rel=1e-5)
    assert metrics["mse"]["clips"] == [0, 1, 3, 4, 6]
    clips = torch.stack([data[i]["frames"] for i in (0, 1, 3, 4, 6)])
    expected = mse(copy_last_frame(clips[:, :2], 4), clips[:, 2:]).mean().item()
    assert results["baselines"]["copy_last_frame"]["mse"]["mean"] == pytest.approx(expected, rel=1e-5)
    assert results["baselines"]["reconstruction"]["psnr"]["mean"] > 48  # 8-bit pixels
    assert 7 < metrics["bits"]["mean"] < 10  # an untrained model over 256 levels
    assert results["baselines"]["copy_last_frame"]["crps"]["mean"] == pytest.approx(
        127.5 * (copy_last_frame(clips[:, :2], 4) - clips[:, 2:]).abs().mean().item(), rel=1e-5
    )


def test_frames_and_maps_do_not_pile_up(tmp_path, monkeypatch):
    """What ``finish`` keeps of a clip does not grow with its frames' size."""
    kept, summarise = [], Evaluation._summarise
    monkeypatch.setattr(
        Evaluation, "_summarise", lambda self, found, real: kept.append(found) or summarise(self, found, real)
    )
    found = evaluation(coded(channels=1), tmp_path, metrics=["mse", "crps"])
    found.run()
    found.finish()
    shapes = {tensor.shape[1:] for metrics in kept for parts in metrics.values() for _, tensor in parts}
    assert shapes == {(3, 4), (1, 4), (4,)}  # (S, T) of mse, S = 1 for baselines; (T,) of crps
    mapped = Path("/proc/self/maps")  # of Linux
    assert not (mapped.is_file() and str(tmp_path) in mapped.read_text())  # no file is kept in memory, whole
    maps = found.crps_maps()
    assert maps.keys() == {"model", *found.baselines} and maps["model"].shape == (16, 16)


def test_tensors_of_a_part_keep_their_names_on_the_disk(tmp_path):
    """So that what another version has measured goes on."""
    found = evaluation(coded(channels=1), tmp_path, metrics=["mse", "crps"])
    assert found.measure(0).keys() >= {("model", "mse"), ("maps", "copy_last_frame"), ("shown", "best")}
    found.run()
    whos = ("model", *found.baselines)
    expected = {"shown.best", "shown.random"} | {f"maps.{who}" for who in whos}
    expected |= {f"{who}.{metric}" for who in whos for metric in ("mse", "crps")}
    with safe_open(tmp_path / "parts/group-00000.safetensors", "pt") as part:
        assert {*part.keys()} == expected


def test_an_interrupted_evaluation_goes_on(tmp_path):
    pipe = coded(channels=1)
    whole = evaluation(pipe, tmp_path / "whole")
    whole.run()
    halved = evaluation(pipe, tmp_path / "halved")
    measure, measured = halved.measure, []

    def stop_at_the_second(group):
        if group == 1:
            raise KeyboardInterrupt
        return measure(group)

    halved.measure = stop_at_the_second
    with pytest.raises(KeyboardInterrupt):
        halved.run()
    resumed = evaluation(pipe, tmp_path / "halved")
    measure_again = resumed.measure
    resumed.measure = lambda group: measured.append(group) or measure_again(group)
    assert resumed.run() == 3 and measured == [1, 2]
    assert resumed.finish() == whole.finish()


def test_what_no_model_changes_is_measured_once(tmp_path, monkeypatch):
    """Figures of a second model are the same with what the first one's evaluation has kept, and without."""
    features, passed = I3D.forward, []
    monkeypatch.setattr(I3D, "forward", lambda self, videos: passed.append(len(videos)) or features(self, videos))
    save_scripted(tmp_path / "i3d_torchscript.pt")
    tokenizer = PixelTokenizer(1, 16, 16, levels=256)
    data = MovingDigits("test", 9, size=16, digit_size=12, n_heldout_videos=8, video_length=9, lattice=1)

    def run(seed, name, references="kept", **changes):
        torch.manual_seed(seed)
        passed.clear()
        pipe = VideoPredictionPipeline(RecurrentVAE(tokenizer.latent_spec, **SMALL_RECURRENT_VAE).eval(), tokenizer)
        fields = {"metrics": ["mse", "crps", "fvd"], "detector": "i3d_torchscript", "n_context": 3, "n_predicted": 6}
        options = {"weights": tmp_path, "references": references and tmp_path / references}
        found, results = evaluated(pipe, tmp_path / name, data, **fields | options | changes)
        return results, found.crps_maps(), sum(passed)

    assert run(0, "first")[2] == 5 * 5  # of five clips the model, the truth, and three baselines
    results, maps, n_videos = run(1, "second")
    assert n_videos == 2 * 5  # the model and the reconstruction
    alone, maps_alone, n_videos = run(1, "alone", references=None)
    assert n_videos == 5 * 5 and results == alone
    assert maps.keys() == maps_alone.keys() and all(torch.equal(maps[who], maps_alone[who]) for who in maps)
    assert run(1, "fewer", baselines=[])[2] == 5  # the model
    for number, changes in enumerate(({"n_clips": 4}, {"n_predicted": 5, "n_context": 4}, {"metrics": ["mse", "fvd"]})):
        n_clips = changes.get("n_clips", 5)
        assert run(1, f"other{number}", **changes)[2] == 5 * n_clips


def test_a_damaged_reference_is_named(tmp_path):
    evaluation(coded(channels=1), tmp_path / "first", references=tmp_path / "kept", metrics=["mse"]).run()
    part = next(iter((tmp_path / "kept").rglob("group-00001.safetensors")))
    part.write_bytes(part.read_bytes()[:50])
    with pytest.raises(OSError, match=f"{part}: cannot be read"):
        evaluation(coded(channels=1), tmp_path / "second", references=tmp_path / "kept", metrics=["mse"]).run()


def test_parts_of_another_protocol_are_not_taken(tmp_path):
    pipe = coded(channels=1)
    evaluation(pipe, tmp_path).run()
    other = evaluation(pipe, tmp_path, seed=1)
    assert other.run() == 5


def test_a_seed_gives_the_same_futures(tmp_path):
    pipe = coded(channels=1)
    first, again, other = (evaluation(pipe, tmp_path / str(i), seed=seed) for i, seed in enumerate((0, 0, 1)))
    for one in (first, again, other):
        one.run()
    assert first.finish() == again.finish()
    assert first.finish()["metrics"]["mse"]["per_clip"] != other.finish()["metrics"]["mse"]["per_clip"]


def test_fvd_of_the_scripted_detector(tmp_path, monkeypatch):
    """Its features are resumed from disk, its fingerprint is in the results, and the context is part of the videos."""
    monkeypatch.setattr(
        "test_evaluate.dataset",
        lambda: MovingDigits("test", 9, size=16, digit_size=12, n_heldout_videos=8, video_length=9, lattice=1),
    )
    torch.manual_seed(0)
    tokenizer = PixelTokenizer(1, 16, 16, levels=256)
    prior = RecurrentVAE(tokenizer.latent_spec, **SMALL_RECURRENT_VAE)  # draws a frame at once
    pipe = VideoPredictionPipeline(prior.eval(), tokenizer)
    save_scripted(tmp_path / "i3d_torchscript.pt")
    changes = {"metrics": ["fvd"], "detector": "i3d_torchscript", "n_context": 3, "n_predicted": 6, "best_of": []}
    found = evaluation(pipe, tmp_path / "a", weights=tmp_path, fvd_samples=2, **changes)
    found.run()
    results = found.finish()
    fvd = FVD(I3D(tmp_path / "i3d_torchscript.pt"))
    data = found.dataset
    for group, clips in enumerate(found.groups):
        frames = torch.stack([data[i]["frames"] for i in clips])
        samples = found._draw(frames[:, :3], group)[:, :2]
        fvd.update(real=frames, fake=torch.cat([frames[:, None, :3].expand(-1, 2, -1, -1, -1, -1), samples], 2))
    assert results["metrics"]["fvd"]["mean"] == pytest.approx(fvd.compute(), rel=1e-6)
    assert (results["metrics"]["fvd"]["n_real"], results["metrics"]["fvd"]["n_fake"]) == (5, 10)
    assert results["detector"]["fvd"] == hashlib.sha256((tmp_path / "i3d_torchscript.pt").read_bytes()).hexdigest()
    assert results["baselines"]["reconstruction"]["fvd"]["mean"] < results["metrics"]["fvd"]["mean"]
    with pytest.raises(FileNotFoundError, match=r"i3d_torchscript.pt: not in .*; put it there"):
        evaluation(pipe, tmp_path / "b", weights=tmp_path / "nowhere", **changes)
    for fewer, message in (
        ({"n_clips": 1}, "at least 2 for fvd"),
        ({"fvd_debiased": True}, "at least 100 for debiased"),
    ):
        with pytest.raises(ValueError, match=f"protocol tiny: n_clips: expected {message}"):  # before anything is drawn
            evaluation(pipe, tmp_path / "b", weights=tmp_path, **changes, **fewer)

    table = report.table(found, results)
    assert "fvd: 5 real against 10 generated videos" in table and "extrapolated" not in table
    for place, metrics in enumerate([results["metrics"], *results["baselines"].values()]):
        metrics["fvd"]["debiased"] = 10.0 + place
    expected = "model 10, copy_last_frame 11, mean_context 12, reconstruction 13"
    assert f"fvd, extrapolated to infinitely many videos: {expected}." in report.table(found, results)


class Repeats(VideoTransformer):
    """Its prediction without chance is its last frame's codes."""

    def predict_mean(self, context, n_frames):
        return context[:, -1:].expand(-1, n_frames, -1, -1, -1)


def test_each_picture_passes_lpips_once(tmp_path, monkeypatch):
    weights_or_skip("lpips_alex")
    passed, features = [], LPIPS._features
    monkeypatch.setattr(LPIPS, "_features", lambda self, x: passed.append(len(x)) or features(self, x))
    data = MovingDigits("test", 6, size=32, digit_size=14, n_heldout_videos=8, video_length=6, lattice=1)
    changes = {"metrics": ["mse", "lpips", "ilpips"], "frame_size": 32, "best_of": [], "n_clips": 2}
    found = Evaluation(coded(size=32, channels=1), data, protocol(**changes), tmp_path, futures=6)
    found.run()
    # Of four frames of two clips: three samples, the truth, the reconstruction; two baselines of one picture a clip.
    assert found.baselines == ["copy_last_frame", "mean_context", "reconstruction"]
    assert sum(passed) == 2 * (4 * (3 + 1 + 1) + 2)
    results = found.finish()
    frames = torch.stack([data[i]["frames"] for i in found.groups[0]])
    context, target = frames[:, :2], frames[:, 2:]
    samples = found._draw(context, 0)
    distances = torch.stack([found.lpips(sample, target).mean(1) for sample in samples.unbind(1)], 1)
    assert results["metrics"]["lpips"]["per_clip"] == pytest.approx(distances.amin(1).tolist(), rel=1e-4)
    assert results["metrics"]["ilpips"]["per_clip"] == pytest.approx(
        ilpips(samples, found.lpips).mean(1).tolist(), rel=1e-4
    )
    still = found.lpips(copy_last_frame(context, 4), target).mean(1)
    assert results["baselines"]["copy_last_frame"]["lpips"]["per_clip"] == pytest.approx(still.tolist(), rel=1e-4)


class Roomless(VideoTransformer):
    """Has no memory for more than so many futures."""

    room = 0

    def sample(self, context, *args, num_samples=1, **options):
        if len(context) * num_samples > self.room:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return super().sample(context, *args, num_samples=num_samples, **options)


@pytest.mark.parametrize("room", [3, 2])  # a clip with its samples; not even that
def test_what_does_not_fit_is_drawn_in_smaller_batches_with_their_figures(tmp_path, caplog, room):
    pipe = coded(Roomless)
    pipe.prior.room = room
    options = {"metrics": ["mse", "crps"], "best_of": [], "frame_size": 16, "n_clips": 5}
    small, large = (
        Evaluation(pipe, colour(), protocol(**options), tmp_path / str(n), futures=n) for n in (room, 4 * room)
    )
    results = []
    for found in (small, large):
        found.run()
        results.append(found.finish())
    assert [len(found.groups) for found in (small, large)] == ([5, 2] if room == 3 else [5, 3])
    assert results[0]["metrics"] == results[1]["metrics"] and results[0]["baselines"] == results[1]["baselines"]
    for who, expected in small.crps_maps().items():
        torch.testing.assert_close(large.crps_maps()[who], expected)
    assert caplog.text.count("out of memory: going on with") == 2
    assert f"{room} futures at once, as evaluation.futures={room} would" in caplog.text
    pipe.prior.room = 0
    with pytest.raises(torch.OutOfMemoryError):
        Evaluation(pipe, colour(), protocol(**options), tmp_path / "none", futures=4).run()


def test_how_many_futures_are_drawn_by_default(pipe, tmp_path):
    huge = argparse.Namespace(channels=3)
    assert fitting_futures("cuda", dataset(), protocol()) == 512
    assert evaluation(pipe, tmp_path, futures=None).futures == fitting_futures("cpu", dataset(), protocol()) == 64
    assert fitting_futures("cpu", huge, protocol(frame_size=4096, n_predicted=10**6)) == 1


class NeverSamples(VideoTransformer):
    def sample(self, *args, **options):
        raise AssertionError("nothing was to be drawn")


def coded(prior=VideoTransformer, size=16, channels=3):
    """A pipeline over the codes of a tokenizer that was never trained, so that no frame survives it."""
    torch.manual_seed(0)
    tokenizer = VQVAE(channels, size, size, codebook_size=12, stride=8, **SMALL_VQVAE).eval()
    options = {"subscale": [1, 1, 1], "dim": 16, "embed_dim": 8, "n_heads": 2, "head_dim": 8, "n_layers": 1}
    return VideoPredictionPipeline(prior(tokenizer.latent_spec, n_frames=6, **options).eval(), tokenizer)


def colour(n_frames=6, video_length=None):
    length = video_length or n_frames
    return MovingDigits("test", n_frames, 16, 3, digit_size=12, n_heldout_videos=8, video_length=length, lattice=1)


def evaluated(pipe, folder, data=None, **changes):
    names = ("sampler", "baselines", "weights", "crps_map", "references")
    options = {name: changes.pop(name) for name in names if name in changes}
    fields = {"metrics": ["mse"], "best_of": []} | changes
    found = Evaluation(pipe, data or colour(), protocol(**fields), folder, futures=6, **options)
    found.run()
    return found, found.finish()


def whole_clips(found):
    """-> the clips and their reconstructions, (B, T, C, H, W)"""
    clips = torch.stack([found.dataset[i]["frames"] for i in found.clips])
    with torch.no_grad():
        return clips, found.pipe.tokenizer.decode(found.pipe.tokenizer.encode(clips).latents)


def test_the_reconstruction_is_of_the_whole_clip(tmp_path):
    """LVT, Tables 1 and 4: MSE and FVD of all 16 frames reconstructed, the context among them."""
    save_scripted(tmp_path / "i3d_torchscript.pt")
    changes = {"metrics": ["clip_mse", "fvd", "mse"], "detector": "i3d_torchscript", "n_context": 3, "n_predicted": 6}
    found, results = evaluated(coded(), tmp_path / "a", colour(9), weights=tmp_path, **changes)
    clips, reconstructed = whole_clips(found)

    def fvd_of(fake):
        fvd = FVD(I3D(tmp_path / "i3d_torchscript.pt"))
        for rows in ([0, 1], [2, 3], [4]):  # in the groups of the evaluation, for the stand-in sees a whole batch
            fvd.update(real=clips[rows], fake=fake[rows])
        return fvd.compute()

    reconstruction = results["baselines"]["reconstruction"]
    assert reconstruction["fvd"]["mean"] == pytest.approx(fvd_of(reconstructed), rel=1e-5)
    with_true_context = fvd_of(torch.cat([clips[:, :3], reconstructed[:, 3:]], 1))
    assert with_true_context != pytest.approx(fvd_of(reconstructed), rel=0.1)
    by_frame = mse(reconstructed, clips)
    assert reconstruction["clip_mse"]["mean"] == pytest.approx(by_frame.mean().item(), rel=1e-5)
    assert reconstruction["clip_mse"]["per_frame"] == pytest.approx(by_frame.mean(0).tolist(), rel=1e-5)
    assert reconstruction["mse"]["mean"] == pytest.approx(by_frame[:, 3:].mean().item(), rel=1e-5)
    assert "clip_mse" not in results["metrics"]  # a model is given the context
    text = report.table(found, results)
    assert "| MSE ↓ | MSE of the whole clip ↓ | FVD ↓ |" in text
    with pytest.raises(ValueError, match="metrics: expected one beside clip_mse"):
        protocol(metrics=["clip_mse"])


def test_bits_alone_draw_nothing(tmp_path):
    (tmp_path / "metrics").mkdir()
    found, results = evaluated(coded(NeverSamples), tmp_path / "a", metrics=["bits", "clip_mse"])
    clips, reconstructed = whole_clips(found)
    codes = found.pipe.encode(clips)
    with torch.no_grad():
        expected = bits_per_dim(found.pipe.prior.log_prob(codes, 2), codes[0, 2:].shape)
    assert results["metrics"].keys() == {"bits"}
    assert results["metrics"]["bits"]["per_clip"] == pytest.approx(expected.tolist(), rel=1e-5)
    assert results["baselines"].keys() == {"reconstruction"}  # the others have neither
    assert results["baselines"]["reconstruction"]["clip_mse"]["mean"] == pytest.approx(
        mse(reconstructed, clips).mean().item(), rel=1e-5
    )
    files = report.write_report(found, results, tmp_path / "metrics")
    assert files.keys() == {"figures", "table"}
    read = read_result(files["figures"])
    assert paired(read, read)["bits"]["difference"] == 0
    with pytest.raises(AssertionError, match="nothing was to be drawn"):
        evaluated(coded(NeverSamples), tmp_path / "b", metrics=["bits", "mse"])


def test_psnr_by_channel(tmp_path):
    pipe = coded()
    *_, bias = (tensor for tensor in pipe.tokenizer.parameters() if tensor.shape == (3,))
    bias.data.copy_(torch.tensor([0.5, 0.0, -1.5]))  # channels that are not equally wrong
    found, results = evaluated(pipe, tmp_path / "a", metrics=["psnr"], psnr="channel")
    clips, reconstructed = whole_clips(found)
    by_channel = sum(psnr(reconstructed[:, 2:, c : c + 1], clips[:, 2:, c : c + 1]) for c in range(3)) / 3
    channel = results["baselines"]["reconstruction"]["psnr"]["mean"]
    assert channel == pytest.approx(by_channel.mean().item(), rel=1e-5)
    _, usual = evaluated(pipe, tmp_path / "b", metrics=["psnr"])
    assert channel > usual["baselines"]["reconstruction"]["psnr"]["mean"] + 0.1


def test_frames_are_rounded_before_every_metric(tmp_path):
    """As pictures of 8 bits; the model's own frames are not."""
    save_scripted(tmp_path / "i3d_torchscript.pt")
    changes = {"metrics": ["mse", "clip_mse", "crps", "fvd"], "detector": "i3d_torchscript", "n_context": 3}
    changes |= {"n_predicted": 6, "weights": tmp_path}
    found, results = evaluated(coded(), tmp_path / "a", colour(9), rounded=True, **changes)
    _, unrounded = evaluated(coded(), tmp_path / "b", colour(9), **changes)

    def kept(frames):
        return torch.from_numpy(((frames.numpy() + 1) * 127.5 + 0.5).astype("uint8")).float() / 127.5 - 1

    clips, reconstructed = whole_clips(found)
    assert (clips - kept(clips)).abs().max() < 1e-6 and (reconstructed - kept(reconstructed)).abs().max() > 1e-3
    found_crps, found_fvd = [], FVD(I3D(tmp_path / "i3d_torchscript.pt"))
    for group, numbers in enumerate(found.groups):
        frames = torch.stack([found.dataset[i]["frames"] for i in numbers])
        samples = kept(found._draw(frames[:, :3], group))
        found_crps.append(crps(samples, frames[:, 3:]).mean().item() * len(numbers) / 5)
        found_fvd.update(real=frames, fake=torch.cat([frames[:, :3], samples[:, 0]], 1))
    metrics, reconstruction = results["metrics"], results["baselines"]["reconstruction"]
    assert metrics["crps"]["mean"] == pytest.approx(sum(found_crps), rel=1e-5)
    assert metrics["fvd"]["mean"] == pytest.approx(found_fvd.compute(), rel=1e-4)
    assert reconstruction["clip_mse"]["mean"] == pytest.approx(mse(kept(reconstructed), clips).mean().item(), rel=1e-6)
    assert reconstruction["mse"]["mean"] == pytest.approx(
        mse(kept(reconstructed), clips)[:, 3:].mean().item(), rel=1e-6
    )
    for name in ("mse", "crps", "fvd"):
        assert metrics[name]["mean"] != unrounded["metrics"][name]["mean"]


def test_clips_of_one_video_are_no_independent_clips(tmp_path):
    found, results = evaluated(
        coded(), tmp_path, colour(6, video_length=18), n_clips=16, metrics=["mse", "crps", "bits"]
    )
    assert found.clips == [i * 24 // 16 for i in range(16)]  # three clips a video, of which two are taken
    videos = [clip // 3 for clip in found.clips]
    for name in ("mse", "crps", "bits"):
        entry = results["metrics"][name]
        assert (entry["videos"], entry["n_clips"], entry["n_videos"]) == (videos, 16, 8)
    values = torch.tensor(results["metrics"]["mse"]["per_clip"], dtype=torch.float64)
    sums = (values - values.mean()).view(8, 2).sum(1)
    half = 2.364624 * (8 / 7 * sums.square().sum()).sqrt().item() / 16  # t of seven degrees of freedom
    low, high = results["metrics"]["mse"]["ci95"]
    assert (high - low) / 2 == pytest.approx(half, rel=1e-5)
    assert "by Student's t over the 8 videos" in report.table(found, results)
    assert paired(results, results)["mse"]["n_videos"] == 8


def test_the_prediction_without_chance_is_a_yardstick(tmp_path, caplog):
    caplog.set_level("INFO", logger="latentcast")
    found, results = evaluated(coded(Repeats), tmp_path / "a", metrics=["mse", "crps"])
    clips, reconstructed = whole_clips(found)
    expected = reconstructed[:, 1:2].expand(-1, 4, -1, -1, -1)  # the tokenizer's own of the last frame given
    deterministic = results["baselines"]["deterministic"]
    assert deterministic["mse"]["mean"] == pytest.approx(mse(expected, clips[:, 2:]).mean().item(), rel=1e-5)
    assert deterministic["crps"]["mean"] == pytest.approx(
        127.5 * (expected - clips[:, 2:]).abs().mean().item(), rel=1e-5
    )
    assert "left out" not in caplog.text

    found, results = evaluated(coded(), tmp_path / "b", baselines=["deterministic"])
    assert results["baselines"] == {} and found.identity["settings"]["baselines"] == []
    assert "the baseline deterministic is left out: VideoTransformer has no predict_mean" in caplog.text


def test_what_a_pipeline_cannot_give_is_left_out_by_name(tmp_path, caplog):
    """A prior over pixels has no tokenizer, and this one no likelihood."""
    caplog.set_level("INFO", logger="latentcast")
    spec = PixelTokenizer(3, 16, 16, levels=None).latent_spec
    pipe = VideoPredictionPipeline(RecurrentVAE(spec, n_groups=1, aligner="none", **SMALL_RECURRENT_VAE).eval())
    _, results = evaluated(pipe, tmp_path, metrics=["mse", "bits", "clip_mse"])
    assert results["metrics"].keys() == {"mse"} and results["baselines"].keys() == {"copy_last_frame", "mean_context"}
    for line in (
        "the baseline reconstruction is left out: the pipeline has no tokenizer",
        "the metric bits is left out: RecurrentVAE has no likelihood",
    ):
        assert line in caplog.text
    for metrics in (["bits"], ["bits", "clip_mse"]):
        with pytest.raises(ValueError, match="protocol tiny: bits: RecurrentVAE has no likelihood"):
            evaluated(pipe, tmp_path, metrics=metrics)


def test_maps_of_crps_of_one_frame_of_one_clip(tmp_path):
    """RVD's Figure 4."""
    (tmp_path / "metrics").mkdir()
    chosen = {"clip": 4, "frame": 3}
    changes = {"metrics": ["crps"], "baselines": ["copy_last_frame"]}
    found, results = evaluated(coded(), tmp_path / "one", crps_map=chosen, **changes)
    group = next(g for g, clips in enumerate(found.groups) if 4 in clips)
    frames = torch.stack([found.dataset[i]["frames"] for i in found.groups[group]])
    place = found.groups[group].index(4)
    samples = found._draw(frames[:, :2], group)
    expected = {"model": samples, "copy_last_frame": copy_last_frame(frames[:, :2], 4)[:, None]}
    maps = found.crps_maps()
    for who, prediction in expected.items():
        of_frame = crps(prediction, frames[:, 2:], reduction="none")[place, 2].mean(0)
        torch.testing.assert_close(maps[who].float(), of_frame)
    files = report.write_report(found, results, tmp_path / "metrics")
    read, title = report.read_maps(Path(files["figures"]))
    assert title == "clip 4, predicted frame 3" and torch.equal(read["model"], maps["model"])
    assert Path(files["crps_maps"]).is_file()

    found, results = evaluated(coded(), tmp_path / "mean", **changes)
    assert found.crps_maps()["model"].mean().item() == pytest.approx(results["metrics"]["crps"]["mean"], rel=1e-5)
    report.write_report(found, results, tmp_path / "metrics")
    assert report.read_maps(Path(files["figures"]))[1] == "mean over 5 clips and 4 predicted frames"
    for wrong, message in (
        (
            {"clip": 5, "frame": 1},
            r"crps_map\.clip: expected one of the clips that are measured, 0, 1, 3, 4, \.\.\. 6, fo",
        ),
        ({"clip": 4, "frame": 5}, r"crps_map\.frame: expected 1 to 4, found 5"),
        ({"clip": 4}, r"crps_map: expected a clip and a frame, or null, found \{'clip': 4\}"),
        ("mean", "crps_map: expected a clip and a frame, or null, found 'mean'"),
    ):
        with pytest.raises(ValueError, match=f"evaluation.{message}"):
            evaluated(coded(), tmp_path / "wrong", crps_map=wrong, **changes)
    with pytest.raises(ValueError, match=r"evaluation\.crps_map: the protocol tiny does not measure crps"):
        evaluated(coded(), tmp_path / "wrong", crps_map=chosen)


def test_the_table_has_the_mean_of_the_samples_too(tmp_path):
    found, results = evaluated(coded(), tmp_path / "a", metrics=["mse", "crps"])
    rows = report.table(found, results).splitlines()
    (line,) = [row for row in rows if row.startswith("| model, mean of the samples |")]
    mean = results["metrics"]["mse"]["mean_of_samples"]["mean"]
    assert f"| {mean:.4g} ± " in line and line.endswith("| – |") and mean > results["metrics"]["mse"]["mean"]
    found, results = evaluated(coded(), tmp_path / "b", n_samples=1)
    assert "mean of the samples |" not in report.table(found, results)


def test_measuring_leaves_a_model_in_training_as_it_was(tmp_path):
    """Its codebooks would move otherwise."""
    pipe = coded()
    pipe.tokenizer.train()
    before = {name: tensor.clone() for name, tensor in pipe.tokenizer.state_dict().items()}
    evaluated(pipe, tmp_path, metrics=["mse", "clip_mse", "bits"])
    assert pipe.tokenizer.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in pipe.tokenizer.state_dict().items())


def test_a_context_at_half_the_rate(pipe, tmp_path):
    """STDiff's Table 4: every second frame up to the last one given, then every frame."""
    changes = {"fps_multiplier": 2, "n_predicted": 3, "metrics": ["psnr"], "best_of": []}
    with pytest.raises(ValueError, match="fps_multiplier 2: VideoTransformer predicts whole frame steps"):
        evaluation(pipe, tmp_path, **changes)
    with pytest.raises(ValueError, match="sampler: fps_multiplier: the protocol sets it"):
        evaluation(pipe, tmp_path, sampler={"fps_multiplier": 2})
    data = dataset()
    frames = torch.stack([data[i]["frames"] for i in (0, 1)])
    context, target = protocol(**changes).divide(frames)
    assert torch.equal(context, frames[:, [0, 2]]) and torch.equal(target, frames[:, 3:])

    torch.manual_seed(0)
    tokenizer = PixelTokenizer(1, 16, 16, levels=None)
    prior = SDEDiffusion(tokenizer.latent_spec, **SMALL_SDE_DIFFUSION)
    pipe = VideoPredictionPipeline(prior.eval(), tokenizer)
    found = Evaluation(pipe, data, protocol(**changes), tmp_path, sampler={"n_steps": 2}, futures=6)
    generator = torch.Generator().manual_seed(_seed(0, 0))
    expected = pipe(context, frame_times=[0.5, 1, 1.5], num_samples=3, generator=generator, n_steps=2).frames
    assert torch.equal(found._draw(context, 0), expected)
    found.run()
    results = found.finish()
    copied = copy_last_frame(context, 3)
    both = psnr(copied, target).mean(1).tolist()
    assert results["baselines"]["copy_last_frame"]["psnr"]["per_clip"][:2] == pytest.approx(both, rel=1e-5)
    assert "3 predicted at 2 times the context's frame rate" in report.table(found, results)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"n_clips": 9}, "n_clips: expected 9 clips of 6 frames, the test split has 8"),
        ({"frame_size": 32}, "frame_size: expected 32, the data set serves 16"),
        ({"n_predicted": 3}, "expected clips of 5 frames, found 6"),
        ({"data_options": {"n_digits": 3}}, "data_options: expected n_digits=3, found None"),
        ({"data": "bair"}, "data: expected bair, found None"),
        ({"baselines": ["zero"]}, "expected some of copy_last_frame, .*, found 'zero'"),
        ({"futures": 0}, "evaluation.futures: expected a whole number of at least 1, found 0"),
        ({"futures": 2.5}, "evaluation.futures: expected a whole number of at least 1, found 2.5"),
        ({"baselines": None}, "evaluation.baselines: expected a list, found None"),
        ({"baselines": "zero"}, "evaluation.baselines: expected a list, found 'zero'"),
        ({"sampler": "ddpm"}, "evaluation.sampler: expected options and their values, found 'ddpm'"),
    ],
)
def test_what_does_not_belong_together_is_refused(pipe, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        evaluation(pipe, tmp_path, **changes)


class Prepared(Noise):
    """Noise with an option that shapes the training videos alone."""

    def __init__(self, n_train):
        super().__init__(frame_size=16, channels=1)
        self.n_train = n_train

    def describe(self):
        return super().describe() | {"n_train": self.n_train}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """Two prepared sets with the same test clips."""
    folder = tmp_path_factory.mktemp("prepared")
    for n_train in (5, 9):
        prepare(Prepared(n_train), folder / str(n_train))
    return folder


def test_a_protocol_of_one_set_refuses_every_second_frame(pipe, tmp_path, prepared):
    changes = {"n_clips": None, "n_predicted": 1}
    every, second = (PreparedVideos(prepared / "5", "test", 3, frame_stride=stride) for stride in (1, 2))
    Evaluation(pipe, every, protocol(**changes, data="noise"), tmp_path)
    with pytest.raises(ValueError, match=r"protocol tiny: data\.frame_stride: expected 1, found 2"):
        Evaluation(pipe, second, protocol(**changes, data="noise"), tmp_path)
    Evaluation(pipe, second, protocol(**changes), tmp_path)  # a protocol of any set has no rate of its own


def test_options_of_the_training_split_are_no_part_of_the_identity(pipe, tmp_path, prepared):
    clips = [PreparedVideos(prepared / str(n_train), "test", 6) for n_train in (5, 9)]
    assert clips[0].describe() != clips[1].describe()
    first, second = (Evaluation(pipe, data, protocol(n_clips=None), tmp_path).identity for data in clips)
    assert first == second


def test_futures_that_are_not_numbers_are_named(pipe, tmp_path):
    found = evaluation(pipe, tmp_path)
    found._draw = lambda context, group, told: torch.full((2, 3, 4, 1, 16, 16), torch.nan)
    with pytest.raises(ValueError, match=r"model: NaN or infinity among the frames predicted for clips \[0, 1\]"):
        found.run()


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"n_samples": 0}, "n_samples: expected at least 1, found 0"),
        ({"n_context": 2.5}, "n_context: expected a whole number, found 2.5"),
        ({"n_context": None}, "n_context: expected a whole number, found None"),
        ({"n_clips": 1.5}, "n_clips: expected a whole number, found 1.5"),
        ({"n_clips": True}, "n_clips: expected a whole number, found True"),
        ({"seed": "x"}, "seed: expected a whole number, found 'x'"),
        ({"split": "train"}, "split: expected one of val, test, found 'train'"),
        ({"data_options": 3}, "data_options: expected an object, found 3"),
        ({"fvd_context": "no"}, "fvd_context: expected true or false, found 'no'"),
        ({"metrics": "psnr"}, "metrics: expected a list, found 'psnr'"),
        ({"metrics": [["psnr"]]}, r"metrics\[0\]: expected one of mse, "),
        ({"best_of": 2}, "best_of: expected a list, found 2"),
        ({"best_of": ["a"]}, r"best_of\[0\]: expected a whole number, found 'a'"),
        ({"metrics": ["psnr", "fid"]}, r"metrics\[1\]: expected one of mse, .*, found 'fid'"),
        ({"metrics": ["ilpips"], "n_samples": 1, "best_of": []}, "n_samples: expected at least 2 for ilpips"),
        ({"best_of": [4]}, "best_of: expected whole numbers from 1 to n_samples=3"),
        ({"metrics": ["fvd"], "fvd_context": False}, "at least 9 frames a video for fvd, here 4, found 4"),
        ({"fps_multiplier": 0}, "fps_multiplier: expected at least 1, found 0"),
        ({"fps_multiplier": 2}, "fps_multiplier: expected 1 for bits"),
        ({"ssim": "box"}, "ssim: expected one of gaussian, uniform, found 'box'"),
        ({"psnr": "mean"}, "psnr: expected one of frame, channel, found 'mean'"),
        ({"rounded": 8}, "rounded: expected true or false, found 8"),
        ({"metrics": ["ssim"], "frame_size": 8}, "frame_size: expected at least 11 for ssim, found 8"),
        ({"metrics": ["lpips"]}, "frame_size: expected at least 31 for lpips, found 16"),
        ({"metrics": ["ilpips"], "lpips": "vgg", "frame_size": 8}, "frame_size: expected at least 16 for ilpips"),
    ],
)
def test_a_protocol_that_cannot_be(changes, message):
    with pytest.raises(ValueError, match=f"protocol tiny: .*{message}"):
        protocol(**changes)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A tiny experiment, trained for a few steps."""
    folder = tmp_path_factory.mktemp("trained")
    for tool in ("train_tokenizer", "encode_dataset", "train_prior"):
        call_tool(tool, folder)
    path = folder / "protocol.yaml"
    return folder, path


TINY = ["protocol=one_digit", "protocol.n_clips=6", "protocol.n_context=2", "protocol.n_predicted=4"]
TINY += ["protocol.frame_size=16", "protocol.n_samples=2", "protocol.best_of=[1]", "evaluation.futures=4"]
TINY += ["protocol.metrics=[mse,psnr,ssim,crps]", "data.video_length=6"]


def comparable(path):
    own = ("seconds", "hardware", "model", "command")
    return {k: v for k, v in json.loads(Path(path).read_text()).items() if k not in own}


def test_the_tool_from_end_to_end_and_by_two_processes(trained, tmp_path, command):
    folder, _ = trained
    status, figures, err = command("evaluate", write_experiment(folder), *TINY)
    assert status == 0, err
    metrics = folder / "run" / "metrics"
    for kind in ("figures", "table", "curves_psnr", "ablation_psnr", "best_sheet", "worst_video", "crps_maps"):
        assert Path(figures["files"][kind]).is_file(), kind
    assert not (metrics / "one_digit.partial").exists()
    results = json.loads((metrics / "one_digit.json").read_text())
    assert 0 < results["seconds"]["measuring"] < results["seconds"]["this_run"]
    assert results["protocol"]["n_clips"] == 6 and results["model"]["prior"] == "VideoTransformer"
    means = {name: results["metrics"][name]["mean_of_samples"]["mean"] for name in ("mse", "psnr", "ssim")}
    assert figures["mean_of_samples"] == means and figures["metrics"].keys() == {*means, "crps"}
    assert "| copy_last_frame |" in (metrics / "one_digit.md").read_text()

    arguments = ["--pipeline", str(folder / "run/pipeline"), "--data", "moving_digits", *TINY]
    arguments += [f"run_dir={tmp_path}", "data.n_heldout_videos=8", "data.digit_size=12", "preview.sampler={}"]
    (status, _, err), (other, *_) = run_ranks("evaluate", tmp_path, *arguments)
    assert status == other == 0, err
    arguments[arguments.index(f"run_dir={tmp_path}")] = f"run_dir={tmp_path / 'shares'}"
    status, shared, err = command("evaluate", *arguments, "--shards", "1/2")
    assert status == 0 and shared == {"protocol": "one_digit", "pending_groups": 2}, err
    status, _, err = command("evaluate", *arguments, "protocol.seed=1", "--shards", "0/2")
    assert status == 1 and "other shares evaluate otherwise (made with protocol.seed 0, asked for 1" in err
    assert command("evaluate", *arguments, "--shards", "0/2")[1]["metrics"] == figures["metrics"]
    for others in (tmp_path / "metrics", tmp_path / "shares/metrics"):
        assert comparable(others / "one_digit.json") == comparable(metrics / "one_digit.json")
        pictures = [{p.name: p.read_bytes() for p in at.rglob("one_digit/**/*.png")} for at in (others, metrics)]
        assert pictures[0] and pictures[0] == pictures[1]
        assert not list(others.glob("*.partial")) and not list(others.glob(".lock"))

    _, _, err = command("evaluate", write_experiment(folder), *TINY)
    assert "finished before, nothing to do" in err

    finished = (metrics / "one_digit.json").read_bytes()
    other = [write_experiment(folder), *TINY, "protocol.seed=1"]
    status, _, err = command("evaluate", *other)
    assert status == 1 and (metrics / "one_digit.json").read_bytes() == finished
    assert f"{metrics / 'one_digit.json'}: a finished result of another evaluation (made with protocol.seed 0" in err
    assert "give another run_dir, protocol.name=..., or evaluation.overwrite=true" in err
    for way, name in (("protocol.name=again", "again"), ("evaluation.overwrite=true", "one_digit")):
        status, _, err = command("evaluate", *other, way)
        assert status == 0, err
        assert json.loads((metrics / f"{name}.json").read_text())["protocol"]["seed"] == 1


@pytest.mark.parametrize(
    "folder, label", [("runs/a/pipeline", "a"), ("runs/a/joint", "a/joint"), ("/models/lvt/", "models/lvt")]
)
def test_a_pipeline_is_called_by_its_run_and_two_of_one_run_are_told_apart(folder, label, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert runpy.run_path(str(TOOLS / "evaluate.py"))["label_of"](Path(folder)) == label


def test_the_tool_in_half_precision(trained, tmp_path, command):
    folder, _ = trained
    found = {}
    for dtype in ("float32", "bfloat16"):
        arguments = [write_experiment(folder), *TINY, "protocol.n_clips=2", "--dtype", dtype]
        arguments += ["evaluation.crps_map={clip: 4, frame: 2}", "evaluation.baselines=[reconstruction]"]
        (tmp_path / dtype).mkdir()
        (tmp_path / dtype / "pipeline").symlink_to(folder / "run/pipeline")
        status, _, err = command("evaluate", *arguments, f"run_dir={tmp_path / dtype}")
        assert status == 0, err
        found[dtype] = json.loads((tmp_path / dtype / "metrics/one_digit.json").read_text())
        assert found[dtype]["model"]["dtype"] == dtype
        assert report.read_maps(tmp_path / dtype / "metrics/one_digit.json")[1] == "clip 4, predicted frame 2"
    assert [found[dtype]["model"]["name"] for dtype in found] == list(found)  # of their run folders
    full, half = (found[dtype]["baselines"]["reconstruction"]["mse"]["mean"] for dtype in found)
    assert full != half and half == pytest.approx(full, rel=0.02)


def test_a_limit_of_file_sizes_is_one_line_and_loses_nothing(trained, tmp_path, monkeypatch, capsys):
    folder, _ = trained
    (tmp_path / "pipeline").symlink_to(folder / "run/pipeline")
    command = ["evaluate.py", str(write_experiment(folder)), *TINY, "protocol.n_clips=4", f"run_dir={tmp_path}"]
    monkeypatch.setattr(sys, "argv", [*command, "evaluation.baselines=[copy_last_frame]"])
    limits, named, parts = resource.getrlimit(resource.RLIMIT_FSIZE), [], []
    for limit in (1000, 4000, 12_000, 12_000):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limits[1]))
        try:
            with pytest.raises(SystemExit):
                runpy.run_path(str(TOOLS / "evaluate.py"), run_name="__main__")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        error = capsys.readouterr().err.strip().splitlines()[-1]
        found = re.fullmatch(rf"error: {tmp_path}/metrics/(.*): cannot be written \(File too large\)", error)
        assert found, error
        named.append(Path(found[1]).name)
        parts.append({path: path.stat().st_mtime_ns for path in (tmp_path / "metrics").rglob("group*")})
    assert named[:2] == ["plan.json", "group-00000.safetensors"] and named[2].endswith(".png")
    assert len(parts[2]) == 2 and parts[2] == parts[3]
    runpy.run_path(str(TOOLS / "evaluate.py"), run_name="__main__")
    assert json.loads((tmp_path / "metrics/one_digit.json").read_text())["protocol"]["n_clips"] == 4


def test_quickstart_shows_metrics_that_have_no_mean_of_samples(trained, tmp_path):
    """CRPS is of all samples at once."""
    folder, _ = trained
    (tmp_path / "pipeline").symlink_to(folder / "run/pipeline")
    settings = [*TINY, f"run_dir={tmp_path}", "frame_size=16", "clip_length=6", "data.digit_size=12"]
    tool = runpy.run_path(str(TOOLS / "evaluate.py"))["main"]
    arguments = {"arguments": ["quickstart", *settings], "pipeline": None, "data": None, "weights": None}
    tool(argparse.Namespace(**arguments, device="cpu", dtype="float32"))
    figures, files = runpy.run_path(str(TOOLS / "quickstart.py"))["show"](settings)
    assert figures["model"].keys() == {"mse", "psnr", "ssim", "crps"}
    assert figures["model_mean_of_samples"].keys() == {"mse", "psnr", "ssim"}
    assert all(Path(path).is_file() for path in files.values())


def test_mistakes_are_one_line(trained, tmp_path, command):
    folder, _ = trained
    experiment = str(write_experiment(folder))
    for arguments, message in (
        ([experiment], "protocol: choose one by protocol=NAME"),
        ([experiment, "protocol=one_digit", "--weights", str(tmp_path / "no")], "no: no such folder"),
        ([experiment, "protocol=nothing"], "protocol: no config named 'nothing'"),
        ([experiment, "protocol=one_digit", "protocol.n_sample=2"], "did you mean 'protocol.n_samples'"),
        ([], "expected one EXPERIMENT"),
        (["--pipeline", str(tmp_path), "--data", "flow", "protocol=one_digit"], "no saved pipeline here"),
        (
            [experiment, "protocol=one_digit", f"run_dir={tmp_path}"],
            "no pipeline here; run tools/train_prior.py first",
        ),
    ):
        status, _, err = command("evaluate", *arguments)
        assert status == 1 and message in err
