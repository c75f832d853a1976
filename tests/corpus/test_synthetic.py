"""Sets that are computed: the formulas of the papers, labels that go with their rows, seeds, no files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from sklearn.datasets import load_digits, make_circles, make_moons

from distclust.corpus import readers, synthetic
from distclust.corpus.prepare import prepare_local
from distclust.corpus.shards import Corpus, Manifest, ShardConfig
from distclust.corpus.sources import Source, SourceConfig, open_source
from distclust.corpus.vocabulary import VocabularyConfig
from distclust.errors import ConfigError, DataError

SEEDED = sorted(synthetic.GENERATORS)
CENTRES = np.array([(10.0, 10.0), (0.0, 0.0), (10.0, 0.0), (0.0, 10.0)])


def rows_of(source: Source) -> tuple[NDArray[np.float32], list[str]]:
    tables = [table for split in source.splits for table in source.read_split(split)]
    values = [row for table in tables for row in table["values"].to_pylist()]
    labels = [label for table in tables for (label,) in table["labels"].to_pylist()]
    return np.array(values, np.float32), labels


def sigmoid(x: NDArray[Any]) -> NDArray[Any]:
    return 1 / (1 + np.exp(-x))


@pytest.mark.parametrize("name", ["damic-sigmoid2", "damic-tanh-sigmoid", "damic-sigmoid-sigmoid"])
def test_damics_rows_are_its_formula_of_the_latent_points(name: str) -> None:
    x, y, latent, image = synthetic.make(name, seed=7)
    drawn = np.random.RandomState(7)
    if name == "damic-sigmoid-sigmoid":
        inner, outer = drawn.standard_normal((10, 2)), drawn.standard_normal((100, 10))
        wanted = sigmoid(sigmoid(latent @ inner.T) @ outer.T)
    else:
        hidden = sigmoid(latent @ drawn.standard_normal((100, 2)).T)
        wanted = hidden**2 if name == "damic-sigmoid2" else np.tanh(hidden)
    np.testing.assert_allclose(x, wanted, rtol=1e-9)
    assert x.shape == (4000, 100)
    assert image is None
    for k, centre in enumerate(CENTRES):
        points = latent[y == k]
        assert len(points) == 1000
        np.testing.assert_allclose(points.mean(0), centre, atol=0.2)
        np.testing.assert_allclose(np.cov(points.T), 2.25 * np.eye(2), atol=0.3)


def test_the_painwheel_keeps_its_labels() -> None:
    x, y, latent, _ = synthetic.make("painwheel", seed=3, documents=1002)
    drawn = np.random.RandomState(3)
    u, labels = drawn.standard_normal((1002, 2)), np.repeat(range(5), [201, 201, 200, 200, 200])
    r = 1 + 0.3 * u[:, 0]
    z = (r + 0.05j * u[:, 1]) * np.exp(1j * (2 * np.pi * labels / 5 + 0.25 * np.exp(r)))
    order = drawn.permutation(1002)
    np.testing.assert_allclose(x[:, 0] + 1j * x[:, 1], z[order], rtol=1e-12)
    np.testing.assert_array_equal(y, labels[order])
    np.testing.assert_array_equal(latent, x)


def test_toroidal_blobs_lie_across_the_edges() -> None:
    x, y, _, _ = synthetic.make("toroidal")
    assert np.abs(x).max() <= 1
    for k, centre in enumerate([(1, 0), (-1, 1), (0, -1), (0, 0)]):
        apart = (x[y == k] - centre + 1) % 2 - 1
        np.testing.assert_allclose(apart.std(0), 0.05, atol=0.008)
        assert np.abs(apart).max() < 0.3
    crossing = x[y == 0, 0]
    assert (crossing > 0.8).any()
    assert (crossing < -0.8).any()


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("moons", lambda r: make_moons(1000, noise=0.1, random_state=r, shuffle=False)),
        (
            "circles",
            lambda random: make_circles(1000, noise=0.1, factor=0.1, random_state=random, shuffle=False),
        ),
    ],
)
def test_moons_and_circles_are_scikit_learns(name: str, wanted: Any) -> None:
    x, y, latent, _ = synthetic.make(name, seed=5)
    points, labels = wanted(np.random.RandomState(5))
    found = sorted(map(tuple, np.column_stack([x, y])))
    assert found == sorted(map(tuple, np.column_stack([points, labels])))
    np.testing.assert_array_equal(latent, x)


def test_simplex_rows_are_distributions() -> None:
    x, y, latent, _ = synthetic.make("simplex")
    assert x.shape == (1000, 3)
    assert x.min() >= 0
    np.testing.assert_allclose(x.sum(1), 1, rtol=1e-12)
    for k, centre in enumerate(
        [(0.02, 0.2, 0.78), (1 / 3, 1 / 3, 1 / 3), (0.95, 0.025, 0.025), (0.02, 0.88, 0.1)]
    ):
        np.testing.assert_allclose(x[y == k].mean(0), centre, atol=0.03)
    corners = np.array([(0, 0), (1, 0), (0.5, np.sqrt(3) / 2)])
    np.testing.assert_allclose(latent, x @ corners, atol=1e-12)


@pytest.mark.parametrize("name", SEEDED)
def test_a_seed_decides_everything(name: str) -> None:
    one, again, other = (synthetic.make(name, seed=seed, documents=203) for seed in (1, 1, 2))
    for a, b in zip(one[:3], again[:3], strict=True):
        np.testing.assert_array_equal(a, b)
    assert not np.isclose(one.x, other.x).all()
    sizes = np.bincount(one.y)
    assert sizes.sum() == 203
    assert sizes.max() - sizes.min() <= 1
    assert len(set(one.y[:50])) == len(sizes), "classes come mixed, not one after another"
    np.testing.assert_array_equal(synthetic.make(name).x, synthetic.make(name, seed=0).x)


@pytest.mark.parametrize(
    ("name", "first"),
    [
        ("damic-sigmoid2", [0.992591, 1.0]),
        ("damic-tanh-sigmoid", [0.760031, 0.761594]),
        ("damic-sigmoid-sigmoid", [0.921290, 0.130586]),
        ("painwheel", [0.636583, 0.263862]),
        ("toroidal", [0.947572, -0.071001]),
        ("moons", [0.887228, -0.016419]),
        ("circles", [0.863728, 0.106688]),
        ("simplex", [0.959887, 0.030510]),
    ],
)
def test_rows_stay_what_they_were(name: str, first: list[float]) -> None:
    """Rows of seed 0 as they were first made; where a generator is changed, `synthetic.VERSION` goes up."""
    np.testing.assert_allclose(synthetic.make(name).x[0, :2], first, atol=1e-6)


@pytest.mark.parametrize("name", synthetic.SETS)
def test_as_a_source(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "SPLIT_ROWS", 700)
    monkeypatch.delenv("DISTCLUST_DATA", raising=False)
    source = open_source(SourceConfig(name=name))
    made = synthetic.make(name)
    assert len(source.splits) > 1
    assert (source.kind, source.n_documents) == ("dense", len(made.x))
    assert source.layout.n_features == made.x.shape[1]
    values, labels = rows_of(source)
    np.testing.assert_array_equal(values, (made.x / (16 if name == "digits" else 1)).astype(np.float32))
    assert labels == [str(label) for label in made.y]
    values, labels = rows_of(open_source(SourceConfig(name=name, limit=5)))
    np.testing.assert_array_equal(labels, made.y[:5].astype(str))


def test_the_digits_are_scikit_learns() -> None:
    values, labels = rows_of(open_source(SourceConfig(name="digits")))
    x, y = load_digits(return_X_y=True)
    assert values.shape == (1797, 64)
    np.testing.assert_array_equal(values, (x / 16).astype(np.float32))
    assert labels == [str(label) for label in y]
    assert open_source(SourceConfig(name="digits")).image_shape == (1, 8, 8)


def test_the_manifest_says_what_shape_images_have(tmp_path: Path) -> None:
    def prepared(name: str) -> Manifest:
        scale = VocabularyConfig(scale=1.0)
        return prepare_local(SourceConfig(name=name), scale, ShardConfig(), tmp_path / name)

    made = prepared("digits")
    assert made.options["image_shape"] == [1, 8, 8]
    assert prepared("digits").fingerprint == made.fingerprint
    assert "image_shape" not in prepared("moons").options


def test_another_seed_or_number_is_another_source() -> None:
    def fingerprint(**options: Any) -> str:
        return open_source(SourceConfig(name="moons", **options)).fingerprint

    assert fingerprint() == fingerprint(seed=0) == fingerprint(documents=1000)
    assert len({fingerprint(), fingerprint(seed=1), fingerprint(documents=999)}) == 3


def test_a_new_generator_is_another_source(monkeypatch: pytest.MonkeyPatch) -> None:
    before = open_source(SourceConfig(name="moons")).fingerprint
    monkeypatch.setattr(synthetic, "VERSION", synthetic.VERSION + 1)
    assert open_source(SourceConfig(name="moons")).fingerprint != before


def test_prepared_like_any_other_set(tmp_path: Path) -> None:
    config = SourceConfig(name="painwheel", seed=4, documents=300)
    shards = ShardConfig(rows_per_shard=128)
    manifest = prepare_local(config, VocabularyConfig(scale=2.0), shards, tmp_path / "c")
    corpus, made = Corpus.open(tmp_path / "c"), synthetic.make("painwheel", 4, 300)
    stored = np.concatenate([corpus.shard(i).dense for i in range(len(corpus.shard_rows))])
    np.testing.assert_array_equal(stored, made.x.astype(np.float32) * np.float32(2))
    assert (manifest.n_rows, manifest.n_features, manifest.classes) == (300, 2, ("0", "1", "2", "3", "4"))
    assert manifest.options["source"]["seed"] == 4
    again = prepare_local(config, VocabularyConfig(scale=2.0), shards, tmp_path / "c")
    assert again.fingerprint == manifest.fingerprint
    with pytest.raises(DataError, match=r"source\.seed: 4 there, 5 asked"):
        prepare_local(
            SourceConfig(name="painwheel", seed=5, documents=300),
            VocabularyConfig(scale=2.0),
            shards,
            tmp_path / "c",
        )


def test_points_to_draw_are_in_the_order_of_the_documents() -> None:
    points, labels = synthetic.latent_points("damic-sigmoid2", seed=2, documents=40)
    made = synthetic.make("damic-sigmoid2", 2, 40)
    np.testing.assert_array_equal(points, made.latent)
    assert rows_of(open_source(SourceConfig(name="damic-sigmoid2", seed=2, documents=40)))[1] == [
        str(label) for label in labels
    ]
    nearest = ((points[:, None] - CENTRES) ** 2).sum(-1).argmin(1)
    np.testing.assert_array_equal(nearest, labels)
    with pytest.raises(ConfigError, match="'digits' has no points in the plane"):
        synthetic.latent_points("digits")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "moons", "seed": -1}, r"source.seed is -1; expected 0 to 4294967295"),
        ({"name": "moons", "seed": 2**32}, r"source.seed is 4294967296"),
        ({"name": "painwheel", "documents": 4}, r"documents is 4 .* 5 classes; expected 5 or more"),
        ({"name": "moons", "documents": 0}, r"documents is 0"),
        ({"name": "digits", "seed": 0}, r"source.seed is 0 for the data set 'digits'; expected none"),
        ({"name": "builtin", "documents": 9}, r"source.documents is 9 .*expected none.*source.limit"),
        ({"name": "files", "files": ("a.npz",), "seed": 1}, r"source.seed is 1 for the data set 'files'"),
        ({"name": "moons", "label": "z"}, r"source.label is 'z'.*expected 'y'"),
        ({"name": "moons", "values_are": "counts"}, r"values_are is 'counts'.*weights"),
        ({"name": "moon"}, r"did you mean 'moons'"),
    ],
)
def test_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SourceConfig(**options)


@pytest.mark.parametrize("path", ["made://suns?seed=0&documents=9", "made://moons?seed=x", "made://"])
def test_an_address_of_nothing(path: str) -> None:
    with pytest.raises(DataError, match=r"is not the address of a made data set"):
        readers.schema_of(path, readers.MADE)
