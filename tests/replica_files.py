"""Small replicas of data sets as they are published: the same folders and kinds of files, with frames that show their
numbers (see video_files.py) in the central square."""

import numpy as np
from PIL import Image
from video_files import counter_frames, encode


def wide_frames(n_frames, height, width, first=0):
    """(n_frames, height, width, 3) uint8; the central square shows each frame's number, beside it is noise."""
    frames = np.random.default_rng(0).integers(0, 256, (n_frames, height, width, 3), np.uint8)
    left = (width - height) // 2
    frames[:, :, left : left + height] = counter_frames(n_frames, height, height, first)
    return frames


def write_pictures(folder, frames, name, numbers=None):
    """One picture a frame; ``name`` is a pattern such as "{:010d}.png"."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, frame in zip(numbers or range(len(frames)), frames):
        Image.fromarray(frame).save(folder / name.format(number))


def cityscapes_sequence(root, split, city, recording, start, first=0, n_frames=30, size=(64, 128)):
    """A sequence of Cityscapes below ``root/leftImg8bit_sequence``."""
    folder = root / "leftImg8bit_sequence" / split / city
    numbers = range(start, start + n_frames)
    frames = wide_frames(n_frames, *size, first)
    write_pictures(folder, frames, f"{city}_{recording:06d}_{{:06d}}_leftImg8bit.png", numbers)
    return folder


def kitti_drive(root, date, number, n_frames, first=0, size=(64, 200), cameras=("image_02",)):
    """A synchronised drive of KITTI; the second camera counts from ``first + 100``. Returns the drive's folder."""
    drive = root / date / f"{date}_drive_{number:04d}_sync"
    for i, camera in enumerate(cameras):
        write_pictures(drive / camera / "data", wide_frames(n_frames, *size, first + 100 * i), "{:010d}.png")
        times = (f"{date.replace('_', '-')} 13:02:{25 + k / 10:012.9f}\n" for k in range(n_frames))
        (drive / camera / "timestamps.txt").write_text("".join(times))
    return drive


def kinetics_videos(root, split, rows, first=0, n_frames=20, fps=25, list_name="{}.csv"):
    """A split of Kinetics-600: the list with published columns, and an mp4 for each (label, id, start) of ``rows``, the
    n-th counting from ``first + 20 * n``."""
    lines = ["label,youtube_id,time_start,time_end,split,is_cc"]
    for i, (label, youtube_id, start) in enumerate(rows):
        path = root / split / label / f"{youtube_id}_{start:06d}_{start + 10:06d}.mp4"
        path.parent.mkdir(parents=True, exist_ok=True)
        encode(path, wide_frames(n_frames, 72, 96, first + 20 * i), fps)
        quoted = f'"{label}"' if "," in label else label
        lines.append(f"{quoted},{youtube_id},{start},{start + 10},{split},0")
    root.joinpath(list_name.format(split)).write_text("\n".join(lines) + "\n")
