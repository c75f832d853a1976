"""A row, a dissimilarity and a network of a user's own, by import paths: the documented example, and what is
never imported."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import runs
from corpora import make_corpus
from distclust.config import load_recipe
from distclust.errors import CheckpointError, ConfigError
from distclust.mixture.imports import VARIABLE, allowed_modules, import_object
from distclust.results.predict import Predictor, export_model
from distclust.training.checkpoint import CheckpointStore
from distclust.training.engine import Trainer
from distclust.training.world import World

ROOT = Path(__file__).parent.parent.parent


def example() -> str:
    """The module that docs/methods.md shows."""
    text = (ROOT / "docs" / "methods.md").read_text()
    found = re.search(r"```python\n(# mine.py.*?)```", text, re.DOTALL)
    assert found is not None
    return found.group(1)


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The example as a module that can be imported, and nothing allowed."""
    (tmp_path / "mine.py").write_text(example())
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv(VARIABLE, "")
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    return tmp_path


def test_the_documented_example_is_short_and_inherits_the_shared_tests(mine: Path) -> None:
    assert len(example().splitlines()) < 40
    env = os.environ | {"DISTCLUST_ROWS": "mine:ROW", VARIABLE: "mine", "PYTHONPATH": str(mine)}
    command = [sys.executable, "-m", "pytest", "-q", "tests/training/test_ladder.py", "-k", "mine"]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-3000:]
    assert "...." in done.stdout  # resume, dense, prediction, digits


def test_a_recipe_may_import_what_it_names(mine: Path) -> None:
    config = load_recipe("damic-text", ["method=mine:ROW", "cluster.workers=0"])
    assert config.row.summary.startswith("a mixture likelihood")
    assert allowed_modules() == ["mine"]


def test_a_path_in_a_model_is_not_imported_unless_its_module_is_allowed(
    mine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus = make_corpus(mine / "corpus", shard_rows=runs.SHARD_ROWS, n_features=30)
    monkeypatch.setenv(VARIABLE, "mine")
    config = runs.tiny_config("mine:ROW")
    trainer = Trainer(config, corpus, CheckpointStore(str(mine / "checkpoints")), World())
    trainer.run()
    export_model(mine / "model", trainer.model, None, {"kind": "sparse", "row_scale": 1.0})
    Predictor.load(mine / "model")

    monkeypatch.setenv(VARIABLE, "")
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    with pytest.raises(CheckpointError, match=r"mine:ROW.*was not allowed here.*--allow-module mine"):
        Predictor.load(mine / "model")
    assert "mine" not in sys.modules


def test_what_cannot_be_imported_is_named(mine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "mine,nowhere")
    with pytest.raises(ValueError, match="no 'missing'"):
        import_object("mine:missing")
    with pytest.raises(ValueError, match="nowhere.*PYTHONPATH"):
        import_object("nowhere:thing")
    with pytest.raises(ConfigError, match="huber is a function; expected a .*Method"):
        load_recipe("damic-text", ["method=mine:huber"])
    with pytest.raises(ConfigError, match="'model.dissimilarity' is|model.dissimilarity is 'mine.huber'"):
        load_recipe("dmae-text", ["model.dissimilarity=mine.huber"])


def test_a_network_of_ones_own(mine: Path) -> None:
    (mine / "net.py").write_text(
        "from distclust.mixture.networks import Autoencoder\n\n\nclass Net(Autoencoder):\n    pass\n"
    )
    config = load_recipe("damic-text", ["model.network=net:Net", "cluster.workers=0"])
    assert config.model.network == "net:Net"
    corpus = make_corpus(mine / "corpus", shard_rows=[30], n_features=30)
    model = {"network": "net:Net"}
    trainer = Trainer(
        runs.tiny_config("damic-text", model=model), corpus, CheckpointStore(str(mine / "run")), World()
    )
    assert type(trainer.model.network).__module__ == "net"
    trainer.run()
