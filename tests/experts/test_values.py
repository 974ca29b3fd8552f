"""Codings of an expert's values: round trips, distance, hostile bytes, and a coding of one's own."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import freemerge.experts as fx
from freemerge.errors import ArgumentError
from freemerge.experts.payload import Bytes, Reader, tensors_to_bytes
from freemerge.experts.select import Selection
from freemerge.experts.values import CODINGS, SparseTensor, coding_of

SPARSE = [coding for coding in CODINGS.values() if issubclass(coding, SparseTensor)]


def entries(rows: int, width: int, count: int, seed: int) -> Selection:
    generator = torch.Generator().manual_seed(seed)
    count = min(count, rows * width)
    indices = torch.randperm(rows * width, generator=generator)[:count].sort().values
    return Selection(indices, torch.randn(count, generator=generator) * 1e-2)


def test_codings_of_the_file_format() -> None:
    assert list(CODINGS) == ["fp32", "bf16", "fp16", "svd2", "gains", "int8", "mask", "sign", "svd16"]


@pytest.mark.parametrize("coding", SPARSE)
@given(rows=st.integers(1, 6), width=st.integers(1, 40), count=st.integers(0, 60), seed=st.integers(0, 99))
def test_values_stay_close_and_come_back_from_their_bytes(
    coding: type[SparseTensor], rows: int, width: int, count: int, seed: int
) -> None:
    selection = entries(rows, width, count, seed)
    indices, values = selection.indices, selection.values
    coded = coding.encode((rows, width), selection)
    assert coded.entries == len(values)
    assert coded.indices.tolist() == indices.tolist()
    decoded = coded.values()
    assert decoded.dtype == torch.float32
    if coding.coding == "sign":
        assert torch.equal(decoded.sign(), values.sign())
        if len(values):
            assert float(decoded.abs().max()) == pytest.approx(float(values.abs().double().mean()), rel=1e-6)
    elif coding.coding == "int8":
        row = indices // width
        largest = torch.stack(
            [values[row == r].abs().amax() if (row == r).any() else torch.zeros(()) for r in range(rows)]
        )
        assert ((decoded - values).abs() <= largest[row] / 127 * (0.501 + 2.0**-8)).all()
    else:
        steps = {"fp32": 0.0, "bf16": 2.0**-8, "fp16": 2.0**-11}[coding.coding]
        assert ((decoded - values).abs() <= steps * values.abs() + 2.0**-25 * (coding.coding == "fp16")).all()
    raw = coded.to_bytes()
    again = coding.from_bytes((rows, width), Reader(raw))
    assert torch.equal(again.indices, coded.indices)
    assert torch.equal(again.values(), decoded)
    raw = coded.values_to_bytes()
    for wrong in (raw[:-1], np.append(raw, np.uint8(0))):
        if wrong.size != raw.size and (len(values) or wrong.size):
            with pytest.raises(ValueError, match="bytes of values"):
                coding.values_from_bytes((rows, width), indices, Reader(wrong))


def test_values_that_a_format_cannot_hold_are_refused() -> None:
    where = torch.tensor([0])
    with pytest.raises(ArgumentError, match="fp16 cannot hold 1e\\+06"):
        fx.extract_experts({"w": torch.zeros(1)}, {"t": {"w": torch.tensor([1e6])}}, values="fp16")
    with pytest.raises(ArgumentError, match="values must be one of fp32, bf16"):
        coding_of("fp8")
    with pytest.raises(ValueError, match="non-finite"):
        CODINGS["fp32"].from_bytes((1,), Reader(np.array([1, 0, 0, 1, 0, 0, 0, 192, 127], np.uint8)))
    stray = coding_of("sign").encode((1,), Selection(where, torch.ones(1))).to_bytes()  # type: ignore[attr-defined]
    stray[-1] |= 2
    with pytest.raises(ValueError, match="stray bits"):
        coding_of("sign").from_bytes((1,), Reader(stray))


@pytest.fixture
def outer_product() -> Iterator[type[fx.ExpertTensor]]:
    """A coding without positions: a matrix of rank one as its two factors."""

    @dataclass(frozen=True, eq=False)
    class OuterProduct(fx.ExpertTensor):
        coding = "outer"
        left: torch.Tensor
        right: torch.Tensor

        @property
        def entries(self) -> int:
            return self.left.numel() + self.right.numel()

        def dense(self, device: torch.device | None = None) -> torch.Tensor:
            return torch.outer(self.left, self.right).to(device)

        def to_bytes(self) -> Bytes:
            return tensors_to_bytes(self.left, self.right)

        @classmethod
        def from_bytes(cls, shape: tuple[int, ...], reader: Reader) -> OuterProduct:
            return cls(shape, *reader.tensors(*[(torch.float32, n) for n in shape]))

    yield OuterProduct
    del CODINGS["outer"]


def test_a_coding_of_its_own_is_one_class(outer_product: type[fx.ExpertTensor], tmp_path: Path) -> None:
    tensor = outer_product((2, 3), torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0, 5.0]))  # type: ignore[call-arg]
    expert = fx.Expert({"w": tensor}, 0.5, None, None, "number", "outer")
    expert.save(tmp_path / "t.safetensors")
    loaded = fx.Expert.load(tmp_path / "t.safetensors")
    assert (loaded.entries, loaded.values) == (5, "outer")
    weights = torch.ones(2, 3)
    with fx.ExpertBank({"w": weights}, {"t": loaded}).active("t"):
        assert weights.tolist() == [[2.5, 3.0, 3.5], [4.0, 5.0, 6.0]]
    assert torch.equal(weights, torch.ones(2, 3))
    with pytest.raises(ArgumentError, match="outer does not code single entries"):
        fx.extract_experts({"w": weights}, {"t": {"w": weights + 1}}, values="outer")
    with pytest.raises(TypeError, match="two codings called 'outer'"):
        type("Again", (fx.ExpertTensor,), {"coding": "outer"})
