"""Coded positions: native against numpy, sizes, hostile bytes."""

from __future__ import annotations

import math

import numpy as np
import position_codec
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from freemerge.experts.positions import (
    BYTE_GAPS,
    RICE,
    CodedPositions,
    decode_positions,
    encode_positions,
    index_dtype,
)

gap = st.one_of(st.integers(0, 3), st.integers(0, 300), st.integers(0, 1 << 33))


def from_gaps(gaps: list[int]) -> torch.Tensor:
    return torch.tensor(gaps, dtype=torch.int64).add(1).cumsum(0) - 1


@settings(deadline=None, max_examples=200)
@given(gaps=st.lists(gap, max_size=40), slack=st.integers(0, 5))
def test_native_and_numpy_write_the_same_bytes_and_read_them_back(gaps: list[int], slack: int) -> None:
    positions = from_gaps(gaps)
    numel = (int(positions[-1]) if gaps else 0) + 1 + slack
    positions = positions.to(index_dtype(numel))
    native, reference = encode_positions(positions), position_codec.encode_positions(positions.long().numpy())
    assert (native.coding, native.parameter) == (reference.coding, reference.parameter)
    assert native.data.tobytes() == reference.data.tobytes()
    assert torch.equal(decode_positions(native, len(gaps), numel), positions)
    assert position_codec.decode_positions(native, len(gaps)).tolist() == positions.tolist()


@pytest.mark.parametrize(("density", "bits"), [(0.0025, 10.25), (0.01, 8.2), (0.05, 5.85), (0.5, 2.05)])
def test_random_positions_take_rice_codes_near_their_entropy(density: float, bits: float) -> None:
    positions = np.flatnonzero(np.random.default_rng(0).random(2_000_000) < density)
    coded = encode_positions(torch.from_numpy(positions))
    entropy = (-density * math.log2(density) - (1 - density) * math.log2(1 - density)) / density
    assert coded.coding == RICE
    assert entropy * 0.99 < 8 * coded.data.size / positions.size < bits


def test_clustered_positions_take_byte_gaps() -> None:
    positions = torch.cat([torch.arange(200) + start for start in range(0, 1 << 30, 1 << 26)])
    coded = encode_positions(positions)
    assert coded.coding == BYTE_GAPS
    assert coded.data.size < 1.02 * positions.numel()
    assert torch.equal(decode_positions(coded, positions.numel(), 1 << 30), positions.int())


def test_positions_must_ascend() -> None:
    for bad in ([1, 1], [2, 1], [-1, 4]):
        with pytest.raises(ValueError, match="ascending"):
            encode_positions(torch.tensor(bad))
        with pytest.raises(ValueError, match="ascending"):
            position_codec.encode_positions(np.array(bad))


@settings(deadline=None, max_examples=300)
@given(
    gaps=st.lists(gap, min_size=1, max_size=30),
    damage=st.sampled_from(["flip", "cut", "append", "count", "parameter", "numel", "coding"]),
    data=st.data(),
)
def test_damaged_bytes_are_refused_or_decode_to_valid_positions(
    gaps: list[int], damage: str, data: st.DataObject
) -> None:
    positions = from_gaps(gaps)
    count, numel = len(gaps), int(positions[-1]) + 1
    coded = encode_positions(positions)
    raw, parameter, kind = coded.data.copy(), coded.parameter, coded.coding
    if damage == "flip":
        bit = data.draw(st.integers(0, 8 * raw.size - 1))
        raw[bit // 8] ^= 1 << bit % 8
    elif damage == "cut":
        raw = raw[: data.draw(st.integers(0, raw.size - 1))].copy()
    elif damage == "append":
        raw = np.append(raw, np.uint8(data.draw(st.integers(0, 255))))
    elif damage == "count":
        count = data.draw(st.integers(-1, 2 * count))
    elif damage == "parameter":
        parameter = data.draw(st.integers(-2, 70) | st.just(1 << 31))
    elif damage == "numel":
        numel = data.draw(st.integers(0, numel))
    else:
        kind = data.draw(st.integers(-1, 3) | st.just(1 << 40))
    damaged = CodedPositions(kind, parameter, raw)
    try:
        decoded = decode_positions(damaged, max(0, count), numel)
    except ValueError:
        return
    assert bool((decoded.diff() > 0).all())
    assert not decoded.numel() or (int(decoded[0]) >= 0 and int(decoded[-1]) < numel)
    if damage in ("cut", "append"):
        pytest.fail("the bytes were not all needed")
