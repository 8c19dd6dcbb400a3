# PYTHON_ARGCOMPLETE_OK
"""The command ``latentcast``, whose subcommands are the programs in ``tools/``, and what texts call those.

``latentcast train-prior ...`` and ``python tools/train_prior.py ...`` are the same program; without a checkout there is
the first alone.
"""

import importlib
import os
import re
import shlex
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
IN_CHECKOUT = not (HERE / "tools").is_dir()  # or an editable install; see latentcast/__init__.py
TOOLS = (HERE.parent if IN_CHECKOUT else HERE) / "tools"


def typed(tool):
    """What a user types to run a tool, the way this program was called: "python tools/train_prior.py" or
    "latentcast train-prior"."""
    if _by_file():
        return f"python tools/{tool}.py"
    return f"latentcast {_dashed(tool)}"


def named(tool):
    """A tool's name in a sentence: "tools/train_prior.py" or "latentcast train-prior"."""
    return typed(tool).removeprefix("python ")


def process_of(tool):
    """The words that start a tool as a process of its own, the way this program was called."""
    if _by_file():
        return [sys.executable, str(TOOLS / f"{tool}.py")]
    # As this process does, -m alone seeks latentcast in the current folder first.
    where = [] if Path(sys.argv[0]).name == "__main__.py" else ["-P"]
    return [sys.executable, *where, "-m", "latentcast", _dashed(tool)]


def command_line():
    """What was typed to run this tool, as it can be typed again; None where no tool runs."""
    program = Path(sys.argv[0])
    if not (_is_command() or program.parent.name == "tools"):
        return None
    return shlex.join([*("latentcast" if _is_command() else typed(program.stem)).split(), *sys.argv[1:]])


def _by_file():
    return IN_CHECKOUT and not _is_command()


def _is_command():
    """Whether this process, or the one that it works for, was started as ``latentcast``; multiprocessing hands
    ``sys.argv`` on."""
    program = Path(sys.argv[0])
    return program.stem == "latentcast" or (program.name, program.parent.name) == ("__main__.py", "latentcast")


def _dashed(tool):
    return tool.replace("_", "-")


def tools():
    """Subcommand -> file of its tool."""
    return {_dashed(path.stem): path for path in sorted(TOOLS.glob("*.py"))}


def main(argv=None):
    """Run ``latentcast TOOL ...``; leaves through the exit status, see ``cli.run_tool``."""
    if "_ARGCOMPLETE" in os.environ:
        _complete()
    argv = sys.argv[1:] if argv is None else list(argv)
    name = _dashed(argv[0]) if argv else ""
    if name in tools():
        from latentcast.cli import run_tool

        tool = _load(name)
        return run_tool(tool.main, _parser_of(name, tool), argv[1:])
    parser = _make_parser()
    if not argv:
        parser.print_help(sys.stderr)
        parser.exit(2)
    if not name.startswith("-"):
        from latentcast.targets import nearest

        parser.error(f"no command {argv[0]!r}{nearest(argv[0], tools())}")
    parser.parse_args(argv)


def _make_parser():
    """Of the command itself, for its help and what is completed before a tool is chosen."""
    import argparse

    from latentcast import __version__

    parser = argparse.ArgumentParser(
        prog="latentcast",
        description="Video prediction in latent space. latentcast TOOL --help says what a tool takes.",
    )
    parser.add_argument("--version", action="version", version=f"latentcast {__version__}")
    choices = parser.add_subparsers(title="tools", metavar="TOOL", required=True)
    for name, path in tools().items():
        choices.add_parser(name, help=_summary(path), add_help=False)
    return parser


def _summary(path):
    """The first clause of a tool's docstring; importing them all would take longer than the help may."""
    return " ".join(re.match(r'"""(.+?)[.,:]\s', path.read_text(encoding="utf-8"), re.DOTALL)[1].split())


def _load(name):
    return importlib.import_module(f"latentcast.tools.{name.replace('-', '_')}")


def _parser_of(name, tool):
    parser = tool.make_parser()
    parser.prog = f"latentcast {name}"
    return parser


def _complete():
    """Tell the shell what may follow, and end. Once the tool is typed, that is for its own parser to say."""
    import argcomplete

    line = os.environ["COMP_LINE"][: int(os.environ["COMP_POINT"])]
    found = re.match(r"\s*\S+\s+(\S+)\s", line)
    name = _dashed(found[1]) if found else ""
    if name in tools():
        os.environ["_ARGCOMPLETE"] = "2"  # the parser's arguments begin after the second word
        from latentcast.cli import add_debug

        parser = _parser_of(name, _load(name))
        add_debug(parser)
    else:
        parser = _make_parser()
    argcomplete.autocomplete(parser, always_complete_options="long")
