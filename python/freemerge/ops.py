"""The filter as operators of torch, ``freemerge::filter`` and ``freemerge::filter_``: for compiled and exported graphs.

They are there once :mod:`freemerge.filter` is imported.

An operator's arguments are tensors, numbers and text, so a response travels as text.
"""

from __future__ import annotations

import ast
from collections.abc import Callable
from functools import lru_cache
from typing import Any, cast
from weakref import WeakValueDictionary

import torch
from torch import Tensor
from torch.compiler import is_compiling

from .errors import ArgumentError
from .responses import RESPONSES, Response, from_config
from .responses.base import ClosedForm

_UNWRITTEN: WeakValueDictionary[str, Response] = WeakValueDictionary()  # responses without a configuration
_COMPILED: dict[Response, Response] = {}  # those that compiled graphs name, which may live as long as the process


def text_of(response: Response) -> str:
    """A response as text, for :func:`response_of`: ``"HighPass|cutoff=0.4|..."``, or the name of a custom one.

    It was written when the response was made, so that torch.compile takes it as it is. A name is good as long as the
    response lives, which compiled graphs see to.
    """
    if type(response).__name__ not in RESPONSES:
        name: str = _name_of(response, is_compiling())
        return name
    return cast(ClosedForm, response)._text


def _name_of(response: Response, compiling: bool) -> str:
    if compiling:
        response = _COMPILED.setdefault(response, response)
    name = f"{type(response).__name__} {hash(response):x} {id(response):x}"
    _UNWRITTEN[name] = response
    return name


# What torch.compiler.assume_constant_result does, which imports all of torch._dynamo first: more than a second.
_name_of._dynamo_marked_constant = True  # type: ignore[attr-defined]


def response_of(text: str) -> Response:
    """The inverse of :func:`text_of`; in the same process for a custom response."""
    return _UNWRITTEN.get(text) or _read(text)


@lru_cache(256)
def _read(text: str) -> Response:
    name, *fields = text.split("|")
    values = (field.partition("=") for field in fields)
    try:
        return from_config({"type": name} | {key: ast.literal_eval(value) for key, _, value in values})
    except (SyntaxError, ValueError) as error:
        raise ArgumentError(f"response {text!r}: {error}") from None


def filter_in_graph(x: Tensor, response: Response, scale: float, backend: str) -> None:
    """The filter in place, as a node of the graph that is traced, with gradients where they are recorded.

    A leaf is updated outside of autograd.
    """
    if x.requires_grad and torch.is_grad_enabled() and not x.is_leaf:
        x.copy_(filtered_in_graph(x, response, scale, backend))
    else:
        torch.ops.freemerge.filter_(x.detach(), text_of(response), float(scale), backend)


def filtered_in_graph(x: Tensor, response: Response, scale: float, backend: str) -> Tensor:
    """The filter to new memory, as a node of a graph: of torch.compile's, or of autograd's."""
    filtered: Tensor = torch.ops.freemerge.filter(x, text_of(response), float(scale), backend)
    return filtered


def define(filter_: Callable[..., Any], filtered: Callable[..., Any]) -> None:
    """Register the operators, whose work these functions do."""

    @torch.library.custom_op("freemerge::filter_", mutates_args={"x"})
    def in_place(x: Tensor, response: str, scale: float = 1.0, backend: str = "auto") -> None:
        filter_(x, response_of(response), scale=scale, backend=backend)

    @in_place.register_fake
    def _(x: Tensor, response: str, scale: float = 1.0, backend: str = "auto") -> None:
        return None

    @torch.library.custom_op("freemerge::filter", mutates_args=())
    def new(x: Tensor, response: str, scale: float = 1.0, backend: str = "auto") -> Tensor:
        result: Tensor = filtered(x, response_of(response), scale=scale, backend=backend)
        return result

    @new.register_fake
    def _(x: Tensor, response: str, scale: float = 1.0, backend: str = "auto") -> Tensor:
        return x.new_empty(x.shape)

    def remember(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, *ctx.options = inputs
        ctx.response = response_of(ctx.options[0])  # which lives until the backward pass

    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        # Gains are real, and so the filter is its own adjoint.
        return torch.ops.freemerge.filter(gradient, *ctx.options), None, None, None

    def batched(info: Any, dims: tuple[Any, ...], x: Tensor, *options: Any) -> tuple[Tensor, int]:
        x = x.movedim(dims[0], 0)
        if x.ndim > 2:
            return new(x, *options), 0
        return torch.stack([new(vector, *options) for vector in x]), 0

    new.register_autograd(backward, setup_context=remember)
    new.register_vmap(batched)
