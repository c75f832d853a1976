"""A job on a cluster with token authentication, submitted as a user does it."""

from __future__ import annotations

import json
import os
import re
import secrets
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
RAY = str(Path(sys.executable).with_name("ray"))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """`ray start --head` with a token, on ports of its own; gives the environment of who may use it."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    port, dashboard = free_port(), free_port()
    head = subprocess.Popen(
        [
            *(RAY, "start", "--head", "--block", f"--port={port}", f"--dashboard-port={dashboard}"),
            *(
                "--num-cpus=4",
                "--node-ip-address=127.0.0.1",
                "--disable-usage-stats",
                "--include-dashboard=true",
            ),
            *(
                "--ray-client-server-port",
                str(free_port()),
                "--dashboard-agent-listen-port",
                str(free_port()),
            ),
            # a short one: sockets lie in it
            *("--temp-dir", str(tmp_path_factory.mktemp("r", numbered=True))),
        ],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    assert head.stdout is not None
    said = ""
    for line in head.stdout:
        said += line
        if "Ray runtime started" in line:
            break
    else:
        pytest.fail(said)
    yield environment | {"RAY_ADDRESS": f"http://127.0.0.1:{dashboard}"}
    os.killpg(head.pid, 9)
    head.wait()


def submit(environment: dict[str, str], *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [RAY, "job", "submit", "--working-dir", ".", "--", *words],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=400,
    )


TINY = [
    *("phases.pretrain.epochs=1", "phases.gate.epochs=1", "phases.joint.epochs=1"),
    *("model.hidden=[16]", "model.gate_hidden=[16]", "model.code_size=8", "vocabulary.max_features=300"),
    *("tracking.enabled=false", "cluster.workers=1"),
]


def test_a_job_trains_and_its_exit_code_is_the_training_s(cluster: dict[str, str], tmp_path: Path) -> None:
    run = tmp_path / "run"
    command = [sys.executable, "-m", "jobs.train", "damic-text", *TINY, "--run", str(run), "--no-baselines"]
    done = submit(cluster, *command)
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    summary = json.loads((run / "summary.json").read_text())
    assert summary["n_documents"] == 7160
    assert json.loads((run / "training" / "workers.json").read_text())["starts"] == 1


def test_a_bad_recipe_is_a_failed_job(cluster: dict[str, str], tmp_path: Path) -> None:
    train = f"{sys.executable} -m jobs.train damic-text seeed=3 --run {tmp_path}/bad"
    bad = submit(cluster, "sh", "-c", f"ls -a | sed 's/^/sent: /'; exec {train}")
    assert bad.returncode != 0
    said = bad.stdout + bad.stderr
    assert "did you mean 'seed'" in said, said
    assert not (tmp_path / "bad").exists()
    # what travelled to the cluster
    there = set(re.findall(r"^sent: (\S+)$", said, re.MULTILINE))
    assert {"distclust", "jobs"} <= there
    assert not there & {".git", ".venv", "runs", "tests", "docs", "mlflow.db"}


def test_without_the_token_nobody_gets_in(cluster: dict[str, str], tmp_path: Path) -> None:
    stranger = cluster | {"RAY_AUTH_TOKEN": secrets.token_hex(32)}
    refused = submit(stranger, "touch", str(tmp_path / "in"))
    assert refused.returncode != 0
    assert "401" in refused.stdout + refused.stderr or "uthent" in refused.stdout + refused.stderr
    assert not (tmp_path / "in").exists()
