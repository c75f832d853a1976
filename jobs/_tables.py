"""What a table of results is: a YAML file of `jobs/tables/`, read into `Table`; its cells, and what there is
of them.

A cell is one row of the table under one protocol with one seed. Its recipe is put together from general to
particular, later ones winning: the table's ``recipe``, the protocol's, the section's, the section's for the
protocol, the protocol's ``epochs``, the row's ``recipe``, the row's for the protocol.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any, Literal

from distclust.config import RunConfig, from_dict, read_recipe, resolve, to_dict
from distclust.corpus.named import NAMED_SETS
from distclust.corpus.sources import SourceConfig
from distclust.corpus.vocabulary import VocabularyConfig
from distclust.errors import ConfigError, nearest
from distclust.mixture.catalogue import ESTIMATORS
from distclust.mixture.methods import METHODS
from distclust.results.agreement import Agreement
from distclust.run_folder import SUMMARY, is_finished, read_json, stored_config
from distclust.training.differences import differences

PROTOCOLS = ("cpu", "paper")
OTHER_PHASES = "*"
TRIALS = "trials"
MACHINE = "machine.json"
FAILED = "failed.json"
# of a run's settings, those that do not change what it finds
_FREE = ("checkpoint", "cluster", "tracking")
Recipe = Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Published:
    """Figures of a paper, as fractions; shown only under protocols whose documents and settings are its."""

    nmi: float | None = None
    ari: float | None = None
    acc: float | None = None
    protocols: tuple[str, ...] = ("paper",)


@dataclass(frozen=True, slots=True, kw_only=True)
class BaselineOf:
    """A row without runs of its own: a baseline that the runs of another row made on the way."""

    row: str
    """The other row's label, in the same section."""
    baseline: str
    """A name of ``baselines`` in its summary.json."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One method in a table."""

    label: str
    method: str | None = None
    """A row of `distclust methods`."""
    recipe: Recipe = field(default_factory=dict)
    per_protocol: Mapping[str, Recipe] = field(default_factory=dict)
    published: Published | None = None
    hours: Mapping[str, float] = field(default_factory=dict)
    """About how long one seed takes, by protocol."""
    baseline_of: BaselineOf | None = None
    paired_with: str | None = None
    """Reference of the paired differences, in place of the table's."""
    gpus: int | None = None
    """In place of the protocol's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """Rows on the same documents."""

    title: str = ""
    words: str = ""
    recipe: Recipe = field(default_factory=dict)
    per_protocol: Mapping[str, Recipe] = field(default_factory=dict)
    lsa: int | None = None
    """The rows are so many singular directions of the documents (LSA), each row of length 1: dense rows for
    methods that want them. The directions are found once, with seed 0."""
    rows: tuple[Row, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Protocol:
    """How long and on what the rows are trained."""

    words: str
    hours_from: str
    """Where the rows' hours come from: a measurement or an estimate, and how."""
    recipe: Recipe = field(default_factory=dict)
    epochs: Mapping[str, int] = field(default_factory=dict)
    """Epochs by phase, where a row has such a phase and trains in it; ``*`` is for all other phases."""
    gpus: int = 0
    """GPUs that a cell asks for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """A table of results."""

    name: str
    title: str
    words: str
    """On the data."""
    recipe: Recipe
    protocols: Mapping[str, Protocol]
    seeds: int = 5
    published_nmi: Literal["geometric", "arithmetic"] | None = None
    """Which NMI the published figures are; without it the table has no columns for them."""
    published_digits: int = 3
    published_from: str = ""
    data_by_seed: bool = False
    """Whether the documents are made anew from each seed (``source.seed``)."""
    paired_with: str | None = None
    """A row's label or a baseline's name; every row's differences to it on the same seeds are listed."""
    agreement: bool = False
    """Whether a column says how far the seeds of a row agree, which takes no label."""
    sections: tuple[Section, ...]

    def __post_init__(self) -> None:
        if self.agreement and self.data_by_seed:
            raise ValueError("agreement compares runs on the same documents, and data_by_seed makes others")
        if set(self.protocols) != set(PROTOCOLS):
            raise ValueError(f"protocols are {sorted(self.protocols)}; expected {' and '.join(PROTOCOLS)}")
        slugs: set[str] = set()
        for section, row in self.rows():
            where = f"row {row.label!r}"
            labels = [r.label for r in section.rows if r.method]
            if (row.method is None) == (row.baseline_of is None):
                raise ValueError(f"{where} needs a method or baseline_of, and not both")
            if row.baseline_of is not None and row.baseline_of.row not in labels:
                name = row.baseline_of.row
                raise ValueError(f"{where}: baseline_of.row is {name!r}{nearest(name, labels)}")
            named = [*section.per_protocol, *row.per_protocol, *row.hours]
            for name in (*named, *(row.published.protocols if row.published else ())):
                if name not in PROTOCOLS:
                    raise ValueError(f"{where}: protocol {name!r}{nearest(name, PROTOCOLS)}")
            place = cell_name(section, row)
            if place in slugs:
                raise ValueError(f"{where}: another row's runs have the name {place!r} too; rename one")
            slugs.add(place)

    def rows(self) -> Iterator[tuple[Section, Row]]:
        """All rows with their sections, in order."""
        for section in self.sections:
            for row in section.rows:
                yield section, row


# ---- files


def table_names() -> list[str]:
    """The packaged tables, without the trials beside them."""
    return _packaged(resources.files("jobs") / "tables")


def trial_names() -> list[str]:
    """The packaged trials: ``trials/NAME`` has what was tried beside a table, on its documents."""
    return [f"{TRIALS}/{name}" for name in _packaged(resources.files("jobs") / "tables" / TRIALS)]


def _packaged(folder: Traversable) -> list[str]:
    return sorted(f.name.removesuffix(".yaml") for f in folder.iterdir() if f.name.endswith(".yaml"))


def load_table(table: str) -> Table:
    """A table by its packaged name, or by the path of a YAML file.

    A file with ``like: TABLE`` has its own title, words and rows, and everything else from that table.

    Raises:
        ConfigError: there is none, or it has an unknown key (the nearest is named) or a wrong value.
    """
    path = Path(table)
    by_path = path.suffix in (".yaml", ".yml")
    data = read_recipe(path) if by_path else _read_packaged(table)
    if "like" in data:
        other = _read_packaged(str(data.pop("like")))
        if "like" in other:
            raise ConfigError(f"table {table} is like one that is itself like {other['like']}; name that one")
        missing = [key for key in ("title", "words") if key not in data]
        if missing:
            raise ConfigError(f"table {table} is like another; give it {' and '.join(missing)} of its own")
        general = {key: value for key, value in other.items() if key not in ("rows", "sections")}
        data = merge_recipes(general, data)
    return _parse({"name": path.stem if by_path else table, **data})


def _read_packaged(name: str) -> dict[str, Any]:
    names = [*table_names(), *trial_names()]
    if name not in names:
        raise ConfigError(f"no table {name!r}{nearest(name, names)}")
    with resources.as_file(resources.files("jobs").joinpath("tables", *f"{name}.yaml".split("/"))) as file:
        return read_recipe(file)


def _parse(data: dict[str, Any]) -> Table:
    import pydantic

    name = data["name"]
    if "rows" in data:  # one section, which needs no name
        if "sections" in data:
            raise ConfigError(f"table {name} has both rows and sections; expected one of them")
        data["sections"] = [{"rows": data.pop("rows")}]
    try:
        _check_keys(Table, data, f"table {name}")
        return pydantic.TypeAdapter(Table).validate_python(data)
    except pydantic.ValidationError as error:
        found = [f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()]
        raise ConfigError(f"table {name}: " + "; ".join(found)) from error


_PARTS: dict[type, dict[str, type]] = {
    Table: {"sections": Section, "protocols": Protocol},
    Section: {"rows": Row},
    Row: {"published": Published, "baseline_of": BaselineOf},
}


def _check_keys(cls: type, data: Any, where: str) -> None:
    """Refuse keys that the dataclass does not have, all the way down to the recipes."""
    if not isinstance(data, Mapping):
        raise ConfigError(f"{where} is {data!r}; expected keys and values")
    known = [f.name for f in fields(cls)]
    for key, value in data.items():
        if key not in known:
            raise ConfigError(f"{where}: unknown key {key!r}{nearest(str(key), known)}")
        part = _PARTS.get(cls, {}).get(key)
        if part is None or value is None:
            continue
        if isinstance(value, list):
            for number, item in enumerate(value):
                label = item.get("label") or item.get("title") if isinstance(item, Mapping) else None
                _check_keys(part, item, f"{where}, {key} {label or number + 1}")
        elif part is Protocol and isinstance(value, Mapping):
            for name, item in value.items():
                _check_keys(part, item, f"{where}, protocol {name}")
        else:
            _check_keys(part, value, f"{where}.{key}")


# ---- the recipe of a cell


def slug(text: str) -> str:
    """The text as part of a file's name."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def cell_name(section: Section, row: Row) -> str:
    """What the row's run folders are called, before protocol and seed."""
    return "-".join(part for part in (slug(section.title), slug(row.label)) if part)


def what_is_missing(table: Table, section: Section, row: Row, protocol: str) -> str | None:
    """Why the row cannot be run by this version at all; None where it can."""
    if row.method is not None and row.method not in (*METHODS, *ESTIMATORS):
        return f"no method {row.method!r} yet"
    name = merge_recipes(*_layers(table, section, row, protocol)).get("source", {}).get("name", "builtin")
    return None if name in (*NAMED_SETS, "files") else f"no data set {name!r} yet"


def cell_config(table: Table, section: Section, row: Row, protocol: str, seed: int) -> RunConfig:
    """The run of one cell, resolved; tracked under the table's name.

    Raises:
        ConfigError: the recipe is wrong; the table and the row are named.
    """
    assert row.method is not None
    gpus = table.protocols[protocol].gpus if row.gpus is None else row.gpus
    tracked = {
        "cluster": {"workers": 0, "gpus_per_worker": gpus},
        "tracking": {"experiment": table.name},
        "checkpoint": {"every_steps": 2000, "keep": 1},  # cells are many and short
    }
    drawn: Recipe = {"source": {"seed": seed}} if table.data_by_seed else {}
    recipe = merge_recipes(tracked, drawn, *_layers(table, section, row, protocol))
    if row.method in ESTIMATORS:  # what is common to the networks of the table is nothing to them
        recipe = {key: value for key, value in recipe.items() if key not in ("model", "phases")}
    try:
        return resolve(recipe | {"method": row.method, "seed": seed})
    except (ConfigError, ValueError) as error:
        raise ConfigError(f"table {table.name}, row {row.label!r}, protocol {protocol}: {error}") from error


def _layers(table: Table, section: Section, row: Row, protocol: str) -> list[Recipe]:
    general = table.protocols[protocol]
    method = METHODS.get(row.method or "")  # scikit-learn's estimators have no phases with epochs
    epochs = {
        phase.name: {"epochs": general.epochs.get(phase.name, general.epochs.get(OTHER_PHASES))}
        for phase in (method.phases if method else ())
        if phase.epochs and (phase.name in general.epochs or OTHER_PHASES in general.epochs)
    }
    return [
        table.recipe,
        general.recipe,
        section.recipe,
        section.per_protocol.get(protocol, {}),
        {"phases": epochs} if epochs else {},
        row.recipe,
        row.per_protocol.get(protocol, {}),
    ]


def merge_recipes(*recipes: Recipe) -> dict[str, Any]:
    """Recipes laid over each other, key by key; a list or a number replaces the one below."""
    merged: dict[str, Any] = {}
    for recipe in recipes:
        for key, value in recipe.items():
            below = merged.get(key)
            if isinstance(value, Mapping) and isinstance(below, Mapping):
                value = merge_recipes(below, value)
            merged[key] = value
    return merged


# ---- cells on disk


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
        line.missing = what_is_missing(table, section, row, protocol)
        if line.missing is not None:
            continue
        for seed in range(seeds):
            try:
                config = cell_config(table, section, row, protocol, seed)
            except ConfigError as error:
                line.missing, line.cells = str(error), []
                break
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
            if is_finished(cell.folder):
                unlike = _unlike(cell)
                if unlike:
                    line.failures[cell.seed] = (
                        f"finished with other settings ({'; '.join(unlike)}); "
                        f"move {cell.folder} away to run it again"
                    )
                    continue
                line.summaries[cell.seed] = read_json(cell.folder / SUMMARY)
                line.machines.add(read_json(cell.folder / MACHINE).get("words", "machine not known"))
            elif (cell.folder / FAILED).exists():
                line.failures[cell.seed] = read_json(cell.folder / FAILED)["reason"]
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


def _unlike(cell: Cell) -> list[str]:
    """Where a finished cell was run otherwise than it is asked for now."""
    try:
        stored = to_dict(
            from_dict(stored_config(cell.folder))
        )  # fields that are newer than the run get defaults
    except ConfigError as error:
        return [str(error)]
    asked = to_dict(cell.config)
    free = {key: asked[key] for key in _FREE}
    return [line.replace("in the checkpoint", "there") for line in differences(stored | free, asked)]
