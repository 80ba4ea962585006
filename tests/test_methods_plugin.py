"""Methods of other packages, through the entry points of packages that lie on the path as pip installs them."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from coop import options
from coop.clip.backbone import Backbone
from coop.config import method_options
from coop.errors import CoopError
from coop.learned import Learned, load_method
from coop.methods import METHODS
from coop.options import OPTIONS
from tests.methods_plain import CLASSES, NAMES, hand_written, sample

EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "new_method.py"
Install = Callable[[str, str], None]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """Return a function that installs the example's package, with one entry point."""

    def install(name: str, place: str) -> None:
        about = tmp_path / "new_method-1.0.dist-info"
        about.mkdir()
        (about / "METADATA").write_text("Metadata-Version: 2.1\nName: new-method\nVersion: 1.0\n")
        (about / "entry_points.txt").write_text(f"[coop.methods]\n{name} = {place}\n")
        (tmp_path / "new_method.py").write_text(EXAMPLE.read_text())
        monkeypatch.syspath_prepend(tmp_path)
        options.plugins.cache_clear()

    yield install
    options.plugins.cache_clear()


def test_the_example_is_a_method_like_any_other(tiny_backbone: Backbone, install: Install, tmp_path: Path) -> None:
    assert "class_means" not in METHODS
    built_in = set(METHODS)
    install("class_means", "new_method:ClassMeans")
    assert set(METHODS) - built_in == set(OPTIONS) - built_in == {"class_means"} and len(METHODS) == len(built_in) + 1
    kind = METHODS["class_means"]
    assert OPTIONS["class_means"] is kind.Options
    chosen = method_options(kind.Options, {"share": 0.25, "n_ctx": 4})
    method = kind(tiny_backbone, CLASSES, chosen)
    data = sample(tiny_backbone, shots=3)
    method.fit(data, data)
    f = F.normalize(data.test_view, dim=1)
    means = torch.stack([f[data.labels == c].mean(dim=0) for c in range(len(NAMES))])
    w = 0.25 * hand_written(tiny_backbone) + 0.75 * means
    expected = tiny_backbone.logit_scale * f @ (w / w.norm(dim=1, keepdim=True)).T
    torch.testing.assert_close(method.logits(data.test_view), expected, rtol=1e-4, atol=1e-4)
    Learned.of(method).save(tmp_path / "learned.safetensors")
    again = load_method(tmp_path / "learned.safetensors", backbone=tiny_backbone)
    assert torch.equal(again.logits(data.test_view), method.logits(data.test_view))
    with pytest.raises(CoopError, match="share=2"):
        method_options(kind.Options, {"share": 2.0})
    assert len(EXAMPLE.read_text().splitlines()) <= 60


@pytest.mark.parametrize("name, place", [
    ("class_means", "new_method:NoSuchClass"), ("class_means", "no_such_module:ClassMeans"),
    ("other_name", "new_method:ClassMeans"), ("class_means", "new_method:ClassMeansOptions"),
])  # fmt: skip
def test_what_is_no_method_is_refused_by_name(install: Install, name: str, place: str) -> None:
    install(name, place)
    assert name in OPTIONS
    for registry in (METHODS, OPTIONS):
        with pytest.raises(CoopError, match=f"method={name}.*{place}"):
            registry[name]  # type: ignore[index]


def test_a_built_in_name_stays_built_in(install: Install) -> None:
    install("coop", "new_method:ClassMeans")
    assert METHODS["coop"].__name__ == "CoOp" and list(METHODS).count("coop") == 1
    with pytest.raises(KeyError):
        METHODS["no_such_method"]
