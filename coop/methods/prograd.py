"""ProGrad: CoOp whose steps never go against zero-shot CLIP (Zhu et al., ICCV 2023)."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from coop.errors import CoopError
from coop.methods.coop import CoOpOptions
from coop.methods.guided import GuidedCoOp
from coop.methods.zero_shot import scaled_cosine


@dataclass(frozen=True)
class ProGradOptions(CoOpOptions):
    """`prograd_lambda` is how much of the conflict is taken out; `temperature` softens both predictions."""

    ctx_init: str | None = "a photo of a"
    prograd_lambda: float = 1.0
    temperature: float = 1.0
    template: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.prograd_lambda >= 0:
            raise CoopError(f"prograd_lambda={self.prograd_lambda}: give 0 or more")
        if not self.temperature > 0:
            raise CoopError(f"temperature={self.temperature}: give a number above 0")


class ProGrad(GuidedCoOp):
    """CoOp along G = G_d - lambda min(G_d . G_g, 0) G_g / |G_g|^2.

    G_d is the gradient of the cross-entropy; G_g, the general direction, that of T^2 KL(p_zs || p), with p_zs the
    zero-shot prediction and both at temperature T. One dot product is taken over the whole context.
    Departure from the released code: there the initial words fill the last of 16 slots, the others being zero; here
    `ctx_init` alone is the context (`ctx_init=null` gives CoOp's random vectors).
    """

    name = "prograd"
    Options = ProGradOptions

    def loss(self, features: Float[Tensor, "b e"], labels: Int[Tensor, " b"]) -> Float[Tensor, ""]:
        """Return a loss whose value is the cross-entropy and whose gradient is G."""
        ctx, t = self.learner.ctx, self.options.temperature
        logits = scaled_cosine(self.backbone, features, self.learner.class_features())
        teacher = (scaled_cosine(self.backbone, features, self.hand_written) / t).log_softmax(dim=1)
        cross_entropy = F.cross_entropy(logits, labels.to(logits.device))
        general = t * t * F.kl_div((logits / t).log_softmax(dim=1), teacher, reduction="batchmean", log_target=True)
        (g_d,) = torch.autograd.grad(cross_entropy, ctx, retain_graph=True)
        (g_g,) = torch.autograd.grad(general, ctx)
        step = projected(g_d, g_g, self.options.prograd_lambda)
        along = (ctx * step).sum()
        return cross_entropy.detach() + along - along.detach()


def projected(g_d: Float[Tensor, "*k"], g_g: Float[Tensor, "*k"], strength: float) -> Float[Tensor, "*k"]:
    """Return `g_d` without (`strength` times) its part along -`g_g`, if it has one."""
    dot = (g_d * g_g).sum()
    return torch.where(dot < 0, g_d - strength * dot / (g_g * g_g).sum() * g_g, g_d)
