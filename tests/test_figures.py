"""The figures: what is in their arrays and pixels, from real models; odd input; and tools/figures.py."""

import dataclasses
import json
import math
import shutil
import sys

import numpy as np
import PIL.Image
import pytest
import torch
from tiny import (
    SMALL_PIXELCNN,
    SMALL_RESIDUAL_DIFFUSION,
    SMALL_SDE_DIFFUSION,
    SMALL_TRANSFORMER,
    SMALL_VQVAE,
    TINY_PRIORS,
    random_clip,
    small_recurrent_vae,
    tiny_prior,
)
from tiny_experiment import write_experiment
from video_files import counter_frames, encode

from latentcast import (
    HRVQVAE,
    KLVAE,
    VQVAE,
    PixelTokenizer,
    ResidualDiffusion,
    SDEDiffusion,
    STPixelCNN,
    VideoPredictionPipeline,
    VideoTransformer,
    figures,
    inspection,
)
from latentcast.data.video.writer import write_drawing
from latentcast.figures import style
from latentcast.figures.sheets import BORDER, GIVEN, PREDICTED, picked
from latentcast.figures.style import AMOUNT, BAD, CHANGED, Scale, code_colours, rgb
from latentcast.inspection import FIGURES, ShownClips, Subject
from latentcast.metrics import crps, psnr, statistics
from latentcast.zoo import EXAMPLES

SIZE = 32


def moving(n_clips=2, n_frames=5, size=SIZE, channels=1):
    """Squares that move over black: (n_clips, n_frames, channels, size, size)."""
    frames = torch.full((n_clips, n_frames, channels, size, size), -1.0)
    for i in range(n_clips):
        for t in range(n_frames):
            row, column = (3 + 4 * i + 3 * t) % (size - 8), (5 * i + t) % (size - 8)
            frames[i, t, :, row : row + 8, column : column + 8] = 1 - 0.3 * i
    return frames


def subject(tokenizer=None, prior=None, frames=None, n_context=2, **options):
    torch.manual_seed(0)
    frames = moving() if frames is None else frames
    pipe = None
    if prior is not None:
        used = None if prior.accepts == "pixels" else tokenizer
        pipe = VideoPredictionPipeline(prior, used, n_context=n_context)
        pipe.set_progress_bar_config(disable=True)
    return Subject(ShownClips(frames, 10.0, [f"video {i}" for i in range(len(frames))]), tokenizer, pipe, **options)


def vqvae(**options):
    torch.manual_seed(0)
    tokenizer = VQVAE(1, SIZE, SIZE, codebook_size=12, stride=8, **SMALL_VQVAE | options)
    tokenizer(moving())  # finds codes
    return tokenizer.eval()


def hierarchical():
    torch.manual_seed(0)
    tokenizer = HRVQVAE(1, SIZE, SIZE, n_layers=2, codebook_size=4, stride=8, **SMALL_VQVAE)
    tokenizer(moving())
    prior = STPixelCNN(tokenizer.latent_spec, **SMALL_PIXELCNN | {"n_frames": 5})
    return tokenizer.eval(), prior.eval()


def pixels_of(drawing):
    return np.asarray(drawing.picture).astype(int)


def coloured(drawing, colour):
    """(H, W) bool: where a picture has exactly that colour."""
    return (pixels_of(drawing) == colour).all(-1)


def lines(axes):
    return {line.get_label(): line.get_ydata() for line in axes.lines}


# Codes ----------------------------------------------------------------------------------------------------------------


def test_frequencies_are_sorted_sum_to_one_and_the_codes_that_hold_80_percent_are_counted():
    generator = np.random.default_rng(0)
    counts = [generator.integers(0, 50, 40) ** 2, np.array([8, 1, 0, 1])]
    drawing = figures.code_frequencies(counts)
    shown, summed = drawing.chart.axes
    for number, book in enumerate(counts, start=1):
        by_size = sorted(book.tolist(), reverse=True)
        brute = next(n for n in range(1, len(book) + 1) if 10 * sum(by_size[:n]) >= 8 * sum(by_size))
        assert drawing.numbers[f"codes_for_80_percent_{number}"] == brute == figures.codes_for(book)
        assert drawing.numbers[f"codes_in_use_{number}"] == sum(count > 0 for count in by_size)
        line = next(data for label, data in lines(shown).items() if label.startswith(f"codebook {number}: {brute} of"))
        found = np.nan_to_num(line)
        assert found.sum() == pytest.approx(1) and found.tolist() == sorted(found, reverse=True)
    curves = [line for line in summed.lines if len(line.get_ydata()) > 4]
    assert all(line.get_ydata()[-1] == pytest.approx(1) for line in curves)
    assert figures.codes_for([0, 0]) == 0  # nothing chosen yet
    figures.code_frequencies([np.zeros(4)])
    with pytest.raises(ValueError, match="counts: expected"):
        figures.code_frequencies([np.array([1, -1])])


def test_a_change_mask_marks_the_changed_code():
    codes = np.zeros((3, 4, 4, 2), np.int64)
    codes[2, 1, 3, 1] = 7  # frame 3, codebook 2
    drawing = figures.change_masks([("clip", "", torch.zeros(3, 1, 16, 16), codes, None)])
    yellow = coloured(drawing, CHANGED)
    rows, columns = np.where(yellow)
    side = 96 // 4
    assert yellow.sum() == side**2 and np.ptp(rows) == np.ptp(columns) == side - 1
    first = np.where(coloured(drawing, (205, 209, 216)))  # frame 1, of both codebooks
    tops = sorted(set(first[0][first[1] == first[1].min()].tolist()))
    second = tops[len(tops) // 2]  # the top of codebook 2's row
    assert rows.min() - second == side * 1
    left = first[1].min() + 2 * (96 + 2 * BORDER + 2)  # of frame 3
    assert columns.min() - left == side * 3
    assert drawing.numbers == {"change_rate clip": pytest.approx(1 / (2 * 16 * 2))}
    assert figures.changes(codes).sum() == 1 and figures.changes(codes)[2, 1, 3, 1]


def test_masks_and_maps_of_a_model_are_those_of_its_codes():
    tokenizer = vqvae()
    shown = subject(tokenizer)
    codes = tokenizer.encode(moving()).codes.numpy()
    changed = codes[0, 1:] != codes[0, :-1]
    assert 0 < changed.mean() < 1
    masks = FIGURES["change_masks"].draw(shown)
    assert masks.numbers["change_rate video 0"] == pytest.approx(changed.mean())
    cell = (96 // 4) ** 2
    both = changed.sum() + (codes[1, 1:] != codes[1, :-1]).sum()
    assert coloured(masks, CHANGED).sum() == both * cell
    maps, colours = FIGURES["code_maps"].draw(shown), code_colours(12)
    assert len({tuple(colour) for colour in colours.tolist()}) == 12
    for code in range(12):
        assert coloured(maps, colours[code]).sum() == (codes == code).sum() * cell
    counts = FIGURES["code_frequencies"].draw(shown)
    assert counts.numbers["codes_in_use_1"] == len(np.unique(codes))


def test_a_code_prior_shows_the_codes_of_truth_and_prediction():
    tokenizer, prior = hierarchical()
    shown = subject(tokenizer, prior, num_samples=1)
    maps = FIGURES["change_masks"].draw(shown)
    assert list(maps.numbers) == ["change_rate video 0 truth", "change_rate video 0 prediction"]
    predicted = torch.cat([shown.encoded.codes[0, :2], shown.predicted[0, 0]])
    rate = (predicted[1:] != predicted[:-1]).float().mean().item()
    assert maps.numbers["change_rate video 0 prediction"] == pytest.approx(rate)
    given = tuple(round((value + 1) * 127.5) for value in GIVEN)
    assert coloured(maps, given).sum() > 2 * 4 * 96  # the edges of two frames


def test_clips_of_single_frames_stand_beside_each_other():
    shown = subject(vqvae(), frames=moving(4, 1))
    assert inspection.reasons(shown)["change_masks"] == "the clips have a single frame, and none before it"
    codes = shown.encoded.codes.numpy()
    maps, colours = FIGURES["code_maps"].draw(shown), code_colours(12)
    assert all(coloured(maps, colours[c]).sum() == (codes == c).sum() * (96 // 4) ** 2 for c in range(12))
    assert FIGURES["reconstructions"].draw(shown).picture.height < 460  # one row of all


def test_usage_over_time_has_a_line_a_codebook_and_split():
    rows = [(step, f"{split}/usage_{n}", 0.1 * n) for step in (1, 2) for split in ("train", "val") for n in (1, 2)]
    rows += [(1, "val/perplexity_1", 3.0), (1, "val/loss", 1.0), (2, "train/usage_1", math.nan)]
    drawing = figures.usage(rows)
    shares, perplexities = drawing.chart.axes
    found = {label: data.tolist() for label, data in lines(shares).items() if ", " in label}
    assert found["2, held out"] == pytest.approx([0.2, 0.2]) and len(found) == 4
    assert lines(perplexities)["1, held out"].tolist() == [3.0]
    assert "1 of" in drawing.caption and "NaN" in drawing.caption
    with pytest.raises(ValueError, match="usage: expected"):
        figures.usage([(1, "val/loss", 1.0)])


# Frames ---------------------------------------------------------------------------------------------------------------


def test_errors_of_reconstructions_are_the_darker_the_larger_on_one_scale():
    truth = torch.zeros(1, 2, 1, SIZE, SIZE)
    wrong = truth.clone()
    wrong[0, 1, 0, :8] = 0.5  # frame 2, the upper quarter
    drawing = figures.reconstructions(truth, wrong, ["clip"], torch.tensor([[100.0, 18.1]]))
    assert drawing.numbers["error"] == pytest.approx(0.5 * 127.5 / 8)
    dark, light = (coloured(drawing, rgb(AMOUNT[end])) for end in (-1, 0))
    columns = np.where(dark.sum(0) >= 20)[0]  # the legend's bar has the colour too
    assert dark.sum() >= 96 * 24 and np.ptp(columns) == 95
    assert columns.min() > np.where(light)[1].min() + 96  # of the second frame
    tokenizer = vqvae()
    drawing = FIGURES["reconstructions"].draw(subject(tokenizer))
    with torch.no_grad():
        quality = psnr(tokenizer(moving()).frames.clamp(-1, 1), moving())
    assert drawing.numbers["psnr"] == pytest.approx(quality.mean().item(), abs=1e-3)


def test_layers_add_up_to_the_reconstruction_and_say_what_they_cost():
    tokenizer, prior = hierarchical()
    shown = subject(tokenizer, prior)
    numbers = FIGURES["layers"].draw(shown).numbers
    bits = prior.level_bits_per_code(tokenizer.encode(moving()).codes, 2).mean(0).tolist()
    assert [numbers["bits_1"], numbers["bits_2"]] == pytest.approx(bits, rel=1e-4)
    alone = subject(tokenizer)
    numbers = FIGURES["layers"].draw(alone).numbers
    counts = torch.bincount(alone.encoded.codes[..., 0].flatten()).double()
    entropy = -(counts / counts.sum() * (counts / counts.sum()).clamp(min=1e-12).log2()).sum()
    assert numbers["bits_1"] == pytest.approx(entropy.item(), rel=1e-4)
    quality = psnr(alone.reconstruction, moving()).mean()
    assert numbers["psnr_2"] == pytest.approx(quality.item(), abs=1e-3)


def test_futures_show_the_best_sample_their_mean_and_spread_and_frame_the_context_in_green():
    context, truth = moving(1, 2, 16), moving(1, 3, 16)
    samples = torch.stack([truth[0] * 0.5, truth[0], -truth[0]])[None]
    scores = torch.stack([psnr(sample, truth).mean(1) for sample in samples.unbind(1)], 1)
    drawing = figures.futures(context, samples, truth, scores.argmax(1), fps=5.0, scores=scores)
    assert drawing.numbers["psnr_best"] == 100 and drawing.numbers["spread"] == pytest.approx(
        (samples.std(1, correction=0).mean() * 127.5).item(), rel=1e-5
    )
    assert drawing.frames.shape[:2] == (5, 3) and drawing.frames.dtype == torch.uint8 and drawing.fps == 5
    picture, given, predicted = (
        pixels_of(drawing),
        *(np.array([round((value + 1) * 127.5) for value in colour]) for colour in (GIVEN, PREDICTED)),
    )
    side = 96 + 2 * BORDER
    edges = [(picture == colour).all(-1).sum() - 11**2 for colour in (given, predicted)]  # but for the legend's squares
    per_frame = side**2 - 96**2
    assert abs(edges[0] - per_frame * 2 * 4) < 60  # truth, best, random, mean
    assert abs(edges[1] - per_frame * 3 * 3) < 60


def test_the_best_future_of_a_model_is_that_of_highest_psnr(tmp_path):
    prior = tiny_prior("recurrent_vae")
    clip = random_clip(prior, n_frames=5)
    shown = subject(prior=prior, frames=clip, num_samples=3)
    drawing = FIGURES["futures"].draw(shown)
    assert shown.scores.shape == (2, 3)
    expected = psnr(shown.samples[1, 2][None], clip[1:, 2:]).mean()
    assert shown.scores[1, 2] == pytest.approx(expected.item())
    written = write_drawing(tmp_path / "futures", drawing)
    assert sorted(written) == [".mp4", ".png"] and all(path.is_file() for path in written.values())
    with PIL.Image.open(written[".png"]) as picture:
        assert picture.text["Description"] == drawing.caption and picture.size == drawing.picture.size


def test_curves_and_crps_maps_of_a_model_are_its_metrics(monkeypatch):
    prior = tiny_prior("recurrent_vae")
    clip = random_clip(prior, batch=3, n_frames=5)
    shown = subject(prior=prior, frames=clip, num_samples=2)
    drawing = FIGURES["curves"].draw(shown)
    panels = {axes.get_ylabel(): lines(axes) for axes in drawing.chart.axes}
    monkeypatch.setattr(statistics, "_all_ranks", None)  # in a training, rank 0 alone draws: others would not answer
    FIGURES["curves"].draw(shown)
    assert list(panels) == ["PSNR, dB ↑", "CRPS, of 255 ↓"]  # frames of 8 x 16 are too small for SSIM and LPIPS
    expected = crps(shown.samples, clip[:, 2:]).mean(0)
    assert panels["CRPS, of 255 ↓"]["model"].tolist() == pytest.approx(expected.tolist(), rel=1e-5)
    copied = psnr(clip[:, 1:2].expand(-1, 3, -1, -1, -1), clip[:, 2:]).mean(0)
    assert panels["PSNR, dB ↑"]["copy last frame"].tolist() == pytest.approx(copied.tolist(), rel=1e-5)
    maps = FIGURES["crps_maps"].draw(shown)
    *panels, bar = maps.chart.axes
    assert len(panels) == 6 and bar.get_ylabel() == "CRPS, of 255"  # three frames, of the model and of the copied one
    expected = crps(shown.samples, clip[:, 2:], reduction="none")[:, 0].mean((0, 1))
    assert np.allclose(panels[0].images[0].get_array(), expected)
    assert len({axes.images[0].get_clim() for axes in panels}) == 1


def test_drift_goes_five_horizons_and_knows_the_truth_as_far_as_it_goes():
    prior = tiny_prior("recurrent_vae")
    long = random_clip(prior, n_frames=9)
    shown = subject(prior=prior, frames=long[:, :4], longer=lambda n: ShownClips(long[:, :n], 10.0, ["a", "b"]))
    drawing = FIGURES["drift"].draw(shown)
    errors, contrast, change = drawing.chart.axes
    assert len(lines(errors)["model"]) == 7 and len(lines(contrast)["model"]) == 10  # 7 true frames, 5 x 2 predicted
    expected = long[:, 2:].std((2, 3, 4), correction=0).mean(0) * 127.5
    assert lines(contrast)["truth"].tolist() == pytest.approx(expected.tolist(), rel=1e-5)
    last = long[:, 1:2]
    rmse = ((last - long[:, 2:]).square().mean((2, 3, 4)).sqrt() * 127.5).mean(0)
    assert lines(errors)["copy last frame"].tolist() == pytest.approx(rmse.tolist(), rel=1e-4)
    assert any(line.get_xdata()[0] == 2.5 for line in change.lines)  # where the training's horizon ends
    assert "(true frames: 7)" in drawing.chart.get_suptitle()


# What priors say of themselves ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in TINY_PRIORS if name.startswith(("video_transformer", "st_pixel"))])
def test_what_single_codes_cost_adds_up_to_the_likelihood(name):
    prior = tiny_prior(name)
    clip = random_clip(prior)
    nats = prior.explain(clip, 1)["nats"]
    assert nats.shape == clip[:, 1:].shape and (nats > 0).all()
    assert torch.allclose(nats.flatten(1).sum(1), -prior.log_prob(clip, 1), rtol=1e-5)


def test_losses_stand_beside_the_entropy_of_the_frequencies():
    tokenizer, prior = hierarchical()
    shown = subject(tokenizer, prior, counts=[torch.tensor([4, 4, 0, 0]), torch.tensor([1, 1, 1, 1])])
    numbers = FIGURES["losses"].draw(shown).numbers
    assert (numbers["entropy_1"], numbers["entropy_2"]) == pytest.approx((1, 2))
    bits = prior.level_bits_per_code(tokenizer.encode(moving()).codes, 2).mean(0).tolist()
    assert [numbers["bits_1"], numbers["bits_2"]] == pytest.approx(bits, rel=1e-4)


def test_kl_of_the_groups_is_that_of_the_loss():
    prior = small_recurrent_vae(PixelTokenizer(1, 8, 16, levels=None).latent_spec, n_groups=1).eval()
    clip = random_clip(prior)
    kl = prior.explain(clip, 2)["kl"]
    assert kl.shape == (2, 3, 1, 3)
    logs = prior(clip, 2).logs  # of one group it does not depend on the draw
    assert kl.mean((0, 1)).sum().item() == pytest.approx(logs["kl"].item(), rel=1e-5)
    numbers = FIGURES["kl_groups"].draw(subject(prior=prior, frames=clip)).numbers
    assert numbers["kl"] == pytest.approx(logs["kl"].item(), rel=1e-5)
    assert numbers["active_units_group_1"] == logs["active_units_group_1"]


def test_groups_of_z_are_varied_one_at_a_time():
    torch.manual_seed(0)
    prior = small_recurrent_vae(PixelTokenizer(1, 8, 16, levels=None).latent_spec, n_groups=2).eval()
    with torch.no_grad():
        for weight in prior.predictor.parameters():  # so that z makes a difference
            weight.normal_()
    shown = subject(prior=prior, frames=random_clip(prior, n_frames=5))
    drawing = FIGURES["z_groups"].draw(shown)
    labels = ["z1 drawn, the rest 0", "z2 drawn, the rest 0", "all of z drawn"]
    assert list(drawing.numbers) == [f"spread {label}" for label in labels]
    fixed = shown.predict(shown.context[:1], 3, 4, z_groups={2: 0})[0]
    spread = fixed.std(0, correction=0).mean().item() * 127.5
    assert drawing.numbers["spread z1 drawn, the rest 0"] == pytest.approx(spread, rel=1e-4) and spread > 0


def test_the_residual_is_what_is_drawn_around_mu():
    torch.manual_seed(0)
    spec = PixelTokenizer(1, SIZE, SIZE, levels=None).latent_spec
    prior = ResidualDiffusion(spec, **SMALL_RESIDUAL_DIFFUSION).eval()
    clip, mus = moving(), []
    predict_frame = prior.predict_frame

    def watched(*args):
        mus.append(predict_frame(*args)[0])
        return predict_frame(*args)

    prior.predict_frame = watched
    with torch.no_grad():
        future = prior.sample(clip[:, :2], 3, generator=torch.Generator().manual_seed(3), n_steps=2)[:, 0]
    del prior.predict_frame
    found = prior.explain(clip, 2, generator=torch.Generator().manual_seed(3), n_steps=2)
    assert torch.equal(found["future"], future) and torch.allclose(found["mu"], torch.stack(mus, 1), atol=1e-5)
    shown = subject(prior=prior, sampler={"n_steps": 2})
    parts = shown.explained(2)
    drawing = FIGURES["residual"].draw(shown)
    size = (parts["future"] - parts["mu"]).square().mean().sqrt() * 127.5
    assert drawing.numbers["residual"] == pytest.approx(size.item(), rel=1e-4)
    assert not ResidualDiffusion(spec, residual=False, **SMALL_RESIDUAL_DIFFUSION).explains


def test_motion_starts_at_the_context_and_spreads_by_its_seed():
    torch.manual_seed(0)
    prior = SDEDiffusion(PixelTokenizer(1, SIZE, SIZE, levels=None).latent_spec, **SMALL_SDE_DIFFUSION).eval()
    for part in (prior.motion_sde.drift, prior.motion_sde.diffusion):
        for weight in part.parameters():
            torch.nn.init.normal_(weight, std=0.2)
    clip = moving()
    motion = prior.explain(clip, 2, num_samples=3, motion_seed=1)["motion"]
    assert motion.shape[:3] == (2, 3, 4)
    start = prior.encode_motion(clip[:, :2])
    assert torch.equal(motion[:, :, 0], start[:, None].expand_as(motion[:, :, 0]))
    assert motion[:, :, 1:].std(1).mean() > 0
    assert torch.equal(motion, prior.explain(clip, 2, num_samples=3, motion_seed=1)["motion"])
    shown = subject(prior=prior, sampler={"n_steps": 2})
    drawing = FIGURES["motion"].draw(shown)
    spread = lines(drawing.chart.axes[0])["spread over the samples"]
    assert spread[0] == 0 and spread[-1] == pytest.approx(drawing.numbers["spread"]) and spread[-1] > 0
    seeded = [[shown.predict(shown.context[:1], 3, motion_seed=m, image_seed=i) for i in (0, 1)] for m in (0, 1)]
    over_images = torch.stack([torch.cat(row) for row in seeded]).std(1, correction=0).mean().item() * 127.5
    assert drawing.numbers["over_images"] == pytest.approx(over_images, rel=1e-4)
    half = FIGURES["half_steps"].draw(shown)
    assert half.picture.width > 6 * 100  # the last frame, and six predicted ones


def test_latents_have_the_kl_of_the_tokenizers_own_loss():
    torch.manual_seed(0)
    tokenizer = KLVAE(
        1, SIZE, SIZE, block_channels=[8, 16], latent_channels=4, norm_groups=4, scaling_factor=0.7
    ).eval()
    drawing = FIGURES["latents"].draw(subject(tokenizer))
    latents = tokenizer.encode(moving()).latents
    assert drawing.numbers["kl"] == pytest.approx(
        tokenizer(moving()).logs["kl"].item() / latents[0, 0, 0].numel(), rel=1e-3
    )
    bars = [bar.get_height() for bar in drawing.chart.axes[1].patches]
    assert bars == pytest.approx(latents.std((0, 1, 3, 4), correction=0).tolist(), rel=1e-5)


# Odd input ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_frames, channels, grid", [(1, 1, 2), (512, 1, 2), (3, 3, 16)])
def test_grey_single_and_very_many_frames_and_coarse_grids(tmp_path, n_frames, channels, grid):
    frames = moving(1, n_frames, 16, channels)
    codes = torch.arange(n_frames * grid * grid).view(n_frames, grid, grid, 1) % 5
    clips = [("clip", "", frames[0], codes, None)]
    for draw in (figures.code_maps, figures.change_masks):
        drawing = draw(clips)
        assert drawing.picture.width < 2000 and drawing.picture.height < 600
    assert math.isnan(drawing.numbers["change_rate clip"]) == (n_frames == 1)
    assert len(np.unique(pixels_of(figures.code_maps(clips)).reshape(-1, 3), axis=0)) > 5
    figures.reconstructions(frames, frames)
    drawing = figures.futures(frames[:, :1], frames[:, None], frames, fps=10.0)
    assert len(drawing.frames) == 1 + n_frames
    figures.layers(frames, frames[:, None])
    figures.residual(frames[:, :1], frames, frames)
    figures.losses(np.ones((n_frames, grid, grid, 1)), [1.0], [4], 1)


def test_many_codebooks_are_summed_up():
    codes = np.zeros((2, 4, 4, 16), int)
    drawing = figures.code_maps([("clip", "", torch.zeros(2, 1, 8, 8), codes, None)])
    assert "The first 8 of 16 codebooks." in drawing.caption and drawing.picture.height < 1100
    drawing = figures.losses(np.ones((2, 4, 4, 16)), np.ones(16), [4] * 16, 1)
    assert len(drawing.chart.axes[0].patches) == 16 and not drawing.chart.axes[0].texts
    assert len(drawing.chart.axes[1].get_legend().get_texts()) == 8  # seven, and how many more
    figures.code_frequencies([np.arange(1, 70_000), np.ones(4)])


def test_what_is_not_finite_is_marked_and_said_and_constants_are_drawn():
    frames, bad = torch.zeros(1, 3, 1, 16, 16), torch.zeros(1, 3, 1, 16, 16)
    bad[0, 1, 0, 2:4, 5:9] = torch.tensor([math.nan, math.inf, -math.inf, math.nan])
    for drawing in (
        figures.reconstructions(frames, bad),
        figures.futures(frames[:, :1], bad[:, None], frames),
        figures.residual(frames[:, :1], bad, frames),
        figures.layers(frames, bad[:, None]),
        figures.z_groups(frames[0], {"z1": bad}),
        figures.half_steps(frames, bad),
    ):
        assert "8 of" in drawing.caption and "NaN or infinite" in drawing.caption, drawing.name
        assert coloured(drawing, BAD[0]).sum() >= 4 * 36 and coloured(drawing, BAD[1]).any(), drawing.name
    assert not coloured(figures.reconstructions(frames, frames), BAD[0]).any()
    values = np.zeros((3, 8, 8, 2))
    values[1, 2, 3] = math.nan
    entry = {"per_frame": [1.0, math.nan, 2.0], "per_frame_ci95": [[0, 2], [math.nan] * 2, [1, 3]], "mean": 1}
    magenta = "#" + "".join(f"{value:02x}" for value in BAD[0])
    for drawing in (
        figures.losses(values, [1.0, math.nan], [4, 4], 2),
        figures.curves({"model": {"psnr": entry}}, ["psnr"]),
        figures.drift({"model": entry}, 1, {"contrast": {"model": [1.0, math.inf]}}, 1),
        figures.kl_groups(values[:, :2, :4, 0] * math.nan, 1),
        figures.latents([0.0, math.nan], [1.0, 1.0], [math.inf, 1.0]),
        figures.motion_spread([[0.0, math.nan]], [[0.0, 1.0]], [0, 1]),
    ):
        assert "NaN or infinite" in drawing.caption, drawing.name
        marks = [line for axes in drawing.chart.axes for line in axes.lines if line.get_color() == magenta]
        assert marks, drawing.name
    drawing = figures.crps_maps({"model": np.where(np.eye(8) > 0, np.nan, 1.0)})
    assert "8 of 64" in drawing.caption and coloured(drawing, BAD[0]).any()
    for constant in (np.zeros((4, 4)), np.full((4, 4), 3.0), np.full((4, 4), np.nan)):
        figures.crps_maps({"constant": constant})
        assert Scale.of("x", constant).paint(constant).shape == (4, 4, 3)
    figures.code_frequencies([np.ones(1)])
    figures.kl_groups(np.zeros((3, 2, 4)), 1)
    figures.latents(np.zeros(1), np.zeros(1))
    figures.training_curves([(1, "train/loss", 0.0), (2, "train/loss", math.inf)])


def test_a_model_that_predicts_nothing_finite_is_drawn():
    shown = subject(prior=tiny_prior("recurrent_vae"), frames=torch.zeros(2, 5, 1, 8, 16))
    shown.__dict__["samples"] = torch.full((2, 4, 3, 1, 8, 16), math.nan)
    drawing = FIGURES["futures"].draw(shown)
    assert "NaN" in drawing.caption and shown.scores is None
    shown.samples[:, :, 0] = 0  # the first predicted frame
    drawn = dict(inspection.draw(shown, ["curves", "crps_maps"]))
    psnrs = lines(drawn["curves"].chart.axes[0])["model"]
    assert np.isfinite(psnrs).tolist() == [True, False, False] and "NaN" in drawn["curves"].caption
    maps = [np.ma.filled(axes.images[0].get_array(), np.nan) for axes in drawn["crps_maps"].chart.axes[:3]]
    assert [np.isfinite(values).all() for values in maps] == [True, False, False]
    with torch.no_grad():
        for weight in shown.prior.decoder.parameters():
            weight.fill_(math.nan)
    drawing = FIGURES["drift"].draw(shown)
    assert "NaN" in drawing.caption and coloured(drawing, BAD[0]).any()


def test_pictures_need_neither_fonts_nor_pyplot(monkeypatch):
    drawn = figures.code_maps([("clip", "", torch.zeros(2, 1, 8, 8), np.zeros((2, 2, 2, 1), int), None)], "title")
    style.font.cache_clear()
    monkeypatch.setattr(style.importlib.util, "find_spec", lambda name: None)
    plain = figures.code_maps([("clip", "", torch.zeros(2, 1, 8, 8), np.zeros((2, 2, 2, 1), int), None)], "title")
    style.font.cache_clear()
    assert abs(plain.picture.height - drawn.picture.height) < 40 and (pixels_of(plain) < 100).any()


def test_the_frame_before_the_future_is_always_shown():
    for n, keep in ((40, 3), (40, 17), (13, 4), (5, 1), (2, 0), (1, 0)):
        places = picked(n, 12, keep).tolist()
        assert keep in places and places == sorted(set(places)) and {0, n - 1} <= set(places)
        assert len(places) == min(n, 12)


# Names ----------------------------------------------------------------------------------------------------------------


def test_the_named_figures_are_there_and_say_why_they_are_not():
    named = "code_frequencies code_maps change_masks reconstructions layers futures curves crps_maps z_groups motion"
    assert {*named.split(), "residual", "drift"} <= set(FIGURES)
    pixels = PixelTokenizer(1, 8, 8)
    assert inspection.reasons(subject(pixels))["code_maps"] == "PixelTokenizer hands on the frames as they are"
    found = inspection.reasons(subject(vqvae()))
    assert found["reconstructions"] is None and found["futures"] == "there is no prior"
    assert found["layers"] == "VQVAE has no layers" and "discrete" in found["latents"]
    prior = tiny_prior("recurrent_vae")
    found = inspection.reasons(subject(prior=prior, frames=random_clip(prior)))
    assert found["code_maps"] == "there is no tokenizer" and found["losses"] == "RecurrentVAE has no nats"
    assert found["half_steps"] == "RecurrentVAE: its sampler takes no fps_multiplier" and found["z_groups"] is None
    short = inspection.reasons(subject(prior=prior, frames=random_clip(prior, n_frames=2)))
    assert short["futures"] == "the clips have 2 frames, and 2 are given to the prior"
    tokenizer = vqvae()
    options = SMALL_TRANSFORMER | {"n_frames": 5, "subscale": (5, 1, 1)}
    prior = VideoTransformer(tokenizer.latent_spec, **options)  # clips of 5 frames alone
    found = [inspection.reasons(subject(tokenizer, prior, moving(n_frames=n)))["losses"] for n in (4, 5, 6)]
    assert found == ["VideoTransformer: its nats are of clips of 5 frames, and these have 4", None, None]
    with pytest.raises(ValueError, match="figure 'code_map': not known; did you mean 'code_maps'"):
        list(inspection.draw(subject(vqvae()), ["code_map"]))


# The tool -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    """A run of the tiny experiment: its config, its pipeline and its metrics."""
    folder = tmp_path_factory.mktemp("tool")
    path = write_experiment(folder)
    run = folder / "run"
    run.mkdir()
    shutil.copy(path, run / "config.yaml")
    torch.manual_seed(0)
    tokenizer = VQVAE(1, 16, 16, codebook_size=16, stride=8, **SMALL_VQVAE)
    prior = STPixelCNN(tokenizer.latent_spec, **SMALL_PIXELCNN)
    VideoPredictionPipeline(prior, tokenizer, n_context=1, fps=10).save_pretrained(run / "pipeline")
    (run / "metrics").mkdir()
    rows = [(step, f"val/{name}", 0.5) for step in (1, 2) for name in ("loss", "usage_1")]
    content = "\n".join(",".join(map(str, row)) for row in [("step", "metric", "value"), *rows])
    (run / "metrics/tokenizer.csv").write_text(content)
    return run


def test_the_tool_draws_what_a_run_has(run_dir, tmp_path, command):
    status, found, err = command("figures", run_dir, "--n-clips", 2, "--num-samples", 2)
    assert status == 0, err
    names = ["reconstructions", "code_frequencies", "code_maps", "change_masks", "usage", "futures", "futures_video"]
    assert list(found["files"]) == [*names, "curves", "crps_maps", "losses", "drift", "training_tokenizer"]
    assert found["output"] == str(run_dir / "figures") and not found["failed"]
    for name, file in found["files"].items():
        kind = b"\x89PNG" if not name.endswith("_video") else b"ftyp"
        with open(file, "rb") as opened:
            assert kind in opened.read(12), name
    assert found["left_out"]["layers"] == "VQVAE has no layers" and "layers: not of this model: VQVAE" in err
    index = json.loads((run_dir / "figures/figures.json").read_text())
    assert index["futures"]["files"] == {"png": "futures.png", "mp4": "futures.mp4"}
    assert index["code_frequencies"]["caption"].startswith("32 codes") and index["losses"]["numbers"]["bits_1"] > 0
    assert "test clips" not in err.splitlines()[-1]


def test_the_tool_names_what_is_wrong(run_dir, tmp_path, command):
    for arguments, message in (
        ([run_dir, "code_map"], "figure 'code_map': not known; did you mean 'code_maps'?"),
        ([run_dir, "layers", "latents"], "none of these figures: layers: VQVAE has no layers; latents: VQVAE is"),
        ([run_dir, "futures", "temprature=1"], "no option of the sampler of STPixelCNN; did you mean 'temperature'?"),
        ([tmp_path / "nothing"], "nothing"),
        ([tmp_path], "no model_index.json in it"),
        ([run_dir, "--n-clips", "0"], "--n-clips: expected at least 1, found 0"),
        ([run_dir, "--input", tmp_path / "none.mp4"], "none.mp4: no such file or folder"),
    ):
        status, found, err = command("figures", *arguments)
        assert status == 1 and found is None and message in err.splitlines()[-1], err


def test_the_tool_takes_a_video_or_the_example_clips_of_a_pipeline(run_dir, tmp_path, command):
    pipeline = tmp_path / "exported"
    shutil.copytree(run_dir / "pipeline", pipeline)
    status, _, err = command("figures", pipeline, "futures")
    assert status == 1 and "give --input VIDEO_OR_FOLDER, or --data NAME data.root=PATH" in err
    video = encode(tmp_path / "clip.mp4", counter_frames(12, 16, 16))
    options = ["--output", tmp_path / "out", "--n-frames", 3, "--num-samples", 1, "temperature=0"]
    status, found, err = command("figures", pipeline, "futures", "code_maps", "--input", video, *options)
    assert status == 0 and list(found["files"]) == ["futures", "futures_video", "code_maps"], err
    from safetensors.torch import save_file

    save_file({"clips": torch.zeros(2, 4, 1, 16, 16, dtype=torch.uint8)}, pipeline / EXAMPLES)
    status, found, err = command("figures", pipeline, "reconstructions")
    assert status == 0 and found["files"]["reconstructions"] == str(pipeline / "figures/reconstructions.png"), err
    tokenizer = pipeline / "tokenizer"
    status, found, err = command("figures", tokenizer, "code_maps", "--input", video, "--output", tmp_path / "out")
    assert status == 0 and list(found["files"]) == ["code_maps"], err
    known = json.loads((tmp_path / "out/figures.json").read_text())
    assert sorted(known) == ["code_maps", "futures"]  # what was drawn before is still known


def test_the_tool_needs_no_display(run_dir, tmp_path, command, monkeypatch):
    monkeypatch.delenv("DISPLAY", raising=False)
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)  # to import it is an error
    status, found, err = command("figures", run_dir, "code_frequencies", "losses", "--output", tmp_path / "out")
    assert status == 0 and (tmp_path / "out/code_frequencies.png").is_file(), err
    assert found["files"]["code_frequencies"] == str(tmp_path / "out/code_frequencies.png")


def test_a_figure_that_fails_costs_no_other(run_dir, tmp_path, command, monkeypatch):
    def broken(subject):
        raise RuntimeError("broken")

    monkeypatch.setitem(FIGURES, "code_maps", dataclasses.replace(FIGURES["code_maps"], draw=broken))
    names = ["code_maps", "code_frequencies"]
    status, found, _ = command("figures", run_dir, *names, "--output", tmp_path)
    assert status == 1 and list(found["files"]) == ["code_frequencies"] and "broken" in found["failed"]["code_maps"]
