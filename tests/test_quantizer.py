"""The quantizer against brute force, hand-computed updates, scikit-learn's k-means and a run on two ranks."""

import copy

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from sklearn.cluster import KMeans
from tiny import TINY_TOKENIZERS, random_frames
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

from latentcast.metrics.codebook import CodebookUsage
from latentcast.metrics.perplexity import perplexity
from latentcast.tokenizers.quantizers.ema_codebook import EMACodebook
from latentcast.tokenizers.quantizers.search import SEARCHED_CPU
from latentcast.tokenizers.quantizers.sliced import SlicedQuantizer


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def brute_force(vectors, codebook):
    """Squared distances of all pairs in float64: (N, d), (K, d) -> (N, K)."""
    return (vectors.double()[:, None] - codebook.double()).square().sum(-1)


def state_of(module):
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def assert_same_state(first, second):
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


# Nearest neighbours


@pytest.mark.parametrize("size", [40, 256])  # the second is searched in groups of codes
@pytest.mark.parametrize("offset", [0.0, 300.0])
def test_nearest_by_brute_force(size, offset):
    codebook = EMACodebook(size, 6)
    codebook.codebook += offset
    vectors = torch.randn(2 * SEARCHED_CPU * torch.get_num_threads() // size + 100, 6) + offset
    distances = brute_force(vectors, codebook.codebook)
    codes = codebook.nearest(vectors)
    assert codes.shape == (len(vectors),) and codes.dtype == torch.int64
    chosen = distances.gather(1, codes[:, None])[:, 0]
    torch.testing.assert_close(chosen, distances.min(1).values, atol=1e-4, rtol=1e-4)
    assert (codes == distances.argmin(1)).double().mean() > 0.999


@pytest.mark.parametrize("size", [40, 256])
def test_of_equal_codes_the_first_is_chosen(size):
    codebook = EMACodebook(size, 3)
    codebook.codebook[size // 2 :] = codebook.codebook[: size // 2]
    assert torch.equal(codebook.nearest(codebook.codebook), torch.arange(size) % (size // 2))


def test_slices_are_searched_in_their_own_codebooks():
    quantizer = SlicedQuantizer(12, n_codebooks=3, codebook_size=7).eval()
    vectors = torch.randn(5, 4, 12)
    output = quantizer(vectors)
    assert output.codes.shape == (5, 4, 3)
    for j in range(3):
        codebook, part = quantizer.codebooks[j].codebook, vectors[..., 4 * j : 4 * j + 4]
        expected = brute_force(part.reshape(-1, 4), codebook).argmin(1).reshape(5, 4)
        assert torch.equal(output.codes[..., j], expected)
        assert torch.equal(output.latents[..., 4 * j : 4 * j + 4], codebook[expected])
    assert torch.equal(quantizer.lookup(output.codes), output.latents)
    assert torch.equal(quantizer.nearest(output.latents), output.codes)


def test_search_never_holds_every_difference():
    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            if torch.is_tensor(result):
                self.numel = max(self.numel, result.numel())
            return result

    at_once = SEARCHED_CPU * torch.get_num_threads() // 256
    codebook, vectors = EMACodebook(256, 32), torch.randn(9 * at_once, 32)
    with Largest() as largest:
        codebook.nearest(vectors)
    assert 0 < largest.numel <= max(at_once * 256, vectors.numel())


# The loss and its gradients


def test_commitment_loss_and_straight_through():
    quantizer = SlicedQuantizer(8, n_codebooks=2, codebook_size=5).eval()
    vectors = torch.randn(3, 4, 8, requires_grad=True)
    output = quantizer(vectors)
    difference = vectors.detach() - output.latents.detach()
    assert output.commitment_loss.item() == pytest.approx(difference.double().square().mean().item(), rel=1e-5)

    weights = torch.randn(3, 4, 8)
    (gradient,) = torch.autograd.grad((weights * output.latents).sum(), vectors, retain_graph=True)
    assert torch.equal(gradient, weights)
    (gradient,) = torch.autograd.grad(output.commitment_loss, vectors)
    torch.testing.assert_close(gradient, 2 * difference / difference.numel())


def test_gradients_survive_the_update_of_the_codebook():
    quantizer = SlicedQuantizer(4, codebook_size=5)
    vectors = torch.randn(50, 4, requires_grad=True)
    before = state_of(quantizer)
    output = quantizer(vectors)
    output.commitment_loss.backward()
    torch.testing.assert_close(vectors.grad, 2 * (vectors - output.latents).detach() / vectors.numel())
    assert not torch.equal(quantizer.codebooks[0].codebook, before["codebooks.0.codebook"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_changes_nothing(dtype):
    vectors = torch.randn(500, 16) + 3
    plain = SlicedQuantizer(16, n_codebooks=2, codebook_size=64)
    cast = copy.deepcopy(plain)
    for _ in range(3):
        torch.manual_seed(1)
        expected = plain(vectors)
        torch.manual_seed(1)
        with torch.autocast("cpu", dtype=dtype):
            found = cast(vectors)
        assert torch.equal(found.codes, expected.codes)
        assert torch.equal(found.latents, expected.latents)
        assert torch.equal(found.commitment_loss, expected.commitment_loss)
    assert_same_state(state_of(cast), state_of(plain))


# The moving averages


def placed(codebook, centers):
    """Set the codes by hand, as if each had been chosen once a batch so far."""
    codebook.codebook.copy_(centers)
    codebook.cluster_size.fill_(1)
    codebook.cluster_sum.copy_(centers)
    codebook.initialized.fill_(True)
    return codebook


def test_update_by_hand():
    codebook = placed(EMACodebook(3, 2, decay=0.9, eps=1e-2, dead_code_threshold=0), torch.eye(3, 2) * 4)
    size, total = np.ones(3), np.eye(3, 2) * 4
    batches = np.random.default_rng(0).normal(loc=[3, 0], size=(4, 7, 2))
    for batch in batches:
        codes = codebook.nearest(torch.tensor(batch).float())
        codebook.update(torch.tensor(batch).float(), codes)
        chosen = np.eye(3)[codes.numpy()]
        size = 0.9 * size + 0.1 * chosen.sum(0)
        total = 0.9 * total + 0.1 * chosen.T @ batch
        smoothed = (size + 1e-2) / (size.sum() + 3e-2) * size.sum()
        np.testing.assert_allclose(codebook.cluster_size, size, rtol=1e-5)
        np.testing.assert_allclose(codebook.cluster_sum, total, rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(codebook.codebook, total / smoothed[:, None], rtol=1e-4, atol=1e-6)


def test_the_published_start():
    """Uniform codes with counts of 0: those that are chosen become means at once, the others fly off for good."""
    K, batch = 8, torch.randn(40, 3) + 3
    codebook = EMACodebook(K, 3, init="uniform", dead_code_threshold=0)
    first = codebook.codebook.double().numpy().copy()
    assert abs(first).max() <= 1 / K and abs(first).std() > 0.2 / K and not codebook.cluster_size.any()
    assert not codebook.initialize(batch).any() and (codebook.codebook.double().numpy() == first).all()
    codes = codebook.nearest(batch)
    codebook.update(batch, codes)
    chosen = np.eye(K)[codes.numpy()]
    size = 0.01 * chosen.sum(0)
    total = 0.99 * first + 0.01 * chosen.T @ batch.double().numpy()
    smoothed = (size + 1e-5) / (size.sum() + K * 1e-5) * size.sum()
    np.testing.assert_allclose(codebook.codebook, total / smoothed[:, None], rtol=1e-4)
    assert codebook.codebook[chosen.sum(0) == 0].abs().amax(1).min() > 1000


def test_kmeans_places_the_codes():
    vectors = torch.randn(400, 2)
    drawn, codebook = (EMACodebook(6, 2, kmeans_iters=n) for n in (0, 100))
    for each in (drawn, codebook):
        torch.manual_seed(3)
        each.initialize(vectors)
    expected = KMeans(6, init=drawn.codebook.numpy(), n_init=1, max_iter=1000, tol=0).fit(vectors.numpy())
    np.testing.assert_allclose(codebook.codebook, expected.cluster_centers_, atol=1e-5)
    assert codebook.initialized
    torch.testing.assert_close(codebook.cluster_size, torch.full((6,), 400 / 6))
    torch.testing.assert_close(codebook.cluster_sum, codebook.codebook * 400 / 6)


def test_codes_are_placed_once_on_the_first_training_batch():
    quantizer = SlicedQuantizer(4, n_codebooks=2, codebook_size=5, kmeans_iters=0)
    first = torch.randn(30, 4) + 50
    codes = quantizer.eval()(first).codes
    assert not quantizer.codebooks[0].initialized
    latents = quantizer.train()(first).latents  # code vectors as drawn, before the update
    for j in range(2):
        parts = first[:, 2 * j : 2 * j + 2]
        assert (latents[:, None, 2 * j : 2 * j + 2] == parts).all(-1).any(1).all()
    before = quantizer.codebooks[0].codebook.clone()
    quantizer(torch.randn(30, 4) - 50)
    assert (quantizer.codebooks[0].codebook - before).abs().max() < 20  # moved by the averages, not placed anew
    assert codes.shape == (30, 2)


def test_fewer_vectors_than_codes():
    quantizer = SlicedQuantizer(4, codebook_size=64)
    vectors = torch.randn(10, 4)
    assert torch.equal(quantizer(vectors).latents, vectors)
    assert all(tensor.isfinite().all() for tensor in quantizer.state_dict().values())


@pytest.mark.parametrize("initialized", [True, False])
def test_unused_codes_do_not_explode(initialized):
    codebook = EMACodebook(8, 3, dead_code_threshold=0)
    if initialized:
        codebook.initialize(torch.randn(100, 3))
    bound = max(codebook.codebook.norm(dim=-1).max().item(), 2)
    vectors = codebook.codebook[:1].repeat(20, 1)
    for step in range(3000):
        codebook.update(vectors, codebook.nearest(vectors))
        if step in (0, 1, 10, 100, 2999):
            assert codebook.codebook.norm(dim=-1).max() <= 1.05 * bound, step
    assert codebook.nearest(vectors).unique().numel() == 1


def test_a_batch_that_skips_a_code_leaves_it_in_place():
    codebook = placed(EMACodebook(2, 2, dead_code_threshold=0), torch.tensor([[0.0, 0.0], [9.0, 9.0]]))
    vectors = torch.full((10, 2), 0.5)
    codebook.update(vectors, codebook.nearest(vectors))
    torch.testing.assert_close(codebook.codebook[1], torch.tensor([9.0, 9.0]), rtol=1e-3, atol=0)


def test_dead_codes_are_revived_and_survive():
    centers = torch.tensor([[0.0, 0.0], [1.0, 0.0], [80.0, 80.0], [90.0, 90.0]])
    codebook = placed(EMACodebook(4, 2, decay=0.8, dead_code_threshold=0.2), centers)
    revived_at = None
    for step in range(30):
        vectors = torch.rand(40, 2)
        codebook.update(vectors, codebook.nearest(vectors))
        if (codebook.codebook < 10).all():
            revived_at = step
            break
    assert revived_at is not None
    # The two dead codes now stand on vectors of this batch, with the count of an average code.
    for row in (2, 3):
        assert (codebook.codebook[row] == vectors).all(-1).any()
    average = codebook.cluster_size[2].item()
    assert codebook.cluster_size[3].item() == average
    torch.testing.assert_close(codebook.cluster_sum[2:], codebook.codebook[2:] * average)

    # A next batch that chooses neither of them leaves both where they are.
    revived = codebook.codebook[2:].clone()
    far = torch.rand(40, 2) - 30
    codes = codebook.nearest(far) * 0
    codebook.update(far, codes)
    torch.testing.assert_close(codebook.codebook[2:], revived, rtol=1e-4, atol=1e-4)
    # And they take part in what follows.
    assert codebook.nearest(torch.rand(500, 2)).unique().numel() >= 3


def test_threshold_zero_never_revives():
    codebook = placed(EMACodebook(2, 2, decay=0.5, dead_code_threshold=0), torch.tensor([[0.0, 0.0], [50.0, 50.0]]))
    for _ in range(8):
        vectors = torch.rand(40, 2)
        codebook.update(vectors, codebook.nearest(vectors))
    assert (codebook.codebook[1] > 40).all()


def test_overflow_does_not_poison_the_codebook():
    quantizer = SlicedQuantizer(4, codebook_size=6)
    quantizer(torch.randn(60, 4))
    vectors = torch.randn(60, 4)
    vectors[3, 1], vectors[7, 0] = float("inf"), float("nan")
    codes = quantizer(vectors).codes
    assert (codes >= 0).all() and (codes < 6).all()
    for name, tensor in quantizer.state_dict().items():
        assert tensor.isfinite().all(), name


def test_evaluation_changes_nothing():
    quantizer = SlicedQuantizer(4, codebook_size=6)
    quantizer(torch.randn(60, 4))
    before = state_of(quantizer)
    quantizer.eval()(torch.randn(60, 4))
    quantizer.train().nearest(torch.randn(60, 4))
    assert_same_state(state_of(quantizer), before)


@pytest.mark.parametrize("cast", [lambda m: m.half(), lambda m: m.to(torch.bfloat16), lambda m: m.double()])
def test_state_stays_in_single_precision(cast):
    quantizer = SlicedQuantizer(4, codebook_size=6)
    before = state_of(quantizer)
    cast(quantizer)
    assert_same_state(state_of(quantizer), before)
    assert quantizer(torch.randn(9, 4).bfloat16()).latents.dtype == torch.float32


def test_uneven_slices_are_refused():
    for n_codebooks in (3, 0):
        with pytest.raises(ValueError, match=f"divisor of the 8 channels, found {n_codebooks}"):
            SlicedQuantizer(8, n_codebooks=n_codebooks)


# Statistics


def test_perplexity():
    counts = torch.tensor([[5, 5, 5, 5], [0, 9, 0, 0], [1, 2, 3, 4], [0, 0, 0, 0]])
    p = np.array([0.1, 0.2, 0.3, 0.4])
    expected = torch.tensor([4.0, 1.0, np.exp(-(p * np.log(p)).sum()), 1.0], dtype=torch.float32)
    torch.testing.assert_close(perplexity(counts), expected)


@pytest.mark.parametrize("sizes", [[6, 4], [7]])
def test_codebook_usage_over_an_epoch(sizes):
    usage = CodebookUsage(sizes)
    # The last code of every codebook is never used.
    batches = [torch.stack([torch.randint(0, size - 1, (2, 3, 2, 2)) for size in sizes], -1) for _ in range(3)]
    for batch in batches:
        usage.update(batch)
    result = usage.compute()
    everything = torch.cat(batches).flatten(0, -2).numpy()
    assert [values.shape for values in result.values()] == [(len(sizes),)] * 3
    for j, size in enumerate(sizes):
        values, counts = np.unique(everything[:, j], return_counts=True)
        p = counts / counts.sum()
        assert result["usage"][j] == pytest.approx(len(values) / size)
        assert result["dead_fraction"][j] == pytest.approx(1 - len(values) / size)
        assert result["perplexity"][j] == pytest.approx(np.exp(-(p * np.log(p)).sum()), rel=1e-5)
    usage.reset()
    usage.update(torch.zeros(1, 1, 1, 1, len(sizes), dtype=torch.int64))
    assert usage.compute()["usage"].tolist() == pytest.approx([1 / size for size in sizes])
    with pytest.raises(ValueError, match=rf"expected values in \[0, {sizes[0]}\), found 10"):
        usage.update(torch.full((1, 1, 1, 1, len(sizes)), 10))
    with pytest.raises(ValueError, match=f"expected {len(sizes)} codebooks, found 3"):
        usage.update(torch.zeros(1, 1, 1, 1, 3, dtype=torch.int64))


# Two ranks

SHARES = (50, 90)  # vectors a batch on each rank
TRAINED = ["vqvae", "sliced_vqvae", "hr_vqvae", "gradient_hr_vqvae", "residual_vqvae"]


def batches_of(rank):
    generator = torch.Generator().manual_seed(100 + rank)
    return [torch.randn(SHARES[rank], 6, generator=generator) for _ in range(4)]


def averaging_only():
    """A quantizer that is in place and never draws, so that one process can repeat what two ranks do."""
    torch.manual_seed(7)
    quantizer = SlicedQuantizer(6, n_codebooks=2, codebook_size=8, dead_code_threshold=0)
    for codebook in quantizer.codebooks:
        codebook.initialized.fill_(True)
    return quantizer


def train_in_company(name, rank):
    """A tokenizer after a few steps with unequal batches, in which codes died and were revived."""
    torch.manual_seed(0)
    tokenizer, revived = TINY_TOKENIZERS[name](), []
    for codebook in tokenizer.quantizer.modules():
        if isinstance(codebook, EMACodebook):
            codebook.decay, codebook.dead_code_threshold = 0.5, 0.6
            codebook.update = lambda *args, update=codebook.update: revived.append(update(*args)) or revived[-1]
    # Nothing but the quantizer itself keeps its buffers equal.
    model = DistributedDataParallel(tokenizer, broadcast_buffers=False)
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    torch.manual_seed(rank)
    for step in range(4):
        optimizer.zero_grad()
        model(random_frames(tokenizer, batch=1 + rank, seed=10 * step + rank)).loss.backward()
        optimizer.step()
    assert torch.cat(revived).any()
    return tokenizer


def run_rank(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    averaged = averaging_only()
    # Random on purpose: ranks draw different rows, and most codes die at once.
    torch.manual_seed(rank)
    drawing = SlicedQuantizer(6, n_codebooks=2, codebook_size=40, decay=0.5, dead_code_threshold=0.5)
    usage = CodebookUsage([8, 8])
    for batch in batches_of(rank):
        usage.update(averaged(batch).codes)
        drawing(batch)

    trained = {name: train_in_company(name, rank) for name in TRAINED}
    result = {"averaged": averaged, "drawing": drawing} | trained
    result = {name: module.state_dict() for name, module in result.items()} | {
        "usage": {name: torch.tensor(values) for name, values in usage.compute().items()}
    }
    torch.save(result, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize(
    "options, message",
    [
        ({"codebook_size": 0}, "codebook_size: expected a whole number of at least 1, found 0"),
        ({"init": "zeros"}, "codebook_init: expected data or uniform, found 'zeros'"),
        ({"decay": 1.5}, "ema_decay: expected at least 0 and below 1, found 1.5"),
    ],
)
def test_settings_that_cannot_be(options, message):
    with pytest.raises(ValueError, match=message):
        SlicedQuantizer(4, **options)


def test_two_ranks_keep_one_codebook(tmp_path):
    mp.start_processes(run_rank, args=(str(tmp_path),), nprocs=2, start_method="forkserver")
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    for name in ("averaged", "drawing", *TRAINED):
        assert_same_state(first[name], second[name])
        assert all(tensor.isfinite().all() for tensor in first[name].values())

    # Both ranks' batches at once in one process give the same averages and the same usage.
    alone, usage = averaging_only(), CodebookUsage([8, 8])
    for batch in zip(batches_of(0), batches_of(1)):
        usage.update(alone(torch.cat(batch)).codes)
    for name, tensor in alone.state_dict().items():
        torch.testing.assert_close(first["averaged"][name], tensor, rtol=1e-4, atol=1e-5)
    for name, values in usage.compute().items():
        np.testing.assert_allclose(first["usage"][name], values)

    # Codes drawn from the batches come from both ranks.
    assert first["drawing"]["codebooks.0.initialized"]
    everything = [torch.cat(batches_of(rank))[:, :3] for rank in range(2)]
    for vectors in everything:
        distance = torch.cdist(first["drawing"]["codebooks.0.codebook"], vectors).min(1).values
        assert (distance < 1e-6).any()
