"""A row, a dissimilarity and a network of a user's own, by import paths: the documented example, and what is
never imported."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import runs
from corpora import make_corpus
from distclust.config import load_recipe
from distclust.errors import CheckpointError, ConfigError
from distclust.mixture.imports import VARIABLE, allowed_modules, import_object
from distclust.mixture.methods import METHODS
from distclust.preflight import check_fits
from distclust.results.predict import Predictor, export_model
from distclust.training.checkpoint import CheckpointStore
from distclust.training.engine import Trainer
from distclust.training.world import World

ROOT = Path(__file__).parent.parent.parent


def example() -> str:
    """The module that docs/rows.md shows."""
    text = (ROOT / "docs" / "rows.md").read_text()
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
    # a fault of the module is not a name that is missing
    for name, content, said in (
        ("half", "ROW = (", "SyntaxError"),
        ("wrong", "import math\nROW = math.missing", "AttributeError"),
    ):
        (mine / f"{name}.py").write_text(content)
        monkeypatch.setenv(VARIABLE, name)
        with pytest.raises(ValueError, match=rf"'{name}:ROW': importing the module failed \({said}.*mend"):
            import_object(f"{name}:ROW")
    monkeypatch.setenv(VARIABLE, "mine,nowhere")
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


NETWORK = """
from torch import nn


class Net(nn.Module):
    def __init__(self, n_features, settings):
        super().__init__()
        self.code_size = settings.code_size
        self.down, self.back = nn.Linear(n_features, self.code_size), nn.Linear(self.code_size, n_features)

    def encode(self, x, noise=None):
        return self.down(x.to_dense())

    def encode_with_layers(self, x, noise=None):
        return self.encode(x), {}

    def recon_error(self, codes, x, layers=None):
        return (x.to_dense() - self.back(codes)).square().sum(1)


class Flat(Net):
    def recon_error(self, codes, x, layers=None):
        return super().recon_error(codes, x).mean()


class Wide(Net):
    def encode(self, x, noise=None):
        return self.down(codes)


class Deaf(nn.Module):
    code_size = 4


class Alone(nn.Module):
    def __init__(self):
        super().__init__()


def far(x, y):
    return (x - y).square()


three = 3
"""


def check_own(mine: Path, method: str, model: dict[str, str]) -> None:
    """Check a run with parts of the module above."""
    (mine / "parts.py").write_text(NETWORK)
    corpus = make_corpus(mine / "corpus", shard_rows=[30], n_features=30)
    model = {name: f"parts:{value}" for name, value in model.items()}
    load_recipe("smoke", [f"method={method}", "phases={}", *(f"model.{n}={v}" for n, v in model.items())])
    check_fits(runs.tiny_config(method, model=model), corpus)


def test_a_network_of_four_members_is_enough(mine: Path) -> None:
    check_own(mine, "dmae-text", {"network": "Net"})


@pytest.mark.parametrize(
    ("method", "model", "said"),
    [
        (
            "depict",
            {"network": "Net"},
            "Net, which has no layer_errors; depict needs encode, .*layer_errors",
        ),
        (
            "vade",
            {"network": "Net"},
            "hands on no mean and no log_variance, which vade needs",
        ),
        (
            "dmae-fourier",
            {"network": "Net"},
            r"phase pretrain: it trains network.encoder, .* expected some of .*network.back, network.down",
        ),
        ("dmae-text", {"network": "Deaf"}, r"making it failed \(TypeError.*by Deaf\(n_features, settings\)"),
        ("dmae-text", {"network": "Alone"}, r"making it failed \(TypeError"),
        ("dmae-text", {"network": "three"}, r"making it failed \(TypeError: 'int' object is not callable"),
        ("dmae-text", {"network": "far"}, r"making it failed"),
        ("dmae-text", {"network": "Flat"}, r"recon_error gives the shape \(\) for two rows; expected \(2,\)"),
        ("dmae-text", {"network": "Wide"}, r"encode failed on two rows of zeros \(NameError"),
        (
            "dmae-text",
            {"dissimilarity": "three"},
            "which is a int; expected a function of x and y",
        ),
        ("dmae-text", {"dissimilarity": "far"}, r"gives the shape \(2, 3, 4\) .*; expected \(2, 3\)"),
        ("dmae-text", {"dissimilarity": "Net"}, "parts:Net, which failed on zeros"),
    ],
)
def test_parts_that_do_not_fit_the_row_are_named_before_workers_start(
    mine: Path, method: str, model: dict[str, str], said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        check_own(mine, method, model)


def test_a_trial_leaves_no_trace(mine: Path) -> None:
    """Random numbers go on as they would have without it."""
    (mine / "parts.py").write_text(NETWORK)
    corpus = make_corpus(mine / "corpus", shard_rows=[30], n_features=30)
    load_recipe("smoke", ["method=dmae-text", "phases={}", "model.network=parts:Net"])
    before = torch.random.get_rng_state()
    check_fits(runs.tiny_config("dmae-text", model={"network": "parts:Net"}), corpus)
    assert torch.equal(before, torch.random.get_rng_state())


@pytest.mark.parametrize("method", METHODS)
def test_no_row_of_the_table_is_refused(method: str, tmp_path: Path) -> None:
    corpus = make_corpus(tmp_path / "corpus", shard_rows=[30], n_features=64)
    check_fits(runs.tiny_config(method), corpus)
    check_fits(runs.tiny_config(method, model={"image": [1, 8, 8], "conv": [[6, 3, 2, 1]]}), corpus)
