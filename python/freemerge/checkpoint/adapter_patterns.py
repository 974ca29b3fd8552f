"""Regular expressions of an adapter's config, matched as PEFT does, in bounded time."""

from __future__ import annotations

import math
import re

_LONGEST = 500
_STEPS = 10**6  # of one match, by the bound below
_ALL_STEPS = 10**9  # of all matches of a config


class Patterns:
    """Matches patterns that a file brings along; ValueError for one that is none, or that could take too long.

    A backtracking matcher can take exponential time. Its steps are bounded here from the text of the pattern: n choose
    s places for s repetitions in a name of n letters, two ways for each optional part, and the alternatives of each
    group.
    """

    def __init__(self) -> None:
        self._left = _ALL_STEPS

    def check(self, pattern: str) -> None:
        """Raise ValueError for what is no pattern, or too complex even for a short name."""
        self._steps(pattern, 40)
        try:
            re.compile(pattern)
        except (re.error, OverflowError, RecursionError) as error:
            raise ValueError(f"{pattern!r} is no valid pattern: {error}") from None

    def fits(self, pattern: str, name: str) -> bool:
        """Whether a pattern matches all of a name, or its end after a dot."""
        self._spend(pattern, name)
        return re.match(rf"(.*\.)?({pattern})$", name) is not None

    def fits_all(self, pattern: str, name: str) -> bool:
        """Whether a pattern matches all of a name."""
        self._spend(pattern, name)
        return re.fullmatch(pattern, name) is not None

    def _spend(self, pattern: str, name: str) -> None:
        self._left -= self._steps(pattern, len(name))
        if self._left < 0:
            raise ValueError("its patterns take too long to match")

    def _steps(self, pattern: str, length: int) -> int:
        plain = re.sub(r"\[\^?\]?[^\]]*\]|\\.", "x", pattern) if len(pattern) <= _LONGEST else "(*)*"
        bars = [0]
        ways = 1
        for letter in plain:
            if letter == "(":
                bars.append(0)
            elif letter == ")" and len(bars) > 1:
                ways *= bars.pop() + 1
            elif letter == "|":
                bars[-1] += 1
        for count in bars:
            ways *= count + 1
        repeats = len(re.findall(r"[*+{]", plain)) + 1  # one for what comes before the pattern
        ways <<= len(re.findall(r"(?<![*+?}(])\?", plain))
        steps = ways * math.comb(length + repeats, repeats)
        if steps > _STEPS or re.search(r"\)[*+{]", plain):
            raise ValueError(f"the pattern {pattern[:80]!r} is too complex")
        return steps
