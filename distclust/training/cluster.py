"""A run on one machine or on a Ray cluster: workers, lost workers, resumption, elastic size.

The engine resumes by itself from the newest checkpoint, on any number of workers; so all that Ray has to do
after a loss is to start workers again. What starting again cannot mend (a `DistclustError`) ends the run at
once. Nothing here waits for ever: not for machines, not for storage, not for workers that do not come back.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from distclust.config import ClusterConfig, RunConfig, from_dict
from distclust.errors import ClusterError
from distclust.training.hooks import Hooks, Outcome, Position
from distclust.training.run_state import (
    RunState,
    Tell,
    describe,
    log_to_file,
    pass_warnings_on,
    revive,
    watching,
)
from distclust.training.worker import (
    Job,
    Tracking,
    check_storage,
    introduce,
    make_job,
    settle,
    token_of,
    work,
    work_here,
)
from distclust.training.world import World

log = logging.getLogger(__name__)

ELASTIC_START_S = 10.0
"""An elastic group that cannot start with the nodes it counted on looks again after so long."""
ANSWER_S = 20.0
"""Within so long somebody has to listen at RAY_ADDRESS."""
POLL_S = 0.5
"""How often Ray looks at its workers. Its own default of 2 s is what every phase would wait at its end."""

_alone = False  # whether this process has started a Ray that is this machine and nothing else


def run_training(
    config: RunConfig,
    corpus_root: str | Path,
    run_dir: str | Path,
    *,
    tracking: Tracking | None = None,
    on_progress: Tell | None = None,
) -> Outcome:
    """Train from wherever the run stands to its end.

    `workers: 0` trains in this process. Otherwise Ray Train does, on this machine or, where RAY_ADDRESS is
    set, on that cluster. A lost worker or node is replaced up to `cluster.max_failures` times; the same call
    after the death of this process continues the run. One call at a time works on a run folder: the caller
    holds it.

    Args:
        config: the resolved configuration.
        corpus_root: the prepared corpus; a path that all nodes see, or a URL.
        run_dir: the run folder; a path that all nodes see.
        tracking: where metrics go; None keeps none.
        on_progress: called in this process with what `RunHooks.content` says, as it changes.

    Raises:
        ClusterError: the cluster cannot give what is asked for, a node does not see the storage, or workers
            were lost more often than allowed.
        DistclustError: any other, as the worker that met it raised it.
    """
    job = make_job(config, corpus_root, run_dir, tracking)
    state = RunState(job["run_dir"], job["command"])
    state.clear()
    if config.cluster.worker_range[1] == 0:
        return work_here(job, state, on_progress)
    with connect(config.cluster):
        _check_resources(config.cluster)
        return _run_on_ray(config.cluster, job, state, on_progress)


# ---- a worker under Ray Train


class _ReportingHooks:
    """Hands Ray a reference to the checkpoint at the end of each phase.

    Only there, because it gains us nothing and costs: `ray.train.report` holds all workers until the
    controller's next look at them, and Ray refuses to start a run again where a checkpoint of its list has
    been pruned. Those of a phase's end are kept for good. Nothing is uploaded, and nothing is ever restored
    from Ray's list.
    """

    def __init__(self, inner: Hooks, world: World):
        self.inner, self.world = inner, world
        self.log, self.after_step = inner.log, inner.after_step
        self.pending, self.offer = inner.pending, inner.offer

    def saved(self, checkpoint: str, position: Position) -> None:
        from ray import train

        self.inner.saved(checkpoint, position)
        if "-after-" not in os.path.basename(checkpoint):
            return
        train.report(
            {"global_step": position.global_step},
            checkpoint=train.Checkpoint.from_directory(checkpoint) if self.world.is_first else None,
            checkpoint_upload_mode=train.CheckpointUploadMode.NO_UPLOAD,
        )


def _train_worker(job: Job) -> dict[str, Any]:
    """What Ray Train runs on each worker.

    Returns:
        What `settle` makes of it. What it raises makes Ray start all workers again.
    """
    from ray.train.torch import get_device

    state = RunState(job["run_dir"], job["command"])
    found = state.error()
    if found is not None:
        return {"error": found}
    cluster = from_dict(job["config"]).cluster
    torch.set_num_threads(max(1, cluster.cpus_per_worker))
    world, node = World.current(get_device()), _node()

    def train() -> Outcome:
        check_storage(job, world, node)
        start = introduce(world, state, node)
        log_to_file(state.log_file, world.rank)
        with watching(state, start):
            return work(job, world, state.write_progress, lambda hooks: _ReportingHooks(hooks, world))

    return settle(train, world, state)


def _node() -> str:
    import ray

    node_id = ray.get_runtime_context().get_node_id()
    return f"{socket.gethostname()} ({ray.util.get_node_ip_address()}, node {node_id[:8]})"


# ---- the driver


@contextmanager
def connect(cluster: ClusterConfig) -> Iterator[None]:
    """Ray for the time of the block: one that runs already, the cluster of RAY_ADDRESS, or one of our own.

    One of our own is this machine, and declares enough logical CPUs for the workers and some tasks beside
    them, whatever the machine has. It has token authentication, as Ray has it by default, unless
    RAY_AUTH_MODE says otherwise. So that preparing, training and assigning share one, put the block around
    all of them.

    Raises:
        ClusterError: the cluster of RAY_ADDRESS cannot be reached.
    """
    global _alone
    import ray

    if ray.is_initialized():
        yield
        return
    address = os.environ.get("RAY_ADDRESS") or "local"
    if address.startswith(("http://", "https://", "ray://")):
        raise ClusterError(
            f"RAY_ADDRESS is {address}; expected the address of a Ray cluster that this machine is part of. "
            "From outside, submit a job (ray job submit --working-dir . -- python -m jobs.train RECIPE), or "
            "unset it"
        )
    options: dict[str, Any] = {"address": address, "logging_level": logging.WARNING, "log_to_driver": False}
    if address == "local":
        workers = max(cluster.worker_range[1], 1) * cluster.cpus_per_worker
        options["num_cpus"] = max(os.cpu_count() or 1, workers + 2)
    try:
        _check_answers(address)
        with _quiet("ray._private.authentication.authentication_token_setup"):
            ray.init(**options)
    except (OSError, RuntimeError, ValueError) as error:
        raise ClusterError(
            f"no Ray cluster at {address} ({error}); expected one that runs. Start it (ray start --head), "
            "correct RAY_ADDRESS and RAY_AUTH_TOKEN, or unset RAY_ADDRESS to work on this machine"
        ) from error
    _alone = address == "local"
    try:
        yield
    finally:
        _alone = False
        ray.shutdown()


def _check_answers(address: str) -> None:
    """Ray itself asks an address again and again, for minutes.

    Raises:
        OSError: nobody listens there.
    """
    host, _, port = address.rpartition(":")
    if host and port.isdigit():
        socket.create_connection((host.strip("[]"), int(port)), timeout=ANSWER_S).close()


@contextmanager
def _quiet(name: str) -> Iterator[None]:
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _per_worker(cluster: ClusterConfig) -> dict[str, float]:
    asked: dict[str, float] = {"CPU": cluster.cpus_per_worker}
    if cluster.gpus_per_worker:
        asked["GPU"] = cluster.gpus_per_worker
    if cluster.memory_per_worker_gb:
        asked["memory"] = cluster.memory_per_worker_gb * 1e9
    return asked


def _check_resources(cluster: ClusterConfig) -> None:
    """Reserve what the least number of workers needs, for a moment; asking also wakes an autoscaler.

    Raises:
        ClusterError: with what was asked for and what is there, after `start_timeout_s`; at once where no
            node can ever come.
    """
    import ray
    from ray.util.placement_group import placement_group, remove_placement_group

    least, asked = cluster.worker_range[0], _per_worker(cluster)
    total = ray.cluster_resources()
    hopeless = _alone and any(total.get(key, 0) < least * value for key, value in asked.items())
    waited = 0.0 if hopeless else cluster.start_timeout_s
    if not hopeless:
        group = placement_group([asked] * least, strategy="PACK")
        try:
            if group.wait(waited):
                return
        finally:
            remove_placement_group(group)
    total, free = ray.cluster_resources(), ray.available_resources()
    nodes = sum(bool(node["Alive"]) for node in ray.nodes())
    each = ", ".join(_amount(k, v) for k, v in asked.items())
    there = ", ".join(f"{_amount(k, total.get(k, 0))} ({_amount(k, free.get(k, 0))} free)" for k in asked)
    raise ClusterError(
        f"asked: {least} workers with {each} each; available: {there} on {nodes} "
        f"{'node' if nodes == 1 else 'nodes'}, after {waited:.0f} s. Ask for less (cluster.workers, "
        "cluster.cpus_per_worker, cluster.gpus_per_worker, cluster.memory_per_worker_gb), add nodes, or wait "
        "longer (cluster.start_timeout_s)"
    )


def _amount(key: str, value: float) -> str:
    return f"{value / 1e9:.3g} GB of memory" if key == "memory" else f"{value:g} {key}"


def _trainer(cluster: ClusterConfig, job: Job, start_s: float) -> Any:
    """Ray's trainer. Its folder is the run folder, as the references to checkpoints must lie inside."""
    from ray import train
    from ray.train.torch import TorchConfig, TorchTrainer

    ray_train: Any = train  # the types that ray.train shows are those of its first version
    least, most = cluster.worker_range
    folder = Path(job["run_dir"])
    starts = math.ceil(cluster.start_timeout_s / start_s)
    return TorchTrainer(
        _train_worker,  # type: ignore[arg-type]
        train_loop_config=job,
        torch_config=TorchConfig(backend="nccl" if cluster.gpus_per_worker else "gloo"),
        scaling_config=ray_train.ScalingConfig(
            num_workers=(least, most) if most > least else most,
            use_gpu=cluster.gpus_per_worker > 0,
            resources_per_worker=_per_worker(cluster),
        ),
        run_config=ray_train.RunConfig(
            name=folder.name,
            storage_path=str(folder.parent),
            failure_config=ray_train.FailureConfig(
                max_failures=cluster.max_failures,
                # failed starts; without a limit Ray would try for ever
                controller_failure_limit=cluster.max_failures + starts - 1,
            ),
        ),
    )


def _run_on_ray(cluster: ClusterConfig, job: Job, state: RunState, on_progress: Tell | None) -> Outcome:
    least, most = cluster.worker_range
    start_s = min(ELASTIC_START_S, cluster.start_timeout_s) if most > least else cluster.start_timeout_s
    token = token_of(job)
    token.touch()
    variables = {
        "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": str(POLL_S),
        "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": str(start_s),
    }
    try:
        _forget_ray(job)
        with _environment(variables):
            trainer = _trainer(cluster, job, start_s)
            result = _fit(trainer, state, on_progress, silence_s=2 * cluster.start_timeout_s + 60)
    finally:
        token.unlink(missing_ok=True)
        _forget_ray(job)
    found = state.error() or result.get("error")
    if found:
        raise revive(found)
    return Outcome(**result["outcome"])


def _fit(trainer: Any, state: RunState, on_progress: Tell | None, silence_s: float) -> dict[str, Any]:
    """`trainer.fit()` in a thread; this one passes progress on, and gives up after `silence_s` of none."""
    box: dict[str, Any] = {}

    def fit() -> None:
        try:
            box["result"] = trainer.fit().return_value
        except BaseException as error:
            box["error"] = error

    thread = threading.Thread(target=fit, name="distclust-fit", daemon=True)
    thread.start()
    seen: dict[str, Any] = {}
    logged = state.log_file.stat().st_size if state.log_file.exists() else 0
    heard = time.monotonic()
    try:
        while True:
            thread.join(0.3)
            progress = state.progress()
            if progress and progress != seen:
                seen, heard = progress, time.monotonic()
                if on_progress is not None and progress["state"] != "starting":
                    on_progress(progress)
            logged = pass_warnings_on(state.log_file, logged)
            if not thread.is_alive():
                break
            if time.monotonic() - heard > silence_s:
                raise ClusterError(
                    f"no worker has worked for {silence_s:.0f} s; expected the cluster to replace what was "
                    "lost. Add nodes or ask for fewer workers, and give the same command again: it goes on "
                    "from the newest checkpoint"
                )
    except BaseException as error:
        state.write_error(describe(error) | {"by": "driver"})  # workers that still live stop by themselves
        raise
    if "error" in box and state.error() is None:
        raise _lost(box["error"], state)
    return box.get("result") or {}


def _lost(error: BaseException, state: RunState) -> ClusterError:
    """Ray's last word as an error of ours."""
    starts, step = state.workers().get("starts", 0), state.progress().get("global_step", 0)
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    log.debug("Ray's error", exc_info=error)
    return ClusterError(
        f"the workers failed after {starts} {'start' if starts == 1 else 'starts'}, more than "
        f"cluster.max_failures allows, at global step {step}; the last words: "
        f"{' | '.join(lines[-3:])[-1500:]}. More is in {state.log_file}. Mend the cause and give the same "
        "command again: it goes on from the newest checkpoint"
    )


def _forget_ray(job: Job) -> None:
    """Remove Ray's own notes from the run folder: with them it may refuse to start the run again."""
    for name in ("checkpoint_manager_snapshot.json", ".validate_storage_marker"):
        with contextlib.suppress(OSError):
            (Path(job["run_dir"]) / name).unlink()


@contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    """Environment variables for the time of the block; those that are set already stay."""
    mine = [name for name in values if name not in os.environ]
    os.environ.update({name: values[name] for name in mine})
    try:
        yield
    finally:
        for name in mine:
            os.environ.pop(name, None)
