"""The rows of a shard: their Arrow schema, and the checks that everything later relies on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from distclust.corpus.manifest import KINDS
from distclust.errors import DataError


def corpus_schema(kind: str, n_features: int) -> pa.Schema:
    """The Arrow schema of a shard; ``n_features`` is the width of dense rows."""
    text = [
        pa.field("id", pa.string()),
        pa.field("labels", pa.list_(pa.string())),
        pa.field("title", pa.string()),
    ]
    if kind == "dense":
        return pa.schema([*text, pa.field("values", pa.list_(pa.float32(), n_features))])
    if kind == "sparse":
        numbers = [pa.field("indices", pa.list_(pa.int32())), pa.field("values", pa.list_(pa.float32()))]
        return pa.schema([*text, *numbers])
    raise DataError(f"kind is {kind!r}; expected one of {', '.join(KINDS)}: correct it.")


def validate_rows(
    offsets: NDArray[np.integer[Any]],
    indices: NDArray[np.integer[Any]],
    values: NDArray[np.floating[Any]],
    n_features: int | None,
    where: str,
) -> None:
    """Check CSR rows before anything relies on them.

    Args:
        offsets: (n + 1,) row bounds.
        indices, values: (nnz,).
        n_features: columns; None leaves the upper bound of the indices unchecked.
        where: what the rows are, for the message (a file name).

    Raises:
        DataError: naming the first bad row: unequal lengths, an index out of range, repeated or out of order,
            or a value that is NaN or infinite.
    """

    def row_of(position: int) -> int:
        return int(np.searchsorted(offsets, position, side="right")) - 1

    if (
        len(offsets) == 0
        or offsets[0] != 0
        or (len(offsets) > 1 and bool((offsets[1:] < offsets[:-1]).any()))
    ):
        raise DataError(f"{where}: the list offsets are damaged. Write the file again.")
    if len(indices) != len(values) or offsets[-1] != len(indices):
        raise DataError(
            f"{where}: {len(indices)} indices and {len(values)} values; expected one value for each index: "
            "correct the two columns."
        )
    if len(indices) == 0:
        return
    top = n_features if n_features is not None else 1 << 31
    if indices.min() < 0 or indices.max() >= top:
        at = int(np.flatnonzero((indices < 0) | (indices >= top))[0])
        raise DataError(
            f"{where}: row {row_of(at)} has index {int(indices[at])}; expected 0 to {top - 1} "
            f"for {top} features: correct the row or the number of features."
        )
    rising = indices[1:] > indices[:-1]
    bounds = offsets[1:-1]
    bounds = bounds[(bounds > 0) & (bounds < len(indices))]
    rising[bounds - 1] = True  # a row may start anywhere
    if not rising.all():
        at = int(np.flatnonzero(~rising)[0]) + 1
        repeated = indices[at] == indices[at - 1]
        raise DataError(
            f"{where}: row {row_of(at)} has {'the repeated' if repeated else 'the unsorted'} index "
            f"{int(indices[at])} (after {int(indices[at - 1])}); expected strictly rising indices in a row: "
            f"{'add up the values of equal indices' if repeated else 'sort each row by index'}."
        )
    validate_finite(values, where, row_of)


def validate_finite(values: NDArray[np.floating[Any]], where: str, row_of: Callable[[int], int]) -> None:
    """Raise DataError for a NaN or infinite value; ``row_of`` turns a flat position into a row number."""
    if np.isfinite(values).all():
        return
    at = int(np.flatnonzero(~np.isfinite(values))[0])
    raise DataError(
        f"{where}: row {row_of(at)} has the value {float(values[at])}; expected finite numbers: "
        "remove the document or correct the value."
    )


def conform(
    table: pa.Table | pa.RecordBatch, kind: str, n_features: int | None, where: str = "rows"
) -> pa.Table:
    """The table in the schema of a shard, checked.

    Integer and floating lists of other widths are converted, as are large lists and strings; absent
    ``labels`` and ``title`` columns are filled in. ``n_features=None`` is for sparse rows whose width is
    not known yet.

    Raises:
        DataError: a column is missing, has another type or holds nulls, or the numbers are not valid rows.
    """
    if isinstance(table, pa.RecordBatch):
        table = pa.Table.from_batches([table])
    if kind == "dense" and n_features is None:
        n_features = _dense_width(table, where)
    schema = corpus_schema(kind, n_features or 0)
    columns = []
    for wanted in schema:
        if wanted.name in table.column_names:
            column = table.column(wanted.name)
        elif wanted.name == "labels":
            column = pa.chunked_array([pa.array([[]] * len(table), wanted.type)])
        elif wanted.name == "title":
            column = pa.chunked_array([pa.nulls(len(table), wanted.type)])
        else:
            raise DataError(
                f"{where}: no column {wanted.name!r} (columns: {', '.join(table.column_names)}); "
                f"expected one of type {wanted.type}: name the column."
            )
        columns.append(_cast(column, wanted, where))
    out = pa.Table.from_arrays(columns, schema=schema).combine_chunks()
    validate_batch(one_batch(out, where), kind, n_features, where)
    return out


def one_batch(table: pa.Table, where: str) -> pa.RecordBatch:
    """The table as a single record batch."""
    batches = table.combine_chunks().to_batches()
    if len(batches) > 1:
        raise DataError(f"{where}: too large for one shard; use fewer rows per shard.")
    return batches[0] if batches else pa.RecordBatch.from_pylist([], schema=table.schema)


def _dense_width(table: pa.Table, where: str) -> int:
    kind = table.schema.field("values").type if "values" in table.column_names else None
    if kind is None or not pa.types.is_fixed_size_list(kind):
        raise DataError(
            f"{where}: column 'values' is {kind}; expected a fixed-size list: give the rows one width."
        )
    return int(kind.list_size)


def _cast(column: pa.ChunkedArray, wanted: pa.Field, where: str) -> pa.ChunkedArray:
    """The column in the wanted type. Null label lists become empty ones."""
    name, found = wanted.name, column.type
    if not _castable(found, wanted.type):
        raise DataError(f"{where}: column {name!r} is {found}; expected {wanted.type}: convert the column.")
    if name == "labels" and column.null_count:
        column = pc.fill_null(column, pa.scalar([], type=found))
    if found == wanted.type:
        return column
    try:
        # A float64 beyond float32's range becomes infinite here and is refused by the check that follows.
        return column.cast(wanted.type)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise DataError(f"{where}: column {name!r} ({found}) does not fit {wanted.type}: {error}") from error


def _castable(found: pa.DataType, wanted: pa.DataType) -> bool:
    def is_list(t: pa.DataType) -> bool:
        return pa.types.is_list(t) or pa.types.is_large_list(t)

    if pa.types.is_fixed_size_list(wanted):
        return (
            pa.types.is_fixed_size_list(found)
            and found.list_size == wanted.list_size
            and _castable(found.value_type, wanted.value_type)
        )
    if is_list(wanted):
        return is_list(found) and _castable(found.value_type, wanted.value_type)
    if pa.types.is_string(wanted):
        return pa.types.is_string(found) or pa.types.is_large_string(found) or pa.types.is_null(found)
    if pa.types.is_integer(wanted):
        return pa.types.is_integer(found) or pa.types.is_null(found)
    return pa.types.is_integer(found) or pa.types.is_floating(found) or pa.types.is_null(found)


def sparse_arrays(
    batch: pa.RecordBatch, where: str
) -> tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.float32]]:
    """(n + 1,) offsets, (nnz,) indices, (nnz,) values: views of the batch's buffers, offsets from 0."""
    indices, values = batch.column("indices"), batch.column("values")
    offsets = _offsets(indices)
    other = _offsets(values)
    if not np.array_equal(offsets - offsets[0], other - other[0]):
        row = int(np.flatnonzero(np.diff(offsets) != np.diff(other))[0])
        raise DataError(
            f"{where}: row {row} has {offsets[row + 1] - offsets[row]} indices and "
            f"{other[row + 1] - other[row]} values; expected lists of equal length: correct the two columns."
        )
    flat_indices, flat_values = indices.flatten(), values.flatten()
    for name, flat in (("indices", flat_indices), ("values", flat_values)):
        if flat.null_count:
            raise DataError(f"{where}: a list in {name!r} holds a null; expected numbers: remove it.")
    if offsets[0] != 0:
        offsets = offsets - offsets[0]
    return offsets, _numpy(flat_indices), _numpy(flat_values)


def _offsets(column: pa.ListArray) -> NDArray[np.int32]:
    if len(column) == 0:
        return np.zeros(1, np.int32)
    return _numpy(column.offsets)


def _numpy(array: pa.Array) -> NDArray[Any]:
    return array.to_numpy(zero_copy_only=True)


def dense_array(batch: pa.RecordBatch, n_features: int, where: str) -> NDArray[np.float32]:
    """(n, n_features) values: a view of the batch's buffer."""
    flat = batch.column("values").flatten()
    if flat.null_count:
        raise DataError(f"{where}: a row holds a null; expected numbers: remove the document or fill it in.")
    return _numpy(flat).reshape(len(batch), n_features)


def validate_batch(batch: pa.RecordBatch, kind: str, n_features: int | None, where: str) -> None:
    """Check a batch in the schema of a shard: no nulls where none may be, and valid numbers.

    Raises:
        DataError: naming ``where`` and the first bad row.
    """
    for name in batch.schema.names:
        if name != "title" and batch.column(name).null_count:
            row = pc.index(pc.is_null(batch.column(name)), pa.scalar(True)).as_py()
            raise DataError(f"{where}: row {row} has no {name} (null); expected a value: fill in the column.")
    if batch.column("labels").flatten().null_count:
        raise DataError(
            f"{where}: a list in 'labels' holds a null; expected text, or an empty list: remove it."
        )
    if kind == "sparse":
        validate_rows(*sparse_arrays(batch, where), n_features, where)
        return
    assert n_features is not None
    dense = dense_array(batch, n_features, where)
    validate_finite(dense.reshape(-1), where, lambda at: at // n_features)


@dataclass(slots=True)
class RowCounts:
    """Documents of each kind; the sum over shards goes into the manifest's ``counts`` and ``classes``."""

    documents: int = 0
    empty: int = 0
    unlabelled: int = 0
    multi_labelled: int = 0
    classes: set[str] = field(default_factory=set)

    @classmethod
    def of(cls, table: pa.Table | pa.RecordBatch) -> RowCounts:
        """The counts of one table in the schema of a shard."""
        labels = table.column("labels")
        n_labels = np.asarray(pc.fill_null(pc.list_value_length(labels), 0))
        single = labels.filter(pa.array(n_labels == 1))
        classes = set(pc.unique(pc.list_flatten(single)).to_pylist()) - {None}
        values = table.column("values")
        if pa.types.is_fixed_size_list(values.type):
            flat = np.asarray(pc.list_flatten(values)).reshape(len(table), values.type.list_size)
            filled = flat.any(axis=1)
        else:
            filled = np.asarray(pc.list_value_length(values)) > 0
        return cls(
            documents=len(table),
            empty=int((~filled).sum()),
            unlabelled=int((n_labels == 0).sum()),
            multi_labelled=int((n_labels > 1).sum()),
            classes=classes,
        )

    def __add__(self, other: RowCounts) -> RowCounts:
        return RowCounts(
            **{f.name: _plus(getattr(self, f.name), getattr(other, f.name)) for f in fields(self)}
        )

    def as_manifest(self) -> dict[str, Any]:
        """The manifest fields ``counts`` and ``classes``."""
        counts = {k: getattr(self, k) for k in ("documents", "empty", "unlabelled", "multi_labelled")}
        return {"counts": counts, "classes": tuple(sorted(self.classes))}


def _plus(a: Any, b: Any) -> Any:
    return a | b if isinstance(a, set) else a + b
