"""FSQ and LFQ against their papers' formulas written out, and against brute force over all codes."""

import itertools

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from tiny import random_frames, tiny_tokenizer

from latentcast import FSQVAE, LFQVAE
from latentcast.tokenizers.quantizers.without_table import FiniteScalarQuantizer, LookupFreeQuantizer

QUANTIZERS = {
    "fsq": lambda: FiniteScalarQuantizer([8, 5, 4]),
    "two_fsq": lambda: FiniteScalarQuantizer([3, 6], n_codebooks=2),
    "lfq": lambda: LookupFreeQuantizer(6),
    "two_lfq": lambda: LookupFreeQuantizer(6, n_codebooks=2),
}


@pytest.fixture(params=QUANTIZERS)
def quantizer(request):
    return QUANTIZERS[request.param]().eval()


def random_vectors(*shape, scale=1.0):
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(0))


def every_code(quantizer):
    return torch.tensor(list(itertools.product(*map(range, quantizer.codebook_sizes))))


def fsq_by_the_paper(z, levels):
    """Appendix A.1 of the paper in float64: (N, d) -> integers of each channel, from 0 on."""
    levels = np.asarray(levels)
    half = (levels - 1) * (1 + 1e-3) / 2
    offset = np.where(levels % 2 == 1, 0.0, 0.5)
    bounded = np.tanh(z + np.arctanh(offset / half)) * half - offset
    return np.round(bounded) + levels // 2


# Codes and code vectors


@pytest.mark.parametrize("levels", [[8, 5, 5, 5], [3, 4], [7, 6, 5]])
def test_fsq_rounds_as_the_paper_says(levels):
    quantizer = FiniteScalarQuantizer(levels)
    vectors = random_vectors(2000, len(levels), scale=2)
    digits = fsq_by_the_paper(vectors.double().numpy(), levels)
    assert (digits >= 0).all() and (digits < levels).all()
    basis = np.cumprod([1, *levels[:-1]])
    output = quantizer(vectors)
    assert torch.equal(output.codes[:, 0], torch.from_numpy((digits * basis).sum(1)).long())
    half = np.asarray(levels) // 2
    np.testing.assert_allclose(output.latents.numpy(), (digits - half) / half, atol=1e-6)


def test_lfq_takes_signs():
    quantizer = LookupFreeQuantizer(6, n_codebooks=2).eval()
    vectors = random_vectors(500, 6)
    output = quantizer(vectors)
    assert torch.equal(output.latents, vectors.sign())
    bits = (vectors > 0).long().view(500, 2, 3)
    assert torch.equal(output.codes, (bits * torch.tensor([4, 2, 1])).sum(-1))


def test_every_code_has_its_vector(quantizer):
    codes = every_code(quantizer)
    vectors = quantizer.lookup(codes)
    assert vectors.shape == (len(codes), quantizer.dim)
    assert len(vectors.unique(dim=0)) == len(codes)
    nearest = quantizer.nearest_level if isinstance(quantizer, FiniteScalarQuantizer) else quantizer.nearest
    assert torch.equal(nearest(vectors), codes)
    distances = torch.cdist(random_vectors(300, quantizer.dim), vectors)
    assert torch.equal(nearest(random_vectors(300, quantizer.dim)), codes[distances.argmin(1)])


def test_leading_axes_are_kept(quantizer):
    vectors = random_vectors(2, 3, 4, 5, quantizer.dim)
    output, flat = quantizer(vectors), quantizer(vectors.flatten(0, -2))
    assert output.codes.shape == (2, 3, 4, 5, len(quantizer.codebook_sizes))
    assert torch.equal(output.codes.flatten(0, -2), flat.codes)
    assert torch.equal(output.latents.flatten(0, -2), flat.latents)
    assert torch.equal(quantizer.nearest(vectors), output.codes)
    assert torch.equal(quantizer.lookup(output.codes), output.latents)


def test_perplexity_is_of_this_batch():
    quantizer = FiniteScalarQuantizer([3, 3])
    codes = quantizer(random_vectors(200, 2)).codes[:, 0]
    p = np.bincount(codes, minlength=9) / 200
    expected = np.exp(-(p[p > 0] * np.log(p[p > 0])).sum())
    assert quantizer(random_vectors(200, 2)).perplexity.tolist() == pytest.approx([expected], rel=1e-4)


# Gradients and losses


@pytest.mark.parametrize("training", [True, False])
def test_values_are_exact_and_gradients_pass_the_rounding(quantizer, training):
    quantizer.train(training)
    vectors = random_vectors(40, quantizer.dim).requires_grad_()
    output = quantizer(vectors)
    assert torch.equal(output.latents, quantizer.lookup(output.codes))
    weights = random_vectors(40, quantizer.dim).flip(0)
    if isinstance(quantizer, LookupFreeQuantizer) and not training:
        return  # the library cuts the gradient outside training
    (gradient,) = torch.autograd.grad((output.latents * weights).sum(), vectors)
    if isinstance(quantizer, LookupFreeQuantizer):
        expected = weights
    else:
        levels = torch.tensor(quantizer.library._levels.tolist()).repeat(quantizer.library.num_codebooks)
        half = (levels - 1) * (1 + 1e-3) / 2
        shift = torch.atanh(torch.where(levels % 2 == 0, 0.5, 0.0) / half)
        expected = weights * (1 - torch.tanh(vectors.detach() + shift) ** 2) * half / (levels // 2)
    torch.testing.assert_close(gradient, expected)


def test_lfq_loss_by_its_formula():
    quantizer = LookupFreeQuantizer(4, 2, entropy_weight=0.3, diversity_gamma=0.7, commitment_weight=0.6).train()
    vectors = random_vectors(50, 4, scale=0.02)
    corners = torch.tensor([[-1.0, -1], [-1, 1], [1, -1], [1, 1]])
    squares = (vectors.view(50, 2, 1, 2) - corners).square().sum(-1)
    p = torch.softmax(-100 * squares, -1)  # 100: the library's inverse temperature

    def entropy(p):
        return -(p * p.log()).sum(-1)

    commitment = (vectors - vectors.sign()).square().mean()
    expected = 0.3 * (entropy(p).mean() - 0.7 * entropy(p.mean(0)).mean()) + 0.6 * commitment
    torch.testing.assert_close(quantizer(vectors).loss, expected, atol=1e-4, rtol=1e-4)
    assert quantizer.eval()(vectors).loss == 0


def test_tokenizer_losses_add_up():
    for name in ("fsq", "lfq"):
        tokenizer = tiny_tokenizer(name)
        frames = random_frames(tokenizer)
        output = tokenizer.train()(frames)
        distance = (output.frames - frames).square().mean()
        torch.testing.assert_close(output.logs["reconstruction_loss"], distance.detach())
        torch.testing.assert_close(output.loss.detach(), (distance + output.logs["quantizer_loss"]).detach())
        assert (output.logs["quantizer_loss"] != 0) == (name == "lfq")


def test_what_is_not_finite_shows_in_the_latents_and_not_as_an_impossible_code(quantizer):
    vectors = random_vectors(20, quantizer.dim)
    vectors[3], vectors[4] = float("nan"), float("inf")
    output = quantizer.train()(vectors)
    assert output.latents[3].isnan().all() and output.latents[:3].isfinite().all()
    assert (output.codes >= 0).all() and (output.codes < torch.tensor(quantizer.codebook_sizes)).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_changes_nothing(quantizer, dtype):
    quantizer.train()
    vectors = random_vectors(2000, quantizer.dim)
    expected = quantizer(vectors)
    with torch.autocast("cpu", dtype=dtype):
        output = quantizer(vectors)
        assert torch.equal(quantizer.nearest(vectors), expected.codes)
        assert quantizer.lookup(expected.codes).dtype == torch.float32
    assert torch.equal(output.codes, expected.codes) and torch.equal(output.latents, expected.latents)
    assert torch.equal(output.loss, expected.loss)
    half = quantizer(vectors.to(dtype))
    assert half.latents.dtype == torch.float32 and torch.equal(half.codes, quantizer(vectors.to(dtype).float()).codes)


@pytest.mark.parametrize("name", ["fsq", "lfq"])
def test_training_uses_more_codes_and_loses_less(name):
    torch.manual_seed(0)
    sizes = {"height": 16, "width": 16, "hidden_channels": 32, "residual_channels": 16, "n_residual_blocks": 1}
    model = (FSQVAE(levels=[8, 5, 5], **sizes) if name == "fsq" else LFQVAE(embedding_dim=8, **sizes)).train()
    corners = torch.rand(16, 4, 3, 4, 4) * 2 - 1
    frames = torch.nn.functional.interpolate(corners.flatten(0, 1), 16, mode="bilinear").unflatten(0, (16, 4))
    optimizer = torch.optim.Adam(model.parameters(), 2e-3)
    used, losses = [], []
    for _ in range(60):
        output = model(frames)
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
        used.append(output.codes.unique().numel())
        losses.append(output.logs["reconstruction_loss"].item())
    assert losses[-1] < 0.6 * losses[0]
    assert used[-1] > 100, used


# Batch normalisation before FSQ


def test_channels_are_normalised_by_the_batch_in_training_and_by_running_statistics_otherwise():
    plain, quantizer = FiniteScalarQuantizer([8, 5, 4]), FiniteScalarQuantizer([8, 5, 4], batch_norm=True)
    vectors = 5 + 3 * random_vectors(4, 50, 3)
    mean, variance = vectors.mean((0, 1)), vectors.var((0, 1), unbiased=False)
    output = quantizer.train()(vectors)
    assert torch.equal(output.codes, plain((vectors - mean) / (variance + 1e-5).sqrt()).codes)
    unbiased = vectors.var((0, 1))
    torch.testing.assert_close(quantizer.norm.running_mean, 0.1 * mean)
    torch.testing.assert_close(quantizer.norm.running_var, 0.9 + 0.1 * unbiased)
    state = {name: value.clone() for name, value in quantizer.state_dict().items()}
    expected = plain((vectors - 0.1 * mean) / (0.9 + 0.1 * unbiased + 1e-5).sqrt()).codes
    assert torch.equal(quantizer.nearest(vectors), expected)  # encoding is the same in either mode, and moves nothing
    assert torch.equal(quantizer.eval()(vectors).codes, expected)
    assert all(torch.equal(value, state[name]) for name, value in quantizer.state_dict().items())
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(quantizer.nearest(vectors), expected)


@pytest.mark.parametrize("batch_norm", [True, False])
def test_without_normalisation_a_large_learning_rate_leaves_one_code(batch_norm):
    torch.manual_seed(0)
    frames = -torch.ones(16, 1, 1, 32, 32)  # mostly black: the first gradients of all positions agree
    frames[:, :, :, 8:16, 8:16] = torch.rand(16, 1, 1, 8, 8)
    model = FSQVAE(1, 32, 32, 32, 16, 1, output_activation="linear", batch_norm=batch_norm).train()
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(30):
        output = model(frames)
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
    assert (output.codes.unique().numel() > 20) == batch_norm


# Several ranks


def diversity_gradient():
    torch.manual_seed(0)
    vectors = (torch.randn(64, 4) * 0.05 + 0.1).requires_grad_()
    quantizer = LookupFreeQuantizer(4, entropy_weight=1.0, diversity_gamma=2.0, commitment_weight=0.0).train()
    quantizer(vectors).loss.backward()
    return vectors.grad


def run_rank(rank, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    torch.save(diversity_gradient(), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_ranks_with_the_same_batch_have_the_gradient_of_one(tmp_path):
    mp.start_processes(run_rank, args=(str(tmp_path),), nprocs=2, start_method="forkserver")
    for rank in range(2):
        torch.testing.assert_close(torch.load(tmp_path / f"{rank}.pt", weights_only=True), diversity_gradient())


# Settings


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FSQVAE(levels=[8, 2]), r"levels: expected 3 to 1000 values for every channel, found \[8, 2\]"),
        (lambda: FSQVAE(levels=[]), "levels: expected 3 to 1000"),
        (lambda: FSQVAE(levels=[1024]), "levels: expected 3 to 1000"),
        (lambda: FSQVAE(levels=[4], n_codebooks=0), "n_codebooks: expected at least 1, found 0"),
        (lambda: FSQVAE(embedding_dim=5), "embedding_dim: expected 4, as the levels say, found 5"),
        (
            lambda: LFQVAE(embedding_dim=10, n_codebooks=3),
            "n_codebooks: expected a divisor of the 10 channels, found 3",
        ),
        (lambda: LFQVAE(stride=3), "stride: expected"),
        (lambda: FSQVAE(reconstruction_loss="l3"), "expected one of l2, l1, found 'l3'"),
        (lambda: LFQVAE(lpips_weight=-0.1), "lpips_weight: expected at least 0"),
    ],
)
def test_settings_that_cannot_be(make, message):
    with pytest.raises(ValueError, match=message):
        make()
