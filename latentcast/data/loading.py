"""Loaders of batches: their processes start where no thread has run, and what one does not come back from is named."""

import contextlib
import functools
import math
import multiprocessing
import os
import signal
import threading
import time
import weakref
from collections.abc import Iterator
from multiprocessing import forkserver, resource_tracker, util

import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info

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

    def __iter__(self) -> Iterator:
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
            if self.dataset.room is not None:
                batch = self.dataset.taken(*batch, pin=self.pin_memory and torch.cuda.is_available())
            self.waited += time.perf_counter() - began
            yield batch


def open_loader(
    dataset: Dataset, kind: type[Loader] = Loader, num_workers: int = 0, read_timeout: float = 0, **kwargs: object
) -> Loader:
    """A loader over ``dataset``, which must pickle where there are workers.

    They start from a server that has imported torch and run nothing: a fork of a process with OpenMP threads may hang
    in its first parallel region. SIGINT and SIGTERM, which a terminal or a cluster sends to all processes of a job, do
    not reach them; the main process ends them.

    Args:
        dataset: a map-style data set; ``item_name(index)``, if it has that, names an item in errors. One that fills
            batches by itself (``new_batch``, ``fill``), as LatentCacheDataset does, reads them into memory which all
            processes share from the start: no list of items, and none of the files that torch makes for each batch.
        kind: Loader or a subclass.
        num_workers: processes that read.
        read_timeout: seconds after which a worker that has not come back from an item is ended, whatever it does, and
            with it the loader (WorkerError). 0: never.
        kwargs: of DataLoader.
    """
    context = None
    if num_workers:
        context = worker_context(*modules_of(dataset))
        _end_workers_at_the_end_of(os.getpid())
    watched = _Watched(dataset, num_workers, read_timeout)
    if kwargs.get("batch_size") and "collate_fn" not in kwargs and hasattr(dataset, "fill"):
        kwargs["collate_fn"] = _as_it_is
        # A worker has ``prefetch_factor`` batches on their way, and one that is being copied.
        watched.fill_batches(num_workers, 1 + (kwargs.get("prefetch_factor") or 2), kwargs["batch_size"])
    workers = {"num_workers": num_workers, "multiprocessing_context": context, "worker_init_fn": _start_worker}
    return kind(watched, **workers, **kwargs)


def waits_for() -> object:
    """What this process waits for while it asks a loader for a batch, a new object each time; else None."""
    return _waiting[-1] if _waiting else None


def end_workers() -> None:
    """End the workers of all loaders at once, whatever they do."""
    for notes in list(_workers):
        for process in _at_work(notes):
            process.kill()


def _at_work(notes):
    pids = set(notes[:, 0].tolist())
    return [process for process in multiprocessing.active_children() if process.pid in pids]


def _forget(notes):
    """What a loader that is gone noted, but for workers that did not end with it, which hang."""
    if not _at_work(notes):
        _workers[:] = [each for each in _workers if each is not notes]


@functools.cache  # once a process
def _end_workers_at_the_end_of(pid):
    """Before multiprocessing waits for them; processes that it started have no "atexit"."""
    util.Finalize(None, end_workers, exitpriority=0)


@contextlib.contextmanager
def _waiting_for(dataset):
    _waiting.append((dataset,))
    try:
        yield
    finally:
        _waiting.pop()


def modules_of(dataset: Dataset) -> Iterator[str]:
    """The modules of a data set's class and of those that it wraps."""
    while dataset is not None:
        yield type(dataset).__module__
        dataset = getattr(dataset, "dataset", None)


def worker_context(*modules: str) -> multiprocessing.context.BaseContext:
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


def end_with_parent() -> None:
    """Wait for the end of the process that started this one, and end as well."""
    multiprocessing.parent_process().join()
    os._exit(1)


def _as_it_is(batch):
    return batch


def _each(function, batch):
    """A function of each tensor of a batch."""
    return {n: _each(function, value) if isinstance(value, dict) else function(value) for n, value in batch.items()}


class _Watched(Dataset):
    """A data set that notes, in shared memory, what each worker reads: its process, 1 + the item or 0, and since when
    (ns). There lie its epoch too, so that persistent workers see it change, and their batches, if it fills those."""

    def __init__(self, dataset, num_workers, read_timeout):
        self.dataset, self.read_timeout = dataset, read_timeout
        self.notes = torch.zeros(max(1, num_workers), 3, dtype=torch.int64).share_memory_()
        self._note = None  # this process's, once it has begun
        self._epoch = torch.full((), -1).share_memory_()  # that of the data set itself
        self._fills, self.room, self._turn, self._turns = False, None, 0, 0
        _workers.append(self.notes)
        weakref.finalize(self, _forget, self.notes).atexit = False

    def __getstate__(self):
        return self.__dict__ | {"_note": None}

    def __len__(self):
        return len(self.dataset)

    def begin(self, worker):
        """Note which process reads as that worker, so that it can be ended, whatever it is at by then."""
        self._note = memoryview(self.notes[worker].numpy())
        self._note[0] = os.getpid()

    def set_epoch(self, epoch):
        """Of the data set, in all processes."""
        self._epoch.fill_(epoch)

    def fill_batches(self, *places):
        """Have the data set fill batches; ``places``: workers, batches of each for which there is to be room, items."""
        self._fills, self._turns = True, places[1]
        if places[0]:
            whole = self.dataset.new_batch(math.prod(places))
            self.room = _each(lambda tensor: tensor.unflatten(0, places).share_memory_(), whole)

    def taken(self, worker, turn, n, pin):
        """A batch of ``n`` items that a worker has filled, out of its way."""
        return _each(lambda t: torch.empty_like(t, pin_memory=pin).copy_(t), self._place(worker, turn, n))

    def _place(self, worker, turn, n):
        return _each(lambda tensor: tensor[worker, turn, :n], self.room)

    def __getitem__(self, index):
        return self.__getitems__([index])[0]

    def __getitems__(self, indices):
        """A list of items, or the batch, or in workers where it is: (worker, turn, number of items)."""
        if self._note is None:
            self.begin(0)
        dataset, noted, worker = self._current(), self._noted(indices), get_worker_info()
        try:
            if not self._fills:
                return [dataset[index] for index in noted]
            if not worker:
                return dataset.fill(dataset.new_batch(len(indices)), noted)
            place = worker.id, self._turn, len(indices)
            dataset.fill(self._place(*place), noted)
            self._turn = (self._turn + 1) % self._turns
            return place
        finally:
            if worker and self.read_timeout:
                signal.setitimer(signal.ITIMER_REAL, 0)
            self._note[1] = 0

    def _noted(self, indices):
        """The indices, each noted while it is read."""
        limit = self.read_timeout if get_worker_info() else 0
        for index in indices:
            self._note[2] = time.monotonic_ns()
            self._note[1] = 1 + index
            if limit:  # SIGALRM ends the process, in native code too
                signal.setitimer(signal.ITIMER_REAL, limit)
            yield index

    def _current(self):
        """The data set at the epoch that was set."""
        if (epoch := int(self._epoch)) >= 0:
            self.dataset.set_epoch(epoch)
        return self.dataset

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
        return getattr(self._current(), "item_name", "item {}".format)(item)
