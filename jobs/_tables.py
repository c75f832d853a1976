"""What a table of results is: a YAML file of `jobs/tables/`, read into `Table`; the recipes of its cells.

A cell is one row of the table under one protocol with one seed. Its recipe is put together from general to
particular, later ones winning: the table's ``recipe``, the protocol's, the section's, the section's for the
protocol, the protocol's ``epochs``, the row's ``recipe``, the row's for the protocol.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any, Literal

from distclust.config import RunConfig, allow_named, read_recipe, resolve
from distclust.corpus.named import NAMED_SETS
from distclust.errors import ConfigError, near, nearest
from distclust.mixture.catalogue import ESTIMATORS, MISSING
from distclust.mixture.imports import is_import_path
from distclust.mixture.methods import METHODS, Method, find_method

PROTOCOLS = ("cpu", "paper")
OTHER_PHASES = "*"
TRIALS = "trials"
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
    """A row of `distclust methods`, or the import path of one's own."""
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
        if self.seeds < 1:
            raise ValueError(f"seeds is {self.seeds}; expected at least 1")
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

    A file with ``like: TABLE`` has its own title, words and rows, and everything else from that table. A file
    may import what its import paths name, as a recipe may.

    Raises:
        ConfigError: there is none, or it has an unknown key (the nearest is named) or a wrong value.
    """
    path = Path(table)
    by_path = path.suffix in (".yaml", ".yml")
    data = read_recipe(path) if by_path else _read_packaged(table)
    inherited: set[str] = set()
    if "like" in data:
        other = _read_packaged(str(data.pop("like")))
        if "like" in other:
            raise ConfigError(f"table {table} is like one that is itself like {other['like']}; name that one")
        missing = [key for key in ("title", "words") if key not in data]
        if missing:
            raise ConfigError(f"table {table} is like another; give it {' and '.join(missing)} of its own")
        general = {key: value for key, value in other.items() if key not in ("rows", "sections")}
        inherited = {name for protocol in other["protocols"].values() for name in protocol.get("epochs", ())}
        data = merge_recipes(general, data)
    parsed = _parse({"name": path.stem if by_path else table, **data})
    if by_path:
        for section, row in parsed.rows():
            for protocol in PROTOCOLS:
                recipe = merge_recipes(*_layers(parsed, section, row, protocol))
                allow_named(recipe | {"method": row.method})
    _check_epochs(parsed, inherited)
    return parsed


def _check_epochs(table: Table, inherited: set[str]) -> None:
    """Refuse epochs of a phase that no row has, unless they are for the rows of the table that it is like."""
    names = [row.method for _, row in table.rows() if row.method is not None and row.method not in ESTIMATORS]
    methods = [_with_phases(name) for name in names]
    known = {phase.name for method in methods if method for phase in method.phases}
    if None in methods or not known:  # a row whose phases nobody knows says why itself; or nothing is trained
        return
    for protocol, general in table.protocols.items():
        for name in general.epochs:
            if name not in (*known, *inherited, OTHER_PHASES):
                raise ConfigError(
                    f"table {table.name}, protocols.{protocol}.epochs: no row has a phase "
                    f"{name!r}{nearest(name, [*known, OTHER_PHASES])}"
                )


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
    """Why the row cannot be run by this version at all; None where it can.

    Raises:
        ConfigError: the method or the data set is misspelt: one of nearly that name is there.
    """
    known = (*METHODS, *ESTIMATORS)
    if row.method is not None and row.method not in known and not is_import_path(row.method):
        return _not_there("method", row.method, known)
    name = merge_recipes(*_layers(table, section, row, protocol)).get("source", {}).get("name", "builtin")
    sets = (*NAMED_SETS, "files")
    return None if name in sets else _not_there("data set", str(name), sets)


def _not_there(kind: str, name: str, known: Sequence[str]) -> str:
    outside = {key.lower(): row for key, row in MISSING.items()}.get(name.lower())
    if kind == "method" and outside is not None:
        return f"{outside.name} is no row: {outside.reason}"
    meant = near(name, known)
    if meant:
        raise ConfigError(f"there is no {kind} {name!r}{meant}")
    return f"no {kind} {name!r} yet"


def _with_phases(name: str | None) -> Method | None:
    """The row of that name; None for scikit-learn's, which have no phases, and for what is not there."""
    try:
        return find_method(name or "")
    except (KeyError, ValueError):
        return None


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
    method = _with_phases(row.method)
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
