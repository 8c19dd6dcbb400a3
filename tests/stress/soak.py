"""Sample and load for long: memory stays where it was after the first tenth, and no file stays open.

    python tests/stress/soak.py
    python tests/stress/soak.py sample --clips 1000
    python tests/stress/soak.py cache videos --epochs 20

``sample``: tools/sample.py over a folder of so many videos, one process, with a tiny pipeline. ``cache`` and
``videos``: so many epochs of the training's loader with two workers, over a latents cache and over a folder of videos.
What is measured is the resident memory of the process and its workers: the median of what was seen between the first
tenth and the second, and that of the last tenth, which may be 2 % more. Not part of ``make test``; the figures are in
docs/reliability.md.
"""

import argparse
import functools
import json
import logging
import os
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
os.environ |= {"OMP_NUM_THREADS": "1", "WANDB_MODE": "disabled"}

import psutil  # noqa: E402
from test_pipeline import transformer  # noqa: E402
from tiny import tiny_tokenizer  # noqa: E402
from tiny_experiment import TOOLS, Started  # noqa: E402
from video_files import counter_frames, encode  # noqa: E402

GROWTH = 0.02  # of resident memory after the first tenth
N_VIDEOS, N_FRAMES, CLIP = 120, 16, 4
OPENED = 8  # descriptors by which a process may differ from moment to moment


class Record:
    """What was seen of processes: (share of the work that is done, resident bytes, open descriptors)."""

    def __init__(self, name):
        self.name, self.seen = name, []

    def see(self, share, *processes):
        memory = sum(process.memory_info().rss for process in processes)
        self.seen.append((share, memory, sum(process.num_fds() for process in processes)))

    def judge(self, **more):
        """Print the figures -> whether all is flat."""
        early = [row for row in self.seen if 0.1 <= row[0] <= 0.2]
        late = [row for row in self.seen if row[0] >= 0.9]
        memory = [statistics.median(row[1] for row in rows) for rows in (early, late)]
        descriptors = [statistics.median(row[2] for row in rows) for rows in (early, late)]
        growth = memory[1] / memory[0] - 1
        flat = growth < GROWTH and descriptors[1] <= descriptors[0] + OPENED and not more.get("left_open")
        figures = {"mb": [round(value / 2**20, 1) for value in memory], "growth_percent": round(100 * growth, 2)}
        print(json.dumps({"soak": self.name} | figures | {"descriptors": descriptors, "flat": flat} | more), flush=True)
        return flat


def soak_sample(home, args):
    """tools/sample.py over ``args.clips`` videos."""
    tokenizer, source, output = tiny_tokenizer("sliced_vqvae"), home / "source", home / "futures"
    from latentcast import VideoPredictionPipeline

    VideoPredictionPipeline(transformer(tokenizer.latent_spec), tokenizer, n_context=2, fps=25).save_pretrained(
        home / "pipeline"
    )
    source.mkdir()
    kinds = [encode(home / f"{n}.{kind}", counter_frames(8, first=n)) for n in range(10) for kind in ("mp4", "mkv")]
    for number in range(args.clips):
        kind = kinds[number % len(kinds)]
        os.link(kind, source / f"video_{number:04}{kind.suffix}")
    given = ["--pipeline", home / "pipeline", "--input", source, "--output", output, "--n-frames", "2"]
    tool = Started(TOOLS / "sample.py", *given, "--num-samples", "1", "--device", "cpu", cwd=home)
    process, record = psutil.Process(tool.pid), Record(f"sample, {args.clips} clips")
    began = time.monotonic()
    while tool.poll() is None:
        n_done = len(list(output.glob("*.gif"))) if output.is_dir() else 0
        try:
            record.see(n_done / args.clips, process)
        except psutil.Error:  # it has just ended
            break
        time.sleep(0.5)
    out, err = tool.communicate(timeout=600)
    if tool.returncode:
        raise SystemExit(f"sample: status {tool.returncode}\n{err}")
    made = json.loads(out.splitlines()[-1])["outputs"]
    return record.judge(files=len(made), seconds=round(time.monotonic() - began))


def soak_loader(name, data, args):
    """``args.epochs`` epochs of the training loader of a data module."""
    own = psutil.Process()
    before = own.num_fds()
    record, n_batches, began = Record(f"{name}, {args.epochs} epochs"), 0, time.monotonic()
    data.setup("fit")
    loader = data.train_dataloader()
    for epoch in range(args.epochs):
        loader.sampler.set_epoch(epoch)
        for number, _batch in enumerate(loader):
            n_batches += 1
            if number % 8 == 0:
                record.see((epoch + number / len(loader)) / args.epochs, own, *workers_of(own))
    seconds = round(time.monotonic() - began)
    del _batch, loader, data._train_loader
    data._sets.clear()
    until = time.monotonic() + 10  # workers take a moment to end
    while (left := own.num_fds() - before) > 0 and time.monotonic() < until:
        time.sleep(0.2)
    return record.judge(batches=n_batches, seconds=seconds, left_open=max(0, left))


def workers_of(process):
    """The loader's processes, without the server that they are forks of."""
    return [child for child in process.children(recursive=True) if child.ppid() != process.pid]


def soak_cache(home, args):
    from test_latent_cache import Noise, vqvae

    from latentcast.data.datamodules import LatentDataModule
    from latentcast.data.store.encoding import encode_dataset

    noise = Noise(lengths=(N_FRAMES,) * N_VIDEOS * 4)
    encode_dataset(noise, vqvae(codebook_size=12), home / "cache/train", batch_frames=64, shard_videos=16)
    warm_up(LatentDataModule(home / "cache", CLIP, 8, num_workers=2, has_val=False))
    return soak_loader("cache", LatentDataModule(home / "cache", CLIP, 8, num_workers=2, has_val=False), args)


def soak_videos(home, args):
    from latentcast import VideoFolder
    from latentcast.data.datamodules import VideoDataModule

    (home / "folder").mkdir()
    for n in range(N_VIDEOS):
        suffix = ("mp4", "mkv", "avi")[n % 3]
        codec = {"codec": "mpeg4", "options": {"bf": "2"}} if suffix == "avi" else {}
        encode(home / f"folder/{n:03}.{suffix}", counter_frames(N_FRAMES, first=n), **codec)
    folder = functools.partial(VideoFolder, home / "folder", clip_length=CLIP, size=32)
    warm_up(VideoDataModule(folder, 4, num_workers=2))
    return soak_loader("videos", VideoDataModule(folder, 4, num_workers=2), args)


def warm_up(data):
    """Start what stays for the process's life: the server of workers, libraries that are loaded when they are used."""
    data.setup("fit")
    next(iter(data.train_dataloader()))
    del data
    own, until = psutil.Process(), time.monotonic() + 10
    while workers_of(own) and time.monotonic() < until:  # until they have ended they hold descriptors, here too
        time.sleep(0.2)


SOAKS = {"sample": soak_sample, "cache": soak_cache, "videos": soak_videos}


def main(args):
    logging.getLogger("latentcast").setLevel(logging.ERROR)
    home, flat = Path(tempfile.mkdtemp(prefix="soak_")), {}
    for name in args.what or SOAKS:
        folder = home / name
        folder.mkdir()
        flat[name] = SOAKS[name](folder, args)
    shutil.rmtree(home)
    if not all(flat.values()):
        raise SystemExit(f"{', '.join(name for name, fine in flat.items() if not fine)}: not flat, see above")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("what", nargs="*", metavar="WHAT", help=f"{', '.join(SOAKS)} (default: all)")
    parser.add_argument("--clips", type=int, default=1000)
    parser.add_argument("--epochs", type=int, default=20)
    main(parser.parse_args())
