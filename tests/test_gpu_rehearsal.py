"""A rehearsal of GPUs on any machine: models and training steps with a device "cuda" that is not there.

Mixed devices are errors, and every wait of the host for the device is counted (``fake_gpu.py``). A training step waits
once, where ``on_before_optimizer_step`` looks whether loss and gradients are finite, and where ``IN_TRAINING`` says;
Lightning's metrics cost one more each time they are written. A call of ``sample`` waits where ``IN_SAMPLING`` says, its
steps nowhere.

What cannot be rehearsed: numbers (bits, TF32, bf16 by cuBLAS), memory, kernels and their limits, cuDNN's LSTMs, streams
and the recording of CUDA graphs (a step that would be recorded is run, and may not wait), torch.compile, pinned memory,
several GPUs, gradient scalers; waits and mixed devices inside of C++ that no operation shows; a leaf on the CPU whose
gradient comes from the GPU.
"""

import copy
import re
import warnings
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from fake_gpu import CPU, GPU, FakeGPU
from pytorch_lightning.accelerators import CPUAccelerator
from pytorch_lightning.strategies import SingleDeviceStrategy
from tiny import (
    TINY_PRIORS,
    TINY_TOKENIZERS,
    TOLD_PRIORS,
    random_clip,
    random_conditions,
    random_frames,
    told_prior,
)
from torch import nn
from torch.utils.data import DataLoader

from latentcast.tokenizers.base import trusted
from latentcast.tokenizers.quantizers.ema_codebook import EMACodebook
from latentcast.training.callbacks import StepSeed, WeightAverage, _Average
from latentcast.training.prior_module import PriorModule

# How often a model waits in a training step ("down": a value travels to the host, "up": a copy that is waited for).
IN_TRAINING = {
    "sde_diffusion": {"down": 1},  # whether the solution exploded
    "ode_diffusion_latents": {"down": 1},
    "latent_sde_diffusion": {"down": 1},
}
# How often a call of sample waits. Codes and pixels are checked: once.
IN_SAMPLING = {
    "recurrent_vae_latents": {},
    "recurrent_vae_vectors": {},
    "residual_diffusion_latents": {},
    "flow_transformer_latents": {},
    "latent_sde_diffusion": {"down": 2},
    "sde_diffusion": {"down": 2},  # the second: whether the solution exploded
}


@pytest.fixture
def gpu():
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of an LSTM without cuDNN
        with FakeGPU() as gpu:
            yield gpu


class Forgotten(nn.Module):
    """A tensor that is no buffer stays behind when the module moves."""

    def __init__(self):
        super().__init__()
        self.scale, self.linear = torch.ones(4), nn.Linear(4, 4)

    def forward(self, x):
        return self.linear(x) * self.scale


def test_a_tensor_left_on_the_cpu_is_found(gpu):
    model = Forgotten()
    assert model(torch.ones(2, 4)).device == CPU
    with pytest.raises(RuntimeError, match="found at least two devices"):
        model.cuda()(torch.ones(2, 4).cuda())
    model.scale = model.scale.cuda()
    loss = model(torch.ones(2, 4).cuda()).square().mean()
    loss.backward()
    assert {loss.device, model.linear.weight.device, model.linear.weight.grad.device} == {GPU}


@pytest.mark.parametrize(
    "function",
    [
        lambda x: torch.cat([x, torch.zeros(4)]),
        lambda x: x @ torch.zeros(4),
        lambda x: torch.zeros(4)[x.long()],
        lambda x: nn.functional.embedding(x.long(), torch.zeros(9, 2)),
        lambda x: torch.where(x > 0, x, torch.zeros(4)),
        lambda x: torch.randn(4, device=x.device, generator=torch.Generator()),
    ],
)
def test_mixed_devices_are_refused(gpu, function):
    function(torch.arange(4.0))
    with pytest.raises(RuntimeError):
        function(torch.arange(4.0, device="cuda"))


@pytest.mark.parametrize(
    "function, waits",
    [
        (lambda x: x.sum().item(), {"down": 1}),
        (lambda x: 1 if x.sum() > 0 else 2, {"down": 1}),
        (lambda x: int(x[0]), {"down": 1}),
        (lambda x: x.tolist(), {"down": 1}),
        (lambda x: x.cpu(), {"down": 1}),
        (lambda x: x.to("cpu"), {"down": 1}),
        (lambda x: x.nonzero(), {"down": 1}),
        (lambda x: x[x > 1], {"down": 1}),
        (lambda x: x.unique(), {"down": 1}),
        (lambda x: torch.bincount(x.long()), {"down": 2}),
        (lambda x: torch.zeros(4).copy_(x), {"down": 1}),
        (lambda x: torch.tensor([1.0], device=x.device), {"up": 1}),
        (lambda x: torch.as_tensor([1.0], device=x.device), {"up": 1}),
        (lambda x: torch.ones(4).to(x), {"up": 1}),
        (lambda x: x[torch.tensor([1])], {"up": 1}),
        (lambda x: torch.ones(4).to(x.device, non_blocking=True), {}),
        (lambda x: x * 2 + torch.zeros_like(x) + torch.tensor(3.0), {}),
        (lambda x: torch.where(x > 1, x, 0)[torch.arange(2, device=x.device)], {}),
        (lambda x: x.masked_fill(x > 1, 0).to(torch.bfloat16), {}),
    ],
)
def test_waits_are_counted(gpu, function, waits):
    function(torch.arange(4.0))
    assert not gpu.waits
    x = torch.arange(4.0, device="cuda")
    gpu.reset()
    function(x)
    assert gpu.waits == waits and all("test_gpu_rehearsal.py" in line for line in gpu.where)


def test_a_graph_cannot_hold_a_wait(gpu):
    from latentcast.priors.sampling import record_graph

    x = torch.zeros(1, device="cuda")
    record_graph(lambda: x.add_(1), GPU).replay()
    assert x.cpu() == 3  # twice to record it
    with pytest.raises(RuntimeError, match="capturing"):
        record_graph(lambda: x.item(), GPU)


def test_nothing_is_left_of_it():
    before = torch.Tensor.device, torch.Tensor.to, torch.tensor, torch.Generator, torch.autocast
    with FakeGPU():
        assert torch.zeros(1, device="cuda").is_cuda and torch.zeros(1).device == CPU
    assert before == (torch.Tensor.device, torch.Tensor.to, torch.tensor, torch.Generator, torch.autocast)
    assert not torch.zeros(1).is_cuda


def train(model, compute, n_steps=3, precision=None):
    """Some training steps with what the trainer does around them -> the last one's waits."""
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameters) if parameters else None
    average = _Average(model.train(), 0.99, None)
    for _ in range(n_steps):
        yield
        with torch.autocast("cuda", torch.bfloat16, enabled=precision == "bf16"), trusted():
            loss = compute().loss
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        if optimizer:
            optimizer.step()
            optimizer.zero_grad()
        average.update_parameters(model)
    assert {parameter.device for parameter in [*parameters, *average.module.parameters()]} <= {GPU}


@pytest.mark.parametrize("name", TINY_TOKENIZERS)
def test_tokenizers(gpu, name):
    model = TINY_TOKENIZERS[name]().cuda()
    frames = random_frames(model, batch=4).cuda()
    for _ in train(model, lambda: model(frames), precision="bf16"):
        gpu.reset()
    assert not gpu.waits, gpu.where

    model.eval()
    gpu.reset()
    with torch.no_grad(), trusted():
        encoded = model.encode(frames)
        decoded = [model.decode(encoded.latents)]
        if encoded.codes is not None:
            decoded.append(model.decode(model.codes_to_latents(model.latents_to_codes(encoded.latents))))
    assert not gpu.waits, gpu.where
    assert {tensor.device for tensor in (encoded.latents, *decoded)} == {GPU}
    model.encode_chunked(frames), model.encode_chunked(frames.cpu()), model.decode_chunked(encoded.latents)


def test_parents_are_gone_through_on_a_gpu_as_on_a_cpu(gpu):
    """All of them, without a wait to know which a batch visits; one that is new is placed by the next batch."""
    here = EMACodebook(4, 3, n_parents=5, dead_code_threshold=0.9, decay=0.5)
    there = copy.deepcopy(here).cuda()
    revived = 0
    for step in range(7):
        vectors, parents = torch.randn(60, 3), torch.randint(5 if step > 3 else 4, (60,))
        for book in (here, there):
            torch.manual_seed(step)
            x, p = (tensor.to(book.codebook.device) for tensor in (vectors, parents))
            gpu.reset()
            placed = book.initialize(x, p)
            new = book.update(x, book.nearest(x, p), p)
            assert not gpu.waits, gpu.where
            revived += new.cpu().sum()
        assert here.initialized.tolist() == [True] * 4 + [step > 3]
        assert there.initialized.cpu().tolist() == [True] * 4 + [step > 4]
        assert placed.cpu().tolist() == [step == 0] * 16 + [step == 5] * 4
        if step < 4:  # then the two draw at different times
            assert all(torch.equal(tensor, there.get_buffer(name).cpu()) for name, tensor in here.named_buffers())
    assert revived > 10


@pytest.mark.parametrize("name", TINY_PRIORS)
def test_priors(gpu, name):
    model = TINY_PRIORS[name]().cuda()
    clip = random_clip(model).cuda()
    for _ in train(model, lambda: model(clip, 2), 2, "bf16"):
        gpu.reset()
    assert gpu.waits == IN_TRAINING.get(name, {}), gpu.where

    model.eval()
    few = {"n_steps": 2} if "n_steps" in model.sampler_options() else {}
    found = []
    for n_frames in (1, 2):
        gpu.reset()
        future = model.sample(clip[:1, :2], n_frames, num_samples=2, **few)
        found.append(dict(gpu.waits))
    assert future.device == GPU and found == [IN_SAMPLING.get(name, {"down": 1})] * 2, (
        gpu.where
    )  # none that grows with the frames
    for device in ("cpu", "cuda"):
        model.sample(clip[:1, :2], 1, generator=torch.Generator(device).manual_seed(0), **few)
    with torch.no_grad():
        model(clip, 2)
        if getattr(model, "predict_mean", None):
            model.predict_mean(clip[:, :2], 1)


@pytest.mark.parametrize("name", TOLD_PRIORS)
def test_told_priors(gpu, name):
    """What a prior is told travels with the batch in training, and to the device without a wait in sampling."""
    model = told_prior(name).cuda()
    clip, told = random_clip(model).cuda(), random_conditions()
    there = {name: value.cuda() for name, value in told.items()}
    for _ in train(model, lambda: model(clip, 2, there), 2, "bf16"):
        gpu.reset()
    assert gpu.waits == IN_TRAINING.get(name, {}), gpu.where

    model.eval()
    few = {"n_steps": 2} if "n_steps" in model.sampler_options() else {}
    guided = {"guidance_scale": 2.0} if "guidance_scale" in model.sampler_options() else {}
    gpu.reset()
    future = model.sample(clip[:, :2], 2, num_samples=2, conditions=told, **few, **guided)
    assert future.device == GPU and gpu.waits == IN_SAMPLING.get(name, {"down": 1}), gpu.where
    with torch.no_grad():
        if getattr(model, "predict_mean", None):
            model.predict_mean(clip[:, :2], 2, conditions=told)


class FakeAccelerator(CPUAccelerator):
    def setup_device(self, device):
        """Any will do."""


class Watch(pl.Callback):
    """The waits of each step, from the batch's way to the device to the end of the step."""

    def __init__(self, gpu):
        self.gpu, self.steps = gpu, []

    def on_train_batch_end(self, trainer, *_):
        self.steps.append((dict(self.gpu.waits), list(self.gpu.where), trainer.lightning_module.device))
        self.gpu.reset()


@pytest.mark.parametrize("name", ["video_transformer", "recurrent_vae", "residual_diffusion"])
def test_a_training_step_waits_once(gpu, tmp_path, name):
    """In Lightning's loop: for loss and gradient norm, which stop a run that is not finite before it takes the step."""
    model = TINY_PRIORS[name]()
    kind = "frames" if model.accepts == "pixels" else model.accepts
    clips = [{kind: clip.byte() if kind == "codes" else clip} for clip in random_clip(model, batch=8)]
    module = PriorModule(model, lambda parameters: torch.optim.AdamW(parameters, lr=1e-3), n_context=2)
    watch = Watch(gpu)
    trainer = pl.Trainer(
        strategy=SingleDeviceStrategy(GPU, FakeAccelerator()),
        max_steps=4,
        callbacks=[StepSeed(0), WeightAverage(0.9), watch],
        log_every_n_steps=100,
        default_root_dir=tmp_path,
        **dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False),
    )
    trainer.fit(module, DataLoader(clips, 2))
    assert len(watch.steps) == 4
    for waits, where, device in watch.steps[1:-1]:
        assert device == GPU and waits == {"down": 1} and "one wait for the device" in where[0], where


def test_one_marker_says_what_needs_a_gpu():
    tests = Path(__file__).parent.glob("test_*.py")
    others = [path.name for path in tests if re.search(r"mark\.skipif\([^)]*torch\.cuda", path.read_text())]
    assert others == []
