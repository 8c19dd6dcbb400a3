"""How well the codebooks of a discrete tokenizer are used."""

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torchmetrics import Metric

from .perplexity import histogram, perplexity


class CodebookUsage(Metric):
    """Exact usage of every codebook over everything seen since the last ``reset``, over all ranks.

    Args:
        codebook_sizes: number of codes in each codebook, as in ``latent_spec["codebook_sizes"]``.
    """

    full_state_update = False
    higher_is_better = True

    def __init__(self, codebook_sizes: Sequence[int], **kwargs: object) -> None:
        super().__init__(**kwargs)
        self.codebook_sizes = list(codebook_sizes)
        counts = torch.zeros(len(self.codebook_sizes), max(self.codebook_sizes), dtype=torch.int64)
        self.add_state("counts", counts, dist_reduce_fx="sum")

    def update(self, codes: Int[Tensor, "*rows n"]) -> None:
        """Count codes, int64."""
        if codes.shape[-1] != len(self.codebook_sizes):
            raise ValueError(f"codes: expected {len(self.codebook_sizes)} codebooks, found {codes.shape[-1]}")
        for counts, size, column in zip(self.counts, self.codebook_sizes, codes.flatten(0, -2).unbind(-1)):
            # A training step waits for no GPU here; what encoded the codes there has checked them.
            if column.device.type == "cpu" and len(column) and column.max() >= size:
                raise ValueError(f"codes: expected values in [0, {size}), found {column.max().item()}")
            counts[:size] += histogram(column, size)

    def compute(self) -> dict[str, Float[np.ndarray, " n"]]:
        """Of each codebook, float64: ``usage`` (fraction of the codes seen at least once), ``dead_fraction``
        (its complement) and ``perplexity`` (1 to codebook size)."""
        sizes = torch.tensor(self.codebook_sizes, device=self.counts.device)
        usage = (self.counts > 0).sum(-1).float() / sizes
        figures = {"usage": usage, "dead_fraction": 1 - usage, "perplexity": perplexity(self.counts)}
        # NumPy, because torchmetrics would squeeze the tensor of a single codebook.
        return {name: values.double().cpu().numpy() for name, values in figures.items()}
