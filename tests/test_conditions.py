"""What priors are told beside the frames, and futures predicted one frame at a time."""

import gc

import pytest
import torch
from tiny import (
    CODES_SPEC,
    CONDITIONS,
    SMALL_FLOW,
    SMALL_MASKED,
    SMALL_PIXELCNN,
    SMALL_SDE_DIFFUSION,
    SMALL_TRANSFORMER,
    TINY_PRIORS,
    TOLD_PRIORS,
    random_clip,
    random_conditions,
    random_frames,
    tiny_prior,
    tiny_tokenizer,
    told_prior,
)

from latentcast import (
    FlowTransformer,
    MaskedTransformer,
    PixelTokenizer,
    RecurrentVAE,
    ResidualDiffusion,
    SDEDiffusion,
    STPixelCNN,
    VideoPredictionPipeline,
    VideoTransformer,
    load_model,
)
from latentcast.layers.conditions import ConditionEmbedding, check_conditions


@pytest.fixture(params=TOLD_PRIORS)
def prior(request):
    """With weights that are far from zero: what starts there says nothing before training."""
    prior = told_prior(request.param)
    with torch.no_grad():
        for parameter in prior.parameters():
            if parameter.ndim <= 2 or not parameter.any():
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    return prior


STEER = {"action": {"shape": [], "dtype": "int64", "per": "frame", "n_values": 3}}
TOGETHER = {
    "video_transformer_spatiotemporal"
}  # predict the frames of a window together, knowing all that leads to them


@pytest.fixture(params=[name for name in TOLD_PRIORS if name not in TOGETHER])
def stepwise(request):
    return told_prior(request.param)


def fewer(prior):
    """Options that make sampling quick."""
    return {name: 4 for name in prior.sampler_options() if name == "n_steps"}


def generator():
    return torch.Generator().manual_seed(3)


def sample(prior, context, n_frames, conditions=None, num_samples=2, **options):
    settings = {"num_samples": num_samples, "generator": generator(), "conditions": conditions}
    return prior.sample(context, n_frames, **settings, **fewer(prior) | options)


def loss(prior, clip, conditions):
    torch.manual_seed(0)  # of priors that draw noise
    with torch.no_grad():
        return prior(clip, 2, conditions).loss.item()


def cut(conditions, n_frames):
    return {name: value if name == "label" else value[:, :n_frames] for name, value in conditions.items()}


def test_samples_are_told_in_training_mode_too(prior):
    """As previews ask for them: dropout is for the loss alone."""
    prior.conditioner.dropout = 0.99
    context, told = random_clip(prior, n_frames=2), random_conditions()
    assert torch.equal(sample(prior.train(), context, 2, told), sample(prior.eval(), context, 2, told))


def test_each_condition_matters_to_loss_and_samples(prior):
    clip, told = random_clip(prior), random_conditions()
    first, nothing = loss(prior, clip, told), loss(prior, clip, None)
    assert first != nothing and first == loss(prior, clip, told)
    future = sample(prior, clip[:, :2], 2, told)
    assert torch.equal(future, sample(prior, clip[:, :2], 2, told))
    assert not torch.equal(future, sample(prior, clip[:, :2], 2))
    for name, other in random_conditions(seed=1).items():
        assert loss(prior, clip, told | {name: other}) != first, name


def test_what_comes_later_is_not_known(stepwise):
    """A frame knows what led to it, and nothing of what leads to later ones."""
    prior = stepwise
    clip, told = random_clip(prior), random_conditions(n_frames=6)
    other = random_conditions(n_frames=6, seed=1) | {"label": told["label"]}
    late = {
        name: value if name == "label" else torch.cat([value[:, :4], other[name][:, 4:]], 1)
        for name, value in told.items()
    }
    one, two = sample(prior, clip[:, :2], 4, told), sample(prior, clip[:, :2], 4, late)
    assert torch.equal(one[:, :, :2], two[:, :, :2])
    assert not torch.equal(one[:, :, 2:], two[:, :, 2:])


def test_a_batch_is_told_row_by_row(prior):
    """Of two contexts each has its own conditions, and one row of them stands for all."""
    clip, told = random_clip(prior), random_conditions()
    whole = loss(prior, clip, {name: value[:1] for name, value in told.items()})
    repeated = loss(prior, clip, {name: value[[0, 0]] for name, value in told.items()})
    swapped = loss(prior, clip, {name: value[[1, 0]] for name, value in told.items()})
    assert whole == repeated and swapped != loss(prior, clip, told)


def test_guidance_goes_from_untold_to_told_and_beyond(prior):
    if "guidance_scale" not in prior.sampler_options():
        pytest.skip("takes none")
    context, told = random_clip(prior, n_frames=2), random_conditions(n_frames=5)
    assert torch.equal(sample(prior, context, 3, told, guidance_scale=1.0), sample(prior, context, 3, told))
    nothing = sample(prior, context, 3).float()
    none = sample(prior, context, 3, told, guidance_scale=0.0).float()
    assert torch.allclose(none, nothing, rtol=0, atol=1e-3 * nothing.std().item())
    assert not torch.equal(sample(prior, context, 3, told, guidance_scale=3.0), sample(prior, context, 3, told))


def test_training_leaves_conditions_out_for_a_share_of_clips(prior):
    conditioner = prior.conditioner.train()
    conditioner.dropout = 0.4
    vectors = conditioner(random_conditions(batch=400, n_frames=2), 400, 2)
    left_out = (vectors == conditioner.null).all(-1)
    assert torch.equal(left_out[:, 0], left_out[:, 1])
    assert 0.3 < left_out.float().mean() < 0.5
    assert not (conditioner.eval()(random_conditions(), 2, 4) == conditioner.null).all(-1).any()


def test_every_parameter_of_the_conditions_learns(prior):
    prior.train()
    optimizer = torch.optim.Adam(prior.parameters(), 1e-3)
    for _ in range(4):
        prior(random_clip(prior), 2, random_conditions()).loss.backward()
        prior(random_clip(prior), 2, None).loss.backward()
        optimizer.step()
    assert not [name for name, p in prior.conditioner.named_parameters() if p.grad is None or not p.grad.any()]


def test_config_holds_conditions_as_declared_and_weights_come_back(prior, tmp_path):
    context, told = random_clip(prior, n_frames=2), random_conditions()
    prior.conditioner.measure([random_conditions(seed=seed) for seed in range(4)])
    prior.save_pretrained(tmp_path)
    loaded = load_model(tmp_path)
    assert {name: dict(spec) for name, spec in loaded.conditions.items()} == CONDITIONS
    assert torch.equal(sample(prior, context, 2, told), sample(loaded, context, 2, told))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"action": None}, "no action"),
        ({"reward": torch.zeros(2, 4)}, "'reward', which it does not know"),
        ({"action": torch.zeros(2, 3, dtype=torch.int64)}, r"action: expected \(2, 4\) \(4 frames\), found \(2, 3\)"),
        ({"action": torch.full((2, 4), 3)}, "action: expected 0 to 2, found 3"),
        ({"action": torch.full((2, 4), -1)}, "action: expected 0 to 2, found -1"),
        ({"action": torch.zeros(2, 4)}, "action: expected whole numbers, found torch.float32"),
        ({"state": torch.full((2, 4, 2), torch.nan)}, "state: expected finite numbers"),
        ({"state": "left"}, "state: expected numbers, found 'left'"),
        ({"label": torch.zeros(3, dtype=torch.int64)}, r"label: expected \(2,\) \(a video\), found \(3,\)"),
    ],
)
def test_conditions_that_do_not_fit_are_refused(prior, change, message):
    told = {name: value for name, value in (random_conditions() | change).items() if value is not None}
    clip = random_clip(prior)
    for call in (lambda: prior(clip, 2, told), lambda: sample(prior, clip[:, :2], 2, told)):
        with pytest.raises(ValueError, match=f"conditions: .*{message}") as caught:
            call()
        assert "\n" not in str(caught.value)


def test_declarations_that_lack_something_are_refused():
    whole = {"shape": [], "dtype": "int64", "per": "frame"}
    with pytest.raises(ValueError, match="action: expected n_values"):
        ConditionEmbedding({"action": whole}, 4)
    with pytest.raises(ValueError, match="action: expected shape, dtype and per"):
        ConditionEmbedding({"action": {"shape": []}}, 4)
    with pytest.raises(ValueError, match=r"condition_dropout: .* found 1"):
        ConditionEmbedding(CONDITIONS, 4, dropout=1)
    with pytest.raises(ValueError, match="expected a mapping"):
        check_conditions([1], CONDITIONS, 1, 1)


def test_numbers_are_measured():
    spec = {"state": CONDITIONS["state"]}
    embedding = ConditionEmbedding(spec, 8).eval()
    far = 1000 + 5 * torch.randn(50, 4, 2)
    before = embedding({"state": far}, 50, 4)
    embedding.measure([{"state": clip[None]} for clip in far])
    network = embedding.networks[0]
    assert torch.allclose(network.mean, far.flatten(0, 1).mean(0)) and torch.allclose(
        network.spread, far.flatten(0, 1).std(0, correction=0)
    )
    assert embedding({"state": far}, 50, 4).abs().mean() < before.abs().mean() / 10


def roll_out(prior, context, n_frames, conditions=None, num_samples=2):
    """As ``sample``, frame by frame."""
    n_context = context.shape[1]
    given = None if conditions is None else cut(conditions, n_context)
    settings = {"num_samples": num_samples, "generator": generator(), "conditions": given}
    rollout = prior.rollout(context, **settings, **fewer(prior))
    frames = []
    for t in range(n_context, n_context + n_frames):
        told = None if conditions is None else {n: conditions[n][:, t] for n in conditions if n != "label"}
        frames.append(rollout.step(told))
    return torch.stack(frames, 2)


@pytest.mark.parametrize("name", TINY_PRIORS)
@pytest.mark.parametrize("n_context", [2, 5])
def test_a_rollout_gives_what_sample_gives(name, n_context):
    prior = tiny_prior(name)
    context = random_clip(prior, n_frames=n_context)
    future = sample(prior, context, 7)
    assert torch.equal(roll_out(prior, context, 7), future)


def test_a_rollout_is_told_step_by_step(stepwise):
    context, told = random_clip(stepwise, n_frames=2), random_conditions(n_frames=8)
    # To rounding, over all the steps: what is told of one frame and of all are products of other shapes.
    future = sample(stepwise, context, 6, told)
    torch.testing.assert_close(roll_out(stepwise, context, 6, told), future, atol=2e-5, rtol=0)


@pytest.mark.parametrize("name", sorted(TOGETHER))
def test_frames_that_are_predicted_together_are_not_told_step_by_step(name):
    prior = told_prior(name)
    with pytest.raises(ValueError, match=r"rollout: expected subscale=\[4, 1, 1\]"):
        roll_out(prior, random_clip(prior, n_frames=2), 1, random_conditions())


def test_a_rollout_refuses_a_step_and_goes_on(stepwise):
    prior = stepwise
    context, told = random_clip(prior, n_frames=2), random_conditions(n_frames=4)
    settings = {"generator": generator(), "num_samples": 2}
    rollout = prior.rollout(context, conditions=cut(told, 2), **settings, **fewer(prior))
    with pytest.raises(ValueError, match="conditions: action: expected 0 to 2, found 7"):
        rollout.step({"action": torch.tensor([7, 0]), "state": told["state"][:, 2]})
    frames = [rollout.step({name: told[name][:, t] for name in ("action", "state")}) for t in (2, 3)]
    torch.testing.assert_close(torch.stack(frames, 2), sample(prior, context, 2, told), atol=2e-5, rtol=0)


def steered_pipe():
    """Over the codes of a tokenizer, told an action of each frame."""
    tokenizer = tiny_tokenizer("fsq")
    torch.manual_seed(0)
    prior = VideoTransformer(tokenizer.latent_spec, subscale=[4, 1, 1], conditions=STEER, **SMALL_TRANSFORMER)
    pipe = VideoPredictionPipeline(prior, tokenizer)
    pipe.set_progress_bar_config(disable=True)
    return pipe, random_frames(tokenizer, batch=2, n_frames=2)


def test_a_pipeline_rolls_out_what_it_predicts():
    pipe, frames = steered_pipe()
    actions = random_conditions(n_frames=5)["action"]
    settings = {"num_samples": 2, "value_range": (-1, 1)}
    futures = pipe(frames, 3, conditions={"action": actions}, generator=generator(), **settings).frames
    rollout = pipe.rollout(frames, conditions={"action": actions[:, :2]}, generator=generator(), **settings)
    steps = [rollout.step(actions[:, 2]), rollout.step({"action": actions[:, 3]}), rollout.step(actions[:, 4])]
    torch.testing.assert_close(torch.stack(steps, 2), futures)
    for action in (7, [0, 1, 2], "left", {"reward": 0}):
        with pytest.raises(ValueError, match="conditions: ") as caught:
            rollout.step(action)
        assert "\n" not in str(caught.value)
    assert rollout.step(1).shape == rollout.step(None).shape == steps[0].shape  # one action for both contexts, or none
    with pytest.raises(ValueError, match="unknown sampler option 'steps'"):
        pipe.rollout(frames, value_range=(-1, 1), steps=3)
    with pytest.raises(ValueError, match="generator: expected one for a rollout, found a list of 2"):
        pipe.rollout(frames, value_range=(-1, 1), generator=[generator(), generator()])


def test_a_pipeline_tells_each_context_its_own():
    pipe, frames = steered_pipe()
    actions = random_conditions(n_frames=5)["action"]
    together = pipe(frames, 3, conditions={"action": actions}, generator=[generator(), generator()]).frames
    for i in range(2):  # without a batch axis
        alone = pipe(frames[i], 3, conditions={"action": actions[i]}, generator=generator(), value_range=(-1, 1)).frames
        torch.testing.assert_close(alone[0], together[i])
    with pytest.raises(ValueError, match=r"conditions: action: expected \(2, 5\) \(5 frames\), found \(2, 4\)"):
        pipe(frames, 3, conditions={"action": actions[:, :4]})
    for wrong in ({"action": actions[[0, 1, 1]]}, {"reward": 0}):  # of more contexts than there are, or no such name
        with pytest.raises(ValueError, match="conditions: "):
            pipe(frames, 3, conditions=wrong, generator=[generator(), generator()])


KINDS = ["video_transformer", "st_pixelcnn", "recurrent_vae", "sde_diffusion", "residual_diffusion"]


@pytest.mark.parametrize("name", KINDS)
def test_a_rollout_holds_no_more_however_long_it_is(name):
    """Live memory past the trained length, and a window later."""
    prior = tiny_prior(name)
    rollout = prior.rollout(random_clip(prior, n_frames=2), **fewer(prior))

    def held_after(n):
        for _ in range(n):
            rollout.step()
        gc.collect()
        live = [thing for thing in gc.get_objects() if type(thing) is torch.Tensor]
        return sum(tensor.numel() * tensor.element_size() for tensor in live)

    early = held_after(6)
    assert held_after(4) == early


# A block on a ring of four columns: an action moves it by one to the right or to the left, or leaves it.

MOVES = torch.tensor([0, 1, -1])
RING_OF_CODES = CODES_SPEC | {"height": 2, "width": 4, "codebook_sizes": [2]}
RING_OF_PIXELS = PixelTokenizer(1, 8, 8, levels=None).latent_spec
# name -> the prior, training steps and learning rate in which it learns
STEERED = {
    "video_transformer": (
        lambda: VideoTransformer(RING_OF_CODES, subscale=[4, 1, 1], conditions=STEER, **SMALL_TRANSFORMER),
        *(150, 1e-2),
    ),
    "recurrent_vae": (
        lambda: RecurrentVAE(
            RING_OF_PIXELS, dim=16, hidden_channels=8, group_dim=2, cells=32, beta=1e-2, conditions=STEER
        ),
        *(150, 1e-2),
    ),
    "residual_diffusion": (
        lambda: ResidualDiffusion(
            PixelTokenizer(1, 4, 4, levels=None).latent_spec,
            **{"width": 8, "denoising_multipliers": [1], "transform_multipliers": [1]},
            **{"sigma": 0.1, "residual_bound_sigmas": 3, "mu_weight": 1.0, "detach_mu": True, "conditions": STEER},
        ),
        *(60, 2e-2),
    ),
    "st_pixelcnn": (
        lambda: STPixelCNN(RING_OF_CODES, attention="none", conditions=STEER, **SMALL_PIXELCNN),
        *(50, 2e-2),
    ),
    "masked_transformer": (
        lambda: MaskedTransformer(RING_OF_CODES, conditions=STEER, **SMALL_MASKED),
        *(160, 4e-3),
    ),
    "flow_transformer": (
        lambda: FlowTransformer(
            RING_OF_PIXELS, patch=2, conditions=STEER, **SMALL_FLOW | {"n_layers": 2}, past_dropout=0.0
        ),
        *(480, 4e-3),
    ),
    "sde_diffusion": (
        lambda: SDEDiffusion(
            PixelTokenizer(1, 4, 4, levels=None).latent_spec,
            conditions=STEER,
            **SMALL_SDE_DIFFUSION
            | {"block_channels": [16], "dt": 1.0, "prediction_type": "sample", "previous_frame": "immediate"},
        ),
        *(80, 1e-2),
    ),
}


def steered_clips(prior, n, n_frames=4):
    """Clips in the space of ``prior``, and their actions (n, n_frames)."""
    spec = prior.config.latent_spec
    actions, start = torch.randint(3, (n, n_frames)), torch.randint(4, (n, 1))
    place = (start + torch.cat([torch.zeros_like(start), MOVES[actions[:, 1:]].cumsum(1)], 1)) % 4
    lit = place[..., None] == torch.arange(spec["width"]) * 4 // spec["width"]  # (n, T, w)
    if prior.accepts == "codes":
        return lit.long()[:, :, None, :, None].expand(-1, -1, spec["height"], -1, len(spec["codebook_sizes"])), actions
    frame = (lit.float() * 2 - 1)[:, :, None, None]
    return frame.expand(-1, -1, spec["channels"], spec["height"], -1), actions


@pytest.mark.parametrize("name", STEERED)
def test_where_actions_decide_they_are_followed(name):
    """A prior that is told of actions predicts what they lead to; told of others' it does not."""
    make, n_steps, rate = STEERED[name]
    torch.manual_seed(0)
    prior = make().train()
    optimizer = torch.optim.Adam(prior.parameters(), rate)
    for _ in range(n_steps):
        clip, actions = steered_clips(prior, 16)
        optimizer.zero_grad()
        prior(clip, 2, {"action": actions}).loss.backward()
        optimizer.step()
    prior.eval()
    clip, actions = steered_clips(prior, 64)

    def share_right(actions):
        """Of positions that change or might: a frame is right where all its places are."""
        future = sample(prior, clip[:, :2], 2, {"action": actions}, num_samples=1)[:, 0]
        wrong = (future.float() - clip[:, 2:].float()).abs() > 0.5 * (1 if prior.accepts == "codes" else 2)
        return 1 - wrong.flatten(2).float().mean(-1).gt(0.25).float().mean().item()

    assert share_right(actions) > 0.9
    assert share_right(actions.roll(1, 0)) < 0.6
