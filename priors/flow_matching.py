"""Flow matching (Lipman et al. 2023) on straight paths (rectified flow, Liu et al. 2023), with diffusers' schedulers.

The path from data x to noise e is x_s = (1 - s) x + s e, s from 0 to 1, its velocity e - x. Sampling follows the
predicted velocity from s = 1 (or where it begins) down to 0.
"""

from collections.abc import Callable

import diffusers
import torch
from jaxtyping import Float
from torch import Tensor

from latentcast.config import one_line

from .denoising import check_steps

SCHEDULERS = {"euler": "FlowMatchEulerDiscreteScheduler", "heun": "FlowMatchHeunDiscreteScheduler"}
MOST_STEPS = 100  # of a path that is next to straight
# Of ``make_scheduler``'s arguments, as ``Prior.sampler_ranges`` has them.
RANGES = {
    "n_steps": {"least": 1, "most": MOST_STEPS},
    "scheduler": {"choices": tuple(SCHEDULERS)},
    "start_time": {"least": 0.01, "most": 1},
    "shift": {"kind": float, "least": 0.01, "most": 100},
}


def interpolate(
    x: Float[Tensor, "*x"], noise: Float[Tensor, "*x"], s: float | Float[Tensor, "*#x"]
) -> Float[Tensor, "*x"]:
    """x_s = (1 - s) x + s e, where s broadcasts to x: Eq. 1 of Liu et al., from the data's side."""
    return (1 - s) * x + s * noise


def make_scheduler(
    scheduler: str | diffusers.SchedulerMixin, n_steps: int, start_time: float = 1.0, shift: float | None = None
) -> diffusers.SchedulerMixin:
    """A fresh scheduler of diffusers with its times set.

    Args:
        scheduler: a name in ``SCHEDULERS``, or an instance of such a class (a pipeline's component), of which class and
            options are taken.
        n_steps: of the solver; Heun's take two predictions each, but for the last. They are even in s, of n the first
            at ``start_time`` and the last at the n-th part of it.
        start_time: s where it begins.
        shift: moves the steps towards the noise, s -> shift s / (1 + (shift - 1) s) (Esser et al. 2024, Eq. 23). None:
            the scheduler's own, 1 of a named one.
    Raises:
        ValueError: an unknown name, a scheduler of another kind of process, or no such number of steps.
    """
    check_steps(n_steps, MOST_STEPS)
    classes = {name: getattr(diffusers, found) for name, found in SCHEDULERS.items()}
    # What needs to know the size of an image, or turns times around, is of other models.
    ours = {"use_dynamic_shifting": False, "invert_sigmas": False, "shift_terminal": None}
    ours |= {} if shift is None else {"shift": float(shift)}
    if isinstance(scheduler, tuple(classes.values())):
        ours = {name: value for name, value in ours.items() if name in scheduler.config}
        made = type(scheduler).from_config(scheduler.config, **ours)
    elif isinstance(scheduler, str) and scheduler in classes:
        made = classes[scheduler](shift=ours.get("shift", 1.0))
    else:
        raise ValueError(
            f"scheduler: expected one of {', '.join(SCHEDULERS)}, or one for flow matching like "
            f"{SCHEDULERS['euler']}, found {one_line(scheduler)}"
        )
    times = start_time * torch.arange(n_steps, 0, -1) / n_steps
    if isinstance(made, classes["euler"]):
        made.set_timesteps(sigmas=times.tolist())
    else:  # takes no times; what it would set itself ends a thousandth from the data, a step for nothing
        made.set_timesteps(n_steps)
        times = made.config.shift * times / (1 + (made.config.shift - 1) * times)
        twice = [times[:1], times[1:].repeat_interleave(2)]
        made.sigmas, made.timesteps = torch.cat([*twice, times.new_zeros(1)]), torch.cat(twice)
        made.timesteps = made.timesteps * made.config.num_train_timesteps
    made.set_begin_index(0)
    return made


@torch.no_grad()
def follow(
    predict: Callable[[Tensor, float], Tensor],
    x: Float[Tensor, "*x"],
    scheduler: diffusers.SchedulerMixin,
    generator: torch.Generator | None = None,
    on_step: Callable[[], object] | None = None,
) -> Float[Tensor, "*x"]:
    """Follow the velocity from where ``scheduler`` (of ``make_scheduler``) begins to the data.

    Args:
        predict: ``predict(x, s)`` -> the velocity of ``x`` at the time ``s``.
        x: at the first of its times.
        generator: of the noise that stochastic schedulers add.
        on_step: called after every prediction.
    Returns:
        x at the end, float32.
    """
    x = x.float()
    for t in scheduler.timesteps:  # on the CPU, as its tables are: no step waits for a GPU
        velocity = predict(x, t.item() / scheduler.config.num_train_timesteps).float()
        x = scheduler.step(velocity, t, x, generator=generator).prev_sample
        if on_step is not None:
            on_step()
    return x
