"""Training stage two."""

import torch
from lightning_fabric.utilities import move_data_to_device
from torch.utils.data import default_collate

from latentcast.priors.base import as_keyword

from .module import TrainingModule

LOOKED_AT = 64  # clips of the train split


class PriorModule(TrainingModule):
    """Trains a Prior to predict the frames after the first ``n_context`` of a clip.

    A batch holds the clips in the space that the prior accepts: ``codes`` (B, T, h, w, n_codebooks) of any integer type
    (they travel as a cache stores them, and become int64 on the device), ``latents`` (B, T, D, h, w), or ``frames``
    (B, T, C, H, W) in [-1, 1] for a prior over pixels. Beside them lie the data set's ``conditions``, of which the
    prior is told those that it has.

    Args:
        model, optimizer, lr_scheduler, config: see TrainingModule.
        n_context: context frames, which the loss skips.
        tokenizer: turns what batches hold into what the prior accepts, as they come: frames, which for PixelTokenizer
            are not worth a cache, into codes or latents, and a cache's codes into latents. Not trained, not saved.
    """

    stage = "prior"

    def __init__(self, model, optimizer, lr_scheduler=None, n_context=1, tokenizer=None, config=None):
        super().__init__(model, optimizer, lr_scheduler, config)
        self.n_context = n_context
        self._tokenizer = [tokenizer]  # in a list: not one of the submodules

    def on_fit_start(self):
        """Let the prior look at some clips before it is trained, the same on every rank; a resumed one has done so."""
        if self.trainer.ckpt_path is None:
            self.model.prepare(map(self._clip, self._batches()))
            if self.model.conditioner is not None:
                told = (conditions_for(self.model, batch)["conditions"] for batch in self._batches())
                self.model.conditioner.measure(told)

    def _batches(self):
        """Up to ``LOOKED_AT`` clips from all over the train split, one by one."""
        data = self.trainer.datamodule.train_set
        n = min(LOOKED_AT, len(data))
        for i in range(n):
            yield move_data_to_device(default_collate([data[i * len(data) // n]]), self.device)

    def validation_step(self, batch, batch_idx):
        """Every batch gets noise of its own, the same in each validation."""
        self.model.eval_seed = batch_idx * self.trainer.world_size + self.trainer.global_rank
        return super().validation_step(batch, batch_idx)

    def compute(self, batch):
        return self.model(self._clip(batch), self.n_context, **conditions_for(self.model, batch))

    def _clip(self, batch):
        """What the prior accepts of a batch."""
        kind = self.model.accepts
        if kind == "pixels":
            return batch["frames"]
        if kind in batch:
            return batch[kind].long() if kind == "codes" else batch[kind]
        (tokenizer,) = self._tokenizer
        with torch.no_grad():
            if "frames" in batch:
                return tokenizer.encode(batch["frames"])[kind]
            codes = batch["codes"].long()
            with torch.autocast(codes.device.type, enabled=False):  # the latents that a cache would hold
                return tokenizer.to(codes.device).codes_to_latents(codes)


def conditions_for(prior, batch):
    """What a prior is told of a batch, as an argument; {} for priors that are told nothing, which need not take it."""
    return as_keyword({name: batch["conditions"][name] for name in prior.conditions} or None)
