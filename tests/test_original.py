"""Checkpoints of the original code: their context is taken, and nothing in them is executed."""

import builtins
import json
import os
import pickle
import random
import subprocess
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from safetensors.torch import load_file

from coop.clip.backbone import Backbone
from coop.errors import CoopError
from coop.learned import load_learned
from coop.methods.base import Classes
from coop.original import import_coop, original_state
from tests.methods_plain import NAMES, with_context
from tests.test_golden import tiny_clip

CTX = torch.randn(3, 32, generator=torch.Generator().manual_seed(0)).half()


class LiveScheduler:
    """Stands for Dassl's: pickled as an object, with a state."""

    def __init__(self) -> None:
        self.last_epoch, self.successor = 4, self.__class__


class Runs:
    """Calls `function(*arguments)` when unpickled."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


def checkpoint(path: Path, state: dict[str, Any], **more: Any) -> Path:
    content = {"state_dict": state, "epoch": 4, "optimizer": {"lr": 0.1}, "val_result": np.float64(0.5), **more}
    torch.save(content, path)
    return path


def original(path: Path, backbone: Backbone, ctx: torch.Tensor = CTX, **more: Any) -> Path:
    prefix = backbone.token_embedding[49406].half().expand(len(NAMES), 1, -1)
    state = {"module.ctx": ctx, "module.token_prefix": prefix, "module.token_suffix": torch.zeros(len(NAMES), 5, 32)}
    return checkpoint(path, state, scheduler={"successor": LiveScheduler()}, **more)


@pytest.mark.assets
def test_the_originals_own_checkpoint(assets: Path, tmp_path: Path) -> None:
    """The context that was recorded as it was learned, and the logits that it gives."""
    golden = assets / "golden"
    path = golden / "original_checkpoint" / "prompt_learner" / "model.pth.tar-4"
    with pytest.raises(pickle.UnpicklingError):
        torch.load(path)
    record = load_file(golden / "end-unified-m4.safetensors")
    tiny = tiny_clip(golden)
    learned_file = import_coop(path, tiny, None, "end")
    torch.testing.assert_close(learned_file.state["ctx"], record["ctx"], rtol=1e-3, atol=1e-4)
    learned_file.save(tmp_path / "learned.safetensors")
    names = tuple(json.loads((golden / "cases.json").read_text())["class_names"])
    method = load_learned(tmp_path).restore(tiny, Classes(names))
    logits = method.logits(tiny.encode_images(record["images"]))
    torch.testing.assert_close(logits, record["logits"].float(), rtol=1e-3, atol=2e-3)


@pytest.mark.assets
def test_a_checkpoint_as_the_original_writes_it(assets: Path) -> None:
    """With the optimiser's momentum buffers in a defaultdict; nothing but its tensors is taken."""
    folder = assets / "golden" / "original_checkpoint_trained"
    state = original_state(folder / "prompt_learner" / "model.pth.tar-50")
    assert torch.equal(state["ctx"], load_file(folder / "ctx.safetensors")["ctx"].float())


def test_the_state_of_an_optimiser(tmp_path: Path) -> None:
    """SGD with momentum and its scheduler as live objects, as the original saves them."""
    ctx = torch.nn.Parameter(CTX.float())
    sgd = torch.optim.SGD([ctx], lr=0.1, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(sgd, 10)
    ctx.sum().backward()
    sgd.step()
    scheduler.step()
    path = checkpoint(tmp_path / "model.pth.tar-1", {"ctx": ctx.data}, scheduler={"successor": scheduler})
    with zipfile.ZipFile(path) as archive:
        (pickled,) = (name for name in archive.namelist() if name.endswith("data.pkl"))
        assert b"defaultdict" in archive.read(pickled)
    assert torch.equal(original_state(path)["ctx"], ctx.data)


def test_tensors_that_are_no_plain_numbers(tiny_backbone: Backbone, tmp_path: Path) -> None:
    for number, ctx in enumerate((CTX.float().to_sparse(), CTX.to(torch.complex64), CTX.to("meta"))):
        with pytest.raises(CoopError, match="the tensor ctx is quantised, sparse"):
            original_state(checkpoint(tmp_path / f"{number}", {"ctx": ctx}))
    path = original(tmp_path / "nan", tiny_backbone, CTX * float("nan"))
    with pytest.raises(CoopError, match="not finite"):
        import_coop(path, tiny_backbone, NAMES, "end")


def test_context_and_names(tiny_backbone: Backbone, tmp_path: Path) -> None:
    path = original(tmp_path / "model.pth.tar-50", tiny_backbone)
    with pytest.raises(pickle.UnpicklingError):
        torch.load(path)
    assert set(original_state(path)) == {"ctx", "token_prefix", "token_suffix"}
    learned_file = import_coop(path, tiny_backbone, NAMES, "end")
    assert torch.equal(learned_file.state["ctx"], CTX.float())
    method: Any = learned_file.restore(tiny_backbone)
    torch.testing.assert_close(method.class_features(), with_context(tiny_backbone, CTX.float()), rtol=1e-4, atol=1e-5)
    with pytest.raises(CoopError, match="does not say which classes it is for"):
        import_coop(path, tiny_backbone, None, "end").restore(tiny_backbone)


def test_class_specific_contexts_need_their_classes(tiny_backbone: Backbone, tmp_path: Path) -> None:
    path = original(tmp_path / "model.pth.tar-50", tiny_backbone, CTX.expand(len(NAMES), -1, -1).clone())
    learned_file = import_coop(path, tiny_backbone, NAMES, "middle")
    assert learned_file.options["class_specific"] and learned_file.options["ctx_position"] == "middle"
    for names in (None, NAMES[:2]):
        with pytest.raises(CoopError, match=f"is for 5 classes, {len(names or ())} class names were given"):
            import_coop(path, tiny_backbone, names, "middle")


def test_a_context_longer_than_the_text_tower_reads(tiny_backbone: Backbone, tmp_path: Path) -> None:
    path = original(tmp_path / "model.pth.tar-50", tiny_backbone, torch.zeros(80, 32))
    for names in (None, NAMES):
        with pytest.raises(CoopError, match="does not fit the text tower"):
            import_coop(path, tiny_backbone, names, "end")


def test_another_backbone_is_told(tiny_backbone: Backbone, tmp_path: Path) -> None:
    path = original(tmp_path / "model.pth.tar-50", tiny_backbone)
    vision = {"width": 32, "head_width": 16, "layers": 1, "image_size": 16, "patch_size": 8}
    for width, said in (
        (32, "token embeddings in .* are not those of custom with pretrained=None: name the backbone"),
        (64, "is 32 wide, but the text tower of custom 64: name the backbone"),
    ):
        other = open_clip.CLIP(16, vision, {"width": width, "layers": 1})
        with pytest.raises(CoopError, match=said):
            import_coop(path, Backbone(other, lambda image: image, tiny_backbone.tokenizer), NAMES, "end")
    with pytest.raises(CoopError, match="unknown ctx_position 'ent': did you mean 'end'"):
        import_coop(path, tiny_backbone, NAMES, "ent")


@pytest.mark.parametrize("function", [os.system, subprocess.call, builtins.eval, builtins.exec, os.mkdir])
@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("protocol", [2, 4])
def test_nothing_in_the_file_is_executed(
    function: Callable[..., Any], inside: bool, protocol: int, tiny_backbone: Backbone, tmp_path: Path
) -> None:
    marker = tmp_path / "marker"
    commands = {os.system: f"touch {marker}", subprocess.call: ["touch", str(marker)], os.mkdir: str(marker)}
    evil = Runs(function, commands.get(function, f"__import__('os').mkdir({str(marker)!r})"))
    content = {"state_dict": {"ctx": CTX, **({"evil": evil} if inside else {})}, "scheduler": evil}
    torch.save(content, tmp_path / "evil", pickle_protocol=protocol)
    try:
        state = original_state(tmp_path / "evil")
        assert not inside and torch.equal(state["ctx"], CTX.float())  # the object beside it was left out
    except CoopError as error:
        assert "\n" not in str(error) and "weights_only" not in str(error)
    assert not marker.exists()
    torch.load(tmp_path / "evil", weights_only=False)  # the file would have done it
    assert marker.exists()


@pytest.mark.parametrize("content", [
    {"epoch": 3}, [1, 2], {"state_dict": 3}, {"state_dict": {"ctx": "words"}}, torch.zeros(2), {"state_dict": None},
])  # fmt: skip
def test_a_checkpoint_of_something_else(content: Any, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "other")
    with pytest.raises(CoopError, match="has no state_dict of tensors: it is not a checkpoint of the original code"):
        original_state(tmp_path / "other")


@pytest.mark.parametrize("state", [{}, {"meta_net.bias": torch.zeros(3)}, {"ctx": torch.zeros(32)}])
def test_a_checkpoint_without_a_context(state: Any, tiny_backbone: Backbone, tmp_path: Path) -> None:
    with pytest.raises(CoopError, match="holds no context `ctx`"):
        import_coop(checkpoint(tmp_path / "other", state), tiny_backbone, NAMES, "end")


def test_files_that_are_no_checkpoint(tiny_backbone: Backbone, tmp_path: Path) -> None:
    """Among them the format before torch 1.6, an archive of something else, and damaged ones."""
    good = original(tmp_path / "good", tiny_backbone).read_bytes()
    (tmp_path / "text").write_text("ctx")
    (tmp_path / "cut").write_bytes(good[: len(good) // 2])
    torch.save({"state_dict": {"ctx": CTX}}, tmp_path / "legacy", _use_new_zipfile_serialization=False)
    with zipfile.ZipFile(tmp_path / "archive", "w") as archive:
        archive.writestr("notes.txt", "nothing")
    for name in ("text", "cut", "legacy", "archive", "missing", "."):
        with pytest.raises(CoopError) as caught:
            original_state(tmp_path / name)
        assert str(tmp_path / name) in str(caught.value) and "\n" not in str(caught.value)


def test_a_damaged_pickle_is_one_sentence(tiny_backbone: Backbone, tmp_path: Path) -> None:
    """Whatever byte of it is wrong: either it still says the same shapes of tensors, or it is refused."""
    path = original(tmp_path / "good", tiny_backbone)
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    (name,) = (name for name in members if name.endswith("data.pkl"))
    dice, refused = random.Random(0), 0
    for _ in range(150):
        data = bytearray(members[name])
        data[dice.randrange(len(data))] = dice.randrange(256)
        with zipfile.ZipFile(tmp_path / "damaged", "w") as archive:
            for member, content in members.items():
                archive.writestr(member, bytes(data) if member == name else content)
        try:
            assert all(isinstance(tensor, torch.Tensor) for tensor in original_state(tmp_path / "damaged").values())
        except CoopError as error:
            refused += 1
            assert "\n" not in str(error)
    assert refused > 20
