"""What is checked before a run begins: generated corpora, documents that changed, a GPU that is not there,
parts that no term trains."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from distclust.config import resolve
from distclust.corpus.generate import GenerateConfig, generate_corpus
from distclust.corpus.prepare import prepare_local
from distclust.corpus.shards import Corpus, ShardConfig
from distclust.corpus.sources import SourceConfig
from distclust.corpus.vocabulary import VocabularyConfig
from distclust.errors import ConfigError, DataError
from distclust.mixture.gradients import check_gradients
from distclust.mixture.methods import METHODS
from distclust.preflight import check_fits
from distclust.run import train_run
from distclust.training.blueprint import blueprint, miniature
from stories import records, tiny_recipe, tiny_run, write_jsonl


def test_a_generated_corpus_is_trained_on(tmp_path: Path) -> None:
    root = tmp_path / "made"
    generate_corpus(root, GenerateConfig(rows=120, terms=200, nonzeros=20))
    before = {path.name: path.read_bytes() for path in root.iterdir()}
    config = tiny_run(write_jsonl(tmp_path / "unused.jsonl", records(3)))
    summary = train_run(config, tmp_path / "run", corpus_root=root)
    assert summary["n_documents"] == 120
    assert {path.name: path.read_bytes() for path in root.iterdir()} == before
    assert train_run(config, tmp_path / "run", corpus_root=root) == summary


def test_a_finished_run_sees_that_its_documents_changed(tmp_path: Path) -> None:
    file, run = write_jsonl(tmp_path / "a.jsonl", records(60)), tmp_path / "run"
    summary = train_run(tiny_run(file), run)
    assert train_run(tiny_run(file), run) == summary
    write_jsonl(file, records(60, seed=1))
    with pytest.raises(DataError, match="no longer those of this finished run.*expected"):
        train_run(tiny_run(file), run)
    file.unlink()
    assert train_run(tiny_run(file), run) == summary, "what is gone cannot be compared"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_missed_before_any_work(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", records(60))
    config = tiny_run(file, cluster={"workers": 0, "gpus_per_worker": 1})
    with pytest.raises(ConfigError, match=r"gpus_per_worker is 1 .*torch sees no GPU"):
        train_run(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 colour images of 6 x 4 bytes, channels last as files have them."""
    file = tmp_path_factory.mktemp("images") / "rgb.npz"
    np.savez(file, x=np.random.default_rng(0).integers(0, 256, (40, 6, 4, 3)).astype(np.uint8))
    return file


def corpus_of(file: Path, root: Path, scale: float) -> Corpus:
    source = SourceConfig(name="files", files=(str(file),))
    prepare_local(source, VocabularyConfig(scale=scale), ShardConfig(), root)
    return Corpus.open(root)


def run_on(method: str, clusters: int = 3, **model: Any) -> Any:
    small = {"hidden": [8], "code_size": 4, "expert_hidden": [8], "gate_hidden": [8]}
    return resolve({"method": method, "clusters": clusters, "model": small | model})


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (run_on("ae-cm", 7), "codes of 4 numbers hold no orthonormal centroids for 7 clusters"),
        (run_on("dmae", image=[1, 9, 9]), r"model.image is \[1, 9, 9\]"),
        (run_on("damic-lowrank", expert_code_size=100), "expert_code_size is 100.*at most 72"),
        # channels last, and height and width exchanged: as many numbers
        (run_on("dcec", image=[6, 4, 3]), r"\[6, 4, 3\], .* images of \[3, 6, 4\].*set model.image="),
        (run_on("dcec", image=[3, 4, 6]), r"\[3, 4, 6\], .* images of \[3, 6, 4\].*set model.image="),
    ],
)
def test_models_that_the_rows_cannot_have_are_refused_before_workers_start(
    images: Path, tmp_path: Path, config: Any, said: str
) -> None:
    corpus = corpus_of(images, tmp_path / "corpus", 1.0)
    with pytest.raises(ConfigError, match=said):
        check_fits(config, corpus)
    check_fits(run_on("dcec", image=[3, 6, 4]), corpus)


def test_a_run_is_refused_where_it_is_begun(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", records(60))
    config = resolve({**tiny_recipe(file, method="ae-cm-text", clusters=5), "phases": {}})
    with pytest.raises(ConfigError, match="set model.code_size to at least 5"):
        train_run(config, tmp_path / "run")
    assert not (tmp_path / "run" / "training").exists(), "no worker has started"


@pytest.mark.parametrize("method", ["vade", "dcn", "dmae"])
def test_a_sigmoid_needs_rows_between_nought_and_one(images: Path, tmp_path: Path, method: str) -> None:
    config = run_on(method, output="sigmoid")
    corpus = corpus_of(images, tmp_path / "bytes", 1.0)
    with pytest.raises(ConfigError, match=r"from 0 to 255; expected .*vocabulary.scale lower \(it is 1 now"):
        check_fits(config, corpus)
    check_fits(run_on(method), corpus)
    check_fits(config, corpus_of(images, tmp_path / "shares", 1 / 255))
    check_fits(run_on("dmm", output="sigmoid"), corpus)  # nothing is compared with a network's output


def test_a_sigmoid_cannot_give_what_is_below_nought(tmp_path: Path) -> None:
    file = tmp_path / "a.npz"
    np.savez(file, x=np.random.default_rng(0).normal(size=(40, 5)).astype(np.float32))
    corpus = corpus_of(file, tmp_path / "corpus", 0.01)
    with pytest.raises(ConfigError, match=r"from -0\.0.*: set model.output=linear$"):
        check_fits(run_on("vade", output="sigmoid"), corpus)


def check_phases(config: Any, n_features: int) -> None:
    model = miniature(config, blueprint(config, n_features))
    for sparse in (True, False):
        check_gradients(model, sparse=sparse)


@pytest.mark.parametrize("method", sorted(METHODS))
def test_every_row_trains_what_its_terms_reach(method: str) -> None:
    row = {"method": method, "clusters": 9}
    check_phases(resolve(row), 2000)
    conv = {"conv": [[8, 5, 1, 2]], "norm": "batch", "hidden_dropout": 0.2}
    check_phases(resolve(row | {"model": {"image": [1, 28, 28]} | conv}), 784)


_UNWEIGHTED = [["target_teacher", 0.1], ["reconstruction", 0.0]]


@pytest.mark.parametrize(
    ("method", "phase", "part", "said"),
    [
        ("damic-text", {"trains": ["network"]}, "network", r"lse_clean_teacher\).* reach \(experts, gate\)"),
        ("damic-text", {"trains": ["experts", "gate", "network"]}, "network", "set phases.joint.trains, or"),
        # on the codes experts learn from what the encoder says, and it not from them
        ("damic-codes", {"trains": ["experts", "network.encoder"]}, "network.encoder", "experts, gate"),
        ("dec", {"trains": ["energy", "network.decoder"]}, "network.decoder", "network, energy, gate"),
        ("dcec", {"trains": ["network.decoder"], "terms": [["target_teacher", 1.0]]}, "network.decoder", ""),
        ("idec", {"trains": ["network.out_bias"], "terms": _UNWEIGHTED}, "network.out", "network, energy"),
        ("cm", {"trains": ["gate"], "terms": [["exp", 0.0], ["usage_prior", 0.0]]}, "gate", "with a weight"),
    ],
)
@pytest.mark.parametrize("image", [[], [1, 28, 28]])
def test_a_phase_that_trains_what_its_terms_do_not_reach_is_refused(
    method: str, phase: dict[str, Any], part: str, said: str, image: list[int]
) -> None:
    config = resolve(
        {"method": method, "clusters": 3, "phases": {"joint": phase}, "model": {"image": image}},
    )
    with pytest.raises(
        ValueError, match=f"phase joint: it trains {part}.*no gradient from its terms .*{said}"
    ):
        check_phases(config, 784)


def test_a_phase_that_nothing_trains_is_refused_where_the_run_is_begun(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", records(60))
    config = tiny_run(file, phases={"joint": {"trains": ["network"]}})
    with pytest.raises(ConfigError, match="phase joint: it trains network, which has no gradient"):
        train_run(config, tmp_path / "run")
    assert not (tmp_path / "run" / "training").exists(), "no worker has started"


def test_looking_for_gradients_costs_the_same_for_any_size() -> None:
    large = {
        "hidden": [500, 500, 2000],
        "code_size": 300,
        "dissimilarity": "mahalanobis",
        "landmarks": 10_000,
    }
    config = resolve({"method": "dmae-spectral", "clusters": 300, "model": large})
    model = blueprint(config, 1_000_000)
    assert sum(p.numel() for p in model.parameters()) > 1e9
    small = miniature(config, model)
    assert sum(t.numel() for t in small.state_dict().values()) < 300
    assert set(dict(small.named_parameters())) == set(dict(model.named_parameters()))
    check_gradients(small, sparse=True)


def test_a_gate_on_codes_has_no_images() -> None:
    with pytest.raises(ConfigError, match=r"reads the experts' codes, .*set model.gate_conv=\[\]"):
        run_on("mixae", image=[3, 6, 4], gate_conv=[[4, 3, 1, 1]])


@pytest.mark.parametrize("method", ["cm", "dmae"])
def test_rows_far_from_0_are_told_of(tmp_path: Path, method: str, caplog: pytest.LogCaptureFixture) -> None:
    x = np.random.default_rng(0).normal(size=(40, 6))
    for name, offset in (("near", 3.0), ("far", 100.0)):
        np.savez(tmp_path / f"{name}.npz", x=x + offset)
        caplog.clear()
        corpus = corpus_of(tmp_path / f"{name}.npz", tmp_path / name, 1.0)
        check_fits(run_on(method), corpus)
        told = [record.message for record in caplog.records if "times their spread from 0" in record.message]
        assert len(told) == (name == "far"), told
    check_fits(run_on("dmm"), corpus)
    assert len([r for r in caplog.records if "their spread" in r.message]) == 1, "no layer meets these rows"
