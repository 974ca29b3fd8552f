"""freemerge demo."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from command_line import run


def test_the_demo_keeps_out_of_a_directory_in_use(files: list[str], tmp_path: Path) -> None:
    before = Path(files[0]).read_bytes()
    assert run("demo", "--keep", tmp_path) == 3
    assert run("demo", "--keep", files[0]) == 3
    assert Path(files[0]).read_bytes() == before
    assert run("demo", "--seed", -1) == 2


def test_the_demo_without_its_digits_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    assert run("demo", "--keep", tmp_path / "digits") == 1
    assert "the demo needs scikit-learn" in capsys.readouterr().err
    assert not (tmp_path / "digits").exists()


def test_the_demo_says_no_more_than_is_asked_for(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def run_demo(**_: object) -> dict[str, dict[str, float]]:
        print("a table")
        print("training", file=sys.stderr)
        return {}

    monkeypatch.setattr("freemerge.demo.run_demo", run_demo)
    for options, expected in (([], ("a table\n", "training\n")), (["--json"], ("{}\n", "")), (["-q"], ("", ""))):
        assert run("demo", *options) == 0
        assert capsys.readouterr() == expected


def test_demo(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("sklearn")
    from freemerge.demo import TASKS, run_demo

    table = run_demo(seed=1, keep=tmp_path)
    means = {method: sum(row.values()) / len(row) for method, row in table.items()}
    assert means["individual"] > 90, "the fine-tuned models learned their tasks"
    assert means["pretrained"] < means["FR-Merging"] < means["individual"]
    assert means["pretrained"] < means["task arithmetic"]
    assert means["FR-Merging"] < means["Iso-C"] < means["individual"]
    for backbone in ("FR-Merging", "Iso-C"):
        for kind in ("1 % entries", "low rank"):
            assert means[backbone] < means[f"{backbone} + {kind}"] < means["individual"]
            assert means["pretrained"] < means[f"{backbone} + {kind}, router"]
    assert means["JSV"] < means["JSV + gains"] < means["JSV + gains, low rank"] < means["individual"]
    assert (tmp_path / "FR-Merging" / "freemerge.json").exists()
    assert len(TASKS) >= 4
    assert "FR-Merging" in capsys.readouterr().out
