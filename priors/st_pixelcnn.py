"""ST-PixelCNN, the prior of S-HR-VQVAE (Adiban et al. 2023, section 4.2).

An autoregressive model over the codes of a frame tokenizer, whose quantisation layers (or codebooks, or pixel channels)
are generated one after the other in each frame, coarse to fine:

    p(future | context) = prod_t prod_i prod_(y,x) p(c_i(t,y,x) | all layers of frames < t, layers < i of frame t,
                                                      c_i(t,y',x') earlier in raster order)

Three stacks of gated convolutions look at these three parts: the frame stack at what is known before the layer is begun
(earlier frames and the layers above, where nothing has to be hidden), the row stack at the rows above, and the column
stack at the codes to the left. Causal self-attention runs on the column stack.

Conditions enter in the gated convolutions of all three stacks, as a bias for each channel of a frame.

Shape letters: B clips, M rows of a sampler (samples of all contexts; with guidance twice as many), n layers, d width.
"""

import math

import torch
from diffusers.configuration_utils import register_to_config
from torch import nn

from latentcast.config import check_counts, one_line
from latentcast.layers.causal_attention import CausalWindowAttention
from latentcast.layers.masked_convolutions import AxisCausalConv3d, shifted
from latentcast.layers.positions import sinusoidal_positions_3d
from latentcast.sizes import as_size, sides
from latentcast.tokenizers.base import check_codes

from .base import Prior, PriorOutput, code_nats, need_codes, no_progress
from .sampling import (
    DRAWING,
    GUIDANCE,
    check_guidance,
    check_sampling,
    check_switches,
    draw,
    guided,
    record_graph,
)

ATTENTION_FORMS = ("full", "factorised", "windowed", "none")


def gate(x):
    """The gated activation of PixelCNN: (..., 2 d) -> (..., d)."""
    a, b = x.chunk(2, -1)
    return a.tanh() * b.sigmoid()


class GatedLayer(nn.Module):
    """x + W (tanh(a) * sigmoid(b)), with [a, b] a convolution of LN(x) and of a condition, causal along one axis.

    Of a model that is told something of each frame, [a, b] also has a linear map of that (van den Oord et al.,
    "Conditional Image Generation with PixelCNN Decoders", 2016, Eq. 4), the same at all positions of the frame.
    """

    def __init__(self, dim, axis, taps, width, is_told=False):
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        # The row stack is conditioned on the frame stack, the column stack on both.
        self.conv = AxisCausalConv3d(dim, 2 * dim, axis, taps, width, condition_channels=axis * dim)
        self.out = nn.Linear(dim, dim)
        self.tell = nn.Linear(dim, 2 * dim, bias=False) if is_told else None

    def forward(self, x, condition=None, past=None, told=None):
        """x (B, t, h, w, d) and what is told of its frames (B, t, d) or None -> like x, and the ``past`` of the piece
        that comes next (see AxisCausalConv3d)."""
        y, past = self.conv(self.norm(x), condition, past)
        if told is not None:
            y = y + self.tell(told)[:, :, None, None]
        return x + self.out(gate(y)), past


class LayerNetwork(nn.Module):
    """The network of one quantisation layer, or of all of them with an embedding that says which.

    Args:
        layers: indices of the layers that it predicts, neighbours.
        codebook_sizes: of all layers.
        grid: (T, h, w).
        dim, n_blocks, block_layers, kernel_size, kernel_frames: as of STPixelCNN.
        attention: function() -> the attention modules of a block.
        is_told: whether it is told something of each frame.
    """

    def __init__(
        self, layers, codebook_sizes, grid, dim, n_blocks, block_layers, kernel_size, kernel_frames, attention, is_told
    ):
        super().__init__()
        self.layers = list(layers)
        starts = [sum(codebook_sizes[:i]) for i in range(len(codebook_sizes) + 1)]
        first, last = self.layers[0], self.layers[-1]
        # Codes arrive as rows of one table over all codebooks.
        self.first_own_row = starts[first]
        self.previous = nn.Embedding(starts[-1], dim)  # codes of the frame before
        self.above = nn.Embedding(starts[last], dim) if last > 0 else None  # codes of this frame in the layers above
        self.own = nn.Embedding(starts[last + 1] - starts[first], dim)  # codes of this frame in the same layer
        for table, n_summed in ((self.previous, len(codebook_sizes)), (self.above, last), (self.own, 1)):
            if table is not None:
                nn.init.normal_(table.weight, std=n_summed**-0.5)
        self.which = nn.Embedding(len(self.layers), dim) if len(self.layers) > 1 else None
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
        self.logits = nn.ModuleList(nn.Linear(dim, codebook_sizes[i]) for i in self.layers)
        self.has_attention = any(len(modules) for modules in self.attention)

    def embed_before(self, rows):
        """What frames tell the frame after them: (B, T, h, w, n) -> (B, T, h, w, d)."""
        return self.previous(rows).sum(-2)

    def embed_known(self, before, rows, i, start=0):
        """Input of the frame stack: what is known of frames before their layer i is begun.

        Args:
            before: (B, T, h, w, d), what the frame before each of them tells it.
            rows: (B, T, h, w, n), of which the layers before i are looked at.
            start: index of the first of these frames in the clip.
        """
        known = before + self.positions[start : start + rows.shape[1]].to(before.dtype)
        if i > 0:
            known = known + self.above(rows[..., :i]).sum(-2)
        if self.which is not None:
            known = known + self.which.weight[i]
        return known

    def embed_own(self, rows):
        """Rows of one of the network's layers -> their embeddings."""
        return self.own(rows - self.first_own_row)

    def predict(self, features, i):
        """Output of the column stack (..., d) -> logits of layer i, (..., size_i)."""
        return self.logits[i - self.layers[0]](self.head(features))

    def forward(self, rows, layers, first=0, told=None):
        """Teacher forcing: rows (B, T, h, w, n), and what is told of the frames (B, T, d) or None -> for each of
        ``layers`` logits (B, T - first, h, w, size)."""
        before = shifted(self.embed_before(rows), 0)
        known = torch.cat([self.embed_known(before, rows, i) for i in layers])
        own = torch.cat([self.embed_own(rows[..., i]) for i in layers])
        features = self.features(known, own, first, told=None if told is None else told.repeat(len(layers), 1, 1))
        return [self.predict(part, i) for i, part in zip(layers, features.chunk(len(layers)))]

    def features(self, known, own, first=0, state=None, told=None):
        """All three stacks over whole frames: (B, T, h, w, d) twice -> (B, T - first, h, w, d).

        Without attention, the row and column stacks of frames before ``first`` are not computed. ``state``, a
        LayerState, keeps what later frames need.
        """
        skipped = 0 if self.has_attention else first
        own, told_own = own[:, skipped:], None if told is None else told[:, skipped:]
        rows, columns = shifted(own, 1), shifted(own, 2)
        for index, attention in enumerate(self.attention):
            known, past = self.frame_stack[index](known, told=told)
            if state is not None:
                state.keep_frames(index, past)
            condition = known[:, skipped:]
            rows, _ = self.row_stack[index](rows, condition, told=told_own)
            columns, _ = self.column_stack[index](columns, torch.cat([condition, rows], -1), told=told_own)
            for number, module in enumerate(attention):
                columns = module(columns, None if state is None else state.caches[index][number])
        return columns[:, first - skipped :]


class STPixelCNN(Prior):
    """The spatio-temporal PixelCNN over the codes of any discrete tokenizer, pixels of 256 levels included.

    It takes one codebook, several side by side (sliced, or channels of pixels) or residual layers alike, and generates
    them in their order, each given the ones before it at every position of the frame. The paper gives neither sizes nor
    the form of its masks. These stacks see all that is earlier, and nothing else.

    Args:
        latent_spec: ``FrameTokenizer.latent_spec`` of the tokenizer; codebooks, height and width are used.
        n_frames: T, the longest clip, at least 2. Longer futures are sampled with a sliding window.
        layers: "separate", a network for each quantisation layer (the paper), or "shared", one for all of them.
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
        latent_spec,
        n_frames=20,
        layers="separate",
        dim=128,
        n_blocks=2,
        block_layers=3,
        kernel_size=3,
        kernel_frames=2,
        attention="full",
        window=8,
        n_heads=4,
        head_dim=32,
        conditions=None,
        condition_dropout=0.1,
    ):
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
        self.networks = nn.ModuleList(LayerNetwork(group, *shared) for group in groups)
        first_row = torch.tensor([sum(sizes[:i]) for i in range(len(sizes))])
        self.register_buffer("first_row", first_row, persistent=False)
        self.make_conditioner(dim)

    def network(self, i):
        """The network that predicts layer i."""
        return self.networks[i if len(self.networks) > 1 else 0]

    # Likelihood -------------------------------------------------------------------------------------------------

    def forward(self, clip, n_context, conditions=None):
        """Mean cross-entropy of the codes after the context, in nats a code, over all layers.

        Args:
            clip: (B, t, h, w, n) int64, t of at most ``n_frames``. n_context: context frames, which the loss skips.
            conditions: see Prior.
        Returns:
            PriorOutput with ``logits``, one (B, t - n_context, h, w, size) a layer, and in ``logs`` the bits a code, of
            all layers and of each.
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

    def log_prob(self, clip, n_context, conditions=None):
        """Log-likelihood of the codes after the context, in nats: (B, t, h, w, n) -> (B,)."""
        return self.layer_log_prob(clip, n_context, conditions).sum(1)

    def layer_log_prob(self, clip, n_context, conditions=None):
        """What each layer adds to ``log_prob``: log p(layer i | layers above), in nats -> (B, n)."""
        return -self._nll(self._logits(clip, n_context, conditions), clip, n_context)

    @torch.no_grad()
    def explain(self, clip, n_context, conditions=None, **options):
        """As Prior's: ``nats`` of each code."""
        target = clip[:, n_context:]
        logits = self._logits(clip, n_context, conditions)
        return {"nats": torch.stack([code_nats(layer, target[..., i]) for i, layer in enumerate(logits)], -1)}

    def layer_bits_per_code(self, clip, n_context, conditions=None):
        """-log2 of the likelihood, averaged over the predicted codes of each layer -> (B, n)."""
        n_codes = clip[0, n_context:, ..., 0].numel()
        return -self.layer_log_prob(clip, n_context, conditions) / (n_codes * math.log(2))

    def _logits(self, clip, n_context, conditions=None):
        """Logits of the codes after the context, a list over layers."""
        check_codes(clip, self.codebook_sizes, self.grid[1:], name="clip")
        if clip.shape[1] > self.grid[0]:
            raise ValueError(f"clip: expected at most {self.grid[0]} frames (n_frames), found {clip.shape[1]}")
        self.check_context(n_context, clip.shape[1])
        rows, told = clip + self.first_row, self.condition_vectors(conditions, *clip.shape[:2])
        return [logits for network in self.networks for logits in network(rows, network.layers, n_context, told)]

    @staticmethod
    def _nll(logits, clip, n_context):
        """Summed cross-entropy of each layer, in nats -> (B, n)."""
        target = clip[:, n_context:]
        nll = [code_nats(layer, target[..., i]) for i, layer in enumerate(logits)]
        return torch.stack([layer.flatten(1).sum(1) for layer in nll], 1)

    # Sampling ---------------------------------------------------------------------------------------------------

    def sampler_ranges(self):
        return DRAWING | GUIDANCE | {"overlap": {"kind": int, "least": 1, "most": self.grid[0] - 1}}

    @torch.no_grad()
    def sample(
        self,
        context,
        n_frames,
        *,
        num_samples=1,
        generator=None,
        progress=None,
        conditions=None,
        temperature=1.0,
        top_k=None,
        top_p=None,
        overlap=None,
        guidance_scale=1.0,
        use_cache=True,
    ):
        """Continue codes (B, n_context, h, w, n) -> (B, num_samples, n_frames, h, w, n).

        A code costs one column of work: the frame stack runs once a frame, the row stack once a row, and attention
        finds the keys and values of earlier positions in a cache. Past the trained clip length T the model slides: it
        starts anew from the last ``overlap`` frames, generated ones included.

        Args:
            context: int64 codes, at least one frame. n_frames: how many to predict.
            num_samples: futures for each context, which is read once.
            generator: a ``torch.Generator`` for reproducible samples.
            progress: a callable like ``tqdm``; counts generated codes.
            conditions: see Prior.
            temperature: divides the logits; 0 is greedy. top_k, top_p: truncate the distribution.
            overlap: frames that the model sees when it slides, 1 to T - 1; more cost more time. None: T // 2.
            guidance_scale: moves the logits away from those without conditions (above 1), or towards them.
            use_cache: False runs the network over the whole clip for each code (a reference for tests and benchmarks).
        """
        check_counts(n_frames=n_frames)
        choose = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "guidance_scale": guidance_scale}
        self._check_sampling(context, num_samples, overlap, use_cache, choose)
        told = self._told(conditions, len(context), context.shape[1] + n_frames)
        with (progress or no_progress)(total=n_frames * math.prod(self.grid[1:]) * len(self.codebook_sizes)) as bar:
            frames = self._stream(context, told, num_samples, generator, overlap, use_cache, choose, bar)
            future = torch.stack([next(frames) for _ in range(n_frames)], 1)
        return future.unflatten(0, (-1, num_samples))

    def stream(self, context, told, *, num_samples, generator, overlap, use_cache, **choose):
        """As Prior's; the last T frames are kept."""
        self._check_sampling(context, num_samples, overlap, use_cache, choose)
        frames = self._stream(context, told, num_samples, generator, overlap, use_cache, choose, no_progress())
        return (frame.unflatten(0, (-1, num_samples)) for frame in frames)

    def _check_sampling(self, context, num_samples, overlap, use_cache, choose):
        check_sampling(**{name: choose[name] for name in DRAWING})
        check_guidance(choose["guidance_scale"], self)
        check_switches(use_cache=use_cache)
        check_codes(context, self.codebook_sizes, self.grid[1:], name="context")
        check_counts(num_samples=num_samples)
        self.check_context(context.shape[1], context.shape[1] + 1)
        if overlap is not None:
            check_counts(overlap=overlap)
            if overlap >= self.grid[0]:
                most = self.grid[0] - 1
                raise ValueError(f"overlap: expected 1 to {most} (n_frames - 1), found {one_line(overlap)}")

    def _stream(self, context, told, num_samples, generator, overlap, use_cache, choose, bar):
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
        stepper = (CachedStepper if use_cache else FullStepper)(self, len(window), choose)
        n_shared = num_samples
        while True:
            if window.shape[1] >= length:
                window, vectors = (x if x is None else x[:, -overlap:] for x in (window, vectors))
            stepper.start(window, vectors, n_shared)
            while window.shape[1] < length:
                if vectors is not None:
                    vectors = torch.cat([vectors, of_rows(n_seen)], 1)
                frame = torch.empty_like(window[:, :1])
                for i in range(len(self.codebook_sizes)):
                    uniform = self._uniform(n_rows, generator).repeat(1, 1, n_copies)
                    for y in range(self.grid[1]):
                        stepper.fill_row(window, frame, vectors, i, y, uniform[y])
                        bar.update(self.grid[2])
                window, n_seen = torch.cat([window, frame], 1), n_seen + 1
                yield frame[:n_rows, 0] - self.first_row
            n_shared = 1

    def _uniform(self, n_rows, generator):
        """Random numbers for a layer of a frame: (h, w, n_rows)."""
        source = generator.device if generator is not None else self.device
        return torch.rand((*self.grid[1:], n_rows), generator=generator, device=source).to(self.device)


def choose_codes(logits, uniform, guidance_scale=1.0, **choose):
    """Codes (M,) drawn from logits (M, size), see ``draw``; with guidance the same ones for both copies of a row."""
    if guidance_scale != 1:
        logits = guided(logits, guidance_scale).repeat(2, 1)
    return draw(logits, uniform, **choose)


class FullStepper:
    """Reference sampler: the network runs over all frames so far for every code."""

    def __init__(self, model, n_rows, choose):
        self.model, self.choose = model, choose

    def start(self, window, vectors, n_shared):
        """Begin a window; there is nothing to prepare."""

    def fill_row(self, window, frame, vectors, i, y, uniform):
        """As CachedStepper's."""
        frame[..., i][:, :, y:] = self.model.first_row[i]  # whatever is there: causality hides it
        frame[..., i + 1 :] = self.model.first_row[i + 1 :]
        for x in range(frame.shape[3]):
            self.fill(window, frame, vectors, i, y, x, uniform[x])

    def fill(self, window, frame, vectors, i, y, x, uniform):
        """Generate one code."""
        rows = torch.cat([window, frame], 1)
        logits = self.model.network(i)(rows, [i], window.shape[1], vectors)[0][:, 0, y, x]
        frame[:, 0, y, x, i] = choose_codes(logits, uniform, **self.choose) + self.model.first_row[i]


class CachedStepper:
    """Keeps what the stacks and the attention of every layer have computed, see LayerState."""

    def __init__(self, model, n_rows, choose):
        self.states = [
            LayerState(model.network(i), i, model.grid, n_rows, choose, model.first_row[i])
            for i in range(len(model.codebook_sizes))
        ]

    def start(self, window, vectors, n_shared):
        """Begin a window with known frames (M, n, h, w, n_codebooks) and what is told of them, (M, n, d) or None, the
        same for ``n_shared`` neighbouring rows."""
        for state in self.states:
            state.start(window[::n_shared], None if vectors is None else vectors[::n_shared])

    def fill_row(self, window, frame, vectors, i, y, uniform):
        """Generate row y of layer i into frame (M, 1, h, w, n_codebooks), which comes after those of ``window``; what
        is told of it is the last of ``vectors``."""
        if y == 0:
            self.states[i].start_frame(window, frame, None if vectors is None else vectors[:, -1:])
        frame[:, 0, y, :, i] = self.states[i].fill_row(frame, y, uniform)


class LayerState:
    """Step-by-step computation of one layer for M rows.

    What a step touches lives in fixed buffers, and where it is in tensors, so that on CUDA it is recorded once as a
    graph and replayed: launching its many small kernels one by one would take longer than running them.
    """

    def __init__(self, network, i, grid, n_rows, choose, first_row):
        self.network, self.i, self.grid, self.choose, self.first_row = network, i, grid, choose, first_row
        dim, dtype, self.device = network.own.embedding_dim, network.own.weight.dtype, network.own.weight.device

        def zeros(*shape, dtype=dtype):
            return torch.zeros(shape, dtype=dtype, device=self.device)

        layers = network.column_stack
        self.caches = [
            [module.new_cache(n_rows, dtype, self.device) for module in modules] for modules in network.attention
        ]
        self.weights = [layer.conv.split_weight() for layer in layers]
        # Of the row being generated: its codes, their random numbers, and the condition of each layer.
        self.row = zeros(n_rows, grid[2], dtype=torch.int64)
        self.uniform = zeros(grid[2], n_rows, dtype=torch.float32)
        self.conditions = zeros(grid[2], len(layers), n_rows, 2 * dim)
        # Of the columns to the left: the embedding of the last code, and the last inputs of each layer.
        self.left = zeros(n_rows, dim)
        self.past_columns = [zeros(n_rows, (layer.conv.taps - 1) * dim) for layer in layers]
        self.column, self.position = (zeros(1, dtype=torch.int64) for _ in range(2))
        self.graph = record_graph(self._step, self.device) if self.device.type == "cuda" else None

    def start(self, window, told=None):
        """Begin with known frames (B, n, h, w, n_codebooks), and what is told of them (B, n, d) or None; each of the B
        stands for M / B neighbouring rows."""
        network, self.time = self.network, window.shape[1]
        self.past_frames = [None] * len(self.weights)
        before = shifted(network.embed_before(window), 0)
        own = network.embed_own(window[..., self.i])
        network.features(network.embed_known(before, window, self.i), own, self.time, self, told)

    def keep_frames(self, index, past):
        """The last inputs of a layer of the frame stack: (B, kernel_frames - 1, h, w, d)."""
        self.past_frames[index] = past.repeat_interleave(len(self.row) // len(past), 0)

    def start_frame(self, window, frame, told=None):
        """The frame stack of the frame that comes after those of ``window`` (M, n, h, w, n_codebooks), of which is told
        (M, 1, d) or nothing."""
        network, self.time = self.network, window.shape[1]
        known = network.embed_known(network.embed_before(window[:, -1:]), frame, self.i, self.time)
        self.known, self.past_rows, self.told = [], [None] * len(self.weights), told
        for index, layer in enumerate(network.frame_stack):
            known, self.past_frames[index] = layer(known, past=self.past_frames[index], told=told)
            self.known.append(known)

    def fill_row(self, frame, y, uniform):
        """Generate the codes of row y: frame (M, 1, h, w, n_codebooks), uniform (w, M) -> rows (M, w)."""
        network = self.network
        if y == 0:
            rows = torch.zeros_like(self.known[0][:, :, :1])
        else:
            rows = network.embed_own(frame[:, :, y - 1 : y, :, self.i])
        for index, layer in enumerate(network.row_stack):
            known = self.known[index][:, :, y : y + 1]
            rows, self.past_rows[index] = layer(rows, known, self.past_rows[index], self.told)
            column_layer = network.column_stack[index]
            condition = torch.cat([known, rows], -1)[:, 0, 0] @ self.weights[index][1]  # (M, w, 2 d)
            self.conditions[:, index] = condition.transpose(0, 1) + column_layer.conv.conv.bias
            if self.told is not None:
                self.conditions[:, index] += column_layer.tell(self.told[:, 0])
            self.past_columns[index].zero_()
        self.left.zero_()
        self.uniform.copy_(uniform)
        start = (self.time * self.grid[1] + y) * self.grid[2]
        for x in range(self.grid[2]):
            self.column.fill_(x)
            self.position.fill_(start + x)
            if self.graph is not None:
                self.graph.replay()
            else:
                self._step(start + x)
        return self.row

    def _step(self, index=None):
        """Generate the code at ``position``, in ``column`` of its row; ``index`` is the position, where known."""
        network, x = self.network, self.left
        conditions = self.conditions.index_select(0, self.column)[0].unbind(0)
        for layer, condition, past, (weight, _), modules, caches in zip(
            network.column_stack, conditions, self.past_columns, self.weights, network.attention, self.caches
        ):
            taps = torch.cat([past, layer.norm(x)], 1)
            past.copy_(taps[:, x.shape[1] :])
            x = x + layer.out(gate(torch.addmm(condition, taps, weight)))
            for module, cache in zip(modules, caches):
                x = module.step(x, cache, self.position, None if index is None else module.span(index))
        uniform = self.uniform.index_select(0, self.column)[0]
        code = choose_codes(network.predict(x, self.i), uniform, **self.choose) + self.first_row
        self.row.index_copy_(1, self.column, code[:, None])
        self.left.copy_(network.embed_own(code))
