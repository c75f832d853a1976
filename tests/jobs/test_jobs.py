"""Jobs are commands of `distclust` that cannot lose what they write."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest

from jobs import submit


@pytest.mark.parametrize(
    ("arguments", "found"),
    [
        (["demo"], "--run is missing"),
        (["demo", "--run", "runs/mine"], "--run is 'runs/mine'"),
        (["demo", "--run=runs/mine"], "--run is 'runs/mine'"),
        (["demo", "--run", "/shared/mine", "--corpus", "corpus"], "--corpus is 'corpus'"),
    ],
)
def test_what_would_be_lost_with_the_job_is_refused(
    arguments: list[str], found: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert submit("train", arguments, needed=("--run",), paths=("--run", "--corpus")) == 2
    assert (
        f"error: {found}; expected an absolute path on storage that every node sees"
        in capsys.readouterr().err
    )


@pytest.mark.parametrize("corpus", ["/shared/corpus", "s3://bucket/corpus"])
def test_the_exit_code_is_the_command_s(
    corpus: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    arguments = ["demo", "seeed=3", f"--run={run}", "--corpus", corpus]
    assert submit("train", arguments, needed=("--run",), paths=("--run", "--corpus")) == 2
    assert "did you mean 'seed'" in capsys.readouterr().err
    assert not run.exists()


@pytest.mark.parametrize("job", ["train", "prepare", "assign"])
def test_each_job_has_the_help_of_its_command(
    job: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [job, "--help"])
    with pytest.raises(SystemExit) as end:
        runpy.run_module(f"jobs.{job}", run_name="__main__")
    assert end.value.code == 0
    said = capsys.readouterr().out
    assert f"distclust {job}" in said
    assert "--run" in said or "--out" in said
