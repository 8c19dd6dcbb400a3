"""torch.compile of what is trained."""

import copy
import logging

import torch
from torch.utils.data import default_collate

from latentcast.cli import UserError
from latentcast.schemas import one_line

logger = logging.getLogger("latentcast")


def compile_model(module, data, trainer, backend):
    """Compile the model's training graph, if that works: it is tried on a copy, with one batch, forward and backward.

    A model that the compiler breaks on is trained as it is, and the log says why. Saved models and checkpoints are the
    same with and without.

    Args:
        module: a TrainingModule. data: its data module. trainer: the one that will fit it.
        backend: True, or the name of a backend of torch.compile.
    Raises:
        UserError: no such backend.
    """
    known = torch._dynamo.list_backends(exclude_tags=())
    if backend is not True and backend not in known:
        raise UserError(f"compile: expected true, false or one of {', '.join(known)}, found {backend!r}")
    options = {} if backend is True else {"backend": backend}
    own, device = module.model, trainer.strategy.root_device
    batch = default_collate([data.train_set[i % len(data.train_set)] for i in range(data.batch_size)])
    module.model = copy.deepcopy(own).to(device).train()
    module.model.compile(**options)
    try:
        with torch.random.fork_rng(), trainer.precision_plugin.forward_context():
            loss = module.compute(module.transfer_batch_to_device(batch, device, 0)).loss
        loss.backward()
    except Exception as error:  # of any of torch's compilers, or of the one for C++ that they call
        reason = one_line(error, 200) or type(error).__name__
        logger.warning("compile: %s is trained uncompiled, torch.compile failed: %s", type(own).__name__, reason)
    else:
        own.compile(**options)
        logger.info("compile: %s is compiled", type(own).__name__)
    finally:
        module.model = own
