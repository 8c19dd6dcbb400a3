"""Small real video files. Each frame shows its own number in black and white bars, so that a test can tell which frame
it was given whatever the codec did to it."""

import av
import numpy as np

N_BARS = 8


def counter_frames(n_frames, height=48, width=64, first=0):
    """(n_frames, height, width, 3) uint8; frame i shows ``first + i`` (< 256) in binary, over a drifting gradient."""
    frames = np.zeros((n_frames, height, width, 3), np.uint8)
    across = np.arange(width)
    for i, frame in enumerate(frames):
        frame[:] = (60 + (2 * across + 3 * i) % 120)[None, :, None]
        for bar in range(N_BARS):
            left = width * bar // N_BARS
            frame[height // 4 : 3 * height // 4, left : left + width // N_BARS] = 255 * (((first + i) >> bar) & 1)
    return frames


def read_counter(frames):
    """Numbers shown by (n, C, H, W) frames that keep their width, black being the least value."""
    frames = frames.float()
    low, high = frames.amin(), frames.amax()
    height, width = frames.shape[2:]
    strip = frames[:, :, 3 * height // 8 : 5 * height // 8].mean((1, 2))
    centres = [width * (2 * bar + 1) // (2 * N_BARS) for bar in range(N_BARS)]
    bits = strip[:, centres] > (low + high) / 2
    return (bits * 2 ** np.arange(N_BARS)).sum(1).tolist()


def encode(
    path,
    frames,
    fps=25,
    codec="libx264",
    pix_fmt="yuv420p",
    options=None,
    pts=None,
    rotation=0,
    title=None,
    format=None,
    **container,
):
    """Write (n, H, W, 3) uint8 frames with PyAV; ``pts``: times of the frames in units of 1 / fps."""
    with av.open(str(path), "w", format, options=container) as file:
        stream = file.add_stream(codec, rate=fps)
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], pix_fmt
        stream.codec_context.thread_count = 2  # else the file's bytes depend on the machine's cores
        stream.options = {"crf": "12", "g": "12"} if options is None and codec == "libx264" else options or {}
        if rotation:
            stream.set_display_rotation(rotation)
        if title:
            file.metadata["title"] = title
        for i, array in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(array, format="rgb24")
            if pts is not None:
                frame.pts = pts[i]
            file.mux(stream.encode(frame))
        file.mux(stream.encode(None))
    return path


def cut_off(path, target, share=0.6):
    """A copy of a file that ends early."""
    content = path.read_bytes()
    target.write_bytes(content[: int(len(content) * share)])
    return target


def overwrite_middle(path, target, n_bytes=400):
    """A copy of a file with zeros in its middle."""
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + n_bytes] = bytes(n_bytes)
    target.write_bytes(content)
    return target
