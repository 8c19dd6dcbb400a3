"""Train systems for one budget of CPU time each, evaluate them under one protocol, and write the tables.

    python benchmarks/league.py [--only NAME,NAME] [--workers 1] [--render] [--table FILE] [--root DIR] [--output FILE]
                                [--zoo DIR] [key=value ...]

``league.yaml`` lists the runs, and what the papers say of them. Each trains in ROOT/NAME: stage one, the latents cache,
the prior, then its evaluation; what is finished is not done again, and what was stopped or killed goes on. A budget
counts the process's CPU time (user and system, of one thread), not the time on the clock, so that a busy machine does
not shorten it: a short run first measures what a step costs, and the number of steps that fit is kept, so that learning
rates fall to the end. A run that is stopped and started again lowers it where steps have cost more than that.

A finished run is kept beside the tables (``docs/results/league/NAME/``: result, cost, pictures), which are written
from there, and its pipeline in ``zoo/``; ROOT may go. ``--render`` trains none. ``key=value`` go to every tool but
``evaluate.py``, after the run's own.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from common import environment, say  # isort: skip  (sets the thread policy before torch loads)

import psutil
import torch
import yaml
from claims import read_claims
from league_page import COST, PICTURES, RESULT, render, swept

from latentcast.config import instantiate, load_config
from latentcast.files import read_json, write_json
from latentcast.pipelines.base import VideoPipeline
from latentcast.priors.base import no_progress
from latentcast.zoo import N_EXAMPLES, export

HERE = Path(__file__).parent
TOOLS = HERE.parent / "tools"
CALIBRATION = (20, 120)  # steps of the two short runs whose difference is what a step costs
SAVED_EVERY = 20  # seconds


@dataclass(frozen=True)
class Run:
    """One row of a table.

    Attributes:
        name, table, label: of the row, its table, and what the table calls it.
        protocol: that it is evaluated under; pictures: whether the page shows its clips.
        experiment, overrides: what the tools are given.
        data: name of the data set that is evaluated on; evaluate: overrides of the evaluation alone.
        cpu_seconds: the budget.
        zoo, licence: what its pipeline's folder in the zoo begins with (None: it is not kept), and its licence.
        tokenizer, joint: shares of it. tokenizer_of: name of the run that trains its tokenizer.
        sweep: an option of the prior's sampler -> values for which its pipeline is evaluated, too.
    """

    name: str
    table: str
    label: str
    experiment: str
    data: str
    protocol: str
    cpu_seconds: float
    overrides: list = field(default_factory=list)
    evaluate: list = field(default_factory=list)
    tokenizer: float = 0.0
    joint: float = 0.0
    tokenizer_of: str | None = None
    sweep: dict = field(default_factory=dict)
    zoo: str | None = None
    licence: str = "MIT"
    pictures: bool = True

    def stages(self):
        """Stage -> its share of the budget, in the order they run."""
        shares = {"tokenizer": self.tokenizer, "prior": 1 - self.tokenizer - self.joint, "joint": self.joint}
        return {stage: share for stage, share in shares.items() if share}

    def zoo_name(self, name=None):
        """The folder in the zoo of this run's pipeline, or of another of its table."""
        return f"{self.zoo}-{(name or self.name).replace('_', '-')}"


def read_table(path):
    """The runs of a YAML like league.yaml, in order -> (list of Run, table name -> its title)."""
    content = yaml.safe_load(Path(path).read_text())
    runs, titles = [], {}
    for table, described in content["tables"].items():
        titles[table] = described["title"]
        shared = {"table": table, "protocol": table, "cpu_hours": content["cpu_hours"]}
        shared |= {k: v for k, v in described.items() if k not in ("title", "runs")}
        for name, run in described["runs"].items():
            run = shared | run
            runs.append(Run(name=name, cpu_seconds=3600 * run.pop("cpu_hours"), **run))
    return runs, titles


class Trainer:
    """Works through one run; ``league.json`` in its folder says how far it is.

    Args:
        run: a Run; root: folder of all runs; overrides: for the tools that train.
        kept, zoo: folders where finished runs and their pipelines are kept.
    """

    def __init__(self, run, root, overrides, kept, zoo):
        self.run, self.root, self.folder, self.overrides = run, root, root / run.name, overrides
        self.kept, self.zoo = kept / run.name, zoo
        self.command = f"python benchmarks/league.py --only {run.name}"  # of what is kept, without this machine's paths
        self.state_file = self.folder / "league.json"
        self.state = read_json(self.state_file) if self.state_file.is_file() else {}

    def work(self):
        """All that is not done yet: the stages, the evaluations, and keeping what came out."""
        if not (self.kept / RESULT).is_file():
            self._train_all()
            result = self._evaluate(self.folder)
            self._note("cost", **self._cost())
            self._keep(result)
        self._sweep()

    def _train_all(self):
        for stage, share in self.run.stages().items():
            if self.state.get(stage, {}).get("done"):
                continue
            if stage == "tokenizer" and self.run.tokenizer_of:
                self._take_tokenizer()
                continue
            budget = share * self.run.cpu_seconds
            if "max_steps" not in self.state.get(stage, {}):
                self._note(stage, max_steps=self._steps_within(stage, budget), cpu_seconds=0.0)
            self._fit_again(stage, budget)
            self._train(stage)
            if stage == "tokenizer":
                self._encode()
            self._note(stage, done=True)

    def _fit_again(self, stage, budget):
        """Fewer steps for a stage that goes on, where they have cost more than was measured: beside other work a core
        does less in a second."""
        state, last = self.state[stage], self.folder / f"{stage}_training" / "last.ckpt"
        if state["cpu_seconds"] and last.is_file():
            step = torch.load(last, map_location="cpu", mmap=True, weights_only=True)["global_step"]
            fit = max(step, int(step * budget / state["cpu_seconds"]))
            if fit < 0.97 * state["max_steps"]:
                say(f"{self.run.name}: {stage}: {step} steps in {state['cpu_seconds']:.0f}, so {fit} in {budget:.0f}")
                self._note(stage, max_steps=fit)

    def _train(self, stage):
        """Train a stage to its end, counting the CPU time of this and of earlier tries."""
        spent = self.state[stage]["cpu_seconds"]
        self._tool(
            *self._command(stage),
            [f"trainer.max_steps={self.state[stage]['max_steps']}", "resume=true"],
            count=lambda seconds: self._note(stage, cpu_seconds=round(spent + seconds, 1)),
        )

    def _command(self, stage):
        return ("train_tokenizer" if stage == "tokenizer" else "train_prior"), ["joint=true"] * (stage == "joint")

    def _steps_within(self, stage, budget):
        """Steps that fit into ``budget`` CPU seconds, by two short runs on the run's own data."""
        trial = self.folder / "calibration"
        seconds = []
        for steps in CALIBRATION:
            shutil.rmtree(trial, ignore_errors=True)
            trial.mkdir(parents=True)
            for part in ("tokenizer", "latents", "prior"):
                if (self.folder / part).is_dir():
                    (trial / part).symlink_to((self.folder / part).resolve())
            if stage != "joint" and (trial / stage).is_symlink():
                (trial / stage).unlink()
            limits = [f"trainer.max_steps={steps}", "trainer.limit_val_batches=1", f"run_dir={trial}"]
            seconds.append(self._tool(*self._command(stage), limits))
        shutil.rmtree(trial)
        step = (seconds[1] - seconds[0]) / (CALIBRATION[1] - CALIBRATION[0])
        fit = max(1, int((budget - seconds[0]) / step))
        say(f"{self.run.name}: {stage}: {step:.3f} CPU seconds a step, {fit} steps in {budget:.0f}")
        return fit

    def _encode(self):
        """Fill the latents cache; a cost beyond the budget, for runs without one draw their clips anew for ever."""
        self._note("latents", cpu_seconds=round(self._tool("encode_dataset", []), 1))

    def _take_tokenizer(self):
        """Encode by the tokenizer that another run has trained."""
        _, cost = self._other_tokenizer()
        self._encode()
        self._note("tokenizer", **cost)

    def _other_tokenizer(self):
        """-> where the tokenizer of the other run is, in its folder or, where that is gone, as it is kept; its cost."""
        other = self.run.tokenizer_of
        state, cost = self.root / other / "league.json", self.kept.parent / other / COST
        found = read_json(state).get("tokenizer", {}) if state.is_file() else {}
        if found.get("done"):
            return self.root / other / "tokenizer", found
        if cost.is_file():
            kept = cost.parent / "tokenizer"  # of a pipeline that is too large for the zoo
            return (kept if kept.is_dir() else self.zoo / self.run.zoo_name(other)), read_json(cost)["tokenizer"]
        raise SystemExit(f"{self.run.name}: tokenizer_of: {other} has not trained it yet")

    def _evaluate(self, folder, *overrides):
        """-> the result, whose files go to ``folder``."""
        run = self.run
        result = folder / "metrics" / f"{run.protocol}.json"
        if not result.is_file():
            arguments = ["--pipeline", str(self.folder / "pipeline"), "--data", run.data, f"protocol={run.protocol}"]
            arguments.append(f"evaluation.references={self.root / 'references'}")
            self._run("evaluate", [*arguments, f"run_dir={folder}", *run.evaluate, *overrides])
        return read_json(result) | {"command": self.command}

    def _sweep(self):
        """The same with other values of an option of the sampler, without bits, which no option changes."""
        for option, values in self.run.sweep.items():
            left = {value: self.kept / swept(option, value) for value in values}
            left = {value: kept for value, kept in left.items() if not kept.is_file()}
            if not left:
                continue
            if not (self.folder / "pipeline").is_dir():
                raise SystemExit(
                    f"{self.run.name}: {option}={next(iter(left))}: its pipeline is gone from {self.folder}"
                )
            metrics = ",".join(metric for metric in self._protocol().metrics if metric != "bits")
            default = self._pipeline().prior.sampler_options()[option].default
            for value, kept in left.items():
                if value == default:
                    found = read_json(self.kept / RESULT) | {"cost": read_json(self.kept / COST)["cost"]}
                else:
                    changed = f"evaluation.sampler.{option}={value}", f"protocol.metrics=[{metrics}]"
                    found = self._evaluate(self.folder / kept.stem, *changed, "evaluation.baselines=[]")
                    found |= {"cost": self._cost(**{option: value})}
                write_json(kept, found)

    def _keep(self, result):
        """Copy what the tables show, its result last, and export the pipeline; where that is too large, keep the
        tokenizer for the runs that share it."""
        run, metrics = self.run, self.folder / "metrics"
        self.kept.mkdir(parents=True, exist_ok=True)
        for kind in PICTURES:
            if (picture := metrics / run.protocol / f"{kind}.png").is_file():
                shutil.copyfile(picture, self.kept / f"{kind}.png")
        if run.zoo:
            self._export(result)
        elif run.tokenizer and not run.tokenizer_of:
            shutil.copytree(self.folder / "tokenizer", self.kept / "tokenizer", dirs_exist_ok=True)
        write_json(self.kept / COST, self.state)
        write_json(self.kept / RESULT, result)

    def _export(self, result):
        run, protocol = self.run, result["protocol"]
        config = load_config(run.experiment, [*run.overrides, *self.overrides], tool="train_prior")
        test = instantiate(config.data)(split="test", clip_length=protocol["n_context"] + protocol["n_predicted"])
        clips = torch.stack([test[i]["frames"] for i in range(N_EXAMPLES)])
        folder = self.zoo / run.zoo_name()
        facts = {"title": f"{run.label}.", "command": self.command}
        pipe = self._pipeline()
        pipe.register_to_config(n_context=protocol["n_context"])  # it may have been trained with fewer
        found = export(pipe, folder, clips, {run.protocol: result}, licence=run.licence, **facts)
        say(f"{run.name}: kept in {folder}: {found:.2f} dB on its example clips")

    def _pipeline(self):
        return VideoPipeline.from_pretrained(self.folder / "pipeline")

    def _protocol(self):
        overrides = (o for o in self.run.evaluate if o.startswith("protocol."))
        return instantiate(load_config("quickstart", [f"protocol={self.run.protocol}", *overrides]).protocol)

    def _cost(self, **sampler):
        """What a future costs: seconds on one thread and network calls a frame, for one context at a time."""
        pipe, protocol = self._pipeline(), self._protocol()
        spec = pipe.prior.config.latent_spec
        shape = (1, protocol.n_context, spec["frame_channels"], spec["frame_height"], spec["frame_width"])
        context, bar = pipe.encode(torch.zeros(shape)), Counting()
        pipe.prior.sample(context, protocol.n_predicted, progress=bar, **sampler)  # warms up, and counts
        began = time.process_time()
        pipe(torch.zeros(shape), protocol.n_predicted, **sampler)
        parameters = sum(p.numel() for part in (pipe.prior, pipe.tokenizer) if part for p in part.parameters())
        return {
            "seconds_a_future": round(time.process_time() - began, 3),
            "calls_a_frame": bar.total / protocol.n_predicted,
            "parameters": parameters,
        }

    def _tool(self, tool, extra, limits=(), count=None):
        """Run a tool on the experiment -> its CPU seconds."""
        quiet = ["wandb.mode=disabled", "trainer.enable_progress_bar=false", "overwrite=true"]
        if tool == "encode_dataset" or "resume=true" in limits:
            quiet.pop()
        arguments = [self.run.experiment, f"run_dir={self.folder}", *self.run.overrides, *self.overrides]
        if self.run.tokenizer_of:
            arguments.append(f"tokenizer={self._other_tokenizer()[0]}")
        return self._run(tool, [*arguments, *quiet, *extra, *limits], count)

    def _run(self, tool, arguments, count=None):
        command = [sys.executable, str(TOOLS / f"{tool}.py"), *arguments]
        say(f"{self.run.name}: {tool}.py {' '.join(arguments)}")
        self.folder.mkdir(parents=True, exist_ok=True)
        with open(self.folder / "league.log", "a") as log:
            child = subprocess.Popen(command, stdout=log, stderr=log, env=os.environ | {"OMP_NUM_THREADS": "1"})
            process, noted = psutil.Process(child.pid), time.monotonic()
            while not (ended := os.wait4(child.pid, os.WNOHANG))[0]:
                if count and time.monotonic() - noted >= SAVED_EVERY:
                    count(cpu_seconds(process))
                    noted = time.monotonic()
                time.sleep(0.2)
        _, status, usage = ended
        child.returncode, seconds = os.waitstatus_to_exitcode(status), usage.ru_utime + usage.ru_stime
        if count:
            count(seconds)
        if child.returncode:
            raise SystemExit(
                f"{self.run.name}: {tool}.py ended with {child.returncode}; see {self.folder / 'league.log'}"
            )
        return seconds

    def _note(self, stage, **facts):
        self.state[stage] = self.state.get(stage, {}) | facts
        write_json(self.state_file, self.state)


class Counting(no_progress):
    """A progress bar that keeps its total."""

    def __call__(self, total=None):
        self.total = total
        return self


def cpu_seconds(process):
    """User and system time so far of a process and of its children."""
    try:
        times = process.cpu_times()
    except psutil.NoSuchProcess:
        return 0.0
    return times.user + times.system + times.children_user + times.children_system


def stop(jobs):
    """Begin none of the jobs any more, and end the tools that run; a training saves its step."""
    told = set()
    for job in jobs:
        job.cancel()
    while not all(job.done() for job in jobs):
        for child in psutil.Process().children():
            if child.pid not in told:
                told.add(child.pid)
                child.terminate()
        time.sleep(0.1)


def main(args):
    runs, titles = read_table(args.table)
    names, claims = [run.name for run in runs], read_claims(args.table, runs)
    chosen = args.only.split(",") if args.only else names
    unknown = [name for name in chosen if name not in names]
    if unknown:
        raise SystemExit(f"--only: expected some of {', '.join(names)}, found {unknown[0]}")
    kept = args.output.with_suffix("")
    if not args.render:
        with ThreadPoolExecutor(args.workers) as pool:
            trainers = [Trainer(run, args.root, args.overrides, kept, args.zoo) for run in runs if run.name in chosen]
            jobs = [pool.submit(trainer.work) for trainer in trainers]
            signal.signal(signal.SIGTERM, signal.default_int_handler)  # like ctrl-C
            try:
                for job in jobs:
                    job.result()
            except KeyboardInterrupt:
                stop(jobs)
                raise SystemExit("stopped; the same command goes on") from None
    render(runs, titles, claims, kept, args.output)
    print(json.dumps({"output": str(args.output), "env": environment()}))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for the tools that train")
    parser.add_argument("--only", help="comma-separated names of runs")
    parser.add_argument("--workers", type=int, default=1, help="runs that train at once (default: 1)")
    parser.add_argument("--render", action="store_true", help="train none: write the tables of what is finished")
    parser.add_argument("--table", type=Path, default=HERE / "league.yaml", metavar="FILE")
    parser.add_argument("--root", type=Path, default=Path("runs/league"), metavar="DIR")
    parser.add_argument("--output", type=Path, default=HERE.parent / "docs/results/league.md", metavar="FILE")
    parser.add_argument("--zoo", type=Path, default=HERE.parent / "zoo", metavar="DIR", help="where pipelines are kept")
    main(parser.parse_intermixed_args())
