"""ST-PixelCNN: its layers, causality, likelihood, sampling with and without caches, and the swaps by config."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from tiny import TINY_TOKENIZERS, random_frames, tiny_tokenizer

from latentcast import STPixelCNN, VideoPredictionPipeline, instantiate, load_config
from latentcast.config import config_root
from latentcast.layers.causal_attention import CausalWindowAttention
from latentcast.layers.masked_convolutions import AxisCausalConv3d, shifted
from latentcast.layers.positions import rotate, rotation_table
from latentcast.priors.sampling import sliding_windows
from latentcast.priors.st_pixelcnn import CachedLevel

LAYERS = ["separate", "shared"]
ATTENTION = ["full", "factorised", "windowed", "none"]
FORMS = list(itertools.product(LAYERS, ATTENTION))


def spec(sizes=(3, 4), height=4, width=4):
    return {
        "kind": "discrete",
        "channels": 8,
        "height": height,
        "width": width,
        "codebook_sizes": list(sizes),
        "scaling_factor": 1.0,
    }


def tiny(latent_spec=None, seed=0, **options):
    """A small model in double precision, with weights that hide nothing."""
    torch.manual_seed(seed)
    small = {"n_frames": 4, "dim": 12, "n_blocks": 2, "block_layers": 2, "window": 2, "n_heads": 2, "head_dim": 6}
    model = STPixelCNN(latent_spec or spec(), **small | options)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.eval().double()


def random_codes(batch=2, frames=4, sizes=(3, 4), height=4, width=4, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randint(size, (batch, frames, height, width), generator=generator) for size in sizes], -1)


# Layers ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_axis_causal_convolution_equals_a_padded_3d_convolution(axis):
    torch.manual_seed(0)
    conv = AxisCausalConv3d(3, 5, axis, taps=2, width=3, condition_channels=2)
    x, condition = torch.randn(2, 4, 5, 6, 3), torch.randn(2, 4, 5, 6, 2)
    found, past = conv(x, condition)
    kernel = conv.conv.weight  # (5, 2 * 3 + 2, kh, kw)
    weight = torch.zeros(5, 5, 3, 3, 3)  # of x and the condition together, centred
    centre, at = [1, 1, 1], [slice(1, 2)] * 3
    for later in range(axis + 1, 3):
        at[later] = slice(0, 3)
    for tap in range(2):
        centre[axis] = tap  # tap 1 is this position
        at[axis] = slice(tap, tap + 1)
        weight[(slice(None), slice(0, 3), *at)] = (
            kernel[:, 3 * tap : 3 * tap + 3].unsqueeze(2).view(weight[(slice(None), slice(0, 3), *at)].shape)
        )
    at[axis] = slice(1, 2)
    weight[(slice(None), slice(3, 5), *at)] = kernel[:, 6:].view(weight[(slice(None), slice(3, 5), *at)].shape)
    expected = F.conv3d(torch.cat([x, condition], -1).movedim(-1, 1), weight, conv.conv.bias, padding=1).movedim(1, -1)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(past, x.narrow(1 + axis, x.shape[1 + axis] - 1, 1))


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_axis_causal_convolution_goes_on_where_it_stopped(axis):
    torch.manual_seed(0)
    conv = AxisCausalConv3d(3, 5, axis, taps=3, width=3)
    x = torch.randn(2, 5, 5, 5, 3)
    pieces, past = [], None
    for piece in x.split([1, 1, 3], 1 + axis):
        y, past = conv(piece, past=past)
        pieces.append(y)
    torch.testing.assert_close(torch.cat(pieces, 1 + axis), conv(x)[0], atol=1e-5, rtol=1e-5)


def test_shifted_moves_on_by_one():
    x = torch.arange(1.0, 28).view(1, 3, 3, 3, 1)
    for axis in range(3):
        moved = shifted(x, axis).select(1 + axis, 0), shifted(x, axis).narrow(1 + axis, 1, 2)
        assert (moved[0] == 0).all() and torch.equal(moved[1], x.narrow(1 + axis, 0, 2))


def test_rotation_is_that_of_complex_numbers_and_depends_on_distance_alone():
    grid, e = (3, 4, 5), 12
    table = rotation_table(grid, e).double()
    torch.manual_seed(0)
    x, y = torch.randn(2, e).double()
    coordinates = list(itertools.product(*(range(size) for size in grid)))
    frequencies = [1.0, 1.0, 1.0, 0.01, 0.01, 0.01]
    for index, place in enumerate(coordinates):
        angle = torch.tensor([place[j % 3] * frequencies[j] for j in range(e // 2)], dtype=torch.float64)
        turned = torch.complex(x[: e // 2], x[e // 2 :]) * torch.polar(torch.ones_like(angle), angle)
        torch.testing.assert_close(rotate(x, *table[index]), torch.cat([turned.real, turned.imag]), atol=1e-6, rtol=0)
    products = {}
    for (i, a), (j, b) in itertools.product(enumerate(coordinates), repeat=2):
        product = rotate(x, *table[i]) @ rotate(y, *table[j])
        distance = tuple(q - k for q, k in zip(a, b))
        torch.testing.assert_close(products.setdefault(distance, product), product, atol=1e-5, rtol=0)


@pytest.mark.parametrize("window, over_time", [((4, 6), True), ((4, 6), False), ((1, 1), True), ((2, 3), True)])
def test_window_attention_equals_a_loop_over_queries(window, over_time):
    torch.manual_seed(0)
    grid, dim, heads, e = (3, 4, 6), 10, 2, 6
    attention = CausalWindowAttention(dim, heads, e, grid, window, over_time).double()
    x = torch.randn(2, *grid, dim).double()
    qkv = attention.to_qkv(attention.norm(x)).view(2, -1, heads, 3, e)
    table = rotation_table(grid, e).double()
    places = list(itertools.product(*(range(size) for size in grid)))
    expected = torch.zeros(2, len(places), heads, e).double()
    for i, (t, y, column) in enumerate(places):
        seen = [
            j
            for j, (s, v, u) in enumerate(places[: i + 1])
            if (over_time or s == t) and (v // window[0], u // window[1]) == (y // window[0], column // window[1])
        ]
        query = rotate(qkv[:, i, :, 0], *table[i])
        keys = torch.stack([rotate(qkv[:, j, :, 1], *table[j]) for j in seen], 1)  # (2, seen, heads, e)
        weights = (torch.einsum("bme,bsme->bsm", query, keys) * e**-0.5).softmax(1)
        expected[:, i] = torch.einsum("bsm,bsme->bme", weights, qkv[:, seen, :, 2])
    expected = x + attention.to_out(expected.flatten(2)).view_as(x)
    torch.testing.assert_close(attention(x), expected)
    # Step by step, with and without knowing on the host where it is.
    for known in (True, False):
        cache = attention.new_cache(2, torch.float64, "cpu")
        steps = [
            attention.step(part, cache, torch.tensor([i]), attention.span(i) if known else None)
            for i, part in enumerate(x.flatten(1, 3).unbind(1))
        ]
        torch.testing.assert_close(torch.stack(steps, 1).view_as(x), expected)
    # Two frames at once into the cache of four rows, then the third frame step by step for each.
    cache = attention.new_cache(4, torch.float64, "cpu")
    attention(x[:, :2], cache)
    for i in range(48, 72):
        row = x.flatten(1, 3)[:, i].repeat_interleave(2, 0)
        found = attention.step(row, cache, torch.tensor([i]), attention.span(i))
        torch.testing.assert_close(found, expected.flatten(1, 3)[:, i].repeat_interleave(2, 0))


# Causality ------------------------------------------------------------------------------------------------------------


def dependence(model, codes, i):
    """Which codes the logits of layer i depend on, by gradient.

    Returns a function (t, y, x) -> bool (T, h, w, n): whether the logits there depend on each code. Gradients are taken
    at the embeddings of the codes, wherever the network looks them up.
    """
    network, looked_up = model.network(i), {}
    tables = {"previous": network.previous, "above": network.above, "own": network.own}
    hooks = [
        table.register_forward_hook(lambda module, args, out, name=name: looked_up.update({name: out}))
        for name, table in tables.items()
        if table is not None
    ]
    logits = network(codes + model.first_row, [i])[0]
    for hook in hooks:
        hook.remove()

    def at(t, y, x):
        gradients = torch.autograd.grad(
            logits[0, t, y, x].square().sum(), list(looked_up.values()), retain_graph=True, allow_unused=True
        )
        depends = torch.zeros(codes.shape[1:], dtype=torch.bool)
        for name, gradient in zip(looked_up, gradients):
            if gradient is not None:
                used = gradient[0].abs().amax(-1) > 0
                layers = {"previous": slice(None), "above": slice(0, i), "own": slice(i, i + 1)}[name]
                depends[..., layers] |= used if name != "own" else used[..., None]
        return depends

    return at


@pytest.mark.parametrize("layers, attention", FORMS)
def test_a_code_depends_on_every_earlier_one_and_on_no_other(layers, attention):
    """Exact, for every position and layer: earlier frames, layers above, and raster order within the layer."""
    model = tiny(spec((3, 2, 4), 4, 4), n_frames=3, layers=layers, attention=attention)
    codes = random_codes(1, 3, (3, 2, 4))
    t, y, x = torch.meshgrid(torch.arange(3), torch.arange(4), torch.arange(4), indexing="ij")
    layer = torch.arange(3).view(1, 1, 1, 3)
    order = ((t[..., None] * 3 + layer) * 4 + y[..., None]) * 4 + x[..., None]  # (T, h, w, n): when each code comes
    for i in range(3):
        at = dependence(model, codes, i)
        for place in itertools.product(range(3), range(4), range(4)):
            if sum(place) % 2 == 0 or place[0] == 2:
                assert torch.equal(at(*place), order < order[(*place, i)]), (i, place)


def test_receptive_field_of_a_single_layer_has_no_hole():
    """k = 3, two frames: what one layer of each stack sees, counted by hand."""
    model = tiny(spec((3, 2), 7, 7), n_frames=4, n_blocks=1, block_layers=1, attention="none")
    codes = random_codes(1, 4, (3, 2), 7, 7)
    t, y, x = (grid[..., None] for grid in torch.meshgrid(*map(torch.arange, (4, 7, 7)), indexing="ij"))
    layer = torch.arange(2).view(1, 1, 1, 2)
    for place in ((3, 3, 3), (3, 6, 0), (2, 0, 6), (3, 4, 5)):
        dt, dy, dx = (here - axis for here, axis in zip(place, (t, y, x)))
        # The frame stack sees 3 x 3 places, and the row stack that sees it three of its columns.
        near = (dy.abs() <= 1) & (dx.abs() <= 2)
        expected = ((dt == 1) | (dt == 2)) & near & (layer >= 0)
        expected = expected | ((dt == 0) | (dt == 1)) & near & (layer == 0)
        own = ((dy == 1) | (dy == 2)) & (dx.abs() <= 1) | (dy == 0) & ((dx == 1) | (dx == 2))
        expected = expected | (dt == 0) & own & (layer == 1)
        assert torch.equal(dependence(model, codes, 1)(*place), expected), place


@pytest.mark.parametrize("layers", LAYERS)
def test_separate_layers_share_nothing_and_shared_ones_all(layers):
    model = tiny(layers=layers)
    logits = model(random_codes(), 1).logits
    logits[0].sum().backward()
    touched = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    if layers == "separate":
        assert touched and all(name.startswith("networks.0.") for name in touched)
    else:
        assert len(model.networks) == 1 and "networks.0.frame_stack.0.conv.conv.weight" in touched


# Likelihood -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layers, attention", [("separate", "full"), ("shared", "factorised"), ("shared", "windowed")])
def test_probabilities_of_all_futures_sum_to_one(layers, attention):
    model = tiny(spec((2, 3), 1, 2), n_frames=3, layers=layers, attention=attention, window=1)
    context = random_codes(1, 1, (2, 3), 1, 2)
    frames = [torch.tensor(codes).view(1, 1, 1, 2, 2) for codes in itertools.product(range(2), range(3), repeat=2)]
    clips = torch.cat([torch.cat([context, *future], 1) for future in itertools.product(frames, repeat=2)])
    assert len(clips) == (2 * 3) ** 4
    with torch.no_grad():
        assert model.log_prob(clips, 1).double().exp().sum().item() == pytest.approx(1, abs=1e-5)
        # Also layer by layer: for each future of the first layer, those of the second sum to one.
        second = model.level_log_prob(clips, 1)[:, 1].double().exp()
    first = clips[:, 1:, ..., 0].flatten(1)
    for future in first.unique(dim=0):
        assert second[(first == future).all(1)].sum().item() == pytest.approx(1, abs=1e-5)


def test_loss_bits_logits_and_log_prob_agree():
    model, clip = tiny(), random_codes()
    output = model(clip, 2)
    assert [tuple(layer.shape) for layer in output.logits] == [(2, 2, 4, 4, 3), (2, 2, 4, 4, 4)]
    assert all(layer.requires_grad for layer in output.logits)
    by_hand = torch.stack(
        [
            layer.log_softmax(-1).gather(-1, clip[:, 2:, ..., i, None]).flatten(1).sum(1)
            for i, layer in enumerate(output.logits)
        ],
        1,
    )
    torch.testing.assert_close(model.level_log_prob(clip, 2).double(), by_hand, atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(model.log_prob(clip, 2).double(), by_hand.sum(1), atol=1e-4, rtol=1e-5)
    assert output.loss.item() == pytest.approx(-by_hand.sum().item() / (2 * 32 * 2), rel=1e-5)
    bits = -by_hand / 32 / math.log(2)
    torch.testing.assert_close(model.level_bits_per_code(clip, 2).double(), bits, atol=1e-5, rtol=1e-5)
    logged = [output.logs[name].item() for name in ("bits_per_code", "bits_per_code_1", "bits_per_code_2")]
    assert logged == pytest.approx([bits.mean().item(), *bits.mean(0).tolist()], rel=1e-5)
    assert list(tiny(spec([5]))(random_codes(sizes=[5]), 1).logs) == ["bits_per_code"]


def test_frames_that_come_later_change_nothing():
    """So a clip shorter than ``n_frames`` is predicted as the beginning of a long one."""
    clip = random_codes()
    for attention in ATTENTION:
        model = tiny(attention=attention)
        long, short = model(clip, 1).logits, model(clip[:, :3], 1).logits
        for a, b in zip(long, short):
            torch.testing.assert_close(a[:, :2], b)


# Sampling -------------------------------------------------------------------------------------------------------------


def stepwise_logits(model, context, n_frames, **options):
    """Samples, and the logits that every code was drawn from: list over layers of (M, n_frames, h, w, size)."""
    seen = [[] for _ in model.codebook_sizes]
    hooks = [
        network.logits[number].register_forward_hook(lambda module, args, out, i=i: seen[i].append(out))
        for network in model.networks
        for number, i in enumerate(network.levels)
    ]
    future = model.sample(context, n_frames, generator=torch.Generator().manual_seed(0), **options)
    for hook in hooks:
        hook.remove()
    grid = (n_frames, *context.shape[2:4])
    return future, [torch.stack(logits, 1).unflatten(1, grid) for logits in seen]


@pytest.mark.parametrize("layers, attention", FORMS)
def test_stepwise_logits_equal_teacher_forcing(layers, attention):
    options = {"layers": layers, "attention": attention, "kernel_frames": 3, "kernel_size": 5}
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 1e-5)):
        model = tiny(n_frames=5, **options).to(dtype)
        context = random_codes(frames=2)
        future, found = stepwise_logits(model, context, 3, num_samples=2)
        clip = torch.cat([context.repeat_interleave(2, 0), future.flatten(0, 1)], 1)
        with torch.no_grad():
            expected = model(clip, 2).logits
        for a, b in zip(found, expected):
            torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)


def cached_and_uncached(model, context, n_frames, **options):
    return [
        model.sample(
            context, n_frames, num_samples=2, generator=torch.Generator().manual_seed(5), use_cache=use, **options
        )
        for use in (True, False)
    ]


@pytest.mark.parametrize("layers, attention", FORMS)
def test_cached_samples_equal_uncached_past_the_trained_length(layers, attention):
    model = tiny(spec((3, 4), 2, 2), layers=layers, attention=attention)
    context = random_codes(frames=1, height=2, width=2)
    cached, uncached = cached_and_uncached(model, context, 5, overlap=3)
    assert cached.shape == (2, 2, 5, 2, 2, 2)
    assert torch.equal(cached, uncached)
    assert not torch.equal(cached[:, 0], cached[:, 1])
    assert 0 <= cached.min() and cached[..., 0].max() < 3 and cached[..., 1].max() < 4


@pytest.mark.parametrize("layers, attention", FORMS)
def test_what_is_told_is_the_same_with_and_without_caches(layers, attention):
    """Past the trained length, too, and with guidance, where each row is there twice."""
    action = {"action": {"shape": [], "dtype": "int64", "per": "frame", "n_values": 5}}
    model = tiny(spec((3, 4), 2, 2), layers=layers, attention=attention, conditions=action)
    context, told = random_codes(frames=2, height=2, width=2), {"action": torch.arange(10).view(2, 5) % 5}
    options = {"conditions": told, "guidance_scale": 2.5, "overlap": 3}
    assert torch.equal(*cached_and_uncached(model, context, 3, **options))
    future, found = stepwise_logits(
        model, context, 2, num_samples=2, conditions=told | {"action": told["action"][:, :4]}
    )
    clip = torch.cat([context.repeat_interleave(2, 0), future.flatten(0, 1)], 1)
    with torch.no_grad():
        expected = model(clip, 2, {"action": told["action"][:, :4].repeat_interleave(2, 0)}).logits
        untold = model(clip, 2).logits
    for a, b, c in zip(found, expected, untold):
        torch.testing.assert_close(a, b)
        assert not torch.allclose(a, c, atol=1e-2)


@pytest.mark.parametrize("options", [{"temperature": 0.7, "top_k": 2}, {"top_p": 0.8}, {"temperature": 0}])
def test_cached_samples_equal_uncached_under_every_option(options):
    model = tiny(spec((3, 4), 2, 2), n_frames=3)
    cached, uncached = cached_and_uncached(model, random_codes(frames=1, height=2, width=2), 2, **options)
    assert torch.equal(cached, uncached)
    plain, _ = cached_and_uncached(model, random_codes(frames=1, height=2, width=2), 2)
    assert not torch.equal(cached, plain)


def test_sampled_frequencies_follow_log_prob():
    model = tiny(spec((2, 2), 1, 1), n_frames=2)
    context = torch.tensor([1, 0]).view(1, 1, 1, 1, 2)
    drawn = model.sample(context, 1, num_samples=20000, generator=torch.Generator().manual_seed(0)).view(-1, 2)
    futures = torch.tensor(list(itertools.product(range(2), repeat=2)))
    clips = torch.cat([context.expand(4, -1, -1, -1, -1), futures.view(4, 1, 1, 1, 2)], 1)
    with torch.no_grad():
        expected = model.log_prob(clips, 1).exp()
    observed = torch.bincount(drawn @ torch.tensor([2, 1]), minlength=4) / 20000
    torch.testing.assert_close(observed, expected.float(), atol=0.015, rtol=0)


def test_the_sliding_window():
    assert sliding_windows(2, 3, 5, 2) == [(2, 3)]
    assert sliding_windows(2, 8, 5, 4) == [(2, 3), (4, 1), (4, 1), (4, 1), (4, 1), (4, 1)]
    assert sliding_windows(7, 5, 5, 2) == [(2, 3), (2, 2)]
    assert sliding_windows(4, 2, 5, 3) == [(4, 1), (3, 1)]
    # What lies before the window is forgotten, what lies in it is not.
    model = tiny()
    long = random_codes(1, 6)
    changed, forgotten = long.clone(), long.clone()
    forgotten[:, :3] = 0
    changed[:, 4] = (changed[:, 4] + 1) % 3
    first, second, third = (stepwise_logits(model, codes, 1, overlap=3)[1][0] for codes in (long, forgotten, changed))
    assert torch.equal(first, second) and not torch.allclose(first, third)


def test_a_step_needs_no_host_synchronisation():
    """What a CUDA graph may record: no value may travel to the host. Fake tensors raise on any that would."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    choose = {"temperature": 0.9, "top_k": 3, "top_p": 0.9}
    for attention in ATTENTION:
        model = tiny(attention=attention)
        for guidance_scale in (1.0, 2.0):
            options = choose | {"guidance_scale": guidance_scale}
            level = CachedLevel(model, 1, 4, options)
            with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
                level._step()


@pytest.mark.gpu
@pytest.mark.parametrize("layers, attention", FORMS)
def test_cuda_graph_samples_equal_uncached(layers, attention):
    model = tiny(layers=layers, attention=attention).cuda()
    samples = [
        model.sample(
            random_codes(frames=1).cuda(),
            5,
            num_samples=2,
            generator=torch.Generator().manual_seed(5),
            use_cache=use,
        )
        for use in (True, False)
    ]
    assert torch.equal(*samples)


def test_sampling_under_autocast():
    model = tiny(attention="full").float()
    with torch.autocast("cpu", torch.bfloat16):
        future = model.sample(random_codes(frames=1), 2, generator=torch.Generator().manual_seed(0))
    assert future.shape == (2, 1, 2, 4, 4, 2)


def test_half_precision_samples():
    model = tiny(attention="factorised").bfloat16()
    assert model.sample(random_codes(frames=1), 2).shape == (2, 1, 2, 4, 4, 2)


# Tokenizers and configs -----------------------------------------------------------------------------------------------


def test_pixels_of_256_levels_need_no_tokenizer():
    tokenizer = TINY_TOKENIZERS["pixel"]()
    prior = STPixelCNN(tokenizer.latent_spec, n_frames=3, dim=8, n_blocks=1, block_layers=1, n_heads=1, head_dim=4)
    frames = random_frames(tokenizer, n_frames=2)
    codes = tokenizer.encode(frames).codes
    assert prior(codes, 1).logits[2].shape == (2, 1, 4, 6, 256)
    future = VideoPredictionPipeline(prior.eval())(frames, n_frames=2, num_samples=2).frames
    assert future.shape == (2, 2, 2, 3, 4, 6)
    levels = (future + 1) * 127.5
    torch.testing.assert_close(levels, levels.round(), atol=1e-3, rtol=0)


@pytest.mark.parametrize("name", ["sliced_vqvae", "hr_vqvae", "residual_vqvae", "fsq", "lfq", "diffusers_vq"])
def test_it_continues_the_codes_of_a_tokenizer(name):
    tokenizer = tiny_tokenizer(name)
    prior = STPixelCNN(tokenizer.latent_spec, n_frames=4, dim=8, n_blocks=1, block_layers=1, n_heads=1, head_dim=4)
    frames = random_frames(tokenizer, n_frames=2)
    future = VideoPredictionPipeline(prior.eval(), tokenizer)(frames, n_frames=3, num_samples=2).frames
    assert future.shape == (2, 2, 3, *frames.shape[2:])


def discrete_groups():
    """The tokenizer files of configs/ whose class can have codes, each with what makes it small."""
    small = {"hidden_channels": 16, "residual_channels": 8, "n_residual_blocks": 1}
    return {
        "vqvae": small,
        "sliced_vqvae": small,
        "hr_vqvae": small,
        "residual_vqvae": small,
        "fsq": small,
        "lfq": small,
        "pixel": {},
    }


def test_no_discrete_tokenizer_is_left_out():
    others = {"kl_vae", "dcgan", "vgg", "diffusers", "diffusers_kl", "diffusers_vq"}  # the last in the matrix's tests
    files = {path.stem for path in (config_root() / "tokenizer").glob("*.yaml")}
    assert files == discrete_groups().keys() | others


@pytest.mark.parametrize(
    "tokenizer, prior", [*((name, "st_pixelcnn") for name in discrete_groups()), ("hr_vqvae", "video_transformer")]
)
def test_swaps_by_config(tokenizer, prior):
    """``tokenizer=...`` and ``prior=...`` on an experiment give a prior that learns that tokenizer's codes."""
    narrow = {
        "st_pixelcnn": ["dim=8", "n_heads=2", "head_dim=4"],
        "video_transformer": ["dim=16", "embed_dim=8", "n_heads=2", "head_dim=8", "n_layers=1"],
    }[prior]
    sizes = [f"tokenizer.{key}={value}" for key, value in discrete_groups()[tokenizer].items()]
    overrides = ["frame_size=16", "clip_length=3", "n_context=1", *sizes, *(f"prior.{option}" for option in narrow)]
    config = load_config("shrvqvae_tiny", [f"tokenizer={tokenizer}", f"prior={prior}", *overrides], tool="train_prior")
    torch.manual_seed(0)
    built = instantiate(config.tokenizer)
    model = instantiate(config.prior, latent_spec=built.latent_spec).train()
    frames = random_frames(built, n_frames=3)
    built.train()(frames)  # codebooks that are placed on the first batch
    codes = built.eval().encode(frames).codes
    optimizer = instantiate(config.optimizer)(model.parameters())
    before = [parameter.detach().clone() for parameter in model.parameters()]
    loss = model(codes, config.n_context).loss
    loss.backward()
    optimizer.step()
    assert torch.isfinite(loss)
    assert any(not torch.equal(old, new) for old, new in zip(before, model.parameters()))


def test_bad_input_is_named():
    model, codes = tiny(), random_codes()
    cases = [
        (lambda: model(codes, 4), "n_context: expected fewer than the clip's 4 frames, found 4"),
        (lambda: model(random_codes(frames=5), 1), "clip: expected at most 4 frames"),
        (lambda: model(codes + 3, 1), r"clip: expected values in \[0, 3\)"),
        (lambda: model.sample(codes[..., :1], 2), "context: expected shape"),
        (lambda: model.sample(codes, 1, overlap=1.5), "overlap: expected a whole number of at least 1, found 1.5"),
        (lambda: model.sample(codes, 0), "n_frames: expected a whole number of at least 1"),
        (lambda: model.sample(codes, 1, num_samples=0), "num_samples: expected a whole number of at least 1"),
        (lambda: model.sample(codes, 1, overlap=4), "overlap: expected 1 to 3"),
        (lambda: model.sample(codes, 1, top_p=1.5), "top_p"),
        (lambda: tiny(attention="local"), "attention: expected one of"),
        (lambda: tiny(layers="both"), "layers: expected one of"),
        (lambda: tiny(kernel_size=4), "kernel_size: expected an odd number"),
        (lambda: tiny(kernel_frames=1), "kernel_frames: expected a whole number of at least 2"),
        (lambda: tiny(n_frames=1), "n_frames: expected a whole number of at least 2"),
        (lambda: tiny(attention="windowed", window=3), r"window: expected divisors of \(h, w\) = \(4, 4\)"),
        (lambda: tiny(head_dim=5), "head_dim: expected an even number"),
        (lambda: tiny(spec(())), "latent_spec: ST-PixelCNN needs codes"),
    ]
    for call, message in cases:
        with pytest.raises(ValueError, match=message) as caught:
            call()
        assert "\n" not in str(caught.value)
