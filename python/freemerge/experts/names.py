"""Codings and scopes of experts by name, which arguments and the command line list without an import of torch."""

from __future__ import annotations

from typing import Literal

#: One of each file in values/.
Values = Literal["fp32", "bf16", "fp16", "int8", "sign", "svd2", "svd16", "mask", "gains"]

#: Over what the largest entries are kept.
Scope = Literal["tensor", "row", "model"]
