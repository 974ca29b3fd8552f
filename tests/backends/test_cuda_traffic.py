"""The documented traffic of the CUDA backend is what its plans say."""

from __future__ import annotations

from pathlib import Path

import torch

import freemerge as fm
from benchmarks.traffic_table import best, merge_table, table


def test_the_documented_tables_are_current() -> None:
    docs = (Path(__file__).parents[2] / "docs" / "cuda.md").read_text(encoding="utf-8")
    for current in (table(), merge_table()):
        assert current in docs, "run python -m benchmarks.traffic_table and paste its tables"


def test_small_cutoffs_move_the_floor_and_no_form_more_than_half_of_torch() -> None:
    assert best((4096, 4096), fm.HighPass(0.05), torch.float32).per_element("matrix", "spectrum") == 12
    assert best((4096, 4096), fm.HighPass(0.05), torch.bfloat16).per_element("matrix", "spectrum") == 6
    for shape in ((4096, 4096), (4096, 11008)):
        assert best(shape, fm.HighPass(0.05), torch.float32).per_element("panel") <= 2.5
    for response in (fm.HighPass(0.4), fm.Official(), fm.Butterworth(0.1)):
        assert best((4096, 4096), response, torch.float32).per_element("matrix", "spectrum") <= 25
