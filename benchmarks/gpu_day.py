"""All that a GPU which is there for minutes can tell, by one command, without a network.

    python benchmarks/gpu_day.py --minutes 8 --output DIR [--train EXPERIMENT [key=value ...]] [--prepare "flow ..."]

The tests that need CUDA; every prior's sampling and training step and every tokenizer's encoding at the papers' sizes;
then, for the time that is left, the training of an experiment. ``DIR/report.json`` and ``DIR/report.md`` are written
after each measurement, as a whole: whatever ends the run, what was measured is there.
"""

from common import counted_flops, environment, matmul_rate, say, seconds, synchronize  # isort: skip  (sets the thread policy before torch loads)

import argparse
import contextlib
import json
import os
import re
import runpy
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import diffusers
import torch

from latentcast import (
    DiffusersTokenizer,
    FlowTransformer,
    MaskedTransformer,
    PixelTokenizer,
    RecurrentVAE,
    ResidualDiffusion,
    SDEDiffusion,
    STPixelCNN,
    VideoTransformer,
)
from latentcast.files import write_json, write_text
from latentcast.priors import st_pixelcnn, video_transformer
from latentcast.sizes import sides
from latentcast.tokenizers.base import trusted

ROOT = Path(__file__).parents[1]
TESTS_SECONDS = 60
SPEED_SHARE = 0.4  # of the time, where something is trained afterwards
ENDING = 50  # seconds for what a training does before its first and after its last step
LARGEST = 1024  # batch; more is not tried
LEAST_LEFT = 5  # seconds: no measurement begins with less
CODES = {"kind": "discrete", "channels": 256, "height": 16, "width": 16, "codebook_sizes": [512] * 4}
CODES |= {"scaling_factor": 1.0, "frame_channels": 3, "frame_height": 64, "frame_width": 64}
RGB = PixelTokenizer(3, 64, 64, levels=None).latent_spec
GREY = PixelTokenizer(1, 64, 64, levels=None).latent_spec
SMALL = {"height": 8, "width": 8, "frame_height": 8, "frame_width": 8}  # --tiny: what every spec becomes


@dataclass
class Case:
    """A prior at the size of its paper.

    Attributes:
        small: options of --tiny.
        frames: context, frames to predict, and frames of a training clip.
        compiled: modules that are compiled for sampling.
    """

    kind: type
    spec: dict
    options: dict
    small: dict
    frames: tuple
    compiled: tuple = ()


SMALL_VAE = {"dim": 8, "hidden_channels": 4, "cells": 12}
SMALL_LVT = {"dim": 16, "embed_dim": 8, "n_heads": 1, "head_dim": 8, "n_layers": 1}
SMALL_PIXELCNN = {"dim": 16, "n_blocks": 1, "block_layers": 1, "n_heads": 1, "head_dim": 4}
SMALL_TRUNK = {"dim": 16, "n_layers": 1, "n_heads": 2, "head_dim": 8}
SMALL_STDIFF = {"motion_channels": [8, 8], "motion_kernels": [3, 3], "block_channels": [8, 16], "n_blocks": 1}
SMALL_STDIFF |= {"head_dim": 8, "norm_groups": 4}
SMALL_RVD = {"width": 8, "denoising_multipliers": [1, 2], "transform_multipliers": [1, 2]}
LAYERS = CODES | {"codebook_sizes": [16] * 3}
PRIORS = {
    "lvt": Case(VideoTransformer, CODES, {}, SMALL_LVT, (5, 11, 16)),
    "st_pixelcnn": Case(STPixelCNN, LAYERS, {"attention": "factorised"}, SMALL_PIXELCNN, (10, 10, 20)),
    "masked": Case(MaskedTransformer, LAYERS, {"n_frames": 20}, SMALL_TRUNK, (10, 10, 20)),
    "flow": Case(FlowTransformer, RGB, {"n_frames": 15}, SMALL_TRUNK, (5, 10, 15)),
    "svg_lp": Case(RecurrentVAE, GREY, {"aligner": "none", "group_dim": 10}, SMALL_VAE, (5, 10, 15), ("encoder",)),
    "hafsvg": Case(RecurrentVAE, GREY, {"group_dim": 10}, SMALL_VAE, (5, 10, 15), ("encoder",)),
    "stdiff": Case(SDEDiffusion, RGB, {}, SMALL_STDIFF, (5, 10, 15), ("unet",)),
    "rvd": Case(ResidualDiffusion, RGB, {}, SMALL_RVD, (4, 16, 8), ("denoiser",)),
}


class Report:
    """What was measured so far, on the disk after each measurement."""

    def __init__(self, folder, device, minutes, tiny):
        self.folder, self.ends = Path(folder), time.monotonic() + 60 * minutes
        self.folder.mkdir(parents=True, exist_ok=True)
        self.part_ends = self.ends
        self.content = {"env": environment(), "device": str(device), "tiny": tiny, "minutes": minutes}
        self.content |= {"finished": False, "rows": [], "not_measured": []}
        self.write()

    def left(self):
        """Seconds for the part at hand."""
        return min(self.part_ends, self.ends) - time.monotonic()

    @contextlib.contextmanager
    def row(self, part, name, **what):
        """Measure into the dict that the block gets; an error is a row too. Nothing is begun without time."""
        row = {"part": part, "name": name} | what
        if self.left() < LEAST_LEFT:
            self.content["not_measured"].append(" ".join(map(str, row.values())))
            self.write()
            raise Skipped
        started = time.monotonic()
        signal.signal(signal.SIGALRM, _time_is_up)
        signal.setitimer(signal.ITIMER_REAL, self.left(), 5)  # again, where a library catches it
        try:
            yield row
        except Exception as error:
            signal.setitimer(signal.ITIMER_REAL, 0)
            row["error"] = f"{type(error).__name__}: {error}".strip().splitlines()[0][:300]
            torch.cuda.empty_cache()
        except (SystemExit, KeyboardInterrupt):
            row["error"] = "interrupted"
            raise
        finally:
            self._add(row, started)

    def _add(self, row, started):
        signal.setitimer(signal.ITIMER_REAL, 0)
        row["took"] = round(time.monotonic() - started, 1)
        self.content["rows"].append(row)
        self.write()
        say("  ".join(f"{key} {value}" for key, value in row.items() if key != "took"))

    def write(self):
        write_json(self.folder / "report.json", self.content)
        write_text(self.folder / "report.md", self.markdown())

    def markdown(self):
        """A table for each part; columns are what its rows have."""
        content, lines = self.content, ["# What was measured", ""]
        lines += [f"{name}: {value}" + "  " for name, value in content["env"].items()]
        size = "tiny models, the figures say nothing about speed" if content["tiny"] else "the papers' sizes"
        lines += [f"device: {content['device']}; {size}", ""]
        for part in dict.fromkeys(row["part"] for row in content["rows"]):
            rows = [row for row in content["rows"] if row["part"] == part]
            columns = [c for c in dict.fromkeys(key for row in rows for key in row) if c not in ("part", "took")]
            lines += [f"## {part}", "", f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
            for row in rows:
                cells = [f"{v:.4g}" if isinstance(v, float) else str(v) for v in (row.get(c, "") for c in columns)]
                lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
            lines.append("")
        missing = [*content["not_measured"], *([] if content["finished"] else ["what comes after this"])]
        return "\n".join([*lines, "Not measured: " + ("; ".join(missing) or "nothing was left out") + ".", ""])


def _time_is_up(*_):
    raise TimeoutError("the time for this part was up")


class Skipped(Exception):
    """There is no time for it."""


def run(arguments, log, limit):
    """Run a program, its output into the file ``log``, for ``limit`` seconds at most -> (status, output).

    One that is at work then gets SIGTERM 5 seconds before, and then SIGKILL; at once where this process is ended.
    """
    with open(log, "w") as file:
        process = subprocess.Popen(
            arguments, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, start_new_session=True, env=child_environment()
        )
        try:
            process.wait(max(limit - 5, 1))
        except subprocess.TimeoutExpired:
            end(process)
        except BaseException:  # a signal to this process, which those of the other session do not get
            end(process)
            raise
    return process.returncode, Path(log).read_text(errors="replace")


def end(process):
    """End a program and what it started: it has 5 seconds to save what it can."""
    for number, patience in ((signal.SIGTERM, 5), (signal.SIGKILL, None)):
        os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(patience)
            return


def _interrupted(number, _):
    for later in (signal.SIGINT, signal.SIGTERM):
        signal.signal(later, signal.SIG_IGN)  # what there is to be ended ends
    raise SystemExit(128 + number)


def child_environment():
    return os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}


# The tests -----------------------------------------------------------------------------------------------------------


def tests(report, limit):
    """Only the files that have some: to collect all takes as long as the tests."""
    files = [path for path in sorted((ROOT / "tests").glob("test_*.py")) if "@pytest.mark.gpu" in path.read_text()]
    with report.row("tests", "pytest -m gpu") as row:
        command = [sys.executable, "-m", "pytest", "-m", "gpu", "-p", "no:cacheprovider", *map(str, files)]
        status, output = run(command, report.folder / "tests.txt", min(limit, report.left()))
        counts = re.findall(r"\d+ (?:passed|failed|skipped|errors?)", output)
        row["result"] = ", ".join(counts) or "none has ended"
        row["status"] = status
        if status:
            row["error"] = (output.strip().splitlines() or ["no output"])[-1][:300]


# Speed ---------------------------------------------------------------------------------------------------------------


def tf32(on):
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = on


def dtype_of(mode):
    return torch.bfloat16 if "bf16" in mode else torch.float32


def best_matmul(mode, device, tiny):
    """``matmul_rate``, of which a step's share is told."""
    tf32(mode == "tf32")
    return matmul_rate(256 if tiny else 8192 if device == "cuda" else 1024, dtype_of(mode), device)


def build(name, device, tiny, dtype=None):
    case = PRIORS[name]
    torch.manual_seed(0)
    model = case.kind(case.spec | (SMALL if tiny else {}), **case.options | (case.small if tiny else {})).to(device)
    return (model if dtype in (None, torch.float32) else model.to(dtype)).eval()


def clip_of(model, batch, n_frames):
    spec, device = model.config.latent_spec, model.device
    shape = (batch, n_frames, spec["height"], spec["width"])
    if model.accepts == "codes":
        return torch.stack([torch.randint(size, shape, device=device) for size in spec["codebook_sizes"]], -1)
    return torch.rand(batch, n_frames, spec["channels"], *shape[2:], device=device) * 2 - 1


def training_step(model, clip, *n_context, mode):
    """-> function() that takes a whole training step of a prior, or of a tokenizer, compiled or not."""
    device = clip.device.type
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=device == "cuda")
    forward = torch.compile(model.train()) if "compiled" in mode else model.train()

    def step():
        with torch.autocast(device, torch.bfloat16, enabled="bf16" in mode), trusted():
            loss = forward(clip, *n_context).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


@contextlib.contextmanager
def without_graphs():
    """Samplers take their steps one operation at a time."""
    recorders = {module: module.record_graph for module in (st_pixelcnn, video_transformer)}
    for module in recorders:
        module.record_graph = lambda step, device: None
    try:
        yield
    finally:
        for module, recorder in recorders.items():
            module.record_graph = recorder


def measured(function, device):
    """Seconds of a call after the first: the median of up to five, of fewer where they are long; and peak memory."""
    function()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    times = [seconds(function, device)]
    while len(times) < 5 and sum(times) < 2:
        times.append(seconds(function, device))
    peak = torch.cuda.max_memory_allocated() / 2**20 if device == "cuda" else None
    return sorted(times)[len(times) // 2], peak


def largest(report, function_of, device):
    """Double the batch until the memory is full, the time is up or ``LARGEST`` -> (batch, seconds, peak memory)."""
    found, batch, limit = None, 2, report.left() / 8
    started = time.monotonic()
    while batch <= LARGEST and time.monotonic() - started < limit:
        try:
            found = (batch, *measured(function_of(batch), device))
        except torch.OutOfMemoryError:
            break
        except RuntimeError as error:  # cuDNN and cuBLAS have errors of their own for it
            if "memory" not in str(error).lower():
                raise
            break
        batch *= 2
    torch.cuda.empty_cache()
    if found is None:
        raise RuntimeError("no batch of 2 fits into memory and time")
    return found


def figures(time_, peak, batch, flops=None, best=None):
    found = {"batch": batch, "seconds": time_, "per_second": batch / time_}
    if peak is not None:
        found["peak_MiB"] = round(peak)
    if flops:
        found |= {"TFLOP/s": flops / time_ / 1e12, "share_of_matmul": flops / time_ / best}
    return found


def speed(report, device, tiny):
    """Rows of the priors by turns, of the tokenizers after them."""
    best, compiled = {}, "compiled bf16" if device == "cuda" else "compiled fp32"
    modes = ["fp32", "bf16", "tf32"] if device == "cuda" else ["fp32", "bf16"]
    for mode in modes:
        with contextlib.suppress(Skipped), report.row("matrix product", mode) as row:
            best[mode] = best_matmul(mode, device, tiny)
            row["TFLOP/s"] = best[mode] / 1e12
    for mode in modes:  # what is asked for first: batch 1
        for name in PRIORS:
            with contextlib.suppress(Skipped):
                prior_rows(report, name, mode, device, tiny, best)
    classes = ()
    with contextlib.suppress(Skipped), report.row("encoding", "all tokenizers") as row:
        classes = tokenizer_classes()
        row["tokenizers"] = len(classes)
    for name, make in classes:
        for size in (16,) if tiny else (64, 256):
            with contextlib.suppress(Skipped), report.row("encoding", name, pixels=size) as row:
                row |= encoding(make, size, device, tiny)
    for name in PRIORS:
        with contextlib.suppress(Skipped), report.row("training step, largest batch", name, mode="bf16") as row:
            tf32(False)
            model, n_context, n_frames = build(name, device, tiny), PRIORS[name].frames[0], PRIORS[name].frames[2]
            size, time_, peak = largest(
                report,
                lambda b, m=model, c=n_context, f=n_frames: training_step(m, clip_of(m, b, f), c, mode="bf16"),
                device,
            )
            row |= figures(time_, peak, size)
        with contextlib.suppress(Skipped), report.row("sampling, largest batch", name, mode="bf16") as row:
            model = build(name, device, tiny, torch.bfloat16)
            size, time_, peak = largest(report, lambda b, m=model, n=name: sampling(m, n, b, 1), device)
            row |= figures(time_, peak, size)

    for name in PRIORS:  # last: a compilation may take minutes
        with contextlib.suppress(Skipped):
            prior_rows(report, name, compiled, device, tiny, best)


def sampling(model, name, batch, n_frames):
    context = clip_of(model, 1, PRIORS[name].frames[0])
    context = context if model.accepts == "codes" else context.to(model.dtype)
    return lambda: model.sample(context, n_frames, num_samples=batch)


def prior_rows(report, name, mode, device, tiny, best):
    (n_context, n_predicted, n_frames), compiled = PRIORS[name].frames, PRIORS[name].compiled
    tf32(mode == "tf32")
    with report.row("training step", name, mode=mode) as row:
        model = build(name, device, tiny)
        clip = clip_of(model, 1, n_frames)
        flops = counted_flops(training_step(model, clip, n_context, mode=mode.replace("compiled ", "")))
        step = training_step(model, clip, n_context, mode=mode)
        row |= figures(*measured(step, device), 1, flops, best.get(mode.replace("compiled ", "")))
    graphs = model.accepts == "codes" and device == "cuda"
    for form in ["graph", "no graph"] if graphs and "compiled" not in mode else [""]:
        if "compiled" in mode and not compiled:
            continue
        with report.row("sampling", name, mode=f"{mode} {form}".strip()) as row:
            model = build(name, device, tiny, dtype_of(mode))
            for module in compiled if "compiled" in mode else ():
                getattr(model, module).compile()
            # Of what has no graph one frame is enough, and all of what a user waits for.
            length = 1 if form == "no graph" or device == "cpu" else n_predicted
            with without_graphs() if form == "no graph" else contextlib.nullcontext():
                time_, peak = measured(sampling(model, name, 1, length), device)
            row |= figures(time_, peak, 1) | {"frames": length, "seconds_a_frame": time_ / length}


def tokenizer_classes():
    # By its path: HuggingFace has a package of that name.
    return runpy.run_path(str(Path(__file__).with_name("tokenizers.py")))["TOKENIZERS"].items()


@torch.no_grad()
def encoding(make, size, device, tiny):
    """Frames a second in 16-frame clips, and how many codes are the same with TF32."""
    torch.manual_seed(0)
    channels = {} if getattr(make, "func", make) is DiffusersTokenizer else {"in_channels": 3}
    model = make(height=size, width=size, **channels)
    model = model.to(device).eval()
    n_clips = 1 if tiny or device == "cpu" else 64 if size < 128 else 8
    frames = torch.rand(n_clips, 16, 3, size, size, device=device) * 2 - 1
    found, exact = {}, None
    for mode in ("fp32", "tf32") if device == "cuda" else ("fp32",):
        tf32(mode == "tf32")
        time_, _ = measured(lambda: model.encode(frames), device)
        found[f"frames_a_second_{mode}"] = n_clips * 16 / time_
        codes = model.encode(frames).codes
        if codes is not None and mode == "tf32":
            found["equal_codes"] = (codes == exact).float().mean().item()
        exact = codes
    with torch.autocast(device, torch.bfloat16):
        time_, peak = measured(lambda: model.encode(frames), device)
    found["frames_a_second_bf16"] = n_clips * 16 / time_
    return found | ({"peak_MiB": round(peak)} if peak is not None else {})


# Training ------------------------------------------------------------------------------------------------------------


def train(report, experiment, overrides, device, preparing):
    """Stage by stage by the tools, then the pipeline in bf16."""
    from latentcast import VideoPredictionPipeline, instantiate, load_config

    run_dir = report.folder / "run"
    common = [
        *overrides,
        f"run_dir={run_dir}",
        "overwrite=true",
        "wandb.mode=disabled",
        f"trainer.accelerator={device}",
    ]
    common = [text.replace("accelerator=cuda", "accelerator=gpu") for text in common]
    if preparing is not None:
        with report.row("training", "preparing the data") as row:
            row["status"] = preparing.wait(max(report.left() - ENDING, 1))
    stages = [("train_prior", 1.0)]
    with report.row("training", experiment) as row:
        if instantiate(load_config(experiment, overrides, tool="train_prior").tokenizer).needs_training:
            stages = [("train_tokenizer", 0.35), ("encode_dataset", None), *stages]
        row["stages"] = len(stages)
    if "error" in row:
        return
    ending = ENDING
    for tool, share in stages:
        settings = [text for text in common if not text.startswith(("overwrite", "trainer.accelerator"))]
        step = None if tool == "encode_dataset" else experiments_step(report, experiment, overrides, tool, device)
        with report.row("training", tool) as row:
            limit = report.left() - ENDING / 4  # of all stages: what one takes too long for, those after it have less
            if tool != "encode_dataset":
                row["seconds"] = int(max(limit * share - ending, 5))
                settings = [*common, *in_time(load_config(experiment, overrides, tool=tool), row["seconds"], step)]
            command = [sys.executable, str(ROOT / "tools" / f"{tool}.py"), experiment, *settings]
            began = time.monotonic()
            row["status"], output = run(command, report.folder / f"{tool}.txt", limit)
            ending = max(ending, time.monotonic() - began - row.get("seconds", 0))  # what this machine takes for it
            if row["status"]:
                raise RuntimeError((output.strip().splitlines() or ["no output"])[-1])
            row |= {k: v for k, v in json.loads(output.strip().splitlines()[-1]).items() if k in ("steps", "val")}
        if "error" in row and tool != "train_prior":  # what comes next needs it; a pipeline may have been saved by then
            report.content["not_measured"].append(f"training after {tool}")
            return
    with report.row("training", "pipeline in bf16") as row:
        pipe = VideoPredictionPipeline.from_pretrained(run_dir / "pipeline").to(torch.bfloat16)
        pipe.save_pretrained(report.folder / "pipeline_bf16")
        size = sum(path.stat().st_size for path in (report.folder / "pipeline_bf16").rglob("*") if path.is_file())
        row |= {"MB": size / 1e6, "under_16_MB": size < 16e6}


def experiments_step(report, experiment, overrides, tool, device):
    """Measure a stage's training step at its own batch -> seconds, or None where that failed."""
    from latentcast import instantiate, load_config
    from latentcast.training.run import precision_here

    with report.row("training", f"a step of {tool}") as row:
        config = load_config(experiment, overrides, tool=tool)
        model, told = instantiate(config.tokenizer), ()
        if tool == "train_prior":
            model, told = instantiate(config.prior, latent_spec=model.latent_spec), (config.n_context,)
            clip = clip_of(model.to(device), config.batch_size, config.clip_length)
        else:
            shape = config.clip_length, config.channels, *sides(config.frame_size)
            clip = torch.rand(config.batch_size, *shape, device=device) * 2 - 1
        tf32(False)
        mode = "bf16" if "bf16" in precision_here({**config.trainer, "accelerator": device}) else "fp32"
        row |= figures(*measured(training_step(model.to(device), clip, *told, mode=mode), device), config.batch_size)
    return row.get("seconds")


def in_time(config, length, step):
    """Overrides for a training that ends after ``length`` seconds, its learning rate's schedule with it, if its
    steps of ``step`` seconds are what they were measured to be; with a checkpoint a minute."""
    hours, rest = divmod(length, 3600)
    settings = [f"trainer.max_time=00:{hours:02}:{rest // 60:02}:{rest % 60:02}"]
    if step is not None:
        settings += [
            f"checkpoint_every_n_steps={max(1, int(60 / step))}",
            f"trainer.max_steps={max(1, int(length / step))}",
        ]
        if config.lr_scheduler and (config.lr_scheduler.get("num_warmup_steps") or 0) >= 1:  # may be more than these
            settings.append("lr_scheduler.num_warmup_steps=0.05")
    return settings


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=8, help="all together (default: 8)")
    parser.add_argument("--output", type=Path, required=True, help="folder of report.json, report.md and the run")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--train", metavar="EXPERIMENT", help="train it for the time that is left")
    parser.add_argument("--prepare", metavar="ARGUMENTS", help="of tools/prepare_dataset.py, run meanwhile on the CPU")
    parser.add_argument("--tiny", action=argparse.BooleanOptionalAction, help="small models (default: on a CPU)")
    parser.add_argument("--parts", default="tests,speed,training", help="some of tests,speed,training")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of the experiment")
    args = parser.parse_intermixed_args()
    if args.minutes <= 0:
        parser.error(f"--minutes: expected above 0, found {args.minutes}")
    unknown = set(args.parts.split(",")) - {"tests", "speed", "training"}
    if unknown:
        parser.error(f"--parts: expected some of tests,speed,training, found {args.parts}")
    tiny = args.device == "cpu" if args.tiny is None else args.tiny
    diffusers.utils.logging.set_verbosity_error()  # it warns of every model that is cast
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _interrupted)
    output = args.output.absolute()
    report, preparing = Report(output, args.device, args.minutes, tiny), None
    if args.prepare:
        command = [sys.executable, str(ROOT / "tools/prepare_dataset.py"), *shlex.split(args.prepare)]
        with open(output / "prepare.txt", "w") as file:
            preparing = subprocess.Popen(
                ["nice", *command], stdout=file, stderr=subprocess.STDOUT, env=child_environment()
            )
    parts = args.parts.split(",")
    try:
        with contextlib.suppress(Skipped):
            if "tests" in parts:
                tests(report, min(TESTS_SECONDS, 15 * args.minutes))
        if "speed" in parts:
            if args.train:
                report.part_ends = time.monotonic() + SPEED_SHARE * 60 * args.minutes
            speed(report, args.device, tiny)
        report.part_ends = report.ends
        if args.train and "training" in parts:
            with contextlib.suppress(Skipped):
                train(report, args.train, args.overrides, args.device, preparing)
    finally:
        if preparing is not None and preparing.poll() is None:
            preparing.terminate()
    synchronize(args.device)
    report.content["finished"] = True
    report.write()
    print(json.dumps({"report": str(output / "report.md"), "rows": len(report.content["rows"])}))


if __name__ == "__main__":
    main()
