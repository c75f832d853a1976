"""One worker's loop, from top to bottom.

It knows torch, the stream, k-means and checkpoints; neither Ray nor MLflow. The same loop runs alone in one
process, or in each worker of a process group: a worker computes the lanes it owns, and everything that all
workers must agree on goes through `World`. Position is (phase, epoch, step), so a run can be resumed in the
middle of an epoch, on any number of workers.
"""

from __future__ import annotations

import logging
import posixpath
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from distclust.config import RunConfig, with_newer_settings
from distclust.corpus.order import Order, lanes_of_worker
from distclust.corpus.shards import Corpus
from distclust.corpus.stream import Batch, Stream
from distclust.errors import CheckpointError
from distclust.mixture.diagnostics import diagnostics, left_out_metrics
from distclust.mixture.method import SPECTRAL_MAP, STARTS
from distclust.mixture.model import MixtureModel
from distclust.mixture.noise import Noise
from distclust.mixture.precision import mixed_parts, product_type, products_in
from distclust.mixture.settings import Phase
from distclust.mixture.sparse import Rows, SparseRows
from distclust.mixture.statistics import STATISTICS, Statistic
from distclust.mixture.terms import Scene, Stats
from distclust.training.checkpoint import CheckpointStore, differences
from distclust.training.hooks import Hooks, NoHooks, Outcome, Position
from distclust.training.initialise import fit_spectral_map, start_clusters
from distclust.training.not_finite import check_totals, check_weights, explain
from distclust.training.optimizer import build_optimizer, optimizer_tensors, restore_optimizer
from distclust.training.schedules import WeightAverage, anneal
from distclust.training.world import World, reducer_freed_first

log = logging.getLogger(__name__)


class _Flag(NamedTuple):
    """The non-finite flag as it was after a step, on its way to the host."""

    value: Tensor
    copied: torch.cuda.Event | None
    batch: Batch
    position: Position


class StepLoss(nn.Module):
    """The loss of a step as one module, for DDP to wrap.

    `flag` is a parameter whose gradient says that a loss was not finite: so the news rides with the
    gradients' reduction.
    """

    def __init__(self, model: MixtureModel, world_size: int):
        super().__init__()
        self.model = model
        self.world_size = world_size
        self.flag = nn.Parameter(torch.zeros(()))

    def forward(
        self, x: Rows, noise: Noise, phase: Phase, totals: Stats, rows_in_step: int
    ) -> tuple[Tensor, Stats]:
        """The local sum of the terms x world / rows in the step, and sums for the log."""
        scene, values = self.model.loss_terms(x, phase, totals, noise)
        sums = {name: value.sum() for name, value in values.items()}
        loss = torch.stack([weight * sums[name] for name, weight in phase.terms]).sum()
        scaled = loss * (self.world_size / rows_in_step)
        not_finite = (~torch.isfinite(scaled.detach())).to(scaled.dtype)
        seen: Stats = {f"term/{name}": value.detach() for name, value in sums.items()}
        seen |= diagnostics(scene, noise.step)
        return scaled + self.flag * not_finite, seen


class Trainer:
    """A run on one worker.

    Args:
        config: the resolved configuration.
        corpus: the prepared rows.
        store: where checkpoints are.
        world: this worker's place.
        hooks: who is told.
    """

    # what is trained
    model: MixtureModel
    optimizer: torch.optim.Optimizer
    # the statistics of the phase
    kept: list[Statistic]
    # what is resumed, beside those two
    position: Position
    totals: Stats  # statistics of the epoch
    phase_checkpoints: dict[str, str]
    # what is measured since the last line of the log
    sums: Stats
    # the non-finite flag: on the device, sticky, and its copy of one step ago
    bad: Tensor

    def __init__(
        self,
        config: RunConfig,
        corpus: Corpus,
        store: CheckpointStore,
        world: World,
        hooks: Hooks | None = None,
    ):
        self.config, self.corpus, self.store, self.world = config, corpus, store, world
        self.hooks: Hooks = hooks or NoHooks()
        self.phases = config.phases
        self.order = Order(corpus.shard_rows, config.order, config.seed)
        lanes = lanes_of_worker(world.rank, world.size, config.order.lanes)
        self.stream = Stream(corpus, self.order, list(lanes), device=world.device, config=config.stream)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            self.model = MixtureModel(config.row, config.model, corpus.n_features, config.clusters)
        self.model.to(world.device)
        self.product_type = product_type(config.precision, world.device)
        self.mixed_parts = mixed_parts(self.model)
        self.identity = config.identity() | {
            "corpus": corpus.manifest.fingerprint,
            "vocabulary": corpus.manifest.vocabulary_fingerprint or "",
        }
        self.position, self.totals, self.phase_checkpoints = Position(), {}, {}
        self.sums, self.kept = {}, []
        self.bad = torch.zeros((), device=world.device)
        self._bad_before: _Flag | None = None
        self.average = WeightAverage()
        self._warned_of_softness = False
        self._timer = time.perf_counter()

    # ---- top to bottom

    def run(self) -> Outcome:
        """Train from wherever the newest checkpoint stands to the end."""
        if self.product_type is not None and self.world.is_first:
            log.info("products of hidden layers are in %s", str(self.product_type).removeprefix("torch."))
        optimizer_state = self.restore()
        for index in range(self.position.phase, len(self.phases)):
            phase = self.phases[index]
            self.kept = [STATISTICS[name] for name in self.model.method.statistics_of(phase)]
            if self.position == replace(self.position, epoch=0, step=0):
                self.begin(phase)
            if phase.by_sweeps:
                for epoch in range(self.position.epoch, phase.epochs):
                    self.sweep_epoch(phase, epoch)
            elif phase.epochs:
                with reducer_freed_first():
                    self.train_phase(phase, self.wrap(phase, optimizer_state))
            optimizer_state = {}
            self.position = Position(index + 1, 0, 0, self.position.global_step)
            self.totals = {}
            self.save(f"after-{phase.name}", phase)
        folder = posixpath.dirname(self._last_checkpoint)
        kept = {phase: posixpath.join(folder, name) for phase, name in self.phase_checkpoints.items()}
        return Outcome(self._last_checkpoint, kept, self.position.global_step)

    def train_phase(self, phase: Phase, loss: nn.Module) -> None:
        """The rest of a phase: its epochs, or fewer where its labels have settled."""
        for epoch in range(self.position.epoch, phase.epochs):
            if self.train_epoch(phase, epoch, loss):
                log.info("phase %s ends in epoch %d: its labels have settled", phase.name, epoch)
                if self.sums:
                    self.write_log(phase)
                break
        self.check_finite()
        if phase.average_last_epoch:
            self.average.finish(self.trained, self.totals)

    def train_epoch(self, phase: Phase, epoch: int, loss: nn.Module) -> bool:
        """The rest of an epoch, from the position on; true when the labels have settled."""
        anneal(self.model, phase, epoch)
        for group in self.optimizer.param_groups:
            group["lr"] = phase.optimizer.rate(epoch)
        if self.position.step == 0:
            for statistic in self._statistics("epoch") if epoch % phase.sweep_epochs == 0 else ():
                self.sweep(statistic)
        averaged = phase.average_last_epoch and epoch + 1 == phase.epochs
        passes_before = sum(p.epochs for p in self.phases[: self.position.phase])
        for batch in self.stream.epoch(passes_before + epoch, self.position.step):
            if self.refresh(phase, epoch, batch.step):
                return True
            self.step(phase, batch, loss)
            if averaged:
                self.average.add(self.trained, self.totals)
            last = batch.step + 1 == self.order.steps_per_epoch
            self.position = Position(
                self.position.phase,
                epoch + 1 if last else epoch,
                0 if last else batch.step + 1,
                self.position.global_step + 1,
            )
            end = last and epoch + 1 == phase.epochs
            due = self.position.global_step % self.config.checkpoint.every_steps == 0 and not end
            if due or end or self.position.global_step % self.config.tracking.log_every == 0:
                self.write_log(phase)
            if due:
                self.check_finite()
                self.save("step", phase)
            self.hooks.after_step(self.position)
        return False

    def sweep_epoch(self, phase: Phase, epoch: int) -> None:
        """An epoch without an optimiser: one pass for each statistic, counted as one step (EM)."""
        anneal(self.model, phase, epoch)
        for statistic in self._statistics("epoch"):
            self.sweep(statistic)
        mine = float(self.world.is_first)  # the totals are reduced already
        self.sums = {
            "term/em": self.totals["em_objective"] * mine,
            "rows": self.totals["em_rows"] * mine,
            "usage": self.totals["em_weights"] * mine,
        }
        p = self.position
        self.position = Position(p.phase, epoch + 1, 0, p.global_step + 1)
        self.write_log(phase)
        if self.position.global_step % self.config.checkpoint.every_steps == 0 and epoch + 1 < phase.epochs:
            self.save("sweep", phase)
        self.hooks.after_step(self.position)

    def refresh(self, phase: Phase, epoch: int, step: int) -> bool:
        """The target's statistics and the teacher, when they are due; true when the labels have settled."""
        done = epoch * self.order.steps_per_epoch + step
        every = phase.refresh_steps or self.order.steps_per_epoch
        if done % every:
            return False
        statistics = list(self._statistics("refresh"))
        for statistic in statistics:
            self.sweep(statistic)
        if not statistics or not phase.stop_label_change or done == 0 or "moved" not in self.totals:
            return False
        return float(self.totals["moved"] / self.totals["moved_rows"]) < phase.stop_label_change

    def step(self, phase: Phase, batch: Batch, loss: nn.Module) -> None:
        """One update. Nothing here waits for the device."""
        x = self.rows(batch)
        noise = self.noise(batch, self.position.global_step)
        self.optimizer.zero_grad(set_to_none=True)
        with products_in(self.mixed_parts, self.product_type):
            for statistic in self._statistics("before_step"):
                self._collect(statistic, x, phase, noise)
            value, seen = loss(x, noise, phase, self.totals, batch.rows_in_step)
        value.backward()
        self._mask_update(loss)
        self.optimizer.step()
        for statistic in self._statistics("after_step"):
            self._collect(statistic, x, phase, None)
        seen["rows"] = torch.tensor(float(batch.rows.shape[0]))
        for key, total in seen.items():
            self.sums[key] = self.sums[key] + total.double() if key in self.sums else total.double()
        self._read_flag_late(batch, phase)

    # ---- the pieces of a phase

    def begin(self, phase: Phase) -> None:
        """Whatever happens once as a phase begins: k-means, and statistics over the whole data."""
        for name in phase.begin:
            if name in STARTS:
                start_clusters(name, self.model, self.stream, self.config, self.world)
            elif name == SPECTRAL_MAP:
                fit_spectral_map(self.model, self.stream, self.world)
            else:
                self.sweep(STATISTICS[name])

    def wrap(self, phase: Phase, optimizer_state: dict[str, Tensor]) -> nn.Module:
        """Only what the phase trains gets gradients, one optimiser and, with several workers, one DDP."""
        trained = self.model.trained_in(phase)
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(name in trained)
        loss = StepLoss(self.model, self.world.size).to(self.world.device)
        self.optimizer = build_optimizer(phase.optimizer, trained)
        restore_optimizer(self.optimizer, trained, optimizer_state)
        self.trained = trained
        self.bad.zero_()
        self._bad_before = None
        if self.world.size == 1:
            return loss
        # without find_unused_parameters the buckets are rebuilt after the first step, and a resumed run
        # differs in the last bits for three workers and more
        return DistributedDataParallel(loss, find_unused_parameters=True, broadcast_buffers=False)

    def sweep(self, statistic: Statistic) -> None:
        """A statistic over the whole data: sums over own lanes, then over workers."""
        sums: Stats = {}
        with torch.no_grad():
            for batch in self.stream.scan():
                for key, value in self.collected(statistic, batch).items():
                    sums[key] = sums[key] + value if key in sums else value
            # a worker whose lanes have no row at all takes part with zeros
            sums = sums or self.collected(statistic, self.stream.gather(np.empty(0, np.int64)))
            totals = self.world.sum(sums)
            check_totals(self, statistic, totals)
            self._apply(statistic, totals)

    def collected(self, statistic: Statistic, batch: Batch) -> Stats:
        """A statistic's sums over undisturbed rows."""
        x = self.rows(batch)
        scene = Scene(self.model, x, self.model.view(x, statistic.needs), self.totals)
        return statistic.collect(scene)

    def _collect(self, statistic: Statistic, x: Rows, phase: Phase, noise: Noise | None) -> None:
        """A statistic over the rows of one step, as disturbed as the loss sees them when there is noise."""
        with torch.no_grad():
            scene = self.model.disturbed(x, phase, self.totals, noise, statistic.needs)
            self._apply(statistic, self.world.sum(statistic.collect(scene)))

    def _apply(self, statistic: Statistic, totals: Stats) -> None:
        statistic.apply(self.model, totals)
        if statistic.when != "begin":
            self.totals |= totals

    def _statistics(self, when: str) -> Iterator[Statistic]:
        return (statistic for statistic in self.kept if statistic.when == when)

    def rows(self, batch: Batch) -> Rows:
        """The batch as the mixture takes it."""
        if batch.offsets is None:
            return batch.values
        assert batch.indices is not None
        return SparseRows(batch.offsets, batch.indices, batch.values, self.corpus.n_features)

    def noise(self, batch: Batch, global_step: int) -> Noise:
        return Noise(self.config.seed, global_step, batch.lanes, batch.lane_rows, self.world.device)

    # ---- non-finite values: masked at once on all workers, read one step late

    def _mask_update(self, loss: nn.Module) -> None:
        """Set the optimiser's `found_inf`: the device skips this update and every later one."""
        grads = [p.grad for p in self.trained.values() if p.grad is not None]
        norms = torch.stack(torch._foreach_norm(grads))
        flag = (loss.module if isinstance(loss, DistributedDataParallel) else loss).flag
        bad = ~torch.isfinite(norms).all() | (flag.grad != 0)
        self.bad = torch.maximum(self.bad, bad.to(self.bad.dtype))
        self.optimizer.found_inf = self.bad  # type: ignore[attr-defined]

    def _read_flag_late(self, batch: Batch, phase: Phase) -> None:
        before, done = self._bad_before, None
        copy = self.bad.to("cpu", non_blocking=True) if self.bad.is_cuda else self.bad.clone()
        if self.bad.is_cuda:
            done = torch.cuda.Event()
            done.record()
        self._bad_before = _Flag(copy, done, batch, self.position)
        if before is None:
            return
        if before.copied is not None:
            before.copied.synchronize()  # of the step before this one, which the device has behind it
        if bool(before.value):
            explain(self, before.batch, before.position, phase)

    def check_finite(self) -> None:
        """Wait for the flag of the last step: before a checkpoint and at the end of a phase."""
        if self._bad_before is not None:
            before = self._bad_before
            if bool(self.bad):
                explain(self, before.batch, before.position, self.phases[before.position.phase])

    # ---- the log

    def write_log(self, phase: Phase) -> None:
        """One line of metrics: means over the rows since the last one, over all workers."""
        now = time.perf_counter()
        seconds = max(now - self._timer, 1e-9)
        self._timer = now
        waited = torch.tensor(self.stream.waited_s / seconds)
        self.stream.waited_s = 0.0
        sums = self.world.sum(
            {k: v.to(self.world.device) for k, v in self.sums.items()}
            | {"waited": waited.to(self.world.device)}
        )
        self.sums = {}
        if not self.world.is_first:
            return
        rows = max(float(sums["rows"]), 1.0)
        metrics = {key: float(sums[key]) / rows for key in sums if key.startswith("term/")}
        terms = phase.terms or (("em", 1.0),)
        metrics["loss"] = sum(weight * metrics[f"term/{name}"] for name, weight in terms)
        if "certainty" in sums:
            metrics["gate_certainty"] = float(sums["certainty"]) / rows
            self._warn_of_softness(metrics["gate_certainty"])
        if "kl_w_p" in sums:
            metrics["kl_w_p"] = float(sums["kl_w_p"]) / rows
        if "usage" in sums:
            shares = (sums["usage"] / rows).tolist()
            metrics["usage/largest"] = max(shares)
            metrics["usage/used"] = float(sum(share > 0 for share in shares))
        metrics |= left_out_metrics(sums, rows)
        metrics["tau"] = float(self.model.tau)
        metrics["docs_per_second"] = rows / seconds
        metrics["waiting_share"] = float(sums["waited"]) / self.world.size
        metrics["epoch"] = self.position.epoch
        metrics["phase"] = self.position.phase
        self.hooks.log(self.position, phase.name, metrics)

    def _warn_of_softness(self, certainty: float) -> None:
        if certainty < 0.9 and not self._warned_of_softness:
            self._warned_of_softness = True
            log.warning(
                "the gate's largest probability is %.2f on average: a soft gate gives MIX an optimum where "
                "codes lie between the centroids, cost nothing and are not clustered; raise model.alpha, or "
                "use dmae-exp or dmae-lse with the same dissimilarity",
                certainty,
            )

    # ---- checkpoints

    def save(self, label: str, phase: Phase) -> None:
        """Write the state, unless it is not finite; rank 0 writes, all wait. `after-<phase>` checkpoints are
        kept for good."""
        p = self.position
        check_weights(self.model, p, phase)
        name = f"{p.global_step:010d}-{p.phase:02d}-{label}"
        if label.startswith("after-"):
            self.phase_checkpoints[phase.name] = name
        groups: dict[str, dict[str, Tensor]] = {"model": dict(self.model.state_dict())}
        if label == "step":
            groups["optimizer"] = optimizer_tensors(self.optimizer, self.trained)
        if label in ("step", "sweep"):
            groups["totals"] = self.totals
        state = {
            "position": asdict(p),
            "identity": self.identity,
            "phase_checkpoints": self.phase_checkpoints,
            "workers": self.world.size,
            "pending_metrics": self.hooks.pending() if self.world.is_first else [],
        }

        def write() -> str:
            path = self.store.save(name, groups, state)
            self.store.prune(self.config.checkpoint.keep, set(self.phase_checkpoints.values()))
            return path

        self._last_checkpoint = self.world.on_first(write)
        self.hooks.saved(self._last_checkpoint, p)

    def restore(self) -> dict[str, Tensor]:
        """Take up the newest checkpoint, if there is one; returns the optimiser's tensors."""
        path = self._last_checkpoint = self.world.on_first(lambda: self.store.latest() or "")
        if not path:
            return {}
        groups, state = self.store.load(path)
        unlike = differences(state["identity"], self.identity)
        if unlike:
            unlike = differences(with_newer_settings(state["identity"]), self.identity)
        if unlike:
            raise CheckpointError(
                f"checkpoint {path} belongs to another run: {'; '.join(unlike)}. "
                "Give the same configuration and data, or another run folder"
            )
        self.model.load_state_dict(groups["model"])
        self.totals = {k: v.to(self.world.device) for k, v in groups.get("totals", {}).items()}
        self.position = Position(**state["position"])
        self.phase_checkpoints = dict(state["phase_checkpoints"])
        if self.world.is_first:
            log.info("resuming from %s (saved by %d workers)", path, state["workers"])
            self.hooks.offer(state["pending_metrics"])
        return groups.get("optimizer", {})
