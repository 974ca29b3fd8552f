"""Which tensors are filtered, merged or copied, and how views see them."""

from __future__ import annotations

import pytest
import torch

import freemerge as fm
from freemerge.checkpoint import TensorSpec
from freemerge.merging.selection import Rule, Split, Stack
from freemerge.merging.units import Unit, plan_units, without_matrices

SHAPES = {
    "embed.weight": (50, 8),
    "layer.q_proj.weight": (8, 8),
    "layer.k_proj.weight": (4, 8),
    "layer.v_proj.weight": (4, 8),
    "layer.qkv.weight": (24, 8),
    "layer.norm.weight": (8,),
    "layer.experts.weight": (3, 16, 32),
    "conv.weight": (8, 3, 3, 3),
    "conv1d.weight": (32, 32, 3),
    "pos_conv_embed.weight": (64, 16, 32),
    "logit_scale": (),
}
SPECS = {name: TensorSpec(name, shape, torch.float32) for name, shape in SHAPES.items()}
SPECS["position_ids"] = TensorSpec("position_ids", (8,), torch.int64)


def actions(select: list[Rule] | None = None) -> dict[str, str]:
    return {name: unit.action for unit in plan_units(SPECS, select or []) for name in unit.names}


def test_defaults_by_rank_and_dtype() -> None:
    assert actions() == {
        "embed.weight": "filter",
        "layer.q_proj.weight": "filter",
        "layer.k_proj.weight": "filter",
        "layer.v_proj.weight": "filter",
        "layer.qkv.weight": "filter",
        "layer.norm.weight": "merge",
        "layer.experts.weight": "filter",
        "conv.weight": "merge",
        "conv1d.weight": "merge",
        "pos_conv_embed.weight": "merge",
        "logit_scale": "merge",
        "position_ids": "copy",
    }


def test_the_first_matching_rule_wins() -> None:
    chosen = actions([Rule("*.q_proj.*", "copy"), Rule("layer.*", "merge"), Rule("*", "filter")])
    assert chosen["layer.q_proj.weight"] == "copy"
    assert chosen["layer.k_proj.weight"] == chosen["layer.norm.weight"] == "merge"
    assert chosen["embed.weight"] == chosen["conv.weight"] == "filter"
    assert chosen["logit_scale"] == "merge", "a scalar has no spectrum"
    assert chosen["position_ids"] == "copy", "integers cannot be merged"


def test_only_unasked_copies_must_agree() -> None:
    units = {unit.names[0]: unit for unit in plan_units(SPECS, [Rule("embed.*", "copy")])}
    assert units["position_ids"].must_agree
    assert not units["embed.weight"].must_agree
    assert not {u.names[0]: u for u in plan_units(SPECS, [Rule("position_ids", "copy")])}["position_ids"].must_agree


def test_views_group_and_split() -> None:
    stack = Stack(("*.q_proj.weight", "*.k_proj.weight", "*.v_proj.weight"))
    units = plan_units(SPECS, views=[stack, Split("*.qkv.weight", 3)])
    names = ("layer.q_proj.weight", "layer.k_proj.weight", "layer.v_proj.weight")
    assert Unit(names, "filter") in units
    assert Unit(("layer.qkv.weight",), "filter", (8, 8, 8)) in units
    assert sorted(name for unit in units for name in unit.names) == sorted(SPECS), "every tensor exactly once"


@pytest.mark.parametrize(
    ("select", "views", "message"),
    [
        ([Rule("*.bais", "copy")], [], r"select: pattern '\*.bais' matches no tensor"),
        ([Rule("position_ids", "merge")], [], "position_ids has dtype torch.int64"),
        ([], [Split("*.nothing", 2)], "matches no filtered tensor"),
        ([], [Split("*.qkv.weight", 5)], "into 5 equal parts: it has 24 rows"),
        ([], [Split("*.qkv.weight", (8, 8))], "parts .* have 16"),
        ([], [Split("*.experts.weight", 3)], "into 3 equal parts: it has 16 rows"),
        (
            [],
            [Stack(("*.experts.weight", "*.w_proj.weight"))],
            "only matrices can be stacked, and stacks of them split",
        ),
        ([], [Stack(("*.q_proj.weight", "*.w_proj.weight"))], "stacked with layer.w_proj.weight, which does not exist"),
        ([], [Stack(("e*.weight", "layer.experts*.weight"))], "does not exist"),
        ([Rule("*.k_proj.*", "copy")], [Stack(("*.q_proj.weight", "*.k_proj.weight"))], "but selected to copy"),
        ([], [Split("*.qkv.weight", 3), Split("*.qkv.weight", 3)], "in more than one view"),
    ],
)
def test_rules_that_cannot_apply(select: list[Rule], views: list[Stack | Split], message: str) -> None:
    with pytest.raises(fm.ArgumentError, match=message):
        plan_units(SPECS, select, views)


def test_a_method_without_matrices_merges_every_tensor_by_itself() -> None:
    units = plan_units(SPECS, views=[Stack(("*.q_proj.weight", "*.k_proj.weight")), Split("*.qkv.weight", 3)])
    plain = list(without_matrices(units))
    assert {name: unit.action for unit in plain for name in unit.names} == {
        name: "copy" if name == "position_ids" else "merge" for name in SPECS
    }
    assert all(len(unit.names) == 1 and not unit.parts for unit in plain)
    assert [unit.must_agree for unit in plain if unit.action == "copy"] == [True]
