"""Task vectors as a method sees them: sums, single vectors, and the matrices that views make of them."""

from __future__ import annotations

import pytest
import torch

from freemerge.methods import vectors
from freemerge.methods.vectors import Deltas, TaskVectors, added, watched
from in_memory import deltas


def test_sums_means_and_single_vectors() -> None:
    base, models = torch.ones(2, 3).bfloat16(), [torch.full((2, 3), 3.0), torch.full((2, 3), -1.0)]
    reads: list[str] = []
    tensor = deltas("w", base, models, reads)
    assert tensor.numel == 6
    assert tensor.means() == [2.0, 2.0]
    assert torch.equal(tensor.sum([1.0, 0.25]), torch.full((2, 3), 1.5))
    assert reads == 2 * ["base", "0", "1"]
    each = tensor.each()
    next(each).zero_()
    assert reads[6:] == ["base", "0"], "one model at a time"
    assert torch.equal(next(each), torch.full((2, 3), -2.0))
    assert base.eq(1).all()
    assert models[0].eq(3).all(), "what a method changes is its own"


def test_values_that_are_not_finite_are_found() -> None:
    tensor = deltas("w", torch.zeros(2), [torch.zeros(2), torch.tensor([1.0, float("nan")])], [])
    for read in (tensor.means, lambda: tensor.sum([1.0, 1.0]), lambda: list(tensor.each())):
        with pytest.raises(ValueError, match="w"):
            read()


def test_pieces_make_up_the_tensor_and_are_read_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vectors, "PIECE", 10)
    base, models = torch.arange(42.0).view(7, 6).T, [torch.full((6, 7), value).bfloat16() for value in (2.0, -3.0)]
    reads: list[str] = []
    tensor, seen = deltas("w", base, models, reads), list[int]()

    def difference(piece: Deltas) -> torch.Tensor:
        first, second = piece.each()
        seen.append(first.numel())
        return first - 2 * second

    assert torch.equal(tensor.by_pieces(difference), 8.0 + base)
    assert seen == [10, 10, 10, 10, 2]
    assert reads == ["base", "0", "1"]
    models[1][5, 6] = float("inf")
    with pytest.raises(ValueError, match="w"):
        tensor.by_pieces(difference)
    empty = deltas("e", torch.zeros(0, 3), [torch.zeros(0, 3)] * 2, [])
    assert empty.by_pieces(difference).shape == (0, 3)


def test_each_gives_the_members_of_one_model() -> None:
    a, b = torch.zeros(2), torch.zeros(3, 2)
    tensors = deltas("a", a, [a + 1, a + 2], []), deltas("b", b, [b + 3, b + 4], [])
    first, second = TaskVectors(tensors, False).each()
    assert [float(tensor.mean()) for tensor in (*first, *second)] == [1, 3, 2, 4]


def test_a_sum_takes_the_memory_of_the_first_model() -> None:
    first = [torch.ones(2), torch.ones(3, 2)]
    total = added(iter([first, [torch.full((2,), 2.0), torch.zeros(3, 2)]]))
    assert [t.data_ptr() for t in total] == [t.data_ptr() for t in first]
    assert [float(tensor.mean()) for tensor in total] == [3, 1]
    with pytest.raises(ValueError, match="zip"):
        added([first, first[:1]])


def test_linear_maps_are_views_of_what_is_stored() -> None:
    weight = torch.zeros(6, 2)
    vectors = TaskVectors((deltas("w", weight, [weight, weight], [], transposed=True),), True, (4, 2))
    assert vectors.count == 2
    for i, part in enumerate(vectors.linear_maps([weight])):
        assert part.shape == ((2, 4), (2, 2))[i]
        part.fill_(i)
    assert weight[:, 0].tolist() == [0, 0, 0, 0, 1, 1]


def test_a_stack_is_one_matrix_and_comes_back() -> None:
    q, k = torch.arange(6.0).view(3, 2), torch.arange(4.0).view(2, 2)
    vectors = TaskVectors((deltas("q", q, [q], []), deltas("k", k, [k], [])), True)
    (stacked,) = matrices = vectors.matrices([q, k])
    assert torch.equal(stacked, torch.cat([q, k]))
    stacked.mul_(2)
    vectors.unstack(matrices, [q, k])
    assert torch.equal(q, 2 * torch.arange(6.0).view(3, 2))
    assert torch.equal(k, 2 * torch.arange(4.0).view(2, 2))


def test_the_parts_of_a_split_share_its_memory() -> None:
    fused = torch.zeros(6, 2)
    vectors = TaskVectors((deltas("qkv", fused, [fused], []),), True, (3, 2, 1))
    for i, part in enumerate(vectors.matrices([fused])):
        part.fill_(i)
    assert fused[:, 0].tolist() == [0, 0, 0, 1, 1, 2]


def test_watched_vectors_tell_their_sum_and_norms_once() -> None:
    q, k = torch.zeros(3, 2), torch.zeros(4)
    reads: list[str] = []
    vectors = TaskVectors((deltas("q", q, [q + 1, q + 2], reads), deltas("k", k, [k - 1, k + 3], [])), False)
    seen = watched(vectors)
    for tensors in seen.each():
        for tensor in tensors:
            tensor.zero_()  # what is done to them afterwards does not matter
    assert len(list(seen.each())) == 2, "they can be read again"
    assert [float(tensor.mean()) for tensor in seen.sums] == [3, 2]
    assert seen.squares == pytest.approx([6 + 4, 24 + 36])
    reads.clear()
    seen.read()
    assert not reads, "that has been done"
    unread = watched(vectors)
    assert [float(tensor.mean()) for tensor in unread.sum([1.0, -1.0])] == [-1, -4]
    unread.read()
    assert unread.squares == seen.squares
