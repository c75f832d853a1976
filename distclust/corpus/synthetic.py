"""Small labelled sets that are computed and not fetched: those of DAMIC's and DMAE's papers, and the digits.

Each is a pure function of its name, a seed and a number of documents, so any node makes the same rows and
nothing has to be stored; to the rest of the package they are files with addresses such as
``made://moons?seed=0&documents=1000``. Random numbers come from NumPy's ``RandomState``, whose stream is
frozen.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple
from urllib.parse import parse_qs, urlencode, urlsplit

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit

from distclust.errors import ConfigError, DataError

VERSION = 1
"""Raised when a generator changes: corpora of the old rows are then told from those of the new."""
SCHEME = "made://"
DIGITS = "digits"
_LARGEST_SEED = 2**32 - 1


class Made(NamedTuple):
    """Rows with their labels, in an order that the seed decides."""

    x: NDArray[np.float64]
    """(N, D)"""
    y: NDArray[np.int64]
    """(N,) 0 .. K-1; used to score, never to train."""
    latent: NDArray[np.float64] | None
    """(N, 2) the points behind the rows, which no method sees; for pictures. None for the digits."""
    image: tuple[int, int, int] | None
    """Channels, height and width of rows that are images."""


class Generator(NamedTuple):
    """How a set is made."""

    make: Callable[[np.random.RandomState, int], tuple[NDArray, NDArray, NDArray]]
    """(random numbers, N) -> rows (N, D), latent points (N, 2), labels (N,), in any order."""
    documents: int
    """How many there are unless told."""
    classes: int


# ---- DAMIC (arXiv 1812.06535), with the constants of DCN's simulation

_CENTRES = np.array([(10.0, 10.0), (0.0, 0.0), (10.0, 0.0), (0.0, 10.0)])
_DEVIATION = 1.5
_OBSERVED, _HIDDEN = 100, 10


def _labels(documents: int, classes: int) -> NDArray[np.int64]:
    """(N,) as many of each class as of the others, give or take one, in order of class."""
    sizes = np.full(classes, documents // classes)
    sizes[: documents % classes] += 1
    return np.repeat(np.arange(classes), sizes)


def _applied(weights: NDArray, rows: NDArray) -> NDArray:
    """Rows (N, J) through W (D, J): (N, D), added up in the order of j, whatever the BLAS."""
    return sum(np.outer(rows[:, j], weights[:, j]) for j in range(rows.shape[1]))  # type: ignore[return-value]


def _gaussians(random: np.random.RandomState, documents: int) -> tuple[NDArray, NDArray]:
    labels = _labels(documents, len(_CENTRES))
    return _CENTRES[labels] + _DEVIATION * random.standard_normal((documents, 2)), labels


def _sigmoid2(random: np.random.RandomState, documents: int) -> tuple[NDArray, NDArray, NDArray]:
    weights = random.standard_normal((_OBSERVED, 2))
    latent, labels = _gaussians(random, documents)
    return expit(_applied(weights, latent)) ** 2, latent, labels


def _tanh_sigmoid(random: np.random.RandomState, documents: int) -> tuple[NDArray, NDArray, NDArray]:
    weights = random.standard_normal((_OBSERVED, 2))
    latent, labels = _gaussians(random, documents)
    return np.tanh(expit(_applied(weights, latent))), latent, labels


def _sigmoid_sigmoid(random: np.random.RandomState, documents: int) -> tuple[NDArray, NDArray, NDArray]:
    inner = random.standard_normal((_HIDDEN, 2))
    outer = random.standard_normal((_OBSERVED, _HIDDEN))
    latent, labels = _gaussians(random, documents)
    return expit(_applied(outer, expit(_applied(inner, latent)))), latent, labels


# ---- DMAE (arXiv 2006.08177), with the constants of its example scripts


def _painwheel(random: np.random.RandomState, documents: int) -> tuple[NDArray, NDArray, NDArray]:
    """Five arms: (r, t) with r ~ N(1, .3^2), t ~ N(0, .05^2), turned by 2 pi k / 5 + .25 exp(r)."""
    labels = _labels(documents, 5)
    r, t = (random.standard_normal((documents, 2)) * (0.3, 0.05) + (1.0, 0.0)).T
    angle = 2 * np.pi * labels / 5 + 0.25 * np.exp(r)
    points = np.stack([r * np.cos(angle) - t * np.sin(angle), r * np.sin(angle) + t * np.cos(angle)], axis=1)
    return points, points, labels


def _blobs(
    random: np.random.RandomState, documents: int, centres: Sequence[tuple[float, ...]], deviation: float
) -> tuple[NDArray, NDArray]:
    from sklearn.datasets import make_blobs

    return make_blobs(documents, centers=centres, cluster_std=deviation, random_state=random, shuffle=False)


def _toroidal(random: np.random.RandomState, documents: int) -> tuple[NDArray, NDArray, NDArray]:
    """Blobs on the torus [-1, 1)^2: two of the four lie across its edges."""
    points, labels = _blobs(random, documents, [(1.0, 0.0), (-1.0, 1.0), (0.0, -1.0), (0.0, 0.0)], 0.05)
    points[points > 1] -= 2
    points[points < -1] += 2
    return points, points, labels


def _simplex(random: np.random.RandomState, documents: int) -> tuple[NDArray, NDArray, NDArray]:
    """Distributions over three outcomes; the latent points are where they lie in an equilateral triangle."""
    centres = [(0.0, 0.2, 0.8), (0.33, 0.33, 0.33), (1.0, 0.0, 0.0), (0.0, 0.9, 0.1)]
    points, labels = _blobs(random, documents, centres, 0.03)
    points = np.abs(points)
    points /= points.sum(axis=1, keepdims=True)
    return points, _applied(np.array([(0.0, 1.0, 0.5), (0.0, 0.0, np.sqrt(0.75))]), points), labels


def _moons(random: np.random.RandomState, documents: int) -> tuple[NDArray, NDArray, NDArray]:
    from sklearn.datasets import make_moons

    points, labels = make_moons(documents, noise=0.1, random_state=random, shuffle=False)
    return points, points, labels


def _circles(random: np.random.RandomState, documents: int) -> tuple[NDArray, NDArray, NDArray]:
    from sklearn.datasets import make_circles

    points, labels = make_circles(documents, noise=0.1, factor=0.1, random_state=random, shuffle=False)
    return points, points, labels


GENERATORS: dict[str, Generator] = {
    "damic-sigmoid2": Generator(_sigmoid2, 4000, 4),
    "damic-tanh-sigmoid": Generator(_tanh_sigmoid, 4000, 4),
    "damic-sigmoid-sigmoid": Generator(_sigmoid_sigmoid, 4000, 4),
    "painwheel": Generator(_painwheel, 1000, 5),
    "toroidal": Generator(_toroidal, 1000, 4),
    "moons": Generator(_moons, 1000, 2),
    "circles": Generator(_circles, 1000, 2),
    "simplex": Generator(_simplex, 1000, 4),
}
"""The sets that a seed decides. DAMIC's: x = sigmoid(Wv)^2, tanh(sigmoid(Wv)) and sigmoid(W2 sigmoid(W1 v))
of points v from four Gaussians (sigma 1.5) in the plane, W (100, 2), W1 (10, 2), W2 (100, 10) standard
normal."""
SETS = (*GENERATORS, DIGITS)
"""Every set that is made and not fetched."""


def check(name: str, seed: int | None, documents: int | None) -> None:
    """Refuse a seed or a number of documents that the set cannot have.

    Raises:
        ConfigError: saying what it can have.
    """
    generator = GENERATORS.get(name)
    if generator is None:
        for field, value in (("seed", seed), ("documents", documents)):
            if value is not None:
                raise ConfigError(
                    f"source.{field} is {value} for the data set {name!r}; expected none: only "
                    f"{', '.join(GENERATORS)} are made from a seed; leave it out"
                    + (", or take the first rows with source.limit." if field == "documents" else ".")
                )
        return
    if seed is not None and not 0 <= seed <= _LARGEST_SEED:
        raise ConfigError(f"source.seed is {seed}; expected 0 to {_LARGEST_SEED}; choose one of them.")
    if documents is not None and documents < generator.classes:
        raise ConfigError(
            f"source.documents is {documents} for the data set {name!r} of {generator.classes} classes; "
            f"expected {generator.classes} or more; leave it out for {generator.documents:,}."
        )


def make(name: str, seed: int | None = None, documents: int | None = None) -> Made:
    """The rows of a set: those that a corpus prepared from it has, in the same order, not scaled.

    Args:
        name: one of `SETS`.
        seed: of the random numbers, 0 unless given.
        documents: N, the set's own number unless given; the classes are of equal size, give or take one.

    Raises:
        ConfigError: no such set, or it cannot have this seed or number.
    """
    if name not in SETS:
        raise ConfigError(f"There is no made data set {name!r}; expected one of {', '.join(SETS)}.")
    check(name, seed, documents)
    if name == DIGITS:
        from sklearn.datasets import load_digits

        bunch = load_digits()
        return Made(bunch.data, bunch.target.astype(np.int64), None, (1, *bunch.images.shape[1:]))
    generator = GENERATORS[name]
    random = np.random.RandomState(seed or 0)
    x, latent, y = generator.make(random, documents or generator.documents)
    order = random.permutation(len(x))  # rows and labels alike, so that the first rows are a fair sample
    return Made(x[order], y[order].astype(np.int64), latent[order], None)


def latent_points(
    name: str, seed: int | None = None, documents: int | None = None
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """(N, 2) points to draw and (N,) labels, in the order of the documents.

    Of DAMIC's sets the points v in the plane that the rows are functions of, of ``simplex`` its triangle, of
    the other sets the rows themselves.

    Raises:
        ConfigError: the set has none.
    """
    made = make(name, seed, documents)
    if made.latent is None:
        raise ConfigError(
            f"The data set {name!r} has no points in the plane; expected one of {', '.join(GENERATORS)}."
        )
    return made.latent, made.y


def address(name: str, seed: int | None, documents: int | None) -> str:
    """What stands for the set where others have the path of a file."""
    generator = GENERATORS.get(name)
    if generator is None:
        return f"{SCHEME}{name}"
    return f"{SCHEME}{name}?{urlencode({'seed': seed or 0, 'documents': documents or generator.documents})}"


@functools.lru_cache(maxsize=2)
def load(path: str) -> Made:
    """The rows behind an `address`.

    Raises:
        DataError: it is not one.
    """
    parts = urlsplit(path)
    given = {key: values[0] for key, values in parse_qs(parts.query).items()}
    seed, documents = given.get("seed"), given.get("documents")
    try:
        return make(
            parts.netloc,
            None if seed is None else int(seed),
            None if documents is None else int(documents),
        )
    except ValueError as error:
        raise DataError(f"{path} is not the address of a made data set ({error}).") from error
