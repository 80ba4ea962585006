"""The command line: `coop demo | run | study | table | words | report | predict | import | data`."""

import argparse
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import coop
from coop.errors import CoopError

if TYPE_CHECKING:
    from coop.learned import Prediction

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
    _add_export(commands)
    add_data_commands(commands)
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
    command.add_argument("results", nargs="?", type=Path, default=Path("results"), help="folder of runs (results)")
    command.add_argument("--rows", type=_names, help="keys, e.g. dataset,method,n_ctx (default: all that differ)")
    command.add_argument("--columns", type=_names, help="keys (default: shots)")
    command.add_argument("--value", default="accuracy", help="accuracy, macro_f1, ece or mean_confidence")
    command.add_argument("--where", action="append", default=[], metavar="KEY=A,B", help="only these runs; repeatable")
    command.add_argument("--format", default="text", help="text, markdown, csv or latex")
    command.add_argument("--output", type=Path, help="write it to a file")


def _table(args: argparse.Namespace) -> int:
    from coop.report.render import render
    from coop.report.table import make_table, select, with_difference
    from coop.runs.store import read_results

    frame = select(with_difference(read_results(args.results), args.value), args.where)
    table = make_table(frame, args.rows, args.columns, args.value)
    width = os.get_terminal_size().columns if sys.stdout.isatty() and not args.output else None
    _put(render(table, args.format, width), args.output)
    return 0


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
    command = _command(commands, "report", "a study's tables, figures and page, from the runs that are there", _report)
    command.add_argument("name", metavar="STUDY", help="e.g. few_shot")
    command.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="what it was run with; results=FOLDER")
    command.add_argument("--output", type=Path, help="folder for the report (reports/STUDY)")


def _report(args: argparse.Namespace) -> int:
    from coop.report.command import report_command

    page, *files = report_command(args.name, args.overrides, args.output)
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
    command.add_argument("--format", default="text", help="text, json or csv")
    command.add_argument("--output", type=Path, help="write it to a file")
    _add_device(command)


def _predict(args: argparse.Namespace) -> int:
    """Classify every image that can be read; return 1 where one could not."""
    from coop.errors import unknown
    from coop.learned import Classifier, image_files

    if args.format not in ("text", "json", "csv"):
        raise unknown("format", args.format, ("text", "json", "csv"))
    files = image_files(args.images)
    classifier = Classifier.load(args.place, args.classes, args.device)
    predictions = list(classifier.predict_files(files, args.top))
    _put(_render_predictions(predictions, args.format), args.output)
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
    command.add_argument("--output", type=Path, required=True, help="the file to write, e.g. prompt.safetensors")


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
    command.add_argument("--output", type=Path, required=True, help="the file to write: NAME.safetensors")


def _export(args: argparse.Namespace) -> int:
    from coop.errors import CoopError
    from coop.learned import export_checkpoint, load_method

    if args.output.suffix != ".safetensors":
        raise CoopError(f"--output {args.output}: open_clip reads this checkpoint by its ending, .safetensors")
    method = load_method(args.place, "cpu")
    export_checkpoint(method, args.output)
    name = method.backbone.architecture
    print(f"{args.output}: open_clip.create_model({name!r}, pretrained={str(args.output)!r})")
    return 0


def _add_device(command: argparse.ArgumentParser) -> None:
    command.add_argument("--device", default="auto", help="auto, cpu or cuda")


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",")]


def _class_names(text: str) -> list[str]:
    """Return the class names of `a,b,c`, or of a text file that has one on each line."""
    from coop.errors import CoopError

    path = Path(text)
    if "," not in text and path.is_file():
        try:
            return [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        except (OSError, ValueError) as error:
            raise CoopError(f"--classes {text} is not a text file in UTF-8: {error}") from error
    return _names(text)


def _put(text: str, output: Path | None) -> None:
    from coop.io import write_text

    if output:
        write_text(output, text)
        print(output)
    else:
        print(text, end="")


if __name__ == "__main__":
    sys.exit(main())
