"""Arguments that several functions take: each check returns what it checked, or ArgumentError names the argument."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import update_wrapper
from inspect import signature
from numbers import Integral, Real
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from .errors import ArgumentError

F = TypeVar("F", bound=Callable[..., Any])
P = ParamSpec("P")
Made = TypeVar("Made")
Result = TypeVar("Result")

_SIZES = {"TB": 10**12, "GB": 10**9, "MB": 10**6, "KB": 10**3}


def path_of(name: str, value: object) -> Path:
    """A path, a string or anything else that the system takes for one, but neither bytes nor nothing."""
    if not isinstance(value, str | os.PathLike) or value == "" or "\0" in str(value):
        raise ArgumentError(f"{name} must be a path, got {value!r}")
    return Path(value)


def whole_number(name: str, value: object, least: int) -> int:
    """An integer of at least ``least``."""
    if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
        raise ArgumentError(f"{name} must be a whole number of at least {least}, got {value!r}")
    return int(value)


def share_of(name: str, value: object) -> float:
    """A share between 0 and 1, both excluded, which may be written in percent: ``0.003`` or ``"0.3%"``."""
    try:
        share = fraction(value) if isinstance(value, str) else number(value)
    except ValueError:
        share = math.nan
    if not 0 < share < 1:
        raise ArgumentError(f'{name} must be a share between 0 and 1 such as 0.003 or "0.3%", got {value!r}')
    return share


def fraction(text: str) -> float:
    """A number, which may be written in percent; ValueError for any other text, as parsers of options raise it."""
    digits = text.strip()
    return float(digits[:-1]) / 100 if digits.endswith("%") else float(digits)


def number(value: object) -> float:
    """A finite number as a float; NaN for anything else: no comparison lets that pass."""
    found = finite_number(value)
    return math.nan if found is None else found


def finite_number(value: object) -> float | None:
    """A finite real number as a Python float, which prints and serialises as one; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, Real):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None


def finite_numbers(value: object) -> tuple[float, ...] | None:
    """A list of at least one such number as a tuple; None for anything else."""
    if isinstance(value, str) or not isinstance(value, Sequence) or not value:
        return None
    numbers = tuple(number for number in map(finite_number, value) if number is not None)
    return numbers if len(numbers) == len(value) else None


def byte_size(name: str, value: object) -> int:
    """A number of bytes, or a text such as ``"2GB"``."""
    if not isinstance(value, str):
        return whole_number(name, value, 0)
    try:
        return size(value)
    except ValueError as error:
        raise ArgumentError(f"{name}: {error}") from None


def size(text: str) -> int:
    """Bytes from a text such as ``"2GB"``; ValueError for any other, as parsers of options raise it."""
    upper = text.upper()
    unit = next((unit for unit in _SIZES if upper.endswith(unit)), "")
    try:
        found = int(float(upper.removesuffix(unit)) * _SIZES.get(unit, 1))
    except (ValueError, OverflowError):
        found = -1
    if found < 0:
        raise ValueError(f"expected a size such as 500MB or 2GB, got {text!r}")
    return found


def function(name: str, value: F) -> F:
    """Something to call."""
    if not callable(value):
        raise ArgumentError(f"{name} must be a function, got {value!r}")
    return value


def check_models(models: object, *, named: bool = False) -> None:
    """Several models, not a single one, whose letters or tensors would be taken for models; ``named``: or a mapping."""
    from torch import Tensor, nn

    tensors = isinstance(models, Mapping) and any(isinstance(value, Tensor) for value in models.values())
    if tensors or isinstance(models, str | bytes | os.PathLike | Tensor | nn.Module):
        raise ArgumentError("models must be a list of models, got a single one")
    unordered = isinstance(models, set | frozenset) or (isinstance(models, Mapping) and not named)
    if not isinstance(models, Collection) or unordered:
        raise ArgumentError(f"models must be a list of models, got {type(models).__name__}")


def after(first: Callable[P, Made]) -> Callable[[Callable[[Made], Result]], Callable[P, Result]]:
    """What a function of the result of ``first`` needs instead: the parameters of ``first``, written down once."""

    def decorate(second: Callable[[Made], Result]) -> Callable[P, Result]:
        def both(*args: P.args, **kwargs: P.kwargs) -> Result:
            return second(first(*args, **kwargs))

        whole = signature(first).replace(return_annotation=signature(second).return_annotation)
        update_wrapper(both, second)
        both.__dict__ |= {"__signature__": whole}
        return both

    return decorate
