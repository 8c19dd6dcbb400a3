"""Several processes on one job, started by torchrun: each takes its share, and files are what they exchange."""

import contextlib
import datetime
import os

import torch
import torch.distributed as dist


@contextlib.contextmanager
def process_group():
    """Under torchrun: the group of processes that share the work. Alone: nothing."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        yield
        return
    # Only barriers pass through it, and a rank may wait for hours at the last one.
    dist.init_process_group("gloo", timeout=datetime.timedelta(days=30))
    try:
        yield
    finally:
        dist.destroy_process_group()


@contextlib.contextmanager
def rank_zero_first():
    """The block runs on rank 0 before the others, which find the files that it made."""
    rank, _ = rank_and_world()
    if rank > 0:
        barrier()
    yield
    if rank == 0:
        barrier()


def rank_and_world():
    """(rank, number of processes); (0, 1) in a process alone."""
    together = dist.is_available() and dist.is_initialized()
    return (dist.get_rank(), dist.get_world_size()) if together else (0, 1)


def all_reduced(tensor):
    """The sum of every process's tensor, as a new one."""
    tensor = tensor.clone()
    if rank_and_world()[1] > 1:
        dist.all_reduce(tensor)
    return tensor


def lost_rank(error):
    """What to say of an error that came because another process of the job is gone; None of other errors."""
    text = str(error)
    torn = "gloo" in text and any(sign in text for sign in ("Connection", "Broken pipe", "connection"))
    if not torn and not isinstance(error, (dist.DistNetworkError, dist.DistBackendError, dist.DistStoreError)):
        return None
    rank, world_size = rank_and_world()
    return (
        f"another process of this job has ended, and this one, rank {rank} of {world_size}, with it: the last lines of "
        "that one say why. To go on run the same command again, trainings with resume=true"
    )


def barrier():
    """Wait for the other processes, if there are any."""
    if dist.is_initialized():
        dist.barrier()


def default_device():
    """This process's GPU, from now on its current one, or the CPU where there is none."""
    if not torch.cuda.is_available():
        return "cpu"
    device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    torch.cuda.set_device(device)  # else every process keeps memory on the first one too
    return device
