"""What torch.compile takes whole: one graph, without a break for a check of values."""

import pytest
import torch
from tiny import TINY_PRIORS, random_clip, random_conditions, random_frames, tiny_tokenizer, told_prior


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()


def compiled(model):
    """By the backend that runs the graph as it is; a break is an error."""
    return torch.compile(model, backend="eager", fullgraph=True)


@pytest.mark.parametrize("name", ["video_transformer", "residual_diffusion"])
def test_a_priors_training_is_one_graph(name):
    torch.manual_seed(0)
    model = TINY_PRIORS[name]().train()
    clip, losses = random_clip(model), []
    for forward in (model, compiled(model)):
        torch.manual_seed(1)
        losses.append(forward(clip, 2).loss)
    assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-6)
    losses[1].backward()
    assert all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)


@pytest.mark.parametrize("name", ["video_transformer", "residual_diffusion"])
def test_a_told_priors_training_is_one_graph(name):
    model = told_prior(name)
    clip, told = random_clip(model), random_conditions()
    expected, found = (forward(clip, 2, told).loss for forward in (model, compiled(model)))
    torch.testing.assert_close(found, expected)
    found.backward()
    assert model.conditioner.networks[0].table.weight.grad.any()


@pytest.mark.parametrize("name", ["vqvae", "sliced_vqvae"])
@torch.no_grad()
def test_a_vqvaes_evaluation_is_one_graph(name):
    model = tiny_tokenizer(name)
    frames = random_frames(model)
    expected, found = model(frames), compiled(model)(frames)
    assert torch.equal(found.codes, expected.codes)
    torch.testing.assert_close(found.frames, expected.frames)
