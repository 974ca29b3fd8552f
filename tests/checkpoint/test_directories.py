"""Directories as transformers, diffusers, trainers and torch write them: read, or refused with the way to a model."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import freemerge as fm
from freemerge.checkpoint import Checkpoint
from in_memory import same

BASE = {"a.weight": torch.arange(32.0).reshape(4, 8), "b.weight": torch.arange(8.0), "c.weight": torch.eye(3)}
TUNED = {name: tensor + 1 for name, tensor in BASE.items()}
EXACT = fm.Recipe(weights=(1.0,), scale=1.0, select=[fm.Rule("*", "merge")])


def save(tensors: dict[str, Tensor], path: Path) -> None:
    path.parent.mkdir(exist_ok=True, parents=True)
    if path.suffix == ".safetensors":
        save_file(tensors, path, metadata={"format": "pt"})
    else:
        torch.save(tensors, path)


def sharded(folder: Path, stem: str, suffix: str = ".safetensors", extra: str = "") -> None:
    files = {name: f"{stem}-{i:05d}-of-00003{suffix}" for i, name in enumerate(TUNED, 1)}
    for name, file in files.items():
        save({name: TUNED[name]}, folder / file)
    (folder / f"{stem}{suffix}.index.json").write_text(json.dumps({"weight_map": files}))


READ: dict[str, Callable[[Path], object]] = {
    "transformers": lambda p: save(TUNED, p / "model.safetensors"),
    "transformers, shards": lambda p: sharded(p, "model"),
    "transformers, torch shards": lambda p: sharded(p, "pytorch_model", ".bin"),
    "diffusers": lambda p: save(TUNED, p / "diffusion_pytorch_model.safetensors"),
    "diffusers, shards": lambda p: sharded(p, "diffusion_pytorch_model"),
    "diffusers, torch": lambda p: save(TUNED, p / "diffusion_pytorch_model.bin"),
    "diffusers beside a variant": lambda p: (
        save(TUNED, p / "diffusion_pytorch_model.safetensors"),
        save(BASE, p / "diffusion_pytorch_model.fp16.safetensors"),
    ),
    "transformers beside other formats": lambda p: (
        save(TUNED, p / "model.safetensors"), save(BASE, p / "pytorch_model.bin"), save(BASE, p / "consolidated.pth"),
    ),
    "a variant alone": lambda p: save(TUNED, p / "model.fp16.safetensors"),
    "another index": lambda p: sharded(p, "flux1"),
    "one torch file": lambda p: save(TUNED, p / "checkpoint.pt"),
    "a trainer's records beside": lambda p: (
        save(TUNED, p / "best.ckpt"), save(BASE, p / "optimizer.pt"), save(BASE, p / "training_args.bin"),
        save(BASE, p / "rng_state_0.pth"), save(BASE, p / "scheduler.bin"),
    ),
    "Llama's original": lambda p: save(TUNED, p / "consolidated.00.pth"),
}  # fmt: skip


@pytest.mark.parametrize("kind", READ)
def test_what_is_read(kind: str, tmp_path: Path) -> None:
    READ[kind](tmp_path / "model")
    assert same(fm.merge(BASE, [tmp_path / "model"], EXACT), TUNED)
    assert fm.inspect(BASE, [tmp_path / "model"], EXACT).warnings == ()


INSIDE: dict[str, Callable[[Path], object]] = {
    "a pipeline": lambda p: save(TUNED, p / "unet" / "diffusion_pytorch_model.safetensors"),
    "a trainer's output": lambda p: save(TUNED, p / "checkpoint-100" / "model.safetensors"),
    "snapshots": lambda p: save(TUNED, p / "c0ffee" / "pytorch_model.bin"),
}


@pytest.mark.parametrize("kind", INSIDE)
def test_the_directories_inside_are_named_and_can_be_given(kind: str, tmp_path: Path) -> None:
    INSIDE[kind](tmp_path / "top")
    (tmp_path / "top" / "logs").mkdir()
    with pytest.raises(fm.CheckpointError, match=r"the models are in (\S+); give one of these directories") as refusal:
        fm.merge(BASE, [tmp_path / "top"])
    found = re.search(r"the models are in (\S+);", str(refusal.value))
    assert found is not None
    assert same(fm.merge(BASE, [tmp_path / "top" / found.group(1)], EXACT), TUNED)


def test_several_files_are_named_and_one_can_be_given_but_no_shard(tmp_path: Path) -> None:
    save(TUNED, tmp_path / "ema.safetensors")
    save(BASE, tmp_path / "raw.safetensors")
    with pytest.raises(fm.CheckpointError, match=r"ema\.safetensors, raw\.safetensors; give one of them"):
        fm.merge(BASE, [tmp_path])
    assert same(fm.merge(BASE, [tmp_path / "ema.safetensors"], EXACT), TUNED)
    sharded(tmp_path / "shards", "model")
    (tmp_path / "shards" / "model.safetensors.index.json").unlink()
    with pytest.raises(fm.CheckpointError, match=r"shards without their index: model-00001-of-00003") as refusal:
        fm.merge(BASE, [tmp_path / "shards"])
    assert "give one" not in str(refusal.value)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_distributed_checkpoint_is_put_together_by_the_command_that_the_message_names(tmp_path: Path) -> None:
    checkpoints: Any = pytest.importorskip("torch.distributed.checkpoint")
    checkpoints.save({"model": TUNED}, checkpoint_id=tmp_path / "dcp", no_dist=True)
    with pytest.raises(fm.CheckpointError, match="a distributed checkpoint of torch; put it together") as refusal:
        fm.merge(BASE, [tmp_path / "dcp"])
    command = re.search(r"python (-m \S+ dcp_to_torch \S+) NEW\.pt", str(refusal.value))
    assert command is not None
    subprocess.run([sys.executable, *command.group(1).split(), str(tmp_path / "new.pt")], check=True)
    assert same(fm.merge(BASE, [tmp_path / "new.pt"], EXACT), TUNED)


def test_a_shard_that_the_index_does_not_name_is_told(tmp_path: Path) -> None:
    sharded(tmp_path / "model", "model")
    save({"d": torch.ones(2)}, tmp_path / "model" / "model-00004-of-00004.safetensors")
    assert same(fm.merge(BASE, [tmp_path / "model"], EXACT), TUNED)
    (notice,) = fm.inspect(BASE, [tmp_path / "model"], EXACT).warnings
    assert notice.endswith("the index does not name model-00004-of-00004.safetensors, which is not read")


@pytest.mark.parametrize("double", ["a.weight", "weight_map"])
def test_an_index_that_says_two_things_is_refused(double: str, tmp_path: Path) -> None:
    sharded(tmp_path / "model", "model")
    index = tmp_path / "model" / "model.safetensors.index.json"
    text = index.read_text()
    twice = {"a.weight": ('{"a.weight"', '{"a.weight": "x", "a.weight"'), "weight_map": ("{", '{"weight_map": {}, ')}
    index.write_text(text.replace(*twice[double], 1))
    with pytest.raises(fm.CheckpointError, match=f"key '{double}' appears twice"):
        fm.merge(BASE, [tmp_path / "model"])


def test_an_adapter_without_its_config_is_refused(tmp_path: Path) -> None:
    for name in ("adapter_model.safetensors", "adapter_model.bin"):
        save(TUNED, tmp_path / name / name)
        with pytest.raises(fm.CheckpointError, match=f"holds {name} without adapter_config.json"):
            fm.merge(BASE, [tmp_path / name])


FULL_MODELS = [
    *("model.safetensors", "pytorch_model.bin", "model.safetensors.index.json", "pytorch_model.bin.index.json"),
    *("model-00001-of-00002.safetensors", "pytorch_model-00001-of-00002.bin", "model.fp16.safetensors"),
    *("diffusion_pytorch_model.safetensors", "consolidated.safetensors", "consolidated.00.pth", "model.pt"),
]


@pytest.mark.parametrize("name", FULL_MODELS)
def test_a_full_model_beside_an_adapter_is_ambiguous(name: str, tmp_path: Path) -> None:
    lora = {
        "base_model.model.a.lora_A.weight": torch.ones(1, 8),
        "base_model.model.a.lora_B.weight": torch.ones(4, 1),
    }
    save(lora, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 1, "lora_alpha": 2}')
    for record in ("optimizer.pt", "training_args.bin", "rng_state.pth", "README.md", "tokenizer.json"):
        (tmp_path / record).write_bytes(b"x")
    assert torch.equal(fm.merge(BASE, [tmp_path], EXACT)["a.weight"], BASE["a.weight"] + 2)
    if name.endswith(".json"):
        (tmp_path / name).write_text("{}")
    else:
        save(TUNED, tmp_path / name)
    with pytest.raises(fm.CheckpointError, match=r"holds a full model .* and an adapter") as refusal:
        fm.merge(BASE, [tmp_path])
    given = re.search(r"give (\S+) or (\S+), whichever is meant", str(refusal.value))
    assert given is not None
    merged = fm.merge(BASE, [given.group(2)], EXACT)
    assert torch.equal(merged["a.weight"], BASE["a.weight"] + 2)
    if not name.endswith(".json"):
        assert same(fm.merge(BASE, [given.group(1)], EXACT), TUNED)


def test_a_config_that_cannot_be_read_is_refused_in_the_base_and_told_of_models(tmp_path: Path) -> None:
    for name in ("base", "model"):
        save(TUNED if name == "model" else BASE, tmp_path / name / "model.safetensors")
        (tmp_path / name / "config.json").write_text('{"model_type": "x"}')
    for content in ("{broken", "[]", "", '"x"'):
        (tmp_path / "base" / "config.json").write_text(content)
        for run in (
            lambda: fm.inspect(tmp_path / "base", [tmp_path / "model"]),
            lambda: fm.merge_checkpoints(tmp_path / "base", [tmp_path / "model"], tmp_path / "out", progress=False),
        ):
            with pytest.raises(fm.CheckpointError, match=r"base/config\.json: not a JSON object"):
                run()
        assert not (tmp_path / "out").exists()
    (tmp_path / "base" / "config.json").write_text('{"model_type": "x"}')
    (tmp_path / "model" / "config.json").write_text("{broken")
    warnings = fm.inspect(tmp_path / "base", [tmp_path / "model"], EXACT).warnings
    assert "config.json: that of models[0] (model) cannot be read and is not compared" in warnings
    fm.merge_checkpoints(tmp_path / "base", [tmp_path / "model"], tmp_path / "out", EXACT, progress=False)
    assert same(load_file(tmp_path / "out" / "model.safetensors"), TUNED)


def test_the_other_architecture_is_told_first(tmp_path: Path) -> None:
    for name, config in (("base", {"model_type": "llama"}), ("model", {"model_type": "qwen2", "a_setting": 1})):
        save(TUNED if name == "model" else BASE, tmp_path / name / "model.safetensors")
        (tmp_path / name / "config.json").write_text(json.dumps(config))
    first, *_ = fm.inspect(tmp_path / "base", [tmp_path / "model"], EXACT).warnings
    assert first.startswith('config.json: model_type is "qwen2" in models[0] (model)')


OTHER_FILES = {
    "pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "a pointer of Git LFS"),
    "page": (b"<!DOCTYPE html><html><title>404</title>", "a web page, not weights"),
    "keras": (b"\x89HDF\r\n\x1a\n" + bytes(80), "an HDF5 file"),
    "array": (b"\x93NUMPY\x01\x00" + bytes(80), "a NumPy array"),
    "gguf": (b"GGUF" + bytes(80), "a GGUF file"),
}


@pytest.mark.parametrize("kind", OTHER_FILES)
@pytest.mark.parametrize("suffix", [".safetensors", ".bin", ".pt", ".tar", ""])
def test_other_files_are_told_by_how_they_begin(kind: str, suffix: str, tmp_path: Path) -> None:
    content, message = OTHER_FILES[kind]
    (tmp_path / f"m{suffix}").write_bytes(content)
    with pytest.raises(fm.CheckpointError, match=rf"m{re.escape(suffix)}: {message}"):
        fm.merge(BASE, [tmp_path / f"m{suffix}"])
    sharded(tmp_path / "shards", "model")
    (tmp_path / "shards" / "model-00002-of-00003.safetensors").write_bytes(content)
    with pytest.raises(fm.CheckpointError, match=rf"model-00002-of-00003\.safetensors: {message}"):
        fm.merge(BASE, [tmp_path / "shards"])


@pytest.mark.parametrize("name", ["m.pth.tar", "m.th", "m.pkl", "m", "m.model"])
def test_weights_are_told_by_how_they_begin(name: str, tmp_path: Path) -> None:
    torch.save(TUNED, tmp_path / name)
    assert same(fm.merge(BASE, [tmp_path / name], EXACT), TUNED)
    save_file(TUNED, tmp_path / name)
    assert same(fm.merge(BASE, [tmp_path / name], EXACT), TUNED)
    (tmp_path / name).write_bytes(b"something else")
    with pytest.raises(fm.CheckpointError, match="neither a safetensors nor a torch file"):
        fm.merge(BASE, [tmp_path / name])


def test_a_torch_file_with_the_name_of_another_is_read_under_the_name_that_the_message_gives(tmp_path: Path) -> None:
    torch.save(TUNED, tmp_path / "m.safetensors")
    with pytest.raises(fm.CheckpointError, match=r"a torch file, in spite of its name; rename it to m\.bin"):
        Checkpoint.open(tmp_path / "m.safetensors")
    (tmp_path / "m.safetensors").rename(tmp_path / "m.bin")
    assert same(fm.merge(BASE, [tmp_path / "m.bin"], EXACT), TUNED)


@pytest.mark.parametrize("stem", ["model", "diffusion_pytorch_model"])
@pytest.mark.parametrize("shards", [1, 3])
def test_the_merged_model_has_the_names_that_the_base_s_library_looks_for(
    stem: str, shards: int, tmp_path: Path
) -> None:
    base = tmp_path / "base"
    if shards == 1:
        save(BASE, base / f"{stem}.safetensors")
    else:
        sharded(base, stem)
    (base / "config.json").write_text("{}")
    size = 1 if shards > 1 else 10**6
    fm.merge_checkpoints(base, [TUNED], tmp_path / "out", EXACT, progress=False, max_shard_bytes=size)
    names = {path.name for path in (tmp_path / "out").glob("*.safetensors*")}
    if shards == 1:
        assert names == {f"{stem}.safetensors"}
    else:
        files = {f"{stem}-{i:05d}-of-00003.safetensors" for i in (1, 2, 3)}
        assert names == files | {f"{stem}.safetensors.index.json"}
    assert same(fm.merge(BASE, [tmp_path / "out"], EXACT), TUNED)


def test_further_modules_of_sentence_transformers_go_along_and_differences_are_told(tmp_path: Path) -> None:
    modules = [{"path": ""}, {"path": "1_Pooling"}, {"path": "2_Dense"}, {"path": "../../etc"}, {"path": 3}]
    for number, name in enumerate(("base", "same", "other")):
        save(
            BASE if name == "base" else {n: t + number for n, t in BASE.items()}, tmp_path / name / "model.safetensors"
        )
        (tmp_path / name / "modules.json").write_text(json.dumps(modules))
        save(
            {"linear.weight": torch.ones(2, 2) * (1 + (name == "other"))}, tmp_path / name / "2_Dense/model.safetensors"
        )
        save(BASE, tmp_path / name / "not_listed" / "model.safetensors")
    models = [tmp_path / "same", tmp_path / "other"]
    lines = fm.inspect(tmp_path / "base", models).warnings
    assert "2_Dense/model.safetensors: models[1] (other) has another; that of the base is taken" in lines
    fm.merge_checkpoints(tmp_path / "base", models, tmp_path / "out", progress=False)
    assert torch.equal(load_file(tmp_path / "out/2_Dense/model.safetensors")["linear.weight"], torch.ones(2, 2))
    assert not (tmp_path / "out" / "not_listed").exists()
