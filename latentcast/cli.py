"""What every tool shares: arguments, one-line errors, the JSON line that ends stdout."""

import argparse
import contextlib
import json
import logging
import multiprocessing
import os
import select
import signal
import socket
import sys
import threading
import traceback
from pathlib import Path

from latentcast.catalogue import complete_experiment, complete_overrides
from latentcast.command import typed
from latentcast.files import later_rank, printable
from latentcast.urls import Url, folder_at

# libgomp's spinning makes two threads slower than one beside another busy process; must be set before torch loads.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

logger = logging.getLogger("latentcast")


class _OneLine(logging.Formatter):
    """Files may have line breaks, control characters and bytes that are no text in their names."""

    def format(self, record):
        text = super().format(record)
        return printable(text) if record.name == logger.name and not record.exc_info else text


class _NotOurs(logging.Filter):
    """Leaves out what libraries say of themselves: devices, tips, matplotlib's fonts, requests that httpx made."""

    def filter(self, record):
        theirs = record.name.startswith(("pytorch_lightning", "lightning", "matplotlib", "httpx"))
        asked_for = record.name.startswith("pytorch_lightning.callbacks")
        return not theirs or asked_for or record.levelno >= logging.WARNING


class UserError(Exception):
    """Something the user can mend; printed as one line, without a traceback."""


class Findings(UserError):
    """What a check found wrong: an error whose ``figures`` are printed as the JSON line all the same."""

    def __init__(self, message, figures):
        super().__init__(message)
        self.figures = figures


def run_tool(main, parser, argv=None):
    """Parse the command line, run ``main(args) -> dict``, and leave through the exit status.

    Logs and progress bars go to stderr; the last line on stdout is ``main``'s result as one JSON object. Where it is
    text, that is what stdout has. Status 0: done; 1: an error, as one clear line (``--debug`` adds the traceback); 2:
    usage; 130: interrupted.
    """
    add_debug(parser)
    args = parser.parse_intermixed_args(argv)  # key=value may stand on both sides of an option
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_OneLine("%(message)s"))
    if not args.debug:
        handler.addFilter(_NotOurs())
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
    logger.setLevel(logging.DEBUG if args.debug else logging.NOTSET)
    try:
        # Libraries that print must not spoil the last line.
        with ending_when_asked(), contextlib.redirect_stdout(sys.stderr):
            result = main(args)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise SystemExit(130) from None
    except Exception as error:
        if args.debug:
            traceback.print_exc()
        print(f"error: {error_line(error)}", file=sys.stderr)
        if isinstance(error, Findings):
            print(json.dumps(error.figures), flush=True)
        raise SystemExit(1) from None
    if later_rank():
        return
    try:
        print(result if isinstance(result, str) else json.dumps(result), flush=True)
    except BrokenPipeError:  # whoever reads, head say, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is left is flushed at the end
        raise SystemExit(1) from None


def add_debug(parser):
    """The option of every tool."""
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error, and all that is logged")


def error_line(error):
    """What went wrong, as one printable line; of errors that are not ours with their kind."""
    if isinstance(error, RuntimeError) and "torch" in sys.modules:
        from latentcast.distributed import lost_rank

        if lost := lost_rank(error):
            return lost
    kind = "" if isinstance(error, (UserError, ValueError, OSError)) else f"{type(error).__name__}: "
    message = str(error).strip()
    if message.startswith("Caught "):  # out of a loader's worker: its whole traceback, the message in the last line
        message = message.splitlines()[-1].partition(": ")[2]
    return f"{kind}{printable(' '.join(message.split()))}"


def announce(config):
    """Say that the settings are fine, before libraries are loaded, which takes seconds."""
    if not later_rank():
        logger.info("%s: loading; all goes to %s", config.name, config.run_dir)


GRACE = 10  # seconds in which a tool that was asked to end may do so by itself


@contextlib.contextmanager
def ending_when_asked():
    """Inside the block a second ctrl-C ends the process, and so does SIGTERM where it waits for data in vain.

    Handlers in Python do not run while the main thread is in native code, which a decoder may never leave. The
    system tells a thread here of each signal, and it ends the process and its workers if nothing has come of it.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    ours, writer = socket.socketpair()
    writer.setblocking(False)
    before = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    threading.Thread(target=_end_when_asked, args=(ours,), daemon=True).start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        writer.close()  # ends the thread


def _end_when_asked(signals):
    interrupts = 0
    with signals:
        while number := signals.recv(1):
            interrupts += number[0] == signal.SIGINT
            if interrupts > 1:
                reading, status = None, 130
            elif number[0] == signal.SIGTERM and (reading := _waits_for()):
                status = 128 + signal.SIGTERM
            else:
                continue
            ready, _, _ = select.select([signals], [], [], GRACE)
            if not ready and (reading is None or _waits_for() is reading):
                _end(status, reading)


def _waits_for():
    loading = sys.modules.get("latentcast.data.loading")  # tools that load nothing do without torch
    return loading and loading.waits_for()


def _end(status, reading):
    what = f" while reading {reading[0].reads()}" if reading else ""
    print(f"interrupted{what}: ended without finishing the step at hand", file=sys.stderr, flush=True)
    for process in multiprocessing.active_children():
        process.kill()
    os._exit(status)


def experiment_parser(description):
    """``TOOL EXPERIMENT [key=value ...]``"""
    parser = argparse.ArgumentParser(description=description)
    experiment = parser.add_argument(
        "experiment", help=f"a name ({typed('list')} shows them) or the path of a YAML file"
    )
    experiment.completer = complete_experiment
    overrides = parser.add_argument(
        "overrides", nargs="*", default=[], metavar="key=value", help="e.g. prior.n_layers=4 or prior=st_pixelcnn"
    )
    overrides.completer = complete_overrides
    return parser


def train_stage(args, stage, train):
    """What the tools of both stages do: ``train(config, run)`` of the experiment that ``args`` name; ``stage``:
    "tokenizer", or "prior", with ``joint=true`` both together."""
    from latentcast.config import check_data, stage_config

    config = stage_config(args.experiment, args.overrides, stage)
    check_data(config)
    announce(config)
    from pytorch_lightning import seed_everything  # which takes seconds: mistakes in the config show before

    from latentcast.pairing import check_pair
    from latentcast.training.run import TrainingRun

    check_pair(config, args.experiment, args.overrides)
    with TrainingRun.open(config, "joint" if stage == "prior" and config.joint else stage) as run:
        seed_everything(config.seed)
        return train(config, run)


def add_pipeline_arguments(parser):
    """``--pipeline``, ``--device`` and ``--dtype``, of tools that sample from a saved pipeline; see ``pick_device`` and
    ``pick_dtype``."""
    parser.add_argument(
        "--pipeline",
        required=True,
        metavar="DIR",
        type=os.path.expanduser,
        help="a saved pipeline, or OWNER/NAME",
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps, ...")
    parser.add_argument("--dtype", default="float32", choices=DTYPES, help="auto: bfloat16 where the hardware has it")


def parse_options(options):
    """["temperature=0.9"] -> {"temperature": 0.9}; values are read as those of overrides. Raises ValueError."""
    from latentcast.yaml_text import override_value, split_overrides

    for option in options:
        if "=" not in option:
            raise UserError(f"{option!r}: expected an option as key=value")
    found = {}
    for key, text in split_overrides(options):
        *parents, last = key.split(".")
        inner = found
        for name in parents:
            inner = inner.setdefault(name, {})
            if not isinstance(inner, dict):
                raise UserError(f"{key}={text}: {name} has a value already")
        inner[last] = override_value(key, text)
    return found


def user_path(text):
    """The path that an argument names; ``~`` is the user's home."""
    return Path(os.path.expanduser(text))


def user_place(text):
    """The same, or the URL."""
    return folder_at(os.path.expanduser(text))


def pick_device(name):
    """The device of that name, a GPU from now on the current one; "auto": a GPU where there is one."""
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:  # AssertionError: torch was built without CUDA
        raise UserError(f"--device {name}: not available ({str(error).splitlines()[0]})") from None
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def computes_bfloat16(device):
    """Whether a kind of device ("cuda", "cpu", ...) computes in bfloat16; others emulate it, and are several times
    slower in it than in fp32."""
    import torch

    if device == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device == "cpu" and torch.cpu._is_avx512_bf16_supported()


DTYPES = ("auto", "float32", "bfloat16", "float16")


def pick_dtype(name, device):
    """One of DTYPES, as torch calls it; "auto" is bfloat16 where the device computes in it, else float32. The log says
    which."""
    import torch

    if name == "auto":
        name = "bfloat16" if computes_bfloat16(torch.device(device).type) else "float32"
    logger.info("computing in %s on %s", name, device)
    return getattr(torch, name)


def prepare_run_dir(path, name="run_dir"):
    """Create ``run_dir`` and make sure it can be written to; ``name`` is what errors call it. Of a Url, which only what
    is to be prepared may have, the first file tells."""
    if isinstance(path, Url):
        return path
    path = Path(path)
    try:
        str(path).encode()
    except UnicodeEncodeError:  # safetensors opens no such files
        raise UserError(f"{name} {path}: expected a path in UTF-8, found other bytes; data may lie in such") from None
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe = path / f".write-test-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(f"{name} {path}: not writable ({error.strerror})") from None
    return path


def usable_port(host, port):
    """The port, or for 0 any free one; UserError where it cannot be had."""
    if not 0 <= port < 65536:
        raise UserError(f"--port: expected 0 to 65535, found {port}")
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as trial:
            trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            trial.bind(address)
            return trial.getsockname()[1]
    except OSError as error:
        raise UserError(f"--host {host} --port {port}: cannot be had ({error.strerror}); choose another") from None
