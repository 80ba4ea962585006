"""Descriptions are found in a checkout and when installed, where a library called `datasets` may lie beside them."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import coop
from coop.data import dataset_descriptions
from coop.io import resource_folder

PROGRAM = "from coop.data import dataset_descriptions as d; print(len(d()), next(iter(d().values())).parent)"


def run_installed(site: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(site)}
    return subprocess.run([sys.executable, "-c", PROGRAM], env=environment, cwd=site, capture_output=True, text=True)


def test_checkout() -> None:
    repository = Path(coop.__file__).resolve().parents[1]
    assert resource_folder("datasets") == repository / "datasets"
    assert len(dataset_descriptions()) == len(list((repository / "datasets").glob("*.yaml")))


def test_installed_beside_a_library_of_the_same_name(tmp_path: Path) -> None:
    package = Path(coop.__file__).resolve().parent
    shutil.copytree(package, tmp_path / "coop", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "datasets").mkdir()
    (tmp_path / "datasets" / "__init__.py").touch()
    broken = run_installed(tmp_path)
    assert broken.returncode == 1 and "has no folder 'datasets'" in broken.stderr
    shutil.copytree(resource_folder("datasets"), tmp_path / "coop" / "datasets")
    whole = run_installed(tmp_path)
    assert whole.stdout.split() == [str(len(dataset_descriptions())), str(tmp_path / "coop" / "datasets")]
