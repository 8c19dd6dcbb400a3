"""A neural stochastic differential equation over feature maps, solved by torchsde on a fixed grid of times."""

import math

import torch
import torch.nn.functional as F
import torchsde
from torch import nn

# The solvers of torchsde that diagonal noise can use without an area for each pair of its components.
SOLVERS = {
    "stratonovich": ("euler_heun", "heun", "midpoint", "milstein", "reversible_heun"),
    "ito": ("euler", "milstein", "srk"),
}
EXPLODED = 1e6  # |m| beyond which a solution has left every use


class NeuralSDE(nn.Module):
    """dm = mu(m) dt + sigma(m) dW on maps m (N, C, h, w), with noise of its own for every number (diagonal).

    The solver steps on the grid 0, dt, 2 dt, ... whatever times are asked for, and the solution between two grid points
    is the straight line. So the value at a time never depends on the other times, and seeded paths (see ``forward``)
    agree bit by bit where they share a time.

    Args:
        drift: module m -> mu(m), of the same shape.
        diffusion: module m -> sigma(m), of the same shape; None makes it an ODE, solved by Euler's method.
        sde_type: "stratonovich" or "ito", the sense of the integral over dW.
        solver: of torchsde, one in ``SOLVERS[sde_type]``.
        dt: the step, in units of time.
        adjoint: gradients by torchsde's stochastic adjoint, in constant memory and more time, instead of through the
            solver's steps.
    Raises:
        ValueError: an option that is not known or does not fit the others.
    """

    def __init__(self, drift, diffusion=None, sde_type="stratonovich", solver="euler_heun", dt=0.1, adjoint=False):
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

    def forward(self, start, times, seeds=None, control=None):
        """Integrate from time 0.

        Args:
            start: m at time 0, (N, C, h, w).
            times: (N, P) positive, in any order.
            seeds: N tuples of whole numbers of at least 0, each of which names a Brownian path that goes on for ever
                (never solved by the adjoint); None draws a path for each row from torch's generator.
            control: function (m, time) -> u (N, C, h, w), added to the drift: the posterior of a latent SDE (Li et al.
                2020, section 5). Takes a diffusion that is nowhere 0; never solved by the adjoint.
        Returns:
            m at the times, (N, P, C, h, w), at least float32. With a control also the KL divergence of the controlled
            paths up to the last time from those without, 1/2 int |u / sigma|^2 dt along each path, (N,) in nats.
        Raises:
            FloatingPointError: the solution exploded or is not a number.
        """
        # In units of the solver's step, so that grid points are whole numbers, which nothing rounds. Times that differ
        # from one only by the rounding of float32 are taken to be there.
        position = times.detach().cpu().double() / self.dt
        position = torch.where((position - position.round()).abs() < 1e-4, position.round(), position)
        low, high = position.floor().long(), position.ceil().long()
        grid = torch.cat([torch.zeros(1, dtype=torch.long), low.flatten(), high.flatten()]).unique()

        n, channels, height, width = start.shape
        shape = (height, width, channels)  # channels last, which convolutions like; torchsde wants rows
        y_0 = start.to(torch.promote_types(start.dtype, torch.float32)).movedim(1, -1).flatten(1)
        equation = _Equation(self, shape, start.dtype, start.device.type, control)
        states, kl = self._solve(y_0, equation, grid, seeds)
        self._check(states.detach(), grid)

        rows = torch.arange(n, device=start.device)[:, None]
        below, above = (
            states[torch.searchsorted(grid, index).to(start.device, non_blocking=True), rows] for index in (low, high)
        )
        weight = (position - low).to(start.device, states.dtype, non_blocking=True)[..., None]
        states = torch.lerp(below, above, weight).unflatten(2, shape).movedim(-1, 2)
        return states if control is None else (states, kl)

    def _solve(self, y_0, equation, grid, seeds):
        """The solution at the whole numbers in ``grid`` (K,), of which the first is 0 -> (K, N, h w C), and the KL
        divergence of a control (N,), or None."""
        last = int(grid[-1])
        if self.diffusion is None:
            wanted, states, y = set(grid.tolist()), [y_0], y_0
            for step in range(1, last + 1):
                y = y + equation.f(None, y)
                if step in wanted:
                    states.append(y)
            return torch.stack(states), None
        area = "space-time" if self.solver == "srk" else "none"
        controlled = equation.control is not None
        like = F.pad(y_0, (0, 1)) if controlled else y_0  # torchsde adds a column for the divergence
        if seeds is None:
            entropy = int(torch.randint(2**62, ()))
            brownian = torchsde.BrownianInterval(
                0, last, like.shape, like.dtype, like.device, entropy, dt=1, levy_area_approximation=area
            )
        else:
            brownian = SeededBrownian(seeds, like, area)
        adjoint = self.adjoint and seeds is None and not controlled and torch.is_grad_enabled()
        solve = torchsde.sdeint_adjoint if adjoint else torchsde.sdeint
        solution = solve(equation, y_0, grid.double(), bm=brownian, method=self.solver, dt=1, logqp=controlled)
        return (solution[0], solution[1].sum(0)) if controlled else (solution, None)

    def _check(self, states, grid):
        largest = states.abs().amax((1, 2)).tolist()
        for step, value in zip(grid.tolist(), largest):
            if not value < EXPLODED:  # NaN too
                kind = "ODE" if self.diffusion is None else "SDE"
                raise FloatingPointError(
                    f"the neural {kind} exploded: its largest |m| is {value:.3g} at time {step * self.dt:g}; a smaller "
                    "dt, a lower learning rate or gradient clipping may help"
                )


class _Equation(nn.Module):
    """What torchsde integrates: rows, in time counted in steps. W in that time is 1 / sqrt(dt) times as large."""

    noise_type = "diagonal"

    def __init__(self, model, shape, dtype, device_type, control=None):
        super().__init__()
        self.control = control
        self.model, self.shape, self.dtype, self.sde_type = model, shape, dtype, model.sde_type
        # The adjoint calls drift and diffusion in the backward pass, which runs outside of autocast.
        self.autocast = {
            "device_type": device_type,
            "dtype": torch.get_autocast_dtype(device_type),
            "enabled": torch.is_autocast_enabled(device_type),
        }

    def f(self, t, y):
        drift = self._evaluate(self.model.drift, y)
        if self.control is not None:
            time = float(t) * self.model.dt + 1e-6  # grid points that rounding leaves just below a whole time are on it
            drift = drift + self._evaluate(lambda maps: self.control(maps, time), y)
        return self.model.dt * drift

    def h(self, t, y):  # torchsde's name for the drift without control
        return self.model.dt * self._evaluate(self.model.drift, y)

    def g(self, t, y):
        return math.sqrt(self.model.dt) * self._evaluate(self.model.diffusion, y)

    def _evaluate(self, network, y):
        maps = y.unflatten(1, self.shape).movedim(-1, 1).to(self.dtype)
        with torch.autocast(**self.autocast):
            if self.model.gradient_checkpointing and torch.is_grad_enabled():
                out = self.model._gradient_checkpointing_func(network, maps)
            else:
                out = network(maps)
        return out.movedim(1, -1).flatten(1).to(y.dtype)


class SeededBrownian(torchsde.BaseBrownian):
    """A Brownian path for each row, fixed by its seed alone: neither the horizon nor the other rows change it.

    A path is a chain of torchsde's BrownianIntervals of ``BLOCK`` steps, each with the entropy (*seed, block). It must
    be asked for step after step, as solvers do. Drawn on the CPU, so that every device sees the same.

    Args:
        seeds: tuples of whole numbers of at least 0, one for each row.
        like: (N, d), for sizes, dtype and device.
        levy_area_approximation: as in BrownianInterval, "none" or "space-time"; so there is never an A to return.
    """

    BLOCK = 64

    def __init__(self, seeds, like, levy_area_approximation):
        super().__init__()
        if len(seeds) != len(like):
            raise ValueError(f"seeds: expected {len(like)}, one for each row, found {len(seeds)}")
        self.seeds, self._like, self._area = seeds, like.detach(), levy_area_approximation
        self._block, self._intervals = None, []

    def __call__(self, ta, tb=None, return_U=False, return_A=False):
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
    def dtype(self):
        return self._like.dtype

    @property
    def device(self):
        return self._like.device

    @property
    def shape(self):
        return self._like.shape

    @property
    def levy_area_approximation(self):
        return self._area
