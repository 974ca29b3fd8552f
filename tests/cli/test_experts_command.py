"""freemerge experts, and freemerge evaluate of models and experts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import run
from safetensors.torch import load_file, save_file

import freemerge as fm


def test_experts(files: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        run("experts", *files, "-o", tmp_path / "experts", "--density", 0.05, "--values", "fp32", "--rescale", 2) == 0
    )
    assert "model-1: 62 entries, mu 2" in capsys.readouterr().out
    expected = fm.extract_experts(files[0], files[1:], density=0.05, values="fp32", rescale=2.0)
    assert sorted(path.name for path in (tmp_path / "experts").iterdir()) == [
        "model-1.safetensors",
        "model-2.safetensors",
    ]
    loaded = fm.Expert.load(tmp_path / "experts" / "model-2.safetensors").dense()
    assert all(torch.equal(tensor, loaded[name]) for name, tensor in expected["model-2"].dense().items())
    assert run("experts", *files, "-o", tmp_path / "experts") == 3
    assert run("experts", *files, "-o", tmp_path / "experts", "--force") == 0


def test_experts_of_low_rank(files: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    size = sum(2 * tensor.numel() for tensor in load_file(files[0]).values() if tensor.is_floating_point())
    budget = ["--backbone", files[1], "--budget", "40%"]
    assert run("experts", *files, "-o", tmp_path / "budget", *budget, "--json") == 0
    assert json.loads(capsys.readouterr().out)["experts"][1]["nbytes"] <= 0.4 * size
    assert run("experts", *files, "-o", tmp_path / "rank", "--backbone", files[1], "--rank", 2) == 0
    for folder, options in (("budget", {"budget": 0.4}), ("rank", {"rank": 2})):
        experts = fm.extract_experts(files[0], files[1:], backbone=files[1], **options)  # type: ignore[arg-type]
        loaded = fm.Expert.load(tmp_path / folder / "model-2.safetensors").dense()
        assert all(torch.equal(tensor, loaded[name]) for name, tensor in experts["model-2"].dense().items())
        assert loaded.keys() == experts["model-2"].tensors.keys()
    assert run("experts", *files, "-o", tmp_path / "both", *budget, "--rank", 2) == 2
    assert run("experts", *files, "-o", tmp_path / "none", "--budget", "1%") == 2


def test_trim_may_be_a_percentage(files: list[str], tmp_path: Path) -> None:
    for folder, share in (("share", "0.1"), ("percent", "10%")):
        assert run("experts", *files, "-o", tmp_path / folder, "--trim", share) == 0
    with pytest.raises(SystemExit, match="2"):
        run("experts", *files, "-o", tmp_path / "no", "--trim", "much")
    share, percent = ((tmp_path / folder / "model-1.safetensors").read_bytes() for folder in ("share", "percent"))
    assert share == percent


def test_an_expert_of_nothing_is_told(files: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The base for a merged model has no directions for gains to be of."""
    assert run("experts", *files, "-o", tmp_path / "gains", "--values", "gains", "--backbone", files[0]) == 0
    assert "model-1: 0 entries, mu 1, 0.00" in (told := capsys.readouterr().out)
    assert told.count("it leaves the merged model as it is") == 2


def test_failed_experts_leave_nothing(files: list[str], tmp_path: Path) -> None:
    state = load_file(files[2])
    state["a.weight"][0, 0] = float("nan")
    save_file(state, files[2])
    before = sorted(tmp_path.iterdir())
    assert run("experts", *files, "-o", tmp_path / "experts") == 1
    assert sorted(tmp_path.iterdir()) == before


def test_evaluate(files: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "score.py").write_text("def score(state):\n    return {'bias': float(state['a.bias'].sum())}\n")
    assert run("evaluate", *files, "--function", f"{tmp_path / 'score.py'}:score", "--json") == 0
    scores = [evaluation["scores"]["bias"] for evaluation in json.loads(capsys.readouterr().out)["evaluations"]]
    assert scores == pytest.approx([float(load_file(path)["a.bias"].sum()) for path in files])
    assert run("evaluate", *files, "--function", "score") == 2


def test_evaluate_experts_that_need_the_base(
    files: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "score.py").write_text(
        "def score(state):\n    return {f'model-{i}': float(state['a.weight'].sum()) for i in (1, 2)}\n"
    )
    merged = tmp_path / "merged"
    assert run("merge", *files, "-o", merged, "--method", "emr") == 0
    assert run("experts", *files, "-o", tmp_path / "masks", "--backbone", merged, "--values", "mask") == 0
    evaluating = ["evaluate", merged, "--function", f"{tmp_path / 'score.py'}:score"]
    capsys.readouterr()
    assert run(*evaluating, "--experts", tmp_path / "masks") == 2
    assert "base must be given" in capsys.readouterr().err
    options = ["--base", files[0], "--backbone", merged, "--json"]
    assert run(*evaluating, "--experts", tmp_path / "masks", *options) == 0
    alone, with_experts = json.loads(capsys.readouterr().out)["evaluations"]
    state = load_file(merged / "model.safetensors")
    bank = fm.ExpertBank.load(state, tmp_path / "masks", base=files[0])
    for task in bank:
        with bank.active(task):
            assert with_experts["scores"][task] == pytest.approx(float(state["a.weight"].sum()))
            assert with_experts["scores"][task] != alone["scores"][task]
    assert run(*evaluating, "--base", files[0]) == 2


def test_evaluate_gains_of_a_rounded_model(
    files: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "score.py").write_text(
        "from safetensors.torch import load_file\n"
        f"OWN = {{f'model-{{i}}': load_file({str(tmp_path)!r} + f'/model-{{i}}.safetensors') for i in (1, 2)}}\n"
        "def score(state):\n"
        "    return {n: -float((state['a.weight'].float() - m['a.weight']).norm()) for n, m in OWN.items()}\n"
    )
    assert run("merge", *files, "-o", tmp_path / "joint", "--method", "jsv", "--scale", 1) == 0
    backbone = tmp_path / "joint" / "model.safetensors"
    rounded = tmp_path / "rounded.safetensors"
    save_file({name: tensor.bfloat16() for name, tensor in load_file(backbone).items()}, rounded)
    assert run("experts", *files, "-o", tmp_path / "gains", "--backbone", backbone, "--values", "gains") == 0
    capsys.readouterr()

    def evaluation(expected: int, *arguments: object) -> Any:
        scoring = ("evaluate", "--function", f"{tmp_path / 'score.py'}:score", "--json")
        assert run(*scoring, "--experts", tmp_path / "gains", *arguments) == expected
        return json.loads(capsys.readouterr().out)

    alone, own = (sum(found["scores"].values()) for found in evaluation(0, backbone, "--base", files[0])["evaluations"])
    assert own > alone
    given = evaluation(0, rounded, "--base", files[0], "--backbone", backbone)["evaluations"][1]
    assert sum(given["scores"].values()) == pytest.approx(own, rel=0.05)
    assert "(--base)" in evaluation(2, backbone)["error"]["message"]
    assert "(--backbone)" in evaluation(2, rounded, "--base", files[0])["error"]["message"]
