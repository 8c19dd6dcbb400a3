"""Training stage one."""

from .module import TrainingModule


class TokenizerModule(TrainingModule):
    """Trains a FrameTokenizer to reconstruct; a batch is ``{"frames": (B, T, C, H, W) in [-1, 1]}``."""

    stage = "tokenizer"

    def compute(self, batch):
        return self.model(batch["frames"])
