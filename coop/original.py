"""Checkpoints of the original CoOp code (`prompt_learner/model.pth.tar-<epoch>`), read without executing them.

They hold more than tensors: the optimiser's state (a `collections.defaultdict` with momentum buffers) and Dassl's
scheduler, a live object. `torch.load(weights_only=True)` refuses them. Here every name in the file that torch does not
know is bound to an empty stand-in, and torch's restricted unpickler reads the rest.
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
from coop.errors import CoopError, first_line
from coop.io import read_file
from coop.learned import Learned, backbone_fields
from coop.methods.base import Classes
from coop.options import CoOpOptions


class IgnoredObject(list[Any]):
    """A stand-in for any object in the file: accepts arguments, items and a state, and does nothing with them."""

    def __init__(self, *_: Any, **__: Any) -> None:
        super().__init__()

    def __setstate__(self, _: Any) -> None:
        pass


class IgnoredMapping:
    """A stand-in for a dictionary type: an empty dict, whose items the unpickler may set."""

    def __new__(cls, *_: Any, **__: Any) -> Any:
        return {}


MAPPINGS = ("collections.defaultdict",)


def original_state(path: Path) -> dict[str, Tensor]:
    """Return the checkpoint's state_dict, in float32, without a "module." in front of its names.

    Raises CoopError for a file that is not such a checkpoint, and for tensors that are not dense numbers.
    """
    try:
        data = read_file(path)
    except OSError as error:
        raise CoopError(f"{path} cannot be read: {first_line(error)}") from error
    if not zipfile.is_zipfile(io.BytesIO(data)):
        raise CoopError(f"{path} is not a PyTorch checkpoint (a zip archive, as torch 1.6 and later write it)")
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(io.BytesIO(data))
        known: list[Any] = [(IgnoredMapping if name in MAPPINGS else IgnoredObject, name) for name in names]
        with torch.serialization.safe_globals(known), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about other pickle protocols; the error below covers them
            content = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle can fail in any way
        raise CoopError(f"{path} cannot be read as a checkpoint of the original code ({first_line(error)})") from error
    state = content.get("state_dict") if isinstance(content, dict) else None
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise CoopError(f"{path} has no state_dict of tensors: it is not a checkpoint of the original code")
    for name, value in state.items():
        if value.is_quantized or value.layout != torch.strided or value.is_complex() or value.is_meta:
            raise CoopError(
                f"{path}: the tensor {name} is quantised, sparse, complex or without values: save it as plain numbers"
            )
    return {str(name).removeprefix("module."): value.float() for name, value in state.items()}


def import_coop(path: Path, backbone: Backbone, class_names: Sequence[str] | None, ctx_position: str) -> Learned:
    """Return the context of an original CoOp checkpoint as a learned file's content for `backbone`.

    The file does not say where the class name goes (`ctx_position`), for which classes it was learned (`class_names`;
    a unified context may be imported without) and on which backbone: its width and, where the file has it, its
    embedding of SOT must be those of `backbone`.
    """
    state = original_state(path)
    ctx = state.get("ctx")
    if ctx is None or ctx.ndim not in (2, 3):
        raise CoopError(
            f"{path} holds no context `ctx` of 2 or 3 dimensions, only {', '.join(sorted(state)) or 'nothing'}: "
            "it is not CoOp's"
        )
    if not ctx.isfinite().all():
        raise CoopError(f"the context in {path} holds values that are not finite: train it again")
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
    try:
        backbone.learned_rows(names or ("x",), ctx.shape[-2], ctx_position, class_specific)
    except CoopError as error:
        raise CoopError(
            f"the context in {path} does not fit the text tower of {backbone.architecture}: {error}"
        ) from error
    options = CoOpOptions(n_ctx=ctx.shape[-2], ctx_position=ctx_position, class_specific=class_specific, epochs=0)
    return Learned(
        method="coop",
        options=dataclasses.asdict(options),
        classes=Classes(names),
        seed=1,
        **backbone_fields(backbone),
        state={"ctx": ctx.contiguous()},
    )


def _check_tower(path: Path, state: dict[str, Tensor], backbone: Backbone) -> None:
    """Compare the SOT embedding that the file happens to keep (its token_prefix) with the backbone's."""
    prefix = state.get("token_prefix")
    if prefix is None or not backbone.vocabulary.head:
        return
    ours = backbone.token_embedding[backbone.vocabulary.head[0]].float().cpu()
    kept = prefix.reshape(-1, prefix.shape[-1])
    if kept.shape[-1] != len(ours) or not len(kept) or not torch.allclose(kept[0], ours, atol=2e-3):  # may be float16
        raise CoopError(
            f"the token embeddings in {path} are not those of {backbone.architecture} with pretrained="
            f"{backbone.pretrained}: name the backbone that it was learned on"
        )
