"""Shares of a job for whatever starts them: one process of many (``--shards I/N``), or Ray's workers.

A share is a process that knows nothing of the others. What they exchange is the folder that they write into: each
prepares it, or finds it prepared, writes the shards that are its own, and completes the whole if nothing is left to do
then. Shares may run at once, one after another, or again; the files are those of one process that does it all.
"""

import argparse
import contextlib
import logging
import os
import re
import socket
import sys
import time
from dataclasses import dataclass

from latentcast.cli import UserError
from latentcast.files import InUseError, later_rank, locked

logger = logging.getLogger("latentcast")

PATIENCE = 600  # seconds that a share waits for another one to prepare or complete the folder
RETRIES = 5  # of a share whose worker was lost
SHARES = 4  # for each of Ray's GPUs, or cores: what one that is slower or lost leaves is shared again


@dataclass(frozen=True)
class Share:
    """Every ``count``-th shard from number ``index`` on."""

    index: int
    count: int

    @classmethod
    def parse(cls, text):
        """ "3/16" -> Share(3, 16); ArgumentTypeError of what is none."""
        found = re.fullmatch(r"(\d{1,9})/(\d{1,9})", text)
        if not found or not int(found[1]) < int(found[2]):
            raise argparse.ArgumentTypeError(f"expected I/N with I from 0 to N - 1, 3/16 say, found {text!r}")
        return cls(*map(int, found.groups()))

    def of(self, numbers):
        """Those of ``numbers`` that are this share's."""
        return [number for number in numbers if number % self.count == self.index]

    def over(self, writer):
        """Give a ShardWriter, which has prepared its folder, this share of its shards."""
        writer.rank, writer.world_size = self.index, self.count

    def __str__(self):
        return f"{self.index}/{self.count}"


def add_sharing(parser):
    """``--shards`` and ``--engine`` of the tools that share their work."""
    parser.add_argument(
        "--shards",
        type=Share.parse,
        metavar="I/N",
        help="do this share of the work, 0/16 to 15/16 say, in any order; the last one completes it",
    )
    parser.add_argument(
        "--engine", choices=("here", "ray"), default="here", help="ray: by the workers of a Ray cluster"
    )
    parser.add_argument(
        "--ray-shares", type=int, metavar="N", help=f"tasks for Ray (default: {SHARES} for each GPU, or core)"
    )


def share_of(args, overwrite=False):
    """The Share that the command line asks for, or None.

    Args:
        overwrite: whether the tool is to replace what is there.
    Raises:
        UserError: other processes share the work already, or shares would overwrite each other's.
    """
    share = getattr(args, "shards", None)
    if share is None:
        return None
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 or later_rank():
        raise UserError(
            f"--shards {share}: expected a process by itself, found one of several that torchrun or srun started; "
            "use an array of jobs, or leave --shards out under torchrun"
        )
    if overwrite:
        raise UserError(
            f"--shards {share}: not with overwrite=true, by which a share would delete what others have done; delete "
            "the folder, or use another one"
        )
    return share


def is_for_ray(args):
    """Whether Ray's workers are to do it."""
    return getattr(args, "engine", None) == "ray"


@contextlib.contextmanager
def turn(folder, what):
    """``files.locked`` for a moment, as one of the shares: waits until others have had theirs."""
    until, waits = time.monotonic() + PATIENCE, 0.05
    with contextlib.ExitStack() as stack:
        while True:
            try:
                stack.enter_context(locked(folder, what))
                break
            except InUseError:
                if time.monotonic() > until:
                    raise
                time.sleep(waits)
                waits = min(2 * waits, 5)
        yield


def by_ray(main, args, on_gpus=True):
    """Run a tool's ``main`` by Ray: its shares in Ray's workers, then what completes them here -> its result.

    Ray decides where and when they run, and runs again those whose worker is lost. A cluster that RAY_ADDRESS names
    ("auto": that of this machine) is used, and left as it is; else Ray is started here, for this tool alone, and ended.
    All machines see the same files, by the same paths, and have latentcast installed.

    Args:
        main: of the tool, as its file defines it.
        args: its arguments.
        on_gpus: a share takes a GPU, where the cluster has some.
    Raises:
        UserError: no Ray, here or at RAY_ADDRESS, or options that do not go together.
        OSError: a share was lost again and again.
        Exception: what a share raised.
    """
    if args.shards is not None:
        raise UserError("--engine ray: it makes the shares itself; leave out --shards")
    if args.ray_shares is not None and args.ray_shares < 1:
        raise UserError(f"--ray-shares: expected at least 1, found {args.ray_shares}")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
    try:
        import ray
    except ImportError:
        raise UserError("--engine ray: Ray is not installed; pip install 'latentcast[ray]'") from None
    # "auto" unasked would find a Ray that another tool has started here, and will end.
    address = os.environ.get("RAY_ADDRESS")
    own = {} if address else {"include_dashboard": False}
    _check_reached(address)
    try:
        ray.init(address or "local", logging_level=logging.WARNING, configure_logging=False, **own)
    except ConnectionError:
        raise UserError(f"RAY_ADDRESS={address}: no Ray answers there") from None
    try:
        resources = ray.cluster_resources()
        gpus, cores = int(on_gpus and resources.get("GPU", 0)), int(resources.get("CPU", 1))
        count = args.ray_shares or SHARES * max(1, gpus or cores)
        logger.info("Ray: %d shares for %s", count, f"{gpus} GPUs" if gpus else f"{cores} cores")
        task = ray.remote(num_cpus=1, num_gpus=1 if gpus else 0, max_retries=RETRIES)(_run_share)
        place = ray.put((os.getcwd(), os.path.abspath(main.__code__.co_filename), vars(args)))
        waiting = [task.remote(place, index, count) for index in range(count)]
        while waiting:
            done, waiting = ray.wait(waiting)
            try:
                ray.get(done)
            except ray.exceptions.RayTaskError as error:
                raise (error.cause or error) from None
            except ray.exceptions.RayError as error:
                raise OSError(f"Ray: a share was lost {RETRIES + 1} times, last by {type(error).__name__}") from None
    finally:
        ray.shutdown()
    return main(argparse.Namespace(**vars(args) | {"engine": "here"}))


def _check_reached(address):
    """Ray itself asks an address that nobody answers at for minutes."""
    host, _, port = (address or "").removeprefix("ray://").rpartition(":")
    if port.isdecimal():
        try:
            socket.create_connection((host, int(port)), timeout=10).close()
        except (OSError, OverflowError) as error:
            raise UserError(f"RAY_ADDRESS={address}: no Ray answers there ({error})") from None


def _run_share(place, index, count):
    """What a worker of Ray does: the share of the tool whose file is given."""
    import runpy

    folder, file, arguments = place
    os.chdir(folder)
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr, force=True)
    main = runpy.run_path(file)["main"]
    return main(argparse.Namespace(**arguments | {"engine": "here", "shards": Share(index, count)}))
