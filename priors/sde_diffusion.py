"""STDiff: a neural SDE predicts the motion, a recurrent diffusion model the frames, at any time.

Ye and Bilodeau, "STDiff: Spatio-temporal Diffusion for Continuous Stochastic Video Prediction", 2023 (AAAI 2024). The
order is the paper's: difference images, their encoder, a ConvGRU, the neural SDE (Eqs. 13 and 14), and the U-Net that
denoises each frame given the motion feature and the previous frame (Eq. 12).

Times are counted in frame intervals from the last context frame, which the paper calls t_0 = N. Shape letters: B clips,
S samples of each, P frames to predict.
"""

import itertools
from collections.abc import Iterator, Sequence

import diffusers
import numpy as np
import torch
import torch.nn.functional as F
from diffusers.configuration_utils import register_to_config
from einops import rearrange
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn

from latentcast.config import MisfitError, check_counts, is_whole, one_line
from latentcast.layers.conv_gru import ConvGRUCell
from latentcast.layers.neural_sde import NeuralSDE, Path
from latentcast.layers.spade_unet import SpadeUNet
from latentcast.shapes import Conditions, Frames, Latents
from latentcast.sizes import nearest_fit
from latentcast.tokenizers.base import LatentSpec

from .base import ContinuousPrior, PriorOutput, Progress, Told, check_widths, levels_for, no_progress
from .denoising import (
    SCHEDULERS,
    check_steps,
    denoise,
    make_scheduler,
    min_snr_weight,
    noise_schedule,
    noised,
    precise,
)
from .sampling import GUIDANCE, check_guidance, check_switches, guided, is_number

AT_ONCE = 16  # frames whose motion is solved together; that of more is solved as they come, and not kept
LONGEST = 10_000  # frame intervals that may be left out between frames that are asked for, and the most in one interval


Times = Shaped[Tensor, " F"] | Shaped[Tensor, "B F"] | Sequence  # in frame intervals after the last context frame
Seed = int | list[int] | tuple[int, ...]  # a whole number of at least 0, or one for each context


class MotionEncoder(nn.Sequential):
    """Difference images, D x h x w -> channels[-1] x h / 2^(n - 1) x w / 2^(n - 1).

    Each of the n stages is a convolution and a ReLU, with max-pooling between the stages.
    """

    def __init__(self, in_channels: int, channels: Sequence[int], kernels: Sequence[int]) -> None:
        layers = []
        for before, after, kernel in zip([in_channels, *channels], channels, kernels):
            layers += [nn.MaxPool2d(2)] * bool(layers) + [
                nn.Conv2d(before, after, kernel, padding=kernel // 2),
                nn.ReLU(),
            ]
        super().__init__(*layers)


class MotionCoefficient(nn.Sequential):
    """f_theta of Eq. 13, for the drift or for the diffusion: four convolutions with tanh between them.

    The last one starts at zero: before training, the motion feature stays what it is. What the drift is told is added
    to what comes out of the first one, a number for each channel.
    """

    def __init__(self, channels: int, in_channels: int | None = None) -> None:
        layers = [nn.Conv2d(in_channels or channels, channels, 3, padding=1)]
        for _ in range(3):
            layers += [nn.Tanh(), nn.Conv2d(channels, channels, 3, padding=1)]
        nn.init.zeros_(layers[-1].weight)
        nn.init.zeros_(layers[-1].bias)
        super().__init__(*layers)

    def forward(
        self, m: Float[Tensor, "N in h w"], told: Float[Tensor, "N C"] | None = None
    ) -> Float[Tensor, "N C h w"]:
        for number, layer in enumerate(self):
            m = layer(m)
            if number == 0 and told is not None:
                m = m + told[..., None, None]
        return m


class PositiveNoise(nn.Module):
    """sigma > 0 from any number: softplus, .1 at 0 and never below .001, by which the KL of two motions divides."""

    def forward(self, x: Float[Tensor, "*x"]) -> Float[Tensor, "*x"]:
        return F.softplus(x - 2.3) + 1e-3


DIFFUSION_OUTPUTS = {"linear": nn.Identity, "tanh": nn.Tanh, "softplus": PositiveNoise}


class MotionPosterior(nn.Module):
    """What the drift of the motion is told of the future in training (Li et al. 2020, section 5).

    c_k, for the time from k - 1 to k, is the state of a ConvGRU that has read the features of the difference images
    from the last one back to k; the control is a small network of m and c_k, zero before training.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gru = ConvGRUCell(channels, channels)
        self.network = MotionCoefficient(channels, 2 * channels)

    def read(self, features: Float[Tensor, "B n C h w"]) -> list[Float[Tensor, "B C h w"]]:
        """Features of the future's difference images -> [c_1, ..., c_n]."""
        states, state = [], None
        for feature in reversed(features.unbind(1)):
            state = self.gru(feature, state)
            states.append(state)
        return states[::-1]

    def forward(self, m: Float[Tensor, "B C h w"], c: Float[Tensor, "B C h w"]) -> Float[Tensor, "B C h w"]:
        """The control at m."""
        return self.network(torch.cat([m, c], 1))


class SDEDiffusion(ContinuousPrior):
    """STDiff over pixels or over the latents of any tokenizer.

    The defaults are the paper's for 64 x 64 RGB: 204.2M parameters, 201.9M with ``motion="ode"``.

    The previous frame is the one before in the sequence of times that is predicted, a random subset in training
    (Algorithm 1) and the times that are asked for in sampling. The network so meets intervals of many lengths and has
    to take from the motion feature where things are, which lets it predict between frames; but sampling at the rate of
    the training shows it only the shortest of them. With ``previous_frame="immediate"`` training shows it the frame one
    interval before instead, exactly as that sampling does, and no other interval ever.

    Args:
        latent_spec: ``FrameTokenizer.latent_spec``. With kind "pixels" the model takes the frames themselves, else
            latents, scaled to about unit variance.
        motion: "sde", or "ode" for the deterministic motion of Table 3.
        motion_channels, motion_kernels: width and kernel size of the motion encoder's convolutions; all but the first
            work at half the size of the one before. The last width is that of the motion feature.
        sde_type, solver, dt, adjoint: see NeuralSDE; dt in frame intervals.
        diffusion_output: what the last convolution of sigma goes through: "linear", nothing, as models of before this
            option were saved; "tanh", as in the published code; "softplus", which keeps it above 0.
        motion_kl_weight: makes the motion a latent SDE with a posterior (Li et al. 2020; not published): in training
            the drift is told of the future frames, and the loss has, times this weight, the KL divergence of the motion
            so told from the one that is not, in nats per number of the predicted frames. So sigma has a reason to be
            above 0: it is what the past leaves open. Takes an SDE and ``diffusion_output="softplus"``. None: without,
            where nothing in the loss rewards sigma.
        block_channels, n_blocks, attention_from, head_dim, n_heads, norm_groups: of the U-Net, see SpadeUNet.
        n_diffusion_steps: L of Eq. 12.
        betas: "linear" or "cosine", the noise schedule.
        prediction_type: what the U-Net predicts: "epsilon" (Eq. 12), "v_prediction" or "sample" (neither published).
        loss: "l2" (Eq. 12) or "l1" (the published code).
        min_snr_gamma: weighs the loss by min-SNR (not published; 5 is usual); None: every time alike.
        n_sampled_frames: P of Algorithm 1, the future frames of a clip that a training step predicts; None: all.
        previous_frame: "sampled" or "immediate", see above.
        gradient_checkpointing: recompute activations of the U-Net's blocks and of the SDE in the backward pass. Also
            ``enable_gradient_checkpointing()``.
        fit_levels: leave out the last of ``motion_channels``, with their kernels, and of ``block_channels`` where the
            frames or latents cannot be halved so often; False: refuse such lists.
        conditions, condition_dropout: see Prior. Conditions enter in two places: the drift of the motion is told, on
            the way to each frame, what leads to it, and the U-Net, beside the diffusion time, what leads to the frame
            that it denoises. Those of the context are what its frames show already, and are not looked at.
    Raises:
        ValueError: an option that is not known or sizes that do not fit each other.
    """

    explains = ("motion",)
    min_context = 2  # a difference image takes two frames
    memory_format = torch.channels_last
    _supports_gradient_checkpointing = True

    @register_to_config
    def __init__(
        self,
        latent_spec: LatentSpec,
        motion: str = "sde",
        motion_channels: Sequence[int] = (64, 128, 256),
        motion_kernels: Sequence[int] = (5, 5, 7),
        sde_type: str = "stratonovich",
        solver: str = "euler_heun",
        dt: float = 0.1,
        adjoint: bool = False,
        diffusion_output: str = "linear",
        motion_kl_weight: float | None = None,
        block_channels: Sequence[int] = (128, 256, 256, 512, 512),
        n_blocks: int = 2,
        attention_from: int = 1,
        head_dim: int = 128,
        n_heads: int | None = None,
        norm_groups: int = 32,
        n_diffusion_steps: int = 1000,
        betas: str = "linear",
        prediction_type: str = "epsilon",
        loss: str = "l2",
        min_snr_gamma: float | None = None,
        n_sampled_frames: int | None = 6,
        previous_frame: str = "sampled",
        gradient_checkpointing: bool = False,
        fit_levels: bool = False,
        conditions: dict[str, dict] | None = None,
        condition_dropout: float = 0.1,
    ) -> None:
        super().__init__()
        for name, value, known in (
            ("motion", motion, ("sde", "ode")),
            ("loss", loss, ("l2", "l1")),
            ("previous_frame", previous_frame, ("sampled", "immediate")),
            ("diffusion_output", diffusion_output, tuple(DIFFUSION_OUTPUTS)),
        ):
            if value not in known:
                raise ValueError(f"{name}: expected {' or '.join(known)}, found {value!r}")
        check_counts(n_blocks=n_blocks, head_dim=head_dim, norm_groups=norm_groups)
        if n_heads is not None:
            check_counts(n_heads=n_heads)
        check_counts(least=0, attention_from=attention_from)
        check_widths(motion_channels=motion_channels, motion_kernels=motion_kernels, block_channels=block_channels)
        if n_sampled_frames is not None:
            check_counts(n_sampled_frames=n_sampled_frames)
        if min_snr_gamma is not None and not (is_number(min_snr_gamma) and min_snr_gamma > 0):
            raise ValueError(f"min_snr_gamma: expected above 0 or None, found {min_snr_gamma!r}")
        if motion_kl_weight is not None:
            if not (is_number(motion_kl_weight) and motion_kl_weight >= 0):
                raise ValueError(f"motion_kl_weight: expected at least 0 or None, found {motion_kl_weight!r}")
            if motion != "sde" or diffusion_output != "softplus":
                raise ValueError(
                    "motion_kl_weight: expected None unless motion=sde and diffusion_output=softplus, found "
                    f"{motion_kl_weight} with motion={motion} and diffusion_output={diffusion_output}"
                )
            if adjoint:
                raise ValueError("adjoint: expected false with a motion_kl_weight, found true")
        channels, size = latent_spec["channels"], (latent_spec["height"], latent_spec["width"])
        if size == (1, 1):
            stride = 2 ** (max(len(motion_channels), len(block_channels)) - 1)
            nearest = "" if fit_levels else f"; {nearest_fit(latent_spec, stride, positions=2)}"
            found = f"STDiff normalises over positions, found latents of a single one{nearest}"
            raise MisfitError(f"latent_spec: {found}", "positions")
        if len(motion_channels) != len(motion_kernels) or any(kernel % 2 != 1 for kernel in motion_kernels):
            raise ValueError(
                f"motion_kernels: expected an odd number for each of motion_channels={list(motion_channels)}, found "
                f"{list(motion_kernels)}"
            )
        motion_channels, motion_kernels = levels_for(
            latent_spec, fit_levels, "motion_channels", motion_channels, motion_kernels
        )
        (block_channels,) = levels_for(latent_spec, fit_levels, "block_channels", block_channels, single=False)
        networks = {"motion_channels": motion_channels, "motion_kernels": motion_kernels}
        self.register_to_config(**networks, block_channels=block_channels, fit_levels=False)  # of the levels there are
        width = motion_channels[-1]
        self.motion_encoder = MotionEncoder(channels, motion_channels, motion_kernels)
        self.gru = ConvGRUCell(width, width)
        diffusion = None
        if motion == "sde":  # as one sequence: the names of the weights are the same whatever comes last
            diffusion = nn.Sequential(*MotionCoefficient(width), DIFFUSION_OUTPUTS[diffusion_output]())
        self.motion_sde = NeuralSDE(MotionCoefficient(width), diffusion, sde_type, solver, dt, adjoint)
        self.motion_posterior = None if motion_kl_weight is None else MotionPosterior(width)
        self.unet = SpadeUNet(
            *(2 * channels, channels, width, size, block_channels, n_blocks),
            *(attention_from, head_dim, norm_groups, n_heads),
        )
        self.schedule = noise_schedule(n_diffusion_steps, betas, prediction_type)
        # No buffer: half precision would round the first of them to 1.
        self.alpha_bars = make_scheduler("ddpm", self.schedule).alphas_cumprod
        self.make_conditioner(width)
        if self.conditioner is not None:
            self.tell_drift, self.tell_unet = nn.Linear(width, width), nn.Linear(width, self.unet.time_channels)
        self.to(memory_format=self.memory_format)
        if gradient_checkpointing:
            self.enable_gradient_checkpointing()

    # Motion -----------------------------------------------------------------------------------------------------

    def encode_motion(self, context: Float[Tensor, "B N D h w"]) -> Float[Tensor, "B width _ _"]:
        """Context of N frames -> m_N, the motion feature of the last one.

        Algorithm 1, lines 2-6: m_1 = 0, d_i = x_i - x_(i-1), m_i = ConvGRU(d_i, m_(i-1)).
        """
        first, *others = self._encode_differences(context).unbind(1)
        state = self.gru(first)
        for feature in others:
            state = self.gru(feature, state)
        return state

    def _encode_differences(self, frames):
        """Frames (B, N, D, h, w) -> features of their N - 1 difference images (B, N - 1, width, h', w')."""
        differences = frames[:, 1:] - frames[:, :-1]
        features = self.motion_encoder(rearrange(differences, "b t ... -> (b t) ..."))
        return rearrange(features, "(b t) ... -> b t ...", t=differences.shape[1])

    def _tell_motion(self, vectors, first):
        """What is told of frames (N, T, width) -> what the drift is told in each interval, for NeuralSDE; the first one
        leads to the frame ``first``."""
        if vectors is None:
            return None
        return lambda k: self.tell_drift(vectors[:, min(first + k, vectors.shape[1]) - 1])

    # Training ---------------------------------------------------------------------------------------------------

    def forward(self, clip: Frames | Latents, n_context: int, conditions: Conditions | None = None) -> PriorOutput:
        """The loss of Eq. 12, a mean over numbers, by Algorithm 1.

        In training on a random subset of each clip's future frames; in eval mode on all of them, with noise and
        Brownian paths that are the same at every call (``eval_seed``), so that validation losses can be compared.

        Args:
            clip: frames in [-1, 1], or latents. n_context: context frames, which the loss skips.
            conditions: see Prior.
        Returns:
            ``logs`` has ``mse``, the unweighted squared error of the U-Net's output, of an SDE
            ``motion_noise``, the root mean square of sigma at m_N, and with a posterior ``motion_kl``, nats a clip.
        Raises:
            ValueError: wrong shape or range. FloatingPointError: the motion exploded.
        """
        self.check_clip(clip, "clip")
        self.check_context(n_context, clip.shape[1])
        steps, seeds, source = self._draw_times(clip, n_context)
        vectors = self.condition_vectors(conditions, *clip.shape[:2])
        start = self.encode_motion(clip[:, :n_context].to(self.dtype))
        feature, kl = self._future_motion(start, clip, n_context, steps, seeds, vectors)
        error, alpha_bar = self._denoising_error(feature, clip, n_context, steps, vectors, source)
        config = self.config
        loss = error.abs() if config.loss == "l1" else error.square()  # line 14
        if config.min_snr_gamma is not None:
            loss = loss * min_snr_weight(alpha_bar, config.min_snr_gamma, config.prediction_type)
        logs = {"mse": error.detach().square().mean()}
        if config.motion == "sde":
            with torch.no_grad():
                logs["motion_noise"] = self.motion_sde.diffusion(start).float().square().mean().sqrt()
        loss = loss.mean()
        if kl is not None:
            loss = loss + config.motion_kl_weight * kl.sum() / error.numel()
            logs["motion_kl"] = kl.detach().mean()
        return PriorOutput(loss=loss, logs=logs)

    def _draw_times(self, clip, n_context):
        """Lines 7 and 8: which future frames are predicted, k_1 < ... < k_P.

        Returns:
            k (B, P) int64 from 1 on, on the CPU, where the solver wants to know the times; seeds of the Brownian paths,
            or None; and where else random numbers come from, as arguments of torch's functions.
        """
        batch, n_future = len(clip), clip.shape[1] - n_context
        if self.training:
            steps = torch.rand(batch, n_future).argsort(1)[:, : self.config.n_sampled_frames]
            return steps.sort(1).values + 1, None, {"device": clip.device}
        seeds = [(self.eval_seed, row) for row in range(batch)]
        source = {"generator": torch.Generator().manual_seed(self.eval_seed)}
        return torch.arange(1, n_future + 1).expand(batch, -1), seeds, source

    def _future_motion(self, start, clip, n_context, steps, seeds, vectors):
        """Line 10, Eqs. 13 and 14: the motion features at the times k, (B * P, width, h', w'); with a posterior, on a
        path that it controls, whose divergence from one without comes with them, (B,), else None."""
        told = self._tell_motion(vectors, n_context)
        if self.motion_posterior is None:
            return rearrange(self.motion_sde(start, steps, seeds, told=told), "b p ... -> (b p) ..."), None
        future = self.motion_posterior.read(self._encode_differences(clip[:, n_context - 1 :].to(self.dtype)))

        def control(m, time):
            return self.motion_posterior(m, future[min(int(time), len(future) - 1)])

        feature, kl = self.motion_sde(start, steps, seeds, control=control, told=told)
        return rearrange(feature, "b p ... -> (b p) ..."), kl

    def _steps_before(self, steps):
        """The frames k_(i-1) that the U-Net is shown beside those at k_i, 0 being the context's last."""
        if self.config.previous_frame == "immediate":
            return steps - 1
        return torch.cat([torch.zeros_like(steps[:, :1]), steps[:, :-1]], 1)

    def _denoising_error(self, feature, clip, n_context, steps, vectors, source):
        """Lines 11 to 13: what the U-Net says of the noised frames at k, less what it should, (B * P, D, h, w), and the
        alpha_bar of each, (B * P, 1, 1, 1)."""
        config, device = self.config, clip.device
        rows = torch.arange(len(clip), device=device)[:, None]
        wanted, shown = (
            n_context - 1 + index.to(device, non_blocking=True) for index in (steps, self._steps_before(steps))
        )
        x_0, previous = (rearrange(precise(clip[rows, i]), "b p ... -> (b p) ...") for i in (wanted, shown))
        told = None if vectors is None else self.tell_unet(rearrange(vectors[rows, wanted], "b p ... -> (b p) ..."))
        times = torch.randint(config.n_diffusion_steps, (len(x_0),), **source).to(device)  # line 11
        noise = torch.randn(x_0.shape, **source).to(x_0)
        alpha_bar = self.alpha_bars.to(x_0, non_blocking=True)[times].view(-1, 1, 1, 1)
        x_l, target = noised(x_0, noise, alpha_bar, config.prediction_type)  # line 12, gamma_l^2 = alpha_bar
        noisy = torch.cat([x_l, previous], 1).to(self.dtype)
        return precise(self.unet(noisy, times, feature.to(self.dtype), told=told)) - target, alpha_bar

    @torch.no_grad()
    def explain(
        self,
        clip: Frames | Latents,
        n_context: int,
        *,
        num_samples: int = 1,
        generator: torch.Generator | None = None,
        conditions: Conditions | None = None,
        motion_seed: Seed | None = None,
        **options: object,
    ) -> dict[str, Float[Tensor, "B ..."]]:
        """As Prior's: ``motion`` features at the last given frame and each frame after it, of ``num_samples`` paths."""
        self.check_clip(clip, "clip")
        self.check_context(n_context, clip.shape[1])
        batch, n_frames = len(clip), clip.shape[1] - n_context
        seed = draw_seeds(generator)[0] if motion_seed is None else motion_seed
        seeds = row_seeds("motion_seed", seed, batch, num_samples)
        times = frame_times_of(n_frames, batch, None, 1).repeat_interleave(num_samples, 0)
        start = self.encode_motion(clip[:, :n_context].to(self.dtype)).repeat_interleave(num_samples, 0)
        vectors = self._of_rows(self.sampling_vectors(conditions, *clip.shape[:2]), num_samples)
        features = self.motion_sde(start, times, seeds, told=self._tell_motion(vectors, n_context))
        features = torch.cat([start[:, None], features], 1)
        return {"motion": features.unflatten(0, (batch, num_samples))}

    # Sampling ---------------------------------------------------------------------------------------------------

    def told_frames(
        self,
        n_context: int,
        n_frames: int,
        *,
        frame_times: Times | None = None,
        fps_multiplier: float = 1,
        **options: object,
    ) -> int:
        """As Prior's: of the context's frames and of each interval up to the last time, whatever is predicted there."""
        return n_context + int(intervals_of(frame_times_of(n_frames, None, frame_times, fps_multiplier)).max())

    def options_of(self, options: dict[str, object], index: int, n_contexts: int, n_frames: int) -> dict[str, object]:
        """As Prior's; ``motion_seed`` and ``image_seed`` may be lists, a seed for each context."""
        options = super().options_of(options, index, n_contexts, n_frames)
        lists = {name: options.get(name) for name in ("motion_seed", "image_seed")}
        for name, seeds in lists.items():
            if isinstance(seeds, (list, tuple)):
                row_seeds(name, seeds, n_contexts, 1)
                options = options | {name: seeds[index : index + 1]}
        return options

    def sampler_ranges(self) -> dict[str, dict]:
        seed = {"kind": int, "least": 0}
        rate = {"kind": float, "above": 0, "most": LONGEST}
        steps = {"least": 1, "most": self.config.n_diffusion_steps}
        ranges = {"n_steps": steps, "horizon": {"kind": int, "least": 1}, "fps_multiplier": rate} | GUIDANCE
        return ranges | {"motion_seed": seed, "image_seed": seed, "scheduler": {"choices": tuple(SCHEDULERS)}}

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
        frame_times: Times | None = None,
        fps_multiplier: float = 1,
        motion_seed: Seed | None = None,
        image_seed: Seed | None = None,
        scheduler: str | diffusers.SchedulerMixin = "sde-dpmsolver++",
        n_steps: int = 15,
        horizon: int | None = None,
        guidance_scale: float = 1.0,
        use_cache: bool = True,
    ) -> Float[Tensor, "B {num_samples} {n_frames} C H W"]:
        """Continue latents or frames.

        One motion path is drawn for each sample; then frame after frame is denoised, given the motion feature at its
        time and the frame predicted before (Eq. 7). Every sample has random numbers of its own, so neither the number
        of samples nor the other contexts change it.

        Beyond the frames that a training step predicts the path goes on by itself, or, with ``horizon``, the motion is
        taken anew from predicted frames each time the horizon is reached, which is what the published code does.

        Args:
            context: at least two frames. n_frames: how many to predict.
            num_samples: futures for each context.
            generator: from which the seeds are drawn that are not given.
            progress: counts denoising steps.
            conditions: see Prior; of as many frames as ``told_frames`` says: those per frame are of the context's
                intervals, whatever the times to predict.
            frame_times: increasing, above 0; None: 1, 2, ... over ``fps_multiplier``.
            fps_multiplier: frames to predict in an interval of the context's.
            motion_seed: of the Brownian paths. The same seed gives the same motion at a time, whatever other times are
                asked for.
            image_seed: of the noise that the frames are made from, likewise.
            scheduler: name in ``denoising.SCHEDULERS`` or a scheduler of diffusers. The default is a stochastic one: in
                so few steps it keeps the quality of 100 ancestral ones better than deterministic solvers do.
            n_steps: denoising steps a frame.
            horizon: frame intervals, a whole number; after so many the last frames, as many as the context has, are
                taken as context, and a new path begins there. In the published code the number of future frames that
                the model was trained on. ``fps_multiplier`` then is a whole number, and ``frame_times`` None.
            guidance_scale: moves what the U-Net says away from what it says without conditions (above 1), or towards
                it. What it says without them is of a motion without them, on the same Brownian path.
            use_cache: False computes the SPADE maps at every step, as the published code does, instead of once a frame;
                the same bits (a reference for tests and benchmarks).
        Raises:
            ValueError: an option outside its range. FloatingPointError: the motion exploded.
        """
        check_counts(n_frames=n_frames)
        settings = {"scheduler": scheduler, "n_steps": n_steps, "guidance_scale": guidance_scale}
        settings |= {"use_cache": use_cache, "num_samples": num_samples}
        self._check_sampling(context, horizon, **settings)
        batch, n_context = context.shape[:2]
        times = frame_times_of(n_frames, batch, frame_times, fps_multiplier)
        rate, part_length = 1, n_frames
        if horizon is not None:
            if frame_times is not None or fps_multiplier % 1:
                found = f"fps_multiplier={fps_multiplier}" if frame_times is None else "frame_times"
                raise ValueError(f"horizon: expected None, or a whole fps_multiplier and no frame_times, found {found}")
            rate = int(fps_multiplier)
            part_length = min(int(horizon) * rate, n_frames)
        seeds = seeds_of(generator, motion_seed, image_seed, batch, num_samples)
        n_told = n_context + int(intervals_of(times).max())
        told = self.sampling_vectors(conditions, batch, n_told)
        by_frame = self._move_by_frame(lambda t: told[:, t], n_context, horizon, num_samples, guidance_scale)
        vectors = self._of_rows(told, num_samples, guidance_scale)

        def at_once(part, start, seeds):
            """The motion of a part at all its times together, which may lie anywhere."""
            part_times = times[:, : min(part_length, n_frames - part * part_length)].repeat_interleave(num_samples, 0)
            part_times = part_times.repeat(len(start) // len(part_times), 1)
            first = n_context + part * (part_length // rate)  # the frame at time 1
            features = self.motion_sde(start, part_times, seeds, told=self._tell_motion(vectors, first)).unbind(1)
            if vectors is None:
                return zip(features, itertools.repeat(None))
            frames = (first - 1 + intervals_of(part_times)).to(context.device, non_blocking=True)
            rows = torch.arange(len(start), device=context.device)[:, None]
            return zip(features, vectors[rows, frames].unbind(1))

        with (progress or no_progress)(total=n_frames * n_steps) as bar:
            whole = frame_times is None and fps_multiplier == 1
            move = by_frame if whole and n_frames > AT_ONCE else at_once  # the same bits
            frames = self._stream(context, move, rate, seeds, bar, **settings)
            future = torch.stack([next(frames) for _ in range(n_frames)], 1)
        return future.unflatten(0, (batch, num_samples)).to(context.dtype)

    def stream(
        self,
        context: Frames | Latents,
        told: Told,
        *,
        num_samples: int,
        generator: torch.Generator | None,
        frame_times: Times | None,
        fps_multiplier: float,
        motion_seed: Seed | None,
        image_seed: Seed | None,
        horizon: int | None,
        guidance_scale: float,
        **settings: object,
    ) -> Iterator[Float[Tensor, "B {num_samples} C H W"]]:
        """As Prior's: frames at the times 1, 2, ..., and no others."""
        if frame_times is not None or fps_multiplier != 1:
            found = f"fps_multiplier={one_line(fps_multiplier)}" if frame_times is None else "frame_times"
            raise ValueError(f"rollout: expected fps_multiplier=1 and no frame_times, found {found}")
        settings |= {"guidance_scale": guidance_scale, "num_samples": num_samples}
        self._check_sampling(context, horizon, **settings)
        batch, n_context = context.shape[:2]
        seeds = seeds_of(generator, motion_seed, image_seed, batch, num_samples)
        move = self._move_by_frame(told, n_context, horizon, num_samples, guidance_scale)
        frames = self._stream(context, move, 1, seeds, no_progress(), **settings)
        return (frame.unflatten(0, (batch, num_samples)).to(context.dtype) for frame in frames)

    def _move_by_frame(self, told, n_context, horizon, num_samples, guidance_scale):
        """For ``_stream``: the motion at the times 1, 2, ..., each as it is asked for, up to the horizon if any."""

        def move(part, start, seeds):
            first, is_told = n_context + part * int(horizon or 0), self.conditioner is not None  # the frame at time 1

            def vectors(k):
                return self._of_rows(told(first + k - 1), num_samples, guidance_scale)

            path = Path(
                self.motion_sde, start, seeds, told=(lambda k: self.tell_drift(vectors(k))) if is_told else None
            )
            for k in itertools.count(1) if horizon is None else range(1, int(horizon) + 1):
                yield path.at(k), vectors(k) if is_told else None

        return move

    def _check_sampling(self, context, horizon, num_samples, scheduler, n_steps, guidance_scale, use_cache):
        self.check_clip(context, "context")
        check_counts(num_samples=num_samples)
        check_switches(use_cache=use_cache)
        check_guidance(guidance_scale, self)
        check_steps(n_steps, self.config.n_diffusion_steps)
        make_scheduler(scheduler, self.schedule)  # a mistake must not wait for the first frame
        self.check_context(context.shape[1], context.shape[1] + 1)
        if horizon is not None:
            check_counts(horizon=horizon)

    def _of_rows(self, vectors, num_samples, guidance_scale=1):
        """What is told of each context (B, ...) -> of each row that the networks see: of its samples, and with guidance
        of as many rows that are told nothing."""
        if vectors is None:
            return None
        rows = vectors.repeat_interleave(num_samples, 0)
        return rows if guidance_scale == 1 else torch.cat([rows, self.conditioner.null.expand_as(rows)])

    def _stream(self, context, move, rate, seeds, bar, num_samples, scheduler, n_steps, guidance_scale, use_cache):
        """Yield predicted frames (B * num_samples, D, h, w), float32, without an end.

        With guidance the networks see every row twice, see ``guided``.

        Args:
            move: the motion of a part, which begins where the motion is taken from frames: function (number of the
                part, motion features there, seeds of the paths) -> for each frame its motion features and what it is
                told.
            rate: frames in an interval.
            seeds: of ``seeds_of``.
        """
        pixels, dtype, n_copies = self.accepts == "pixels", self.dtype, 1 if guidance_scale == 1 else 2

        def copied(x):
            return x if n_copies == 1 else x.repeat(n_copies, *[1] * (x.ndim - 1))

        motion_seeds, image_seeds = seeds
        noises = [torch.Generator().manual_seed(seed_number(seed)) for seed in image_seeds]
        start = self.encode_motion(context.to(dtype)).repeat_interleave(num_samples, 0)
        known = [*context.float().repeat_interleave(num_samples, 0).unbind(1)]  # the last frames at whole times
        previous = known[-1]
        for part in itertools.count():
            if part > 0:
                start = self.encode_motion(torch.stack(known, 1).to(dtype))
                motion_seeds = [(seed_number(seed), part) for seed in motion_seeds]
            for number, (feature, vectors) in enumerate(move(part, copied(start), motion_seeds * n_copies), start=1):
                feature = feature.to(dtype)
                maps = self.unet.maps(feature) if use_cache else None
                told = None if vectors is None else self.tell_unet(vectors)

                def predict(x, t, previous=previous, feature=feature, maps=maps, told=told):
                    noisy = copied(torch.cat([x, previous], 1).to(dtype))
                    output = self.unet(noisy, copied(t), feature, maps, told=told)
                    return output if n_copies == 1 else guided(output, guidance_scale)

                previous = denoise(
                    predict,
                    torch.stack([torch.randn(previous.shape[1:], generator=noise) for noise in noises]).to(
                        context.device, non_blocking=True
                    ),
                    make_scheduler(scheduler, self.schedule),
                    n_steps,
                    generator=noises,
                    clamp=1 if pixels else None,
                    on_step=lambda: bar.update(1),
                )
                previous = self.in_range(previous)
                if number % rate == 0:
                    known = [*known[1:], previous]
                yield previous


def intervals_of(times: Float[Tensor, "*times"]) -> Int[Tensor, "*times"]:
    """The frame intervals that times lie in, (k - 1, k], by their k."""
    near = times.round()
    return torch.where((times - near).abs() < 1e-5, near, times).ceil().long()


def frame_times_of(
    n_frames: int, batch: int | None, frame_times: Times | None, fps_multiplier: float
) -> Float[Tensor, "B {n_frames}"]:
    """The times to predict, float32; refuses those that are not positive and increasing, and those so far away that the
    solver, which takes every step on the way, would hardly come there. ``batch`` None: of as many contexts as there are
    times of."""
    furthest = LONGEST + n_frames
    if frame_times is None:
        if not (is_number(fps_multiplier) and fps_multiplier > 0):
            raise ValueError(f"fps_multiplier: expected a number above 0, found {one_line(fps_multiplier)}")
        if not n_frames / furthest <= fps_multiplier <= LONGEST:
            raise ValueError(
                f"fps_multiplier: expected {n_frames / furthest:.2g} to {LONGEST} for {n_frames} frames, found "
                f"{fps_multiplier:.3g}"
            )
        return (torch.arange(1, n_frames + 1) / fps_multiplier).expand(batch or 1, n_frames)
    if not (is_number(fps_multiplier) and fps_multiplier == 1):
        raise ValueError(f"fps_multiplier: expected 1 where frame_times are given, found {one_line(fps_multiplier)}")
    try:
        times = torch.as_tensor(frame_times, dtype=torch.float32).cpu()
    except (TypeError, ValueError, RuntimeError, OverflowError):  # not numbers, or of uneven lengths
        raise ValueError(f"frame_times: expected numbers, found {one_line(frame_times)}") from None
    if batch is None:
        batch = len(times) if times.ndim == 2 else 1
    if tuple(times.shape) not in ((n_frames,), (batch, n_frames)):
        raise ValueError(
            f"frame_times: expected shape ({n_frames},) or ({batch}, {n_frames}), found {tuple(times.shape)}"
        )
    if not (times.diff(dim=-1, prepend=torch.zeros_like(times[..., :1])) > 0).all() or not times.isfinite().all():
        raise ValueError(
            "frame_times: expected increasing times above 0, in frame intervals after the context, found "
            f"{one_line(times.tolist())}"
        )
    if times.max() > furthest:
        raise ValueError(f"frame_times: expected at most {furthest} frame intervals, found {times.max().item():g}")
    return times.expand(batch, n_frames)


def seeds_of(
    generator: torch.Generator | None, motion_seed: Seed | None, image_seed: Seed | None, batch: int, num_samples: int
) -> list[list[tuple[int, ...]]]:
    """Seeds of each sample's Brownian path and of its images' noise, see ``row_seeds``; those not given are drawn."""
    return [
        row_seeds(name, default if seed is None else seed, batch, num_samples)
        for name, seed, default in zip(("motion_seed", "image_seed"), (motion_seed, image_seed), draw_seeds(generator))
    ]


def draw_seeds(generator: torch.Generator | None) -> list[int]:
    """Two, for motion and for images."""
    device = generator.device if generator is not None else "cpu"
    return torch.randint(2**62, (2,), generator=generator, device=device).tolist()


def row_seeds(name: str, seed: Seed, n_contexts: int, n_samples: int) -> list[tuple[int, ...]]:
    """Whole numbers for each sample of each context, context by context. Of seeds one for each context, a context gets
    what it would get alone."""
    if isinstance(seed, list | tuple):
        contexts = [(each, 0) for each in seed]
    else:
        contexts = [(seed, index) for index in range(n_contexts)]
    if len(contexts) != n_contexts or not all(is_whole(each, 0) for each, _ in contexts):
        raise ValueError(
            f"{name}: expected a whole number of at least 0, or one for each of {n_contexts} contexts, found "
            f"{one_line(seed)}"
        )
    return [(*context, sample) for context in contexts for sample in range(n_samples)]


def seed_number(seed: tuple[int, ...]) -> int:
    """Whole numbers -> one of 64 bits."""
    return int(np.random.SeedSequence(seed).generate_state(1, np.uint64)[0])
