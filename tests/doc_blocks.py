"""The blocks of code in README, CONTRIBUTING and docs: found, expanded by bash, and the calls in them read or run."""

import argparse
import contextlib
import functools
import inspect
import re
import subprocess
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path

import pytest
from tiny_experiment import ROOT, typed

PAGES = ["README.md", "CONTRIBUTING.md", *sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("docs/**/*.md"))]
FENCE = re.compile(r"^(?P<indent> *)```(?P<kind>\w*)\n(?P<text>.*?)^(?P=indent)```$", re.DOTALL | re.MULTILINE)
PROGRAMS = ("latentcast", "python", "python3", "pip", "make", "ruff", "pyright", "ray", "cp", "mkdir")  # of blocks
LAUNCHERS = ("srun", "torchrun")  # of a script, whose call is what counts
OF_A_CLUSTER = {"SLURM_ARRAY_TASK_ID": "0", "SLURM_ARRAY_TASK_COUNT": "1"}
RECORD = "\n".join(
    [
        "exec 3>calls",
        'record() { printf "%s\\0" $# "$@" >&3; }',
        *(f'{program}() {{ record {program} "$@"; }}' for program in PROGRAMS),
        *(f'{launcher}() {{ until [[ $1 == *.py ]]; do shift; done; record python "$@"; }}' for launcher in LAUNCHERS),
    ]
)

# What makes the tools' calls tiny: overrides.
TRAINING = "trainer.max_steps=1 trainer.accelerator=cpu trainer.limit_val_batches=1 trainer.precision=32-true "
TRAINING += "batch_size=2 num_workers=0 preview.figures=[] preview.every_n_steps=0 logger=none"
EVALUATION = "protocol.n_clips=2 protocol.n_samples=2 protocol.n_predicted=2 protocol.metrics=[psnr] "
EVALUATION += "evaluation.baselines=[copy_last_frame] logger=none"
DIGITS = "frame_size=16 data.digit_size=12 data.n_videos=4 data.n_heldout_videos=16"


@dataclass
class Block:
    page: str  # from the repository's root
    line: int
    heading: str  # of the section, of the second level
    kind: str  # sh, python, yaml, text, or nothing
    text: str

    def __str__(self):
        return f"{self.page}:{self.line}"


def blocks(page):
    """The fenced blocks of a file, in order."""
    content = (ROOT / page).read_text(encoding="utf-8")
    found = []
    for fence in FENCE.finditer(content):
        before = content[: fence.start()]
        headings = re.findall(r"^## (.+)$", FENCE.sub("", before), re.MULTILINE)
        place = page, before.count("\n") + 1, headings[-1] if headings else ""
        found.append(Block(*place, fence["kind"], textwrap.dedent(fence["text"])))
    return found


def calls(block, folder):
    """What a block of shell calls, as lists of words, with its variables, loops and quotes done by bash itself.

    Nothing is run: PROGRAMS write down what they are given, and others cannot be found.
    """
    (folder / ".venv/bin").mkdir(parents=True, exist_ok=True)
    (folder / ".venv/bin/activate").touch()
    command = ["/bin/bash", "-euo", "pipefail", "-c", f"{RECORD}\n{block.text}"]
    done = subprocess.run(command, cwd=folder, env={"PATH": ""} | OF_A_CLUSTER, capture_output=True, text=True)
    assert done.returncode == 0, f"{block}: {done.stderr}"
    words = (folder / "calls").read_text().split("\0")[:-1]
    found = []
    while words:
        n = int(words[0])
        call, words = words[1 : 1 + n], words[1 + n :]
        if call[0] == "latentcast":  # whose subcommands are the tools
            call = ["python", f"tools/{call[1].replace('-', '_')}.py", *call[2:]]
        found.append(call)
    return found


def is_script(call):
    return call[0] == "python" and call[1].endswith(".py")


class Parsed(Exception):
    """Of a script that has read its command line."""


def parsed(call):
    """The arguments of ``python SCRIPT ...`` as the script's own parser reads them; it is ended there."""

    def stop_after(parse):
        def stop(parser, *given):
            raise Parsed(parse(parser, *given))

        return stop

    with pytest.MonkeyPatch.context() as patch:
        for name in ("parse_args", "parse_intermixed_args"):
            patch.setattr(argparse.ArgumentParser, name, stop_after(getattr(argparse.ArgumentParser, name)))
        try:
            _, _, err = typed(ROOT / call[1], call[2:])
        except Parsed as reached:
            return reached.args[0]
    raise AssertionError(err)


def check(call):
    """Refuse a call that could not be run: of an unknown tool, extra, target, experiment, key or option."""
    if is_script(call):
        args, name = parsed(call), Path(call[1]).stem
        if name in CHECKERS:
            CHECKERS[name](args)
        elif hasattr(args, "experiment"):
            composed(args.experiment, *args.overrides)
    elif call[0] == "pip":
        check_pip(call[1:])
    elif call[0] == "make":
        known(call[1:], re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    elif call[:2] == ["python", "-m"]:
        known(call[2:3], ["pytest"])


def known(names, of):
    for name in names:
        assert name in of, f"{name!r}: not one of {', '.join(of)}"


@functools.cache
def composed(experiment, *overrides):
    """An experiment's config; its sections of all tools are checked, whichever runs."""
    from latentcast.config import load_config

    return load_config(experiment, overrides, "evaluate")


def check_evaluate(args):
    given = [word for word in args.arguments if "=" not in word]
    overrides = [word for word in args.arguments if "=" in word]
    if args.pipeline:  # which is not there: any experiment with its data
        assert args.data and not given, "expected --data NAME and no experiment beside --pipeline"
        given = ["quickstart"]
        overrides += [f"data={args.data}", "data.root=DIR"]
    assert composed(*given, *overrides).protocol is not None, "protocol=NAME: there is none"


def check_prepare(args):
    from latentcast.cli import parse_options
    from latentcast.data.sets import BENCHMARKS
    from latentcast.targets import import_name

    if args.name != "check":
        known([args.name], BENCHMARKS)
        benchmark = import_name(BENCHMARKS[args.name])
        known(parse_options(args.arguments), inspect.signature(benchmark).parameters)
        assert args.output and (args.source or not benchmark.needs_source), "--output and --source: one is missing"


def check_figures(args):
    from latentcast.inspection import check_names

    check_names([word for word in args.words if "=" not in word])


def check_gpu_day(args):
    if args.train:
        composed(args.train, *args.overrides)
    if args.prepare:
        check(["python", "tools/prepare_dataset.py", *args.prepare.split()])


CHECKERS = {
    "evaluate": check_evaluate,
    "prepare_dataset": check_prepare,
    "figures": check_figures,
    "gpu_day": check_gpu_day,
    "quickstart": lambda args: composed("quickstart", *args.overrides),
}


def check_pip(words):
    """Extras are those of setup.py, constraints are there."""
    extras = re.findall(r'^        "(\w+)": \[', (ROOT / "setup.py").read_text(), re.MULTILINE)
    for word in words[1:]:
        if ours := re.fullmatch(r"(?:\.|latentcast)\[([\w,]+)\]", word):
            known(ours[1].split(","), extras)
    assert "-c" not in words or (ROOT / words[words.index("-c") + 1]).is_file(), words


def run(call, folder, extra=()):
    """Run a call in ``folder``, of scripts in this process, with further arguments -> what it printed on stdout."""
    if not is_script(call):
        return subprocess.run(call, cwd=folder, check=True, capture_output=True, text=True).stdout
    words = []
    for word in call[2:]:
        words += sorted(map(str, folder.glob(word))) if "*" in word else [word]
    with contextlib.chdir(folder):
        status, out, err = typed(ROOT / call[1], [*words, *extra])
    assert status in (0, None), f"{' '.join([*call, *extra])}\n{err}"
    return out


def run_python(block, names, folder):
    """Run a block of Python in ``folder``, after what is told in ``names``; errors show the page and its line."""
    code = compile("\n" * block.line + block.text, str(ROOT / block.page), "exec")
    with contextlib.chdir(folder), pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["python"])
        exec(code, names)
    return names
