"""The page in a real browser: sorting, filtering, hovering, switching, by mouse and by keyboard."""

import json

import pytest

from coop.report.build import Report
from coop.report.figures import Curves
from coop.report.page import write_page
from coop.report.tables import Grid, shown
from tests.page_sample import report

pytestmark = [pytest.mark.browser, pytest.mark.slow]
pytest.importorskip("selenium", reason="selenium is not installed (the extra `test`)")

from selenium.webdriver import ActionChains  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402

from tests.page_browser import Driver, every, one, point  # noqa: E402


@pytest.fixture(scope="module")
def sample() -> Report:
    return report()


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, sample: Report) -> str:
    path = tmp_path_factory.mktemp("page") / "report.html"
    write_page(sample, path)
    return path.as_uri()


def grid_of(sample: Report) -> Grid:
    return next(part for part in sample.parts if isinstance(part, Grid))


def name_of(keys: tuple[str, ...]) -> str:
    return "|".join(shown("dataset", key) for key in keys)


def orders(page: Driver, column: int) -> tuple[list[str], str]:
    """Return the row headers in the order of the page, and the column's aria-sort."""
    script = """const table = document.querySelector('#accuracy table');
    return [[...table.tBodies[0].rows].map(row => [...row.querySelectorAll('th')].map(th => th.textContent).join('|')),
            table.tHead.rows[0].cells[arguments[0]].getAttribute('aria-sort')]"""
    rows, sort = page.execute_script(script, column)
    return rows, sort


def test_nothing_but_the_file_is_asked_for(page: Driver, place: str) -> None:
    events = [json.loads(entry["message"])["message"] for entry in page.get_log("performance")]
    sent = [event["params"] for event in events if event["method"] == "Network.requestWillBeSent"]
    asked = {one["request"]["url"] for one in sent if one["documentURL"] == place}
    assert place in asked
    assert all(address == place or address.startswith("data:") for address in asked)


@pytest.mark.parametrize("column", [2, 6, 7])
def test_numbers_are_sorted_by_value_and_missing_ones_stay_last(page: Driver, sample: Report, column: int) -> None:
    rows = [(name_of(keys), values[column - 2]) for keys, values in grid_of(sample).rows]
    known = [(key, value.mean) for key, value in rows if value is not None and value.mean is not None]
    unknown = [key for key, value in rows if value is None or value.mean is None]
    falling = [key for key, _ in sorted(known, key=lambda row: row[1], reverse=True)] + unknown
    button = every(page, "#accuracy thead button")[column]
    button.click()
    assert orders(page, column) == (falling, "descending")
    button.send_keys(Keys.ENTER)
    rising = [key for key, _ in sorted(known, key=lambda row: row[1])] + unknown
    assert orders(page, column) == (rising, "ascending")
    button.send_keys(Keys.SPACE)
    assert orders(page, column) == ([key for key, _ in rows], "none")


def test_sorting_twice_keeps_the_first_order_within_the_second(page: Driver, sample: Report) -> None:
    """By 16 shots, then by dataset: within a dataset the best stands first."""
    buttons = every(page, "#accuracy thead button")
    buttons[7].click()
    buttons[0].click()
    rows = grid_of(sample).rows
    by_value = sorted(
        rows, key=lambda row: -1e9 if row[1][5] is None or row[1][5].mean is None else row[1][5].mean, reverse=True
    )  # type: ignore[union-attr]
    expected = sorted(by_value, key=lambda row: shown("dataset", row[0][0]).lower())
    assert orders(page, 0) == ([name_of(keys) for keys, _ in expected], "ascending")


def test_rows_are_filtered_by_words(page: Driver) -> None:
    one(page, ".filter input").send_keys("eurosat class-specific")
    rows = [row for row in every(page, "#accuracy tbody tr") if row.is_displayed()]
    assert len(rows) == 2 and all("EuroSAT" in row.text or "class-specific" in row.text for row in rows)
    assert one(page, ".filter output").text == "2 of 72 rows"


def test_hovering_a_point_tells_its_numbers(page: Driver, sample: Report) -> None:
    curves = next(part for part in sample.parts if isinstance(part, Curves))
    line = next(line for line in curves.panels[2].lines if line.label == "CoOp, M=16, end")
    value = next(value for x, value in line.points if x == 4)
    target = point(page, "Caltech101, CoOp, M=16, end, shots 4:")
    settled = "arguments[0].scrollIntoView({block: 'center'}); setTimeout(arguments[1], 300)"
    page.execute_async_script(settled, target)  # the page's own scroll events hide the tip
    assert not one(page, "#tip").is_displayed()
    ActionChains(page).move_to_element(target).perform()
    said = one(page, "#tip").text.replace("\u2212", "-")
    assert curves.panels[2].title == "caltech101"
    assert said.startswith("Caltech101, CoOp, M=16, end, shots 4\n")
    assert value.mean is not None and value.std is not None and value.difference is not None
    theirs = value.published[0]
    for words in (
        f"{value.mean:.2f} ± {value.std:.2f}",
        "n = 3; seeds 1, 2, 3",
        f"{value.difference:+.2f} to zero-shot",
        f"published {theirs.value:.2f} (ours {value.mean - theirs.value:+.2f}): {theirs.source}",
    ):
        assert words in said
    ActionChains(page).move_to_element(one(page, "#summary-title")).perform()
    assert not one(page, "#tip").is_displayed()


def test_arrow_keys_walk_through_a_chart(page: Driver) -> None:
    def name() -> str:
        return str(page.switch_to.active_element.get_attribute("aria-label")).split(":")[0]

    start = point(page, "DTD, CoOp, M=16, middle, shots 2")
    page.execute_script("arguments[0].focus()", start)
    assert "DTD, CoOp, M=16, middle, shots 2" in one(page, "#tip").text
    walked = []
    for key in (Keys.ARROW_RIGHT, Keys.ARROW_RIGHT, Keys.HOME, Keys.END, Keys.ARROW_DOWN):
        page.switch_to.active_element.send_keys(key)
        walked.append(name())
    assert walked[:4] == [f"DTD, CoOp, M=16, middle, shots {shots}" for shots in (4, 8, 1, 16)]
    assert walked[4].endswith("shots 16") and "middle, shots" not in walked[4]
    inside = every(page, 'svg[aria-label^="DTD: accuracy"] .pt[tabindex="0"]')
    assert [mark.get_attribute("aria-label").split(":")[0] for mark in inside] == [walked[4]]


def test_a_series_can_be_switched_off_and_on_in_all_panels(page: Driver) -> None:
    key = next(key for key in every(page, ".legend .key") if key.text == "CoOp, M=16, end")
    wanted = f'#curves .chart .pt[data-s="{key.get_attribute("data-s")}"]'
    assert len(every(page, wanted)) > 5 and all(series.is_displayed() for series in every(page, wanted))
    key.click()
    assert key.get_attribute("aria-pressed") == "false"
    assert not any(series.is_displayed() for series in every(page, wanted))
    assert point(page, "DTD, linear probe, shots 2").is_displayed()
    key.send_keys(Keys.ENTER)
    assert all(series.is_displayed() for series in every(page, wanted))
    every(page, ".legend .key")[-1].click()
    assert [series.is_displayed() for series in every(page, "#curves .pt[data-theirs]")].count(True) == 0


def test_a_cell_tells_its_runs(page: Driver, sample: Report) -> None:
    keys, values = next(row for row in grid_of(sample).rows if row[0] == ("eurosat", "CoOp, M=16, end"))
    value = values[-1]
    assert value is not None
    place = [row for row, _ in grid_of(sample).rows].index(keys)
    button = one(page, f"#accuracy tbody tr:nth-child({place + 1}) td:last-child button")
    button.send_keys(Keys.ENTER)
    dialog = one(page, "#source")
    assert dialog.is_displayed() and one(page, "#source-title").text == "EuroSAT · CoOp, M=16, end · 16"
    assert "partial" in dialog.text and "2 of 3" in dialog.text and "UNVERIFIED" in dialog.text
    assert "(ours" not in dialog.text, "an unverified number is compared with nothing"
    assert [code.text for code in every(page, "#source code")] == list(value.runs)
    page.switch_to.active_element.send_keys(Keys.ESCAPE)
    assert not dialog.is_displayed() and page.switch_to.active_element == button


def test_one_dataset_is_shown_at_a_time(page: Driver) -> None:
    names = [choice.get_attribute("data-name") for choice in every(page, "#classes .choice") if choice.is_displayed()]
    assert names == ["Caltech101"]
    one(page, "#classes select").send_keys("EuroSAT")
    names = [choice.get_attribute("data-name") for choice in every(page, "#classes .choice") if choice.is_displayed()]
    assert names == ["EuroSAT"]
    one(page, "#classes .choose button").click()
    assert all(choice.is_displayed() for choice in every(page, "#classes .choice"))
