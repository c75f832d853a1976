"""The whole job: documents in; clusters, scores, a report and a model out.

`train_run` reads from top to bottom. Each part of the job leaves something whole behind, and the run folder
says which parts are done (`done.json`): the same command after a loss goes on behind them, and after the end
it only reads the summary.
"""

from __future__ import annotations

import logging
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distclust.config import ClusterConfig, RunConfig, to_dict
from distclust.corpus.files import is_url
from distclust.corpus.prepare import prepare, prepare_local
from distclust.corpus.shards import MANIFEST, Corpus, Manifest
from distclust.corpus.sources import SourceConfig
from distclust.corpus.vocabulary import VOCABULARY_FILE, Vocabulary
from distclust.errors import CheckpointError, DataError
from distclust.mixture.catalogue import ESTIMATORS
from distclust.mixture.model import MixtureModel
from distclust.preflight import (
    check_device,
    check_fits,
    check_prepared,
    check_tracking,
    check_unchanged,
    is_generated,
)
from distclust.progress import SILENT, Listener, PhaseWatch, timed
from distclust.results.assign import AssignConfig, assign_corpus, assign_documents
from distclust.results.assignment import Assignment
from distclust.results.baselines import baselines_of
from distclust.results.estimators import (
    Fitted,
    assign_fitted,
    find_assigned,
    fit_estimator,
    fitted_on,
)
from distclust.results.evaluate import class_numbers, evaluate, score_clusters
from distclust.results.from_checkpoint import export_checkpoint, load_model
from distclust.results.pictures import PICTURES, save_pictures
from distclust.results.predict import MODEL_FILE
from distclust.results.report import SCORE_NAMES, describe_clusters
from distclust.run_folder import (
    ASSIGNMENTS,
    CONFIG,
    DONE,
    SUMMARY,
    Done,
    assignments_of,
    check_same_data,
    check_same_run,
    hold,
    lost_baselines,
    nothing_left,
    read_json,
    remember_run,
    stored_path,
    write_json,
)
from distclust.training.cluster import connect, run_training
from distclust.training.hooks import Outcome
from distclust.training.tracking import Tracker

log = logging.getLogger(__name__)


MODEL = "model"


# ---- prepare, assign, evaluate


def prepare_run(
    config: RunConfig, out: str | Path, *, listener: Listener = SILENT, overwrite: bool = False
) -> Manifest:
    """Prepare the documents of a configuration into a corpus folder; with `cluster.workers` 0 without Ray.

    Raises:
        DataError: documents that cannot be used; nothing half-made is left.
    """
    work = prepare if config.cluster.worker_range[1] else prepare_local
    names = {"read": "reading documents", "rank": "ranking words", "write": "writing shards"}
    with _ray(config.cluster):
        return work(
            config.source,
            config.vocabulary,
            config.shards,
            out,
            progress=lambda stage, done, total: listener.advance(done, total, names.get(stage, stage)),
            overwrite=overwrite,
        )


def assign_run(
    model: str | Path,
    documents: str | Path | SourceConfig,
    out: str | Path,
    config: AssignConfig | None = None,
    *,
    listener: Listener = SILENT,
) -> Assignment:
    """Assign a prepared corpus (a folder or URL) or new documents (a `SourceConfig`).

    Args:
        model: a model folder, or a run folder with one.
        documents: which.
        out: where the assignments go.
        config: workers and columns; by default in this process.
        listener: who is told.

    Raises:
        DataError: no model, documents that do not fit it, or rows that cannot be used.
    """
    folder = model_folder(model)
    config = config or AssignConfig()

    def progress(done: int, total: int) -> None:
        listener.advance(done, total, "part by part")

    with _ray(ClusterConfig(workers=config.workers)):
        if isinstance(documents, SourceConfig):
            return assign_documents(folder, documents, out, config, progress=progress)
        return assign_corpus(folder, documents, out, config, progress=progress)


def evaluate_run(assignments: str | Path, corpus: str | Path) -> dict[str, Any]:
    """Score assignments against the labels of a corpus; see `results.evaluate.evaluate`."""
    return evaluate(assignments_of(Path(assignments)), corpus)


def model_folder(path: str | Path) -> Path:
    """The model folder at `path`, or that of the run folder at `path`.

    Raises:
        DataError: there is none.
    """
    folder = Path(path)
    for place in (folder, folder / MODEL):
        if (place / MODEL_FILE).exists():
            return place
    method = (read_json(folder / CONFIG).get("config") or {}).get("method")
    if method in ESTIMATORS:
        raise DataError(
            f"{folder} is a run of {method}, which is scikit-learn's and keeps no model; expected a run of a "
            f"method that trains one. The clusters of its own documents are in {folder / ASSIGNMENTS}; to "
            "assign others, put them among its documents and run it again, or train such a method "
            "(`distclust methods --brief` lists them)"
        )
    hint = "its training has not finished" if (folder / "checkpoints").exists() else "check the path"
    raise DataError(f"{folder} holds no model; expected a run folder or the model folder in it: {hint}")


def _ray(cluster: ClusterConfig) -> AbstractContextManager[Any]:
    """One Ray for all parts of a job, or none."""
    return connect(cluster) if cluster.worker_range[1] else nullcontext()


# ---- train


def train_run(
    config: RunConfig,
    run_dir: str | Path,
    *,
    corpus_root: str | Path | None = None,
    listener: Listener = SILENT,
    baselines: bool = True,
) -> dict[str, Any]:
    """The whole job, from wherever the run folder stands.

    Args:
        config: the resolved configuration.
        run_dir: the run folder, on storage that all nodes see.
        corpus_root: a corpus to use, prepared there if need be; by default `corpus` in the run folder.
        listener: who is told.
        baselines: whether the baselines are made; without any label they are left out. A finished run
            without them gets them when it is started with them.

    Returns:
        The contents of summary.json.

    Raises:
        ConfigError: the folder is held by another process, or holds another run.
        DataError: documents that cannot be used, or fewer distinct ones than clusters.
        DistclustError: whatever ends the training; see `training.cluster.run_training`.
    """
    folder, start = Path(run_dir), time.monotonic()
    check_device(config.cluster)
    with _terminating(), hold(folder):
        if check_same_run(folder, config) and nothing_left(folder, baselines):
            check_unchanged(config, str(corpus_root if corpus_root is not None else folder / "corpus"))
            log.info("%s is finished; nothing to do", folder)
            if baselines and lost_baselines(folder):
                log.warning("%s has no baselines, and the checkpoints that they need are gone", folder)
            return read_json(folder / SUMMARY)
        with _ray(config.cluster), _terminating():  # once more: Ray puts handlers of its own in place
            job = _Job(config, folder, corpus_root, listener)
            job.done.add_seconds("start", time.monotonic() - start)
            return job.run(baselines)


@contextmanager
def _terminating() -> Iterator[None]:
    """SIGTERM ends the block as Ctrl-C does, so that everything is left in order."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(number: int, _: FrameType | None) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class _Job:
    """One start of a run. Attributes are what later parts need of earlier ones."""

    corpus: Corpus
    outcome: Outcome | None = None
    """What training left; None for an estimator."""
    fitted: Fitted | None = None
    assignment: Assignment

    def __init__(self, config: RunConfig, folder: Path, corpus_root: str | Path | None, listener: Listener):
        self.config, self.folder, self.listener = config, folder, listener
        self.corpus_root = corpus_root if corpus_root is not None else folder / "corpus"
        self.done = Done(folder / DONE)
        self.model = folder / MODEL
        self.by_estimator = config.method in ESTIMATORS

    def run(self, baselines: bool) -> dict[str, Any]:
        """Top to bottom."""
        check_tracking(self.config.tracking, self.folder)
        self.prepare()
        with self.track() as tracker:
            if self.by_estimator:
                self.fit()
            else:
                self.train(tracker)
            self.assign()
            truth = class_numbers(self.corpus)
            if baselines and (truth >= 0).any():
                self.make_baselines(truth)
            self.draw()
            summary = self.summarise(truth)
            return self.finish(summary, tracker)

    # ---- documents to rows

    def prepare(self) -> None:
        """The corpus, and the checks that need it; from here on the folder belongs to this configuration."""
        self.listener.stage("prepare")
        with timed(lambda s: self.done.add_seconds("prepare", s)):
            root = str(self.corpus_root)
            found = Manifest.load(root) if is_url(root) or (Path(root) / MANIFEST).exists() else None
            if found is not None and (is_url(root) or is_generated(found)):
                check_prepared(found, self.config, root)
            else:
                prepare_run(self.config, self.corpus_root, listener=self.listener)
            self.corpus = Corpus.open(self.corpus_root, cache_config=self.config.cache)
        manifest = self.corpus.manifest
        data = {"corpus": manifest.fingerprint, "vocabulary": manifest.vocabulary_fingerprint}
        check_same_data(self.folder, data)
        check_fits(self.config, self.corpus)
        remember_run(self.folder, self.config, data)
        self.done.content["finished"] = False  # one that was over, and lacks something, may be cut off again
        self.done.save()

    # ---- rows to a model

    @contextmanager
    def track(self) -> Iterator[Tracker | None]:
        """The MLflow run, ended in whatever way this start ends."""
        if not self.config.tracking.enabled:
            yield None
            return
        self.listener.stage("mlflow")
        start = time.monotonic()
        with Tracker.open(self.config.tracking, self.folder, name=self.folder.absolute().name) as tracker:
            manifest = self.corpus.manifest
            tracker.log_params(to_dict(self.config))
            tracker.log_dataset(to_dict(manifest), str(self.corpus_root), fingerprint=manifest.fingerprint)
            self.done.add_seconds("mlflow", time.monotonic() - start)
            yield tracker

    def train(self, tracker: Tracker | None) -> None:
        """All phases, then the model folder."""
        self.listener.stage("train")
        watch = PhaseWatch(self.config, self.done, self.listener)
        tracking = (tracker.uri, tracker.run_id) if tracker is not None else None
        try:
            self.outcome = run_training(
                self.config, self.corpus_root, self.folder, tracking=tracking, on_progress=watch
            )
        finally:
            watch.close()
        with self.done.timed("export"):
            export_checkpoint(self.outcome.checkpoint, self.config, self.corpus, self.model)

    def fit(self) -> None:
        """scikit-learn's row in place of training; done again after a loss, unless all is assigned."""
        self.listener.stage("train")
        if find_assigned(self.config, self.corpus, self.folder / ASSIGNMENTS, replace=True) is None:
            with self.done.timed("train"), self.done.timed("fit"):
                self.fitted = fit_estimator(self.config, self.corpus)

    # ---- a model to results

    def assign(self) -> None:
        """Every document's cluster."""
        self.listener.stage("assign")
        with self.done.timed("assign"):
            if self.by_estimator:
                self.assignment = self._assign_fitted()
                return
            cluster = self.config.cluster
            self.assignment = assign_run(
                self.model,
                self.corpus_root,
                self.folder / ASSIGNMENTS,
                # an earlier version may have exported the model that the last start assigned with
                AssignConfig(
                    workers=cluster.worker_range[1], gpus_per_worker=cluster.gpus_per_worker, replace=True
                ),
                listener=self.listener,
            )

    def make_baselines(self, truth: NDArray[np.int64]) -> None:
        """Scores of what simpler methods find in the same documents; made once, in whichever start."""
        self.listener.stage("baselines")
        k = self.config.clusters
        phases = self.outcome.phase_checkpoints if self.outcome is not None else {}
        kinds = baselines_of(self.config, self.corpus, phases, self._model_after)
        for place, (kind, make) in enumerate(kinds.items()):
            self.listener.advance(place, len(kinds), kind)
            if kind in self.done.baselines:
                continue
            with self.done.timed("baselines"):
                try:
                    found = make()
                except CheckpointError as error:  # of an earlier phase: the run itself is whole
                    log.warning("the run goes without the baselines of its %s: %s", kind, error)
                    continue
                self.done.baselines[kind] = {n: score_clusters(truth, c, k) for n, c in found.items()}
        self.listener.advance(len(kinds), len(kinds))

    def _assign_fitted(self) -> Assignment:
        out = self.folder / ASSIGNMENTS
        if self.fitted is None:
            return Assignment.open(out)
        note = "part by part"
        return assign_fitted(
            self.fitted, self.config, self.corpus, out, lambda d, n: self.listener.advance(d, n, note)
        )

    def _model_after(self, phase: str) -> MixtureModel:
        assert self.outcome is not None
        name = Path(self.outcome.phase_checkpoints[phase]).name  # the folder may have been moved since
        return load_model(f"{self.folder}/checkpoints/{name}", self.config, self.corpus)

    def draw(self) -> None:
        """Pictures, where there is something to see; a run is whole without them."""
        with self.done.timed("pictures"):
            try:
                save_pictures(self.folder, self.corpus_root)
            except Exception as error:  # whatever it is: of the data, of the library, of the disk
                log.warning("the run goes without its pictures: %s: %s", type(error).__name__, error)

    def summarise(self, truth: NDArray[np.int64]) -> dict[str, Any]:
        """What summary.json holds, but for what MLflow adds."""
        self.listener.stage("report")
        k, clusters = self.config.clusters, self.assignment.clusters()
        with self.done.timed("report"):
            described = describe_clusters(self.corpus, clusters, k, terms=self._terms())
        counts = self.corpus.manifest.counts
        scores = score_clusters(truth, clusters, k)
        found = {name: row for kind in self.done.baselines.values() for name, row in kind.items()}
        return {
            "method": self.config.method,
            "seed": self.config.seed,
            "n_documents": self.corpus.n_rows,
            "n_clusters": k,
            "n_features": self.corpus.n_features,
            **scores,
            "scored": int((truth >= 0).sum()),
            "unlabelled": counts.get("unlabelled", 0),
            "multi_labelled": counts.get("multi_labelled", 0),
            "empty": counts.get("empty", 0),
            "classes": len(self.corpus.manifest.classes),
            "baselines": found,
            "clusters": [c.as_dict() for c in described],
            "ambiguous": self.assignment.manifest["ambiguous"],
            "seconds": dict(self.done.seconds),
            "fitted_on": fitted_on(self.config, self.corpus) if self.by_estimator else self.corpus.n_rows,
            "global_steps": self.outcome.global_steps if self.outcome is not None else 0,
            "checkpoint": stored_path(self.outcome.checkpoint, self.folder)
            if self.outcome is not None
            else None,
            "assignments": ASSIGNMENTS,
            "model": None if self.by_estimator else MODEL,
            "corpus": stored_path(str(self.corpus_root), self.folder),
            "mlflow_run_id": None,
            "model_uri": None,
            "how_to_open": None,
        }

    def _terms(self) -> tuple[str, ...] | None:
        """Names of the columns, where they are words."""
        content = self.corpus.read_file(VOCABULARY_FILE)
        if content is None:
            return None
        # a vocabulary is read from a file, and the corpus may lie behind a URL
        copy = self.folder / f".{VOCABULARY_FILE}"
        try:
            copy.write_bytes(content)
            vocabulary = Vocabulary.load(copy)
        finally:
            copy.unlink(missing_ok=True)
        return vocabulary.terms if vocabulary.of == "words" else None

    def finish(self, summary: dict[str, Any], tracker: Tracker | None) -> dict[str, Any]:
        """MLflow gets figures, model and summary; then the run is over."""
        if tracker is not None:
            self.listener.stage("mlflow")
            with self.done.timed("mlflow"):
                if not self.by_estimator:
                    summary["model_uri"] = self._log_model(tracker)
            summary |= {"mlflow_run_id": tracker.run_id, "how_to_open": tracker.how_to_open}
            summary["seconds"] = dict(self.done.seconds)
            tracker.log_final(final_metrics(summary))
        write_json(self.folder / SUMMARY, summary)
        if tracker is not None:
            tracker.log_artifacts(self.folder / SUMMARY)
            if (self.folder / PICTURES).exists():
                tracker.log_artifacts(self.folder / PICTURES, PICTURES)
            tracker.finish("FINISHED")
        self.done.content["finished"] = True
        self.done.save()
        return summary

    def _log_model(self, tracker: Tracker) -> str | None:
        if "model_uri" not in self.done.content:
            from distclust.results.served_model import save_served_model  # loads MLflow, which takes seconds

            served = self.folder / "served-model"
            shutil.rmtree(served, ignore_errors=True)
            save_served_model(self.model, served)
            tracking = self.config.tracking
            uri = tracker.log_model(served, register_as=tracking.register_as, alias=tracking.alias)
            if uri is None:  # the server is away; the spool has the model, and another start tries again
                return None
            self.done.content["model_uri"] = uri
            shutil.rmtree(served, ignore_errors=True)
        return str(self.done.content["model_uri"])


# ---- pieces


def final_metrics(summary: dict[str, Any]) -> dict[str, float]:
    """The closing figures that MLflow gets: scores, scores of the baselines, seconds, sizes."""
    metrics: dict[str, float] = {
        "largest_cluster": max(c["share"] for c in summary["clusters"]),
        "clusters_used": float(sum(c["size"] > 0 for c in summary["clusters"])),
        "documents": float(summary["n_documents"]),
        "scored": float(summary["scored"]),
    }
    for prefix, row in {
        "": summary,
        **{f"baseline/{n}/": b for n, b in summary["baselines"].items()},
    }.items():
        for key in SCORE_NAMES:
            if row[key] is not None:
                metrics[f"{prefix}{key}"] = row[key]
    return metrics | {f"seconds/{part}": seconds for part, seconds in summary["seconds"].items()}
