"""One training run: its folder, its trainer, how it is continued, and what it leaves."""

import contextlib
import logging
import shutil
import time
import warnings
from dataclasses import dataclass, field
from pathlib import Path

import torch
from omegaconf import DictConfig
from pytorch_lightning.callbacks import Callback, ModelCheckpoint, ProgressBar, WeightAveraging
from pytorch_lightning.loggers import Logger
from pytorch_lightning.strategies import DDPStrategy, SingleDeviceStrategy
from pytorch_lightning.strategies.launchers import _MultiProcessingLauncher
from pytorch_lightning.utilities import rank_zero_only
from torch.utils.data import default_collate

from latentcast.cli import UserError, computes_bfloat16, prepare_run_dir
from latentcast.command import command_line
from latentcast.config import instantiate, to_container
from latentcast.data.base import ShownClips
from latentcast.data.datamodules import VideoDataModule
from latentcast.files import locked, printable, told, write_text
from latentcast.yaml_text import dump

from . import slurm
from .callbacks import (
    LastCheckpoint,
    LogInterval,
    StepSeed,
    Throughput,
    ValidationInterval,
    WeightAverage,
    finishing_steps,
)
from .checkpoints import DamagedCheckpoint, WholeFileIO, check_checkpoint, replacing_folder
from .compiling import compile_model
from .console import Console
from .loggers import CSVMetrics, TrackerLogger, open_logger, plot_curves
from .metrics_file import read_metrics
from .sharding import FullyShardedStrategy, check_sharded
from .trackers import Tracker, open_tracker

logger = logging.getLogger("latentcast")

LEFT = ("*.ckpt", "config.json", "model_index.json", "step_*", ".*.tmp")  # what trainings leave in their folders


@dataclass
class TrainingRun:
    """Where a stage ("tokenizer", "prior", or "joint" for both together) of an experiment trains.

    ``run_dir`` gets ``{stage}_training/`` with ``last.ckpt``, the one before it and ``best.ckpt``,
    ``metrics/{stage}.csv`` and its curves, ``previews/{stage}/``, and in the end ``{stage}/``, the model (of "joint":
    the pipeline) as ``save_pretrained`` writes it.
    """

    config: DictConfig
    stage: str
    run_dir: Path
    tracker: Tracker | None = field(default=None, init=False)  # of W&B or trackio, from ``fit`` on

    @classmethod
    @contextlib.contextmanager
    def open(cls, config, stage):
        """Prepare ``run_dir``, refuse to start over what is there already, and keep other runs out inside the block.

        Raises:
            UserError: not writable, a group or setting that training cannot do without, or there is a run and neither
                ``resume`` nor ``overwrite`` says what to do.
            InUseError: another run trains there.
        """
        if config.final_weights not in ("last", "best"):
            raise UserError(f"final_weights: expected last or best, found {config.final_weights!r}")
        if not 0 <= config.ema_decay < 1:
            raise UserError(f"ema_decay: expected at least 0 and below 1, found {config.ema_decay}")
        if config.least_steps_between_val < 0:
            raise UserError(f"least_steps_between_val: expected at least 0, found {config.least_steps_between_val}")
        for group in ("prior" if stage == "joint" else stage, "data", "trainer"):
            if config[group] is None:
                raise UserError(f"{group}: the experiment names none; choose one by {group}=NAME")
        check_trainer(config.trainer)
        if is_sharded(config):
            check_sharded(config)
        open_tracker(config, config.run_dir, stage)  # refuses an unknown one
        run = cls(config, stage, prepare_run_dir(config.run_dir))
        with locked(run.run_dir, f"training ({stage})"):
            run.check_replaced()
            # The other ranks start later and must not judge by what rank 0 has written meanwhile.
            if rank_zero_only.rank == 0 and not (config.resume or config.overwrite):
                for found in (run.last, run.model_dir):
                    if found.exists():
                        raise UserError(
                            f"run_dir {run.run_dir}: it holds {found.relative_to(run.run_dir)} of an earlier training; "
                            "resume=true continues it, overwrite=true starts over, run_dir=... keeps it"
                        )
            try:
                yield run
            except BaseException:
                run.close(1)
                raise
            run.close()

    @rank_zero_only
    def close(self, exit_code=0):
        """End the run of W&B or trackio, which takes what is saved after ``fit`` as well."""
        if self.tracker is not None:
            self.tracker.close(exit_code)

    def check_replaced(self):
        """Refuse a ``run_dir``, which a stranger's config may name, in which others' files would be replaced."""
        for folder in (self.training_dir, self.model_dir, self.preview_dir, self.run_dir / "pipeline"):
            ours = (found for kind in LEFT for found in folder.glob(kind))
            if folder.is_dir() and any(folder.iterdir()) and not any(ours):
                raise UserError(
                    f"{folder}: expected nothing, or what an earlier training left, for this one is to replace it; "
                    "found other files: choose another run_dir"
                )

    @property
    def training_dir(self):
        return self.run_dir / f"{self.stage}_training"

    @property
    def last(self):
        return self.training_dir / "last.ckpt"

    @property
    def previous(self):
        return self.training_dir / "previous.ckpt"

    @property
    def checkpoint(self):
        """The checkpoint that this run continues, or None."""
        there = [path for path in (self.last, self.previous) if path.exists()]  # a folder takes two steps to replace
        return there[0] if self.config.resume and there else None

    def _resumed(self, module, datamodule):
        """-> the checkpoint that this run continues and its step: the last one, the one before where that is damaged,
        or None and 0."""
        checkpoint, averaging = self.checkpoint, self.config.ema_decay > 0
        if checkpoint is None:
            if self.config.resume:
                logger.info("%s: nothing to resume, starting at step 0", self.last)
            return None, 0
        try:
            step = check_checkpoint(checkpoint, module, averaging, datamodule, is_sharded(self.config))
        except DamagedCheckpoint as error:
            if checkpoint == self.previous or not self.previous.exists():
                raise
            logger.warning("%s; the one before it is taken", error)
            checkpoint = self.previous
            step = check_checkpoint(checkpoint, module, averaging, datamodule, is_sharded(self.config))
        logger.info("resuming from step %d (%s)", step, checkpoint)
        return checkpoint, step

    @property
    def best(self):
        return self.training_dir / "best.ckpt"

    @property
    def model_dir(self):
        return self.run_dir / self.stage

    @property
    def preview_dir(self):
        return self.run_dir / "previews" / self.stage

    def fit(self, module, datamodule, callbacks=(), inputs=()):
        """Train ``module``, or go on training it, and give it the weights to keep.

        Args:
            module: a TrainingModule.
            datamodule: a LightningDataModule.
            callbacks: those that only this stage needs.
            inputs: what it goes on from, see ``Tracker.uses``: (kind, folder).
        Returns:
            dict of ``steps``, ``val`` (name -> figure of the final weights) and ``seconds``.
        Raises:
            ValueError: the checkpoint is damaged or does not fit the config, or the model does not take the clips.
            UserError: a Trainer that cannot train here.
            FloatingPointError: a loss that is not finite.
            KeyboardInterrupt: asked to stop; ``last.ckpt`` is written.
        """
        config, started = self.config, time.perf_counter()
        checkpoint, start_step = self._resumed(module, datamodule)
        curves = self.run_dir / "metrics" / f"{self.stage}.csv"
        logged = max((row[0] for row in read_metrics(curves)), default=0) if checkpoint and curves.is_file() else 0
        csv = CSVMetrics(curves)
        facts = {"parameters": module.n_parameters(), "trainable_parameters": module.n_parameters(trainable=True)}
        steps = {"resume": checkpoint is not None, "start_step": start_step, "last_step": logged}
        chosen = open_logger(config, self.stage, self.run_dir, facts, **steps)
        if isinstance(chosen, TrackerLogger):
            self.tracker = chosen.tracker
        average = WeightAverage(config.ema_decay) if config.ema_decay > 0 else None
        own = {name: _several(instantiate(config.trainer.get(name))) for name in ("logger", "callbacks", "plugins")}
        if any(isinstance(callback, WeightAveraging) for callback in own["callbacks"]):
            raise UserError("trainer.callbacks: ema_decay averages the weights already; found a second average")
        has_val = datamodule.val_set is not None and config.trainer.get("limit_val_batches") != 0
        keeps_best = has_val and config.trainer.get("enable_checkpointing") is not False
        start = Start(lambda: self._start(csv, start_step, inputs))
        own_bar = any(isinstance(callback, ProgressBar) for callback in own["callbacks"])
        console = Console(self.stage, not own_bar and config.trainer.get("enable_progress_bar") is not False)
        trainer = instantiate(
            config.trainer,
            precision=precision_here(config.trainer),
            **({"strategy": FullyShardedStrategy()} if is_sharded(config) else {}),
            logger=[csv, *_several(chosen), *(logger for logger in own["logger"] if isinstance(logger, Logger))],
            default_root_dir=str(self.run_dir),
            enable_checkpointing=keeps_best or None,
            enable_progress_bar=own_bar,
            enable_model_summary=bool(config.trainer.get("enable_model_summary")),
            plugins=[WholeFileIO(), *own["plugins"]],
            callbacks=[
                start,
                console,
                *([average] if average else []),
                StepSeed(config.seed),
                ValidationInterval(config.least_steps_between_val),
                LogInterval(),
                Throughput(),
                *callbacks,
                LastCheckpoint(self.last, self.previous, config.checkpoint_every_n_steps, checkpoint != self.previous),
                *([self._best_checkpoint()] if keeps_best else []),
                *own["callbacks"],
            ],
        )
        check_strategy(trainer)
        if checkpoint is None:
            try_out(module, datamodule)
        if config.compile:
            compile_model(module, datamodule, trainer, config.compile)
        for message in NOT_WORTH_SAYING:
            warnings.filterwarnings("ignore", message=message)
        try:
            with finishing_steps(trainer) as asked:
                trainer.fit(module, datamodule=datamodule, ckpt_path=checkpoint, weights_only=True)
            start()  # where a resumed run had no step left to do
            if average:
                average.apply(module)
            if config.final_weights == "best" and not self.best.exists():
                logger.warning("final_weights=best: nothing was validated in training; the last weights are kept")
            elif config.final_weights == "best":
                module.load_state_dict(load_checkpoint(trainer, self.best)["state_dict"])
            val = trainer.validate(module, datamodule=datamodule, verbose=False)[0] if has_val else {}
            module.make_whole()
        except SystemExit:  # how Lightning ends a run that was asked to stop
            if trainer.is_global_zero and self.last.exists():
                logger.info("%s holds step %d; resume=true goes on from there", self.last, trainer.global_step)
            if trainer.is_global_zero and slurm.SIGNAL in asked:
                if config.resume:
                    slurm.requeue()
                else:
                    logger.warning("SLURM: without resume=true the job would start over, and is not queued again")
            raise KeyboardInterrupt from None
        finally:
            named = to_container(config.preview.figures)
            if curves.is_file() and (named is None or f"training_{self.stage}" in named):
                try:
                    plot_curves(curves, curves.with_name(f"{self.stage}_curves.png"))
                except OSError as error:  # a picture; the trained model is still to be saved
                    logger.warning("%s", told(error, curves))
        return {
            "steps": trainer.global_step,
            "val": {name.removeprefix("val/"): value for name, value in val.items() if name != "step"},
            "seconds": round(time.perf_counter() - started, 1),
        }

    def save(self, model):
        """Write ``{stage}/`` as a whole."""
        with replacing_folder(self.model_dir) as folder:
            model.save_pretrained(folder)
        if self.tracker is not None:
            made = {kind: self.model_dir / kind for kind in ("tokenizer", "prior")}
            for kind, saved in (made if self.stage == "joint" else {self.stage: self.model_dir}).items():
                self.tracker.makes(kind, saved)

    def _best_checkpoint(self):
        return ModelCheckpoint(
            dirpath=self.training_dir,
            filename="best",
            monitor="val/loss",
            enable_version_counter=False,
            save_on_train_epoch_end=False,
        )

    @rank_zero_only
    def _start(self, csv, start_step, inputs):
        """Give up what an earlier run of this stage left, unless this one continues it, so that nothing of it is taken
        for this one's; ``config_{stage}.yaml`` are all settings of this training, itself an experiment file, and
        ``config.yaml`` those of the latest one; both begin with the command."""
        if self.checkpoint is None:
            for folder in (self.training_dir, self.model_dir, self.preview_dir):
                shutil.rmtree(folder, ignore_errors=True)
            self.training_dir.mkdir(parents=True)
        for leftover in self.training_dir.glob(".*.ckpt.*"):  # folders that a killed run was writing
            shutil.rmtree(leftover, ignore_errors=True)
        command = command_line()
        text = (f"# {printable(command)}\n" if command else "") + dump(to_container(self.config))
        for name in (f"config_{self.stage}.yaml", "config.yaml"):
            write_text(self.run_dir / name, text)
        csv.start(start_step)
        for kind, folder in inputs if self.tracker else ():
            self.tracker.uses(kind, folder)


class Start(Callback):
    """Calls ``function`` once, before the first step: what is wrong with a run shows before that, and must not cost an
    earlier one."""

    def __init__(self, function):
        self.function = function

    def __call__(self):
        function, self.function = self.function, None
        if function is not None:
            function()

    def on_train_start(self, trainer, pl_module):
        self()


NOT_WORTH_SAYING = (  # warnings of Lightning and torch
    "Checkpoint directory .* exists and is not empty",  # that is checked here
    r".*LeafSpec.* is deprecated",
    "Total length of `.*` across ranks is zero",  # no val split: said when the data is opened
    r"The '\w+_dataloader' does not have many workers",  # num_workers is a setting
    "The number of training batches .* is smaller than the logging interval",
    "Be aware that when using `ckpt_path`",  # what was added or left out between two runs is as it should be
)
NOT_OURS = {  # options of the Trainer that a training which is to leave a model cannot take
    "fast_dev_run": "trainer.max_steps=1 with another run_dir tries everything out",
    "barebones": "it logs nothing and has no callbacks, which keep checkpoints and metrics",
    "default_root_dir": "run_dir says where everything goes",
}
NOT_ZERO = ("max_steps", "max_epochs", "limit_train_batches", "accumulate_grad_batches", "check_val_every_n_epoch")


def check_trainer(options):
    """Refuse options of the Trainer that cannot be honoured, by name, before anything is built."""
    for name, reason in NOT_OURS.items():
        if options.get(name):
            raise UserError(f"trainer.{name}: not with the tools; {reason}")
    for name in NOT_ZERO:
        if options.get(name) == 0:
            raise UserError(f"trainer.{name}: expected anything but 0")


def precision_here(options):
    """``precision`` of the Trainer's options; "auto" is bf16-mixed where the hardware computes so, else fp32."""
    precision = options.get("precision", "32-true")
    if precision != "auto":
        return precision
    on_gpu = torch.cuda.is_available() and options.get("accelerator", "auto") in ("auto", "gpu", "cuda")
    return "bf16-mixed" if computes_bfloat16("cuda" if on_gpu else "cpu") else "32-true"


def is_sharded(config):
    """Whether the processes of a training share its weights."""
    return config.trainer.get("strategy") == "fsdp"


def load_checkpoint(trainer, path):
    """A checkpoint of this very training, with tensors as its module takes them."""
    if path.is_dir():
        return trainer.strategy.load_checkpoint(path)
    return torch.load(path, map_location="cpu", weights_only=True)


def check_strategy(trainer):
    """Refuse strategies that leave the trained weights elsewhere: in processes that end, or in pieces that are not
    put together."""
    strategy = trainer.strategy
    known = isinstance(strategy, (SingleDeviceStrategy, DDPStrategy, FullyShardedStrategy))
    if (
        not known
        or type(strategy).__name__ == "DeepSpeedStrategy"
        or isinstance(strategy.launcher, _MultiProcessingLauncher)
    ):
        found = getattr(strategy, "_start_method", None)
        name = type(strategy).__name__ + (f" by {found}" if found else "")
        raise UserError(f"trainer.strategy: expected auto, ddp or fsdp, found {name}")


def _several(found):
    """A config's value that may be one thing, a list, or nothing -> list."""
    return [] if found is None else found if isinstance(found, list) else [found]


@torch.no_grad()
def try_out(module, datamodule):
    """Make sure that model and data fit, with one clip of the train split, better than Lightning's errors say it;
    changes nothing in the model."""
    was_training = module.training
    module.eval()
    module.compute(default_collate([datamodule.train_set[0]]))
    module.train(was_training)


def open_videos(config):
    """An experiment's VideoDataModule."""
    return VideoDataModule(instantiate(config.data), **loading(config))


def loading(config):
    """The settings that all data modules take."""
    return {name: config[name] for name in ("batch_size", "num_workers", "seed", "read_timeout", "shuffle_buffer")}


def preview_clips(data, n_clips):
    """Clips to show -> ShownClips: of the val split, of the train split where there is no val, and of as many videos as
    can be."""
    if n_clips < 1:
        raise UserError(f"preview.n_clips: expected at least 1, found {n_clips}")
    train, val = data.train_set, data.val_set  # opened, and so told of, in this order
    return ShownClips.of(val or train, n_clips, trained_on=val is None)
