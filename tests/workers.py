"""Short training runs in gloo processes; a script of its own, so that it can be run by hand.

`python tests/workers.py JOBS.json` reads a list of jobs and runs each with its number of workers. One
process imports
torch and forks the workers of every job, so that a job costs what its steps cost. A job is a dictionary:

    config   a resolved configuration (config.to_dict)        corpus  a prepared folder
    run      the run folder                                   world   number of workers
    out      JSON lines of rank 0: losses per step            rows    also write row numbers of every step
    and rank
    stop     stop after this global step (a clean exception)  kill    [rank, global step]: that rank dies by
    SIGKILL there
    grads    write the gradients of the first step to this file and stop
    together this job shares its processes with all jobs of its number of workers
    copy     [from, to]: a folder (the last that matches) copied beside the job file, before the job runs
"""

from __future__ import annotations

import contextlib
import gc
import glob
import json
import multiprocessing
import os
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any

import sklearn.cluster  # noqa: F401  (before the fork: each of these takes seconds to import)
import torch
import torch._dynamo
import torch.distributed as dist
from safetensors.torch import save_file
from torch.nn.parallel import DistributedDataParallel

from distclust.config import from_dict
from distclust.corpus.shards import Corpus
from distclust.errors import NonFiniteError
from distclust.training.checkpoint import CheckpointStore
from distclust.training.engine import Trainer
from distclust.training.hooks import NoHooks, Position
from distclust.training.world import World

with contextlib.suppress(ImportError):
    import faiss  # noqa: F401


class Stopped(Exception):
    """The clean end of a job with `stop` or `grads`."""


class Recorder(NoHooks):
    """Writes what happens to files, and dies when told."""

    def __init__(self, job: dict[str, Any], world: World):
        self.job, self.world = job, world
        self.trainer: Trainer

    def log(self, position: Position, phase: str, metrics: dict[str, float]) -> None:
        kept = {k: v for k, v in metrics.items() if k not in ("docs_per_second", "waiting_share")}
        with open(self.job["out"], "a") as out:
            out.write(json.dumps([position.global_step, phase, kept]) + "\n")

    def after_step(self, position: Position) -> None:
        step = position.global_step
        if (grads := self.job.get("grads")) is not None:
            if self.world.is_first:
                found = {n: p.grad for n, p in self.trainer.trained.items() if p.grad is not None}
                save_file({n: g.contiguous() for n, g in found.items()}, grads)
            raise Stopped
        if self.job.get("kill") == [self.world.rank, step]:
            os.kill(os.getpid(), signal.SIGKILL)
        if self.job.get("stop") == step:
            raise Stopped


class RowRecorder(Recorder):
    """Also writes the row numbers of every step."""

    def attach(self) -> None:
        original = self.trainer.step

        def step(phase: Any, batch: Any, loss: Any) -> None:
            start = 0
            with open(f"{self.job['out']}.rows-{self.world.rank}", "a") as out:
                for lane, count in zip(batch.lanes, batch.lane_rows, strict=True):
                    numbers = batch.rows[start : start + count].tolist()
                    start += count
                    out.write(json.dumps([self.trainer.position.global_step, lane, numbers]) + "\n")
            original(phase, batch, loss)

        self.trainer.step = step  # type: ignore[method-assign]


def train(job: dict[str, Any]) -> None:
    """A job's training on one worker; the process group is there."""
    world = World.current()
    hooks = RowRecorder(job, world) if job.get("rows") else Recorder(job, world)
    store = CheckpointStore(f"{job['run']}/checkpoints")
    hooks.trainer = Trainer(from_dict(job["config"]), Corpus.open(job["corpus"]), store, world, hooks)
    if isinstance(hooks, RowRecorder):
        hooks.attach()
    with contextlib.suppress(Stopped):
        hooks.trainer.run()


def join_group(rendezvous: str, rank: int, size: int) -> None:
    torch.set_num_threads(1)
    if size > 1:
        dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=size)


def run_job(job: dict[str, Any], rank: int) -> None:
    """One worker of a job that has processes of its own."""
    join_group(job["rendezvous"], rank, job["world"])
    try:
        train(job)
    except NonFiniteError as error:
        Path(f"{job['out']}.error-{rank}").write_text(str(error))
        left = sum(isinstance(found, DistributedDataParallel) for found in gc.get_objects())
        Path(f"{job['out']}.reducers-{rank}").write_text(str(left))
        sys.exit(3)
    finally:
        if job["world"] > 1 and not job.get("kill"):
            dist.destroy_process_group()


def run_together(jobs: list[dict[str, Any]], folder: Path, rank: int) -> None:
    """One worker of all jobs of a size, one after the other in one process group."""
    join_group(jobs[0]["rendezvous"], rank, jobs[0]["world"])
    for job in jobs:
        if rank == 0:
            prepare(job, folder)
        if job["world"] > 1:
            dist.barrier()
        train(job)
        Path(f"{job['out']}.ended-{rank}").touch()
    if jobs[0]["world"] > 1:
        dist.destroy_process_group()


def prepare(job: dict[str, Any], folder: Path) -> None:
    """The job's folder, with the checkpoint that it starts from."""
    Path(job["run"]).mkdir(parents=True, exist_ok=True)
    if copy := job.get("copy"):
        found = sorted(glob.glob(copy[0]))[-1]
        target = folder / copy[1]
        shutil.copytree(
            found, target / Path(found).name if copy[1].endswith("/") else target, dirs_exist_ok=True
        )


def wait(workers: list[Any], seconds: float) -> list[int]:
    """Exit codes; who is not done in time is killed."""
    for worker in workers:
        worker.start()
    end = time.monotonic() + seconds
    for worker in workers:
        worker.join(max(end - time.monotonic(), 1.0))
        if worker.is_alive():
            worker.kill()
            worker.join()
    return [worker.exitcode for worker in workers]


def run_jobs(path: str) -> None:
    """Jobs that go together first, a spawn for each number of workers; then the others in turn.

    Exit codes of a job's workers go to `<out>.exit`.
    """
    context = multiprocessing.get_context("fork")
    folder = Path(path).parent
    jobs = json.loads(Path(path).read_text())
    for number, job in enumerate(jobs):
        job["rendezvous"] = f"{path}.rendezvous-{number}"
    for size in sorted({job["world"] for job in jobs if job.get("together")}):
        group = [job for job in jobs if job.get("together") and job["world"] == size]
        codes = wait(
            [context.Process(target=run_together, args=(group, folder, rank)) for rank in range(size)], 400
        )
        for job in group:
            ended = [Path(f"{job['out']}.ended-{rank}").exists() for rank in range(size)]
            found = [0 if e else code or 1 for e, code in zip(ended, codes, strict=True)]
            Path(f"{job['out']}.exit").write_text(json.dumps(found))
    for job in jobs:
        if job.get("together"):
            continue
        prepare(job, folder)
        workers = [context.Process(target=run_job, args=(job, rank)) for rank in range(job["world"])]
        Path(f"{job['out']}.exit").write_text(json.dumps(wait(workers, 120)))


if __name__ == "__main__":
    run_jobs(sys.argv[1])
