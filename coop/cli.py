"""The command line: `coop demo | run | study | table | words | report | predict | import | data | pretrain`."""

import argparse
import os
import shutil
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import coop
from coop.errors import CoopError, unknown

if TYPE_CHECKING:
    from coop.runs.store import StoredRun

Handler = Callable[[argparse.Namespace], int]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; return its exit code: 0, 1 where runs failed, 2 for a user's mistake."""
    args = _parsed(_parser(), arguments)
    try:
        with warnings.catch_warnings():
            if not sys.warnoptions:
                warnings.simplefilter("ignore")  # the libraries' advice to programmers
            code: int = args.run(args)
            return code
    except CoopError as error:
        print(f"coop: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("coop: interrupted; finished runs are kept, and the same command goes on with the rest", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `coop table | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _parsed(parser: argparse.ArgumentParser, arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line; KEY=VALUE may also stand after options, where argparse takes no more of them."""
    args, rest = parser.parse_known_args(arguments)
    if rest and not (hasattr(args, "overrides") and all("=" in word and not word.startswith("-") for word in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        args.overrides = [*args.overrides, *rest]
    return args


def _parser() -> argparse.ArgumentParser:
    from coop.data.commands import add_data_commands
    from coop.pretrain.arguments import add_pretrain_command

    parser = argparse.ArgumentParser(prog="coop", description=coop.__doc__.splitlines()[0] if coop.__doc__ else "")
    parser.add_argument("--version", action="version", version=f"coop-clip {coop.__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_demo(commands)
    _add_run(commands)
    _add_study(commands)
    _add_table(commands)
    _add_words(commands)
    _add_report(commands)
    _add_predict(commands)
    _add_import(commands)
    add_data_commands(commands)
    add_pretrain_command(commands)
    return parser


def _command(
    commands: "argparse._SubParsersAction[argparse.ArgumentParser]", name: str, text: str, run: Handler
) -> argparse.ArgumentParser:
    command = commands.add_parser(name, help=text, description=text)
    command.set_defaults(run=run)
    return command


def _add_demo(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    command = _command(
        commands, "demo", "zero-shot against learned prompts, with what ships here, in two minutes", _demo
    )
    command.add_argument("--results", type=Path, default=Path("demo"), help="folder for the runs (demo)")


def _demo(args: argparse.Namespace) -> int:
    from coop.demo import demo

    return demo(args.results)


def _add_run(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    command = _command(commands, "run", "one run, or with -m a sweep over all values given with commas", _run)
    command.add_argument("-m", "--multirun", action="store_true", help="run the grid; what is done already is skipped")
    command.add_argument("--cfg", action="store_true", help="print the configuration instead of running it")
    command.add_argument(
        "overrides",
        nargs="*",
        metavar="KEY=VALUE",
        help="e.g. dataset=eurosat shots=1,2,4 (Hydra); with -m, +experiment=NAME runs a study (coop study lists them)",
    )


def _run(args: argparse.Namespace) -> int:
    from coop.runs.command import run_command

    return run_command(args.overrides, args.multirun, args.cfg)


def _add_study(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    command = _command(commands, "study", "the studies: which there are, what one is, how far it has come", _study)
    command.add_argument("name", nargs="?", metavar="STUDY", help="e.g. few_shot (default: list them all)")
    command.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="what it is run with; results=FOLDER")
    command.add_argument("--status", action="store_true", help="what is done, missing and failed, and the time left")


def _study(args: argparse.Namespace) -> int:
    from coop.runs.status import study_command

    return study_command(args.name, args.overrides, args.status)


def _add_table(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    command = _command(commands, "table", "the table of finished runs, with the difference to zero-shot", _table)
    command.add_argument("place", nargs="?", type=Path, metavar="RESULTS", help="folder of runs (results)")
    command.add_argument("--results", type=Path, help="the same")
    command.add_argument("--rows", type=_names, help="keys, e.g. dataset,method,n_ctx (default: all that differ)")
    command.add_argument("--columns", type=_names, help="keys (default: shots)")
    command.add_argument("--value", default="accuracy", help="accuracy, macro_f1, ece or mean_confidence")
    command.add_argument("--where", action="append", default=[], metavar="KEY=A,B", help="only these runs; repeatable")
    command.add_argument("--format", default="text", help="text, markdown, csv or latex")
    command.add_argument("--output", type=Path, help="write it to a file")


def _table(args: argparse.Namespace) -> int:
    from coop.report.frame import measured, select, with_difference
    from coop.report.tables import FORMATS, make_table, render
    from coop.runs.store import stored_runs

    if args.format not in FORMATS:
        raise unknown("format", args.format, FORMATS)
    if args.place and args.results and args.place != args.results:
        raise CoopError(f"{args.place} and --results {args.results} name two folders: give one")
    results = args.place or args.results or Path("results")
    runs = stored_runs(results)
    _warn_damaged(runs)
    frame = select(with_difference(measured(runs, results), args.value), args.where)
    table = make_table(frame, args.rows, args.columns, args.value)
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() and not args.output else None
    _put(render(table, args.format, width), args.output)
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
    command.add_argument("--format", default="text", help="text, json or csv")
    command.add_argument("--output", type=Path, help="write it to a file")
    _add_device(command)


def _words(args: argparse.Namespace) -> int:
    from coop.report.words import context_words, render_words

    words = context_words(args.place, args.top, args.metric, args.whole_words, args.class_name, args.device)
    _put(render_words(words, args.format), args.output)
    return 0


def _add_report(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    text = "tables, figures and page of a study, or of a results folder, from the runs that are there"
    command = _command(commands, "report", text, _report)
    command.add_argument("name", metavar="STUDY", help="e.g. few_shot; or a folder of runs")
    command.add_argument(
        "overrides",
        nargs="*",
        metavar="KEY=VALUE",
        help="what it was run with; results=FOLDER; of a folder: which runs",
    )
    command.add_argument("--output", type=Path, help="folder for the report (reports/STUDY)")
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
    command.add_argument("images", nargs="+", type=Path, metavar="IMAGE")
    command.add_argument(
        "--classes", type=_names, help="other class names, with commas (not for class-specific contexts)"
    )
    command.add_argument("--top", type=int, default=5, help="classes per image (5)")
    command.add_argument("--format", default="text", help="text or json")
    _add_device(command)


def _predict(args: argparse.Namespace) -> int:
    import json

    from coop.learned import Classifier

    if args.format not in ("text", "json"):
        raise unknown("format", args.format, ("text", "json"))
    predictions = Classifier.load(args.place, args.classes, args.device).predict(args.images, args.top)
    named = zip(map(str, args.images), predictions, strict=True)
    if args.format == "json":
        print(json.dumps([{"image": image, "classes": [list(pair) for pair in top]} for image, top in named], indent=1))
        return 0
    for image, top in named:
        print(image)
        for name, probability in top:
            print(f"  {100 * probability:5.1f} %  {name}")
    return 0


def _add_import(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    text = "take the context out of a checkpoint of the original code (model.pth.tar-*)"
    command = _command(commands, "import", text, _import)
    command.add_argument("checkpoint", type=Path)
    command.add_argument(
        "--architecture", required=True, help="open_clip's name of the backbone it was learned on: RN50"
    )
    command.add_argument("--pretrained", default="openai", help="its tag or checkpoint file (openai)")
    command.add_argument("--ctx-position", default="end", help="end, middle or front: the file does not say it")
    command.add_argument(
        "--classes", type=_names, help="class names in label order, with commas, or a file with one a line"
    )
    command.add_argument("--output", type=Path, required=True, help="the file to write, e.g. prompt.safetensors")


def _import(args: argparse.Namespace) -> int:
    from coop.clip.backbone import load_backbone
    from coop.original import import_coop, original_state

    original_state(args.checkpoint)  # a wrong file is told before a model is loaded
    names = args.classes
    if names and len(names) == 1 and Path(names[0]).is_file():
        names = [line.strip() for line in Path(names[0]).read_text(encoding="utf-8").splitlines() if line.strip()]
    backbone = load_backbone(args.architecture, args.pretrained)
    artefact = import_coop(args.checkpoint, backbone, names, args.ctx_position)
    artefact.save(args.output)
    print(f"{args.output}: context of shape {tuple(artefact.state['ctx'].shape)}")
    return 0


def _add_device(command: argparse.ArgumentParser) -> None:
    command.add_argument("--device", default="auto", help="auto, cpu or cuda")


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",")]


def _put(text: str, output: Path | None) -> None:
    from coop.io import write_text

    if output:
        write_text(output, text)
        print(output)
    else:
        print(text, end="")


if __name__ == "__main__":
    sys.exit(main())
