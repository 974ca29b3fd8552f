"""What travels along: whose tokenizer the merged model gets, and a line for each difference that it does not get."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import freemerge as fm
from freemerge.checkpoint.side_files import is_tokenizer_file
from freemerge.cli import main

WEIGHTS = {"layer.weight": torch.arange(32.0).reshape(4, 8), "norm.weight": torch.ones(8)}
CONFIG = {"model_type": "llama", "rope_theta": 1e4, "vocab_size": 100, "torch_dtype": "float32", "eos_token_id": 2}


def folder(path: Path, change: float = 0.0, config: dict[str, Any] | None = None, **files: Any) -> Path:
    path.mkdir()
    tensors = {name: tensor + change for name, tensor in WEIGHTS.items()}
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    (path / "config.json").write_text(json.dumps(CONFIG | (config or {})))
    for name, content in files.items():
        name = name.replace("__", ".").replace("_OF_", "/")
        (path / name).parent.mkdir(exist_ok=True)
        (path / name).write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def notices(base: Any, models: list[Any], **options: Any) -> list[str]:
    return [warning for warning in fm.inspect(base, models, **options).warnings if "spectrum" not in warning]


def test_equal_inputs_give_no_notice(tmp_path: Path) -> None:
    files: dict[str, Any] = {"tokenizer__json": {"a": 1, "b": 2}, "chat_template__jinja": "x"}
    base = folder(tmp_path / "base", **files)
    model = folder(tmp_path / "a", 1.0, {"transformers_version": "9"}, **files)
    (model / "tokenizer.json").write_text('{"b": 2,   "a": 1}')
    assert notices(base, [model]) == []


TOKENIZER_FILES = [
    *("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "vocab.txt", "merges.txt", "spiece.model", "sentencepiece.bpe.model", "cl100k.tiktoken"),
    *("tekken.json", "chat_template.jinja", "chat_template.json", "generation_config.json"),
    *("additional_chat_templates/tool.jinja", "source.spm", "bpe.codes", "entity_vocab.json", "tokenization_mine.py"),
]


@pytest.mark.parametrize("name", TOKENIZER_FILES)
def test_every_file_of_a_tokenizer_is_compared_and_taken_over(name: str, tmp_path: Path) -> None:
    key = name.replace(".", "__").replace("/", "_OF_")
    base = folder(tmp_path / "base", **{key: '{"v": 0}', "notes__md": "base"})
    models = [
        folder(tmp_path / t, change, **{key: '{"v": 1}', "notes__md": t}) for t, change in (("a", 1.0), ("b", 2.0))
    ]
    (line,) = notices(base, models)
    assert line.startswith(f"{name}: models[0] (a) and models[1] (b) have another; that of the base is taken")
    assert notices(base, models, tokenizer_from="auto")[0].startswith(
        f"{name}: the base has another; that of a is taken"
    )
    for choice, expected in (("base", 0), (1, 1), ("auto", 1)):
        out = tmp_path / f"out {choice}"
        fm.merge_checkpoints(base, models, out, progress=False, tokenizer_from=choice)  # type: ignore[arg-type]
        assert json.loads((out / name).read_text()) == {"v": expected}
        assert (out / "notes.md").read_text() == "base"
    # A file that only the models have.
    (base / name).unlink()
    (line,) = notices(base, models)
    assert "have one; the base has none, and none is taken" in line
    fm.merge_checkpoints(base, models, tmp_path / "without", progress=False)
    assert not (tmp_path / "without" / name).exists()
    fm.merge_checkpoints(base, models, tmp_path / "with", progress=False, tokenizer_from="auto")
    assert (tmp_path / "with" / name).exists()


def test_vocabularies_of_all_classes_of_transformers_belong_to_the_tokenizer() -> None:
    sources = Path(pytest.importorskip("transformers").__file__).parent.rglob("tokenization_*.py")
    named = [re.findall(r"VOCAB_FILES_NAMES\s*=\s*\{([^}]*)\}", path.read_text(encoding="utf-8")) for path in sources]
    files = {file for entries in named for entry in entries for file in re.findall(r':\s*"([^"]+)"', entry)}
    assert len(files) > 10
    assert [file for file in sorted(files) if not is_tokenizer_file(file)] == []


def test_auto_takes_the_bases_where_the_models_disagree(tmp_path: Path) -> None:
    base = folder(tmp_path / "base", tokenizer__json="0")
    models = [folder(tmp_path / str(i), 1.0, tokenizer__json=str(i)) for i in (1, 2)]
    fm.merge_checkpoints(base, models, tmp_path / "out", progress=False, tokenizer_from="auto")
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "0"


def test_special_tokens_come_with_the_tokenizer(tmp_path: Path) -> None:
    base = folder(tmp_path / "base", tokenizer__json="0")
    model = folder(tmp_path / "a", 1.0, {"eos_token_id": [2, 7], "pad_token_id": 3}, tokenizer__json="1")
    assert any(
        "eos_token_id is [2, 7] in models[0] (a); the merged model has the base's, 2" in n
        for n in notices(base, [model])
    )
    fm.merge_checkpoints(base, [model], tmp_path / "out", progress=False, tokenizer_from=0)
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (written["eos_token_id"], written["pad_token_id"], written["rope_theta"]) == ([2, 7], 3, 1e4)
    assert not any("eos_token_id" in line for line in notices(base, [model], tokenizer_from=0))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("rope_theta", 1e6),
        ("rope_scaling", {"type": "linear", "factor": 2.0}),
        ("rope_parameters", {"rope_theta": 5e5}),
        ("vocab_size", 128),
        ("max_position_embeddings", 8192),
        ("sliding_window", 512),
        ("model_type", "mistral"),
        ("architectures", ["LlamaForSequenceClassification"]),
        ("torch_dtype", "bfloat16"),
        ("dtype", "float16"),
    ],
)
def test_differences_of_configs_are_told_before_the_merge(
    key: str, value: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, model = folder(tmp_path / "base"), folder(tmp_path / "a", 1.0, {key: value})
    if key == "dtype":
        (model / "config.json").write_text(
            json.dumps({**{k: v for k, v in CONFIG.items() if k != "torch_dtype"}, key: value})
        )
    name = key.removeprefix("torch_")
    (line,) = notices(base, [model])
    assert line.startswith(
        f"config.json: {name} is {json.dumps(value)} in models[0] (a); the merged model has the base's"
    )
    assert main(["merge", str(base), str(model), "-o", str(tmp_path / "out"), "--dry-run"]) == 0
    assert f"warning: {line}" in capsys.readouterr().err
    with pytest.raises(RuntimeError, match="stop"):
        fm.merge_checkpoints(base, [model], tmp_path / "out", progress=False, on_start=_stop)
    assert not (tmp_path / "out").exists()


def _stop(inspection: fm.Inspection) -> None:
    raise RuntimeError("stop")


def test_nested_configs_and_long_lists_are_readable(tmp_path: Path) -> None:
    base = folder(tmp_path / "base", 0.0, {"text_config": {"rope_theta": 1e4}})
    model = folder(tmp_path / "a", 1.0, {"text_config": {"rope_theta": 1e6}, **{f"option{i}": i for i in range(40)}})
    lines = notices(base, [model])
    assert lines[-1] == "and 29 more such differences"
    model = folder(tmp_path / "b", 1.0, {"text_config": {"rope_theta": 1e6}})
    (line,) = notices(base, [model])
    assert line.startswith("config.json: text_config.rope_theta is 1000000.0 in models[0] (b)")


@pytest.mark.parametrize("choice", [2, -1, "0", "model", True, 1.0])
def test_a_choice_that_is_none_is_refused(choice: Any, tmp_path: Path) -> None:
    base, models = folder(tmp_path / "base"), [folder(tmp_path / task, 1.0) for task in "ab"]
    with pytest.raises(fm.FreemergeError, match=r"tokenizer_from must be 'base', 'auto' or the number of a model"):
        fm.inspect(base, models, tokenizer_from=choice)
    with pytest.raises(fm.FreemergeError, match=r"tokenizer_from: .*a holds no tokenizer files"):
        fm.inspect(base, models, tokenizer_from=0)


def test_a_tokenizer_of_another_vocabulary_is_refused(tmp_path: Path) -> None:
    """Its embeddings are copied from the base by a rule, so that the models need not fit."""
    recipe = fm.Recipe(select=[("embed_tokens.*", "copy")])

    def vocabulary(name: str, rows: int, config: dict[str, Any] | None = None, **files: Any) -> Path:
        path = folder(tmp_path / name, float(rows), {"vocab_size": rows} | (config or {}), **files)
        save_file(load_file(path / "model.safetensors") | {"embed_tokens.weight": torch.ones(rows, 8)}, path / "m")
        (path / "m").rename(path / "model.safetensors")
        return path

    base = vocabulary("base", 10, tokenizer__json={})
    for name, rows, config, files, reason in [
        (
            "larger",
            12,
            {},
            {"tokenizer__json": {"b": 1}},
            "embed_tokens.weight has 12 rows in .*larger, 10 in the merged",
        ),
        ("smaller", 8, {}, {"tokenizer__json": {"b": 1}}, "embed_tokens.weight has 8 rows"),
        ("ids", 10, {"pad_token_id": 10}, {"vocab__txt": "a"}, "config.json of .*ids has the token 10"),
        ("ends", 10, {}, {"generation_config__json": {"eos_token_id": [2, 11]}}, "generation_config.json .* token 11"),
        ("added", 10, {}, {"tokenizer__json": {"added_tokens": [{"id": 9}, {"id": 10}]}}, "tokenizer.json .* token 10"),
        ("words", 10, {}, {"tokenizer__json": {"model": {"vocab": {"a": 0, "b": 12}}}}, "tokenizer.json .* token 12"),
        ("pieces", 10, {}, {"tokenizer__json": {"model": {"vocab": [["a", 0.5]] * 12}}}, "tokenizer.json .* token 11"),
        (
            "old",
            10,
            {},
            {"added_tokens__json": {"<pad>": 10}, "vocab__json": {"a": 9}},
            "added_tokens.json .* token 10",
        ),
    ]:
        model = vocabulary(name, rows, config, **files)
        with pytest.raises(fm.ArgumentError, match=f"^tokenizer_from: {reason}"):
            fm.inspect(base, [model], recipe, tokenizer_from=0)
        out = tmp_path / f"out {name}"
        fm.merge_checkpoints(base, [model], out, recipe, progress=False, tokenizer_from="auto")
        assert (out / "tokenizer.json").read_text() == "{}", "the base's fits"
    for path in (base, tmp_path / "larger"):  # embeddings under a name that is not known
        state = load_file(path / "model.safetensors")
        save_file({n: t for n, t in state.items() if "embed" not in n}, path / "model.safetensors")
    with pytest.raises(fm.ArgumentError, match=r"^tokenizer_from: vocab_size is 12 in .*larger, 10 in the merged"):
        fm.inspect(base, [tmp_path / "larger"], tokenizer_from=0)


def test_the_command_line_takes_a_tokenizer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = folder(tmp_path / "base", tokenizer__json="0")
    model = folder(tmp_path / "a", 1.0, tokenizer__json="1")
    for choice, expected in (("0", "1"), ("auto", "1"), ("base", "0")):
        out = tmp_path / f"out {choice}"
        assert main(["merge", str(base), str(model), "-o", str(out), "--tokenizer-from", choice]) == 0
        assert (out / "tokenizer.json").read_text() == expected
    assert "tokenizer.json: models[0] (a) has another" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["merge", str(base), str(model), "-o", str(tmp_path / "x"), "--tokenizer-from", "first"])


def test_mixed_dtypes_are_told_and_an_adapter_is_none(tmp_path: Path) -> None:
    base = {name: tensor.bfloat16() for name, tensor in WEIGHTS.items()}
    single, half, own = (
        {name: (tensor + change).to(dtype) for name, tensor in WEIGHTS.items()}
        for change, dtype in ((1, torch.float32), (2, torch.float16), (3, torch.bfloat16))
    )
    assert notices(base, [single, half, own]) == [
        "models[0] (in-memory state dict) stores 2 tensors in float32, the base in bfloat16",
        "models[1] (in-memory state dict) stores 2 tensors in float16, the base in bfloat16",
    ]
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 1, "lora_alpha": 1}))
    factors = {"A": torch.ones(1, 8), "B": torch.ones(4, 1)}
    save_file(
        {f"base_model.model.layer.lora_{key}.weight": value for key, value in factors.items()},
        adapter / "adapter_model.safetensors",
    )
    assert notices(base, [adapter]) == []


def test_a_model_that_is_given_twice_or_is_the_base(tmp_path: Path) -> None:
    base, model = folder(tmp_path / "base"), folder(tmp_path / "a", 1.0)
    (tmp_path / "link").symlink_to(model)
    assert "models[1] is the same as models[0]" in notices(base, [model, tmp_path / "link"])
    assert "models[0] is the same as base" in notices(base, [str(base)])
    copy = folder(tmp_path / "copy")
    told = notices(base, [model, model, copy])
    assert "models[1] is the same as models[0]" in told
    assert "models[2] has the same weights as base and changes nothing" in told
    state = {**WEIGHTS}
    assert "models[1] is the same as models[0]" in notices(WEIGHTS, [state, state])


@pytest.mark.parametrize("broken", ["link", "directory"])
def test_what_cannot_be_carried_is_found_before_the_work(
    broken: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, model = folder(tmp_path / "base"), folder(tmp_path / "model", 1.0, tokenizer_config__json="{}")
    (tmp_path / "out").mkdir()
    for name in ("notes.json", "tokenizer.json"):  # the tokenizer of the base is not taken, nor the model's notes
        target = "nowhere" if broken == "link" else "."
        (model / "notes.json").symlink_to(target)
        (base / name).symlink_to(target)
        fm.merge_checkpoints(base, [model], tmp_path / "one.safetensors", progress=False, force=True)
        with monkeypatch.context() as patch:
            patch.setattr("freemerge.merging.engine.Merger.measure", None)
            for run in (fm.inspect, fm.merge_checkpoints):
                with pytest.raises(fm.CheckpointError, match=rf"base/{name}\b"):
                    run(base, [model], out=tmp_path / "out")
        if name == "tokenizer.json":
            fm.merge_checkpoints(base, [model], tmp_path / "out", progress=False, tokenizer_from=0)
        (base / name).unlink()
        (model / "notes.json").unlink()


def test_an_adapter_brings_its_tokenizer(tmp_path: Path) -> None:
    base = folder(tmp_path / "base", tokenizer__json="0")
    adapter = folder(tmp_path / "adapter", tokenizer__json="1")
    for name in ("model.safetensors", "config.json"):
        (adapter / name).unlink()
    (adapter / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 1, "lora_alpha": 1}))
    save_file({"base_model.model.norm.weight": torch.zeros(8)}, adapter / "adapter_model.safetensors")
    assert len(notices(base, [adapter])) == 1
    fm.merge_checkpoints(base, [adapter], tmp_path / "out", progress=False, tokenizer_from=0)
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "1"
    assert sorted(load_file(tmp_path / "out" / "model.safetensors")) == sorted(WEIGHTS)
