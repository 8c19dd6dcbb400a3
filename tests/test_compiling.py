"""What torch.compile takes whole: one graph, without a break for a check of values; and steps of samplers, compiled."""

import copy

import pytest
import torch
from tiny import (
    CODES_SPEC,
    SMALL_PIXELCNN,
    SMALL_TRANSFORMER,
    TINY_PRIORS,
    random_clip,
    random_conditions,
    random_frames,
    tiny_tokenizer,
    told_prior,
)

from latentcast import STPixelCNN, VideoTransformer
from latentcast.priors.sampling import CompiledStep

pytestmark = pytest.mark.usefixtures("unchecked")


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()


def compiled(model):
    """By the backend that runs the graph as it is; a break is an error."""
    return torch.compile(model, backend="eager", fullgraph=True)


@pytest.mark.parametrize(
    "name, told",
    [
        ("video_transformer", False),
        ("masked_transformer", False),
        ("flow_transformer", True),
        ("residual_diffusion", False),
        ("residual_diffusion", True),
    ],
)
def test_a_priors_training_is_one_graph(name, told):
    torch.manual_seed(0)
    smallest = {"denoising_multipliers": [1], "transform_multipliers": [1]}  # compiling takes its time
    smallest = smallest if name == "residual_diffusion" else {}
    model = (told_prior(name, **smallest) if told else TINY_PRIORS[name]()).train()
    clip, conditions, losses = random_clip(model), random_conditions() if told else None, []
    for forward in (model, compiled(model)):
        torch.manual_seed(1)
        losses.append(forward(clip, 2, conditions).loss)
    assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-6)
    losses[1].backward()
    assert all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)


@pytest.mark.parametrize("name", ["vqvae", "sliced_vqvae"])
@torch.no_grad()
def test_a_vqvaes_evaluation_is_one_graph(name):
    model = tiny_tokenizer(name)
    frames = random_frames(model)
    expected, found = model(frames), compiled(model)(frames)
    assert torch.equal(found.codes, expected.codes)
    torch.testing.assert_close(found.frames, expected.frames)


@pytest.mark.parametrize("name", ["vqvae", "sliced_vqvae"])
def test_a_vqvaes_training_is_one_graph_once_its_codes_are_placed(name):
    eager = tiny_tokenizer(name).train()
    frames = random_frames(eager)
    eager(frames)
    model = copy.deepcopy(eager)
    for _ in range(2):  # no code is dead, so that none is drawn by chance
        expected, found = eager(frames), compiled(model)(frames)
        torch.testing.assert_close(found.loss, expected.loss)
    assert all(torch.allclose(a, b) for a, b in zip(eager.buffers(), model.buffers(), strict=True))
    found.loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)


def drawn(name, **options):
    """Codes of two futures of two contexts, by a model of two codebooks of one size."""
    torch.manual_seed(0)
    spec = CODES_SPEC | {"codebook_sizes": [6, 6]}
    if name == "st_pixelcnn":
        model = STPixelCNN(spec, **SMALL_PIXELCNN).eval()
    else:
        model = VideoTransformer(spec, subscale=[4, 1, 1], **SMALL_TRANSFORMER).eval()
    context, generator = random_clip(model)[:, :2], torch.Generator().manual_seed(1)
    return model.sample(context, 3, num_samples=2, generator=generator, top_p=0.9, **options)


@pytest.mark.parametrize("name", ["video_transformer", "st_pixelcnn"])
def test_a_compiled_step_draws_the_same_codes(name, caplog):
    """The levels of ST-PixelCNN, a network each, share one graph."""
    expected = drawn(name)
    torch._dynamo.utils.counters.clear()
    assert torch.equal(drawn(name, compile=True), expected)
    if "uncompiled" in caplog.text:  # the machine's fault, or the step's
        works = CompiledStep(lambda: torch.ones(1) + 1)
        works()
        if works._run is works._step:
            pytest.skip("torch.compile does not work on this machine")
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert "uncompiled" not in caplog.text


@pytest.mark.parametrize("name", ["video_transformer", "st_pixelcnn"])
def test_where_compiling_fails_sampling_goes_on_as_it_is(name, caplog, monkeypatch):
    def fails():
        raise RuntimeError("no compiler\nfor C++")

    monkeypatch.setattr(torch, "compile", lambda step, **options: fails)
    expected, found = drawn(name), drawn(name, compile=True)
    assert torch.equal(found, expected)
    warning = "compile: sampling goes on uncompiled, torch.compile failed: no compiler for C++"
    assert {record.getMessage() for record in caplog.records} == {warning}
    with pytest.raises(ValueError, match=r"^compile: expected false with use_cache=False, found True$"):
        drawn(name, compile=True, use_cache=False)
