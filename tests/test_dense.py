"""Tensors without memory of their own: every public function says so, and none crashes."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch

import freemerge as fm
from freemerge import _core
from freemerge.dense import address, bits, dense, same_bits

PACKAGE = Path(fm.__file__).parent
COPIED = {"big-endian", "read-only", "read-only DLPack", "negative strides"}  # what `filtered` need not write to


@cache
def outcomes() -> list[tuple[str, str, str, str]]:
    """What tests/foreign.py prints, from a process that may crash."""
    run = subprocess.run(
        [sys.executable, "-X", "faulthandler", str(Path(__file__).with_name("foreign.py"))],
        capture_output=True,
        text=True,
        timeout=300,
        env={"PYTHONPATH": f"{PACKAGE.parent}:{Path(__file__).parent}"},
    )
    found = [tuple(json.loads(line)) for line in run.stdout.splitlines()]
    assert run.returncode == 0, f"after {found[-1:]}: {run.stderr[-2000:]}"
    return found


# What the functions of tests/foreign.py get the tensor as.
ARGUMENTS = {
    "filter_": "x",
    "filter_ of a list": "x[1]",
    "filter_ by torch": "x",
    "filtered": "x",
    "merge, base": "base (in-memory state dict): tensor 'w'",
    "merge, model": "models[0] (in-memory state dict): tensor 'w'",
    "merge, module": "base (in-memory Linear): tensor 'weight'",
    "merge_tensors, base": "base",
    "merge_tensors, model": "tensors[1]",
    "extract_experts": "models['task'] (in-memory state dict): tensor 'w'",
    "extract_experts, base": "base (in-memory state dict): tensor 'w'",
    "ExpertBank": "model: 'w'",
    "Router": "features",
    "RoutedModel": "features",
}
# Within torch.func.grad, even new tensors have no memory of their own: those that come first are named.
FIRST_IN_GRAD = {"filter_ of a list": "x[0]", "merge, model": "a tensor", "extract_experts": "a tensor"}


def test_foreign_tensors_are_refused_by_name() -> None:
    wrong, seen = [], set()
    for kind, tensor, function, outcome in outcomes():
        if kind == "foreign":
            seen.add(tensor)
            copied = function == "filtered" and tensor in COPIED
            named = (FIRST_IN_GRAD.get(function) if tensor == "grad" else None) or ARGUMENTS[function]
            not_a_state_dict = named.replace("tensor 'w'", "not a state dict ('w'")  # as it holds no tensor
            refused = outcome.startswith((f"refused: {named} ", f"refused: {not_a_state_dict} "))
            if (outcome != "done") if copied else not refused:
                wrong.append((tensor, function, outcome))
    assert {function for kind, _, function, _ in outcomes() if kind == "foreign"} == ARGUMENTS.keys()
    assert not wrong
    assert len(seen) >= 20


def test_tensors_with_memory_are_taken_whatever_their_class() -> None:
    wrong = [
        found
        for found in outcomes()
        if found[0] == "welcome"
        and found[3] != "done"
        and not ("DTensor" in found[1] and found[2] == "RoutedModel")  # its model would get plain and DTensors mixed
        and not (found[1] == "Parameter" and found[2] == "filtered")
    ]
    assert not wrong
    assert sum(found[0] == "welcome" for found in outcomes()) > 50


def test_a_message_says_what_to_pass() -> None:
    said = {(tensor, function): outcome for _, tensor, function, outcome in outcomes()}
    assert said["FSDP2", "merge, module"].endswith("pass full_tensor()")
    assert "base (in-memory Linear): tensor 'weight' is a DTensor" in said["FSDP2", "merge, module"]
    assert said["quantised", "merge_tensors, model"].startswith("refused: tensors[1] is quantised")
    assert said["freed", "ExpertBank"].startswith("refused: model: 'w' has lost its memory")
    assert said["conjugated", "merge, model"].endswith("tensor 'w' is a lazily conjugated view; pass resolve_conj()")


def test_addresses_get_into_native_code_through_one_function() -> None:
    for path in sorted(PACKAGE.rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        native = "_core" in text or path.parent.name == "backends"
        calls = [n for n in ast.walk(ast.parse(text)) if isinstance(n, ast.Attribute) and n.attr == "data_ptr"]
        assert not (native and calls), f"{path} takes an address by itself"


def test_an_address_is_that_of_the_first_entry() -> None:
    x = torch.zeros(4, 6)
    assert address(x[1:, 2:]) == x.data_ptr() + 4 * (6 + 2)
    assert address(torch.empty(0)) == torch.empty(0).data_ptr()
    assert dense(x, "x") is x
    view = x[::2, 1::2]
    assert dense(view, "x") is view


def test_a_single_entry_may_have_any_stride(tmp_path: Path) -> None:
    """A slice of a matrix of one row is contiguous to torch, which will not see its bytes for their distance."""
    row, counter = torch.arange(6.0).view(1, 6), torch.tensor([7, 0])[::2]
    column = row[:, 2]
    assert bits(column).tolist() == bits(torch.tensor(2.0)).tolist()
    assert bits(column).data_ptr() == column.data_ptr()
    base = {"w": torch.randn(4, 3), "gain": column, "steps": counter, "n.running_mean": row[:, 3]}
    model = {"w": base["w"] + 1, "gain": row[:, 4], "steps": counter, "n.running_mean": row[:, 5]}
    fm.merge_checkpoints(base, [model, model], tmp_path / "merged", progress=False)
    assert fm.merge(base, [model, model])["steps"].tolist() == [7]
    assert {found.name for found in fm.diff(base, model)} == set(base) - {"steps"}
    fm.save_experts(fm.extract_experts(base, {"t": model}), tmp_path / "experts")
    assert fm.Expert.load(tmp_path / "experts" / "t.safetensors").statistics["n.running_mean"].tolist() == [5.0]


@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")
def test_the_same_bits_are_asked_for_in_any_dtype() -> None:
    for name in ("complex32", "float4_e2m1fn_x2", "float8_e8m0fnu", "bfloat16", "uint16", "bool"):
        dtype = getattr(torch, name, None)
        if dtype is not None:
            x, y = (
                torch.tensor([[first, 1, 0], [1, 1, 0]], dtype=torch.uint8).repeat(1, 4).view(dtype) for first in (0, 1)
            )
            assert same_bits(x, x.clone()), name
            assert same_bits(x.t(), x.t().contiguous()), name
            assert not same_bits(x, y), name
            assert not same_bits(x, x.reshape(-1)), name
    assert same_bits(torch.tensor([torch.nan]), torch.tensor([torch.nan]))
    assert not same_bits(torch.tensor([0.0]), torch.tensor([-0.0]))
    assert not same_bits(torch.zeros(1), torch.zeros(1, dtype=torch.int32))


@pytest.mark.parametrize(
    "call",
    [
        lambda: _core.accumulate(0, 0, 0, [8], [0], [1.0], False, 4, 1),
        lambda: _core.accumulate(0, 8, 0, [0], [0], [1.0], False, 4, 1),
        lambda: _core.add_round(0, 0, 8, 0, 8, 0, 1.0, 1.0, 4, 1),
        lambda: _core.square_sum(0, 0, 4, 1),
        lambda: _core.select_largest(0, 0, 8, 0, 1, 4, 1, 1),
        lambda: _core.elect((0, 8), (0, 0), 8, 0, 1.0, 0.0, 1.0, 4, 1),
        lambda: _core.decide((8, 0), (0, 0), 0, 4, 1),
        lambda: _core.count_magnitudes(0, 0, 8, 0, 4, 16, 15, 0, 8, 1),
        lambda: _core.count_magnitudes(8, 0, 8, 0, 4, 16, 15, 0, 0, 1),
        lambda: _core.select_from_bin(8, 0, 0, 0, 4, 0, 1),
        lambda: _core.sparse_sum([(0, True, 4, 8, 1.0)]),
        lambda: _core.sparse_sum([(8, True, 4, 0, 1.0)]),
        lambda: _core.SparseSwitch([(0, 0, 4, 8, True, 1, 8, 1.0, 0)]),
        lambda: _core.encode_positions(0, True, 4),
        lambda: _core.decode_positions(0, 0, 0, 4, 4, 4, 8, True),
    ],
)
def test_native_functions_refuse_null(call: object) -> None:
    with pytest.raises(ValueError, match="no memory"):
        call()  # type: ignore[operator]
    assert _core.square_sum(0, 0, 0, 1) == 0.0  # an empty tensor needs none
