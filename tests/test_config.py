"""Recipes and overrides: what is accepted, and how what is not is refused."""

from __future__ import annotations

import dataclasses
import datetime
import json
import typing
from collections.abc import Iterator
from typing import Any

import pytest

from distclust import config
from distclust.config import RunConfig, from_dict, load_recipe, recipe_names, resolve, to_dict
from distclust.errors import ConfigError
from distclust.mixture.catalogue import ESTIMATORS
from distclust.mixture.methods import METHODS, Phase

LEAST = {"method": "damic-text", "clusters": 9}


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_loads_and_says_how_it_is_run(name):
    run = load_recipe(name)
    assert run.method in METHODS and run.phases
    text = (config.resources.files("distclust") / "recipes" / f"{name}.yaml").read_text()
    header = text.split("\n\n")[0]
    for word in ("command", "run time", "result"):
        assert f"#   {word}" in header, f"the header of {name}.yaml lacks its {word}"
    assert f"distclust train {name}" in header


def test_the_demo_is_what_is_promised():
    run = load_recipe("demo")
    assert (run.method, run.clusters, run.cluster.workers) == ("damic-text", 9, 2)
    assert run.source.name == "builtin" and run.order.lanes == 8 and run.order.rows_per_lane == 32


def test_a_method_brings_its_own_settings():
    run = resolve(LEAST)
    assert run.model == METHODS["damic-text"].settings and run.phases == METHODS["damic-text"].phases


def test_a_recipe_changes_only_what_it_names():
    run = resolve(
        LEAST | {"model": {"code_size": 7}, "phases": {"joint": {"epochs": 3, "optimizer": {"eps": 1e-7}}}}
    )
    row = METHODS["damic-text"]
    assert run.model == dataclasses.replace(row.settings, code_size=7)
    before, after = row.phases[-1], run.phases[-1]
    assert after == dataclasses.replace(
        before, epochs=3, optimizer=dataclasses.replace(before.optimizer, eps=1e-7)
    )
    assert run.phases[:-1] == row.phases[:-1]


def test_a_run_survives_its_json():
    for name in recipe_names():
        run = load_recipe(name)
        assert from_dict(json.loads(json.dumps(to_dict(run)))) == run


@pytest.mark.parametrize(
    ("override", "place", "value"),
    [
        (
            "phases.pretrain.optimizer.learning_rate=1e-3",
            lambda r: r.phases[0].optimizer.learning_rate,
            0.001,
        ),
        ("phases.pretrain.optimizer.learning_rate=2E+1", lambda r: r.phases[0].optimizer.learning_rate, 20.0),
        ("model.tau=2", lambda r: r.model.tau, 2.0),
        ("model.tau_spread=null", lambda r: r.model.tau_spread, None),
        ("model.hidden=[64, 32]", lambda r: r.model.hidden, (64, 32)),
        ("cluster.workers=[1,4]", lambda r: r.cluster.workers, (1, 4)),
        ("source.files=[a.csv]", lambda r: r.source.files, ("a.csv",)),
        ("tracking.uri=http://host:5000", lambda r: r.tracking.uri, "http://host:5000"),
        ("tracking.uri=sqlite:///a=b.db", lambda r: r.tracking.uri, "sqlite:///a=b.db"),
        ("tracking.enabled=false", lambda r: r.tracking.enabled, False),
        ("vocabulary.max_df=1", lambda r: r.vocabulary.max_df, 1),
    ],
)
def test_overrides_are_yaml(override, place, value):
    more = ["source.name=files"] if override.startswith("source.files") else []
    found = place(load_recipe("smoke", [override, *more]))
    assert found == value and type(found) is type(value)


def test_overrides_leave_the_data_alone():
    data = {"method": "damic", "model": {"tau": 1.0}}
    assert config.apply_overrides(data, ["model.tau=2", "clusters=3"])["model"] == {"tau": 2}
    assert data == {"method": "damic", "model": {"tau": 1.0}}


@pytest.mark.parametrize(
    ("override", "said"),
    [
        # unknown keys, with the nearest valid one
        ("clutsers=3", ["unknown key 'clutsers'", "'clusters'"]),
        ("cluster.wokers=2", ["unknown key 'cluster.wokers'", "'workers'"]),
        ("model.tua=1", ["unknown key 'model.tua'", "'tau'"]),
        ("phases.jiont.epochs=2", ["phases.jiont", "'joint'"]),
        ("phases.joint.epoch=2", ["phases.joint.epoch", "'epochs'"]),
        ("phases.joint.optimizer.lerning_rate=1", ["'learning_rate'"]),
        ("source.nme=builtin", ["'name'"]),
        ("vocabulary.maxfeatures=10", ["'max_features'"]),
        ("zzz=1", ["unknown key 'zzz'", "expected one of"]),
        ("method=damic-txt", ["'damic-txt'", "'damic-text'"]),
        ("source.name=20newz", ["'20news'"]),
        # wrong types: nothing is converted silently
        ("clusters=nine", ["clusters", "nine"]),
        ("clusters=9.0", ["clusters", "9.0"]),
        ("clusters='9'", ["clusters"]),
        ("clusters=true", ["clusters", "True"]),
        ("model.hidden=256", ["model.hidden", "256"]),
        ("model=3", ["model", "expected keys and values"]),
        ("cluster=3", ["cluster is 3"]),
        ("phases.joint=3", ["phases.joint is 3"]),
        ("phases.joint.epochs=2.5", ["epochs", "2.5"]),
        ("tracking.enabled=maybe", ["tracking.enabled"]),
        ("tracking.on_unreachable=fial", ["tracking.on_unreachable", "'fail' or 'spool'"]),
        ("clusters.x=1", ["clusters"]),
        ("clusters=", ["clusters"]),
        # impossible values
        ("clusters=1", ["clusters is 1", "at least 2"]),
        ("seed=-1", ["seed is -1"]),
        ("model.tau=0", ["model.tau is 0", "above 0"]),
        ("model.gate_dropout=1.0", ["model.gate_dropout", "[0, 1)"]),
        ("model.hidden=[]", ["model.hidden"]),
        ("model.dissimilarity=euclid", ["model.dissimilarity", "euclidean"]),
        ("phases.joint.epochs=-1", ["epochs is -1"]),
        ("phases.joint.optimizer.learning_rate=-1e-3", ["learning_rate is -0.001"]),
        ("cluster.workers=-1", ["cluster.workers"]),
        ("cluster.workers=[3,2]", ["cluster.workers"]),
        ("cluster.workers=[0,2]", ["cluster.workers"]),
        ("cluster.workers=5", ["cluster.workers is 5", "order.lanes is 4"]),
        ("order.lanes=0", ["order.lanes"]),
        ("shards.rows_per_shard=0", ["shards.rows_per_shard"]),
        ("vocabulary.max_df=2.0", ["vocabulary.max_df"]),
        ("checkpoint.every_steps=0", ["checkpoint.every_steps"]),
        ("tracking.log_every=0", ["tracking.log_every"]),
        ("tracking.alias=best", ["tracking.alias", "register_as"]),
        ("initialise.restarts=0", ["initialise.restarts"]),
        # no override at all
        ("clusters", ["key=value"]),
        ("=3", ["key=value"]),
        ("model.tau=[", ["model.tau=["]),
    ],
)
def test_what_cannot_be_run_is_refused_with_a_reason(override, said):
    with pytest.raises(ConfigError) as caught:
        load_recipe("smoke", [override])
    for part in said:
        assert part in str(caught.value)


@pytest.mark.parametrize("missing", ["method", "clusters"])
def test_a_recipe_needs_a_method_and_a_number_of_clusters(missing):
    with pytest.raises(ConfigError, match=missing):
        resolve({key: value for key, value in LEAST.items() if key != missing})


def test_unknown_recipes_name_the_nearest():
    with pytest.raises(ConfigError, match="'demo'"):
        load_recipe("dmo")
    with pytest.raises(ConfigError, match=r"no recipe file nowhere\.yaml"):
        load_recipe("nowhere.yaml")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: [1", "not YAML"),
        ("- 1\n- 2\n", "holds list"),
        ("", "holds NoneType"),
        ("phases:\n  joint: {epochs: 1, epochs: 2}\n", "'epochs' is given twice"),
        ("clusters: 3\nmethod: damic\nclusters: 4\n", "'clusters' is given twice"),
    ],
)
def test_files_that_are_no_recipe(tmp_path, text, said):
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(ConfigError, match=said):
        load_recipe(tmp_path / "mine.yaml")


def test_a_recipe_from_a_file(tmp_path):
    (tmp_path / "mine.yaml").write_text("method: dmae-text\nclusters: 4\n")
    run = load_recipe(tmp_path / "mine.yaml", ["seed=3"])
    assert isinstance(run, RunConfig) and (run.method, run.clusters, run.seed) == ("dmae-text", 4, 3)


def test_identity_is_what_a_checkpoint_binds():
    """Where it runs, how often it saves and who tracks it may change between two starts of a run."""
    run = load_recipe("smoke")
    for change in ("cluster.workers=2", "checkpoint.every_steps=7", "tracking.experiment=x"):
        assert load_recipe("smoke", [change]).identity() == run.identity()
    for change in ("seed=1", "clusters=4", "order.lanes=5", "model.tau=3", "phases.joint.epochs=9"):
        assert load_recipe("smoke", [change]).identity() != run.identity()


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("cpus_per_worker", -3),
        ("cpus_per_worker", 0),
        ("gpus_per_worker", -1),
        ("max_failures", -1),
        ("memory_per_worker_gb", -1.0),
        ("memory_per_worker_gb", float("nan")),
        ("start_timeout_s", 0.0),
    ],
)
def test_impossible_clusters_are_refused_as_they_are_read(setting: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=rf"cluster\.{setting}"):
        resolve({"method": "damic", "clusters": 3, "cluster": {setting: value}})


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"phases": {"joint": {"optimizer": 3}}}, r"phases\.joint\.optimizer is 3; expected keys and values"),
        ({"seed": datetime.date(2024, 1, 1)}, "seed"),
        ({"model": {"hidden": {1, 2}}}, "hidden"),
        (
            {"method": "self-training", "phases": {"joint": {"terms": [["target_responsibility", 1.0]]}}},
            "target_responsibility needs energies and a gate of its own.*found energy none",
        ),
        (
            {"method": "dec", "phases": {"joint": {"terms": [["target_responsibility", 1.0]]}}},
            "target_responsibility needs energies and a gate of its own.*gate tied; use target_clean",
        ),
        ({"model": {"sharpen": 2.0}}, "model.sharpen change the teacher of the term lse_clean_teacher"),
        ({"model": {"tau_spread": 0.5}}, r"tau_spread is 0\.5.*say phases\.joint\.begin=\[temperature\]"),
        # terms, statistics and starts that the row's slots cannot have
        (
            {"phases": {"joint": {"terms": [["lse", 1.0], ["orthonormality", 0.1]]}}},
            "phase joint: orthonormality needs the energy dissimilarity or student, and .* is experts",
        ),
        ({"phases": {"joint": {"statistics": ["running_means"]}}}, "running_means needs .* is experts"),
        (
            {"method": "dmm", "phases": {"joint": {"begin": ["pinv_gate"]}}},
            "pinv_gate needs the gate linear, and that of this row is tied; leave pinv_gate out",
        ),
        (
            {"method": "dmae-lse", "phases": {"joint": {"terms": [["lse", 1.0], ["mix", 1.0]]}}},
            "mix needs the gate tied, and that of this row is prior",
        ),
        (
            {"method": "self-training", "phases": {"joint": {"begin": ["temperature"]}}},
            "temperature reads energies, and this row has none",
        ),
        (
            {"method": "dcn", "phases": {"joint": {"anneal": "alpha"}}},
            r"anneal is alpha.*the gate of this row is hard; set phases\.joint\.anneal=none",
        ),
    ],
)
def test_odd_values_of_a_recipe_are_named(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        resolve({"method": "damic", "clusters": 3} | changes)


def numbers_of(cls: type, where: str = "") -> Iterator[str]:
    """Every setting that may be a number with a fraction, as an override names it; the joint phase's."""
    hints = typing.get_type_hints(cls)
    for name, hint in hints.items():
        inner = config._dataclass_in(hint)
        if name == "phases":
            yield from numbers_of(Phase, "phases.joint.")
        elif inner is not None:
            yield from numbers_of(inner, f"{where}{name}.")
        elif float in (hint, *typing.get_args(hint)):
            yield where + name


@pytest.mark.parametrize("value", [".nan", ".inf", "-.inf", "-1.0"])
@pytest.mark.parametrize("setting", sorted(numbers_of(RunConfig)))
def test_no_number_may_be_infinite_or_none_at_all_or_below_nought(setting: str, value: str) -> None:
    with pytest.raises(ConfigError, match=f"{setting.split('.')[-1]}.* is .*expected"):
        load_recipe("smoke", [f"{setting}={value}"])


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("eps=0", r"^phases\.joint\.optimizer\.eps is 0\.0; expected a finite number above 0$"),
        ("momentum=2", r"optimizer\.momentum is 2\.0; expected a share in \[0, 1\)"),
        ("floor=10", r"optimizer\.floor is 10\.0 and learning_rate 0\.001; .*set floor as well"),
    ],
)
def test_step_sizes_that_no_optimiser_takes_are_refused_as_they_are_read(override: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        load_recipe("smoke", [f"phases.joint.optimizer.{override}"])


@pytest.mark.parametrize("weight", [".nan", ".inf"])
def test_a_weight_of_a_term_is_a_finite_number(weight: str) -> None:
    with pytest.raises(ConfigError, match=r"phases\.joint\.terms: the weight of lse_clean_teacher is"):
        load_recipe("smoke", [f"phases.joint.terms=[[lse_clean_teacher, {weight}]]"])


ONE_PHASE = {"name": "x", "epochs": 1, "trains": ["gate"], "terms": [["pseudo_cross_entropy", 1.0]]}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"epcohs": 4}, "unknown key 'phases.x.epcohs'; did you mean 'epochs'"),
        ({"optimizer": {"learning_rat": 5.0}}, "unknown key 'phases.x.optimizer.learning_rat'; did you mean"),
        ({"epochs": 2.5}, "phases.x.epochs is 2.5"),
        ({"optimizer": {"eps": 0.0}}, "phases.x.optimizer.eps is 0.0"),
        ({"noise": ["gtae"]}, "phases.x.noise is 'gtae'; expected one of: .*; did you mean 'gate'"),
        ({"noise": ["experts"]}, "phases.x.noise is 'experts'; expected one of: augment, gate, network"),
        ({"name": "final pass"}, "called 'final pass', and its checkpoint after it; expected .*: rename it"),
        ({"name": "a/b"}, "called 'a/b'"),
        ({"name": ""}, "called ''"),
        ({"name": "x" * 101}, "100 at most"),
        ({"name": "initialise"}, "2 of its phases are called initialise; expected a name for each"),
    ],
)
def test_phases_of_a_list_are_read_as_closely_as_changes_of_the_methods(
    changes: dict[str, Any], said: str
) -> None:
    start = {"name": "initialise", "epochs": 0, "begin": ["initialise_clusters"]}
    row = {"method": "damic-pretraining", "clusters": 3}
    assert [p.name for p in resolve(row | {"phases": [start, ONE_PHASE]}).phases] == ["initialise", "x"]
    with pytest.raises(ConfigError, match=said):
        resolve(row | {"phases": [start, ONE_PHASE | changes]})


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("phases=[]", "phases is an empty list; expected phases"),
        ("phases=false", "phases is False"),
        ("model=[]", r"model is \[\]; expected keys and values"),
        ("phases.joint.name=last", "phases.joint.name is 'last'; the key joint is the phase's name already"),
        ("phases.joint.noise=[gtae]", "did you mean 'gate'"),
    ],
)
def test_changes_of_a_methods_phases_that_say_nothing(override: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        load_recipe("smoke", [override])


@pytest.mark.parametrize("name", ["damic-text", "vade"])
def test_the_phases_of_a_finished_run_are_a_recipe(name: str) -> None:
    """config.json has them as a list, every key written out."""
    run = resolve(LEAST | {"method": name})
    assert resolve(json.loads(json.dumps(to_dict(run)))) == run


@pytest.mark.parametrize(
    ("method", "changes", "said"),
    [
        ("damic-text", {}, "phase experts: expert_means reads clusters that k-means has to find first"),
        (
            "damic",
            {},
            "phase experts: pseudo_energy reads .*damic has phases.initialise.begin=.initialise_cl",
        ),
        ("self-training", {}, "phase gate: pseudo_cross_entropy reads"),
        ("dec", {}, "phase joint: target_teacher reads"),
        ("dcn", {}, "phase joint: min reads"),
        ("bregman", {}, "phase em: em reads"),
        ("ae-cm", {}, "phase module: exp reads"),
        ("ae-kmeans", {}, "after phase initialise nothing has found them"),
        ("cm", {"initialise": {"begin": ["pinv_gate"]}}, "phase initialise: pinv_gate reads"),
        # in the wrong order
        (
            "vade",
            {"initialise": {"begin": ["gaussian_start", "initialise_clusters"]}},
            "gaussian_start reads",
        ),
        ("aljalbout", {"joint": {"epochs": 0}, "recluster": {"begin": []}}, "labels are read from clusters"),
    ],
)
def test_what_k_means_finds_has_to_be_found_before_it_is_read(
    method: str, changes: dict[str, Any], said: str
) -> None:
    row = {"method": method, "clusters": 3}
    resolve(row)
    with pytest.raises(ConfigError, match=said):
        resolve(row | {"phases": {"initialise": {"begin": []}} | changes})


def test_a_row_may_start_from_k_means_elsewhere_or_not_at_all() -> None:
    rows = [name for name, row in METHODS.items() if not row.starts_from_kmeans]
    assert rows == ["damic-joint", "mixae", "cm-random", "ae-cm-random", "dkm-annealed"]
    for name in rows:
        resolve({"method": name, "clusters": 3})
    moved = {"initialise": {"begin": []}, "joint": {"begin": ["initialise_clusters"]}}
    resolve({"method": "dmae-text", "clusters": 3, "phases": moved})
    # nothing reads pseudo-labels that no epoch learns, and experts are not started from k-means
    unread = {"initialise": {"begin": []}, "experts": {"epochs": 0}, "gate": {"epochs": 0}}
    resolve({"method": "damic", "clusters": 3, "phases": unread})


def test_k_means_needs_a_code_for_each_cluster() -> None:
    few = {"clusters": 9, "initialise": {"sample": 8}}
    with pytest.raises(ConfigError, match="initialise.sample is 8; k-means finds 9 in it.*better to 450"):
        resolve({"method": "damic"} | few)
    resolve({"method": "damic", "clusters": 9, "initialise": {"sample": 9}})
    resolve({"method": "cm-random"} | few)
    resolve({"method": "k-means"} | few)


@pytest.mark.parametrize(
    ("recipe", "refused"),
    [
        ("demo", []),
        ("damic-text", []),
        ("dmae-text-mahalanobis", []),
        ("dmae", ["bregman"]),
        ("dmae-text", ["bregman"]),
    ],
)
def test_recipes_take_the_rows_that_the_docs_say(recipe: str, refused: list[str]) -> None:
    found = []
    for name in (*METHODS, *ESTIMATORS):
        try:
            load_recipe(recipe, [f"method={name}"])
        except ConfigError:
            found.append(name)
    assert found == refused
