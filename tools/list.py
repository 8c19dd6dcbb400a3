"""List what there is by name: tokenizers, priors, experiments, protocols and data sets.

A tokenizer, say, is chosen by tokenizer=NAME, an experiment by its name alone; what is in it, the tool config shows.
"""

import argparse
import shutil
import textwrap

from latentcast.catalogue import KINDS, described
from latentcast.cli import run_tool


def make_parser():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", nargs="?", choices=KINDS, help="default: all")
    parser.add_argument("--json", action="store_true", help="print it as JSON, with whole sentences")
    return parser


def main(args):
    found = {kind: described(KINDS[kind]) for kind in ([args.kind] if args.kind else KINDS)}
    return found if args.json else "\n\n".join(table(kind, names) for kind, names in found.items())


def table(kind, names):
    """A heading and a line for each name, none longer than the terminal is wide."""
    longest, width = max(map(len, names)), shutil.get_terminal_size((120, 0)).columns
    room = max(width - longest - 4, 20)
    lines = (f"  {name:{longest}}  {textwrap.shorten(text, room, placeholder=' ...')}" for name, text in names.items())
    return "\n".join([f"{kind} ({KINDS[kind]}=NAME)" if kind != "experiments" else kind, *map(str.rstrip, lines)])


if __name__ == "__main__":
    run_tool(main, make_parser())
