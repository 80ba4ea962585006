"""The methods that can be compared, by name."""

from coop.methods.base import Classes, Method
from coop.methods.clap import Clap
from coop.methods.clip_adapter import ClipAdapter
from coop.methods.cocoop import CoCoOp
from coop.methods.coop import CoOp
from coop.methods.kgcoop import KgCoOp
from coop.methods.linear_probe import LinearProbe
from coop.methods.prograd import ProGrad
from coop.methods.prompt_ensemble import PromptEnsemble
from coop.methods.tip_adapter import TipAdapter
from coop.methods.tip_adapter_f import TipAdapterF
from coop.methods.tip_adapter_test_selected import TipAdapterFTestSelected, TipAdapterTestSelected
from coop.methods.zero_shot import ZeroShot

METHODS: dict[str, type[Method]] = {
    method.name: method
    for method in (
        ZeroShot,
        LinearProbe,
        Clap,
        CoOp,
        CoCoOp,
        KgCoOp,
        ProGrad,
        PromptEnsemble,
        ClipAdapter,
        TipAdapter,
        TipAdapterF,
        TipAdapterTestSelected,
        TipAdapterFTestSelected,
    )
}

__all__ = ["METHODS", "Classes", "Method"]
