"""One training run: its folder, its trainer, how it is continued, and what it leaves."""

import contextlib
import logging
import os
import pickle
import shutil
import time
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
from omegaconf import DictConfig
from pytorch_lightning.callbacks import LearningRateMonitor, ModelCheckpoint
from pytorch_lightning.utilities import rank_zero_only
from torch.utils.data import default_collate

from latentcast.cli import UserError, prepare_run_dir
from latentcast.config import instantiate, to_container
from latentcast.yaml_text import dump

from .callbacks import (
    FinishStepOnInterrupt,
    LastCheckpoint,
    StepSeed,
    Throughput,
    ValidationInterval,
    WeightAverage,
)
from .loggers import CSVMetrics, WandbRun, plot_curves, read_metrics

logger = logging.getLogger("latentcast")


@dataclass
class TrainingRun:
    """Where a stage ("tokenizer", "prior", or "joint" for both together) of an experiment trains.

    ``run_dir`` gets ``{stage}_training/`` with ``last.ckpt`` and ``best.ckpt``, ``metrics/{stage}.csv`` and its curves,
    ``previews/{stage}/``, and in the end ``{stage}/``, the model (of "joint": the pipeline) as ``save_pretrained``
    writes it.
    """

    config: DictConfig
    stage: str
    run_dir: Path

    @classmethod
    def open(cls, config, stage):
        """Prepare ``run_dir`` and refuse to start over what is there already.

        Raises:
            UserError: not writable, a group or setting that training cannot do without, or there is a run and neither
                ``resume`` nor ``overwrite`` says what to do.
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
        run = cls(config, stage, prepare_run_dir(config.run_dir))
        # The other ranks start later and must not judge by what rank 0 has written meanwhile.
        if rank_zero_only.rank == 0 and not (config.resume or config.overwrite):
            for found in (run.last, run.model_dir):
                if found.exists():
                    raise UserError(
                        f"run_dir {run.run_dir}: it holds {found.relative_to(run.run_dir)} of an earlier training; "
                        "resume=true continues it, overwrite=true starts over, run_dir=... keeps it"
                    )
        return run

    @property
    def training_dir(self):
        return self.run_dir / f"{self.stage}_training"

    @property
    def last(self):
        return self.training_dir / "last.ckpt"

    @property
    def checkpoint(self):
        """The checkpoint that this run continues, or None."""
        return self.last if self.config.resume and self.last.exists() else None

    @property
    def best(self):
        return self.training_dir / "best.ckpt"

    @property
    def model_dir(self):
        return self.run_dir / self.stage

    @property
    def preview_dir(self):
        return self.run_dir / "previews" / self.stage

    def fit(self, module, datamodule, callbacks=()):
        """Train ``module``, or go on training it, and give it the weights to keep.

        Args:
            module: a TrainingModule.
            datamodule: a LightningDataModule.
            callbacks: those that only this stage needs.
        Returns:
            dict of ``steps``, ``val`` (name -> figure of the final weights) and ``seconds``.
        Raises:
            ValueError: the checkpoint is damaged or does not fit the config, or the model does not take the clips.
            FloatingPointError: a loss that is not finite.
            KeyboardInterrupt: asked to stop; ``last.ckpt`` is written.
        """
        config, started = self.config, time.perf_counter()
        checkpoint = self.checkpoint
        if checkpoint is not None:
            start_step = check_checkpoint(checkpoint, module, config.ema_decay > 0) - 1
            logger.info("resuming from step %d (%s)", start_step + 1, checkpoint)
        else:
            start_step = -1
            if config.resume:
                logger.info("%s: nothing to resume, starting at step 0", self.last)
        curves = self.run_dir / "metrics" / f"{self.stage}.csv"
        logged = max((row[0] for row in read_metrics(curves)), default=-1) if checkpoint and curves.is_file() else -1
        csv = CSVMetrics(curves)
        wandb = WandbRun(
            self.run_dir, self.stage, to_container(config.wandb), config.name, checkpoint is not None, logged
        )
        average = WeightAverage(config.ema_decay) if config.ema_decay > 0 else None
        has_val = datamodule.val_set is not None and config.trainer.get("limit_val_batches") != 0
        trainer = instantiate(
            config.trainer,
            logger=[csv, wandb, *self._more("logger")],
            default_root_dir=str(self.run_dir),
            enable_checkpointing=has_val,
            callbacks=[
                *([average] if average else []),
                StepSeed(config.seed),
                ValidationInterval(config.least_steps_between_val),
                Throughput(),
                LearningRateMonitor("step"),
                *callbacks,
                LastCheckpoint(self.last, config.checkpoint_every_n_steps),
                FinishStepOnInterrupt(),
                *([self._best_checkpoint()] if has_val else []),
                *self._more("callbacks"),
            ],
        )
        if checkpoint is None:
            try_out(module, datamodule)  # before an earlier training is given up for this one
            self._clear()
        self._save_config()
        csv.start(start_step)
        # Lightning's warning about a checkpoint folder that is not empty: here it is checked above.
        warnings.filterwarnings("ignore", message="Checkpoint directory .* exists and is not empty")
        try:
            trainer.fit(module, datamodule=datamodule, ckpt_path=checkpoint, weights_only=True)
            if average:
                average.apply(module)
            if config.final_weights == "best" and not self.best.exists():
                logger.warning("final_weights=best: nothing was validated in training; the last weights are kept")
            elif config.final_weights == "best":
                module.load_state_dict(torch.load(self.best, map_location="cpu", weights_only=True)["state_dict"])
            val = trainer.validate(module, datamodule=datamodule, verbose=False)[0] if has_val else {}
        except SystemExit:  # how Lightning ends a run that was asked to stop
            raise KeyboardInterrupt from None
        finally:
            wandb.close()
            plot_curves(curves, curves.with_name(f"{self.stage}_curves.png"))
        return {
            "steps": trainer.global_step,
            "val": {name.removeprefix("val/"): value for name, value in val.items() if name != "step"},
            "seconds": round(time.perf_counter() - started, 1),
        }

    def save(self, model):
        """Write ``{stage}/`` as a whole."""
        with replacing_folder(self.model_dir) as folder:
            model.save_pretrained(folder)

    def _more(self, name):
        """What the config adds to the trainer's ``callbacks`` or ``logger``."""
        found = instantiate(self.config.trainer.get(name))
        return [] if found is None else found if isinstance(found, list) else [found]

    def _best_checkpoint(self):
        return ModelCheckpoint(
            dirpath=self.training_dir,
            filename="best",
            monitor="val/loss",
            enable_version_counter=False,
            save_on_train_epoch_end=False,
        )

    @rank_zero_only
    def _clear(self):
        """Remove what an earlier run of this stage left, so that nothing of it is taken for this one's."""
        for folder in (self.training_dir, self.model_dir, self.preview_dir):
            shutil.rmtree(folder, ignore_errors=True)
        self.training_dir.mkdir(parents=True)

    @rank_zero_only
    def _save_config(self):
        """``config_{stage}.yaml``, all settings of this training, itself an experiment file; ``config.yaml`` is that
        of the latest one."""
        for name in (f"config_{self.stage}.yaml", "config.yaml"):
            (self.run_dir / name).write_text(dump(to_container(self.config)))


def check_checkpoint(path, module, averaging):
    """Make sure that a checkpoint can be resumed -> its step.

    Args:
        path: a checkpoint that Lightning wrote.
        module: the TrainingModule that is to go on.
        averaging: whether this run averages the weights.
    Raises:
        ValueError: damaged, of another model, or written with the moving average switched the other way.
    """
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        found, step = checkpoint["state_dict"], checkpoint["global_step"]
    except (OSError, EOFError, RuntimeError, KeyError, TypeError, pickle.UnpicklingError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(f"checkpoint {path}: damaged, cannot be resumed ({reason[:100]})") from None
    expected = module.state_dict()
    for name in sorted(expected.keys() | found.keys()):
        sides = [tuple(side[name].shape) if name in side else "nothing" for side in (found, expected)]
        if sides[0] != sides[1]:
            raise ValueError(
                f"checkpoint {path}: of another model than the config's: {name} is {sides[0]} in the checkpoint, "
                f"{sides[1]} in the config"
            )
    if ("averaging_state" in checkpoint) != averaging:
        side = "without" if averaging else "with"
        raise ValueError(f"checkpoint {path}: it was trained {side} a moving average (ema_decay); keep it so to resume")
    return step


@torch.no_grad()
def try_out(module, datamodule):
    """Make sure that model and data fit, with one clip of the train split; changes nothing in the model."""
    was_training = module.training
    module.eval()
    module.compute(default_collate([datamodule.train_set[0]]))
    module.train(was_training)


def preview_clips(data, n_clips):
    """The first clips of the val split (of the train split, where there is no val) -> ((N, T, C, H, W), their fps)."""
    if n_clips < 1:
        raise UserError(f"preview.n_clips: expected at least 1, found {n_clips}")
    dataset = data.val_set or data.train_set
    return torch.stack([dataset[index]["frames"] for index in range(min(n_clips, len(dataset)))]), dataset.fps


@contextlib.contextmanager
def replacing_folder(folder):
    """A temporary folder that takes the place of ``folder`` when the block ends well."""
    folder = Path(folder)
    temporary, old = (folder.with_name(f".{folder.name}.{os.getpid()}.{kind}") for kind in ("tmp", "old"))
    try:
        yield temporary
        if folder.exists():
            os.rename(folder, old)
        os.rename(temporary, folder)
    except BaseException:
        if old.exists() and not folder.exists():
            os.rename(old, folder)
        raise
    finally:
        for leftover in (temporary, old):
            shutil.rmtree(leftover, ignore_errors=True)
