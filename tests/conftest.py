"""What several test files need."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch

from coop.clip.backbone import Backbone
from tests.small_towers import TOKENIZER


@pytest.fixture(scope="session")
def assets() -> Path:
    """Return the folder of development assets; tests without it are skipped."""
    place = os.environ.get("COOP_TEST_ASSETS")
    if not place or not Path(place).is_dir():
        pytest.skip("COOP_TEST_ASSETS does not name the folder of development assets")
    return Path(place).resolve()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests that need a browser."""
    for item in items:
        if "browser" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.browser)


torch.set_num_threads(1)  # tests run side by side: more threads than cores make every one wait


@pytest.fixture(scope="session")
def tiny_backbone() -> Backbone:
    """Return a small CLIP with random weights, strong enough that prompts and classes differ."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = open_clip.CLIP(
            embed_dim=32,
            vision_cfg={"image_size": 16, "patch_size": 8, "width": 32, "layers": 1, "head_width": 16},
            text_cfg={"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
        )
        with torch.no_grad():
            for parameter in (model.token_embedding.weight, model.positional_embedding):
                parameter.mul_(10)
    return Backbone(model, lambda image: image, TOKENIZER, "tiny")


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Return Chromium, driven by selenium, with a profile of its own; tests without it are skipped."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed (the extra `test`)")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    chromedriver = shutil.which("chromedriver")
    if not chromium or not chromedriver:
        pytest.skip("chromium and chromedriver are not installed (Debian: apt-get install chromium chromium-driver)")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in (
        "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
        "--disable-background-networking", "--disable-component-update", "--disable-dev-shm-usage",
        f"--user-data-dir={tmp_path_factory.mktemp('profile')}",
    ):  # fmt: skip
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(chromedriver))
    yield driver
    driver.quit()


@pytest.fixture()
def page(browser: Any, place: str) -> Iterator[Any]:
    """Return the browser with the page at `place` freshly opened; nothing may be left in its console."""
    from tests.page_browser import open_page

    open_page(browser, place)
    yield browser
    assert browser.get_log("browser") == []
