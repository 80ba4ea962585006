"""Every command and Python snippet of the documentation is understood, and does what it says in a user's own folder."""

import ast
import os
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from coop.cli import _dataset_spec, _parsed, _parser, main
from coop.clip.lit_lite import TRUNK_PACKAGE
from coop.config import check_keys
from coop.runs.study import load_study, planned_runs, study_names
from tests.small_place import COLOURS, make_place

ROOT = Path(__file__).resolve().parents[1]
PAGES = ["README.md", "CONTRIBUTING.md", "docs/*.md", "experiments/**/*.md", "examples/*.py"]
TEXTS = {str(path.relative_to(ROOT)): path.read_text() for page in PAGES for path in sorted(ROOT.glob(page))}
START = re.compile(r"coop [a-z].*|python -m experiments.*")


def fenced(text: str, *kinds: str) -> list[str]:
    found = re.findall(r"^```(\w*)\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)
    return [block for kind, block in found if kind in kinds or not kinds]


def inline(text: str) -> list[str]:
    """Return the code within the text's lines; a line break in it is a space."""
    return [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", re.sub(r"(?ms)^```.*?^```$", "", text))]


def commands(text: str) -> list[str]:
    """Return the commands of a page, as they would be pasted: without prompt, comment, or what installs the toolkit."""
    lines = [line for block in fenced(text) for line in block.replace("\\\n", " ").splitlines()]
    pasted = (re.sub(r"^\$ |\s+#.*$|^.*&& \.venv/bin/(?=coop)", "", line) for line in lines)
    return list(dict.fromkeys(c for c in [*pasted, *inline(text)] if START.fullmatch(c)))


@dataclass(frozen=True)
class Use:
    """How a command is tried where it cannot run as it stands: `why`; with `changes` it runs, without it is read only.

    A changed command has other words in the place of some; `...` and names of things are filled in.
    """

    why: str
    changes: dict[str, str] = field(default_factory=dict)


QUICK = "epochs=1 augment.views=0"
CPU = "hours on this machine's CPU"
NETWORK = "data from the network"
IMAGENET = "ImageNet's images"
SLURM = (
    "coop run -m dataset=eurosat,dtd shots=1,2,4,8,16 seed=1,2,3 hydra/launcher=slurm "
    "hydra.launcher.partition=gpu jobs=8"
)
RUN = "results/birds/lit_lite/coop/*"
USES = {
    "coop data prepare eurosat": Use(NETWORK),
    "coop data prepare hub dataset.source=torchvision:CIFAR10": Use(NETWORK),
    "coop run dataset=hub dataset.source=torchvision:CIFAR10": Use(NETWORK),
    "coop run dataset=imagenet protocol=cross_dataset \"protocol.targets=[dtd,eurosat]\"": Use(IMAGENET),
    "coop run dataset=imagenet protocol=domain_generalisation": Use(IMAGENET),
    "coop run dataset=imagenet sample_file=sample.json": Use(IMAGENET),
    "coop data sample imagenet --shots 16 --seed 1 --output sample.json": Use(IMAGENET),
    "coop run -m +experiment=NAME": Use("a placeholder", {"NAME": "demo shots=1 seed=1 epochs=1"}),
    "coop run dataset=eurosat backbone=rn50 shots=16 n_ctx=4": Use(NETWORK, {"rn50": f"lit_lite {QUICK}"}),
    "coop run -m dataset=eurosat,dtd backbone=rn50,vit_b16 method=zero_shot": Use(
        NETWORK, {"rn50,vit_b16": "lit_lite"}
    ),
    "coop run -m dataset=eurosat,dtd backbone=rn50,vit_b16 shots=1,2,4,8,16 n_ctx=4,16 seed=1,2,3": Use(
        f"{NETWORK}, {CPU}", {"rn50,vit_b16": f"lit_lite {QUICK}", "1,2,4,8,16": "1,2", "1,2,3": "1"}
    ),
    "coop run -m dataset=eurosat,dtd shots=1,4,16 seed=1,2,3 hydra/launcher=local_gpus": Use(
        f"{CPU}, no GPU", {"shots=1,4,16": f"{QUICK} shots=1,4", "local_gpus": "local_gpus jobs=2"}
    ),
    "coop run -m dataset=eurosat,dtd shots=1,2,4,8,16 seed=1,2,3 hydra/launcher=local_gpus": Use("as the README's"),
    SLURM: Use("a Slurm cluster"),
    "coop run -m dataset=dtd backbone=vit_b16 method=coop,taskres,tip_adapter_f,gda,clip_lora shots=1,4,16 seed=1,2,3":
        Use(NETWORK, {
            "vit_b16": "custom backbone.architecture=tiny.json backbone.pretrained=tiny.pt",
            "shots=1,4,16 seed=1,2,3": "shots=1 seed=1,2 epochs=2 augment.views=2 n_ctx=2 steps=2",
        }),
    "coop run -m +experiment=few_shot dataset=eurosat,dtd backbone=vit_b16": Use(
        f"{NETWORK}, {CPU}", {"vit_b16": "lit_lite shots=1 seed=1 epochs=1 n_ctx=16 augment.views=0"}
    ),
    "coop report few_shot dataset=eurosat,dtd backbone=vit_b16": Use(
        NETWORK, {"vit_b16": "lit_lite shots=1 seed=1 epochs=1 n_ctx=16 augment.views=0"}
    ),
    "coop run dataset=caltech101 protocol=base_to_new": Use(CPU, {"base_to_new": f"base_to_new {QUICK}"}),
    "coop run dataset=folder dataset.root=~/birds \"dataset.template=a photo of a {}, a bird.\"": Use(
        "quick", {"run ": "run epochs=1 "}
    ),
    "coop run dataset=csv dataset.file=~/birds.csv dataset.root=~/images": Use("quick", {"run ": "run epochs=1 "}),
    "coop predict results/birds/... my.jpg a_folder/ --output answers.csv": Use(
        "a run's name", {"results/birds/...": RUN}
    ),
    "coop predict results/birds/... my.jpg --classes \"barn owl,tawny owl\"": Use(
        "a run's name", {"results/birds/...": RUN}
    ),
    "coop import prompt_learner/model.pth.tar-50 --architecture RN50 --output prompt.safetensors": Use(
        NETWORK, {"RN50": "lit_lite"}
    ),
    "coop export RUN --output model.safetensors": Use("a run's name"),  # tests/test_learned.py
    "coop words RUN": Use("a run's name", {"RUN": RUN}),
    "coop words demo/fashion_mnist/lit_lite/coop/shots16-seed1-augment.views-0-8cf54aa0 --top 3 --whole-words": Use(
        "after the demo: test_the_demo_is_the_readme_s"
    ),
    "coop demo": Use("test_the_demo_is_the_readme_s"),
    "coop run -m backbone=custom backbone.architecture=small_vit/config.json "
    "backbone.pretrained=small_vit/model.safetensors backbone.name=small_vit    dataset=dtd,caltech101 shots=4,16 "
    "method=maple depth=3": Use(
        "the ViT takes 40 minutes", {
            "small_vit/config.json": "tiny.json", "small_vit/model.safetensors": "tiny.pt", "dtd,caltech101": "dtd",
            "4,16": "1", "depth=3": "depth=1 epochs=1 augment.views=0",
        }),
    "coop run -m epochs=0 seed=1,2,3": Use("quick", {"seed=1,2,3": "seed=1 augment.views=0"}),
    "coop run -m dataset=dtd,eurosat method=... shots=1,4,16": Use(
        CPU, {"...": "coop epochs=1", "shots=1,4,16": "shots=1"}
    ),
    "coop run method=NAME": Use("a placeholder", {"NAME": "zero_shot"}),
    "coop run method=...": Use("a placeholder", {"...": "zero_shot"}),
    "coop run -m ...": Use("a placeholder", {"...": "method=zero_shot"}),
    "coop report methods": Use(CPU),
    "coop run -m +experiment=methods dataset=dtd,eurosat backbone=lit_lite layer=2 depth=4 seed=1": Use(CPU),
    "coop report methods dataset=dtd,eurosat backbone=lit_lite layer=2 depth=4 seed=1": Use(CPU),
    "coop data sample eurosat --shots 4 --seed 1 --output sample.json": Use("its sample is for the next one"),
    "coop run -m dataset=eurosat shots=4 seed=1,2,3,4,5 sample_file=sample.json epochs=50 "
    "augment.views=0,1,10,epochs": Use(CPU),
}  # fmt: skip
FOUND = {page: commands(text) for page, text in TEXTS.items()}
ALL = sorted({command for found in FOUND.values() for command in found})
PAGE_OF = {command: page for page in reversed(FOUND) for command in FOUND[page]}  # the first page that has it


def changed(command: str) -> str:
    for old, new in (USES[command].changes if command in USES else {}).items():
        assert old in command, f"the table of uses no longer fits: {command}"
        command = command.replace(old, new)
    return command


def is_name_only(command: str) -> bool:
    """Whether the text speaks of a command, and not of a call: `coop data check`."""
    return len(command.split()) == (3 if command.startswith("coop data") else 2)


def test_the_table_has_no_command_that_is_gone() -> None:
    assert set(USES) <= set(ALL), set(USES) - set(ALL)
    assert len(ALL) > 50


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "results").mkdir()
    return tmp_path


@pytest.mark.parametrize("command", ALL)
def test_a_command_is_understood(command: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its words are parsed and, of a run, composed and typed; nothing is read or computed."""
    words = shlex.split(changed(command).replace("*", "x").replace("~", "/home/user"))
    if words[0] == "python":
        spec = find_spec(words[2])
        assert spec and spec.origin
        place = Path(spec.origin)
        source = "".join(
            p.read_text() for p in (place.parent.glob("*.py") if spec.submodule_search_locations else [place])
        )
        assert all(f'"{word}"' in source for word in words if word.startswith("-") and word != "-m")
    elif words[1] == "run" and "--help-keys" not in words and not is_name_only(command):
        assert main(["run", "--cfg", *words[2:]]) == 0, capsys.readouterr().err
        assert "dataset:" in capsys.readouterr().out
    elif is_name_only(command):
        with pytest.raises(SystemExit) as ended:
            main([*words[1:], "--help"])
        assert ended.value.code == 0
    else:
        args = _parsed(_parser(), words[1:])
        assert words[1] != "data" or words[2] == "list" or _dataset_spec(args)


def test_a_key_that_is_spoken_of_is_one() -> None:
    """`KEY=VALUE` and `KEY=A|B` in a line of text; `jobs` is a launcher's, `key` a placeholder."""
    keys = {
        word.partition("=")[0]
        for text in TEXTS.values()
        for code in inline(text)
        if not START.fullmatch(code)
        for word in code.split()
        if re.fullmatch(r"[a-z][a-z_.]*=[^=(]+", word)
    }
    assert len(keys) > 40
    check_keys(sorted(keys - {"jobs", "key"}))


@pytest.mark.slow
def test_sizes_of_studies_are_those_of_the_table() -> None:
    """experiments/README.md: each study's number of runs."""
    rows = re.findall(r"^\| `(\w+)` \|[^|]*\| ([\d,]+) \|", TEXTS["experiments/README.md"], flags=re.MULTILINE)
    assert {name for name, _ in rows} == set(study_names())
    for name, runs in rows:
        assert int(runs.replace(",", "")) == len({run.key for run in planned_runs(load_study(name), [])}), name


def write_images(folder: Path, count: int, names: dict[str, tuple[int, int, int]]) -> None:
    random = np.random.default_rng(0)
    for name, colour in names.items():
        (folder / name).mkdir(parents=True)
        for i in range(count):
            pixels = np.clip(np.array(colour) + random.integers(-40, 40, (20, 24, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{i}.jpg")


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if find_spec(TRUNK_PACKAGE) is None:
        pytest.skip("the image tower of lit_lite is not installed (the extra `demo`)")
    return tmp_path_factory.mktemp("cache")


def user_folder(folder: Path) -> Path:
    """Make what the documentation's commands speak of: images in folders and by a CSV, datasets, a checkpoint."""
    make_place(folder)
    colours = list(COLOURS.values())
    write_images(folder / "birds", 8, dict(zip(("001.Barn_owl", "002.Tawny_owl", "003.Jay"), colours, strict=True)))
    (folder / "images").rename(folder / "small")
    write_images(folder / "images", 8, dict(zip(("owl", "jay"), colours, strict=False)))
    listed = [f"{name}/{i}.jpg,{name}" for name in ("owl", "jay") for i in range(8)]
    (folder / "birds.csv").write_text("\n".join(["path,label", *listed]) + "\n")
    for place, names in {
        "eurosat/2750": ("AnnualCrop", "Forest", "River"),
        "dtd/images": ("banded", "dotted", "woven"),
        "caltech-101/101_ObjectCategories": ("airplanes", "cup", "rhino"),
    }.items():
        write_images(folder / "data" / place, 10, dict(zip(names, colours, strict=True)))
    write_images(folder / "a_folder", 2, {"more": colours[0]})
    write_images(folder, 1, {"one": colours[1]})
    (folder / "one/0.jpg").rename(folder / "my.jpg")
    (folder / "prompt_learner").mkdir()
    ctx = torch.randn(16, 224, generator=torch.Generator().manual_seed(0)) / 50
    torch.save({"state_dict": {"ctx": ctx}, "epoch": 50}, folder / "prompt_learner/model.pth.tar-50")
    return folder


def shell(command: str, place: Path, cache: Path) -> str:
    """Run a command as a shell does and return what it printed. Fails, with that, unless it ends with 0."""
    (place / "bin").mkdir(exist_ok=True)
    (place / "bin/coop").write_text(f'#!/bin/sh\nexec {sys.executable} -m coop.cli "$@"\n')
    (place / "bin/coop").chmod(0o755)
    path = f"{place / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    others = {key: value for key, value in os.environ.items() if key not in ("COOP_DATA", "COLUMNS")}
    mine = {
        "OMP_NUM_THREADS": "1",
        "HOME": str(place),
        "COOP_CACHE": str(cache),
        "PYTHONPATH": str(ROOT),
        "PATH": path,
        "HF_HUB_OFFLINE": "1",
    }
    found = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", command],
        cwd=place,
        env=others | mine,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    assert found.returncode == 0, f"{command}\n{found.stdout}"
    assert "Traceback" not in found.stdout
    return found.stdout


def runs(command: str) -> bool:
    """Whether a command is run: all but names, what needs what is not here, and what takes long (experiments)."""
    if is_name_only(command) and command not in ("coop study", "coop table"):
        return False
    return (command.startswith("coop") or command == "python -m experiments.costs") and (
        command not in USES or bool(USES[command].changes)
    )


@pytest.mark.slow
@pytest.mark.parametrize("page", sorted({PAGE_OF[command] for command in ALL if runs(command)}))
def test_the_commands_of_a_page_run(page: str, tmp_path: Path, cache: Path) -> None:
    """One after the other, as someone would who reads it from top to bottom; what another page has, there."""
    place = user_folder(tmp_path)
    if page != "README.md" and any(RUN in changed(command) for command in FOUND[page]):
        shell("coop run dataset=folder dataset.root=birds epochs=1", place, cache)
    for command in (one for one in FOUND[page] if PAGE_OF[one] == page and runs(one)):
        assert shell(changed(command), place, cache)
    if page == "README.md":
        assert (place / "answers.csv").read_text().startswith("image,rank,class,probability,error\n")
        assert (place / "table.tex").read_text().startswith("\\begin{tabular}")


@pytest.mark.slow
def test_the_python_of_a_page_runs(tmp_path: Path, cache: Path) -> None:
    place = user_folder(tmp_path)
    snippets = [code for text in TEXTS.values() for code in fenced(text, "python")]
    assert snippets
    for code in snippets:
        ast.parse(code)
        assert "[[('" in shell(f"python -c {shlex.quote(code)}", place, cache)


@pytest.mark.slow
def test_the_demo_is_the_readme_s(tmp_path: Path, cache: Path) -> None:
    """The table that it ends with and, by the command beside it, the first words, to the last digit."""
    table, words = (block for block in fenced(TEXTS["README.md"], "") if "zero_shot" in block or "vector" in block)
    printed = shell("coop demo", tmp_path, cache)
    assert table in printed, printed
    command, *lines = words.splitlines()
    assert shell(command.removeprefix("$ "), tmp_path, cache).startswith("\n".join(lines[:3]))
    assert (tmp_path / "demo/report/index.html").is_file()


def test_the_demo_s_run_is_named_as_in_the_readme() -> None:
    (run,) = planned_runs(load_study("demo"), ["method=coop", "shots=16", "seed=1"])
    name = str(run.key.folder(Path("demo"))).rpartition("-")[0]  # before a digest that the images are part of
    assert f"coop words {name}-" in TEXTS["README.md"]
