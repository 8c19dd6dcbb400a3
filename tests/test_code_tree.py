"""The code tree against brute force, the plain quantizer, hand-computed averages and a run on two ranks."""

import copy

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from test_quantizer import assert_same_state, placed, state_of
from torch.utils._python_dispatch import TorchDispatchMode

from latentcast.tokenizers.quantizers import search
from latentcast.tokenizers.quantizers.code_tree import CodeTree
from latentcast.tokenizers.quantizers.ema_codebook import EMACodebook
from latentcast.tokenizers.quantizers.sliced import SlicedQuantizer


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def walk(quantizer, vector):
    """One vector down the tree in float64, by looking at one code after the other.

    Returns the local codes, the residuals xi^0 ... xi^(n-1) and the code vectors e^1 ... e^n.
    """
    m = quantizer.codebook_size
    xi, path, codes, residuals, vectors = vector.detach().double().numpy(), 0, [], [], []
    for layer in quantizer.layers:
        table = layer.codebook.detach().double().numpy()
        children = [table[path * m + c] for c in range(m)]
        code = min(range(m), key=lambda c: ((xi - children[c]) ** 2).sum())
        codes.append(code)
        residuals.append(xi)
        vectors.append(children[code])
        xi = xi - children[code]
        path = path * m + code if quantizer.tree else 0
    return codes, np.array(residuals), np.array(vectors)


def trained(n_layers=3, m=4, dim=5, steps=3, **arguments):
    quantizer = CodeTree(dim, n_layers, m, **arguments)
    for _ in range(steps):
        quantizer(torch.randn(200, dim))
    return quantizer


# The search


def test_layers_have_a_codebook_for_each_path():
    tree, flat = CodeTree(5, 3, 4), CodeTree(5, 3, 4, tree=False)
    assert [tuple(layer.codebook.shape) for layer in tree.layers] == [(4, 5), (16, 5), (64, 5)]
    assert [tuple(layer.codebook.shape) for layer in flat.layers] == [(4, 5)] * 3
    for n_layers, m in ((0, 4), (3, 0)):
        with pytest.raises(ValueError, match=f"expected at least 1 of each, found {n_layers} and {m}"):
            CodeTree(5, n_layers, m)


@pytest.mark.parametrize("tree", [True, False])
@pytest.mark.parametrize("learned", [True, False])
def test_search_by_brute_force(tree, learned, monkeypatch):
    monkeypatch.setattr(search, "GATHERED_CPU", 7 * 4 * 5)  # several chunks
    quantizer = trained(tree=tree, learned=learned).eval()
    vectors = torch.randn(6, 11, 5)
    output = quantizer(vectors)
    assert output.codes.shape == (6, 11, 3) and output.codes.dtype == torch.int64
    assert output.codes.unique().tolist() == [0, 1, 2, 3]
    for index in np.ndindex(6, 11):
        codes, _, e = walk(quantizer, vectors[index])
        assert output.codes[index].tolist() == codes
        for k in (1, 2, 3):
            found = quantizer.lookup(output.codes[index], k)
            torch.testing.assert_close(found, torch.tensor(e[:k].sum(0)).float(), atol=1e-5, rtol=1e-5)
    assert torch.equal(quantizer.nearest(vectors), output.codes)
    assert torch.equal(quantizer.lookup(output.codes), output.latents)
    assert not quantizer.lookup(output.codes).requires_grad
    for k in (0, 4):
        with pytest.raises(ValueError, match=f"n_layers: expected 1 to 3, found {k}"):
            quantizer.lookup(output.codes, k)


def test_nearest_far_from_the_origin():
    family = EMACodebook(8, 6, n_parents=3)
    family.codebook += 300
    vectors, parents = torch.randn(500, 6) + 300, torch.randint(3, (500,))
    distances = (vectors.double()[:, None] - family.codebook.double().view(3, 8, 6)[parents]).square().sum(-1)
    assert (family.nearest(vectors, parents) == distances.argmin(1)).double().mean() > 0.99


def test_search_is_local_and_bounded(monkeypatch):
    """No tensor as large as the distances to all leaves, or as all gathered children."""

    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            if torch.is_tensor(result) and result.data_ptr() not in self.known:
                self.numel = max(self.numel, result.numel())
            return result

    monkeypatch.setattr(search, "GATHERED_CPU", 2**12)
    quantizer, vectors = CodeTree(8, 4, 8), torch.randn(1000, 8)
    with Largest() as largest:
        largest.known = {layer.codebook.data_ptr() for layer in quantizer.layers}
        quantizer.nearest(vectors)
    assert 0 < largest.numel <= vectors.numel() < 1000 * 8 * 8 < 1000 * 8**4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("learned", [True, False])
def test_autocast_changes_nothing(dtype, learned):
    plain = CodeTree(16, 3, 4, learned=learned)
    cast = copy.deepcopy(plain)
    for step in range(3):
        vectors = torch.randn(500, 16) + 3
        torch.manual_seed(step)
        expected = plain(vectors)
        torch.manual_seed(step)
        with torch.autocast("cpu", dtype=dtype):
            found = cast(vectors)
            codes = cast.nearest(vectors)
        assert torch.equal(found.codes, expected.codes)
        assert torch.equal(found.latents, expected.latents)
        assert torch.equal(found.commitment_loss, expected.commitment_loss)
        assert torch.equal(codes, plain.nearest(vectors))
    assert_same_state(state_of(cast), state_of(plain))


# One layer is the plain quantizer


@pytest.mark.parametrize("tree", [True, False])
@pytest.mark.parametrize("threshold", [0.0, 0.5])
def test_one_layer_is_the_plain_quantizer(tree, threshold):
    arguments = {"decay": 0.5, "dead_code_threshold": threshold}
    torch.manual_seed(5)
    plain = SlicedQuantizer(6, codebook_size=12, **arguments)
    torch.manual_seed(5)
    quantizer = CodeTree(6, 1, 12, tree=tree, **arguments)
    revived = False
    for step in range(8):
        vectors = torch.randn(100, 6) * (1 + step % 3)
        torch.manual_seed(step)
        expected = plain(vectors)
        torch.manual_seed(step)
        found = quantizer(vectors)
        assert torch.equal(found.codes, expected.codes)
        torch.testing.assert_close(found.latents, expected.latents)
        torch.testing.assert_close(found.perplexity, expected.perplexity)
        torch.testing.assert_close(found.commitment_loss, 2 * expected.commitment_loss)  # of the layer and of the sum
        for name in ("codebook", "cluster_size", "cluster_sum"):
            torch.testing.assert_close(getattr(quantizer.layers[0], name), getattr(plain.codebooks[0], name))
        drawn = (quantizer.layers[0].codebook[:, None] == vectors).all(-1)  # these stand on a vector of the batch
        revived |= bool(drawn.any())
    assert revived == (threshold > 0)


# The loss and its gradients


@pytest.mark.parametrize("tree", [True, False])
def test_loss_is_the_naive_one(tree):
    quantizer = trained(tree=tree, learned=True).eval()
    vectors = torch.randn(40, 5)
    output = quantizer(vectors)
    layers, total = 0.0, 0.0
    for vector in vectors:
        _, xi, e = walk(quantizer, vector)
        layers += ((xi - e) ** 2).sum()
        total += ((vector.double().numpy() - e.sum(0)) ** 2).sum()
    expected = (layers + total) / vectors.numel()
    assert output.commitment_loss.item() == pytest.approx(expected, rel=1e-5)
    assert output.codebook_loss.item() == pytest.approx(expected, rel=1e-5)
    with torch.no_grad():
        assert quantizer(vectors).codebook_loss.item() == pytest.approx(expected, rel=1e-5)
    assert trained(tree=tree).eval()(vectors).codebook_loss is None


def test_every_layer_pulls_the_encoder():
    """d/dz of the commitment is the sum of what remains after every layer, plus that after the last once more."""
    quantizer = trained().eval()
    vectors = torch.randn(40, 5, requires_grad=True)
    output = quantizer(vectors)
    (gradient,) = torch.autograd.grad(output.commitment_loss, vectors, retain_graph=True)
    remainders = []
    for vector in vectors:
        _, xi, e = walk(quantizer, vector)
        assert (np.abs(xi - e).max(1) > 1e-4).all()
        remainders.append((xi - e).sum(0) + (xi - e)[-1])
    expected = 2 / vectors.numel() * torch.tensor(np.array(remainders)).float()
    torch.testing.assert_close(gradient, expected, atol=1e-6, rtol=1e-4)
    weights = torch.randn(40, 5)
    (gradient,) = torch.autograd.grad((weights * output.latents).sum(), vectors)
    assert torch.equal(gradient, weights)


def test_gradients_of_the_codes():
    """Of chosen codes: 2 (e^i - xi^(i-1)) + 2 (e_C - z) for each vector that chose them; of others zero."""
    quantizer = trained(learned=True).eval()
    vectors = torch.randn(40, 5, requires_grad=True)
    output = quantizer(vectors)
    expected = [np.zeros(layer.codebook.shape) for layer in quantizer.layers]
    for vector in vectors:
        codes, xi, e = walk(quantizer, vector)
        row = 0
        for i, code in enumerate(codes):
            row = row * 4 + code
            expected[i][row] += 2 * (e[i] - xi[i]) + 2 * (e.sum(0) - vector.detach().double().numpy())
    # The codes' loss is theirs alone, and neither the commitment nor what the decoder wants moves them.
    assert torch.autograd.grad(output.codebook_loss, vectors, retain_graph=True, allow_unused=True) == (None,)
    (output.codebook_loss + output.commitment_loss + output.latents.sum()).backward()
    for layer, gradient in zip(quantizer.layers, expected):
        expected_gradient = torch.tensor(gradient).float() / vectors.numel()
        torch.testing.assert_close(layer.codebook.grad, expected_gradient, atol=1e-6, rtol=1e-4)


def test_gradients_survive_the_update_of_the_codebooks():
    for learned in (True, False):
        quantizer = CodeTree(4, 2, 5, learned=learned)
        vectors = torch.randn(50, 4, requires_grad=True)
        before = state_of(quantizer)
        output = quantizer(vectors)
        (output.commitment_loss + (output.codebook_loss if learned else 0)).backward()
        assert vectors.grad.abs().sum() > 0
        assert not torch.equal(quantizer.layers[1].codebook, before["layers.1.codebook"])


# Placing, averaging and reviving, each parent by itself


def test_every_parent_is_updated_as_a_codebook_of_its_own():
    """Also averages by hand: a parent's codes follow its own vectors, in the batches that visit it."""
    m, dim, n_parents = 3, 2, 4
    arguments = {"decay": 0.9, "eps": 1e-2, "dead_code_threshold": 0}
    family = EMACodebook(m, dim, n_parents=n_parents, **arguments)
    placed(family, torch.randn(n_parents * m, dim))
    size = np.ones((n_parents, m))
    total = family.codebook.view(n_parents, m, dim).double().numpy().copy()
    for step in range(5):
        vectors, parents = torch.randn(30, dim), torch.randint(3, (30,))
        parents[parents == 1] = 0 if step % 2 else 1  # parent 1 in every other batch, parent 3 never
        codes = family.nearest(vectors, parents)
        family.update(vectors, codes, parents)
        for p in set(parents.tolist()):
            chosen = np.eye(m)[codes[parents == p].numpy()]
            size[p] = 0.9 * size[p] + 0.1 * chosen.sum(0)
            total[p] = 0.9 * total[p] + 0.1 * chosen.T @ vectors[parents == p].double().numpy()
        smoothed = (size + 1e-2) / (size.sum(1, keepdims=True) + 3e-2) * size.sum(1, keepdims=True)
        visited = sorted(set(parents.tolist()))
        np.testing.assert_allclose(family.cluster_size.view(n_parents, m), size, rtol=1e-5)
        np.testing.assert_allclose(family.cluster_sum.view(n_parents, m, dim), total, rtol=1e-4, atol=1e-5)
        codebook = family.codebook.view(n_parents, m, dim)
        np.testing.assert_allclose(codebook[visited], (total / smoothed[..., None])[visited], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("learned", [True, False])
def test_a_parent_that_is_not_visited_stays_bit_for_bit(learned):
    quantizer = CodeTree(2, 2, 4, decay=0.5, dead_code_threshold=0.5, learned=learned)
    quantizer(torch.randn(400, 2))
    family, before = quantizer.layers[1], state_of(quantizer.layers[1])
    assert family.initialized.all()
    vectors = quantizer.layers[0].codebook[2].detach() + 0.05 * torch.randn(50, 2)
    draws = torch.get_rng_state()
    for _ in range(200):
        path = family.nearest(vectors, torch.full((50,), 2))
        family.update(vectors, path, torch.full((50,), 2))
    assert not torch.equal(torch.get_rng_state(), draws)  # parent 2 revived codes
    others = torch.arange(16) // 4 != 2
    for name, tensor in family.state_dict().items():
        if len(tensor) == 16:
            assert torch.equal(tensor[others], before[name][others]), name
    assert family.codebook[~others].abs().max() < 10


def test_parents_are_placed_on_their_first_visit():
    family = EMACodebook(4, 2, n_parents=3, kmeans_iters=20)
    start = family.codebook.clone()
    first = torch.randn(60, 2) + torch.tensor([50.0, 0.0])
    rows = family.initialize(first, torch.full((60,), 1)).nonzero()[:, 0]
    assert rows.tolist() == [4, 5, 6, 7]
    assert family.initialized.tolist() == [False, True, False]
    assert torch.equal(family.codebook[:4], start[:4]) and torch.equal(family.codebook[8:], start[8:])
    # Lloyd's algorithm has converged: every code is the mean of the vectors that are nearest to it.
    nearest = torch.cdist(first, family.codebook[4:8]).argmin(1)
    for c in range(4):
        torch.testing.assert_close(family.codebook[4 + c], first[nearest == c].mean(0))
    torch.testing.assert_close(family.cluster_size[4:8], torch.full((4,), 15.0))
    torch.testing.assert_close(family.cluster_sum[4:8], family.codebook[4:8] * 15)
    placed_codes = family.codebook[4:8].clone()
    rows = family.initialize(torch.randn(2, 2), torch.tensor([1, 2])).nonzero()[:, 0]  # one vector for four codes
    assert rows.tolist() == [8, 9, 10, 11]
    assert torch.equal(family.codebook[4:8], placed_codes)
    assert (family.codebook[8:] == family.codebook[8]).all()
    assert not family.initialize(torch.randn(5, 2), torch.tensor([1, 2, 2, 1, 1])).any()


def test_unused_codes_do_not_explode():
    """Neither in the first batches nor after hundreds that use a single leaf, when their counts are gone."""
    quantizer = CodeTree(3, 3, 4, decay=0.9, dead_code_threshold=0)
    first = torch.randn(30, 3)
    quantizer(first)
    for step in range(300):
        quantizer(first[:1].repeat(10, 1))
        if step in (0, 1, 10, 100, 299):
            for layer in quantizer.layers:
                assert layer.codebook.norm(dim=-1).max() <= 1.05 * max(first.norm(dim=-1).max(), 5)


def test_dead_children_are_revived_from_their_own_parent_and_survive():
    family = EMACodebook(4, 2, n_parents=2, decay=0.8, dead_code_threshold=0.2)
    centers = torch.tensor([[0.0, 0.0], [1.0, 0.0], [80.0, 80.0], [90.0, 90.0]])
    placed(family, torch.cat([centers, centers - 200]))
    revived = torch.empty(0)
    for _ in range(30):
        if len(revived):
            break
        near, far = torch.rand(40, 2), torch.rand(40, 2) - 200
        vectors, parents = torch.cat([near, far]), torch.arange(80) // 40
        revived = family.update(vectors, family.nearest(vectors, parents), parents).nonzero()[:, 0]
    assert {2, 3, 6, 7} == set(revived.tolist())
    for row in revived.tolist():
        assert (family.codebook[row] == (near if row < 4 else far)).all(-1).any()
    for p in range(2):
        average = family.cluster_size[4 * p + 2].item()
        assert family.cluster_size[4 * p + 3].item() == average
        rows = slice(4 * p + 2, 4 * p + 4)
        torch.testing.assert_close(family.cluster_sum[rows], family.codebook[rows] * average)
    # A next batch that chooses none of them leaves them in place, and then they take part.
    before = family.codebook[[2, 3, 6, 7]].clone()
    family.update(vectors, torch.zeros(80, dtype=torch.int64), parents)
    torch.testing.assert_close(family.codebook[[2, 3, 6, 7]], before, rtol=1e-4, atol=1e-4)
    assert family.nearest(torch.rand(500, 2), torch.zeros(500, dtype=torch.int64)).unique().numel() >= 3


def test_few_vectors_revive_few_codes():
    """Two codes on one vector would not both live: a dead code waits until its parent has a vector for it."""
    family = EMACodebook(6, 2, n_parents=2, decay=0.5, dead_code_threshold=0.5)
    placed(family, torch.cat([torch.zeros(6, 2) + 70, torch.zeros(6, 2)]))
    family.cluster_size[1:6] = 1e-3
    family.cluster_sum[1:6] = family.codebook[1:6] * 1e-3
    vectors = torch.randn(2, 2) + 70
    revived = family.update(vectors, torch.tensor([0, 0]), torch.tensor([0, 0])).nonzero()[:, 0]
    assert revived.tolist() == [1, 2]
    assert {tuple(code) for code in family.codebook[[1, 2]].tolist()} == {tuple(v) for v in vectors.tolist()}
    vectors = torch.randn(3, 2) + 70
    revived = family.update(vectors, torch.tensor([0, 1, 2]), torch.zeros(3, dtype=torch.int64)).nonzero()[:, 0]
    assert revived.tolist() == [3, 4, 5]


def test_below_a_new_code_the_tree_starts_over():
    quantizer = CodeTree(2, 3, 3, decay=0.5, dead_code_threshold=0.3)
    for _ in range(3):
        quantizer(torch.randn(500, 2))
    assert all(layer.initialized.all() for layer in quantizer.layers)
    with torch.no_grad():  # code 1 of the first layer is lost far away
        quantizer.layers[0].codebook[1] = 1000
        quantizer.layers[0].cluster_sum[1] = 1000 * quantizer.layers[0].cluster_size[1]
    for _ in range(10):  # until it is revived
        if quantizer.layers[1].initialized.all():
            quantizer(torch.randn(500, 2))
    assert quantizer.layers[1].initialized.tolist() == [True, False, True]
    old = quantizer.layers[1].codebook[3:6].clone()
    vectors = torch.randn(500, 2)
    output = quantizer(vectors)
    assert quantizer.layers[1].initialized.all()
    below = (output.codes[:, 0] == 1).nonzero()[:, 0]
    assert len(below) > 20
    assert (quantizer.layers[1].codebook[3:6] - old).abs().max() > 1e-3
    assert (vectors[below] - output.latents[below]).square().mean() < 0.25 * vectors.square().mean()
    # Grandchildren of the new code began anew with their parents, and describe what these leave.
    counts = quantizer.layers[2].cluster_size[9:18].sum()
    torch.testing.assert_close(counts, torch.tensor(float(len(below))))


@pytest.mark.parametrize("learned", [True, False])
def test_leaves_that_nothing_reached_are_their_parent(learned):
    quantizer = CodeTree(3, 3, 4, learned=learned)
    vectors = torch.randn(2, 3) + 5  # two of 4 x 4 paths
    quantizer(vectors)
    every = torch.cartesian_prod(*[torch.arange(4)] * 3)
    reached = [layer.initialized for layer in quantizer.layers[1:]]
    assert all(not r.all() and r.any() for r in reached)
    for i, known in enumerate(reached, start=1):
        rows = every[:, 0] if i == 1 else every[:, 0] * 4 + every[:, 1]
        unknown = every[~known[rows]]
        assert torch.equal(quantizer.lookup(unknown, i + 1), quantizer.lookup(unknown, i))
    fresh = CodeTree(3, 3, 4, learned=learned)
    assert torch.equal(fresh.lookup(every), fresh.lookup(every, 1)) and fresh.lookup(every).abs().min() > 0
    # Below a code that is taken back, at once, and to the leaves.
    quantizer._start_over_below(
        0, torch.arange(len(quantizer.layers[0].codebook)) == quantizer.nearest(vectors[:1])[0, 0]
    )
    below = every[every[:, 0] == quantizer.nearest(vectors[:1])[0, 0]]
    assert torch.equal(quantizer.lookup(below), quantizer.lookup(below, 1))


def test_a_settled_tree_revives_no_code():
    quantizer = CodeTree(2, 2, 4, decay=0.5, dead_code_threshold=0.9)
    for _ in range(3):
        quantizer(torch.randn(400, 2))
    for layer in quantizer.layers:
        layer.revives = False
    for step in range(20):
        vectors = torch.randn(400, 2) * (1 if step < 10 else 0.01)  # then most codes die
        rows, (total, size) = quantizer.nearest(vectors)[:, 0], (quantizer.layers[0].cluster_sum.clone(), 400 / 4)
        quantizer(vectors)
        assert all(layer.initialized.all() for layer in quantizer.layers)  # nothing started over
        for c in range(4):  # plain moving averages
            torch.testing.assert_close(
                quantizer.layers[0].cluster_sum[c], (total[c] + vectors[rows == c].sum(0)) / 2, rtol=1e-4, atol=1e-4
            )
    assert quantizer.layers[0].cluster_size.min() < 0.1 * size
    quantizer.layers[0].revives = True
    assert quantizer.layers[0].update(vectors, rows).any()


def test_overflow_does_not_poison_the_codebooks():
    for learned in (True, False):
        quantizer = CodeTree(4, 2, 6, learned=learned)
        for batch in range(3):
            vectors = torch.randn(60, 4)
            vectors[3, 1], vectors[7, 0] = float("inf"), float("nan")
            if batch == 2:
                vectors[:] = float("nan")
            codes = quantizer(vectors).codes
            assert (codes >= 0).all() and (codes < 6).all()
        for name, tensor in quantizer.state_dict().items():
            assert tensor.isfinite().all(), name


@pytest.mark.parametrize("learned", [True, False])
def test_evaluation_changes_nothing(learned):
    quantizer = trained(learned=learned)
    before = state_of(quantizer)
    quantizer.eval()(torch.randn(60, 5))
    quantizer.train().nearest(torch.randn(60, 5))
    assert_same_state(state_of(quantizer), before)


@pytest.mark.parametrize("cast", [lambda m: m.half(), lambda m: m.to(torch.bfloat16), lambda m: m.double()])
@pytest.mark.parametrize("learned", [True, False])
def test_state_stays_in_single_precision(cast, learned):
    quantizer = trained(learned=learned)
    before = state_of(quantizer)
    cast(quantizer)
    assert_same_state(state_of(quantizer), before)
    assert quantizer(torch.randn(9, 5).bfloat16()).latents.dtype == torch.float32


@pytest.mark.parametrize("learned", [True, False])
def test_a_resumed_quantizer_goes_on_as_if_never_stopped(learned):
    """All state is in the state dict: counts, sums, codes and which parents have been placed."""
    batches = [torch.randn(30, 5) * (1 + i % 2) for i in range(12)]
    whole = CodeTree(5, 3, 4, decay=0.5, dead_code_threshold=0.5, learned=learned)
    for batch in batches[:4]:
        whole(batch)
    assert not whole.layers[2].initialized.all()
    resumed = CodeTree(5, 3, 4, decay=0.5, dead_code_threshold=0.5, learned=learned)
    resumed.load_state_dict(whole.state_dict())
    for quantizer in (whole, resumed):
        torch.manual_seed(9)
        for batch in batches[4:]:
            quantizer(batch)
    assert_same_state(state_of(resumed), state_of(whole))


@pytest.mark.parametrize("learned", [True, False])
def test_every_leaf_is_used_and_every_layer_halves_the_error(learned):
    quantizer = CodeTree(2, 3, 4, decay=0.9, learned=learned)
    optimizer = torch.optim.Adam(quantizer.parameters(), 1e-2) if learned else None
    for _ in range(60):
        output = quantizer(torch.randn(1000, 2))
        if learned:
            optimizer.zero_grad()
            output.codebook_loss.backward()
            optimizer.step()
    quantizer.eval()
    vectors = torch.randn(4000, 2)
    codes = quantizer.nearest(vectors)
    errors = [(vectors - quantizer.lookup(codes, k)).square().mean().item() for k in (1, 2, 3)]
    assert errors[0] < 0.5 and errors[1] < 0.5 * errors[0] and errors[2] < 0.5 * errors[1]
    leaves = codes @ torch.tensor([16, 4, 1])
    assert leaves.unique().numel() == 64


# Two ranks

SHARES = (30, 70)  # vectors a batch on each rank


def batches_of(rank):
    generator = torch.Generator().manual_seed(100 + rank)
    # Rank 1 alone sees one corner of the space, so that some parents are visited on one rank only.
    return [torch.randn(SHARES[rank], 4, generator=generator) + 2 * rank for _ in range(5)]


def averaging_only():
    """A tree that is in place and never draws, so that one process can repeat what two ranks do."""
    torch.manual_seed(7)
    quantizer = CodeTree(4, 3, 4, dead_code_threshold=0)
    for layer in quantizer.layers:
        layer.initialized.fill_(True)
    return quantizer


def run_rank(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    averaged = averaging_only()
    # Random on purpose: ranks draw different rows, and most codes die at once.
    torch.manual_seed(rank)
    drawing = {
        name: CodeTree(4, 3, 6, tree=name != "residual", learned=name == "learned", decay=0.5, dead_code_threshold=0.5)
        for name in ("tree", "residual", "learned")
    }
    for layer in drawing["learned"].layers:  # DDP makes parameters the same on all ranks
        dist.broadcast(layer.codebook.data, 0)
    for name in ("tree", "residual"):  # and buffers
        for layer in drawing[name].layers:
            for buffer in layer.buffers():
                if buffer.dtype.is_floating_point:
                    dist.broadcast(buffer, 0)
    first = CodeTree(4, 2, 6, kmeans_iters=0)
    for step, batch in enumerate(batches_of(rank)):
        averaged(batch)
        for quantizer in drawing.values():
            quantizer(batch)
        if step == 0:
            first.layers[0].initialize(batch, torch.zeros(len(batch), dtype=torch.int64))
    result = {name: module.state_dict() for name, module in (drawing | {"averaged": averaged, "first": first}).items()}
    torch.save(result, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_ranks_keep_one_tree(tmp_path):
    mp.start_processes(run_rank, args=(str(tmp_path),), nprocs=2, start_method="forkserver")
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    for name in ("averaged", "tree", "residual", "learned"):
        assert_same_state(first[name], second[name])
        assert all(tensor.isfinite().all() for tensor in first[name].values())

    # Both ranks' batches at once in one process give the same averages.
    alone = averaging_only()
    for batch in zip(batches_of(0), batches_of(1)):
        alone(torch.cat(batch))
    for name, tensor in alone.state_dict().items():
        torch.testing.assert_close(first["averaged"][name], tensor, rtol=1e-4, atol=1e-5)

    # Codes drawn from the first batch: three from each rank, taking turns, no vector twice.
    drawn = first["first"]["layers.0.codebook"]
    for rank in range(2):
        from_rank = (drawn[:, None] == batches_of(rank)[0]).all(-1).any(1)
        assert from_rank.tolist() == [i % 2 == rank for i in range(6)]
    assert len(drawn.unique(dim=0)) == 6
