"""``python -m freemerge``: the command line."""

from .cli import main

raise SystemExit(main())
