"""Say what latentcast finds on this machine: versions, processors, what reads videos, weights, W&B, disk space.

What is missing or too old stands under problems; the status is 0 all the same. Put the whole into a report of a fault.
"""

import argparse

from latentcast.cli import run_tool


def make_parser():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print it as JSON")
    return parser


def main(args):
    from latentcast.environment import examine

    found = examine()
    return found if args.json else "\n".join(lines(found))


def lines(found, indent=""):
    for name, value in found.items():
        if isinstance(value, dict) and value:
            yield f"{indent}{name}"
            yield from lines(value, f"{indent}  ")
        elif isinstance(value, list) and value:
            yield from (f"{indent}{name}  {item}" for item in value)
        else:
            yield f"{indent}{name}  {'-' if value in (None, [], {}) else value}"


if __name__ == "__main__":
    run_tool(main, make_parser())
