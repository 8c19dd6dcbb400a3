"""The convolutional gated recurrent unit."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn


class ConvGRUCell(nn.Module):
    """A GRU whose matrix products are convolutions (Ballas et al. 2016): maps and its state -> the next state.

    With update gate z, reset gate r and candidate c: ``h' = (1 - z) h + z c``, where ``c = tanh(W x + U (r h))``.

    Args:
        in_channels: C of the input.
        hidden_channels: channels of the state.
        kernel_size: odd side of the kernels.
    """

    def __init__(self, in_channels: int, hidden_channels: int, kernel_size: int = 3) -> None:
        super().__init__()
        if kernel_size % 2 != 1:
            raise ValueError(f"kernel_size: expected an odd number, found {kernel_size}")
        self.hidden_channels = hidden_channels
        both = in_channels + hidden_channels
        self.gates = nn.Conv2d(both, 2 * hidden_channels, kernel_size, padding=kernel_size // 2)
        self.candidate = nn.Conv2d(both, hidden_channels, kernel_size, padding=kernel_size // 2)

    def forward(
        self, x: Float[Tensor, "sN C H W"], state: Float[Tensor, "N hidden H W"] | None = None, n_steps: int = 1
    ) -> Float[Tensor, "sN hidden H W"]:
        """One step or several, whose inputs are convolved at once.

        Args:
            x: of ``n_steps`` times, time before batch.
            state: None for zeros.
        Returns:
            the state after each step.
        """
        # A convolution of both is one over the input plus one over the state: W x + U h.
        layers, n = (self.gates, self.candidate), x.shape[1]
        (gates_x, gates_h), (candidate_x, candidate_h) = (layer.weight.tensor_split((n,), 1) for layer in layers)
        bias, padding = torch.cat([layer.bias for layer in layers]), self.gates.padding
        inputs = F.conv2d(x, torch.cat([gates_x, candidate_x]), bias, padding=padding)
        states = []
        for z_r, c in zip(*(part.chunk(n_steps) for part in inputs.tensor_split((2 * self.hidden_channels,), 1))):
            # Under autocast a state may be more precise than what a convolution gives.
            if state is None:  # zeros add nothing
                z, _ = z_r.sigmoid().chunk(2, 1)
                state = z.to(x.dtype) * c.tanh().to(x.dtype)
            else:
                z, r = (z_r + F.conv2d(state, gates_h, padding=padding)).sigmoid().chunk(2, 1)
                c = (c + F.conv2d(r * state, candidate_h, padding=padding)).tanh()
                state = torch.lerp(state, c.to(state.dtype), z.to(state.dtype))
            states.append(state)
        return torch.cat(states)
