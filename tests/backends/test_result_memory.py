"""Memory of large results is used again within a block, and never shared by two that live."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

from freemerge.backends import result_memory
from freemerge.backends.result_memory import empty, reusing

LARGE = 1 << 20  # entries of 4 MB


def large(entries: int = LARGE) -> Tensor:
    return empty((entries,), torch.float32, torch.device("cpu"))


@pytest.fixture
def fresh() -> Iterator[list[int]]:
    """Sizes of the pieces that were made; takes note of them by counting."""
    made: list[int] = []
    original = torch.empty

    def counted(*args: object, **options: object) -> Tensor:
        result: Tensor = original(*args, **options)  # type: ignore[call-overload]
        made.append(result.nbytes)
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(result_memory.torch, "empty", counted)
        yield made


def test_the_next_result_lies_where_the_last_one_was(fresh: list[int]) -> None:
    with reusing():
        first = large()
        part = first[5:10].view(torch.int32)  # views and NumPy's arrays hold the memory, too
        array = part.numpy()
        del first, part
        second = large()
        assert len(fresh) == 2
        del array
        third = large(LARGE * 3 // 4)
        fourth = large(LARGE // 4)  # behind the third one
        assert len(fresh) == 2
        fifth = large(LARGE // 4)
        assert len(fresh) == 3  # nothing is left
        assert [x.numel() for x in (second, third, fourth, fifth)] == [LARGE, LARGE * 3 // 4, LARGE // 4, LARGE // 4]


def test_what_was_cut_to_pieces_is_used_again_as_a_whole(fresh: list[int]) -> None:
    with reusing():
        large()
        pieces = [large(LARGE // 4) for _ in range(4)]
        for i in (0, 2, 3, 1):
            pieces[i] = torch.empty(0)
        large()
    assert [nbytes for nbytes in fresh if nbytes] == [4 * LARGE]


def test_no_more_is_held_than_was_in_use_at_one_time(fresh: list[int]) -> None:
    with reusing():
        for entries in (LARGE, 2 * LARGE, 4 * LARGE, 2 * LARGE, LARGE):
            large(entries)
            assert result_memory._pieces._held <= result_memory._pieces._most
        held = large(2 * LARGE), large(2 * LARGE)
        large(LARGE)
        assert result_memory._pieces._held == 20 * LARGE
        del held
        large(5 * LARGE)
        assert result_memory._pieces._held == result_memory._pieces._most == 20 * LARGE
    assert fresh == [4 * LARGE, 8 * LARGE, 16 * LARGE, 4 * LARGE, 20 * LARGE]


def test_nothing_is_kept_outside_of_the_block() -> None:
    with reusing():
        survivor = large()
        large()
        with reusing():
            pass
        assert result_memory._pieces._returned
    assert not result_memory._pieces._returned
    survivor.fill_(3.0)
    with reusing():
        other = large().fill_(1.0)
        del survivor
        assert not result_memory._pieces._returned  # it was taken in another block
        assert float(other.sum()) == LARGE
    del other
    assert not result_memory._pieces._returned


def test_a_tensor_that_dies_while_memory_is_taken_gets_nobody_elses(monkeypatch: pytest.MonkeyPatch) -> None:
    with reusing():
        whole = large(3 * LARGE)
        del whole
        held = [large() for _ in range(3)]
        del held[1]

        def smallest(values: Iterable[Any], **options: Any) -> Any:
            found = min(values, **options)
            if options:
                held.clear()  # as a search for garbage may, which begins wherever something is allocated
            return found

        monkeypatch.setattr(result_memory, "min", smallest, raising=False)
        first = large().fill_(1.0)
        monkeypatch.undo()
        others = [large().fill_(2.0) for _ in range(3)]
        assert float(first.sum()) == LARGE
        assert all(float(other.sum()) == 2 * LARGE for other in others)


def test_results_that_live_never_overlap() -> None:
    def work(seed: int) -> None:
        choose = random.Random(seed)
        held: list[tuple[Tensor, int]] = []
        for number in range(200):
            tensor = large(LARGE // choose.choice((1, 2)))
            value = seed * 1000 + number
            held.append((tensor.fill_(value), value))
            if len(held) > 3:
                tensor, value = held.pop(choose.randrange(len(held)))
                assert bool((tensor == value).all())

    with reusing(), ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))
