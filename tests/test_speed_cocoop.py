"""The comparison of speeds is between two ways to the same numbers."""

import torch

from coop.clip.backbone import Backbone
from experiments.speed_cocoop import Row, _extrapolated, plain_encoder, report
from tests.methods_plain import NAMES, with_context


def test_the_plain_way_is_the_whole_tower(tiny_backbone: Backbone) -> None:
    contexts = torch.randn(2, 4, tiny_backbone.width, generator=torch.Generator().manual_seed(0))
    plain = plain_encoder(tiny_backbone, tiny_backbone.learned_rows(NAMES, 4, "end", False))
    ours = torch.nn.functional.normalize(plain(contexts), dim=-1)
    theirs = torch.stack([with_context(tiny_backbone, ctx) for ctx in contexts])
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_the_report_names_both_ratios() -> None:
    plain = _extrapolated(Row("plain", 100, 2, 10.0, 2_000, 1_500, 1.0), 1000)
    text = report([plain, Row("shared", 1000, 2, 5.0, 1_000, 1_000, 1.0)])
    assert "1000 classes: 20.0x faster, peak memory 1/20.0, kept for backward 1/15.0" in text
    assert text.count("(extrapolated)") == 1
