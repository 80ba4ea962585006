"""The page in a real browser: light and dark, on a phone, on paper, and for those who cannot see it."""

import base64
import re

import pytest

from coop.report.page import write_page
from tests.page_parser import contrast
from tests.page_sample import report

pytestmark = [pytest.mark.browser, pytest.mark.slow]
pytest.importorskip("selenium", reason="selenium is not installed (the extra `test`)")

from selenium.webdriver.common.keys import Keys  # noqa: E402

from tests.page_browser import Driver, every, look, one  # noqa: E402


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("page") / "report.html"
    write_page(report(), path)
    return path.as_uri()


def colours(page: Driver, selector: str) -> tuple[list[float], list[float]]:
    """Return the colour of an element's text and of what is behind it, each part from 0 to 255."""
    script = """let at = document.querySelector(arguments[0]); const ink = getComputedStyle(at).color;
    while (/(, 0\\)|transparent)$/.test(getComputedStyle(at).backgroundColor)) at = at.parentElement;
    const canvas = document.createElement('canvas').getContext('2d', {willReadFrequently: true});
    return [ink, getComputedStyle(at).backgroundColor].map(colour => {
      canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1);
      return [...canvas.getImageData(0, 0, 1, 1).data.slice(0, 3)]; })"""
    ink, paper = page.execute_script(script, selector)
    return ink, paper


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_light_and_dark(page: Driver, scheme: str) -> None:
    look(page, scheme=scheme)
    _, paper = colours(page, "body")
    assert (sum(paper) < 150) == (scheme == "dark")
    nearest = '#words td[style*="--t:100"]'
    for selector in (
        "h1",
        ".note",
        ".about",
        "td small .up",
        "td small .down",
        ".unverified",
        ".lack",
        f"{nearest} small",
    ):
        assert contrast(*colours(page, selector)) >= 4.5, selector
    one(page, "#theme").click()
    assert (sum(colours(page, "body")[1]) < 150) == (scheme == "light")
    page.refresh()
    assert (sum(colours(page, "body")[1]) < 150) == (scheme == "light"), "the choice is remembered"


@pytest.mark.parametrize("width", [320, 768, 1280, 1920])
def test_the_page_never_scrolls_sideways(page: Driver, width: int) -> None:
    look(page, width=width)
    for button in every(page, ".choose button"):
        button.click()
    page.execute_script("document.querySelectorAll('details').forEach(details => { details.open = true; })")
    size = page.execute_script("const root = document.documentElement; return [root.scrollWidth, root.clientWidth]")
    assert size[0] <= size[1]
    wide = page.execute_script("""return [...document.querySelectorAll('main *')].filter(element =>
        element.getBoundingClientRect().right > document.documentElement.clientWidth + 1
        && !element.closest('.scroll, .legend, .heard')).map(element => element.outerHTML.slice(0, 90))""")
    assert wide == []


def test_a_table_that_is_wider_than_the_screen_says_so(page: Driver) -> None:
    """Whatever it holds: numbers, words, confusions. On a desk's screen none of these does."""
    script = """return [...document.querySelectorAll('.scroll')].filter(one => one.checkVisibility()).map(one => [
        one.scrollWidth > one.clientWidth + 1, one.previousElementSibling.checkVisibility()
        && one.previousElementSibling.textContent.includes('sideways')])"""
    for width, some in ((390, True), (1920, False)):
        look(page, width=width)
        found = page.execute_async_script(
            f"requestAnimationFrame(() => setTimeout(() => arguments[0]((() => {{{script}}})())))"
        )
        assert len(found) > 3 and all(wide == told for wide, told in found)
        assert any(wide for wide, _ in found) == some


def test_names_on_a_phone_are_those_of_the_desk(page: Driver) -> None:
    look(page, width=390)
    script = (
        "return [...document.querySelectorAll('[data-outer]')].map(one => getComputedStyle(one, '::before').content)"
    )
    assert '"Caltech101"' in page.execute_script(script)


def test_printing(page: Driver) -> None:
    """All datasets are on paper, all lists open; nothing to press; no table is wider than its sheet."""
    pdf = base64.b64decode(page.execute_cdp_cmd("Page.printToPDF", {"preferCSSPageSize": True})["data"])
    assert pdf.startswith(b"%PDF") and len(re.findall(rb"/Type\s*/Page\b", pdf)) > 5 and len(pdf) > 100_000
    look(page, width=1016, height=1400, media="print")  # A4 landscape within its margins, at 96 to the inch
    page.execute_script("dispatchEvent(new Event('beforeprint'))")
    assert all(choice.is_displayed() for choice in every(page, ".choice"))
    assert all(details.get_attribute("open") for details in every(page, "details"))
    for selector in ("#theme", ".filter", ".choose", ".copy", "#contents", "thead button"):
        assert not any(element.is_displayed() for element in every(page, selector)), selector
    wide = "return [...document.querySelectorAll('table')].map(table => table.getBoundingClientRect().width)"
    assert max(page.execute_script(wide)) <= 1016
    look(page, width=688, height=980, media="print")  # A4 upright
    narrow = wide.replace("querySelectorAll('table')]", "querySelectorAll('table')].filter(t => !t.closest('.wide'))")
    assert max(page.execute_script(narrow)) <= 688
    page.execute_script("dispatchEvent(new Event('afterprint'))")
    assert not one(page, "#classes details:not(.runs)").get_attribute("open")


def test_everything_has_a_name(page: Driver) -> None:
    """What axe asks first: one h1, no heading level left out, names for controls, images and regions, a language."""
    assert len(every(page, "h1")) == 1 and one(page, "html").get_attribute("lang") == "en"
    levels = page.execute_script(
        "return [...document.querySelectorAll('h1,h2,h3,h4,h5')].map(h => Number(h.tagName[1]))"
    )
    assert all(after - before <= 1 for before, after in zip(levels, levels[1:], strict=False))
    for selector in (
        "button:not([hidden])",
        "select",
        "input",
        "img",
        "[role=region]",
        "nav",
        ".pt",
        "svg.chart[role]",
    ):
        seen = "return [...document.querySelectorAll(arguments[0])].filter(element => element.checkVisibility())"
        elements = page.execute_script(seen, selector)
        assert elements, selector
        for element in elements[:: max(1, len(elements) // 12)]:  # the browser takes its time for each
            assert element.accessible_name.strip(), element.get_attribute("outerHTML")[:200]


def test_focus_is_seen_and_the_skip_link_comes_first(page: Driver) -> None:
    one(page, "body").send_keys(Keys.TAB)
    first = page.switch_to.active_element
    assert first.text == "Skip to the summary" and first.rect["y"] >= 0
    first.send_keys(Keys.ENTER)
    assert page.current_url.endswith("#summary")
    for selector in ("#theme", ".legend .key", "td .v", "thead button"):
        page.execute_script("arguments[0].focus({focusVisible: true})", one(page, selector))
        style = (
            "const style = getComputedStyle(document.activeElement); return [style.outlineStyle, style.outlineWidth]"
        )
        kind, width = page.execute_script(style)
        assert kind != "none" and float(width.removesuffix("px")) >= 2, selector


def test_without_javascript_everything_can_be_read(page: Driver) -> None:
    page.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": True})
    try:
        page.refresh()
        assert all(element.is_displayed() for element in every(page, ".choice, .panel, .sortable, noscript p"))
        assert not any(element.is_displayed() for element in every(page, "#theme, .filter, .choose, .copy"))
    finally:
        page.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})
