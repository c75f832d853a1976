"""The cells of a table: what is to be run, where it lies, and what there is of it on disk."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from distclust.config import RunConfig, from_dict, to_dict
from distclust.corpus.sources import SourceConfig
from distclust.corpus.vocabulary import VocabularyConfig
from distclust.errors import ConfigError
from distclust.results.agreement import Agreement
from distclust.run_folder import SUMMARY, is_finished, read_json, stored_config
from distclust.training.differences import differences
from jobs._tables import Row, Section, Table, cell_config, cell_name, what_is_missing

MACHINE = "machine.json"
FAILED = "failed.json"
_SHOWN = (
    *("nmi_geometric", "nmi_arithmetic", "ari", "acc", "baselines"),
    *("seconds", "n_documents", "scored", "n_clusters"),
)
"""What a table shows of a summary."""
# of a run's settings, those that do not change what it finds
_FREE = ("checkpoint", "cluster", "tracking")


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One run: a row under a protocol with one seed."""

    config: RunConfig
    folder: Path
    corpus: Path
    seed: int
    documents: RunConfig | None = None
    """Where the rows are singular directions: the run on the documents that they are made of."""


@dataclass(slots=True, kw_only=True)
class Line:
    """A row of a table, with what its cells have come to."""

    section: Section
    row: Row
    cells: list[Cell] = field(default_factory=list)
    missing: str | None = None
    """Why this version cannot run the row, or what is wrong with its recipe."""
    wrong: bool = False
    """Whether that is for the table's writer to mend."""
    summaries: dict[int, dict[str, Any]] = field(default_factory=dict)
    """summary.json by seed, of finished cells."""
    failures: dict[int, str] = field(default_factory=dict)
    """Reasons by seed."""
    machines: set[str] = field(default_factory=set)
    """Date and machine of the finished cells."""
    agreement: Agreement | None = None
    """Between the clusters of the finished seeds, where there are two or more."""


def plan(table: Table, protocol: str, seeds: int, runs: Path) -> list[Line]:
    """Every row with its cells; nothing is read or run."""
    lines = []
    for section, row in table.rows():
        line = Line(section=section, row=row)
        lines.append(line)
        if row.baseline_of is not None:
            continue
        try:
            line.missing = what_is_missing(table, section, row, protocol)
            if line.missing is not None:
                continue
            configs = [cell_config(table, section, row, protocol, seed) for seed in range(seeds)]
        except ConfigError as error:
            line.missing, line.wrong = str(error), True
            continue
        for seed, config in enumerate(configs):
            documents = None
            if section.lsa is not None:
                documents, config = config, _on_directions(config, section.lsa, runs)
            folder = runs / table.name / f"{protocol}-{cell_name(section, row)}-{seed}"
            corpus = corpus_folder(config, runs)
            cell = Cell(config=config, folder=folder, corpus=corpus, seed=seed, documents=documents)
            line.cells.append(cell)
    return lines


def corpus_folder(config: RunConfig, runs: Path) -> Path:
    """Where the documents are prepared: one folder for each source, vocabulary and way of cutting."""
    whole = to_dict(config)
    parts = json.dumps([whole[key] for key in ("source", "vocabulary", "shards")], sort_keys=True)
    return runs / "corpora" / f"{config.source.name}-{hashlib.sha256(parts.encode()).hexdigest()[:10]}"


def _on_directions(config: RunConfig, directions: int, runs: Path) -> RunConfig:
    """The same run on rows that `paper_tables.prepare_cell` writes."""
    folder = corpus_folder(config, runs)
    source = SourceConfig(name="files", files=(str(folder.with_name(f"{folder.name}-lsa{directions}.npz")),))
    return replace(config, source=source, vocabulary=VocabularyConfig(scale=1.0))


def read_cells(lines: Sequence[Line]) -> None:
    """Take in what is on disk: finished cells, and why others failed or cannot be taken."""
    for line in lines:
        line.summaries, line.failures, line.machines = {}, {}, set()
        for cell in line.cells:
            try:
                summary, machine = read_cell(cell)
                unlike = finished_unlike(cell) if summary else ""
                if unlike:
                    line.failures[cell.seed] = unlike
                elif summary:
                    line.summaries[cell.seed] = summary
                    line.machines.add(machine)
                elif machine:
                    line.failures[cell.seed] = (
                        f"finished, and its {SUMMARY} is gone; run it: that alone is made"
                    )
                elif (cell.folder / FAILED).exists():
                    line.failures[cell.seed] = read_json(cell.folder / FAILED).get("reason", "not said why")
            except ConfigError as error:
                line.failures[cell.seed] = str(error)
    by_label = {(line.section.title, line.row.label): line for line in lines}
    for line in lines:
        origin = line.row.baseline_of
        if origin is None:
            continue
        whole = by_label[line.section.title, origin.row]
        for seed, summary in whole.summaries.items():
            if origin.baseline in summary["baselines"]:
                line.summaries[seed] = {**summary["baselines"][origin.baseline], "seconds": {}}
            else:
                line.failures[seed] = f"the runs of {origin.row} have no baseline {origin.baseline!r}"


def read_cell(cell: Cell) -> tuple[dict[str, Any], str]:
    """summary.json and the machine of a finished cell; an empty summary where something is left to be run,
    and no machine where that is more than the summary.

    Raises:
        ConfigError: a file of the cell is damaged.
    """
    remedy = f"move {cell.folder} away, and the cell is run again"
    try:
        if not is_finished(cell.folder):
            return {}, ""
        remedy = "remove that file: a summary is made anew, a machine is then not known"
        machine = read_json(cell.folder / MACHINE).get("words", "machine not known")
        summary = read_json(cell.folder / SUMMARY)
        lacking = [name for name in _SHOWN if summary and name not in summary]
        if lacking:
            raise ConfigError(f"{cell.folder / SUMMARY} has no {', '.join(lacking)}")
        return summary, machine
    except ConfigError as error:
        raise ConfigError(f"{error}. Of a table: {remedy}") from error


def finished_unlike(cell: Cell) -> str:
    """How a finished cell was run otherwise than it is asked for now; empty where it was not."""
    found = "; ".join(_unlike(cell))
    return found and f"finished with other settings ({found}); move {cell.folder} away to run it again"


def _unlike(cell: Cell) -> list[str]:
    try:
        stored = to_dict(
            from_dict(stored_config(cell.folder))
        )  # fields that are newer than the run get defaults
    except ConfigError as error:
        return [str(error)]
    asked = to_dict(cell.config)
    free = {key: asked[key] for key in _FREE}
    return [line.replace("in the checkpoint", "there") for line in differences(stored | free, asked)]
