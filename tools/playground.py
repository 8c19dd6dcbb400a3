"""Try a saved pipeline out in the browser: drop a video or take an example clip, and see its futures side by side.

The page is served to this machine alone, unless --host says otherwise; nothing is sent anywhere, and all files that it
makes are gone when it ends, by ctrl-C. The last line on stdout then says how many predictions were made.
"""

import argparse
import logging
import os
import signal
import tempfile
import threading
from pathlib import Path

from latentcast.cli import UserError, add_pipeline_arguments, pick_device, pick_dtype, run_tool, usable_port

logger = logging.getLogger("latentcast")

PORT = 7860


def make_parser():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_pipeline_arguments(parser)
    parser.add_argument("--port", type=int, default=PORT, help=f"default: {PORT}; 0: any that is free")
    parser.add_argument("--host", default="127.0.0.1", help="0.0.0.0: whoever reaches this machine may use it")
    parser.add_argument("--max-mb", type=float, default=64, help="largest video that is taken (default: 64)")
    parser.add_argument(
        "--max-frames", type=int, default=2000, help="most frames of a video that are read (default: 2000)"
    )
    return parser


def main(args):
    from latentcast.saved import pipeline_folder

    for name, least in (("max_mb", 0), ("max_frames", 1)):
        if not least <= getattr(args, name) < float("inf") or not getattr(args, name):
            raise UserError(f"--{name.replace('_', '-')}: expected a number above 0, found {getattr(args, name)}")
    port = usable_port(args.host, args.port)
    folder = pipeline_folder(args.pipeline)
    logger.info("loading %s", args.pipeline)
    with tempfile.TemporaryDirectory(prefix="latentcast-playground-") as files:
        os.environ["GRADIO_TEMP_DIR"] = os.path.join(files, "cache")  # gradio looks when it is loaded
        return serve(args, folder, port, files)


def serve(args, folder, port, files):
    """Serve a pipeline's folder until ctrl-C; all files lie in the folder ``files``."""
    try:
        from latentcast import playground
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "gradio":
            raise
        raise UserError('the playground needs gradio: pip install "latentcast[demo]"') from None
    from latentcast.pipelines.base import VideoPipeline
    from latentcast.zoo import EXAMPLES, read_examples

    device = pick_device(args.device)
    pipe = VideoPipeline.from_pretrained(folder, dtype=pick_dtype(args.dtype, device)).to(device)
    examples = read_examples(folder) if (folder / EXAMPLES).is_file() else None
    title, limits = Path(folder).resolve().name, {"most_mb": args.max_mb, "most_read": args.max_frames}
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # files go then, too
    with playground.serving(pipe, examples, title, files, args.host, port, **limits) as (address, served):
        try:
            logger.info("ready at %s (ctrl-C ends it)", address)
            threading.Event().wait()
        except KeyboardInterrupt:
            logger.info("ending")
    return {"address": address, "predictions": served.n_predicted}


if __name__ == "__main__":
    run_tool(main, make_parser())
