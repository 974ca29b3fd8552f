"""How long a merge will take: its work on a small matrix in memory, scaled to the size of the models."""

from __future__ import annotations

import hashlib
import os
import time
from contextlib import ExitStack
from dataclasses import dataclass
from tempfile import TemporaryFile

import torch

from ..checkpoint import Checkpoint, Inputs
from ..errors import FreemergeError
from .engine import Merger
from .recipe import Recipe

_SIDE = 512


@dataclass(frozen=True)
class Pace:
    """Seconds for a byte that is measured, merged (of what is read) and hashed."""

    measure: float
    merge: float
    hash: float

    @property
    def ratio(self) -> float:
        """How much longer a byte takes to merge than to measure."""
        return self.merge / self.measure if self.measure else 1.0

    def seconds(self, measured: int, merged: int, hashed: int) -> float:
        """An estimate for a merge of so many bytes, whose files come from and go to a disk that is no slower."""
        hashing = self.hash * hashed / (os.cpu_count() or 1)  # beside the rest where there are processors for it
        return self.measure * measured + self.merge * merged + hashing


def pace(recipe: Recipe, count: int, backend: str) -> Pace | None:
    """The pace of this machine at a recipe with ``count`` models; None where no small merge stands in for it."""
    try:
        return _timed(_stand_in(recipe, count), count, backend)
    except (FreemergeError, RuntimeError, ValueError, MemoryError):  # a mask for one shape, say, or a full GPU
        return None  # an estimate must not end the merge that it is about


def _stand_in(recipe: Recipe, count: int) -> Recipe:
    """A recipe of the same work: without what goes by tensors' names, and without numbers that noise may overflow."""
    method = recipe.method
    if isinstance(method.weights, tuple):
        method = method.replace(weights=(1 / count,) * count)
    scale = recipe.scale if recipe.global_scale(count) is None else 1.0
    return Recipe(method=method, scale=scale, filter=recipe.filter, compute_dtype=recipe.compute_dtype)


def _timed(recipe: Recipe, count: int, backend: str) -> Pace:
    generator = torch.Generator().manual_seed(0)
    noise = [
        torch.randn(_SIDE, _SIDE, generator=generator, dtype=torch.float32, device="cpu").bfloat16()
        for _ in range(count + 1)
    ]
    states = [{"x.weight": tensor} for tensor in noise]
    base, *models = map(Checkpoint.open, states)
    merger = Merger(Inputs(base, models), recipe, backend)
    (unit,) = merger.steps
    measuring = merging = float("inf")
    with ExitStack() as stack:
        if merger.bytes.keepable(merger.steps):
            merger.keep_in(stack.enter_context(TemporaryFile(buffering=0)))
        for _ in range(2):  # tables are made in the first
            begin = time.perf_counter()
            measured = merger.measure()
            middle = time.perf_counter()
            merger.merged(unit, measured)
            measuring, merging = min(measuring, middle - begin), min(merging, time.perf_counter() - middle)
    inspection = merger.inspect()
    block = bytes(1 << 22)
    begin = time.perf_counter()
    hashlib.sha256(block)
    hashing = (time.perf_counter() - begin) / len(block)
    merged = inspection.read_bytes - inspection.measured_bytes
    measuring = measuring / inspection.measured_bytes if inspection.measured_bytes else 0.0
    return Pace(measuring, merging / merged, hashing)
