"""What the diffusion priors have in common: diffusers' schedulers by name, and the loop that denoises."""

import inspect
from collections.abc import Callable

import diffusers
import torch
from diffusers.utils.torch_utils import randn_tensor
from jaxtyping import Float
from torch import Tensor

from latentcast.config import check_counts, one_line

# name -> (class in diffusers, its arguments beyond the forward process). "trailing" steps begin at the noisiest time.
SCHEDULERS = {
    "ddpm": ("DDPMScheduler", {"clip_sample": False}),  # ancestral sampling
    "ddim": ("DDIMScheduler", {"clip_sample": False}),
    "dpmsolver++": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++", "solver_order": 2}),
    # the same with steps even in log-SNR (Lu et al. 2022): few even steps in time are too coarse where data are narrow
    "dpmsolver++_logsnr": (
        "DPMSolverMultistepScheduler",
        {"algorithm_type": "dpmsolver++", "solver_order": 2, "use_lu_lambdas": True},
    ),
    # Their stochastic forms: fresh noise at every step, as in ancestral sampling, wipes out what the noisiest steps did
    # wrong, where a small error in epsilon is a large one in x_0. The deterministic forms keep it.
    "sde-dpmsolver++": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++", "solver_order": 2}),
    "sde-dpmsolver++_logsnr": (
        "DPMSolverMultistepScheduler",
        {"algorithm_type": "sde-dpmsolver++", "solver_order": 2, "use_lu_lambdas": True},
    ),
    "unipc": ("UniPCMultistepScheduler", {}),
    "euler": ("EulerDiscreteScheduler", {}),
}


def noise_schedule(n_diffusion_steps: int, betas: str, prediction_type: str) -> dict[str, object]:
    """The forward process as diffusers' schedulers are configured.

    Args:
        n_diffusion_steps: N, the number of diffusion steps in training.
        betas: "linear" (Ho et al. 2020, from 1e-4 to .02) or "cosine" (Nichol and Dhariwal 2021).
        prediction_type: what the network predicts: "epsilon", "v_prediction" or "sample".
    Returns:
        what ``make_scheduler`` takes; JSON-able.
    Raises:
        ValueError: an unknown name, or no steps.
    """
    check_counts(n_diffusion_steps=n_diffusion_steps)
    names = {"linear": "linear", "cosine": "squaredcos_cap_v2"}
    if betas not in names:
        raise ValueError(f"betas: expected linear or cosine, found {betas!r}")
    if prediction_type not in ("epsilon", "v_prediction", "sample"):
        raise ValueError(f"prediction_type: expected epsilon, v_prediction or sample, found {prediction_type!r}")
    return {
        "num_train_timesteps": n_diffusion_steps,
        "beta_schedule": names[betas],
        "beta_start": 1e-4,
        "beta_end": 0.02,
        "prediction_type": prediction_type,
    }


def make_scheduler(scheduler: str | diffusers.SchedulerMixin, schedule: dict[str, object]) -> diffusers.SchedulerMixin:
    """A fresh scheduler of diffusers for a forward process.

    Args:
        scheduler: a name in ``SCHEDULERS``, or an instance (a pipeline's component), of which class and options are
            taken; the forward process is always that of the training, and x_0 is clamped by ``denoise`` alone.
        schedule: of ``noise_schedule``.
    Raises:
        ValueError: an unknown name, or a scheduler of another kind of process (flow matching, EDM).
    """
    if isinstance(scheduler, diffusers.SchedulerMixin):
        if not all(hasattr(scheduler, name) for name in ("alphas_cumprod", "init_noise_sigma")):
            raise ValueError(
                f"scheduler: expected one with the discrete noise levels of DDPM (alphas_cumprod), like DDIMScheduler, "
                f"found {type(scheduler).__name__}"
            )
        ours = {"clip_sample": False, "trained_betas": None, "rescale_betas_zero_snr": False}
        ours = {name: value for name, value in ours.items() if name in scheduler.config}
        return type(scheduler).from_config(scheduler.config, **schedule, **ours)
    if not isinstance(scheduler, str) or scheduler not in SCHEDULERS:
        raise ValueError(f"scheduler: expected one of {', '.join(SCHEDULERS)}, found {one_line(scheduler)}")
    name, options = SCHEDULERS[scheduler]
    return getattr(diffusers, name)(**schedule, **options, timestep_spacing="trailing")


def check_steps(n_steps: int, n_train: int) -> None:
    """Refuse numbers of denoising steps that a process of ``n_train`` diffusion steps cannot take."""
    check_counts(n_steps=n_steps)
    if n_steps > n_train:
        raise ValueError(f"n_steps: expected 1 to {n_train}, found {one_line(n_steps)}")


@torch.no_grad()
def denoise(
    predict: Callable[[Tensor, Tensor], Tensor],
    noise: Float[Tensor, "N ..."],
    scheduler: diffusers.SchedulerMixin,
    n_steps: int,
    generator: torch.Generator | list[torch.Generator] | None = None,
    clamp: float | Tensor | None = None,
    on_step: Callable[[], object] | None = None,
) -> Float[Tensor, "N ..."]:
    """Run the reverse process from noise to a sample.

    Args:
        predict: ``predict(x, t)`` -> the network's output for ``x`` (N, ...) at the times ``t`` (N,).
        noise: standard normal.
        scheduler: a fresh one, of ``make_scheduler``.
        n_steps: number of denoising steps.
        generator: of the noise that stochastic schedulers add.
        clamp: bound of the predicted clean sample |x_0| at every step, or None. Kept for every scheduler by handing it
            the output that belongs to the clamped x_0.
        on_step: called after every step, to move a progress bar.
    Returns:
        the sample, float32.
    Raises:
        ValueError: more steps than the process has, or fewer than one.
    """
    check_steps(n_steps, scheduler.config.num_train_timesteps)
    scheduler.set_timesteps(n_steps)  # its tables stay on the CPU: no step waits for a GPU
    if hasattr(scheduler, "set_begin_index"):  # else one whose first two times round to the same step skips one
        scheduler.set_begin_index(0)
    takes = inspect.signature(scheduler.step).parameters
    noisy = {"generator": generator} if "generator" in takes else {}
    # Drawn here, as the scheduler would draw it, which would wait until a GPU has it.
    stochastic = "variance_noise" in takes and scheduler.config.get("algorithm_type", "").startswith("sde-")
    source = generator[0] if isinstance(generator, list) else generator
    x = noise.float() * scheduler.init_noise_sigma
    seen = scheduler.timesteps.to(x.device, non_blocking=True)
    alpha_bars = _noise_levels(scheduler).to(x, non_blocking=True)
    for t, t_seen, alpha_bar in zip(scheduler.timesteps, seen, alpha_bars):
        if stochastic:
            fresh = randn_tensor(x.shape, generator, x.device if source is None else source.device, torch.float32)
            noisy = {"variance_noise": fresh.to(x.device, non_blocking=True)}
        scaled = scheduler.scale_model_input(x, t)
        output = predict(scaled, t_seen.expand(len(x))).float()
        if clamp is not None:
            output = _clamped(output, scaled, alpha_bar, scheduler.config.prediction_type, clamp)
        x = scheduler.step(output, t, x, **noisy).prev_sample
        if on_step is not None:
            on_step()
    return x


def _noise_levels(scheduler):
    """alpha_bar of each step (n_steps,), as the scheduler itself counts.

    Steps even in log-SNR lie between the times of training; the scheduler tells the network the nearest of those.
    """
    times, sigmas = scheduler.timesteps, getattr(scheduler, "sigmas", ())
    if len(sigmas) == len(times) + 1:
        return 1 / (1 + sigmas[:-1].double() ** 2)
    return scheduler.alphas_cumprod[times.long()]


def clean_sample(
    output: Float[Tensor, "*x"], x: Float[Tensor, "*x"], alpha_bar: Float[Tensor, "*#x"], prediction_type: str
) -> Float[Tensor, "*x"]:
    """The x_0 that a network's output stands for: (x - sqrt(1 - alpha_bar) epsilon) / sqrt(alpha_bar) for "epsilon"."""
    alpha, sigma = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
    if prediction_type == "epsilon":
        return (x - sigma * output) / alpha
    return alpha * x - sigma * output if prediction_type == "v_prediction" else output


def network_output(
    x_0: Float[Tensor, "*x"], x: Float[Tensor, "*x"], alpha_bar: Float[Tensor, "*#x"], prediction_type: str
) -> Float[Tensor, "*x"]:
    """The inverse of ``clean_sample``: what the network would have to say for ``x_0``."""
    alpha, sigma = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
    if prediction_type == "epsilon":
        return (x - alpha * x_0) / sigma
    return (alpha * x - x_0) / sigma if prediction_type == "v_prediction" else x_0


def _clamped(output, x, alpha_bar, prediction_type, bound):
    x_0 = clean_sample(output, x, alpha_bar, prediction_type).clamp(-bound, bound)
    return network_output(x_0, x, alpha_bar, prediction_type)


def precise(x: Float[Tensor, "*x"]) -> Float[Tensor, "*x"]:
    """x in at least fp32, whatever autocast or the weights made of it: bf16 rounds the least noise to none."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def noised(
    x_0: Float[Tensor, "*x"], noise: Float[Tensor, "*x"], alpha_bar: Float[Tensor, "*#x"], prediction_type: str
) -> tuple[Float[Tensor, "*x"], Float[Tensor, "*x"]]:
    """A training pair of the forward process.

    Args:
        x_0, noise: clean samples and standard normal noise.
        alpha_bar: of the times, broadcastable to them.
        prediction_type: of ``noise_schedule``.
    Returns:
        x_t = sqrt(alpha_bar) x_0 + sqrt(1 - alpha_bar) noise, and what the network should say for it.
    """
    alpha, sigma = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
    targets = {"epsilon": noise, "v_prediction": alpha * noise - sigma * x_0, "sample": x_0}
    return alpha * x_0 + sigma * noise, targets[prediction_type]


def min_snr_weight(alpha_bar: Float[Tensor, "*x"], gamma: float, prediction_type: str) -> Float[Tensor, "*x"]:
    """Weight of the squared error at each time: min(SNR, gamma) on x_0's (Hang et al. 2023, section 3.4).

    In terms of the other outputs: over SNR for "epsilon", over SNR + 1 for "v_prediction".
    """
    snr = alpha_bar / (1 - alpha_bar)
    weight = snr.clamp(max=gamma)
    return weight / {"epsilon": snr, "v_prediction": snr + 1, "sample": 1}[prediction_type]
