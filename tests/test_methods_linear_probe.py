"""The linear probe against scikit-learn, and its search for C against the released one, spelled out."""

import warnings

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from coop.clip.backbone import Backbone
from coop.errors import CoopError
from coop.features import Samples
from coop.methods.base import Classes
from coop.methods.linear import GRID, LinearProbe, LinearProbeOptions, _Probes, search_c
from tests.methods_plain import CLASSES, sample


def released_search(accuracy) -> float:  # type: ignore[no-untyped-def]
    """lpclip/linear_probe.py: the grid from strong to weak C, then 8 bisections of [C/10, 10 C] in powers of ten."""
    search_list = [1e6, 1e4, 1e2, 1, 1e-2, 1e-4, 1e-6]
    peak = search_list[int(np.argmax([accuracy(c) for c in search_list]))]
    c_left, c_right = 1e-1 * peak, 1e1 * peak
    for _ in range(8):
        if accuracy(c_left) < accuracy(c_right):
            c_final = c_right
            c_left = 10 ** (0.5 * (np.log10(c_right) + np.log10(c_left)))
        else:
            c_final = c_left
            c_right = 10 ** (0.5 * (np.log10(c_right) + np.log10(c_left)))
    return float(c_final)


@pytest.mark.parametrize("seed", range(20))
def test_the_search_is_the_released_one(seed: int) -> None:
    """On accuracies of any shape: coarse steps, so that there are ties."""
    random = np.random.default_rng(seed)
    centre, wave = random.uniform(-6, 6), random.uniform(0, 6)

    def accuracy(power: float) -> float:
        return float(np.round(-abs(power - centre) + np.sin(wave * power), 1 + seed % 2))

    power, best = search_c(accuracy)
    assert power == pytest.approx(np.log10(released_search(lambda c: accuracy(round(np.log10(c), 9)))), abs=1e-6)
    assert best == accuracy(power)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")  # of the plain fits
@pytest.mark.parametrize("val_shots", [4, 40])
def test_picks_the_same_c_as_brute_force(tiny_backbone: Backbone, seed: int, val_shots: int) -> None:
    """Every C fitted from zero, twice where the released code does."""
    train = sample(tiny_backbone, 4, seed=seed, spread=3.0)
    val = sample(tiny_backbone, val_shots, seed=seed + 100, spread=3.0)
    method = LinearProbe(tiny_backbone, CLASSES, LinearProbeOptions())
    notes = method.fit(train, val)
    x, y = train.test_view.numpy(), train.labels.numpy()

    def cold(c: float) -> LogisticRegression:
        return LogisticRegression(C=c, max_iter=1000).fit(x, y)

    seen: list[float] = []

    def accuracy(c: float) -> float:
        seen.append(cold(c).score(val.test_view.numpy(), val.labels.numpy()))
        return seen[-1]

    expected = released_search(accuracy)
    assert len(set(seen)) > 1
    assert notes["C"] == pytest.approx(expected, rel=1e-6)
    assert notes["val_accuracy"] == pytest.approx(accuracy(expected))
    ours = method.logits(val.test_view).softmax(dim=1).numpy()
    np.testing.assert_allclose(ours, cold(expected).predict_proba(val.test_view.numpy()), atol=1e-4)


def test_warm_starts_take_fewer_steps_to_a_probe_as_good(tiny_backbone: Backbone) -> None:
    train, val = sample(tiny_backbone, 8, seed=1, spread=2.0), sample(tiny_backbone, 40, seed=2, spread=2.0)
    x, y = train.test_view.numpy(), train.labels.numpy()
    steps, accuracies = [], []
    for warm in (False, True):
        options = LinearProbeOptions(warm_start=warm)
        probes = _Probes(x, y, options)
        for power in sorted(GRID):
            probes(power)
        steps.append(sum(int(probe.n_iter_[0]) for probe in probes.known.values()))
        accuracies.append(LinearProbe(tiny_backbone, CLASSES, options).fit(train, val)["val_accuracy"])
    assert steps[1] < steps[0]
    assert accuracies[1] == pytest.approx(accuracies[0], abs=0.02)


def test_a_given_c_is_scikit_learns(tiny_backbone: Backbone) -> None:
    data = sample(tiny_backbone, shots=4)
    method = LinearProbe(tiny_backbone, CLASSES, LinearProbeOptions(C=0.3))
    assert method.fit(data, sample(tiny_backbone, shots=0)) == {"C": pytest.approx(0.3)}
    theirs = LogisticRegression(C=method_c(0.3), max_iter=1000).fit(data.test_view.numpy(), data.labels.numpy())
    expected = theirs.decision_function(data.test_view.numpy())
    np.testing.assert_allclose(method.logits(data.test_view).numpy(), expected, rtol=1e-3, atol=1e-3)


def method_c(c: float) -> float:
    """C goes through a power of ten."""
    return float(10.0 ** np.log10(c))


def test_two_classes_and_classes_without_shots(tiny_backbone: Backbone) -> None:
    whole = sample(tiny_backbone, shots=6)
    kept = (whole.labels == 1) | (whole.labels == 3)
    some = Samples(whole.labels[kept], whole.test_view[kept], whole.views[:, kept])
    method = LinearProbe(tiny_backbone, CLASSES, LinearProbeOptions(C=1.0))
    method.fit(some, some)
    ours = method.logits(whole.test_view).softmax(dim=1).numpy()
    theirs = LogisticRegression(C=1.0, max_iter=1000).fit(some.test_view.numpy(), some.labels.numpy())
    np.testing.assert_allclose(ours[:, [1, 3]], theirs.predict_proba(whole.test_view.numpy()), atol=1e-4)
    assert (ours[:, [0, 2, 4]] == 0).all()


def test_the_penalty_path_is_quiet(tiny_backbone: Backbone) -> None:
    data = sample(tiny_backbone, shots=4, spread=3.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        LinearProbe(tiny_backbone, CLASSES, LinearProbeOptions(max_iter=2)).fit(data, data)
    assert sorted(GRID) == [-6, -4, -2, 0, 2, 4, 6]


def test_saves_loads_and_does_not_move(tiny_backbone: Backbone) -> None:
    data = sample(tiny_backbone, shots=2)
    method, again = (LinearProbe(tiny_backbone, CLASSES, LinearProbeOptions()) for _ in range(2))
    method.fit(data, data)
    again.load_state(method.state())
    assert torch.equal(again.logits(data.test_view), method.logits(data.test_view))
    with pytest.raises(CoopError, match="cannot be moved to other classes"):
        method.for_classes(Classes(("river",)))


def test_some_of_its_classes_are_scikit_learns_columns(tiny_backbone: Backbone) -> None:
    """As ImageNet-A has 200 of ImageNet's classes; two of ImageNet's share a name."""
    data = sample(tiny_backbone, shots=4, spread=3.0)
    names = ("missile", "sea", "missile", "abbey", "sun")
    method = LinearProbe(tiny_backbone, Classes(names), LinearProbeOptions(C=1.0))
    method.fit(data, data)
    some = method.for_classes(Classes(("sun", "missile", "sea")))
    x = sample(tiny_backbone, shots=7, seed=5).test_view
    theirs = LogisticRegression(C=1.0, max_iter=1000).fit(data.test_view.numpy(), data.labels.numpy())
    scores = theirs.decision_function(x.numpy())
    expected = np.stack([scores[:, 4], np.maximum(scores[:, 0], scores[:, 2]), scores[:, 1]], axis=1)
    np.testing.assert_allclose(some.logits(x).numpy(), expected, rtol=1e-3, atol=1e-3)


def test_refusals(tiny_backbone: Backbone) -> None:
    with pytest.raises(CoopError, match="C=0"):
        LinearProbeOptions(C=0.0)
    with pytest.raises(CoopError, match="there are none: give C"):
        LinearProbe(tiny_backbone, CLASSES, LinearProbeOptions()).fit(
            sample(tiny_backbone, shots=1), sample(tiny_backbone, shots=0)
        )
    one = Samples(torch.zeros(3, dtype=torch.long), torch.randn(3, 32), torch.zeros(0, 3, 32))
    with pytest.raises(CoopError, match="at least 2 classes"):
        LinearProbe(tiny_backbone, CLASSES, LinearProbeOptions(C=1.0)).fit(one, one)
