"""Ranks that spend a number of bytes where they bring a low-rank expert nearest to the fine-tuned model."""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass


def byte_limit(share: float, shapes: Iterable[Sequence[int]]) -> int:
    """The bytes that a budget allows for experts of tensors of these shapes: its share of them in float16."""
    return math.floor(share * 2 * sum(math.prod(shape) for shape in shapes))


@dataclass(frozen=True)
class Offer:
    """What a tensor has to offer: the energy of each component, falling, and bits of a component and of the first one
    in addition."""

    energies: Sequence[float]
    bits: int
    opening: int

    def best(self, taken: int, room: int) -> tuple[float, int]:
        """How many more components have the most energy a bit within ``room`` bits, and that energy a bit."""
        opening = 0 if taken else self.opening
        gained, best = 0.0, (0.0, 0)
        for count in range(1, min((room - opening) // self.bits, len(self.energies) - taken) + 1):
            gained += self.energies[taken + count - 1]
            ratio = gained / (opening + count * self.bits)
            if ratio <= best[0]:
                break  # as energies fall, no larger number is better
            best = ratio, count
        return best


def allocate(offers: Mapping[str, Offer], room: int) -> dict[str, int]:
    """The number of components of each tensor, which take at most ``room`` bits: always the most energy a bit next."""
    names = list(offers)
    ranks = dict.fromkeys(names, 0)
    heap: list[tuple[float, int, int]] = []

    def push(index: int) -> None:
        ratio, count = offers[names[index]].best(ranks[names[index]], room)
        if count:
            heapq.heappush(heap, (-ratio, index, count))

    for index in range(len(names)):
        push(index)
    while heap:
        _, index, count = heapq.heappop(heap)
        offer, name = offers[names[index]], names[index]
        cost = count * offer.bits + (0 if ranks[name] else offer.opening)
        if cost <= room:
            room -= cost
            ranks[name] += count
        push(index)  # with what fits now
    return ranks
