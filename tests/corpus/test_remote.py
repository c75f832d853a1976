"""Corpora in S3: a real server of its protocol, and between it and the reader a proxy that fails."""

from __future__ import annotations

import contextlib
import http.client
import os
import signal
import socketserver
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from corpora import dense_rows, make_corpus
from distclust.corpus.cache import CacheConfig
from distclust.corpus.order import Order, OrderConfig
from distclust.corpus.shards import Corpus
from distclust.corpus.stream import Stream, StreamConfig
from distclust.errors import DataError

s3fs = pytest.importorskip("s3fs")
moto_server = pytest.importorskip("moto.server")

Fault = str | None
"""What the proxy does with a request: a status to answer with, "cut", "hang", or None to let it through."""


class Proxy(ThreadingHTTPServer):
    """Hands requests on to a server, but for those that ``fault(path, number)`` says to spoil."""

    daemon_threads = True

    def __init__(self, behind: tuple[str, int]) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.behind = behind
        self.fault: Callable[[str, int], Fault] = lambda path, number: None
        self.requests: list[str] = []
        self.let_go = threading.Event()
        self.lock = threading.Lock()

    def server_bind(self) -> None:
        socketserver.TCPServer.server_bind(self)  # without looking up the machine's name
        self.server_name, self.server_port = self.server_address[:2]  # type: ignore[assignment]

    def count(self, part: str) -> int:
        return sum(part in path for path in self.requests)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Proxy

    def handle_any(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        with self.server.lock:
            number = self.server.count(self.path.split("?")[0])
            if self.command == "GET":
                self.server.requests.append(self.path)
        fault = self.server.fault(self.path, number) if self.command == "GET" else None
        if fault in ("403", "503"):
            name = {"403": "AccessDenied", "503": "ServiceUnavailable"}[fault]
            text = f"<Error><Code>{name}</Code><Message>as the test wants</Message></Error>".encode()
            self.answer(int(fault), {"Content-Type": "application/xml"}, text, len(text))
            return
        behind = http.client.HTTPConnection(*self.server.behind)
        behind.request(self.command, self.path, body, dict(self.headers))
        found = behind.getresponse()
        content = found.read()
        behind.close()
        dropped = ("transfer-encoding", "connection", "content-length")
        headers = {k: v for k, v in found.getheaders() if k.lower() not in dropped}
        length = int(found.getheader("Content-Length") or len(content))
        self.answer(found.status, headers, content[: len(content) // 2] if fault else content, length)
        if fault == "hang":
            self.server.let_go.wait(60)
        if fault:
            self.close_connection = True

    def answer(self, status: int, headers: dict[str, str], content: bytes, length: int) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(length))
        self.end_headers()
        with contextlib.suppress(OSError):
            self.wfile.write(content)
            self.wfile.flush()

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = handle_any  # noqa: N815

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture(scope="module")
def server() -> Iterator[Proxy]:
    moto = moto_server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    moto.start()
    proxy = Proxy(moto.get_host_and_port())
    threading.Thread(target=proxy.serve_forever, daemon=True).start()
    yield proxy
    proxy.let_go.set()
    proxy.shutdown()
    proxy.server_close()
    moto.stop()


@pytest.fixture
def proxy(server: Proxy, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Proxy]:
    """The server as this process sees it; s3fs and botocore do not try again by themselves."""
    for name, value in {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{server.server_address[1]}",
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_CONFIG_FILE": str(tmp_path / "none"),
        "AWS_SHARED_CREDENTIALS_FILE": str(tmp_path / "none"),
        "AWS_MAX_ATTEMPTS": "1",
        "NO_PROXY": "127.0.0.1",
        "no_proxy": "127.0.0.1",
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("AWS_PROFILE", raising=False)
    monkeypatch.setattr(s3fs.S3FileSystem, "retries", 1)
    s3fs.S3FileSystem.clear_instance_cache()
    fs = s3fs.S3FileSystem()
    if not fs.exists("corpora"):
        fs.mkdir("corpora")
    yield server
    server.fault = lambda path, number: None
    server.requests.clear()
    s3fs.S3FileSystem.clear_instance_cache()


@pytest.fixture
def url(proxy: Proxy) -> str:
    where = "s3://corpora/words"
    if not s3fs.S3FileSystem().exists(f"{where}/manifest.json"):
        make_corpus(where, [30, 1, 64, 0, 25])
    s3fs.S3FileSystem.clear_instance_cache()
    proxy.requests.clear()
    return where


def reading(folder: Path, attempts: int = 4, **options: float) -> CacheConfig:
    return CacheConfig(folder=str(folder / "cache"), attempts=attempts, backoff_s=0.01, **options)  # type: ignore


def fail(part: str, fault: str, times: int) -> Callable[[str, int], Fault]:
    return lambda path, number: fault if part in path and number < times else None


def files(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.rglob("*") if p.is_file() and p.suffix != ".lock")


def test_a_corpus_in_s3_trains_like_a_local_one(url: str, tmp_path: Path) -> None:
    local = make_corpus(tmp_path / "local", [30, 1, 64, 0, 25])
    remote = Corpus.open(url, cache_config=reading(tmp_path))
    assert remote.manifest == local.manifest
    np.testing.assert_array_equal(dense_rows(remote), dense_rows(local))
    order = Order(local.shard_rows, OrderConfig(lanes=3, rows_per_lane=4), 0)
    for config in (StreamConfig(resident_bytes=0), StreamConfig()):
        streams = [Stream(corpus, order, range(3), config=config).epoch(1) for corpus in (remote, local)]
        for one, other in zip(*streams, strict=True):
            assert one.rows.tolist() == other.rows.tolist()
            assert one.values.tolist() == other.values.tolist()


@pytest.mark.parametrize("fault", ["503", "cut"])
def test_a_failure_that_passes_is_tried_again(
    url: str, proxy: Proxy, tmp_path: Path, fault: str, caplog: pytest.LogCaptureFixture
) -> None:
    proxy.fault = fail("shard-00002", fault, 2)
    corpus = Corpus.open(url, cache_config=reading(tmp_path))
    assert corpus.shard(2).n_rows == 64
    assert proxy.count("shard-00002") == 3
    told = [r.getMessage() for r in caplog.records if r.name.startswith("distclust")]
    assert [text.split(" for ")[0] for text in told] == ["attempt 1 of 4", "attempt 2 of 4"]
    assert files(tmp_path / "cache") == ["shard-00002.arrow"]


@pytest.mark.parametrize("fault", ["503", "cut"])
def test_a_failure_that_stays_ends_after_the_last_attempt(
    url: str, proxy: Proxy, tmp_path: Path, fault: str
) -> None:
    proxy.fault = fail("shard-00002", fault, 1000)
    corpus = Corpus.open(url, cache_config=reading(tmp_path, attempts=3))
    assert corpus.shard(0).n_rows == 30
    with pytest.raises(DataError, match=rf"{url}/shard-00002.arrow: attempt 3 of 3 failed"):
        corpus.shard(2)
    assert proxy.count("shard-00002") == 3
    assert files(tmp_path / "cache") == ["shard-00000.arrow"]  # nothing half-fetched is left
    proxy.fault = lambda path, number: None
    assert corpus.shard(2).n_rows == 64


@pytest.mark.parametrize("part", ["manifest.json", "shard-00000"])
def test_denied_access_is_an_error_at_once(url: str, proxy: Proxy, tmp_path: Path, part: str) -> None:
    proxy.fault = fail(part, "403", 1000)
    with pytest.raises(DataError, match=rf"access to {url}/{part}.* is denied .*check the credentials"):
        Corpus.open(url, cache_config=reading(tmp_path)).shard(0)
    assert proxy.count(part) == 1


def test_no_credentials_are_an_error_at_once(
    url: str, proxy: Proxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    s3fs.S3FileSystem.clear_instance_cache()
    with pytest.raises(DataError, match=rf"access to {url}/manifest.json is denied .*check the credentials"):
        Corpus.open(url, cache_config=reading(tmp_path))
    assert proxy.requests == []


def test_a_manifest_is_asked_for_again(url: str, proxy: Proxy, tmp_path: Path) -> None:
    proxy.fault = fail("manifest.json", "503", 1)
    assert Corpus.open(url, cache_config=reading(tmp_path)).n_rows == 120
    assert proxy.count("manifest.json") == 2


def test_a_missing_shard_is_named(proxy: Proxy, tmp_path: Path) -> None:
    url = "s3://corpora/lost"
    make_corpus(url, [3, 3])
    s3fs.S3FileSystem().rm(f"{url}/shard-00001.arrow")
    with pytest.raises(DataError, match=rf"{url}/shard-00001.arrow is missing; the manifest lists it"):
        Corpus.open(url, cache_config=reading(tmp_path)).shard(1)


def test_an_epoch_survives_a_bad_network_in_a_small_cache(url: str, proxy: Proxy, tmp_path: Path) -> None:
    """Each file fails once, each time that it is fetched anew; two workers share the cache."""
    local = make_corpus(tmp_path / "local", [30, 1, 64, 0, 25])
    expected = dense_rows(local)
    failed: dict[str, int] = {}

    def fault(path: str, number: int) -> Fault:
        failed[path] = failed.get(path, 0) + 1
        return ("503", "cut", None)[failed[path] % 3] if "shard-" in path else None

    proxy.fault = fault
    largest = max(info.bytes for info in local.manifest.shards)
    config = reading(tmp_path, max_bytes=4 * largest)
    order = Order(local.shard_rows, OrderConfig(lanes=2, rows_per_lane=4, window=1), 0)
    seen: list[int] = []

    def work(lane: int) -> None:
        corpus = Corpus.open(url, cache_config=config)
        for epoch in range(2):
            for batch in Stream(corpus, order, [lane], config=StreamConfig(resident_bytes=0)).epoch(epoch):
                assert batch.values.sum() == pytest.approx(expected[batch.rows.numpy()].sum(), rel=1e-5)
                seen.extend(batch.rows.tolist())

    threads = [threading.Thread(target=work, args=(lane,)) for lane in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(seen) == sorted([*range(120)] * 2)
    assert sum(p.stat().st_size for p in (tmp_path / "cache").rglob("*.arrow")) <= 4 * largest


def test_a_process_killed_in_the_middle_of_a_fetch_leaves_nothing_that_is_read(
    url: str, proxy: Proxy, tmp_path: Path
) -> None:
    proxy.fault = fail("shard-00002", "hang", 1)
    corpus = Corpus.open(url, cache_config=reading(tmp_path))
    info = corpus.manifest.shards[2]
    program = (
        "import sys; from distclust.corpus.cache import *; "
        "ShardCache(sys.argv[1], sys.argv[2], CacheConfig(folder=sys.argv[3]))"
        ".open(sys.argv[4], int(sys.argv[5]), sys.argv[6])"
    )
    arguments = [url, corpus.manifest.fingerprint, str(tmp_path / "cache"), info.file]
    child = subprocess.Popen(
        [sys.executable, "-c", program, *arguments, str(info.bytes), info.sha256], env=dict(os.environ)
    )
    try:
        for _ in range(1200):
            if any(name.endswith(".part") for name in files(tmp_path / "cache")) and proxy.count(
                "shard-00002"
            ):
                break
            assert child.poll() is None
            time.sleep(0.05)
        assert files(tmp_path / "cache") != []
        assert "shard-00002.arrow" not in files(tmp_path / "cache")
    finally:
        child.send_signal(signal.SIGKILL)
        child.wait()
        proxy.let_go.set()
    assert corpus.shard(2).n_rows == 64
    assert files(tmp_path / "cache") == ["shard-00002.arrow"]
