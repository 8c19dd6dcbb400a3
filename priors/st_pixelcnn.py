"""ST-PixelCNN, the prior of S-HR-VQVAE (Adiban et al. 2023, section 4.2).

An autoregressive model over the codes of a frame tokenizer, whose levels (the paper's layers of quantisation; or
codebooks, or pixel channels) are generated one after the other in each frame, coarse to fine:

    p(future | context) = prod_t prod_i prod_(y,x) p(c_i(t,y,x) | all levels of frames < t, levels < i of frame t,
                                                      c_i(t,y',x') earlier in raster order)

Three stacks of gated layers look at these three parts: the frame stack at what is known before the level is begun
(earlier frames and the levels above, where nothing has to be hidden), the row stack at the rows above, and the column
stack at the codes to the left. Causal self-attention runs on the column stack.

Conditions enter in the gated layers of all three stacks, as a bias for each channel of a frame.

Shape letters: B clips, M rows of a sampler (samples of all contexts; with guidance twice as many), n levels, d width.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from diffusers.configuration_utils import register_to_config
from jaxtyping import Float, Int
from torch import Tensor, nn

from latentcast.config import check_counts, one_line
from latentcast.layers.causal_attention import CausalWindowAttention
from latentcast.layers.masked_convolutions import AxisCausalConv3d, shifted
from latentcast.layers.positions import sinusoidal_positions_3d
from latentcast.shapes import Codes, Conditions
from latentcast.sizes import as_size, sides
from latentcast.tokenizers.base import LatentSpec, check_codes

from .base import Prior, PriorOutput, Progress, Told, code_nats, need_codes, no_progress
from .sampling import (
    DRAWING,
    GUIDANCE,
    check_caching,
    check_guidance,
    check_sampling,
    draw,
    fixed_step,
    guided,
)

ATTENTION_FORMS = ("full", "factorised", "windowed", "none")


def gate(x: Float[Tensor, "*rows dd"]) -> Float[Tensor, "*rows dd//2"]:
    """The gated activation of PixelCNN, of dd = 2 d channels."""
    a, b = x.chunk(2, -1)
    return a.tanh() * b.sigmoid()


class GatedLayer(nn.Module):
    """x + W (tanh(a) * sigmoid(b)), with [a, b] a convolution of LN(x) and of a condition, causal along one axis.

    Of a model that is told something of each frame, [a, b] also has a linear map of that (van den Oord et al.,
    "Conditional Image Generation with PixelCNN Decoders", 2016, Eq. 4), the same at all positions of the frame.
    """

    def __init__(self, dim: int, axis: int, taps: int, width: int, is_told: bool = False) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        # The row stack is conditioned on the frame stack, the column stack on both.
        self.conv = AxisCausalConv3d(dim, 2 * dim, axis, taps, width, condition_channels=axis * dim)
        self.out = nn.Linear(dim, dim)
        self.tell = nn.Linear(dim, 2 * dim, bias=False) if is_told else None

    def forward(
        self,
        x: Float[Tensor, "B t h w d"],
        condition: Float[Tensor, "B t h w conditions"] | None = None,
        past: Float[Tensor, "B _ _ _ d"] | None = None,
        told: Float[Tensor, "B t told"] | None = None,
    ) -> tuple[Float[Tensor, "B t h w d"], Float[Tensor, "B _ _ _ d"]]:
        """x and what is told of its frames -> like x, and the ``past`` of the piece that comes next (see
        AxisCausalConv3d)."""
        y, after = self.conv(self.norm(x), condition, past)
        if told is not None:
            y = y + self.tell(told)[:, :, None, None]
        return x + self.out(gate(y)), after

    def step(
        self,
        x: Float[Tensor, "M d"],
        given: Float[Tensor, "M dd"],
        past: Float[Tensor, "M taps_d"],
        weight: Float[Tensor, "taps dd"],
    ) -> Float[Tensor, "M d"]:
        """One position of the column stack.

        Args:
            given: see ``given``.
            past: the ``taps`` - 1 normalised inputs to the left, which move on in place.
            weight: of the taps, the first part of ``conv.split_weight()``.
        """
        taps = torch.cat([past, self.norm(x)], 1)
        past.copy_(taps[:, x.shape[1] :])
        return x + self.out(gate(torch.addmm(given, taps, weight)))

    def given(
        self,
        condition: Float[Tensor, "M w conditions"],
        weight: Float[Tensor, "conditions dd"],
        told: Float[Tensor, "M told"] | None = None,
    ) -> Float[Tensor, "M w dd"]:
        """What a row's condition and what is told of its frame make of [a, b] before any column is known. ``weight``:
        the second part of ``conv.split_weight()``."""
        given = condition @ weight + self.conv.conv.bias
        return given if told is None else given + self.tell(told)[:, None]


class LevelNetwork(nn.Module):
    """The network of one level, or of all of them with an embedding that says which.

    Args:
        levels: indices of the levels that it predicts, neighbours.
        codebook_sizes: of all levels.
        grid: (T, h, w).
        dim, n_blocks, block_layers, kernel_size, kernel_frames: as of STPixelCNN.
        attention: function() -> the attention modules of a block.
        is_told: whether it is told something of each frame.
    """

    def __init__(
        self,
        levels: Sequence[int],
        codebook_sizes: Sequence[int],
        grid: Sequence[int],
        dim: int,
        n_blocks: int,
        block_layers: int,
        kernel_size: int,
        kernel_frames: int,
        attention: Callable[[], list[CausalWindowAttention]],
        is_told: bool,
    ) -> None:
        super().__init__()
        self.levels = list(levels)
        starts = [sum(codebook_sizes[:i]) for i in range(len(codebook_sizes) + 1)]
        first, last = self.levels[0], self.levels[-1]
        # Codes arrive as rows of one table over all codebooks.
        self.first_own_row = starts[first]
        self.previous = nn.Embedding(starts[-1], dim)  # codes of the frame before
        self.above = nn.Embedding(starts[last], dim) if last > 0 else None  # codes of this frame in the levels above
        self.own = nn.Embedding(starts[last + 1] - starts[first], dim)  # codes of this frame in the same level
        for table, n_summed in ((self.previous, len(codebook_sizes)), (self.above, last), (self.own, 1)):
            if table is not None:
                nn.init.normal_(table.weight, std=n_summed**-0.5)
        self.which = nn.Embedding(len(self.levels), dim) if len(self.levels) > 1 else None
        positions = sinusoidal_positions_3d(grid, dim).unflatten(0, tuple(grid))
        self.register_buffer("positions", positions, persistent=False)  # (T, h, w, d)

        def stack(axis, taps):
            n_layers = n_blocks * block_layers
            return nn.ModuleList(GatedLayer(dim, axis, taps, kernel_size, is_told) for _ in range(n_layers))

        self.frame_stack = stack(0, kernel_frames)
        self.row_stack = stack(1, kernel_size // 2 + 1)
        self.column_stack = stack(2, kernel_size // 2 + 1)
        # What follows each layer of the column stack.
        self.attention = nn.ModuleList(
            nn.ModuleList(attention() if number % block_layers == 0 else [])
            for number in range(1, n_blocks * block_layers + 1)
        )
        self.head = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, dim), nn.ReLU())
        self.logits = nn.ModuleList(nn.Linear(dim, codebook_sizes[i]) for i in self.levels)
        self.has_attention = any(len(modules) for modules in self.attention)

    def embed_before(self, rows: Codes) -> Float[Tensor, "B T h w d"]:
        """What frames tell the frame after them."""
        return self.previous(rows).sum(-2)

    def embed_known(
        self, before: Float[Tensor, "B T h w d"], rows: Codes, i: int, start: int = 0
    ) -> Float[Tensor, "B T h w d"]:
        """Input of the frame stack: what is known of frames before their level i is begun.

        Args:
            before: what the frame before each of them tells it.
            rows: of these the levels before i are looked at.
            start: index of the first of these frames in the clip.
        """
        known = before + self.positions[start : start + rows.shape[1]].to(before.dtype)
        if i > 0:
            known = known + self.above(rows[..., :i]).sum(-2)
        if self.which is not None:
            known = known + self.which.weight[i]
        return known

    def embed_own(self, rows: Int[Tensor, "*rows"]) -> Float[Tensor, "*rows d"]:
        """Rows of one of the network's levels -> their embeddings."""
        return self.own(rows - self.first_own_row)

    def predict(self, features: Float[Tensor, "*rows d"], i: int) -> Float[Tensor, "*rows K"]:
        """Output of the column stack -> logits of level i."""
        return self.logits[i - self.levels[0]](self.head(features))

    def forward(
        self, rows: Codes, levels: Sequence[int], first: int = 0, told: Float[Tensor, "B T told"] | None = None
    ) -> list[Float[Tensor, "B _ h w _"]]:
        """Teacher forcing: rows, and what is told of the frames -> for each of ``levels`` logits of the frames from
        ``first`` on."""
        before = shifted(self.embed_before(rows), 0)
        known = torch.cat([self.embed_known(before, rows, i) for i in levels])
        own = torch.cat([self.embed_own(rows[..., i]) for i in levels])
        told = None if told is None else told.repeat(len(levels), 1, 1)
        features, _ = self.features(known, own, first, told)
        return [self.predict(part, i) for i, part in zip(levels, features.chunk(len(levels)))]

    def features(
        self,
        known: Float[Tensor, "B T h w d"],
        own: Float[Tensor, "B T h w d"],
        first: int = 0,
        told: Float[Tensor, "B T told"] | None = None,
        caches: Sequence[Sequence[Tensor]] | None = None,
    ) -> tuple[Float[Tensor, "B T-{first} h w d"], list[Float[Tensor, "B _ h w d"]]]:
        """All three stacks over whole frames.

        Args:
            known, own: see ``embed_known`` and ``embed_own``.
            first: frames before it are not wanted; without attention, their row and column stacks are not computed.
            told: what is told of the frames; None: nothing.
            caches: of the attention modules of each layer, which keep their keys and values there, or None.
        Returns:
            features, and with caches of each layer of the frame stack the ``past`` of the next frame.
        """
        skipped, pasts = 0 if self.has_attention else first, []
        own, told_own = own[:, skipped:], None if told is None else told[:, skipped:]
        rows, columns = shifted(own, 1), shifted(own, 2)
        for index, attention in enumerate(self.attention):
            known, past = self.frame_stack[index](known, told=told)
            if caches is not None:
                pasts.append(past)
            condition = known[:, skipped:]
            rows, _ = self.row_stack[index](rows, condition, told=told_own)
            columns, _ = self.column_stack[index](columns, torch.cat([condition, rows], -1), told=told_own)
            for number, module in enumerate(attention):
                columns = module(columns, None if caches is None else caches[index][number])
        return columns[:, first - skipped :], pasts


class STPixelCNN(Prior):
    """The spatio-temporal PixelCNN over the codes of any discrete tokenizer, pixels of 256 levels included.

    It takes one codebook, several side by side (sliced, or channels of pixels) or residual levels alike, and generates
    them in their order, each given the ones before it at every position of the frame. The paper gives neither sizes nor
    the form of its masks. These stacks see all that is earlier, and nothing else.

    Args:
        latent_spec: ``FrameTokenizer.latent_spec`` of the tokenizer; codebooks, height and width are used.
        n_frames: T, the longest clip, at least 2. Longer futures are sampled with a sliding window.
        layers: of quantisation, here levels: "separate", a network for each (the paper), or "shared", one for all.
        dim: d, the width of the stacks.
        n_blocks: blocks, each of ``block_layers`` gated layers in each of the three stacks and then attention.
        block_layers: see above.
        kernel_size: k of the convolutions in space, odd: k x k in the frame stack, k // 2 + 1 rows of k in the row
            stack, k // 2 + 1 columns in the column stack.
        kernel_frames: of the frame stack's convolutions, in frames.
        attention: "full", over all earlier positions; "factorised", over those of the same frame and then over those
            at the same place in earlier frames; "windowed", over those of all frames in the same of the windows that
            tile a frame; "none".
        window: height and width of these windows in positions, a number or [height, width]; each divides h or w, or
            exceeds it.
        n_heads, head_dim: attention heads, and the width of each.
        conditions, condition_dropout: see Prior; what is told of a frame is a bias of every gated layer there.
    Raises:
        ValueError: a spec without codes, or an option that is out of range.
    """

    accepts = "codes"
    explains = ("nats",)

    @register_to_config
    def __init__(
        self,
        latent_spec: LatentSpec,
        n_frames: int = 20,
        layers: str = "separate",
        dim: int = 128,
        n_blocks: int = 2,
        block_layers: int = 3,
        kernel_size: int = 3,
        kernel_frames: int = 2,
        attention: str = "full",
        window: int | Sequence[int] = 8,
        n_heads: int = 4,
        head_dim: int = 32,
        conditions: dict[str, dict] | None = None,
        condition_dropout: float = 0.1,
    ) -> None:
        super().__init__()
        sizes = list(latent_spec["codebook_sizes"])
        need_codes(latent_spec, "ST-PixelCNN")
        check_counts(least=2, n_frames=n_frames, kernel_frames=kernel_frames)
        check_counts(dim=dim, n_blocks=n_blocks, block_layers=block_layers, n_heads=n_heads)
        for name, value, known in (
            ("layers", layers, ("separate", "shared")),
            ("attention", attention, ATTENTION_FORMS),
        ):
            if value not in known:
                raise ValueError(f"{name}: expected one of {', '.join(known)}, found {value!r}")
        if kernel_size < 3 or kernel_size % 2 == 0:
            raise ValueError(f"kernel_size: expected an odd number of at least 3, found {kernel_size}")
        self.codebook_sizes = sizes
        self.grid = grid = (n_frames, latent_spec["height"], latent_spec["width"])
        frame = grid[1:]
        forms = {  # (window, over_time) of each module
            "full": [(frame, True)],
            "factorised": [(frame, False), ((1, 1), True)],
            "windowed": [(tuple(map(min, sides(as_size(window, "window")), frame)), True)],
            "none": [],
        }

        def modules():
            return [CausalWindowAttention(dim, n_heads, head_dim, grid, *form) for form in forms[attention]]

        groups = [[i] for i in range(len(sizes))] if layers == "separate" else [list(range(len(sizes)))]
        shared = (sizes, grid, dim, n_blocks, block_layers, kernel_size, kernel_frames, modules, bool(conditions))
        self.networks = nn.ModuleList(LevelNetwork(group, *shared) for group in groups)
        first_row = torch.tensor([sum(sizes[:i]) for i in range(len(sizes))])
        self.register_buffer("first_row", first_row, persistent=False)
        self.make_conditioner(dim)

    def network(self, i: int) -> LevelNetwork:
        """The network that predicts level i."""
        return self.networks[i if len(self.networks) > 1 else 0]  # pyright: ignore[reportReturnType]

    # Likelihood -------------------------------------------------------------------------------------------------

    def forward(self, clip: Codes, n_context: int, conditions: Conditions | None = None) -> PriorOutput:
        """Mean cross-entropy of the codes after the context, in nats a code, over all levels.

        Args:
            clip: int64, of at most ``n_frames``. n_context: context frames, which the loss skips.
            conditions: see Prior.
        Returns:
            ``logits`` of each level, and in ``logs`` the bits a code, of all levels and of each.
        """
        logits = self._logits(clip, n_context, conditions)
        nll = self._nll(logits, clip, n_context).mean(0)
        n_codes = clip[0, n_context:, ..., 0].numel()
        loss = nll.mean() / n_codes
        bits = nll.detach() / (n_codes * math.log(2))
        logs = {"bits_per_code": bits.mean()}
        if len(bits) > 1:
            logs |= {f"bits_per_code_{i}": value for i, value in enumerate(bits, start=1)}
        return PriorOutput(loss=loss, logs=logs, logits=logits)

    def log_prob(self, clip: Codes, n_context: int, conditions: Conditions | None = None) -> Float[Tensor, " B"]:
        """Log-likelihood of the codes after the context, in nats."""
        return self.level_log_prob(clip, n_context, conditions).sum(1)

    def level_log_prob(self, clip: Codes, n_context: int, conditions: Conditions | None = None) -> Float[Tensor, "B n"]:
        """What each level adds to ``log_prob``: log p(level i | levels above), in nats."""
        return -self._nll(self._logits(clip, n_context, conditions), clip, n_context)

    @torch.no_grad()
    def explain(
        self, clip: Codes, n_context: int, conditions: Conditions | None = None, **options: object
    ) -> dict[str, Float[Tensor, "B ..."]]:
        """As Prior's: ``nats`` of each code."""
        target = clip[:, n_context:]
        logits = self._logits(clip, n_context, conditions)
        return {"nats": torch.stack([code_nats(level, target[..., i]) for i, level in enumerate(logits)], -1)}

    def level_bits_per_code(
        self, clip: Codes, n_context: int, conditions: Conditions | None = None
    ) -> Float[Tensor, "B n"]:
        """-log2 of the likelihood, averaged over the predicted codes of each level."""
        n_codes = clip[0, n_context:, ..., 0].numel()
        return -self.level_log_prob(clip, n_context, conditions) / (n_codes * math.log(2))

    def _logits(self, clip, n_context, conditions=None):
        """Logits of the codes after the context, a list over levels."""
        check_codes(clip, self.codebook_sizes, self.grid[1:], name="clip")
        if clip.shape[1] > self.grid[0]:
            raise ValueError(f"clip: expected at most {self.grid[0]} frames (n_frames), found {clip.shape[1]}")
        self.check_context(n_context, clip.shape[1])
        rows, told = clip + self.first_row, self.condition_vectors(conditions, *clip.shape[:2])
        return [logits for network in self.networks for logits in network(rows, network.levels, n_context, told)]

    @staticmethod
    def _nll(logits, clip, n_context):
        """Summed cross-entropy of each level, in nats -> (B, n)."""
        target = clip[:, n_context:]
        nll = [code_nats(level, target[..., i]) for i, level in enumerate(logits)]
        return torch.stack([level.flatten(1).sum(1) for level in nll], 1)

    # Sampling ---------------------------------------------------------------------------------------------------

    def sampler_ranges(self) -> dict[str, dict]:
        return DRAWING | GUIDANCE | {"overlap": {"kind": int, "least": 1, "most": self.grid[0] - 1}}

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
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        overlap: int | None = None,
        guidance_scale: float = 1.0,
        use_cache: bool = True,
        compile: bool = False,
    ) -> Int[Tensor, "B {num_samples} {n_frames} h w n"]:
        """Continue codes.

        A code costs one column of work: the frame stack runs once a frame, the row stack once a row, and attention
        finds the keys and values of earlier positions in a cache. Past the trained clip length T the model slides: it
        starts anew from the last ``overlap`` frames, generated ones included.

        Args:
            context: int64 codes, at least one frame. n_frames: how many to predict.
            num_samples: futures for each context, which is read once.
            generator: for reproducible samples.
            progress: counts generated codes.
            conditions: see Prior.
            temperature: divides the logits; 0 is greedy. top_k, top_p: truncate the distribution.
            overlap: frames that the model sees when it slides, 1 to T - 1; more cost more time. None: T // 2.
            guidance_scale: moves the logits away from those without conditions (above 1), or towards them.
            use_cache: False runs the network over the whole clip for each code (a reference for tests and benchmarks).
            compile: fuse the many small operations of a code by torch.compile, see ``CompiledStep``.
        """
        check_counts(n_frames=n_frames)
        choose = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "guidance_scale": guidance_scale}
        self._check_sampling(context, num_samples, overlap, use_cache, compile, choose)
        told = self._told(conditions, len(context), context.shape[1] + n_frames)
        with (progress or no_progress)(total=n_frames * math.prod(self.grid[1:]) * len(self.codebook_sizes)) as bar:
            frames = self._stream(context, told, num_samples, generator, overlap, use_cache, compile, choose, bar)
            future = torch.stack([next(frames) for _ in range(n_frames)], 1)
        return future.unflatten(0, (-1, num_samples))

    def stream(
        self,
        context: Codes,
        told: Told,
        *,
        num_samples: int,
        generator: torch.Generator | None,
        overlap: int | None,
        use_cache: bool,
        compile: bool,
        **choose: float | None,
    ) -> Iterator[Int[Tensor, "B {num_samples} h w n"]]:
        """As Prior's; the last T frames are kept."""
        self._check_sampling(context, num_samples, overlap, use_cache, compile, choose)
        frames = self._stream(context, told, num_samples, generator, overlap, use_cache, compile, choose, no_progress())
        return (frame.unflatten(0, (-1, num_samples)) for frame in frames)

    def _check_sampling(self, context, num_samples, overlap, use_cache, compile, choose):
        check_sampling(**{name: choose[name] for name in DRAWING})
        check_guidance(choose["guidance_scale"], self)
        check_caching(use_cache, compile)
        check_codes(context, self.codebook_sizes, self.grid[1:], name="context")
        check_counts(num_samples=num_samples)
        self.check_context(context.shape[1], context.shape[1] + 1)
        if overlap is not None:
            check_counts(overlap=overlap)
            if overlap >= self.grid[0]:
                most = self.grid[0] - 1
                raise ValueError(f"overlap: expected 1 to {most} (n_frames - 1), found {one_line(overlap)}")

    def _stream(self, context, told, num_samples, generator, overlap, use_cache, compile, choose, bar):
        """Yield predicted frames (B * num_samples, h, w, n), without an end.

        With guidance every row is there twice, and the second time is told nothing, see ``guided``.
        """
        length, n_seen, n_rows = self.grid[0], context.shape[1], len(context) * num_samples
        overlap = length // 2 if overlap is None else overlap
        n_copies = 1 if choose["guidance_scale"] == 1 else 2

        def of_rows(t):
            """What is told of a frame, (M, 1, d)."""
            rows = told(t).repeat_interleave(num_samples, 0)[:, None]
            return rows if n_copies == 1 else torch.cat([rows, self.conditioner.null.expand_as(rows)])

        window = (context + self.first_row).repeat_interleave(num_samples, 0).repeat(n_copies, 1, 1, 1, 1)
        vectors = None  # of the frames in the window, (M, t, d)
        if self.conditioner is not None:
            vectors = torch.cat([of_rows(t) for t in range(n_seen)], 1)
        sampler = partial(CachedLevel, compiled=compile) if use_cache else UncachedLevel
        levels = [sampler(self, i, len(window), choose) for i in range(len(self.codebook_sizes))]
        n_shared = num_samples
        while True:
            if window.shape[1] >= length:
                window, vectors = (x if x is None else x[:, -overlap:] for x in (window, vectors))
            for level in levels:
                level.start(window, vectors, n_shared)
            while window.shape[1] < length:
                if vectors is not None:
                    vectors = torch.cat([vectors, of_rows(n_seen)], 1)
                frame = torch.empty_like(window[:, :1])
                for level in levels:
                    uniform = self._uniform(n_rows, generator).repeat(1, 1, n_copies)
                    level.start_frame(window, frame, vectors)
                    for y in range(self.grid[1]):
                        level.fill_row(y, uniform[y])
                        bar.update(self.grid[2])
                window, n_seen = torch.cat([window, frame], 1), n_seen + 1
                yield frame[:n_rows, 0] - self.first_row
            n_shared = 1

    def _uniform(self, n_rows, generator):
        """Random numbers for a level of a frame: (h, w, n_rows)."""
        source = generator.device if generator is not None else self.device
        return torch.rand((*self.grid[1:], n_rows), generator=generator, device=source).to(self.device)


def choose_codes(
    logits: Float[Tensor, "M K"], uniform: Float[Tensor, " _"], guidance_scale: float = 1.0, **choose: float | None
) -> Int[Tensor, " M"]:
    """Codes drawn from logits, see ``draw``; with guidance the same ones for both copies of a row."""
    if guidance_scale != 1:
        logits = guided(logits, guidance_scale).repeat(2, 1)
    return draw(logits, uniform, **choose)


class UncachedLevel:
    """Reference sampler of level i for M rows: the network runs over all frames so far for every code."""

    def __init__(self, model: STPixelCNN, i: int, n_rows: int, choose: dict[str, float | None]) -> None:
        self.network, self.i, self.first_row, self.choose = model.network(i), i, model.first_row, choose

    def start(self, window: Int[Tensor, "M t h w n"], vectors: Float[Tensor, "M t d"] | None, n_shared: int) -> None:
        """As CachedLevel's; there is nothing to prepare."""

    def start_frame(
        self, window: Int[Tensor, "M t h w n"], frame: Int[Tensor, "M 1 h w n"], vectors: Float[Tensor, "M T d"] | None
    ) -> None:
        """As CachedLevel's."""
        self.window, self.frame, self.vectors = window, frame, vectors

    def fill_row(self, y: int, uniform: Float[Tensor, "w M"]) -> None:
        """As CachedLevel's."""
        i, frame = self.i, self.frame
        frame[..., i][:, :, y:] = self.first_row[i]  # whatever is there: causality hides it
        frame[..., i + 1 :] = self.first_row[i + 1 :]
        for x in range(frame.shape[3]):
            self.fill(y, x, uniform[x])

    def fill(self, y: int, x: int, uniform: Float[Tensor, " M"]) -> None:
        """Generate one code."""
        rows = torch.cat([self.window, self.frame], 1)
        logits = self.network(rows, [self.i], self.window.shape[1], self.vectors)[0][:, 0, y, x]
        self.frame[:, 0, y, x, self.i] = choose_codes(logits, uniform, **self.choose) + self.first_row[self.i]


class CachedLevel:
    """Sampler of level i for M rows: each stack runs once for what it looks at, and what comes later finds it kept.

    What a step touches lives in fixed buffers, and where it is in tensors, so that on CUDA it is recorded once as a
    graph and replayed, and elsewhere can be compiled: launching its many small kernels one by one would take longer
    than running them.
    """

    def __init__(
        self, model: STPixelCNN, i: int, n_rows: int, choose: dict[str, float | None], compiled: bool = False
    ) -> None:
        self.network, self.i, self.grid, self.choose = model.network(i), i, model.grid, choose
        self.first_row = model.first_row[i]
        # What differs from level to level is modules and tensors, no numbers: a step is compiled once for all of them.
        self.logits = self.network.logits[i - self.network.levels[0]]
        self.own_row = self.first_row - self.network.first_own_row
        dim, dtype, device = self.network.own.embedding_dim, self.network.own.weight.dtype, model.device

        def zeros(*shape, dtype=dtype):
            return torch.zeros(shape, dtype=dtype, device=device)

        layers, width = self.network.column_stack, self.grid[2]
        self.caches = [
            [module.new_cache(n_rows, dtype, device) for module in modules] for modules in self.network.attention
        ]
        self.weights = [layer.conv.split_weight() for layer in layers]
        # Of the row being generated: its codes, their random numbers, and what is given to each layer.
        self.row = zeros(n_rows, width, dtype=torch.int64)
        self.uniform = zeros(width, n_rows, dtype=torch.float32)
        self.given = zeros(width, len(layers), n_rows, 2 * dim)
        # Of the columns to the left: the embedding of the last code, and the last inputs of each layer.
        self.left = zeros(n_rows, dim)
        self.past_columns = [zeros(n_rows, (layer.conv.taps - 1) * dim) for layer in layers]
        self.column, self.position = (zeros(1, dtype=torch.int64) for _ in range(2))
        self.replay = fixed_step(self._step, device, compiled)

    def start(self, window: Int[Tensor, "M t h w n"], vectors: Float[Tensor, "M t d"] | None, n_shared: int) -> None:
        """Begin a window with known frames and what is told of them, the same for ``n_shared`` neighbouring rows."""
        network, rows = self.network, window[::n_shared]
        known = network.embed_known(shifted(network.embed_before(rows), 0), rows, self.i)
        told = None if vectors is None else vectors[::n_shared]
        _, pasts = network.features(known, network.embed_own(rows[..., self.i]), window.shape[1], told, self.caches)
        self.past_frames = [past.repeat_interleave(n_shared, 0) for past in pasts]

    def start_frame(
        self, window: Int[Tensor, "M t h w n"], frame: Int[Tensor, "M 1 h w n"], vectors: Float[Tensor, "M T d"] | None
    ) -> None:
        """The frame stack of ``frame``, which comes after those of ``window`` and has the levels above; what is told of
        it is the last of ``vectors``."""
        network, self.frame, self.time = self.network, frame, window.shape[1]
        self.told = None if vectors is None else vectors[:, -1:]
        known = network.embed_known(network.embed_before(window[:, -1:]), frame, self.i, self.time)
        self.known, self.past_rows = [], [None] * len(network.row_stack)
        for index, layer in enumerate(network.frame_stack):
            known, self.past_frames[index] = layer(known, past=self.past_frames[index], told=self.told)
            self.known.append(known)

    def fill_row(self, y: int, uniform: Float[Tensor, "w M"]) -> None:
        """Generate row y of the level into the frame, from random numbers."""
        self._start_row(y)
        self.uniform.copy_(uniform)
        start = (self.time * self.grid[1] + y) * self.grid[2]
        for x in range(self.grid[2]):
            self.column.fill_(x)
            self.position.fill_(start + x)
            if self.replay is not None:
                self.replay()
            else:
                self._step(start + x)
        self.frame[:, 0, y, :, self.i] = self.row

    def _start_row(self, y):
        """The row stack of row y, and what it and the frame stack give to the column stack."""
        network = self.network
        if y == 0:
            rows = torch.zeros_like(self.known[0][:, :, :1])
        else:
            rows = network.embed_own(self.frame[:, :, y - 1 : y, :, self.i])
        for index, (layer, column_layer) in enumerate(zip(network.row_stack, network.column_stack)):
            known = self.known[index][:, :, y : y + 1]
            rows, self.past_rows[index] = layer(rows, known, self.past_rows[index], self.told)
            condition = torch.cat([known, rows], -1)[:, 0, 0]
            told = None if self.told is None else self.told[:, 0]
            self.given[:, index] = column_layer.given(condition, self.weights[index][1], told).transpose(0, 1)
            self.past_columns[index].zero_()
        self.left.zero_()

    def _step(self, index=None):
        """The column stack at ``position``, in ``column`` of its row, and the code there; ``index`` is the position,
        where known."""
        network, x = self.network, self.left
        given = self.given.index_select(0, self.column)[0].unbind(0)
        for number, (layer, modules) in enumerate(zip(network.column_stack, network.attention)):
            x = layer.step(x, given[number], self.past_columns[number], self.weights[number][0])
            for module, cache in zip(modules, self.caches[number]):
                x = module.step(x, cache, self.position, None if index is None else module.span(index))
        uniform = self.uniform.index_select(0, self.column)[0]
        code = choose_codes(self.logits(network.head(x)), uniform, **self.choose)
        self.row.index_copy_(1, self.column, (code + self.first_row)[:, None])
        self.left.copy_(network.own(code + self.own_row))
