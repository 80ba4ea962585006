"""How the house is built: imports point downwards only, and few files know what is inside open_clip and Hydra."""

import ast
from collections.abc import Iterator
from pathlib import Path

import open_clip
import pytest

ROOT = Path(__file__).resolve().parents[1]
FILES = sorted((ROOT / "coop").rglob("*.py"))
ROOMS = (  # from the ground up: a room imports itself and what stands before it
    "errors", "paths", "memory", "progress", "data", "text", "embedded", "backbone", "features", "train", "methods",
    "config", "evaluate", "artefact", "protocols", "results", "study", "published", "interpret", "predict",
    "importing", "workshop", "runner", "sweep", "report", "demo", "pretrain", "cli",
)  # fmt: skip
UPWARDS = {("methods/prompt_ensemble.py", "artefact")}  # when asked: a method that is made of learned files


def name_of(path: Path) -> str:
    return path.relative_to(ROOT / "coop").as_posix()


def room_of(path: Path) -> str:
    return path.relative_to(ROOT / "coop").parts[0].removesuffix(".py")


def imported(tree: ast.AST) -> Iterator[tuple[str, str | None]]:
    """Yield (module, name) of every import statement, also of those inside functions."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, None) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield from ((node.module or "", alias.name) for alias in node.names)


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_imports_point_downwards(path: Path) -> None:
    room = room_of(path)
    if room == "__init__":  # the package's face shows names of every room, when they are asked for
        return
    assert room in ROOMS, "a new room needs its place in ROOMS"
    below = set(ROOMS[: ROOMS.index(room) + 1])
    for module, name in imported(ast.parse(path.read_text())):
        parts = module.split(".")
        if parts[0] != "coop":
            continue
        used = parts[1] if len(parts) > 1 else name
        if used not in (None, "__version__") and (name_of(path), used) not in UPWARDS:
            assert used in below, f"{room} must not import {module} {name or ''}"


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_open_clip_is_used_by_its_public_names(path: Path) -> None:
    """Beyond them: the tower view and the loader, and pre-training for the transforms of a new model."""
    insides = set()
    tree = ast.parse(path.read_text())
    for module, name in imported(tree):
        if module.split(".")[0] == "open_clip" and (module if name is None else name) != "open_clip":
            insides |= {name} if not hasattr(open_clip, str(name)) else set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Attribute):
            inner = node.value.value
            if isinstance(inner, ast.Name) and inner.id == "open_clip":
                insides.add(node.attr)
    allowed = {"backbone.py", "text/tower.py", "pretrain/command.py"}
    assert not insides or name_of(path) in allowed, insides


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_configuration_becomes_dataclasses_at_the_edge(path: Path) -> None:
    imports = set(imported(ast.parse(path.read_text())))
    if any(module.split(".")[0] == "hydra" for module, _ in imports):
        assert room_of(path) in {"sweep", "cli"}
    if ("omegaconf", "DictConfig") in imports:
        assert room_of(path) in {"config", "sweep"}


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_nothing_seeds_the_global_state(path: Path) -> None:
    """Except within a fork of it: torchvision's transforms and a model's initial weights know no other randomness."""
    source = path.read_text()
    assert "random.seed(" not in source and "np.random.rand" not in source
    if "torch.manual_seed(" in source:
        assert "fork_rng" in source


@pytest.mark.parametrize("folder", ["datasets", "conf"])
def test_descriptions_hold_no_code(folder: str) -> None:
    """A Python package called `datasets` would shadow another library."""
    assert (ROOT / folder).is_dir() and not list((ROOT / folder).rglob("*.py*"))
