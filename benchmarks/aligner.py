"""Peak memory of HAF-SVG's feature aligner against the same formula with its N x N matrix written out.

    python benchmarks/aligner.py

At 64 x 64 features of 64 channels, the finest level of VGG-64, forwards and backwards: N = 4096.
"""

from common import kilobytes, run_parts, say, seconds  # isort: skip  (sets the thread policy before torch loads)

import multiprocessing
from concurrent.futures import ProcessPoolExecutor

import torch

from latentcast.layers.aligner import FeatureAligner, to_positions

DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
CHANNELS, SIDE, N_FRAMES = 64, 64, 4


class NaiveAligner(FeatureAligner):
    """Section 4.3 as it is written: similarities of all pairs of positions, their softmax, weighted sums."""

    def aligned(self, decoded, memory):
        positions = to_positions(decoded)
        attention = (self.to_query(positions) @ memory.key.transpose(1, 2)).softmax(-1)
        return [(attention @ self.to_value(positions)).transpose(1, 2).unflatten(2, decoded.shape[2:])]


ALIGNERS = {"aligner": FeatureAligner, "naive": NaiveAligner}


def aligner():
    """Ratios of aligner over naive: memory, and the time of the same work."""
    ratios = {}
    for device in DEVICES:
        memory = {name: peak_megabytes(name, device) for name in ALIGNERS}
        time = {name: aligner_seconds(name, device) for name in ALIGNERS}
        say(
            f"  {N_FRAMES} frames, {device}: aligner {memory['aligner']:.0f} MB, {time['aligner'] * 1e3:.0f} ms; "
            f"naive {memory['naive']:.0f} MB, {time['naive'] * 1e3:.0f} ms"
        )
        suffix = "_gpu" * (device == "cuda")
        ratios[f"aligner_memory_vs_naive{suffix}"] = memory["aligner"] / memory["naive"]
        ratios[f"aligner_time_vs_naive{suffix}"] = time["aligner"] / time["naive"]
    return ratios


def work(name, side, device):
    """A function that aligns some frames forwards and backwards."""
    layer = ALIGNERS[name](CHANNELS).to(device)
    decoded, encoded = torch.randn(2, N_FRAMES, CHANNELS, side, side, device=device)
    decoded.requires_grad_()

    def run():
        layer(decoded, layer.memory(encoded)).square().mean().backward()

    return run


def aligner_seconds(name, device):
    run = work(name, SIDE, device)
    run()
    return seconds(run, device, repeat=3)


def peak_megabytes(name, device):
    """MB by which memory grows; on the CPU of a fresh process, where nothing used before is used again."""
    if device == "cpu":
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            return pool.submit(resident_megabytes, name).result()
    run = work(name, SIDE, device)
    run()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    return (torch.cuda.max_memory_allocated() - before) / 1e6


def resident_megabytes(name):
    """MB that the process grows by at most, beside what loading the libraries' kernels takes."""
    work(name, 2, "cpu")()
    run = work(name, SIDE, "cpu")
    before = kilobytes("VmRSS")
    run()
    return (kilobytes("VmHWM") - before) / 1e3


if __name__ == "__main__":
    run_parts(__doc__.splitlines()[0], {"aligner": aligner})
