"""The feature aligner and the skip connection: section 4.3 written out, what is aligned to what, and memory."""

from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from latentcast.layers.aligner import FeatureAligner, Memory, SkipConnection

SHAPE = (2, 6, 3, 5)  # N, C, H, W


def section_4_3(aligner, decoded, encoded, form):
    """The formulas of the paper, a frame at a time, on features flattened to C x N."""
    frames = []
    for F_d, F_e in zip(decoded.flatten(2), encoded.flatten(2)):
        Q, K = aligner.to_query.weight @ F_d, aligner.to_key.weight @ F_e
        V = aligner.to_value.weight @ (F_d if form == "paper" else F_e)
        S = Q.T @ K
        A = S.exp() / S.exp().sum(1, keepdim=True)
        frames.append(torch.cat([F_d, F_e, V @ A.T]).unflatten(1, SHAPE[2:]))
    return torch.stack(frames)


@pytest.mark.parametrize("form", ["paper", "encoder_value"])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_values_and_gradients_are_those_of_the_formulas(form, memory_format):
    torch.manual_seed(0)
    aligner = FeatureAligner(SHAPE[1], form).double()
    inputs = [torch.randn(SHAPE).double().contiguous(memory_format=memory_format).requires_grad_() for _ in range(2)]
    decoded, encoded = inputs
    aligned = aligner(decoded, aligner.memory(encoded))
    expected = section_4_3(aligner, decoded, encoded, form)
    assert aligned.shape == (2, 3 * 6, 3, 5)
    torch.testing.assert_close(aligned, expected)
    sources = [*inputs, *aligner.parameters()]
    weights = torch.randn_like(expected)
    for found, wanted in zip(*(torch.autograd.grad((x * weights).sum(), sources) for x in (aligned, expected))):
        assert wanted.abs().max() > 1e-3
        torch.testing.assert_close(found, wanted)


def test_values_from_the_encoder_follow_what_has_moved():
    """Each position has a feature of its own; in the decoder everything is somewhere else."""
    n = 3 * 5
    encoded = torch.eye(n).reshape(1, n, 3, 5)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(0))
    decoded = encoded.flatten(2)[:, :, order].unflatten(2, (3, 5))
    moved = {}
    for form in ("paper", "encoder_value"):
        aligner = FeatureAligner(n, form)
        for linear in (aligner.to_query, aligner.to_key, aligner.to_value):
            linear.weight.data = torch.eye(n)
        aligner.to_query.weight.data *= 50  # a query has one answer
        moved[form] = aligner(decoded, aligner.memory(encoded)).chunk(3, 1)[2]
    torch.testing.assert_close(moved["encoder_value"], decoded)
    # As written, the place that answers is looked up in the decoder: moved once more.
    torch.testing.assert_close(moved["paper"], decoded.flatten(2)[:, :, order].unflatten(2, (3, 5)))


@pytest.mark.parametrize("aligner", [SkipConnection(), FeatureAligner(6), FeatureAligner(6, "encoder_value")])
def test_memories_are_rows_that_can_be_chosen_and_joined(aligner):
    decoded, encoded = torch.randn(4, 6, 3, 5), torch.randn(2, 6, 3, 5)
    rows = torch.tensor([1, 0, 1, 1])
    expected = aligner(decoded, aligner.memory(encoded[rows]))
    assert expected.shape == (4, (1 + aligner.joined) * 6, 3, 5)
    assert torch.equal(expected[:, :12], torch.cat([decoded, encoded[rows]], 1))
    parts = [aligner.memory(frame) for frame in encoded.split(1)]
    chosen = Memory.cat(parts).map(lambda x: x[rows])
    torch.testing.assert_close(aligner(decoded, chosen), expected)


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that any operation makes."""

    found = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        sizes = [x.numel() for x in tree_leaves(result) if torch.is_tensor(x)]
        self.found = max([self.found, *sizes])
        return result


@pytest.mark.parametrize("form", ["paper", "encoder_value"])
def test_memory_is_linear_in_the_positions(form):
    aligner = FeatureAligner(8, form)
    largest = {}
    for side in (16, 32):
        decoded, encoded = torch.randn(2, 1, 8, side, side, requires_grad=True)
        with Largest() as largest[side]:
            aligner(decoded, aligner.memory(encoded)).square().sum().backward()
    assert largest[16].found == 3 * 8 * 16**2 < (16**2) ** 2  # the output; one similarity matrix is larger
    assert largest[32].found == 4 * largest[16].found


def test_unknown_form():
    with pytest.raises(ValueError, match="aligner: expected one of paper, encoder_value, found 'decoder'"):
        FeatureAligner(4, "decoder")


def test_benchmark_compares_the_same_function(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    from aligner import NaiveAligner, work

    torch.manual_seed(0)
    linear, naive = FeatureAligner(6), NaiveAligner(6)
    naive.load_state_dict(linear.state_dict())
    decoded, encoded = torch.randn(2, *SHAPE)
    torch.testing.assert_close(naive(decoded, naive.memory(encoded)), linear(decoded, linear.memory(encoded)))
    with Largest() as largest:
        work("naive", 16, "cpu")()
    assert largest.found == 4 * (16**2) ** 2  # all similarities of four frames
