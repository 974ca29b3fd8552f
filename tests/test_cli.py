"""The command line on real files: exit codes, output, and that flags reach the merge."""

from __future__ import annotations

import errno
import json
import os
import re
import shlex
import subprocess
import sys
import textwrap
from contextlib import nullcontext
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

import freemerge as fm
from freemerge.cli import main
from freemerge.cli.commands import NAMES, Commands
from freemerge.experts.names import Values
from freemerge.experts.values import CODINGS
from freemerge.merging.commented import commented_recipe
from freemerge.merging.recipe import PRESETS, Recipe
from freemerge.methods import METHODS
from freemerge.methods.fr import FR
from freemerge.methods.parameters import parameters_of


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    generator = torch.Generator().manual_seed(0)
    base = {"a.weight": torch.randn(40, 30, generator=generator), "a.bias": torch.randn(40, generator=generator)}
    paths = []
    for i in range(3):
        state = {n: t + 0.01 * i * torch.randn(t.shape, generator=generator) for n, t in base.items()}
        paths.append(str(tmp_path / f"{'base' if i == 0 else f'model-{i}'}.safetensors"))
        save_file(state, paths[-1])
    return paths


def run(*arguments: object) -> int:
    return main([str(argument) for argument in arguments])


def merged(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "model.safetensors")


def test_merge_with_flags(files: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    flags = [
        "--cutoff",
        0.2,
        "--weights",
        "0.5,0.25",
        "--scale",
        0.9,
        "--renormalize",
        "none",
        "--out-dtype",
        "bfloat16",
    ]
    assert run("merge", *files, "-o", out, *flags, "--select", "*.bias=copy") == 0
    captured = capsys.readouterr()
    assert "weights 0.5000, 0.2500; scale 0.9" in captured.out
    assert "tensors" in captured.err, "a progress bar on standard error"
    recipe = fm.Recipe(
        fm.HighPass(0.2),
        weights=[0.5, 0.25],
        scale=0.9,
        renormalize=None,
        out_dtype="bfloat16",
        select=[("*.bias", "copy")],
    )
    expected = fm.merge(files[0], files[1:], recipe)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in merged(out).items())


def test_a_preset_with_an_override(files: list[str], tmp_path: Path) -> None:
    assert run("merge", *files, "-o", tmp_path / "out", "--preset", "official-roberta", "--scale", 0.3) == 0
    expected = fm.merge(files[0], files[1:], fm.Recipe.preset("official-roberta").replace(scale=0.3))
    assert torch.equal(merged(tmp_path / "out")["a.weight"], expected["a.weight"])


def test_a_recipe_file(files: list[str], tmp_path: Path) -> None:
    recipe = fm.Recipe(fm.Gaussian(0.1), weights="uniform")
    (tmp_path / "recipe.yaml").write_text(recipe.to_yaml())
    assert run("merge", *files, "-o", tmp_path / "out", "--recipe", tmp_path / "recipe.yaml") == 0
    assert torch.equal(merged(tmp_path / "out")["a.weight"], fm.merge(files[0], files[1:], recipe)["a.weight"])


def test_a_cutoff_keeps_the_kind_of_response(files: list[str], tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(fm.Recipe(fm.Gaussian(0.1)).to_yaml())
    assert run("merge", *files, "-o", tmp_path / "a", "--recipe", tmp_path / "recipe.yaml", "--cutoff", 0.3) == 0
    assert torch.equal(
        merged(tmp_path / "a")["a.weight"], fm.merge(files[0], files[1:], fm.Recipe(fm.Gaussian(0.3)))["a.weight"]
    )
    assert run("merge", *files, "-o", tmp_path / "b", "--preset", "official-roberta", "--cutoff", 0.3) == 0
    recipe = fm.Recipe.preset("official-roberta").replace(response=fm.HighPass(0.3))
    assert torch.equal(merged(tmp_path / "b")["a.weight"], fm.merge(files[0], files[1:], recipe)["a.weight"])


def test_json_output_is_json_alone(files: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("merge", *files, "-o", tmp_path / "out", "--json") == 0
    captured = capsys.readouterr()
    report = json.loads(captured.out)
    assert sum(report["weights"]) == pytest.approx(1)
    assert captured.err == ""


@pytest.mark.parametrize("cutoff", ["0.7", "0.9", "9"])
def test_a_cutoff_that_removes_nearly_everything_is_told_before_the_merge(
    cutoff: str, files: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    everything = cutoff != "0.7"
    recipe = fm.Recipe(cutoff=float(cutoff))
    told: list[bool] = []
    with pytest.raises(fm.ArgumentError, match="removes the whole spectrum") if everything else nullcontext():
        fm.merge_checkpoints(
            files[0],
            files[1:],
            out := tmp_path / "out",
            recipe,
            progress=False,
            on_start=lambda inspection: told.append(bool(inspection.warnings) and not out.exists()),
        )
    assert told == [True] * (not everything)
    assert bool(fm.inspect(files[0], files[1:], recipe).warnings)
    for again in ([], ["--dry-run"]):
        code = run("merge", *files, "-o", tmp_path / "again", "--cutoff", cutoff, *again, "--force")
        assert code == (2 if everything else 0)
        message = "removes the whole spectrum" if everything else "warning: the filter removes more than 90% of"
        assert message in capsys.readouterr().err
        assert (tmp_path / "again").exists() != everything


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


def test_dry_run_and_inspect_write_nothing(
    files: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(tmp_path.iterdir())
    assert run("merge", *files, "-o", tmp_path / "out", "--dry-run") == 0
    dry = capsys.readouterr().out
    assert run("inspect", *files) == 0
    assert dry.startswith(capsys.readouterr().out)
    assert re.search(r"needs 0\.\d+ GB of memory .*, .* GB of disk, and about .* where the disk keeps up\n$", dry)
    assert sorted(tmp_path.iterdir()) == before
    assert "a.weight" in dry
    assert "40x30" in dry
    assert f"removes {fm.HighPass(0.4).removed_fraction((40, 30)):6.2%}" in dry
    assert "1 tensor filtered, 1 merged unfiltered, 0 copied" in dry


def test_a_method_without_a_filter_is_not_said_to_filter(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = [tmp_path / f"{i}.safetensors" for i in range(3)]
    for path in paths:
        save_file({"a.weight": torch.randn(8, 8), "a.bias": torch.randn(8), "b.running_mean": torch.randn(4)}, path)
    for method, told in (
        ("fr", "1 tensor filtered, 1 merged unfiltered, 0 copied, 1 averaged"),
        ("iso_c", "1 tensor merged as matrices, 1 entry by entry, 0 copied, 1 averaged"),
        ("average", "0 tensors merged as matrices, 2 entry by entry, 0 copied, 1 averaged"),
    ):
        assert run("inspect", *paths, "--method", method) == 0
        assert told in capsys.readouterr().out


def test_inspect_as_json(files: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run("inspect", *files, "--json") == 0
    decisions = json.loads(capsys.readouterr().out)["decisions"]
    assert [decision["action"] for decision in decisions] == ["merge", "filter"]


def test_verify_finds_a_changed_file(files: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    run("merge", *files, "-o", out)
    assert run("verify", out) == 0
    assert "verified" in capsys.readouterr().out
    content = bytearray((out / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (out / "model.safetensors").write_bytes(content)
    assert run("verify", out) == 1
    assert "model.safetensors has changed" in capsys.readouterr().out


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


def test_every_parameter_is_an_option(files: list[str], tmp_path: Path) -> None:
    flags = {
        "weights": "sum", "stats": "filtered", "scope": "tensor", "renormalize": "none", "align": True,
        "sign_election": True, "cutoff": 0.15, "scale": 0.3, "compute_dtype": "float64", "out_dtype": "float16",
    }  # fmt: skip
    known = parameters_of(Recipe).keys() | parameters_of(FR).keys()
    assert flags.keys() == known - {"filter"}, "a new parameter needs a value here; fr takes no other filter"
    options: list[object] = []
    for name, value in flags.items():
        flag = f"--{name.replace('_', '-')}"
        options += [flag] if value is True else [flag, value]
    assert run("merge", *files, "-o", tmp_path / "out", *options) == 0
    expected = Recipe(**{**flags, "renormalize": None}).to_config()
    manifest = json.loads((tmp_path / "out" / "freemerge.json").read_text())
    assert {name: value for name, value in manifest["recipe"].items() if name != "measured"} == expected


def test_another_method_keeps_what_is_common(files: list[str], tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("preset: official-llm\nselect: [{pattern: '*.bias', action: copy}]\n")
    out = tmp_path / "out"
    assert run("merge", *files, "-o", out, "--recipe", tmp_path / "recipe.yaml", "--method", "average") == 0
    recipe = fm.Recipe(method="average", scale=0.88, select=[("*.bias", "copy")])
    expected = fm.merge(files[0], files[1:], recipe)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in merged(out).items())


def test_a_flag_can_be_switched_off(files: list[str], tmp_path: Path) -> None:
    options = ["--preset", "official-llm", "--no-sign-election", "--weights=paper"]
    assert run("merge", *files, "-o", tmp_path / "out", *options) == 0
    recipe = fm.Recipe.preset("official-llm").replace(sign_election=False, weights="magnitude")
    expected = fm.merge(files[0], files[1:], recipe)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in merged(tmp_path / "out").items())


def test_a_dry_run_counts_the_memory_that_was_chosen(
    files: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told = []
    for memory in ("1MB", "3GB"):
        assert run("merge", *files, "-o", tmp_path / "out", "--dry-run", "--json", "--memory", memory) == 0
        told.append(json.loads(capsys.readouterr().out)["memory_bytes"])
    assert told[1] - told[0] == 2_999_000_000


def test_a_dry_run_refuses_what_the_merge_would(files: list[str], tmp_path: Path) -> None:
    assert run("merge", *files, "-o", files[0], "--force", "--dry-run") == 3
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    assert run("merge", *files, "-o", tmp_path / "full", "--dry-run") == 3


@pytest.mark.parametrize("kind", ["recipe", "mergekit"])
def test_an_output_that_holds_its_own_recipe_is_not_replaced(kind: str, files: list[str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert run("merge", *files, "-o", out) == 0
    file = out / "own.yml"
    listed = "".join(f"- {{model: {path}, parameters: {{weight: 1}}}}\n" for path in files[1:])
    config = f"merge_method: task_arithmetic\nbase_model: {files[0]}\ndtype: float32\nmodels:\n{listed}"
    file.write_text("method: task_arithmetic\n" if kind == "recipe" else config)
    inputs = files if kind == "recipe" else []
    for dry in ([], ["--dry-run"]):
        assert run("merge", *inputs, "-o", out, f"--{kind}", file, "--force", *dry) == 3
    assert file.exists()
    assert run("merge", *inputs, "-o", tmp_path / "other", f"--{kind}", file) == 0


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


COMMANDS = [name for name in NAMES if name != "mergekit-yaml"]  # that one is mergekit's


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


@pytest.mark.parametrize(
    "values",
    [
        ["--scale", "0"],
        ["--weights", "0,0"],
        ["--weights", "0,-0.0", "--dry-run"],
        ["--method", "ties", "--density", "0"],
        ["--method", "pcb", "--density", "0", "--dry-run"],
        ["--select", "*=copy"],
        ["--select", "*=copy", "--dry-run"],
    ],
)
def test_a_merge_that_changes_nothing_is_refused(
    values: list[str], files: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("merge", *files, "-o", tmp_path / "out", *values) == 2
    assert "the merged model is the base" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


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
    assert message in json.loads(captured.out)["error"]["message"]


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


def test_verbose_says_where_an_error_was_raised_and_what_happens_to_each_tensor(
    files: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("merge", files[0], tmp_path / "nowhere", "-o", tmp_path / "out", "-v") == 1
    assert "Traceback" in capsys.readouterr().err
    assert run("merge", *files, "-o", tmp_path / "out") == 0
    assert "a.weight" not in capsys.readouterr().err
    assert run("merge", *files, "-o", tmp_path / "out", "--force", "--verbose") == 0
    assert "a.weight" in capsys.readouterr().err


# The keys of --json that stay, as docs/stability.md promises; "a[].b" is one of the objects in a list.
KEYS = {
    "analyze": "base tasks band_edges ranks scales total module_types depths tensors left_out notices advice "
    "tensors[].name tensors[].shape tensors[].module_type tensors[].depth tensors[].measures",
    "backends": "backends backends[].name backends[].available backends[].reason backends[].details",
    "clean": "path nbytes alive holds_output removed",
    "completion": "shell script",
    "diff": "name kind first second largest mean",
    "evaluate": "evaluations evaluations[].label evaluations[].scores",
    "experts": "experts experts[].task experts[].mu experts[].entries experts[].nbytes",
    "init": "method response weights stats scope renormalize align sign_election scale select views compute_dtype "
    "out_dtype",
    "inspect": "decisions warnings read_bytes write_bytes passes measured_bytes memory_bytes seconds decisions[].name "
    "decisions[].shape decisions[].dtype decisions[].action decisions[].seen_as decisions[].stacked_with "
    "decisions[].removed decisions[].backend decisions[].form",
    "lora": "out rank layers kept left_out nbytes",
    "merge": "out weights scale inspection stages stages[].name stages[].seconds stages[].nbytes",
    "schema": "$schema title type properties additionalProperties allOf",
    "tune": "recipe entropies",
    "verify": "problems",
}


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
    assert KEYS.keys() == set(COMMANDS) - {"demo"}, "its keys are the methods that it compares"
    for command, keys in KEYS.items():
        capsys.readouterr()
        assert run(command, *arguments.get(command, []), "--json") == (1 if command == "diff" else 0), command
        captured = capsys.readouterr()
        told = json.loads(captured.out.splitlines()[0])
        inner = {f"{key}[].{name}" for key, value in told.items() if isinstance(value, list)
                 for item in value if isinstance(item, dict) for name in item}  # fmt: skip
        assert set(keys.split()) <= told.keys() | inner, command
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
    ):
        monkeypatch.setenv("_FREEMERGE_COMPLETE", "bash_complete")
        monkeypatch.setenv("COMP_WORDS", line)
        monkeypatch.setenv("COMP_CWORD", word)
        assert run() == 0
        assert {answer.split(",")[1] for answer in capsys.readouterr().out.split()} == expected


def test_init(files: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "recipe.yml"
    options = ["--method", "iso_c", "--filter", "after", "--cutoff", "0.2", "--select", "*.bias=copy"]
    recipe = Recipe(method="iso_c", filter="after", cutoff=0.2, select=[("*.bias", "copy")])
    assert run("init", *files, *options, "-o", file) == 0
    assert run("init", *files, *options) == 0
    assert file.read_text().splitlines()[2:] == capsys.readouterr().out.splitlines()[3:], "the head names the file"
    assert Recipe.from_yaml(file) == recipe
    text = file.read_text()
    assert f"--recipe {file} -o OUT" in text
    assert "# strength of the merged task vector: auto, interference or a finite number\nscale: auto\n" in text
    assert "1 tensor filtered, 0 merged unfiltered, 1 copied" in text
    assert "\nrename: []\n" in text, "defaults, too"
    assert run("merge", *files, "--recipe", file, "-o", tmp_path / "out", "-q") == 0
    expected = fm.merge(files[0], files[1:], recipe)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in merged(tmp_path / "out").items())
    assert run("init", *files, "-o", file) == 3
    assert file.read_text() == text
    assert run("init", *files, "-o", file, "--force") == 0
    assert Recipe.from_yaml(file) == Recipe()
    assert run("init", *files, "-o", file, "--force", "--method", "task_arithmetic", "--weights", "1,2") == 0
    assert {"filter", "layers", "rename"} < set(yaml.safe_load(file.read_text()))
    assert Recipe.from_yaml(file) == Recipe(method="task_arithmetic", weights=[1.0, 2.0])
    assert run("init", files[0], tmp_path / "nowhere") == 1


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
    assert run(command, *files, *options, "-o", tmp_path, "--force") == (2 if command == "analyze" else 3)
    assert "is a directory" in capsys.readouterr().err
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


def test_a_recipe_for_models_whose_names_are_no_text(files: list[str], tmp_path: Path) -> None:
    model = tmp_path / os.fsdecode(b"m\xff.safetensors")
    save_file(load_file(files[1]), model)
    assert run("init", files[0], model, "-o", tmp_path / "recipe.yml") == 0
    assert Recipe.from_yaml(tmp_path / "recipe.yml") == Recipe()


EVERYTHING = Recipe(
    method="task_arithmetic", weights=[0.1, 0.2], layers=[("*.0.*", [0.3, 0.4])], filter="before", cutoff=0.3,
    select=[("*.bias", "copy")], rename=[("a.", "b.")], views=[{"split": "*.qkv", "parts": 3}], out_dtype="float16",
)  # fmt: skip


@pytest.mark.parametrize("recipe", [EVERYTHING, *(Recipe(method=m) for m in METHODS), *map(Recipe.preset, PRESETS)])
def test_a_commented_recipe_is_the_recipe(recipe: Recipe, tmp_path: Path) -> None:
    file = tmp_path / "recipe.yml"
    file.write_text(commented_recipe(recipe, ["one", "", "two"]))
    assert Recipe.from_yaml(file) == recipe
    keys = [line.split(":")[0] for line in file.read_text().splitlines() if line[:1].isalpha()]
    config = recipe.to_config()
    assert [key for key in keys if key in config] == [*config]
    assert set(keys) - set(config) <= {"version", "filter", "layers", "rename"}, (
        "these are left out where they are empty"
    )
    assert {"version", "rename"} < set(keys)


def test_the_codings_of_the_command_line_are_those_of_experts() -> None:
    assert set(get_args(Values)) == set(CODINGS)


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


def test_backends_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("backends") == 0
    assert "torch    available" in capsys.readouterr().out


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
