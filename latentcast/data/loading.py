"""Loaders of batches: their processes start where no thread has run, and what one does not come back from is named."""

import contextlib
import multiprocessing
import os
import signal
import threading
import time
from multiprocessing import forkserver, resource_tracker, util

import torch
from torch.utils.data import DataLoader, Dataset, default_collate, get_worker_info

from .base import view_item

SECONDS_TO_END = 10.0  # at most, until the system says that a lost process has ended

_waiting = []  # the watched data sets of which this process waits for a batch
_workers = []  # notes of all loaders, in which the processes of their workers stand


class WorkerError(OSError):
    """A loader's process ended, or was ended, while it read something; the message names that."""


class Loader(DataLoader):
    """A DataLoader that says what its workers read when one is lost; made by ``open_loader``.

    ``waited``: seconds in which somebody waited for its batches.
    """

    waited = 0.0

    def __iter__(self):
        batches = super().__iter__()
        while True:
            began = time.perf_counter()
            try:
                with _waiting_for(self.dataset):
                    batch = next(batches)
            except StopIteration:
                return
            except Exception as error:
                # The batch may have been in the memory of a worker that is about to end.
                wait = SECONDS_TO_END if isinstance(error, (ConnectionError, EOFError)) else 0
                until = time.monotonic() + wait
                while (lost := self.dataset.lost()) is None and time.monotonic() < until:
                    time.sleep(0.1)
                if lost is None:
                    raise
                end_workers()
                raise WorkerError(lost) from None
            if isinstance(batch, _InRoom):
                batch = batch.taken(self.dataset.room, self.pin_memory and torch.cuda.is_available())
            self.waited += time.perf_counter() - began
            yield batch


def open_loader(dataset, kind=Loader, num_workers=0, read_timeout=0, **kwargs):
    """A loader over ``dataset``, which must pickle where there are workers.

    They start from a server that has imported torch and run nothing: a fork of a process with OpenMP threads may hang
    in its first parallel region. SIGINT and SIGTERM, which a terminal or a cluster sends to all processes of a job, do
    not reach them; the main process ends them.

    Args:
        dataset: a map-style data set; ``item_name(index)``, if it has that, names an item in errors. Items of one that
            has ``view(index)``, as LatentCacheDataset has, are copied once into a batch that travels through memory
            which all processes share from the start: 40 us a window less than the files that torch makes for each.
        kind: Loader or a subclass.
        num_workers: processes that read.
        read_timeout: seconds after which a worker that has not come back from an item is ended, whatever it does, and
            with it the loader (WorkerError). 0: never.
        kwargs: of DataLoader.
    """
    context = None
    if num_workers:
        context = worker_context(*modules_of(dataset))
        # At the process's end, before multiprocessing waits for them; processes that it started have no "atexit".
        util.Finalize(None, end_workers, exitpriority=0)
    watched = _Watched(dataset, num_workers, read_timeout)
    in_batches = kwargs.get("batch_size") and "collate_fn" not in kwargs
    if num_workers and in_batches and hasattr(getattr(dataset, "dataset", dataset), "view"):
        kwargs["collate_fn"] = watched.collate
        # A worker has ``prefetch_factor`` batches on their way, and one that is being copied.
        watched.make_room(1 + (kwargs.get("prefetch_factor") or 2), kwargs["batch_size"])
    workers = {"num_workers": num_workers, "multiprocessing_context": context, "worker_init_fn": _start_worker}
    return kind(watched, **workers, **kwargs)


def waits_for():
    """What this process waits for while it asks a loader for a batch, a new object each time; else None."""
    return _waiting[-1] if _waiting else None


def end_workers():
    """End the workers of all loaders at once, whatever they do."""
    pids = {int(pid) for notes in _workers for pid in notes[:, 0]}
    for process in multiprocessing.active_children():
        if process.pid in pids:
            process.kill()


@contextlib.contextmanager
def _waiting_for(dataset):
    _waiting.append((dataset,))
    try:
        yield
    finally:
        _waiting.pop()


def modules_of(dataset):
    """The modules of a data set's class and of those that it wraps."""
    while dataset is not None:
        yield type(dataset).__module__
        dataset = getattr(dataset, "dataset", None)


def worker_context(*modules):
    """How to start processes that work for this one: from a server, where there can be one, that has these modules.

    The server imports them once, when it starts. Its processes inherit that SIGINT and SIGTERM are blocked; ``kill``
    ends them.
    """
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch.utils.data", __name__, *modules])
    resource_tracker.ensure_running()  # would unblock them
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))
    try:
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return context


def _start_worker(worker):
    """A worker ends with the main process: the server, whose child it is, lives on with it. An alarm ends it."""
    get_worker_info().dataset.begin(worker)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    threading.Thread(target=end_with_parent, daemon=True).start()


def end_with_parent():
    """Wait for the end of the process that started this one, and end as well."""
    multiprocessing.parent_process().join()
    os._exit(1)


class _InRoom(dict):
    """A batch; its clips are in shared memory, at ``place``: (name, worker, turn, number of clips)."""

    def taken(self, room, pin):
        """The whole batch, out of the worker's way."""
        name, worker, turn, n = self.place
        clips = room[worker, turn, :n]
        return {name: torch.empty_like(clips, pin_memory=pin).copy_(clips)} | self


class _Watched(Dataset):
    """A data set that notes, in shared memory, what each worker reads: its process, 1 + the item or 0, and since when
    (ns)."""

    def __init__(self, dataset, num_workers, read_timeout):
        self.dataset, self.read_timeout = dataset, read_timeout
        self.notes = torch.zeros(max(1, num_workers), 3, dtype=torch.int64).share_memory_()
        self._note = None  # this process's, once it has begun
        self.room, self._turn = None, 0
        _workers.append(self.notes)

    def __getstate__(self):
        return self.__dict__ | {"_note": None}

    def __len__(self):
        return len(self.dataset)

    def begin(self, worker):
        """Note which process reads as that worker, so that it can be ended, whatever it is at by then."""
        self._note = self.notes[worker].numpy()
        self._note[0] = os.getpid()

    def make_room(self, n_batches, batch_size):
        """Share memory for the clips of so many batches of each worker."""
        clip = next(iter(view_item(self.dataset, 0).values()))
        self.room = clip.new_empty(len(self.notes), n_batches, batch_size, *clip.shape).share_memory_()

    def collate(self, items):
        """Items -> the batch, whose clips this worker has put into the room."""
        worker, name = get_worker_info().id, next(iter(items[0]))
        torch.stack([item.pop(name) for item in items], out=self.room[worker, self._turn, : len(items)])
        batch = _InRoom(default_collate(items))
        batch.place = name, worker, self._turn, len(items)
        self._turn = (self._turn + 1) % self.room.shape[1]
        return batch

    def __getitem__(self, index):
        return self.__getitems__([index])[0]

    def __getitems__(self, indices):
        """The items of a batch, which may be views: the loader copies them into one tensor."""
        if self._note is None:
            self.begin(0)
        limit, items = self.read_timeout if get_worker_info() else 0, []
        try:
            for index in indices:
                self._note[2] = time.monotonic_ns()
                self._note[1] = 1 + index
                if limit:  # SIGALRM ends the process, in native code too
                    signal.setitimer(signal.ITIMER_REAL, limit)
                items.append(view_item(self.dataset, index))
        finally:
            if limit:
                signal.setitimer(signal.ITIMER_REAL, 0)
            self._note[1] = 0
        return items

    def lost(self):
        """One line about a worker that has ended in the middle of an item, or None."""
        alive = {process.pid for process in multiprocessing.active_children()}
        for pid, item, since in self.notes.tolist():
            if item and pid not in alive and pid != os.getpid():
                seconds = (time.monotonic_ns() - since) / 1e9
                if 0 < self.read_timeout <= seconds:
                    return (
                        f"{self.reads()}: reading it did not end within {self.read_timeout:g} s (read_timeout); "
                        "remove or convert it"
                    )
                return f"{self.reads()}: the process that read it was lost (killed, or out of memory)"
        return None

    def reads(self):
        """The name of what is being read, of the longest since."""
        item = min((since, item) for _, item, since in self.notes.tolist() if item)[1] - 1
        return getattr(self.dataset, "item_name", "item {}".format)(item)
