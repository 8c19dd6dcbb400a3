"""A GPU that is not there: ordinary CPU tensors of which a book says on which device they are.

FakeTensorMode, which has a device without one, does not do: in a PyTorch built without CUDA a fake CUDA tensor that
takes part in autograd ends the process, and without values no control flow that depends on some can be followed.
"""

import contextlib
import linecache
import sys
from collections import Counter
from pathlib import Path
from unittest.mock import patch

import torch
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
# Operations that wait for the GPU to see how large their result is, or to check it, and how often.
WAITING = {
    aten._local_scalar_dense.default: 1,
    aten.nonzero.default: 1,
    aten.masked_select.default: 1,
    aten.bincount.default: 2,  # the least and the largest
    aten.equal.default: 1,
    aten.multinomial.default: 1,
    aten.repeat_interleave.Tensor: 1,
    aten._unique2.default: 1,
    aten.unique_dim.default: 1,
    aten.unique_consecutive.default: 1,
}
COPYING = {
    aten._to_copy.default,
    aten.copy_.default,
    aten._foreach_copy_.default,
    aten.set_.source_Storage_storage_offset,
}
INDEXING = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}
INDEXING |= {aten._unsafe_index.Tensor}


class FakeGPU(TorchDispatchMode):
    """Inside ``with FakeGPU() as gpu`` there is a device "cuda" that finds what a real one would trip over.

    Operations over tensors of both devices raise the RuntimeError of CUDA. ``waits`` counts what makes the host wait
    for the device: "down", a value or its copy travels to the host (``item``, ``tolist``, ``bool``, ``cpu``, and what
    needs to know a size: ``nonzero``, a boolean index); "up", a copy to the device that is not ``non_blocking``.
    ``where`` has the line of each.
    """

    def __init__(self):
        super().__init__()
        self._there, self._generators = {}, {}  # what is there, kept alive: an address must not be used again
        self._recording = False
        self.reset()

    def reset(self):
        self.waits, self.where = Counter(), []

    def __enter__(self):
        self._patches = contextlib.ExitStack()
        for target, name, value in self._replaced():
            self._patches.enter_context(patch.object(target, name, value))
        return super().__enter__()

    def __exit__(self, *exception):
        super().__exit__(*exception)
        self._patches.close()

    # The book -----------------------------------------------------------------------------------------------------

    def device_of(self, tensor):
        return GPU if tensor.untyped_storage()._cdata in self._there else CPU

    def _mark(self, tensor):
        storage = tensor.untyped_storage()
        self._there[storage._cdata] = storage
        return tensor

    def _wait(self, direction, times=1):
        if self._recording:
            raise RuntimeError("CUDA error: operation not permitted when stream is capturing")
        self.waits[direction] += times
        frame = sys._getframe(1)
        while frame.f_code.co_filename == __file__ or "/torch/" in frame.f_code.co_filename:
            frame = frame.f_back
        name, line = frame.f_code.co_filename, frame.f_lineno
        self.where.append(f"{direction} {Path(name).name}:{line}: {linecache.getline(name, line).strip()}")

    # Operations ---------------------------------------------------------------------------------------------------

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        tensors = list(tensors_in((args, kwargs)))
        devices = {self.device_of(tensor) for tensor in tensors}
        wanted = kwargs.get("device")
        if wanted is not None:
            wanted, kwargs["device"] = normal(wanted), CPU
        if torch._C._current_autograd_node() is not None and devices <= {GPU}:
            wanted = GPU  # what a backward pass makes for itself is where its gradients are
        if func in INDEXING:
            self._index(func, *args, **kwargs)
            target = self.device_of(args[0])
        elif func in COPYING:
            target = self.device_of(args[0])
            if func is aten.copy_.default:
                self._copied(self.device_of(args[1]), target, *args[2:], **kwargs)
        else:
            self._check_same(func, tensors, devices)
            target = wanted or (GPU if GPU in devices else CPU)
            if target == GPU:
                generator = kwargs.get("generator")
                if generator is not None and generator._cdata not in self._generators:
                    raise RuntimeError("Expected a 'cuda' device type for generator but found 'cpu'")
                if func in WAITING:
                    self._wait("down", WAITING[func])
        out = func(*args, **kwargs)
        if target == GPU and func is not aten._local_scalar_dense.default:
            for tensor in tensors_in(out):
                self._mark(tensor)
        return out

    def _check_same(self, func, tensors, devices):
        if len(devices) < 2:
            return
        elementwise = torch.Tag.pointwise in func.tags or "_foreach" in func.name() or "_fused" in func.name()
        if not elementwise or any(t.ndim for t in tensors if self.device_of(t) == CPU):
            raise RuntimeError(
                f"Expected all tensors to be on the same device, found at least two devices, {GPU} and cpu ({func})"
            )

    def _index(self, func, x, indices, values=None, *args, **kwargs):
        indices = [index for index in indices if index is not None]
        device = self.device_of(x)
        if values is not None and self.device_of(values) != device and values.ndim:
            raise RuntimeError("Expected all tensors to be on the same device (index_put_)")
        filled = values is not None and values.numel() == 1 and len(indices) == 1  # by masked_fill
        for index in indices:
            if self.device_of(index) != device and (device == CPU or self.device_of(index) == GPU):
                raise RuntimeError("indices should be either on cpu or on the same device as the indexed tensor (cpu)")
            if self.device_of(index) != device:
                self._wait("up")
            elif device == GPU and index.dtype in (torch.bool, torch.uint8) and not filled:
                self._wait("down")

    def _copied(self, source, target, non_blocking=False, **kwargs):
        if source != target and not non_blocking:
            self._wait("up" if target == GPU else "down")

    # What does not come here as an operation ----------------------------------------------------------------------

    def _move(self, tensor, device, non_blocking=False, **options):
        """``tensor.to(device, ...)``, the only way from one device to the other."""
        device = self.device_of(tensor) if device is None else normal(device)
        if device == self.device_of(tensor):
            return self._to(tensor, **options) if options else tensor
        self._copied(self.device_of(tensor), device, non_blocking)
        with torch.utils._python_dispatch._disable_current_modes():
            moved = self._to(tensor, **options | {"copy": True})
        return self._mark(moved) if device == GPU else moved

    def _replaced(self):
        """(object, name, value): what stands in for PyTorch's own inside the block."""
        gpu, Tensor = self, torch.Tensor
        self._to = Tensor.to
        tolist, numpy, deepcopy = Tensor.tolist, Tensor.numpy, Tensor.__deepcopy__
        group = torch._C._group_tensors_by_device_and_dtype
        make_tensor, as_tensor, autocast = torch.tensor, torch.as_tensor, torch.autocast

        def to(tensor, *args, copy=False, **kwargs):
            options = {"copy": True} if copy else {}
            other = args[0] if args else kwargs.get("other")
            if isinstance(other, Tensor):
                device, options["dtype"] = gpu.device_of(other), other.dtype
                non_blocking = kwargs.get("non_blocking", False)
            else:
                device, dtype, non_blocking, memory_format = torch._C._nn._parse_to(*args, **kwargs)
                found = {"dtype": dtype, "memory_format": memory_format}
                options |= {name: value for name, value in found.items() if value is not None}
            return gpu._move(tensor, device, non_blocking, **options)

        def to_list(tensor):
            if gpu.device_of(tensor) == GPU:
                gpu._wait("down")
            return tolist(tensor)

        def to_numpy(tensor, **kwargs):
            if gpu.device_of(tensor) == GPU:
                raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first")
            return numpy(tensor, **kwargs)

        def copied(tensor, memo):
            found = deepcopy(tensor, memo)
            return gpu._mark(found) if gpu.device_of(tensor) == GPU else found

        def from_data(make):
            def function(data, *, device=None, **kwargs):
                made = make(data, **kwargs)
                return made if device is None else gpu._move(made, device)

            return function

        def grouped(lists, with_indices=False):
            found = group(lists, with_indices)
            return {(gpu.device_of(tensors[0][0]), key[1]): (tensors, i) for key, (tensors, i) in found.items()}

        class Generator(torch.Generator):
            def __new__(cls, device="cpu"):
                made = super().__new__(cls, "cpu")
                if normal(device) == GPU:
                    gpu._generators[made._cdata] = made
                return made

            device = property(lambda self: GPU if self._cdata in gpu._generators else CPU)

        class Autocast(autocast):
            def __init__(self, device_type, *args, **kwargs):
                super().__init__("cpu" if device_type == "cuda" else device_type, *args, **kwargs)

        class Graph:
            """Runs the step anew instead of replaying it; while it is recorded, nothing may wait."""

            def __init__(self, step, device):
                self.replay = step
                step()
                gpu._recording = True
                try:
                    step()
                finally:
                    gpu._recording = False

        class Event:
            """What was recorded has happened."""

            def record(self):
                """Nothing is to be kept."""

            synchronize = record

        from latentcast.priors import sampling

        yield torch.cuda, "_lazy_init", lambda: None
        yield torch.cuda, "is_available", lambda: True
        yield torch.cuda, "Event", Event
        yield Tensor, "device", property(gpu.device_of)
        yield Tensor, "is_cuda", property(lambda tensor: gpu.device_of(tensor) == GPU)
        yield Tensor, "is_cpu", property(lambda tensor: gpu.device_of(tensor) == CPU)
        yield Tensor, "to", to
        yield Tensor, "cuda", lambda tensor, device=None, non_blocking=False: gpu._move(tensor, GPU, non_blocking)
        yield Tensor, "cpu", lambda tensor: gpu._move(tensor, "cpu")
        yield Tensor, "tolist", to_list
        yield Tensor, "numpy", to_numpy
        yield Tensor, "__deepcopy__", copied
        yield torch, "tensor", from_data(make_tensor)
        yield torch, "as_tensor", from_data(as_tensor)
        yield torch, "Generator", Generator
        for name in ("get_autocast_dtype", "is_autocast_enabled"):
            query = getattr(torch, name)
            yield torch, name, lambda device_type, query=query: query("cpu" if device_type == "cuda" else device_type)
        yield torch._C, "_group_tensors_by_device_and_dtype", grouped
        for module in (torch, torch.amp):
            yield module, "autocast", Autocast
        yield sampling, "record_graph", Graph


def tensors_in(x):
    if isinstance(x, torch.Tensor):
        yield x
    elif isinstance(x, (tuple, list, dict)):
        for value in x.values() if isinstance(x, dict) else x:
            yield from tensors_in(value)


def normal(device):
    """ "cuda" means the first GPU."""
    return GPU if torch.device(device).type == "cuda" else CPU
