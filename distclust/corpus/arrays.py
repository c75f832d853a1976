"""NumPy archives as rows: a CSR matrix, a dense array, images, perhaps with labels."""

from __future__ import annotations

import functools
import os
from typing import NamedTuple

import fsspec
import numpy as np

from distclust.corpus import synthetic
from distclust.corpus.files import is_url, open_binary, unreadable
from distclust.errors import DataError

_CHANNELS = 4


class Arrays(NamedTuple):
    """The content of an ``.npz`` file: a CSR matrix, or a dense array, perhaps with labels."""

    csr: tuple[np.ndarray, np.ndarray, np.ndarray] | None
    """indptr, indices, data."""
    dense: np.ndarray | None
    """(n, D)"""
    labels: np.ndarray | None
    """(n,)"""
    n_rows: int
    n_features: int
    image: tuple[int, int, int] | None = None
    """Channels, height and width, where the dense rows are images."""


def load_npz(path: str) -> Arrays:
    """Read what ``scipy.sparse.save_npz`` wrote, or arrays ``x`` and ``y`` (or x_train, x_test, y_train,
    y_test, the training rows first).

    ``x`` may be rows (n, D), or images (n, H, W) or (n, H, W, C), which become rows in the order of channel,
    line and column: value (c, h, w) is number (c H + h) W + w of its row.

    Raises:
        DataError: it holds neither.
    """
    if is_url(path):
        fs, place = fsspec.core.url_to_fs(path)
        return _load_npz(path, str(fs.info(place)))
    status = os.stat(path)
    return _load_npz(path, f"{status.st_size} {status.st_mtime_ns}")


@functools.lru_cache(maxsize=1)
def _load_npz(path: str, _mark: str) -> Arrays:
    """`load_npz`, once for each content: `_mark` is what changes with it."""
    try:
        with open_binary(path) as file:
            found = np.load(file, allow_pickle=False)
            arrays = {name: _native(found[name]) for name in found.files}
    except Exception as error:  # zipfile, zlib, struct and numpy each have their own
        raise unreadable(path, "npz", error) from error
    if {"indptr", "indices", "data", "shape"} <= set(arrays):
        kind = arrays.get("format", np.array(b"csr")).item()
        kind = kind.decode() if isinstance(kind, bytes) else kind
        if kind != "csr":
            raise DataError(
                f"{path} holds a sparse matrix of format {kind!r}; expected csr; save it with "
                "scipy.sparse.save_npz(path, matrix.tocsr())."
            )
        n_rows, n_features = (int(size) for size in arrays["shape"])
        for name, kinds in (("indptr", "iu"), ("indices", "iu"), ("data", "fiub")):
            _check_array(path, name, arrays[name], kinds)
        _check_labels(path, arrays.get("y"), n_rows)
        if n_features < 1:
            raise DataError(f"{path}: the matrix has no columns; expected at least one; save it again.")
        indptr, nnz = arrays["indptr"], len(arrays["indices"])
        if (
            len(indptr) != n_rows + 1
            or nnz != len(arrays["data"])
            or indptr[0] != 0
            or indptr[-1] != nnz
            or (np.any(np.diff(indptr) < 0))
        ):
            raise DataError(
                f"{path}: indptr, indices and data do not fit together ({len(indptr)} row bounds for "
                f"{n_rows} rows, {nnz} indices, {len(arrays['data'])} values); expected a valid CSR matrix; "
                "save it again."
            )
        return Arrays((indptr, arrays["indices"], arrays["data"]), None, arrays.get("y"), n_rows, n_features)
    names = ("x", "y") if "x" in arrays else ("X", "y")
    if names[0] not in arrays and {"x_train", "x_test"} <= set(arrays):
        arrays["X"] = np.concatenate([arrays["x_train"], arrays["x_test"]])
        if {"y_train", "y_test"} <= set(arrays):
            arrays["y"] = np.concatenate([arrays["y_train"], arrays["y_test"]])
    x, y = arrays.get(names[0]), arrays.get("y")
    if x is None or x.ndim < 2 or x.dtype.kind not in "fiub":
        found_text = ", ".join(f"{k} {v.shape} {v.dtype}" for k, v in sorted(arrays.items()))
        raise DataError(
            f"{path} holds {found_text or 'nothing'}; expected a CSR matrix saved by scipy.sparse.save_npz, "
            "or an array x of numbers (n, ...) with labels y (n,) if there are any; save it so."
        )
    _check_labels(path, y, len(x))
    if x.dtype.itemsize > 8 or not np.prod(x.shape[1:]):
        raise DataError(
            f"{path}: x is {x.dtype} of shape {x.shape}; expected rows of at least one number of 64 bits or "
            "fewer; convert it with x.astype('float32')."
        )
    image = None
    if x.ndim == 4:
        if x.shape[3] > _CHANNELS >= x.shape[1]:
            raise DataError(
                f"{path}: x has shape {x.shape}, which looks like images with their channels first; expected "
                "(n, height, width, channels); move the axis with numpy.moveaxis(x, 1, -1)."
            )
        x = np.moveaxis(x, 3, 1)
        image = (x.shape[1], x.shape[2], x.shape[3])
    elif x.ndim == 3:
        image = (1, x.shape[1], x.shape[2])
    x = x.reshape(len(x), int(np.prod(x.shape[1:])))
    return Arrays(None, x, y, len(x), x.shape[1], image)


def _native(array: np.ndarray) -> np.ndarray:
    """The array in this machine's order of bytes."""
    return array if array.dtype.isnative else array.astype(array.dtype.newbyteorder("="))


def _check_array(path: str, name: str, array: np.ndarray, kinds: str) -> None:
    if array.ndim != 1 or array.dtype.kind not in kinds or array.dtype.itemsize > 8:
        raise DataError(
            f"{path}: {name} is {array.dtype} of shape {array.shape}; expected one dimension of "
            f"{'whole numbers' if kinds == 'iu' else 'numbers of 64 bits or fewer'}; save the matrix with "
            "scipy.sparse.save_npz."
        )


def _check_labels(path: str, labels: np.ndarray | None, n_rows: int) -> None:
    if labels is not None and (labels.shape != (n_rows,) or labels.dtype.kind not in "iufbUS"):
        raise DataError(
            f"{path}: y is {labels.dtype} of shape {labels.shape}; expected ({n_rows},), one label for each "
            "row, text or whole numbers; mend y."
        )


def load_made(path: str) -> Arrays:
    """The rows and labels of a set that is computed."""
    made = synthetic.load(path)
    return Arrays(None, made.x, made.y, len(made.x), made.x.shape[1], made.image)
