"""What every row of the table must keep: golden losses, resume at every step, sparse as dense, prediction row
by row, and the real data sets that a test can have.

`python tests/training/test_ladder.py` writes the golden file anew; look at the difference before you keep it.
"""

from __future__ import annotations

import contextlib
import math
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))  # for the golden file's own run

import runs
from corpora import make_corpus
from distclust.config import RunConfig, resolve
from distclust.corpus.shards import Corpus, ShardWriter
from distclust.mixture.methods import METHODS, find_method
from distclust.mixture.sparse import SparseRows
from distclust.training.checkpoint import CheckpointStore
from distclust.training.engine import Trainer
from distclust.training.hooks import NoHooks, Position
from distclust.training.world import World

OWN = tuple(name for name in os.environ.get("DISTCLUST_ROWS", "").split(",") if name)
"""Rows of a user's own, as import paths: they inherit these tests (docs/rows.md)."""
ROWS = (*METHODS, *OWN)
GOLDEN = Path(__file__).parent / "golden_losses.txt"
# rows whose temperature or step would make tiny runs explode on their published settings
CHANGES: dict[str, dict[str, Any]] = {
    name: {"model": {"alpha": 5.0}} for name in ("dmae", "ae-dmm", "dmm", "dkm")
}


class Stopped(Exception):
    pass


class Hooks(NoHooks):
    """Keeps the losses, and stops after a step when told."""

    def __init__(self, stop: int | None = None):
        self.stop, self.losses = stop, {}

    def log(self, position: Position, phase: str, metrics: dict[str, float]) -> None:
        self.losses[position.global_step] = (phase, metrics["loss"])

    def after_step(self, position: Position) -> None:
        if position.global_step == self.stop:
            raise Stopped


def config_of(method: str, **more: Any) -> RunConfig:
    return runs.tiny_config(method, **CHANGES.get(method, {}), **more)


def train(config: RunConfig, corpus: Corpus, folder: Path, stop: int | None = None) -> tuple[Trainer, Hooks]:
    hooks = Hooks(stop)
    trainer = Trainer(config, corpus, CheckpointStore(str(folder / "checkpoints")), World(), hooks)
    with contextlib.suppress(Stopped):
        trainer.run()
    return trainer, hooks


def as_dense(sparse: Corpus, root: Path) -> Corpus:
    """The same numbers, stored dense, in the same shards."""
    d = sparse.n_features
    writer = ShardWriter(root, "dense", d, rows_per_shard=int(sparse.shard_rows.max()))
    for i in range(len(sparse.shard_rows)):
        shard = sparse.shard(i)
        rows = np.zeros((len(shard.ids()), d), np.float32)
        for r in range(len(rows)):
            a, b = shard.offsets[r], shard.offsets[r + 1]
            rows[r, shard.indices[a:b]] = shard.values[a:b]
        columns = {"id": shard.ids(), "labels": shard.labels(), "title": shard.titles()}
        writer.write(pa.table({**columns, "values": pa.array(list(rows), pa.list_(pa.float32(), d))}))
    writer.finish({})
    return Corpus.open(root)


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Corpus]:
    root = tmp_path_factory.mktemp("corpora")
    even = make_corpus(root / "even", shard_rows=(20, 20, 20), n_features=30)
    return {
        "odd": make_corpus(root / "odd", shard_rows=runs.SHARD_ROWS, n_features=30),
        "even": even,
        "dense": as_dense(even, root / "dense"),
    }


@pytest.fixture(scope="module")
def finished(corpora: dict[str, Corpus], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A whole run of a row, once."""
    made: dict[tuple[str, str], tuple[Trainer, Hooks]] = {}

    def of(method: str, which: str = "odd") -> tuple[Trainer, Hooks]:
        if (method, which) not in made:
            folder = tmp_path_factory.mktemp(f"{method}-{which}")
            made[method, which] = train(config_of(method), corpora[which], folder)
        return made[method, which]

    return of


def golden_lines(method: str, hooks: Hooks) -> list[str]:
    """The last loss of each phase."""
    last: dict[str, float] = {}
    for phase, loss in hooks.losses.values():
        last[phase] = loss
    return [f"{method} {phase} {loss:.6g}" for phase, loss in last.items()]


@pytest.mark.parametrize("method", METHODS)
def test_golden_losses(finished: Any, method: str) -> None:
    """The losses of this code on this data, as they were when the row was found right."""
    expected = {tuple(line.split()[:2]): float(line.split()[2]) for line in GOLDEN.read_text().splitlines()}
    found = {
        tuple(line.split()[:2]): float(line.split()[2]) for line in golden_lines(method, finished(method)[1])
    }
    assert found.keys() == {key for key in expected if key[0] == method}
    for key, loss in found.items():
        assert loss == pytest.approx(expected[key], rel=5e-3, abs=1e-5), key


@pytest.mark.parametrize("method", ROWS)
def test_resumed_at_every_step_ends_with_the_same_bits(
    finished: Any, corpora: dict[str, Corpus], tmp_path: Path, method: str
) -> None:
    whole, hooks = finished(method)
    config = config_of(method, checkpoint={"every_steps": 1, "keep": 1})
    steps = max(hooks.losses)
    seen: dict[int, tuple[str, float]] = {}
    for step in range(1, steps + 1):
        _, part = train(config, corpora["odd"], tmp_path, stop=step)
        # one step a start, and again the last one of a phase: what ends a phase is saved after its last step
        assert set(part.losses) in ({step}, {step - 1, step})
        seen |= part.losses
    last, _ = train(config, corpora["odd"], tmp_path)
    assert seen == hooks.losses
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, last.model.state_dict()[name]), name


@pytest.mark.parametrize("method", ROWS)
def test_dense_rows_train_as_sparse_ones(finished: Any, method: str) -> None:
    """The same numbers stored both ways: float32 in another order."""
    sparse, dense = finished(method, "even")[1], finished(method, "dense")[1]
    assert sparse.losses.keys() == dense.losses.keys()
    for step, (phase, loss) in sparse.losses.items():
        assert dense.losses[step][1] == pytest.approx(loss, rel=5e-3, abs=1e-4), (phase, step)


@pytest.mark.parametrize("method", ROWS)
def test_prediction_does_not_depend_on_the_batch(finished: Any, method: str) -> None:
    trainer, _ = finished(method)
    batch = trainer.rows(trainer.stream.gather(np.arange(61)))
    assert isinstance(batch, SparseRows)
    together = trainer.model.predict(batch)
    torch.testing.assert_close(together.exp().sum(1), torch.ones(61), atol=1e-4, rtol=0)
    for size in (1, 7):
        parts = [
            trainer.model.predict(trainer.rows(trainer.stream.gather(np.arange(a, min(a + size, 61)))))
            for a in range(0, 61, size)
        ]
        torch.testing.assert_close(torch.cat(parts), together, atol=2e-4, rtol=2e-4)
    # an empty document has probabilities too
    empty = trainer.model.predict(
        SparseRows(torch.zeros(2, dtype=torch.int32), torch.zeros(0, dtype=torch.int32), torch.zeros(0), 30)
    )
    assert torch.isfinite(empty.exp()).all()


IMAGES = {"image": [1, 8, 8], "conv": [[6, 3, 2, 1], [8, 3, 2, 1]], "hidden": [32]}


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    """scikit-learn's digits, 8 x 8."""
    from sklearn.datasets import load_digits

    root = tmp_path_factory.mktemp("digits")
    x, y = load_digits(return_X_y=True)
    writer = ShardWriter(root, "dense", 64, rows_per_shard=500)
    for a in range(0, len(x), 500):
        part = slice(a, a + 500)
        n = len(x[part])
        columns = {
            "id": [str(a + i) for i in range(n)],
            "labels": [[str(v)] for v in y[part]],
            "title": [None] * n,
        }
        values = pa.array(list((x[part] / 16).astype(np.float32)), pa.list_(pa.float32(), 64))
        writer.write(
            pa.table({**columns, "title": pa.array(columns["title"], pa.string()), "values": values})
        )
    writer.finish({})
    return Corpus.open(root)


@pytest.mark.parametrize("method", ROWS)
def test_every_row_trains_on_digits(digits: Corpus, tmp_path: Path, method: str) -> None:
    """A few epochs, images where the row has convolutions: finite losses, and more than one cluster."""
    row = find_method(method)
    fast = {"epochs": 8, "optimizer": {"name": "adam", "learning_rate": 3e-3}}
    phases = {p.name: {"epochs": 2} if p.name == "joint" else fast for p in row.phases if p.epochs}
    model = dict(IMAGES) if row.settings.conv else {"hidden": [32]}
    config = resolve(
        {
            "method": method,
            "clusters": 10,
            "model": {**model, "code_size": 10, "expert_hidden": [16], "gate_hidden": [32]},
            "phases": phases,
            "order": {"lanes": 2, "rows_per_lane": 32},
            "initialise": {"restarts": 2},
            "tracking": {"log_every": 5},
        }
    )
    trainer, hooks = train(config, digits, tmp_path)
    assert all(math.isfinite(loss) for _, loss in hooks.losses.values())
    labels = trainer.model.predict(trainer.rows(trainer.stream.gather(np.arange(0, 1797, 3)))).argmax(1)
    if row.phases[0].name != "joint":  # what starts from k-means has not collapsed in two epochs
        assert len(labels.unique()) > 3


@pytest.mark.parametrize("method", ["dmae-fourier", "dmae-spectral"])
def test_convolutions_learn_first_codes_too(digits: Corpus, tmp_path: Path, method: str) -> None:
    fast = {"epochs": 2, "optimizer": {"learning_rate": 3e-3}}
    model = {**IMAGES, "code_size": 10, "fourier_gamma" if method == "dmae-fourier" else "landmarks": 50}
    config = resolve(
        {
            "method": method,
            "clusters": 10,
            "model": {**model, "dissimilarity": "euclidean"},
            "phases": dict.fromkeys(("pretrain", "decoder", "joint"), fast),
            "order": {"lanes": 2, "rows_per_lane": 64},
            "initialise": {"restarts": 2},
            "tracking": {"log_every": 5},
        }
    )
    _, hooks = train(config, digits, tmp_path)
    decoder = [loss for phase, loss in hooks.losses.values() if phase == "decoder"]
    assert decoder[-1] < decoder[0]


def test_damic_with_convolutional_experts_and_gate(digits: Corpus, tmp_path: Path) -> None:
    fast = {"epochs": 2, "optimizer": {"learning_rate": 3e-3}}
    config = resolve(
        {
            "method": "damic",
            "clusters": 4,
            "model": {
                "image": [1, 8, 8],
                "conv": [[6, 3, 2, 1]],
                "experts": "convolutional",
                "expert_conv": [[4, 3, 2, 1]],
                "gate_conv": [[4, 3, 2, 1]],
                "gate_hidden": [16],
            },
            "phases": dict.fromkeys(("pretrain", "experts", "gate", "joint"), fast),
            "order": {"lanes": 2, "rows_per_lane": 64},
            "initialise": {"restarts": 2},
        }
    )
    trainer, hooks = train(config, digits, tmp_path)
    names = {name.split(".")[0] for name, _ in trainer.model.named_parameters()}
    assert names == {"network", "experts", "gate"}
    by_phase: dict[str, list[float]] = {}
    for phase, loss in hooks.losses.values():
        by_phase.setdefault(phase, []).append(loss)
    for phase, losses in by_phase.items():
        assert losses[-1] < losses[0], phase
    labels = trainer.model.predict(trainer.rows(trainer.stream.gather(np.arange(300)))).argmax(1)
    assert len(labels.unique()) > 1


@pytest.fixture(scope="module")
def stories(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    """The built-in corpus with 300 words."""
    from distclust.config import load_recipe
    from distclust.corpus.prepare import prepare_local

    config = load_recipe("damic-text", ["vocabulary.max_features=300"])
    root = tmp_path_factory.mktemp("stories") / "corpus"
    prepare_local(config.source, config.vocabulary, config.shards, root)
    return Corpus.open(root)


@pytest.mark.parametrize("method", ROWS)
def test_every_row_trains_on_the_built_in_corpus(stories: Corpus, tmp_path: Path, method: str) -> None:
    """One epoch a phase of small networks: finite losses and probabilities."""
    row = find_method(method)
    # the published step of SGD is for the published networks and preprocessing
    one = {"epochs": 1, "optimizer": {"name": "adam", "learning_rate": 1e-3}}
    config = resolve(
        {
            "method": method,
            "clusters": 9,
            "model": {"hidden": [32], "code_size": 16, "expert_hidden": [8], "gate_hidden": [32]},
            "phases": {p.name: one for p in row.phases if p.epochs},
            "order": {"lanes": 8, "rows_per_lane": 64},
            "initialise": {"restarts": 1, "sample": 2000},
            "tracking": {"log_every": 5},
        }
    )
    trainer, hooks = train(config, stories, tmp_path)
    assert hooks.losses
    assert all(math.isfinite(loss) for _, loss in hooks.losses.values())
    scores = trainer.model.predict(trainer.rows(trainer.stream.gather(np.arange(0, 7160, 20))))
    torch.testing.assert_close(scores.exp().sum(1), torch.ones(358), atol=1e-4, rtol=0)


def write_golden(folder: Path) -> None:
    corpus = make_corpus(folder / "corpus", shard_rows=runs.SHARD_ROWS, n_features=30)
    lines: list[str] = []
    for method in METHODS:
        lines += golden_lines(method, train(config_of(method), corpus, folder / method)[1])
    GOLDEN.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    import tempfile

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        write_golden(Path(name))
