"""What training a tokenizer and training a prior have in common."""

import contextlib
import copy
import math
from collections.abc import Mapping
from functools import partial
from typing import ClassVar

import pytorch_lightning as pl
import torch
from diffusers.optimization import get_scheduler
from pytorch_lightning.plugins.precision import Precision

from latentcast.config import is_whole, one_line
from latentcast.modeling import eval_mode
from latentcast.tokenizers.base import trusted

from .sharding import full, gather, shard

WITHOUT_WARMUP = ("constant", "piecewise_constant")  # schedules


class TrainingModule(pl.LightningModule):
    """A thin wrapper that optimises ``model``; subclasses say what a step is.

    Args:
        model: a FrameTokenizer or a Prior.
        optimizer: callable, parameters -> torch optimizer (``instantiate`` of a config with ``_partial_: true``).
        lr_scheduler: arguments of ``diffusers.optimization.get_scheduler``; stepped once an optimizer step. Of a
            ``num_warmup_steps`` below 1 the warm-up is that fraction of the run.
        config: the experiment as plain Python (JSON-able), kept in checkpoints and sent to the loggers.
    """

    stage = None  # "tokenizer", "prior" or "joint"
    sharded: ClassVar = {"model": ()}  # what is under ``trainer.strategy=fsdp``: name -> methods that use its weights

    def __init__(self, model, optimizer, lr_scheduler=None, config=None):
        super().__init__()
        self.model = model
        self.optimizer = optimizer
        self.lr_scheduler = lr_scheduler
        self.save_hyperparameters(config or {})
        self._loss = None  # summed over the batches of one optimizer step
        self._batch = None  # the last of them
        self._whole = {}  # of what is sharded: name -> what it was
        self._norms = ()  # (parameters, norm of their gradients, as a number) of the step at hand
        self._build_optimizer()  # so that a mistake in the settings shows now

    def configure_model(self):
        """Under ``trainer.strategy=fsdp``, the only one with a mesh: train copies of its parts that are sharded."""
        if self.device_mesh is not None and not self._whole:
            self._whole = {name: getattr(self, name) for name in self.sharded}
            for name, part in self._whole.items():
                setattr(self, name, copy.deepcopy(part))
            self.shard(self, self.device_mesh)

    @classmethod
    def shard(cls, module, mesh):
        """Let each process keep a piece of the weights of a module of this class."""
        for name, methods in cls.sharded.items():
            shard(getattr(module, name), mesh, methods)

    def whole(self):
        """The model as it was given, with the weights that it has by now, which the first process has, and with it
        what else is sharded; every process calls it."""
        for name, whole in self._whole.items():
            part = getattr(self, name)
            gather(part, whole)
            whole.train(part.training)
        return self._whole.get("model", self.model)

    def make_whole(self):
        """End what ``configure_model`` began."""
        self.whole()
        for name, whole in self._whole.items():
            setattr(self, name, whole)
        self._whole = {}

    def n_parameters(self, trainable=False):
        """How many numbers it has, or learns."""
        return sum(p.numel() for p in self.parameters() if p.requires_grad or not trainable)

    def compute(self, batch):
        """batch -> the model's output, which has ``loss`` and ``logs``."""
        raise NotImplementedError

    def training_step(self, batch, batch_idx):
        """One batch -> the dict that callbacks see: ``loss``, and ``codes`` where the model gives some."""
        with trusted():
            output = self.compute(batch)
        self._batch = batch
        self._loss = output.loss.detach() + (0 if self._loss is None else self._loss)
        # For a progress bar Lightning waits for the loss in every step.
        self.log("train/loss", output.loss, prog_bar=self.trainer.progress_bar_callback is not None)
        self.log_dict({f"train/{name}": value for name, value in output.logs.items()})
        return {"loss": output.loss, "codes": output.get("codes")}

    def validation_step(self, batch, batch_idx):
        """One batch -> the same dict."""
        output = self.compute(batch)
        size = next(iter(batch.values())).shape[0]
        figures = {"loss": output.loss, **output.logs, **self.quality(batch, output)}
        self.log_dict({f"val/{name}": value for name, value in figures.items()}, batch_size=size, sync_dist=True)
        # Lightning logs under the step of this name: that of the last training step, after the end of the run too.
        self.log("step", float(self.trainer.global_step - 1), batch_size=size, sync_dist=True)
        return {"loss": output.loss, "codes": output.get("codes")}

    def quality(self, batch, output):
        """Figures of what a validation's batch has come to, beside the model's own: name -> number."""
        return {}

    def on_before_optimizer_step(self, optimizer):
        """Log gradient norm and rate; stop before a loss or gradient that is not finite reaches the weights."""
        parts = self.clipped_apart()
        norms = [full(torch.nn.utils.get_total_norm([p.grad for p in part if p.grad is not None])) for part in parts]
        norm = norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack(norms))
        rate = torch.tensor(optimizer.param_groups[0]["lr"])  # on the CPU: a number would be sent to the GPU
        self.log_dict({"train/grad_norm": norm, "train/lr": rate})
        loss, self._loss = self._loss, None
        batch, self._batch = self._batch, None
        figures = torch.stack([value.float() for value in (loss, norm, *norms)])
        loss, norm, *known = figures.tolist()  # one wait for the device, not several
        self._norms = list(zip(parts, norms, known))
        # Gradients overflow now and then in fp16; there the gradient scaler skips the step.
        scaled = getattr(self.trainer.precision_plugin, "scaler", None) is not None
        for name, value in (("loss", loss), ("gradient norm", 0 if scaled else norm)):
            if not math.isfinite(value):
                # Of a model that is sharded other processes would have to take part in computing it again.
                culprit = "" if self._whole else self._first_not_finite(batch, gradients=name != "loss")
                raise FloatingPointError(
                    f"{type(self.model).__name__}: the training {name} is {value} at step {self.trainer.global_step}"
                    f"{culprit and f', first in {culprit}'}; stopped before it reached the weights. A lower learning "
                    "rate or precision=32-true may help"
                )

    def clipped_apart(self):
        """Lists of the parameters that are trained; each is clipped by the norm of its own gradients."""
        return [[p for p in self.parameters() if p.requires_grad]]

    def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None):
        """Clip by the norms that are known already, where Lightning would compute them again, and multiply nothing by
        1."""
        plugin = self.trainer.precision_plugin
        special = type(plugin).clip_grad_by_norm is not Precision.clip_grad_by_norm  # of gradients in pieces, say
        scaled = getattr(plugin, "scaler", None) and getattr(optimizer, "_step_supports_amp_scaling", False)
        if gradient_clip_algorithm == "value" or special or scaled:
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)
        elif gradient_clip_val:
            for parameters, norm, known in self._norms:
                if not known + 1e-6 <= gradient_clip_val:
                    torch.nn.utils.clip_grads_with_norm_(parameters, gradient_clip_val, norm)

    def _first_not_finite(self, batch, gradients):
        """The module, "decoder.0 (Conv2d)" say, with the first output that is not finite when the batch is computed
        again; with ``gradients``, else the one where the backward pass met such a gradient first; "" if there is none.
        """
        found = []

        def look(name, module, arguments, output):
            if not all(tensor.isfinite().all() for tensor in _tensors(output)):
                found.append(name)  # inner modules come before those that they are part of

        hooks = [module.register_forward_hook(partial(look, name)) for name, module in self.named_modules()]
        with contextlib.suppress(ValueError, RuntimeError, ArithmeticError):  # of modules that meet what is not finite
            # In eval mode nothing is updated, and ranks that are well need not take part.
            with torch.no_grad(), eval_mode(self), self.trainer.precision_plugin.forward_context():
                self.compute(batch)
        for hook in hooks:
            hook.remove()
        if not found and gradients:
            parameters = reversed(list(self.named_parameters()))
            found = [n.rpartition(".")[0] for n, p in parameters if p.grad is not None and not p.grad.isfinite().all()]
        name = next((name for name in found if name not in ("", "model")), "")
        return name and f"{name.removeprefix('model.')} ({type(self.get_submodule(name)).__name__})"

    def configure_optimizers(self):
        steps = self.trainer.estimated_stepping_batches
        return self._build_optimizer(steps if math.isinf(steps) else int(steps))

    def on_train_start(self):
        """A resumed run takes learning rate, schedule and weight decay of its own config; Lightning has restored those
        of the checkpoint."""
        for optimizer in self.trainer.optimizers:
            own = optimizer.defaults
            for group in optimizer.param_groups:
                group |= {name: own[name] for name in ("lr", "weight_decay") if name in own} | {"initial_lr": own["lr"]}
        for scheduler in (config.scheduler for config in self.trainer.lr_scheduler_configs):
            groups = scheduler.optimizer.param_groups
            scheduler.last_epoch = self.trainer.global_step  # counted in steps
            scheduler.base_lrs = [group["initial_lr"] for group in groups]
            rates = [base * rate(scheduler.last_epoch) for base, rate in zip(scheduler.base_lrs, scheduler.lr_lambdas)]
            for group, rate in zip(groups, rates):
                group["lr"] = rate
            scheduler._last_lr = rates

    def _build_optimizer(self, n_steps=None):
        """``n_steps``: of the run, infinity where it has no end; None: not known yet, nothing is trained by it."""
        optimizer = self.optimizer([p for p in self.parameters() if p.requires_grad])
        if self.lr_scheduler is None:
            return optimizer
        options = dict(self.lr_scheduler)
        if "num_warmup_steps" in options:
            options["num_warmup_steps"] = warmup_steps(options["num_warmup_steps"], options.get("name"), n_steps)
        length = 1 if n_steps is None else None if math.isinf(n_steps) else n_steps
        scheduler = get_scheduler(optimizer=optimizer, num_training_steps=length, **options)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def warmup_steps(value, schedule, n_steps):
    """The number of steps in which the learning rate rises.

    Args:
        value: ``lr_scheduler.num_warmup_steps``: steps, or below 1 a fraction of the run.
        schedule: name of the schedule; some have no warm-up.
        n_steps: of the run, infinity where it has no end; None: not known yet.
    Raises:
        ValueError: no such number, more steps than the run has, or a fraction of a run without an end.
    """
    if not (is_whole(value, 0) or (isinstance(value, float) and 0 <= value < 1)):
        raise ValueError(
            "lr_scheduler.num_warmup_steps: expected a whole number of steps, or a fraction of the run below 1, found "
            f"{one_line(value)}"
        )
    if schedule in WITHOUT_WARMUP or n_steps is None:
        return 0
    if not is_whole(value):
        if math.isinf(n_steps):
            raise ValueError(
                f"lr_scheduler.num_warmup_steps: {value} of the run, which has no end; give steps, or trainer.max_steps"
            )
        value = round(value * n_steps)
    if value > n_steps:
        raise ValueError(
            f"lr_scheduler.num_warmup_steps: expected at most the {n_steps} steps of the run, whose learning rate is "
            f"never reached else, found {value}; below 1 it is a fraction of the run"
        )
    return value


def _tensors(output):
    """All tensors in what a module returns."""
    if torch.is_tensor(output):
        yield output
    elif isinstance(output, (Mapping, list, tuple)):
        for value in output.values() if isinstance(output, Mapping) else output:
            yield from _tensors(value)
