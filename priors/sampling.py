"""What the samplers of autoregressive priors share: drawing codes, sliding windows, recorded steps."""

import logging
import math
from collections.abc import Callable
from numbers import Real

import torch
from jaxtyping import Float, Int
from torch import Tensor

from latentcast import schemas
from latentcast.config import one_line

from .base import Prior

logger = logging.getLogger("latentcast")

GUIDANCE = {"guidance_scale": {"least": 0, "most": 100}}  # ``Prior.sampler_ranges`` of what ``check_guidance`` checks
DRAWING = {  # ... and of what ``check_sampling`` checks
    "temperature": {"least": 0},
    "top_k": {"kind": int, "least": 1},
    "top_p": {"kind": float, "above": 0, "most": 1},
}


def check_sampling(temperature: float, top_k: int | None, top_p: float | None) -> None:
    """Refuse sampling options outside their ranges."""
    if not (is_number(temperature) and temperature >= 0):
        raise ValueError(f"temperature: expected a number >= 0, found {one_line(temperature)}")
    if top_k is not None and not (is_number(top_k) and top_k >= 1 and top_k % 1 == 0):
        raise ValueError(f"top_k: expected an integer >= 1 or None, found {one_line(top_k)}")
    if top_p is not None and not (is_number(top_p) and 0 < top_p <= 1):
        raise ValueError(f"top_p: expected a number in (0, 1] or None, found {one_line(top_p)}")


def check_guidance(scale: float, prior: Prior) -> bool:
    """Whether ``guidance_scale`` asks for predictions without conditions beside those with them.

    Raises:
        ValueError: a scale out of the range of ``GUIDANCE``, or other than 1 for a prior without conditions.
    """
    check_numbers(**GUIDANCE["guidance_scale"], guidance_scale=scale)
    if scale != 1 and prior.conditioner is None:
        raise ValueError(f"guidance_scale: expected 1 for a {type(prior).__name__} without conditions, found {scale}")
    return bool(scale != 1)


def guided(output: Float[Tensor, "MM ..."], scale: float) -> Float[Tensor, "MM//2 ..."]:
    """Classifier-free guidance (Ho and Salimans 2022): rows with conditions, then the same without -> half the rows,
    ``scale`` of the way from what is predicted without to what is predicted with them."""
    told, untold = output.chunk(2)
    return untold + scale * (told - untold)


def is_number(value: object) -> bool:
    """Whether it is a real number that a float can hold, and finite; False and True are not."""
    try:
        return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # of a whole number
        return False


def check_numbers(least: float, most: float, **numbers: float | None) -> None:
    """Refuse what is no number from ``least`` to ``most``, by name."""
    for name, value in numbers.items():
        if not (is_number(value) and least <= value <= most):
            raise ValueError(f"{name}: expected a number from {least} to {most}, found {one_line(value)}")


def check_switches(**switches: bool) -> None:
    """Refuse switches that are neither True nor False, by name."""
    for name, value in switches.items():
        if not isinstance(value, bool):
            raise ValueError(f"{name}: expected true or false, found {one_line(value)}")


def check_caching(use_cache: bool, compile: bool) -> None:
    """Refuse switches of a sampler that caches, which has steps of its own to compile, and of its reference, which has
    none."""
    check_switches(use_cache=use_cache, compile=compile)
    if compile and not use_cache:
        raise ValueError("compile: expected false with use_cache=False, found True")


def draw(
    logits: Float[Tensor, "*rows K"],
    uniform: Float[Tensor, "*rows"],
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
) -> Int[Tensor, "*rows"]:
    """Sample codes by inverting the distribution function at given uniform numbers.

    Taking the randomness as an argument makes a sample the same with and without a cache, and lets a whole step be
    recorded as a CUDA graph.

    Args:
        uniform: in [0, 1).
        temperature: divides the logits; 0 takes the most likely code.
        top_k: keep the k most likely codes. top_p: keep the fewest codes that hold this much probability.
    """
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits.float()
    if temperature != 1:
        # From the largest on, and by no less than float32 can tell from 0: no quotient is infinite at the likeliest.
        logits = (logits - logits.amax(-1, keepdim=True)) / max(float(temperature), torch.finfo(torch.float32).tiny)
    if top_k is not None and top_k < logits.shape[-1]:
        logits = logits.masked_fill(logits < logits.topk(int(top_k)).values[..., -1:], -torch.inf)
    probabilities = logits.softmax(-1)
    if top_p is not None and top_p < 1:
        ordered, order = probabilities.sort(dim=-1, descending=True)
        short = ordered.cumsum(-1) - ordered < float(top_p)  # a code stays if those before it fall short
        short[..., 0] = True  # also of a top_p that is 0 in float32
        ordered = ordered * short
        probabilities = torch.zeros_like(probabilities).scatter(-1, order, ordered)
    cumulative = probabilities.cumsum(-1)
    # Below the total even after rounding, so that a code of probability zero at the end is never drawn.
    threshold = uniform.clamp(max=1 - 1e-6)[..., None] * cumulative[..., -1:]
    return (cumulative <= threshold).sum(-1)


def sliding_windows(n_context: int, n_frames: int, length: int, overlap: int) -> list[tuple[int, int]]:
    """How a model over ``length`` frames gets past them: (known, new) frames of each window.

    The first window holds the context, or its last ``overlap`` frames where it fills the window; each further one the
    last ``overlap`` frames of what there is by then.
    """
    known = n_context if n_context < length else overlap
    windows = [(known, min(n_frames, length - known))]
    while (done := sum(new for _, new in windows)) < n_frames:
        windows.append((overlap, min(n_frames - done, length - overlap)))
    return windows


def fixed_step(step: Callable[[], object], device: torch.device, compiled: bool) -> Callable[[], object] | None:
    """What does as ``step``, whose inputs and outputs are fixed buffers, in few operations: on a GPU a CUDA graph,
    elsewhere what torch.compile makes of it; None where nothing of the kind is wanted."""
    if device.type == "cuda":
        return record_graph(torch.compile(step, dynamic=False) if compiled else step, device).replay
    return CompiledStep(step) if compiled else None


class CompiledStep:
    """``step()`` fused by torch.compile, for a CPU; where that fails, as it is, and the log says why.

    The first call in a process compiles, for tens of seconds, or reads what torch has kept on the disk; steps of
    the same shapes share it.
    """

    def __init__(self, step: Callable[[], object]) -> None:
        self._step, self._run = step, None  # _run: what is called once it has worked

    def __call__(self) -> None:
        if self._run is not None:
            self._run()
            return
        # By the wrapper in C++ many small operations follow each other faster.
        compiled = torch.compile(self._step, dynamic=False, options={"cpp_wrapper": True})
        try:
            compiled()
        except Exception as error:  # of any of torch's compilers, or of the one for C++ that they call
            reason = schemas.one_line(error, 200) or type(error).__name__
            logger.warning("compile: sampling goes on uncompiled, torch.compile failed: %s", reason)
            self._run = self._step
            self._run()
        else:
            self._run = compiled


def record_graph(step: Callable[[], object], device: torch.device) -> torch.cuda.CUDAGraph:
    """Record ``step()``, whose inputs and outputs are fixed buffers on a GPU, as a CUDA graph to ``replay()``."""
    with torch.cuda.device(device):  # streams belong to the current device; recorded on another's, a graph is empty
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):  # libraries set themselves up on the first runs, which a graph must not record
                step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # Thread-local: the thread that pins a loader's batches may go on meanwhile.
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            step()
    return graph
