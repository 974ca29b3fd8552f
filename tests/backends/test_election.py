"""Elections of signs and histograms of magnitudes: native and torch's are the same bytes, and by hand."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from normals import DTYPES, normal

from freemerge import accumulate
from freemerge.backends import memory
from freemerge.backends.registry import named
from freemerge.errors import ArgumentError


@pytest.mark.parametrize("n", [1, 63, 1000, 70001])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shares", [False, True])
def test_an_election_is_the_same_bytes_on_every_backend(n: int, dtype: torch.dtype, shares: bool) -> None:
    found = []
    for one in (named("cpu"), named("torch")):
        assert one is not None
        tensors = [torch.zeros(n, dtype=dtype) for _ in range(4)]
        sums, own_shares = tensors[:2], tensors[2:] if shares else []
        for i, (weight, least, outlier) in enumerate(
            [(1.0, 0.5, math.inf), (-0.3, 0.0, 1.25), (0.7, 1.0, 1.0), (1 / 3, math.inf, math.inf), (2.0, 0.1, 2.0)]
        ):
            delta = normal((n,), i, dtype)
            delta[i::5] = 0.0
            delta[::3] = delta[::3].bfloat16().to(dtype)  # equal to thresholds, and to each other
            delta[7::11] = torch.tensor([math.nan, math.inf, -math.inf]).repeat(n)[: delta[7::11].numel()]
            one.elect(delta, weight, least, outlier, sums, own_shares)
        found.append([tensor.clone() for tensor in tensors])
        one.decide(sums, own_shares)
        found[-1].append(sums[0])
    for native, reference in zip(*found, strict=True):
        assert torch.equal(native.view(torch.uint8), reference.view(torch.uint8))


def test_an_election_by_hand() -> None:
    sums, shares = ([torch.zeros(5) for _ in range(2)] for _ in range(2))
    for values in ([1.0, -2.0, 0.0, 4.0, 1.0], [3.0, 1.0, 0.0, -4.0, -9.0]):
        accumulate.elect(torch.tensor(values), 2.0, sums, shares, least=1.5, outlier=9.0)
    assert [tensor.tolist() for tensor in sums] == [[6.0, 0.0, 0.0, 8.0, 0.0], [0.0, -4.0, 0.0, -8.0, 0.0]]
    assert [tensor.tolist() for tensor in shares] == [[2.0, 0.0, 0.0, 2.0, 0.0], [0.0, 2.0, 0.0, 2.0, 0.0]]
    assert accumulate.decide(sums, shares).tolist() == [3.0, -2.0, 0.0, 0.0, 0.0]
    total = torch.zeros(3)
    accumulate.elect(torch.tensor([1.0, -2.0, 3.0]), -1.0, (total, total), outlier=3.0)
    assert total.tolist() == [-1.0, 2.0, 0.0]


def test_an_election_takes_sums_of_its_own_shape_and_dtype() -> None:
    for wrong in (torch.zeros(3), torch.zeros(4, dtype=torch.float64), torch.zeros(8)[::2]):
        with pytest.raises(ArgumentError, match="out must be a contiguous torch"):
            accumulate.elect(torch.ones(4), 1.0, (torch.zeros(4), wrong))


@pytest.mark.parametrize(
    ("shift", "bits", "above"), [(15, 16, 0), (16, 15, 0), (0, 15, 0x7F00), (8, 8, 0), (8, 8, 16257)]
)
@pytest.mark.parametrize("dtypes", [(torch.float32, None), (torch.float64, None), *itertools.product(DTYPES, DTYPES)])
def test_magnitudes_are_counted_alike(
    shift: int, bits: int, above: int, dtypes: tuple[torch.dtype, torch.dtype | None]
) -> None:
    model, base = normal((70001,), 1, dtypes[0]), None if dtypes[1] is None else normal((70001,), 2, dtypes[1])
    model[:5000] = 0.0 if base is None else base[:5000].to(model.dtype)
    model[5000:5002] = torch.tensor([math.inf, 1e-39])
    counts = [torch.ones(1 << bits, dtype=torch.int64) for _ in range(3)]
    for one, own in zip((named("cpu"), named("torch")), counts, strict=False):
        assert one is not None
        one.count_magnitudes(model, base, own, shift, above)
    compute = memory.arithmetic_of([model] if base is None else [model, base])
    v = (model if base is None else model.to(compute) - base.to(compute)).float()
    magnitudes = v.view(torch.int32).numpy() & 0x7FFFFFFF
    inside = magnitudes[magnitudes >> (shift + bits) == above] >> shift & ((1 << bits) - 1)
    counts[2] += torch.from_numpy(np.bincount(inside, minlength=1 << bits))
    assert torch.equal(counts[0], counts[2])
    assert torch.equal(counts[1], counts[2])


def test_pieces_of_a_long_vector_are_counted_on_every_thread() -> None:
    values = normal((3 << 18,), 5)
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(torch.zeros(1 << 16, dtype=torch.int64))
            accumulate.count_magnitudes(values, None, found[-1], 15, 0)
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(counts, found[0]) for counts in found)
    assert int(found[0].sum()) == values.numel()
