"""The original's checkpoints (`prompt_learner/model.pth.tar-<epoch>`), read without executing anything in them.

They hold more than tensors - Dassl's scheduler is in them as a live object - so that `torch.load` refuses them. Every
name in the file that torch does not know is bound to an inert class here; torch's restricted unpickler does the rest.
"""

import dataclasses
import io
import warnings
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from coop.clip.backbone import Backbone
from coop.errors import CoopError
from coop.learned import Learned
from coop.methods.base import Classes
from coop.methods.coop import CoOpOptions


class Inert:
    """Stands for any object of the file: takes everything and does nothing."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __setstate__(self, _: Any) -> None:
        pass


def original_state(path: Path) -> dict[str, Tensor]:
    """Return the checkpoint's state_dict, in float32, without a "module." in front of its names."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise CoopError(f"{path} cannot be read: {error.strerror}") from error
    if not zipfile.is_zipfile(io.BytesIO(data)):
        raise CoopError(f"{path} is not a PyTorch checkpoint (a zip archive, as torch 1.6 and later write it)")
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(io.BytesIO(data))
        with torch.serialization.safe_globals([(Inert, name) for name in names]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of other pickle protocols, which the error below tells
            content = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle can fail in any way
        reason = " ".join(str(error).split())[:200]
        raise CoopError(f"{path} cannot be read as a checkpoint of the original code ({reason})") from error
    state = content.get("state_dict") if isinstance(content, dict) else None
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise CoopError(f"{path} has no state_dict of tensors: it is not a checkpoint of the original code")
    return {str(name).removeprefix("module."): value.float() for name, value in state.items()}


def import_coop(path: Path, backbone: Backbone, class_names: Sequence[str] | None, ctx_position: str) -> Learned:
    """Return the context of an original CoOp checkpoint as an artefact for `backbone`.

    The file does not say where the class name goes (`ctx_position`), for which classes it was learned (`class_names`;
    a unified context may be imported without) and on which backbone: its width and, where the file has it, its
    embedding of SOT must be those of `backbone`.
    """
    state = original_state(path)
    ctx = state.get("ctx")
    if ctx is None or ctx.ndim not in (2, 3):
        raise CoopError(
            f"{path} holds no context `ctx`, only {', '.join(sorted(state)) or 'nothing'}: it is not CoOp's"
        )
    if ctx.shape[-1] != backbone.width:
        raise CoopError(
            f"the context in {path} is {ctx.shape[-1]} wide, but the text tower of {backbone.architecture} "
            f"{backbone.width}: name the backbone that it was learned on"
        )
    _check_tower(path, state, backbone)
    class_specific = ctx.ndim == 3
    names = tuple(class_names or ())
    if class_specific and len(names) != len(ctx):
        raise CoopError(f"the context in {path} is for {len(ctx)} classes, {len(names)} class names were given")
    options = CoOpOptions(n_ctx=ctx.shape[-2], ctx_position=ctx_position, class_specific=class_specific, epochs=0)
    about = (backbone.architecture, backbone.pretrained, backbone.precision, backbone.identity)
    return Learned("coop", dataclasses.asdict(options), Classes(names), 1, *about, {"ctx": ctx.contiguous()})


def _check_tower(path: Path, state: dict[str, Tensor], backbone: Backbone) -> None:
    """Compare the SOT embedding that the file happens to keep (its token_prefix) with the backbone's."""
    prefix = state.get("token_prefix")
    if prefix is None or not backbone.vocabulary.head:
        return
    ours = backbone.token_embedding[backbone.vocabulary.head[0]].float().cpu()
    if not torch.allclose(prefix.reshape(-1, prefix.shape[-1])[0], ours, atol=2e-3):  # the file's may be half precision
        raise CoopError(
            f"the token embeddings in {path} are not those of {backbone.architecture} with pretrained="
            f"{backbone.pretrained}: name the backbone that it was learned on"
        )
