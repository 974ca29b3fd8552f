"""Responses as plain data, for recipes and manifests."""

from __future__ import annotations

from dataclasses import fields

from ..errors import ArgumentError, did_you_mean
from .base import RESPONSES, Response
from .custom import Custom


def to_config(response: Response) -> dict[str, object]:
    """A response as plain data, ``{"type": "HighPass", "cutoff": 0.4, ...}``; custom masks cannot be written down."""
    name = type(response).__name__
    if name not in RESPONSES:
        raise ArgumentError(f"response {name} cannot be serialised; use one of {', '.join(sorted(RESPONSES))}")
    return {"type": name, **{f.name: getattr(response, f.name) for f in fields(response)}}


def to_record(response: Response) -> dict[str, object]:
    """For manifests: :func:`to_config`, or what identifies a response that cannot be written down."""
    if type(response).__name__ in RESPONSES:
        return to_config(response)
    return {
        "type": type(response).__name__,
        "mask": response.identity if isinstance(response, Custom) else repr(response),
    }


def from_config(config: object) -> Response:
    """The inverse of :func:`to_config`."""
    kind = config.get("type") if isinstance(config, dict) else None
    if not isinstance(config, dict) or not isinstance(kind, str) or kind not in RESPONSES:
        names = sorted(RESPONSES)
        hint = did_you_mean(kind, names, listed=True)
        raise ArgumentError(f"response must be a mapping with type one of {', '.join(names)}, got {config!r}{hint}")
    options = {key: value for key, value in config.items() if key != "type"}
    cls = RESPONSES[kind]
    known = [f.name for f in fields(cls)]
    for key in options:
        if key not in known:
            hint = did_you_mean(key, known, listed=True)
            raise ArgumentError(f"response {kind} has no option {key!r}, it takes {', '.join(known)}{hint}")
    try:
        return cls(**options)
    except TypeError as error:
        raise ArgumentError(f"response {kind}: {error}") from None
