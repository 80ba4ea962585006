"""GDA against scikit-learn's discriminant analysis with the same shrinkage, and against its equations in numpy."""

import numpy as np
import pytest
import torch
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

from coop.clip.backbone import Backbone
from coop.errors import CoopError
from coop.features import Samples
from coop.methods.base import Classes
from coop.methods.gaussian import ALPHAS, Gda, GdaOptions
from tests.methods_plain import CLASSES, hand_written, sample

D = 32


def unit(x: torch.Tensor) -> np.ndarray:
    return (x / x.norm(dim=-1, keepdim=True)).double().numpy()


@pytest.mark.parametrize(("shots", "views"), [(3, 4), (2, 0), (20, 3)])
def test_weights_are_those_of_scikit_learn(tiny_backbone: Backbone, shots: int, views: int) -> None:
    """P = inv((n - 1) / d S + tr(S) / d I) is k times the inverse of (1 - s) S' + s tr(S') / d I."""
    data = sample(tiny_backbone, shots, views, spread=2.0)
    method = Gda(tiny_backbone, CLASSES, GdaOptions(alpha=2.0))
    method.fit(data, data)
    x = unit(data.views.flatten(0, 1) if views else data.test_view)
    y = data.labels.repeat(max(views, 1)).numpy()
    n = len(x)
    strength = (n - 1) / D + 1
    theirs = LinearDiscriminantAnalysis("lsqr", shrinkage=1 / strength).fit(x, y)
    k = strength * n / (n - 1)  # scikit-learn divides the covariance by n
    np.testing.assert_allclose(method.weight.numpy(), theirs.coef_ / k, rtol=1e-3, atol=1e-4)
    bias = (theirs.intercept_ - np.log(1 / 5)) / k + np.log(1 / 5)
    np.testing.assert_allclose(method.bias.numpy(), bias, rtol=1e-3, atol=1e-4)
    test = sample(tiny_backbone, shots=5, seed=9).test_view
    ours = method.logits(test).numpy() - tiny_backbone.logit_scale * unit(test) @ hand_written(tiny_backbone).numpy().T
    centred = (theirs.decision_function(unit(test)) - np.log(1 / 5)) / k + np.log(1 / 5)
    np.testing.assert_allclose(ours, 2 * centred, rtol=1e-3, atol=1e-3)


def test_alpha_is_the_first_best_of_its_grid(tiny_backbone: Backbone) -> None:
    train, val = sample(tiny_backbone, 2, 3, spread=3.0), sample(tiny_backbone, 30, seed=4, spread=3.0)
    method = Gda(tiny_backbone, CLASSES, GdaOptions())
    notes = method.fit(train, val)
    found = []
    for alpha in ALPHAS:
        fixed = Gda(tiny_backbone, CLASSES, GdaOptions(alpha=alpha))
        fixed.fit(train, val)
        found.append(float((fixed.logits(val.test_view).argmax(dim=1) == val.labels).double().mean()))
    assert len(set(found)) > 1
    assert notes["val_accuracies"] == pytest.approx(found)
    assert notes["alpha"] == ALPHAS[int(np.argmax(found))]
    assert not GdaOptions(alpha=1.0).uses_validation and GdaOptions().uses_validation


def test_new_classes_follow_the_equations(tiny_backbone: Backbone) -> None:
    data = sample(tiny_backbone, shots=4, views=5, spread=2.0)
    method = Gda(tiny_backbone, CLASSES, GdaOptions(covariance="per_class", alpha=0.3))
    method.fit(data, data)
    x, y = unit(data.views.flatten(0, 1)), data.labels.repeat(5).numpy()
    inverse = np.linalg.pinv(np.mean([np.cov(x[y == c].T) for c in range(5)], axis=0))
    means = np.stack([x[y == c].mean(axis=0) for c in range(5)])
    np.testing.assert_allclose(method.weight.numpy(), means @ inverse, rtol=1e-2, atol=0.1)

    names = ("river", "sea")
    new = method.for_classes(Classes(names))
    texts = hand_written(tiny_backbone, names=names).double().numpy()
    inverses, centres = [], []
    for u in texts:
        near = x[np.argsort(-(x @ u))[:64]]
        z = near - u
        covariance = z.T @ z / 63
        inverses.append(D * np.linalg.inv(63 * covariance + np.trace(covariance) * np.eye(D)))
        centres.append((near.sum(axis=0) + 16 * u) / 80)
    w = np.stack(centres) @ np.mean(inverses, axis=0)
    b = np.log(1 / 2) - (np.stack(centres) * w).sum(axis=1) / 2
    f = unit(data.test_view)
    expected = tiny_backbone.logit_scale * f @ texts.T + 0.3 * (f @ w.T + b)
    np.testing.assert_allclose(new.logits(data.test_view).numpy(), expected, rtol=1e-3, atol=1e-3)


def test_few_features_and_missing_classes(tiny_backbone: Backbone) -> None:
    whole = sample(tiny_backbone, shots=2, views=2)
    kept = whole.labels != 2
    data = Samples(whole.labels[kept], whole.test_view[kept], whole.views[:, kept])
    method = Gda(tiny_backbone, CLASSES, GdaOptions(alpha=1.0))
    method.fit(data, data)
    assert method.weight[2].abs().max() == 0
    assert method.logits(whole.test_view).isfinite().all()
    assert method.for_classes(Classes(("river", "abbey"))).logits(whole.test_view).isfinite().all()


@pytest.mark.parametrize("covariance", ["pooled", "per_class"])
def test_saves_loads_and_moves(tiny_backbone: Backbone, covariance: str) -> None:
    data = sample(tiny_backbone, shots=2, views=2)
    method, again = (Gda(tiny_backbone, CLASSES, GdaOptions(covariance=covariance)) for _ in range(2))
    new = Classes(("river", "abbey"))
    text = hand_written(tiny_backbone, names=new.names)
    zero_shot = tiny_backbone.logit_scale * torch.nn.functional.normalize(data.test_view, dim=1) @ text.T
    torch.testing.assert_close(method.for_classes(new).logits(data.test_view), zero_shot, rtol=1e-4, atol=1e-4)
    method.fit(data, data)
    again.load_state(method.state())
    for classes in (new, Classes(("abbey", "forest")), CLASSES):
        ours, theirs = (m.for_classes(classes).logits(data.test_view) for m in (method, again))
        assert torch.equal(ours, theirs)
    assert torch.equal(ours, method.logits(data.test_view))
    with pytest.raises(CoopError, match="expected tensors"):
        again.load_state({**method.state(), "features": torch.zeros(3, D + 1)})


def test_refusals(tiny_backbone: Backbone) -> None:
    none = sample(tiny_backbone, shots=0)
    with pytest.raises(CoopError, match="there are none: give alpha"):
        Gda(tiny_backbone, CLASSES, GdaOptions()).fit(sample(tiny_backbone, shots=1), none)
    with pytest.raises(CoopError, match="per_class"):
        GdaOptions(covariance="per_clas")
    with pytest.raises(CoopError, match="alpha=-1"):
        GdaOptions(alpha=-1.0)
    with pytest.raises(CoopError, match="two views"):
        single = sample(tiny_backbone, shots=1)
        Gda(tiny_backbone, CLASSES, GdaOptions(alpha=1.0, covariance="per_class")).fit(single, single)
