"""Kill every tool at random moments, go on, and compare what it leaves with what an undisturbed run left.

    python tests/stress/kill_storm.py --kills 100 --seed 0
    python tests/stress/kill_storm.py --full-disk

Both stages, from a folder of videos to an evaluation, at tiny size: prepare_dataset, train_tokenizer, encode_dataset,
train_prior, the two jointly, evaluate, sample. Kills are SIGKILL to the whole process group. With ``--full-disk`` no
file may grow beyond a size that falls from call to call (RLIMIT_FSIZE), as on a disk that fills up: a call that fails
has to end with status 1 and one line. Not part of ``make test``; the figures are in docs/reliability.md.
"""

import argparse
import contextlib
import csv
import hashlib
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["WANDB_MODE"] = "disabled"

import yaml  # noqa: E402
from tiny_experiment import EXPERIMENT, TOOLS, Started  # noqa: E402
from video_files import counter_frames, encode  # noqa: E402

N_VIDEOS, N_FRAMES = 24, 12
STORM = EXPERIMENT | {
    "defaults": EXPERIMENT["defaults"] | {"data": "folder", "protocol": "video_folder"},
    "channels": 3,
    "checkpoint_every_n_steps": 2,
    "resume": True,
    "data": {"actions": False},
    "prior": {"_target_": "latentcast.STPixelCNN", "dim": 8, "n_blocks": 1, "block_layers": 1, "attention": "none"},
    "trainer": EXPERIMENT["trainer"] | {"max_steps": 16, "val_check_interval": 3, "check_val_every_n_epoch": None},
    "cache": {"shard_videos": 2},
    "protocol": {"n_clips": 2, "n_predicted": 3, "n_samples": 2, "metrics": ["psnr", "ssim"]},
    "evaluation": {"baselines": ["copy_last_frame"], "futures": 2},
    "preview": EXPERIMENT["preview"] | {"every_n_steps": 5, "figures": []},
    "train_jointly": {"trainer": {"max_steps": 8}},
}
# What says how long something took and by which commit, in tables and in JSON.
TIMED = ("throughput/", "seconds", "frames_per_s", "commit")
SKIPPED = (".ckpt", ".log", ".lock")  # checkpoints hold the time of each epoch; their weights are saved beside them


def stages(folder):
    """What is typed, one after the other: name, tool, arguments."""
    experiment = folder / "storm.yaml"
    given = [experiment, f"data.root={folder / 'set'}"]
    prepare = ["folder", "--source", folder / "videos", "--output", folder / "set", "--workers", "0", "frame_size=16"]
    sample = ["--pipeline", folder / "run/pipeline", "--input", folder / "videos/video_00.mp4", "--n-frames", "3"]
    return [
        ("prepare", "prepare_dataset", prepare),
        ("tokenizer", "train_tokenizer", given),
        ("encode", "encode_dataset", given),
        ("prior", "train_prior", given),
        ("joint", "train_prior", [*given, "joint=true"]),
        ("evaluate", "evaluate", given),
        ("sample", "sample", [*sample, "--output", folder / "futures", "--seed", "0", "--device", "cpu"]),
    ]


def lay_out(folder):
    """Videos and the experiment, in a folder that has one name while it is worked in, for names are in what is kept."""
    (folder / "videos").mkdir(parents=True)
    for n in range(N_VIDEOS):
        encode(folder / f"videos/video_{n:02}.mp4", counter_frames(N_FRAMES, first=8 * n, height=24, width=32))
    (folder / "storm.yaml").write_text(yaml.safe_dump(STORM | {"run_dir": str(folder / "run")}))


def content_of(path):
    """Bytes of a file, without what tells the time."""
    if path.suffix == ".csv":
        with open(path, newline="") as file:
            return repr([row for row in csv.reader(file) if not any(map("".join(row).count, TIMED))]).encode()
    if path.suffix == ".json":
        return json.dumps(untimed(json.loads(path.read_text())), sort_keys=True).encode()
    return path.read_bytes()


def untimed(value):
    if isinstance(value, dict):
        return {name: untimed(inner) for name, inner in value.items() if not any(map(name.count, TIMED))}
    return [untimed(inner) for inner in value] if isinstance(value, list) else value


def digests(folder):
    """Relative path -> digest of what the stages left, the previews' pictures and reports included."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_file() and not name.startswith("videos") and not name.endswith(SKIPPED):
            found[name] = hashlib.sha256(content_of(path)).hexdigest()
    return found


def start(tool, arguments, folder):
    return Started(TOOLS / f"{tool}.py", *arguments, cwd=folder)


def run_to_the_end(stage, folder):
    """-> seconds that it took."""
    name, tool, arguments = stage
    began, process = time.monotonic(), start(tool, arguments, folder)
    _, err = process.communicate(timeout=600)
    if process.returncode:
        raise SystemExit(f"{name}: status {process.returncode}\n{err}")
    return time.monotonic() - began


def kill_at_random(stage, folder, longest, rng):
    """Start a stage and kill its group after up to ``longest`` seconds -> whether it was still running."""
    name, tool, arguments = stage
    process, ends = start(tool, arguments, folder), time.monotonic() + rng.uniform(0, longest)
    while process.poll() is None and time.monotonic() < ends:
        time.sleep(0.005)
    was_running = process.poll() is None
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    _, err = process.communicate(timeout=60)
    if not was_running and process.returncode:
        raise SystemExit(f"{name}: status {process.returncode} after a kill\n{err}")
    return was_running


def fill_the_disk(stage, folder, size):
    """Run a stage with no file larger than ``size`` bytes -> (status, last line of its errors)."""
    _, tool, arguments = stage
    process = start(tool, arguments, folder)
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (size, size))
    _, err = process.communicate(timeout=600)
    lines = err.strip().splitlines()
    return process.returncode, lines[-1] if lines else ""


def compare(expected, found, where):
    """Name the differences -> how many there are."""
    different = {name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name)}
    for name in sorted(different):
        what = "missing" if name not in found else "left over" if name not in expected else "different"
        print(f"{where}: {name}: {what}", flush=True)
    return len(different)


def main(args):
    rng, home = random.Random(args.seed), Path(tempfile.mkdtemp(prefix="kill_storm_"))
    work = home / "work"  # one name for all rounds
    lay_out(work)
    clean = home / "clean"
    shutil.copytree(work, clean)
    seconds = [run_to_the_end(stage, work) for stage in stages(work)]
    expected = digests(work)
    print(f"undisturbed: {len(expected)} files, {sum(seconds):.0f} s", flush=True)
    counts, n_rounds, n_different = dict.fromkeys((name for name, *_ in stages(work)), 0), 0, 0
    while sum(counts.values()) < (1 if args.full_disk else args.kills):
        work.rename(home / f"round_{n_rounds}")  # the undisturbed one is 0
        shutil.copytree(clean, work)
        for stage, longest in zip(stages(work), seconds):
            if args.full_disk:
                counts[stage[0]] += storm_of_limits(stage, work)
            else:
                for _ in range(args.kills_a_stage):
                    if not kill_at_random(stage, work, longest, rng):
                        break
                    counts[stage[0]] += 1
            run_to_the_end(stage, work)
        n_rounds += 1
        n_different += compare(expected, digests(work), f"round {n_rounds}")
        print(f"round {n_rounds}: {sum(counts.values())} so far", flush=True)
    what = "full disks" if args.full_disk else "kills"
    figures = {what.replace(" ", "_"): sum(counts.values()), "by_stage": counts, "rounds": n_rounds}
    print(json.dumps(figures | {"files_a_round": len(expected), "files_that_differ": n_different}))
    if n_different:
        raise SystemExit(f"{n_different} files differ; what is left lies in {home}")
    shutil.rmtree(home)


def storm_of_limits(stage, folder):
    """Let a stage run into limits of a falling size -> how many calls failed, each as it should."""
    failed = 0
    for size in (20_000, 5_000, 1_000):
        status, line = fill_the_disk(stage, folder, size)
        if status:
            if status != 1 or not line.startswith("error: ") or "too large" not in line.lower():
                raise SystemExit(f"{stage[0]} with files of up to {size} bytes: status {status}, {line}")
            failed += 1
    return failed


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=100, help="in all")
    parser.add_argument("--kills-a-stage", type=int, default=3, help="in each round")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--full-disk", action="store_true", help="limits of file sizes in the place of kills")
    main(parser.parse_args())
