"""Which tokenizers and priors go together: both are built without weights, which takes a moment, and asked."""

import contextlib
import logging

from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from latentcast.catalogue import config_root, names_below
from latentcast.config import MisfitError, instantiate, load_config

logger = logging.getLogger("latentcast")

GROUPS = ("tokenizer", "prior")


@contextlib.contextmanager
def without_weights():
    """What is built inside the block has parameters with shapes but no values (torch's device "meta"), and says
    nothing."""

    def drop(module, name, parameter):
        return None if parameter is None else nn.Parameter(parameter.detach().to("meta"), parameter.requires_grad)

    hook, disabled = register_module_parameter_registration_hook(drop), logger.disabled
    logger.disabled = True
    try:
        yield
    finally:
        logger.disabled = disabled
        hook.remove()


def plan_tokenizer(config):
    """An experiment's tokenizer, as it is before training, without weights."""
    if config.tokenizer.get("path") is not None:  # its sizes are those of weights that are loaded
        return instantiate(config.tokenizer)
    with without_weights():
        return instantiate(config.tokenizer)


def plan_prior(config, tokenizer):
    """An experiment's prior over the latents of a tokenizer, without weights.

    Raises:
        MisfitError: they do not go together. ValueError: other mistakes in the prior's settings.
    """
    with without_weights():
        return instantiate(config.prior, latent_spec=tokenizer.latent_spec)


def check_pair(config, experiment, overrides):
    """Refuse an experiment whose prior cannot work over the latents of its tokenizer, before hours of training.

    Args:
        config: what ``load_config(experiment, overrides, ...)`` returned.
    Raises:
        MisfitError: in one line, with the tokenizers and priors that could stand in the other's place; or, of a prior
            that is only too large for the latents, with sizes that fit.
    """
    if config.tokenizer is None or config.prior is None:
        return
    tokenizer = plan_tokenizer(config)
    try:
        plan_prior(config, tokenizer)
    except MisfitError as error:
        if error.needs is None:
            raise
        misfit = error
    except ValueError:  # other mistakes are told by the tool that they concern
        return
    else:
        return
    fitting = []
    for group in GROUPS:
        names = names_below(config_root() / group)
        found = [name for name in names if _fits(group, name, tokenizer, experiment, overrides)]
        if found:
            fitting.append(f"{group}={' or '.join(found)}")
    pair = " over ".join(str(config[group]._target_).rpartition(".")[2] for group in ("prior", "tokenizer"))
    _, _, reason = str(misfit).partition(": ")
    raise MisfitError(f"{pair}: {reason}; what fits: {', or '.join(fitting)}", misfit.needs)


def _fits(group, name, tokenizer, experiment, overrides):
    """Whether the file ``name`` of a group, in the place of the experiment's, makes a pair."""
    kept = [override for override in overrides if group not in override.partition("=")[0].split(".")[:2]]
    try:
        config = load_config(experiment, [*kept, f"{group}={name}"], "train_prior")
        plan_prior(config, tokenizer if group == "prior" else plan_tokenizer(config))
    except (ValueError, OSError):
        return False
    return True
