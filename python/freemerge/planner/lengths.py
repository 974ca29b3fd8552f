"""Prime factors of the lengths of transforms."""

from __future__ import annotations

from functools import lru_cache


@lru_cache(maxsize=4096)
def prime_factors(n: int) -> tuple[int, ...]:
    """The prime factors of n in ascending order, as often as they divide it; none of 1."""
    found, divisor = [], 2
    while divisor * divisor <= n:
        if n % divisor == 0:
            found.append(divisor)
            n //= divisor
        else:
            divisor += 1
    return (*found, n) if n > 1 else tuple(found)


def largest_prime(n: int) -> int:
    """The largest prime factor of n; 1 for 1."""
    return max(prime_factors(n), default=1)
