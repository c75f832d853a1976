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
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distclust.config import ClusterConfig, RunConfig, to_dict
from distclust.corpus.cache import is_url
from distclust.corpus.prepare import prepare, prepare_local
from distclust.corpus.shards import Corpus, Manifest
from distclust.corpus.sources import SourceConfig
from distclust.corpus.vocabulary import VOCABULARY_FILE, Vocabulary
from distclust.errors import DataError
from distclust.mixture.model import MixtureModel
from distclust.preflight import check_distinct, check_prepared, check_tracking
from distclust.results.assign import AssignConfig, assign_corpus, assign_documents
from distclust.results.assignment import Assignment
from distclust.results.baselines import code_baselines, corpus_baselines
from distclust.results.evaluate import class_numbers, evaluate, score_clusters
from distclust.results.from_checkpoint import encode_corpus, export_checkpoint, load_model, predict_corpus
from distclust.results.predict import MODEL_FILE
from distclust.results.report import SCORE_NAMES, describe_clusters
from distclust.run_folder import (
    DONE,
    SUMMARY,
    Done,
    check_same_data,
    check_same_run,
    hold,
    read_json,
    remember_run,
    write_json,
)
from distclust.training.cluster import connect, run_training
from distclust.training.engine import Outcome
from distclust.training.tracking import Tracker

log = logging.getLogger(__name__)


class Listener:
    """Who is told how a job goes on; this one keeps it to itself."""

    def stage(self, name: str) -> None:
        """A part of the job begins."""

    def advance(self, done: int, total: int, note: str = "") -> None:
        """It went on."""


SILENT = Listener()

ASSIGNMENTS = "assignments"
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
    folder = Path(assignments)
    return evaluate(folder / ASSIGNMENTS if (folder / SUMMARY).exists() else folder, corpus)


def model_folder(path: str | Path) -> Path:
    """The model folder at `path`, or that of the run folder at `path`.

    Raises:
        DataError: there is none.
    """
    folder = Path(path)
    for place in (folder, folder / MODEL):
        if (place / MODEL_FILE).exists():
            return place
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
        baselines: whether the baselines are made; without any label they are left out.

    Returns:
        The contents of summary.json.

    Raises:
        ConfigError: the folder is held by another process, or holds another run.
        DataError: documents that cannot be used, or fewer distinct ones than clusters.
        DistclustError: whatever ends the training; see `training.cluster.run_training`.
    """
    folder, start = Path(run_dir), time.monotonic()
    with _terminating(), hold(folder):
        if check_same_run(folder, config) and is_finished(folder):
            log.info("%s is finished; nothing to do", folder)
            return read_json(folder / SUMMARY)
        with _ray(config.cluster), _terminating():  # once more: Ray puts handlers of its own in place
            job = _Job(config, folder, corpus_root, listener)
            job.done.add_seconds("start", time.monotonic() - start)
            return job.run(baselines)


def is_finished(run_dir: str | Path) -> bool:
    """Whether the run in the folder is over, in every part."""
    return bool(read_json(Path(run_dir) / DONE).get("finished"))


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
    outcome: Outcome
    assignment: Assignment

    def __init__(self, config: RunConfig, folder: Path, corpus_root: str | Path | None, listener: Listener):
        self.config, self.folder, self.listener = config, folder, listener
        self.corpus_root = corpus_root if corpus_root is not None else folder / "corpus"
        self.done = Done(folder / DONE)
        self.model = folder / MODEL

    def run(self, baselines: bool) -> dict[str, Any]:
        """Top to bottom."""
        check_tracking(self.config.tracking, self.folder)
        self.prepare()
        with self.track() as tracker:
            self.train(tracker)
            self.assign()
            truth = class_numbers(self.corpus)
            if baselines and (truth >= 0).any():
                self.make_baselines(truth)
            summary = self.summarise(truth)
            return self.finish(summary, tracker)

    # ---- documents to rows

    def prepare(self) -> None:
        """The corpus, and the checks that need it; from here on the folder belongs to this configuration."""
        self.listener.stage("prepare")
        with _timed(lambda s: self.done.add_seconds("prepare", s)):
            if is_url(str(self.corpus_root)):
                check_prepared(Manifest.load(self.corpus_root), self.config, str(self.corpus_root))
            else:
                prepare_run(self.config, self.corpus_root, listener=self.listener)
            self.corpus = Corpus.open(self.corpus_root)
        manifest = self.corpus.manifest
        data = {"corpus": manifest.fingerprint, "vocabulary": manifest.vocabulary_fingerprint}
        check_same_data(self.folder, data)
        check_distinct(self.corpus, self.config.clusters)
        remember_run(self.folder, self.config, data)
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
        watch = _PhaseWatch(self.config, self.done, self.listener)
        tracking = (tracker.uri, tracker.run_id) if tracker is not None else None
        try:
            with _timed(lambda s: self.done.add_seconds("train", s)):
                self.outcome = run_training(
                    self.config, self.corpus_root, self.folder, tracking=tracking, on_progress=watch
                )
        finally:
            watch.close()
            self.done.save()
        with self.done.timed("export"):
            export_checkpoint(self.outcome.checkpoint, self.config, self.corpus, self.model)

    # ---- a model to results

    def assign(self) -> None:
        """Every document's cluster."""
        self.listener.stage("assign")
        with self.done.timed("assign"):
            cluster = self.config.cluster
            self.assignment = assign_run(
                self.model,
                self.corpus_root,
                self.folder / ASSIGNMENTS,
                AssignConfig(workers=cluster.worker_range[1], gpus_per_worker=cluster.gpus_per_worker),
                listener=self.listener,
            )

    def make_baselines(self, truth: NDArray[np.int64]) -> None:
        """Scores of what simpler methods find in the same documents; made once, in whichever start."""
        self.listener.stage("baselines")
        k, seed = self.config.clusters, self.config.seed
        before = phase_before_joint(self.config)

        def rows() -> dict[str, NDArray[np.int64]]:
            return corpus_baselines(self.corpus, k, seed)

        def codes() -> dict[str, NDArray[np.int64]]:
            return code_baselines(encode_corpus(self._model_after("pretrain"), self.corpus), k, seed)

        def gate() -> dict[str, NDArray[np.int64]]:
            name = "gate after warm start" if before == "gate" else "before joint training"
            return {name: predict_corpus(self._model_after(before), self.corpus)}

        kinds = {"rows": rows, "codes": codes, "gate": gate}
        phases = self.outcome.phase_checkpoints
        if "pretrain" not in phases:
            del kinds["codes"]
        if before not in phases:
            del kinds["gate"]
        for place, (kind, make) in enumerate(kinds.items()):
            self.listener.advance(place, len(kinds), kind)
            if kind in self.done.baselines:
                continue
            with self.done.timed("baselines"):
                self.done.baselines[kind] = {n: score_clusters(truth, c, k) for n, c in make().items()}
        self.listener.advance(len(kinds), len(kinds))

    def _model_after(self, phase: str) -> MixtureModel:
        name = Path(self.outcome.phase_checkpoints[phase]).name  # the folder may have been moved since
        return load_model(f"{self.folder}/checkpoints/{name}", self.config, self.corpus)

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
            "global_steps": self.outcome.global_steps,
            "checkpoint": _relative(self.outcome.checkpoint, self.folder),
            "assignments": ASSIGNMENTS,
            "model": MODEL,
            "corpus": _relative(str(self.corpus_root), self.folder),
            "mlflow_run_id": None,
            "model_uri": None,
            "how_to_open": None,
        }

    def _terms(self) -> tuple[str, ...] | None:
        """Names of the columns, where they are words."""
        if self.corpus.read_file(VOCABULARY_FILE) is None:
            return None
        vocabulary = Vocabulary.load(self.model / VOCABULARY_FILE)
        return vocabulary.terms if vocabulary.of == "words" else None

    def finish(self, summary: dict[str, Any], tracker: Tracker | None) -> dict[str, Any]:
        """MLflow gets figures, model and summary; then the run is over."""
        if tracker is not None:
            self.listener.stage("mlflow")
            with self.done.timed("mlflow"):
                summary["model_uri"] = self._log_model(tracker)
            summary |= {"mlflow_run_id": tracker.run_id, "how_to_open": tracker.how_to_open}
            summary["seconds"] = dict(self.done.seconds)
            tracker.log_final(final_metrics(summary))
        write_json(self.folder / SUMMARY, summary)
        if tracker is not None:
            tracker.log_artifacts(self.folder / SUMMARY)
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


class _PhaseWatch:
    """Hears of the training's progress; measures each phase by this process' clock, and passes it on."""

    def __init__(self, config: RunConfig, done: Done, listener: Listener):
        self.done, self.listener = done, listener
        self.names = [phase.name for phase in config.phases]
        self.phase = -1
        self.since = time.monotonic()

    def __call__(self, progress: dict[str, Any]) -> None:
        if progress["state"] == "starting":
            self.listener.advance(0, progress["total_steps"], "starting")
            return
        self._turn_to(int(progress["phase_index"]))
        if progress["phase"]:
            loss, metrics = "", progress["metrics"]
            if "loss" in metrics:
                loss = f", loss {metrics['loss']:.4g}"
            epoch = f", epoch {min(progress['epoch'] + 1, progress['epochs'])}/{progress['epochs']}"
            note = progress["phase"] + (epoch if progress["epochs"] else "") + loss
        else:
            note = "trained"
        self.listener.advance(progress["global_step"], progress["total_steps"], note)

    def close(self) -> None:
        """The last phase that was heard of ends now."""
        self._turn_to(-1)

    def _turn_to(self, phase: int) -> None:
        if phase == self.phase:
            return
        now = time.monotonic()
        # until the first phase is heard of, workers are being started
        name = (
            "start workers"
            if self.phase < 0
            else self.names[self.phase]
            if self.phase < len(self.names)
            else "stop"
        )
        self.done.add_seconds(name, now - self.since)
        for skipped in self.names[max(self.phase, 0) : max(phase, 0)]:
            self.done.add_seconds(skipped, 0.0)  # done between two looks
        self.phase, self.since = phase, now


@contextmanager
def _timed(add: Callable[[float], None]) -> Iterator[None]:
    start = time.monotonic()
    try:
        yield
    finally:
        add(time.monotonic() - start)


def phase_before_joint(config: RunConfig) -> str:
    """The phase whose checkpoint the last phase starts from: its labels show what joint training adds."""
    return config.phases[-2].name if len(config.phases) > 1 else config.phases[-1].name


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


def _relative(path: str, folder: Path) -> str:
    """The path as seen from the run folder, where it lies in it."""
    try:
        return str(Path(path).absolute().relative_to(folder.absolute()))
    except ValueError:
        return path
