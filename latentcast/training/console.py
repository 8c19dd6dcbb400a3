"""What a training says on stderr: what runs, in one line, and how far the whole run is, by a bar or a line at times."""

import logging
import math
import time

import torch
from pytorch_lightning.callbacks import Callback, Timer
from pytorch_lightning.trainer.states import RunningStage

from latentcast.progress import EVERY, Bar

logger = logging.getLogger("latentcast")

REFRESH = 0.5  # seconds between looks at the loss, for which a GPU is waited
WARM = 3.0  # seconds after the first step, which is slow, from which on an end is foretold
SETTLED = 60.0  # seconds after which it is right
LONG = 3600.0  # seconds: runs longer than that are announced


class Console(Callback):
    """Shows what runs, how far it is, and when it ends, counted in steps of the whole run.

    Args:
        stage: what is trained: "tokenizer", "prior" or "joint".
        show: False says only what runs.
    """

    def __init__(self, stage, show=True):
        self.stage, self.show = stage, show
        self.bar = self.validation = None
        self.loss, self.ended = float("nan"), False

    def on_train_start(self, trainer, pl_module):
        if not trainer.is_global_zero:
            self.show = False
            return
        steps = trainer.estimated_stepping_batches
        self.total = int(steps) if math.isfinite(steps) else None
        self.timer = next((callback for callback in trainer.callbacks if isinstance(callback, Timer)), None)
        self.first, self.began, self.looked, self.announced = trainer.global_step, time.monotonic(), 0.0, False
        self.warm = None  # step and time when the first one of this run has been made
        logger.info("%s", self.describe(trainer, pl_module))
        if self.show:
            count = "{n_fmt} of {total_fmt} steps" if self.total else "{n_fmt} steps"
            self.bar = Bar(
                desc=self.stage,
                total=self.total,
                initial=self.first,
                bar_format=f"{{desc}}: {{percentage:3.0f}}%|{{bar}}| {count}{{postfix}}",
                plain_format=f"{{desc}}: {count}{' ({percentage:.0f}%)' * bool(self.total)}{{postfix}}",
            )

    def describe(self, trainer, pl_module):
        """One line: model, parameters, steps, device, data."""
        n_parameters = pl_module.n_parameters(trainable=True)
        data, device = trainer.datamodule, trainer.strategy.root_device
        steps = "steps without end" if self.total is None else f"{self.total} steps"
        if self.first:
            steps = f"{steps}, from step {self.first} on,"
        where = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
        where = f"{trainer.world_size} x {where}" if trainer.world_size > 1 else where
        splits = [f"{len(data.train_set.videos)} videos to train on"]
        splits += [f"{len(data.val_set.videos)} to validate"] if data.val_set is not None else []
        until = f", {duration(self.timer.time_remaining())} at most" if self.timer else ""
        return (
            f"{self.stage}: {type(pl_module.model).__name__}, {count(n_parameters)} parameters; {steps} of "
            f"{data.batch_size * trainer.accumulate_grad_batches * trainer.world_size} clips{until}; on {where} "
            f"({trainer.precision}); {type(data.train_set).__name__}, {', '.join(splits)}"
        )

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if self.bar is None:
            return
        now, step = time.monotonic(), trainer.global_step
        if self.warm is None and step > self.first:
            self.warm = step, now
        if now - self.looked >= (EVERY if self.bar.plain else REFRESH):
            self.looked = now
            self.loss = outputs["loss"].item()
            self.say(step, now)
        self.bar.update(step - self.bar.n)

    def say(self, step, now):
        """Put loss, pace and what is to go behind the count; announce once a run that will take long."""
        parts, seconds = [f"loss {self.loss:.4g}"], now - self.began
        to_go, pace = self.to_go(step, now), self.pace(step, now)
        if self.ended:
            parts.append(f"{duration(seconds)} in all")
            pace = pace or seconds / (step - self.first)
        elif to_go is not None:
            parts.append(f"{duration(to_go)} to go")
        if pace:
            parts.append(f"{1 / pace:.3g} steps/s" if pace <= 1 else f"{pace:.3g} s/step")
        self.bar.set_postfix_str(", ".join(parts), refresh=False)
        if to_go is not None and seconds >= SETTLED and not self.announced:
            self.announced = True
            if to_go >= LONG and not self.timer:
                logger.info(
                    "%s: at this pace %d steps take %s more; trainer.max_time=DD:HH:MM:SS or a lower trainer.max_steps "
                    "end it earlier, ctrl-C with resume=true continues it later, and steps of a smaller network "
                    "(%s.KEY=VALUE) or batch_size take less time",
                    *(self.stage, self.total - step, duration(to_go), "prior" if self.stage == "joint" else self.stage),
                )

    def pace(self, step, now):
        """Seconds a step, validations and pictures counted as they were so far; the first step, in which much is done
        once, is left out. None: not known yet."""
        if self.warm is None or step <= self.warm[0] or now - self.warm[1] < WARM:
            return None
        return (now - self.warm[1]) / (step - self.warm[0])

    def to_go(self, step, now):
        """Seconds to the end of the run; None: not known."""
        found, pace = [self.timer.time_remaining()] if self.timer else [], self.pace(step, now)
        if self.total and pace is not None:
            found.append(pace * (self.total - step))
        return min(found, default=None)

    def on_validation_start(self, trainer, pl_module):
        if not self.show or not trainer.is_global_zero:
            return
        if self.bar is not None:
            self.bar.set_description_str(f"{self.stage}, validating", refresh=not self.bar.plain)
        elif trainer.state.stage is RunningStage.VALIDATING:
            n_batches = sum(trainer.num_val_batches)
            self.validation = Bar(desc=f"{self.stage}, final validation", total=n_batches, unit="step")

    def on_validation_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0):
        if self.validation is not None:
            self.validation.update(1)

    def on_validation_end(self, trainer, pl_module):
        if self.validation is not None:
            self.validation.close()
            self.validation = None
        elif self.bar is not None:
            self.bar.set_description_str(self.stage, refresh=not self.bar.plain)

    def on_train_end(self, trainer, pl_module):
        if self.bar is not None and trainer.global_step > self.first:
            self.ended = True
            self.say(trainer.global_step, time.monotonic())
        self._close()
        if trainer.is_global_zero and self.timer and self.timer.time_remaining() <= 0:
            logger.info(
                "%s: trainer.max_time is over at step %d; resume=true goes on from there",
                self.stage,
                trainer.global_step,
            )

    def on_exception(self, trainer, pl_module, exception):
        self._close()

    def _close(self):
        if self.bar is not None:
            self.bar.close()
            self.bar = None


def count(n):
    """1234567 -> "1.23M"."""
    for unit, size in (("M", 1_000_000), ("k", 1000)):
        if n >= size:
            return f"{n / size:.3g}{unit}"
    return str(n)


def duration(seconds):
    """Seconds as one reads them: 45 s, 12 min, 3.4 h."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
