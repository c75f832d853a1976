"""Shards and order -> batches on the device.

Three places for the data, one order: rows copied into the device's memory when they fit, shards mapped from
local disk, and remote shards copied to local disk. The batches are the same bit for bit.

Mapped rows are gathered for several steps at once, and each batch is a slice of that: a step of 1,024 rows
may touch 32 shards (8 lanes, windows of 4), which would cost more than the copying. Memory is a few buffers
of ``CHUNK_BYTES`` whatever the corpus; the mapped pages belong to the operating system.

Two things run ahead of the consumer: one thread makes the next batches, and others bring the shards of the
next windows, at the end of an epoch those of the next epoch's first windows, to this machine and check them.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from distclust.corpus.ahead import Ahead, shards_of_epoch, shards_of_scan
from distclust.corpus.gather import (
    Mapped,
    Resident,
    ResidentOnDevice,
    Rows,
    bytes_of,
    split_rows,
    upload,
)
from distclust.corpus.order import Order
from distclust.corpus.shards import Corpus
from distclust.errors import ConfigError, DataError

T = TypeVar("T")
CHUNK_BYTES = 16 << 20
"""Rows gathered at once, in bytes: enough to spread the cost of touching a shard, yet few."""
_RESIDENT_ON_CPU = 1 << 28


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamConfig:
    """How batches get to the device. No field changes what is in them."""

    prefetch: int = 2
    """Batches made ahead by a thread; 0 makes each when it is asked for."""
    resident_bytes: int | None = None
    """A corpus of at most this size is copied into the device's memory once and gathered there; 0 never.
    None is a rule: on a GPU ``resident_share`` of the memory that is free when the stream first reads, on the
    CPU 256 MiB, since there mapped shards are in memory as well, once for all workers."""
    resident_share: float = 0.5
    """See ``resident_bytes``; the rest is for the model, its gradients and the batches."""
    fetch_threads: int = 4
    """Shards of a remote corpus that a worker fetches side by side, ahead of their use; 0 fetches each when
    it is opened. Of a local corpus one thread reads and checks ahead."""

    def __post_init__(self) -> None:
        for name in ("prefetch", "resident_bytes", "fetch_threads"):
            value = getattr(self, name)
            if name == "resident_bytes" and value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise ConfigError(
                    f"stream.{name} is {value!r}; expected a whole number, 0 or more: correct it."
                )
        if not 0 <= self.resident_share <= 1:
            raise ConfigError(
                f"stream.resident_share is {self.resident_share!r}; expected 0 to 1: correct it."
            )


class Batch(NamedTuple):
    """The rows of one step on one worker, in lane order. All tensors are on the stream's device.

    ``offsets`` and ``indices`` are int32: ``embedding_bag`` takes either width as long as both are equal,
    so nothing is converted on the way from the file. Tensors share memory with other batches: do not write
    to them.
    """

    epoch: int
    step: int
    """With ``epoch`` the position of the batch."""
    rows_in_step: int
    """Rows of the step over all workers."""
    lanes: tuple[int, ...]
    """Lane numbers in this batch, ascending."""
    lane_rows: tuple[int, ...]
    """Rows of each of these lanes, 0 allowed; their sum is B."""
    rows: Tensor
    """(B,) int64 global row numbers."""
    offsets: Tensor | None
    """(B + 1,) int32, sparse only, from 0."""
    indices: Tensor | None
    """(nnz,) int32, sparse only, rising within a row."""
    values: Tensor
    """(nnz,) float32 sparse | (B, D) float32 dense."""


class _Plan(NamedTuple):
    """What one batch holds, before its rows are gathered."""

    epoch: int
    step: int
    rows_in_step: int
    lanes: tuple[int, ...]
    lane_rows: tuple[int, ...]
    rows: NDArray[np.int64]


class _Sent(NamedTuple):
    batch: Batch
    done: torch.cuda.Event | None


class Stream:
    """Batches of one worker.

    Args:
        corpus: where the rows are.
        order: which rows form a step; made for this corpus.
        lanes: the worker's lanes, ascending.
        device: where the tensors of a batch are.
        config: how they get there.

    Raises:
        ConfigError: the order is of another corpus, or the lanes are not ascending lanes of the order.

    Copies to a CUDA device go from pinned memory, on a stream of their own. *Untested on a GPU.*
    """

    def __init__(
        self,
        corpus: Corpus,
        order: Order,
        lanes: Sequence[int],
        device: str | torch.device = "cpu",
        config: StreamConfig | None = None,
    ) -> None:
        if not np.array_equal(corpus.shard_rows, order.shard_rows):
            raise ConfigError(
                f"the order was made for other shards than those of {corpus.root}: make it from them."
            )
        self.lanes = tuple(lanes)
        if list(self.lanes) != sorted(set(self.lanes)) or not set(self.lanes) <= set(
            range(order.config.lanes)
        ):
            raise ConfigError(
                f"lanes {self.lanes}; expected ascending numbers from 0 to {order.config.lanes - 1}."
            )
        self.corpus, self.order = corpus, order
        self.device = torch.device(device)
        self.config = config or StreamConfig()
        self.waited_s = 0.0
        """Seconds that the consumer has waited for batches; the caller resets it."""
        self._copies = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        self._resident: Resident | ResidentOnDevice | None = None
        self._resident_limit: int | None = None
        self._full_steps = min(order.lane_sizes) // order.config.rows_per_lane
        self._mapped = Mapped(corpus)
        self._lock = threading.RLock()

    # What a caller uses -------------------------------------------------------------------------------------

    def epoch(self, epoch: int, start_step: int = 0) -> Generator[Batch]:
        """The batches of an epoch from ``start_step`` on, ``order.steps_per_epoch - start_step`` of them.

        A worker without rows in a step gets a batch of none, so that all workers take the same steps. Closing
        the generator stops the background thread; an exception in that thread is raised here.
        """
        if not 0 <= start_step <= self.order.steps_per_epoch:
            raise ValueError(f"start step {start_step}; expected 0 to {self.order.steps_per_epoch}")
        return self._deliver(self._epoch_chunks(epoch, start_step), lambda: self._ahead(epoch, start_step))

    def scan(self, rows_per_batch: int = 512) -> Generator[Batch]:
        """Each row of the worker's lanes once, in file order, lane after lane, the same in every epoch.

        A batch has rows of one lane; ``epoch``, ``step`` and ``rows_in_step`` are 0.
        """
        if rows_per_batch < 1:
            raise ValueError(f"{rows_per_batch} rows per batch; expected at least 1")
        return self._deliver(self._scan_chunks(rows_per_batch), lambda: self._ahead(None, 0))

    def gather(self, rows: NDArray[np.int64] | Sequence[int]) -> Batch:
        """A batch of arbitrary rows in the order given (repeats allowed); no lanes, position 0.

        Raises:
            DataError: a row number is out of range.
        """
        wanted = np.asarray(rows, dtype=np.int64).reshape(-1)
        if wanted.size and (wanted.min() < 0 or wanted.max() >= self.corpus.n_rows):
            raise DataError(f"rows {wanted.min()} to {wanted.max()}; expected 0 to {self.corpus.n_rows - 1}.")
        plan = _Plan(0, 0, len(wanted), (), (), wanted)
        with self._lock:  # the shards of one call stay open for the next
            (sent,) = self._batches([[plan]], self._mapped)
        return self._receive(sent)

    # Plans: which rows, several steps at a time -------------------------------------------------------------

    def _epoch_chunks(self, epoch: int, start_step: int) -> Iterator[list[_Plan]]:
        order, per_lane = self.order, self.order.config.rows_per_lane
        most = self._steps_per_chunk(per_lane * max(len(self.lanes), 1))
        step, size = start_step, 1  # the first chunk is one step, so that the first batch comes soon
        while step < order.steps_per_epoch:
            stop = min(step + size, order.steps_per_epoch)
            slices = [order.lane_slice(epoch, lane, step * per_lane, stop * per_lane) for lane in self.lanes]
            chunk = []
            if stop <= self._full_steps and slices:  # every lane has all its rows in each of these steps
                by_lane = np.stack(slices).reshape(len(slices), stop - step, per_lane)
                in_step, lane_rows = order.config.lanes * per_lane, (per_lane,) * len(slices)
                for number, rows in enumerate(by_lane.swapaxes(0, 1).reshape(stop - step, -1), start=step):
                    chunk.append(_Plan(epoch, number, in_step, self.lanes, lane_rows, rows))
            else:
                for number in range(step, stop):
                    chunk.append(self._plan_short(epoch, number, slices, (number - step) * per_lane))
            yield chunk
            step, size = stop, min(size * 2, most)

    def _plan_short(self, epoch: int, step: int, slices: list[NDArray[np.int64]], at: int) -> _Plan:
        """The plan of a step in which a lane may have fewer rows, or none; its rows start at ``at``."""
        parts = [rows[at : at + self.order.config.rows_per_lane] for rows in slices]
        rows = np.concatenate(parts) if parts else np.empty(0, np.int64)
        in_step = self.order.rows_in_step(epoch, step)
        return _Plan(epoch, step, in_step, self.lanes, tuple(len(part) for part in parts), rows)

    def _ahead(self, epoch: int | None, start_step: int) -> Ahead | None:
        """What brings shards to hand for an epoch and the start of the next, or (None) for a scan."""
        if self._fits() or not self.config.fetch_threads:
            return None
        # An order of its own: planning the next epoch would replace the plan that batches are made from.
        order = Order(self.order.shard_rows, self.order.config, self.order.seed)
        then: Callable[[], Iterable[int]] = tuple
        if epoch is None:
            shards = shards_of_scan(order, self.lanes)
        else:
            following = epoch + 1
            shards = shards_of_epoch(order, self.lanes, epoch, start_step * order.config.rows_per_lane)
            then = lambda: shards_of_epoch(order, self.lanes, following)  # noqa: E731
        # At most half of the cache: what runs ahead must not push out what is about to be read.
        window = max(1, min(len(self.lanes) * order.config.window, self.corpus.room // 2))
        threads = self.config.fetch_threads if self.corpus.remote else 1
        return Ahead(self.corpus, shards, window, threads, then)

    def _scan_chunks(self, rows_per_batch: int) -> Iterator[list[_Plan]]:
        most = self._steps_per_chunk(rows_per_batch)
        for lane in self.lanes:
            span = self.order.scan_range(lane)
            chunk: list[_Plan] = []
            for start in range(span.start, span.stop, rows_per_batch):
                rows = np.arange(start, min(start + rows_per_batch, span.stop), dtype=np.int64)
                chunk.append(_Plan(0, 0, 0, (lane,), (len(rows),), rows))
                if len(chunk) == most:
                    yield chunk
                    chunk = []
            if chunk:
                yield chunk

    def _steps_per_chunk(self, rows_per_step: int) -> int:
        manifest = self.corpus.manifest
        cell_bytes = 8 if self.corpus.kind == "sparse" else 4
        row_bytes = max(1.0, manifest.n_nonzeros / max(manifest.n_rows, 1) * cell_bytes)
        return max(1, int(CHUNK_BYTES / (row_bytes * rows_per_step)))

    # Rows to tensors ----------------------------------------------------------------------------------------

    def _batches(self, chunks: Iterable[list[_Plan]], mapped: Mapped) -> Iterator[_Sent]:
        resident = self._resident_rows()
        on_device = resident if isinstance(resident, ResidentOnDevice) else None
        on_host = resident if isinstance(resident, Resident) else mapped
        for chunk in chunks:
            parts: Iterator[Rows] = iter(())
            if on_device is None:
                rows = on_host.gather(np.concatenate([plan.rows for plan in chunk]))
                parts = split_rows(rows, [len(plan.rows) for plan in chunk])
            for plan in chunk:
                # On a GPU everything is queued on a stream of its own, and the event says when it is done.
                with nullcontext() if self._copies is None else torch.cuda.stream(self._copies):
                    part = next(parts) if on_device is None else on_device.gather(plan.rows)
                    offsets, indices, values = (upload(array, self.device) for array in part)
                    batch = Batch(*plan[:5], upload(plan.rows, self.device), offsets, indices, values)
                    done = None if self._copies is None else self._copies.record_event()
                yield _Sent(batch, done)

    def _receive(self, sent: _Sent) -> Batch:
        """Make the consumer's GPU stream wait for the copies; the host does not wait."""
        if sent.done is not None:
            current = torch.cuda.current_stream(self.device)
            current.wait_event(sent.done)
            for tensor in sent.batch[5:]:
                if tensor is not None:
                    tensor.record_stream(current)
        return sent.batch

    def _fits(self) -> bool:
        """Whether the corpus is to be resident. Decided once: a phase later less memory is free."""
        with self._lock:
            if self._resident_limit is None:
                limit = self.config.resident_bytes
                if limit is None and self.device.type == "cuda":
                    free, _ = torch.cuda.mem_get_info(self.device)
                    limit = int(free * self.config.resident_share)
                self._resident_limit = _RESIDENT_ON_CPU if limit is None else limit
            return 0 < bytes_of(self.corpus) <= self._resident_limit

    def _resident_rows(self) -> Resident | ResidentOnDevice | None:
        with self._lock:
            if self._resident is None and self._fits():
                everything = range(len(self.corpus.shard_rows)) if self.corpus.remote else ()
                ahead = Ahead(self.corpus, everything, self.corpus.room // 2, self.config.fetch_threads)
                try:
                    on_cpu = self.device.type == "cpu"
                    self._resident = (
                        Resident(self.corpus) if on_cpu else ResidentOnDevice(self.corpus, self.device)
                    )
                finally:
                    ahead.close()
            return self._resident

    # The background thread ----------------------------------------------------------------------------------

    def _deliver(
        self, chunks: Iterator[list[_Plan]], look_ahead: Callable[[], Ahead | None]
    ) -> Generator[Batch]:
        ahead = look_ahead()
        try:
            mapped = Mapped(self.corpus) if ahead is None else Mapped(self.corpus, ahead.opened)
            if self.config.prefetch == 0:
                source = self._batches(chunks, mapped)
                while (sent := self._timed(lambda: next(source, None))) is not None:
                    yield self._receive(sent)
            else:
                yield from self._from_thread(chunks, mapped)
        finally:
            if ahead is not None:
                ahead.close()

    def _from_thread(self, chunks: Iterator[list[_Plan]], mapped: Mapped) -> Generator[Batch]:
        """The batches, made by a thread that is at most ``prefetch`` of them ahead."""
        ready: queue.Queue[_Sent | BaseException | None] = queue.Queue(self.config.prefetch)
        stop = threading.Event()

        def work() -> None:
            try:
                for sent in self._batches(chunks, mapped):
                    ready.put(sent)
                    if stop.is_set():
                        return
                ready.put(None)
            except BaseException as error:  # noqa: BLE001  whatever it is, the consumer raises it
                ready.put(error)

        thread = threading.Thread(target=work, name="distclust-prefetch", daemon=True)
        thread.start()
        try:
            while (item := self._timed(ready.get)) is not None:
                if isinstance(item, BaseException):
                    raise item
                yield self._receive(item)
        finally:
            stop.set()
            while thread.is_alive():  # it may wait for room in the queue
                with suppress(queue.Empty):
                    ready.get(timeout=0.01)

    def _timed(self, get: Callable[[], T]) -> T:
        started = time.perf_counter()
        try:
            return get()
        finally:
            self.waited_s += time.perf_counter() - started
