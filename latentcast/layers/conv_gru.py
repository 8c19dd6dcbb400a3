"""The convolutional gated recurrent unit."""

import torch
from torch import nn


class ConvGRUCell(nn.Module):
    """A GRU whose matrix products are convolutions (Ballas et al. 2016): (N, C, H, W) and its state -> the next state.

    With update gate z, reset gate r and candidate c: ``h' = (1 - z) h + z c``, where ``c = tanh(W x + U (r h))``.

    Args:
        in_channels: C of the input.
        hidden_channels: channels of the state.
        kernel_size: odd side of the kernels.
    """

    def __init__(self, in_channels, hidden_channels, kernel_size=3):
        super().__init__()
        if kernel_size % 2 != 1:
            raise ValueError(f"kernel_size: expected an odd number, found {kernel_size}")
        self.hidden_channels = hidden_channels
        both = in_channels + hidden_channels
        self.gates = nn.Conv2d(both, 2 * hidden_channels, kernel_size, padding=kernel_size // 2)
        self.candidate = nn.Conv2d(both, hidden_channels, kernel_size, padding=kernel_size // 2)

    def forward(self, x, state=None):
        """One step.

        Args:
            x: (N, C, H, W).
            state: (N, hidden_channels, H, W), or None for zeros.
        Returns:
            the new state, of the same shape.
        """
        if state is None:
            state = x.new_zeros(len(x), self.hidden_channels, *x.shape[2:])
        update, reset = self.gates(torch.cat([x, state], 1)).sigmoid().chunk(2, 1)
        candidate = self.candidate(torch.cat([x, reset * state], 1)).tanh()
        # Under autocast a state may be more precise than what a convolution gives.
        return torch.lerp(state, candidate.to(state.dtype), update.to(state.dtype))
