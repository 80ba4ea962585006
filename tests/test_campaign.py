"""The short form of the campaign: a few kills, refusals, places, fuzzed inputs and extremes, and none that fails."""

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_short_campaign() -> None:
    """In a process of its own: it forks, and must not inherit what other tests have imported or started."""
    root = Path(__file__).resolve().parents[1]
    done = subprocess.run(
        [sys.executable, "-m", "experiments.campaign", "--short"], cwd=root, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
