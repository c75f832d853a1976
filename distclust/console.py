"""What a job says on a terminal: progress, tables, errors.

Used by the command line and by the jobs of a cluster. Tables go to the standard output; progress, warnings
and errors to the standard error.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.logging import RichHandler
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from distclust.errors import ConfigError, DataError, DistclustError

if TYPE_CHECKING:
    from distclust.results.agreement import Agreement
    from distclust.run import Listener

out = Console(highlight=False)
err = Console(stderr=True, highlight=False)

STAGES = {
    "prepare": "documents to rows",
    "train": "training",
    "assign": "assigning documents",
    "baselines": "baselines",
    "report": "report",
    "mlflow": "MLflow",
}
"""What the parts of a job are called."""


# ---- errors


@contextmanager
def reporting_errors(debug: bool = False) -> Iterator[None]:
    """Errors as one paragraph on the standard error, and an exit code by `SystemExit`.

    The code is 2 for a configuration or documents that cannot be used, 1 for any other error, 130 for Ctrl-C.
    Warnings of the package are printed too; with `debug` all its messages, and errors keep their trace.
    """
    handler = RichHandler(
        console=err, show_time=False, show_path=False, show_level=False, markup=False, highlighter=None
    )
    handler.setFormatter(logging.Formatter("%(message)s"))
    ours = logging.getLogger("distclust")
    level = ours.level
    ours.setLevel(logging.DEBUG if debug else logging.WARNING)
    ours.addHandler(handler)
    if not debug:
        _quieten_libraries()
    try:
        yield
    except KeyboardInterrupt:
        err.print("interrupted; the same command goes on where it was", soft_wrap=True)
        raise SystemExit(130) from None
    except Exception as error:
        if debug:
            raise
        print_error(error)
        raise SystemExit(exit_code(error)) from None
    finally:
        ours.removeHandler(handler)
        ours.setLevel(level)


def exit_code(error: Exception) -> int:
    """2 for what the user gave, 1 for what happened."""
    return 2 if isinstance(error, ConfigError | DataError) else 1


def print_error(error: Exception) -> None:
    """The error in one paragraph."""
    words = " ".join(str(error).split())
    if not isinstance(error, DistclustError):
        words = f"{type(error).__name__}: {words}. This should not happen; --debug shows where it did"
    err.print(Text.assemble(("error: ", "bold red"), words), soft_wrap=True)


def _quieten_libraries() -> None:
    """Libraries that greet on the standard error speak up only when something is wrong."""
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
    for name in ("ray.data", "ray.data._internal.progress", "alembic"):
        logging.getLogger(name).setLevel(logging.ERROR)


# ---- progress


@contextmanager
def display() -> Iterator[Listener]:
    """A progress display on the standard error: bars on a terminal, elsewhere a line for each stage and
    phase."""
    listener = _bars() if err.is_terminal else _lines()
    with listener as told:
        yield told


@contextmanager
def _lines() -> Iterator[Listener]:
    from distclust.run import Listener

    class Lines(Listener):
        said = ""

        def stage(self, name: str) -> None:
            self._say(STAGES.get(name, name))

        def advance(self, done: int, total: int, note: str = "") -> None:
            if note:
                self._say(f"  {note.split(',')[0]}")  # without what changes with each step

        def _say(self, line: str) -> None:
            if line != self.said:
                self.said = line
                err.print(line, soft_wrap=True, markup=False)

    yield Lines()


@contextmanager
def _bars() -> Iterator[Listener]:
    from distclust.run import Listener

    progress = Progress(
        TextColumn("{task.description:<19}"),
        BarColumn(bar_width=20),
        TextColumn("{task.percentage:>3.0f} %"),
        TimeElapsedColumn(),
        TextColumn("{task.fields[note]}", markup=False),
        console=err,
    )

    class Bars(Listener):
        task: TaskID | None = None

        def stage(self, name: str) -> None:
            self.end()
            self.task = progress.add_task(STAGES.get(name, name), total=None, note="")

        def advance(self, done: int, total: int, note: str = "") -> None:
            if self.task is not None:
                progress.update(self.task, completed=done, total=max(total, 1), note=note)

        def end(self) -> None:
            if self.task is not None:
                progress.update(self.task, total=1, completed=1, note="")
                progress.stop_task(self.task)

    bars = Bars()
    with progress:
        yield bars
        bars.end()


# ---- results


def print_summary(summary: dict[str, Any], folder: Path) -> None:
    """The tables of a run, and where its things are.

    Args:
        summary: the contents of summary.json.
        folder: the run folder.
    """
    from distclust.results.report import SCORE_NAMES, ClusterSummary, cluster_table, score_table

    clusters = [ClusterSummary(**{**c, "terms": tuple(c["terms"])}) for c in summary["clusters"]]
    out.print()
    out.print(cluster_table(clusters, width=out.width))
    out.print()
    if empty := [c.cluster for c in clusters if not c.size]:
        out.print(
            f"{len(empty)} of {len(clusters)} clusters have no document: ask for fewer clusters. Where "
            "usage/used in the log falls during joint training, smaller steps keep them "
            "(phases.joint.optimizer.learning_rate), or a row with a usage prior (`distclust methods`).",
            soft_wrap=True,
        )
    if summary["scored"]:
        name = f"{summary['method']}, seed {summary['seed']}"
        out.print(score_table(name, {key: summary[key] for key in SCORE_NAMES}, summary["baselines"]))
    else:
        out.print("No document has exactly one label, so nothing is scored.")
    out.print(scored_line(summary), soft_wrap=True)
    out.print()
    places = {"summary": "summary.json", **{key: summary[key] for key in ("assignments", "model")}}
    for what, place in places.items():
        if place is None:  # an estimator keeps no model
            continue
        out.print(f"{what:<12} {folder / place}", soft_wrap=True, markup=False)
    if summary["how_to_open"]:
        out.print(f"{'MLflow':<12} {summary['how_to_open']}", soft_wrap=True, markup=False)


def print_agreement(found: Agreement, names: list[str], as_json: bool) -> None:
    """How far the runs of these names agree, each with the others, and the one that agrees most."""
    nearest = names[found.nearest]
    if as_json:
        pairs = {
            name: dict(zip(names, row, strict=True))
            for name, row in zip(names, found.pairs.tolist(), strict=True)
        }
        used = dict(zip(names, found.used.tolist(), strict=True))
        said = {"agreement": found.mean, "nearest": nearest, "clusters_used": used, "pairs": pairs}
        out.print(json.dumps(said, indent=1), soft_wrap=True, markup=False)
        return
    for name, value, used in zip(names, found.of_each, found.used, strict=True):
        alone = "" if used > 1 else "  (all documents in one cluster: agrees with nobody)"
        out.print(f"{value:.3f}  {name}{alone}", soft_wrap=True, markup=False)
    out.print(f"{found.mean:.3f}  on average: NMI (arithmetic) of every two of the {len(names)}")
    if len(names) > 2:  # two agree with each other equally
        out.print(f"{nearest} agrees most with the others.", soft_wrap=True, markup=False)


# ---- the table of methods


def print_methods(table: dict[str, list[dict[str, Any]]], brief: bool = False) -> None:
    """The whole table.

    Args:
        table: what `mixture.taxonomy.table_data` gives.
        brief: one line a row.
    """
    headings = {
        "methods": "Mixture methods: trained by phases, from a recipe's method=NAME",
        "estimators": "scikit-learn's (kind: estimator): fitted in one process, no model is kept",
        "missing": "Not in the table",
    }
    for part, heading in headings.items():
        out.print(Text(heading, style="bold underline"))
        if not brief:
            out.print()
        if part == "missing" and not brief:
            out.print(_pairs({r["name"]: f"{r['kind']}: {r['reason']} ({r['paper']})" for r in table[part]}))
            continue
        for row in table[part]:
            print_method(row, brief, whole=False)
        if brief:
            out.print()


def print_method(row: dict[str, Any], brief: bool = False, *, whole: bool = True) -> None:
    """One row, or one method that has none.

    Args:
        row: what `mixture.taxonomy.row_data` gives, or a `Missing` as plain data.
        brief: in one line.
        whole: with all its settings, and each phase in full.
    """
    said = row.get("summary") or f"{row['kind']}: {row['reason']}"
    if brief or "slots" not in row:
        source = "" if brief or "slots" in row else f" ({row['paper']})"
        out.print(Text.assemble((f"{row['name']:<18}", "bold"), f" {said}{source}"), soft_wrap=brief)
        return
    lines: dict[str, str] = {slot: str(value) for slot, value in row["slots"].items()}
    if not whole:
        epochs = ((phase["name"], phase.get("epochs")) for phase in row["phases"])
        lines["phases (epochs)"] = ", ".join(f"{name} ({n})" if n else name for name, n in epochs)
    lines["paper"] = row["paper"]
    lines |= {key.replace("non_", "non-").replace("_", " "): value for key, value in row["taxonomy"].items()}
    out.print(Text.assemble((row["name"], "bold"), f"  {said}"))
    out.print(_pairs(lines))
    if whole:
        for phase in row["phases"]:
            out.print(Text(f"phase {phase['name']}", style="bold"))
            out.print(_pairs({key: _plain(v) for key, v in phase.items() if _says_something(phase, key)}))
        out.print(Text("settings", style="bold"))
        out.print(_pairs({key: _plain(value) for key, value in row["settings"].items()}))
    out.print()


def _pairs(lines: dict[str, str]) -> Table:
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 1))
    table.add_column(no_wrap=True, style="dim")
    table.add_column(overflow="fold")
    for name, value in lines.items():
        table.add_row(f"  {name}", Text(value))
    return table


def _says_something(phase: dict[str, Any], key: str) -> bool:
    """Whether a phase makes use of this field."""
    if key == "name" or (key == "optimizer" and not phase["trains"]):
        return False
    if key.startswith("anneal"):
        return bool(phase["anneal"] != "none")
    if key == "tau_factor":
        return bool(phase[key] != 1.0)
    return key == "epochs" or bool(phase[key])


def _plain(value: Any) -> str:
    """A setting in words."""
    if isinstance(value, dict):
        return ", ".join(f"{key} {_plain(inner)}" for key, inner in value.items())
    if isinstance(value, tuple | list):
        items = (" x ".join(map(_plain, v)) if isinstance(v, tuple | list) else _plain(v) for v in value)
        return ", ".join(items) or "-"
    return "-" if value is None or value == "" else f"{value:.6g}" if isinstance(value, float) else str(value)


# ---- small words


def scored_line(found: dict[str, Any]) -> str:
    """How many documents were scored, and why the others were not."""
    documents = found.get("n_documents", found.get("documents"))
    return (
        f"{found['scored']:,} of {documents:,} documents scored ({found['unlabelled']:,} without a label, "
        f"{found['multi_labelled']:,} with several)."
    )


def duration(seconds: float) -> str:
    """Minutes and seconds."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
