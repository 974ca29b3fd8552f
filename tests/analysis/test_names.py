"""The type of module and the depth, from names."""

from __future__ import annotations

import pytest

from freemerge.analysis.names import depth, module_type


@pytest.mark.parametrize(
    ("name", "kind", "layer"),
    [
        ("model.layers.3.self_attn.q_proj.weight", "model.layers.*.self_attn.q_proj.weight", 3),
        ("visual.transformer.resblocks.11.mlp.c_fc.bias", "visual.transformer.resblocks.*.mlp.c_fc.bias", 11),
        ("layers.3.experts.07.w1", "layers.*.experts.*.w1", 3),
        ("0.weight", "*.weight", 0),
        ("embed", "embed", None),
        ("conv2d.weight1", "conv2d.weight1", None),
        ("7", "*", 7),
        ("", "", None),
        ("a..2.", "a..*.", 2),
    ],
)
def test_numbers_between_dots_are_layers(name: str, kind: str, layer: int | None) -> None:
    assert (module_type(name), depth(name)) == (kind, layer)
