"""Training stage two."""

import torch

from .module import TrainingModule


class PriorModule(TrainingModule):
    """Trains a Prior to predict the frames after the first ``n_context`` of a clip.

    A batch holds the clips in the space that the prior accepts: ``codes`` (B, T, h, w, n_codebooks), ``latents``
    (B, T, D, h, w), or ``frames`` (B, T, C, H, W) in [-1, 1] for a prior over pixels.

    Args:
        model, optimizer, lr_scheduler, config: see TrainingModule.
        n_context: context frames, which the loss skips.
        tokenizer: turns batches of frames into codes or latents as they come; not trained, not saved. For
            PixelTokenizer, whose codes are not worth a cache.
    """

    stage = "prior"

    def __init__(self, model, optimizer, lr_scheduler=None, n_context=1, tokenizer=None, config=None):
        super().__init__(model, optimizer, lr_scheduler, config)
        self.n_context = n_context
        self._encode = tokenizer.encode if tokenizer is not None else None  # a method: not one of the submodules

    def validation_step(self, batch, batch_idx):
        """Every batch gets noise of its own, the same in each validation."""
        self.model.eval_seed = batch_idx * self.trainer.world_size + self.trainer.global_rank
        return super().validation_step(batch, batch_idx)

    def compute(self, batch):
        kind = self.model.accepts
        if kind == "pixels":
            clip = batch["frames"]
        elif self._encode is not None:
            with torch.no_grad():
                clip = self._encode(batch["frames"])[kind]
        else:
            clip = batch[kind]
        return self.model(clip, self.n_context)
