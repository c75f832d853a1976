"""The workers of a run as one: sums, broadcasts and gathered rows over torch.distributed, or over nothing
for one process."""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from distclust.errors import DistclustError
from distclust.mixture.terms import Stats

TEXT_BYTES = 8192


@contextlib.contextmanager
def reducer_freed_first() -> Iterator[None]:
    """An error that leaves this block keeps no local variables of the frames it came through.

    Else its traceback keeps DDP's reducer alive until the process group is gone from everywhere else, and the
    reducer then ends the group with the GIL held while it waits for Gloo's thread, which may want the GIL to
    free the tensors of the last collective: the worker hangs instead of reporting its error (torch 2.13;
    seen in 13 of 120 runs of two workers).
    """
    try:
        yield
    except BaseException as error:
        traceback.clear_frames(error.__traceback__)
        raise


@dataclass(frozen=True, slots=True)
class World:
    """This worker's place among the workers. The default is one process without torch.distributed."""

    rank: int = 0
    size: int = 1
    device: torch.device = torch.device("cpu")

    @classmethod
    def current(cls, device: torch.device | str = "cpu") -> World:
        """The place in torch.distributed's default group, if there is one."""
        if dist.is_available() and dist.is_initialized():
            return cls(dist.get_rank(), dist.get_world_size(), torch.device(device))
        return cls(device=torch.device(device))

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def sum(self, stats: Stats) -> Stats:
        """Each statistic added over workers, in one collective; float64 in between, so that counts stay
        exact."""
        if self.size == 1 or not stats:
            return stats
        keys = sorted(stats)
        flat = torch.cat([stats[k].reshape(-1).double() for k in keys])
        dist.all_reduce(flat)
        sizes = [stats[k].numel() for k in keys]
        return {
            k: part.view(stats[k].shape).to(stats[k].dtype)
            for k, part in zip(keys, flat.split(sizes), strict=True)
        }

    def gather_rows(self, rows: Tensor) -> Tensor:
        """Every worker's (n_i, J) rows, stacked in rank order, on all workers."""
        if self.size == 1:
            return rows
        counts = torch.zeros(self.size, dtype=torch.int64, device=self.device)
        counts[self.rank] = rows.shape[0]
        dist.all_reduce(counts)
        sizes = counts.tolist()
        padded = rows.new_zeros(max(sizes), *rows.shape[1:])
        padded[: rows.shape[0]] = rows
        pieces = [torch.empty_like(padded) for _ in range(self.size)]
        dist.all_gather(pieces, padded)
        return torch.cat([piece[:n] for piece, n in zip(pieces, sizes, strict=True)])

    def gather_texts(self, text: str) -> list[str]:
        """Every worker's text (its first 8 kB), in rank order."""
        if self.size == 1:
            return [text]
        mine = self._encode(text)
        pieces = [torch.empty_like(mine) for _ in range(self.size)]
        dist.all_gather(pieces, mine)
        return [self._decode(piece) for piece in pieces]

    def on_first(self, work: Callable[[], str]) -> str:
        """What `work` gives on rank 0, on all workers; its error is raised on all of them too.

        Without this an error on rank 0 leaves the others waiting for a message that never comes.
        """
        result, error = "", None
        if self.is_first:
            try:
                result = "+" + work()
            except DistclustError as raised:
                result, error = f"-{type(raised).__name__}: {raised}", raised
            except Exception as raised:
                if self.size > 1:
                    self._share(f"-{type(raised).__name__}: {raised}")
                raise
        result = self._share(result)
        if error is not None:
            raise error
        if result.startswith("-"):
            raise DistclustError(f"worker 0 failed: {result[1:]}")
        return result[1:]

    def broadcast(self, tensor: Tensor) -> Tensor:
        """Rank 0's tensor, on all workers (in place)."""
        if self.size > 1:
            dist.broadcast(tensor, 0)
        return tensor

    def _share(self, text: str) -> str:
        if self.size == 1:
            return text
        return self._decode(self.broadcast(self._encode(text)))

    def _encode(self, text: str) -> Tensor:
        raw = text.encode()[: TEXT_BYTES - 4]
        buffer = torch.zeros(TEXT_BYTES, dtype=torch.uint8)
        buffer[:4] = torch.tensor(list(len(raw).to_bytes(4, "little")), dtype=torch.uint8)
        if raw:
            buffer[4 : 4 + len(raw)] = torch.frombuffer(bytearray(raw), dtype=torch.uint8)
        return buffer.to(self.device)

    @staticmethod
    def _decode(buffer: Tensor) -> str:
        data = bytes(buffer.cpu().tolist())
        return data[4 : 4 + int.from_bytes(data[:4], "little")].decode(errors="replace")
