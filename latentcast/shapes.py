"""Shapes as types: what goes from room to room has a name here, and each letter one meaning (docs/architecture.md).

Nothing is checked when programs run; the tests check every call, by jaxtyping's import hook.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float, Int
from torch import Tensor

Frames = Float[Tensor, "B T C H W"]  # in [-1, 1]
Latents = Float[Tensor, "B T D h w"]
Codes = Int[Tensor, "B T h w n"]
Futures = Float[Tensor, "B S T C H W"]
Scalar = Float[Tensor, ""]
Clip = Frames | Latents | Codes  # in the space of some prior

Numbers = Tensor | np.ndarray | Sequence | float  # what torch.as_tensor takes
Conditions = Mapping[str, Numbers]  # (B, T, *shape) of those per frame, (B, *shape) of those per video
