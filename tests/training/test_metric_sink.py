"""Metrics on their way to a server that is slow, refuses or dies: none is lost, and none arrives twice."""

from __future__ import annotations

import math
import random
import sqlite3
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Sequence
from contextlib import closing
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from distclust.config import TrackingConfig
from distclust.errors import TrackingError
from distclust.training import metric_sink
from distclust.training.metric_sink import PointQueue, PointRefusedError, RunGoneError
from distclust.training.spool import MetricPoint, Spool
from distclust.training.tracking import MetricSink, Tracker, replay
from mlflow_server import SPOOL, MlflowServer, steps, wait_until

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


# ---- a real server ----------------------------------------------------------------------------------------


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
