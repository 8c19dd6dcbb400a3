"""What a benchmark data set must tell so that ``tools/prepare_dataset.py`` can prepare it."""

from pathlib import Path

from ...urls import Place, Url
from ..base import Clip


class Benchmark:
    """Base class of the data sets. An instance pickles: worker processes read through it.

    Subclasses set the attributes and take, after ``source`` and ``protocol``, their options as keyword arguments with
    defaults that follow the protocol; ``frame_size`` is one of them.

    Attributes:
        name: of the data set, on the command line and in manifests.
        protocols: names of the ways to split and crop in use, the default first; ``--split`` chooses one.
        needs_source: whether there is something to read; False for simulations.
        growing: whether videos are added as they are made; see ``more``.
        frame_size: H = W of prepared frames in pixels, or [H, W].
        crop: how videos of another shape get to that, see ``video.reader.fit_frames``.
        channels: 3 (RGB), 1 (grey), or any number of other data.
        fps: frames per second.
        conditions: see VideoDataset.
        shard_videos: videos a file.
        provenance: JSON-able facts for the manifest: class names, checksums of index files, physical parameters.
    """

    name: str
    protocols: tuple = ("standard",)
    needs_source = True
    growing = False
    frame_size = 64
    crop = "center"
    channels = 3
    fps = 10.0
    conditions: dict = {}  # noqa: RUF012
    shard_videos = 64

    def __init__(self, source: Place | None = None, protocol: str | None = None) -> None:
        self.source = None if source is None else Path(source)
        self.protocol = self.protocols[0] if protocol is None else protocol
        if self.protocol not in self.protocols:
            raise ValueError(f"--split: {self.name} has {', '.join(self.protocols)}, found {protocol!r}")
        if self.needs_source:
            if self.source is None:
                raise ValueError(f"--source: {self.name} is prepared from files; expected their folder or archive")
            if not self.source.exists():
                raise FileNotFoundError(f"--source {self.source}: no such file or folder")
        elif self.source is not None:
            raise ValueError(f"--source: {self.name} is made without one, found {self.source}")
        self.provenance = {}

    def videos(self) -> dict[str, list[str]]:
        """split ("train", "val", "test") -> list of the names of its videos, in a stable order.

        A name is unique within its split and is all that ``read`` is given. Names that a list (a csv, say) promises
        appear even where their file is missing: ``read`` raises for those.

        Raises:
            OSError, ValueError: the source is not laid out as published; names the file, what was expected and found.
        """
        raise NotImplementedError

    def more(self, split: str, n_videos: int, n_frames: int) -> list[str]:
        """Names of further videos for a split whose ``n_videos``, ``n_frames`` frames in all, stand; [] where it is
        complete. For sets whose length shows when they are made; must follow from the arguments."""
        return []

    def expected_counts(self) -> dict[str, int]:
        """split -> number of videos that the published set has under this protocol, or {} where there is no such."""
        return {}

    def generated(self) -> dict[str, dict]:
        """split -> keyword arguments of the class that makes its videos as they are asked for, instead of files."""
        return {}

    def files(self) -> dict:
        """name below the prepared set -> path of a file of the source that is copied there unchanged."""
        return {}

    def read(self, split: str, name: str) -> Clip:
        """One video -> Clip.

        Raises:
            VideoError: missing or damaged; one line with the file (and offset or row), what was expected and found.
        """
        raise NotImplementedError

    def describe(self) -> dict:
        """JSON-able: the protocol's name and every option that shapes the frames."""
        raise NotImplementedError

    def figures(self, root: Path | Url) -> dict:
        """What the tool's last line says beside the counts, measured on the finished set at ``root``."""
        return {}
