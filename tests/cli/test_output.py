"""What every command has: --json, --quiet, --verbose, and readers that stop early."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from command_line import COMMANDS, run

import freemerge as fm


def test_json_output_is_json_alone(files: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("merge", *files, "-o", tmp_path / "out", "--json") == 0
    captured = capsys.readouterr()
    report = json.loads(captured.out)
    assert sum(report["weights"]) == pytest.approx(1)
    assert captured.err == ""


def test_inspect_as_json(files: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run("inspect", *files, "--json") == 0
    decisions = json.loads(capsys.readouterr().out)["decisions"]
    assert [decision["action"] for decision in decisions] == ["merge", "filter"]


PAGE = Path(__file__).resolve().parents[2] / "docs" / "command-line.md"


def documented_keys() -> dict[str, set[str]]:
    """Of each command: the page's table, which docs/stability.md promises to stay."""
    table = PAGE.read_text().split("| command | keys |\n|---|---|\n")[1].split("\n\n")[0]
    rows = [re.findall(r"`([^`]+)`", line) for line in table.splitlines()]
    return {command: set(keys) for command, *keys in rows}


def test_the_keys_of_json_stay(files: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run("merge", *files, "-o", tmp_path / "merged", "--quiet")
    (tmp_path / "folder" / ".a.freemerge-tmp").mkdir(parents=True)
    (tmp_path / "data.py").write_text("def logits(state):\n    yield state['a.weight']\n")
    learning = ["--method", "average", "--function", f"{tmp_path / 'data.py'}:logits", "--iterations", 1]
    out = tmp_path / "out"
    arguments: dict[str, list[object]] = {
        "analyze": [*files, "--methods", "average"],
        "clean": [tmp_path / "folder"],
        "completion": ["bash"],
        "diff": files[:2],
        "evaluate": [files[0], "--function", "builtins:len"],
        "experts": [*files, "-o", out / "experts"],
        "init": files,
        "inspect": files,
        "lora": [*files[:2], "--rank", 2, "-o", out / "lora"],
        "merge": [*files, "-o", out / "merged"],
        "tune": [*files, *learning, "-o", tmp_path / "recipe.yml"],
        "verify": [tmp_path / "merged"],
    }
    assert documented_keys().keys() == set(COMMANDS) - {"demo"}, "its keys are the methods that it compares"
    for command, keys in documented_keys().items():
        capsys.readouterr()
        assert run(command, *arguments.get(command, []), "--json") == (1 if command == "diff" else 0), command
        captured = capsys.readouterr()
        told = json.loads(captured.out.splitlines()[0])
        inner = {f"{key}[].{name}" for key, value in told.items() if isinstance(value, list)
                 for item in value if isinstance(item, dict) for name in item}  # fmt: skip
        assert keys <= told.keys() | inner, command
        assert told.keys() <= keys or command == "init", command
        assert captured.err == "", command


@pytest.mark.parametrize("command", ["verify", "backends", "clean", "schema", "experts", "init", "evaluate"])
def test_json_and_quiet_of_every_command(
    command: str, files: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run("merge", *files, "-o", tmp_path / "merged", "--quiet")
    (tmp_path / ".a.freemerge-tmp").mkdir()
    arguments: list[object] = {
        "verify": [tmp_path / "merged"],
        "clean": [tmp_path, "--dry-run"],
        "experts": [*files, "-o", tmp_path / "a"],
        "init": files,
        "evaluate": [files[0], "--function", "builtins:len"],
    }.get(command, [])
    capsys.readouterr()
    assert run(command, *arguments, "--json") == 0
    captured = capsys.readouterr()
    assert isinstance(json.loads(captured.out), dict)
    assert captured.err == ""
    if command == "experts":
        arguments[-1] = tmp_path / "b"
    assert run(command, *arguments, "-q") == 0
    assert capsys.readouterr() == ("", "")


def test_verbose_says_where_an_error_was_raised_and_what_happens_to_each_tensor(
    files: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("merge", files[0], tmp_path / "nowhere", "-o", tmp_path / "out", "-v") == 1
    assert "Traceback" in capsys.readouterr().err
    assert run("merge", *files, "-o", tmp_path / "out") == 0
    assert "a.weight" not in capsys.readouterr().err
    assert run("merge", *files, "-o", tmp_path / "out", "--force", "--verbose") == 0
    assert "a.weight" in capsys.readouterr().err


COMMAND = [sys.executable, "-m", "freemerge"]


@pytest.mark.parametrize("arguments", [["inspect"], ["verify", "nowhere", "--json"], ["verify", "--json"]])
def test_a_reader_that_stops_early_is_no_error_message(arguments: list[str], files: list[str]) -> None:
    command = [*COMMAND, *arguments, *(files if arguments == ["inspect"] else [])]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait() == 1


def test_streams_that_are_closed_or_have_few_characters(files: list[str], tmp_path: Path) -> None:
    for closed in (">&-", "2>&-", ">&- 2>&-"):
        out = tmp_path / closed
        command = [*COMMAND, "merge", *files, "-o", str(out)]
        done = subprocess.run(["sh", "-c", f'exec "$@" {closed}', "sh", *command], capture_output=True, text=True)
        assert (done.returncode, "Traceback" in done.stderr) == (0, False), closed
        assert fm.verify(out) == []
    shell = [*COMMAND, "analyze", *files[:2], "--methods", "average"]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    told = subprocess.run(shell, check=True, capture_output=True, text=True, env=environment).stdout
    assert r"cosine \u2013" in told, "of one model there is none"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no device that is always full")
@pytest.mark.parametrize("options", [[], ["--json"], ["--log-json"]])
def test_a_result_that_cannot_be_printed_is_no_failed_merge(
    options: list[str], files: list[str], tmp_path: Path
) -> None:
    command = [*COMMAND, "merge", *files, "-o", str(tmp_path / "out"), *options]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
        listed = subprocess.run([*COMMAND, "backends"], stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 1
    told = f"the result cannot be printed: No space left on device; {tmp_path / 'out'} was written"
    last = done.stderr.splitlines()[-1]
    assert (json.loads(last)["message"] if options == ["--log-json"] else last.removeprefix("freemerge: ")) == told
    assert fm.verify(tmp_path / "out") == []
    assert listed.stderr == "freemerge: the result cannot be printed: No space left on device\n"
    assert listed.returncode == 1


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no device that is always full")
@pytest.mark.parametrize("options", [[], ["--log-json"], ["--verbose"]])
@pytest.mark.parametrize("sink", ["full", "pipe"])
def test_a_merge_goes_on_when_standard_error_cannot_be_written(
    options: list[str], sink: str, files: list[str], tmp_path: Path
) -> None:
    command = [*COMMAND, "merge", *files, "--cutoff", "0.8", *options, "-o", str(tmp_path / "out")]
    if sink == "full":
        stream = os.open("/dev/full", os.O_WRONLY)
    else:
        reader, stream = os.pipe()
        os.close(reader)
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=stream, text=True)
        assert done.returncode == 0
        assert str(tmp_path / "out") in done.stdout
        assert fm.verify(tmp_path / "out") == []
        assert subprocess.run(command, stdout=subprocess.PIPE, stderr=stream).returncode == 3, "the status stays"
    finally:
        os.close(stream)


def test_backends_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("backends") == 0
    assert "torch    available" in capsys.readouterr().out


def test_clean_says_when_there_is_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("clean", tmp_path) == 0
    assert capsys.readouterr() == ("", f"{tmp_path}: killed runs left nothing here\n")
    for option in ("--json", "--quiet"):
        assert run("clean", tmp_path, option) == 0
        assert capsys.readouterr() == ("", "")


def test_json_beside_quiet_and_verbose(files: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("inspect", *files, "--json", "--quiet") == 0
    captured = capsys.readouterr()
    assert (json.loads(captured.out).keys() > {"decisions"}, captured.err) == (True, "")
    assert run("merge", *files, "-o", tmp_path / "out", "--json", "--verbose") == 0
    assert capsys.readouterr().err == ""
    assert run("inspect", files[0], tmp_path / "nowhere", "--json", "--verbose") == 1
    captured = capsys.readouterr()
    assert (json.loads(captured.out).keys(), "Traceback" in captured.err) == ({"error"}, True)


def test_an_expert_given_twice_is_refused_in_words_for_paths(
    files: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("experts", *files, files[1], "-o", tmp_path / "experts") == 2
    assert "two are called 'model-1'; each needs a path of its own" in capsys.readouterr().err
