"""A neural stochastic differential equation over feature maps, solved on a fixed grid of times.

The steps of the default, Euler-Heun, are written out here, as are Euler's for an ODE; torchsde does all else: the other
solvers, the adjoint, and the divergence of a controlled equation.
"""

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
import torchsde
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn

from latentcast.shapes import Scalar

# The solvers of torchsde that diagonal noise can use without an area for each pair of its components.
SOLVERS = {
    "stratonovich": ("euler_heun", "heun", "midpoint", "milstein", "reversible_heun"),
    "ito": ("euler", "milstein", "srk"),
}
EXPLODED = 1e6  # |m| beyond which a solution has left every use
ON_GRID = 1e-4  # of a step: times that the rounding of float32 leaves so near to a grid point are taken to be there

Seeds = Sequence[tuple[int, ...]]  # of whole numbers of at least 0, one for each row
Control = Callable[[Tensor, float], Tensor]  # (m, time) -> u, like m
Told = Callable[[int], Tensor]  # k -> what the drift is told of the time from k - 1 to k, k from 1 on


class NeuralSDE(nn.Module):
    """dm = mu(m) dt + sigma(m) dW on maps m, with noise of its own for every number (diagonal).

    The solver steps on the grid 0, dt, 2 dt, ... whatever times are asked for, and the solution between two grid points
    is the straight line. So the value at a time never depends on the other times, and seeded paths (see ``forward``)
    agree bit by bit where they share a time.

    Args:
        drift: module m -> mu(m), of the same shape; where it is told something, (m, what it is told) -> mu.
        diffusion: module m -> sigma(m), of the same shape; None makes it an ODE, solved by Euler's method.
        sde_type: "stratonovich" or "ito", the sense of the integral over dW.
        solver: of torchsde, one in ``SOLVERS[sde_type]``.
        dt: the step, in units of time.
        adjoint: gradients by torchsde's stochastic adjoint, in constant memory and more time, instead of through the
            solver's steps.
    Raises:
        ValueError: an option that is not known or does not fit the others.
    """

    def __init__(
        self,
        drift: nn.Module,
        diffusion: nn.Module | None = None,
        sde_type: str = "stratonovich",
        solver: str = "euler_heun",
        dt: float = 0.1,
        adjoint: bool = False,
    ) -> None:
        super().__init__()
        if sde_type not in SOLVERS:
            raise ValueError(f"sde_type: expected one of {', '.join(SOLVERS)}, found {sde_type!r}")
        if solver not in SOLVERS[sde_type]:
            raise ValueError(f"solver: expected one of {', '.join(SOLVERS[sde_type])} ({sde_type}), found {solver!r}")
        if not 0 < dt <= 1:
            raise ValueError(f"dt: expected above 0 and at most 1, found {dt}")
        if adjoint and diffusion is None:
            raise ValueError("adjoint: expected false for an ODE, found true")
        self.drift, self.diffusion = drift, diffusion
        self.sde_type, self.solver, self.dt, self.adjoint = sde_type, solver, dt, adjoint
        self.gradient_checkpointing = False  # as diffusers' blocks; set by enable_gradient_checkpointing

    def forward(
        self,
        start: Float[Tensor, "N C h w"],
        times: Float[Tensor, "N P"] | Int[Tensor, "N P"],
        seeds: Seeds | None = None,
        control: Control | None = None,
        told: Told | None = None,
    ) -> Float[Tensor, "N P C h w"] | tuple[Float[Tensor, "N P C h w"], Float[Tensor, " N"]]:
        """Integrate from time 0.

        Args:
            start: m at time 0.
            times: positive, in any order.
            seeds: each names a Brownian path that goes on for ever (never solved by the adjoint); None draws a path for
                each row from torch's generator.
            control: added to the drift: the posterior of a latent SDE (Li et al. 2020, section 5). Takes a diffusion
                that is nowhere 0; never solved by the adjoint.
            told: holds for the steps that begin in that time.
        Returns:
            m at the times, at least float32. With a control also the KL divergence of the controlled paths up to the
            last time from those without, 1/2 int |u / sigma|^2 dt along each path, in nats.
        Raises:
            FloatingPointError: the solution exploded or is not a number.
        """
        position, low, high = self.on_grid(times.detach().cpu())
        grid = torch.cat([torch.zeros(1, dtype=torch.long), low.flatten(), high.flatten()]).unique()
        path = Path(self, start, seeds, control, told, int(grid[-1]))
        states = path.follow(grid)
        rows = torch.arange(len(start), device=start.device)[:, None]
        below, above = (
            states[torch.searchsorted(grid, index).to(start.device, non_blocking=True), rows] for index in (low, high)
        )
        states = path.between(below, above, position - low)
        return states if path.kl is None else (states, path.kl)

    def on_grid(
        self, times: Float[Tensor, "*times"] | Int[Tensor, "*times"]
    ) -> tuple[Float[Tensor, "*times"], Int[Tensor, "*times"], Int[Tensor, "*times"]]:
        """Times in units of the solver's step, so that grid points are whole numbers, which nothing rounds: where they
        lie, and the grid points below and above."""
        position = times.double() / self.dt
        position = torch.where((position - position.round()).abs() < ON_GRID, position.round(), position)
        return position, position.floor().long(), position.ceil().long()


class Path:
    """A solution of a NeuralSDE that is followed from time 0 on, as far as is asked for at a time. It holds what the
    next steps need and no more, and where it pauses changes no bit.

    Args:
        model: the NeuralSDE. start, seeds, control, told: as for its ``forward``.
        last: the grid point where a path without seeds ends.
    """

    def __init__(
        self,
        model: NeuralSDE,
        start: Float[Tensor, "N C h w"],
        seeds: Seeds | None = None,
        control: Control | None = None,
        told: Told | None = None,
        last: int | None = None,
    ) -> None:
        self.model, self.control, self.told = model, control, told
        self.sizes = dict(zip("hw", start.shape[2:]))
        self.dtype, self.device = start.dtype, start.device
        self.y = as_rows(start.to(torch.promote_types(start.dtype, torch.float32)))
        self.position, self.kl = 0, None if control is None else self.y.new_zeros(len(start))
        self.extra = None  # what some solvers keep beside the state
        self.adjoint = model.adjoint and seeds is None and control is None and torch.is_grad_enabled()
        if model.diffusion is None:
            return
        area = "space-time" if model.solver == "srk" else "none"
        like = self.y if control is None else F.pad(self.y, (0, 1))  # torchsde adds a column for the divergence
        if seeds is None:
            entropy = int(torch.randint(2**62, ()))
            self.brownian = torchsde.BrownianInterval(
                0, last, like.shape, like.dtype, like.device, entropy, dt=1, levy_area_approximation=area
            )
        else:
            self.brownian = SeededBrownian(seeds, like, area)

    def at(self, time: float) -> Float[Tensor, "N C h w"]:
        """m at a time after those that it was followed to."""
        position, low, high = self.model.on_grid(torch.tensor(time))
        grid = torch.stack([torch.tensor(self.position), low, high]).unique()
        states = self.follow(grid)
        below, above = (states[torch.searchsorted(grid, index)][:, None] for index in (low, high))
        return self.between(below, above, (position - low).view(1, 1))[:, 0]

    def follow(self, grid: Int[Tensor, " K"]) -> Float[Tensor, "K N hwC"]:
        """States at the whole numbers in ``grid``, increasing, the first of them where it is by now."""
        states, last = [self.y[None]], int(grid[-1])
        while self.position < last:
            end, told = last, None
            if self.told is not None:
                interval = int((self.position + ON_GRID) * self.model.dt) + 1
                end = min(last, math.ceil(interval / self.model.dt - ON_GRID))
                told, self.extra = self.told(interval), None  # the solver begins anew with another drift
            stops = grid[(grid > self.position) & (grid <= end)].tolist()
            piece = self._solve(stops if end in stops else [*stops, end], told)
            states.append(piece[: len(stops)])
            self.position, self.y = end, piece[-1]
        states = torch.cat(states)
        self._check(states.detach(), grid)
        return states

    def between(
        self, below: Float[Tensor, "N P hwC"], above: Float[Tensor, "N P hwC"], weight: Float[Tensor, "_ P"]
    ) -> Float[Tensor, "N P C h w"]:
        """States so far between two others, by weights from 0 to 1 (of N rows, or of all) -> maps."""
        weight = weight.to(self.device, below.dtype, non_blocking=True)[..., None]
        return rearrange(torch.lerp(below, above, weight), "n p (h w c) -> n p c h w", **self.sizes)

    def _solve(self, stops, told):
        """The solution at later whole numbers (K, N, h w C), all of them steps with the same drift."""
        equation = _Equation(self, told)
        if self.model.diffusion is None:
            return self._euler(equation, stops)
        if self.model.solver == "euler_heun" and self.control is None and not self.adjoint:
            return self._euler_heun(equation, stops)
        return self._torchsde(equation, stops)

    def _euler(self, equation, stops):
        """Euler's method for an ODE: y' = y + f(y)."""
        y, states = self.y, []
        for step in range(self.position + 1, stops[-1] + 1):
            y = y + equation.f(None, y)
            if step in stops:
                states.append(y)
        return torch.stack(states)

    def _euler_heun(self, equation, stops):
        """The predictor-corrector for a Stratonovich SDE: y' = y + f(y) + (g(y) dW + g(y~) dW) / 2, y~ = y + g(y) dW,
        whose noise is the mean of that at the start of a step and that where it would lead to."""
        y, states = self.y, []
        for step in range(self.position, stops[-1]):
            dW = self.brownian(step, step + 1)
            drift, noise = equation.f(None, y), equation.g(None, y) * dW
            there = equation.g(None, y + noise) * dW
            y = y + drift + (noise + there) * 0.5
            if step + 1 in stops:
                states.append(y[None])
        return torch.cat(states)

    def _torchsde(self, equation, stops):
        model, controlled = self.model, self.control is not None
        settings = {"bm": self.brownian, "method": model.solver, "dt": 1, "logqp": controlled}
        settings |= {"extra": True, "extra_solver_state": self.extra}
        grid = torch.tensor([self.position, *stops], dtype=torch.float64)
        if self.adjoint:
            parameters = [*equation.parameters(), *equation.told]
            settings["adjoint_params"] = parameters
            states, *_, self.extra = torchsde.sdeint_adjoint(equation, self.y, grid, **settings)
        else:
            states, *kl, self.extra = torchsde.sdeint(equation, self.y, grid, **settings)
            if controlled:
                self.kl = self.kl + kl[0].sum(0)
        return states[1:]

    def _check(self, states, grid):
        largest = states.abs().amax((1, 2)).tolist()
        for step, value in zip(grid.tolist(), largest):
            if not value < EXPLODED:  # NaN too
                kind = "ODE" if self.model.diffusion is None else "SDE"
                raise FloatingPointError(
                    f"the neural {kind} exploded: its largest |m| is {value:.3g} at time {step * self.model.dt:g}; a "
                    "smaller dt, a lower learning rate or gradient clipping may help"
                )


class _Equation(nn.Module):
    """What is integrated, as torchsde likes it: rows, in time counted in steps.

    W in that time is 1 / sqrt(dt) times as large.
    """

    noise_type = "diagonal"

    def __init__(self, path, told):
        super().__init__()
        self.control, self.told = path.control, [] if told is None else [told]
        self.model, self.sizes, self.dtype, self.sde_type = path.model, path.sizes, path.dtype, path.model.sde_type
        # The adjoint calls drift and diffusion in the backward pass, which runs outside of autocast.
        device_type = path.device.type
        self.autocast = {
            "device_type": device_type,
            "dtype": torch.get_autocast_dtype(device_type),
            "enabled": torch.is_autocast_enabled(device_type),
        }

    def f(self, t, y):
        drift = self._evaluate(self.model.drift, y, *self.told)
        if self.control is not None:
            time = float(t) * self.model.dt + 1e-6  # grid points that rounding leaves just below a whole time are on it
            drift = drift + self._evaluate(lambda maps: self.control(maps, time), y)
        return self.model.dt * drift

    def h(self, t, y):  # torchsde's name for the drift without control
        return self.model.dt * self._evaluate(self.model.drift, y, *self.told)

    def g(self, t, y):
        return math.sqrt(self.model.dt) * self._evaluate(self.model.diffusion, y)

    def _evaluate(self, network, y, *told):
        maps = rearrange(y, "n (h w c) -> n c h w", **self.sizes).to(self.dtype)
        told = [tensor.to(self.dtype) for tensor in told]
        with torch.autocast(**self.autocast):
            if self.model.gradient_checkpointing and torch.is_grad_enabled():
                out = self.model._gradient_checkpointing_func(network, maps, *told)
            else:
                out = network(maps, *told)
        return as_rows(out).to(y.dtype)


def as_rows(maps: Float[Tensor, "N C h w"]) -> Float[Tensor, "N h*w*C"]:
    """What torchsde wants, with channels last, which convolutions like."""
    return rearrange(maps, "n c h w -> n (h w c)")


class SeededBrownian(torchsde.BaseBrownian):
    """A Brownian path for each row, fixed by its seed alone: neither the horizon nor the other rows change it.

    A path is a chain of torchsde's BrownianIntervals of ``BLOCK`` steps, each with the entropy (*seed, block). It must
    be asked for step after step, as solvers do. Drawn on the CPU, so that every device sees the same.

    Args:
        seeds: of the rows.
        like: for sizes, dtype and device.
        levy_area_approximation: as in BrownianInterval, "none" or "space-time"; so there is never an A to return.
    """

    BLOCK = 64

    def __init__(self, seeds: Seeds, like: Float[Tensor, "N d"], levy_area_approximation: str) -> None:
        super().__init__()
        if len(seeds) != len(like):
            raise ValueError(f"seeds: expected {len(like)}, one for each row, found {len(seeds)}")
        self.seeds, self._like, self._area = seeds, like.detach(), levy_area_approximation
        self._block, self._intervals = None, []

    def __call__(
        self, ta: float | Scalar, tb: float | Scalar | None = None, return_U: bool = False, return_A: bool = False
    ) -> Float[Tensor, "N d"] | tuple[Float[Tensor, "N d"], ...]:
        block = int(ta) // self.BLOCK
        if block != self._block:
            start, size = block * self.BLOCK, (1, self._like.shape[1])
            self._block = block
            self._intervals = [
                torchsde.BrownianInterval(
                    start,
                    start + self.BLOCK,
                    size,
                    self.dtype,
                    "cpu",
                    (*seed, block),
                    dt=1,
                    cache_size=16,  # bounds the memory: each holds a row of noise
                    levy_area_approximation=self._area,
                )
                for seed in self.seeds
            ]
        rows = [interval(ta, tb, return_U) for interval in self._intervals]
        if return_U:
            return tuple(torch.cat(parts).to(self.device, non_blocking=True) for parts in zip(*rows))
        return torch.cat(rows).to(self.device, non_blocking=True)

    def __repr__(self):
        return f"{type(self).__name__}({len(self.seeds)} paths)"

    @property
    def dtype(self) -> torch.dtype:
        return self._like.dtype

    @property
    def device(self) -> torch.device:
        return self._like.device

    @property
    def shape(self) -> torch.Size:
        return self._like.shape

    @property
    def levy_area_approximation(self) -> str:
        return self._area
