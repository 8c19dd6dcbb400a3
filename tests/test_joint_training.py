"""Prior and decoder trained together: the lookup that gradients pass through, the loss, what moves, and the tool."""

import argparse
import math
import os
import runpy
import signal

import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from tiny import TINY_TOKENIZERS, random_frames, tiny_prior, tiny_tokenizer
from tiny_experiment import (
    TOOLS,
    assert_same_checkpoints,
    call_tool,
    run_ranks,
    run_tool,
    tiny_config,
    write_experiment,
)

from latentcast import (
    VQVAE,
    JointModule,
    STPixelCNN,
    VideoDataModule,
    VideoPredictionPipeline,
    VideoTransformer,
    instantiate,
    load_config,
    load_model,
)
from latentcast.cli import UserError
from latentcast.config import to_container
from latentcast.modeling import fingerprint
from latentcast.training.metrics_file import read_metrics
from latentcast.training.run import TrainingRun

DISCRETE = [name for name in TINY_TOKENIZERS if TINY_TOKENIZERS[name]().is_discrete]
SMALL = {"n_frames": 4, "dim": 16, "n_blocks": 1, "block_layers": 1, "n_heads": 2, "head_dim": 8}
PRIOR = ["prior._target_=latentcast.STPixelCNN", *(f"prior.{name}={value}" for name, value in SMALL.items())]
JOINT = [*PRIOR, "joint=true"]
N_CONTEXT = 1


def one_hot(tokenizer, codes):
    sizes = tokenizer.latent_spec["codebook_sizes"]
    return [F.one_hot(column, size).float() for column, size in zip(codes.unbind(-1), sizes)]


def grids(tokenizer):
    """Random codes (2, 3, h, w, n), and for each codebook a distribution whose largest weight is on them."""
    spec = tokenizer.latent_spec
    torch.manual_seed(0)
    shape = (2, 3, spec["height"], spec["width"])
    codes = torch.stack([torch.randint(size, shape) for size in spec["codebook_sizes"]], -1)
    soft = [torch.randn(*shape, size).softmax(-1) for size in spec["codebook_sizes"]]
    return codes, [0.5 * s + 0.5 * hard for s, hard in zip(soft, one_hot(tokenizer, codes))]


# The lookup ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", DISCRETE)
def test_one_hot_weights_give_exactly_the_latents_of_their_codes(name):
    tokenizer = tiny_tokenizer(name)
    codes, _ = grids(tokenizer)
    for precision in (torch.float32, torch.bfloat16):
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == torch.bfloat16):
            found = tokenizer.weights_to_latents([w.to(precision) for w in one_hot(tokenizer, codes)])
        assert found.dtype == torch.float32 and found.is_contiguous()
        assert torch.equal(found, tokenizer.codes_to_latents(codes))


@pytest.mark.parametrize("name", DISCRETE)
def test_weights_mix_the_codes_below_the_likeliest_path(name):
    """Against a sum over all codes of every codebook, one after the other, by ``codes_to_latents``."""
    tokenizer = tiny_tokenizer(name)
    codes, weights = grids(tokenizer)
    layered = "n_layers" in tokenizer.config
    expected = tokenizer.codes_to_latents(codes).double()
    for k, w in enumerate(weights):

        def latents(codes, k=k):
            return tokenizer.codes_to_latents(codes, *([k + 1] if layered else [])).double()

        for code in range(w.shape[-1]):
            other = codes.clone()
            other[..., k] = code
            expected = expected + w[..., code].double()[:, :, None] * (latents(other) - latents(codes))
    torch.testing.assert_close(tokenizer.weights_to_latents(weights).double(), expected, atol=1e-5, rtol=1e-5)

    # Along a straight line with the same path they are linear, so the gradient must tell the whole difference.
    direction = torch.randn(expected.shape)
    leaves = [w.clone().requires_grad_() for w in weights]
    before = (tokenizer.weights_to_latents(leaves) * direction).sum()
    gradients = torch.autograd.grad(before, leaves)
    ends = one_hot(tokenizer, codes)
    after = (tokenizer.codes_to_latents(codes) * direction).sum()
    difference = sum((g * (end - w)).sum() for g, end, w in zip(gradients, ends, weights))
    assert difference.item() == pytest.approx((after - before).item(), rel=1e-3, abs=1e-3)
    assert all(g.any() for g in gradients)


@pytest.mark.parametrize("name", ["sliced_vqvae", "lfq", "diffusers_vq", "hr_vqvae", "pixel"])
def test_bad_weights_are_one_clear_line(name):
    tokenizer = tiny_tokenizer(name)
    _, weights = grids(tokenizer)
    cut = [w[..., 1:] for w in weights]
    for bad in (weights[:-1], cut, [w[0] for w in weights], [w.long() for w in weights], [None for _ in weights]):
        with pytest.raises(ValueError, match="weights: expected") as error:
            tokenizer.weights_to_latents(bad)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["kl_vae", "diffusers_kl", "continuous_pixel"])
def test_continuous_tokenizers_have_no_weights(name):
    with pytest.raises(ValueError, match="continuous tokenizer"):
        tiny_tokenizer(name).weights_to_latents([])


@pytest.mark.parametrize("name", DISCRETE)
def test_decoder_parameters_are_those_that_decoding_alone_uses(name):
    tokenizer = tiny_tokenizer(name)
    frames = random_frames(tokenizer)
    encoded = tokenizer.encode(frames)
    found = {id(p) for p in tokenizer.decoder_parameters()}
    if not found:
        assert next(tokenizer.parameters(), None) is None
        return
    tokenizer.decode(encoded.latents.detach()).square().sum().backward()
    assert found == {id(p) for p in tokenizer.parameters() if p.grad is not None}
    with torch.no_grad():
        for parameter in tokenizer.decoder_parameters():
            parameter.add_(1)
    after = tokenizer.encode(frames)
    assert torch.equal(after.codes, encoded.codes) and torch.equal(after.latents, encoded.latents)


@pytest.mark.parametrize("name", [name for name in DISCRETE if name != "pixel"])
def test_decoder_loss_is_the_first_term_of_the_training_loss(name):
    tokenizer = tiny_tokenizer(name)
    frames = random_frames(tokenizer)
    loss, logs = tokenizer.decoder_loss(tokenizer.encode(frames).latents, frames)
    assert loss.item() == pytest.approx(tokenizer(frames).logs["reconstruction_loss"].item(), rel=1e-5)
    assert logs["reconstruction_loss"] == loss


def test_decoder_loss_passes_gradients_where_decode_clamps():
    tokenizer = VQVAE(height=16, width=16, hidden_channels=16, embedding_dim=8, output_activation="linear")
    torch.nn.init.constant_(tokenizer.decoder[-1].bias, 5.0)
    latents = torch.randn(1, 2, 8, 4, 4, requires_grad=True)
    assert not torch.autograd.grad(tokenizer.decode(latents).sum(), latents)[0].any()
    loss, _ = tokenizer.decoder_loss(latents, torch.zeros(1, 2, 3, 16, 16))
    assert torch.autograd.grad(loss, latents)[0].all()


# The loss -----------------------------------------------------------------------------------------------------------


def joint_module(tokenizer="hr_vqvae", seed=0, **options):
    torch.manual_seed(seed)
    tokenizer = tiny_tokenizer(tokenizer)
    prior = STPixelCNN(tokenizer.latent_spec, **SMALL)
    optimizer = torch.optim.AdamW
    return JointModule(prior, tokenizer, optimizer, n_context=N_CONTEXT, **options)


def gradients(module, batch):
    """-> those of the prior and those of the tokenizer, by name; the same random numbers each time."""
    module.zero_grad()
    torch.manual_seed(0)
    module.compute(batch).loss.backward()
    sides = (module.model, module.tokenizer)
    return [{name: p.grad.clone() for name, p in side.named_parameters() if p.grad is not None} for side in sides]


@pytest.mark.parametrize("name", ["hr_vqvae", "gradient_hr_vqvae", "sliced_vqvae", "lfq"])
def test_loss_is_cross_entropy_plus_the_predicted_futures_distance(name):
    module = joint_module(name, weight=0.7).eval()
    tokenizer, frames = module.tokenizer, random_frames(module.tokenizer, n_frames=4)
    output = module.compute({"frames": frames})
    codes = tokenizer.encode(frames).codes
    clean = module.model(codes, N_CONTEXT)
    choice = torch.stack([x.argmax(-1) for x in clean.logits], -1)
    assert choice.shape == codes[:, N_CONTEXT:].shape
    drawn = tokenizer.decode(tokenizer.codes_to_latents(choice))
    distance = (drawn - frames[:, N_CONTEXT:]).square().mean()
    assert output.loss.item() == pytest.approx((clean.loss + 0.7 * distance).item(), rel=1e-5)
    assert output.logs["cross_entropy"] == clean.loss
    assert output.logs["reconstruction_loss"].item() == pytest.approx(distance.item(), rel=1e-5)
    assert output.logs.keys() > clean.logs.keys()


@pytest.mark.parametrize("bridge", ["none", "straight_through", "gumbel"])
def test_gradients_reach_the_decoder_and_over_a_bridge_the_prior(bridge):
    module = joint_module(weight=2.0, bridge=bridge).train()
    frames = random_frames(module.tokenizer, n_frames=4)
    prior, tokenizer = gradients(module, {"frames": frames})
    decoder = {n for n, p in module.tokenizer.named_parameters() if n.startswith("decoder.")}
    assert tokenizer.keys() == decoder and all(g.any() for g in tokenizer.values())

    module.model.zero_grad()
    torch.manual_seed(0)
    module.model(module.tokenizer.encode(frames).codes, N_CONTEXT).loss.backward()
    alone = {n: p.grad for n, p in module.model.named_parameters()}
    assert prior.keys() == alone.keys()
    assert all(torch.equal(prior[n], alone[n]) for n in alone) == (bridge == "none")


@pytest.mark.parametrize("temperature", [1.0, 0.3])
def test_straight_through_looks_up_the_likeliest_code_and_has_the_softmax_gradient(temperature):
    module = joint_module("vqvae", bridge="straight_through", temperature=temperature).train()
    codebook = module.tokenizer.quantizer.codebooks[0].codebook
    logits = torch.randn(1, 2, 4, 4, len(codebook), requires_grad=True)
    latents = module.predict([logits])
    assert torch.equal(latents, module.tokenizer.codes_to_latents(logits.argmax(-1)[..., None]))
    direction = torch.randn_like(latents)
    (found,) = torch.autograd.grad((latents * direction).sum(), logits)
    p = (logits / temperature).softmax(-1).detach()
    score = direction.movedim(2, -1) @ codebook.T  # what each code would add
    expected = p * (score - (p * score).sum(-1, keepdim=True)) / temperature
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("temperature", [1.0, 0.2])
def test_gumbel_draws_codes_from_the_prior_and_eval_mode_takes_the_likeliest(temperature):
    module = joint_module("vqvae", bridge="gumbel", temperature=temperature).train()
    spec = module.tokenizer.latent_spec
    torch.manual_seed(1)
    row = torch.randn(spec["codebook_sizes"][0])
    n = 16 * 400
    logits = row.expand(100, 4, 4, 4, -1)
    drawn = module.tokenizer.latents_to_codes(module.predict([logits]))
    share = torch.bincount(drawn.flatten(), minlength=len(row)) / drawn.numel()
    p = row.softmax(-1)
    assert drawn.numel() == n and ((share - p).abs() < 4.5 * (p * (1 - p) / n).sqrt()).all()
    assert (module.tokenizer.latents_to_codes(module.eval().predict([logits])) == row.argmax()).all()


def test_the_decoder_learns_to_draw_what_the_prior_predicts():
    """A prior that is always wrong: with no bridge it stays so, and the decoder draws its codes as the true frames."""
    module = joint_module("vqvae", weight=1.0).train()
    frames = random_frames(module.tokenizer, batch=1, n_frames=2, seed=3).expand(4, -1, -1, -1, -1)
    module.model.requires_grad_(False)
    optimizer = torch.optim.Adam(module.tokenizer.decoder_parameters(), 1e-2)
    before = module.eval().compute({"frames": frames}).logs
    for _ in range(60):
        optimizer.zero_grad()
        module.train().compute({"frames": frames}).loss.backward()
        optimizer.step()
    after = module.eval().compute({"frames": frames}).logs
    assert after["reconstruction_loss"] < 0.8 * before["reconstruction_loss"]
    assert after["cross_entropy"] == before["cross_entropy"]


def test_the_tokenizer_stays_in_eval_mode_and_its_encoder_in_fp32():
    module = joint_module()
    module.eval().train()
    assert module.model.training and not any(part.training for part in module.tokenizer.modules())
    frames = random_frames(module.tokenizer, n_frames=4)
    seen = []
    hook = module.model.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
    with torch.autocast("cpu", torch.bfloat16):
        module.compute({"frames": frames})
    hook.remove()
    assert torch.equal(seen[0], module.tokenizer.encode(frames).codes)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"weight": -1.0}, "joint_training.weight: expected at least 0, found -1.0"),
        ({"weight": float("nan")}, "joint_training.weight: expected at least 0, found nan"),
        ({"bridge": "st"}, "joint_training.bridge: expected one of none, straight_through, gumbel, found 'st'"),
        ({"temperature": 0.0}, "joint_training.temperature: expected more than 0, found 0.0"),
        ({"tokenizer": "pixel"}, "joint training: PixelTokenizer has no decoder to train"),
        ({"tokenizer": "kl_vae"}, "joint training: KLVAE has no codes"),
        ({"prior": "recurrent_vae_latents"}, "joint training: expected a prior over codes, found RecurrentVAE"),
    ],
)
def test_what_cannot_be_trained_jointly_is_refused(options, message):
    tokenizer = tiny_tokenizer(options.get("tokenizer", "hr_vqvae"))
    prior = tiny_prior(options["prior"]) if "prior" in options else joint_module().model
    options = {name: value for name, value in options.items() if name not in ("tokenizer", "prior")}
    with pytest.raises(ValueError) as error:
        JointModule(prior, tokenizer, torch.optim.AdamW, **options)
    assert str(error.value) == message


def test_a_prior_that_does_not_predict_all_codes_at_once_is_refused_by_name():
    tokenizer = tiny_tokenizer("vqvae")
    small = {"n_frames": 4, "subscale": [4, 1, 1], "dim": 8, "embed_dim": 8, "n_heads": 1, "head_dim": 8, "n_layers": 1}
    module = JointModule(VideoTransformer(tokenizer.latent_spec, **small), tokenizer, torch.optim.AdamW)
    with pytest.raises(ValueError, match=r"^joint training: VideoTransformer gives no logits: .* in one pass$"):
        module.compute({"frames": random_frames(tokenizer, n_frames=4)})


# The tool -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def encoded(tmp_path_factory):
    """A folder whose run has an HR-VQVAE and a latents cache."""
    folder = tmp_path_factory.mktemp("joint")
    call_tool("train_tokenizer", folder, *HR_VQVAE)
    call_tool("encode_dataset", folder, *HR_VQVAE)
    return folder


HR_VQVAE = [
    "tokenizer._target_=latentcast.HRVQVAE",
    *("tokenizer.in_channels=1", "tokenizer.height=16", "tokenizer.width=16", "tokenizer.stride=8"),
    *("tokenizer.hidden_channels=16", "tokenizer.residual_channels=8", "tokenizer.n_residual_blocks=1"),
    *("tokenizer.embedding_dim=8", "tokenizer.n_layers=2", "tokenizer.codebook_size=4"),
    "tokenizer.codebook_update=gradient",  # codes that an optimizer could move, or its weight decay
]


def call(folder, *overrides):
    return call_tool("train_prior", folder, *HR_VQVAE, *overrides)


def borrow(encoded, folder, *names):
    """-> folder/run, a run that has these parts of the encoded one."""
    run = folder / "run"
    run.mkdir()
    for name in names:
        (run / name).symlink_to(encoded / "run" / name)
    return run


def curves(folder, stage="joint"):
    figures = {}
    for step, name, value in read_metrics(folder / "metrics" / f"{stage}.csv"):
        figures.setdefault(name, {})[step] = value
    return figures


def files(folder, *names):
    """path -> when it was written, of everything below some folders of a run."""
    return {path: path.stat().st_mtime_ns for name in names for path in (folder / "run" / name).rglob("*")}


def test_with_weight_zero_the_prior_is_trained_exactly_as_alone(encoded, tmp_path):
    """Both through the tools: the same clips, once as frames and once out of the cache, past the first epoch."""
    run = borrow(encoded, tmp_path, "tokenizer", "latents")
    steps = [*PRIOR, "trainer.max_steps=7", "optimizer.lr=0.01"]
    together = call(tmp_path, *steps, "joint=true", "joint_training.weight=0")
    apart = call(tmp_path, *steps)
    found, expected = (load_model(figures["prior"]).state_dict() for figures in (together, apart))
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    checkpoints = [torch.load(run / f"{stage}_training/last.ckpt", weights_only=True) for stage in ("joint", "prior")]
    assert str(checkpoints[0]["optimizer_states"]) == str(checkpoints[1]["optimizer_states"])
    assert curves(run)["train/loss"] == curves(run, "prior")["train/loss"]
    assert together["val"]["loss"] == apart["val"]["loss"] == together["val"]["cross_entropy"]
    assert fingerprint(load_model(together["tokenizer"])) == fingerprint(load_model(run / "tokenizer"))


@pytest.mark.parametrize("bridge", ["none", "gumbel"])
def test_only_prior_and_decoder_move(encoded, tmp_path, bridge):
    run = borrow(encoded, tmp_path, "tokenizer")
    options = ["optimizer.lr=0.01", "optimizer.weight_decay=0.5", f"joint_training.bridge={bridge}"]
    figures = call(tmp_path, *JOINT, *options)
    before, after = load_model(run / "tokenizer"), load_model(figures["tokenizer"])
    assert before.latent_spec == after.latent_spec
    found, expected = after.state_dict(), before.state_dict()
    moved = {name for name in expected if not torch.equal(found[name], expected[name])}
    assert moved == {name for name in expected if name.startswith("decoder.")}


def test_lambda_reaches_the_prior_over_a_bridge_alone_also_where_gradients_are_clipped(encoded, tmp_path):
    def prior_after(name, *overrides):
        borrow(encoded, (tmp_path / name).mkdir() or tmp_path / name, "tokenizer")
        clipped = ["trainer.gradient_clip_val=0.01", "trainer.max_steps=2"]
        plain = ["optimizer._target_=torch.optim.SGD", "optimizer.lr=1", *clipped]
        call(tmp_path / name, *JOINT, *plain, *overrides)
        return load_model(tmp_path / name / "run/joint/prior").state_dict()

    few = prior_after("few", "joint_training.weight=0.1")
    many = prior_after("many", "joint_training.weight=1000")
    assert all(torch.equal(few[name], many[name]) for name in few)
    bridged = prior_after("bridged", "joint_training.weight=1000", "joint_training.bridge=straight_through")
    assert not all(torch.equal(few[name], bridged[name]) for name in few)


def test_it_goes_on_with_the_prior_that_was_trained_alone(encoded, tmp_path):
    """At a learning rate of 0 both stages come out as they went in."""
    run = borrow(encoded, tmp_path, "tokenizer")
    prior = STPixelCNN(load_model(run / "tokenizer").latent_spec, **SMALL)
    prior.save_pretrained(run / "prior")
    figures = call(tmp_path, *JOINT, "optimizer.lr=0")
    assert fingerprint(load_model(figures["prior"])) == fingerprint(prior)
    assert fingerprint(load_model(figures["tokenizer"])) == fingerprint(load_model(run / "tokenizer"))


def test_the_tool_leaves_both_stages_and_itself_in_order(encoded):
    """The prior alone, jointly (as a process), jointly for longer; then the prior alone once more."""
    run = encoded / "run"
    settings = [*PRIOR, "optimizer.lr=0.01", "preview.num_samples=1", "preview.figures=[futures, training_joint]"]
    call(encoded, *settings)
    kept = ("tokenizer", "latents", "prior", "prior_training")
    before = files(encoded, *kept)
    status, figures, err = run_tool("train_prior", encoded, *HR_VQVAE, *settings, "joint=true")
    assert status == 0, err
    assert f"joint training starts with the prior in {run / 'prior'}" in err and "Warning" not in err
    assert figures["steps"] == 4 and set(figures["val"]) >= {"loss", "cross_entropy", "reconstruction_loss"}
    first = load_model(figures["tokenizer"]).state_dict()

    figures = call(encoded, *settings, "joint=true", "resume=true", "trainer.max_steps=6")
    assert figures["steps"] == 6 and files(encoded, *kept) == before
    second = load_model(figures["tokenizer"])
    assert not torch.equal(second.state_dict()["decoder.0.weight"], first["decoder.0.weight"])
    pipeline = VideoPredictionPipeline.from_pretrained(figures["pipeline"])
    assert fingerprint(pipeline.tokenizer) == fingerprint(second) != fingerprint(load_model(run / "tokenizer"))
    assert fingerprint(pipeline.prior) == fingerprint(load_model(figures["prior"]))
    future = pipeline(torch.zeros(1, 2, 1, 16, 16), n_frames=3, num_samples=2).frames
    assert future.shape == (1, 2, 3, 1, 16, 16) and future.isfinite().all()
    same = VideoPredictionPipeline.from_pretrained(run / "joint")
    assert fingerprint(same.tokenizer) == fingerprint(second)

    pictures = [path.name for path in (run / "previews/joint").iterdir()]
    assert {f"step_{step:07d}.{suffix}" for step in (4, 6) for suffix in ("mp4", "gif", "png")} == set(pictures)
    assert (run / "config_joint.yaml").is_file() and (run / "metrics/joint_curves.png").is_file()
    logged = curves(run)
    for step in range(1, 7):
        total = logged["train/cross_entropy"][step] + logged["train/reconstruction_loss"][step]
        assert logged["train/loss"][step] == pytest.approx(total, rel=1e-5)

    joint = files(encoded, "joint", "joint_training")
    figures = call(encoded, *PRIOR, "overwrite=true")
    assert files(encoded, "joint", "joint_training") == joint
    pipeline = VideoPredictionPipeline.from_pretrained(figures["pipeline"])
    assert fingerprint(pipeline.tokenizer) == fingerprint(load_model(run / "tokenizer"))


@pytest.mark.parametrize(
    "overrides, message",
    [
        (["prior.dim=24"], "run/prior: trained with prior.dim=16, asked for 24; train it again with overwrite=true"),
        (["prior=video_transformer"], "run/prior: trained with prior._target_=STPixelCNN, asked for VideoTransformer"),
        (["joint_training.bridge=st"], "joint_training.bridge: expected one of none, straight_through, gumbel"),
        (["joint_training.lambda=1"], "unknown key 'joint_training.lambda'"),
        (["joint=yes please"], "joint: expected true or false, found 'yes please'"),
        (["prior=null"], "prior: the experiment names none; choose one by prior=NAME"),
        (["trainer.precision=bf16-true"], "trainer.precision: joint training keeps the encoder .*; take bf16-mixed"),
    ],
)
def test_mistakes_are_one_clear_line(encoded, tmp_path, overrides, message):
    run = borrow(encoded, tmp_path, "tokenizer")
    prior = STPixelCNN(load_model(run / "tokenizer").latent_spec, **SMALL)
    prior.save_pretrained(run / "prior")
    swapped = any(override.startswith("prior=") for override in overrides)
    with pytest.raises((ValueError, UserError), match=message) as error:
        call(tmp_path, "joint=true", *([] if swapped else PRIOR), *overrides)
    assert "\n" not in str(error.value) and not (run / "joint").exists()


class Stop(pl.Callback):
    """Asks this process to end in the middle of a step."""

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        if trainer.global_step == 4:
            os.kill(os.getpid(), signal.SIGTERM)


def fit(config, tokenizer, callbacks=()):
    """-> the TrainingRun after a joint training, its last checkpoint."""
    with TrainingRun.open(config, "joint") as run:
        pass
    pl.seed_everything(config.seed)
    data = VideoDataModule(instantiate(config.data), config.batch_size, 0, config.seed)
    tokenizer = load_model(tokenizer)
    prior = instantiate(config.prior, latent_spec=tokenizer.latent_spec)
    optimizer = instantiate(config.optimizer)
    options = to_container(config.joint_training)
    run.fit(JointModule(prior, tokenizer, optimizer, n_context=N_CONTEXT, **options), data, callbacks)
    return run, torch.load(run.last, weights_only=True)


def test_a_stopped_run_goes_on_as_if_it_had_not_been_stopped(encoded, tmp_path):
    tokenizer = encoded / "run/tokenizer"
    settings = [*JOINT, "trainer.max_steps=7", "joint_training.bridge=gumbel", "optimizer.lr=0.01"]
    whole, expected = fit(tiny_config(tmp_path, *settings, f"run_dir={tmp_path}/whole"), tokenizer)
    half = [*settings, f"run_dir={tmp_path}/half"]
    with pytest.raises(KeyboardInterrupt):
        fit(tiny_config(tmp_path, *half), tokenizer, [Stop()])
    resumed, found = fit(tiny_config(tmp_path, *half, "resume=true"), tokenizer)
    assert_same_checkpoints(found, expected)
    assert curves(whole.run_dir)["train/loss"] == curves(resumed.run_dir)["train/loss"]
    moved, average = found["current_model_state"], found["state_dict"]
    assert not torch.equal(moved["tokenizer.decoder.0.weight"], average["tokenizer.decoder.0.weight"])
    assert torch.equal(moved["tokenizer.encoder.0.weight"], average["tokenizer.encoder.0.weight"])


def test_two_processes_train_together(encoded, tmp_path):
    borrow(encoded, tmp_path, "tokenizer")
    two = ["trainer.devices=2", "trainer.strategy=ddp", "trainer.max_steps=2", "batch_size=4"]
    bridge = "joint_training.bridge=straight_through"
    (status, figures, err), (other, *_) = run_ranks(
        "train_prior", tmp_path, write_experiment(tmp_path), *HR_VQVAE, *JOINT, *two, bridge
    )
    assert status == other == 0, err
    assert figures["steps"] == 2 and "no trained prior here, joint training starts with a new one" in err
    VideoPredictionPipeline.from_pretrained(figures["pipeline"])


def test_the_experiment_with_a_bridge(tmp_path):
    """shrvqvae_tiny, both tools as a user calls them, at a smaller size: over its bridge lambda reaches the prior."""
    small = ["frame_size=16", "data.digit_size=8", "data.n_videos=16", "data.n_heldout_videos=8", "clip_length=6"]
    small += ["tokenizer.hidden_channels=8", "tokenizer.residual_channels=4", "tokenizer.stride=4", "prior.dim=16"]
    small += ["prior.head_dim=8", "batch_size=4", "trainer.max_steps=2", "trainer.accelerator=cpu", "preview.n_clips=1"]
    small += ["data.video_length=6", "preview.num_samples=1", "wandb.mode=disabled", f"run_dir={tmp_path}/run"]
    small += ["trainer.enable_progress_bar=false", "trainer.enable_model_summary=false", "overwrite=true"]
    small += ["prior.attention=none", "trainer.limit_val_batches=1"]

    def call(tool, *overrides):
        arguments = argparse.Namespace(experiment="shrvqvae_tiny", overrides=[*small, *overrides])
        return runpy.run_path(str(TOOLS / f"{tool}.py"))["main"](arguments)

    call("train_tokenizer", "clip_length=1")
    assert load_config("shrvqvae_tiny", tool="train_jointly").joint_training.bridge == "straight_through"
    found = {}
    for name, overrides in {
        "bridge": ["joint_training.weight=100"],
        "lighter": ["joint_training.weight=1"],
    }.items():
        figures = call("train_prior", "joint=true", "trainer.gradient_clip_val=null", *overrides)
        assert figures["steps"] == 2 and all(math.isfinite(value) for value in figures["val"].values())
        found[name] = fingerprint(load_model(figures["prior"]))
    assert found["bridge"] != found["lighter"]
    VideoPredictionPipeline.from_pretrained(figures["pipeline"])
