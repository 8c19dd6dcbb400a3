"""Training both stages together: the prior, and the decoder that turns what it predicts into frames."""

import json
import logging
import warnings
from typing import ClassVar

import torch

from latentcast.modeling import VideoModel, load_model
from latentcast.priors.base import PriorOutput

from .module import TrainingModule
from .prior_module import conditions_for

logger = logging.getLogger("latentcast")

BRIDGES = ("none", "straight_through", "gumbel")


class JointModule(TrainingModule):
    """Trains a prior over codes together with its tokenizer's decoder (S-HR-VQVAE, section 4.4).

    The loss is the prior's own, the cross-entropy of the future's codes, plus ``weight`` times the first term of the
    tokenizer's loss (eq. 4) between the true future frames and the predicted ones, so that the decoder learns to draw
    what the prior predicts. The prediction is teacher-forced like the cross-entropy: at every position the code that is
    most likely given the true codes before it. Encoder and codebooks stay as they are, and with them all codes.

    A batch is ``{"frames": (B, T, C, H, W) in [-1, 1]}``. With ``weight`` 0 the decoder is frozen as well, and the
    prior is trained exactly as ``PriorModule`` trains it on those frames' codes.

    Args:
        model, optimizer, lr_scheduler, config: see TrainingModule.
        tokenizer: a discrete FrameTokenizer whose decoder learns; kept in eval mode.
        n_context: context frames, which both terms skip.
        weight: lambda.
        bridge: how the second term reaches the prior, which chooses codes, through which no gradient passes. "none":
            not at all, it trains the decoder alone. "straight_through": as if the softmax of the logits had been looked
            up. "gumbel": the same with Gumbel noise on the logits (Jang et al. 2017), so that in training the codes are
            drawn from the prior, not its most likely ones.
        temperature: divides the logits in the softmax that carries the gradient.
    Raises:
        ValueError: a prior or tokenizer that cannot be trained so, or an option out of its range.
    """

    stage = "joint"
    sharded: ClassVar = {"model": (), "tokenizer": ("encode", "codes_to_latents", "weights_to_latents", "decoder_loss")}

    def __init__(
        self,
        model,
        tokenizer,
        optimizer,
        lr_scheduler=None,
        n_context=1,
        weight=1.0,
        bridge="none",
        temperature=1.0,
        config=None,
    ):
        super().__init__(model, optimizer, lr_scheduler, config)
        if not weight >= 0:
            raise ValueError(f"joint_training.weight: expected at least 0, found {weight}")
        if bridge not in BRIDGES:
            raise ValueError(f"joint_training.bridge: expected one of {', '.join(BRIDGES)}, found {bridge!r}")
        if not temperature > 0:
            raise ValueError(f"joint_training.temperature: expected more than 0, found {temperature}")
        if model.accepts != "codes":
            raise ValueError(f"joint training: expected a prior over codes, found {type(model).__name__}")
        if not tokenizer.is_discrete or not tokenizer.decoder_parameters():
            lack = "decoder to train" if tokenizer.is_discrete else "codes"
            raise ValueError(f"joint training: {type(tokenizer).__name__} has no {lack}")
        self.tokenizer = tokenizer.eval().requires_grad_(False)
        for parameter in tokenizer.decoder_parameters():
            parameter.requires_grad_(weight > 0)
        self.n_context, self.weight, self.bridge, self.temperature = n_context, weight, bridge, temperature

    def train(self, mode=True):
        """The tokenizer stays in eval mode: nothing in its encoder may follow the batches."""
        super().train(mode)
        self.tokenizer.eval()
        return self

    def on_fit_start(self):
        """Refuse a precision that rounds the encoder, whose codes would change."""
        if self.trainer.precision in ("16-true", "bf16-true"):
            raise ValueError(
                f"trainer.precision: joint training keeps the encoder as it is, found {self.trainer.precision}; "
                f"take {self.trainer.precision.replace('true', 'mixed')}"
            )
        # The tokenizer is; Lightning's warning is for those who forgot to leave it.
        warnings.filterwarnings("ignore", message=r"Found \d+ module\(s\) in eval mode")

    def clipped_apart(self):
        """Prior and decoder where no bridge joins them: the decoder's gradient is as large as lambda, and would shrink
        the prior's, which lambda must not reach."""
        if self.bridge != "none" or self.weight == 0:
            return super().clipped_apart()
        return [[p for p in part.parameters() if p.requires_grad] for part in (self.model, self.tokenizer)]

    def compute(self, batch):
        frames = batch["frames"]
        with torch.no_grad(), torch.autocast(frames.device.type, enabled=False):  # the codes that a cache would hold
            codes = self.tokenizer.encode(frames).codes
        output = self.model(codes, self.n_context, **conditions_for(self.model, batch))
        if output.logits is None:
            raise ValueError(
                f"joint training: {type(self.model).__name__} gives no logits: it does not predict all codes of a clip "
                "in one pass"
            )
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.weight > 0):
            predicted = self.predict(output.logits)
            distance, logs = self.tokenizer.decoder_loss(predicted, frames[:, self.n_context :])
        # Nothing is added at weight 0: 0 times a distance that is not finite would be.
        loss = output.loss + self.weight * distance if self.weight > 0 else output.loss
        return PriorOutput(loss=loss, logs=output.logs | {"cross_entropy": output.loss.detach()} | logs)

    def predict(self, logits):
        """Latents of the codes that the prior chooses, through which gradients pass as ``bridge`` says.

        In eval mode they are always the most likely ones.

        Args:
            logits: list with one tensor (B, T, h, w, K) a codebook.
        Returns:
            (B, T, D, h, w) fp32.
        """
        if self.bridge == "none" or not self.training:
            return self.tokenizer.codes_to_latents(torch.stack([x.argmax(-1) for x in logits], -1))
        weights = []
        for x in logits:
            x = x.float()
            if self.bridge == "gumbel":
                x = x - torch.empty_like(x).exponential_().log()
            soft = (x / self.temperature).softmax(-1)
            hard = torch.zeros_like(x).scatter_(-1, x.argmax(-1, keepdim=True), 1.0)
            weights.append(hard + (soft - soft.detach()))  # exactly one-hot
        return self.tokenizer.weights_to_latents(weights)


def start_from(prior, folder):
    """Give a prior the weights of the trained one in ``folder``, if there is one; the log says which it is.

    Raises:
        ValueError: the trained one is of another class or has other settings.
    """
    if not (folder / VideoModel.config_name).is_file():
        logger.info("%s: no trained prior here, joint training starts with a new one", folder)
        return
    trained = load_model(folder)
    sides = [
        {"_target_": type(side).__name__} | {k: v for k, v in side.config.items() if not k.startswith("_")}
        for side in (trained, prior)
    ]
    found, asked = json.loads(json.dumps(sides))
    for name in sorted(found.keys() | asked.keys()):
        if found.get(name) != asked.get(name):
            raise ValueError(
                f"{folder}: trained with prior.{name}={found.get(name)}, asked for {asked.get(name)}; train it again "
                "with overwrite=true, or use another run_dir"
            )
    prior.load_state_dict(trained.state_dict())
    logger.info("joint training starts with the prior in %s", folder)
