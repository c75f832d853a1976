"""scikit-learn's rows: they are scikit-learn's, assign every document, and refuse what they cannot do."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.cluster import KMeans, SpectralClustering
from sklearn.datasets import make_blobs
from sklearn.decomposition import TruncatedSVD
from sklearn.metrics import adjusted_rand_score
from sklearn.mixture import GaussianMixture
from sklearn.neighbors import kneighbors_graph
from sklearn.preprocessing import normalize

from corpora import dense_rows, make_corpus
from distclust.config import RunConfig, load_recipe, method_row, resolve
from distclust.corpus.prepare import prepare_local
from distclust.corpus.shards import Corpus, ShardConfig
from distclust.corpus.sources import SourceConfig
from distclust.corpus.vocabulary import VocabularyConfig
from distclust.errors import ConfigError, DataError
from distclust.mixture.catalogue import ESTIMATORS, MISSING, SLOTS, EstimatorConfig
from distclust.mixture.energies import DISSIMILARITIES
from distclust.mixture.methods import METHODS
from distclust.mixture.taxonomy import taxonomy
from distclust.results import estimators
from distclust.results.assignment import Assignment, partial_of
from distclust.results.baselines import code_phase, start_phase
from distclust.results.estimators import (
    assign_fitted,
    check_estimator,
    find_assigned,
    fit_estimator,
    neighbour_graph,
)
from distclust.run import Listener, assign_run, train_run
from stories import records, snapshot, tiny_recipe, write_jsonl

SHARDS = (40, 0, 70, 61)


def config(method: str, clusters: int = 3, **settings: Any) -> RunConfig:
    return resolve({"method": method, "clusters": clusters, "estimator": {"restarts": 3, **settings}})


@pytest.fixture(scope="module")
def dense(tmp_path_factory) -> Corpus:
    return make_corpus(tmp_path_factory.mktemp("dense") / "corpus", SHARDS, n_features=6, kind="dense")


@pytest.fixture(scope="module")
def sparse(tmp_path_factory) -> Corpus:
    return make_corpus(tmp_path_factory.mktemp("sparse") / "corpus", SHARDS, n_features=30)


def assigned(run: RunConfig, corpus: Corpus, out: Path) -> Assignment:
    check_estimator(run, corpus)
    return assign_fitted(fit_estimator(run, corpus), run, corpus, out)


# ---- they are scikit-learn's


def test_k_means_is_sklearns(sparse, tmp_path):
    found = assigned(config("k-means"), sparse, tmp_path / "out").clusters()
    from scipy.sparse import csr_matrix

    reference = KMeans(3, n_init=3, random_state=0).fit(csr_matrix(dense_rows(sparse)))
    assert adjusted_rand_score(found, reference.labels_) == 1.0


def test_k_means_of_rows_far_from_nought(tmp_path):
    """In float32 expanded squares of 10,000 have no digit left for distances of 10."""
    x, y = make_blobs(400, n_features=5, centers=4, cluster_std=0.5, center_box=(-4, 4), random_state=0)
    file = tmp_path / "far.npz"
    np.savez(file, x=(x + 10_000.0).astype(np.float32), y=y)
    source = SourceConfig(name="files", files=(str(file),))
    prepare_local(source, VocabularyConfig(), ShardConfig(), tmp_path / "corpus")
    corpus = Corpus.open(tmp_path / "corpus")
    found = assigned(config("k-means", clusters=4), corpus, tmp_path / "out").clusters()
    assert adjusted_rand_score(found, y) == 1.0


@pytest.mark.parametrize("unit", [1e-4, 1.0, 1e4])
def test_what_is_close_does_not_depend_on_the_unit_of_the_data(unit, tmp_path):
    x, y = make_blobs(400, n_features=5, centers=4, cluster_std=0.5, center_box=(-4, 4), random_state=0)
    np.savez(tmp_path / "rows.npz", x=(unit * x).astype(np.float32), y=y)
    source = SourceConfig(name="files", files=(str(tmp_path / "rows.npz"),))
    prepare_local(source, VocabularyConfig(scale=1.0), ShardConfig(), tmp_path / "corpus")
    done = assigned(config("k-means", clusters=4), Corpus.open(tmp_path / "corpus"), tmp_path / "out")
    assert adjusted_rand_score(done.clusters(), y) == 1.0
    assert done.manifest["ambiguous"] == 0


@pytest.mark.parametrize(
    ("covariance", "kind"), [("spherical", "spherical"), ("diagonal", "diag"), ("full", "full")]
)
def test_the_mixture_of_gaussians_is_sklearns(dense, tmp_path, covariance, kind):
    done = assigned(config("gmm", covariance=covariance), dense, tmp_path / "out")
    rows = dense_rows(dense).astype(np.float64)
    reference = GaussianMixture(3, covariance_type=kind, n_init=3, max_iter=300, random_state=0).fit(rows)
    p = reference.predict_proba(rows)
    assert np.array_equal(done.clusters(), p.argmax(axis=1))
    written = np.concatenate([table["probability"].to_numpy() for table in done.tables()])
    np.testing.assert_allclose(written, p.max(axis=1), rtol=1e-6)


def test_lsa_k_means_is_sklearns(sparse, tmp_path):
    found = assigned(config("lsa-kmeans", components=5), sparse, tmp_path / "out").clusters()
    from scipy.sparse import csr_matrix

    codes = TruncatedSVD(5, random_state=0).fit_transform(csr_matrix(dense_rows(sparse)))
    reference = KMeans(3, n_init=3, random_state=0).fit(normalize(codes).astype(np.float32))
    assert adjusted_rand_score(found, reference.labels_) == 1.0


def test_spectral_is_sklearns_with_its_own_affinity():
    rows, _ = make_blobs(150, 4, centers=5, cluster_std=2.0, random_state=0)
    found = estimators._spectral(rows, 5, 0, EstimatorConfig(neighbours=8, restarts=3))
    reference = SpectralClustering(
        5, affinity="nearest_neighbors", n_neighbors=8, n_init=3, random_state=0
    ).fit_predict(rows)
    assert np.array_equal(found, reference)


# ---- neighbours by any dissimilarity


@pytest.mark.parametrize("name", sorted(DISSIMILARITIES))
def test_every_dissimilarity_makes_a_graph_of_neighbours(name):
    rows = np.random.default_rng(0).random((60, 4)).astype(np.float32) + 0.1
    graph = neighbour_graph(rows, EstimatorConfig(dissimilarity=name, neighbours=5))
    assert graph.shape == (60, 60)
    assert (np.diff(graph.indptr) == 5).all()
    assert (graph.diagonal() == 1).all()
    assert set(graph.data) == {1.0}


@pytest.mark.parametrize("name", ["euclidean", "manhattan", "minkowski", "chebyshev", "cosine"])
def test_sklearns_neighbours_are_those_of_the_formula(name):
    rows = np.random.default_rng(1).standard_normal((70, 5)).astype(np.float32)
    settings = EstimatorConfig(dissimilarity=name, neighbours=6, p=4.0)
    by_formula = estimators._graph_by_formula(rows, 6, settings)
    assert (neighbour_graph(rows, settings) != by_formula).nnz == 0
    assert (by_formula != kneighbors_graph(rows, 6, metric="euclidean", include_self=True)).nnz > 0 or (
        name == "euclidean"
    )


def test_mahalanobis_does_not_care_about_the_scale_of_a_direction():
    rows = np.random.default_rng(2).standard_normal((80, 3))
    settings = EstimatorConfig(dissimilarity="mahalanobis", neighbours=6, floor=1e-12)
    stretched = rows * np.array([1.0, 100.0, 0.01])
    assert (neighbour_graph(rows, settings) != neighbour_graph(stretched, settings)).nnz == 0


def test_the_torus_joins_what_lies_across_its_edge():
    rows = np.array([[-0.95, 0], [-0.9, 0], [0.92, 0], [0.97, 0], [0.0, 0.1], [0.05, 0.1]], np.float32)
    around = neighbour_graph(rows, EstimatorConfig(dissimilarity="toroidal", neighbours=4)).toarray()
    assert around[0].tolist() == [1, 1, 1, 1, 0, 0]


def test_blobs_are_parts_of_the_graph():
    rows, truth = make_blobs(150, 2, centers=3, cluster_std=0.3, random_state=3)
    graph = neighbour_graph(rows, EstimatorConfig(neighbours=8))
    assert all((truth[row.indices] == truth[i]).all() for i, row in enumerate(graph))


# ---- every document, whatever was fitted


@pytest.mark.parametrize("method", sorted(ESTIMATORS))
@pytest.mark.parametrize("kind", ["sparse", "dense"])
def test_every_document_is_assigned(method, kind, sparse, dense, tmp_path):
    corpus = sparse if kind == "sparse" else dense
    run = config(method, components=4)
    if method == "nmf-kmeans" and kind == "dense":
        with pytest.raises(DataError, match=r"negative values.*lsa-kmeans"):
            fit_estimator(run, corpus)
        return
    done = assigned(run, corpus, tmp_path / "out")
    ids = [i for table in done.tables() for i in table["id"].to_pylist()]
    assert ids == [f"doc-{i}" for i in range(sum(SHARDS))]
    assert done.sizes.sum() == sum(SHARDS)
    assert np.bincount(done.clusters(), minlength=3).tolist() == done.sizes.tolist()
    assert done.manifest["empty"] == (~dense_rows(corpus).any(axis=1)).sum()
    names = [table.schema.names for table in done.tables()]
    assert names == [["id", "cluster", "probability"]] * len(SHARDS)
    again = assigned(run, corpus, tmp_path / "again")
    assert np.array_equal(again.clusters(), done.clusters())
    other = dataclasses.replace(run, seed=1)
    with pytest.raises(DataError, match="another model"):
        find_assigned(other, corpus, tmp_path / "out")


@pytest.mark.parametrize("method", ["k-means", "gmm", "lsa-kmeans", "nmf-kmeans"])
def test_a_sample_is_fitted_and_all_are_assigned(method, sparse, tmp_path):
    run = config(method, components=4, max_rows=50)
    fitted = fit_estimator(run, sparse)
    assert fitted.n_fitted == 50
    assert assign_fitted(fitted, run, sparse, tmp_path / "out").n_documents == sum(SHARDS)


@pytest.mark.parametrize("method", ["k-means", "gmm", "lsa-kmeans", "nmf-kmeans"])
def test_a_document_is_assigned_by_itself(method, sparse):
    """Not by what else is in its block."""
    run = config(method, components=4)
    fitted = fit_estimator(run, sparse)
    rows = estimators.gather(sparse, np.arange(sparse.n_rows))
    whole = fitted.predict(rows, 0, 3)
    alone = [fitted.predict(rows[i : i + 1], i, 3) for i in range(0, sparse.n_rows, 7)]
    assert [int(p.clusters[0]) for p in alone] == whole.clusters[::7].tolist()
    np.testing.assert_allclose([p.probabilities[0] for p in alone], whole.probabilities[::7], atol=1e-5)


def test_weights_of_a_document_do_not_depend_on_its_block(sparse):
    """As they would if NMF stopped by a tolerance over all rows of a block."""
    rows = estimators.gather(sparse, np.arange(sparse.n_rows))
    codes, weights = estimators._nmf(rows, 8, 0, EstimatorConfig())
    alone = np.concatenate([weights(rows[i : i + 1]) for i in range(20)])
    np.testing.assert_allclose(alone, codes[:20], atol=1e-6)


def test_clusters_of_spectral_stay_with_their_documents(dense, tmp_path):
    run = config("spectral")
    fitted = fit_estimator(run, dense)
    assert len(np.unique(fitted.labels[:40])) > 1
    assert np.array_equal(assign_fitted(fitted, run, dense, tmp_path / "out").clusters(), fitted.labels)


def test_parts_that_are_there_are_kept(sparse, tmp_path):
    run, out = config("k-means"), tmp_path / "out"
    fitted = fit_estimator(run, sparse)

    def stop(done: int, total: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        assign_fitted(fitted, run, sparse, out, stop)
    before = {k: v for k, v in snapshot(partial_of(out)).items() if k.endswith("parquet")}
    assert len(before) == 2
    assign_fitted(fitted, run, sparse, out)
    assert before.items() <= snapshot(out).items()


# ---- refusals


@pytest.mark.parametrize(
    ("method", "settings", "said"),
    [
        ("spectral", {"spectral_rows": 100}, r"given 171 documents and takes 100 at most.*source.limit"),
        ("k-means", {"max_rows": 2}, r"max_rows is 2 and clusters is 3"),
        ("lsa-kmeans", {"components": 0}, "components is 0"),
    ],
)
def test_what_cannot_be_done_is_refused_before_the_work(sparse, method, settings, said):
    with pytest.raises((ConfigError, DataError), match=said):
        check_estimator(config(method, **settings), sparse)


def test_rows_too_large_to_be_dense_are_refused(sparse, monkeypatch):
    monkeypatch.setattr(estimators, "DENSE_VALUES", 1000)
    with pytest.raises(DataError, match=r"gmm would hold 5,130 dense values.*estimator.components"):
        check_estimator(config("gmm", components=0), sparse)
    check_estimator(config("gmm"), sparse)


@pytest.mark.parametrize("name", ["itakura_saito", "i_divergence"])
def test_divergences_refuse_negative_rows(name):
    with pytest.raises(DataError, match=rf"{name}.*negative values.*components=0"):
        neighbour_graph(-np.ones((5, 2)), EstimatorConfig(dissimilarity=name))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"covariance": "ful"}, "covariance"),
        ({"dissimilarity": "euclidian"}, "expected one of: chebyshev"),
        ({"neighbours": 1}, "at least 2"),
        ({"neighbors": 5}, "did you mean 'neighbours'"),
        ({"p": 0.5, "dissimilarity": "minkowski"}, "at least 1"),
        ({"floor": 0.0}, "above 0"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, said):
    with pytest.raises(ConfigError, match=said):
        config("gmm", **settings)


def test_any_recipe_may_name_an_estimator(caplog):
    run = load_recipe("demo", ["method=gmm", "estimator.covariance=full", "model.hidden=[8]"])
    assert (run.method, run.phases, run.estimator.covariance) == ("gmm", (), "full")
    assert "model of the recipe: left out" in caplog.text
    with pytest.raises(ConfigError, match="did you mean 'k-means'"):
        load_recipe("demo", ["method=k-mean"])
    with pytest.raises(ConfigError, match="scikit-learn's"):
        method_row("gmm")


# ---- the whole job


@pytest.fixture(scope="module")
def stories(tmp_path_factory) -> Path:
    return write_jsonl(tmp_path_factory.mktemp("stories") / "stories.jsonl", records(90))


def estimator_run(stories: Path, method: str, **changes: Any) -> RunConfig:
    own = changes.pop("estimator", {})
    return resolve({**tiny_recipe(stories, **changes), "method": method, "estimator": own})


@pytest.mark.parametrize(
    ("method", "baselines"),
    [
        ("k-means", ["LSA + k-means"]),
        ("lsa-kmeans", ["k-means"]),
        ("gmm", ["k-means", "LSA + k-means"]),
        ("nmf-kmeans", ["k-means", "LSA + k-means"]),
        ("spectral", ["k-means", "LSA + k-means"]),
    ],
)
def test_a_run_leaves_what_every_run_leaves(stories, tmp_path, method, baselines):
    run = estimator_run(stories, method)
    summary = train_run(run, tmp_path / "run")
    assert summary == json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["method"], summary["n_documents"], summary["fitted_on"]) == (method, 90, 90)
    assert (summary["checkpoint"], summary["model"], summary["model_uri"]) == (None, None, None)
    assert list(summary["baselines"]) == baselines
    assert {"prepare", "fit", "train", "assign", "baselines", "report"} <= set(summary["seconds"])
    assert summary["acc"] > 0.8
    assert any("wheat" in c["terms"] or "corn" in c["terms"] for c in summary["clusters"])
    assert Assignment.open(tmp_path / "run" / "assignments").n_documents == 90
    before = snapshot(tmp_path / "run")
    assert train_run(run, tmp_path / "run") == summary
    assert snapshot(tmp_path / "run") == before
    with pytest.raises(DataError, match=rf"run of {method}, .*keeps no model.*assignments"):
        assign_run(tmp_path / "run", tmp_path / "run" / "corpus", tmp_path / "out")


class Stop(Exception):
    pass


@pytest.mark.parametrize("stage", ["train", "assign", "baselines", "report"])
def test_a_run_that_stopped_goes_on(stories, tmp_path, stage):
    """What is there is kept: a fit whose assignments are whole is not made again."""

    class Stopping(Listener):
        def stage(self, name: str) -> None:
            if name == stage:
                raise Stop

    run, folder = estimator_run(stories, "gmm"), tmp_path / "run"
    expected = train_run(run, tmp_path / "whole", corpus_root=tmp_path / "whole" / "corpus")
    with pytest.raises(Stop):
        train_run(run, folder, listener=Stopping())
    before = snapshot(folder)
    fits = json.loads((folder / "done.json").read_text())["seconds"].get("fit")
    summary = train_run(run, folder)
    assert {k: v for k, v in summary.items() if k != "seconds"} == {
        k: v for k, v in expected.items() if k != "seconds"
    }
    kept = "assignments/" if stage in ("baselines", "report") else "corpus/"
    assert {k: v for k, v in before.items() if k.startswith(kept)}.items() <= snapshot(folder).items()
    if kept == "assignments/":
        assert summary["seconds"]["fit"] == fits


def test_settings_of_its_own_keep_the_baseline_beside_it(stories, tmp_path):
    run = estimator_run(stories, "lsa-kmeans", estimator={"components": 4, "max_rows": 60})
    summary = train_run(run, tmp_path / "run")
    assert list(summary["baselines"]) == ["k-means", "LSA + k-means"]
    assert summary["fitted_on"] == 60
    with pytest.raises(ConfigError, match="estimator.components: 4 there, 5 asked"):
        train_run(estimator_run(stories, "lsa-kmeans", estimator={"components": 5}), tmp_path / "run")


def test_too_many_documents_for_spectral_leave_no_run(stories, tmp_path):
    run = estimator_run(stories, "spectral", estimator={"spectral_rows": 50})
    with pytest.raises(DataError, match="spectral was given 90 documents and takes 50"):
        train_run(run, tmp_path / "run")
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"corpus"}


def test_mlflow_has_the_same_metrics(stories, tmp_path):
    from mlflow import MlflowClient

    uri = f"sqlite:///{tmp_path}/mlflow.db"
    run = estimator_run(stories, "gmm", tracking={"enabled": True, "uri": uri})
    summary = train_run(run, tmp_path / "run")
    found = MlflowClient(uri).get_run(summary["mlflow_run_id"])
    assert found.info.status == "FINISHED"
    assert found.data.params["method"] == "gmm"
    assert found.data.metrics["nmi_geometric"] == summary["nmi_geometric"]
    assert found.data.metrics["baseline/k-means/acc"] == summary["baselines"]["k-means"]["acc"]
    assert found.data.metrics["seconds/fit"] == summary["seconds"]["fit"]


# ---- the table that they stand in


def test_every_row_has_every_cell_of_the_taxonomy():
    for row in (*METHODS.values(), *ESTIMATORS.values()):
        cells = dataclasses.asdict(taxonomy(row))
        assert len(cells) == 7
        assert all(cells.values()), row.name
        assert all(getattr(row, slot) for slot in SLOTS)


SURVEY = {
    "dec": ("MLP", "assignment hardening", "pretrain, then fine-tune", "no"),
    "idec": ("MLP", "assignment hardening", "pretrain, then joint", "no"),
    "dbc": ("CNN", "assignment hardening", "pretrain, then fine-tune", "no"),
    "dcn": ("MLP", "k-means (hard)", "pretrain, then joint", "no"),
    "aljalbout": ("CNN", "assignment hardening", "pretrain, then joint", "k-means on the final features"),
    "damic": (
        "MLP + K autoencoders + gate network",
        "mixture likelihood + cluster classification (warm start)",
        "pretrain, then fine-tune",
        "no",
    ),
    "dmm": ("none (shallow)", "soft k-means (mixed centroid)", "clustering only", "no"),
    "dmae": ("MLP", "soft k-means (mixed centroid)", "pretrain, then joint", "no"),
    "k-means": ("none (shallow)", "k-means (hard)", "clustering only", "no"),
    "gmm": ("none (shallow)", "mixture likelihood", "clustering only", "no"),
}


@pytest.mark.parametrize("name", sorted(SURVEY))
def test_the_taxonomy_says_of_known_methods_what_the_survey_says(name):
    """Aljalbout et al. 2018, by the text of their table; for later methods, by their papers."""
    found = taxonomy(METHODS[name] if name in METHODS else ESTIMATORS[name])
    cells = (found.architecture, found.clustering_loss, found.combination, found.after_training)
    assert cells == SURVEY[name]
    update = {"dcn": "alternating, hard", "k-means": "alternating, hard", "gmm": "alternating (EM), soft"}
    assert found.cluster_update.startswith(update.get(name, "jointly"))


def test_a_mixture_that_ends_in_self_training_has_both_losses():
    found = taxonomy(METHODS["damic-consolidated"]).clustering_loss
    assert found == "mixture likelihood + cluster classification (warm start) + assignment hardening"
    update = taxonomy(METHODS["damic-consolidated"]).cluster_update
    assert update == "jointly, by back-propagation, soft; target refreshed from the whole set"


def test_what_is_missing_is_not_in_the_table():
    names = {name.lower() for name in (*METHODS, *ESTIMATORS)}
    assert not names & {name.lower() for name in MISSING}
    assert {"JULE", "SpectralNet", "DEN", "DGG", "ClusterGAN", "UMMC", "NMMC"} <= set(MISSING)
    assert {"IMSAT", "CCNN", "SCCNN", "UGTAC", "IEC", "DECCA", "SDEC", "DDC", "ConvDEC"} <= set(MISSING)
    assert all(len(row.reason) < 110 and row.paper for row in MISSING.values())


# ---- which baselines a row gets


@pytest.mark.parametrize(
    ("method", "codes", "start"),
    [
        ("damic", "pretrain", ("gate", "gate after warm start")),
        ("damic-consolidated", "pretrain", ("gate", "gate after warm start")),
        ("damic-joint", None, None),
        ("damic-pretraining", "pretrain", None),
        ("k-dae", "pretrain", ("experts", "before joint training")),
        ("mixae", None, None),
        ("dmm", None, ("initialise", "before joint training")),
        ("bregman", None, ("initialise", "before joint training")),
        ("ae-cm", "pretrain", ("module", "before joint training")),
        ("ae-cm-random", None, None),
        ("ae-kmeans", "pretrain", None),
        ("dkm-annealed", None, None),
        ("aljalbout", "pretrain", ("initialise", "before joint training")),
        ("depict", "pretrain", ("gate", "gate after warm start")),
        ("vade", "pretrain", ("initialise", "before joint training")),
    ],
)
def test_baselines_follow_from_the_phases(method, codes, start):
    run = resolve({"method": method, "clusters": 3})
    assert (code_phase(run), start_phase(run)) == (codes, start)


def test_phases_may_have_any_name():
    run = resolve({"method": "damic", "clusters": 3})
    renamed = [dataclasses.replace(phase, name=f"p{i}") for i, phase in enumerate(run.phases)]
    other = dataclasses.replace(run, phases=tuple(renamed))
    assert (code_phase(other), start_phase(other)) == ("p0", ("p3", "gate after warm start"))


def test_a_gate_that_has_learnt_nothing_is_no_baseline():
    run = resolve({"method": "damic", "clusters": 3})
    without = dataclasses.replace(run, phases=tuple(p for p in run.phases if p.name != "gate"))
    assert start_phase(without) is None
