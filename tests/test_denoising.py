"""The loop of the diffusion priors, against closed forms and diffusers' own pipeline of steps."""

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    EDMEulerScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
    KDPM2DiscreteScheduler,
)

from latentcast.priors.denoising import (
    SCHEDULERS,
    clean_sample,
    denoise,
    make_scheduler,
    min_snr_weight,
    network_output,
    noise_schedule,
    noised,
)


def oracle(scheduler, mean, std, kind):
    """The best network for data N(mean, std^2): E[x_0 | x_t] in closed form, as the output that ``kind`` names."""

    def predict(x, t):
        alpha_bar = scheduler.alphas_cumprod[int(t[0])].to(x)
        gain = alpha_bar.sqrt() * std**2 / (alpha_bar * std**2 + 1 - alpha_bar)
        return network_output(mean + gain * (x - alpha_bar.sqrt() * mean), x, alpha_bar, kind)

    return predict


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("betas", ["linear", "cosine"])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_scheduler_finds_the_data(name, betas, kind):
    schedule = noise_schedule(1000, betas, kind)
    scheduler = make_scheduler(name, schedule)
    noise = torch.randn(4000, 1, generator=torch.Generator().manual_seed(0))
    predict = oracle(scheduler, 0.4, 0.3, kind)
    n_steps = 1000 if name == "ddpm" else 50
    x = denoise(predict, noise, scheduler, n_steps, torch.Generator().manual_seed(1))
    assert x.mean().item() == pytest.approx(0.4, abs=0.03) and x.std().item() == pytest.approx(0.3, abs=0.03)


@pytest.mark.parametrize("steps", ["", "_logsnr"])
def test_stochastic_solvers_forget_the_errors_of_the_noisiest_steps(steps):
    """A network that errs by a hundredth in epsilon, in the noisier half of the process."""
    schedule = noise_schedule(1600, "cosine", "epsilon")
    noise = torch.randn(4000, 1, generator=torch.Generator().manual_seed(0))
    off = {}
    for name in (f"dpmsolver++{steps}", f"sde-dpmsolver++{steps}"):
        scheduler = make_scheduler(name, schedule)
        best = oracle(scheduler, 0.0, 0.03, "epsilon")

        def predict(x, t, best=best):
            return best(x, t) + 0.01 * (t[0] > 800)

        x = denoise(predict, noise, scheduler, 25, torch.Generator().manual_seed(1), clamp=1.0)
        off[name] = x.mean().abs().item()
    assert off[f"sde-dpmsolver++{steps}"] < off[f"dpmsolver++{steps}"] / 2


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("scheduler_class", [DDPMScheduler, DDIMScheduler])
def test_clamping_is_that_of_diffusers(scheduler_class, kind):
    schedule = noise_schedule(20, "cosine", kind)
    noise = torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(0))

    def predict(x, t):
        return torch.sin(3 * x) * 2

    theirs = scheduler_class(**schedule, clip_sample=True, clip_sample_range=0.7, timestep_spacing="trailing")
    expected = noise
    generator = torch.Generator().manual_seed(2)
    theirs.set_timesteps(20)
    for t in theirs.timesteps:
        options = {"use_clipped_model_output": True} if scheduler_class is DDIMScheduler else {}
        expected = theirs.step(predict(expected, t), t, expected, generator=generator, **options).prev_sample
    name = "ddpm" if scheduler_class is DDPMScheduler else "ddim"
    generator = torch.Generator().manual_seed(2)
    found = denoise(predict, noise, make_scheduler(name, schedule), 20, generator, clamp=0.7)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("betas", ["linear", "cosine"])
@pytest.mark.parametrize("name", ["dpmsolver++", "dpmsolver++_logsnr", "sde-dpmsolver++_logsnr", "unipc"])
def test_the_clamp_holds_in_what_the_scheduler_makes_of_it(name, betas):
    scheduler = make_scheduler(name, noise_schedule(1000, betas, "epsilon"))
    convert, found = scheduler.convert_model_output, []

    def record(*arguments, **options):
        found.append(convert(*arguments, **options))
        return found[-1]

    scheduler.convert_model_output = record
    noise = torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    denoise(lambda x, t: torch.sin(3 * x), noise, scheduler, 25, torch.Generator().manual_seed(1), clamp=0.7)
    assert len(found) == 25 and all(x_0.abs().max() < 0.72 for x_0 in found)


@pytest.mark.parametrize("component", [HeunDiscreteScheduler, KDPM2DiscreteScheduler])
def test_clamping_hardly_changes_what_lies_within_the_bound(component):
    schedule = noise_schedule(1000, "linear", "epsilon")
    noise = torch.randn(500, 1, generator=torch.Generator().manual_seed(0))
    found = []
    for clamp in (None, 4.0):
        scheduler = make_scheduler(component(), schedule)
        found.append(denoise(oracle(scheduler, 0.4, 0.3, "epsilon"), noise, scheduler, 50, clamp=clamp))
    torch.testing.assert_close(*found, rtol=0, atol=0.02)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_outputs_and_clean_samples_are_inverse(kind):
    x, x_0 = torch.randn(2, 5, 3, dtype=torch.float64)
    alpha_bar = torch.tensor(0.3, dtype=torch.float64)
    output = network_output(x_0, x, alpha_bar, kind)
    torch.testing.assert_close(clean_sample(output, x, alpha_bar, kind), x_0)


def test_a_component_keeps_its_options_and_takes_the_forward_process_of_the_training():
    schedule = noise_schedule(30, "cosine", "v_prediction")
    component = DDIMScheduler(77, trained_betas=[0.1] * 77, rescale_betas_zero_snr=True, set_alpha_to_one=False)
    scheduler = make_scheduler(component, schedule)
    assert isinstance(scheduler, DDIMScheduler) and scheduler is not component
    assert scheduler.config.num_train_timesteps == 30 and scheduler.config.prediction_type == "v_prediction"
    assert not scheduler.config.set_alpha_to_one
    torch.testing.assert_close(scheduler.alphas_cumprod, make_scheduler("ddpm", schedule).alphas_cumprod)


@pytest.mark.parametrize("component", [DDIMScheduler(), DDPMScheduler()])  # which clip x_0 to [-1, 1] by default
def test_a_component_does_not_clip(component):
    scheduler = make_scheduler(component, noise_schedule(1000, "linear", "epsilon"))
    noise = torch.randn(4000, 1, generator=torch.Generator().manual_seed(0))
    x = denoise(oracle(scheduler, 0.0, 1.0, "epsilon"), noise, scheduler, 100, torch.Generator().manual_seed(1))
    assert x.std().item() == pytest.approx(1, abs=0.06) and x.abs().max() > 2.5


def test_unknown_names_and_step_counts_are_refused():
    schedule = noise_schedule(10, "linear", "epsilon")
    for call, message in (
        (lambda: make_scheduler("dppm", schedule), "scheduler: expected one of"),
        (lambda: make_scheduler(FlowMatchEulerDiscreteScheduler(), schedule), "scheduler: expected one with .* DDPM"),
        (lambda: make_scheduler(EDMEulerScheduler(), schedule), "scheduler: .* found EDMEulerScheduler"),
        (lambda: noise_schedule(0, "linear", "epsilon"), "n_diffusion_steps: expected a whole number of at least 1"),
        (lambda: noise_schedule(10, "quadratic", "epsilon"), "betas: expected"),
        (lambda: noise_schedule(10, "linear", "noise"), "prediction_type: expected"),
        (
            lambda: denoise(lambda x, t: x, torch.randn(1, 2), make_scheduler("ddim", schedule), 11),
            "n_steps: expected 1 to 10",
        ),
        (
            lambda: denoise(lambda x, t: x, torch.randn(1, 2), make_scheduler("ddim", schedule), 2.5),
            "n_steps: expected a whole number of at least 1, found 2.5",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            call()


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_training_pairs_are_those_of_diffusers(kind):
    scheduler = make_scheduler("ddpm", noise_schedule(50, "cosine", kind))
    x_0, noise = torch.randn(2, 6, 2, 3, 3)
    t = torch.tensor([0, 3, 17, 30, 48, 49])
    alpha_bar = scheduler.alphas_cumprod[t].view(-1, 1, 1, 1)
    x, target = noised(x_0, noise, alpha_bar, kind)
    torch.testing.assert_close(x, scheduler.add_noise(x_0, noise, t))
    expected = {"epsilon": noise, "v_prediction": scheduler.get_velocity(x_0, noise, t), "sample": x_0}[kind]
    torch.testing.assert_close(target, expected)


def test_min_snr_weighs_the_error_of_x_0_alike_for_every_kind_of_output():
    alpha_bar = torch.tensor([0.999, 0.9, 0.5, 0.1, 0.01], dtype=torch.float64)
    x_0, noise, guess = torch.randn(3, 5, dtype=torch.float64)
    for kind in ("epsilon", "v_prediction", "sample"):
        x, target = noised(x_0, noise, alpha_bar, kind)
        error = network_output(guess, x, alpha_bar, kind) - target
        snr = alpha_bar / (1 - alpha_bar)
        expected = torch.minimum(snr, torch.tensor(5.0)) * (guess - x_0) ** 2
        torch.testing.assert_close(min_snr_weight(alpha_bar, 5.0, kind) * error**2, expected)
