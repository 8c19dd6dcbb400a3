"""Convolutional blocks shared by the networks of both stages."""

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn


class ResidualBlock(nn.Module):
    """x + conv1x1(relu(conv3x3(relu(x)))).

    Latent Video Transformer, section 4.1. The ReLU must not work in place: the skip connection carries x itself.
    """

    def __init__(self, channels: int, residual_channels: int, padding_mode: str = "zeros") -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, residual_channels, 3, padding=1, padding_mode=padding_mode)
        self.conv2 = nn.Conv2d(residual_channels, channels, 1)

    def forward(self, x: Float[Tensor, "N C h w"]) -> Float[Tensor, "N C h w"]:
        return x + self.conv2(F.relu(self.conv1(F.relu(x))))
