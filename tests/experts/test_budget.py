"""Which components a budget buys."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from freemerge.arguments import share_of
from freemerge.errors import ArgumentError
from freemerge.experts.budget import Offer, allocate

OFFERS = st.lists(
    st.builds(
        lambda energies, bits, opening: Offer(sorted(energies, reverse=True), bits, opening),
        st.lists(st.just(0.0) | st.floats(1e-6, 100), max_size=5),
        st.integers(1, 20),
        st.integers(0, 30),
    ),
    max_size=5,
)


def cost(offer: Offer, rank: int) -> int:
    return rank * offer.bits + (offer.opening if rank else 0)


@given(offers=OFFERS, room=st.integers(0, 300))
def test_the_room_is_kept_and_nothing_that_fits_is_left(offers: list[Offer], room: int) -> None:
    named = {str(i): offer for i, offer in enumerate(offers)}
    ranks = allocate(named, room)
    left = room - sum(cost(offer, ranks[name]) for name, offer in named.items())
    assert left >= 0
    for name, offer in named.items():
        assert 0 <= ranks[name] <= len(offer.energies)
        more = offer.energies[ranks[name] :]
        if more and more[0] > 0:
            assert cost(offer, ranks[name] + 1) - cost(offer, ranks[name]) > left


@given(
    energies=st.lists(st.lists(st.floats(0.1, 100), max_size=4), min_size=1, max_size=4), count=st.integers(0, 16)
)  # fmt: skip
def test_components_of_equal_cost_are_the_strongest_ones(energies: list[list[float]], count: int) -> None:
    offers = {str(i): Offer(sorted(row, reverse=True), 7, 0) for i, row in enumerate(energies)}
    ranks = allocate(offers, 7 * count + 6)
    gained = sum(sum(offer.energies[: ranks[name]]) for name, offer in offers.items())
    best = sorted(itertools.chain(*energies), reverse=True)[:count]
    assert gained == pytest.approx(sum(best))


def test_a_tensor_is_opened_for_as_many_components_as_pay_for_it() -> None:
    # One component of the first costs 110 bits for 10, ten cost 200 for 100; the second gives 4 for 10.
    offers = {"wide": Offer([10.0] * 10, 10, 100), "cheap": Offer([4.0], 10, 0)}
    assert offers["wide"].best(0, 1000) == (0.5, 10)
    assert offers["wide"].best(3, 1000) == (1.0, 1)
    assert allocate(offers, 200) == {"wide": 10, "cheap": 0}
    assert allocate(offers, 199) == {"wide": 9, "cheap": 0}
    assert allocate(offers, 160) == {"wide": 5, "cheap": 1}  # six would bring .375 a bit


@pytest.mark.parametrize(("budget", "share"), [("0.3%", 0.003), (" 50 % ", 0.5), (0.003, 0.003), ("0.003", 0.003)])
def test_budgets_are_shares(budget: float | str, share: float) -> None:
    assert share_of("budget", budget) == pytest.approx(share)


@pytest.mark.parametrize("budget", ["0", "100%", 1, -0.1, "nan", "much", "", "%", "1%%", True, [0.1]])
def test_what_is_no_share_is_refused(budget: float | str) -> None:
    with pytest.raises(ArgumentError, match="budget must be a share"):
        share_of("budget", budget)  # type: ignore[arg-type]
