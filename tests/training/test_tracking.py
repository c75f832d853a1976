"""A run in MLflow: made, taken up again and ended; a server that is away; what MLflow takes as names."""

from __future__ import annotations

import json
import logging
import math
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from contextlib import closing, nullcontext
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from socketserver import TCPServer

import pytest

from distclust.config import TrackingConfig
from distclust.errors import TrackingError
from distclust.training.reach import limits, reach
from distclust.training.spool import MetricPoint, Spool, clean_key, flatten, redact, shorten
from distclust.training.tracking import MetricSink, Tracker, code_version, replay
from mlflow_server import SPOOL, free_port, steps

REPOSITORY = Path(__file__).parents[2]


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


def test_a_spool_is_replayed_from_where_the_run_folder_is_now(run_dir: Path, tmp_path: Path) -> None:
    """Moved since; and what cannot be found keeps the spool."""
    away = TrackingConfig(uri=f"http://127.0.0.1:{free_port()}", on_unreachable="spool")
    tracker = Tracker.open(away, run_dir, name="demo")
    for name in ("summary.json", "other.json"):
        (run_dir / name).write_text("{}")
        tracker.log_artifacts(run_dir / name)
    tracker.finish("FINISHED")
    moved = tmp_path / "moved" / "run"
    moved.parent.mkdir()
    run_dir.rename(moved)
    other = (moved / "other.json").rename(tmp_path / "other.json")

    uri = f"sqlite:///{database(moved)}"
    with pytest.raises(
        TrackingError, match=rf"other\.json cannot be sent.*nor beside {moved / SPOOL}; expected"
    ):
        replay(moved, uri)
    assert (moved / SPOOL).exists()
    other.rename(moved / "other.json")
    run_id = replay(moved, uri)
    assert not (moved / SPOOL).exists()
    from mlflow import MlflowClient

    client = MlflowClient(uri)
    assert {file.path for file in client.list_artifacts(run_id)} >= {"summary.json", "other.json"}
    assert client.get_run(run_id).info.status == "FINISHED"


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


@pytest.mark.parametrize(
    "content",
    [b"my notes\n", b"", b'{"text": "a"}\n', b'{"type": "news"}\n', b"PAR1\x00\x01\n\xff\n", b"[1]\n"],
)
def test_replay_takes_nothing_but_a_spool(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "notes.txt"
    file.write_bytes(content)
    with pytest.raises(TrackingError, match=r"notes\.txt is no spool.*expected"):
        replay(file, f"sqlite:///{tmp_path}/mlflow.db")
    assert file.read_bytes() == content
    assert list(tmp_path.iterdir()) == [file]
