"""MaskedTransformer: the codes of a frame are drawn together, in a few steps, down their tree.

No paper's. What it is made of: masked training and decoding by confidence (MaskGIT, Chang et al. 2022; of video MAGVIT,
Yu et al. 2023), one level of codes after the other (SoundStorm, Borsos et al. 2023), and a transformer that is causal
from frame to frame (``latentcast/layers/block_causal.py``) in which one pass trains all frames of a clip.

    p(future | context) = prod_t p(frame t | frames < t)

Of a frame some codes are known and the rest is masked. A position has levels (quantisation layers, codebooks, channels
of pixels), and its **depth** is how many of them are known, from the coarsest on: a code is never known while its
parent is masked, so every state on the way stands for a picture. The network sees a frame's state and all earlier
frames, and gives of each masked position the probabilities of its next code, and of those below it given the path down
to them.

Training draws a level and a rate for each frame: of so many positions this level is masked, and of all positions what
is below it. Sampling begins with nothing known, draws all masked codes at every step, and keeps some of them.

Shape letters: B clips, s frames predicted, P positions of a frame in raster order, n levels, M rows of a sampler, d
width.
"""

import itertools
import math
import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import register_to_config
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn

from latentcast.config import check_counts, is_whole, one_line
from latentcast.layers.block_causal import Past
from latentcast.shapes import Codes, Conditions
from latentcast.tokenizers.base import LatentSpec, check_codes

from .base import PriorOutput, Progress, Told, code_nats, need_codes, no_progress
from .block_causal import BlockCausalPrior, Memory
from .sampling import (
    DRAWING,
    GUIDANCE,
    check_guidance,
    check_numbers,
    check_sampling,
    check_switches,
    draw,
    guided,
    is_number,
)

MASKINGS = ("tree", "flat")
ORDERS = ("confidence", "random", "raster")
CANVASES = ("last", "argmax")
IGNORED = -100  # in the place of a code


class MaskedTransformer(BlockCausalPrior):
    """Masked decoding over the codes of any discrete tokenizer: one codebook, several side by side, or a tree.

    Args:
        latent_spec: ``FrameTokenizer.latent_spec`` of the tokenizer; codebooks, height and width are used.
        n_frames: of the longest clip in training, at least 2.
        window: frames that each layer sees, the one being predicted among them, at least 2; None: ``n_frames``. Few
            make a step cheaper, and through several layers more are seen.
        dim, n_layers, n_heads, head_dim, kernel_size: of the transformer.
        max_paths: below a code of a tree each number means something else, so a code is embedded as the path down to
            it, of its own level and all above it; at levels with more paths than this, alone.
        masking: "tree", level after level; "flat", where a position is masked all of its levels are.
        corruption: in training a share of the codes before the predicted frame is replaced by random ones, as its own
            mistakes will be. The share is drawn for each clip, from 0 to this, and told to the model.
        conditions, condition_dropout: see Prior; what is told of a frame enters every block there.
    Raises:
        ValueError: a spec without codes, or an option that is out of range.
    """

    accepts = "codes"
    explains = ("nats", "decoding", "depth")

    @register_to_config
    def __init__(
        self,
        latent_spec: LatentSpec,
        n_frames: int = 16,
        dim: int = 256,
        n_layers: int = 6,
        n_heads: int = 4,
        head_dim: int = 64,
        window: int | None = None,
        kernel_size: int = 3,
        max_paths: int = 4096,
        masking: str = "tree",
        corruption: float = 0.2,
        conditions: dict[str, dict] | None = None,
        condition_dropout: float = 0.1,
    ) -> None:
        super().__init__()
        need_codes(latent_spec, "MaskedTransformer")
        if masking not in MASKINGS:
            raise ValueError(f"masking: expected one of {', '.join(MASKINGS)}, found {one_line(masking)}")
        if not (is_number(corruption) and 0 <= corruption < 1):
            raise ValueError(f"corruption: expected at least 0 and below 1, found {one_line(corruption)}")
        self.codebook_sizes = sizes = list(latent_spec["codebook_sizes"])
        self.grid = latent_spec["height"], latent_spec["width"]
        self.n_positions, self.n_levels = math.prod(self.grid), len(sizes)
        self.register_buffer("sizes", torch.tensor(sizes), persistent=False)
        self.make_trunk(self.grid, dim, n_layers, n_heads, head_dim, n_frames, window, kernel_size)
        check_counts(max_paths=max_paths)
        paths = list(itertools.accumulate(sizes, operator.mul))
        n_rows = [n if n <= max_paths else size for n, size in zip(paths, sizes)]
        # Of a position stand in its place the sum of its known codes, and a vector for how many are known.
        self.codes = nn.ModuleList(nn.Embedding(n, dim) for n in n_rows)
        self.depths = nn.Embedding(self.n_levels + 1, dim)
        for weight, n_summed in ((self.depths.weight, 1), *((table.weight, self.n_levels) for table in self.codes)):
            nn.init.normal_(weight, std=n_summed**-0.5)
        # The logits of a level, from the features and the path down to it.
        self.path = nn.ModuleList(nn.Embedding(n, dim) for n in n_rows[:-1])
        self.heads = nn.ModuleList(
            nn.Sequential(nn.Linear(dim, dim), nn.GELU(), nn.Linear(dim, size)) for size in sizes
        )

    # The network --------------------------------------------------------------------------------------------------

    def embed(self, codes: Int[Tensor, "*frames P n"], depth: Int[Tensor, "*frames P"]) -> Float[Tensor, "*frames P d"]:
        """Codes of which ``depth`` levels are known."""
        known = depth[..., None] > torch.arange(self.n_levels, device=depth.device)  # (..., P, n)
        x = self.depths(depth) + self.places
        for i, (table, row) in enumerate(zip(self.codes, self._rows(codes))):
            x = x + table(row) * known[..., i, None]
        return x

    def _rows(self, codes):
        """Of each level in turn the rows of its codes in its embedding: codes (..., n) -> (...)."""
        path = torch.zeros_like(codes[..., 0])
        for code, size, table in zip(codes.unbind(-1), self.codebook_sizes, self.codes):
            path = path * size + code
            yield path if table.num_embeddings > size else code

    def embed_clean(self, codes: Int[Tensor, "*frames P n"]) -> Float[Tensor, "*frames P d"]:
        """Codes that are all known."""
        return self.embed(codes, torch.full(codes.shape[:-1], self.n_levels, device=codes.device))

    def logits(
        self, features: Float[Tensor, "*rows d"], i: int, codes: Int[Tensor, "*rows n"]
    ) -> Float[Tensor, "*rows K"]:
        """Logits of level i; of the codes those above level i count."""
        for table, row in zip(self.path[:i], self._rows(codes)):
            features = features + table(row)
        return self.heads[i](features)

    # Training -----------------------------------------------------------------------------------------------------

    def forward(self, clip: Codes, n_context: int, conditions: Conditions | None = None) -> PriorOutput:
        """Mean cross-entropy of the masked codes, in nats a code.

        In eval mode masks and corruption are the same in every call (``eval_seed``), so that losses compare.

        Args:
            clip: int64, of at most ``n_frames``. n_context: context frames; the others are predicted, all in one pass,
                each from the true frames before it.
            conditions: see Prior.
        Returns:
            ``logs`` has the bits a masked code, and of each level where there are several.
        """
        codes, told = self._check_clip(clip, n_context, conditions)
        target, n_clips = codes[:, n_context:], len(codes)
        generator = None if self.training else torch.Generator().manual_seed(self.eval_seed)
        depth, masked = self._draw_masks(target.shape[:2], generator)
        rate = self._rand((n_clips, 1), generator) * self.config.corruption
        clean = self._corrupted(codes[:, :-1], rate, generator)
        features = self.trunk(
            self.embed_clean(clean),
            self.embed(target, depth),
            *self._both_vectors(rate, told, n_context),
        )
        total, n_codes, logs = 0, 0, {}
        for i in range(self.n_levels):
            predicted = masked & (depth <= i)
            # All positions are looked at, and some do not count: to pick them would wait for a GPU.
            wanted = target[..., i].masked_fill(~predicted, IGNORED)
            logits = self.logits(features, i, target).float()
            nats = F.cross_entropy(logits.flatten(0, -2), wanted.flatten(), ignore_index=IGNORED, reduction="sum")
            count = predicted.sum()
            total, n_codes = total + nats, n_codes + count
            logs[f"bits_per_masked_code_{i + 1}"] = nats.detach() / count.clamp(min=1) / math.log(2)
        loss = total / n_codes
        logs = {"bits_per_masked_code": loss.detach() / math.log(2)} | (logs if self.n_levels > 1 else {})
        return PriorOutput(loss=loss, logs=logs)

    def _draw_masks(self, shape, generator):
        """For frames of ``shape`` -> how many levels of each position are known, and of which the next is masked and to
        be predicted (both (*shape, P)): with r uniform in [0, 1), of a share cos(pi r / 2), at least one."""
        share = torch.cos(self._rand((*shape, 1), generator) * math.pi / 2)
        masked = ranks(self._rand((*shape, self.n_positions), generator)) < (share * self.n_positions).ceil()
        if self.config.masking == "flat":
            return (~masked) * self.n_levels, masked
        level = (self._rand((*shape, 1), generator) * self.n_levels).long()
        return level + ~masked, masked

    def _corrupted(self, codes, rate, generator):
        """Codes (B, t, P, n), of a share ``rate`` (B, 1) of the positions random ones from a random level down."""
        wrong = self._rand(codes.shape[:3], generator) < rate[..., None]
        level = (self._rand(codes.shape[:3], generator) * self.n_levels).long()
        wrong = wrong[..., None] & (level[..., None] <= torch.arange(self.n_levels, device=codes.device))
        return torch.where(wrong, (self._rand(codes.shape, generator) * self.sizes).long(), codes)

    def _check_clip(self, clip, n_context, conditions):
        """-> codes (B, t, P, n), what is told of the frames (B, t, d) or None."""
        check_codes(clip, self.codebook_sizes, self.grid, name="clip")
        self.check_length(clip, n_context)
        return clip.flatten(2, 3), self.condition_vectors(conditions, *clip.shape[:2])

    # Likelihood ---------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def log_prob(self, clip: Codes, n_context: int, conditions: Conditions | None = None) -> Float[Tensor, " B"]:
        """Log-likelihood in nats of the codes after the context, drawn one by one.

        That of ``sample(order="raster", n_steps=...)`` with as many steps as there are codes in a frame (with flat
        masking: positions): a proper distribution, of which each code costs a pass. ``log_prob_bound`` needs fewer.
        """
        return -self._nats(clip, n_context, conditions).flatten(1).sum(1)

    def _nats(self, clip, n_context, conditions):
        """(B, s, h, w, n): what each code costs, level after level in raster order."""
        predict, target = self._from_true_past(clip, n_context, conditions)
        nats = torch.zeros(target.shape, device=target.device)
        for levels, _ in self._phases([1] * self.n_levels):
            for place in range(self.n_positions):
                known = torch.arange(self.n_positions, device=target.device) < place
                depth = torch.where(known, levels[-1] + 1, levels[0]).expand(target.shape[:-1])
                features = predict(depth)[:, :, place]
                nats[:, :, place, levels] = self._level_nats(levels, features, target[:, :, place])
        return nats.unflatten(2, self.grid)

    @torch.no_grad()
    def log_prob_bound(
        self,
        clip: Codes,
        n_context: int,
        conditions: Conditions | None = None,
        n_draws: int = 8,
        generator: torch.Generator | None = None,
    ) -> Float[Tensor, " B"]:
        """An estimate of a lower bound of the log-likelihood, in nats: the mean over all orders in which the positions
        of a level might be drawn one by one (the any-order ELBO, Hoogeboom et al. 2022, Eq. 4),

            sum over levels of P E_k E_(k positions masked) [mean over these of log p(code | known)], k = 1 .. P.

        Args:
            n_draws: of k, spread evenly, and of masks for each level and frame; each is one pass.
        """
        total = torch.zeros(len(clip), device=clip.device)
        for _, nats, masked in self._by_random_orders(clip, n_context, conditions, n_draws, generator):
            share = masked.float().mean(2, keepdim=True)[..., None]
            total = total - (nats * masked[..., None] / share).sum((1, 2, 3)) / n_draws
        return total

    def _by_random_orders(self, clip, n_context, conditions, n_draws, generator):
        """Yield for each draw a level (or all), what its codes cost where they are masked, nats (B, s, P, len(levels)),
        and where they are, (B, s, P): of k positions, k uniform in 1 .. P and spread evenly over the draws."""
        check_counts(n_draws=n_draws)
        predict, target = self._from_true_past(clip, n_context, conditions)
        for levels, _ in self._phases([1] * self.n_levels):
            for number in range(n_draws):
                where = (number + self._rand((*target.shape[:2], 1), generator)) / n_draws
                masked = ranks(self._rand(target.shape[:3], generator)) <= (where * self.n_positions).long()
                features = predict(torch.where(masked, levels[0], levels[-1] + 1))
                yield levels, self._level_nats(levels, features, target), masked

    @torch.no_grad()
    def explain(
        self,
        clip: Codes,
        n_context: int,
        *,
        num_samples: int = 1,
        generator: torch.Generator | None = None,
        conditions: Conditions | None = None,
        n_draws: int = 8,
        **options: object,
    ) -> dict[str, Shaped[Tensor, "B ..."]]:
        """As Prior's: ``nats`` of each code, as ``log_prob_bound`` estimates them; and of the first frame that is
        predicted the states on the way to it, ``decoding`` (B, n_steps, h, w, n), in which codes that are not known yet
        are as they were drawn last, and ``depth`` (B, n_steps, h, w), how many levels of each position are known."""
        shape = len(clip), clip.shape[1] - n_context, self.n_positions, self.n_levels
        total, weights, states = torch.zeros(shape, device=self.device), torch.zeros(shape, device=self.device), []
        for levels, nats, masked in self._by_random_orders(clip, n_context, conditions, n_draws, generator):
            weight = (masked / masked.sum(2, keepdim=True))[..., None]
            total[..., levels] += nats * weight
            weights[..., levels] += weight
        how = Decoding(**self._sampling_defaults() | options)
        context, told = clip[:, :n_context], self._told(conditions, *clip.shape[:2])
        phases = self._check_sampling(context, 1, how)
        next(self._stream(context, told, 1, generator, how, phases, lambda *state: states.append(state)))
        drawn = states[: how.n_calls(phases) - 1]  # and then remembered
        codes, depth = (torch.stack(each, 1).unflatten(2, self.grid) for each in zip(*drawn))
        nats = total / weights.clamp(min=torch.finfo(torch.float32).tiny)
        return {"nats": nats.unflatten(2, self.grid), "decoding": codes, "depth": depth}

    def _from_true_past(self, clip, n_context, conditions):
        """-> function of depths (B, s, P) -> features (B, s, P, d) of frames each seen with the true ones before it;
        and the codes of these, (B, s, P, n)."""
        codes, told = self._check_clip(clip, n_context, conditions)
        none = codes.new_zeros(len(codes), 1)
        clean, target = self.embed_clean(codes[:, :-1]), codes[:, n_context:]
        clean_vectors, vectors = self._both_vectors(none, told, n_context)
        past = self.trunk.remember(Past(), clean, clean_vectors, n_targets=target.shape[1])
        return lambda depth: self.trunk.predict(past, self.embed(target, depth), vectors), target

    def _level_nats(self, levels, features, codes):
        """What the codes of these levels cost: features (..., d), codes (..., n) -> (..., len(levels))."""
        return torch.stack([code_nats(self.logits(features, i, codes), codes[..., i]) for i in levels], -1)

    # Sampling -----------------------------------------------------------------------------------------------------

    def sampler_ranges(self) -> dict[str, dict]:
        return (
            DRAWING
            | GUIDANCE
            | {
                "n_steps": {"least": 1},
                "order": {"choices": ORDERS},
                "choice_temperature": {"least": 0},
                "canvas": {"kind": None},
                "doubt": {"least": 0, "most": 1},
                "revise": {"least": 0, "most": self.n_positions},
                "told_corruption": {"least": 0, "most": 1},
            }
        )

    @torch.no_grad()
    def sample(
        self,
        context: Codes,
        n_frames: int,
        *,
        num_samples: int = 1,
        generator: torch.Generator | None = None,
        progress: Progress | None = None,
        conditions: Conditions | None = None,
        n_steps: int = 8,
        steps: Sequence[int] | None = None,
        order: str = "confidence",
        choice_temperature: float = 4.5,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        canvas: Int[Tensor, "#B k h w n"] | str | None = None,
        doubt: float = 0.1,
        revise: int = 0,
        told_corruption: float = 0.0,
        guidance_scale: float = 1.0,
        use_cache: bool = True,
    ) -> Int[Tensor, "B {num_samples} {n_frames} h w n"]:
        """Continue codes.

        A frame costs a pass for each step, and one to remember it.

        Args:
            context: int64 codes, at least one frame. n_frames: how many to predict.
            num_samples: futures for each context, which is read once.
            generator: for reproducible samples.
            progress: counts steps.
            conditions: see Prior.
            n_steps: of a frame. The coarsest level gets what the others, with one each, leave; where there are fewer
                steps than levels, all levels of a position are drawn in the same pass.
            steps: in the place of ``n_steps``, a list: of each level; a level with 0 is drawn along with the one above
                it. With flat masking their sum counts.
            order: which of the codes drawn are kept at a step: "confidence", the likeliest ones (MaskGIT), after Gumbel
                noise that falls from ``choice_temperature`` to 0; "random"; "raster", the first ones, at even steps.
                Without noise the likeliest codes are those of the last frame, and everything stands still.
            temperature: divides the logits; 0 is greedy. top_k, top_p: truncate the distribution.
            canvas: what a frame begins with: None, nothing; "last", the frame before; "argmax", the most likely code of
                each position; or codes (B, k, h, w, n), of the k-th frame the last for all after it. A code of it stays
                if its probability, given the past alone, is at least 1 - ``doubt``; the others are drawn.
            revise: so many positions, those with the least probable codes, are drawn anew in the end, all of their
                levels.
            told_corruption: what the model is told of the share of wrong codes in the past, see ``corruption``.
            guidance_scale: moves the logits away from those without conditions (above 1), or towards them.
            use_cache: False reads the past anew for each frame (a reference for tests and benchmarks).
        """
        how = Decoding(
            *(n_steps, steps, order, choice_temperature, temperature, top_k, top_p),
            *(canvas, doubt, revise, told_corruption, guidance_scale, use_cache),
        )
        check_counts(n_frames=n_frames)
        phases = self._check_sampling(context, num_samples, how)
        told = self._told(conditions, len(context), context.shape[1] + n_frames)
        with (progress or no_progress)(total=n_frames * how.n_calls(phases)) as bar:
            frames = self._stream(context, told, num_samples, generator, how, phases, lambda *_: bar.update())
            future = torch.stack([next(frames) for _ in range(n_frames)], 1)
        return future.unflatten(0, (-1, num_samples))

    def stream(
        self, context: Codes, told: Told, *, num_samples: int, generator: torch.Generator | None, **options: object
    ) -> Iterator[Int[Tensor, "B {num_samples} h w n"]]:
        """As Prior's; the last frames that the model sees are kept."""
        how = Decoding(**options)
        phases = self._check_sampling(context, num_samples, how)
        frames = self._stream(context, told, num_samples, generator, how, phases, lambda *_: None)
        return (frame.unflatten(0, (-1, num_samples)) for frame in frames)

    def options_of(self, options: dict[str, object], index: int, n_contexts: int, n_frames: int) -> dict[str, object]:
        canvas = options.get("canvas")
        if torch.is_tensor(canvas) and len(canvas) > 1:
            options = options | {"canvas": canvas[index : index + 1]}
        return super().options_of(options, index, n_contexts, n_frames)

    def _check_sampling(self, context, num_samples, how):
        """Refuse what cannot be sampled -> the phases of a frame."""
        how.check(self)
        check_counts(num_samples=num_samples)
        check_codes(context, self.codebook_sizes, self.grid, name="context")
        self.check_context(context.shape[1], context.shape[1] + 1)
        if torch.is_tensor(how.canvas):
            check_codes(how.canvas, self.codebook_sizes, self.grid, name="canvas")
            if len(how.canvas) not in (1, len(context)) or not how.canvas.shape[1]:
                raise ValueError(
                    f"canvas: expected frames for each of {len(context)} contexts, or for all, found "
                    f"{tuple(how.canvas.shape)}"
                )
        return self._phases(how.steps or self._spread(how.n_steps))

    def _spread(self, n_steps):
        """Steps of each level: the coarsest has what is left by one for each of the others."""
        others = 1 if n_steps >= self.n_levels and self.config.masking == "tree" else 0
        return [n_steps - others * (self.n_levels - 1)] + [others] * (self.n_levels - 1)

    def _phases(self, steps):
        """Steps of each level -> (levels, steps) of what is drawn together, a step a position at most."""
        if self.config.masking == "flat":
            return [(list(range(self.n_levels)), min(sum(steps), self.n_positions))]
        phases = []
        for level, n_steps in enumerate(steps):
            if n_steps:
                phases.append(([level], min(n_steps, self.n_positions)))
            else:
                phases[-1][0].append(level)
        return phases

    def _stream(self, context, told, num_samples, generator, how, phases, on_step):
        """Yield predicted frames (B * num_samples, h, w, n), without an end.

        With guidance every row is there twice, and the second time is told nothing, see ``guided``. ``on_step`` is
        called after each pass with the state of the frame: ``_decode``'s, and what is remembered.
        """
        copies = [(how.told_corruption, True), (how.told_corruption, False)][: 1 if how.guidance_scale == 1 else 2]

        def vector(stands_as, t, n):
            """Of frame t, of all copies of the contexts, n rows each: (rows, 1, d)."""
            return self.copied_vectors(
                stands_as, copies, None if self.conditioner is None else told(t), len(context), n
            )

        n_copies, n_seen = len(copies), context.shape[1]
        memory = Memory(self.trunk, how.use_cache)
        vectors = torch.cat([vector(self.as_clean, t, 1) for t in range(n_seen)], 1)
        memory.add(self.embed_clean(context.flatten(2, 3).repeat(n_copies, 1, 1, 1)), vectors)
        memory.repeat_interleave(num_samples)
        last = context[:, -1].flatten(1, 2).repeat_interleave(num_samples, 0)
        while True:
            target_vector = vector(self.as_target, n_seen, num_samples)

            def predict(codes, depth):
                """Features (n_copies * M, P, d) of a state of the frame."""
                x = self.embed(codes, depth)[:, None].repeat(n_copies, 1, 1, 1)
                return self.trunk.predict(memory.past, x, target_vector)[:, 0]  # noqa: B023

            canvas = self._canvas(how.canvas, last, n_seen - context.shape[1])
            last = self._decode(predict, len(last), canvas, how, phases, generator, on_step)
            clean = self.embed_clean(last)[:, None].repeat(n_copies, 1, 1, 1)
            memory.add(clean, vector(self.as_clean, n_seen, num_samples))
            on_step(last, torch.full_like(last[..., 0], self.n_levels))
            n_seen += 1
            yield last.unflatten(1, self.grid)

    def _canvas(self, canvas, last, number):
        """Codes (M, P, n) of the canvas of the ``number``-th predicted frame; "argmax" for those yet to be found."""
        if torch.is_tensor(canvas):
            codes = canvas[:, min(number, canvas.shape[1] - 1)].to(last.device).flatten(1, 2)
            return codes.repeat_interleave(len(last) // len(codes), 0)
        return last if canvas == "last" else canvas

    def _decode(self, predict, n_rows, canvas, how, phases, generator, on_step):
        """Draw a frame -> codes (M, P, n).

        Args:
            predict: function of codes (M, P, n) and depth (M, P) -> features, of all copies of the rows.
            n_rows: M. canvas: of ``_canvas``.
            on_step: called after each step with the codes, those not known yet as they were drawn last, and the depth.
        """
        codes = torch.zeros(n_rows, self.n_positions, self.n_levels, dtype=torch.long, device=self.device)
        depth, sure = torch.zeros_like(codes[..., 0]), torch.zeros(codes.shape[:2], device=self.device)
        for levels, n_steps in phases:
            codes, depth, sure = self._draw_levels(
                levels, n_steps, codes, depth, sure, predict, canvas, how, generator, on_step
            )
        if how.revise:
            worst = sure.argsort(-1)[:, : how.revise]
            depth, sure = depth.scatter(-1, worst, 0), sure.scatter(-1, worst, 0.0)
            for levels, _ in phases:
                codes, depth, sure = self._draw_levels(
                    levels, 1, codes, depth, sure, predict, None, how, generator, on_step
                )
        return codes

    def _draw_levels(self, levels, n_steps, codes, depth, sure, predict, canvas, how, generator, on_step):
        """Draw these levels of all positions where they are masked, in ``n_steps`` steps -> codes, depth, and ``sure``
        (M, P), the log-probability of each position's codes when they were drawn."""
        first, last = levels[0], levels[-1] + 1
        n_masked = (depth == first).sum(-1, keepdim=True)
        for step in range(n_steps):
            masked = depth == first
            features = predict(codes, depth)
            if step == 0 and canvas is not None:
                kept, codes, chance = self._kept(canvas, levels, features, codes, masked, how)
                depth, sure = torch.where(kept, last, depth), torch.where(kept, sure + chance, sure)
                masked = masked & ~kept
                n_masked = masked.sum(-1, keepdim=True)

            def drawn_code(i, logits):
                uniform = self._rand(logits.shape[:-1], generator)
                return draw(logits, uniform, how.temperature, how.top_k, how.top_p)

            drawn, chance = self._filled(levels, features, codes, masked, drawn_code, how)
            done = (step + 1) / n_steps
            if how.order == "raster":
                score = -torch.arange(self.n_positions, device=self.device).expand(masked.shape).float()
                n_left = (n_masked * (1 - done)).ceil()
            else:
                score = self._rand(masked.shape, generator)
                if how.order == "confidence":
                    gumbel = -(-score.clamp(1e-20).log()).clamp(1e-20).log()
                    score = chance + how.choice_temperature * (1 - done) * gumbel
                n_left = (n_masked * math.cos(done * math.pi / 2)).floor()
            # The least likely stay masked; at every step one at least becomes known.
            n_left = torch.minimum(n_left, masked.sum(-1, keepdim=True) - 1) if done < 1 else torch.zeros_like(n_left)
            known = masked & (ranks(score.masked_fill(~masked, torch.inf)) >= n_left)
            codes, depth = drawn, torch.where(known, last, depth)
            sure = torch.where(known, sure + chance, sure)
            on_step(codes, depth)
        return codes, depth, sure

    def _kept(self, canvas, levels, features, codes, masked, how):
        """Of which positions the canvas's codes are taken as known (M, P), the codes with these, and their
        log-probabilities (M, P)."""

        def code_of_canvas(i, logits):
            return logits.argmax(-1) if isinstance(canvas, str) else canvas[..., i]

        found, chance = self._filled(levels, features, codes, masked, code_of_canvas, how)
        kept = masked & (chance >= math.log(max(1 - how.doubt, torch.finfo(torch.float32).tiny)))
        if not isinstance(canvas, str):  # its codes below others than those drawn mean something else
            kept = kept & (codes[..., : levels[0]] == canvas[..., : levels[0]]).all(-1)
        return kept, torch.where(kept[..., None], found, codes), chance

    def _filled(self, levels, features, codes, masked, choose, how):
        """Go down these levels where they are masked, and take of each the code that ``choose(i, logits)`` gives -> the
        codes with these (M, P, n), and their log-probabilities (M, P)."""
        chance = 0
        for i in levels:
            logits = self._guided_logits(features, i, codes, how)
            code = torch.where(masked, choose(i, logits), codes[..., i])
            codes = torch.cat([codes[..., :i], code[..., None], codes[..., i + 1 :]], -1)
            chance = chance + logits.log_softmax(-1).gather(-1, code[..., None])[..., 0]
        return codes, chance

    def _guided_logits(self, features, i, codes, how):
        """Logits of level i of the rows (M, P, size), fp32, from the features of all their copies."""
        if how.guidance_scale == 1:
            return self.logits(features, i, codes).float()
        return guided(self.logits(features, i, codes.repeat(2, 1, 1)).float(), how.guidance_scale)


def ranks(x: Float[Tensor, "*rows P"]) -> Int[Tensor, "*rows P"]:
    """The place of each number among those of its row, from the smallest, 0, on."""
    return x.argsort(-1).argsort(-1)


@dataclass(frozen=True)
class Decoding:
    """How frames are drawn: the options of ``MaskedTransformer.sample``."""

    n_steps: int
    steps: list | None
    order: str
    choice_temperature: float
    temperature: float
    top_k: int | None
    top_p: float | None
    canvas: torch.Tensor | str | None
    doubt: float
    revise: int
    told_corruption: float
    guidance_scale: float
    use_cache: bool

    def check(self, prior: MaskedTransformer) -> None:
        """Refuse options out of their ranges."""
        check_sampling(self.temperature, self.top_k, self.top_p)
        check_guidance(self.guidance_scale, prior)
        check_switches(use_cache=self.use_cache)
        check_counts(n_steps=self.n_steps)
        check_counts(0, revise=self.revise)
        if self.revise > prior.n_positions:
            raise ValueError(f"revise: expected 0 to {prior.n_positions} positions, found {one_line(self.revise)}")
        if self.steps is not None:
            n = prior.n_levels
            whole = isinstance(self.steps, (list, tuple)) and all(is_whole(each, 0) for each in self.steps)
            if not whole or len(self.steps) != n or not self.steps[0]:
                raise ValueError(
                    f"steps: expected a whole number for each of {n} levels, the first at least 1, found "
                    f"{one_line(self.steps)}"
                )
        if not isinstance(self.order, str) or self.order not in ORDERS:
            raise ValueError(f"order: expected one of {', '.join(ORDERS)}, found {one_line(self.order)}")
        named = isinstance(self.canvas, str) and self.canvas in CANVASES
        if not (self.canvas is None or torch.is_tensor(self.canvas) or named):
            raise ValueError(
                f"canvas: expected one of {', '.join(CANVASES)}, codes or None, found {one_line(self.canvas)}"
            )
        if not (is_number(self.choice_temperature) and self.choice_temperature >= 0):
            raise ValueError(f"choice_temperature: expected a number >= 0, found {one_line(self.choice_temperature)}")
        check_numbers(0, 1, doubt=self.doubt, told_corruption=self.told_corruption)

    def n_calls(self, phases: list[tuple[list[int], int]]) -> int:
        """Passes of the network for a frame: the steps, and one to remember it."""
        return sum(n_steps for _, n_steps in phases) + (len(phases) if self.revise else 0) + 1
