"""freemerge merge and inspect on real files: flags reach the merge, and what would go wrong is told first."""

from __future__ import annotations

import json
import re
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from command_line import merged, run
from safetensors.torch import save_file

import freemerge as fm
from freemerge.merging.recipe import Recipe
from freemerge.methods.fr import FR
from freemerge.methods.parameters import parameters_of


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


def test_shares_may_be_percentages(files: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for method, option, share in (("ties", "density", 0.3), ("dare", "drop", 0.25), ("breadcrumbs", "gamma", 0.01)):
        told = []
        for text in (str(share), f"{share:.0%}"):
            assert run("init", *files, "--method", method, f"--{option}", text, "--json") == 0
            told.append(json.loads(capsys.readouterr().out)[option])
        assert told == [share, share]
    for wrong in ("101%", "%", "30 percent"):
        assert run("init", *files, "--method", "ties", "--density", wrong) == 2
        assert f"--density must be a number from 0 to 1, got {wrong!r}" in capsys.readouterr().err


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
