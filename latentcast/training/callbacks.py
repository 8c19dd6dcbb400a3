"""What happens around the training steps: one job a callback."""

import contextlib
import logging
import math
import os
import signal
import threading
import time
from pathlib import Path

import numpy as np
import torch
from pytorch_lightning.callbacks import Callback, Timer, WeightAveraging
from pytorch_lightning.utilities.exceptions import SIGTERMException
from torch.optim.swa_utils import AveragedModel

from latentcast import inspection
from latentcast.config import one_line
from latentcast.data.loading import WorkerError, waits_for
from latentcast.data.video.writer import write_drawing
from latentcast.distributed import all_reduced, rank_and_world
from latentcast.metrics.codebook import CodebookUsage
from latentcast.metrics.ensemble import ilpips

from . import slurm
from .checkpoints import keep_previous
from .loggers import MediaLogger
from .sharding import local

logger = logging.getLogger("latentcast")

LOW_USAGE = 0.1  # fraction of a codebook below which a warning names it


class WeightAverage(WeightAveraging):
    """Exponential moving average of the weights, which validation, previews and the saved model use.

    Codebooks and other floating-point buffers of the state dict are averaged like the weights: a codebook then lags
    behind exactly as its encoder does.

    Args:
        decay: the decay rises to it as (1 + n) / (10 + n) over the updates n, so that a short run is not dominated by
            its random start.
    """

    _validating = False  # the module has the averaged weights

    def __init__(self, decay):
        super().__init__()
        self.decay = decay

    def setup(self, trainer, pl_module, stage):
        if stage == "fit":
            mesh = getattr(trainer.strategy, "device_mesh", None)
            if mesh is not None:
                pl_module._device_mesh = None  # groups of processes cannot be copied
            # The module itself moves to its device only after this.
            self._average_model = _Average(pl_module, self.decay, trainer.strategy.root_device)
            if mesh is not None:
                pl_module._device_mesh = mesh
                pl_module.shard(self._average_model.module, mesh)

    def on_validation_epoch_start(self, trainer, pl_module):
        super().on_validation_epoch_start(trainer, pl_module)
        self._validating = self._average_model is not None

    def on_validation_epoch_end(self, trainer, pl_module):
        self._give_back(pl_module)

    def on_exception(self, trainer, pl_module, exception):
        """A validation that is broken off has no end, and what is saved now must hold each side in its place."""
        self._give_back(pl_module)

    def _give_back(self, pl_module):
        if self._validating:
            self._validating = False
            self._swap_models(pl_module)

    def on_train_end(self, trainer, pl_module):
        """Nothing yet: the last checkpoint must hold the weights that training goes on with. See ``apply``."""

    def apply(self, pl_module):
        """Make the average the module's weights, for good."""
        self._copy_average_to_current(pl_module)
        self._average_model = None

    @contextlib.contextmanager
    def averaged(self, pl_module):
        """The module has the averaged weights inside the block."""
        self._swap_models(pl_module)
        try:
            yield
        finally:
            self._swap_models(pl_module)


class _Average(AveragedModel):
    # torch's own update averages every buffer, and a mask of minus infinities would become NaN.
    def __init__(self, model, decay, device):
        super().__init__(model, device)
        self.decay = decay
        saved = model.state_dict().keys()  # buffers that are not are constants
        self._averaged_buffers = [name for name, _ in model.named_buffers() if name in saved]
        self.n_averaged = torch.zeros((), dtype=torch.long)  # the host counts, and need not ask a GPU

    @torch.no_grad()
    def update_parameters(self, model):
        n = int(self.n_averaged)
        averages, currents = [], []
        for average, current in zip(self._state(self.module), self._state(model)):
            if average.is_floating_point():
                averages.append(local(average))
                currents.append(local(current).to(average.dtype))  # weights may be half, the average is not
            else:
                average.copy_(current)
        torch._foreach_lerp_(averages, currents, 1 - min(self.decay, (1 + n) / (10 + n)))
        self.n_averaged += 1

    def _state(self, module):
        yield from (parameter.data for parameter in module.parameters())
        yield from map(module.get_buffer, self._averaged_buffers)


def find_average(trainer):
    """The run's WeightAverage, or None."""
    return next((callback for callback in trainer.callbacks if isinstance(callback, WeightAverage)), None)


class StepSeed(Callback):
    """Makes the randomness of a training step depend on the seed, the rank and the step alone, and that of a batch of
    validation on the seed, the rank and the batch's number.

    A resumed run then continues exactly like one that was never stopped, how often pictures are made does not change
    the training, and validations compare.
    """

    def __init__(self, seed):
        self.seed = seed

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        epoch_loop = trainer.fit_loop.epoch_loop
        self._draw_from(trainer.global_rank, epoch_loop.total_batch_idx)
        # What Lightning logs a step as; its own count is off by one after some restarts.
        epoch_loop._batches_that_stepped = trainer.global_step

    def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
        self._draw_from(trainer.global_rank, batch_idx, 1)  # another length: none of the training's seeds

    def _draw_from(self, *entropy):
        torch.manual_seed(int(np.random.SeedSequence([self.seed, *entropy]).generate_state(1, np.uint64)[0]))


class LastCheckpoint(Callback):
    """Writes ``path`` every so many steps, at the end, and when the run is asked to stop (SIGTERM, ctrl-C).

    A step is saved when all that comes with it is done, its figures logged, its validation and pictures made: that is
    when the next batch is there, which a resumed run reads again. Whatever ends a run, the metrics file then holds
    every row up to the checkpoint. A validation that a stop breaks off is made again by the resumed run. The file is
    replaced as a whole, so a ``kill -9`` leaves the one before; and that stays as ``previous``. An error leaves it as
    it is, but for that of a loader in a process alone: of several ranks one has it, and the others, who take part in
    saving, wait for its gradients.
    """

    def __init__(self, path, previous, every_n_steps, keeps=True):
        self.path, self.previous = Path(path), Path(previous)
        self._keeps = keeps  # False: what is there is damaged, and does not become the previous one
        self.every_n_steps = every_n_steps
        self._saved = None  # step, and whether its validation is to be made again; None until training starts
        self._broken_off = False  # the validation of the step that is saved
        self._resumed_broken_off = False

    def state_dict(self):
        return {"broken_off": self._broken_off}

    def load_state_dict(self, state):
        self._resumed_broken_off = state["broken_off"]

    def on_train_start(self, trainer, pl_module):
        self._saved = trainer.global_step, self._resumed_broken_off

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if self.every_n_steps and trainer.global_step % self.every_n_steps == 0:
            self._save(trainer)

    def on_train_end(self, trainer, pl_module):
        self._save(trainer)

    def on_exception(self, trainer, pl_module, exception):
        alone = isinstance(exception, WorkerError) and trainer.world_size == 1
        if isinstance(exception, SIGTERMException) or alone:  # no step is at hand
            self._broken_off = trainer.validating
            self._save(trainer)

    def _save(self, trainer):
        state = trainer.global_step, self._broken_off
        if self._saved not in (None, state):
            if trainer.is_global_zero and self._keeps:
                keep_previous(self.path, self.previous)
            trainer.save_checkpoint(self.path, False)  # False: not the weights alone
            self._saved, self._keeps = state, True

    def on_load_checkpoint(self, trainer, pl_module, checkpoint):
        """Forget how long earlier runs took: ``trainer.max_time`` is of this one."""
        checkpoint["callbacks"].pop(Timer.__qualname__, None)

    def on_save_checkpoint(self, trainer, pl_module, checkpoint):
        """Keep what the data is, and make Lightning's counters those of the end of a step."""
        checkpoint["data"] = trainer.datamodule.describe()
        loops = checkpoint["loops"]["fit_loop"]
        batches = loops["epoch_loop.batch_progress"]
        if batches["current"]["ready"] > batches["current"]["started"]:
            batches["is_last_batch"] = False
            for count in (batches["current"], batches["total"]):
                count["ready"] -= 1
            for loader in loops["state_dict"].get("combined_loader", ()):
                loader["n_clips"] -= loader["batch_clips"]
        epoch = loops["epoch_progress"]["current"]
        if batches["is_last_batch"] and epoch["completed"] == epoch["ready"]:
            # The next step is the first of an epoch; Lightning would make it one by itself.
            batches["is_last_batch"] = False
            batches["current"] = dict.fromkeys(batches["current"], 0)
        # By these numbers a restart knows whether the step's validation is still to be made.
        begun = int(self._broken_off)
        for count in ("current", "total"):
            counts = {"ready": begun, "started": begun, "processed": 0, "completed": 0}
            loops["epoch_loop.val_loop.batch_progress"][count] = counts


@contextlib.contextmanager
def finishing_steps(trainer):
    """In the block the first ctrl-C ends ``trainer``'s run after the step at hand, like SIGTERM and SLURM's signal; the
    second ctrl-C at once. A run that waits for data ends at once too: no step is at hand, and the data may never come.

    Yields:
        the set of the signals, of ctrl-C and of SLURM, that have come by now.
    """
    asked = set()
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return

    def terminate(signum, frame):
        # Lightning puts its own handler, which only takes a note, before this one. Of several ranks all must go on.
        if not trainer.received_sigterm or (waits_for() and trainer.world_size == 1):
            raise SIGTERMException

    def interrupt(signum, frame):
        if signum in asked:
            raise KeyboardInterrupt
        asked.add(signum)
        logger.warning("interrupted: finishing this step and saving it; press ctrl-C again to stop at once")
        os.kill(os.getpid(), signal.SIGTERM)

    def end_soon(signum, frame):
        if signum not in asked:
            asked.add(signum)
            logger.warning("SLURM: the time is nearly up; finishing this step and saving it")
            os.kill(os.getpid(), signal.SIGTERM)

    handlers = {signal.SIGINT: interrupt, signal.SIGTERM: terminate}
    if slurm.job() and slurm.SIGNAL:
        handlers[slurm.SIGNAL] = end_soon
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class ValidationInterval(Callback):
    """Validates after every n-th epoch where epochs are short, and within them where they are long.

    An epoch over few videos takes less time than a validation; one over many can be longer than the whole run, which
    validates ten times at least. A Trainer that is told how often to validate keeps to that.

    Args:
        least_steps: n is the smallest number of epochs that have so many steps, or a tenth of the run's if that is
            less.
    """

    def __init__(self, least_steps):
        self.least_steps = least_steps

    def on_train_start(self, trainer, pl_module):
        n_batches = trainer.num_training_batches  # of an epoch
        if trainer.check_val_every_n_epoch != 1 or trainer.val_check_batch != n_batches:
            return
        steps = trainer.estimated_stepping_batches
        tenth = steps // 10 * trainer.accumulate_grad_batches if math.isfinite(steps) else math.inf
        if 1 <= tenth < n_batches:
            trainer.val_check_batch, trainer.check_val_every_n_epoch = tenth, None  # None: counted over epochs
        else:
            least = min(self.least_steps * trainer.accumulate_grad_batches, tenth)
            trainer.check_val_every_n_epoch = max(1, math.ceil(least / n_batches))


class LogInterval(Callback):
    """Makes a run that is too short to log its figures twice, by ``log_every_n_steps``, do it ten times."""

    def on_train_start(self, trainer, pl_module):
        steps = trainer.estimated_stepping_batches
        if trainer.log_every_n_steps > steps / 2:
            trainer.log_every_n_steps = max(1, int(steps) // 10)


class CodebookMonitor(Callback):
    """Logs usage, perplexity and dead fraction of every codebook, counted from 1 as the priors' bits are: in training
    over each epoch, or the short epochs that share a validation, and over each validation. A codebook that is hardly
    used is warned about when that begins.

    Args:
        codebook_sizes: as in ``latent_spec``.
    """

    def __init__(self, codebook_sizes):
        self._low = set()  # (split, number) of codebooks that are hardly used
        self.counts = self._counted = None  # see ``_keep``
        self.train, self.val = CodebookUsage(codebook_sizes), CodebookUsage(codebook_sizes)

    def state_dict(self):
        return {"counts": all_reduced(self.train.counts)}

    def load_state_dict(self, state):
        first = rank_and_world()[0] == 0  # what all ranks have seen counts once
        self.train.counts = state["counts"] if first else torch.zeros_like(state["counts"])
        self.train._update_count = int(state["counts"].any())  # it reports what it has seen before the stop as well

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.train.to(pl_module.device).update(outputs["codes"])

    def on_validation_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0):
        self.val.to(pl_module.device).update(outputs["codes"])

    def on_train_epoch_end(self, trainer, pl_module):
        if (trainer.current_epoch + 1) % (trainer.check_val_every_n_epoch or 1) == 0:
            self._report(trainer, pl_module, self.train, "train")

    def on_validation_epoch_end(self, trainer, pl_module):
        self._report(trainer, pl_module, self.val, "val")

    def _keep(self, metric, split):
        """``counts``: for each codebook how often its codes were chosen, (K,), in the latest validation; where there is
        none, in the latest epoch."""
        if split == "val" or self._counted != "val":
            counts, self._counted = all_reduced(metric.counts).cpu(), split
            self.counts = [row[:size].clone() for row, size in zip(counts, metric.codebook_sizes)]

    def _report(self, trainer, pl_module, metric, split):
        if not metric.update_called:
            return
        figures = {name: values.reshape(-1) for name, values in metric.compute().items()}
        self._keep(metric, split)
        metric.reset()
        for name, values in figures.items():
            numbered = {f"{split}/{name}_{number}": value for number, value in enumerate(values, start=1)}
            pl_module.log_dict(numbered, on_epoch=True, sync_dist=True)
        if trainer.sanity_checking or not trainer.is_global_zero:
            return
        for number, (usage, size) in enumerate(zip(figures["usage"].tolist(), metric.codebook_sizes), start=1):
            known = (split, number) in self._low
            (self._low.add if usage < LOW_USAGE else self._low.discard)((split, number))
            if usage < LOW_USAGE and not known:
                logger.warning(
                    "%s: codebook %d: only %.1f %% of its %d codes are used (%s, step %d)",
                    *(type(pl_module.model).__name__, number, 100 * usage, size),
                    *(split, trainer.global_step),
                )


class CollapseMonitor(Callback):
    """Warns of groups of latent variables that say nothing, posterior collapse, when a validation finds them first.

    Reads ``active_units_group_1`` ... from what the model logs, the numbers of a group whose KL is not almost zero;
    models without such groups are left alone.
    """

    prefix = "val/active_units_group_"

    def __init__(self):
        self._collapsed = set()

    def on_validation_end(self, trainer, pl_module):
        if trainer.sanity_checking or not trainer.is_global_zero:
            return
        for name, units in trainer.callback_metrics.items():
            if not name.startswith(self.prefix):
                continue
            known = name in self._collapsed
            (self._collapsed.add if units == 0 else self._collapsed.discard)(name)
            if units == 0 and not known:
                logger.warning(
                    "posterior collapse: no unit of latent group %s of %s is active, so it tells the decoder nothing "
                    "(step %d); a smaller beta may help",
                    *(name.removeprefix(self.prefix), type(pl_module.model).__name__, trainer.global_step),
                )


class Throughput(Callback):
    """Logs how much is trained on a second: clips, frames, and codes where a batch has them; and the share of the time
    in which training waited for a batch.

    The time that validation and previews take is left out."""

    def on_train_start(self, trainer, pl_module):
        self._step = trainer.global_step
        self._restart(trainer)

    def on_validation_end(self, trainer, pl_module):
        self._restart(trainer)

    def _restart(self, trainer):
        self._since, self._seen, self._waited = time.perf_counter(), {}, self._waiting(trainer)

    def _waiting(self, trainer):
        return getattr(trainer.train_dataloader, "waited", 0.0)

    def leave_out(self, seconds):
        """Do not count that many seconds that have just passed."""
        self._since += seconds

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        clips = next(clips for name, clips in batch.items() if name != "conditions")
        counts = {"clips": clips.shape[0], "frames": clips.shape[0] * clips.shape[1]}
        if "codes" in batch:
            counts["codes"] = clips.numel()
        for unit, count in counts.items():
            self._seen[unit] = self._seen.get(unit, 0) + count * trainer.world_size
        stepped, self._step = trainer.global_step > self._step, trainer.global_step  # not so while gradients add up
        if stepped and trainer.log_every_n_steps and trainer.global_step % trainer.log_every_n_steps == 0:
            seconds = time.perf_counter() - self._since
            pl_module.log_dict({f"throughput/{unit}_per_s": count / seconds for unit, count in self._seen.items()})
            pl_module.log("throughput/data_wait", (self._waiting(trainer) - self._waited) / seconds)
            self._restart(trainer)


class Preview(Callback):
    """Draws figures of the same clips every so many steps, and more of them at the end, with the averaged weights.

    Those of ``latentcast/inspection.py`` that the model has: the ``first`` one as ``step_0000500.png``, the others as
    ``step_0000500_NAME.png``; the loggers get them as ``media/NAME``, and videos as ``media/NAME_video``. What
    takes long is left to the end or to tools/figures.py. A figure that fails is named in the log, and the training goes
    on. ``figures``, name -> number, are logged after each time.

    Args:
        shown: ShownClips.
        folder: where the pictures go.
        every_n_steps: 0 makes them at the end only.
        names: the figures to draw, of those that fit; None: all.
    Raises:
        ValueError: a name that no figure has.
    """

    stage = first = None  # "tokenizer" or "prior", and a name

    def __init__(self, shown, folder, every_n_steps, names=None):
        inspection.check_names(names or ())
        self.shown, self.folder, self.every_n_steps, self.names = shown, Path(folder), every_n_steps, names
        self.figures = {}
        self._made_step = None

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if self.every_n_steps and trainer.global_step % self.every_n_steps == 0:
            self._make(trainer, pl_module)

    def on_train_end(self, trainer, pl_module):
        self._make(trainer, pl_module, end=True)

    def _make(self, trainer, pl_module, end=False):
        step = trainer.global_step
        made, self._made_step = self._made_step == step, step
        if made and not end:
            return
        started = time.perf_counter()
        average = find_average(trainer)
        training = pl_module.training
        pl_module.eval()
        with (
            torch.no_grad(),
            trainer.precision_plugin.forward_context(),
            average.averaged(pl_module) if average else contextlib.nullcontext(),
        ):
            model = pl_module.whole()
            if trainer.is_global_zero:
                files = self.draw(self.subject(pl_module, model), self.folder / f"step_{step:07d}", end, made)
        pl_module.train(training)
        if not trainer.is_global_zero:
            return
        for run in trainer.loggers:
            if self.figures and not made:
                run.log_metrics(self.figures, step - 1)  # Lightning counts from 0 the step that has just been made
            if isinstance(run, MediaLogger):
                run.log_files(files, step, f"{type(pl_module.model).__name__}, {self.label(pl_module)}")
        for callback in trainer.callbacks:
            if isinstance(callback, Throughput):
                callback.leave_out(time.perf_counter() - started)

    def draw(self, subject, path, end=False, made=False):
        """Write pictures called ``path`` plus a suffix -> name for the logger -> file.

        Args:
            end: also those that are drawn at the end alone. made: all others are there already.
        """
        names, files = inspection.of_training(subject, self.stage, end, made), {}
        names = [name for name in names if self.names is None or name in self.names]
        for name, drawing in inspection.draw(subject, names, self._failed):
            first = name == self.first
            written = write_drawing(path if first else path.with_name(f"{path.name}_{name}"), drawing, gif=first)
            files[f"media/{name}"] = written[".png"]
            if ".mp4" in written:
                files[f"media/{name}_video"] = written[".mp4"]
        return files

    def _failed(self, name, error):
        logger.warning("no picture of %s: %s: %s", name, type(error).__name__, one_line(error, 200))

    def subject(self, pl_module, model):
        """The Subject of the figures of ``model``, the module's own as a whole."""
        raise NotImplementedError

    def label(self, pl_module):
        """When, and of which clips."""
        clips = "TRAINING clips, as none are held out" if self.shown.trained_on else "held-out clips"
        return f"step {pl_module.trainer.global_step}: {clips}"


class ReconstructionPreview(Preview):
    """Figures of a tokenizer, its reconstructions first; see Preview."""

    stage, first = "tokenizer", "reconstructions"

    def subject(self, pl_module, model):
        monitors = [cb for cb in pl_module.trainer.callbacks if isinstance(cb, CodebookMonitor)]
        counts = next((monitor.counts for monitor in monitors), None)
        return inspection.Subject(self.shown, model, label=self.label(pl_module), counts=counts)


class PredictionPreview(Preview):
    """Figures of a prior, futures of the clips first, also as mp4 and GIF; see Preview. How much the samples of a clip
    differ is logged (``preview/``, see ``sample_diversity``), if there are several.

    Args:
        make_pipeline: prior -> VideoPredictionPipeline.
        n_context: frames of the clip that are given.
        num_samples: futures a clip.
        sampler: options of the prior's sampler.
        seed: of the samples, the same each time so that pictures can be compared.
    """

    stage, first = "prior", "futures"

    def __init__(self, shown, folder, every_n_steps, make_pipeline, n_context, num_samples, sampler, seed, names=None):
        super().__init__(shown, folder, every_n_steps, names)
        self.make_pipeline, self.n_context = make_pipeline, n_context
        self.num_samples, self.sampler, self.seed = num_samples, sampler, seed

    def try_out(self, prior):
        """Predict one frame: a mistake in ``sampler`` must not wait for the first preview."""
        given = self.shown.frames[:1, : self.n_context]
        self._pipeline(prior)(given, n_frames=1, num_samples=self.num_samples, value_range=(-1, 1), **self.sampler)

    def _pipeline(self, prior):
        pipeline = self.make_pipeline(prior)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    def subject(self, pl_module, model):
        pipeline = self._pipeline(model).to(pl_module.device)
        settings = {"num_samples": self.num_samples, "sampler": self.sampler, "seed": self.seed}
        label = self.label(pl_module)
        return inspection.Subject(self.shown, pipe=pipeline, n_context=self.n_context, label=label, **settings)

    def draw(self, subject, path, end=False, made=False):
        files = super().draw(subject, path, end, made)
        if subject.num_samples > 1 and not made:
            self.figures = {f"preview/{name}": value for name, value in sample_diversity(subject.samples).items()}
        return files


def sample_diversity(samples):
    """How much samples of one context differ: (B, S, T, C, H, W) in [-1, 1], S >= 2 -> name -> number.

    ``sample_std``: standard deviation of a pixel over the samples, frames in [0, 1]. ``ilpips``: see there; only where
    LPIPS can be had, of frames of at least 31 pixels and with its weights at hand.
    """
    figures = {"sample_std": samples.std(1).mean().item() / 2}
    try:
        figures["ilpips"] = ilpips(samples).mean().item()
    except (OSError, ValueError) as error:
        logger.info("no iLPIPS of the preview: %s", error)
    return figures
