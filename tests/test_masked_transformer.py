"""MaskedTransformer and its trunk: streams and caches, masks, decoding, likelihood."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from tiny import (
    CODES_SPEC,
    SMALL_MASKED,
    TINY_PRIORS,
    random_clip,
    random_frames,
    tiny_prior,
    tiny_tokenizer,
    told_prior,
)

from latentcast import MaskedTransformer, VideoPredictionPipeline
from latentcast.inspection import ShownClips, Subject, draw, reasons
from latentcast.layers.block_causal import BlockCausalTransformer, Past
from latentcast.layers.positions import rotate, rotation_table

NAMES = [name for name in TINY_PRIORS if name.startswith("masked")]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def small(sizes=(3, 4), height=2, width=2, **options):
    spec = CODES_SPEC | {"codebook_sizes": list(sizes), "height": height, "width": width}
    torch.manual_seed(0)
    options = {"n_frames": 4, "dim": 16, "n_layers": 2, "n_heads": 2, "head_dim": 8} | options
    prior = MaskedTransformer(spec, **options).eval()
    with torch.no_grad():
        for parameter in prior.parameters():  # far from what they start with, where codes hardly differ
            parameter.add_(0.2 * torch.randn(parameter.shape))
    return prior


# The trunk --------------------------------------------------------------------------------------------------------


def trunk_and_streams(window, n_frames=6, n_targets=3, kernel_size=3):
    torch.manual_seed(0)
    trunk = BlockCausalTransformer(12, 2, 2, 6, (2, 3), window, kernel_size).double()
    for block in trunk.blocks:
        if block.around is not None:  # which begins as nothing
            torch.nn.init.normal_(block.around.weight, std=0.3)
            torch.nn.init.normal_(block.around.bias)
    shapes = [(2, n_frames - 1, 6, 12), (2, n_targets, 6, 12), (2, n_frames - 1, 12), (2, n_targets, 12)]
    return trunk, [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]


def slow(trunk, clean, target, clean_vectors, target_vectors):
    """The same over one sequence of both streams, with a mask that says who sees whom."""
    (b, t, p, d), s = clean.shape, target.shape[1]
    frames = torch.cat([torch.arange(t), torch.arange(t + 1 - s, t + 1)]).repeat_interleave(p)
    is_target = torch.cat([torch.zeros(t), torch.ones(s)]).bool().repeat_interleave(p)
    past = frames[:, None] - frames
    near = (past >= 0) & (past < trunk.window)
    sees_clean = near & ~is_target & ((past > 0) | ~is_target[:, None])
    sees_own = is_target[:, None] & is_target & (past == 0)
    table = rotation_table((t + 1, *trunk.grid), trunk.head_dim).double().view(t + 1, p, 2, -1)
    table = torch.cat([table[:t], table[t + 1 - s :]]).flatten(0, 1).transpose(0, 1)
    vectors = torch.cat([clean_vectors, target_vectors], 1)
    x = (torch.cat([clean, target], 1) + vectors[:, :, None]).flatten(1, 2)
    vectors = trunk.modulate(vectors).unflatten(-1, (6, -1))
    for block in trunk.blocks:
        x = x + around(x, block.around, trunk.grid)
        shift, scale, gate, *others = (vectors + block.modulation).repeat_interleave(p, 1).unbind(2)
        y = F.rms_norm(x, (d,)) * (1 + scale) + shift
        q, k, v = block.to_qkv(y).view(b, -1, 3, block.n_heads, trunk.head_dim).permute(2, 0, 3, 1, 4)
        logits = rotate(q, *table) @ rotate(k, *table).transpose(2, 3) / math.sqrt(trunk.head_dim)
        logits = logits.masked_fill(~(sees_clean | sees_own), -torch.inf)
        x = x + gate * block.to_out((logits.softmax(-1) @ v).transpose(1, 2).flatten(2))
        shift, scale, gate = others
        x = x + gate * block.feed_forward(F.rms_norm(x, (d,)) * (1 + scale) + shift)
    return trunk.norm(x[:, t * p :]).view(target.shape)


def around(x, convolution, grid):
    """Position by position: of each channel the weighted sum of what is near in the same frame."""
    if convolution is None:
        return 0
    out, (h, w) = torch.zeros_like(x), grid
    reach = convolution.kernel_size[0] // 2
    for here, (i, j) in enumerate(itertools.product(range(h), range(w))):
        out[:, here :: h * w] += convolution.bias
        for di, dj in itertools.product(range(-reach, reach + 1), repeat=2):
            if 0 <= i + di < h and 0 <= j + dj < w:
                weight = convolution.weight[:, 0, reach + di, reach + dj]
                out[:, here :: h * w] += x[:, (i + di) * w + j + dj :: h * w] * weight
    return out


@pytest.mark.parametrize(("window", "kernel_size"), [(2, 3), (3, 5), (9, 1)])
def test_streams_are_one_sequence_with_a_mask(window, kernel_size):
    trunk, streams = trunk_and_streams(window, kernel_size=kernel_size)
    torch.testing.assert_close(trunk(*streams), slow(trunk, *streams))


@pytest.mark.parametrize("window", [2, 3, 9])
def test_what_is_remembered_frame_by_frame_is_what_a_pass_sees(window):
    trunk, streams = trunk_and_streams(window)
    expected, (clean, target, clean_vectors, target_vectors) = trunk(*streams), streams
    past, first = Past(), clean.shape[1] + 1 - target.shape[1]
    for t in range(clean.shape[1] + 1):
        if t >= first:
            own = slice(t - first, t - first + 1)
            found = trunk.predict(past, target[:, own], target_vectors[:, own])
            torch.testing.assert_close(found, expected[:, own])
        if t < clean.shape[1]:
            past = trunk.remember(past, clean[:, t : t + 1], clean_vectors[:, t : t + 1])
            assert past.blocks[0][0].shape[2] == min(t + 1, window - 1) * 6  # and no more is kept
    together = trunk.remember(Past(), clean, clean_vectors)
    torch.testing.assert_close(together.blocks, past.blocks)
    read_once = trunk.remember(Past(), clean, clean_vectors, n_targets=target.shape[1])
    assert read_once.blocks[0][0].shape[2] == min(clean.shape[1], window - 2 + target.shape[1]) * 6
    torch.testing.assert_close(trunk.predict(read_once, target, target_vectors), expected)


def test_a_target_sees_itself_and_what_was_before_it():
    trunk, streams = trunk_and_streams(window=4)
    for place in range(3):
        out = trunk(*streams)[:, place].sum()
        clean, target = torch.autograd.grad(out, streams[:2])
        seen = [bool(clean[:, t].any()) for t in range(5)]
        # Through two blocks it reaches twice as far back as its window.
        assert seen == [t < 3 + place for t in range(5)]
        assert [bool(target[:, s].any()) for s in range(3)] == [s == place for s in range(3)]


@pytest.mark.parametrize("max_paths", [1, 12, 60])
def test_a_code_is_embedded_as_the_path_down_to_it_where_paths_are_few(max_paths):
    """Two codes of one number below different parents differ there, and nowhere else."""
    prior = small((3, 4, 5), max_paths=max_paths)
    codes = torch.cartesian_prod(*[torch.arange(size) for size in (3, 4, 5)])
    everywhere = codes[:, None].expand(-1, 4, -1)
    found = prior.embed_clean(everywhere) - prior.embed(everywhere, torch.zeros(60, 4, dtype=torch.long))
    depths = prior.depths.weight[3] - prior.depths.weight[0]
    counts = {1: (3, 4, 5), 12: (3, 12, 5), 60: (3, 12, 60)}[max_paths]
    assert tuple(table.num_embeddings for table in prior.codes) == counts
    assert tuple(table.num_embeddings for table in prior.path) == counts[:2]
    for (a, b, c), each in zip(codes.tolist(), found[:, 0]):
        rows = a, 4 * a + b if counts[1] == 12 else b, 20 * a + 5 * b + c if counts[2] == 60 else c
        expected = depths + sum(table.weight[row] for table, row in zip(prior.codes, rows))
        torch.testing.assert_close(each, expected)
        above = prior.logits(torch.zeros(1, 16), 2, torch.tensor([[a, b, c]]))
        by_hand = prior.heads[2](prior.path[0].weight[rows[0]] + prior.path[1].weight[rows[1]])
        torch.testing.assert_close(above[0], by_hand)


# Training ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("masking", ["tree", "flat"])
def test_a_child_is_never_known_while_its_parent_is_masked(masking):
    prior = small((3, 4, 5), height=4, masking=masking)
    depth, masked = prior._draw_masks((400, 2), generator())
    levels = depth[masked]
    if masking == "flat":
        assert (levels == 0).all() and (depth[~masked] == 3).all()
    else:  # of a frame one level is being drawn: it is known where it is not masked, and what is below nowhere
        level = depth.amin(-1, keepdim=True).minimum(torch.tensor(2))
        assert torch.equal(depth, torch.where(masked, level, level + 1)) and masked.any(-1).all()
        share = [(levels == i).float().mean() for i in range(3)]
        assert all(0.25 < each < 0.42 for each in share)
    rate = masked.float().mean(-1)
    assert 0.6 < rate.mean() < 0.75  # 2 / pi, and a little for rounding up
    assert {round(8 * value) for value in rate.unique().tolist()} == set(range(1, 9))


def test_the_past_is_corrupted_by_the_share_that_the_model_is_told():
    prior = small((50, 60), height=4, width=4, corruption=0.5)
    codes = torch.zeros(200, 3, 16, 2, dtype=torch.long)
    rate = torch.full((200, 1), 0.3)
    wrong = prior._corrupted(codes, rate, generator()) != 0
    assert 0.26 < wrong.any(-1).float().mean() < 0.31  # some of the random codes are the true ones
    assert (wrong[..., 0] <= wrong[..., 1]).float().mean() > 0.99  # a random root has random children
    assert 0.4 < (wrong[..., 0].sum() / wrong[..., 1].sum()) < 0.6
    assert not (prior._corrupted(codes, torch.zeros(200, 1), generator()) != 0).any()
    one, other = (prior.vectors(prior.as_clean, torch.tensor([[x]])) for x in (0.0, 0.5))
    assert not torch.allclose(one, other)


@pytest.mark.parametrize("name", NAMES)
def test_the_loss_of_eval_mode_is_one_and_that_of_training_is_not(name):
    prior = tiny_prior(name)
    clip = random_clip(prior)
    assert prior(clip, 2).loss == prior(clip, 2).loss
    prior.train()
    assert prior(clip, 2).loss != prior(clip, 2).loss


def test_clips_that_are_too_long_are_refused():
    prior = small()
    with pytest.raises(ValueError, match=r"clip: expected at most 4 frames \(n_frames\), found 5"):
        prior(random_clip(prior, n_frames=5), 2)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"masking": "trees"}, "masking: expected one of tree, flat, found 'trees'"),
        ({"corruption": 1.0}, "corruption: expected at least 0 and below 1, found 1.0"),
        ({"head_dim": 5}, "head_dim: expected an even number, found 5"),
        ({"n_frames": 1}, "n_frames: expected"),
        ({"window": 1}, "window: expected"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        small(**options)


# Decoding ---------------------------------------------------------------------------------------------------------


def states(prior, **options):
    """The states of the first predicted frame, and the frame."""
    found, original = [], prior._decode

    def decode(*arguments):
        *others, on_step = arguments
        on = lambda codes, depth: (found.append((codes, depth)), on_step(codes, depth))  # noqa: E731
        return original(*others, on)

    prior._decode = decode
    frame = prior.sample(random_clip(prior, n_frames=2), 1, generator=generator(), num_samples=3, **options)
    del prior._decode
    return found, frame.flatten(0, 2).flatten(1, 2)


@pytest.mark.parametrize("masking, order", itertools.product(["tree", "flat"], ["confidence", "random", "raster"]))
def test_codes_never_change_once_they_are_known(masking, order):
    prior = small((3, 4, 5), height=4, width=4, masking=masking)
    found, frame = states(prior, n_steps=7, order=order)
    assert len(found) == 7
    level = torch.arange(3)
    for (codes, depth), (later, deeper) in itertools.pairwise(found):
        known = depth[..., None] > level
        assert torch.equal(codes[known], later[known]) and (deeper >= depth).all()
        assert (deeper.sum(-1) > depth.sum(-1)).all()  # and at every step more are known
    codes, depth = found[-1]
    assert (depth == 3).all() and torch.equal(codes, frame)
    for codes, _ in found:  # every state decodes
        assert all(0 <= codes[..., i].min() <= codes[..., i].max() < size for i, size in enumerate((3, 4, 5)))


def test_steps_are_spread_over_the_levels():
    prior = small((3, 4, 5), height=4)
    assert prior._spread(6) == [4, 1, 1] and prior._spread(3) == [1, 1, 1] and prior._spread(2) == [2, 0, 0]
    found, _ = states(prior, steps=[2, 0, 3])
    # The second level along with the first one, then three steps of the third.
    assert [sorted(set(depth.flatten().tolist())) for _, depth in found][:2] == [[0, 2], [2]] and len(found) == 5
    assert small((3, 4, 5), masking="flat")._spread(6) == [6, 0, 0]


@pytest.mark.parametrize("masking", ["tree", "flat"])
def test_with_a_step_a_code_and_a_fixed_order_it_is_an_autoregressive_model(masking):
    """The frame drawn is that of a loop over codes, each from a pass over what is known, and ``log_prob`` its
    probability: summed over all frames there are it is 1."""
    prior = small((2, 3), height=1, width=2, masking=masking)
    context = random_clip(prior, n_frames=2)[:1]
    n_steps = {"tree": 4, "flat": 2}[masking]
    frames = torch.cartesian_prod(*[torch.arange(size) for size in (2, 3) * 2]).view(-1, 1, 1, 2, 2)
    clips = torch.cat([context.expand(len(frames), -1, -1, -1, -1), frames], 1)
    log_prob = prior.log_prob(clips, 2)
    assert log_prob.exp().sum().item() == pytest.approx(1, abs=1e-5)
    options = {"order": "raster", "num_samples": 4000}
    steps = {"steps": [2, 2]} if masking == "tree" else {"n_steps": n_steps}
    drawn = prior.sample(context, 1, generator=generator(), **options, **steps)[0]
    counts = torch.stack([(drawn == frame).flatten(1).all(1).sum() for frame in frames]) / 4000
    spread = (log_prob.exp() * (1 - log_prob.exp()) / 4000).sqrt()
    assert ((counts - log_prob.exp()).abs() < 4.5 * spread).all()
    assert not torch.allclose(counts, torch.full_like(counts, 1 / 36), atol=0.02)  # it is not just uniform


@pytest.mark.parametrize("masking", ["tree", "flat"])
def test_the_bound_is_the_mean_over_all_orders(masking):
    prior = small((2, 3), height=1, width=3, masking=masking)
    clip = random_clip(prior, n_frames=3)
    predict, target = prior._from_true_past(clip, 2, None)
    total, orders = 0, list(itertools.permutations(range(3)))
    with torch.no_grad():
        for (levels, _), order in itertools.product(prior._phases([1, 1]), orders):
            depth = torch.full((2, 1, 3), levels[0])
            for place in order:
                features = predict(depth)
                for i in levels:
                    logits = prior.logits(features, i, target).log_softmax(-1)
                    total = total + logits.gather(-1, target[..., i, None])[:, 0, place, 0] / len(orders)
                depth = depth.clone()
                depth[..., place] = levels[-1] + 1
    many = clip.repeat(300, 1, 1, 1, 1)
    estimate = prior.log_prob_bound(many, 2, n_draws=3, generator=generator()).view(300, 2)
    error = estimate.std(0) / math.sqrt(300)
    assert ((estimate.mean(0) - total).abs() < 4 * error + 1e-4).all() and (error < 0.1).all()


@pytest.mark.parametrize("name", NAMES)
def test_a_cached_past_gives_the_same_frames(name):
    prior = told_prior(name)
    context = random_clip(prior, n_frames=2)
    for options in ({}, {"revise": 2, "canvas": "argmax", "doubt": 0.7}, {"guidance_scale": 2.0}):
        told = {"action": torch.randint(3, (2, 9)), "state": torch.randn(2, 9, 2), "label": torch.tensor([0, 2])}
        settings = {"num_samples": 2, "conditions": told, "n_steps": 5, **options}
        first, second = (
            prior.sample(context, 7, generator=generator(), use_cache=use_cache, **settings)
            for use_cache in (True, False)
        )
        assert torch.equal(first, second)


def test_of_a_canvas_stays_what_is_not_doubted():
    prior = small((3, 4), height=4, width=4)
    context = random_clip(prior, n_frames=2)
    canvas = random_clip(prior, n_frames=1, seed=5)
    sample = lambda **options: prior.sample(context, 2, generator=generator(), **options)  # noqa: E731
    assert torch.equal(sample(canvas=canvas, doubt=1.0), canvas[:, None].expand(-1, -1, 2, -1, -1, -1))
    assert torch.equal(sample(canvas="last", doubt=1.0)[:, 0], context[:, [-1, -1]])
    # What is the likeliest given the past alone: one pass of each level.
    best = sample(canvas="argmax", doubt=1.0)[:, 0, 0]
    greedy = sample(steps=[1, 1], temperature=0)[:, 0, 0]
    assert torch.equal(best, greedy)
    some = sample(canvas=canvas, doubt=0.75)[:, 0, 0]
    share = (some == canvas[:, 0]).all(-1).float().mean()
    assert 0.1 < share < 0.9
    assert not torch.equal(sample(canvas="last", doubt=0.0), sample(canvas="last", doubt=1.0))


def test_what_is_revised_are_the_least_likely_positions_with_all_their_levels():
    prior = small((3, 4), height=4, width=4)
    found, frame = states(prior, n_steps=4, revise=5)
    before, after = found[3][0], found[-1][0]
    assert len(found) == 6 and (found[4][1] < 2).sum(-1).tolist() == [5] * 6
    assert ((before != after).any(-1).sum(-1) <= 5).all() and not torch.equal(before, after)
    assert torch.equal(after, frame)
    again, _ = states(prior, n_steps=4)
    assert torch.equal(again[3][0], before)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"n_steps": 0}, "n_steps: expected"),
        ({"steps": [1]}, r"steps: expected a whole number for each of 2 levels, the first at least 1, found \[1\]"),
        ({"steps": [0, 2]}, "steps: expected"),
        ({"order": "best"}, "order: expected one of confidence, random, raster, found 'best'"),
        ({"canvas": "mean"}, "canvas: expected one of last, argmax, codes or None, found 'mean'"),
        ({"doubt": 1.5}, "doubt: expected a number from 0 to 1, found 1.5"),
        ({"revise": 9}, "revise: expected 0 to 4 positions, found 9"),
        ({"choice_temperature": -1}, "choice_temperature: expected a number >= 0, found -1"),
    ],
)
def test_ways_to_sample_that_are_out_of_range_are_refused(options, message):
    prior = small()
    with pytest.raises(ValueError, match=message) as caught:
        prior.sample(random_clip(prior, n_frames=2), 1, **options)
    assert "\n" not in str(caught.value)


def test_a_canvas_of_another_size_is_refused():
    prior = small()
    context = random_clip(prior, n_frames=2)
    with pytest.raises(ValueError, match="canvas: expected frames for each of 2 contexts, or for all, found"):
        prior.sample(context, 1, canvas=context[[0, 0, 1]])
    with pytest.raises(ValueError, match="canvas: expected a grid"):
        prior.sample(context, 1, canvas=torch.zeros(2, 1, 3, 3, 2, dtype=torch.long))


# Explained, and in a pipeline -------------------------------------------------------------------------------------


@pytest.mark.parametrize("masking", ["tree", "flat"])
def test_what_lies_behind_a_frame(masking):
    prior = small((3, 4), height=3, width=4, masking=masking)
    clip = random_clip(prior, n_frames=4)
    found = prior.explain(clip, 2, generator=generator(), n_steps=5, revise=2)
    n_steps = 5 + (2 if masking == "tree" else 1)
    assert found["nats"].shape == (2, 2, 3, 4, 2) and (found["nats"] > 0).all()
    assert found["decoding"].shape == (2, n_steps, 3, 4, 2) and found["depth"].shape == (2, n_steps, 3, 4)
    bound = prior.log_prob_bound(clip, 2, n_draws=64, generator=generator())
    many = prior.explain(clip, 2, generator=generator(), n_draws=64)["nats"]
    assert torch.allclose(many.flatten(1).sum(1), -bound, rtol=0.05)
    settings = {"n_steps": 5, "revise": 2}
    drawn = generator()
    for _ in prior._by_random_orders(clip, 2, None, 8, drawn):
        pass  # takes its share of the generator's numbers
    assert torch.equal(found["decoding"][:, -1], prior.sample(clip[:, :2], 1, generator=drawn, **settings)[:, 0, 0])


def test_a_pipeline_decodes_layer_by_layer_and_takes_frames_as_canvas():
    tokenizer = tiny_tokenizer("hr_vqvae")
    torch.manual_seed(0)
    prior = MaskedTransformer(tokenizer.latent_spec, **SMALL_MASKED).eval()
    pipe = VideoPredictionPipeline(prior, tokenizer, n_context=2)
    pipe.set_progress_bar_config(disable=True)
    frames, canvas = random_frames(tokenizer, n_frames=2), random_frames(tokenizer, n_frames=1, seed=4)
    settings = {"n_frames": 2, "n_steps": 4, "value_range": (-1, 1)}

    def predict(**options):
        return pipe(frames, generator=generator(), **settings, **options).frames

    codes = predict(output_type="latent")
    for n in (1, 2, 3):
        expected = tokenizer.decode(codes[:, 0], n_layers=n)
        torch.testing.assert_close(predict(output_layers=n)[:, 0], expected)
    torch.testing.assert_close(predict(), predict(output_layers=3))
    encoded = tokenizer.encode(canvas).codes
    drawn = predict(canvas=canvas, doubt=1.0, output_type="latent")
    assert torch.equal(drawn, encoded[:, None].expand(-1, -1, 2, -1, -1, -1))
    each = pipe(
        frames, generator=[generator(), generator()], canvas=canvas, doubt=1.0, output_type="latent", **settings
    )
    assert torch.equal(each.frames, drawn)
    for layers in (0, 4, "one"):
        with pytest.raises(ValueError, match=r"output_layers: expected 1 to 3, found"):
            predict(output_layers=layers)
    flat = tiny_tokenizer("vqvae")
    pipe = VideoPredictionPipeline(MaskedTransformer(flat.latent_spec, **SMALL_MASKED).eval(), flat)
    with pytest.raises(
        ValueError, match=r"output_layers: expected a prior over codes in layers .*found MaskedTransformer"
    ):
        pipe(random_frames(flat, n_frames=2), 1, output_layers=1, value_range=(-1, 1))


def test_the_steps_to_a_frame_are_drawn():
    tokenizer = tiny_tokenizer("hr_vqvae")
    prior = MaskedTransformer(tokenizer.latent_spec, **SMALL_MASKED).eval()
    clips = ShownClips(random_frames(tokenizer, n_frames=4), 10.0, ["one", "two"])
    subject = Subject(
        clips, pipe=VideoPredictionPipeline(prior, tokenizer, n_context=2), n_context=2, sampler={"n_steps": 4}
    )
    assert reasons(subject, ["decoding", "losses"]) == {"decoding": None, "losses": None}
    ((name, drawing),) = draw(subject, ["decoding"])
    assert name == drawing.name == "decoding" and min(drawing.picture.size) > 50
