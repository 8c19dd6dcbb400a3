"""The training step of each model at its paper's size: plain against tuned, and what everything around the model costs.

    python benchmarks/training.py [--only lvt,vqvae,...]

Both sides run the tools' own loop (checks, logging, clipping, the moving average) over made-up clips in small batches,
in a process of their own, twice in turns. Plain is fp32 without a compiler. Tuned is ``trainer.precision=auto``:
bfloat16 where the hardware computes in it, and on a GPU ``compile=true``; without either the two sides are the same.

``loaders`` measures what feeds them: windows a second from a latents cache, by number of loader processes.
"""

import functools
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import counted_flops, kilobytes, matmul_rate, run_parts, say, seconds, synchronize  # isort: skip  (thread policy)

import pytorch_lightning as pl
import torch
from torch.utils.data import default_collate

from latentcast import LatentCacheWriter, PriorModule, TokenizerModule, VideoDataModule, instantiate, load_config
from latentcast.config import to_container
from latentcast.data.base import VideoDataset, VideoEntry
from latentcast.data.datamodules import LatentDataModule
from latentcast.sizes import sides
from latentcast.training.run import TrainingRun

# name -> stage, experiment of the paper's size and overrides, clips a batch on a CPU and on a GPU. Clips have the
# experiment's own length.
MODELS = {
    "lvt": ("prior", "lvt_bair", 2, 32),
    "vqvae": ("tokenizer", "lvt_bair", 16, 512),
    "svg_lp": ("prior", "svg_lp_mnist2", 4, 100),
    "hafsvg": ("prior", "hafsvg_moving_mnist2", 4, 100),
    "stdiff": ("prior", "stdiff_smmnist", 1, 10),
    "rvd": ("prior", "rvd_kth", 1, 8),
    "st_pixelcnn": ("prior", "shrvqvae_moving_mnist", 1, 16),
    "flow": ("prior", "small/flow_transformer", 4, 64),
    "masked": ("prior", "small/st_pixelcnn prior=masked_transformer", 4, 64),
}
STEPS, WARM = 7, 2  # of which the first are left out
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SIDES = {
    "plain": ("trainer.precision=32-true",),
    "tuned": ("trainer.precision=auto", *(["compile=true"] if DEVICE == "cuda" else [])),
}


class MadeClips(VideoDataset):
    """Random clips in the space that a model accepts, as a data set with one split."""

    fps, videos = 10.0, ()

    def __init__(self, shape, sizes=(), n=64, split="train"):
        frames = torch.rand(n, *shape) * 2 - 1
        if sizes:
            frames = torch.stack([torch.randint(size, (n, *shape)) for size in sizes], -1)
        self.name, self.clips = "codes" if sizes else "frames", frames
        self.videos = [VideoEntry(f"made_{i}", shape[0], self.fps) for i in range(n)]

    def describe(self):
        return {}

    def __len__(self):
        return len(self.clips)

    def __getitem__(self, index):
        return {self.name: self.clips[index]}


class Clock(pl.Callback):
    """When each step began, and how long training had waited for data by then."""

    def __init__(self):
        self.began = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        synchronize(pl_module.device)
        self.began.append((time.perf_counter(), trainer.train_dataloader.waited))


def measure(name, side):
    """One side of a model -> figures, JSON-able."""
    stage, what, on_cpu, on_gpu = MODELS[name]
    experiment, *own = what.split()
    batch_size = on_cpu if DEVICE == "cpu" else on_gpu
    with tempfile.TemporaryDirectory() as folder:
        overrides = (
            f"run_dir={folder}",
            "wandb.mode=disabled",
            "lr_scheduler=null",  # whose warm-up may be longer than this
            "trainer.max_epochs=null",
            f"trainer.max_steps={STEPS}",
        )
        shown = ("trainer.enable_progress_bar=false", "trainer.limit_val_batches=0", "num_workers=0")
        config = load_config(
            experiment, [*own, *overrides, *shown, f"batch_size={batch_size}", *SIDES[side]], tool=f"train_{stage}"
        )
        tokenizer = instantiate(config.tokenizer)
        arguments = (instantiate(config.optimizer), to_container(config.lr_scheduler))
        frames = (config.clip_length, config.channels, *sides(config.frame_size))
        if stage == "tokenizer":
            module, clips = TokenizerModule(tokenizer, *arguments), (frames, ())
        else:
            spec = tokenizer.latent_spec
            prior = instantiate(config.prior, latent_spec=spec)
            module = PriorModule(prior, *arguments, config.n_context, tokenizer)
            codes = (config.clip_length, spec["height"], spec["width"]), spec["codebook_sizes"]
            clips = codes if prior.accepts == "codes" else (frames, ())
        data = VideoDataModule(functools.partial(MadeClips, *clips, n=STEPS * batch_size), batch_size)
        data._sets["val"] = None
        clock = Clock()
        with TrainingRun.open(config, stage) as run:
            run.fit(module, data, [clock])
            precision = module.trainer.precision
        began = clock.began[WARM:]
        whole = statistics.median(b[0] - a[0] for a, b in itertools.pairwise(began))
        waited = statistics.median(b[1] - a[1] for a, b in itertools.pairwise(began))
        batch = {
            key: value.to(DEVICE)
            for key, value in default_collate([data.train_set[i] for i in range(batch_size)]).items()
        }
        alone, flops = model_alone(module.to(DEVICE), batch, "bf16" in precision)
    peak = torch.cuda.max_memory_allocated() / 2**20 if DEVICE == "cuda" else kilobytes("VmHWM") / 2**10
    return {
        "precision": precision,
        "batch": batch_size,
        "parameters": sum(parameter.numel() for parameter in module.model.parameters()),
        "step_s": whole,
        "clips_per_s": batch_size / whole,
        "model_s": alone,
        "wait_s": waited,
        "peak_mib": peak,
        "gflop": flops / 1e9,
    }


def model_alone(module, batch, bf16):
    """Forward, backward and optimizer step with nothing around -> (median seconds, operations of one)."""
    module.train()
    optimizer = module.optimizer(list(module.model.parameters()))

    def step():
        optimizer.zero_grad()
        with torch.autocast(DEVICE, torch.bfloat16, enabled=bf16):
            loss = module.compute(batch).loss
        loss.backward()
        optimizer.step()

    for _ in range(WARM):
        step()
    took = [seconds(step, DEVICE) for _ in range(STEPS - WARM)]
    return statistics.median(took), counted_flops(step)


@functools.cache
def best_rate(bf16):
    """GFLOP/s of a large matrix product."""
    return matmul_rate(8192 if DEVICE == "cuda" else 2048, torch.bfloat16 if bf16 else torch.float32, DEVICE) / 1e9


def compare_sides(name):
    found = {side: [] for side in SIDES}
    for _ in range(2):
        for side in SIDES:
            done = subprocess.run(
                [sys.executable, __file__, "--measure", name, side], stdout=subprocess.PIPE, check=True
            )
            found[side].append(json.loads(done.stdout.splitlines()[-1]))
    best = {side: min(runs, key=lambda run: run["step_s"]) for side, runs in found.items()}
    stage, experiment, *_ = MODELS[name]
    first = best["plain"]
    say(f"{name}: {stage} of {experiment}, {first['parameters'] / 1e6:.1f}M parameters, {first['batch']} clips a step")
    for side, run in best.items():
        rate = run["gflop"] / run["model_s"]
        share = rate / best_rate("bf16" in run["precision"])
        around, wait = 1 - run["model_s"] / run["step_s"], run["wait_s"] / run["step_s"]
        say(
            f"  {side:5} {run['precision']:10} {run['step_s']:.3f} s a step, {run['clips_per_s']:.2f} clips/s, "
            f"{run['peak_mib']:.0f} MiB; around the model {around:.1%}, of which waiting for data {wait:.1%}; "
            f"{rate:.0f} GFLOP/s, {share:.0%} of a matrix product's"
        )
    return {f"{name}_step": first["step_s"] / best["tuned"]["step_s"]}


def loaders():
    """Windows of 16 frames of 16 x 16 x 4 codes from a cache -> ``loader_windows_2_vs_0``: of 2 processes over none."""
    sizes, length, n_frames = [512] * 4, 16, 512
    spec = instantiate(load_config("lvt_bair").tokenizer).latent_spec
    rates = {}
    with tempfile.TemporaryDirectory() as folder:
        videos = [VideoEntry(f"v{i}", n_frames, 10.0) for i in range(64)]  # one shard
        writer = LatentCacheWriter(Path(folder) / "train", spec, "f" * 64, videos=videos, data={}, fps=10.0)
        with writer.open_shard(0) as shard:
            for i in range(len(videos)):
                shard.append(i, torch.stack([torch.randint(size, (n_frames, 16, 16)) for size in sizes], -1))
        writer.finish()
        for workers in (0, 1, 2):
            data = LatentDataModule(folder, length, 64, num_workers=workers)
            loader, n, began = data.train_dataloader(), 0, None
            while began is None or time.perf_counter() - began < 5:
                for batch in loader:
                    n, began = (n + len(batch["codes"]), began) if began else (0, time.perf_counter())
            rates[workers] = n / (time.perf_counter() - began)
    counts = ", ".join(f"{workers} processes {rate:.0f}" for workers, rate in rates.items())
    say(f"loaders: windows/s of 16 frames of 16 x 16 x 4 codes: {counts}")
    return {"loader_windows_2_vs_0": rates[2] / rates[0]}


PARTS = {name: functools.partial(compare_sides, name) for name in MODELS} | {"loaders": loaders}

if __name__ == "__main__":
    if sys.argv[1:2] == ["--measure"]:
        print(json.dumps(measure(*sys.argv[2:])))
    else:
        run_parts(__doc__.splitlines()[0], PARTS)
