"""Training stage one."""

import logging

from latentcast.metrics.frame import WINDOWS, psnr, ssim
from latentcast.metrics.perceptual import lpips

from .module import TrainingModule

logger = logging.getLogger("latentcast")

SETTLING = 0.1  # of the run: its last part, in which the tokenizer settles


class TokenizerModule(TrainingModule):
    """Trains a FrameTokenizer to reconstruct; a batch is ``{"frames": (B, T, C, H, W) in [-1, 1]}``."""

    stage = "tokenizer"
    _without_lpips = False

    def on_train_batch_start(self, batch, batch_idx):
        """Tell the tokenizer how far the run is: from the steps alone, so that a resumed run knows it too."""
        self.model.settle(self.trainer.global_step >= (1 - SETTLING) * self.trainer.estimated_stepping_batches)

    def compute(self, batch):
        return self.model(batch["frames"])

    def quality(self, batch, output):
        """``psnr`` (dB), ``ssim`` and ``lpips`` (AlexNet) of the reconstructions, means over frames: SSIM of frames of
        at least 11 pixels, LPIPS where it can be had, of frames of at least 31 and with its weights at hand."""
        pair = [frames.detach().float().clamp(-1, 1) for frames in (output.frames, batch["frames"])]
        found = {"psnr": psnr(*pair).mean()}
        if min(pair[0].shape[-2:]) >= WINDOWS["gaussian"]:
            found["ssim"] = ssim(*pair).mean()
        if not self._without_lpips:
            try:
                found["lpips"] = lpips(*pair).mean()
            except (OSError, ValueError) as error:
                self._without_lpips = True
                logger.info("no LPIPS of the reconstructions: %s", error)
        return found
