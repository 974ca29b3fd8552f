"""What goes wrong: exit statuses, one line that names the argument, and nothing half-written."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest
import torch
from command_line import run
from safetensors.torch import load_file, save_file

import freemerge as fm


def test_exit_codes(files: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert run("merge", files[0], tmp_path / "nowhere", "-o", out) == 1
    assert "nowhere" in capsys.readouterr().err
    assert run("merge", *files, "-o", out, "--weights", "1,2,3") == 2
    assert "weights has 3 numbers for 2 models" in capsys.readouterr().err
    assert run("merge", *files, "-o", out, "--preset", "paper", "--recipe", "x.yaml") == 2
    assert "exclude each other" in capsys.readouterr().err
    assert not out.exists()
    assert run("merge", *files, "-o", out) == 0
    assert run("merge", *files, "-o", out) == 3
    assert run("merge", *files, "-o", out, "--force") == 0
    with pytest.raises(SystemExit) as caught:
        run("merge", *files, "-o", out, "--cutof", "0.1")
    assert caught.value.code == 2


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--max-shard-size", "infGB", "expected a size such as"),
        ("--max-shard-size", "5GiB", "expected a size such as"),
        ("--max-shard-size", "5G", "expected a size such as"),
        ("--memory", "-5MB", "expected a size such as"),
    ],
)
def test_misspelt_values(
    option: str, value: str, message: str, files: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        run("merge", *files, "-o", "never", option, value)
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--weights", "foo"],
            "'magnitude', 'uniform', 'sum' or a list of finite numbers, got 'foo'",
        ),
        (["--weights", "0.5;0.5"], "--weights must be"),
        (["--scale", "big"], "--scale must be 'auto', 'interference' or a finite number, got 'big'"),
        (["--stats", "all"], "--stats must be one of 'raw', 'filtered', got 'all'"),
        (["--scope", "row"], "--scope must be one of 'model', 'tensor', got 'row'"),
        (["--renormalize", "no"], "--renormalize must be one of 'none', 'energy', got 'no'"),
        (["--out-dtype", "int8"], "--out-dtype must be one of"),
        (["--cutoff", "-1"], "cutoff must be a finite number >= 0"),
        (["--cutoff", "low"], "--cutoff must be a finite number, got 'low'"),
        (["--method", "average", "--cutoff", "0.1"], "no option --cutoff, which is for --method fr; --filter before"),
        (["--method", "task_arithmetic", "--align"], "method task_arithmetic has no option --align"),
        (["--density", "0.3"], "method fr has no option --density, which is for --method pcb or ties"),
        (["--filter", "after"], "filter: method fr filters by itself"),
        (["--method", "iso_c", "--filter", "both"], "--filter must be one of 'none', 'before', 'after', got 'both'"),
        (["--method", "average", "--weights", "sum"], "--weights must be 'uniform' or a list of finite numbers"),
    ],
)
def test_parameters_that_the_method_does_not_take(
    options: list[str], message: str, files: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("merge", *files, "-o", "never", *options) == 2
    assert message in capsys.readouterr().err
    assert not Path("never").exists()


def test_paths_the_system_refuses(files: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("merge", *files, "-o", tmp_path / ("x" * 300)) == 1
    assert "File name too long" in capsys.readouterr().err
    assert run("merge", "x" * 300, *files, "-o", tmp_path / "out") == 1
    assert "no such file or directory" in capsys.readouterr().err
    (tmp_path / "loop").symlink_to("loop")
    for out in ("loop", "loop/x"):
        assert run("merge", *files, "-o", tmp_path / out) == 1
        assert "cannot write" in capsys.readouterr().err
    with pytest.raises(fm.CheckpointError, match="no such file"):
        fm.merge(files[0], ["x" * 300])
    for arguments in ((files[0], files[1:], "a\0b"), (files[0], ["a\0b"], tmp_path / "out")):
        with pytest.raises(fm.ArgumentError, match=r"must be a path, got 'a\\x00b'"):
            fm.merge_checkpoints(*arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["mrege"], "there is no command 'mrege'; did you mean 'merge'? (see freemerge --help)"),
        (["merge", "a", "b", "-o", "c", "--cutof", "1"], "--cutoff"),
        (["merge", "a", "b", "-o", "c", "--method", "isoc"], "there is no 'isoc'; did you mean 'iso_c'?"),
        (["experts", "a", "b", "-o", "c", "--scope", "rows"], "there is no 'rows'; did you mean 'row'?"),
        (["experts", "a", "b", "-o", "c", "--rescale", "big"], "expected auto, released"),
        (["merge", "a", "b"], "Missing option '-o' / '--out'. (see freemerge merge --help)"),
        (["verify", "a", "--quiet", "--verbose"], "exclude each other"),
        (["completion"], "Missing argument 'SHELL'. One of bash, fish, zsh"),
        (["completion", "tcsh"], "Invalid value for 'SHELL': there is no 'tcsh'; known: bash, fish, zsh"),
    ],
)
def test_wrong_arguments_are_answered_in_a_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        run(*arguments)
    assert caught.value.code == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.startswith("freemerge: ")
    assert captured.err.count("\n") == 1
    with pytest.raises(SystemExit):
        run(*arguments, "--json")
    captured = capsys.readouterr()
    assert captured.err == ""
    told = json.loads(captured.out)["error"]
    assert told["type"] == "ArgumentError"
    assert message in told["message"]


def test_errors_as_json(files: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "file").touch()
    for arguments, kind, code in (
        (["merge", *files, "-o", out], "RefusedError", 3),
        (["merge", *files, "-o", out, "--cutoff", "x"], "ArgumentError", 2),
        (["merge", files[0], tmp_path / "nowhere", "-o", out], "CheckpointError", 1),
        (["clean", tmp_path / "nowhere"], "CheckpointError", 1),
    ):
        assert run(*arguments, "--json") == code
        captured = capsys.readouterr()
        told = json.loads(captured.out)["error"]
        assert (told["type"], told["status"], captured.err) == (kind, code, "")
        assert run(*arguments) == code
        assert capsys.readouterr().err == f"freemerge: {told['message']}\n"
        if arguments[0] == "merge":
            assert run(*arguments, "--log-json") == code
            assert json.loads(capsys.readouterr().err.splitlines()[-1]) == {"event": "error", **told}


@pytest.mark.parametrize("command", ["init", "tune", "analyze"])
def test_a_text_file_takes_the_place_of_no_model_and_is_never_half_written(
    command: str, files: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "data.py").write_text("def logits(state):\n    yield state['a.weight']\n")
    learning = ["--method", "average", "--function", f"{tmp_path / 'data.py'}:logits", "--iterations", 1]
    options = {"tune": learning, "analyze": ["--methods", "average"]}.get(command, [])
    before = Path(files[1]).read_bytes()
    link = tmp_path / "link"
    link.symlink_to(files[1])
    for out in (files[1], link, tmp_path / "NEW.GGUF"):
        assert run(command, *files, *options, "-o", out, "--force") == 2
        assert "has the name of a weight file" in capsys.readouterr().err
    assert run(command, *files, *options, "-o", tmp_path, "--force") == 3
    assert "is a directory" in capsys.readouterr().err
    assert run(command, *files, *options, "-o", tmp_path / "absent" / "text") == 1
    assert "absent is no directory that can be written" in capsys.readouterr().err
    assert Path(files[1]).read_bytes() == before

    text, to_text = tmp_path / "text", tmp_path / "to_text"
    text.write_text("former")
    text.chmod(0o600)
    to_text.symlink_to(text)
    os.mkfifo(tmp_path / "pipe")
    assert run(command, *files, *options, "-o", tmp_path / "pipe", "--force") == 3
    assert "pipe is no file" in capsys.readouterr().err

    def full(self: Path, content: bytes) -> None:
        with self.open("wb") as file:
            file.write(content[:5])
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(Path, "write_bytes", full)
        assert run(command, *files, *options, "-o", to_text, "--force") == 1
    assert f"cannot write {to_text}: No space left on device; the disk is full" in capsys.readouterr().err
    assert text.read_text() == "former"
    assert run(command, *files, *options, "-o", to_text, "--force") == 0
    assert text.read_text() != "former"
    assert text.stat().st_mode & 0o777 == 0o600
    assert to_text.is_symlink()
    assert run(command, *files, *options, "-o", tmp_path / ("r" * 250)) == 0
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("command", ["merge", "init", "analyze", "experts", "lora", "diff", "clean", "verify"])
def test_an_empty_path_is_not_the_current_directory(
    command: str, files: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    save_file(load_file(files[0]), "model.safetensors")
    others = {"clean": [], "verify": [], "diff": files[:1], "lora": [files[1], "--rank", 1]}.get(command, files[1:])
    out = ["-o", tmp_path / "out"] if command in ("merge", "experts", "lora") else []
    with pytest.raises(SystemExit) as caught:
        run(command, "", *others, *out)
    assert caught.value.code == 2
    assert "the path is empty" in capsys.readouterr().err
    with pytest.raises(fm.ArgumentError, match="base must be a path, got ''"):
        fm.merge("", files[1:])


def test_interruption(files: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("freemerge.merging.engine.add_round", interrupt)
    before = sorted(tmp_path.iterdir())
    assert run("merge", *files, "-o", tmp_path / "out") == 130
    assert sorted(tmp_path.iterdir()) == before


def test_control_characters_in_names_do_not_reach_the_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = "a\x1b[31m\x07.weight"
    paths = [tmp_path / f"{i}.safetensors" for i in range(2)]
    save_file({name: torch.ones(8, 8), "b": torch.ones(3)}, paths[0])
    save_file({"b": torch.ones(3)}, paths[1])
    assert run("merge", *paths, "-o", tmp_path / "out") == 1
    assert run("inspect", paths[0], paths[0]) == 0
    captured = capsys.readouterr()
    assert "a\\x1b[31m\\x07.weight" in captured.err
    assert not set("\x1b\x07") & set(captured.err + captured.out)


def test_no_output_takes_the_place_of_an_input_or_lies_in_one(
    files: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    base = tmp_path / "model"
    assert run("merge", *files, "-o", base, "-q") == 0
    program = tmp_path / "data_of_a_module.py"
    program.write_text("def logits(state):\n    yield state['a.weight']\n")
    learning = ["--method", "average", "--function", f"{program}:logits", "--iterations", 1]
    models = [base, files[1]]
    before = {path: path.read_bytes() for path in (*base.iterdir(), program)}
    for command, options, out in (
        ("init", [], base / "config.json"),
        ("init", [], base / "recipe.yml"),
        ("analyze", ["--methods", "average"], base / "README.md"),
        ("tune", learning, base / "README.md"),
        ("tune", learning, program),
        ("tune", [*learning, "--function", f"{program.stem}:logits"], program),
        ("experts", [], base / "experts"),
    ):
        forced = [] if command == "experts" else ["--force"]
        assert run(command, *models, *options, "-o", out, *forced) == 3, (command, out)
        assert "an input" in capsys.readouterr().err
    assert run("init", *models, "-o", tmp_path / "model.safetensors.index.json") == 2
    index = tmp_path / "sharded" / "model.safetensors.index.json"
    assert run("merge", *files, "-o", index.parent, "--max-shard-size", "1KB", "-q") == 0
    (index.parent / "config.json").write_text("{}")
    assert run("init", index, files[1], "-o", index.parent / "config.json", "--force") == 3
    assert f"is inside of an input ({index.parent})" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in (*base.iterdir(), program)} == before
    assert run("init", base / "model.safetensors", files[1], "-o", base / "config.json") == 3
    assert "is beside an input" in capsys.readouterr().err
    assert run("init", *models, "-o", tmp_path / "recipe.yml") == 0  # beside them
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    assert run("analyze", loop, files[1], "-o", tmp_path / "report.html") in (1, 2)
    assert "loop" in capsys.readouterr().err
