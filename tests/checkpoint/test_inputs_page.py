"""docs/inputs.md names what the code decides."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import pytest

from freemerge.checkpoint.adapter_config import _INITIALISATIONS, _PEFT_CANNOT_MERGE
from freemerge.checkpoint.locate import PICKLE_SUFFIXES
from freemerge.checkpoint.quantised import _PACKED
from freemerge.merging.selection import Action

PAGE = (Path(__file__).parents[2] / "docs" / "inputs.md").read_text()


@pytest.mark.parametrize(
    "word",
    [
        *sorted(PICKLE_SUFFIXES), *get_args(Action), *sorted(_INITIALISATIONS), *_PEFT_CANNOT_MERGE,
        *(name for kind in _PACKED for name in kind.partition(",")[0].split(" or ")),
        *("MXFP4", "GGUF", "--rename", "--tokenizer-from"),
    ],
)  # fmt: skip
def test_the_page_names(word: str) -> None:
    assert word in PAGE
