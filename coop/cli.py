"""The command line: `coop demo | run | study | table | words | report | predict | import | data`."""

import argparse
import logging
import os
import shutil
import sys
import textwrap
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import coop
from coop.errors import CoopError, explanation, first_line, unknown
from coop.io import check_writable, read_file
from coop.machine import prepare_process

if TYPE_CHECKING:
    from coop.data import DatasetSpec
    from coop.data.few_shot import Shots
    from coop.learned import Prediction
    from coop.runs.store import StoredRun
    from coop.runs.study import PlannedRun

Handler = Callable[[argparse.Namespace], int]
FLAGS = ("--debug", "--verbose")  # may stand anywhere


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; return its exit code: 0, 1 where runs failed or the system refused, 2 for a user's mistake."""
    prepare_process()  # before torch is imported
    for stream in ("stdout", "stderr"):
        if getattr(sys, stream) is None:  # closed: `coop table >&-`
            setattr(sys, stream, open(os.devnull, "w"))  # noqa: SIM115 - as long as the process
    words = list(sys.argv[1:] if arguments is None else arguments)
    flags = {word for word in words if word in FLAGS}
    try:
        args = _parsed(_parser(), [word for word in words if word not in FLAGS])
        with _logging("--verbose" in flags):
            code: int = args.run(args)
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # `coop table | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (Exception, KeyboardInterrupt) as error:
        code, text = explanation(error)
        if not text:
            raise
        if "--debug" in flags:
            traceback.print_exc()
        print(f"coop: {' '.join(text.split())}", file=sys.stderr)
        return code


@contextmanager
def _logging(verbose: bool) -> Iterator[None]:
    """Log to standard error: our own warnings; with `verbose` everything, libraries' warnings among it."""
    handler, root = logging.StreamHandler(), logging.getLogger()
    handler.setFormatter(logging.Formatter("%(name)s: %(message)s"))
    if not verbose:
        handler.addFilter(lambda record: record.name.startswith("coop") and record.levelno >= logging.WARNING)
    level = root.level
    root.addHandler(handler)
    root.setLevel(logging.INFO if verbose else logging.WARNING)
    try:
        with warnings.catch_warnings():
            if not sys.warnoptions:
                warnings.simplefilter("default" if verbose else "ignore")
            logging.captureWarnings(True)
            yield
    finally:
        logging.captureWarnings(False)
        root.removeHandler(handler)
        root.setLevel(level)


def _parsed(parser: argparse.ArgumentParser, arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line; KEY=VALUE may also stand after options, where argparse takes no more of them.

    Raises CoopError, with the closest match, for a command that there is not.
    """
    first = next((word for word in arguments or () if not word.startswith("-")), None)
    if first is not None and first not in parser.get_default("commands"):
        raise unknown("command", first, parser.get_default("commands"))
    args, rest = parser.parse_known_args(arguments)
    if rest and not (hasattr(args, "overrides") and all("=" in word and not word.startswith("-") for word in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        args.overrides = [*args.overrides, *rest]
    return args


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="coop", description=coop.__doc__.splitlines()[0] if coop.__doc__ else "")
    parser.add_argument("--version", action="version", version=f"coop-clip {coop.__version__}")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error; anywhere in the command")
    parser.add_argument("--verbose", action="store_true", help="show what libraries log; anywhere in the command")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_demo(commands)
    _add_run(commands)
    _add_study(commands)
    _add_table(commands)
    _add_words(commands)
    _add_report(commands)
    _add_predict(commands)
    _add_import(commands)
    _add_export(commands)
    _add_data(commands)
    parser.set_defaults(commands=tuple(commands.choices))
    return parser


def _command(commands: Any, name: str, text: str, run: Handler) -> argparse.ArgumentParser:
    command: argparse.ArgumentParser = commands.add_parser(name, help=text, description=text)
    command.set_defaults(run=run)
    return command


def _add_demo(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    command = _command(
        commands, "demo", "zero-shot against learned prompts, with what ships here, in two minutes", _demo
    )
    command.add_argument("--results", type=Path, default=Path("demo"), help="folder for the runs (demo)")


def _demo(args: argparse.Namespace) -> int:
    from coop.clip.lit_lite import lit_lite_files
    from coop.io import cache_folder
    from coop.runs.store import stored_runs
    from coop.runs.study import load_study, match_runs, planned_runs

    print("Fashion-MNIST (10 kinds of clothing, 1,000 test images) with lit_lite, a small CLIP: zero-shot against")
    print("CoOp, 16 learned context vectors, three few-shot samples each\n", flush=True)
    lit_lite_files(cache_folder())  # says what is missing before eleven runs do
    place = f"results={args.results}"
    if code := main(["run", "-m", "+experiment=demo", place]):
        return code
    main(["table", str(args.results), "--rows", "dataset,method,template", "--columns", "shots"])
    best = planned_runs(load_study("demo"), [place, "method=coop", "shots=16", "seed=1"])
    (found,) = match_runs(best, stored_runs(args.results))
    assert found is not None
    print(f"\nThe words nearest to the 16 context vectors learned from 16 shots ({found.folder}):\n", flush=True)
    main(["words", str(found.folder), "--top", "4", "--whole-words"])
    code = main(["report", "demo", place, "--output", str(args.results / "report")])
    print("Open the page in a browser: curves, tables, words, and what changed, class by class.")
    return code


def _add_run(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    command = _command(commands, "run", "one run, or with -m a sweep over all values given with commas", _run)
    command.add_argument("-m", "--multirun", action="store_true", help="run the grid; what is done already is skipped")
    command.add_argument("--cfg", action="store_true", help="print the configuration instead of running it")
    command.add_argument(
        "--help-keys",
        action="store_true",
        help="print what each key means, and its default; of KEY or method=NAME alone",
    )
    _add_overrides(
        command, "e.g. dataset=eurosat shots=1,2,4; with -m, +experiment=NAME runs a study (coop study lists them)"
    )


def _run(args: argparse.Namespace) -> int:
    from coop.config import config_text, key_help, run_config
    from coop.runs.grid import single, split_launch_words, sweep
    from coop.runs.study import load_study, planned_runs, split_experiment

    if args.help_keys:
        print(key_help(args.overrides), end="")
        return 0
    launch_words, words = split_launch_words(args.overrides)
    study, words = split_experiment(words)
    if study and not args.multirun:
        raise CoopError(f"+experiment={study} is a sweep of many runs: coop run -m +experiment={study}")
    if launch_words and not args.multirun:
        raise CoopError(f"{launch_words[0]} is for sweeps: coop run -m ...")
    unused = ""
    if study:
        configs = [run.config for run in planned_runs(load_study(study), words)]
    elif args.multirun:
        jobs, unused = sweep(words)
        configs = [run_config(job) for job in jobs]
    else:
        configs = [run_config(single(words))]
    if args.cfg:
        print("---\n".join(map(config_text, configs)), end="# what a key means: coop run --help-keys KEY\n")
        return 0
    from coop.runs.workers import launcher_of, run_one, run_sweep

    if unused:
        _say(unused)
    if args.multirun:
        return run_sweep(configs, launcher_of(launch_words), _say)
    run_one(configs[0], _say)
    return 0


def _say(text: str) -> None:
    print(text, flush=True)


def _add_study(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    command = _command(commands, "study", "the studies: which there are, what one is, how far it has come", _study)
    command.add_argument("name", nargs="?", metavar="STUDY", help="e.g. few_shot (default: list them all)")
    _add_overrides(command, "what it is run with; results=FOLDER")
    command.add_argument("--status", action="store_true", help="what is done, missing and failed, and the time left")


def _study(args: argparse.Namespace) -> int:
    from coop.runs.study import command_of, load_study, planned_runs, split_experiment, study_names

    if args.name is None:
        if args.status:
            raise CoopError("--status needs a study's name: coop study NAME --status (coop study lists them)")
        studies = [load_study(name) for name in study_names()]
        rows = [[s.name, s.title, str(s.size()), s.reproduces] for s in studies]
        columns = ["study", "title", "runs", "reproduces"][: 4 if (_width() or 120) >= 100 else 3]
        _print_table(columns, [row[: len(columns)] for row in rows])
        print("coop study NAME says more; coop run -m +experiment=NAME runs it; coop report NAME shows it")
        return 0
    study = load_study(args.name)
    named, words = split_experiment(args.overrides)
    if named:
        raise CoopError(f"+experiment={named}: the study is named already, {args.name}")
    planned = planned_runs(study, words)
    if args.status:
        return _status(planned, command_of(study.name, words))
    print(f"{study.title}\nafter {study.reproduces}\n\n{textwrap.fill(study.about, min(_width() or 100, 100))}")
    labels = [run.label for run in planned]
    _print_table(["series", "runs"], [[label, str(labels.count(label))] for label in dict.fromkeys(labels)])
    different = len({run.key for run in planned})
    shared = f", {different} of them different" if different < len(planned) else ""
    print(f"{len(planned)} runs{shared}: {command_of(study.name, words)}")
    return 0


def _status(planned: "Sequence[PlannedRun]", command: str) -> int:
    """Print what is done, missing, failed and damaged of a study's runs, and the time that is left."""
    from coop.runs.protocol import missing_data
    from coop.runs.store import stored_runs
    from coop.runs.study import match_runs, time_left

    results = planned[0].config.results
    stored = stored_runs(results) if results.is_symlink() or results.exists() else []
    states = {run.key: "missing" for run in planned}
    found = dict(zip(states, match_runs(list({r.key: r for r in planned}.values()), stored), strict=True))
    states |= {key: run.state for key, run in found.items() if run}
    several = len({run.key.backbone for run in planned}) > 1
    counts: dict[tuple[str, ...], list[str]] = {}
    for run in planned:
        place = (run.label, run.key.dataset, *([run.key.backbone] if several else []))
        counts.setdefault(place, []).append(states[run.key])
    kinds = ("done", "missing", "failed")
    head = ["series", "dataset", *(["backbone"] if several else []), *kinds]
    _print_table(head, [[*place, *(str(of.count(kind) or "-") for kind in kinds)] for place, of in counts.items()])
    failures: dict[str, list[Path]] = {}
    for stored_run in found.values():
        if stored_run and stored_run.state == "failed":
            failures.setdefault(str(stored_run.error).split("\n", 1)[0], []).append(stored_run.folder)
    for error, folders in failures.items():
        print(f"failed: {error}", *(f"  in {folder}" for folder in folders[:SHOWN]), sep="\n")
        if len(folders) > SHOWN:
            print(f"  and {len(folders) - SHOWN} more")
    for damaged in (run for run in stored if run.state == "damaged"):
        print(f"damaged: {damaged.folder}: {damaged.error}")
    todo = {run.key: run.config for run in planned if states[run.key] != "done"}
    for name, (count, reason) in missing_data(todo.values()).items():
        print(f"no data for {_counted(count)} on {name}: {reason}")
    totals = ", ".join(f"{list(states.values()).count(kind)} {kind}" for kind in kinds)
    print(f"{totals}, of {_counted(len(states))} in {results}")
    done = {key: sum(run.seconds.values()) for key, run in found.items() if run and run.state == "done"}
    left = time_left((key, done.get(key)) for key in states)
    unknown = f"no estimate for {_counted(left.unknown)}, of whose kind none is finished"
    known = f"about {_duration(left.seconds)} for {_counted(left.estimated)}, one after the other"
    parts = [text for text, count in ((known, left.estimated), (unknown, left.unknown)) if count]
    print(f"time left: {'; '.join(parts)}" if parts else "nothing is left to do")
    if todo:
        print(f"the rest: {command}")
    return 0


SHOWN = 20  # failures that are listed


def _duration(seconds: float) -> str:
    """Return seconds, minutes or hours: `1.5 hours`."""
    for unit, length in (("hours", 3600), ("minutes", 60)):
        if seconds >= (length if unit == "hours" else 1.5 * length):
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.0f} seconds"


def _counted(count: int) -> str:
    return f"{count} run{'s' * (count != 1)}"


def _print_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table for people: numbers to the right, as wide as the terminal where there is one."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        number = column in ("runs", "done", "missing", "failed")
        table.add_column(
            column, justify="right" if number else "left", no_wrap=column not in ("title", "reproduces", "series")
        )
    for row in rows:
        table.add_row(*map(Text, row))
    Console(highlight=False, width=_width() or 120).print(table)


def _width() -> int | None:
    """Return the width of the terminal, or what COLUMNS says; None where output goes elsewhere."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() or "COLUMNS" in os.environ else None


def _add_table(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    command = _command(commands, "table", "the table of finished runs, with the difference to zero-shot", _table)
    command.add_argument("place", nargs="?", type=Path, metavar="RESULTS", help="folder of runs (results)")
    command.add_argument("--results", type=Path, help="the same")
    command.add_argument("--rows", type=_names, help="keys, e.g. dataset,method,n_ctx (default: all that differ)")
    command.add_argument("--columns", type=_names, help="keys (default: shots)")
    command.add_argument(
        "--value", default="accuracy", help="accuracy, mean_per_class_accuracy, macro_f1, ece, mean_confidence"
    )
    command.add_argument("--where", action="append", default=[], metavar="KEY=A,B", help="only these runs; repeatable")
    _add_output(command, "text, markdown, csv or latex")


def _table(args: argparse.Namespace) -> int:
    from coop.report.frame import measured, select, with_difference
    from coop.report.tables import FORMATS, make_table, render
    from coop.runs.store import stored_runs

    form = _format(args, FORMATS)
    if args.place and args.results and args.place != args.results:
        raise CoopError(f"{args.place} and --results {args.results} name two folders: give one")
    results = args.place or args.results or Path("results")
    runs = stored_runs(results)
    _warn_damaged(runs)
    frame = select(with_difference(measured(runs, results), args.value), args.where)
    grid = make_table(frame, args.rows, args.columns, args.value)
    _put(render(grid, form, None if args.output else _width()), args.output)
    return 0


def _warn_damaged(runs: "Sequence[StoredRun]") -> None:
    for run in runs:
        if run.state == "damaged":
            print(f"coop: left out as damaged: {run.folder}: {run.error}", file=sys.stderr)


def _add_words(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    command = _command(commands, "words", "the vocabulary words nearest to each learned context vector", _words)
    command.add_argument("place", type=Path, metavar="RUN", help="a run's folder, or a learned file")
    command.add_argument("--top", type=int, default=5, help="words per vector (5)")
    command.add_argument("--metric", default="euclidean", help="euclidean or cosine")
    command.add_argument("--whole-words", action="store_true", help="leave out fragments, punctuation, special tokens")
    command.add_argument("--class", dest="class_name", help="only this class, of a class-specific context")
    _add_output(command, "text, json or csv")
    _add_device(command)


def _words(args: argparse.Namespace) -> int:
    from coop.report.words import context_words, render_words

    form = _format(args, ("text", "json", "csv"))
    words = context_words(args.place, args.top, args.metric, args.whole_words, args.class_name, args.device)
    _put(render_words(words, form, None if args.output else _width()), args.output)
    return 0


def _add_report(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    text = "tables, figures and page of a study, or of a results folder, from the runs that are there"
    command = _command(commands, "report", text, _report)
    command.add_argument("name", metavar="STUDY", help="e.g. few_shot; or a folder of runs")
    _add_overrides(command, "what it was run with; results=FOLDER; of a folder: which runs")
    command.add_argument("--output", type=_output_folder, help="folder for the report (reports/STUDY)")
    command.add_argument("--unverified", action="store_true", help="also published numbers that nobody has checked")


def _report(args: argparse.Namespace) -> int:
    from coop.report.build import report_command

    page, *files = report_command(args.name, args.overrides, args.output, args.unverified)
    print(page)
    for folder in dict.fromkeys(path.parent for path in files):
        print(f"{folder}: {', '.join(path.name for path in files if path.parent == folder)}")
    return 0


def _add_predict(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    command = _command(commands, "predict", "classify images with what a run learned", _predict)
    command.add_argument("place", type=Path, metavar="RUN", help="a run's folder, or a learned file")
    help_images = "image files, folders of images, or CSV files with a column 'path'"
    command.add_argument("images", nargs="+", type=Path, metavar="IMAGE", help=help_images)
    help_classes = "other class names: a,b,c or a text file with one a line (not for class-specific contexts)"
    command.add_argument("--classes", type=_class_names, help=help_classes)
    command.add_argument("--top", type=int, default=5, help="classes per image (5)")
    _add_output(command, "text, json or csv")
    _add_device(command)


def _predict(args: argparse.Namespace) -> int:
    """Classify every image that can be read; return 1 where one could not."""
    from coop.learned import Classifier, image_files, learned_path
    from coop.runs.store import stored_run

    form = _format(args, ("text", "json", "csv"))
    files = image_files(args.images)
    classifier = Classifier.load(args.place, args.classes, args.device)
    if stored_run(learned_path(args.place).parent).validation["rule"] == "test":
        print("coop: the run's settings were chosen on its test images: its accuracy is too good", file=sys.stderr)
    predictions = list(classifier.predict_files(files, args.top))
    _put(_render_predictions(predictions, form), args.output)
    failed = [prediction for prediction in predictions if prediction.error]
    for prediction in failed:
        print(f"coop: {prediction.error}", file=sys.stderr)
    return 1 if failed else 0


def _render_predictions(predictions: "Sequence[Prediction]", form: str) -> str:
    """Return predictions as text, JSON, or CSV with a row for each image and class."""
    import csv
    import dataclasses
    import io
    import json

    if form == "json":
        return json.dumps([dataclasses.asdict(p) for p in predictions], indent=1) + "\n"
    if form == "csv":
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow(["image", "rank", "class", "probability", "error"])
        for p in predictions:
            ranked = [[p.image, rank, name, value, ""] for rank, (name, value) in enumerate(p.classes, start=1)]
            writer.writerows(ranked or [[p.image, "", "", "", p.error]])
        return out.getvalue()
    lines = []
    for p in predictions:
        lines += [p.image, *(f"  {100 * value:5.1f} %  {name}" for name, value in p.classes)]
        lines += ["  cannot be read"] if p.error else []
    return "\n".join(lines) + "\n"


def _add_import(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    text = "take the context out of a checkpoint of the original code (model.pth.tar-*)"
    command = _command(commands, "import", text, _import)
    command.add_argument("checkpoint", type=Path)
    command.add_argument(
        "--architecture", required=True, help="open_clip's name of the backbone it was learned on: RN50"
    )
    command.add_argument("--pretrained", help="its tag or checkpoint file (openai; none for lit_lite)")
    command.add_argument("--ctx-position", default="end", help="end, middle or front: the file does not say it")
    help_classes = "class names in label order: a,b,c or a text file with one a line"
    command.add_argument("--classes", type=_class_names, help=help_classes)
    command.add_argument(
        "--output", type=_output_file, required=True, help="the file to write, e.g. prompt.safetensors"
    )


def _import(args: argparse.Namespace) -> int:
    from coop.clip.backbone import LIT_LITE, load_backbone
    from coop.original import import_coop, original_state

    original_state(args.checkpoint)  # a wrong file is an error before a model is loaded
    pretrained = args.pretrained or (None if args.architecture == LIT_LITE else "openai")
    backbone = load_backbone(args.architecture, pretrained)
    learned = import_coop(args.checkpoint, backbone, args.classes, args.ctx_position)
    learned.save(args.output)
    print(f"{args.output}: context of shape {tuple(learned.state['ctx'].shape)}")
    return 0


def _add_export(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    text = "merge what a run learned into its backbone: an open_clip checkpoint"
    command = _command(commands, "export", text, _export)
    command.add_argument("place", type=Path, metavar="RUN", help="a run of a LoRA, LayerNorm or projection method")
    command.add_argument("--output", type=_output_file, required=True, help="the file to write: NAME.safetensors")


def _export(args: argparse.Namespace) -> int:
    from coop.learned import export_checkpoint, load_method

    if args.output.suffix != ".safetensors":
        raise CoopError(f"--output {args.output}: open_clip reads this checkpoint by its ending, .safetensors")
    method = load_method(args.place, "cpu")
    export_checkpoint(method, args.output)
    name = method.backbone.architecture
    print(f"{args.output}: open_clip.create_model({name!r}, pretrained={str(args.output)!r})")
    return 0


def _add_overrides(command: argparse.ArgumentParser, text: str) -> None:
    command.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help=text)


def _add_device(command: argparse.ArgumentParser) -> None:
    command.add_argument("--device", default="auto", help="auto, cpu or cuda")


def _add_output(command: argparse.ArgumentParser, formats: str) -> None:
    command.add_argument("--format", help=f"{formats} (what --output ends in, else text)")
    command.add_argument("--output", type=_output_file, help="write it to a file")


def _format(args: argparse.Namespace, known: Sequence[str]) -> str:
    """Return the format that is asked for, or that the ending of --output means; text where it has none.

    Raises CoopError for another one.
    """
    ending = args.output.suffix.lower() if args.output else ""
    endings = {"": "text", ".txt": "text", ".csv": "csv", ".json": "json", ".tex": "latex", ".md": "markdown"}
    if args.format is None and endings.get(ending) not in known:
        usual = ", ".join(end for end, form in endings.items() if end and form in known)
        raise CoopError(f"--output {args.output}: give a name that ends in {usual}, or say --format")
    form: str = args.format or endings[ending]
    if form not in known:
        raise unknown("format", form, known)
    return form


def _output_file(text: str) -> Path:
    """Return the file that --output names; what stands in its way is said before anything is computed.

    Raises CoopError for no name and for a folder, OSError where the system would refuse to write it.
    """
    path = Path(text)
    if not text.strip() or path.is_dir():
        raise CoopError(f"--output {text!r}: give the name of a file to write")
    check_writable(path)
    return path


def _output_folder(text: str) -> Path:
    """Return the folder that --output names. Raises CoopError for no name and for a file, OSError as above."""
    path = Path(text)
    if not text.strip() or (path.exists() and not path.is_dir()):
        raise CoopError(f"--output {text!r}: give the name of a folder to write into")
    check_writable(path)
    return path


def _data_root(text: str) -> Path:
    """Return the folder of all datasets, as `data_root=` takes it. Raises CoopError for none."""
    from coop.config import named_path

    return named_path("--data-root", text)


def _shots(text: str) -> "Shots":
    from coop.config import parse_shots

    return parse_shots(text)


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",")]


def _class_names(text: str) -> list[str]:
    """Return the class names of `a,b,c`, or of a text file that has one on each line. Raises CoopError for others."""
    if "," in text:
        return _names(text)
    try:
        lines = read_file(Path(text)).decode("utf-8-sig").splitlines()
    except (OSError, ValueError) as error:
        raise CoopError(f"--classes {text}: give names, a,b,c, or a text file ({first_line(error)})") from error
    return [line.strip() for line in lines if line.strip()]


def _put(text: str, output: Path | None) -> None:
    from coop.io import write_text

    if output:
        write_text(output, text)
        print(output)
    else:
        print(text, end="")


# The commands of `coop data`: what is on disk, what is wrong with it, getting it, and its few-shot samples.


class _DataParser(argparse.ArgumentParser):
    """Take dataset.KEY=VALUE words anywhere among the arguments, as `coop run` does; argparse alone cannot."""

    def parse_known_args(  # type: ignore[override]  # argparse's own overloads say the same in four ways
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        words = list(args or ())
        overrides = [word for word in words if word.startswith("dataset.") and "=" in word]
        parsed, rest = super().parse_known_args([word for word in words if word not in overrides], namespace)
        parsed.dataset_words = overrides
        return parsed, rest


def _add_data(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    data = commands.add_parser("data", help="datasets: list, check, prepare, sample")
    kinds = data.add_subparsers(required=True, metavar="list|check|prepare|sample", parser_class=_DataParser)
    root = os.environ.get("COOP_DATA", "data")
    listed = _command(kinds, "list", "what is there, how complete, under which licence", _data_list)
    check = _command(kinds, "check", "count, look for and decode every image", _data_check)
    prepare = _command(kinds, "prepare", "fetch and unpack what can be; say what to do by hand", _data_prepare)
    sample = _command(kinds, "sample", "print or write a few-shot sample", _data_sample)
    for command in (check, prepare, sample):
        command.add_argument("name", help="dataset, see 'coop data list'; folder and csv are your own")
        command.epilog = "dataset.KEY=VALUE changes the description, e.g. dataset.root=FOLDER"
    for command in (listed, check, prepare, sample):
        command.add_argument(
            "--data-root", type=_data_root, default=root, help="folder of all datasets (COOP_DATA, ./data)"
        )
    check.add_argument("--no-decode", action="store_true", help="look whether files are there, but do not read them")
    check.add_argument("--classes", action="store_true", help="print the counts of every class")
    sample.add_argument("--shots", type=_shots, required=True, help="images per class, or all")
    sample.add_argument("--seed", type=int, default=1)
    rules = "none, min4 (CoOp: min(shots, 4) per class), shots, full, held_out (one of the shots)"
    sample.add_argument("--validation", default="min4", help=rules)
    sample.add_argument("--output", type=_output_file, help="write a sample file (JSON) instead of printing")
    sample.add_argument("--split-file", type=Path, help="sample from this split file; the images need not be there")


def _dataset_spec(args: argparse.Namespace) -> "DatasetSpec":
    """Return the description that the arguments name, with their overrides, which are read as `coop run` reads them."""
    from coop.config import described
    from coop.runs.grid import single

    values = single(args.dataset_words)
    return described(args.name, {key.removeprefix("dataset."): value for key, value in values.items()})


def _data_list(args: argparse.Namespace) -> int:
    """Print a line for every dataset."""
    from tabulate import tabulate

    from coop.data import dataset_descriptions, load_description
    from coop.data.check import state

    rows = [state(load_description(name), args.data_root) for name in dataset_descriptions()]
    print(tabulate(rows, ["dataset", "classes", "state", "split", "licence", "folder"], disable_numparse=True))
    return 0


def _data_check(args: argparse.Namespace) -> int:
    """Print what a dataset is and what is wrong with it; 1 if files are missing or cannot be read."""
    from tabulate import tabulate

    from coop.data import read_dataset
    from coop.data.check import SHOWN, check_dataset, class_counts
    from coop.data.dataset import PARTS

    spec = _dataset_spec(args)
    dataset = read_dataset(spec, args.data_root)
    print(f"{dataset.name}: {dataset.root}\nsplit: {dataset.split_source}\nsha256 of its list: {dataset.digest}")
    print(f"template: {dataset.template}\nlicence: {spec.licence or 'yours'}")
    counts = class_counts(dataset)
    print(f"classes: {len(counts)} ({', '.join(name for _, name, *_ in counts[:5])}{', ...' * (len(counts) > 5)})")
    for part, *of_class in zip(PARTS, *(row[2:] for row in counts), strict=True):
        print(f"{part}: {sum(of_class)} images, {min(of_class)} to {max(of_class)} per class")
    if args.classes:
        print(tabulate(counts, ["label", "class name", *PARTS], disable_numparse=True))
    for note in dataset.notes:
        print(f"note: {note}")
    report = check_dataset(dataset, spec.expected, decode=not args.no_decode)
    for difference in report.differences:
        print(f"differs from the whole dataset: {difference}")
    for path, fault in list(report.faults.items())[:SHOWN]:
        print(f"FAULT {path}: {fault}")
    well = "every file is there" if args.no_decode else "every file is there and can be read"
    print(f"{len(report.faults)} files are missing or cannot be read" if report.faults else well)
    return 1 if report.faults else 0


def _data_prepare(args: argparse.Namespace) -> int:
    """Fetch a dataset as far as possible; 1 if something is left to do."""
    from coop.data.prepare import prepare_dataset
    from coop.data.spec import prepare_command

    spec = _dataset_spec(args)
    if not spec.directory and spec.reader != "hub":
        raise CoopError(f"dataset '{spec.name}' is your own: there is nothing to fetch")
    done = prepare_dataset(spec, args.data_root, print)
    check = prepare_command(spec).replace("prepare", "check", 1)
    print(f"ready: '{check}' counts it" if done else "not complete yet")
    return 0 if done else 1


def _data_sample(args: argparse.Namespace) -> int:
    """Print a sample as path, label, class name - train, then val - or write it as a sample file."""
    from coop.data import few_shot, few_shot_notes, few_shot_sample, load_split_file, read_dataset
    from coop.data.splits import names_of, rows_of, sample_text

    spec, notes = _dataset_spec(args), tuple[str, ...]()
    train: Sequence[Sequence[Any]]
    val: Sequence[Sequence[Any]]
    if args.split_file:
        split = load_split_file(args.split_file)
        names_of(split, str(args.split_file), spec.same_names)
        train, val = few_shot_sample(split, args.shots, args.seed, args.validation)
    else:
        dataset = read_dataset(spec, args.data_root)
        parts = few_shot(dataset, args.shots, args.seed, args.validation)
        train, val = (rows_of(part, dataset.class_names) for part in parts)
        notes = (*dataset.notes, *few_shot_notes(dataset, args.shots, args.validation))
    for note in notes:
        print(note, file=sys.stderr)
    if args.output:
        about = {"dataset": spec.name, "shots": args.shots, "seed": args.seed, "validation": args.validation}
        _put(sample_text(train, val, **about), args.output)
        print(f"{len(train)} train and {len(val)} val images written", file=sys.stderr)
    else:
        for path, label, name in (*train, *val):
            print(f"{path}\t{label}\t{name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
