"""The cost of methods is measured on answers that are right."""

import json
from pathlib import Path

import pytest

from benchmarks import methods
from freemerge.methods import METHODS, WUDI


@pytest.mark.parametrize("method", sorted(METHODS))
@pytest.mark.parametrize("kind", ["full", "rank 16"])
def test_every_method_passes_the_check(method: str, kind: str) -> None:
    methods.check(method, 4, kind)


def test_a_wrong_answer_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(WUDI, "_way", lambda self, values, corrected: 0 * values)
    with pytest.raises(AssertionError, match="wudi: not the formula"):
        methods.check("wudi", 4, "full")


def test_a_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ["--shape", "64", "96", "--models", "2", "--filter", "before", "--report", str(tmp_path / "r.json")]
    monkeypatch.setattr("sys.argv", ["methods", *arguments, "--method", "ties", "iso_c"])
    methods.main()
    rows = json.loads((tmp_path / "r.json").read_text())["rows"]
    assert [(row["method"], row["task_vectors"]) for row in rows] == [
        (method, kind) for kind in ("full", "rank 16") for method in ("ties", "iso_c")
    ]
    assert all(row["wall_s"] > 0 and row["declared_gb"] > 0 for row in rows)
