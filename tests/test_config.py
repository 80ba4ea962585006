"""From words to a run's configuration: what is understood as it was written, and what is refused."""

from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from coop.config import GROUPS, key_help, run_config
from coop.errors import CoopError
from coop.methods import METHODS
from coop.options import OPTIONS
from coop.runs.grid import single, sweep, word

ROOT = Path(__file__).resolve().parents[1]


def configured(*words: str) -> Any:
    return run_config(single(words))


@pytest.mark.parametrize("method", OPTIONS)
def test_a_method_has_its_defaults(method: str) -> None:
    """But what a method leaves to the shots or the dataset: epochs, steps, the released values of a dataset."""
    config = configured(f"method={method}", "dataset=dtd")
    expected = OPTIONS[method]()
    for of in fields(expected):
        if getattr(expected, of.name) is not None:
            assert getattr(config.options, of.name) == getattr(expected, of.name)
    assert METHODS[method].name == method and METHODS[method].Options is OPTIONS[method]
    assert (config.shots, config.seed) == ((16, 1) if expected.trains else (0, 0))


def test_no_default_stands_twice() -> None:
    """conf/ has the choices of groups and nothing of a run's keys or a method's options."""
    assert {path.name for path in (ROOT / "conf").iterdir()} == {"backbone", "protocol"}
    text = key_help()
    assert all(f"method={name}\n" in text for name in OPTIONS)
    assert all(f"{group}={default}: one of" in text for group, default in GROUPS.items())


@pytest.mark.slow
def test_every_key_has_a_help_of_its_own() -> None:
    """With the default of each method that has it; what is no key is an error with the closest match."""
    for kind in OPTIONS.values():
        for option in fields(kind):
            assert option.name in key_help([option.name if option.name != "augment" else "augment.views"])
    lines = key_help(["epochs", "seed"]).splitlines()
    assert "method=cocoop: epochs=10" in lines and lines[-1].startswith("seed=1: ") and "50 for 1" in lines[0]
    assert not any(line.startswith("method=zero_shot") for line in lines)
    assert "ratio=0.2" in key_help(["method=clip_adapter"]) and "`root`" in key_help(["dataset.root"])
    for wrong, close in (("epoch", "epochs"), ("method=cop", "coop")):
        with pytest.raises(CoopError, match=close):
            key_help([wrong])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a photo of a {}, a type of bird.", "a photo of a {}, a type of bird."),
        ("'a photo of a {}, a type of bird.'", "a photo of a {}, a type of bird."),
        ('"the \\"{}\\", drawn"', 'the "{}", drawn'),
        ("{} texture.", "{} texture."),
        ("{}", "{}"),
        ("it's a {}", "it's a {}"),
    ],
)
@pytest.mark.parametrize("key", ["template", "dataset.template"])
def test_a_template_is_understood_as_the_shell_passes_it(key: str, text: str, expected: str) -> None:
    words = ["method=zero_shot", f"{key}={text}"]
    (swept,), _ = sweep([*words, "dataset=dtd,dtd"])
    for values in (single(words), swept):
        config = run_config(values)
        assert (config.options.template if key == "template" else config.dataset.template) == expected
    assert configured("method=zero_shot", word(key, expected)) == run_config(single(words))


def test_templates_can_be_swept() -> None:
    for text in ("template={},imagenet7,null", "template='{}',imagenet7,null", 'template="{}","imagenet7",null'):
        jobs, _ = sweep(["method=zero_shot", text])
        assert [job["template"] for job in jobs] == ["{}", "imagenet7", None]


def test_values_keep_their_kind() -> None:
    jobs, unused = sweep(["shots=1,all", "seed=range(1,3)", "lr=1e-3", "class_specific=true", "backbone=glob(rn50*)"])
    assert unused == "" and len(jobs) == 2 * 2 * 3
    configs = [run_config(job) for job in jobs]
    assert {(c.shots, c.seed, c.options.lr, c.options.class_specific) for c in configs} == {
        (shots, seed, 0.001, True) for shots in (1, "all") for seed in (1, 2)
    }
    assert {config.backbone.name for config in configs} == {"rn50", "rn50x4", "rn50x16"}
    assert configured("results=out/${shots}-${method}", "shots=4").results == Path("out/4-coop")
    assert configured("dataset.root=/data (old)/x").dataset.root == "/data (old)/x"
    assert configured("augment.views=2", "augment.scale=0.5").options.augment.scale == 0.5


def test_a_key_that_a_method_lacks_is_told_in_a_sweep() -> None:
    """Where it applies to one method at least; and what differs in such keys alone is one run."""
    jobs, unused = sweep(["method=zero_shot,coop,linear_probe", "shots=1,2", "lr=0.1", "momentum=0.8", "n_ctx=2,4"])
    assert [job["method"] for job in jobs] == ["zero_shot"] + ["coop"] * 4 + ["linear_probe"] * 2
    assert unused == ("shots does not apply to zero_shot; lr, momentum, n_ctx do not apply to zero_shot, linear_probe")
    jobs, unused = sweep(["method=coop,kgcoop", "n_ctx=2,4"])
    assert [(job["method"], job.get("n_ctx")) for job in jobs] == [("coop", 2), ("coop", 4), ("kgcoop", None)]
    assert run_config({"method": "kgcoop", "ctx_init": None, "n_ctx": 16}).options.n_ctx == 16
    jobs, _ = sweep(["method=coop,tip_adapter", "validation=none,full"])
    assert [(job["method"], job.get("validation")) for job in jobs] == [
        ("coop", None),
        ("tip_adapter", "none"),
        ("tip_adapter", "full"),
    ]
    for words in (["method=zero_shot,linear_probe", "lr=1"], ["method=zero_shot", "shots=1,2"]):
        with pytest.raises(CoopError, match="coop"):  # names the methods that have it
            sweep(words)


LONG = "n" * 300


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ("shot=4", "shots"),
        ("dataset=foldr", "'folder'"),
        ("method=taskrs", "taskres"),
        ("backbone=lit_lit", "'lit_lite'"),
        ("protocol=base_to_knew", "base_to_new"),
        ("+shots=4", "shots=VALUE"),
        ("+bakbone=lit_lite", "backbone"),
        ("~dataset", "dataset=VALUE"),
        ("~results", "results=VALUE"),
        ("optimizer=adam", "optimizer"),
        ("hydra.run.dir=x", "results=FOLDER"),
        ("hydra.searchpath=[x]", "results=FOLDER"),
        ("dataset@x=dtd", "dataset"),
        ("dataset.templte=x", "template"),
        ("augment.view=3", "augment.view"),
        ("augment=3", "Augment"),
        ("lr=abc", "lr=abc: give a number"),
        ("lr=", "lr=: give a number"),
        ("n_ctx=1.5", "n_ctx=1.5: give a whole number"),
        ("device=[]", "device=[]: give a text"),
        ("class_specific=x", "class_specific=x: give true or false"),
        ("dataset.split_seed=a", "split_seed=a: give a whole number"),
        ("dataset.name.x=1", "is wrong"),
        ("dataset.name=a dataset.name.x=1", "dataset.name.x=1"),
        ("shots=0", "shots=0"),
        ("shots=true", "shots"),
        ("shots=1.5", "shots"),
        ("shots=1,2", "-m"),
        ("seed=-1", "seed=-1"),
        ("seed=99999999999999999999", "2**63"),
        ("method=-inf", "-inf"),
        ("dataset=1", "dataset"),
        ("dataset=null", "dataset"),
        ("protocol=null", "protocol"),
        ("backbone=null", "backbone"),
        ("protocol.name=1", "base_to_new"),
        ("protocol.name=[{}]", "base_to_new"),
        ("protocol.targets=5", "[dtd,eurosat]"),
        ("protocol=base_to_new protocol.targets=[dtd]", "base_to_new"),
        ("protocol=cross_dataset protocol.targets=[]", "protocol.targets"),
        ("protocol=cross_dataset protocol.targets=[/no/such/folder]", "/no/such/folder"),
        ("protocol=cross_dataset protocol.targets=[dtd,dtd]", "dtd"),
        ("protocol=cross_dataset protocol.targets=[conf,./conf]", "./conf"),
        ("protocol=cross_dataset protocol.targets=[./conf,conf/]", "twice"),
        ("protocol=cross_dataset protocol.targets=[folder]", "./folder"),
        ("device=meta", "cuda"),
        ("precision=fp8", "fp16"),
        ("validation=full", "tip_adapter"),
        ("method=tip_adapter validation=ful", "full"),
        ("results=null", "results=null"),
        ("results=", "results"),
        ("results=${nothing}", "nothing"),
        ("results=${", "${"),
        ("shots=${oc.env:", "${"),
        ("cache=~nosuchuser/x", "~nosuchuser/x"),
        ("dataset.name=..", "dataset.name"),
        ("backbone.name=..", "backbone.name"),
        (f"dataset.name={LONG}", "dataset.name"),
        (f"backbone.name={LONG}", "backbone.name"),
        ("dataset.rename=[", "dataset.rename"),
        ("method=zero_shot lr=5", "tip_adapter_f"),
        ("method=zero_shot shots=4", "does not train"),
        ("method=kgcoop n_ctx=16", "ctx_init=null"),
        ("n_ctx=4 ctx_init=hello", "ctx_init=null"),
        ("backbone=custom", "backbone.architecture"),
        ("workers=-1", "workers"),
        ("workers=9999999", "at most 1024"),
    ],
)
def test_a_mistake_is_one_sentence(words: str, named: str) -> None:
    with pytest.raises(CoopError) as caught:
        configured(*words.split(" "))
    text = str(caught.value)
    assert named in text and "\n" not in text and len(text) < 1500


def test_a_missing_home_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COOP_CACHE", "~nosuchuser/x")
    with pytest.raises(CoopError, match="COOP_CACHE=~nosuchuser/x"):
        configured()
    monkeypatch.delenv("COOP_CACHE")
    monkeypatch.delenv("HOME")
    monkeypatch.setattr("os.getuid", lambda: 2**31 - 7)  # a user without an entry
    with pytest.raises(CoopError, match="COOP_CACHE"):
        configured()


def test_own_folders_are_targets_with_names_of_their_own(tmp_path: Path) -> None:
    for name in ("a/birds", "b/birds", "c/fish"):
        (tmp_path / name / "images").mkdir(parents=True)
    places = ",".join(str(tmp_path / name) for name in ("a/birds", "b/birds", "c/fish"))
    config = configured("protocol=cross_dataset", f"protocol.targets=[{places},dtd]")
    assert [target.name for target in config.protocol.targets] == ["birds", "b-birds", "fish", "dtd"]
    mapped = f"[{{root: {tmp_path}/a/birds, template: 'a bird {{}}'}},{{name: mine, root: {tmp_path}/c/fish}}]"
    config = configured("protocol=cross_dataset", f"protocol.targets={mapped}")
    assert [(t.name, t.template) for t in config.protocol.targets][0] == ("birds", "a bird {}")
    assert config.protocol.targets[1].name == "mine"
    config = configured("dataset=folder", f"dataset.root={tmp_path}/a/birds", f"protocol.targets=[{tmp_path}/b/birds]")
    assert (config.dataset.name, config.protocol.targets[0].name) == ("birds", "b-birds")
