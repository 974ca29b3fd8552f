"""How far a merge is: bytes read, and the time that is left, over the passes that measure and the one that merges."""

from __future__ import annotations

import json
import sys
import time
from contextlib import suppress
from types import TracebackType
from typing import Any, Literal

from tqdm import tqdm

from ..errors import counted

Style = Literal["bar", "json", "none"]
_EVERY = 1.0  # seconds between lines


class _Bar(tqdm):  # type: ignore[type-arg]
    """A bar whose remaining time is told to it."""

    left = 0.0

    @property
    def format_dict(self) -> dict[str, Any]:
        return {**super().format_dict, "left": self.format_interval(self.left)}

    def display(self, *arguments: Any, **options: Any) -> None:
        with suppress(OSError):  # no merge is given up for its bar
            super().display(*arguments, **options)

    def close(self) -> None:
        with suppress(OSError):
            super().close()


class Progress:
    """A bar, or one JSON object a line, on standard error, as long as it can be written.

    Merging takes longer than measuring, byte for byte: the time that is left is told from the pace of each, and before
    the first tensor is merged from what ``ratio`` promises.

    Args:
        measured, merged: bytes that the passes which measure read, and those that merging reads.
        ratio: how much longer a byte takes to merge than to measure.
        style: "bar", "json" or "none".
    """

    def __init__(self, measured: int, merged: int, *, ratio: float, style: Style) -> None:
        self._totals = {"measure": measured, "merge": merged}
        self._done = {"measure": 0, "merge": 0}
        self._seconds = {"measure": 0.0, "merge": 0.0}
        if style != "none":
            try:
                sys.stderr.flush()
            except (AttributeError, OSError, ValueError):  # there is none, the terminal is gone, or the disk full
                style = "none"
        self._ratio, self._style = ratio, style
        self._tensors = 0
        self._last = self._told = time.monotonic()
        self._bar = _Bar(
            total=measured + merged,
            unit="B",
            unit_scale=True,
            unit_divisor=1000,
            disable=style != "bar",
            file=sys.stderr,
            bar_format="{desc}{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{left}{postfix}]",
        )

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()

    def advance(self, stage: str, read_bytes: int, tensors: int) -> None:
        """Report that ``read_bytes`` more were read to "measure" or to "merge" so many tensors."""
        now = time.monotonic()
        self._seconds[stage] += now - self._last
        self._done[stage] += read_bytes
        self._last = now
        if stage == "merge":
            self._tensors += tensors
        left = self.seconds_left()
        if self._style == "bar":
            self._bar.left = left
            self._bar.set_postfix_str(counted(self._tensors, "tensor") if self._tensors else "measuring", refresh=False)
            self._bar.update(read_bytes)
        elif self._style == "json" and now - self._told >= _EVERY:
            self._told = now
            self.event("progress", **self._counts(), seconds_left=round(left, 1))

    def event(self, kind: str, **content: object) -> None:
        """A line of the log, if there is one."""
        if self._style == "json":
            try:
                print(json.dumps({"event": kind, **content}), file=sys.stderr, flush=True)
            except OSError:  # nobody reads it; the merge goes on
                self._style = "none"

    def seconds_left(self) -> float:
        """The time that is left."""
        left = {stage: max(0, self._totals[stage] - self._done[stage]) for stage in self._totals}
        pace = {stage: self._seconds[stage] / done for stage, done in self._done.items() if done}
        if not pace:
            return 0.0
        pace.setdefault("merge", pace.get("measure", 0.0) * self._ratio)
        return sum(left[stage] * pace.get(stage, 0.0) for stage in left)

    def _counts(self) -> dict[str, object]:
        done, total = sum(self._done.values()), sum(self._totals.values())
        return {"bytes": done, "total_bytes": total, "tensors": self._tensors}
