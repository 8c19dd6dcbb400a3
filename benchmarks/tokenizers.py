"""Speed and memory of stage one.

python benchmarks/tokenizers.py [--only tree]
"""

import sys

sys.path.append(sys.path.pop(0))  # this folder last: transformers imports HuggingFace's ``tokenizers``, not this file

from common import run_parts, say, seconds  # isort: skip  (sets the thread policy before torch loads)

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch

from latentcast.tokenizers.quantizers.code_tree import CodeTree
from latentcast.tokenizers.quantizers.ema_codebook import EMACodebook

DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
SEARCHES = {
    "tree": lambda n_layers: CodeTree(64, n_layers, 16),
    "flat": lambda n_layers: EMACodebook(16**n_layers, 64),
}


def tree():
    """HR-VQVAE's search down a tree of 16 codes a node against one codebook with as many codes as the tree has leaves.

    4096 positions (16 frames of 64 x 64) of 64 channels. Ratios are tree over flat, at 2^16 leaves and, with their
    number in the name, at fewer. Memory is that of the codes plus the peak of the search.
    """
    ratios = {}
    for device in DEVICES:
        for n_layers in (2, 3, 4):
            time = {name: search_seconds(name, n_layers, device) for name in SEARCHES}
            memory = {name: search_memory(name, n_layers, device) for name in SEARCHES}
            say(
                f"  {16**n_layers:5d} leaves, {device}: tree {time['tree'] * 1e3:.1f} ms, {memory['tree']:.0f} MB; "
                f"flat {time['flat'] * 1e3:.1f} ms, {memory['flat']:.0f} MB"
            )
            suffix = f"_{16**n_layers}" * (n_layers < 4) + "_gpu" * (device == "cuda")
            ratios[f"tree_vs_flat_time{suffix}"] = time["tree"] / time["flat"]
            ratios[f"tree_vs_flat_memory{suffix}"] = memory["tree"] / memory["flat"]
    return ratios


def search_seconds(name, n_layers, device):
    quantizer, vectors = SEARCHES[name](n_layers).to(device), torch.randn(4096, 64, device=device)
    quantizer.nearest(vectors)
    return seconds(lambda: quantizer.nearest(vectors), device, repeat=5)


def search_memory(name, n_layers, device):
    """MB; on the CPU of a fresh process, since memory that was used before is not given back reliably."""
    if device == "cpu":
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            return pool.submit(resident_memory, name, n_layers).result()
    vectors = torch.randn(4096, 64, device=device)
    before = torch.cuda.memory_allocated()
    quantizer = SEARCHES[name](n_layers).to(device)
    torch.cuda.reset_peak_memory_stats()
    quantizer.nearest(vectors)
    return (torch.cuda.max_memory_allocated() - before) / 1e6


def resident_memory(name, n_layers):
    """MB that the process grows by at most, besides what loading the libraries' kernels takes."""
    SEARCHES[name](2).nearest(torch.randn(16, 64))
    quantizer, vectors = SEARCHES[name](n_layers), torch.randn(4096, 64)
    codes = sum(module.codebook.nbytes for module in quantizer.modules() if isinstance(module, EMACodebook))
    before = kilobytes("VmRSS")
    quantizer.nearest(vectors)
    return codes / 1e6 + (kilobytes("VmHWM") - before) / 1e3


def kilobytes(field):
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1])


if __name__ == "__main__":
    run_parts(__doc__.splitlines()[0], {"tree": tree})
