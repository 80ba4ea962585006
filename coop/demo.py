"""`coop demo`: the main job on the model and data that ship with the toolkit, in two minutes, without a download."""

from pathlib import Path

from rich.console import Console
from rich.markup import escape

from coop.errors import CoopError
from coop.report.build import report_command
from coop.report.frame import measured, select, with_difference
from coop.report.tables import make_table, render, to_bars
from coop.report.words import context_words, render_words
from coop.runs.command import run_command
from coop.runs.store import stored_runs

STUDY = "demo"


def demo(results: Path) -> int:
    """Compare zero-shot with learned prompts at 1, 4 and 16 shots; show table, curve, nearest words, and the report."""
    console = Console(soft_wrap=True, highlight=False)
    console.print("Fashion-MNIST (10 kinds of clothing, 1,000 test images) with lit_lite, a small CLIP: ", end="")
    console.print("zero-shot against CoOp, 16 learned context vectors, three few-shot samples each\n")
    place = f"results={results}"
    if run_command([f"+experiment={STUDY}", place], multirun=True):
        raise CoopError(f"a run of the demo failed: see failure.json below {results}")
    frame = select(
        with_difference(measured(stored_runs(results), results)), ["dataset=fashion_mnist", "backbone=lit_lite"]
    )
    table = make_table(frame, ["dataset", "method", "template"], ["shots"])
    console.print("\n" + escape(render(table, "text", console.width if console.is_terminal else None)))
    console.print(to_bars(table))
    best = frame[(frame["method"] == "coop") & (frame["shots"] == 16) & (frame["seed"] == 1)]["run"].iloc[0]
    console.print(f"\nThe words nearest to the 16 context vectors learned from 16 shots ({escape(str(best))}):\n")
    console.print(escape(render_words(context_words(results / best, 4, "euclidean", whole_words=True), "text")))
    page = report_command(STUDY, [place], results / "report")[0]
    console.print(f"Open {escape(str(page))} in a browser: curves, tables, words, and what changed, class by class.")
    return 0
