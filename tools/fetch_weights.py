"""Get the weights of the metric networks: I3D for FVD, AlexNet and VGG-16 for LPIPS.

Files that are there already are checked and left alone. The others are made out of the source distributions that
publish them (about 110 MB to download; what is in them is not run).
"""

import argparse
import hashlib
import logging
from pathlib import Path

from latentcast.cli import UserError, run_tool, user_path

logger = logging.getLogger("latentcast")


def make_parser():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--weights", metavar="DIR", type=user_path, help="default: $LATENTCAST_WEIGHTS, or the user's cache"
    )
    parser.add_argument(
        "--from",
        dest="archives",
        metavar="FILE",
        type=user_path,
        nargs="+",
        default=[],
        help="source distributions downloaded before; nothing is then downloaded",
    )
    return parser


def main(args):
    from latentcast.metrics.weights import SOURCES, convert, default_folder, download, load_weights

    folder = args.weights or Path(default_folder()).expanduser()
    archives = read_archives(args.archives)
    figures = {}
    for name, source in SOURCES.items():
        path = folder / f"{name}.safetensors"
        fetched = not path.is_file()
        if fetched:
            if source.archive not in archives:
                if args.archives:
                    raise UserError(f"{path}: missing, and --from does not give {source.archive}")
                archives[source.archive] = download(source.archive)
            convert(archives[source.archive], name, folder)
        load_weights(name, path)
        logger.info("%s: %s", path, "written" if fetched else "good")
        figures[name] = {"path": str(path), "fingerprint": source.fingerprint, "fetched": fetched}
    return {"weights": str(folder), "files": figures}


def read_archives(paths):
    """Name of a source distribution -> its bytes, for files that may be called anything."""
    from latentcast.metrics.weights import SOURCES

    archives = {source.sha256: source.archive for source in SOURCES.values()}
    contents = {}
    for path in paths:
        content = path.read_bytes()
        digest = hashlib.sha256(content).hexdigest()
        if digest not in archives:
            expected = " or ".join(f"{archive} ({sha256})" for sha256, archive in archives.items())
            raise UserError(f"{path}: expected {expected}, found sha256 {digest}")
        contents[archives[digest]] = content
    return contents


if __name__ == "__main__":
    run_tool(main, make_parser())
