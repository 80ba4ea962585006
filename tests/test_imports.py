"""How the package is built: the import contract, no private API of others, no global randomness, no code in data."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from importlinter.cli import lint_imports

ROOT = Path(__file__).resolve().parents[1]
FILES = sorted([*(ROOT / "coop").rglob("*.py"), *(ROOT / "experiments").rglob("*.py")])


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def test_import_contract(monkeypatch: pytest.MonkeyPatch) -> None:
    """`lint-imports`: rooms import downwards only, and no room has a circle (pyproject.toml)."""
    monkeypatch.chdir(ROOT)
    assert lint_imports(no_cache=True) == 0


def foreign_names(tree: ast.AST) -> Iterator[tuple[str, str]]:
    """Yield (local name, what it is) of everything that is imported from other packages."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.asname or alias.name.split(".")[0], alias.name
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                yield alias.asname or alias.name, f"{node.module}.{alias.name}"


def is_private(name: str) -> bool:
    return any(part.startswith("_") and not part.startswith("__") for part in name.split("."))


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_no_private_names_of_other_packages(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    foreign = {local: name for local, name in foreign_names(tree) if name.split(".")[0] not in ("coop", "experiments")}
    found = [name for name in foreign.values() if is_private(name)]
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            dotted = ast.unparse(node)
            if dotted.split(".")[0] in foreign and is_private(dotted):
                found.append(dotted)
    assert not found


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_nothing_seeds_the_global_state(path: Path) -> None:
    """Except within a fork of it: torchvision's transforms and a model's initial weights know no other randomness."""
    source = path.read_text(encoding="utf-8")
    calls = {ast.unparse(node.func) for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)}
    calls -= {"np.random.default_rng", "random.Random"}
    assert not any(call.startswith(("random.", "np.random.", "torch.seed", "torch.random.seed")) for call in calls)
    if "torch.manual_seed" in calls:
        assert "fork_rng" in source


@pytest.mark.parametrize("folder", ["datasets", "conf"])
def test_descriptions_hold_no_code(folder: str) -> None:
    """A Python package called `datasets` would shadow another library."""
    assert (ROOT / folder).is_dir() and not list((ROOT / folder).rglob("*.py*"))


LIGHT = (  # what `coop table`, `coop study` and `coop data` need
    "coop", "coop.cli", "coop.config", "coop.data", "coop.errors", "coop.io", "coop.options", "coop.report.tables",
    "coop.runs.grid", "coop.runs.protocol", "coop.runs.store", "coop.runs.study",
)  # fmt: skip


def test_light_modules_import_no_torch() -> None:
    script = f"""
import importlib, sys
for name in {LIGHT}:
    importlib.import_module(name)
    if {{"torch", "open_clip"}} & sys.modules.keys():
        sys.exit(name)
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
