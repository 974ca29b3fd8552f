"""The ``freemerge`` command, and ``python -m freemerge``."""

from __future__ import annotations

import sys

from .signals import Stop, stops


def main() -> int:
    """Run the command line, which takes a moment to import, and return its exit code."""
    with stops():
        try:
            from .cli import main

            return main()
        except Stop as stop:
            print(f"freemerge: {stop}; no output was written", file=sys.stderr)
            return stop.code


if __name__ == "__main__":
    raise SystemExit(main())
