"""A progress bar in bytes: tensors are too unequal to count."""

from __future__ import annotations

import sys
from types import TracebackType

from tqdm import tqdm


class Progress:
    """Bytes read so far, bytes per second and time left, on standard error."""

    def __init__(self, total_bytes: int, *, enabled: bool) -> None:
        self._bar = tqdm(
            total=total_bytes, unit="B", unit_scale=True, unit_divisor=1000, disable=not enabled, file=sys.stderr
        )
        self._tensors = 0

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()

    def advance(self, read_bytes: int, tensors: int = 1) -> None:
        """Report that ``tensors`` tensors with ``read_bytes`` bytes of input are done."""
        self._tensors += tensors
        self._bar.set_postfix_str(f"{self._tensors} tensors", refresh=False)
        self._bar.update(read_bytes)
