"""Residual Video Diffusion (RVD).

Yang, Srivastava and Mandt, "Diffusion Probabilistic Modeling for Video Generation", 2022. A transform network predicts
the next frame, mu; what is missing, the residual, is drawn by a diffusion model that knows the past through a network
of convolutional GRUs. The first section of this file holds the networks of appendix A, the second the model.

Where many frames are handled at once, they lie along the batch axis, time before batch: (T * N, C, H, W).
"""

import itertools
from collections.abc import Iterator, Sequence
from functools import partial

import diffusers
import torch
import torch.nn.functional as F
from diffusers.configuration_utils import register_to_config
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from diffusers.utils.torch_utils import randn_tensor
from einops import rearrange
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from latentcast.config import check_counts
from latentcast.layers.linear_attention import LinearAttention
from latentcast.layers.residual_unet import LevelNetwork, RecurrentEncoder, ResBlock, double, halve
from latentcast.shapes import Conditions, Frames, Latents, Scalar
from latentcast.sizes import nearest_fit
from latentcast.tokenizers.base import LatentSpec

from .base import ContinuousPrior, PriorOutput, Progress, Told, check_widths, levels_for, no_progress
from .denoising import SCHEDULERS, check_steps, denoise, make_scheduler, noise_schedule, noised, precise
from .sampling import GUIDANCE, check_guidance, check_switches, guided

PIXEL_BOUND = 2.0  # two frames in [-1, 1] differ by no more
LATENT_BOUND = 10.0  # latents have unit variance: hardly ever reached, but it keeps the noisiest steps from exploding
RMS_DECAY = 0.98  # of the running root mean square of x - mu
LEAST_SCALE = 0.01  # of sigma: the smallest that a learned scale can become


class TransformLevel(nn.Module):
    """ResBlock on the features from below and a skip, then twice the size (the TU of Figure 6b)."""

    def __init__(self, in_channels: int, out_channels: int, last: bool) -> None:
        super().__init__()
        self.block = ResBlock(in_channels, out_channels)
        self.up = nn.Identity() if last else double(out_channels)

    def forward(
        self, x: Float[Tensor, "N C H W"], skip: Float[Tensor, "N C H W"] | None = None
    ) -> Float[Tensor, "N out _ _"]:
        return self.up(self.block(x if skip is None else torch.cat([x, skip], 1)))


class TransformNetwork(LevelNetwork):
    """The autoregressive transform of Figure 6: the past frames -> mu, the mean of the next.

    The deepest level on the way up takes its ConvGRU's state alone, each other one the state of its level as a skip.

    Args:
        in_channels: C of the frames.
        widths: channels of the levels, from the finest.
        learned_scale: a second output, from the same features but without gradient to them, for the scale of Eq. 5.
        told_dim: see ``RecurrentEncoder``.
    """

    def __init__(
        self, in_channels: int, widths: Sequence[int], learned_scale: bool, told_dim: int | None = None
    ) -> None:
        super().__init__()
        self.encoder = RecurrentEncoder(in_channels, widths, told_dim)
        finer = [widths[0], *widths[:-1]]
        self.levels = nn.ModuleList(
            TransformLevel(wide * (1 if i == len(widths) - 1 else 2), narrow, i == 0)
            for i, (wide, narrow) in reversed(list(enumerate(zip(widths, finer))))
        )
        self.to_mu = nn.Conv2d(widths[0], in_channels, 1)
        self.to_scale = nn.Conv2d(widths[0], in_channels, 1) if learned_scale else None

    def forward(
        self, states: Sequence[Float[Tensor, "N _ _ _"]]
    ) -> tuple[Float[Tensor, "N C H W"], Float[Tensor, "N C H W"] | None]:
        """The encoder's states -> mu, and the raw scale or None."""
        x = None
        for level, state in zip(self.levels, reversed(states)):
            x = self.run(level, state) if x is None else self.run(level, x, state)
        return self.to_mu(x), None if self.to_scale is None else self.to_scale(x.detach())


Condition = tuple[Float[Tensor, "N width h w"], Float[Tensor, "N width h w"]]  # of a level, see ``ResBlock.condition``


class DownLevel(nn.Module):
    """Two ResBlocks, of which the second sees the context too, and attention (the DD of Figure 5b)."""

    def __init__(self, in_channels: int, out_channels: int, time_dim: int) -> None:
        super().__init__()
        self.block1 = ResBlock(in_channels, out_channels, time_dim)
        self.block2 = ResBlock(out_channels, out_channels, time_dim, context_channels=out_channels)
        self.attention = LinearAttention(out_channels)

    def forward(
        self, x: Float[Tensor, "N C H W"], time: Float[Tensor, "N time"], condition: Condition
    ) -> Float[Tensor, "N out H W"]:
        return self.attention(self.block2(self.block1(x, time), time, condition))


class UpLevel(nn.Module):
    """Two ResBlocks, of which the first sees the skip, attention, and twice the size (the DU of Figure 5b)."""

    def __init__(self, in_channels: int, out_channels: int, time_dim: int, last: bool) -> None:
        super().__init__()
        self.block1 = ResBlock(2 * in_channels, out_channels, time_dim)
        self.block2 = ResBlock(out_channels, out_channels, time_dim)
        self.attention = LinearAttention(out_channels)
        self.up = nn.Identity() if last else double(out_channels)

    def forward(
        self, x: Float[Tensor, "N C H W"], skip: Float[Tensor, "N C H W"], time: Float[Tensor, "N time"]
    ) -> Float[Tensor, "N out _ _"]:
        return self.up(self.attention(self.block2(self.block1(torch.cat([x, skip], 1), time), time)))


class MiddleLevel(nn.Module):
    """Attention between two ResBlocks, at the smallest size."""

    def __init__(self, channels: int, time_dim: int) -> None:
        super().__init__()
        self.block1 = ResBlock(channels, channels, time_dim)
        self.attention = LinearAttention(channels)
        self.block2 = ResBlock(channels, channels, time_dim)

    def forward(self, x: Float[Tensor, "N C H W"], time: Float[Tensor, "N time"]) -> Float[Tensor, "N C H W"]:
        return self.block2(self.attention(self.block1(x, time)), time)


class DenoisingUNet(LevelNetwork):
    """f_theta of Eq. 9 (Figure 5): noisy residual, diffusion step and context -> the noise.

    Args:
        in_channels: C of the residual.
        widths: channels of the levels, from the finest; the context's are the same.
    """

    def __init__(self, in_channels: int, widths: Sequence[int]) -> None:
        super().__init__()
        time_dim = widths[0]
        self.steps = Timesteps(time_dim, flip_sin_to_cos=False, downscale_freq_shift=1)
        self.time = TimestepEmbedding(time_dim, 4 * time_dim, out_dim=time_dim)
        pairs = list(zip([in_channels, *widths[:-1]], widths))
        self.down = nn.ModuleList(DownLevel(*pair, time_dim) for pair in pairs)
        self.halve = nn.ModuleList(halve(width) for width in widths[:-1])
        self.middle = MiddleLevel(widths[-1], time_dim)
        pairs = list(zip(widths, [widths[0], *widths[:-1]]))
        self.up = nn.ModuleList(UpLevel(*pairs[i], time_dim, i == 0) for i in reversed(range(len(pairs))))
        self.to_noise = nn.Conv2d(widths[0], in_channels, 1)

    def conditions(self, context: Sequence[Float[Tensor, "N _ _ _"]]) -> list[Condition]:
        """What the context, of ``RecurrentEncoder``, adds at each level, the same at every denoising step."""
        return [level.block2.condition(state) for level, state in zip(self.down, context)]

    def forward(
        self, y: Float[Tensor, "N C H W"], n: Shaped[Tensor, " N"], conditions: Sequence[Condition]
    ) -> Float[Tensor, "N C H W"]:
        """Noisy residuals y, their diffusion steps n, ``conditions`` -> the noise."""
        time = self.time(self.steps(n).to(y.dtype))
        x, skips = y, []
        for i, (level, condition) in enumerate(zip(self.down, conditions)):
            x = self.run(level, x if i == 0 else self.halve[i - 1](x), time, condition)
            skips.append(x)
        x = self.run(self.middle, x, time)
        for level in self.up:
            x = self.run(level, x, skips.pop(), time)
        return self.to_noise(x)


class Memory:
    """What the recurrent networks hold after each of T frames of N clips.

    Args:
        states: of a network, by its name, those of each level; with an anchor also "last", the frames themselves.
    """

    def __init__(self, states: dict[str, list[Float[Tensor, "T N _ _ _"]]]) -> None:
        self.states = states

    def rows(self, name: str) -> list[Float[Tensor, "TN _ _ _"]]:
        """Of one network, as networks take and give it: of each level, time before batch."""
        return [rearrange(state, "t n ... -> (t n) ...") for state in self.states[name]]

    def after(self, t: int) -> "Memory":
        """Without what was held before the t-th of the T frames."""
        return self._map(lambda state: state[t - 1 :])

    def of(self, index: Shaped[Tensor, " _"]) -> "Memory":
        """Of some of the N clips."""
        return self._map(lambda state: state[:, index])

    def _map(self, function):
        return Memory({name: [function(state) for state in states] for name, states in self.states.items()})


def time_first(x: Shaped[Tensor, "N T *rest"]) -> Shaped[Tensor, " rows *rest"]:
    """Frames of clips as rows, time before batch."""
    return rearrange(x, "n t ... -> (t n) ...")


class ResidualDiffusion(ContinuousPrior):
    """Residual Video Diffusion over pixels or over the latents of any tokenizer.

    The defaults are the paper's for 64 x 64 frames. For 128 x 128 (Table 3): ``width=64``,
    ``denoising_multipliers=[1, 1, 2, 2, 4, 4]``, ``transform_multipliers=[1, 2, 3, 4]``. As drawn in Figures 5 and 6,
    both U-Nets have a level on the way up for each on the way down; without that of the finest size they would have the
    published 37.6M parameters, and have 37.8M.

    Args:
        latent_spec: ``FrameTokenizer.latent_spec`` of the tokenizer. Of kind "pixels" the prior works on frames in
            [-1, 1], of any other kind on latents of about unit variance.
        width: channels of the finest level, a multiple of 8.
        denoising_multipliers: widths of the denoising U-Net's levels and of its context network's, in units of
            ``width``; each level has half the side of the one before.
        transform_multipliers: the same of the transform network. None, with an anchor: there is none, mu is the last
            frame itself. For few videos: the network soon knows their changes by heart, and what it adds to the last
            frame of others is worse than nothing.
        residual: False: the paper's ablation VD (section 3.6), mu = 0 and sigma = 1, diffuses the frames themselves.
        sigma: of Eq. 5, in units of the frames or latents. "auto": the running root mean square of x - mu in training,
            so that the residual has unit variance; a saved model's config has its last value.
        learned_sigma: let the transform network give each number of a frame its own scale below ``sigma``. It is
            fitted by the Gaussian likelihood of x - mu: the noise loss alone would push it up without end, since
            noise is easy to read off when y is zero.
        n_diffusion_steps: N.
        noise_loss: "l2", Eq. 9, or "l1".
        anchor: "last_frame": mu is the last frame plus a change that begins at zero. None, as published: the network's
            output alone.
        mu_weight: of the mean squared error of mu, added to the loss; 0: mu learns through Eq. 9 alone, as published,
            which does not identify it: the denoiser sees the same past as mu, so that mu plus any function of the past
            has the same least loss.
        detach_mu: keep the gradient of the noise loss from mu, which then learns by ``mu_weight`` alone.
        shared_step: one diffusion step n for all frames of a clip, as in Algorithm 1; False: one for each frame.
        residual_bound: largest |x - mu| that a denoising step may predict, in units of the frames or latents. None:
            over pixels 2, or 1 where the frame itself is diffused, over latents 10.
        residual_bound_sigmas: the same in units of sigma, in the place of ``residual_bound``.
        gradient_checkpointing: recompute each level's activations in the backward pass: less memory, more time.
        fit_levels: leave out the last levels of ``denoising_multipliers`` and ``transform_multipliers`` where the
            frames cannot be halved so often; False: refuse such lists.
        conditions, condition_dropout: see Prior. Both recurrent networks read, beside each frame, what leads to the
            next: a bias of each level's channels.
    Raises:
        ValueError: an unknown name, a width that is no multiple of 8, a frame that cannot be halved often enough, a
            negative weight, a bound in two units, or an option of the residual without one.
    """

    _supports_gradient_checkpointing = True
    _keys_to_ignore_on_load_unexpected = ["residual_rms"]  # noqa: RUF012 - a saved model's config has its value
    gradient_checkpointing = False  # diffusers' switch; without it, the option's name in the config makes it warn

    @register_to_config
    def __init__(
        self,
        latent_spec: LatentSpec,
        width: int = 48,
        denoising_multipliers: Sequence[int] = (1, 2, 4, 8),
        transform_multipliers: Sequence[int] | None = (1, 2, 2, 4),
        residual: bool = True,
        sigma: float | str = 2.0,
        learned_sigma: bool = False,
        n_diffusion_steps: int = 1600,
        noise_loss: str = "l2",
        mu_weight: float = 0.0,
        shared_step: bool = True,
        residual_bound: float | None = None,
        gradient_checkpointing: bool = False,
        anchor: str | None = None,
        detach_mu: bool = False,
        residual_bound_sigmas: float | None = None,
        fit_levels: bool = False,
        conditions: dict[str, dict] | None = None,
        condition_dropout: float = 0.1,
    ) -> None:
        super().__init__()
        if width < 8 or width % 8:
            raise ValueError(f"width: expected a multiple of 8, found {width}")
        for name, value, known in (("noise_loss", noise_loss, ("l1", "l2")), ("anchor", anchor, (None, "last_frame"))):
            if value not in known:
                raise ValueError(f"{name}: expected {known[0]} or {known[1]}, found {value!r}")
        positive = {"residual_bound": residual_bound, "residual_bound_sigmas": residual_bound_sigmas}
        if sigma != "auto":
            positive["sigma"] = sigma
        for name, value in positive.items():
            if value is not None and not (isinstance(value, (int, float)) and value > 0):
                raise ValueError(f"{name}: expected a positive number, found {value!r}")
        if residual_bound and residual_bound_sigmas:
            raise ValueError(
                f"residual_bound_sigmas: expected null beside residual_bound, found {residual_bound_sigmas}"
            )
        if mu_weight < 0:
            raise ValueError(f"mu_weight: expected at least 0, found {mu_weight}")
        of_mu = {"learned_sigma": learned_sigma, "mu_weight": mu_weight, "anchor": anchor, "detach_mu": detach_mu}
        of_mu["sigma"] = sigma if sigma == "auto" else None
        for name, value in of_mu.items():
            if value and not residual:
                raise ValueError(f"{name}: expected none without a residual, found {value!r}")
        if residual and transform_multipliers is None:
            if not anchor:
                raise ValueError("transform_multipliers: expected a list, or an anchor as mu in its place, found None")
            for name in ("learned_sigma", "mu_weight", "detach_mu"):
                if of_mu[name]:
                    raise ValueError(f"{name}: expected none without transform_multipliers, found {of_mu[name]!r}")
        if detach_mu and not mu_weight:
            raise ValueError("detach_mu: expected a mu_weight, without which mu learns nothing, found 0")
        networks = {"denoising_multipliers": denoising_multipliers}
        if residual and transform_multipliers is not None:
            networks["transform_multipliers"] = transform_multipliers
        check_widths(**networks)
        single = width > 8  # else each group of the normalisation has one number, and needs more than one position
        if not single and latent_spec["height"] * latent_spec["width"] == 1:
            nearest = nearest_fit(latent_spec, 2 ** (max(map(len, networks.values())) - 1), positions=2)
            raise ValueError(f"width: expected more than 8 of latents of a single position, found 8; {nearest}")
        for name, value in networks.items():
            networks[name] = levels_for(latent_spec, fit_levels, name, value, single=single)[0]
        self.register_to_config(**networks, fit_levels=False)  # what is saved is of the levels that there are
        widths = {name: [width * multiplier for multiplier in value] for name, value in networks.items()}
        self.schedule = noise_schedule(n_diffusion_steps, "cosine", "epsilon")
        # No buffer: in bf16 the first of them would round to 1, which is no noise at all.
        self.alpha_bars = make_scheduler("ddpm", self.schedule).alphas_cumprod

        channels, told_dim = latent_spec["channels"], width if conditions else None
        self.context = RecurrentEncoder(channels, widths["denoising_multipliers"], told_dim)
        self.denoiser = DenoisingUNet(channels, widths["denoising_multipliers"])
        self.transform = None
        if "transform_multipliers" in widths:
            self.transform = TransformNetwork(channels, widths["transform_multipliers"], learned_sigma, told_dim)
            if anchor:
                nn.init.zeros_(self.transform.to_mu.weight)
                nn.init.zeros_(self.transform.to_mu.bias)
        if not residual:
            self.predict_mean = None  # there is no mu
        if sigma == "auto":
            self.register_buffer("residual_rms", torch.zeros(()))  # 0: nothing seen yet
        self.make_conditioner(width)
        if gradient_checkpointing:
            self.enable_gradient_checkpointing()

    @property
    def explains(self) -> tuple[str, ...]:
        """``mu`` and ``future``, where there is a mu."""
        return ("mu", "future") if self.config.residual else ()

    def save_pretrained(self, *args: object, **kwargs: object) -> None:
        """As in diffusers; the config has the number that ``sigma="auto"`` came to."""
        sigma = self.config.sigma
        if sigma == "auto":
            self.register_to_config(sigma=self._sigma.item())
        try:
            super().save_pretrained(*args, **kwargs)
        finally:
            self.register_to_config(sigma=sigma)

    @property
    def _sigma(self):
        """``sigma``: a number, or of "auto" a scalar tensor."""
        if self.config.sigma != "auto":
            return self.config.sigma
        return torch.where(self.residual_rms > 0, self.residual_rms, 1.0)

    # The past -----------------------------------------------------------------------------------------------------

    def observe(
        self,
        frames: Float[Tensor, "TN C H W"],
        n_frames: int = 1,
        memory: Memory | None = None,
        vectors: Float[Tensor, "TN width"] | None = None,
    ) -> Memory:
        """Both recurrent networks read frames, of ``n_frames`` times, time before batch -> the Memory after each frame.

        Args:
            memory: after the one frame before these; None: there is none.
            vectors: what leads to the frame after each; None: nothing is told.
        """
        encoders = {"context": self.context}
        if self.transform is not None:
            encoders["transform"] = self.transform.encoder
        read = {"last": [frames]} if self.config.anchor else {}
        for name, encoder in encoders.items():
            read[name] = encoder(frames, n_frames, None if memory is None else memory.rows(name), vectors)
        by_time = partial(rearrange, pattern="(t n) ... -> t n ...", t=n_frames)
        return Memory({name: [by_time(state) for state in states] for name, states in read.items()})

    def predict_frame(
        self, memory: Memory, guidance_scale: float = 1.0
    ) -> tuple[Float[Tensor, "R C H W"], Float[Tensor, "R C H W"] | Scalar]:
        """Of the frame after each that the memory has, mu and sigma of Eq. 5, at least fp32. Without a residual they
        are 0 and 1.

        Args:
            guidance_scale: other than 1, the memory has rows that were told and then the same untold, and mu is guided
                as the noise is: the frame that the two make up then moves as a whole, and 0 gives what is predicted
                untold. So is the raw scale, which keeps sigma in its range.
        """
        if self.transform is not None:
            mu, scale = self.transform(memory.rows("transform"))
        else:
            finest, scale = memory.rows("context")[0], None
            mu = finest.new_zeros(len(finest), self.config.latent_spec["channels"], *finest.shape[2:])
        mu = precise(mu)
        if self.config.anchor:
            mu = precise(memory.rows("last")[0]) + mu
        sigma = self._sigma if self.config.residual else 1.0
        sigma = sigma if torch.is_tensor(sigma) else mu.new_full((), sigma)
        if guidance_scale != 1:
            mu, scale = guided(mu, guidance_scale), None if scale is None else guided(precise(scale), guidance_scale)
        if scale is not None:
            sigma = sigma * (LEAST_SCALE + (1 - LEAST_SCALE) * precise(scale).sigmoid())
        return mu, sigma

    # Training -----------------------------------------------------------------------------------------------------

    def forward(self, clip: Frames | Latents, n_context: int, conditions: Conditions | None = None) -> PriorOutput:
        """The loss of Eq. 9 and 10 with teacher forcing, a mean over frames and numbers.

        All predicted frames of all clips go through the U-Net at once. In eval mode noise and diffusion steps are the
        same in every call (``eval_seed``), so that losses compare.

        Args:
            clip: frames in [-1, 1], or latents. n_context: context frames, which the loss skips; two in the paper.
            conditions: see Prior.
        Returns:
            ``logs`` has ``noise_loss`` and, where there is a mu, ``mu_error``, its mean squared error.
        """
        self.check_clip(clip)
        self.check_context(n_context, clip.shape[1])
        n_clips, n_frames = clip.shape[:2]
        past, target = time_first(clip[:, :-1]), precise(time_first(clip[:, n_context:]))
        vectors = self.condition_vectors(conditions, n_clips, n_frames)
        leading = None if vectors is None else time_first(vectors[:, 1:])
        memory = self.observe(past.to(self.dtype), n_frames - 1, vectors=leading).after(n_context)

        mu, sigma = self.predict_frame(memory)
        if self.config.sigma == "auto" and self.training:
            self._follow((target - mu).detach())
        noise_mu = mu.detach() if self.config.detach_mu else mu
        y = (target - noise_mu) / sigma.detach()  # Eq. 5
        generator = None if self.training else torch.Generator().manual_seed(self.eval_seed)
        n = self._draw_steps(n_clips, n_frames - n_context, generator)
        noise = randn_tensor(y.shape, generator, y.device, y.dtype)
        alpha_bar = self.alpha_bars.to(y, non_blocking=True)[n].view(-1, 1, 1, 1)
        y_n, wanted = noised(y, noise, alpha_bar, "epsilon")  # Eq. 10
        predicted = self.denoiser(y_n.to(self.dtype), n, self.denoiser.conditions(memory.rows("context")))
        distance = F.mse_loss if self.config.noise_loss == "l2" else F.l1_loss
        loss = distance(predicted.to(wanted.dtype), wanted)
        logs = {"noise_loss": loss.detach()}

        if self.transform is not None:
            mu_error = F.mse_loss(mu, target)
            logs["mu_error"] = mu_error.detach()
            if self.config.mu_weight:
                loss = loss + self.config.mu_weight * mu_error
            if self.config.learned_sigma:  # reaches the scale's own layer alone
                nll = (sigma.log() + ((target - mu.detach()) / sigma).square() / 2).mean()
                loss = loss + nll
                logs["scale_nll"] = nll.detach()
        return PriorOutput(loss=loss, logs=logs)

    @torch.no_grad()
    def _follow(self, residual):
        """Move the running root mean square of x - mu; the first batch sets it."""
        square, seen = residual.square().mean(), self.residual_rms > 0
        kept = RMS_DECAY * self.residual_rms.square() + (1 - RMS_DECAY) * square
        self.residual_rms.copy_(torch.where(seen, kept, square).sqrt())

    def _draw_steps(self, n_clips, n_frames, generator):
        """Diffusion steps, uniform in 0 .. N - 1 -> (n_frames * n_clips,), time before batch."""
        shared = self.config.shared_step
        device = self.device if generator is None else generator.device
        shape = (1 if shared else n_frames, n_clips)
        n = torch.randint(len(self.alpha_bars), shape, generator=generator, device=device)
        return n.expand(n_frames, n_clips).flatten().to(self.device)

    # Sampling -----------------------------------------------------------------------------------------------------

    def sampler_ranges(self) -> dict[str, dict]:
        steps = {"least": 1, "most": self.config.n_diffusion_steps}
        ranges = {"n_steps": steps, "sample_batch": {"least": 1}, "scheduler": {"choices": tuple(SCHEDULERS)}}
        return ranges | GUIDANCE

    @torch.no_grad()
    def sample(
        self,
        context: Frames | Latents,
        n_frames: int,
        *,
        num_samples: int = 1,
        generator: torch.Generator | None = None,
        progress: Progress | None = None,
        conditions: Conditions | None = None,
        scheduler: str | diffusers.SchedulerMixin = "sde-dpmsolver++_logsnr",
        n_steps: int = 25,
        guidance_scale: float = 1.0,
        sample_batch: int = 64,
        use_cache: bool = True,
    ) -> Float[Tensor, "B {num_samples} {n_frames} C H W"]:
        """Continue a context, frame by frame.

        Algorithm 1 is ``scheduler="ddpm", n_steps=1600``, with the posterior's standard deviation where the paper
        prints its variance. Every scheduler works on the same trained model.

        Each future has noise of its own, seeded by ``generator``: it does not depend on its neighbours in the batch.

        Args:
            context: frames or latents, at least one. n_frames: how many to predict.
            num_samples: futures for each context, which is read once a chunk.
            generator: for reproducible samples.
            progress: counts denoising steps.
            conditions: see Prior.
            scheduler: a name in ``denoising.SCHEDULERS`` or a scheduler of diffusers. The steps of the default are even
                in log-SNR: residuals are a few percent of sigma, and few steps even in time end before they take shape.
                And it is stochastic: deterministic solvers end far from mu where the network is still a little wrong.
            n_steps: denoising steps for each frame.
            guidance_scale: moves mu and noise away from what is predicted without conditions (above 1), or towards it
                (below); each future is then computed twice.
            sample_batch: futures computed at once, which bounds the memory.
            use_cache: False computes what the context adds to the U-Net at every denoising step anew, instead of once
                a frame (a reference for tests and benchmarks).
        """
        options = {"scheduler": scheduler, "n_steps": n_steps, "guidance_scale": guidance_scale, "use_cache": use_cache}
        check_counts(n_frames=n_frames)
        self._check_sampling(context, num_samples, sample_batch, **options)
        n_clips, n_context = context.shape[:2]
        self.check_context(n_context, n_context + n_frames)
        told = self._told(conditions, n_clips, n_context + n_frames)
        chunks, futures = self._chunks(n_clips * num_samples, generator, sample_batch), []
        with (progress or no_progress)(total=len(chunks) * n_frames * n_steps) as bar:
            for chunk in chunks:
                frames = self._continue(context, told, num_samples, *chunk, bar.update, **options)
                futures.append(torch.stack([next(frames) for _ in range(n_frames)], 1))
        return rearrange(torch.cat(futures), "(b s) ... -> b s ...", s=num_samples).to(context.dtype)

    def stream(
        self,
        context: Frames | Latents,
        told: Told,
        *,
        num_samples: int,
        generator: torch.Generator | None,
        sample_batch: int,
        **options: object,
    ) -> Iterator[Float[Tensor, "B {num_samples} C H W"]]:
        """As Prior's."""
        self._check_sampling(context, num_samples, sample_batch, **options)
        chunks = self._chunks(len(context) * num_samples, generator, sample_batch)
        futures = [self._continue(context, told, num_samples, *chunk, **options) for chunk in chunks]
        together = (torch.cat(frames) for frames in zip(*futures))
        return (rearrange(frames, "(b s) ... -> b s ...", s=num_samples).to(context.dtype) for frames in together)

    def _check_sampling(self, context, num_samples, sample_batch, scheduler, n_steps, guidance_scale, use_cache):
        self.check_clip(context, "context")
        check_counts(num_samples=num_samples, sample_batch=sample_batch)
        check_switches(use_cache=use_cache)
        check_guidance(guidance_scale, self)
        make_scheduler(scheduler, self.schedule)
        check_steps(n_steps, self.config.n_diffusion_steps)

    def _chunks(self, n_futures, generator, sample_batch):
        """The futures that are computed at once -> list of (their indices, the seed of each)."""
        device = "cpu" if generator is None else generator.device
        seeds = torch.randint(2**62, (n_futures,), generator=generator, device=device).tolist()
        chunks = torch.arange(n_futures).split(min(int(sample_batch), n_futures))
        return [(chunk, [seeds[row] for row in chunk.tolist()]) for chunk in chunks]

    def _read(self, frames, t, memory, told, clips, is_guided=False):
        """``observe`` the frames (N, C, H, W) before the frame ``t``, with what leads to it in the clips (N,) of which
        they are; guided, the memory has rows that are told and then the same untold."""
        if self.conditioner is None:
            return self.observe(frames, memory=memory)
        vectors = told(t)[clips]
        if is_guided:
            frames = frames.repeat(2, 1, 1, 1)
            vectors = torch.cat([vectors, self.conditioner.null.expand_as(vectors)])
        return self.observe(frames, memory=memory, vectors=vectors)

    @torch.no_grad()
    def _continue(
        self,
        context,
        told,
        num_samples,
        chunk,
        seeds,
        on_step=None,
        *,
        scheduler,
        n_steps,
        guidance_scale,
        use_cache,
    ):
        """Algorithm 1 for the N futures in ``chunk``: yield their frames (N, C, H, W) without an end, at least fp32."""
        n_context, is_guided = context.shape[1], guidance_scale != 1
        rows = (chunk // num_samples).unique(return_inverse=True)
        clips, owner = (index.to(context.device, non_blocking=True) for index in rows)
        memory = None
        for t, frame in enumerate(context[clips].to(self.dtype).unbind(1), start=1):  # one by one: flat memory
            memory = self._read(frame, t, memory, told, clips, is_guided)
        memory = memory.of(torch.cat([owner, owner + len(clips)]) if is_guided else owner)
        clips = clips[owner]

        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        shape = (len(seeds), *context.shape[2:])
        for t in itertools.count(n_context + 1):
            mu, sigma = self.predict_frame(memory, guidance_scale)
            noise = randn_tensor(shape, generators, "cpu", torch.float32).to(self.device, non_blocking=True)
            y = denoise(
                self._noise_predictor(memory.rows("context"), guidance_scale, use_cache),
                noise,
                make_scheduler(scheduler, self.schedule),
                n_steps,
                generators,
                clamp=self.config.residual_bound_sigmas or self._bound / sigma,
                on_step=on_step,
            )
            x = self.in_range(mu + sigma * y)
            yield x
            memory = self._read(x.to(self.dtype), t, memory, told, clips, is_guided)

    @torch.no_grad()
    def predict_mean(
        self, context: Frames | Latents, n_frames: int, conditions: Conditions | None = None
    ) -> Float[Tensor, "B {n_frames} C H W"]:
        """mu alone, rolled out: the deterministic prediction under the diffusion. None without a residual."""
        self.check_clip(context, "context")
        check_counts(n_frames=n_frames)
        n_clips, n_context = context.shape[:2]
        self.check_context(n_context, n_context + n_frames)
        told = self._told(conditions, n_clips, n_context + n_frames)
        return self.in_range(self._means(context, n_context, n_frames, told)).to(context.dtype)

    @torch.no_grad()
    def explain(
        self,
        clip: Frames | Latents,
        n_context: int,
        *,
        generator: torch.Generator | None = None,
        conditions: Conditions | None = None,
        guidance_scale: float = 1.0,
        **options: object,
    ) -> dict[str, Float[Tensor, "B ..."]]:
        """As Prior's: ``future``, one sample, and the ``mu`` of each of its frames; {} without a residual."""
        if not self.config.residual:
            return {}
        n_clips, n_frames = clip.shape[:2]
        shared = {"conditions": conditions, "guidance_scale": guidance_scale}
        context, n_predicted = clip[:, :n_context], n_frames - n_context
        future = self.sample(context, n_predicted, generator=generator, **shared, **options)[:, 0]
        told = self._told(conditions, n_clips, n_frames)
        mu = self._means(torch.cat([context, future], 1), n_context, n_predicted, told, guidance_scale)
        return {"mu": mu.to(clip.dtype), "future": future}

    def _means(self, frames, n_context, n_frames, told, guidance_scale=1.0):
        """mu of the ``n_frames`` after a context -> (B, n_frames, C, H, W), at least fp32.

        Args:
            frames: (B, n, C, H, W), the context and what follows; in the place of what lacks stands mu itself.
            told: see ``stream``.
        """
        frames, memory, means = list(frames.unbind(1)), None, []
        for t in range(1, n_context + n_frames):
            last = frames[t - 1].to(self.dtype)
            memory = self._read(last, t, memory, told, slice(None), guidance_scale != 1)
            if t >= n_context:
                means.append(self.predict_frame(memory, guidance_scale)[0])
            if t == len(frames):
                frames.append(self.in_range(means[-1]))
        return torch.stack(means, 1)

    def _noise_predictor(self, context, guidance_scale, use_cache):
        """``predict(y, n)`` for the denoising steps of one frame; guided, the context has two rows for each of y's."""
        dtype = self.dtype
        cached = self.denoiser.conditions(context) if use_cache else None

        def predict(y, n):
            conditions = cached if use_cache else self.denoiser.conditions(context)
            if guidance_scale == 1:
                return self.denoiser(y.to(dtype), n, conditions)
            both = self.denoiser(y.to(dtype).repeat(2, 1, 1, 1), n.repeat(2), conditions)
            return guided(precise(both), guidance_scale)

        return predict

    @property
    def _bound(self):
        """``residual_bound``, with its default by space."""
        if self.config.residual_bound is not None:
            return self.config.residual_bound
        if self.accepts == "latents":
            return LATENT_BOUND
        return PIXEL_BOUND if self.config.residual else PIXEL_BOUND / 2
