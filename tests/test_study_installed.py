"""Studies and published numbers are found in a checkout and when installed, and the wheel carries them."""

import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import coop
from coop.io import resource_folder
from coop.report.published import FOLDER as PUBLISHED
from coop.runs.study import FOLDER as STUDIES
from coop.runs.study import study_names

ROOT = Path(__file__).resolve().parents[1]
PROGRAM = """
from coop.io import resource_folder
from coop.report.published import published
from coop.runs.study import load_study, study_names
print(len(study_names()), len(load_study("demo").series), len(published("few_shot")) > 0)
print(resource_folder("experiments/studies"))
"""


def run_installed(site: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(site)}
    return subprocess.run([sys.executable, "-c", PROGRAM], env=environment, cwd=site, capture_output=True, text=True)


def test_installed(tmp_path: Path) -> None:
    package = Path(coop.__file__).resolve().parent
    shutil.copytree(package, tmp_path / "coop", ignore=shutil.ignore_patterns("__pycache__"))
    missing = run_installed(tmp_path)
    assert missing.returncode == 1 and f"has no folder '{STUDIES}'" in missing.stderr
    included = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    for source, place in included["force-include"].items():  # as the wheel does
        shutil.copytree(ROOT / source, tmp_path / place)
    whole = run_installed(tmp_path)
    assert whole.stdout.split() == [str(len(study_names())), "3", "True", str(tmp_path / "coop" / STUDIES)], (
        whole.stderr
    )


def test_the_wheel_has_them_without_their_neighbours() -> None:
    wheel = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    carried = wheel["force-include"]
    assert {STUDIES, PUBLISHED} <= set(carried) and "experiments" not in carried
    for folder in (STUDIES, PUBLISHED):
        assert carried[folder] == f"coop/{folder}" and resource_folder(folder) == ROOT / folder
        assert not list((ROOT / folder).rglob("*.py"))
