"""Checkpoints: written whole or not at all, and continued by a run that can honour its own config."""

import contextlib
import inspect
import logging
import os
import shutil
import warnings
import zipfile
from pathlib import Path

import torch
from lightning_fabric.plugins.io.torch_io import TorchCheckpointIO

from latentcast.config import defaults, find_target
from latentcast.files import replacing
from latentcast.yaml_text import flattened

logger = logging.getLogger("latentcast")

# Options of which a resumed run takes its own value, for they are about how it goes on or about what it does besides.
APPLIED = (
    *("batch_size", "num_workers", "read_timeout", "optimizer.lr", "optimizer.weight_decay", "lr_scheduler", "trainer"),
    *("ema_decay", "compile", "checkpoint_every_n_steps", "least_steps_between_val", "final_weights"),
)
ELSEWHERE = (
    "name",
    "run_dir",
    "resume",
    "overwrite",
    "preview",
    "logger",
    "wandb",
    "cache",
    "evaluation",
    "protocol",
    "joint",
    *("cache_dir", "cache_gigabytes", "data.cache_dir", "data.cache_gigabytes"),
)


REST = "rest.ckpt"  # in the folder that a sharded checkpoint is: all but the tensors, and what is known of these


class DamagedCheckpoint(ValueError):
    """A checkpoint that cannot be read."""


class WholeFileIO(TorchCheckpointIO):
    """Writes a checkpoint beside the one that it replaces, on the same file system, and renames it when it is on the
    disk. Lightning's own way moves a file out of ``TMPDIR``, which copies it over the old one.

    Raises:
        OSError: it cannot be written; names the checkpoint. The one before is still whole.
    """

    def save_checkpoint(self, checkpoint, path, storage_options=None):
        with replacing(path, durable=True) as temporary, open(temporary, "wb") as file:
            torch.save(checkpoint, file)


def check_checkpoint(path, module, averaging, data=None, sharded=False):
    """Make sure that a checkpoint can be resumed -> its step.

    Args:
        path: a checkpoint that Lightning wrote.
        module: the TrainingModule that is to go on.
        averaging: whether this run averages the weights.
        data: its data module, if the data is to be compared.
        sharded: whether its processes share the weights, and so the checkpoint.
    Raises:
        DamagedCheckpoint: it cannot be read.
        ValueError: of another model, written with the moving average switched the other way, or with another
            value of an option that a resumed run cannot change; the message names it.
    """
    path = Path(path)
    if path.exists() and path.is_dir() != sharded:
        raise ValueError(
            f"checkpoint {path}: expected {'a folder of shards' if sharded else 'one file'}, found the other; keep "
            f"trainer.strategy={'auto or ddp' if sharded else 'fsdp'} to resume"
        )
    try:
        checkpoint, found = _open(path, sharded)
        step, was, before = checkpoint["global_step"], checkpoint.get("data"), checkpoint.get("hyper_parameters") or {}
        if not (isinstance(step, int) and isinstance(was, dict | None) and isinstance(before, dict)):
            raise ValueError("not what a training writes")
    except Exception as error:  # a damaged pickle may raise anything
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise DamagedCheckpoint(f"checkpoint {path}: damaged, cannot be resumed ({reason[:100]})") from None
    expected = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    for name in sorted(expected.keys() | found.keys()):
        sides = [side.get(name, "nothing") for side in (found, expected)]
        if sides[0] != sides[1]:
            raise ValueError(
                f"checkpoint {path}: of another model than the config's: {name} is {sides[0]} in the checkpoint, "
                f"{sides[1]} in the config"
            )
    if ("averaging_state" in checkpoint) != averaging:
        side = "without" if averaging else "with"
        raise ValueError(f"checkpoint {path}: it was trained {side} a moving average (ema_decay); keep it so to resume")
    now = data and data.describe()
    if was and now and was.get("tokenizer") != now.get("tokenizer"):
        raise ValueError(
            f"checkpoint {path}: the latents are of another tokenizer than those it was trained on; overwrite=true "
            "starts over"
        )
    same_data = bool(was and now) and was == now
    check_options(path, before, dict(module.hparams), module.stage, same_data)
    if was and now and not same_data:
        logger.warning("%s: the videos are not those that it was trained on; it goes on with the new ones", path)
    return step


def _open(path, sharded):
    """-> a checkpoint, of shards without their tensors, and name -> shape of the model's tensors."""
    file = path / REST if sharded else path
    with zipfile.ZipFile(file) as parts:
        if any(part.file_size > part.compress_size for part in parts.infolist()):  # it could grow beyond all bounds
            raise ValueError("its parts are compressed")
    with warnings.catch_warnings(action="ignore"):  # of pickles that torch did not write
        checkpoint = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    if not sharded:
        return checkpoint, {name: tuple(tensor.shape) for name, tensor in checkpoint["state_dict"].items()}
    for name, size in checkpoint["files"].items():
        found = (path / name).stat().st_size
        if found != size:
            raise EOFError(f"{name}: expected {size} bytes, found {found}")
    states = {}
    for key, shape in checkpoint["shapes"].items():
        state, _, name = key.partition("/")
        states.setdefault(state, {})[name] = shape
    return {**states, **checkpoint}, states["state_dict"]


def keep_previous(path, previous):
    """Let ``previous`` be the checkpoint that ``path`` is now, if it is there, before another takes its place. It is
    the same file by another name, or the same files, where the file system can do so, else a copy."""
    if path.is_dir():
        with replacing_folder(previous) as temporary:
            shutil.copytree(path, temporary, copy_function=_link)
    elif path.exists():
        with replacing(previous) as temporary:
            _link(path, temporary)


def _link(path, other):
    try:
        os.link(path, other)
    except OSError:
        shutil.copyfile(path, other)


@contextlib.contextmanager
def replacing_folder(folder, first=True):
    """A temporary folder that takes the place of ``folder`` when the block ends well; of several processes that fill it
    only the ``first`` moves it, and the others must wait for that."""
    folder = Path(folder)
    temporary, old = (folder.with_name(f".{folder.name}.{os.getpid()}.{kind}") for kind in ("tmp", "old"))
    try:
        yield temporary
        if first:
            if folder.is_dir():
                os.rename(folder, old)
            os.rename(temporary, folder)
    except BaseException:
        if old.exists() and not folder.exists():
            os.rename(old, folder)
        raise
    finally:
        for leftover in (temporary, old):
            shutil.rmtree(leftover, ignore_errors=True)


def check_options(path, before, now, stage, same_data=False):
    """Refuse another value of an option that a resumed run cannot change, and say which others it applies.

    Args:
        path: of the checkpoint. before, now: the configs that it was and is trained with, as plain Python; empty ones
            are not compared.
        stage: "tokenizer", "prior" or "joint": groups of other stages do not count.
        same_data: the data sets are known to be the same, however they are found.
    """
    if not before or not now:
        return
    others = {"tokenizer": ("prior", "n_context", "joint_training"), "prior": ("joint_training",), "joint": ()}[stage]
    if stage != "tokenizer":
        others += ("tokenizer_dir",)  # the same one may lie elsewhere; its identity is compared
    if stage != "tokenizer" and None in (before.get("tokenizer"), now.get("tokenizer")):
        others += ("tokenizer",)  # taken as it stands in run_dir
    before, now = flattened(before), flattened(now)
    for name in sorted(before.keys() | now.keys()):
        if _under(name, (*ELSEWHERE, *others)) or (same_data and _under(name, ("data",))):
            continue
        old, new = (side[name] if name in side else _default(name, side) for side in (before, now))
        if old == new:
            continue
        if not _under(name, APPLIED) or _under(name, ("trainer.overfit_batches",)):
            raise ValueError(
                f"checkpoint {path}: trained with {name}={old}, asked for {new}, which resume=true cannot change; "
                "overwrite=true starts over, run_dir=... keeps it"
            )
        logger.info("resuming with %s=%s (it was %s)", name, new, old)


def _under(name, prefixes):
    return any(name == prefix or name.startswith(f"{prefix}.") for prefix in prefixes)


def _default(name, flat):
    """What an option is where a config (of an earlier version, say) does not have it."""
    group, _, option = name.rpartition(".")
    target = flat.get(f"{group}._target_")
    if target is None:
        return flattened(defaults()).get(name)
    parameter = inspect.signature(find_target(target)).parameters.get(option)
    default = None if parameter is None or parameter.default is parameter.empty else parameter.default
    return list(default) if isinstance(default, tuple) else default
