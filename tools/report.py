"""Write one HTML file that says what runs did: commands, settings, curves, figures, metrics with protocol and
intervals, and videos that play in it. Several runs are compared. It opens without a server and without a network.
"""

import argparse
import logging
from pathlib import Path

from latentcast.cli import UserError, run_tool, user_path

logger = logging.getLogger("latentcast")


def make_parser():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="RUN_DIR", type=user_path, help="folders of runs")
    parser.add_argument("--output", metavar="FILE.html", type=user_path, help="default: report.html in the first run")
    parser.add_argument("--max-mb", type=float, default=20, help="largest size of the file (default: 20)")
    return parser


def main(args):
    if not 1 <= args.max_mb <= 1000:
        raise UserError(f"--max-mb: expected 1 to 1000, found {args.max_mb:g}")
    from latentcast.reporting.folder import read_run
    from latentcast.reporting.page import write_page

    runs = [read_run(path) for path in args.runs]
    output = args.output or args.runs[0] / "report.html"
    if output.is_dir():
        raise UserError(f"--output {output}: expected a file's name, found a folder")
    if not output.parent.is_dir():
        raise UserError(f"--output {output}: no such folder {output.parent}")
    left_out = write_page(runs, output, round(args.max_mb * 1e6))
    if left_out:
        logger.warning("%s: %d files left out, beyond --max-mb %g", output, len(left_out), args.max_mb)
    return {"report": str(output), "bytes": Path(output).stat().st_size, "left_out": left_out}


if __name__ == "__main__":
    run_tool(main, make_parser())
