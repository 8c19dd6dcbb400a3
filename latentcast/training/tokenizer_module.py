"""Training stage one."""

from .module import TrainingModule

SETTLING = 0.1  # of the run: its last part, in which the tokenizer settles


class TokenizerModule(TrainingModule):
    """Trains a FrameTokenizer to reconstruct; a batch is ``{"frames": (B, T, C, H, W) in [-1, 1]}``."""

    stage = "tokenizer"

    def on_train_batch_start(self, batch, batch_idx):
        """Tell the tokenizer how far the run is: from the steps alone, so that a resumed run knows it too."""
        self.model.settle(self.trainer.global_step >= (1 - SETTLING) * self.trainer.estimated_stepping_batches)

    def compute(self, batch):
        return self.model(batch["frames"])
