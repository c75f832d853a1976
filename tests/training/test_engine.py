"""The loop on one worker: non-finite values, refusals, and the slots of methods that are not in the table
yet."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import runs
from corpora import dense_rows, make_corpus
from distclust.config import RunConfig, method_row
from distclust.corpus.prepare import prepare_local
from distclust.corpus.shards import Corpus, ShardConfig
from distclust.corpus.sources import SourceConfig
from distclust.corpus.vocabulary import VocabularyConfig
from distclust.errors import CheckpointError, DataError, NonFiniteError
from distclust.mixture import terms
from distclust.mixture.methods import METHODS, Method, ModelSettings, OptimizerConfig, Phase
from distclust.mixture.rows.common import INITIALISE, pretrain
from distclust.training.checkpoint import CheckpointStore
from distclust.training.engine import Trainer
from distclust.training.hooks import NoHooks, Position
from distclust.training.world import World


@pytest.fixture
def corpus(tmp_path: Path) -> Corpus:
    return make_corpus(tmp_path / "corpus", shard_rows=runs.SHARD_ROWS, n_features=30)


class Losses(NoHooks):
    """Keeps what the loop logs."""

    def __init__(self) -> None:
        self.lines: list[tuple[int, str, dict[str, float]]] = []

    def log(self, position: Position, phase: str, metrics: dict[str, float]) -> None:
        self.lines.append((position.global_step, phase, metrics))


def trainer(config: RunConfig, corpus: Corpus, folder: Path, hooks: NoHooks | None = None) -> Trainer:
    return Trainer(config, corpus, CheckpointStore(str(folder / "checkpoints")), World(), hooks)


# ---- non-finite values


class Poison:
    """A term that is not finite for one document, from one step on."""

    def __init__(self, document: int, in_gradient: bool):
        self.document, self.in_gradient, self.step = document, in_gradient, 7
        self.trainer: Trainer

    def __call__(self, scene: terms.Scene) -> torch.Tensor:
        value = terms._reconstruction(scene)
        if self.trainer.position.global_step < self.step:
            return value
        if self.in_gradient:
            return value + (value - value.detach()).abs().clamp_min(0).sqrt()  # 0 with an infinite slope
        row = self.trainer.stream.gather([self.document])
        hit = scene.x.square_norms() == row.values.square().sum()  # type: ignore[union-attr]
        return torch.where(hit, torch.full_like(value, float("nan")), value)


@pytest.mark.parametrize("in_gradient", [False, True])
def test_a_value_that_is_not_finite_stops_the_run_and_changes_nothing(
    corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_gradient: bool
) -> None:
    phases = {"pretrain": {"epochs": 4}}
    config = runs.tiny_config("damic", checkpoint={"every_steps": 100}, phases=phases)
    clean = trainer(config, corpus, tmp_path / "clean", _StopAt(7))
    with pytest.raises(_Stopped):
        clean.run()

    poison = Poison(document=33, in_gradient=in_gradient)
    poisoned = trainer(config, corpus, tmp_path / "poisoned")
    poison.trainer = poisoned
    monkeypatch.setitem(terms.TERMS, "reconstruction", terms.Term(poison, frozenset({"codes"})))
    with pytest.raises(NonFiniteError) as error:
        poisoned.run()
    message = str(error.value)
    assert "phase pretrain" in message
    if in_gradient:
        assert "step 7 " in message
        assert "gradient of" in message
        assert "network." in message
    else:
        assert "term 'reconstruction'" in message
        assert "shard-" in message
        assert "doc-33" in message
    # the update was masked, and so was the one after it, before the flag was read
    if in_gradient:
        for name, value in clean.model.state_dict().items():
            assert torch.equal(value, poisoned.model.state_dict()[name]), name
    assert all(torch.isfinite(v).all() for v in poisoned.model.state_dict().values())
    assert CheckpointStore(str(tmp_path / "poisoned" / "checkpoints")).latest() is None


@pytest.mark.parametrize("method", ["idec", "damic"])
def test_weights_that_a_last_step_broke_are_not_saved(corpus: Corpus, tmp_path: Path, method: str) -> None:
    """The step's own check is of gradients; the last one's effect on the weights nobody else sees."""
    row = METHODS[method]
    last = row.phases[-1].name
    phases = {p.name: {"epochs": 1} for p in row.phases if p.epochs}
    phases[last] = {"epochs": 1, "optimizer": {"name": "adam", "learning_rate": 1e38}}
    one_step = {"lanes": 6, "rows_per_lane": 40, "window": 2}
    config = runs.tiny_config(method, phases=phases, order=one_step)
    with pytest.raises(NonFiniteError, match=f"phase {last}.* not finite; expected .*learning rate"):
        trainer(config, corpus, tmp_path).run()
    kept = CheckpointStore(str(tmp_path / "checkpoints")).latest()
    assert kept is not None
    assert "after-joint" not in kept


def test_a_row_that_breaks_a_pass_over_the_data_is_named(tmp_path: Path) -> None:
    """EM has no gradients: the sums of its pass are looked at before the model takes them."""
    rows = np.random.default_rng(0).standard_normal((45, 6))
    rows[27] = 1e20
    np.savez(tmp_path / "a.npz", x=rows.astype(np.float32))
    source = SourceConfig(name="files", files=(str(tmp_path / "a.npz"),))
    prepare_local(source, VocabularyConfig(), ShardConfig(rows_per_shard=9), tmp_path / "corpus")
    corpus = Corpus.open(tmp_path / "corpus")
    config = runs.tiny_config("bregman", initialise={"sample": 3}, phases={"em": {"epochs": 3}})
    with pytest.raises(NonFiniteError, match=r"em_.*pass over the data \(phase em.*shard-00003.*'27'"):
        trainer(config, corpus, tmp_path / "run").run()


class _Stopped(Exception):
    pass


class _StopAt(NoHooks):
    def __init__(self, step: int):
        self._step = step

    def after_step(self, position: Position) -> None:
        if position.global_step == self._step:
            raise _Stopped


# ---- refusals


def test_another_configuration_is_refused_with_the_differences(corpus: Corpus, tmp_path: Path) -> None:
    trainer(runs.tiny_config("damic-text"), corpus, tmp_path, _StopAt(99)).run()
    other = dataclasses.replace(runs.tiny_config("damic-text"), clusters=4, seed=5)
    with pytest.raises(CheckpointError, match=r"clusters.*3.*4.*seed.*0.*5"):
        trainer(other, corpus, tmp_path).run()


def test_a_checkpoint_from_before_a_setting_was_there_goes_on_with_its_default(
    corpus: Corpus, tmp_path: Path
) -> None:
    whole = trainer(runs.tiny_config("damic"), corpus, tmp_path)
    path = whole.run().checkpoint
    groups, state = whole.store.load(path)
    for phase in state["identity"]["phases"]:
        del phase["tau_factor"]
    whole.store.save(Path(path).name, groups, state)
    again = trainer(runs.tiny_config("damic"), corpus, tmp_path)
    assert again.run().global_steps == whole.position.global_step
    hot = {"joint": {"tau_factor": 2.0}}
    with pytest.raises(CheckpointError, match="tau_factor"):
        trainer(runs.tiny_config("damic", phases=hot), corpus, tmp_path).run()


def test_another_corpus_is_refused(corpus: Corpus, tmp_path: Path) -> None:
    config = runs.tiny_config("damic-text")
    trainer(config, corpus, tmp_path).run()
    other = make_corpus(tmp_path / "other", shard_rows=runs.SHARD_ROWS, n_features=30, seed=9)
    with pytest.raises(CheckpointError, match="corpus"):
        trainer(config, other, tmp_path).run()


def test_more_clusters_than_distinct_codes_is_refused(tmp_path: Path) -> None:
    corpus = make_corpus(tmp_path / "corpus", shard_rows=[2, 1], n_features=30)
    with pytest.raises(DataError, match="distinct"):
        trainer(dataclasses.replace(runs.tiny_config("damic-text"), clusters=5), corpus, tmp_path).run()


@pytest.mark.parametrize("name", ["itakura_saito", "i_divergence"])
def test_rows_that_a_divergence_is_not_defined_for_are_refused(tmp_path: Path, name: str) -> None:
    corpus = make_corpus(tmp_path / "corpus", shard_rows=runs.SHARD_ROWS, n_features=30, kind="dense")
    config = runs.tiny_config("dmm", model={"dissimilarity": name})
    n, below = corpus.n_rows, int((dense_rows(corpus) < 0).any(1).sum())
    assert 0 < below < n
    with pytest.raises(DataError, match=f"{name}, and {below} of {n} rows have values below 0; expected"):
        trainer(config, corpus, tmp_path / "run").run()


def test_codes_that_a_divergence_is_not_defined_for_are_told_of(
    corpus: Corpus, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer(
        runs.tiny_config("dmae", model={"dissimilarity": "itakura_saito"}), corpus, tmp_path / "run"
    ).run()
    assert "codes have values below 0; expected none" in caplog.text
    caplog.clear()
    trainer(runs.tiny_config("dmae"), corpus, tmp_path / "other").run()
    assert "below 0" not in caplog.text


# ---- a run is a function of its seed, and its metrics have names


def test_the_same_seed_gives_the_same_run_and_another_seed_another(corpus: Corpus, tmp_path: Path) -> None:
    lines = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        hooks = Losses()
        trainer(
            dataclasses.replace(runs.tiny_config("damic"), seed=seed), corpus, tmp_path / name, hooks
        ).run()
        lines.append([(step, phase, m["loss"]) for step, phase, m in hooks.lines])
    assert lines[0] == lines[1]
    assert lines[0] != lines[2]
    metrics = hooks.lines[-1][2]
    for key in (
        "loss",
        "term/lse",
        "kl_w_p",
        "usage/largest",
        "usage/used",
        "docs_per_second",
        "waiting_share",
    ):
        assert key in metrics


@pytest.mark.parametrize("method", sorted(METHODS))
@pytest.mark.parametrize("kind", ["sparse", "dense"])
def test_losses_fall_in_every_phase_on_sparse_and_dense_rows(tmp_path: Path, method: str, kind: str) -> None:
    corpus = make_corpus(tmp_path / "corpus", shard_rows=[40, 40], n_features=30, kind=kind)
    row = method_row(method)
    phases = {
        p.name: {"epochs": 8, "optimizer": {"learning_rate": 3e-3, "name": "adam"}}
        for p in row.phases
        if p.epochs
    }
    # without noise the clean teacher's term is the likelihood itself, which has to fall
    model: dict[str, Any] = (
        {"alpha": 5.0} if row.gate == "tied" else {"gate_dropout": 0.0, "tau_spread": None}
    )
    if row.settings.sharpen != 1.0:
        model |= {"sharpen": 1.0, "balance": 0.0}
    # a gate that starts at the optimum of all but the usage prior has less to gain than the noise of a prior
    # over few rows, so a step has them all
    whole = any("e_step_gate" in p.begin for p in row.phases)
    order = {"order": {"lanes": 6, "rows_per_lane": 14, "window": 2}} if whole else {}
    hooks = Losses()
    trainer(runs.tiny_config(method, phases=phases, model=model, **order), corpus, tmp_path, hooks).run()
    for phase in phases:
        losses = [m["loss"] for _, name, m in hooks.lines if name == phase]
        assert all(math.isfinite(value) for value in losses), phase
        if terms.AGGREGATOR_TERMS["TARGET"] & {
            name for p in row.phases if p.name == phase for name, _ in p.terms
        }:
            continue  # the target moves with the gate, and the distance to it may grow
        epoch = len(losses) // 8
        assert sum(losses[-epoch:]) < sum(losses[:epoch]), (phase, losses)


def test_sparse_and_dense_rows_train_alike(tmp_path: Path) -> None:
    """The same numbers stored both ways; float32 in another order."""
    import pyarrow as pa

    from distclust.corpus.shards import ShardWriter

    sparse = make_corpus(tmp_path / "sparse", shard_rows=[40, 21], n_features=30)
    writer = ShardWriter(tmp_path / "dense", "dense", 30, rows_per_shard=40)
    for i in range(2):
        shard = sparse.shard(i)
        rows = torch.zeros(len(shard.ids()), 30)
        for r in range(rows.shape[0]):
            a, b = shard.offsets[r], shard.offsets[r + 1]
            rows[r, torch.tensor(shard.indices[a:b]).long()] = torch.tensor(shard.values[a:b])
        columns = {
            "id": shard.ids(),
            "labels": shard.labels(),
            "title": shard.titles(),
            "values": list(rows.numpy()),
        }
        writer.write(pa.table({**columns, "values": pa.array(columns["values"], pa.list_(pa.float32(), 30))}))
    writer.finish({})
    losses = []
    for root in ("sparse", "dense"):
        hooks = Losses()
        order = {"lanes": 6, "rows_per_lane": 3, "window": 2}
        config = runs.tiny_config("damic-text", order=order)
        trainer(config, Corpus.open(tmp_path / root), tmp_path / f"run-{root}", hooks).run()
        losses.append([m["loss"] for _, _, m in hooks.lines])
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


# ---- the interface holds DEC and DCN


def _custom(name: str, joint: Phase, **slots: Any) -> Method:
    return Method(
        name=name,
        paper="a row of a test",
        summary="",
        settings=ModelSettings(alpha=1.0, dissimilarity="squared_euclidean"),
        phases=(pretrain(1, OptimizerConfig()), INITIALISE, joint),
        **slots,
    )


@pytest.mark.parametrize(
    ("slots", "reason"),
    [
        ({"gate": "tied", "aggregator": "LSE", "readout": "gate"}, "count twice"),
        ({"gate": "prior", "aggregator": "LSE", "readout": "gate"}, "responsibility"),
        ({"gate": "hard", "aggregator": "MIX", "readout": "energy"}, "MIX needs"),
        ({"gate": "hard", "aggregator": "TARGET", "readout": "energy"}, "TARGET needs"),
        ({"gate": "network", "aggregator": "EXP", "readout": "gate"}, "no phase has the term"),
    ],
)
def test_rows_that_contradict_themselves_are_refused(slots: dict[str, Any], reason: str) -> None:
    joint = Phase(name="joint", epochs=1, trains=("network",), terms=(("reconstruction", 1.0),))
    with pytest.raises(ValueError, match=reason):
        _custom("wrong", joint, energy="dissimilarity", **slots)
