"""What every benchmark shares: choosing parts, describing the machine, and the JSON line that ends stdout."""

import argparse
import json
import os
import platform
import sys
import time
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: see latentcast/cli.py

import torch
from torch.utils.flop_counter import FlopCounterMode

FOLDER = str(Path(__file__).parent)
if FOLDER in sys.path:  # last: transformers imports HuggingFace's ``tokenizers``, not the benchmark of that name
    sys.path.remove(FOLDER)
    sys.path.append(FOLDER)


def run_parts(description, parts):
    """Run the parts named by ``--only`` (all by default).

    Args:
        parts: name -> function() that prints its measurements to stderr and returns a dict ratio name -> number.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--only", help=f"comma-separated parts to run, of: {', '.join(parts)}")
    args = parser.parse_args()
    chosen = args.only.split(",") if args.only else list(parts)
    unknown = [name for name in chosen if name not in parts]
    if unknown:
        parser.error(f"unknown part {unknown[0]!r}; expected some of {', '.join(parts)}")
    ratios = {}
    for name in chosen:
        ratios |= parts[name]()
    print(json.dumps({"ratios": {k: float(f"{v:.3g}") for k, v in ratios.items()}, "env": environment()}))


def environment():
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def cpu_name():
    try:
        with open("/proc/cpuinfo") as info:
            return next(line.split(":")[1].strip() for line in info if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


def say(text):
    print(text, file=sys.stderr, flush=True)


def seconds(function, device="cpu", repeat=1):
    """Wall-clock seconds of one call, the mean of ``repeat`` calls; warming up is the caller's."""
    synchronize(device)
    start = time.perf_counter()
    for _ in range(repeat):
        function()
    synchronize(device)
    return (time.perf_counter() - start) / repeat


def compare(first, second, device="cpu", rounds=15):
    """-> (median of the rounds' ratio first / second, median seconds of each), after warming up.

    The two take turns, so that a machine that slows down slows both.
    """
    first(), second()
    pairs = torch.tensor([[seconds(function, device) for function in (first, second)] for _ in range(rounds)])
    ratio = (pairs[:, 0] / pairs[:, 1]).median().item()
    return ratio, *pairs.median(0).values.tolist()


def matmul_rate(size, dtype, device="cpu"):
    """Operations a second of a large matrix product, the limit of what a model's step can reach."""
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    a @ b
    return 2 * size**3 / min(seconds(lambda: a @ b, device, repeat=3) for _ in range(3))


def counted_flops(function):
    """Operations of one call that torch counts: convolutions and matrix products, not those inside LSTMs."""
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


def kilobytes(field):
    """A field of this process's memory, "VmRSS" (now) or "VmHWM" (peak), from Linux's /proc."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1])


def synchronize(device):
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()
