"""A training whose optimiser, gradients and averages are spread over its processes, by torch's FSDP2, and checkpoints
of it that go on with any number of them."""

import contextlib
from pathlib import Path

import torch
from pytorch_lightning.strategies import ModelParallelStrategy
from torch.distributed import checkpoint as distributed_checkpoint
from torch.distributed.checkpoint import CheckpointException, HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from latentcast.cli import UserError

from .checkpoints import REST, replacing_folder

STATES = ("state_dict", "current_model_state", "averaging_state")  # of a checkpoint: name -> tensor
PRECISIONS = ("32-true", "bf16-mixed")


class FullyShardedStrategy(ModelParallelStrategy):
    """FSDP2 over all processes, by ``trainer.strategy=fsdp``, on GPUs and on CPUs.

    Each process keeps a piece of every weight, of its gradient, of the optimiser's moments and of the moving average;
    a step gathers the weights as a whole, and gives them up after it. A checkpoint is a folder: safetensors of
    each process (torch.distributed.checkpoint, no pickles), and ``rest.ckpt`` with all else. It is put in the place
    of the one before as a whole, and loads on any number of processes.
    """

    def __init__(self):
        super().__init__(tensor_parallel_size=1)

    @property
    def lightning_restore_optimizer(self):
        return True

    def setup_environment(self):
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    def load_model_state_dict(self, checkpoint, strict=True):
        self.lightning_module.load_state_dict(checkpoint["state_dict"], strict=strict)

    def load_optimizer_state_dict(self, checkpoint):
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            set_optimizer_state_dict(self.model, optimizer, state)

    def save_checkpoint(self, checkpoint, filepath, storage_options=None):
        """Every process calls it. Raises OSError where it cannot be written; the one before is still whole."""
        tensors = dict(_tensors(checkpoint))
        rest = {name: value for name, value in checkpoint.items() if name not in (*STATES, "optimizer_states")}
        groups = [state["param_groups"] for state in checkpoint.get("optimizer_states", ())]
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        path = Path(filepath)
        with replacing_folder(path, first=self.is_global_zero) as own:
            folder = Path(self.broadcast(str(own)))
            writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
            with _told(path, "written"):
                distributed_checkpoint.save(tensors, storage_writer=writer)
            if self.is_global_zero:
                sizes = {file.name: file.stat().st_size for file in folder.glob("*.safetensors")}
                torch.save(rest | {"shapes": shapes, "groups": groups, "files": sizes}, folder / REST)
            self.barrier()
        self.barrier()

    def load_checkpoint(self, checkpoint_path, weights_only=None):
        """-> the checkpoint as Lightning knows it, whose tensors are this process's pieces."""
        path = Path(checkpoint_path)
        checkpoint = torch.load(path / REST, map_location="cpu", weights_only=True)
        shapes, groups = checkpoint.pop("shapes"), checkpoint.pop("groups")
        model = self.lightning_module.state_dict()
        for state in STATES:
            names = [name.removeprefix(f"{state}/") for name in shapes if name.startswith(f"{state}/")]
            if names:  # the average counts by a number that no model has
                checkpoint[state] = {
                    name: torch.empty_like(model[name]) if name in model else torch.zeros((), dtype=torch.int64)
                    for name in names
                }
        checkpoint["optimizer_states"] = [
            get_optimizer_state_dict(self.model, optimizer) | {"param_groups": settings}
            for optimizer, settings in zip(self.optimizers, groups)
        ]
        reader = HuggingFaceStorageReader(str(path))
        with _told(path, "read"):
            distributed_checkpoint.load(dict(_tensors(checkpoint)), storage_reader=reader)  # into these very tensors
        return checkpoint


@contextlib.contextmanager
def _told(path, done):
    """torch tells in pages, of no Exception, what one or more processes could not do -> OSError of one line."""
    try:
        yield
    except CheckpointException as error:
        rank, (reason, _) = next(iter(error.failures.items()))
        raise OSError(f"checkpoint {path}: cannot be {done} (rank {rank}: {reason})") from None


def _tensors(checkpoint):
    """(name in the files, tensor) of all that is sharded, or as large."""
    for state in STATES:
        for name, tensor in checkpoint.get(state, {}).items():
            yield f"{state}/{name}", tensor
    for number, optimizer in enumerate(checkpoint.get("optimizer_states", ())):
        for parameter, values in optimizer["state"].items():
            for name, value in values.items():
                if torch.is_tensor(value):
                    yield f"optimizer/{number}/{parameter}/{name}", value


def shard(model, mesh, methods=()):
    """Let each process of the mesh keep a piece of a model's weights, which its ``forward`` gathers, and so do
    ``methods`` of it, by their names."""
    name = type(model).__name__
    for parameter in model.parameters():  # of convolutions that hold theirs channels last, which FSDP does not take
        parameter.data = parameter.data.contiguous()
    fully_shard(model, mesh=mesh["data_parallel"], reshard_after_forward=True)
    type(model).__name__ = name  # a class of its own, which logs and errors are to call as before
    for method in methods:
        register_fsdp_forward_method(model, method)


def gather(model, whole):
    """Give ``whole``, on the first process, the weights of a model that is sharded; every process calls it."""
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if state:
        whole.load_state_dict(state)


def local(tensor):
    """This process's piece of a tensor, or the tensor that is not sharded; what is written into it is kept."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def full(tensor):
    """A tensor as a whole, on every process, of which each calls it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def check_sharded(config):
    """Refuse what ``trainer.strategy=fsdp`` cannot do, by name."""
    reason = None
    if config.compile:
        reason = "not with compile"
    elif config.trainer.get("precision", "32-true") not in (*PRECISIONS, "auto"):
        reason = f"expected trainer.precision {', '.join(PRECISIONS)} or auto, found {config.trainer.precision}"
    if reason:
        raise UserError(f"trainer.strategy=fsdp: {reason}")
