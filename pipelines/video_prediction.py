"""From context frames to predicted futures."""

import difflib
import json
from dataclasses import dataclass

import numpy as np
import PIL.Image
import torch
from diffusers.utils import BaseOutput

from latentcast.config import check_counts, one_line
from latentcast.modeling import eval_mode
from latentcast.schemas import Count, Rate
from latentcast.tokenizers.base import check_frames

from .base import Component, PipelineIndex, VideoPipeline

OUTPUT_TYPES = ("pt", "np", "pil")


@dataclass
class VideoPipelineOutput(BaseOutput):
    """What a pipeline returns, for B contexts with S futures each.

    frames: "pt": (B, S, T, C, H, W) float32 tensor in [-1, 1]; "np": (B, S, T, H, W, C) float32 array in [0, 1];
        "pil": lists of lists of lists of images, [B][S][T].
    """

    frames: torch.Tensor | np.ndarray | list


class VideoPredictionIndex(PipelineIndex):
    """``model_index.json`` of a VideoPredictionPipeline."""

    prior: Component
    tokenizer: Component | None = None
    scheduler: Component | None = None
    n_context: Count | None = None
    fps: Rate | None = None


class VideoPredictionPipeline(VideoPipeline):
    """Encode the context, let the prior continue it, decode the continuation.

    Args:
        prior: the model that predicts, in the space that its ``accepts`` names.
        tokenizer: the tokenizer whose latents the prior was trained on. A prior over pixels needs none.
        scheduler: noise scheduler, for priors whose sampler takes one.
        n_context: number of context frames that the prior was trained with; kept for tools.
        fps: frames per second of the clips that the prior was trained on; kept for tools.
    Raises:
        ValueError: the prior was trained on the latents of another tokenizer, or does not take the scheduler.
    """

    index_schema = VideoPredictionIndex
    _optional_components = ["tokenizer", "scheduler"]  # noqa: RUF012 (diffusers' name)
    model_cpu_offload_seq = "tokenizer->prior"  # and back

    def __init__(self, prior, tokenizer=None, scheduler=None, n_context=None, fps=None):
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
        self.register_to_config(n_context=n_context, fps=fps)

    @torch.no_grad()
    def __call__(
        self,
        frames,
        n_frames=None,
        num_samples=1,
        generator=None,
        output_type="pt",
        frame_times=None,
        decode_batch=256,
        **sampler,
    ):
        """Predict futures.

        Args:
            frames: (B, T, C, H, W) or (T, C, H, W) float in [-1, 1], the context.
            n_frames: number of frames to predict; None: one for each of ``frame_times``, or 16.
            num_samples: number of futures for each context.
            generator: torch.Generator; the same seed gives the same futures.
            output_type: "pt", "np" or "pil".
            frame_times: (n_frames,) or (B, n_frames) float, in units of the context's frame interval, with its last
                frame at 0. Only for priors over continuous time.
            decode_batch: number of frames decoded at once, which bounds the memory.
            **sampler: options of the prior's sampler; ``prior.sampler_options()`` lists them. ``scheduler``, where the
                prior takes one, only in a pipeline without that component.
        Returns:
            VideoPipelineOutput
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
        if generator is not None and not isinstance(generator, torch.Generator):
            raise ValueError(f"generator: expected one torch.Generator, found {type(generator).__name__}")
        frames = self.check_inputs(frames, n_frames, num_samples, output_type, frame_times, sampler, decode_batch)
        if frame_times is not None:
            sampler["frame_times"] = frame_times
        if self.scheduler is not None:
            sampler["scheduler"] = self.scheduler

        with eval_mode(self.prior, self.tokenizer):
            context = self.encode(frames)
            _onload(self.prior)
            future = self.prior.sample(
                context,
                n_frames,
                num_samples=num_samples,
                generator=generator,
                progress=self.progress_bar,
                **sampler,
            )
            predicted = self.decode(future, decode_batch)
        self.maybe_free_model_hooks()
        return VideoPipelineOutput(frames=_convert(predicted, output_type))

    def encode(self, frames):
        """(B, T, C, H, W) in [-1, 1] -> what the prior accepts: codes, latents or the frames themselves."""
        frames = frames.to(self._execution_device)
        if self.prior.accepts == "pixels":
            return frames.to(self.prior.dtype)
        _onload(self.tokenizer)
        output = self.tokenizer.encode(frames)
        return output.codes if self.prior.accepts == "codes" else output.latents.to(self.prior.dtype)

    def decode(self, future, decode_batch=256):
        """What the prior predicts, (B, S, T, ...) -> (B, S, T, C, H, W) float32 in [-1, 1]. Never quantises."""
        if self.prior.accepts == "pixels":
            return future.float().clamp(-1, 1)
        _onload(self.tokenizer)
        frames = []
        for part in future.flatten(0, 2).split(decode_batch):
            part = part[:, None]
            latents = self.tokenizer.codes_to_latents(part) if self.prior.accepts == "codes" else part
            frames.append(self.tokenizer.decode(latents)[:, 0].float().clamp(-1, 1))
        return torch.cat(frames).unflatten(0, future.shape[:3])

    def check_inputs(self, frames, n_frames, num_samples, output_type, frame_times=None, sampler=(), decode_batch=1):
        """Refuse what cannot be predicted from -> frames as (B, T, C, H, W)."""
        if torch.is_tensor(frames) and frames.ndim == 4:
            frames = frames[None]
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
        return frames


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
    if output_type == "pt":
        return frames
    array = ((frames + 1) / 2).movedim(-3, -1).cpu().numpy()
    if output_type == "np":
        return array
    pixels = (array * 255).round().astype(np.uint8)
    pixels = pixels[..., 0] if pixels.shape[-1] == 1 else pixels
    return [[[PIL.Image.fromarray(image) for image in future] for future in futures] for futures in pixels]
