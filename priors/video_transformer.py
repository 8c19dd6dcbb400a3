"""Latent Video Transformer (LVT), the prior.

Rakhimov et al., "Latent Video Transformer", 2020, sections 3.2 and 4. The generator is the Video Transformer of
Weissenborn et al. ("Scaling Autoregressive Video Models", 2020) over the codes of a frame tokenizer: a video is cut
into interleaved slices (subscaling); an encoder summarises the slices generated so far, and a causal decoder generates
the current one code by code.

Shape letters: B clips, M slices (a batch of (clip, slice) pairs), N positions of a slice in raster order, d width.
"""

import contextlib
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import register_to_config
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn

from latentcast.config import check_counts
from latentcast.layers.adaptive import AdaptiveSoftmax, AdaptiveTable, TiedSoftmax, cluster_bounds
from latentcast.layers.attention import attention, plain_attention
from latentcast.layers.masked_convolutions import CausalConv3d
from latentcast.layers.packed import packed_linears
from latentcast.layers.positions import RelativeBias3D, sinusoidal_positions_3d
from latentcast.shapes import Codes, Conditions
from latentcast.sizes import nearest_divisors
from latentcast.tokenizers.base import LatentSpec, check_codes

from .base import Prior, PriorOutput, Progress, Told, need_codes, no_progress
from .sampling import (
    DRAWING,
    GUIDANCE,
    check_caching,
    check_guidance,
    check_sampling,
    draw,
    fixed_step,
    guided,
    sliding_windows,
)

# Positions of slices in one pass of ``log_prob``, which bounds its memory: as many as in a training step of the paper.
POSITIONS_AT_ONCE = 64 * 256
MOST_TAPS, MOST_SEEN = 2**16, 2**24  # of a kernel, and times a clip's positions; the paper's models come to 2**22
ATTENTION_FORMS = ("query_key_relative", "key_relative", "relative")
UNSEEN = -1  # in the place of positions and codes that the encoder does not see; as an index, the last


# Subscaling (section 3.2) -------------------------------------------------------------------------------------------


def encoder_taps(subscale: Sequence[int], n_frames: int, context_frames: int | None = None) -> list[tuple[int, ...]]:
    """Offsets (dt, dy, dx) of the slice encoder's convolution.

    Published kernels: 7 frames for single-frame slices; otherwise, on each axis, 2 * (s // 2) + 1.
    """
    reach = [s // 2 for s in subscale]
    if subscale[0] == n_frames:
        reach[0] = 3
    if context_frames is not None:
        reach[0] = context_frames
    times = range(-reach[0], reach[0] + 1)
    if context_frames is not None and subscale == (n_frames, 1, 1):
        times = range(-reach[0], 0)  # with one whole frame a slice, only past taps can see anything
    if (n := len(times) * math.prod(2 * r + 1 for r in reach[1:])) > MOST_TAPS:
        raise ValueError(f"subscale, context_frames: expected a kernel of at most {MOST_TAPS} taps, found {n}")
    return list(itertools.product(times, *(range(-r, r + 1) for r in reach[1:])))


def slice_geometry(
    grid: Sequence[int], subscale: Sequence[int], taps: Sequence[tuple[int, ...]]
) -> tuple[Int[Tensor, "n_slices N"], Int[Tensor, "n_slices N taps"]]:
    """Which positions form each slice, and what the encoder sees from them.

    Returns:
        pixels: raster index of each slice's positions in the clip.
        neighbours: raster index of each tap; UNSEEN where it is outside the clip or belongs to a slice that is not
            generated yet.
    """
    if (n := math.prod(grid) * len(taps)) > MOST_SEEN:
        raise ValueError(f"n_frames, latent_spec: expected at most {MOST_SEEN} positions times taps, found {n}")
    size = torch.tensor(grid)
    index = torch.arange(math.prod(grid)).view(grid)
    starts = itertools.product(*(range(s) for s in subscale))
    pixels = torch.stack([index[a :: subscale[0], b :: subscale[1], c :: subscale[2]].flatten() for a, b, c in starts])
    slice_of = torch.empty(math.prod(grid), dtype=torch.int64)
    slice_of[pixels] = torch.arange(len(pixels))[:, None].expand_as(pixels)
    coordinates = torch.stack(torch.unravel_index(pixels, grid), -1)
    located = coordinates[:, :, None] + torch.tensor(taps)
    inside = ((located >= 0) & (located < size)).all(-1)
    located = located.clamp(min=0).minimum(size - 1)
    neighbours = (located[..., 0] * grid[1] + located[..., 1]) * grid[2] + located[..., 2]
    earlier = slice_of[neighbours] < torch.arange(len(pixels))[:, None, None]
    return pixels, torch.where(inside & earlier, neighbours, UNSEEN)


# Encoder and decoder (sections 3.2 and 4.4) ------------------------------------------------------------------------


Cache = tuple[Float[Tensor, "M heads N e"], Float[Tensor, "M heads N e"]]  # keys and values


class Attention(nn.Module):
    """Multi-head attention in one of the three forms of section 4.4, with relative distance bias b.

    - query_key_relative: A ~ exp(x_q' Q' K x_k + b), the default;
    - key_relative: A ~ exp(u' K x_k + b), u learned per head;
    - relative: A ~ exp(b).
    """

    def __init__(self, dim: int, n_heads: int, head_dim: int, form: str) -> None:
        super().__init__()
        self.form, self.n_heads, self.head_dim = form, n_heads, head_dim
        inner = n_heads * head_dim
        self.norm = nn.LayerNorm(dim)
        if form == "query_key_relative":
            self.to_query = nn.Linear(dim, inner, bias=False)
        elif form == "key_relative":
            self.query = nn.Parameter(torch.randn(n_heads, 1, head_dim))
        if form != "relative":
            self.to_key = nn.Linear(dim, inner, bias=False)
        self.to_value = nn.Linear(dim, inner, bias=False)
        self.to_out = nn.Linear(inner, dim, bias=False)

    def _heads(self, x):
        return rearrange(x, "b l (m e) -> b m l e", m=self.n_heads)

    def _key(self, x):
        return None if self.form == "relative" else self._heads(self.to_key(x))

    def _query(self, x, dtype):
        if self.form == "query_key_relative":
            return self._heads(self.to_query(x))
        return self.query.to(dtype).expand(x.shape[0], -1, x.shape[1], -1)

    def forward(self, x: Float[Tensor, "M N dim"], bias: Float[Tensor, "heads N N"]) -> Float[Tensor, "M N dim"]:
        """All positions at once; the bias is minus infinity where a key is hidden."""
        x = self.norm(x)
        key, value = self._key(x), self._heads(self.to_value(x))
        bias = bias.to(value.dtype)
        if key is None:
            out = bias.softmax(-1) @ value
        else:
            out = attention(self._query(x, value.dtype), key, value, bias[None])
        return self.to_out(rearrange(out, "b m l e -> b l (m e)"))

    def step(
        self, x: Float[Tensor, "M L dim"], bias: Float[Tensor, "heads L S"], cache: Cache, positions: Int[Tensor, " L"]
    ) -> Float[Tensor, "M L dim"]:
        """Some positions, which attend to the first S.

        Their keys and values are written to the ``cache``, which holds those of the other positions.
        """
        x, n_seen = self.norm(x), bias.shape[-1]
        for kept, new in zip(cache, (self._key(x), self._heads(self.to_value(x)))):
            if new is not None:
                kept.index_copy_(2, positions, new.to(kept.dtype))
        keys, values = (kept[:, :, :n_seen] for kept in cache)
        bias = bias.to(values.dtype)
        if self.form == "relative":
            out = bias.softmax(-1) @ values
        else:
            out = plain_attention(self._query(x, values.dtype), keys, values, bias)
        return self.to_out(rearrange(out, "b m l e -> b l (m e)"))


class Block(nn.Module):
    """Pre-norm attention and a feed-forward network of the same width (no expansion)."""

    def __init__(
        self, grid: Sequence[int], dim: int, n_heads: int, head_dim: int, form: str, relative_scale: float
    ) -> None:
        super().__init__()
        self.attention = Attention(dim, n_heads, head_dim, form)
        self.relative = RelativeBias3D(grid, n_heads, relative_scale)
        self.feed_forward = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, dim))

    def forward(self, x: Float[Tensor, "M N dim"], bias: Float[Tensor, "heads N N"]) -> Float[Tensor, "M N dim"]:
        x = x + self.attention(x, bias)
        return x + self.feed_forward(x)

    def step(
        self, x: Float[Tensor, "M L dim"], bias: Float[Tensor, "heads L S"], cache: Cache, positions: Int[Tensor, " L"]
    ) -> Float[Tensor, "M L dim"]:
        x = x + self.attention.step(x, bias, cache, positions)
        return x + self.feed_forward(x)


class SliceEncoder(nn.Module):
    """Summarises the slices generated so far, as seen from each position of the slice that comes next.

    The published encoder is a strided convolution over the one-hot video, shifted so that it is centred on the slice,
    with everything not generated yet zeroed. A convolution over one-hot vectors is a sum of table rows, one for each
    (tap, codebook, code), which is how it is computed here.
    """

    def __init__(
        self,
        n_slices: int,
        n_taps: int,
        grid: Sequence[int],
        codebook_sizes: Sequence[int],
        dim: int,
        embed_dim: int,
        n_layers: int,
        block: Callable[[], Block],
        absolute: bool,
    ) -> None:
        super().__init__()
        n_rows = sum(codebook_sizes)
        self.unseen = n_taps * n_rows
        self.taps = nn.EmbeddingBag(self.unseen + 1, embed_dim, mode="sum", padding_idx=self.unseen)
        nn.init.normal_(self.taps.weight, std=(n_taps * len(codebook_sizes)) ** -0.5)
        nn.init.zeros_(self.taps.weight[self.unseen])
        self.slice_embedding = nn.Embedding(n_slices, embed_dim)
        self.project = nn.Linear(embed_dim, dim)
        self.blocks = nn.ModuleList(block() for _ in range(n_layers))
        self.register_buffer("tap_rows", torch.arange(n_taps)[:, None] * n_rows, persistent=False)
        self.register_buffer("positions", sinusoidal_positions_3d(grid, dim) * absolute, persistent=False)

    def forward(
        self, rows: Int[Tensor, "M N taps n"], slice_ids: Int[Tensor, " M"], told: Float[Tensor, "M N d"] | None = None
    ) -> Float[Tensor, "M N d"]:
        """Rows, of which some are UNSEEN, and what is told of each position's frame -> the memory."""
        index = torch.where(rows == UNSEEN, self.unseen, rows + self.tap_rows)
        x = self.taps(rearrange(index, "m p taps n -> (m p) (taps n)"))
        x = rearrange(x, "(m p) d -> m p d", m=len(rows))
        x = self.project(x + self.slice_embedding(slice_ids)[:, None])
        x = x + self.positions.to(x.dtype)
        if told is not None:
            x = x + told
        for block in self.blocks:
            x = block(x, block.relative())
        return x if told is None else x + told  # once more, for the decoder


class SliceDecoder(nn.Module):
    """Causal over the positions of one slice, given the encoder's memory of the earlier slices."""

    def __init__(
        self,
        grid: Sequence[int],
        codebook_sizes: Sequence[int],
        dim: int,
        embed_dim: int,
        n_layers: int,
        block: Callable[[], Block],
        clusters: list[list[int]] | None = None,
        fit_kernel: bool = False,
    ) -> None:
        super().__init__()
        self.grid = tuple(grid)
        std = len(codebook_sizes) ** -0.5
        if clusters is None:
            self.embed_codes = nn.Embedding(sum(codebook_sizes), embed_dim)
            nn.init.normal_(self.embed_codes.weight, std=std)
        else:
            self.embed_codes = nn.ModuleList(AdaptiveTable(bounds, embed_dim, std) for bounds in clusters)
        kernel = tuple(1 if fit_kernel and size == 1 else 3 for size in grid)
        self.conv = CausalConv3d(embed_dim, dim, kernel, mask="A")
        self.from_memory = nn.Linear(dim, dim)
        self.blocks = nn.ModuleList(block() for _ in range(n_layers))
        n = math.prod(self.grid)
        self.register_buffer("positions", sinusoidal_positions_3d(grid, dim), persistent=False)
        self.register_buffer("neighbours", self.conv.neighbours(self.grid), persistent=False)
        self.register_buffer("causal", torch.full((n, n), -torch.inf).triu(1), persistent=False)

    def biases(self) -> list[Float[Tensor, "heads N N"]]:
        """Relative bias plus causal mask of every block."""
        return [block.relative() + self.causal for block in self.blocks]

    def table(self) -> Float[Tensor, "rows embed"]:
        """Embeddings of the codes of all codebooks."""
        if isinstance(self.embed_codes, nn.Embedding):
            return self.embed_codes.weight
        return torch.cat([table() for table in self.embed_codes])

    def embed(
        self, rows: Int[Tensor, "M L n"], table: Float[Tensor, "rows embed"] | None = None
    ) -> Float[Tensor, "M L embed"]:
        """Sum of the codebooks' embeddings."""
        return F.embedding(rows, self.table() if table is None else table).sum(-2)

    def forward(self, rows: Int[Tensor, "M N n"], memory: Float[Tensor, "M N d"]) -> Float[Tensor, "M N d"]:
        """All positions at once."""
        sizes = dict(zip("thw", self.grid))
        convolved = self.conv(rearrange(self.embed(rows), "m (t h w) d -> m d t h w", **sizes))
        x = rearrange(convolved, "m d t h w -> m (t h w) d")
        x = x + self.positions.to(memory.dtype) + self.from_memory(memory)
        for block, bias in zip(self.blocks, self.biases()):
            x = block(x, bias)
        return x

    def step(self, state: "DecoderState", positions: Int[Tensor, " L"], stop: int) -> Float[Tensor, "M L d"]:
        """Some positions only, all below ``stop``, with keys and values of the earlier ones taken from ``state``, to
        which the codes before each of them must have been fed."""
        near = state.embedded[:, self.neighbours[positions]].flatten(2)  # (M, L, taps * embed_dim)
        x = near @ state.tap_weight + state.base[:, positions]
        for block, bias, cache in zip(self.blocks, state.biases, state.caches):
            x = block.step(x, bias[:, positions, :stop], cache, positions)
        return x


class DecoderState:
    """Pre-allocated buffers of step-by-step decoding for M rows; reused from slice to slice and window to window."""

    def __init__(self, decoder: SliceDecoder, n_rows: int, dtype: torch.dtype, device: torch.device) -> None:
        attention = decoder.blocks[0].attention
        n = decoder.positions.shape[0]
        shape = (n_rows, attention.n_heads, n, attention.head_dim)
        self.decoder = decoder
        self.caches = [tuple(torch.zeros(shape, dtype=dtype, device=device) for _ in range(2)) for _ in decoder.blocks]
        self.biases = [bias.to(dtype) for bias in decoder.biases()]
        self.tap_weight = decoder.conv.tap_weight().to(dtype)
        # Row N of the embeddings stays zero: it is what neighbours outside the slice read.
        self.table = decoder.table()
        self.embedded = torch.zeros(n_rows, n + 1, self.table.shape[1], dtype=dtype, device=device)
        self.base = torch.zeros(n_rows, n, decoder.positions.shape[1], dtype=dtype, device=device)

    def start_slice(self, memory: Float[Tensor, "M N d"]) -> None:
        """Begin a slice. The caches need no clearing: the causal bias hides stale entries."""
        decoder = self.decoder
        self.base.copy_(decoder.from_memory(memory) + decoder.positions.to(memory.dtype) + decoder.conv.bias)

    def feed(self, rows: Int[Tensor, "M L n"], positions: Int[Tensor, " L"]) -> None:
        """Write the codes' embeddings at ``positions``."""
        self.embedded.index_copy_(1, positions, self.decoder.embed(rows, self.table).to(self.embedded.dtype))


class ChannelHead(nn.Module):
    """The codes of one position, one after the other.

    u_k = ReLU(U_k [LN(y); onehot(c_1 .. c_{k-1})]), logits P_k u_k.

    Args:
        logits: the P_k, where they are no linear layers.
    """

    def __init__(self, codebook_sizes: Sequence[int], dim: int, logits: Sequence[nn.Module] | None = None) -> None:
        super().__init__()
        self.sizes = list(codebook_sizes)
        self.norm = nn.LayerNorm(dim)
        self.hidden = nn.Linear(dim, dim * len(self.sizes))
        # The part of U_k that multiplies the one-hot codes, as tables; k sees the codebooks before it.
        self.previous = nn.ModuleList(nn.Embedding(sum(self.sizes[:k]), dim) for k in range(1, len(self.sizes)))
        for table in self.previous:
            nn.init.uniform_(table.weight, -(dim**-0.5), dim**-0.5)
        self.logits = nn.ModuleList(logits or [nn.Linear(dim, size) for size in self.sizes])

    def features(self, y: Float[Tensor, "*rows d"]) -> tuple[Float[Tensor, "*rows d"], ...]:
        """For each codebook, what does not depend on the codes of the position."""
        return self.hidden(self.norm(y)).chunk(len(self.sizes), dim=-1)

    def channel(
        self, features: Sequence[Float[Tensor, "*rows d"]], k: int, rows: Int[Tensor, "*rows n"]
    ) -> Float[Tensor, "*rows K"]:
        """Logits of codebook k, given the rows of the codes before it; of others it sees none."""
        u = features[k]
        if k > 0:
            u = u + self.previous[k - 1](rows[..., :k]).sum(-2)
        return self.logits[k](u.relu())

    def forward(self, y: Float[Tensor, "*rows d"], rows: Int[Tensor, "*rows n"]) -> list[Float[Tensor, "*rows _"]]:
        """Teacher forcing."""
        features = self.features(y)
        return [self.channel(features, k, rows) for k in range(len(self.sizes))]


class VideoTransformer(Prior):
    """The Latent Video Transformer over the codes of any discrete tokenizer.

    The defaults are the paper's: 49.9M parameters with four codebooks of 512 codes on a 16 x 16 grid.

    Args:
        latent_spec: ``FrameTokenizer.latent_spec`` of the tokenizer; codebooks, height and width are used.
        n_frames: T, the clip length that the model is trained on.
        subscale: (s_t, s_h, s_w); divides (T, h, w). Single frame (T, 1, 1), spatial (1, 2, 2), spatio-temporal
            (4, 2, 2) in the paper. Slices are generated in the order (0, 0, 0), (0, 0, 1), ...
        attention: "query_key_relative", "key_relative" or "relative" (section 4.4).
        dim, embed_dim: width of the transformer and of the code embeddings.
        n_heads, head_dim: attention heads and the width of **each**.
        n_layers: blocks of the encoder, and of the decoder.
        context_frames: how many frames back the encoder's convolution sees from the position being generated. None
            keeps the published kernels (single frame: 7 x 1 x 1, of which only the 3 past taps ever see a code; spatial
            1 x 3 x 3; spatio-temporal 5 x 3 x 3), for which the paper's parameter counts hold.
        slices_per_clip: random slices trained on in one step, per clip (the paper: 1); None takes all of them.
        encoder_positions: give the encoder the decoder's sinusoidal positions too. Without them (as published) it
            cannot tell where the frame ends, so it does not know where things bounce or leave.
        relative_scale: multiplies the relative bias tables, see RelativeBias3D; 1 as published.
        decoder_input, decoder_output, tied: the forms of appendix A (Table 8). "embedding" or "adaptive" input;
            "softmax" or "adaptive" output, whose likelihood and samples are exact too; "none", "embeddings": the output
            weighs by the vectors of the input (of the same form), or, of adaptive ones, "projections": by its
            projections as well. Adaptive forms spend fewer numbers on rare codes, which ``prepare`` looks for.
        cutoffs: how many of a codebook's most frequent codes each cluster of the adaptive forms goes up to; None: 43 %
            of them, the paper's 218 of 512, and the rest.
        fit_kernel: the decoder's convolution is as wide as a slice: without the taps along axes on which a slice is one
            position long, which see no code (of single frames, 18 of its 27; the paper's parameter counts have them).
        weight_init: "default", or "published": the published code's distributions, Xavier's uniform one for what it
            computes by convolutions and linear layers, N(0, 1) for embeddings.
        conditions, condition_dropout: see Prior; added to what encoder and decoder hold of each position.
    """

    accepts = "codes"
    explains = ("nats",)

    @register_to_config
    def __init__(
        self,
        latent_spec: LatentSpec,
        n_frames: int = 16,
        subscale: Sequence[int] = (16, 1, 1),
        attention: str = "query_key_relative",
        dim: int = 512,
        embed_dim: int = 128,
        n_heads: int = 8,
        head_dim: int = 128,
        n_layers: int = 8,
        context_frames: int | None = None,
        slices_per_clip: int | None = 1,
        encoder_positions: bool = False,
        relative_scale: float = 1.0,
        decoder_input: str = "embedding",
        decoder_output: str = "softmax",
        tied: str = "none",
        cutoffs: Sequence[int] | None = None,
        fit_kernel: bool = False,
        weight_init: str = "default",
        conditions: dict[str, dict] | None = None,
        condition_dropout: float = 0.1,
    ) -> None:
        super().__init__()
        sizes = list(latent_spec["codebook_sizes"])
        need_codes(latent_spec, "the video transformer")
        check_counts(n_frames=n_frames, dim=dim, embed_dim=embed_dim, n_heads=n_heads)
        check_counts(head_dim=head_dim, n_layers=n_layers)
        grid = (n_frames, latent_spec["height"], latent_spec["width"])
        subscale = tuple(subscale)
        if len(subscale) != 3 or any(not isinstance(s, int) or s < 1 or n % s for s, n in zip(subscale, grid)):
            nearest = f"; the nearest are {nearest_divisors(grid, subscale)}" if len(subscale) == 3 else ""
            raise ValueError(
                f"subscale: expected three divisors of (T, h, w) = {grid}, found {list(subscale)}{nearest}"
            )
        for name, value, known in (
            ("attention", attention, ATTENTION_FORMS),
            ("decoder_input", decoder_input, ("embedding", "adaptive")),
            ("decoder_output", decoder_output, ("softmax", "adaptive")),
            ("tied", tied, ("none", "embeddings", "projections")),
            ("weight_init", weight_init, ("default", "published")),
        ):
            if value not in known:
                raise ValueError(f"{name}: expected one of {', '.join(known)}, found {value!r}")
        for name, value in (("context_frames", context_frames), ("slices_per_clip", slices_per_clip)):
            if value is not None:
                check_counts(**{name: value})
        self.codebook_sizes, self.grid, self.subscale, self.clip_frames = sizes, grid, subscale, n_frames
        self.single_frame = subscale[0] == n_frames and subscale[1:] == (1, 1)
        slice_grid = tuple(size // s for size, s in zip(grid, subscale))

        taps = encoder_taps(subscale, n_frames, context_frames)
        slice_pixels, neighbours = slice_geometry(grid, subscale, taps)
        # Codes become rows of one table over all codebooks: code c of codebook k is row first_row[k] + c.
        first_row = torch.tensor([0, *itertools.accumulate(sizes)][:-1])
        self.register_buffer("slice_pixels", slice_pixels, persistent=False)  # (n_slices, N) raster index in the clip
        self.register_buffer("neighbours", neighbours, persistent=False)  # (n_slices, N, taps), or UNSEEN
        self.register_buffer("first_row", first_row, persistent=False)

        def block():
            return Block(slice_grid, dim, n_heads, head_dim, attention, relative_scale)

        shared = (slice_grid, sizes, dim, embed_dim, n_layers, block)
        self.encoder = SliceEncoder(len(slice_pixels), len(taps), *shared, absolute=encoder_positions)
        forms = (decoder_input, decoder_output)
        ties = {("embedding", "softmax"): ("embeddings",), ("adaptive", "adaptive"): ("embeddings", "projections")}
        if tied not in ("none", *ties.get(forms, ())):
            raise ValueError(
                "tied: expected none, embeddings where input and output are of one form, or projections where both are "
                f"adaptive, found {tied} with decoder_input={decoder_input} and decoder_output={decoder_output}"
            )
        if cutoffs is not None and "adaptive" not in forms:
            raise ValueError(f"cutoffs: expected None without an adaptive input or output, found {list(cutoffs)}")
        clusters = [cluster_bounds(size, cutoffs) for size in sizes] if "adaptive" in forms else None
        self.decoder = SliceDecoder(*shared, clusters if decoder_input == "adaptive" else None, fit_kernel)
        logits, tables = None, self.decoder.embed_codes
        if decoder_output == "adaptive":
            logits = [
                AdaptiveSoftmax(dim, bounds, *(() if tied == "none" else (tables[k], embed_dim, tied == "projections")))
                for k, bounds in enumerate(clusters)
            ]
        elif tied == "embeddings":
            ends = [0, *itertools.accumulate(sizes)]
            logits = [TiedSoftmax(dim, tables, slice(*rows)) for rows in itertools.pairwise(ends)]
        self.head = ChannelHead(sizes, dim, logits)
        self.make_conditioner(dim)
        if weight_init == "published":
            self._draw_published_weights(len(taps))

    def _draw_published_weights(self, n_taps):
        for module in self.modules():
            if isinstance(module, (nn.Linear, CausalConv3d)):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight)
        # Here tables and one layer, there a convolution over one-hot codes and a layer for each codebook.
        n_rows, width = sum(self.codebook_sizes), self.config.embed_dim
        xavier_uniform(self.encoder.taps.weight[:-1], n_taps * n_rows, n_taps * width)
        for k, part in enumerate(self.head.hidden.weight.chunk(len(self.codebook_sizes))):
            n_previous = sum(self.codebook_sizes[:k])
            for weight in (part, *([self.head.previous[k - 1].weight] if k else [])):
                xavier_uniform(weight, self.config.dim + n_previous, self.config.dim)

    @torch.no_grad()
    def prepare(self, clips: Iterable[Codes]) -> None:
        """Find out how frequent the codes are, where the form of input or output depends on it."""
        forms = {"decoder_input": self.decoder.embed_codes, "decoder_output": self.head.logits}
        adaptive = [modules for name, modules in forms.items() if self.config[name] == "adaptive"]
        if not adaptive:
            return
        counts = [torch.zeros(size, dtype=torch.int64, device=self.device) for size in self.codebook_sizes]
        for clip in clips:
            for count, codes in zip(counts, clip.flatten(0, -2).unbind(-1)):
                count += torch.bincount(codes, minlength=len(count))
        for modules in adaptive:
            for module, count in zip(modules, counts):
                order = count.argsort(descending=True, stable=True)
                module.rank[order] = torch.arange(len(order), device=order.device)

    # Likelihood -------------------------------------------------------------------------------------------------

    def slice_logits(
        self,
        codes: Int[Tensor, "M T h w n"],
        slice_ids: Int[Tensor, " M"],
        vectors: Float[Tensor, "M T d"] | None = None,
    ) -> tuple[list[Float[Tensor, "M N _"]], Int[Tensor, "M N n"]]:
        """Teacher-forced logits of each codebook, of one slice a row, and the slice's own codes. ``vectors``: of
        ``condition_vectors``."""
        rows = (codes + self.first_row).flatten(1, 3)
        memory = self._encode(rows, slice_ids, vectors)
        own = self._take(rows, self.slice_pixels[slice_ids])
        return self.head(self.decoder(own, memory), own), own - self.first_row

    def _encode(self, rows, slice_ids, vectors=None):
        """The encoder's memory: rows (M, T * h * w, n_codebooks), slice_ids (M,), vectors (M, T, d) -> (M, N, d)."""
        near = self._take(F.pad(rows, (0, 0, 0, 1), value=UNSEEN), self.neighbours[slice_ids])
        told = None if vectors is None else self._take(vectors, self._times(slice_ids))
        return self.encoder(near, slice_ids, told)

    @staticmethod
    def _take(rows, index):
        """rows (M, P, n), index (M, ...) -> (M, ..., n)."""
        batch = torch.arange(rows.shape[0], device=rows.device).view(-1, *[1] * (index.ndim - 1))
        return rows[batch, index]

    def _slice_log_prob(self, codes, slice_ids, n_context, vectors=None):
        """Summed log-probability of the predicted codes of a slice (M,), in nats, and how many codes that are (M,)."""
        future = self._times(slice_ids) >= n_context  # (M, N)
        nll = self._code_nats(codes, slice_ids, vectors)
        total = 0
        for nll_k in nll:
            total = total - (nll_k * future).sum(1)
        return total, future.sum(1) * len(nll)

    def _code_nats(self, codes, slice_ids, vectors=None):
        """Negative log-probability of each code of a slice, in nats: a list over codebooks of (M, N)."""
        logits, own = self.slice_logits(codes, slice_ids, vectors)
        return [
            F.cross_entropy(logits_k.float().transpose(1, 2), own[..., k], reduction="none")
            for k, logits_k in enumerate(logits)
        ]

    def _times(self, slice_ids):
        """Frame index of each position of a slice."""
        return self.slice_pixels[slice_ids] // (self.grid[1] * self.grid[2])

    def _check_clip(self, clip, n_context):
        check_codes(clip, self.codebook_sizes, self.grid[1:], name="clip")
        if clip.shape[1] != self.clip_frames:
            raise ValueError(f"clip: expected {self.clip_frames} frames (n_frames of the prior), found {clip.shape[1]}")
        self.check_context(n_context, clip.shape[1])

    def _predicted_slices(self, n_context):
        """Indices of the slices that hold a code to predict: the last ones, since slices are in order of time."""
        n_slices = len(self.slice_pixels)
        known = sum(self._frames_of(index)[-1] < n_context for index in range(n_slices))
        return torch.arange(known, n_slices, device=self.slice_pixels.device)

    def _frames_of(self, index):
        """The frames that a slice has positions in, as many in each; known without a look at the device."""
        return range(index // math.prod(self.subscale[1:]), self.grid[0], self.subscale[0])

    def forward(self, clip: Codes, n_context: int, conditions: Conditions | None = None) -> PriorOutput:
        """Mean cross-entropy of the codes after the context, in nats a code.

        In training on ``slices_per_clip`` random slices of each clip; in eval mode on all of them, so a validation
        loss is exact.

        Args:
            clip: int64. n_context: context frames, which the loss skips.
            conditions: see Prior.
        """
        self._check_clip(clip, n_context)
        if not self.training:
            loss = -self._mean_log_prob(clip, n_context, conditions).mean()
        else:
            slices = self._predicted_slices(n_context)
            per_clip = min(self.config.slices_per_clip or len(slices), len(slices))
            order = torch.rand(clip.shape[0], len(slices), device=clip.device).argsort(1)[:, :per_clip]
            vectors = self.condition_vectors(conditions, *clip.shape[:2])
            log_prob, count = self._slice_log_prob(
                clip.repeat_interleave(per_clip, 0),
                slices[order].flatten(),
                n_context,
                None if vectors is None else vectors.repeat_interleave(per_clip, 0),
            )
            loss = -log_prob.sum() / count.sum()
        return PriorOutput(loss=loss, logs={"bits_per_code": loss.detach() / math.log(2)})

    def log_prob(self, clip: Codes, n_context: int, conditions: Conditions | None = None) -> Float[Tensor, " B"]:
        """Log-likelihood of the codes after the context, in nats.

        The product of the conditionals in generation order (section 3.2), as the paper's bits/dim: each code given
        all codes before it in that order.
        """
        batch = len(clip)
        total = torch.zeros(batch, device=clip.device)
        for rows, slices, vectors in self._passes(clip, n_context, conditions):
            log_prob, _ = self._slice_log_prob(rows, slices, n_context, vectors)
            total = total + log_prob.view(-1, batch).sum(0)
        return total

    def _passes(self, clip, n_context, conditions=None):
        """Clips and their slices with codes to predict, as many as are computed at once, and what is told of them:
        (M, T, ...), (M,), (M, T, d) or None."""
        self._check_clip(clip, n_context)
        vectors = self.condition_vectors(conditions, *clip.shape[:2])
        slices, batch = self._predicted_slices(n_context), len(clip)
        at_once = max(1, POSITIONS_AT_ONCE // (batch * self.slice_pixels.shape[1]))
        for some in slices.split(at_once):
            told = None if vectors is None else vectors.repeat(len(some), 1, 1)
            yield clip.repeat(len(some), 1, 1, 1, 1), some.repeat_interleave(batch), told

    @torch.no_grad()
    def explain(
        self, clip: Codes, n_context: int, conditions: Conditions | None = None, **options: object
    ) -> dict[str, Float[Tensor, "B ..."]]:
        """As Prior's: ``nats`` of each code."""
        batch, n = len(clip), len(self.codebook_sizes)
        nats = torch.zeros(batch, math.prod(self.grid), n, device=clip.device)
        for rows, slices, vectors in self._passes(clip, n_context, conditions):
            found = torch.stack(self._code_nats(rows, slices, vectors), -1).unflatten(
                0, (-1, batch)
            )  # (slices, B, N, n)
            for part, pixels in zip(found, self.slice_pixels[slices[::batch]]):
                nats[:, pixels] = part
        return {"nats": nats.unflatten(1, self.grid)[:, n_context:]}

    def _mean_log_prob(self, clip, n_context, conditions=None):
        return self.log_prob(clip, n_context, conditions) / (clip[0, n_context:].numel())

    def bits_per_code(self, clip: Codes, n_context: int, conditions: Conditions | None = None) -> Float[Tensor, " B"]:
        """The paper's bits/dim: -log2 of the likelihood, averaged over the predicted latent codes."""
        return -self._mean_log_prob(clip, n_context, conditions) / math.log(2)

    # Sampling ---------------------------------------------------------------------------------------------------

    def sampler_ranges(self) -> dict[str, dict]:
        return DRAWING | GUIDANCE

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
        guidance_scale: float = 1.0,
        use_cache: bool = True,
        compile: bool = False,
    ) -> Int[Tensor, "B {num_samples} {n_frames} h w n"]:
        """Continue codes.

        Past the trained clip length T the model slides: the window is refilled with the last T - 1 frames (single-frame
        subscaling) or the last T // 2 (otherwise), generated ones included.

        Args:
            context: int64 codes, at least one frame. n_frames: how many to predict.
            num_samples: futures for each context; what they share is computed once.
            generator: for reproducible samples.
            progress: counts generated positions.
            conditions: see Prior.
            temperature: divides the logits; 0 is greedy. top_k, top_p: truncate the distribution.
            guidance_scale: moves the logits away from those without conditions (above 1), or towards them.
            use_cache: False re-runs the decoder over the whole slice for each position, as the published sampler does
                (a reference for tests and benchmarks).
            compile: fuse the operations of a position by torch.compile, see ``CompiledStep``.
        """
        choose = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
        self._check_sampling(context, num_samples, guidance_scale, use_cache, compile, choose)
        check_counts(n_frames=n_frames)
        batch, n_context = context.shape[:2]
        self.check_context(n_context, n_context + n_frames)
        windows = sliding_windows(n_context, n_frames, self.grid[0], self._overlap)
        n_steps = sum(self.slice_pixels.shape[1] - start for window in windows for _, start in self._plan(*window))
        vectors = self.sampling_vectors(conditions, batch, n_context + n_frames)
        with (progress or no_progress)(total=n_steps) as bar:
            frames = self._stream(
                context,
                lambda t: vectors[:, t] if t < vectors.shape[1] else self.conditioner.null.expand_as(vectors[:, 0]),
                *(num_samples, generator, guidance_scale, use_cache, compile, bar),
                choose=choose,
            )
            future = torch.stack([next(frames) for _ in range(n_frames)], 1)
        return future.unflatten(0, (-1, num_samples))

    def stream(
        self,
        context: Codes,
        told: Told,
        *,
        num_samples: int,
        generator: torch.Generator | None,
        guidance_scale: float,
        use_cache: bool,
        compile: bool,
        **choose: float | None,
    ) -> Iterator[Int[Tensor, "B {num_samples} h w n"]]:
        """As Prior's. A model whose slices span several frames generates a window of frames together: told what leads
        to each, it would have to know so beforehand, which is refused."""
        self._check_sampling(context, num_samples, guidance_scale, use_cache, compile, choose)
        if self.conditioner is not None and not self.single_frame:
            raise ValueError(
                f"rollout: expected subscale=[{self.grid[0]}, 1, 1], a frame at a time, of a prior with conditions, "
                f"found {list(self.subscale)}"
            )
        frames = self._stream(
            *(context, told, num_samples, generator, guidance_scale, use_cache, compile, no_progress()), choose=choose
        )
        return (frame.unflatten(0, (-1, num_samples)) for frame in frames)

    def _check_sampling(self, context, num_samples, guidance_scale, use_cache, compile, choose):
        check_sampling(**choose)
        check_guidance(guidance_scale, self)
        check_caching(use_cache, compile)
        check_codes(context, self.codebook_sizes, self.grid[1:], name="context")
        check_counts(num_samples=num_samples)

    @property
    def _overlap(self):
        """Frames of the window before that the next one begins with."""
        return self.grid[0] - 1 if self.single_frame else max(1, self.grid[0] // 2)

    def _stream(self, context, told, num_samples, generator, guidance_scale, use_cache, compile, bar, choose):
        """Yield predicted frames (B * num_samples, h, w, n_codebooks), without an end.

        Single frames are a window each, since nothing after them has to be generated.
        """
        n_seen, length = context.shape[1], self.grid[0]  # n_seen: frames there are, the context's and those predicted
        video = context.repeat_interleave(num_samples, 0)
        make = partial(CachedStepper, compiled=compile) if use_cache else FullStepper
        stepper = make(self, len(video), choose, guidance_scale)
        shared, vectors = num_samples, []  # of the frames in ``video``
        if self.conditioner is not None and not self.single_frame:
            vectors = [told(t) for t in range(n_seen)]
        with contextlib.nullcontext() if compile else packed_linears(self.decoder, self.head, rows=len(video)):
            while True:
                known = n_seen if n_seen < length else self._overlap
                new = 1 if self.single_frame else length - known
                window_vectors = None
                if self.conditioner is not None:
                    if self.single_frame:  # a slice sees what is told of its own frame
                        window_vectors = told(n_seen)[:, None].expand(-1, length, -1)
                    else:
                        vectors += [told(n_seen + i) for i in range(new)]
                        window_vectors = torch.stack(vectors[-length:], 1)
                    window_vectors = window_vectors.repeat_interleave(num_samples, 0)
                plan = self._plan(known, new)
                window = self._sample_window(video[:, -known:], plan, shared, generator, stepper, bar, window_vectors)
                for frame in window[:, known : known + new].unbind(1):
                    yield frame.clone()  # not all of the window
                n_seen, shared = n_seen + new, 1
                video, vectors = torch.cat([video, window[:, known : known + new]], 1)[:, -length:], vectors[-length:]

    def _plan(self, known, new):
        """(slice, first position) to generate from, when ``known`` frames are given and ``new`` wanted.

        Frames after the wanted ones are left out where nothing depends on them (single-frame slices).
        """
        plan = []
        for index in range(len(self.slice_pixels)):
            frames, n_positions = self._frames_of(index), self.slice_pixels.shape[1]
            # The known positions lead: raster order is time-major.
            start = sum(frame < known for frame in frames) * n_positions // len(frames)
            if start < n_positions and not (self.single_frame and index >= known + new):
                plan.append((index, start))
        return plan

    def _sample_window(self, known, plan, num_shared, generator, stepper, bar, vectors):
        """Fill one window: known (M, n, h, w, n_codebooks), vectors (M, T, d) or None -> (M, T, h, w, n_codebooks).

        Rows come in groups of ``num_shared`` with the same known frames, so the first slice's memory is computed once
        a group.
        """
        n_rows, n_known = known.shape[:2]
        rows = torch.zeros(n_rows, *self.grid, len(self.codebook_sizes), dtype=torch.int64, device=known.device)
        rows[:, :n_known] = known
        rows = (rows + self.first_row).flatten(1, 3)
        for order, (index, start) in enumerate(plan):
            share = num_shared if order == 0 else 1
            slice_ids = torch.full((n_rows // share,), index, device=known.device)
            told = None if vectors is None else vectors[::share]
            memory = self._encode(rows[::share], slice_ids, told)
            if stepper.is_guided:
                untold = self.conditioner.null.expand_as(told)
                memory = torch.cat([memory, self._encode(rows[::share], slice_ids, untold)])
            memory = memory.repeat_interleave(share, 0)
            own = rows[:, self.slice_pixels[index]]
            shape = (own.shape[1], n_rows, len(self.codebook_sizes))
            source = generator.device if generator is not None else known.device
            uniform = torch.rand(shape, generator=generator, device=source).to(known.device)
            stepper.start_slice(memory, own, start, uniform)
            for position in range(start, own.shape[1]):
                stepper.step(position)
                bar.update(1)
            rows[:, self.slice_pixels[index]] = stepper.own[:n_rows]
        return (rows - self.first_row).unflatten(1, self.grid)

    def _draw_codes(self, y, uniform, choose, guidance_scale):
        """Sample one position channel by channel: y (M, d), uniform (M, n_codebooks) -> rows (M, n_codebooks).

        With guidance y has 2 M rows, see ``guided``, and so has what is returned.
        """
        features = self.head.features(y)
        rows = torch.empty(y.shape[0], 0, dtype=torch.int64, device=y.device)
        for k in range(len(self.codebook_sizes)):
            logits = self.head.channel(features, k, rows)
            if guidance_scale != 1:
                logits = guided(logits, guidance_scale)
            code = draw(logits, uniform[:, k], **choose)
            code = code.repeat(len(rows) // len(code))
            rows = torch.cat([rows, (code + self.first_row[k])[:, None]], 1)
        return rows


class Stepper:
    """What draws the codes of ``n_rows`` futures position by position; with guidance, of two copies of each."""

    def __init__(
        self, model: VideoTransformer, n_rows: int, choose: dict[str, float | None], guidance_scale: float = 1.0
    ) -> None:
        self.model, self.choose, self.guidance_scale = model, choose, guidance_scale
        self.is_guided = guidance_scale != 1
        self.n_copies = 1 + self.is_guided

    def draw(self, y: Float[Tensor, "M d"], uniform: Float[Tensor, "_ n"]) -> Int[Tensor, "M n"]:
        return self.model._draw_codes(y, uniform, self.choose, self.guidance_scale)


class FullStepper(Stepper):
    """Reference sampler: the decoder re-runs over the whole slice for every position."""

    def start_slice(
        self, memory: Float[Tensor, "M N d"], own: Int[Tensor, "_ N n"], start: int, uniform: Float[Tensor, "N _ n"]
    ) -> None:
        self.memory, self.own, self.uniform = memory, own.repeat(self.n_copies, 1, 1), uniform

    def step(self, position: int) -> None:
        y = self.model.decoder(self.own, self.memory)[:, position]
        self.own[:, position] = self.draw(y, self.uniform[position])


class CachedStepper(Stepper):
    """Key/value cache: a position costs one column of work.

    Everything a step touches lives in fixed buffers and its position in a tensor, so on CUDA the step is recorded once
    as a graph and replayed, and elsewhere can be compiled: at this size, launching the kernels one by one would take
    longer than running them.
    """

    def __init__(
        self,
        model: VideoTransformer,
        n_rows: int,
        choose: dict[str, float | None],
        guidance_scale: float = 1.0,
        compiled: bool = False,
    ) -> None:
        super().__init__(model, n_rows, choose, guidance_scale)
        self.device = model.device
        n, n_codebooks = model.slice_pixels.shape[1], len(model.codebook_sizes)
        self.state = DecoderState(model.decoder, n_rows * self.n_copies, model.dtype, self.device)
        self.own = torch.zeros(n_rows * self.n_copies, n, n_codebooks, dtype=torch.int64, device=self.device)
        self.uniform = torch.zeros(n, n_rows, n_codebooks, device=self.device)
        self.position = torch.zeros(1, dtype=torch.int64, device=self.device)
        self.replay = fixed_step(partial(self._step, n), self.device, compiled)

    def start_slice(
        self, memory: Float[Tensor, "M N d"], own: Int[Tensor, "_ N n"], start: int, uniform: Float[Tensor, "N _ n"]
    ) -> None:
        self.own.copy_(own.repeat(self.n_copies, 1, 1))
        self.uniform.copy_(uniform)
        self.state.start_slice(memory)
        if start:  # the known positions, all at once
            positions = torch.arange(start, device=self.device)
            self.state.feed(self.own[:, :start], positions)
            self.model.decoder.step(self.state, positions, start)

    def step(self, position: int) -> None:
        self.position.fill_(position)
        if self.replay is not None:
            self.replay()
        else:
            self._step(position + 1)

    def _step(self, stop):
        """Generate the position held in ``self.position``, attending to the first ``stop`` cached ones."""
        y = self.model.decoder.step(self.state, self.position, stop)[:, 0]
        rows = self.draw(y, self.uniform.index_select(0, self.position)[0])
        self.own.index_copy_(1, self.position, rows[:, None])
        self.state.feed(rows[:, None], self.position)


@torch.no_grad()
def xavier_uniform(weight: Tensor, fan_in: int, fan_out: int) -> None:
    """Glorot's uniform distribution, for a weight that is a part of a layer, or laid out otherwise."""
    weight.uniform_(-1, 1).mul_(math.sqrt(6 / (fan_in + fan_out)))
