"""Fill the page's template with a report."""

import base64
import hashlib
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from coop.io import write_text
from coop.report.content import Curves, Report
from coop.report.page import bars, curves
from coop.report.page.numbers import decimals_of, decimals_of_grid, direction, number, signed, spoken
from coop.report.page.sections import highlights, sections
from coop.report.page.sources import Sources

HERE = Path(__file__).resolve().parent
STYLES = ("style.css", "parts.css", "print.css")
SCRIPTS = ("values.js", "charts.js", "tables.js", "page.js")


def write_page(report: Report, path: Path) -> None:
    """Write the report as one HTML file, whole or not at all."""
    write_text(path, render_page(report))


def render_page(report: Report) -> str:
    """Return the page. Its policy allows no request, and no script but its own, whatever a report's texts say."""
    sources = Sources()
    script = "(() => {\n'use strict';\n" + "".join(_static(name) for name in SCRIPTS) + "})();\n"
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = (
        f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; "
        "base-uri 'none'; form-action 'none'"
    )

    def draw(part: Curves) -> dict[str, Any]:
        looks = curves.styles(part)
        return {"styles": looks, "panels": curves.draw_panels(part, looks, sources)}

    return (
        _environment()
        .get_template("page.html")
        .render(
            report=report,
            sections=sections(report),
            highlights=highlights(report),
            sources=sources,
            draw=draw,
            curves=curves,
            bars=bars,
            policy=policy,
            style=Markup("".join(_static(name) for name in STYLES)),
            script=Markup(script),
        )
    )


def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(HERE / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": number, "signed": signed, "direction": direction, "spoken": spoken}
    environment.globals |= {"decimals_of": decimals_of, "decimals_of_grid": decimals_of_grid}
    return environment


def _static(name: str) -> str:
    return (HERE / "static" / name).read_text(encoding="utf-8")
