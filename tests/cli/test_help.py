"""Help, examples and completion, without waiting for torch."""

from __future__ import annotations

import shlex
import subprocess
import sys
import textwrap
from typing import get_args

import pytest
from command_line import COMMANDS, run

import freemerge as fm
from freemerge.cli.commands import Commands
from freemerge.experts.names import Values
from freemerge.experts.values import CODINGS
from freemerge.methods.parameters import parameters_of


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["--help"], 0),
        (["--version"], 0),
        (["merge", "-h"], 0),
        (["completion", "bash"], 0),
        ([], 2),
        (["mrege"], 2),
        (["merge", "base", "-o", "out"], 2),
        (["merge", "base", "model", "-o", "out", "--cutof", "0.1"], 2),
        (["merge", "base", "model", "-o", "out", "--weights", "foo"], 2),
        (["merge", "base", "model", "-o", "out", "--recipe", "nowhere.yaml"], 2),
    ],
)
def test_help_and_wrong_arguments_do_not_wait_for_torch(arguments: list[str], code: int) -> None:
    script = f"""
        import sys
        from freemerge.cli import main
        try:
            code = main({arguments})
        except SystemExit as stop:
            code = stop.code
        assert code == {code}, code
        assert "torch" not in sys.modules
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=True, capture_output=True)


def test_the_help_of_every_command_has_examples_and_needs_no_torch() -> None:
    script = f"""
        import sys
        from freemerge.cli import main
        for name in {COMMANDS}:
            print("command", name)
            try:
                main([name, "--help"])
            except SystemExit as stop:
                assert not stop.code
        assert "torch" not in sys.modules
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=True, capture_output=True, text=True)
    helps = done.stdout.split("command ")[1:]
    assert [help.split()[0] for help in helps] == COMMANDS
    for name, help in zip(COMMANDS, helps, strict=True):
        head, examples = help.split("\nExamples:\n")
        assert examples.startswith(f"  freemerge {name}")
        assert all(word in head for word in ("--json", "--quiet", "--verbose", "Common options:"))


def test_every_example_is_parsed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its command, options and values exist."""
    commands = Commands()
    context = commands.make_context("freemerge", ["demo"])
    for name in COMMANDS:
        command = commands.get_command(context, name)
        assert command is not None
        for line in command.examples.splitlines():  # type: ignore[attr-defined]
            words = shlex.split(line.split(" > ")[0], comments=True)
            used, *words = words[words.index("freemerge") + 1 :]  # torchrun may stand before it
            other = commands.get_command(context, used)
            assert other is not None
            other.make_context(used, words)


def test_the_codings_of_the_command_line_are_those_of_experts() -> None:
    assert set(get_args(Values)) == set(CODINGS)


def test_help_is_as_wide_as_the_terminal(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """But for examples, which are to be copied."""
    monkeypatch.setenv("COLUMNS", "80")
    for name in ([], *([name] for name in COMMANDS if name != "mergekit-yaml")):
        with pytest.raises(SystemExit):
            run(*name, "--help")
        lines = capsys.readouterr().out.split("\nExamples:\n")[0].splitlines()
        assert max(map(len, lines)) <= 80, name


def test_help_lists_every_method_and_parameter(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run("merge", "--help")
    told = capsys.readouterr().out
    assert all(method in told for method in fm.methods.METHODS)
    assert all(
        f"--{name.replace('_', '-')} " in told for cls in fm.methods.METHODS.values() for name in parameters_of(cls)
    )
    told = " ".join(told.split())
    assert "(default auto)" in told
    assert "[ties: 0.2]" in told
    assert "[average: uniform, breadcrumbs: sum," in told


def test_completion(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for shell in ("bash", "zsh", "fish"):
        assert run("completion", shell) == 0
        assert "_FREEMERGE_COMPLETE" in capsys.readouterr().out
    for line, word, expected in (
        ("freemerge an", "1", {"analyze"}),
        ("freemerge merge --metho", "2", {"--method"}),
        ("freemerge merge --method iso", "3", {"iso_c", "iso_cts"}),
        ("freemerge merge --renormalize e", "3", {"energy"}),
        ("freemerge experts --rescale p", "3", {"paper", "projection"}),
        ("freemerge merge --backend c", "3", {"cpu", "cuda"}),
    ):
        monkeypatch.setenv("_FREEMERGE_COMPLETE", "bash_complete")
        monkeypatch.setenv("COMP_WORDS", line)
        monkeypatch.setenv("COMP_CWORD", word)
        assert run() == 0
        assert {answer.split(",")[1] for answer in capsys.readouterr().out.split()} == expected
