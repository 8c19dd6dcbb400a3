"""Peak memory and local disk of a training, on a set behind a URL and on one of ten times its size.

    python tests/stress/large_data.py --megabytes 150 --times 10 --steps 400

Both sets are noise, in shards of about 10 MB on a ``file://`` store. A tokenizer's training reads them with two
processes, and with room for fewer copies than the smaller set takes. Every fifth of a second the resident memory of the
training and its processes is read, and what the copies take. Prints a line a set; status 1 where memory grew by a
tenth, or the copies took more than their bound. Not part of ``make test``; the figures are in docs/reliability.md.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import yaml

sys.path.insert(0, str(Path(__file__).parents[1]))

from tiny_experiment import EXPERIMENT, TOOLS

from latentcast.data.base import Clip
from latentcast.data.sets.base import Benchmark
from latentcast.data.store.prepared import prepare
from latentcast.urls import folder_at

SIZE, N_FRAMES, SHARD_VIDEOS = 64, 100, 8
GIGABYTES = 0.12  # of local copies: a dozen shards


class Noise(Benchmark):
    """``n`` videos of 1.2 MB."""

    name, needs_source, frame_size, shard_videos = "noise", False, SIZE, SHARD_VIDEOS

    def __init__(self, n):
        super().__init__()
        self.n = n

    def videos(self):
        return {"train": [f"video-{i:06d}" for i in range(self.n)]}

    def describe(self):
        return {"protocol": "standard"}

    def read(self, split, name):
        seed = torch.Generator().manual_seed(int(name[-6:]))
        return Clip([torch.randint(256, (N_FRAMES, 3, SIZE, SIZE), generator=seed, dtype=torch.uint8)])


def resident(pid):
    """kB of a process and of all that it started, pages that they share counted once -> (that, the largest one's)."""
    sums, largest = 0, 0
    for process in [pid, *descendants(pid)]:
        try:
            lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()[1:]
            fields = dict(line.split()[:2] for line in lines)
            sums, largest = sums + int(fields["Pss:"]), max(largest, int(fields["Rss:"]))
        except (OSError, ValueError):  # it has ended meanwhile
            continue
    return sums, largest


def descendants(pid):
    found = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            for child in task.read_text().split():
                found += [int(child), *descendants(int(child))]
        except OSError:
            continue
    return found


def train(store, folder, steps):
    """-> (largest sum of memory, largest memory of one process in MB, most MB of copies)"""
    own = {"hidden_channels": 32, "residual_channels": 16, "n_residual_blocks": 1, "embedding_dim": 8}
    experiment = EXPERIMENT | {
        "defaults": {"tokenizer": "vqvae", "data": "folder", "trainer": "default"},
        "run_dir": str(folder / "run"),
        "frame_size": SIZE,
        "channels": 3,
        "num_workers": 2,
        "cache_dir": str(folder / "copies"),
        "cache_gigabytes": GIGABYTES,
        "shuffle_buffer": 500,
        "data": {"root": f"file://{store}", "name": "noise"},
        "tokenizer": own | {"codebook_size": 16, "stride": 8},
        "trainer": EXPERIMENT["trainer"] | {"max_steps": steps, "log_every_n_steps": 50},
    }
    path = folder / "large.yaml"
    path.write_text(yaml.safe_dump(experiment))
    command = [sys.executable, TOOLS / "train_tokenizer.py", path, "logger=none"]
    with open(folder / "log", "w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=os.environ | {"OMP_NUM_THREADS": "1"})
    peaks = [0, 0, 0]
    while process.poll() is None:
        copies = sum(size(path) for path in (folder / "copies").glob("*.safetensors"))
        peaks = [max(pair) for pair in zip(peaks, (*resident(process.pid), copies))]
        time.sleep(0.2)
    if process.returncode:
        raise SystemExit((folder / "log").read_text())
    return peaks[0] / 1024, peaks[1] / 1024, peaks[2] / 1e6


def size(path):
    try:
        return path.stat().st_size
    except OSError:
        return 0


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--megabytes", type=int, default=150, help="of the smaller set")
    parser.add_argument("--times", type=int, default=10, help="how much larger the other one is")
    parser.add_argument("--steps", type=int, default=400)
    args = parser.parse_args()
    found = []
    for times in (1, args.times):
        with tempfile.TemporaryDirectory() as folder:
            folder = Path(folder)
            n_videos = round(args.megabytes * times * 1e6 / (N_FRAMES * 3 * SIZE * SIZE))
            figures = prepare(Noise(n_videos), folder_at(f"file://{folder}/store", folder / "copies"), partial=True)
            found.append(train(folder / "store", folder, args.steps))
            print(
                f"{figures['bytes'] / 1e6:.0f} MB in {-(-n_videos // SHARD_VIDEOS)} shards: at most "
                "{:.0f} MB of memory in all, {:.0f} MB in one process, {:.0f} MB of copies".format(*found[-1]),
                flush=True,
            )
    growth = [after / before - 1 for before, after in zip(*found)][:2]
    print("memory grew by {:.1%} in all, by {:.1%} in one process".format(*growth))
    return max(growth) >= 0.1 or max(copies for *_, copies in found) > GIGABYTES * 1000


if __name__ == "__main__":
    sys.exit(main())
