"""How two checkpoints differ, against the definition in float64."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

import freemerge as fm
from freemerge.cli import main

FLOATS = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


@settings(max_examples=40, deadline=None)
@given(
    shape=st.sampled_from([(), (1,), (7,), (5, 3), (2, 3, 4)]),
    first=st.sampled_from(FLOATS),
    second=st.sampled_from(FLOATS),
    seed=st.integers(0, 5),
)
def test_differences_are_those_of_float64(
    shape: tuple[int, ...], first: torch.dtype, second: torch.dtype, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    a, b = (torch.randn(shape, generator=generator).to(dtype) for dtype in (first, second))
    (found,) = fm.diff({"x": a}, {"x": b})
    apart = (a.double() - b.double()).abs()
    assert found.kind == "values"
    assert found.largest == float(apart.max())
    assert found.mean == pytest.approx(float(apart.mean()), rel=1e-12)


def test_every_kind_of_difference() -> None:
    first = {
        "same": torch.tensor([1.0, float("nan"), float("inf")]), "gone": torch.ones(2), "shape": torch.ones(2, 3),
        "dtype": torch.ones(2), "values": torch.tensor([1, 2, 3]), "nan": torch.tensor([1.0, float("nan")]),
        "empty": torch.ones(0), "bool": torch.tensor([True, False]), "complex": torch.tensor([1 + 1j]),
    }  # fmt: skip
    second = {
        "same": first["same"].clone(), "new": torch.ones(3, dtype=torch.int8), "shape": torch.ones(3, 2),
        "dtype": torch.ones(2).bfloat16(), "values": torch.tensor([1, 0, 3]), "nan": torch.tensor([1.0, 2.0]),
        "empty": torch.ones(0), "bool": torch.tensor([True, True]), "complex": torch.tensor([1 - 1j]),
    }  # fmt: skip
    found = {difference.name: difference for difference in fm.diff(first, second)}
    assert {name: difference.kind for name, difference in found.items()} == {
        "bool": "values", "complex": "values", "dtype": "dtype", "gone": "only in first", "nan": "values",
        "new": "only in second", "shape": "shape", "values": "values",
    }  # fmt: skip
    assert (found["values"].largest, found["values"].mean) == (2, pytest.approx(2 / 3))
    assert (found["complex"].largest, found["bool"].largest, found["dtype"].largest) == (2, 1, 0)
    assert found["nan"].largest != found["nan"].largest
    assert (found["new"].first, found["new"].second) == ("", "int8 3")
    assert list(fm.diff(first, first)) == []


def test_large_tensors_are_compared_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("freemerge.checkpoint.differences._CHUNK", 10)
    a, b = torch.zeros(95), torch.zeros(95)
    b[3], b[94] = -2.0, 1.0
    (found,) = fm.diff({"x": a}, {"x": b})
    assert (found.largest, found.mean) == (2, pytest.approx(3 / 95))


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for index, value in enumerate((1.0, 1.5)):
        save_file({"a": torch.full((2, 2), value), "b": torch.ones(3)}, tmp_path / f"{index}.safetensors")
    first, second = str(tmp_path / "0.safetensors"), str(tmp_path / "1.safetensors")
    assert main(["diff", first, first]) == 0
    assert capsys.readouterr().out == "the same\n"
    assert main(["diff", first, second]) == 1
    assert capsys.readouterr().out == "a  values, at most 0.5, mean 0.5\n1 tensor differs\n"
    assert main(["diff", first, second, "--json"]) == 1
    assert json.loads(capsys.readouterr().out) == {
        "name": "a", "kind": "values", "first": "float32 2x2", "second": "float32 2x2", "largest": 0.5, "mean": 0.5,
    }  # fmt: skip


def test_integers_that_are_one_number_in_float64_differ() -> None:
    first = {"x": torch.tensor([2**53, 5]), "same": torch.tensor([2**53 + 1])}
    second = {"x": torch.tensor([2**53 + 1, 5]), "same": torch.tensor([2**53 + 1])}
    (found,) = fm.diff(first, second)
    assert (found.name, found.kind, found.largest, found.mean) == ("x", "values", 1.0, 0.5)


def test_json_has_no_number_for_what_is_not_finite(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, value in (("a", 1.0), ("b", float("nan"))):
        save_file({"x": torch.tensor([value])}, tmp_path / f"{name}.safetensors")
    assert main(["diff", *(str(tmp_path / f"{name}.safetensors") for name in "ab"), "--json"]) == 1

    def refused(constant: str) -> None:
        raise AssertionError(constant)

    told = json.loads(capsys.readouterr().out, parse_constant=refused)
    assert (told["kind"], told["largest"]) == ("values", None)


def test_what_cannot_be_read_is_told_at_once(tmp_path: Path) -> None:
    for first, second in ((tmp_path / "absent", {"x": torch.ones(2)}), ({"x": torch.ones(2)}, tmp_path / "absent")):
        with pytest.raises(fm.CheckpointError, match="absent"):
            fm.diff(first, second)
