"""The Latent Video Transformer: parameter counts, causality, likelihood, and sampling with and without the cache."""

import copy
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from latentcast import VideoTransformer, instantiate, load_config, load_model
from latentcast.config import config_root
from latentcast.layers.adaptive import AdaptiveSoftmax, AdaptiveTable, cluster_bounds
from latentcast.layers.masked_convolutions import CausalConv3d
from latentcast.layers.positions import RelativeBias3D
from latentcast.priors.sampling import draw
from latentcast.priors.video_transformer import CachedStepper, DecoderState, encoder_taps

SUBSCALES = [(4, 1, 1), (1, 2, 2), (2, 2, 2)]
ATTENTION = ["query_key_relative", "key_relative", "relative"]


def spec(sizes=(5, 5), height=4, width=4):
    return {
        "kind": "discrete",
        "channels": 8,
        "height": height,
        "width": width,
        "codebook_sizes": list(sizes),
        "scaling_factor": 1.0,
        "frame_channels": 1,
        "frame_height": 4 * height,
        "frame_width": 4 * width,
    }


def tiny_as_drawn(subscale=(4, 1, 1), sizes=(5, 5), seed=0, **kwargs):
    torch.manual_seed(seed)
    return VideoTransformer(
        spec(sizes), n_frames=4, subscale=subscale, dim=24, embed_dim=12, n_heads=2, head_dim=8, n_layers=2, **kwargs
    )


def tiny(*args, **kwargs):
    model = tiny_as_drawn(*args, **kwargs)
    for parameter in model.parameters():  # biases and tables start at zero, which would hide mistakes
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def random_codes(batch=2, frames=4, sizes=(5, 5), height=4, width=4, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randint(size, (batch, frames, height, width), generator=generator) for size in sizes], -1)


@pytest.mark.parametrize(
    "attention, millions", [("query_key_relative", 49.87), ("key_relative", 41.50), ("relative", 33.09)]
)
def test_parameter_counts_of_table_7(attention, millions):
    model = VideoTransformer(spec([512] * 4, 16, 16), attention=attention)
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, rel=0.03)


def test_published_weights_have_the_published_distributions():
    model = tiny_as_drawn(weight_init="published")
    conv = nn.Conv3d(10, 12, (7, 1, 1))  # the published encoder's, over one-hot codes of two codebooks of 5
    layers = [nn.Linear(24, 24), nn.Linear(24 + 5, 24)]  # U_1 and U_2
    for layer in (conv, *layers):
        nn.init.xavier_uniform_(layer.weight)
    head = model.head
    for ours, theirs in (
        (model.encoder.taps.weight[:-1], conv.weight),
        (head.hidden.weight[:24], layers[0].weight),
        (torch.cat([head.hidden.weight[24:].flatten(), head.previous[0].weight.flatten()]), layers[1].weight),
    ):
        assert ours.numel() == theirs.numel()
        assert ours.abs().max().item() == pytest.approx(theirs.abs().max().item(), rel=0.03)
        assert ours.std().item() == pytest.approx(theirs.std().item(), rel=0.1)
    assert not model.encoder.taps.weight[-1].any() and not head.hidden.bias.any()
    assert model.decoder.embed_codes.weight.std().item() == pytest.approx(1, abs=0.25)
    assert torch.equal(
        tiny_as_drawn().head.logits[0].weight, tiny_as_drawn(weight_init="default").head.logits[0].weight
    )
    assert model(random_codes(), 1).loss.isfinite()


@pytest.mark.parametrize("name", ["lvt_bair", "lvt_kinetics600"])
def test_exactly_the_papers_by_the_overrides_that_the_experiment_names(name):
    """They compose, and both stages train a step with the experiment's own optimisers, at a small width."""
    text = (config_root() / "experiment" / f"{name}.yaml").read_text()
    exact = [
        word for word in text.partition("Exactly as published:")[2].partition("defaults:")[0].split() if "=" in word
    ]
    assert len(exact) == 3
    small = [
        "tokenizer.hidden_channels=8",
        "tokenizer.residual_channels=4",
        "tokenizer.embedding_dim=8",
        "prior.dim=16",
    ]
    small += ["prior.n_layers=1", "prior.n_heads=2", "prior.head_dim=8", "prior.embed_dim=8", "frame_size=16"]
    config = load_config(name, exact + small, tool="train_tokenizer")
    assert (config.tokenizer.codebook_init, config.tokenizer.dead_code_threshold) == ("uniform", 0)
    torch.manual_seed(0)
    tokenizer = instantiate(config.tokenizer).train()
    books = tokenizer.quantizer.codebooks
    assert len(books) == 4 and all(book.initialized and not book.cluster_size.any() for book in books)
    frames = torch.rand(2, 16, 3, 16, 16) * 2 - 1
    step(tokenizer, instantiate(config.optimizer), frames)
    assert all(book.cluster_size.sum() == pytest.approx(0.01 * 2 * 16 * 16) for book in books)
    config = load_config(name, exact + small, tool="train_prior")
    prior = instantiate(config.prior, latent_spec=tokenizer.latent_spec).train()
    assert prior.config.weight_init == "published"
    step(prior, instantiate(config.optimizer), tokenizer.eval().encode(frames).codes, config.n_context)


def step(model, optimizer, *inputs):
    before = copy.deepcopy(list(model.parameters()))
    optimizer = optimizer(model.parameters())
    loss = model(*inputs).loss
    assert loss.isfinite()
    loss.backward()
    optimizer.step()
    assert any(not torch.equal(p, old) for p, old in zip(model.parameters(), before))


def test_encoder_equals_a_masked_strided_convolution_over_one_hot_codes():
    """The published form: zero what is not generated yet, shift the video onto the slice, convolve with a stride."""
    model = tiny((2, 2, 2))
    codes = random_codes()
    kernel = (3, 3, 3)
    assert len(encoder_taps((2, 2, 2), 4)) == math.prod(kernel)
    n_rows = sum(model.codebook_sizes)
    weight = model.encoder.taps.weight[: model.encoder.unseen].view(*kernel, n_rows, -1).permute(4, 3, 0, 1, 2)
    one_hot = torch.cat([F.one_hot(codes[..., k], size) for k, size in enumerate(model.codebook_sizes)], -1).float()
    for index, (a, b, c) in enumerate(itertools.product(range(2), repeat=3)):
        visible = torch.zeros(4, 4, 4)
        for earlier in list(itertools.product(range(2), repeat=3))[:index]:
            visible[earlier[0] :: 2, earlier[1] :: 2, earlier[2] :: 2] = 1
        video = (one_hot * visible[..., None]).movedim(-1, 1)
        expected = F.conv3d(F.pad(video, (1, 1, 1, 1, 1, 1)), weight)[:, :, a::2, b::2, c::2].flatten(2).transpose(1, 2)
        seen = {}
        hook = model.encoder.taps.register_forward_hook(lambda module, args, out, seen=seen: seen.update(out=out))
        model.slice_logits(codes, torch.full((2,), index))
        hook.remove()
        torch.testing.assert_close(seen["out"].view_as(expected), expected, atol=1e-5, rtol=1e-5)


def test_causal_convolution_equals_explicit_zeroing():
    torch.manual_seed(0)
    for mask, grid in itertools.product("AB", [(3, 4, 5), (1, 4, 4)]):
        conv = CausalConv3d(3, 6, (3, 3, 3), mask=mask)
        x = torch.randn(2, 3, *grid)
        weight = conv.weight.clone()
        weight[:, :, 2] = 0
        weight[:, :, 1, 2] = 0
        weight[:, :, 1, 1, 2] = 0
        if mask == "A":
            weight[:, :, 1, 1, 1] = 0
        torch.testing.assert_close(conv(x), F.conv3d(x, weight, conv.bias, padding=1), atol=1e-5, rtol=1e-5)


def test_relative_bias_is_the_sum_of_per_axis_tables():
    bias = RelativeBias3D((2, 3, 2), 2)
    for table in bias.tables:
        torch.nn.init.normal_(table)
    dense = bias()
    positions = list(itertools.product(range(2), range(3), range(2)))
    for (q, a), (k, b) in itertools.product(enumerate(positions), repeat=2):
        expected = sum(table[:, i - j + size - 1] for table, i, j, size in zip(bias.tables, a, b, bias.grid))
        torch.testing.assert_close(dense[:, q, k], expected)


def generation_order(model):
    """Rank of every (t, y, x) of the clip in the order of section 3.2."""
    rank = torch.empty(math.prod(model.grid), dtype=torch.int64)
    rank[model.slice_pixels.flatten()] = torch.arange(rank.numel())
    return rank


@pytest.mark.parametrize("subscale", SUBSCALES)
@pytest.mark.parametrize("attention", ATTENTION)
def test_no_code_sees_itself_or_a_later_one(subscale, attention):
    """By gradient: the logits of every code depend on earlier codes in generation order only, and do depend on them."""
    model = tiny(subscale, attention=attention, context_frames=3)
    codes = random_codes(batch=1)
    rows = torch.nn.functional.one_hot(codes + model.first_row, sum(model.codebook_sizes)).float()
    order = generation_order(model)
    reached = 0
    for index in range(len(model.slice_pixels)):
        soft = rows.flatten(1, 3).requires_grad_()  # (1, P, n_codebooks, rows)
        logits = soft_logits(model, soft, index)
        for position in (0, model.slice_pixels.shape[1] // 2, model.slice_pixels.shape[1] - 1):
            here = order[model.slice_pixels[index, position]]
            for k, logits_k in enumerate(logits):
                (gradient,) = torch.autograd.grad(logits_k[0, position].square().sum(), soft, retain_graph=True)
                depends = gradient.abs().sum((0, 3))  # (P, n_codebooks)
                pixel = model.slice_pixels[index, position]
                assert depends[order > here].max() == 0 if (order > here).any() else True
                assert (depends[pixel, k:] == 0).all()
                if k > 0:
                    assert (depends[pixel, :k] > 0).all()
                reached += int((depends[order < here].sum(-1) > 0).sum())
    assert reached > 0
    if attention != "relative":
        assert (depends[order < here].sum(-1) > 0).all()  # the very last code sees every code before it


def soft_logits(model, soft, index):
    """``slice_logits`` with one-hot codes in place of indices, so that gradients reach them."""
    pixels, neighbours = model.slice_pixels[index], model.neighbours[index]
    padded = torch.cat([soft, torch.zeros_like(soft[:, :1])], 1)
    near = padded[:, neighbours]  # (1, N, taps, n_codebooks, rows)
    tables = model.encoder.taps.weight[: model.encoder.unseen].view(near.shape[2], near.shape[4], -1)
    x = torch.einsum("bntkr,tre->bne", near, tables)
    x = model.encoder.project(x + model.encoder.slice_embedding.weight[index]) + model.encoder.positions
    for block in model.encoder.blocks:
        x = block(x, block.relative())
    own = soft[:, pixels]
    decoder = model.decoder
    grid = (own.sum(2) @ decoder.embed_codes.weight).unflatten(1, decoder.grid).movedim(-1, 1)
    y = decoder.conv(grid).flatten(2).transpose(1, 2) + decoder.positions + decoder.from_memory(x)
    for block, bias in zip(decoder.blocks, decoder.biases()):
        y = block(y, bias)
    features = model.head.features(y)
    logits = []
    for k in range(len(model.codebook_sizes)):
        u = features[k]
        if k > 0:
            table = model.head.previous[k - 1].weight
            u = u + (own[:, :, :k, : len(table)] @ table).sum(2)
        logits.append(model.head.logits[k](u.relu()))
    return logits


@pytest.mark.parametrize("subscale", SUBSCALES)
def test_soft_logits_of_the_causality_test_are_the_models(subscale):
    model = tiny(subscale)
    codes = random_codes(batch=1)
    soft = F.one_hot(codes + model.first_row, sum(model.codebook_sizes)).float().flatten(1, 3)
    for index in range(len(model.slice_pixels)):
        for ours, theirs in zip(soft_logits(model, soft, index), model.slice_logits(codes, torch.tensor([index]))[0]):
            torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("subscale", SUBSCALES)
@pytest.mark.parametrize("attention", ATTENTION)
def test_stepwise_logits_equal_teacher_forcing(subscale, attention):
    """What sampling sees at every position, one step at a time through the cache, is what training saw."""
    model = tiny(subscale, attention=attention)
    codes = random_codes()
    rows = (codes + model.first_row).flatten(1, 3)
    with torch.no_grad():
        for index in range(len(model.slice_pixels)):
            slice_ids = torch.full((2,), index)
            expected, own = model.slice_logits(codes, slice_ids)
            own = own + model.first_row
            memory = model._encode(rows, slice_ids)
            state = DecoderState(model.decoder, 2, memory.dtype, memory.device)
            state.start_slice(memory)
            for position in range(own.shape[1]):
                here = torch.tensor([position])
                y = model.decoder.step(state, here, position + 1)[:, 0]
                for k, logits in enumerate(model.head(y, own[:, position])):
                    torch.testing.assert_close(logits, expected[k][:, position], atol=2e-5, rtol=1e-4)
                state.feed(own[:, position, None], here)


@pytest.mark.parametrize("subscale", SUBSCALES)
@pytest.mark.parametrize("options", [{}, {"temperature": 0.7, "top_k": 3}, {"top_p": 0.8}])
def test_cached_samples_equal_uncached(subscale, options):
    model = tiny(subscale)
    context = random_codes(frames=1)
    samples = [
        model.sample(context, 6, num_samples=3, generator=torch.Generator().manual_seed(5), use_cache=cache, **options)
        for cache in (True, False)
    ]
    assert samples[0].shape == (2, 3, 6, 4, 4, 2)
    assert torch.equal(*samples)
    assert not torch.equal(samples[0][:, 0], samples[0][:, 1])


def test_probabilities_of_all_futures_sum_to_one():
    torch.manual_seed(0)
    model = VideoTransformer(
        spec((2, 3), 1, 2), n_frames=2, subscale=(2, 1, 1), dim=12, embed_dim=6, n_heads=2, head_dim=4, n_layers=1
    ).eval()
    context = random_codes(1, 1, (2, 3), 1, 2)
    futures = [
        torch.tensor(values).view(1, 1, 1, 2, 2) for values in itertools.product(range(2), range(3), range(2), range(3))
    ]
    clips = torch.cat([torch.cat([context, future], 1) for future in futures])
    with torch.no_grad():
        total = model.log_prob(clips, 1).double().exp().sum()
    assert total.item() == pytest.approx(1, abs=1e-5)


def test_sampled_frequencies_follow_log_prob():
    torch.manual_seed(3)
    model = VideoTransformer(
        spec((3,), 1, 1), n_frames=2, subscale=(2, 1, 1), dim=12, embed_dim=6, n_heads=2, head_dim=4, n_layers=1
    ).eval()
    context = torch.tensor([1]).view(1, 1, 1, 1, 1)
    drawn = model.sample(context, 1, num_samples=20000, generator=torch.Generator().manual_seed(0)).flatten()
    clips = torch.tensor([[1, c] for c in range(3)]).view(3, 2, 1, 1, 1)
    with torch.no_grad():
        expected = model.log_prob(clips, 1).exp()
    observed = torch.bincount(drawn, minlength=3) / 20000
    torch.testing.assert_close(observed, expected, atol=0.015, rtol=0)


def test_loss_bits_and_log_prob_agree():
    model = tiny((2, 2, 2))
    clip = random_codes()
    with torch.no_grad():
        output = model(clip, 1)
        nats = model.log_prob(clip, 1)
    n_codes = 3 * 16 * 2
    assert output.loss.item() == pytest.approx(-(nats / n_codes).mean().item(), rel=1e-5)
    torch.testing.assert_close(model.bits_per_code(clip, 1), -nats / n_codes / math.log(2))
    model.train()  # one random slice by default: the loss varies from draw to draw
    losses = {round(model(clip, 1).loss.item(), 4) for _ in range(8)}
    assert len(losses) > 1


@pytest.mark.parametrize("subscale", SUBSCALES)
def test_slices_are_evaluated_together_with_the_same_numbers(subscale, monkeypatch):
    model, codes = tiny(subscale), random_codes(batch=3)
    calls = []
    model.decoder.register_forward_hook(lambda module, arguments, output: calls.append(len(output)))
    found = model.log_prob(codes, 1)
    n_slices = len(model._predicted_slices(1))
    assert calls == [3 * n_slices]
    n = model.slice_pixels.shape[1]
    for positions in (1, 3 * n, 2 * 3 * n):  # one by one, and in twos
        monkeypatch.setattr("latentcast.priors.video_transformer.POSITIONS_AT_ONCE", positions)
        calls.clear()
        torch.testing.assert_close(model.log_prob(codes, 1), found)
        assert sum(calls) == 3 * n_slices and max(calls) == (6 if positions > 3 * n else 3)
    torch.testing.assert_close(torch.cat([model.log_prob(codes[i : i + 1], 1) for i in range(3)]), found)


def test_training_on_all_slices_equals_the_likelihood():
    model = tiny((4, 1, 1), slices_per_clip=None).train()
    clip = random_codes()
    assert model(clip, 2).loss.item() == pytest.approx(model.eval()(clip, 2).loss.item(), rel=1e-5)


def test_published_kernel_sees_three_frames_and_context_frames_widens_it():
    clip = random_codes(1, 6, (5,))
    other = clip.clone()
    other[:, 0] = (other[:, 0] + 1) % 5
    for context_frames, sees_first in ((None, False), (5, True)):
        torch.manual_seed(0)
        model = VideoTransformer(
            spec((5,)),
            n_frames=6,
            subscale=(6, 1, 1),
            dim=24,
            embed_dim=12,
            n_heads=2,
            head_dim=8,
            n_layers=1,
            context_frames=context_frames,
        ).eval()
        last = torch.tensor([5])
        same = torch.equal(model.slice_logits(clip, last)[0][0], model.slice_logits(other, last)[0][0])
        assert same is not sees_first


@pytest.mark.parametrize("subscale", SUBSCALES)
def test_sliding_past_the_trained_length(subscale):
    model = tiny(subscale)
    generator = torch.Generator().manual_seed(0)
    for n_context, n_frames in ((1, 9), (3, 2), (4, 3), (7, 5)):
        future = model.sample(random_codes(1, n_context), n_frames, generator=generator)
        assert future.shape == (1, 1, n_frames, 4, 4, 2)
        assert future.min() >= 0 and future.max() < 5


def test_draw_matches_brute_force():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(6, generator=generator)
    uniform = torch.rand(40000, generator=generator)

    def frequencies(**options):
        return torch.bincount(draw(logits.expand(40000, 6), uniform, **options), minlength=6) / 40000

    probabilities = logits.softmax(-1)
    torch.testing.assert_close(frequencies(), probabilities, atol=0.01, rtol=0)
    torch.testing.assert_close(frequencies(temperature=0.5), (logits / 0.5).softmax(-1), atol=0.01, rtol=0)
    assert frequencies(temperature=0).argmax() == logits.argmax() and frequencies(temperature=0).max() == 1
    top2 = probabilities.topk(2).indices
    kept = torch.zeros(6).scatter(0, top2, probabilities[top2])
    torch.testing.assert_close(frequencies(top_k=2), kept / kept.sum(), atol=0.01, rtol=0)
    order = probabilities.argsort(descending=True)
    enough = int((probabilities[order].cumsum(0) < 0.7).sum()) + 1
    kept = torch.zeros(6).scatter(0, order[:enough], probabilities[order[:enough]])
    torch.testing.assert_close(frequencies(top_p=0.7), kept / kept.sum(), atol=0.01, rtol=0)


def test_bad_input_is_named():
    model = tiny()
    codes = random_codes()
    cases = [
        (lambda: model(codes, 4), "n_context: expected fewer than the clip's 4 frames, found 4"),
        (lambda: model(codes[:, :3], 1), "expected 4 frames"),
        (lambda: model(codes + 3, 1), r"clip: expected values in \[0, 5\)"),
        (lambda: model.sample(codes[..., :1], 2), "context: expected shape"),
        (lambda: model.sample(codes[:, :0], 2), "n_context: expected at least 1, found 0"),
        (lambda: model.sample(codes, 0), "n_frames: expected a whole number of at least 1"),
        (lambda: model.sample(codes, 1, temperature=-1), "temperature"),
        (lambda: model.sample(codes, 1, top_p=1.5), "top_p"),
        (lambda: model.sample(codes, 1, top_k=0), "top_k"),
        (lambda: tiny(slices_per_clip=0), "slices_per_clip: expected a whole number of at least 1, found 0"),
        (lambda: tiny(context_frames=1.5), "context_frames: expected a whole number of at least 1, found 1.5"),
        (lambda: VideoTransformer(spec((5, 5)), n_layers=0), "n_layers: expected a whole number of at least 1"),
        (lambda: tiny(subscale=(3, 1, 1)), "subscale: expected three divisors"),
        (lambda: tiny(attention="dot"), "attention: expected one of"),
    ]
    for call, message in cases:
        with pytest.raises(ValueError, match=message) as caught:
            call()
        assert "\n" not in str(caught.value)


@pytest.mark.gpu
@pytest.mark.parametrize("subscale", SUBSCALES)
def test_cuda_graph_samples_equal_uncached(subscale):
    model = tiny(subscale).double().cuda()  # convolutions in fp32 may be TF32, matrix products are not
    context = random_codes(frames=1).cuda()
    samples = [
        model.sample(context, 6, num_samples=3, generator=torch.Generator("cuda").manual_seed(5), use_cache=cache)
        for cache in (True, False)
    ]
    assert torch.equal(*samples)


@pytest.mark.gpu(2)
def test_cuda_graphs_are_recorded_on_the_models_device():
    context, found = random_codes(frames=1), []
    for device in ("cuda:0", "cuda:1"):
        model = tiny().double().to(device)
        found.append(model.sample(context.to(device), 6, generator=torch.Generator().manual_seed(5)).cpu())
    assert torch.equal(*found)


@pytest.mark.parametrize("subscale, kernel", [((4, 1, 1), (1, 3, 3)), ((1, 2, 4), (3, 3, 1)), ((2, 2, 2), (3, 3, 3))])
def test_the_taps_that_a_fitted_kernel_lacks_see_no_code(subscale, kernel):
    full, fitted = tiny(subscale), tiny(subscale, fit_kernel=True)
    assert fitted.decoder.conv.kernel_size == kernel
    weights = full.state_dict()
    centre = [slice(1, 2) if size == 1 else slice(None) for size in kernel]
    weights["decoder.conv.weight"] = weights["decoder.conv.weight"][(..., *centre)]
    fitted.load_state_dict(weights)
    clip = random_codes()
    torch.testing.assert_close(full.bits_per_code(clip, 1), fitted.bits_per_code(clip, 1))
    sampled = [model.sample(clip[:, :1], 3, generator=torch.Generator().manual_seed(0)) for model in (full, fitted)]
    assert torch.equal(*sampled)


def test_encoder_positions_and_relative_scale_change_what_they_name():
    clip = random_codes()
    plain = tiny().bits_per_code(clip, 1)
    assert not torch.allclose(plain, tiny(encoder_positions=True).bits_per_code(clip, 1))
    scaled = tiny(relative_scale=2.0)
    assert not torch.allclose(plain, scaled.bits_per_code(clip, 1))
    with torch.no_grad():  # halving the tables undoes the scale
        for name, parameter in scaled.named_parameters():
            if "relative.tables" in name:
                parameter /= 2
    torch.testing.assert_close(plain, scaled.bits_per_code(clip, 1))


def test_a_step_needs_no_host_synchronisation():
    """What a CUDA graph may record: no value may travel to the host. Fake tensors raise on any that would."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    model = tiny((2, 2, 2))
    stepper = CachedStepper(model, 3, {"temperature": 0.9, "top_k": 3, "top_p": 0.9})
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        stepper._step(8)


# Appendix A: adaptive input and softmax -------------------------------------------------------------------------------

TABLE_8 = [  # (decoder_input, decoder_output, tied), row by row
    ("embedding", "softmax", "none"),
    ("embedding", "softmax", "embeddings"),
    ("adaptive", "softmax", "none"),
    ("embedding", "adaptive", "none"),
    ("adaptive", "adaptive", "none"),
    ("adaptive", "adaptive", "embeddings"),
    ("adaptive", "adaptive", "projections"),
]


def form(row):
    return dict(zip(("decoder_input", "decoder_output", "tied"), row))


@pytest.mark.parametrize("row", TABLE_8)
def test_parameter_counts_of_table_8(row):
    """With one codebook the published model has 45.2M; what the forms save or add is below 1 % of it."""
    model = VideoTransformer(spec([512], 16, 16), n_layers=1, **form(row))
    of_blocks = sum(p.numel() for name, p in model.named_parameters() if ".blocks." in name)
    rest = sum(p.numel() for p in model.parameters()) - of_blocks
    assert (8 * of_blocks + rest) / 1e6 == pytest.approx(45.2, rel=0.03)


def test_adaptive_softmax_is_torchs():
    torch.manual_seed(0)
    theirs = nn.AdaptiveLogSoftmaxWithLoss(24, 11, cutoffs=[3, 7], div_value=4.0)
    ours = AdaptiveSoftmax(24, cluster_bounds(11, [3, 7]))
    with torch.no_grad():
        ours.head.weight.copy_(theirs.head.weight)
        for mine, tail in zip(ours.tails, theirs.tail):
            assert [layer.weight.shape for layer in mine] == [layer.weight.shape for layer in tail]
            mine.load_state_dict(tail.state_dict())
    x = torch.randn(50, 24)
    torch.testing.assert_close(ours(x), theirs.log_prob(x))
    ours.rank.copy_(torch.randperm(11))  # code c has the probability of the rank[c]-th in order
    torch.testing.assert_close(ours(x), theirs.log_prob(x)[:, ours.rank])
    torch.testing.assert_close(ours(x).exp().sum(-1), torch.ones(50))


def test_an_adaptive_table_projects_its_clusters():
    torch.manual_seed(0)
    table = AdaptiveTable([0, 3, 7, 11], 32)
    assert [tuple(e.weight.shape) for e in table.embeddings] == [(3, 32), (4, 8), (4, 2)]
    table.rank.copy_(torch.randperm(11))
    found = table()
    for code, place in enumerate(table.rank.tolist()):
        cluster, row = (0, place) if place < 3 else (1, place - 3) if place < 7 else (2, place - 7)
        expected = table.projections[cluster].weight @ table.embeddings[cluster].weight[row]
        torch.testing.assert_close(found[code], expected)
    plain = AdaptiveTable(cluster_bounds(4000), 128)().std().item()
    assert plain == pytest.approx(1, abs=0.1)  # at the start, vectors as large as those of an embedding


@pytest.mark.parametrize("tied", ["embeddings", "projections"])
def test_tied_adaptive_softmax_by_hand(tied):
    model = tiny(sizes=(9, 6), cutoffs=[2, 4], **form(("adaptive", "adaptive", tied)))
    u = torch.randn(3, 24)
    for table, output in zip(model.decoder.embed_codes, model.head.logits):
        place = torch.randperm(len(table.rank))
        table.rank.copy_(place), output.rank.copy_(place)
        logits = []
        for i, (e, p) in enumerate(zip(table.embeddings, table.projections)):
            h = output.reduce[0](u) @ p.weight if tied == "projections" else output.reduce[i](u)
            logits.append(h @ e.weight.T / e.embedding_dim**0.5)
        head = torch.cat([logits[0], output.clusters(u)], -1).softmax(-1)
        parts = [head[:, :2], *(head[:, 2 + i, None] * tail.softmax(-1) for i, tail in enumerate(logits[1:]))]
        torch.testing.assert_close(output(u).exp(), torch.cat(parts, -1)[:, place])


@pytest.mark.parametrize("row", TABLE_8[1:])
def test_every_form_samples_with_and_without_cache_alike(row):
    model = tiny((4, 1, 1), cutoffs=[2] if "adaptive" in row else None, **form(row))
    model.prepare([random_codes()])
    futures = [
        model.sample(
            random_codes(1, 3), 1, num_samples=2, generator=torch.Generator().manual_seed(0), use_cache=use_cache
        )
        for use_cache in (True, False)
    ]
    assert torch.equal(*futures) and futures[0].min() >= 0 and futures[0].max() < 5


@pytest.mark.parametrize("row", TABLE_8[1:])
def test_the_likelihood_of_every_form_is_exact_and_what_it_samples_follows_it(row):
    torch.manual_seed(0)
    sizes = {"dim": 16, "embed_dim": 8, "n_heads": 2, "head_dim": 8, "n_layers": 1, "n_frames": 2}
    cutoffs = [1] if "adaptive" in row else None
    model = VideoTransformer(spec([3], 1, 2), subscale=(2, 1, 1), cutoffs=cutoffs, **sizes, **form(row)).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5)
    context = torch.tensor([0, 2]).view(1, 1, 1, 2, 1)
    model.prepare([torch.tensor([2, 2, 2, 1, 1, 0]).view(1, 1, 1, 6, 1)])
    if row[1] == "adaptive":
        assert model.head.logits[0].rank.tolist() == [2, 1, 0]
    futures = torch.cartesian_prod(torch.arange(3), torch.arange(3)).view(9, 1, 1, 2, 1)
    with torch.no_grad():
        clips = torch.cat([context.expand(9, -1, -1, -1, -1), futures], 1)
        probabilities = model.log_prob(clips, 1).exp()
        drawn = model.sample(context, 1, num_samples=3000, generator=torch.Generator().manual_seed(0))[0, :, 0, 0]
    assert probabilities.sum().item() == pytest.approx(1, abs=1e-5)
    frequencies = torch.bincount(drawn[:, 0, 0] * 3 + drawn[:, 1, 0], minlength=9) / 3000
    torch.testing.assert_close(frequencies, probabilities, atol=0.04, rtol=0)


def test_forms_are_saved_once_and_train_every_part(tmp_path):
    model = tiny_as_drawn(**form(("adaptive", "adaptive", "projections")))
    codes = random_codes()
    model.prepare([codes])
    assert model.decoder.embed_codes[0].rank.tolist() != list(range(5))
    model.save_pretrained(tmp_path)
    assert torch.equal(load_model(tmp_path).log_prob(codes, 1), model.eval().log_prob(codes, 1))
    model.train()(codes, 1).loss.backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize(
    "options, message",
    [
        ({"tied": "embeddings", "decoder_input": "adaptive"}, "tied: expected none, embeddings .* found embeddings"),
        ({"tied": "projections"}, "tied: expected none"),
        ({"tied": True}, "tied: expected one of none, embeddings, projections, found True"),
        ({"cutoffs": [2]}, r"cutoffs: expected None without an adaptive input or output, found \[2\]"),
        ({"cutoffs": [5], "decoder_output": "adaptive"}, "cutoffs: expected increasing whole numbers from 1 to 4"),
        ({"cutoffs": [3, 2], "decoder_input": "adaptive"}, "cutoffs: expected increasing whole numbers"),
        ({"decoder_input": "sparse"}, "decoder_input: expected one of embedding, adaptive, found 'sparse'"),
    ],
)
def test_forms_that_cannot_be(options, message):
    with pytest.raises(ValueError, match=message):
        tiny(**options)
