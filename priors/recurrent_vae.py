"""Recurrent VAEs: SVG-LP (Denton and Fergus 2018) and its extension HAF-SVG, "Hierarchical Stochastic Video Generation
network with Aligned Features".

At each time step a latent variable z_t, in G groups (equations 2 and 3), says what the past cannot: in training it is
drawn from the posterior q(z_t | x_1:t), which knows the frame to predict, in sampling from the learned prior
p(z_t | x_1:t-1). An LSTM predicts from the previous frame's vector h_t-1 and z_t what a decoder draws, with features of
the last observed frame at every level: joined as they are (SVG's skip connections) or aligned first (section 4.3).

With ``n_groups=1, aligner="none"`` this is SVG-LP; with ``fixed_prior=True`` also SVG-FP; with ``n_groups=0`` its
deterministic form.

Shape letters: B clips, S samples, R rows (a batch of (clip, sample) pairs), Z = n_groups * group_dim numbers of z.
"""

import collections
import contextlib
import functools
import itertools
import math
from collections.abc import Iterator, Mapping

import torch
from diffusers.configuration_utils import register_to_config
from einops import rearrange
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from latentcast.config import MisfitError, check_counts, one_line
from latentcast.layers.aligner import FeatureAligner, Memory, SkipConnection
from latentcast.layers.dcgan import DCGANDecoder, DCGANEncoder
from latentcast.layers.latent_cnn import LatentDecoder, LatentEncoder
from latentcast.layers.lstm import FramePredictor, GaussianGroups, StandardGroups
from latentcast.layers.multilevel import SteadyDecoder, n_halvings
from latentcast.layers.vgg import VGGDecoder, VGGEncoder
from latentcast.modeling import eval_mode
from latentcast.shapes import Conditions, Frames, Latents, Numbers
from latentcast.sizes import nearest_multiples, size_text
from latentcast.tokenizers.base import LatentSpec

from .base import ContinuousPrior, PriorOutput, Progress, Told, no_progress
from .sampling import check_switches

NETWORKS = {
    "dcgan": (DCGANEncoder, DCGANDecoder),
    "vgg": (VGGEncoder, VGGDecoder),
    "latent": (LatentEncoder, LatentDecoder),
}
ALIGNERS = ("none", "paper", "encoder_value")
KL_REDUCTIONS = ("sum", "mean")
ACTIVE = 0.01  # nats: a number of z whose KL is below this says nothing


class RecurrentVAE(ContinuousPrior):
    """SVG-LP and HAF-SVG over pixels, or over the latents of any tokenizer.

    Over pixels, encoder and decoder are SVG's and everything is trained end to end; over latents, small convolutional
    networks take their place. The space follows from ``latent_spec``: "pixels" for ``PixelTokenizer``, else "latents"
    (for a discrete tokenizer, the cache must hold those: ``cache.store=latents``).

    The loss is the negative of equation 1 over all frames after the first, context included, as published:
    ``sum_t [MSE_t + beta * KL_t]``. MSE is the mean over the frame's numbers, of pixels in [0, 1] and of latents as
    they are. KL is the closed form between the two Gaussians of each group, given the same draws of the groups before
    it. In training every step sees the true previous frame; all steps are then one batch for the convolutions, and
    BatchNorm's statistics are taken over the frames of all steps together.

    Args:
        latent_spec: ``FrameTokenizer.latent_spec`` of the tokenizer.
        network: "dcgan" (SVG's for Moving-MNIST), "vgg" (for KTH and BAIR) or "latent"; None: "dcgan" for pixels,
            "latent" for latents. The first two need sides that can be halved at least once.
        dim: |h|, numbers in a frame's vector, and in what the frame predictor gives the decoder.
        hidden_channels: channels of the networks' finest level; the next ones have 2, 4 and then 8 times as many.
        n_groups: G; 0 leaves z out: the deterministic form.
        group_dim: numbers in each group of z (as the paper counts: 16 for Moving-MNIST, 24 for KTH, 64 for BAIR,
            whatever G).
        fixed_prior: True takes N(0, 1) in the place of the learned prior (SVG-FP).
        aligner: "none": skip connections. "paper": the feature aligner as written, with values from the decoder.
            "encoder_value": with values from the encoder, see ``FeatureAligner``.
        aligner_max_positions: levels with more positions (height times width) than this have skip connections instead,
            since aligning costs their square: the default leaves out the 64x64 level of VGG-64. None: aligned at all
            levels. (At a single position, as in latents that are vectors, there is nothing to align.)
        cells: of every LSTM layer.
        predictor_layers: LSTM layers of the frame predictor; prior and posterior have one.
        beta: weight of the KL term.
        last_frame_skip: give the decoder the features of the frame before, after the context too, where that is a
            predicted one (an option of SVG's published code); False: those of the last observed frame.
        kl_reduction: KL_t is the mean over clips of the KL in nats summed over the numbers of z ("sum", SVG's), or also
            their mean ("mean"), with which beta means the same for any Z.
        conditions, condition_dropout: see Prior; concatenated to what all LSTMs read.
    Raises:
        ValueError: an unknown name, a negative number of groups, or groups without numbers.
    """

    memory_format = torch.channels_last  # VGG's convolutions are a third faster so

    @register_to_config
    def __init__(
        self,
        latent_spec: LatentSpec,
        network: str | None = None,
        dim: int = 128,
        hidden_channels: int = 64,
        n_groups: int = 1,
        group_dim: int = 16,
        fixed_prior: bool = False,
        aligner: str = "paper",
        aligner_max_positions: int | None = 1024,
        cells: int = 256,
        predictor_layers: int = 2,
        beta: float = 1e-4,
        kl_reduction: str = "sum",
        last_frame_skip: bool = False,
        conditions: dict[str, dict] | None = None,
        condition_dropout: float = 0.1,
    ) -> None:
        super().__init__()
        self.over_pixels = self.accepts == "pixels"
        network = network or ("dcgan" if self.over_pixels else "latent")
        for name, value, known in (
            ("network", network, tuple(NETWORKS)),
            ("aligner", aligner, ALIGNERS),
            ("kl_reduction", kl_reduction, KL_REDUCTIONS),
        ):
            if value not in known:
                raise ValueError(f"{name}: expected one of {', '.join(known)}, found {value!r}")
        check_counts(least=0, n_groups=n_groups)
        check_counts(group_dim=group_dim)
        if beta < 0:
            raise ValueError(f"beta: expected at least 0, found {beta}")
        sizes = (latent_spec["channels"], latent_spec["height"], latent_spec["width"], dim, hidden_channels)
        make_encoder, make_decoder = NETWORKS[network]
        if network != "latent":
            make_decoder = functools.partial(make_decoder, output_activation="tanh" if self.over_pixels else "linear")
            if not n_halvings(latent_spec["height"], latent_spec["width"]):
                nearest = size_text(nearest_multiples(latent_spec["height"], latent_spec["width"], 2, least=4))
                raise MisfitError(
                    f"network: {network} needs even sides of at least 8, found {latent_spec['height']} x "
                    f"{latent_spec['width']}; take latent, or the nearest that fits, {nearest}"
                )
        self.encoder = make_encoder(*sizes)
        self.joins = nn.ModuleList()
        for channels, height, width in self.encoder.level_shapes:
            affordable = aligner_max_positions is None or height * width <= aligner_max_positions
            aligned = aligner != "none" and affordable and height * width > 1
            self.joins.append(FeatureAligner(channels, aligner) if aligned else SkipConnection())
        self.decoder = make_decoder(*sizes, joined=[join.joined for join in self.joins])
        n_read, groups = dim * (2 if conditions else 1), (n_groups, group_dim)  # by LSTMs of each frame, see ``beside``
        self.posterior = GaussianGroups(n_read, *groups, cells)
        self.prior = StandardGroups(*groups) if fixed_prior else GaussianGroups(n_read, *groups, cells)
        self.predictor = FramePredictor(n_read + n_groups * group_dim, dim, cells, predictor_layers)
        self.make_conditioner(dim)
        self.to(memory_format=self.memory_format)

    # Training -----------------------------------------------------------------------------------------------------

    def forward(self, clip: Frames | Latents, n_context: int, conditions: Conditions | None = None) -> PriorOutput:
        """The negative ELBO, per clip; one draw of z.

        Args:
            clip: frames in [-1, 1], or latents. n_context: how many of its frames the decoder may take features from.
                As published the loss is that of all frames after the first, in and after the context.
            conditions: see Prior.
        Returns:
            ``logs``, all means over the frames: ``mse``, ``kl`` and ``kl_group_1`` ... (nats, summed over the group),
            ``active_units`` and ``active_units_group_1`` ... (numbers of z with a KL of at least 0.01 nats; none: the
            group has collapsed onto the prior).
        """
        self.check_clip(clip, "clip")
        self.check_context(n_context, clip.shape[1])
        T = clip.shape[1]
        h, features = self.encoder(as_rows(clip.to(self.dtype)))
        h = of_clips(h, T)
        before, after = self._transitions(h, conditions)
        z, kl = self._posterior_kl(before, after)
        predicted, _ = self.predictor(torch.cat([before, z], -1))

        # Frame t has the features of the frame before it, and after the context those of the last observed one.
        n_shown = T - 1 if self.config.last_frame_skip else n_context
        decoder = SteadyDecoder(self.decoder, self.joins)
        observed = [as_rows(of_clips(level, T)[:, :n_shown]) for level in features]
        memories = [
            memory.map(lambda x: as_rows(last_repeated(of_clips(x, n_shown), T - 1)))
            for memory in decoder.remember(observed)
        ]
        frames = of_clips(decoder(as_rows(predicted), memories).float(), T - 1)

        scale = 0.5 if self.over_pixels else 1.0  # from [-1, 1] to the [0, 1] for which beta was published
        mse = (scale * (frames - clip[:, 1:])).square().mean()
        kl = kl.mean((0, 1))  # (Z,)
        weighted = self.config.beta * (kl.mean() if self.config.kl_reduction == "mean" and len(kl) else kl.sum())
        return PriorOutput(loss=(T - 1) * (mse + weighted), logs={"mse": mse.detach(), **self._kl_logs(kl.detach())})

    @property
    def explains(self) -> tuple[str, ...]:
        """``kl``, where there is a z."""
        return ("kl",) if self._z_dim else ()

    def _transitions(self, h, conditions):
        """Frames' vectors h (B, T, dim) -> what the LSTMs read of each frame after the first, (B, T - 1, n_read) both:
        the frame before it, for prior and predictor, and the frame itself, for the posterior."""
        vectors = self.condition_vectors(conditions, *h.shape[:2])
        told = None if vectors is None else vectors[:, 1:]
        return beside(h[:, :-1], told), beside(h[:, 1:], told)

    def _posterior_kl(self, before, after, noise=None):
        """What ``_transitions`` gives -> z of the frames after the first, drawn by noise of its shape, and the KL of
        each of its numbers from the prior in nats, (B, T - 1, Z) both."""
        z, mean, logvar, _ = self.posterior(after, noise=noise)
        _, prior_mean, prior_logvar, _ = self.prior(before, self._groups(z))
        return z, kl_gaussians(mean, logvar, prior_mean, prior_logvar)

    @torch.no_grad()
    def explain(
        self,
        clip: Frames | Latents,
        n_context: int,
        *,
        generator: torch.Generator | None = None,
        conditions: Conditions | None = None,
        **options: object,
    ) -> dict[str, Float[Tensor, "B ..."]]:
        """As Prior's: ``kl`` of each number of z, of all frames after the first; {} without z."""
        self.check_clip(clip, "clip")
        self.check_context(n_context, clip.shape[1])
        if not self._z_dim:
            return {}
        B, T = clip.shape[:2]
        noise = self._noise((B, T - 1, self._z_dim), generator)
        with eval_mode(self):
            h = of_clips(self.encoder(as_rows(clip.to(self.dtype)))[0], T)
            kl = self._posterior_kl(*self._transitions(h, conditions), noise)[1]
        return {"kl": kl.unflatten(-1, (self.config.n_groups, self.config.group_dim))}

    def _kl_logs(self, kl):
        """What to log of the KL of each number of z, (Z,) in nats."""
        if not len(kl):
            return {}
        groups, active = kl.split(self.config.group_dim), (kl >= ACTIVE).float()
        logs = {"kl": kl.sum(), "active_units": active.sum()}
        for j, (nats, units) in enumerate(zip(groups, active.split(self.config.group_dim)), start=1):
            logs |= {f"kl_group_{j}": nats.sum(), f"active_units_group_{j}": units.sum()}
        return logs

    def _groups(self, z):
        """z (..., Z) -> its groups, (..., group_dim) each."""
        return z.split(self.config.group_dim, -1) if self._z_dim else ()

    @property
    def _z_dim(self):
        return self.config.n_groups * self.config.group_dim

    # Sampling -----------------------------------------------------------------------------------------------------

    @property
    def deterministic(self) -> bool:
        """Whether the model has no z, and with it nothing to draw."""
        return not self._z_dim

    def options_of(self, options: dict[str, object], index: int, n_contexts: int, n_frames: int) -> dict[str, object]:
        """As Prior's; values in ``z_groups`` may be (B, n_frames, group_dim)."""
        options, z_groups = super().options_of(options, index, n_contexts, n_frames), options.get("z_groups")
        if isinstance(z_groups, Mapping):
            fixed = self._fixed_groups(z_groups, n_contexts, n_frames)
            each = {group: value for group, value in fixed.items() if value.ndim == 3 and len(value) > 1}
            cut = {group: each[int(group) - 1][index : index + 1] for group in z_groups if int(group) - 1 in each}
            options = options | {"z_groups": dict(z_groups) | cut}
        return options

    def sampler_ranges(self) -> dict[str, dict]:
        return {"sample_batch": {"least": 1}}

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
        z_groups: Mapping[int | str, Numbers] | None = None,
        sample_batch: int = 128,
        batch_statistics: bool = False,
    ) -> Float[Tensor, "B {num_samples} {n_frames} C H W"]:
        """Continue frames or latents.

        The context's frames are encoded once each. The LSTMs go over them with z from the posterior, a draw for each
        sample; then z comes from the prior, and each predicted frame is encoded in turn. BatchNorm uses its running
        statistics, also while the model is in training mode (but see ``batch_statistics``).

        Args:
            context: at least one frame. n_frames: how many to predict, any number.
            num_samples: futures for each context; all of them are rows of one batch.
            generator: for reproducible samples. What it draws depends neither on ``sample_batch`` nor on ``z_groups``,
                and the first frames of a longer future are those of a shorter one.
            progress: counts predicted frames, those of one batch at once.
            conditions: see Prior.
            z_groups: groups of z, counted from 1, that are not drawn in the future -> their value: a number for all of
                the group ({1: 0}: Figure 8), or numbers (group_dim,), (n_frames, group_dim) or
                (B, n_frames, group_dim), as ``infer`` gives.
            sample_batch: rows that are advanced at once, which bounds the memory.
            batch_statistics: BatchNorm normalises by the rows that are advanced at once, as SVG's published code does,
                which never leaves training mode; a future then depends on the others of its batch.
        Raises:
            ValueError: too short a context, unknown groups or values that do not fit.
        """
        check_counts(n_frames=n_frames)
        fixed = self._check_sampling(context, n_frames, num_samples, z_groups, sample_batch, batch_statistics)
        B, n_context = context.shape[:2]
        n_rows = B * self._n_drawn(num_samples)
        future = torch.empty(n_rows, n_frames, *context.shape[2:], dtype=context.dtype, device=context.device)
        with self._sampling(batch_statistics):
            told = self._told(conditions, B, n_context + n_frames)
            futures = self._futures(context, told, n_rows, generator, fixed, sample_batch)
            with (progress or no_progress)(total=n_frames * math.ceil(n_rows / int(sample_batch))) as bar:
                for rows, frames in futures:
                    for t, frame in zip(range(n_frames), frames):
                        future[rows, t] = frame.to(future.dtype)
                        bar.update(1)
        return self._by_context(future, B, num_samples)

    def stream(
        self,
        context: Frames | Latents,
        told: Told,
        *,
        num_samples: int,
        generator: torch.Generator | None,
        z_groups: Mapping[int | str, Numbers] | None,
        sample_batch: int,
        batch_statistics: bool,
    ) -> Iterator[Float[Tensor, "B {num_samples} C H W"]]:
        """As Prior's. Values in ``z_groups`` are those of every frame: a number, (group_dim,) or (B, 1, group_dim)."""
        fixed = self._check_sampling(context, 1, num_samples, z_groups, sample_batch, batch_statistics)
        n_rows = len(context) * self._n_drawn(num_samples)
        futures = self._futures(context, told, n_rows, generator, fixed, sample_batch)
        frames = self._together(futures, batch_statistics)
        return (self._by_context(frame.to(context.dtype), len(context), num_samples) for frame in frames)

    def _check_sampling(self, context, n_frames, num_samples, z_groups, sample_batch, batch_statistics):
        """Refuse what cannot be sampled -> the values in ``z_groups``: group, from 0 -> (B, n_frames, group_dim)."""
        self.check_clip(context, "context")
        check_counts(num_samples=num_samples, sample_batch=sample_batch)
        check_switches(batch_statistics=batch_statistics)
        B, n_context = context.shape[:2]
        self.check_context(n_context, n_context + n_frames)
        fixed = self._fixed_groups(z_groups, B, n_frames)
        return {group: value.expand(B, n_frames, self.config.group_dim) for group, value in fixed.items()}

    def _n_drawn(self, num_samples):
        """How many futures of a context there are to draw: without z, all of them are one and the same."""
        return num_samples if self._z_dim else 1

    @staticmethod
    def _by_context(rows, n_contexts, num_samples):
        """What each row has, (R, ...) -> (B, num_samples, ...)."""
        rows = rows.unflatten(0, (n_contexts, -1))
        return rows.expand(n_contexts, num_samples, *rows.shape[2:]).contiguous()

    @contextlib.contextmanager
    def _sampling(self, batch_statistics):
        with eval_mode(self), by_batch_statistics(self) if batch_statistics else contextlib.nullcontext():
            yield

    @torch.no_grad()
    def _together(self, futures, batch_statistics):
        """Yield the frames of ``_futures``, those of all rows at once; between two of them the model is as it was."""
        with self._sampling(batch_statistics):
            chunks = [frames for _, frames in futures]
        while True:
            with self._sampling(batch_statistics):
                frame = torch.cat([next(frames) for frames in chunks])
            yield frame

    def _futures(self, context, told, n_rows, generator, fixed, sample_batch):
        """Begin ``n_rows`` futures, as many of each context; yield those that are advanced at once: their indices, and
        their frames (R, C, H, W) without an end.

        Args:
            told: see ``stream``. fixed: group, from 0 -> (B, n_frames, group_dim); what the last frame has, later ones
                have too.
        """
        sample_batch = min(int(sample_batch), 2**31)  # torch counts no further
        decoder = SteadyDecoder(self.decoder, self.joins)
        h, memories = self._encode_context(context, decoder, sample_batch)
        chunks = torch.arange(n_rows, device=context.device).split(sample_batch)
        # Step by step, so that a longer future begins like a shorter one; of all rows at once, whatever the chunks.
        noise = (self._noise((n_rows, self._z_dim), generator) for _ in itertools.count())
        for rows, own in zip(chunks, shared(noise, len(chunks))):
            clips = rows // (n_rows // len(context))
            yield rows, self._roll_out(rows, clips, h, memories, decoder, own, told, fixed)

    def _roll_out(self, rows, clips, h, memories, decoder, noise, told, fixed):
        """Yield the predicted frames of R rows, (R, C, H, W) each, without an end.

        Args:
            rows, clips: (R,), which rows these are, and the context of each. h, memories: see ``_encode_context``.
            noise: iterator over the steps, of all rows (n_rows, Z).
            told, fixed: see ``_futures``.
        """
        h, memories = h[clips], [memory.map(lambda x: x[clips]) for memory in memories]
        fixed = {j: value[clips] for j, value in fixed.items()}

        def beside_told(h, first):
            """``beside`` of the transitions to the frames from ``first`` on."""
            if self.conditioner is None:
                return h
            return beside(h, torch.stack([told(first + i)[clips] for i in range(h.shape[1])], 1))

        n_context, prior_state, predictor_state = h.shape[1], None, None
        if n_context > 1:
            drawn = torch.stack([next(noise)[rows] for _ in range(n_context - 1)], 1)
            z, *_ = self.posterior(beside_told(h[:, 1:], 1), noise=drawn)
            before = beside_told(h[:, :-1], 1)
            *_, prior_state = self.prior(before, self._groups(z))
            _, predictor_state = self.predictor(torch.cat([before, z], -1))
        last = h[:, -1:]
        for t in itertools.count():
            known = [None] * self.config.n_groups
            for j, value in fixed.items():
                known[j] = value[:, min(t, value.shape[1] - 1), None].to(last.dtype)
            before = beside_told(last, n_context + t)
            z, _, _, prior_state = self.prior(before, known, next(noise)[rows, None], prior_state)
            predicted, predictor_state = self.predictor(torch.cat([before, z.to(before.dtype)], -1), predictor_state)
            frame = decoder(predicted[:, 0], memories)
            yield frame
            h, features = self.encoder(frame.to(self.dtype))
            last = h[:, None]
            if self.config.last_frame_skip:
                memories = decoder.remember(features)

    def _encode_context(self, context, decoder, chunk):
        """context (B, n_context, ...) -> h (B, n_context, dim), and of each level the Memory of the last frames.

        In chunks; the features of earlier frames, which nobody needs, are not kept.
        """
        frames = context.to(self.dtype)
        earlier = [self.encoder(part)[0] for part in frames[:, :-1].flatten(0, 1).split(chunk) if len(part)]
        last, memories = [], []
        for part in frames[:, -1].split(chunk):
            h, features = self.encoder(part)
            last.append(h)
            memories.append(decoder.remember(features))
        h = torch.cat(last)[:, None]
        if earlier:
            h = torch.cat([torch.cat(earlier).unflatten(0, (len(context), -1)), h], 1)
        return h, [Memory.cat(parts) for parts in zip(*memories)]

    @torch.no_grad()
    def infer(
        self, clip: Frames | Latents, *, generator: torch.Generator | None = None, conditions: Conditions | None = None
    ) -> dict[int, Float[Tensor, "B _ group_dim"]]:
        """z of the frames after the first, a draw from the posterior, which sees the frames themselves.

        Args:
            clip: frames in [-1, 1], or latents, at least 2.
            generator: of the draw. conditions: see Prior.
        Returns:
            of each group, counted from 1. ``sample(..., z_groups=...)`` takes those of the frames that it is to
            predict: reconstructed, or in between two clips where theirs are interpolated.
        """
        self.check_clip(clip, "clip")
        self.check_context(1, clip.shape[1])
        B, T = clip.shape[:2]
        noise = self._noise((B, T - 1, self._z_dim), generator)
        with eval_mode(self):
            h = of_clips(self.encoder(as_rows(clip.to(self.dtype)))[0], T)
            z, *_ = self.posterior(self._transitions(h, conditions)[1], noise=noise)
        return dict(enumerate(self._groups(z), start=1))

    def reconstruct(
        self,
        clip: Frames | Latents,
        n_context: int,
        *,
        generator: torch.Generator | None = None,
        conditions: Conditions | None = None,
    ) -> Float[Tensor, "B _ C H W"]:
        """What z can say about a clip: ``clip[:, n_context:]`` as sampled with z from the posterior.

        Args:
            clip: frames in [-1, 1], or latents. generator: of the draws.
            conditions: see Prior.
        """
        self.check_context(n_context, clip.shape[1])
        settings = {"generator": generator, "conditions": conditions}
        z = {j: group[:, n_context - 1 :] for j, group in self.infer(clip, **settings).items()}
        return self.sample(clip[:, :n_context], clip.shape[1] - n_context, z_groups=z, **settings)[:, 0]

    def _noise(self, shape, generator):
        device = self.device if generator is None else generator.device
        return torch.randn(shape, generator=generator, device=device).to(self.device)

    def _fixed_groups(self, z_groups, n_clips, n_frames):
        """``z_groups`` of ``sample`` -> group, from 0 -> values that fit (B, n_frames, group_dim)."""
        fixed = {}
        shape = (n_clips, n_frames, self.config.group_dim)
        z_groups = {} if z_groups is None else z_groups
        if not isinstance(z_groups, Mapping):
            raise ValueError(
                f"z_groups: expected a mapping from groups to values, like {{1: 0}}, found {one_line(z_groups)}"
            )
        for group, value in z_groups.items():
            if str(group) not in {str(j + 1) for j in range(self.config.n_groups)}:
                known = f"1 to {self.config.n_groups}" if self.config.n_groups else "none: the model has no z"
                raise ValueError(f"z_groups: expected groups {known}, found {one_line(group)}")
            try:
                value = torch.as_tensor(value, dtype=torch.float32, device=self.device)
            except (TypeError, ValueError, RuntimeError, OverflowError):  # not numbers, or of uneven lengths
                raise ValueError(
                    f"z_groups: group {group}: expected a number or numbers, found {one_line(value)}"
                ) from None
            if not value.isfinite().all():
                raise ValueError(f"z_groups: group {group}: expected finite numbers, found {one_line(value.tolist())}")
            if value.ndim > 3 or any(n not in (1, size) for n, size in zip(value.shape[::-1], shape[::-1])):
                raise ValueError(
                    f"z_groups: group {group}: expected a number or numbers of a shape that fits "
                    f"(B, n_frames, group_dim) = {shape}, found {tuple(value.shape)}"
                )
            fixed[int(group) - 1] = value
        return fixed


@contextlib.contextmanager
def by_batch_statistics(model: nn.Module) -> Iterator[None]:
    """Let BatchNorm normalise by the batch at hand; its running statistics stay as they are."""
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.training, norm.track_running_stats = True, False
    try:
        yield
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        expected = "expected two contexts or more, and no batch of one row (sample_batch)"
        raise ValueError(f"batch_statistics: {expected}, found a batch of one") from None
    finally:
        for norm in norms:
            norm.training, norm.track_running_stats = False, True


def as_rows(x: Shaped[Tensor, "B T *rest"]) -> Shaped[Tensor, " rows *rest"]:
    """Frames of clips, one after another."""
    return rearrange(x, "b t ... -> (b t) ...")


def of_clips(x: Shaped[Tensor, " rows *rest"], n_frames: int) -> Shaped[Tensor, "B {n_frames} *rest"]:
    """``as_rows`` undone."""
    return rearrange(x, "(b t) ... -> b t ...", t=n_frames)


def beside(h: Float[Tensor, "B T n"], vectors: Float[Tensor, "B T told"] | None) -> Float[Tensor, "B T n_read"]:
    """What LSTMs read: frames' vectors h, and beside each what the model is told."""
    return h if vectors is None else torch.cat([h, vectors], -1)


def shared(iterator: Iterator, n: int) -> list[Iterator]:
    """``n`` iterators over the same endless items, each of which is kept until all have had it (``itertools.tee`` keeps
    dozens more)."""
    waiting = [collections.deque() for _ in range(n)]

    def hand_out(item):
        for queue in waiting:
            queue.append(item)

    def own(queue):
        while True:
            if not queue:
                hand_out(next(iterator))
            yield queue.popleft()

    return [own(queue) for queue in waiting]


def last_repeated(x: Float[Tensor, "B m *rest"], n: int) -> Float[Tensor, "B n *rest"]:
    """The last of the m entries of x stands for those that lack."""
    lacking = n - x.shape[1]
    return torch.cat([x, x[:, -1:].expand(-1, lacking, *x.shape[2:])], 1) if lacking else x


def kl_gaussians(
    mean: Float[Tensor, "*z"],
    logvar: Float[Tensor, "*z"],
    prior_mean: Float[Tensor, "*z"],
    prior_logvar: Float[Tensor, "*z"],
) -> Float[Tensor, "*z"]:
    """KL(N(mean, exp(logvar)) || N(prior_mean, exp(prior_logvar))) of each number in nats, in fp32."""
    mean, logvar, prior_mean, prior_logvar = (x.float() for x in (mean, logvar, prior_mean, prior_logvar))
    distance = (mean - prior_mean).square() * (-prior_logvar).exp()
    return 0.5 * (prior_logvar - logvar + (logvar - prior_logvar).exp() + distance - 1)
