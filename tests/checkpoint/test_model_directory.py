"""A written directory is a model: transformers loads it, its other files are carried over, its manifest holds."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from freemerge.checkpoint import (
    Checkpoint,
    CheckpointWriter,
    InputHashes,
    build_manifest,
    carry_over,
    compare,
    model_card,
    verify,
)
from freemerge.checkpoint.hashing import Hasher
from freemerge.errors import CheckpointError


@pytest.fixture(scope="module")
def llama() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    def make(tied: bool, seed: int = 0) -> Any:
        torch.manual_seed(seed)
        config = LlamaConfig(
            vocab_size=101,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            tie_word_embeddings=tied,
        )
        return LlamaForCausalLM(config).bfloat16().eval()

    return make


def copy_model(source: Path, out: Path, *, shard: int = 10**9, dtype: torch.dtype | None = None) -> None:
    """What a merge does around the arithmetic."""
    with Checkpoint.open(source) as base, InputHashes([base, base]) as hashes:
        specs = [spec if dtype is None else spec.with_dtype(dtype) for spec in base.specs.values()]
        with CheckpointWriter(out, specs, max_shard_bytes=shard, force=True) as writer:
            assert base.directory is not None
            assert writer.directory is not None
            carry_over(base.directory, writer.directory, out_dtype=dtype)
            card = model_card(base=base, models=[base], files=["model.safetensors"], recipe="cutoff: 0.4\n")
            (writer.directory / "README.md").write_text(card)
            for spec in specs:
                writer.write(spec.name, base.read(spec.name).to(spec.dtype))
            writer.manifest = build_manifest(
                recipe={"cutoff": 0.4}, inputs=hashes.records(), tensors={"b": "merge", "a": "copy"}, backend="torch"
            )


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("shard", [10**9, 20_000])
def test_transformers_loads_what_is_written(tmp_path: Path, llama: Any, tied: bool, shard: int) -> None:
    from transformers import AutoModelForCausalLM

    model = llama(tied)
    model.save_pretrained(tmp_path / "base", max_shard_size="30KB")
    assert (tmp_path / "base" / "model.safetensors.index.json").exists()
    copy_model(tmp_path / "base", tmp_path / "out", shard=shard)
    copy_model(tmp_path / "out", tmp_path / "again", shard=10**9)
    for directory in ("out", "again"):
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / directory)
        state = loaded.state_dict()
        assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())
        assert loaded.dtype == torch.bfloat16
        tokens = torch.tensor([[1, 2, 3]])
        assert torch.equal(loaded(tokens).logits, model(tokens).logits)
    assert ("lm_head.weight" in Checkpoint.open(tmp_path / "out").specs) != tied


def test_modules_files_and_torch_files_of_a_tied_model_agree(tmp_path: Path, llama: Any) -> None:
    model, tuned = llama(True), llama(True, seed=1)
    model.save_pretrained(tmp_path / "base")
    torch.save(tuned.state_dict(), tmp_path / "pytorch_model.bin")
    with Checkpoint.open(tmp_path / "base") as base, Checkpoint.open(tmp_path / "pytorch_model.bin") as pickled:
        result = compare(base, [Checkpoint.open(tuned), pickled])
    assert result.tied == {"lm_head.weight": "model.embed_tokens.weight"}
    assert "lm_head.weight" not in result.names
    untied = Checkpoint.open(llama(False))
    with pytest.raises(CheckpointError, match=r"lm_head.weight"), Checkpoint.open(tmp_path / "base") as base:
        compare(base, [untied])


def test_out_dtype_reaches_config_and_loaded_model(tmp_path: Path, llama: Any) -> None:
    from transformers import AutoModelForCausalLM

    llama(True).save_pretrained(tmp_path / "base")
    copy_model(tmp_path / "base", tmp_path / "out", dtype=torch.float32)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").dtype == torch.float32


def test_the_same_inputs_give_the_same_bytes_wherever_they_lie(tmp_path: Path, llama: Any) -> None:
    everything = []
    for place in ("here", "there"):
        llama(True).save_pretrained(tmp_path / place / "base")
        copy_model(tmp_path / place / "base", tmp_path / place / "out", shard=20_000)
        out = tmp_path / place / "out"
        everything.append({path.name: path.read_bytes() for path in out.iterdir()})
        assert str(tmp_path) not in (out / "freemerge.json").read_text() + (out / "README.md").read_text()
    assert everything[0] == everything[1]


class TestCarryOver:
    def base(self, tmp_path: Path, **files: str) -> Path:
        base = tmp_path / "base"
        for name in (
            *("config.json", "generation_config.json", "tokenizer.json", "tokenizer.model", "tokenizer_config.json"),
            *("vocab.txt", "merges.txt", "chat_template.jinja", "modeling_custom.py", "LICENSE"),
            *("additional_chat_templates/tool.jinja", "1_Pooling/config.json"),
        ):
            (base / name).parent.mkdir(parents=True, exist_ok=True)
            (base / name).write_text(f'{{"name": "{name}"}}')
        return base

    def test_everything_but_weights_and_records(self, tmp_path: Path) -> None:
        base, target = self.base(tmp_path), tmp_path / "target"
        expected = {path.relative_to(base).as_posix(): path.read_bytes() for path in base.rglob("*") if path.is_file()}
        for name in (
            *("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json"),
            *("tf_model.h5", "flax_model.msgpack", "model.gguf", "consolidated.00.pth", "training_args.bin"),
            *("checkpoint.pth.tar", "model.ckpt.index", "model.ckpt.meta", "model.ckpt.data-00000-of-00001"),
            "model.safetensors.index.fp16.json",
            *("README.md", "freemerge.json", "adapter_config.json", "trainer_state.json", "all_results.json"),
            *(".gitattributes", ".git/config", ".cache/x.json", "onnx/config.json", "onnx/model.onnx"),
            *("checkpoint-500/config.json", "runs/events", "original/params.json", "2_Dense/model.safetensors"),
        ):
            (base / name).parent.mkdir(parents=True, exist_ok=True)
            (base / name).write_text("x")
        target.mkdir()
        carry_over(base, target)
        found = {path.relative_to(target).as_posix(): path.read_bytes() for path in target.rglob("*") if path.is_file()}
        assert found == expected

    @pytest.mark.parametrize("kind", ["outside", "dangling", "directory", "pipe"])
    def test_what_leads_out_is_refused_before_anything_is_copied(self, tmp_path: Path, kind: str) -> None:
        base, target = self.base(tmp_path), tmp_path / "target"
        target.mkdir()
        (tmp_path / "private").mkdir()
        (tmp_path / "private" / "key").write_text("secret")
        if kind == "pipe":
            os.mkfifo(base / "z_last")
        else:
            ends = {"outside": "private/key", "dangling": "nowhere", "directory": "private"}
            (base / "z_last").symlink_to(tmp_path / ends[kind])
        with pytest.raises(CheckpointError, match="z_last"):
            carry_over(base, target)
        assert list(target.iterdir()) == []

    def test_links_of_the_hub_cache_become_files(self, tmp_path: Path) -> None:
        repository, target = tmp_path / "models--org--model", tmp_path / "target"
        snapshot = repository / "snapshots" / "abc"
        (snapshot / "sub").mkdir(parents=True)
        (repository / "blobs").mkdir()
        (repository / "blobs" / "123").write_text("{}")
        (snapshot / "config.json").symlink_to("../../blobs/123")
        (snapshot / "sub" / "x.json").symlink_to("../../../blobs/123")
        target.mkdir()
        carry_over(snapshot, target)
        assert sorted(path.name for path in target.rglob("*")) == ["config.json", "sub", "x.json"]
        assert not (target / "config.json").is_symlink()
        assert (target / "sub" / "x.json").read_text() == "{}"

    @pytest.mark.parametrize(
        ("config", "expected"),
        [
            ({"torch_dtype": "float32", "x": 1}, {"torch_dtype": "bfloat16", "x": 1}),
            ({"x": 1, "dtype": "float32"}, {"x": 1, "dtype": "bfloat16"}),
            ({"x": 1}, {"x": 1, "torch_dtype": "bfloat16"}),
            (
                {"dtype": "float32", "text_config": {"dtype": "float32"}, "quiet": {"y": 2}},
                {"dtype": "bfloat16", "text_config": {"dtype": "bfloat16"}, "quiet": {"y": 2}},
            ),
        ],
    )
    def test_dtype_in_config(self, tmp_path: Path, config: object, expected: object) -> None:
        (tmp_path / "base").mkdir()
        (tmp_path / "out").mkdir()
        text = json.dumps(config)
        (tmp_path / "base" / "config.json").write_text(text)
        carry_over(tmp_path / "base", tmp_path / "out")
        assert (tmp_path / "out" / "config.json").read_text() == text
        carry_over(tmp_path / "base", tmp_path / "out", out_dtype=torch.bfloat16)
        assert json.loads((tmp_path / "out" / "config.json").read_text()) == expected

    @pytest.mark.parametrize("text", ["", "[]", "{", "\xff"])
    def test_unreadable_config_is_named(self, tmp_path: Path, text: str) -> None:
        (tmp_path / "base").mkdir()
        (tmp_path / "out").mkdir()
        (tmp_path / "base" / "config.json").write_bytes(text.encode("latin-1"))
        with pytest.raises(CheckpointError, match=r"base/config.json: not"):
            carry_over(tmp_path / "base", tmp_path / "out", out_dtype=torch.float16)


class TestManifest:
    @pytest.fixture
    def out(self, tmp_path: Path) -> Path:
        (tmp_path / "base").mkdir()
        (tmp_path / "base" / "config.json").write_text("{}")
        save_file({"a": torch.zeros(8), "b": torch.ones(8)}, tmp_path / "base" / "model.safetensors")
        copy_model(tmp_path / "base", tmp_path / "out", shard=32)
        return tmp_path / "out"

    def test_contents(self, out: Path) -> None:
        manifest = json.loads((out / "freemerge.json").read_text())
        weights = out.parent / "base" / "model.safetensors"
        record = {
            "name": "base",
            "files": [
                {
                    "name": "model.safetensors",
                    "bytes": weights.stat().st_size,
                    "sha256": hashlib.sha256(weights.read_bytes()).hexdigest(),
                }
            ],
        }
        assert manifest["base"] == record
        assert manifest["models"] == [record]
        assert list(manifest["tensors"]) == ["a", "b"]
        assert (manifest["recipe"], manifest["backend"], manifest["torch"]) == (
            {"cutoff": 0.4},
            "torch",
            torch.__version__,
        )
        for name, file in manifest["files"].items():
            content = (out / name).read_bytes()
            assert file == {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        assert sorted([*manifest["files"], "freemerge.json"]) == sorted(path.name for path in out.iterdir())

    def test_intact(self, out: Path) -> None:
        assert verify(out) == verify(str(out)) == []

    def test_every_kind_of_damage_is_found(self, out: Path) -> None:
        shard = out / "model-00001-of-00002.safetensors"
        content = bytearray(shard.read_bytes())
        content[-1] ^= 1
        shard.write_bytes(bytes(content))
        (out / "config.json").unlink()
        (out / "model.safetensors").write_bytes(b"stale")
        (out / ".git").mkdir()
        (out / ".git" / "HEAD").touch()
        assert verify(out) == [
            "config.json is missing",
            "model-00001-of-00002.safetensors has changed: its hash is not the one in freemerge.json",
            "model.safetensors is not in freemerge.json",
        ]

    @pytest.mark.parametrize(
        "text",
        [
            "",
            "[]",
            "{}",
            '{"files": {"a": 1}}',
            '{"files": {"a": {}}}',
            '{"files": {"../a": {"sha256": ""}}}',
            '{"files": {"/a": {"sha256": ""}}}',
            '{"files": {"": {"sha256": ""}}}',
            "[" * 200_000,
        ],
    )
    def test_what_is_no_manifest_is_refused(self, tmp_path: Path, text: str) -> None:
        (tmp_path / "freemerge.json").write_text(text)
        with pytest.raises(CheckpointError, match=r"freemerge.json"):
            verify(tmp_path)

    def test_without_manifest(self, tmp_path: Path) -> None:
        with pytest.raises(CheckpointError, match=r"has no freemerge.json, as directories"):
            verify(tmp_path)
        with pytest.raises(CheckpointError, match=r"cannot read .*freemerge.json: No such file"):
            verify(tmp_path / "nowhere")

    def test_a_single_file_has_none(self, tmp_path: Path) -> None:
        (tmp_path / "m.safetensors").touch()
        with pytest.raises(CheckpointError, match=r"m\.safetensors is a file; a directory that freemerge wrote has"):
            verify(tmp_path / "m.safetensors")

    def test_inputs_in_memory_have_no_files(self) -> None:
        with InputHashes([Checkpoint.open({"a": torch.zeros(1)})]) as hashes:
            assert hashes.records() == [{"name": "in-memory state dict", "files": []}]

    def test_hashing_stops_when_the_block_is_left(self, tmp_path: Path) -> None:
        with open(tmp_path / "large", "wb") as stream:
            stream.truncate(1 << 40)  # sparse: would take many minutes
        with Hasher() as hasher:
            future = hasher.submit(tmp_path / "large")
        with pytest.raises(CheckpointError, match="cancelled"):
            future.result()
