"""Model cards: what hubs read of them is true, and their snippets load the model."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import save_file

import freemerge as fm
from freemerge.checkpoint.model_card import _auto_class

STATE = {"w": torch.arange(12.0).reshape(3, 4)}


def write(folder: Path, config: dict[str, Any] | None = None, front: str | None = None, *files: str) -> Path:
    folder.mkdir(parents=True)
    save_file(STATE, folder / "model.safetensors")
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    if front is not None:
        (folder / "README.md").write_text(f"---\n{front}\n---\n# card\n")
    for file in files:
        (folder / file).write_text("{}")
    return folder


def card(*inputs: Path, out: Path) -> tuple[dict[str, Any], str]:
    """The front matter and the body of the card of a merge."""
    fm.merge_checkpoints(inputs[0], inputs[1:], out, progress=False, force=True)
    _, front, body = (out / "README.md").read_text().split("---\n", 2)
    return yaml.safe_load(front), body


def test_only_ids_of_the_hub_are_base_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    base = write(tmp_path / "hub" / "models--org--base" / "snapshots" / "abc")
    model = write(tmp_path / "math")
    front, body = card(base, model, out=tmp_path / "out")
    assert front["base_model"] == ["org/base"]
    assert front["base_model_relation"] == "merge"
    assert "# Merge of math\n" in body
    assert "`org/base`" in body
    assert "`math`" in body
    front, _ = card(model, model, out=tmp_path / "local")
    assert front == {"tags": ["merge", "freemerge"]}


def test_licence_and_task_are_those_of_the_inputs(tmp_path: Path) -> None:
    base = write(tmp_path / "base", None, "license: mit\npipeline_tag: summarization")
    same = write(tmp_path / "same", None, "license: mit")
    other = write(tmp_path / "other", None, "license: apache-2.0")
    silent = write(tmp_path / "silent")
    broken = write(tmp_path / "broken", None, "license: [mit")
    assert card(base, same, silent, broken, out=tmp_path / "out")[0] == {
        "license": "mit",
        "pipeline_tag": "summarization",
        "tags": ["merge", "freemerge"],
    }
    assert "license" not in card(base, other, out=tmp_path / "out")[0]
    assert "license" not in card(silent, same, out=tmp_path / "out")[0]


@pytest.mark.parametrize(
    ("config", "library", "task", "line"),
    [
        ({"architectures": ["LlamaForCausalLM"]}, "transformers", "text-generation", "AutoModelForCausalLM"),
        ({"architectures": ["CLIPModel"]}, "transformers", None, "CLIPModel"),
        (
            {"architectures": ["LlavaForConditionalGeneration"], "vision_config": {}},
            "transformers",
            "image-text-to-text",
            "AutoModelForImageTextToText",
        ),
        ({"architectures": ["SomethingElse"]}, "transformers", None, "SomethingElse"),
        ({"_class_name": "UNet2DConditionModel", "_diffusers_version": "1"}, "diffusers", None, "UNet2DConditionModel"),
        ({"architectures": ["x; import os"]}, None, None, "load_file"),
        ({"architectures": "LlamaForCausalLM"}, None, None, "load_file"),
    ],
)
def test_library_and_class_follow_from_the_config(
    config: dict[str, Any], library: str | None, task: str | None, line: str, tmp_path: Path
) -> None:
    base = write(tmp_path / "base", config, None, "tokenizer.json")
    front, body = card(base, base, out=tmp_path / "out")
    assert (front.get("library_name"), front.get("pipeline_tag")) == (library, task)
    assert re.search(rf"from \S+ import {line}\b", body)
    assert ("AutoTokenizer.from_pretrained" in body) == (library == "transformers")


def test_the_snippet_loads_the_model_with_its_head(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path / "base")
    _, body = card(tmp_path / "base", tmp_path / "base", out=tmp_path / "out")
    (code,) = re.findall(r"```python\n(.*?)```", body, re.S)
    found: dict[str, Any] = {}
    exec(code.replace("path/to/this/directory", str(tmp_path / "out")), found)
    assert isinstance(found["model"], LlamaForCausalLM)


@pytest.mark.parametrize("shards", [1, 2])
def test_the_snippet_reads_the_files_that_there_are(shards: int, tmp_path: Path) -> None:
    """The merged model may have more files than its base, or fewer."""
    state = {"v": torch.ones(2, 2), **STATE}
    base = write(tmp_path / "base")
    save_file(state, base / "model.safetensors")
    fm.merge_checkpoints(base, [base], tmp_path / "out", progress=False, max_shard_bytes=100 if shards == 1 else 50)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) == shards
    (code,) = re.findall(r"```python\n(.*?)```", (tmp_path / "out" / "README.md").read_text(), re.S)
    found: dict[str, Any] = {}
    exec(code.replace("path/to/this/directory", str(tmp_path / "out")), found)
    assert found["state"].keys() == state.keys()
    assert all(torch.equal(found["state"][name], tensor) for name, tensor in state.items())


TASKS = (
    *("MODEL_FOR_CAUSAL_LM", "MODEL_FOR_MASKED_LM", "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM", "MODEL_FOR_QUESTION_ANSWERING"),
    *("MODEL_FOR_SEQUENCE_CLASSIFICATION", "MODEL_FOR_TOKEN_CLASSIFICATION", "MODEL_FOR_IMAGE_CLASSIFICATION", "MODEL"),
)


@pytest.mark.parametrize("task", TASKS)
def test_auto_classes_know_the_models_of_transformers(task: str) -> None:
    """Whatever Auto class is written down for a model of transformers has it."""
    from transformers.models.auto import modeling_auto

    names: dict[str, str] = getattr(modeling_auto, f"{task}_MAPPING_NAMES")
    wrong = []
    for model_type, several in names.items():
        for name in [several] if isinstance(several, str) else several:
            auto, _ = _auto_class(name, {"model_type": model_type})
            if auto == name:
                continue
            known: Any = getattr(modeling_auto, auto)._model_mapping._model_mapping.get(model_type, ())
            if name not in ([known] if isinstance(known, str) else known):
                wrong.append((name, auto, known))
    assert not wrong


@pytest.mark.parametrize("single", [True, False])
def test_metadata_of_the_base_is_kept_but_for_hashes(single: bool, tmp_path: Path) -> None:
    """Of Stable Diffusion's files, for instance."""
    said = {"format": "mlx", "modelspec.title": "Base", "modelspec.hash_sha256": "0x12", "sshs_model_hash": "34"}
    base, model = write(tmp_path / "base"), write(tmp_path / "model")
    save_file(STATE, base / "model.safetensors", metadata=said)
    save_file(STATE, model / "model.safetensors", metadata={"modelspec.author": "another"})
    sources = [folder / "model.safetensors" if single else folder for folder in (base, model)]
    out = tmp_path / ("out.safetensors" if single else "out")
    fm.merge_checkpoints(sources[0], sources[1:], out, progress=False)
    with safe_open(out if single else out / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt", "modelspec.title": "Base"}
