"""The user's functions on the command line: their failures are told as theirs, and what they print is no result."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from command_line import run

import freemerge as fm
from freemerge.evaluation import evaluate, load_function

SOURCE = """\
import sys

import torch

print("loading data...")


def fine(state):
    print("scoring")
    return 1.0


@torch.no_grad()
def boom(state):
    return json.loads("{")


def leaves(state):
    sys.exit(0)


def absent(state):
    return open("absent.csv")


def logits(state):
    print("a batch")
    yield state["a.weight"]


def stops(state):
    yield state["a.weight"]
    raise LookupError("no more")


def interrupted(state):
    raise KeyboardInterrupt
"""


@pytest.fixture
def bad(tmp_path: Path) -> Path:
    (tmp_path / "bad.py").write_text(SOURCE)
    return tmp_path / "bad.py"


def command(name: str, files: list[str], reference: str) -> list[object]:
    if name == "evaluate":
        return [name, files[0], "--function", reference]
    learning = ["--method", "average", "--iterations", 1, "-o", Path(files[0]).with_name("recipe.yml")]
    return [name, *files, *learning, "--function", reference]


@pytest.mark.parametrize("name", ["evaluate", "tune"])
@pytest.mark.parametrize(
    ("function", "message", "line"),
    [
        ("boom", "NameError: name 'json' is not defined", 15),
        ("leaves", "SystemExit: 0", 19),
        ("absent", "absent.csv", 23),
    ],
)
def test_a_failing_function_is_named_with_its_line(
    name: str, function: str, message: str, line: int, files: list[str], bad: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = command(name, files, f"{bad}:{function}")
    assert run(*arguments, "--json") == 2
    captured = capsys.readouterr()
    told = json.loads(captured.out)["error"]
    assert (told["type"], captured.err) == ("ArgumentError", "loading data...\n")
    assert f"function {bad}:{function}: " in told["message"]
    assert message in told["message"]
    assert told["message"].endswith(f"(at {bad}:{line})")
    assert run(*arguments) == 2
    assert "Traceback" not in capsys.readouterr().err
    assert run(*arguments, "-v") == 2
    assert f'"{bad}", line {line}' in capsys.readouterr().err


def test_a_generator_that_fails_is_named(files: list[str], bad: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*command("tune", files, f"{bad}:stops")) == 2
    assert f"bad.py:stops: LookupError: no more (at {bad}:33)" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["def f(:\n", "raise SystemExit(0)\n", "1 / 0\n"])
def test_a_file_that_fails_is_named(
    text: str, files: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "broken.py").write_text(text)
    assert run(*command("evaluate", files, f"{tmp_path / 'broken.py'}:f")) == 2
    told = capsys.readouterr().err
    assert "broken.py" in told.split(": ", 2)[2], "the place"
    assert told.count("\n") == 1


def test_an_interruption_stays_one(files: list[str], bad: Path) -> None:
    assert run(*command("evaluate", files, f"{bad}:interrupted")) == 130


@pytest.mark.parametrize("name", ["evaluate", "tune"])
def test_what_a_function_prints_is_no_result(
    name: str, files: list[str], bad: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = command(name, files, f"{bad}:{'fine' if name == 'evaluate' else 'logits'}")
    assert run(*arguments, "--json") == 0
    captured = capsys.readouterr()
    assert isinstance(json.loads(captured.out), dict)
    assert captured.err.startswith("loading data...\n")
    assert run(*arguments, "-q", *(["--force"] if name == "tune" else [])) == 0
    assert capsys.readouterr().out == ""


def test_in_python_errors_of_the_function_stay_as_they_are(files: list[str], bad: Path) -> None:
    with pytest.raises(NameError):
        evaluate(files[0], load_function(f"{bad}:boom"))
    with pytest.raises(LookupError, match="no more"):
        fm.tune(files[0], files[1:], fm.Recipe(method="average"), load_function(f"{bad}:stops"), iterations=1)


def test_models_of_one_name_are_told_apart(
    files: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = [tmp_path / task / "checkpoint-500" for task in ("math", "code")]
    for path, file in zip(paths, files[1:], strict=True):
        path.mkdir(parents=True)
        shutil.copy(file, path / "model.safetensors")
    assert run("evaluate", *paths, files[0], paths[0], "--function", "builtins:len", "--json") == 0
    labels = [evaluation["label"] for evaluation in json.loads(capsys.readouterr().out)["evaluations"]]
    unique = f"{tmp_path.name}/base.safetensors"
    assert labels == ["math-checkpoint-500", "code-checkpoint-500", unique, "math-checkpoint-500"]
    assert run("experts", *files[:1], *paths, "-o", tmp_path / "experts", "-q") == 0
    scores = tmp_path / "scores.py"
    scores.write_text("def f(state):\n    return {'math-checkpoint-500': 1, 'code-checkpoint-500': 0}\n")
    experts = ["--experts", tmp_path / "experts", "--function", f"{scores}:f"]
    assert run("evaluate", *paths, *experts, "--json") == 0
    last = json.loads(capsys.readouterr().out)["evaluations"][-1]["label"]
    assert last == "math-checkpoint-500 with experts"
    assert run("merge", files[0], *paths, "-o", tmp_path / "out", "-q") == 0
    card = (tmp_path / "out" / "README.md").read_text()
    assert "# Merge of math-checkpoint-500 and code-checkpoint-500\n" in card
    assert "- `math-checkpoint-500`\n- `code-checkpoint-500`\n" in card
