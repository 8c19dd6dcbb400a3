"""Training on all frames of a clip in one pass of two streams, against a pass for each predicted frame.

python benchmarks/one_pass.py
"""

from common import run_parts, say, seconds  # isort: skip  (sets the thread policy before torch loads)

import torch

from latentcast.layers.block_causal import BlockCausalTransformer

N_CONTEXT, N_FRAMES, GRID, BATCH = 5, 15, (8, 8), 4  # of configs/experiment/small/st_pixelcnn.yaml
SIZES = {"dim": 128, "n_layers": 4, "n_heads": 4, "head_dim": 32}


def one_pass():
    """The trunk of MaskedTransformer at the size of the small experiment: 5 -> 10 frames of 8 x 8 positions.

    ``one_pass_time``: seconds of forward and backward of ten passes over those of one. ``one_pass_memory``: bytes kept
    for the backward pass by one over those that the largest of ten keeps.
    """
    torch.manual_seed(0)
    trunk = BlockCausalTransformer(**SIZES, grid=GRID, window=N_FRAMES)
    n_targets, dim = N_FRAMES - N_CONTEXT, SIZES["dim"]
    shapes = [(N_FRAMES - 1, 64, dim), (n_targets, 64, dim), (N_FRAMES - 1, dim), (n_targets, dim)]
    clean, target, clean_vectors, target_vectors = (torch.randn(BATCH, *shape) for shape in shapes)

    def together():
        trunk(clean, target, clean_vectors, target_vectors).square().mean().backward()

    def frame(number):
        seen, own = slice(N_CONTEXT + number), slice(number, number + 1)
        out = trunk(clean[:, seen], target[:, own], clean_vectors[:, seen], target_vectors[:, own])
        (out.square().mean() / n_targets).backward()

    def apart():
        for number in range(n_targets):
            frame(number)

    gradients = []
    for way in (together, apart):
        trunk.zero_grad()
        way()
        gradients.append(torch.cat([p.grad.flatten() for p in trunk.parameters() if p.grad is not None]))
    difference = ((gradients[0] - gradients[1]).norm() / gradients[0].norm()).item()
    times = [min(seconds(way, "cpu") for _ in range(3)) for way in (together, apart)]
    kept = [kept_bytes(together), kept_bytes(lambda: frame(n_targets - 1))]
    shown = [f"{time:.2f} s, {size / 2**20:.0f} MiB" for time, size in zip(times, kept)]
    say(f"one pass {shown[0]}; a pass a frame {shown[1]}; relative difference of the gradients {difference:.1e}")
    return {"one_pass_time": times[1] / times[0], "one_pass_memory": kept[0] / kept[1]}


def kept_bytes(step):
    """Bytes of all tensors that ``step`` keeps for its backward pass."""
    storages = {}

    def keep(tensor):
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        step()
    return sum(storages.values())


if __name__ == "__main__":
    run_parts(__doc__.splitlines()[0], {"one_pass": one_pass})
