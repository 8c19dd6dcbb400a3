"""What every benchmark shares: choosing parts, describing the machine, and the JSON line that ends stdout."""

import argparse
import json
import os
import platform
import sys
import time

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: see latentcast/cli.py

import torch


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
    print(json.dumps({"ratios": {k: round(v, 2) for k, v in ratios.items()}, "env": environment()}))


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


def synchronize(device):
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()
