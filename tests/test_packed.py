"""Packed weights: the same products, only while a model samples."""

import pytest
import torch
from tiny import Bar, random_clip, tiny_prior
from torch import nn

from latentcast.layers.packed import can_pack, packed_linears

pytestmark = pytest.mark.skipif(not can_pack(), reason="this CPU or PyTorch has no products in bfloat16")


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(1, 24), (2, 5, 24), (40, 24)])
@torch.no_grad()
def test_products_are_those_of_the_layer(bias, shape):
    model = nn.Sequential(nn.Linear(24, 17, bias), nn.ReLU(), nn.Linear(17, 9, bias)).to(torch.bfloat16)
    x = torch.randn(shape).to(torch.bfloat16)
    expected = model(x)
    with packed_linears(model):
        assert vars(model[0]).keys() >= {"forward"}
        torch.testing.assert_close(model(x), expected)
        with packed_linears(model):  # another sampler of the model
            pass
        torch.testing.assert_close(model(x), expected)
    assert all("forward" not in vars(layer) for layer in model) and torch.equal(model(x), expected)


def test_other_weights_and_training_are_left_alone():
    model = nn.Linear(4, 4)
    with torch.no_grad(), packed_linears(model):
        assert "forward" not in vars(model)
    model.to(torch.bfloat16)
    with packed_linears(model):
        model(torch.ones(1, 4, dtype=torch.bfloat16)).sum().backward()
    assert model.weight.grad is not None


def test_while_a_model_samples_and_no_longer():
    prior, packed = tiny_prior("video_transformer").to(torch.bfloat16), set()
    layers = [layer for layer in prior.modules() if type(layer) is nn.Linear]

    class Looks(Bar):
        def update(self, n=1):
            packed.update(i for i, layer in enumerate(layers) if "forward" in vars(layer))

    prior.sample(random_clip(prior, 1, 2), 1, progress=Looks())
    assert packed and not any("forward" in vars(layer) for layer in layers)
