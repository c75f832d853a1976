"""The run configuration: frozen, slotted dataclasses, parsed from YAML at the edge.

A recipe is a YAML file. It names a method, which brings its own settings and phases; what the recipe writes
under `model` and `phases` changes those. `load_recipe` resolves everything, so that a `RunConfig` says the
whole truth about a run.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import logging
import re
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import yaml

from distclust.corpus.cache import CacheConfig
from distclust.corpus.order import OrderConfig
from distclust.corpus.shards import ShardConfig
from distclust.corpus.sources import SourceConfig
from distclust.corpus.stream import StreamConfig
from distclust.corpus.vocabulary import VocabularyConfig
from distclust.errors import ConfigError, nearest
from distclust.mixture.catalogue import ESTIMATORS, MISSING, EstimatorConfig
from distclust.mixture.imports import allow_modules, is_import_path
from distclust.mixture.methods import METHODS, Method, ModelSettings, Phase, find_method
from distclust.mixture.precision import Precision

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class InitialiseConfig:
    """k-means on the codes, which starts the clusters."""

    sample: int = 262_144
    """Codes drawn evenly from the whole corpus; all of them when there are fewer."""
    restarts: int = 10
    """k-means++ starts, of which the best is kept."""
    iterations: int = 50
    """Lloyd iterations a start."""

    def __post_init__(self) -> None:
        for name in ("sample", "restarts", "iterations"):
            if getattr(self, name) < 1:
                raise ConfigError(f"initialise.{name} is {getattr(self, name)}; expected at least 1")


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointConfig:
    """How often the state is saved, and how much of it is kept."""

    every_steps: int = 200
    """Optimiser steps between two checkpoints; one more is written at the end of each phase."""
    keep: int = 2
    """Newest checkpoints that are kept, beside those at the end of a phase."""

    def __post_init__(self) -> None:
        for name in ("every_steps", "keep"):
            if getattr(self, name) < 1:
                raise ConfigError(f"checkpoint.{name} is {getattr(self, name)}; expected at least 1")


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterConfig:
    """Who does the work."""

    workers: int | tuple[int, int] = 1
    """DDP workers; 0 runs in this process without Ray; [least, most] lets Ray Train choose as nodes come and
    go."""
    cpus_per_worker: int = 1
    """CPUs that a worker reserves."""
    gpus_per_worker: int = 0
    """GPUs that a worker reserves; more than 0 means NCCL and training on the GPU."""
    memory_per_worker_gb: float | None = None
    """Memory in GB that a worker reserves; none when empty."""
    max_failures: int = 3
    """Times that a lost worker or node is replaced before the run fails."""
    start_timeout_s: float = 120.0
    """Seconds to wait for the asked resources before giving up."""

    def __post_init__(self) -> None:
        least, most = self.worker_range
        if least < 0 or most < least or (least == 0) != (most == 0):
            raise ConfigError(
                f"cluster.workers is {self.workers}; expected a number, or [least, most] with "
                "1 <= least <= most"
            )
        limits = {"cpus_per_worker": 1, "gpus_per_worker": 0, "max_failures": 0}
        for name, low in limits.items():
            if getattr(self, name) < low:
                raise ConfigError(f"cluster.{name} is {getattr(self, name)}; expected at least {low}")
        for name in ("memory_per_worker_gb", "start_timeout_s"):
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise ConfigError(f"cluster.{name} is {value}; expected a number above 0")

    @property
    def worker_range(self) -> tuple[int, int]:
        """The least and the most workers."""
        return self.workers if isinstance(self.workers, tuple) else (self.workers, self.workers)


@dataclass(frozen=True, slots=True, kw_only=True)
class TrackingConfig:
    """Where MLflow keeps the run."""

    enabled: bool = True
    """Whether the run is tracked at all."""
    uri: str | None = None
    """The tracking server; empty means a SQLite file beside the run folders."""
    experiment: str = "distclust"
    """The experiment's name."""
    register_as: str | None = None
    """Register the model under this name."""
    alias: str | None = None
    """Give the registered version this alias."""
    on_unreachable: Literal["fail", "spool"] = "fail"
    """A server that does not answer at the start: fail at once, or go on and keep everything in a file."""
    log_every: int = 10
    """Steps between two points of a metric."""

    def __post_init__(self) -> None:
        if self.log_every < 1:
            raise ConfigError(f"tracking.log_every is {self.log_every}; expected at least 1")
        if self.alias is not None and self.register_as is None:
            raise ConfigError(
                "tracking.alias is set and tracking.register_as is not; an alias needs a model name"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class RunConfig:
    """One training run, resolved."""

    method: str
    """A row of `distclust methods`."""
    clusters: int
    """K, the number of clusters."""
    seed: int = 0
    """Seed of everything: order, noise, weights, k-means."""
    source: SourceConfig = field(default_factory=SourceConfig)
    """The documents."""
    vocabulary: VocabularyConfig = field(default_factory=VocabularyConfig)
    """How text becomes TF-IDF rows."""
    shards: ShardConfig = field(default_factory=ShardConfig)
    """How rows are laid on disk."""
    order: OrderConfig = field(default_factory=OrderConfig)
    """Which rows form a step; lanes x rows_per_lane is the batch of a step over all workers."""
    stream: StreamConfig = field(default_factory=StreamConfig)
    """How batches get to the device."""
    cache: CacheConfig = field(default_factory=CacheConfig)
    """Local copies of a corpus that lies behind a URL."""
    model: ModelSettings = field(default_factory=ModelSettings)
    """Settings of the method's slots."""
    phases: tuple[Phase, ...] = ()
    """The schedule."""
    precision: Precision = "auto"
    """Type of the products that lead to hidden layers, in a training step; all else is float32. auto:
    bfloat16 on a GPU that has it, float32 elsewhere."""
    estimator: EstimatorConfig = field(default_factory=EstimatorConfig)
    """Settings of scikit-learn's rows, such as k-means and gmm; of no use to the others."""
    initialise: InitialiseConfig = field(default_factory=InitialiseConfig)
    """k-means on the codes."""
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    """Saving."""
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    """Workers."""
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    """MLflow."""

    def __post_init__(self) -> None:
        if self.clusters < 2:
            raise ConfigError(f"clusters is {self.clusters}; expected at least 2")
        if not 0 <= self.seed < 2**31:
            raise ConfigError(f"seed is {self.seed}; expected 0 to 2^31 - 1")
        if self.method not in ESTIMATORS:
            published = method_row(self.method)
            try:
                self.row.check_training(self.clusters, published)  # its other rules are checked as it is made
            except ValueError as error:
                raise ConfigError(str(error)) from None
            if self.row.starts_from_kmeans and self.initialise.sample < self.clusters:
                raise ConfigError(
                    f"initialise.sample is {self.initialise.sample}; k-means finds {self.clusters} in it, so "
                    f"at least as many are expected: set it higher, better to {50 * self.clusters}"
                )
        most = self.cluster.worker_range[1]
        if most > self.order.lanes:
            raise ConfigError(
                f"cluster.workers is {most} and order.lanes is {self.order.lanes}; "
                f"a worker owns whole lanes: set order.lanes to {most} or a multiple of it"
            )

    @property
    def row(self) -> Method:
        """The method's row of the table, with this run's settings and phases."""
        return dataclasses.replace(find_method(self.method), settings=self.model, phases=self.phases)

    def identity(self) -> dict[str, Any]:
        """What a checkpoint must agree on before it may be continued."""
        whole = to_dict(self)
        return {key: whole[key] for key in _IDENTITY}


_IDENTITY = ("method", "clusters", "seed", "order", "model", "phases", "precision", "initialise")


def method_row(name: str) -> Method:
    """The row of that name.

    Raises:
        ConfigError: with the nearest valid name; or the row is scikit-learn's, and has no network.
    """
    if name in ESTIMATORS:
        raise ConfigError(f"method is {name!r}, which is scikit-learn's; expected a row with phases to train")
    if name not in METHODS and not is_import_path(name):
        known = [*METHODS, *ESTIMATORS]
        raise ConfigError(f"method is {name!r}, which is not in the table{nearest(name, known)}")
    try:
        return find_method(name)
    except ValueError as error:
        raise ConfigError(f"method: {error}") from error


def table_row(name: str) -> Any:
    """The row of that name: of the table, of scikit-learn's, or plain data of one that is left out.

    Raises:
        ConfigError: as `method_row`.
    """
    if name in ESTIMATORS:
        return ESTIMATORS[name]
    missing = {key.lower(): row for key, row in MISSING.items()}
    if name.lower() in missing:
        return dataclasses.asdict(missing[name.lower()])
    if is_import_path(name):  # whoever names it wants it
        allow_modules([name.partition(":")[0]])
    return method_row(name)


# ---- YAML at the edge


class _Loader(yaml.SafeLoader):
    """YAML in which 1e-3 is a number, as everybody expects, and no key stands twice."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        names: set[str] = set()
        for key, _ in node.value:
            name = str(key.value)
            if name in names:
                said = f"{name!r} is given twice; keep one of the two"
                raise yaml.composer.ComposerError(None, None, said, key.start_mark)
            names.add(name)
        return node


_Loader.yaml_implicit_resolvers = {k: list(v) for k, v in yaml.SafeLoader.yaml_implicit_resolvers.items()}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def recipe_names() -> list[str]:
    """The packaged recipes."""
    folder = resources.files("distclust") / "recipes"
    return sorted(f.name.removesuffix(".yaml") for f in folder.iterdir() if f.name.endswith(".yaml"))


def read_recipe(recipe: str | Path) -> dict[str, Any]:
    """A recipe as plain data, by packaged name or by path.

    Raises:
        ConfigError: when there is none, or it is not YAML.
    """
    path = Path(recipe)
    if path.suffix in (".yaml", ".yml"):
        if not path.is_file():
            raise ConfigError(f"no recipe file {path}; packaged recipes: {', '.join(recipe_names())}")
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(
                f"recipe {path} cannot be read ({error}); expected YAML as UTF-8 text: save it so"
            ) from error
    elif str(recipe) in recipe_names():
        text = (resources.files("distclust") / "recipes" / f"{recipe}.yaml").read_text()
    else:
        raise ConfigError(
            f"no recipe named {str(recipe)!r}{nearest(str(recipe), recipe_names())}; "
            "a file's name ends in .yaml"
        )
    try:
        data = yaml.load(text, Loader=_Loader)  # noqa: S506 (a SafeLoader)
    except yaml.YAMLError as error:
        raise ConfigError(f"recipe {recipe} is not YAML that can be used: {error}") from error
    if not isinstance(data, dict):
        raise ConfigError(f"recipe {recipe} holds {type(data).__name__}; expected keys and values")
    return data


def apply_overrides(data: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """The data with each `a.b=value` put in; values are read as YAML."""
    result: dict[str, Any] = copy.deepcopy(dict(data))
    for item in overrides:
        key, separator, value = item.partition("=")
        if not separator or not key:
            raise ConfigError(
                f"override {item!r} is not of the form key=value (for example cluster.workers=2)"
            )
        place = result
        *parents, last = key.split(".")
        for parent in parents:
            if place.get(parent) is None:
                place[parent] = {}
            place = place[parent]
            if not isinstance(place, dict):
                raise ConfigError(f"override {item!r}: {parent!r} holds a value, not keys")
        try:
            place[last] = yaml.load(value, Loader=_Loader)  # noqa: S506 (a SafeLoader)
        except yaml.YAMLError as error:
            raise ConfigError(
                f"override {item!r}: the value is not YAML that can be used ({str(error).splitlines()[0]})"
            ) from error
    return result


def load_recipe(recipe: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """A recipe with overrides, checked and resolved; modules that its import paths name are allowed."""
    data = apply_overrides(read_recipe(recipe), overrides)
    allow_named(data)
    return resolve(data)


def allow_named(data: Mapping[str, Any]) -> None:
    """Allow the modules that a recipe's import paths name: whoever gives the recipe wants them."""
    model = data.get("model")
    settings = [model.get("dissimilarity"), model.get("network")] if isinstance(model, dict) else []
    paths = [str(value) for value in (data.get("method"), *settings) if is_import_path(str(value))]
    allow_modules(path.partition(":")[0] for path in paths)


def resolve(data: Mapping[str, Any]) -> RunConfig:
    """A `RunConfig` from a recipe's plain data: the method's row, changed by `model` and `phases`.

    Raises:
        ConfigError: for an unknown key (naming the nearest), a wrong type or an impossible value.
    """
    data = dict(data)
    for key in ("method", "clusters"):
        if key not in data:
            raise ConfigError(
                f"the recipe has no {key!r}; every recipe names a method and the number of clusters"
            )
    if str(data["method"]) in ESTIMATORS:
        return _resolve_estimator(data)
    row = method_row(str(data["method"]))
    model, phases = ({} if data.get(key) is None else data[key] for key in ("model", "phases"))
    _check_keys(ModelSettings, model, "model")
    data["model"] = to_dict(row.settings) | dict(model)
    if isinstance(phases, Mapping):
        data["phases"] = _merge_phases(row, phases)
    elif phases == []:
        raise ConfigError("phases is an empty list; expected phases: leave it out for those of the method")
    _check_keys(RunConfig, data, "")
    return _parse(data)


def _resolve_estimator(data: dict[str, Any]) -> RunConfig:
    """A row of scikit-learn's; what a recipe says of networks and phases is left out, and said so."""
    unused = [key for key in ("model", "phases") if data.get(key)]
    if data.pop("model", None) == to_dict(ModelSettings()):
        unused.remove("model")
    data.pop("phases", None)
    if unused:
        log.warning(
            "%s of the recipe: left out, since %s is scikit-learn's; its settings are in estimator",
            " and ".join(unused),
            data["method"],
        )
    _check_keys(RunConfig, data, "")
    return _parse(data)


def _merge_phases(row: Method, changes: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The row's phases with `{name: {epochs: ...}}` put in."""
    names = [phase.name for phase in row.phases]
    for name, change in changes.items():
        if name not in names:
            raise ConfigError(
                f"phases.{name} is unknown: {row.name} has {', '.join(names)}{nearest(name, names)}"
            )
        _check_keys(Phase, change, f"phases.{name}")
        if "name" in change:
            raise ConfigError(
                f"phases.{name}.name is {change['name']!r}; the key {name} is the phase's name already, and "
                "no other is expected: leave it out, or give all phases as a list, each with its name"
            )
    merged = []
    for phase in row.phases:
        whole = to_dict(phase)
        change = dict(changes.get(phase.name) or {})
        given = change.pop("optimizer", None) or {}
        if not isinstance(given, Mapping):
            raise ConfigError(
                f"phases.{phase.name}.optimizer is {given!r}; expected keys and values, such as "
                f"phases.{phase.name}.optimizer.learning_rate=1e-3"
            )
        optimizer = whole["optimizer"] | dict(given)
        merged.append(whole | change | {"optimizer": optimizer})
    return merged


def _parse(data: Mapping[str, Any]) -> RunConfig:
    import pydantic  # here, so that the loop runs on machines without it

    try:
        # JSON in strict mode: lists become tuples, whole numbers become floats, and nothing else is converted
        config: RunConfig = pydantic.TypeAdapter(RunConfig).validate_json(
            json.dumps(data, default=str), strict=True
        )
    except pydantic.ValidationError as error:
        raise ConfigError("\n".join(_explain(e, data) for e in error.errors())) from error
    except (ValueError, TypeError) as error:
        raise ConfigError(str(error)) from error
    return config


def _explain(error: Any, data: Mapping[str, Any]) -> str:
    """One line of pydantic's findings on the data, in words."""
    cause, loc = (error.get("ctx") or {}).get("error"), [str(part) for part in error["loc"]]
    if loc[:1] == ["phases"] and len(loc) > 1:  # a phase has a name, and the place that pydantic tells
        loc[1] = str(_name_of(data["phases"][int(loc[1])]) or loc[1])
    place = ".".join(loc)
    if isinstance(cause, Exception):
        return f"{place}.{cause}" if loc[-1:] == ["optimizer"] else str(cause)
    return f"{place} is {error['input']!r}: {error['msg'][0].lower()}{error['msg'][1:]}"


def _name_of(phase: Any) -> Any:
    return phase.get("name") if isinstance(phase, Mapping) else None


def from_dict(data: Mapping[str, Any]) -> RunConfig:
    """A `RunConfig` from what `to_dict` gave (a run folder's config.json)."""
    return _parse(data)


def with_newer_settings(identity: Mapping[str, Any]) -> dict[str, Any]:
    """A stored `RunConfig.identity`, and what stands beside it, in which settings that are newer than it have
    their defaults; as it is where it cannot be read."""
    try:
        whole = from_dict({key: identity[key] for key in _IDENTITY if key in identity}).identity()
    except (ConfigError, ImportError):  # it has other keys; or a machine without pydantic
        return dict(identity)
    return dict(identity) | whole


def to_dict(config: Any) -> dict[str, Any]:
    """A dataclass as plain JSON data."""
    return typing.cast(dict[str, Any], json.loads(json.dumps(dataclasses.asdict(config))))


def _check_keys(cls: type, data: Any, where: str) -> None:
    """Refuse keys that the dataclass does not have, all the way down."""
    if not isinstance(data, Mapping):
        raise ConfigError(f"{where or 'the recipe'} is {data!r}; expected keys and values")
    hints = typing.get_type_hints(cls)
    for key, value in data.items():
        name = f"{where}.{key}" if where else str(key)
        if key not in hints:
            raise ConfigError(f"unknown key {name!r}{nearest(str(key), hints)}")
        inner = _dataclass_in(hints[key])
        if inner is None:
            continue
        if isinstance(value, Mapping):
            _check_keys(inner, value, name)
        elif isinstance(value, list | tuple):  # of phases
            for number, item in enumerate(value):
                if isinstance(item, Mapping):
                    _check_keys(inner, item, f"{name}.{_name_of(item) or number}")


def _dataclass_in(hint: Any) -> type | None:
    """The dataclass that a field's annotation holds, through unions and tuples."""
    held = isinstance(hint, types.UnionType) or typing.get_origin(hint) is tuple
    options = typing.get_args(hint) if held else (hint,)
    return next((o for o in options if isinstance(o, type) and dataclasses.is_dataclass(o)), None)
