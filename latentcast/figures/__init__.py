"""Figures: pure functions, arrays (NumPy's or tensors) in, a ``Drawing`` out. No model and no logger is known here.

A Drawing has the picture, a caption that says what it shows and how to read it, the numbers in it, and, where it moves,
the frames of a video. ``latentcast/inspection.py`` computes the arrays from models, and draws by name.

    drawing = code_frequencies([counts])
    drawing.save("frequencies.png")
"""

from .charts import (
    ablation,
    code_frequencies,
    codes_for,
    crps_maps,
    curves,
    drift,
    kl_groups,
    latents,
    losses,
    motion_spread,
    tradeoff,
    training_curves,
    usage,
)
from .frames import (
    change_masks,
    changes,
    code_maps,
    decoding,
    futures,
    half_steps,
    layers,
    motion,
    reconstructions,
    residual,
    rollout,
    z_groups,
)
from .style import Drawing, Scale

__all__ = [
    "Drawing",
    "Scale",
    "ablation",
    "change_masks",
    "changes",
    "code_frequencies",
    "code_maps",
    "codes_for",
    "crps_maps",
    "curves",
    "decoding",
    "drift",
    "futures",
    "half_steps",
    "kl_groups",
    "latents",
    "layers",
    "losses",
    "motion",
    "motion_spread",
    "reconstructions",
    "residual",
    "rollout",
    "tradeoff",
    "training_curves",
    "usage",
    "z_groups",
]
