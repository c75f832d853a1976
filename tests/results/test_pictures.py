"""Pictures: what experts give back, what is drawn of which run, and that a picture never costs a run."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
import torch
from PIL import Image
from scipy.sparse import csr_matrix

from distclust.config import resolve
from distclust.corpus.synthetic import latent_points, make
from distclust.errors import DataError
from distclust.mixture.experts import build_experts
from distclust.mixture.settings import ModelSettings
from distclust.mixture.sparse import SparseRows
from distclust.results.drawing import Panel, draw_panels, palette, save_figure
from distclust.results.pictures import (
    MOST_ROWS,
    FinishedRun,
    _turned,
    code_panels,
    encode,
    expert_rows,
    latent_panel,
    region_panel,
    save_pictures,
)
from distclust.run import train_run

SETTINGS = {
    "autoencoder": {},
    "autoencoder, layer norm": {"norm": "layer"},
    "constant": {"experts": "constant"},
    "low_rank": {"experts": "low_rank"},
    "convolutional": {"experts": "convolutional", "image": (1, 6, 4), "expert_conv": ((3, 3, 1, 2),)},
}


@pytest.mark.parametrize("kind", SETTINGS)
def test_the_energy_is_the_distance_to_what_the_experts_give_back(kind: str) -> None:
    torch.manual_seed(0)
    s = ModelSettings(expert_hidden=(7,), expert_code_size=3, **SETTINGS[kind])
    experts = build_experts(24, 5, s)
    with torch.no_grad():
        for parameter in experts.parameters():
            parameter.normal_(std=0.5)
        x = torch.rand(6, 24) * (torch.rand(6, 24) < 0.5)
        found = experts.reconstruct(x)
        assert found.shape == (6, 5, 24)
        torch.testing.assert_close((x[:, None] - found).square().sum(2), experts.errors(x))
        csr = csr_matrix(x.numpy())
        parts = (torch.from_numpy(part) for part in (csr.indptr, csr.indices, csr.data))
        rows = SparseRows(*parts, 24)
        torch.testing.assert_close(experts.reconstruct(rows), found)


# ---- finished runs


def recipe(method: str, source: dict[str, Any], clusters: int, **more: Any) -> dict[str, Any]:
    return {
        "method": method,
        "clusters": clusters,
        "source": source,
        "vocabulary": {"scale": 2.0},  # not 1: pictures are of rows as they were given
        "shards": {"rows_per_shard": 300},
        "order": {"lanes": 2, "rows_per_lane": 64},
        "cluster": {"workers": 0},
        "tracking": {"enabled": False},
        **more,
    }


SMALL = {"hidden": [16], "code_size": 4, "expert_hidden": [8], "expert_code_size": 3, "gate_hidden": [8]}
EPOCHS = {"pretrain": {"epochs": 2}, "experts": {"epochs": 1}, "gate": {"epochs": 2}, "joint": {"epochs": 1}}
RECIPES = {
    "plane": recipe("k-means", {"name": "painwheel", "documents": 6000}, 5),
    "spectral": recipe("spectral", {"name": "painwheel", "documents": 200}, 5),
    "dmm": recipe("dmm", {"name": "painwheel", "documents": 300}, 5, phases={"joint": {"epochs": 1}}),
    "latent": recipe("k-means", {"name": "damic-sigmoid2", "documents": 400, "seed": 3}, 4),
    "damic": recipe("damic", {"name": "digits"}, 10, model=SMALL, phases=EPOCHS),
    "dmae": recipe(
        "dmae", {"name": "digits"}, 10, model={"hidden": [16], "code_size": 4},
        phases={"pretrain": {"epochs": 5}, "joint": {"epochs": 1}},
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Name -> run folder, run when it is first asked for; not to be changed."""
    root, made = tmp_path_factory.mktemp("runs"), {}

    def folder(name: str) -> Path:
        if name not in made:
            train_run(resolve(RECIPES[name]), root / name, baselines=False)
            made[name] = root / name
        return made[name]

    return folder


DRAWN = {
    "plane": ["regions"],
    "spectral": ["regions"],
    "dmm": ["regions"],
    "latent": ["latent"],
    "damic": ["codes", "experts"],
    "dmae": ["codes"],
}


@pytest.mark.parametrize("name", DRAWN)
def test_a_finished_run_has_the_pictures_that_make_sense(folders, name: str) -> None:
    files = sorted((folders(name) / "pictures").iterdir())
    assert [file.name for file in files] == [f"{drawn}.png" for drawn in DRAWN[name]]
    for file in files:
        assert file.stat().st_size < 200_000
        with Image.open(file) as image:
            assert min(image.size) > 200
            assert len(image.getcolors(256) or ()) > 20, "a picture of nothing"


def test_rows_are_few_and_their_clusters_and_labels_are_their_own(folders) -> None:
    run = FinishedRun(folders("plane"))
    assert run.rows.shape == (MOST_ROWS, 2)
    given = make("painwheel", documents=6000)
    np.testing.assert_allclose(run.rows, 2.0 * given.x[run.sample], rtol=1e-5)
    classes = np.array(run.corpus.manifest.classes)
    assert (classes[run.labels] == given.y[run.sample].astype(str)).all()
    # on this set k-means errs by a few rows in a hundred: clusters in another order would show
    assert all(
        (np.bincount(run.labels[run.clusters == k]).max() > 0.9 * (run.clusters == k).sum()) for k in range(5)
    )


def cells_at(panel: Panel) -> np.ndarray:
    """The region's cluster at each of the panel's points."""
    left, right, bottom, top = panel.region.extent
    n = len(panel.region.cells)
    column = ((panel.points[:, 0] - left) / (right - left) * n).astype(int)
    row = ((panel.points[:, 1] - bottom) / (top - bottom) * n).astype(int)
    return panel.region.cells[row, column]


@pytest.mark.parametrize("name", ["plane", "dmm"])
def test_points_lie_in_the_region_of_their_cluster(folders, name: str) -> None:
    run = FinishedRun(folders(name))
    panel = region_panel(run, "")
    np.testing.assert_allclose(panel.points, run.rows / 2.0)
    assert len(np.unique(panel.region.cells)) == 5
    # but for those on the border of a cell
    assert (cells_at(panel) == panel.clusters).mean() > 0.98


def test_spectral_clustering_has_points_and_no_regions(folders) -> None:
    panel = region_panel(FinishedRun(folders("spectral")), "")
    assert panel.region.cells is None
    assert len(panel.points) == 200


def test_latent_points_are_those_behind_the_rows(folders) -> None:
    run = FinishedRun(folders("latent"))
    points, labels = latent_points("damic-sigmoid2", 3, 400)
    panel = latent_panel(run, "")
    np.testing.assert_array_equal(panel.points, points)
    assert (np.array(run.corpus.manifest.classes)[panel.labels] == labels.astype(str)).all()
    assert latent_panel(FinishedRun(folders("plane")), "") is None


# ---- codes


def test_codes_that_do_not_move_are_drawn_with_the_clusters_of_both_times(folders) -> None:
    run = FinishedRun(folders("damic"))
    before, after = code_panels(run)
    assert "same codes" in after.title
    np.testing.assert_array_equal(before.points, after.points)
    np.testing.assert_array_equal(after.clusters, run.clusters)
    assert 0.3 < (before.clusters == after.clusters).mean() < 1.0


def test_codes_that_move_are_drawn_as_they_were_and_are(folders) -> None:
    run = FinishedRun(folders("dmae"))
    before, after = code_panels(run)
    assert (before.title, after.title) == ("before joint training", "after joint training")
    phase, model = run.model_before()
    assert phase == "initialise"
    for panel, codes in ((before, encode(model, run.rows)), (after, encode(run.predictor.model, run.rows))):
        centred = codes - codes.mean(axis=0)
        # the plane of the largest variance, whichever way it is turned
        largest = np.linalg.svd(centred, compute_uv=False)[:2]
        drawn = np.linalg.svd(panel.points - panel.points.mean(axis=0), compute_uv=False)
        np.testing.assert_allclose(drawn, largest, rtol=1e-3)


def test_sparse_rows_have_the_codes_of_dense_ones(folders) -> None:
    run = FinishedRun(folders("dmae"))
    dense = encode(run.predictor.model, run.rows)
    assert dense.shape == (1797, 4)
    np.testing.assert_allclose(encode(run.predictor.model, csr_matrix(run.rows)), dense, atol=1e-4)


def test_turning_finds_a_turned_and_mirrored_copy() -> None:
    points = np.random.default_rng(0).standard_normal((50, 2)) * (3.0, 1.0)
    points -= points.mean(axis=0)
    turned = points @ np.array([[0.6, 0.8], [0.8, -0.6]])
    np.testing.assert_allclose(_turned(points + 5.0, turned), turned, atol=1e-9)


# ---- experts


def test_experts_are_shown_ones_and_a_four(folders) -> None:
    run = FinishedRun(folders("damic"))
    rows, names = expert_rows(run)
    assert [name for name, *_ in rows] == ["all ones", "a 4"]
    assert len(names) == 10
    (_, ones, _, _), (_, four, found, p) = rows
    assert (ones == 1.0).all()
    digits = make("digits")
    same = np.abs(digits.x / 16.0 - four.reshape(-1)).max(axis=1) < 1e-6
    assert digits.y[same].tolist() == [4]
    assert (four.shape, found.shape) == ((8, 8), (10, 8, 8))
    model, x = run.predictor.model, torch.from_numpy(2.0 * four.reshape(1, -1))
    with torch.no_grad():
        errors = model.experts.errors(x)[0].numpy()
        np.testing.assert_allclose(p, model.log_scores(x).exp()[0].numpy(), atol=1e-5)
    np.testing.assert_allclose(4.0 * ((four - found) ** 2).sum(axis=(1, 2)), errors, rtol=1e-4)


def test_no_experts_no_picture(folders) -> None:
    assert expert_rows(FinishedRun(folders("dmae"))) is None


# ---- figures


def test_many_clusters_and_many_labels_can_be_drawn(tmp_path: Path) -> None:
    before = dict(matplotlib.rcParams)
    rng = np.random.default_rng(0)
    labels = rng.integers(-1, 30, 200)
    panel = Panel(title="t", points=rng.random((200, 2)), clusters=labels % 23, labels=labels, named=True)
    grey = Panel(title="not yet", points=rng.random((3, 2)), clusters=None)
    figure = draw_panels([panel, grey], 23)
    assert not figure.legends, "30 labels have no marker each"
    assert [len(axes.texts) for axes in figure.axes] == [23, 0]
    assert save_figure(figure, tmp_path / "new" / "many.png").exists()
    assert dict(matplotlib.rcParams) == before


def test_colours_are_told_apart_up_to_ten() -> None:
    for k in range(2, 11):
        assert len(set(palette(k))) == k
    assert palette(12)[10:] == palette(12)[:2]


# ---- what goes wrong


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no run"):
        save_pictures(tmp_path)


def test_pictures_that_cannot_be_drawn_cost_a_warning_and_not_the_run(tmp_path: Path, caplog) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "pictures").write_text("in the way")
    config = resolve(recipe("k-means", {"name": "moons", "documents": 60}, 2))
    with caplog.at_level(logging.WARNING):
        summary = train_run(config, folder, baselines=False)
    assert summary["n_documents"] == 60
    assert "goes without its pictures" in caplog.text
    assert train_run(config, folder, baselines=False) == summary, "finished"
