"""The start from singular directions: what it finds, on whatever rows, and what it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import runs
from corpora import make_corpus
from distclust.config import RunConfig, resolve
from distclust.corpus.shards import Corpus
from distclust.errors import ConfigError
from distclust.mixture.methods import METHODS
from distclust.mixture.model import MixtureModel
from distclust.mixture.networks import Directions
from distclust.training.checkpoint import CheckpointStore
from distclust.training.engine import Trainer
from distclust.training.initialise import find_directions
from distclust.training.world import World


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return make_corpus(tmp_path_factory.mktemp("rows"), shard_rows=runs.SHARD_ROWS, n_features=30)


def dense(corpus: Corpus) -> np.ndarray:
    rows = np.zeros((corpus.n_rows, corpus.n_features))
    for number, first in enumerate(corpus.shard_starts[: len(corpus.shard_rows)]):
        shard = corpus.shard(number)
        for i in range(int(corpus.shard_rows[number])):
            own = slice(shard.offsets[i], shard.offsets[i + 1])
            rows[first + i, shard.indices[own]] = shard.values[own]
    return rows


def found(corpus: Corpus, code_size: int, **more: Any) -> tuple[MixtureModel, np.ndarray]:
    """The model after its start, and its directions (D, J)."""
    config = runs.tiny_config("damic-lsa", model={"code_size": code_size}, **more)
    trainer = Trainer(config, corpus, CheckpointStore("unused"), World())
    model = trainer.model
    find_directions(model, trainer.stream, config, World())
    assert isinstance(model.network, Directions)
    return model, model.network.directions.detach().numpy()


def test_they_are_the_leading_right_singular_vectors(corpus: Corpus) -> None:
    _, directions = found(corpus, 5)
    rows = dense(corpus)
    _, values, vectors = np.linalg.svd(rows, full_matrices=False)
    np.testing.assert_allclose(directions.T @ directions, np.eye(5), atol=1e-5)
    # of any 5 directions these keep the most of the rows
    kept = np.linalg.norm(rows @ directions) ** 2
    assert kept == pytest.approx((values[:5] ** 2).sum(), rel=1e-3)
    overlap = np.abs(vectors[:5] @ directions).max(1)
    assert (overlap[:2] > 0.99).all()


def test_codes_and_errors_are_those_of_the_projection(corpus: Corpus) -> None:
    model, directions = found(corpus, 4)
    rows = torch.tensor(dense(corpus), dtype=torch.float32)
    codes = model.network.encode(rows)
    np.testing.assert_allclose(codes.detach().numpy(), rows.numpy() @ directions, atol=1e-4)
    left = rows.numpy() - rows.numpy() @ directions @ directions.T
    error = model.network.recon_error(codes, rows).detach().numpy()
    np.testing.assert_allclose(error, (left**2).sum(1), rtol=1e-4, atol=1e-3)


def test_a_sample_of_the_rows_is_enough(corpus: Corpus) -> None:
    _, directions = found(corpus, 3, initialise={"sample": 20})
    chosen = dense(corpus)[np.unique(np.linspace(0, corpus.n_rows - 1, 20).astype(int))]
    values = np.linalg.svd(chosen, compute_uv=False)
    assert np.linalg.norm(chosen @ directions) ** 2 == pytest.approx((values[:3] ** 2).sum(), rel=1e-3)


def test_more_numbers_in_a_code_than_directions_are_zeros(corpus: Corpus) -> None:
    _, directions = found(corpus, 40)
    assert directions.shape == (30, 40)
    np.testing.assert_allclose(directions[:, :30].T @ directions[:, :30], np.eye(30), atol=1e-4)
    assert not directions[:, 30:].any()


def test_training_leaves_them_as_they_were_found(corpus: Corpus, tmp_path: Path) -> None:
    config = runs.tiny_config("damic-lsa-consolidated")
    trainer = Trainer(config, corpus, CheckpointStore(str(tmp_path / "checkpoints")), World())
    trainer.run()
    _, directions = found(corpus, config.model.code_size)
    np.testing.assert_array_equal(trainer.model.network.directions.detach().numpy(), directions)


def begin(*names: str) -> RunConfig:
    return resolve({"method": "damic-lsa", "clusters": 3, "phases": {"initialise": {"begin": list(names)}}})


@pytest.mark.parametrize(
    "names", [("initialise_clusters", "code_radius"), ("initialise_clusters", "singular_directions")]
)
def test_codes_before_there_are_directions_are_refused(names: tuple[str, ...]) -> None:
    with pytest.raises(
        ConfigError,
        match=r"found before anything else; say phases.initialise.begin=\[singular_directions, initialise_cl",
    ):
        begin(*names)


def test_other_networks_have_no_directions_to_find() -> None:
    phases = {"initialise": {"begin": ["singular_directions", "initialise_clusters"]}}
    with pytest.raises(
        ConfigError, match="needs the network directions, and that of this row is autoencoder"
    ):
        resolve({"method": "damic-text", "clusters": 3, "phases": phases})


def test_no_autoencoder_is_trained_or_stored() -> None:
    for name in ("damic-lsa", "damic-lsa-consolidated", "self-training-lsa"):
        row = METHODS[name]
        assert not any(phase.trains_network for phase in row.phases)
        model = MixtureModel(row, row.settings, 60, 3)
        assert [n for n, _ in model.named_parameters() if n.startswith("network")] == ["network.directions"]
