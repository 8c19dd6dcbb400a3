"""The recurrent parts of SVG (Denton and Fergus 2018): LSTMs between a linear embedding and linear outputs."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from .multilevel import init_normal

State = tuple[Tensor, Tensor]  # of an LSTM, (layers, B, cells) both
Groups = Sequence[Float[Tensor, "B T group_dim"] | None]  # of z, or of noise


class EmbeddedLSTM(nn.Module):
    """A linear embedding and an LSTM over it.

    Args:
        n_in: numbers in each input.
        cells: of each layer, and of the embedding.
        n_layers: of the LSTM.
    """

    def __init__(self, n_in: int, cells: int, n_layers: int = 1) -> None:
        super().__init__()
        self.embed = nn.Linear(n_in, cells)
        self.lstm = nn.LSTM(cells, cells, n_layers, batch_first=True)

    def forward(
        self, x: Float[Tensor, "B T n_in"], state: State | None = None
    ) -> tuple[Float[Tensor, "B T cells"], State]:
        """Inputs and the state to go on from (None: zeros) -> what the cells say of each, and the state after it."""
        x = self.embed(x)
        # On CUDA any autocast, also to bfloat16, runs LSTMs in float16, where small gradients vanish without a scaler.
        with torch.autocast(x.device.type, enabled=False):
            return self.lstm(x.to(self.lstm.weight_ih_l0.dtype), state)


class FramePredictor(nn.Module):
    """SVG's LSTM_theta: frames' vectors and z -> what the decoder takes, in [-1, 1].

    Args:
        n_in: numbers in the previous frame's vector and in z together.
        dim: numbers in the output.
        cells, n_layers: as in ``EmbeddedLSTM``.
    """

    def __init__(self, n_in: int, dim: int, cells: int = 256, n_layers: int = 2) -> None:
        super().__init__()
        self.recurrent = EmbeddedLSTM(n_in, cells, n_layers)
        self.out = nn.Linear(cells, dim)
        self.apply(init_normal)

    def forward(
        self, x: Float[Tensor, "B T n_in"], state: State | None = None
    ) -> tuple[Float[Tensor, "B T dim"], State]:
        """Inputs and the state to go on from (None: zeros) -> what the decoder takes of each, the state after it."""
        x, after = self.recurrent(x, state)
        return self.out(x).tanh(), after


class GaussianGroups(nn.Module):
    """HAF-SVG's hierarchical module (equation 4): G groups of z, each of them given those before it.

    Group j has an LSTM of its own over ``[h_t, z_t^1, ..., z_t^(j-1)]``, whose outputs are mean and log-variance of
    ``z_t^j``. With one group it is SVG's; with none there is no z.

    Args:
        n_in: numbers in h.
        n_groups: G, at least 0.
        group_dim: numbers in each z^j.
        cells: of each group's LSTM.
    """

    def __init__(self, n_in: int, n_groups: int, group_dim: int, cells: int = 256) -> None:
        super().__init__()
        self.group_dim = group_dim
        self.recurrent = nn.ModuleList(EmbeddedLSTM(n_in + j * group_dim, cells) for j in range(n_groups))
        self.moments = nn.ModuleList(nn.Linear(cells, 2 * group_dim) for _ in range(n_groups))
        self.apply(init_normal)

    def forward(
        self,
        h: Float[Tensor, "B T n_in"],
        z: Groups | None = None,
        noise: Float[Tensor, "B T Z"] | None = None,
        states: Sequence[State | None] | None = None,
    ) -> tuple[Float[Tensor, "B T Z"], Float[Tensor, "B T Z"], Float[Tensor, "B T Z"], list[State]]:
        """Equation 4, group after group.

        Args:
            z: of each group what is known already, or None where it is drawn; None: all are drawn.
            noise: of the draws, standard normal; None: torch's own.
            states: of the groups, to go on from; None: zeros.
        Returns:
            z, mean, log-variance of all Z = n_groups * group_dim numbers; the states after the last step.
        """
        n_groups = len(self.recurrent)
        given, noises = by_group(z, noise, n_groups, self.group_dim)
        after, known, found = [], h, [h.new_zeros(2, *h.shape[:-1], 0)]
        for j, (recurrent, moments) in enumerate(zip(self.recurrent, self.moments)):
            features, state = recurrent(known, states[j] if states else None)
            after.append(state)
            found.append(torch.stack(moments(features).chunk(2, -1)))
            known = torch.cat([known, draw(*found[-1], noises[j]) if given[j] is None else given[j]], -1)
        mean, logvar = torch.cat(found, -1)
        return known[..., h.shape[-1] :], mean, logvar, after


class StandardGroups(nn.Module):
    """The fixed prior of SVG-FP in the place of ``GaussianGroups``: z is standard normal whatever came before."""

    def __init__(self, n_groups: int, group_dim: int) -> None:
        super().__init__()
        self.n_groups, self.group_dim = n_groups, group_dim

    def forward(
        self,
        h: Float[Tensor, "B T n_in"],
        z: Groups | None = None,
        noise: Float[Tensor, "B T Z"] | None = None,
        states: None = None,
    ) -> tuple[Float[Tensor, "B T Z"], Float[Tensor, "B T Z"], Float[Tensor, "B T Z"], None]:
        given, noises = by_group(z, noise, self.n_groups, self.group_dim)
        zeros = h.new_zeros(*h.shape[:-1], self.group_dim)
        groups = [draw(zeros, zeros, noises[j]) if given[j] is None else given[j] for j in range(self.n_groups)]
        drawn = torch.cat([h[..., :0], *groups], -1)
        return drawn, torch.zeros_like(drawn), torch.zeros_like(drawn), states


def by_group(
    z: Groups | None, noise: Float[Tensor, "B T Z"] | None, n_groups: int, group_dim: int
) -> tuple[Groups, Groups]:
    """What is known of z and the noise of what is drawn, as for ``GaussianGroups`` -> the same of each group."""
    return z or [None] * n_groups, [None] * n_groups if noise is None else noise.split(group_dim, -1)


def draw(
    mean: Float[Tensor, "*rows"], logvar: Float[Tensor, "*rows"], noise: Float[Tensor, "*rows"] | None = None
) -> Float[Tensor, "*rows"]:
    """A draw of N(mean, exp(logvar)), by standard normal noise; None: torch's own."""
    noise = torch.randn_like(mean) if noise is None else noise.to(mean.dtype)
    return mean + (0.5 * logvar).exp() * noise
