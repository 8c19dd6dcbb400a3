"""From context frames to predicted futures."""

import difflib
import functools
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import diffusers
import numpy as np
import PIL.Image
import torch
from diffusers.utils import BaseOutput
from jaxtyping import Float, Shaped
from torch import Tensor

from latentcast.config import check_counts, is_whole, one_line
from latentcast.data.video.reader import CROPS, check_crop
from latentcast.figures.sheets import shown_channels
from latentcast.modeling import eval_mode
from latentcast.priors.base import Prior, Rollout, as_keyword
from latentcast.schemas import Count, Rate
from latentcast.shapes import Clip, Conditions, Frames, Futures, Numbers
from latentcast.tokenizers.base import FrameTokenizer, check_frames

from .base import Component, PipelineIndex, VideoPipeline
from .inputs import FramesLike, as_frames

OUTPUT_TYPES = ("pt", "np", "pil", "latent")


@dataclass
class VideoPipelineOutput(BaseOutput):
    """What a pipeline returns, for B contexts with S futures each.

    frames: "pt": (B, S, T, C, H, W) float32 tensor in [-1, 1]; "np": (B, S, T, H, W, C) float32 array in [0, 1];
        "pil": lists of lists of lists of images, [B][S][T], see ``shown_channels``; "latent": what the prior predicted,
        not decoded: codes (B, S, T, h, w, n_codebooks), latents (B, S, T, D, h, w), or the frames themselves.
    """

    frames: torch.Tensor | np.ndarray | list


class VideoPredictionIndex(PipelineIndex):
    """``model_index.json`` of a VideoPredictionPipeline."""

    prior: Component
    tokenizer: Component | None = None
    scheduler: Component | None = None
    n_context: Count | None = None
    fps: Rate | None = None
    crop: Literal[CROPS] = "center"


class VideoPredictionPipeline(VideoPipeline):
    """Encode the context, let the prior continue it, decode the continuation.

    Args:
        prior: the model that predicts, in the space that its ``accepts`` names.
        tokenizer: the tokenizer whose latents the prior was trained on. A prior over pixels needs none.
        scheduler: noise scheduler, for priors whose sampler takes one.
        n_context: number of context frames that the prior was trained with; kept for tools.
        fps: frames per second of the clips that the prior was trained on; kept for tools.
        crop: how the videos that it was trained on got to the shape of its frames (see ``video.reader.fit_frames``), by
            which tools bring others to it, and this pipeline images.
    Raises:
        ValueError: the prior was trained on the latents of another tokenizer, or does not take the scheduler.
    """

    index_schema = VideoPredictionIndex
    _optional_components = ["tokenizer", "scheduler"]  # noqa: RUF012 (diffusers' name)
    model_cpu_offload_seq = "tokenizer->prior"  # and back

    def __init__(
        self,
        prior: Prior,
        tokenizer: FrameTokenizer | None = None,
        scheduler: diffusers.SchedulerMixin | None = None,
        n_context: int | None = None,
        fps: int | float | None = None,  # diffusers, which compares types with these, takes no int for a float
        crop: str = "center",
    ) -> None:
        super().__init__()
        spec = prior.config.latent_spec
        if tokenizer is None and prior.accepts != "pixels":
            if spec["kind"] != "pixels":
                raise ValueError(
                    f"{type(prior).__name__} predicts {prior.accepts}: it needs the tokenizer they came from"
                )
            # 256 levels a channel: frames are codes already.
            from latentcast.tokenizers.pixel import PixelTokenizer

            tokenizer = PixelTokenizer.from_spec(spec)
        if tokenizer is not None:
            _check_same_spec(spec, tokenizer.latent_spec)
            if prior.accepts == "codes" and not tokenizer.is_discrete:
                raise ValueError(f"{type(prior).__name__} predicts codes; {type(tokenizer).__name__} has none")
        if scheduler is not None and "scheduler" not in prior.sampler_options():
            raise ValueError(f"{type(prior).__name__}: its sampler takes no scheduler")
        self.register_modules(prior=prior, tokenizer=tokenizer, scheduler=scheduler)
        self.register_to_config(n_context=n_context, fps=fps, crop=check_crop(crop))

    @torch.no_grad()
    def __call__(
        self,
        frames: FramesLike,
        n_frames: int | None = None,
        num_samples: int = 1,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        output_type: str = "pt",
        frame_times: Numbers | None = None,
        decode_batch: int = 256,
        num_inference_steps: int | None = None,
        value_range: Sequence[int] | None = None,
        conditions: Conditions | None = None,
        output_layers: int | None = None,
        return_dict: bool = True,
        **sampler: object,
    ) -> VideoPipelineOutput | tuple:
        """Predict futures.

        Args:
            frames: (B, T, C, H, W) or (T, C, H, W) float in [-1, 1], the context; or uint8, arrays, PIL images, which
                are brought to the model's size, and lists of them, see ``as_frames``.
            n_frames: number of frames to predict; None: one for each of ``frame_times``, or 16.
            num_samples: number of futures for each context.
            generator: torch.Generator; the same seed gives the same futures. A list, one for each context: each is
                predicted by itself, so that its futures do not depend on the rest of the batch, to the bit.
            output_type: "pt", "np", "pil" or "latent".
            frame_times: (n_frames,) or (B, n_frames) float, in units of the context's frame interval, with its last
                frame at 0. Only for priors over continuous time.
            decode_batch: number of frames decoded at once, which bounds the memory.
            num_inference_steps: diffusers' name of the sampler option ``n_steps``.
            value_range: (-1, 1) or (0, 1), of ``frames`` that are floats; None: see ``as_frames``.
            conditions: what the prior is told, of all in ``prior.conditions``: name -> (B, T, *shape) of those per
                frame, T the context's and the predicted ones together, (B, *shape) of those per video, or the same
                without B, for all contexts. What stands at frame t is what led to it. None: nothing is told.
            output_layers: of a tokenizer whose codes have layers, coarse to fine: only the first so many are decoded.
            return_dict: False gives the plain tuple (frames,).
            **sampler: options of the prior's sampler; ``prior.sampler_options()`` lists them. ``scheduler``, where the
                prior takes one, only in a pipeline without that component. ``canvas``, of priors that take one, may be
                frames, as ``frames``.
        Returns:
            VideoPipelineOutput, or a tuple
        Raises:
            ValueError: wrong shape or range of frames, too short a context, or an option that is not known.
        """
        if frame_times is not None:
            try:
                frame_times = torch.as_tensor(frame_times, dtype=torch.float32, device=self._execution_device)
            except (TypeError, ValueError, RuntimeError, OverflowError):
                raise ValueError(f"frame_times: expected numbers, found {one_line(frame_times)}") from None
        if n_frames is None:
            n_frames = 16 if frame_times is None else torch.atleast_1d(frame_times).shape[-1]
        if num_inference_steps is not None:
            if "n_steps" not in self.prior.sampler_options() or "n_steps" in sampler:
                found = (
                    "n_steps as well" if "n_steps" in sampler else f"a {type(self.prior).__name__}, which takes none"
                )
                raise ValueError(f"num_inference_steps: expected a prior with n_steps, and these once, found {found}")
            sampler["n_steps"] = num_inference_steps
        frames, conditions = self._as_frames(frames, value_range), self._batched(conditions)
        self.check_inputs(frames, n_frames, num_samples, output_type, frame_times, sampler, decode_batch)
        self._check_generator(generator, len(frames))
        self._check_layers(output_layers)
        self._encode_canvas(sampler, value_range)
        if frame_times is not None:
            sampler["frame_times"] = frame_times
        if self.scheduler is not None:
            sampler["scheduler"] = self.scheduler

        decode = functools.partial(self.decode, decode_batch=decode_batch, n_layers=output_layers)
        if output_type == "latent":
            decode = None
        with eval_mode(self.prior, self.tokenizer):
            if isinstance(generator, (list, tuple)):
                bar = OneBar(self.progress_bar, len(frames))
                parts = []
                for i, own in enumerate(generator):
                    options = self.prior.options_of(sampler, i, len(frames), n_frames)
                    told = conditions and {name: _row(value, i, len(frames)) for name, value in conditions.items()}
                    parts.append(
                        self._predict(frames[i : i + 1], n_frames, num_samples, own, bar, told, options, decode)
                    )
                predicted = torch.cat(parts)
            else:
                own, bar = generator, self.progress_bar
                predicted = self._predict(frames, n_frames, num_samples, own, bar, conditions, sampler, decode)
        self.maybe_free_model_hooks()
        predicted = _convert(predicted, output_type)
        return VideoPipelineOutput(frames=predicted) if return_dict else (predicted,)

    @torch.no_grad()
    def rollout(
        self,
        frames: FramesLike,
        num_samples: int = 1,
        generator: torch.Generator | None = None,
        conditions: Conditions | None = None,
        value_range: Sequence[int] | None = None,
        **sampler: object,
    ) -> "VideoRollout":
        """Begin futures that are predicted one frame at a time, each told as it comes what leads to it: a world model.

        Args:
            frames, num_samples, value_range: as for a call.
            generator: torch.Generator; with the same seed and conditions, frames are those of a call.
            conditions: of the context's frames, as for a call; None: nothing is told of them.
            **sampler: options of the prior's sampler.
        Returns:
            VideoRollout
        Raises:
            ValueError: as for a call; or a prior that predicts several frames together.
        """
        frames = self._as_frames(frames, value_range)
        self.check_inputs(frames, 1, num_samples, "pt", None, sampler)
        self._check_generator(generator, len(frames))
        if isinstance(generator, (list, tuple)):
            raise ValueError(f"generator: expected one for a rollout, found a list of {len(generator)}")
        if self.scheduler is not None:
            sampler["scheduler"] = self.scheduler
        self._encode_canvas(sampler, value_range)
        with eval_mode(self.prior, self.tokenizer):
            context = self.encode(frames)
        settings = {"num_samples": num_samples, "generator": generator, "conditions": self._batched(conditions)}
        return VideoRollout(self, self.prior.rollout(context, **settings, **sampler))

    def _as_frames(self, frames, value_range):
        spec = self.prior.config.latent_spec
        sizes = (spec[f"frame_{name}"] for name in ("channels", "height", "width"))
        return as_frames(frames, *sizes, value_range=value_range, crop=self.config.crop)

    def _batched(self, conditions, of_one_frame=False):
        """Conditions with a batch axis, where they come without; the prior checks them."""
        if not hasattr(conditions, "items"):
            return conditions
        found = {}
        for name, value in conditions.items():
            spec = self.prior.conditions.get(name)
            if spec is not None:
                try:
                    value = torch.as_tensor(value)
                except (TypeError, ValueError, RuntimeError, OverflowError):
                    raise ValueError(f"conditions: {name}: expected numbers, found {one_line(value)}") from None
                if value.ndim == len(spec["shape"]) + (spec["per"] == "frame" and not of_one_frame):
                    value = value[None]
            found[name] = value
        return found

    def _predict(self, frames, n_frames, num_samples, generator, progress, conditions, sampler, decode):
        """Encode, continue, and ``decode``, if that is not None."""
        context = self.encode(frames)
        _onload(self.prior)
        settings = {"num_samples": num_samples, "generator": generator, "progress": progress, **as_keyword(conditions)}
        future = self.prior.sample(context, n_frames, **settings, **sampler)
        return future if decode is None else decode(future)

    def _check_generator(self, generator, n_contexts):
        several = isinstance(generator, (list, tuple))
        for one in generator if several else [generator]:
            if not isinstance(one, torch.Generator) and (several or one is not None):
                raise ValueError(
                    f"generator: expected a torch.Generator, or a list with one for each context, found "
                    f"{'a list with ' if several else ''}{type(one).__name__}"
                )
        if several and len(generator) != n_contexts:
            raise ValueError(f"generator: expected one for each of {n_contexts} contexts, found {len(generator)}")

    def _check_layers(self, output_layers):
        if output_layers is None:
            return
        n = len(self.prior.config.latent_spec["codebook_sizes"])
        if self.prior.accepts != "codes" or not self.tokenizer.has_layers:
            found = f"{type(self.prior).__name__} over {type(self.tokenizer or self.prior).__name__}"
            raise ValueError(f"output_layers: expected a prior over codes in layers (HRVQVAE), found {found}")
        if not is_whole(output_layers, 1) or output_layers > n:
            raise ValueError(f"output_layers: expected 1 to {n}, found {one_line(output_layers)}")

    def _encode_canvas(self, sampler, value_range):
        """Frames as the sampler option ``canvas`` become the codes that the prior takes, in place."""
        canvas = sampler.get("canvas")
        if torch.is_tensor(canvas) and canvas.is_floating_point():
            with eval_mode(self.tokenizer):
                sampler["canvas"] = self.encode(self._as_frames(canvas, value_range))

    def encode(self, frames: Frames) -> Clip:
        """Frames, in [-1, 1], to what the prior accepts: codes, latents or the frames themselves."""
        frames = frames.to(self._execution_device)
        if self.prior.accepts == "pixels":
            return frames.to(self.prior.dtype)
        _onload(self.tokenizer)
        output = self.tokenizer.encode(frames)
        return output.codes if self.prior.accepts == "codes" else output.latents.to(self.prior.dtype)

    def decode(
        self, future: Shaped[Tensor, "B S T _ _ _"], decode_batch: int = 256, n_layers: int | None = None
    ) -> Futures:
        """What the prior predicts to frames, float32 in [-1, 1]. Never quantises.

        Args:
            decode_batch: number of frames decoded at once.
            n_layers: of codes in layers, so many are decoded; None: all.
        """
        if self.prior.accepts == "pixels":
            return future.float().clamp(-1, 1)
        _onload(self.tokenizer)
        frames = []
        for part in future.flatten(0, 2).split(decode_batch):
            part = part[:, None]
            latents = part
            if self.prior.accepts == "codes":
                latents = self.tokenizer.codes_to_latents(part, **({} if n_layers is None else {"n_layers": n_layers}))
            frames.append(self.tokenizer.decode(latents)[:, 0].float().clamp(-1, 1))
        return torch.cat(frames).unflatten(0, future.shape[:3])

    def check_inputs(
        self,
        frames: Frames,
        n_frames: int,
        num_samples: int,
        output_type: str,
        frame_times: Float[Tensor, "..."] | None = None,
        sampler: Sequence[str] | dict = (),
        decode_batch: int = 1,
    ) -> None:
        """Refuse what cannot be predicted from."""
        spec = self.prior.config.latent_spec
        check_frames(frames, spec["frame_channels"], spec["frame_height"], spec["frame_width"])
        check_counts(n_frames=n_frames, num_samples=num_samples, decode_batch=decode_batch)
        if not len(frames):
            raise ValueError("frames: expected at least one clip, found none")
        self.prior.check_context(frames.shape[1], frames.shape[1] + n_frames)
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"output_type: expected one of {', '.join(OUTPUT_TYPES)}, found {output_type!r}")
        known = self.prior.sampler_options()
        if frame_times is not None:
            if "frame_times" not in known:
                raise ValueError(f"{type(self.prior).__name__} predicts whole frame steps: it takes no frame_times")
            shape = tuple(frame_times.shape)
            if shape not in ((n_frames,), (len(frames), n_frames)):
                raise ValueError(
                    f"frame_times: expected shape ({n_frames},) or ({len(frames)}, {n_frames}), found {shape}"
                )
        taken = {"frame_times"} | ({"scheduler"} if self.scheduler is not None else set())
        known = [name for name in known if name not in taken]
        for name in sampler:
            if name not in known:
                close = difflib.get_close_matches(name, known, n=1)
                hint = f"; did you mean {close[0]!r}?" if close else ""
                raise ValueError(f"unknown sampler option {name!r}{hint} (known: {', '.join(known) or 'none'})")


class VideoRollout:
    """Futures of some contexts, predicted frame by frame; see ``VideoPredictionPipeline.rollout``."""

    def __init__(self, pipe: VideoPredictionPipeline, rollout: Rollout) -> None:
        self.pipe, self._rollout = pipe, rollout

    @torch.no_grad()
    def step(self, conditions: Conditions | Numbers | None = None) -> Float[Tensor, "B S C H W"]:
        """The next frame of each future, float32 in [-1, 1].

        Args:
            conditions: what leads to it: name -> (B, *shape), or (*shape) for all contexts, of all conditions per
                frame; a value alone where there is but one. None: nothing is told.
        """
        if conditions is not None and not hasattr(conditions, "items"):
            names = [name for name, spec in self.pipe.prior.conditions.items() if spec["per"] == "frame"]
            if len(names) != 1:
                found = f"{', '.join(names) or 'none'}, found {one_line(conditions)}"
                raise ValueError(f"conditions: expected values by name, of {found}")
            conditions = {names[0]: conditions}
        frame = self._rollout.step(self.pipe._batched(conditions, of_one_frame=True))
        with eval_mode(self.pipe.tokenizer):
            return self.pipe.decode(frame[:, :, None])[:, :, 0]


class OneBar:
    """One progress bar for the ``n`` calls of a sampler that follow one another, each as long as the first."""

    def __init__(self, progress: Callable, n: int) -> None:
        self.progress, self.n, self.bar, self.done = progress, n, None, 0

    def __call__(self, total: int) -> "OneBar":
        if self.bar is None:
            self.bar = self.progress(total=total * self.n)
        return self

    def __enter__(self):
        return self.bar

    def __exit__(self, *exception):
        self.done += 1
        if self.done == self.n or exception[0] is not None:
            self.bar.close()


def _row(value, i, n):
    """Row ``i`` of what has one for each of ``n`` contexts; anything else as it is, for the prior to check."""
    return value[i : i + 1] if torch.is_tensor(value) and value.ndim and len(value) == n else value


def _onload(model):
    """Bring a model to the GPU that ``enable_model_cpu_offload`` keeps on the CPU; that alone minds ``forward``."""
    hook = getattr(model, "_hf_hook", None)
    if hook is not None:
        hook.pre_forward(model)


def _check_same_spec(prior_spec, tokenizer_spec):
    """Refuse a prior and a tokenizer that speak of different latents, naming both sides."""
    ours, theirs = (json.loads(json.dumps(dict(spec))) for spec in (prior_spec, tokenizer_spec))
    differing = [key for key in sorted(ours.keys() | theirs.keys()) if ours.get(key) != theirs.get(key)]
    if differing:
        sides = "; ".join(f"{key} {ours.get(key)} against {theirs.get(key)}" for key in differing)
        raise ValueError(
            f"the prior was trained on other latents than the tokenizer gives (prior against tokenizer): {sides}"
        )


def _convert(frames, output_type):
    """(B, S, T, C, H, W) in [-1, 1] -> what ``output_type`` names."""
    if output_type in ("pt", "latent"):
        return frames
    array = ((frames + 1) / 2).movedim(-3, -1).cpu().numpy()
    if output_type == "np":
        return array
    pixels = shown_channels((array * 255).round().astype(np.uint8), axis=-1)
    pixels = pixels[..., 0] if pixels.shape[-1] == 1 else pixels
    return [[[PIL.Image.fromarray(image) for image in future] for future in futures] for futures in pixels]
