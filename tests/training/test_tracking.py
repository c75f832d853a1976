from __future__ import annotations

import json
import logging
import math
import os
import random
import signal
import socket
import sqlite3
import subprocess
import sys
import textwrap
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import closing, nullcontext
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from socketserver import TCPServer

import pytest

from distclust.config import TrackingConfig
from distclust.errors import TrackingError
from distclust.training import metric_sink
from distclust.training.metric_sink import PointQueue, PointRefusedError, RunGoneError
from distclust.training.reach import limits, reach
from distclust.training.spool import MetricPoint, Spool, clean_key, flatten, redact, shorten
from distclust.training.tracking import MetricSink, Tracker, code_version, replay
from mlflow_server import MlflowServer, free_port, wait_until

REPOSITORY = Path(__file__).parents[2]
SPOOL = "metrics-unsent.jsonl"


def steps(database: Path, run_id: str) -> dict[str, list[int]]:
    """Every (key, step) row of a run, straight from MLflow's table."""
    with closing(sqlite3.connect(database)) as db:
        rows = db.execute(
            "select key, step from metrics where run_uuid = ? order by step", (run_id,)
        ).fetchall()
    found: dict[str, list[int]] = {}
    for key, step in rows:
        found.setdefault(key, []).append(step)
    return found


@pytest.fixture(scope="module")
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database with MLflow's tables, made once: that takes seconds."""
    folder = tmp_path_factory.mktemp("mlflow")
    Tracker.open(TrackingConfig(), folder / "runs" / "first", name="first").finish("FINISHED")
    return folder / "runs" / "mlflow.db"


@pytest.fixture
def run_dir(tmp_path: Path, empty_database: Path) -> Path:
    """A run folder with such a database beside it."""
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "mlflow.db").write_bytes(empty_database.read_bytes())
    return tmp_path / "runs" / "demo"


def database(run_dir: Path) -> Path:
    return run_dir.parent / "mlflow.db"


# ---- the run ----------------------------------------------------------------------------------------------


def test_a_run_is_made_filled_and_taken_up_again(
    run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cwd = tmp_path / "elsewhere"
    cwd.mkdir()
    monkeypatch.chdir(cwd)
    before = dict(os.environ)
    config = {"method": "damic", "model": {"hidden": [500, 10], "note": "x" * 7000}, "w:ö": 1}
    config |= {f"p{i}": i for i in range(250)}
    manifest = {
        "kind": "sparse",
        "n_rows": 7,
        "n_features": 5,
        "shards": [{"sha256": "ab"}],
        "classes": ["a"],
    }
    tracker = Tracker.open(TrackingConfig(), run_dir, name="demo")
    tracker.log_params(config)
    tracker.log_dataset(manifest, "/data/corpus", fingerprint="f" * 64)
    tracker.log_tags({"host": "a"})
    tracker.log_final({"nmi": 0.5, "none": math.nan, "inf": math.inf})
    (tmp_path / "summary.json").write_text("{}")
    tracker.log_artifacts(tmp_path / "summary.json", "report")
    assert tracker.finish("KILLED") is None
    client = tracker._client
    assert client is not None
    assert tracker.run_id is not None
    assert client.get_run(tracker.run_id).info.status == "KILLED"

    again = Tracker.open(TrackingConfig(), run_dir, name="demo")
    assert again.run_id == tracker.run_id
    run = client.get_run(tracker.run_id)
    assert run.info.status == "RUNNING"
    again.log_params(config | {"method": "dmae", "new": 1})
    again.log_dataset(manifest, "/data/corpus", fingerprint="f" * 64)
    again.log_final({"nmi": 0.5, "none": math.nan, "inf": math.inf})
    again.log_final({"nmi": 0.75})
    again.finish("FINISHED")

    run = client.get_run(tracker.run_id)
    assert run.info.status == "FINISHED"
    assert run.info.run_name == "demo"
    assert len(run.data.params) == 255
    assert run.data.params["model.note"] == "x" * 5997 + "..."
    assert run.data.params["w:ö"] == "1"
    assert (run.data.params["method"], run.data.tags["resumed.method"]) == ("damic", "dmae")
    assert run.data.tags["host"] == "a"
    assert run.data.tags["distclust.version"] == code_version()["version"]
    assert run.data.tags.get("mlflow.source.git.commit") == code_version().get("commit")
    [entered] = run.inputs.dataset_inputs
    assert (entered.dataset.name, entered.dataset.digest) == ("corpus", "f" * 36)
    assert json.loads(entered.dataset.profile)["fingerprint"] == "f" * 64
    assert json.loads(entered.dataset.source) == {"uri": "/data/corpus"}
    assert steps(database(run_dir), tracker.run_id) == {"nmi": [0, 1], "none": [0], "inf": [0]}
    assert run.data.metrics["nmi"] == 0.75
    assert [file.path for file in client.list_artifacts(tracker.run_id, "report")] == ["report/summary.json"]
    assert list(cwd.iterdir()) == []
    assert dict(os.environ) == before
    assert not (run_dir / SPOOL).exists()


@pytest.mark.parametrize(
    ("error", "status"),
    [(None, "FINISHED"), (ValueError, "FAILED"), (KeyboardInterrupt, "KILLED"), (SystemExit, "KILLED")],
)
def test_a_run_always_ends(run_dir: Path, error: type[BaseException] | None, status: str) -> None:
    tracker = Tracker.open(TrackingConfig(), run_dir, name="demo")
    with pytest.raises(error) if error else nullcontext(), tracker:
        if error is not None:
            raise error
    assert tracker._client is not None
    assert tracker._client.get_run(tracker.run_id).info.status == status


def test_the_environments_run_is_taken_up_and_the_folders_run_goes_first(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    outer = Tracker.open(TrackingConfig(), run_dir, name="outer").run_id
    monkeypatch.setenv("MLFLOW_RUN_ID", str(outer))
    inner = Tracker.open(TrackingConfig(), run_dir.parent / "other", name="inner")
    assert inner.run_id == outer
    monkeypatch.setenv("MLFLOW_RUN_ID", "0" * 32)
    assert Tracker.open(TrackingConfig(), run_dir, name="outer").run_id == outer
    assert "MLFLOW_RUN_ID" in caplog.text


def test_artifacts_lie_beside_the_database_and_not_where_the_command_was_given(run_dir: Path) -> None:
    tracker = Tracker.open(TrackingConfig(experiment="another"), run_dir, name="demo")
    assert tracker._client is not None
    run = tracker._client.get_run(str(tracker.run_id))
    assert run.info.artifact_uri == f"{(run_dir.parent / 'mlartifacts').as_uri()}/{tracker.run_id}/artifacts"


def test_a_run_that_is_gone_is_refused_with_the_remedy(run_dir: Path) -> None:
    tracker = Tracker.open(TrackingConfig(), run_dir, name="demo")
    assert tracker._client is not None
    tracker._client.delete_run(tracker.run_id)
    with pytest.raises(TrackingError, match=rf"{tracker.run_id}.*deleted.*delete .*mlflow\.json"):
        Tracker.open(TrackingConfig(on_unreachable="spool"), run_dir, name="demo")
    (run_dir / "mlflow.json").write_text(json.dumps({"run_id": "0" * 32}))
    with pytest.raises(TrackingError, match=r"has no run 0+; .*delete .*mlflow\.json"):
        Tracker.open(TrackingConfig(on_unreachable="spool"), run_dir, name="demo")


# ---- a server that is not there ---------------------------------------------------------------------------


class Answer(BaseHTTPRequestHandler):
    """A server in trouble: every request gets the server's `code`."""

    def do_GET(self) -> None:
        self.send_error(self.server.code)  # type: ignore[attr-defined]

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture(params=["refused", "silent", "500", "no database", "no folder"])
def broken_uri(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    if request.param == "refused":
        yield f"http://user:secret@127.0.0.1:{free_port()}"
    elif request.param == "silent":
        with closing(socket.socket()) as listener:
            listener.bind(("127.0.0.1", 0))
            listener.listen()
            yield f"http://user:secret@127.0.0.1:{listener.getsockname()[1]}"
    elif request.param == "500":
        with ThreadingHTTPServer(("127.0.0.1", 0), Answer) as server:
            server.code = 500  # type: ignore[attr-defined]
            threading.Thread(target=server.serve_forever, daemon=True).start()
            yield f"http://user:secret@127.0.0.1:{server.server_port}"
            server.shutdown()
    elif request.param == "no database":
        (tmp_path / "text.db").write_text("not a database, but long enough to be taken for one" * 20)
        yield f"sqlite:///{tmp_path}/text.db"
    else:
        (tmp_path / "file").write_text("")
        yield f"sqlite:///{tmp_path}/file/mlflow.db"


def test_a_server_that_is_away_is_an_error_within_seconds(broken_uri: str, tmp_path: Path) -> None:
    started = time.monotonic()
    with pytest.raises(TrackingError) as caught:
        Tracker.open(TrackingConfig(uri=broken_uri), tmp_path / "runs" / "demo", name="demo")
    assert time.monotonic() - started < 10
    message = str(caught.value)
    assert "does not answer" in message
    assert "expected" in message
    assert "tracking.on_unreachable=spool" in message
    assert "secret" not in message
    assert not (tmp_path / "runs").exists()


def test_a_server_that_is_being_restarted_is_waited_for() -> None:
    port = free_port()
    with ThreadingHTTPServer(("127.0.0.1", port), Answer, bind_and_activate=False) as server:
        server.code = 404  # type: ignore[attr-defined]

        def start() -> None:
            TCPServer.server_bind(server)  # HTTPServer's own looks up the host's name, which may take seconds
            server.server_activate()
            server.serve_forever()

        later = threading.Timer(0.3, start)
        later.daemon = True  # a failure must not keep the process from ending
        later.start()
        try:
            reach(f"http://127.0.0.1:{port}")
        finally:
            server.shutdown()


def test_without_a_server_everything_is_spooled_and_replayed(
    run_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    away = TrackingConfig(uri=f"http://127.0.0.1:{free_port()}", on_unreachable="spool", experiment="later")
    with caplog.at_level(logging.WARNING):
        tracker = Tracker.open(away, run_dir, name="demo")
    assert tracker.run_id is None
    assert str(run_dir / SPOOL) in caplog.text
    tracker.log_params({"seed": 3})
    tracker.log_dataset({"kind": "dense", "shards": []}, "/data/corpus")
    sink = MetricSink(tracker.uri, tracker.run_id, run_dir / SPOOL)
    for step in range(2500):
        sink.log(step, {"loss": 1.0 / (step + 1), "bad": math.nan})
    assert sink.close() == run_dir / SPOOL
    tracker.log_final({"nmi": 0.5, "bad final": math.inf})
    assert tracker.finish("FINISHED") == run_dir / SPOOL
    for line in (run_dir / SPOOL).read_text().splitlines():
        json.loads(line, parse_constant=lambda constant: pytest.fail(f"{constant} is not JSON"))

    uri = f"sqlite:///{database(run_dir)}"
    kept = (run_dir / SPOOL).read_bytes()
    run_id = replay(run_dir / SPOOL, uri)
    (run_dir / SPOOL).write_bytes(kept)  # as if the replay had been cut off at its end
    assert replay(run_dir, uri) == run_id
    assert not (run_dir / SPOOL).exists()
    found = steps(database(run_dir), run_id)
    assert found["loss"] == found["bad"] == list(range(2500))
    assert found["nmi"] == found["bad final"] == [0]
    resumed = Tracker.open(TrackingConfig(), run_dir, name="demo")
    assert resumed.run_id == run_id
    assert resumed._client is not None
    run = resumed._client.get_run(run_id)
    assert run.data.params == {"seed": "3"}
    assert run.info.run_name == "demo"
    assert resumed._client.get_experiment(run.info.experiment_id).name == "later"
    assert len(run.inputs.dataset_inputs) == 1
    assert math.isnan(run.data.metrics["bad"])


def test_a_spool_of_earlier_steps_fills_the_gap_of_a_run_that_went_on(run_dir: Path) -> None:
    tracker = Tracker.open(TrackingConfig(), run_dir, name="demo")
    sink = MetricSink(tracker.uri, tracker.run_id, run_dir / SPOOL)
    for step in (*range(5), *range(8, 12)):
        sink.log(step, {"loss": 1.0})
    assert sink.close() is None
    Spool(run_dir / SPOOL).append_points([MetricPoint("loss", 1.0, step, 1) for step in range(4, 9)])
    resumed = Tracker.open(TrackingConfig(), run_dir, name="demo")
    assert steps(database(run_dir), str(resumed.run_id)) == {"loss": list(range(12))}
    assert not (run_dir / SPOOL).exists()


def test_a_missing_spool_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TrackingError, match="does not exist"):
        replay(tmp_path / SPOOL, "sqlite:///x.db")


# ---- the queue, against a server of known moods -----------------------------------------------------------


class MoodyServer:
    """Keeps points in memory; before and after each request a mood may strike."""

    def __init__(self) -> None:
        self.points: list[MetricPoint] = []
        self.away = False
        self.loses_answers = 0
        self.largest = metric_sink.MAX_BATCH
        self.pause_s = 0.0
        self.refused = ""
        self.gone = False

    def last_steps(self) -> dict[str, int]:
        if self.gone:
            raise RunGoneError("no such run")
        if self.away:
            raise ConnectionError("away")
        last: dict[str, int] = {}
        for point in self.points:
            last[point.key] = max(point.step, last.get(point.key, point.step))
        return last

    def send(self, points: Sequence[MetricPoint]) -> None:
        time.sleep(self.pause_s)
        if self.away:
            raise ConnectionError("away")
        if len(points) > self.largest:
            raise OSError("413 Request Entity Too Large")
        if any(point.key == self.refused for point in points):
            raise PointRefusedError("no")
        self.points.extend(points)
        if self.loses_answers:
            self.loses_answers -= 1
            raise TimeoutError("the answer was lost")

    def counts(self) -> Counter[tuple[str, int]]:
        return Counter((point.key, point.step) for point in self.points)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> MoodyServer:
    monkeypatch.setattr(metric_sink, "FIRST_DELAY_S", 0.01)
    return MoodyServer()


def once(n_steps: int, *keys: str) -> Counter[tuple[str, int]]:
    return Counter((key, step) for key in keys for step in range(n_steps))


def test_a_lost_answer_makes_no_duplicate(server: MoodyServer, tmp_path: Path) -> None:
    server.loses_answers = 3
    queue = PointQueue(server, tmp_path / SPOOL, interval_s=0.01)
    for step in range(3000):
        queue.log(step, {"a": 1.0, "b": 2.0})
    assert queue.close() is None
    assert server.loses_answers == 0
    assert server.counts() == once(3000, "a", "b")


def test_requests_get_smaller_until_they_pass(server: MoodyServer, tmp_path: Path) -> None:
    server.largest = 70
    queue = PointQueue(server, tmp_path / SPOOL, interval_s=0.01)
    for step in range(500):
        queue.log(step, {"a": 1.0})
    assert queue.close() is None
    assert server.counts() == once(500, "a")


def test_a_refused_point_does_not_hold_up_the_others(
    server: MoodyServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    server.refused = "bad"
    queue = PointQueue(server, tmp_path / SPOOL, interval_s=0.01)
    for step in range(20):
        queue.log(step, {"a": 1.0, "bad": 2.0})
    assert queue.close() is None
    assert server.counts() == once(20, "a")
    assert "bad" in caplog.text


def test_log_costs_microseconds_while_the_server_is_slow(server: MoodyServer, tmp_path: Path) -> None:
    server.pause_s = 0.5
    queue = PointQueue(server, tmp_path / SPOOL, interval_s=0.01)
    took = []
    for step in range(2000):
        before = time.perf_counter()
        queue.log(step, {"a": 1.0, "b": 2.0, "c": 3.0})
        took.append(time.perf_counter() - before)
    assert sorted(took)[len(took) // 2] < 1e-4
    assert max(took) < 0.25  # half of one request, on a machine that others use too
    before = time.perf_counter()
    assert queue.close(timeout_s=0.2) == tmp_path / SPOOL
    assert time.perf_counter() - before < 2
    waiting = {point[:3] for point in Spool(tmp_path / SPOOL).read_points(10_000)[0]}
    there = {point[:3] for point in list(server.points)}
    assert len(there | waiting) == 6000


def test_nothing_is_lost_over_the_memory_bound(server: MoodyServer, tmp_path: Path) -> None:
    server.away = True
    queue = PointQueue(server, tmp_path / SPOOL, {"run_id": "r"}, memory_points=100, interval_s=0.01)
    for step in range(3000):
        queue.log(step, {"a": 1.0, "b": 2.0})
    wait_until(lambda: len(queue.pending()) <= 100)
    assert Spool(tmp_path / SPOOL).has_metrics()
    server.away = False
    for step in range(3000, 3500):
        queue.log(step, {"a": 1.0, "b": 2.0})
    assert queue.close() is None
    assert server.counts() == once(3500, "a", "b")
    assert [point.step for point in server.points if point.key == "a"] == list(range(3500))
    assert list(tmp_path.iterdir()) == []


def test_memory_is_bounded_under_a_slow_server_too(server: MoodyServer, tmp_path: Path) -> None:
    server.pause_s = 0.1
    queue = PointQueue(server, tmp_path / SPOOL, memory_points=100, interval_s=0.01)
    for step in range(5000):
        queue.log(step, {"a": 1.0})
    wait_until(lambda: Spool(tmp_path / SPOOL).has_metrics())
    assert queue.close() is None
    assert server.counts() == once(5000, "a")


def test_a_fragment_does_not_swallow_the_next_record(tmp_path: Path) -> None:
    spool = Spool(tmp_path / SPOOL)
    spool.append([{"type": "tags", "tags": {}}])
    with open(spool.path, "ab") as file:
        file.write(b'{"type": "metr')
    spool.append_points([MetricPoint("a", 1.0, 1, 1)])
    assert [record["type"] for record in spool.records()] == ["tags", "metric"]


def test_a_killed_process_is_taken_up_from_file_checkpoint_and_recomputed_steps(
    server: MoodyServer, tmp_path: Path
) -> None:
    """The server has steps to 10, the file 8 to 30, the checkpoint of step 40 had 25 to 40 pending."""
    server.points = [MetricPoint("a", 1.0, step, 1) for step in range(11)]
    spool = Spool(tmp_path / SPOOL)
    spool.append_points([MetricPoint("a", 1.0, step, 1) for step in range(8, 31)])
    with open(spool.path, "ab") as file:
        file.write(b'{"type": "metric", "key": "a", "val')  # the process died here
    queue = PointQueue(server, tmp_path / SPOOL, interval_s=0.01)
    queue.offer([MetricPoint("a", 1.0, step, 1) for step in range(25, 41)])
    for step in range(41, 60):
        queue.log(step, {"a": 1.0})
    assert queue.close() is None
    assert server.counts() == once(60, "a")
    assert not spool.path.exists()


def test_pending_points_are_those_that_nobody_acknowledged(server: MoodyServer, tmp_path: Path) -> None:
    queue = PointQueue(server, tmp_path / SPOOL, interval_s=0.01)
    queue.log(0, {"a": 1.0})
    wait_until(lambda: not queue.pending())
    server.away = True
    queue.log(1, {"a": 2.0})
    time.sleep(0.1)
    [point] = queue.pending()
    assert point[:3] == ("a", 2.0, 1)
    server.away = False
    assert queue.close() is None
    assert server.counts() == once(2, "a")


def test_a_server_that_stays_away_leaves_a_file_whose_path_is_logged(
    server: MoodyServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    server.away = True
    queue = PointQueue(server, tmp_path / SPOOL, {"run_id": "r"}, interval_s=0.01)
    queue.log(0, {"a": math.nan, "b/ü?": 2})
    queue.log(1, {"a": object()})  # type: ignore[dict-item]
    before = time.monotonic()
    assert queue.close(timeout_s=1.0) == tmp_path / SPOOL
    assert time.monotonic() - before < 3
    assert str(tmp_path / SPOOL) in caplog.text
    [header, first, second] = Spool(tmp_path / SPOOL).records()
    assert header == {"type": "run", "run_id": "r"}
    assert (first["key"], first["value"], second["key"]) == ("a", "nan", "b/ü_")
    queue.log(2, {"a": 1.0})  # too late, and still no exception
    queue.close()


def test_a_run_that_is_gone_sends_its_metrics_to_the_file(server: MoodyServer, tmp_path: Path) -> None:
    server.gone = True
    queue = PointQueue(server, tmp_path / SPOOL, interval_s=0.01)
    queue.log(0, {"a": 1.0})
    wait_until(lambda: not queue.pending())  # it does not wait in memory for a server that will never take it
    assert queue.close() == tmp_path / SPOOL
    assert Spool(tmp_path / SPOOL).has_metrics()


def test_a_full_disk_is_said_and_stops_nothing(
    server: MoodyServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    server.away = True
    queue = PointQueue(server, "/dev/full", memory_points=10, interval_s=0.01)
    for step in range(100):
        queue.log(step, {"a": 1.0})
    wait_until(lambda: len(queue.pending()) <= 10)
    assert queue.close(timeout_s=0.5) is None
    assert "cannot be written" in caplog.text


def test_the_drivers_records_survive_the_sinks_file(server: MoodyServer, tmp_path: Path) -> None:
    spool = Spool(tmp_path / SPOOL)
    spool.append([{"type": "run", "run_id": "r"}, {"type": "tags", "tags": {"a": "b"}}])
    spool.append_points([MetricPoint("a", 1.0, step, 1) for step in range(5)])
    queue = PointQueue(server, tmp_path / SPOOL, interval_s=0.01)
    queue.log(5, {"a": 1.0})
    assert queue.close() is None
    assert server.counts() == once(6, "a")
    assert [record["type"] for record in Spool(tmp_path / SPOOL).records()] == ["run", "tags"]


# ---- SQLite, and processes that die -----------------------------------------------------------------------


def test_any_value_and_name_reaches_sqlite_once(run_dir: Path) -> None:
    tracker = Tracker.open(TrackingConfig(), run_dir, name="demo")
    sink = MetricSink(tracker.uri, tracker.run_id, run_dir / SPOOL)
    values = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf, "x y@%": 1.0, "../up": 2.0, "k" * 300: 3.0}
    for _ in range(2):
        for step in range(3):
            sink.log(step, values)
    assert sink.close(30) is None
    found = steps(database(run_dir), str(tracker.run_id))
    assert len(found) == 6
    assert set(map(tuple, found.values())) == {(0, 1, 2)}


def test_a_database_on_another_disk_is_not_made_anew(run_dir: Path, tmp_path: Path) -> None:
    sink = MetricSink(f"sqlite:///{tmp_path}/other/mlflow.db", "0" * 32, run_dir / SPOOL)
    sink.log(0, {"a": 1.0})
    assert sink.close(30) == run_dir / SPOOL
    assert not (tmp_path / "other").exists()


CHILD = """
import os, signal, sys, time
from distclust.training import tracking
from distclust.training.spool import MetricPoint

uri, run_id, spool, first, last, die_after = *sys.argv[1:4], *map(int, sys.argv[4:7])
send = tracking._RunServer.send
sent = 0

def send_and_die(self, points):
    global sent
    send(self, points)
    sent += len(points)
    if die_after and sent >= die_after:  # the server has them, and nobody here knows
        os.kill(os.getpid(), signal.SIGKILL)

tracking._RunServer.send = send_and_die
sink = tracking.MetricSink(uri, run_id, spool, interval_s=0.05)
sink.offer([MetricPoint("loss", 0.5, step, 1) for step in range(max(0, first - 20), first)])
for step in range(first, last):
    sink.log(step, {"loss": 0.5, "acc": step})
    time.sleep(0.002)
assert sink.close(30) is None
"""


def child(tracker: Tracker, run_dir: Path, first: int, last: int, die_after: int) -> subprocess.Popen[str]:
    arguments = [
        tracker.uri,
        str(tracker.run_id),
        str(run_dir / SPOOL),
        str(first),
        str(last),
        str(die_after),
    ]
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(CHILD), *arguments],
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        stderr=subprocess.PIPE,
        text=True,
    )


def test_a_kill_between_sending_and_acknowledgement_logs_no_step_twice(run_dir: Path) -> None:
    """In its first life SIGKILL strikes once the server has taken a batch; the driver logs all the while."""
    tracker = Tracker.open(TrackingConfig(), run_dir, name="demo")
    first = child(tracker, run_dir, 0, 600, die_after=300)
    while first.poll() is None:
        tracker.log_tags({"driver": str(time.time())})
        time.sleep(0.05)
    assert first.returncode == -signal.SIGKILL, first.stderr and first.stderr.read()
    there = steps(database(run_dir), str(tracker.run_id))
    assert 100 < len(there["loss"]) < 600
    second = child(tracker, run_dir, 40, 600, die_after=0)  # from a checkpoint at step 40: steps overlap
    assert second.wait(60) == 0, second.stderr and second.stderr.read()
    assert steps(database(run_dir), str(tracker.run_id)) == {
        "loss": list(range(600)),
        "acc": list(range(600)),
    }


# ---- a real server ----------------------------------------------------------------------------------------


@pytest.fixture
def mlflow_server(tmp_path: Path) -> Iterator[MlflowServer]:
    running = MlflowServer(tmp_path)
    running.start()
    yield running
    running.kill()


@pytest.mark.slow
def test_a_server_killed_in_mid_run_has_everything_once_it_is_back(
    mlflow_server: MlflowServer, tmp_path: Path
) -> None:
    tracking = TrackingConfig(uri=mlflow_server.uri)
    tracker = Tracker.open(tracking, tmp_path / "runs" / "demo", name="demo")
    sink = MetricSink(tracker.uri, tracker.run_id, tracker.spool, interval_s=0.05, memory_points=500)
    longest = 0.0
    for step in range(3000):
        if step == 1000:
            assert steps(mlflow_server.database, str(tracker.run_id)).get("loss")
            mlflow_server.kill()
        if step == 2000:
            assert sink.pending() or tracker.spool.exists()
            mlflow_server.start()
        before = time.perf_counter()
        sink.log(step, {"loss": 1.0, "usage": math.nan if step % 7 == 0 else step, "top": math.inf})
        longest = max(longest, time.perf_counter() - before)
        time.sleep(0.002)
    assert longest < 0.25
    assert sink.close(60) is None
    assert tracker.finish("FINISHED") is None
    found = steps(mlflow_server.database, str(tracker.run_id))
    assert found == {key: list(range(3000)) for key in ("loss", "usage", "top")}
    assert not tracker.spool.exists()


@pytest.mark.slow
def test_a_server_killed_for_ever_leaves_a_spool_that_another_day_replays(
    mlflow_server: MlflowServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run_dir = tmp_path / "runs" / "demo"
    tracker = Tracker.open(TrackingConfig(uri=mlflow_server.uri), run_dir, name="demo")
    sink = MetricSink(tracker.uri, tracker.run_id, tracker.spool, interval_s=0.05)
    for step in range(1000):
        if step == 500:
            wait_until(lambda: steps(mlflow_server.database, str(tracker.run_id)).get("loss"))
            mlflow_server.kill()
        sink.log(step, {"loss": 1.0})
        time.sleep(0.001)
    assert sink.close(5) == tracker.spool
    before = time.monotonic()
    tracker.log_final({"nmi": 0.5})
    assert tracker.finish("FINISHED") == tracker.spool
    assert time.monotonic() - before < 30
    assert str(tracker.spool) in caplog.text
    with pytest.raises(TrackingError, match="Nothing is lost"):
        replay(run_dir, mlflow_server.uri)

    mlflow_server.start()
    assert replay(run_dir, mlflow_server.uri) == tracker.run_id
    found = steps(mlflow_server.database, str(tracker.run_id))
    assert found == {"loss": list(range(1000)), "nmi": [0]}
    with closing(sqlite3.connect(mlflow_server.database)) as db:
        [(status,)] = db.execute("select status from runs where run_uuid = ?", (tracker.run_id,)).fetchall()
    assert status == "FINISHED"
    assert not tracker.spool.exists()


class LosingProxy(BaseHTTPRequestHandler):
    """Forwards everything; some answers to a batch of metrics get lost, and large batches are refused."""

    protocol_version = "HTTP/1.0"
    target = ""
    luck = random.Random(0)
    lost = 0

    def forward(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        batch = self.path.endswith("/log-batch") and b'"metrics"' in body
        if batch and len(body) > 20_000:
            self.send_error(413)
            return
        request = urllib.request.Request(self.target + self.path, body or None, method=self.command)
        request.add_header("Content-Type", "application/json")
        try:
            with urllib.request.urlopen(request) as reply:
                status, content = reply.status, reply.read()
        except urllib.error.HTTPError as error:
            status, content = error.code, error.read()
        if batch and self.luck.random() < 0.5:
            type(self).lost += 1
            self.close_connection = True
            return
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(content)

    do_GET = do_POST = do_PATCH = forward  # noqa: N815

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.mark.slow
def test_lost_answers_and_too_large_requests_over_http(
    mlflow_server: MlflowServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metric_sink, "FIRST_DELAY_S", 0.01)
    monkeypatch.setattr(LosingProxy, "target", mlflow_server.uri)
    with ThreadingHTTPServer(("127.0.0.1", 0), LosingProxy) as proxy:
        threading.Thread(target=proxy.serve_forever, daemon=True).start()
        uri = f"http://127.0.0.1:{proxy.server_port}"
        tracker = Tracker.open(TrackingConfig(uri=uri), tmp_path / "runs" / "demo", name="demo")
        sink = MetricSink(uri, tracker.run_id, tracker.spool, interval_s=0.01)
        for step in range(4000):
            sink.log(step, {"loss": step, "nan": math.nan})
        assert sink.close(60) is None
        proxy.shutdown()
    assert LosingProxy.lost >= 3
    found = steps(mlflow_server.database, str(tracker.run_id))
    assert found == {"loss": list(range(4000)), "nan": list(range(4000))}


# ---- text rules -------------------------------------------------------------------------------------------


def test_what_a_user_set_in_the_environment_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    name, other = "MLFLOW_HTTP_REQUEST_TIMEOUT", "MLFLOW_HTTP_REQUEST_MAX_RETRIES"
    monkeypatch.setenv(name, "77")
    monkeypatch.delenv(other, raising=False)
    with limits(timeout_s=5, retries=0):
        assert (os.environ[name], os.environ[other]) == ("77", "0")
        with limits(timeout_s=9, retries=3):
            assert os.environ[other] == "3"
        assert os.environ[other] == "0"
    assert os.environ[name] == "77"
    assert other not in os.environ


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("https://user:pw@host:5000/a", "https://host:5000/a"),
        ("s3://bucket/key?X-Amz-Signature=abc", "s3://bucket/key"),
        (
            "postgresql+psycopg2://u:p@h/db and sqlite:////tmp/x.db",
            "postgresql+psycopg2://h/db and sqlite:////tmp/x.db",
        ),
        ("no address, me@home?", "no address, me@home?"),
    ],
)
def test_secrets_of_addresses_are_not_shown(text: str, shown: str) -> None:
    assert redact(text) == shown


def test_names_and_values_fit_mlflow() -> None:
    from mlflow.utils.validation import _validate_metric_name, _validate_param

    for name in ("a b/c", "../x", "/abs//y/", "ö@%", "", "k" * 400, "./."):
        _validate_metric_name(clean_key(name))
    flat = flatten({"a": {"b": [1], "c": None, "d": {}}, "e": "x" * 7000, "u": "http://a:b@c/"})
    assert flat["a.b"] == "[1]"
    assert (flat["a.c"], flat["a.d"], flat["u"]) == ("null", "{}", "http://c/")
    for key, value in flat.items():
        assert _validate_param(key, value).value == value
    assert shorten("abcdef", 5) == "ab..."


@pytest.mark.slow
def test_two_runs_that_begin_at_once_make_one_database(tmp_path: Path) -> None:
    """Without a lock MLflow's migrations collide, and one of the two does not start."""
    code = textwrap.dedent(
        """
        import sys, time
        from pathlib import Path
        import mlflow
        from distclust.config import TrackingConfig
        from distclust.training.tracking import Tracker
        folder = Path(sys.argv[1])
        (folder.parent / (folder.name + ".ready")).touch()
        while len(list(folder.parent.glob("*.ready"))) < 2:
            time.sleep(0.01)
        Tracker.open(TrackingConfig(), folder, name=folder.name).finish("FINISHED")
        """
    )
    both = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(tmp_path / name)], stderr=subprocess.PIPE, text=True
        )
        for name in ("a", "b")
    ]
    for process in both:
        _, said = process.communicate(timeout=300)
        assert process.returncode == 0, said[-2000:]
    with closing(sqlite3.connect(tmp_path / "mlflow.db")) as db:
        assert db.execute("select count(*) from runs where status = 'FINISHED'").fetchone() == (2,)


def test_the_command_that_opens_the_run_is_there(run_dir: Path) -> None:
    with Tracker.open(TrackingConfig(), run_dir, name="here") as tracker:
        program, *words = tracker.how_to_open.split()
    assert Path(program).exists()
    assert words == ["ui", "--backend-store-uri", tracker.uri]
