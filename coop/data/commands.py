"""`coop data list | check | prepare | sample`: what is on disk, what is wrong with it, getting it, and its subsets."""

import os
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from tabulate import tabulate

from coop.data.check import SHOWN, check_dataset, class_counts, part_of
from coop.data.content import PARTS, Row, names_of
from coop.data.description import Description, dataset_descriptions, dataset_folder, load_description
from coop.data.few_shot import Shots, few_shot, few_shot_notes, few_shot_sample
from coop.data.images import file_faults
from coop.data.prepare import prepare
from coop.data.reading import bundled_sample, read_described
from coop.data.sample_file import sample_rows, write_rows
from coop.data.split_file import load_split_file
from coop.errors import CoopError


class OverridesParser(ArgumentParser):
    """Take dataset.KEY=VALUE words anywhere among the arguments, as `coop run` does; argparse alone cannot."""

    def parse_known_args(  # type: ignore[override]  # argparse's own overloads say the same in four ways
        self, args: Sequence[str] | None = None, namespace: Namespace | None = None
    ) -> tuple[Namespace, list[str]]:
        words = list(args or ())
        overrides = [word for word in words if word.startswith("dataset.") and "=" in word]
        parsed, rest = super().parse_known_args([word for word in words if word not in overrides], namespace)
        parsed.overrides = overrides
        return parsed, rest


def add_data_commands(subparsers: Any) -> None:
    """Add `data` and its four commands to an argparse sub-parser; each sets `run`, a function of the arguments."""
    data: ArgumentParser = subparsers.add_parser("data", help="datasets: list, check, prepare, sample")
    commands = data.add_subparsers(
        dest="data_command", required=True, metavar="list|check|prepare|sample", parser_class=OverridesParser
    )
    _add(commands, "list", run_list, "what is there, how complete, under which licence")
    check = _add(commands, "check", run_check, "count, look for and decode every image", own=True)
    check.add_argument("--no-decode", action="store_true", help="look whether files are there, but do not read them")
    check.add_argument("--classes", action="store_true", help="print the counts of every class")
    _add(commands, "prepare", run_prepare, "fetch and unpack what can be; say what to do by hand", own=True)
    sample = _add(commands, "sample", run_sample, "print or write a few-shot sample", own=True)
    sample.add_argument("--shots", type=parse_shots, required=True, help="images per class, or all")
    sample.add_argument("--seed", type=int, default=1)
    sample.add_argument("--output", type=Path, help="write a sample file (JSON) instead of printing")
    sample.add_argument("--split-file", help="sample from this split file; the images need not be there")


def _add(commands: Any, name: str, run: Callable[[Namespace], int], text: str, own: bool = False) -> ArgumentParser:
    parser: ArgumentParser = commands.add_parser(name, help=text, description=text)
    if own:
        parser.add_argument("name", help="dataset, see 'coop data list'; folder and csv are your own")
        parser.epilog = "dataset.KEY=VALUE changes the description, e.g. dataset.root=FOLDER"
    default = Path(os.environ.get("COOP_DATA", "data"))
    parser.add_argument("--data-root", type=Path, default=default, help="folder of all datasets (COOP_DATA, ./data)")
    parser.set_defaults(run=run)
    return parser


def parse_shots(text: str) -> Shots:
    """Return a number of shots or 'all'; argparse turns ValueError into its own message."""
    return "all" if text == "all" else int(text)


def _described(args: Namespace) -> Description:
    """Return the description that the arguments name, with their overrides, as `coop run` takes them."""
    overrides = OmegaConf.to_container(OmegaConf.from_dotlist(args.overrides)) or {}
    assert isinstance(overrides, dict)
    return load_description(args.name, **overrides.get("dataset", {}))


def run_list(args: Namespace) -> int:
    """Print a line for every dataset."""
    rows = [_list_row(load_description(name), args.data_root) for name in dataset_descriptions()]
    headers = ["dataset", "classes", "state", "split", "licence", "folder"]
    print(tabulate(rows, headers, disable_numparse=True))
    return 0


def _list_row(description: Description, data_root: Path) -> list[str]:
    """Return name, classes, how many of the whole dataset's images are there, split, licence, folder."""
    name, expected = description.name, description.expected
    if not description.directory:
        place = "dataset.file=CSV" if description.reader == "csv" else "dataset.root=FOLDER"
        return [name, "", "yours", "", "", place]
    folder = dataset_folder(description, data_root)
    end = [description.licence, str(folder)]
    sample = None if folder.is_dir() else bundled_sample(description)
    if sample:
        end = [description.licence, str(sample)]
    elif not folder.is_dir():
        return [name, str(expected.classes or ""), "not there", "", *end]
    try:
        dataset = read_described(description, data_root)
    except CoopError:
        return [name, str(expected.classes or ""), f"not usable: 'coop data check {name}'", "", *end]
    parts = ("train", "test") if dataset.val_is_test else PARTS
    paths = [path for part in parts for path in part_of(dataset, part).paths]
    here = len(paths) - len(file_faults(dataset.root, paths, dataset.follow_links))
    whole = sum(getattr(expected, part) or 0 for part in parts)
    state = f"{here} of {whole or len(paths)} images"
    kind = "own split" if dataset.own_split else "changed" if "not the official" in dataset.split_source else "official"
    return [name, str(len(dataset.class_names)), state, "sample" if sample else kind, *end]


def run_check(args: Namespace) -> int:
    """Print what a dataset is and what is wrong with it; 1 if files are missing or cannot be read."""
    description = _described(args)
    dataset = read_described(description, args.data_root)
    print(f"{dataset.name}: {dataset.root}\nsplit: {dataset.split_source}\nsha256 of its list: {dataset.digest}")
    print(f"template: {dataset.template}\nlicence: {description.licence or 'yours'}")
    counts = class_counts(dataset)
    print(f"classes: {len(counts)} ({', '.join(name for _, name, *_ in counts[:5])}{', ...' * (len(counts) > 5)})")
    for part, *of_class in zip(PARTS, *(row[2:] for row in counts), strict=True):
        print(f"{part}: {sum(of_class)} images, {min(of_class)} to {max(of_class)} per class")
    if args.classes:
        print(tabulate(counts, ["label", "class name", *PARTS], disable_numparse=True))
    for note in dataset.notes:
        print(f"note: {note}")
    report = check_dataset(dataset, description.expected, decode=not args.no_decode)
    for difference in report.differences:
        print(f"differs from the whole dataset: {difference}")
    for path, fault in list(report.faults.items())[:SHOWN]:
        print(f"FAULT {path}: {fault}")
    if report.faults:
        print(f"{len(report.faults)} files are missing or cannot be read")
    else:
        print("every file is there" if args.no_decode else "every file is there and can be read")
    return 1 if report.faults else 0


def run_prepare(args: Namespace) -> int:
    """Fetch a dataset as far as possible; 1 if something is left to do."""
    description = _described(args)
    if not description.directory:
        raise CoopError(f"dataset '{description.name}' is your own: there is nothing to fetch")
    done = prepare(description, args.data_root, print)
    print(f"ready: 'coop data check {description.name}' counts it" if done else "not complete yet")
    return 0 if done else 1


def run_sample(args: Namespace) -> int:
    """Print the sample as path, label, class name - train, then val - or write it as a sample file."""
    train, val, notes = _sample(args)
    for note in notes:
        print(note, file=sys.stderr)
    if args.output:
        write_rows(args.output, train, val, dataset=args.name, shots=args.shots, seed=args.seed)
        print(f"{len(train)} train and {len(val)} val images written to {args.output}", file=sys.stderr)
    else:
        for path, label, name in (*train, *val):
            print(f"{path}\t{label}\t{name}")
    return 0


def _sample(args: Namespace) -> tuple[list[Row], list[Row], tuple[str, ...]]:
    if args.split_file:
        split = load_split_file(Path(args.split_file))
        names_of(split, args.split_file, load_description(args.name).same_names)
        train, val = few_shot_sample(split, args.shots, args.seed)
        return [(p, i, n) for p, i, n in train], [(p, i, n) for p, i, n in val], ()
    dataset = read_described(_described(args), args.data_root)
    samples = few_shot(dataset, args.shots, args.seed)
    rows = [sample_rows(sample, dataset.class_names) for sample in samples]
    return rows[0], rows[1], (*dataset.notes, *few_shot_notes(dataset, args.shots))
