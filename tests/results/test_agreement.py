"""How far runs agree, documents matched by id."""

from __future__ import annotations

import itertools

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from sklearn.metrics import normalized_mutual_info_score as nmi

from distclust.errors import ConfigError, DataError
from distclust.results.agreement import agreement

IDS = np.array([f"doc-{i}" for i in range(200)])


@pytest.fixture
def runs(tmp_path):
    """Three runs of the same documents, each in an order of its own: one alone, two alike."""
    random = np.random.default_rng(0)
    alike = random.integers(0, 4, 200)
    clusters = [random.integers(0, 3, 200), alike, np.where(np.arange(200) < 190, alike, 0)]
    for number, found in enumerate(clusters):
        order = random.permutation(200)
        pq.write_table(pa.table({"id": IDS[order], "cluster": found[order]}), tmp_path / f"{number}.parquet")
    return [tmp_path / f"{number}.parquet" for number in range(3)], clusters


def test_runs_that_collapsed_agree_with_nobody(runs, tmp_path):
    """One cluster for all is the same whatever the seed, and says nothing for a setting."""
    files, _ = runs
    for name in ("one", "two"):
        pq.write_table(pa.table({"id": IDS, "cluster": np.zeros(200, int)}), tmp_path / f"{name}.parquet")
    found = agreement([tmp_path / "one.parquet", tmp_path / "two.parquet", files[1], files[2]])
    assert found.of_each[:2].tolist() == [0.0, 0.0]
    assert found.used.tolist() == [1, 1, 4, 4]
    assert found.nearest == 2


def test_repeated_ids_and_no_documents_are_refused(tmp_path):
    for name, ids in (("a", ["x", "x", "y"]), ("b", ["x", "x", "y"]), ("none", []), ("nothing", [])):
        table = pa.table(
            {"id": pa.array(ids, pa.string()), "cluster": pa.array([0, 1, 2][: len(ids)], pa.int64())}
        )
        pq.write_table(table, tmp_path / f"{name}.parquet")
    with pytest.raises(DataError, match="'x' more than once"):
        agreement([tmp_path / "a.parquet", tmp_path / "b.parquet"])
    with pytest.raises(DataError, match="has no documents; expected"):
        agreement([tmp_path / "none.parquet", tmp_path / "nothing.parquet"])


def test_it_is_the_mean_nmi_of_pairs_and_names_the_run_in_the_middle(runs):
    files, clusters = runs
    found = agreement(files)
    pairs = {(i, j): nmi(clusters[i], clusters[j]) for i, j in itertools.combinations(range(3), 2)}
    for (i, j), value in pairs.items():
        assert found.pairs[i, j] == found.pairs[j, i] == pytest.approx(value, abs=1e-12)
    assert found.mean == pytest.approx(np.mean(list(pairs.values())), abs=1e-12)
    assert found.of_each[1] == pytest.approx((pairs[0, 1] + pairs[1, 2]) / 2, abs=1e-12)
    assert found.nearest == int(np.argmax(found.of_each)) and found.nearest in (1, 2)


def test_other_documents_one_run_and_the_same_run_are_refused(runs, tmp_path):
    (first, second, _), clusters = runs
    fewer, more = tmp_path / "fewer.parquet", tmp_path / "more.parquet"
    pq.write_table(pa.table({"id": IDS[1:], "cluster": clusters[0][1:]}), fewer)
    pq.write_table(pa.table({"id": [*IDS, "new"], "cluster": [*clusters[0], 0]}), more)
    with pytest.raises(DataError, match=r"fewer.parquet lacks 1 of the 200 .* of .*0.parquet, .*doc-0"):
        agreement([first, fewer])
    with pytest.raises(DataError, match=r"more.parquet has 201 .*, 1 more than the 200 of .*0.parquet"):
        agreement([first, more])
    with pytest.raises(ConfigError, match="expected two or more"):
        agreement([first])
    with pytest.raises(ConfigError, match="given twice"):
        agreement([first, second, first])
