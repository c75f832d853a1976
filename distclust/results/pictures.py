"""Pictures of a finished run: regions in the plane, codes before and after joint training, what experts give.

What is drawn is computed here, from the run folder alone; how it looks is in `results.drawing`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from distclust.config import RunConfig, from_dict
from distclust.corpus.shards import Corpus
from distclust.corpus.synthetic import GENERATORS, latent_points
from distclust.errors import DataError
from distclust.mixture.catalogue import ESTIMATORS
from distclust.mixture.model import MixtureModel
from distclust.mixture.sparse import SparseRows
from distclust.results.assignment import Assignment
from distclust.results.baselines import Rows, evenly_drawn, gather
from distclust.results.drawing import Labels, Panel, Points, Region, draw_experts, draw_panels, save_figure
from distclust.results.estimators import fit_estimator
from distclust.results.evaluate import class_numbers
from distclust.results.from_checkpoint import load_model
from distclust.results.predict import BLOCK_ROWS, MODEL_FILE, Predictor

PICTURES = "pictures"
"""The folder in a run folder."""
MOST_ROWS = 5_000
"""Rows that are drawn at most, evenly drawn from the corpus."""
_WIDEST_CODES = 4_096
_REFIT_ROWS = 50_000


# ---- what is drawn of a run


class FinishedRun:
    """A run folder as the pictures need it, with at most `MOST_ROWS` of its rows.

    Attributes:
        rows: the rows (n, D) as the corpus holds them, dense or CSR.
        clusters: (n,) the cluster of each.
        labels: (n,) class numbers, -1 for those without exactly one label; None where no row has one.
        predictor: the model, or None for scikit-learn's rows.

    Raises:
        DataError: training or assignment is not finished, or the corpus is not there.
    """

    def __init__(self, folder: str | Path, corpus: str | Path | None = None):
        self.folder = Path(folder)
        try:
            self.config: RunConfig = from_dict(
                json.loads((self.folder / "config.json").read_text())["config"]
            )
        except (OSError, KeyError, ValueError) as error:
            raise DataError(
                f"{folder} holds no run ({error}); expected a folder that `distclust train` made"
            ) from error
        self.corpus = Corpus.open(corpus if corpus is not None else self._corpus_root())
        clusters = Assignment.open(self.folder / "assignments").clusters()
        self.sample = evenly_drawn(self.corpus.n_rows, MOST_ROWS, self.config.seed)
        self.rows: Rows = gather(self.corpus, self.sample)
        self.clusters = clusters[self.sample]
        labels = class_numbers(self.corpus)[self.sample]
        self.labels = labels if (labels >= 0).any() else None
        self.predictor = None
        if (self.folder / "model" / MODEL_FILE).exists():
            self.predictor = Predictor.load(self.folder / "model")

    def _corpus_root(self) -> Path:
        own = self.folder / "corpus"
        try:
            named = json.loads((self.folder / "summary.json").read_text())["corpus"]
        except (OSError, KeyError, ValueError):
            return own
        return self.folder / named

    @property
    def row_scale(self) -> float:
        """What raw rows were multiplied by."""
        return float(self.corpus.manifest.row_scale)

    def model_before(self) -> tuple[str, MixtureModel] | None:
        """The phase before the last that trained, and the model as it was then; None where there is none."""
        phases = self.config.phases
        last = max((i for i, phase in enumerate(phases) if phase.epochs), default=0)
        found = sorted((self.folder / "checkpoints").glob(f"*-after-{phases[last - 1].name}")) if last else []
        if not found:
            return None
        return phases[last - 1].name, load_model(str(found[-1]), self.config, self.corpus)


def region_panel(run: FinishedRun, title: str, cells: int = 200) -> Panel | None:
    """The plane by cluster, and the rows in it (DMAE, figure 2); None where rows are not two numbers.

    Spectral clustering says nothing of other points than its own, so its region is empty.
    """
    if run.corpus.n_features != 2 or run.corpus.kind != "dense":
        return None
    points = np.asarray(run.rows) / run.row_scale
    region = _region(points, _plane_rule(run), cells)
    return Panel(title=title, points=points, clusters=run.clusters, labels=run.labels, region=region)


def _plane_rule(run: FinishedRun) -> Callable[[Points], Labels] | None:
    """Points of the plane (n, 2), not scaled, to clusters (n,)."""
    predictor = run.predictor
    if predictor is not None:
        return lambda points: predictor.predict_matrix(points).clusters
    method = run.config.method
    if method not in ESTIMATORS or method == "spectral" or run.corpus.n_rows > _REFIT_ROWS:
        return None
    # a run of scikit-learn's keeps no model: in the plane it is fitted again in no time, and alike
    rule = fit_estimator(run.config, run.corpus).rule
    scale = np.float32(run.row_scale)
    return None if rule is None else lambda points: rule(points.astype(np.float32) * scale).clusters


def _region(points: Points, predict: Callable[[Points], Labels] | None, cells: int) -> Region:
    low, high = points.min(axis=0), points.max(axis=0)
    half = 0.56 * float((high - low).max()) + 1e-9  # a square, so that distances look as they are
    (left, bottom), (right, top) = (low + high) / 2 - half, (low + high) / 2 + half
    extent = (float(left), float(right), float(bottom), float(top))
    if predict is None:
        return Region(None, extent)
    x = left + (np.arange(cells) + 0.5) * (right - left) / cells
    y = bottom + (np.arange(cells) + 0.5) * (top - bottom) / cells
    grid = np.stack(np.meshgrid(x, y), axis=-1).reshape(-1, 2)
    return Region(predict(grid).reshape(cells, cells), extent)


def latent_panel(run: FinishedRun, title: str, clusters: Labels | None = None) -> Panel | None:
    """The points behind DAMIC's synthetic rows by cluster (its figure 2); None for other data.

    Args:
        run: the run.
        title: of the panel.
        clusters: (n,) of the run's sample; the run's own unless given.
    """
    source = run.config.source
    if source.name not in GENERATORS or run.corpus.n_features == 2:
        return None
    points = latent_points(source.name, source.seed, source.documents)[0][run.sample]
    return Panel(
        title=title,
        points=points,
        clusters=run.clusters if clusters is None else clusters,
        labels=run.labels,
        note="the points behind the rows",
    )


def code_panels(run: FinishedRun) -> list[Panel]:
    """Codes in two dimensions, before and after the last phase that trained; by cluster.

    Codes of two numbers are drawn as they are, longer ones on their two principal components; the plane
    before is turned to lie as near as it can to that after. Nothing is drawn where the codes are plane rows
    or there are too many numbers in them.
    """
    if run.predictor is None:
        return []
    model = run.predictor.model
    identity = model.method.network == "none"
    if not 2 <= model.code_size <= _WIDEST_CODES or (identity and model.code_size == 2):
        return []
    codes = encode(model, run.rows)
    after, note = _in_the_plane(codes)
    panels = [_code_panel("after training", after, run.clusters, note)]
    found = run.model_before()
    if found is None:
        return panels
    phase, model = found
    earlier = encode(model, run.rows)
    moved = not np.array_equal(earlier, codes)
    before, note_before = _in_the_plane(earlier) if moved else (after, note)
    names = [p.name for p in run.config.phases]
    past = run.config.phases[: names.index(phase) + 1]
    placed = any("initialise_clusters" in p.begin for p in past)
    last = run.config.phases[len(past)].name
    words = "joint training" if last == "joint" else f"the phase '{last}'"
    return [
        _code_panel(
            f"before {words}",
            _turned(before, after) if moved and codes.shape[1] > 2 else before,
            predict_with(run, model) if placed else None,
            note_before,
        ),
        _code_panel(f"after {words}{'' if moved else ' (the same codes)'}", after, run.clusters, note),
    ]


def _code_panel(title: str, points: Points, clusters: Labels | None, note: str) -> Panel:
    return Panel(title=title, points=points, clusters=clusters, named=True, note=note)


def _in_the_plane(codes: Points) -> tuple[Points, str]:
    """(n, 2), and what its directions are."""
    if codes.shape[1] == 2:
        return codes, "the two numbers of a code"
    from sklearn.decomposition import PCA

    pca = PCA(2, random_state=0)
    points = pca.fit_transform(codes.astype(np.float64))  # long codes that vary little: not in float32
    share = 100 * float(np.nan_to_num(pca.explained_variance_ratio_).sum())
    return points, f"2 principal components of {codes.shape[1]}: {share:.0f} % of the variance"


def _turned(points: Points, towards: Points) -> Points:
    """The points turned and mirrored about their mean, nearest to `towards` (orthogonal Procrustes)."""
    centred = points - points.mean(axis=0)
    u, _, v = np.linalg.svd(centred.T @ (towards - towards.mean(axis=0)))
    return centred @ (u @ v)


def _blocks(rows: Rows) -> Iterator[torch.Tensor | SparseRows]:
    for at in range(0, rows.shape[0], BLOCK_ROWS):
        part = rows[at : at + BLOCK_ROWS]
        if isinstance(part, np.ndarray):
            yield torch.from_numpy(np.array(part, np.float32))
        else:
            parts = (
                part.indptr.astype(np.int64),
                part.indices.astype(np.int64),
                part.data.astype(np.float32),
            )
            offsets, indices, values = (torch.from_numpy(array) for array in parts)
            yield SparseRows(offsets, indices, values, part.shape[1])


@torch.no_grad()
def encode(model: MixtureModel, rows: Rows) -> NDArray[np.float32]:
    """The codes (n, J) of rows (n, D), dense or CSR, as the energies see them."""
    found = [model.codes(block).float().numpy() for block in _blocks(rows)]
    return np.concatenate(found)


def predict_with(run: FinishedRun, model: MixtureModel) -> NDArray[np.int64]:
    """The clusters (n,) of the run's rows by another model of its kind."""
    predictor = Predictor(model, {"kind": run.corpus.kind, "row_scale": run.row_scale})
    if isinstance(run.rows, np.ndarray):
        return predictor.predict_dense(run.rows).clusters
    return predictor.predict_rows(run.rows.indptr, run.rows.indices, run.rows.data).clusters


@torch.no_grad()
def expert_rows(
    run: FinishedRun, label: str = "4"
) -> tuple[list[tuple[str, Points, Points, Points]], list[str]] | None:
    """What each expert makes of an image of ones, and of one with a given label (DAMIC, figures 3 and 4).

    Returns:
        What `draw_experts` takes; None where there are no experts of images.
    """
    shape = run.config.model.image or tuple(run.corpus.manifest.options.get("image_shape", ()))
    model = None if run.predictor is None else run.predictor.model
    if model is None or model.experts is None or model.settings.expert_space != "rows":
        return None
    if not shape or shape[0] not in (1, 3) or not isinstance(run.rows, np.ndarray):
        return None
    classes = list(run.corpus.manifest.classes)
    place, name = 0, "an image"
    if run.labels is not None and label in classes:
        own = np.flatnonzero(run.labels == classes.index(label))
        if own.size:
            place, name = int(own[0]), f"a {label}"
    given = torch.from_numpy(np.array(run.rows[[place, place]], np.float32))
    given[0] = run.row_scale
    found = model.experts.reconstruct(given) / run.row_scale  # (2, K, D)
    p = model.log_scores(given).exp().numpy()
    images = _as_images(found.numpy(), shape)
    inputs = _as_images(given.numpy() / run.row_scale, shape)
    rows = [(["all ones", name][i], inputs[i], images[i], p[i]) for i in range(2)]
    return rows, [_expert_name(run, k) for k in range(model.n_clusters)]


def _as_images(rows: Points, shape: Sequence[int]) -> Points:
    """(..., D) to (..., H, W), or (..., H, W, C) where there are colours."""
    images = rows.reshape(*rows.shape[:-1], *shape)
    return images[..., 0, :, :] if shape[0] == 1 else np.moveaxis(images, -3, -1)


def _expert_name(run: FinishedRun, k: int) -> str:
    """Its number, and the label that most rows of its cluster have."""
    if run.labels is None:
        return f"expert {k}"
    own = run.labels[(run.clusters == k) & (run.labels >= 0)]
    if not own.size:
        return f"expert {k}\nno row"
    return f"expert {k}\nmostly {run.corpus.manifest.classes[int(np.bincount(own).argmax())]}"


# ---- a run's own


def save_pictures(run_folder: str | Path, corpus: str | Path | None = None) -> list[Path]:
    """Draw what makes sense for a run into `pictures/` of its folder.

    ``regions.png`` where rows are points of the plane, ``latent.png`` where the data set is a function of
    such points, ``experts.png`` where experts reconstruct images, ``codes.png`` where there is a network.

    Args:
        run_folder: of a run whose documents are assigned.
        corpus: its corpus; the one that its summary names, or that in the folder, unless given.

    Returns:
        The files.

    Raises:
        DataError: the run is not so far, or its corpus is not there.
        CheckpointError: a damaged model or checkpoint.
    """
    run = FinishedRun(run_folder, corpus)
    folder, k, method = run.folder / PICTURES, run.config.clusters, run.config.method
    saved = []
    plane = region_panel(run, f"{method}: regions"), latent_panel(run, f"{method}: clusters")
    for name, panel in zip(("regions", "latent"), plane, strict=True):
        if panel is not None:
            saved.append(save_figure(draw_panels([panel], k, side=4.5), folder / f"{name}.png"))
    experts = expert_rows(run)
    if experts is not None:
        title = f"{method}: each expert's reconstruction"
        saved.append(save_figure(draw_experts(*experts, title=title), folder / "experts.png"))
    panels = code_panels(run)
    if panels:
        figure = draw_panels(panels, k, title=f"{method}: codes by cluster", side=4.2)
        saved.append(save_figure(figure, folder / "codes.png"))
    return saved
