"""The methods that can be compared: a registry by name that imports a method's module when it is looked up.

Methods of other packages come in by the entry-point group `coop.methods` (see examples/new_method.py).
"""

from collections.abc import Iterator, Mapping
from importlib import import_module
from typing import TYPE_CHECKING

from coop.options import OPTIONS, plugin

if TYPE_CHECKING:
    from coop.methods.base import Method

_CLASSES = {
    "zero_shot": "coop.methods.zero_shot:ZeroShot",
    "waffle": "coop.methods.zero_shot:Waffle",
    "linear_probe": "coop.methods.linear:LinearProbe",
    "clap": "coop.methods.linear:Clap",
    "taskres": "coop.methods.task_residual:TaskRes",
    "lp_plus_plus": "coop.methods.linear:LpPlusPlus",
    "cross_modal": "coop.methods.linear:CrossModal",
    "gda": "coop.methods.gaussian:Gda",
    "prolip": "coop.methods.projection:ProLip",
    "linear_adapter": "coop.methods.projection:LinearAdapter",
    "coop": "coop.methods.coop:CoOp",
    "cocoop": "coop.methods.cocoop:CoCoOp",
    "kgcoop": "coop.methods.regularised:KgCoOp",
    "prograd": "coop.methods.regularised:ProGrad",
    "prompt_ensemble": "coop.methods.prompt_ensemble:PromptEnsemble",
    "clip_adapter": "coop.methods.clip_adapter:ClipAdapter",
    "tip_adapter": "coop.methods.tip_adapter:TipAdapter",
    "tip_adapter_f": "coop.methods.tip_adapter:TipAdapterF",
    "deep_text": "coop.methods.deep_prompts:DeepText",
    "vpt": "coop.methods.deep_prompts:Vpt",
    "ivlp": "coop.methods.deep_prompts:Ivlp",
    "maple": "coop.methods.deep_prompts:Maple",
    "promptsrc": "coop.methods.promptsrc:PromptSRC",
    "tcp": "coop.methods.tcp:TCP",
    "clip_lora": "coop.methods.lora:ClipLora",
    "two_stage": "coop.methods.layer_norm:TwoStage",
    "mma": "coop.methods.multimodal:MMA",
    "mmrl": "coop.methods.multimodal:MMRL",
    "ape": "coop.methods.tip_adapter:Ape",
    "ape_t": "coop.methods.tip_adapter:ApeT",
}


class _Methods(Mapping[str, "type[Method]"]):
    """Method classes by name, imported (with torch) when looked up."""

    def __getitem__(self, name: str) -> "type[Method]":
        if name not in _CLASSES:
            return plugin(name)
        module, _, attribute = _CLASSES[name].partition(":")
        method: type[Method] = getattr(import_module(module), attribute)
        return method

    def __contains__(self, name: object) -> bool:
        return name in OPTIONS

    def __iter__(self) -> Iterator[str]:
        return iter(OPTIONS)

    def __len__(self) -> int:
        return len(OPTIONS)


METHODS: Mapping[str, "type[Method]"] = _Methods()

__all__ = ["METHODS"]
