"""What several test files need."""

import os
from pathlib import Path

import pytest
import torch


@pytest.fixture(scope="session")
def assets() -> Path:
    """Return the folder of development assets; tests without it are skipped."""
    place = os.environ.get("COOP_TEST_ASSETS")
    if not place or not Path(place).is_dir():
        pytest.skip("COOP_TEST_ASSETS does not name the folder of development assets")
    return Path(place).resolve()


torch.set_num_threads(1)  # tests run side by side: more threads than cores make every one wait
