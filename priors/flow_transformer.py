"""FlowTransformer: the numbers of a frame are drawn together, by following a velocity from noise to the frame.

No paper's. What it is made of: flow matching (Lipman et al. 2023, Eq. 9) on straight paths (rectified flow, Liu et al.
2023, Eq. 1), times from a logit-normal distribution (Esser et al. 2024, Eq. 19), a time for each frame and a noise
level of the past that the model is told (Diffusion Forcing, Chen et al. 2024), and a transformer that is causal from
frame to frame (``latentcast/layers/block_causal.py``) in which one pass trains all frames of a clip. The continuous
sibling of MaskedTransformer.

    p(future | context) = prod_t p(frame t | frames < t)

    x_s = (1 - s) x + s e,    loss = E |v(x_s, s, frames < t) - (e - x)|^2    for a frame x and noise e

What the network says is the frame, v = (x_s - x) / s (Li and He 2025, "Back to basics"): what there is in a frame's
patches, the past mostly tells, and noise, which a narrow network has to hand through, is nobody's to learn. Or it is v
itself, as published.

Shape letters: B clips, t clean frames, s frames predicted, P patches of a frame in raster order, M rows of a sampler,
d width, n numbers in a patch.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import diffusers
import torch
import torch.nn.functional as F
from diffusers.configuration_utils import register_to_config
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from latentcast.config import MisfitError, check_counts, is_whole, one_line
from latentcast.shapes import Conditions, Frames, Latents
from latentcast.sizes import nearest_divisors
from latentcast.tokenizers.base import LatentSpec

from .base import ContinuousPrior, PriorOutput, Progress, SamplerOption, Told, no_progress
from .block_causal import BlockCausalPrior, Memory
from .denoising import precise
from .flow_matching import RANGES, follow, interpolate, make_scheduler
from .sampling import GUIDANCE, check_guidance, check_numbers, check_switches, is_number

STARTS = ("noise", "previous")
HISTORY_GUIDANCE = {"history_guidance_scale": GUIDANCE["guidance_scale"]}
PREDICTIONS = ("sample", "velocity")
LEAST_TIME = 0.05  # by which a predicted frame's error is divided at most (Li and He)
TIME_CHANNELS = 256  # of the sinusoids of a time


class FlowTransformer(ContinuousPrior, BlockCausalPrior):
    """Flow matching over pixels or over the latents of any tokenizer.

    Args:
        latent_spec: ``FrameTokenizer.latent_spec`` of the tokenizer. Of kind "pixels" the prior works on frames in
            [-1, 1], of any other kind on latents of about unit variance.
        n_frames: of the longest clip in training, at least 2.
        window: frames that each layer sees, as MaskedTransformer's; None: ``n_frames``.
        patch: side of the square patches of pixels or latents that are one position each, or [height, width]; must
            divide the grid. None: the smallest with at most ``max_positions`` in a frame.
        max_positions: see ``patch``.
        dim, n_layers, n_heads, head_dim, kernel_size: of the transformer.
        prediction_type: what the network says: "sample", the frame, or "velocity"; the loss is the velocity's.
        time_mean, time_std: of the normal numbers of which the logistic function gives the times of training: a larger
            mean means more noise.
        past_noise: in training the frames before the predicted one are noised a little, as its own predictions will be
            wrong. The level is drawn for each clip, from 0 to this, and told to the model.
        past_dropout: share of training's clips whose past is noise alone (level 1), for ``history_guidance_scale``.
        conditions, condition_dropout: see Prior; what is told of a frame enters every block there.
    Raises:
        MisfitError: a patch that does not divide the grid. ValueError: an option that is out of range.
    """

    @register_to_config
    def __init__(
        self,
        latent_spec: LatentSpec,
        n_frames: int = 16,
        patch: int | Sequence[int] | None = None,
        max_positions: int = 256,
        dim: int = 256,
        n_layers: int = 6,
        n_heads: int = 4,
        head_dim: int = 64,
        window: int | None = None,
        kernel_size: int = 3,
        prediction_type: str = "sample",
        time_mean: float = 0.0,
        time_std: float = 1.0,
        past_noise: float = 0.1,
        past_dropout: float = 0.1,
        conditions: dict[str, dict] | None = None,
        condition_dropout: float = 0.1,
    ) -> None:
        super().__init__()
        if prediction_type not in PREDICTIONS:
            raise ValueError(
                f"prediction_type: expected one of {', '.join(PREDICTIONS)}, found {one_line(prediction_type)}"
            )
        check_numbers(-10, 10, time_mean=time_mean)
        check_numbers(0.01, 10, time_std=time_std)
        for name, value in (("past_noise", past_noise), ("past_dropout", past_dropout)):
            if not (is_number(value) and 0 <= value < 1):
                raise ValueError(f"{name}: expected at least 0 and below 1, found {one_line(value)}")
        size = latent_spec["height"], latent_spec["width"]
        self.patch = _smallest_patch(size, max_positions) if patch is None else _checked_patch(size, patch)
        self.grid = tuple(side // part for side, part in zip(size, self.patch))
        n_numbers = latent_spec["channels"] * self.patch[0] * self.patch[1]
        self.make_trunk(self.grid, dim, n_layers, n_heads, head_dim, n_frames, window, kernel_size)
        self.from_patch = nn.Linear(n_numbers, dim)
        self.sinusoids = Timesteps(TIME_CHANNELS, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.time = TimestepEmbedding(TIME_CHANNELS, dim)
        # The last layer, near 0 at first: the vector shifts and scales what it sees (DiT, Peebles and Xie 2023).
        self.modulate = nn.Sequential(nn.SiLU(), nn.Linear(dim, 2 * dim))
        self.to_patch = nn.Linear(dim, n_numbers)
        nn.init.zeros_(self.modulate[1].weight)
        nn.init.normal_(self.to_patch.weight, std=0.1 * dim**-0.5)
        for layer in (self.modulate[1], self.to_patch):
            nn.init.zeros_(layer.bias)

    # The network --------------------------------------------------------------------------------------------------

    def embed(self, x: Float[Tensor, "*frames C H W"]) -> Float[Tensor, "*frames P d"]:
        """Frames -> their patches."""
        p, q = self.patch
        x = rearrange(x, "... C (h p) (w q) -> ... (h w) (C p q)", p=p, q=q)
        return self.from_patch(x.to(self.dtype)) + self.places

    def velocity(
        self,
        features: Float[Tensor, "*frames P d"],
        vectors: Float[Tensor, "*frames d"],
        noisy: Float[Tensor, "*frames C H W"],
        s: Float[Tensor, "*frames 1 1 1"] | Float[Tensor, ""],
    ) -> Float[Tensor, "*frames C H W"]:
        """Features of frames, their vectors, the frames x_s and s -> their velocity, at least fp32."""
        shift, scale = self.modulate(vectors)[..., None, :].chunk(2, -1)
        x = precise(self.to_patch(features * (1 + scale) + shift))
        p, q = self.patch
        x = rearrange(x, "... (h w) (C p q) -> ... C (h p) (w q)", h=self.grid[0], p=p, q=q)
        return x if self.config.prediction_type == "velocity" else velocity_to(x, noisy, s)

    def time_vectors(self, s: Float[Tensor, "*frames"]) -> Float[Tensor, "*frames d"]:
        """What a frame's vector is told of its time."""
        return self.time(self.sinusoids(1000 * s.flatten()).to(self.dtype)).unflatten(0, s.shape)

    # Training -----------------------------------------------------------------------------------------------------

    def forward(self, clip: Frames | Latents, n_context: int, conditions: Conditions | None = None) -> PriorOutput:
        """Mean squared error of the velocity, a mean over frames and numbers.

        In eval mode noise and times are the same in every call (``eval_seed``), and no past is left out, so that losses
        compare.

        Args:
            clip: frames in [-1, 1], or latents; at most ``n_frames`` of them. n_context: context frames; the others are
                predicted, all in one pass, each from the true frames before it.
            conditions: see Prior.
        Returns:
            ``logs`` has ``flow_loss``.
        """
        self.check_clip(clip)
        self.check_length(clip, n_context)
        told = self.condition_vectors(conditions, *clip.shape[:2])
        past, target = precise(clip[:, :-1]), precise(clip[:, n_context:])
        generator = None if self.training else torch.Generator().manual_seed(self.eval_seed)
        level = self._rand((len(clip), 1), generator) * self.config.past_noise
        if self.training:
            level = torch.where(self._rand(level.shape) < self.config.past_dropout, 1.0, level)
        times = self._draw_times(target.shape[:2], generator)
        noise = self._rand(target.shape, generator, torch.randn)
        clean = interpolate(past, self._rand(past.shape, generator, torch.randn), level[..., None, None, None])
        s = times[..., None, None, None]
        noisy = interpolate(target, noise, s)
        of_clean, of_target = self._both_vectors(level, told, n_context)
        of_target = of_target + self.time_vectors(times)
        of_clean = of_clean.expand(-1, past.shape[1], -1)
        features = self.trunk(self.embed(clean), self.embed(noisy), of_clean, of_target)
        wanted = noise - target if self.config.prediction_type == "velocity" else velocity_to(target, noisy, s)
        loss = F.mse_loss(self.velocity(features, of_target, noisy, s), wanted)
        return PriorOutput(loss=loss, logs={"flow_loss": loss.detach()})

    def _draw_times(self, shape, generator):
        """Logit-normal times of frames."""
        normal = self._rand(shape, generator, torch.randn)
        return (self.config.time_mean + self.config.time_std * normal).sigmoid()

    # Sampling -----------------------------------------------------------------------------------------------------

    def sampler_ranges(self) -> dict[str, dict]:
        told = {"told_noise": {"least": 0, "most": self.config.past_noise}, "start": {"choices": STARTS}}
        return GUIDANCE | HISTORY_GUIDANCE | RANGES | told

    def sampler_options(self) -> dict[str, SamplerOption]:
        """As Prior's; one that never learned to do without a past has nothing to be guided by either."""
        options = super().sampler_options()
        if not self.config.past_dropout:
            del options["history_guidance_scale"]
        return options

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
        n_steps: int = 8,
        scheduler: str | diffusers.SchedulerMixin = "euler",
        shift: float | None = None,
        start: str = "noise",
        start_time: float = 0.7,
        told_noise: float = 0.0,
        guidance_scale: float = 1.0,
        history_guidance_scale: float = 1.0,
        use_cache: bool = True,
    ) -> Float[Tensor, "B {num_samples} {n_frames} C H W"]:
        """Continue a context, frame by frame.

        A frame costs a pass for each prediction of its velocity, and one to remember it.

        Args:
            context: frames or latents, at least one. n_frames: how many to predict.
            num_samples: futures for each context, which is read once.
            generator: for reproducible samples.
            progress: counts passes.
            conditions: see Prior.
            n_steps: of the solver, for each frame.
            scheduler: "euler", "heun" (two predictions a step), or one of diffusers' classes of these.
            shift: spends more steps near the noise (above 1) or near the frame, see ``make_scheduler``.
            start: "noise", or "previous": from the frame before, noised to ``start_time`` (RIVER, Davtyan et al. 2023,
                section 3.4): fewer steps for the same step size, and less change.
            start_time: s where "previous" begins, before the shift.
            told_noise: level of noise that is added to predicted frames when they become the past, and told to the
                model; at most ``past_noise``.
            guidance_scale: moves the velocity away from that without conditions (above 1), or towards it.
            history_guidance_scale: the same away from that without a past (Song et al. 2025, "History-guided video
                diffusion"). The two add up; each costs the passes once more.
            use_cache: False reads the past anew for each frame (a reference for tests and benchmarks).
        """
        how = Following(
            *(n_steps, scheduler, shift, start, start_time, told_noise),
            *(guidance_scale, history_guidance_scale, use_cache),
        )
        check_counts(n_frames=n_frames)
        self._check_sampling(context, num_samples, how)
        told = self._told(conditions, len(context), context.shape[1] + n_frames)
        n_passes = 1 + len(how.scheduler_with_times().timesteps)
        with (progress or no_progress)(total=n_frames * n_passes) as bar:
            frames = self._stream(context, told, num_samples, generator, how, bar.update)
            future = torch.stack([next(frames) for _ in range(n_frames)], 1)
        return future.unflatten(0, (-1, num_samples)).to(context.dtype)

    def stream(
        self,
        context: Frames | Latents,
        told: Told,
        *,
        num_samples: int,
        generator: torch.Generator | None,
        **options: object,
    ) -> Iterator[Float[Tensor, "B {num_samples} C H W"]]:
        """As Prior's; the last frames that the model sees are kept."""
        how = Following(**options)
        self._check_sampling(context, num_samples, how)
        frames = self._stream(context, told, num_samples, generator, how)
        return (frame.unflatten(0, (-1, num_samples)).to(context.dtype) for frame in frames)

    def _check_sampling(self, context, num_samples, how):
        how.check(self)
        check_counts(num_samples=num_samples)
        self.check_clip(context, "context")
        self.check_context(context.shape[1], context.shape[1] + 1)

    def _stream(self, context, told, num_samples, generator, how, on_pass=lambda: None):
        """Yield predicted frames (B * num_samples, C, H, W), at least fp32, without an end.

        With guidance every row is there once more, told nothing, and with that of the history once more, after a past
        of noise.
        """
        copies, n_contexts = how.copies(), len(context)

        def noise_like(x):
            return self._rand(x.shape, generator, torch.randn)

        def vector(stands_as, t, level, n):
            """Of frame t, of all copies of the contexts, n rows each: (rows, 1, d)."""
            damage = [(1.0 if is_blind else level, is_told) for is_told, is_blind, _ in copies]
            of_frame = None if self.conditioner is None else told(t)
            return self.copied_vectors(stands_as, damage, of_frame, n_contexts, n)

        def clean_vectors(ts, level, n):
            """Of the frames of the times ts, of which ``told`` knows no more once the next one is asked for."""
            return torch.cat([vector(self.as_clean, t, level, n) for t in ts], 1)

        def add(frames, level, vectors):
            """Remember frames (N, k, C, H, W), noised to the level."""
            seen = [noise_like(frames) if is_blind else frames for _, is_blind, _ in copies]
            if level:
                noisy = interpolate(frames, noise_like(frames), level)
                seen = [noisy if x is frames else x for x in seen]
            memory.add(self.embed(torch.cat(seen)), vectors)
            on_pass()

        memory, n_seen, level = Memory(self.trunk, how.use_cache), context.shape[1], 0.0
        last, x = precise(context[:, -1]).repeat_interleave(num_samples, 0), precise(context)
        vectors = clean_vectors(range(n_seen), level, 1)
        while True:
            add(x, level, vectors)
            if n_seen == context.shape[1]:
                memory.repeat_interleave(num_samples)
            of_target = vector(self.as_target, n_seen, level, num_samples)

            def predict(x, s):
                """The guided velocity of x (M, C, H, W)."""
                x = x[:, None].repeat(len(copies), 1, 1, 1, 1)
                s = torch.full((len(x), 1), s, device=self.device)
                vectors = of_target + self.time_vectors(s)  # noqa: B023
                features = self.trunk.predict(memory.past, self.embed(x), vectors)
                velocity = self.velocity(features, vectors, x, s[..., None, None, None])[:, 0]
                full, *others = velocity.chunk(len(copies))
                return full + sum((scale - 1) * (full - other) for (*_, scale), other in zip(copies[1:], others))

            solver = how.scheduler_with_times()
            noise = noise_like(last)
            x = noise if how.start == "noise" else interpolate(last, noise, solver.sigmas[0])
            last = self.in_range(follow(predict, x, solver, generator, on_pass))
            vectors = clean_vectors([n_seen], how.told_noise, num_samples)
            yield last
            x, level, n_seen = last[:, None], how.told_noise, n_seen + 1


def velocity_to(x: Float[Tensor, "*x"], noisy: Float[Tensor, "*x"], s: Float[Tensor, "*#x"]) -> Float[Tensor, "*x"]:
    """The velocity at x_s that has the frame x at its end; near there as if it had further to go."""
    return (noisy - x) / s.clamp(min=LEAST_TIME)


@dataclass(frozen=True)
class Following:
    """How frames are drawn: the options of ``FlowTransformer.sample``."""

    n_steps: int
    scheduler: object
    shift: float | None
    start: str
    start_time: float
    told_noise: float
    guidance_scale: float
    history_guidance_scale: float
    use_cache: bool

    def check(self, prior: FlowTransformer) -> None:
        """Refuse options out of their ranges."""
        check_guidance(self.guidance_scale, prior)
        check_numbers(**HISTORY_GUIDANCE["history_guidance_scale"], history_guidance_scale=self.history_guidance_scale)
        if self.history_guidance_scale != 1 and not prior.config.past_dropout:
            raise ValueError(
                f"history_guidance_scale: expected 1 for a FlowTransformer trained without past_dropout, found "
                f"{self.history_guidance_scale}"
            )
        check_switches(use_cache=self.use_cache)
        check_numbers(0, prior.config.past_noise, told_noise=self.told_noise)
        if not isinstance(self.start, str) or self.start not in STARTS:
            raise ValueError(f"start: expected one of {', '.join(STARTS)}, found {one_line(self.start)}")
        for name in ("start_time", "shift"):
            least, most = (RANGES[name][end] for end in ("least", "most"))
            if getattr(self, name) is not None or name == "start_time":
                check_numbers(least, most, **{name: getattr(self, name)})
        self.scheduler_with_times()

    def scheduler_with_times(self) -> diffusers.SchedulerMixin:
        """Fresh, for one frame."""
        start_time = 1.0 if self.start == "noise" else self.start_time
        return make_scheduler(self.scheduler, self.n_steps, start_time, self.shift)

    def copies(self) -> list[tuple[bool, bool, float | None]]:
        """What each row is predicted for: (whether conditions are told, whether the past is noise, how much is moved
        away from this one)."""
        copies: list[tuple[bool, bool, float | None]] = [(True, False, None)]
        if self.guidance_scale != 1:
            copies.append((False, False, self.guidance_scale))
        if self.history_guidance_scale != 1:
            copies.append((True, True, self.history_guidance_scale))
        return copies


def _smallest_patch(size, max_positions):
    """(height, width) of the smallest patches that divide ``size`` into at most so many."""
    check_counts(max_positions=max_positions)
    for side in range(1, max(size)):
        patch = nearest_divisors(size, (side, side))
        if (size[0] // patch[0]) * (size[1] // patch[1]) <= max_positions:
            return tuple(patch)
    return tuple(size)


def _checked_patch(size, patch):
    """``patch`` as (height, width), where it divides ``size``."""
    found = list(patch) if isinstance(patch, list | tuple) else [patch, patch]
    if len(found) != 2 or not all(is_whole(side, 1) for side in found):
        raise ValueError(f"patch: expected a whole number of at least 1, or two of them, found {one_line(patch)}")
    if any(whole % side for whole, side in zip(size, found)):
        raise MisfitError(
            f"patch: expected divisors of {size[0]} x {size[1]} (height, width), found {found}; the nearest are "
            f"{nearest_divisors(size, found)}"
        )
    return tuple(found)
