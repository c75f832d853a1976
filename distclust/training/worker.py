"""One worker of a run, in whatever process it lives: this one, or one that Ray has started."""

from __future__ import annotations

import json
import logging
import os
import socket
import time
import traceback
import uuid
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from distclust.config import RunConfig, from_dict, to_dict
from distclust.corpus.files import is_url
from distclust.corpus.order import Order
from distclust.corpus.shards import Corpus, Manifest
from distclust.errors import ClusterError, ConfigError, DataError, DistclustError
from distclust.mixture.imports import allow_modules, allowed_modules
from distclust.training.checkpoint import CheckpointStore
from distclust.training.engine import Trainer
from distclust.training.hooks import Hooks, NoHooks, Outcome
from distclust.training.run_state import FOLDER, RunHooks, RunState, Tell, beating, describe
from distclust.training.tracking import SPOOL_NAME, MetricSink
from distclust.training.world import World

log = logging.getLogger(__name__)

Job = dict[str, Any]
"""What a worker has to know: config, corpus, fingerprint, run_dir, command, tracking. Plain data."""
_FAULTS = (
    ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, NameError, NotImplementedError,
    TypeError, ValueError,
)  # fmt: skip
"""What a fault of the code looks like (a user's own parts are code): another start would meet it again."""
Tracking = tuple[str, str | None]
"""The MLflow server, and the run that rank 0 sends metrics to; without a run they wait in the run folder."""


def make_job(
    config: RunConfig, corpus_root: str | Path, run_dir: str | Path, tracking: Tracking | None
) -> Job:
    """The job of one command; makes the run folder.

    Raises:
        ConfigError: the run folder is a URL.
        DataError: there is no corpus.
    """
    if is_url(run_dir):
        raise ConfigError(
            f"the run folder is {run_dir}; expected a path: mount the storage on every node and name it there"
        )
    folder = Path(run_dir).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    root = str(corpus_root) if is_url(corpus_root) else str(Path(corpus_root).absolute())
    return {
        "config": to_dict(config),
        "corpus": root,
        "fingerprint": Manifest.load(root).fingerprint,
        "run_dir": str(folder),
        "command": uuid.uuid4().hex,
        "tracking": tracking,
        "allow_modules": allowed_modules(),
    }


def work(job: Job, world: World, tell: Tell, wrap: Callable[[Hooks], Hooks] = lambda hooks: hooks) -> Outcome:
    """The engine, from wherever the run stands to its end.

    Args:
        job: see `make_job`.
        world: this worker's place.
        tell: takes rank 0's progress (`RunHooks.content`).
        wrap: what to put around the hooks.
    """
    allow_modules(job["allow_modules"])
    config = from_dict(job["config"])
    corpus = Corpus.open(job["corpus"], cache_config=config.cache)
    store = CheckpointStore(f"{job['run_dir']}/checkpoints")
    if not world.is_first:
        return Trainer(config, corpus, store, world, wrap(NoHooks())).run()
    steps_per_epoch = Order(corpus.shard_rows, config.order, config.seed).steps_per_epoch
    sink = None
    if job["tracking"]:
        uri, run_id = job["tracking"]
        sink = MetricSink(uri, run_id, Path(job["run_dir"]) / SPOOL_NAME)
    hooks = RunHooks(config, steps_per_epoch, sink, tell)
    try:
        with beating(hooks):
            return Trainer(config, corpus, store, world, wrap(hooks)).run()
    finally:
        if sink is not None:
            sink.close()


def work_here(job: Job, state: RunState, on_progress: Tell | None) -> Outcome:
    """The only worker, in this process, without Ray."""
    cluster = from_dict(job["config"]).cluster
    threads = torch.get_num_threads()
    torch.set_num_threads(max(1, cluster.cpus_per_worker))
    state.write_workers(uuid.uuid4().hex, [{"rank": 0, "pid": os.getpid(), "host": socket.gethostname()}])

    def tell(content: dict[str, Any]) -> None:
        state.write_progress(content)
        if on_progress is not None and content["state"] != "starting":
            on_progress(content)

    try:
        return work(job, World(device=torch.device("cuda" if cluster.gpus_per_worker else "cpu")), tell)
    finally:
        torch.set_num_threads(threads)


def token_of(job: Job) -> Path:
    """A file that the driver makes, and that every worker must see."""
    return Path(job["run_dir"]) / FOLDER / f"token-{job['command']}"


def check_storage(job: Job, world: World, node: str) -> None:
    """Every worker's node must see the run folder and the corpus; all workers learn of one that does not.

    Raises:
        ClusterError: naming the nodes (each worker gives its own as `node`) and what they do not see.
    """
    problem = _blind_spot(job)
    blind = [text for text in world.gather_texts(f"{node} {problem}" if problem else "") if text]
    if blind:
        raise ClusterError(
            f"{len(blind)} of {world.size} workers do not see the storage: {'; '.join(sorted(set(blind)))}. "
            "Expected the run folder and the corpus on storage that every node sees under the same path "
            "(NFS, EFS, a mounted bucket; a corpus may also be a URL): mount it there, or move them"
        )


def _blind_spot(job: Job) -> str:
    """What this node does not see of the run's storage; empty when it sees all."""
    token = token_of(job)
    until = time.monotonic() + 3.0
    while not token.exists():  # a network file system may take a moment
        if time.monotonic() > until:
            return f"does not see the run folder {job['run_dir']} (no {token.name} in its {FOLDER}/)"
        time.sleep(0.2)
    try:
        found = Manifest.load(job["corpus"]).fingerprint
    except DataError as error:
        return f"does not see the corpus: {error}"
    if found != job["fingerprint"]:
        return f"sees another corpus at {job['corpus']} ({found[:12]}..., not {job['fingerprint'][:12]}...)"
    return ""


def introduce(world: World, state: RunState, node: str) -> str:
    """Rank 0 writes down who works from now on; returns the name of this start."""
    me = {"rank": world.rank, "pid": os.getpid(), "host": socket.gethostname(), "node": node}
    me["device"] = str(world.device)
    everybody = [json.loads(text) for text in world.gather_texts(json.dumps(me))]

    def write() -> str:
        start = uuid.uuid4().hex
        state.write_workers(start, everybody)
        return start

    return world.on_first(write)


def settle(train: Callable[[], Outcome], world: World, state: RunState) -> dict[str, Any]:
    """Train, and sort out the errors.

    Returns:
        `{"outcome": ...}` or, where starting again would be no use, `{"error": ...}`: the error of the worker
        that met it, on all workers, also on those that only saw their connection to it break.

    Raises:
        Exception: a lost worker, storage that does not answer, the like: with workers started again it may
            go well.
    """
    try:
        return {"outcome": asdict(train())}
    except DistclustError as error:
        return _end(error, world, state)
    except Exception as error:
        reason = f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"
        log.exception("worker %d of %d: %s", world.rank, world.size, reason)
        found = state.wait_for_error(1.0)
        if found is not None:
            return {"error": found}
        if not isinstance(error, _FAULTS):
            raise
        at = traceback.extract_tb(error.__traceback__)[-1]
        fault = ClusterError(
            f"worker {world.rank} of {world.size} ended with {reason} ({at.filename}, line {at.lineno}, in "
            f"{at.name}), which another start would meet again; expected code that runs: mend it where it is "
            f"your own, report it where it is not. The whole trace is in {state.log_file}"
        )
        return _end(fault, world, state)


def _end(error: DistclustError, world: World, state: RunState) -> dict[str, Any]:
    """Let all workers know of an error that ends the run."""
    state.write_error(error)
    if world.size > 1 and dist.get_backend() == "gloo":
        # those that wait for this worker fail at once; over NCCL `run_state.watching` ends them
        dist.destroy_process_group()
    return {"error": state.error() or describe(error)}
