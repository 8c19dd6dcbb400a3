"""The ConvGRU against torch's GRUCell and against its equations written out."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from latentcast.layers.conv_gru import ConvGRUCell


def test_with_one_channel_it_is_torchs_gru_in_every_pixel():
    """With one channel U (r h) is r (U h), which is torch's form; torch keeps the state where its z is 1."""
    torch.manual_seed(0)
    cell, reference = ConvGRUCell(3, 1, kernel_size=1), nn.GRUCell(3, 1)
    (update, reset), candidate = cell.gates.weight[:, :, 0, 0], cell.candidate.weight[0, :, 0, 0]
    weights = torch.stack([reset, -update, candidate])
    update_bias, reset_bias = cell.gates.bias
    with torch.no_grad():
        reference.weight_ih.copy_(weights[:, :3])
        reference.weight_hh.copy_(weights[:, 3:])
        reference.bias_ih.copy_(torch.stack([reset_bias, -update_bias, cell.candidate.bias[0]]))
        reference.bias_hh.zero_()
    state, expected = None, torch.zeros(5 * 2 * 4, 1)
    for x in 2 * torch.randn(6, 5, 3, 2, 4):
        state, expected = cell(x, state), reference(x.movedim(1, -1).flatten(0, 2), expected)
        torch.testing.assert_close(state.flatten(), expected.flatten())


def test_it_follows_its_equations_at_every_step():
    torch.manual_seed(1)
    cell = ConvGRUCell(2, 3, kernel_size=5)
    state, h, hs = None, torch.zeros(2, 3, 6, 7), []
    xs = torch.randn(4, 2, 2, 6, 7)
    for x in xs:
        gates = F.conv2d(torch.cat([x, h], 1), cell.gates.weight, cell.gates.bias, padding=2)
        z, r = 1 / (1 + torch.exp(-gates[:, :3])), 1 / (1 + torch.exp(-gates[:, 3:]))
        c = torch.tanh(F.conv2d(torch.cat([x, r * h], 1), cell.candidate.weight, cell.candidate.bias, padding=2))
        h = (1 - z) * h + z * c
        state = cell(x, state)
        torch.testing.assert_close(state, h)
        hs.append(h)
    torch.testing.assert_close(cell(xs.flatten(0, 1), None, 4), torch.cat(hs))
    torch.testing.assert_close(cell(xs[2:].flatten(0, 1), hs[1], 2), torch.cat(hs[2:]))


def test_the_update_gate_holds_or_replaces_the_state():
    cell = ConvGRUCell(1, 2)
    x, state = torch.randn(1, 1, 4, 4), torch.randn(1, 2, 4, 4)
    with torch.no_grad():
        cell.gates.bias[:2] = -100.0  # z = 0
        torch.testing.assert_close(cell(x, state), state)
        cell.gates.bias[:2] = 100.0  # z = 1: the candidate alone, within (-1, 1)
        assert cell(x, 50 * state).abs().max() <= 1


def test_an_even_kernel_is_refused():
    with pytest.raises(ValueError, match="kernel_size: expected an odd number, found 4"):
        ConvGRUCell(1, 1, 4)
