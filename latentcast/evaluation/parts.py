"""What an evaluation has measured so far, on the disk: a file for each group of clips, and the plan they belong to."""

import contextlib
import logging
import shutil
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from latentcast.data.store.shards import difference_of
from latentcast.files import read_json, replacing, write_json
from latentcast.schemas import one_line

logger = logging.getLogger("latentcast")


def key_to_text(key: tuple[str, str]) -> str:
    """("model", "mse") -> "model.mse", as a tensor is called in a file."""
    return ".".join(key)


def text_to_key(text: str) -> tuple[str, str]:
    """``key_to_text`` undone."""
    who, _, what = text.partition(".")
    return who, what


@dataclass
class Parts:
    """The folder ``parts`` within ``folder``; tensors have keys (who, what)."""

    folder: Path

    def path(self, group: int) -> Path:
        return self.folder / "parts" / f"group-{group:05d}.safetensors"

    def prepare(self, identity: dict, shared: bool = False) -> None:
        """Keep parts of this very evaluation, clear those of another; where others add to them, ValueError names what
        differs instead."""
        plan = self.folder / "parts" / "plan.json"
        if plan.is_file():
            difference = difference_of(read_json(plan), identity)
            if not difference:
                return
            if shared:
                raise ValueError(
                    f"{self.folder}: other shares evaluate otherwise ({difference}); give all the same settings, "
                    "or delete the folder"
                )
            logger.info("%s: parts of another evaluation are cleared (%s)", self.folder, difference)
        self.clear()
        plan.parent.mkdir(parents=True)
        write_json(plan, identity)

    def write(self, group: int, found: dict[tuple[str, str], Tensor], seconds: float = 0.0) -> None:
        """Keep what was measured of a group, key -> tensor, and how long it took."""
        self.path(group).parent.mkdir(parents=True, exist_ok=True)
        with replacing(self.path(group)) as temporary:
            tensors = {key_to_text(key): tensor for key, tensor in found.items()}
            save_file(tensors, temporary, metadata={"seconds": str(seconds)})

    def read(self, group: int, *whos: str) -> dict[tuple[str, str], Tensor]:
        """key -> tensor of a group, those of ``whos``."""
        path = self.path(group)
        try:
            with safe_open(path, framework="pt") as file:
                keys = {text_to_key(text): text for text in file.keys()}
                return {key: file.get_tensor(text) for key, text in keys.items() if key[0] in whos}
        except (OSError, SafetensorError) as error:
            why = one_line(error, 200)
            raise OSError(f"{path}: cannot be read ({why}); delete it and evaluate again, the rest is kept") from None

    def seconds(self) -> float:
        """What measuring all groups took, by whichever processes and in however many runs."""
        total = 0.0
        for path in self.path(0).parent.glob("group-*.safetensors"):
            with safe_open(path, framework="pt") as file:
                total += float(file.metadata()["seconds"])
        return total

    def clear(self) -> None:
        """Delete the parts, and the folder if nothing else is in it."""
        shutil.rmtree(self.folder / "parts", ignore_errors=True)
        with contextlib.suppress(OSError):
            self.folder.rmdir()
