"""Progress bars on a terminal; where stderr is a file or a queue's log, a plain line every half minute."""

import os
import sys

from tqdm import tqdm

EVERY = 30.0  # seconds from a plain line to the next
WIDTH = 80  # columns of a terminal that does not know its own
PLAIN = "{desc}: {percentage:.0f}%, {n_fmt} of {total_fmt} {unit}s in {elapsed}, {remaining} left"


class Bar(tqdm):
    """A tqdm on stderr; without a terminal its state is a line of its own, in the end and every ``EVERY`` seconds.

    Args:
        iterable, desc, total, **options: as tqdm's.
        on_update: called with (done, total) after each ``update``; what it raises ends what is under way.
    """

    plain, _said, _on_update = False, None, None

    def __init__(self, iterable=None, desc=None, total=None, on_update=None, **options):
        self._on_update, self._done = on_update, 0
        options.setdefault("file", sys.stderr)
        options.setdefault("nrows", 20)  # tqdm hides bars on terminals that say they have none
        self.plain = not options["file"].isatty()
        if not self.plain:
            options.setdefault("ncols", (_width(options["file"]) or WIDTH) - 1)
        if self.plain:
            options |= {"mininterval": EVERY, "maxinterval": EVERY, "bar_format": options.pop("plain_format", PLAIN)}
        options.pop("plain_format", None)
        super().__init__(iterable, desc, total, **options)

    def display(self, msg=None, pos=None):
        if not self.plain:
            return super().display(msg, pos)
        text = str(self) if msg is None else msg
        if text and text != self._said and self.n > self.initial:
            self.fp.write(f"{text.strip()}\n")
            self.fp.flush()
            self._said = text
        return False

    def update(self, n=1):
        shown = super().update(n)
        if self._on_update is not None:
            self._done += n  # ``self.n`` stands still where the bar is disabled
            self._on_update(self._done, self.total)
        return shown

    def close(self):
        if self.plain and not self.disable:
            self.display()
            self.leave = False  # tqdm would move to the next line
        super().close()


def _width(terminal):
    """Columns of a terminal; 0: not known."""
    try:
        return os.get_terminal_size(terminal.fileno()).columns
    except (OSError, ValueError):  # ValueError: a file without a descriptor
        return 0
