"""What a message advises for quantised weights is done as it is written, and ends in weights that merge."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import freemerge as fm

transformers = pytest.importorskip("transformers", minversion="5.0")
pytestmark = pytest.mark.filterwarnings("ignore")

EXACT = fm.Recipe(weights=(1.0,), scale=1.0, select=[fm.Rule("*", "merge")])


def llama(folder: Path) -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "vocab_size": 64}
    config = transformers.LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=2)
    model = transformers.LlamaForCausalLM(config)
    model.save_pretrained(folder)
    return model


def refusal(base: Any, model: Path, match: str) -> str:
    with pytest.raises(fm.CheckpointError, match=match) as refused:
        fm.merge(base, [model], EXACT)
    assert "copy" not in str(refused.value)
    return str(refused.value)


def follow(message: str, new: Path, **values: Any) -> Path:
    """Do what the message says, with ``values`` for the names in capitals."""
    code = re.search(r"torch\.save\(.*'NEW\.bin'\)", message)
    assert code is not None, message
    names = {name: getattr(transformers, name) for name in ("AutoModelForCausalLM", "Mxfp4Config")}
    eval(code.group().replace("'NEW.bin'", "NEW"), {"torch": torch, "NEW": new} | names | values)
    return new


def mxfp4(values: Tensor) -> tuple[Tensor, Tensor]:
    """Blocks of 32 values along the last dimension in E2M1 with a power of two, by the OCP specification."""
    magnitudes = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
    blocks = values.float().reshape(*values.shape[:-1], -1, 32)
    exponent = blocks.abs().amax(-1).clamp(min=1e-30).log2().floor() - 2
    scaled = blocks / exponent.exp2()[..., None]
    codes = (scaled.abs()[..., None] - magnitudes).abs().argmin(-1) + 8 * (scaled < 0)
    pairs = codes.reshape(*codes.shape[:-1], 16, 2)
    return (pairs[..., 0] + 16 * pairs[..., 1]).to(torch.uint8), (exponent + 127).to(torch.uint8)


def test_mxfp4(tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "vocab_size": 64, "head_dim": 32}
    config = transformers.GptOssConfig(**sizes, num_attention_heads=2, num_key_value_heads=2, num_local_experts=2)
    model = transformers.GptOssForCausalLM(config)
    model.save_pretrained(tmp_path / "base")
    shutil.copytree(tmp_path / "base", tmp_path / "packed")
    tensors = load_file(tmp_path / "base" / "model.safetensors")
    for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
        blocks, scales = mxfp4(tensors.pop(name).mT)
        tensors |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
    save_file(tensors, tmp_path / "packed" / "model.safetensors", metadata={"format": "pt"})
    settings = json.loads((tmp_path / "packed" / "config.json").read_text())
    settings["quantization_config"] = {"quant_method": "mxfp4"}
    (tmp_path / "packed" / "config.json").write_text(json.dumps(settings))
    message = refusal(tmp_path / "base", tmp_path / "packed", r"is quantised \(mxfp4")
    new = follow(message, tmp_path / "new.bin", PATH=tmp_path / "packed")
    for base in (tmp_path / "base", model):
        merged = fm.merge(base, [new], EXACT)
        for name, tensor in model.state_dict().items():
            torch.testing.assert_close(merged[name], tensor, rtol=0, atol=0.02, msg=name)
        experts = "model.layers.0.mlp.experts.gate_up_proj"
        assert not torch.equal(merged[experts], model.state_dict()[experts])


def write_gguf(model: Any, path: Path) -> None:
    """A model in float32, as llama.cpp stores it: the rows of queries and keys in another order."""
    gguf: Any = pytest.importorskip("gguf")
    config = model.config
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(1)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(2)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(1e4)
    writer.add_vocab_size(config.vocab_size)
    writer.add_file_type(0)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([f"t{i}" for i in range(config.vocab_size)])
    writer.add_token_merges([])
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 1)
    for name, tensor in model.state_dict().items():
        if "q_proj" in name or "k_proj" in name:
            tensor = tensor.reshape(2, 2, -1, tensor.shape[1]).swapaxes(1, 2).reshape(tensor.shape)
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), tensor.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_gguf(tmp_path: Path) -> None:
    model = llama(tmp_path / "base")
    (tmp_path / "model").mkdir()
    write_gguf(model, tmp_path / "model" / "m.gguf")
    for source in (tmp_path / "model", tmp_path / "model" / "m.gguf"):
        message = refusal(tmp_path / "base", source, r"m\.gguf.*a GGUF file")
        new = follow(message, tmp_path / "new.bin", FOLDER=str(tmp_path / "model"), NAME="m.gguf")
        merged = fm.merge(tmp_path / "base", [new], EXACT)
        for name, tensor in model.state_dict().items():
            torch.testing.assert_close(merged[name], tensor, rtol=0, atol=1e-6, msg=name)


INT4 = {"a.qweight": torch.ones(1, 8, dtype=torch.int32), "a.qzeros": torch.ones(1, 1, dtype=torch.int32)}


def test_formats_that_cannot_be_restored_say_what_to_merge_instead(tmp_path: Path) -> None:
    original = {"a.weight": torch.arange(64.0).reshape(8, 8)}
    save_file(INT4 | {"a.scales": torch.ones(1, 8)}, tmp_path / "packed.safetensors")
    message = refusal({"a.weight": torch.zeros(8, 8)}, tmp_path / "packed.safetensors", "is quantised")
    assert "merge the model that it was quantised from, and quantise the result" in message
    assert torch.equal(fm.merge({"a.weight": torch.zeros(8, 8)}, [original], EXACT)["a.weight"], original["a.weight"])
