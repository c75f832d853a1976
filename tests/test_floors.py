"""Each floor imports only floors below it, and heavy libraries stay in the rooms that are named for them."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FLOORS = {"errors": 0, "mixture": 1, "corpus": 1, "config": 2, "training": 3, "results": 4}
TOP = 5
"""run, run_folder, cli, estimators: whatever is not a floor stands on all of them; jobs stand on those."""
ROOMS = {
    "ray": {"corpus/prepare.py", "training/cluster.py", "results/assign.py"},
    "mlflow": {"training/tracking.py", "training/records.py", "results/served_model.py"},
    "faiss": {"training/kmeans.py"},
}


def sources() -> list[Path]:
    return sorted((ROOT / "distclust").rglob("*.py"))


def imports(path: Path) -> Iterator[tuple[str, int]]:
    """(module, line) of every import in a file that may happen, those inside functions too."""
    tree = ast.parse(path.read_text())
    for block in [n for n in ast.walk(tree) if isinstance(n, ast.If)]:
        if isinstance(block.test, ast.Name) and block.test.id == "TYPE_CHECKING":
            block.body = []  # names for the type checker; nothing is imported
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for name in node.names:
                yield name.name, node.lineno
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            yield node.module, node.lineno


def floor_of(module: str) -> int:
    """The floor of a dotted name below distclust."""
    parts = module.split(".")
    return FLOORS.get(parts[1], TOP) if len(parts) > 1 else 0


def test_floors_import_downwards_only() -> None:
    wrong = []
    for path in sources():
        own = path.relative_to(ROOT).with_suffix("").parts
        for module, line in imports(path):
            if module.split(".")[0] != "distclust":
                if module.split(".")[0] == "jobs":
                    wrong.append(f"{path.relative_to(ROOT)}:{line} imports {module}")
                continue
            same_room = len(own) > 1 and module.split(".")[1:2] == [own[1]]
            if (
                not same_room
                and floor_of(module) >= floor_of(".".join(own))
                and floor_of(".".join(own)) < TOP
            ):
                wrong.append(f"{path.relative_to(ROOT)}:{line} imports {module}")
    assert not wrong, "\n".join(wrong)


def test_heavy_libraries_are_imported_in_their_rooms_only() -> None:
    wrong = []
    for path in sources():
        room = str(path.relative_to(ROOT / "distclust"))
        for module, line in imports(path):
            library = module.split(".")[0]
            if library in ROOMS and room not in ROOMS[library]:
                wrong.append(f"distclust/{room}:{line} imports {module}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("hidden", ["ray mlflow faiss pydantic sklearn"])
def test_the_engine_needs_torch_and_the_stream_alone(hidden: str) -> None:
    """It is profiled on machines that have torch, pyarrow, numpy and scipy."""
    code = (
        f"import sys\nfor name in {hidden.split()!r}: sys.modules[name] = None\n"
        "import distclust.training.engine, distclust.corpus.stream, distclust.mixture.model"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_the_mixture_imports_torch_and_nothing_else_of_ours() -> None:
    allowed = {"torch", "distclust", *sys.stdlib_module_names}
    for path in (ROOT / "distclust" / "mixture").glob("*.py"):
        found = {module.split(".")[0] for module, _ in imports(path)}
        assert found <= allowed, f"{path.name} imports {found - allowed}"


def test_no_pickle_and_no_print_in_the_library() -> None:
    for path in sources():
        names = {module.split(".")[0] for module, _ in imports(path)}
        assert not names & {"pickle", "cloudpickle", "joblib", "dill"}, path
        calls = [n.func for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Call)]
        named = {f.id for f in calls if isinstance(f, ast.Name)}
        assert "print" not in named, path
        assert not named & {"eval", "exec"}, path
        loads = {f.attr for f in calls if isinstance(f, ast.Attribute) and isinstance(f.value, ast.Name)
                 and f.value.id == "torch"}  # fmt: skip
        assert "load" not in loads, path
