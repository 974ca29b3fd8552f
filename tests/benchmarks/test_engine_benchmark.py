"""The benchmark of the engine checks what it times."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import freemerge as fm
from benchmarks import engine, mergekit_jobs
from freemerge.checkpoint import known_hashes


def test_small_tensors_are_timed_and_checked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    report = tmp_path / "report.json"
    arguments = ["engine", "--small", "40", "--models", "2", "--rounds", "1", "--report", str(report)]
    monkeypatch.setattr("sys.argv", [*arguments, "--jobs", "copy", "average"])
    engine.main()
    told = capsys.readouterr().out
    assert "x copy" in told
    rows = json.loads(report.read_text())["rows"]
    assert [row["what"] for row in rows] == ["copy", "average"]
    assert all(row["wall"] > 0 and row["memory"] > 0 for row in rows)


def test_hashes_of_inputs_are_known_before_a_merge_is_timed_that_counts_on_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine.write_models(tmp_path, 3, {"a.weight": (64, 48), "b": (16,)})
    monkeypatch.setattr(known_hashes, "key", lambda path: path.name)  # old enough at once
    monkeypatch.setattr(engine, "in_own_process", lambda job, folder: None)
    with pytest.raises(AssertionError, match="are not known"):
        engine.know_hashes(tmp_path)
    monkeypatch.setattr(engine, "in_own_process", engine.measured)
    monkeypatch.setenv("FREEMERGE_CACHE", str(tmp_path / "hashes"))
    engine.know_hashes(tmp_path)


def test_a_wrong_result_is_refused(tmp_path: Path) -> None:
    engine.write_models(tmp_path, 3, {"a.weight": (64, 48), "b": (16,)})
    recipe = engine.RECIPES["FR-Merging, default"]
    engine.merge(tmp_path, tmp_path / "out", recipe)
    engine.check(tmp_path, tmp_path / "out", recipe)
    state = load_file(tmp_path / "out" / "model.safetensors")
    state["a.weight"] += 0.01 * torch.randn(64, 48, generator=torch.Generator().manual_seed(0))
    save_file(state, tmp_path / "out" / "model.safetensors")
    with pytest.raises(AssertionError, match=r"relative error .* of a\.weight"):
        engine.check(tmp_path, tmp_path / "out", recipe)


def test_every_kind_of_check_refuses_a_model_that_was_not_merged(tmp_path: Path) -> None:
    engine.write_models(tmp_path, 3, engine.shapes_of(1, width=64))
    for method in ("average", "task_arithmetic", "ties", "dare", "emr", "iso_c"):
        recipe, out = engine.RECIPES[method], tmp_path / method
        engine.merge(tmp_path, out, recipe)
        engine.check(tmp_path, out, recipe)
        shutil.copy(tmp_path / "model-0.safetensors", out / "model.safetensors")
        with pytest.raises(AssertionError):
            engine.check(tmp_path, out, recipe)


def test_a_model_for_mergekit_says_what_its_tensors_are(tmp_path: Path) -> None:
    shapes = engine.shapes_of(1, width=256)
    engine.write_models(tmp_path, 2, shapes)
    for file, path in zip(files := engine.inputs(tmp_path), mergekit_jobs.prepare(tmp_path, files), strict=True):
        config = json.loads((path / "config.json").read_text())
        heads = config["num_key_value_heads"] * config["head_dim"]
        assert shapes["model.layers.0.self_attn.v_proj.weight"] == (heads, config["hidden_size"])
        assert shapes["model.layers.0.mlp.down_proj.weight"] == (config["hidden_size"], config["intermediate_size"])
        assert f"model.layers.{config['num_hidden_layers'] - 1}.input_layernorm.weight" in shapes
        assert f"model.layers.{config['num_hidden_layers']}.input_layernorm.weight" not in shapes
        assert (path / "model.safetensors").samefile(file)


def test_the_filter_for_mergekit_is_the_default(tmp_path: Path) -> None:
    engine.write_models(tmp_path, 3, {"a.weight": (64, 48), "b": (16,)})
    recipe = fm.Recipe(weights="uniform", scale=2 * mergekit_jobs.SCALE)
    states = [load_file(path) for path in engine.inputs(tmp_path)]
    merged = fm.merge(states[0], states[1:], recipe)
    for name, expected in merged.items():
        base, *models = (state[name] for state in states)
        found = mergekit_jobs.add_filtered(base.float(), [model.float() for model in models], [mergekit_jobs.SCALE] * 2)
        assert torch.allclose(found, expected.float(), rtol=2**-7, atol=1e-6), name
