"""A prior to start from: what it is, and the paper (section, equation) it comes from."""

import torch
from diffusers.configuration_utils import register_to_config
from jaxtyping import Float
from torch import Tensor, nn

from latentcast.config import check_counts
from latentcast.shapes import Latents
from latentcast.tokenizers.base import LatentSpec, check_latents

from .base import Prior, PriorOutput, Progress, no_progress


class MyPrior(Prior):
    """The next frame's latents are the last one's plus what a small network makes of them.

    Args:
        latent_spec: of the tokenizer; the tools fill it in.
        dim: width of the network.
    """

    accepts = "latents"  # or "codes", or "pixels"
    deterministic = True  # it draws nothing; leave this line out for a prior that does

    @register_to_config
    def __init__(self, latent_spec: LatentSpec, dim: int = 64) -> None:
        super().__init__()
        check_counts(dim=dim)
        channels = latent_spec["channels"]
        self.network = nn.Sequential(
            nn.Conv2d(channels, dim, 3, padding=1), nn.SiLU(), nn.Conv2d(dim, channels, 3, padding=1)
        )

    def forward(self, clip: Latents, n_context: int) -> PriorOutput:
        """Training loss of predicting ``clip[:, n_context:]``, each frame from the true one before; ``logs`` has
        ``mse``."""
        self._check(clip, n_context, clip.shape[1])
        predicted, target = self._next(clip[:, n_context - 1 : -1]), clip[:, n_context:]
        loss = (predicted - target).square().mean()
        return PriorOutput(loss=loss, logs={"mse": loss.detach()})

    @torch.no_grad()
    def sample(
        self,
        context: Latents,
        n_frames: int,
        *,
        num_samples: int = 1,
        generator: torch.Generator | None = None,
        progress: Progress | None = None,
    ) -> Float[Tensor, "B {num_samples} {n_frames} D h w"]:
        """Continue latents.

        Args:
            context: at least one frame. n_frames: how many to predict, any number.
            num_samples: futures for each context.
            generator: of what a prior draws: ``torch.randn(..., generator=generator)``.
            progress: counts frames.
        """
        check_counts(n_frames=n_frames, num_samples=num_samples)
        self._check(context, context.shape[1], context.shape[1] + n_frames)
        last, future = context[:, -1:], []
        with (progress or no_progress)(total=n_frames) as bar:
            for _ in range(n_frames):
                last = self._next(last)
                future.append(last)
                bar.update(1)
        future = torch.cat(future, 1)[:, None]
        return future.expand(-1, num_samples, *future.shape[2:]).contiguous().to(context.dtype)

    def _next(self, frames):
        """Each frame's successor."""
        change = self.network(frames.to(self.dtype).flatten(0, 1)).unflatten(0, frames.shape[:2])
        return frames + change

    def _check(self, clip, n_context, n_total):
        spec = self.config.latent_spec
        check_latents(clip, spec["channels"], spec["height"], spec["width"], name="clip")
        self.check_context(n_context, n_total)
