"""How far a reconstruction is from its frames: the losses that every trained tokenizer offers."""

import torch.nn.functional as F

from latentcast.metrics import lpips
from latentcast.shapes import Frames, Scalar

DISTANCES = {"l2": F.mse_loss, "l1": F.l1_loss}


def check_reconstruction_options(reconstruction_loss: str, lpips_weight: float) -> None:
    """Refuse what ``reconstruction_loss`` below does not know; for constructors."""
    if reconstruction_loss not in DISTANCES:
        raise ValueError(f"reconstruction_loss: expected one of {', '.join(DISTANCES)}, found {reconstruction_loss!r}")
    if not lpips_weight >= 0:
        raise ValueError(f"lpips_weight: expected at least 0, found {lpips_weight}")


def reconstruction_loss(
    prediction: Frames, frames: Frames, kind: str = "l2", lpips_weight: float = 0.0
) -> tuple[Scalar, dict[str, Scalar]]:
    """The distance between frames and what a decoder made of them, in fp32 also under autocast.

    LPIPS is the VGG one, as in Latent Diffusion's autoencoders (Rombach et al. 2022, section 3.1), which leaves the
    AlexNet one for judging the result. Its network belongs to no model: it is neither saved nor trained with one.

    Args:
        prediction: values beyond [-1, 1] are clipped for LPIPS alone.
        frames: in [-1, 1].
        kind: "l2" (mean square) or "l1" (mean absolute difference).
        lpips_weight: of LPIPS, averaged over the frames; 0: not computed, and its weights are not needed.
    Returns:
        loss, with gradients, and logs, detached: ``reconstruction_loss``, the distance, and ``lpips``, unweighted,
        where it takes part.
    Raises:
        FileNotFoundError: LPIPS takes part and its weights are not there.
        ValueError: LPIPS takes part and the frames are smaller than 16 pixels or neither grey nor RGB.
    """
    prediction, frames = prediction.float(), frames.float()
    loss = DISTANCES[kind](prediction, frames)
    logs = {"reconstruction_loss": loss.detach()}
    if lpips_weight > 0:
        perceptual = lpips(prediction.clamp(-1, 1), frames.clamp(-1, 1), net="vgg").mean()
        logs["lpips"] = perceptual.detach()
        loss = loss + lpips_weight * perceptual
    return loss, logs
