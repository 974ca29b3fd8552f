"""The merge of one model is that model: over architectures, ties, and forms in files and memory."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import freemerge as fm

transformers = pytest.importorskip("transformers", minversion="5.0")
pytestmark = pytest.mark.filterwarnings("ignore")

EXACT = fm.Recipe(weights=(1.0,), scale=1.0, select=[fm.Rule("*", "merge")])
ENCODER = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
ENCODER |= {"vocab_size": 40}
BOTH = {"d_model": 16, "vocab_size": 40, "pad_token_id": 1, "max_position_embeddings": 32}
BOTH |= {f"{part}_{name}": n for part in ("encoder", "decoder") for name, n in
         {"layers": 1, "attention_heads": 2, "ffn_dim": 24}.items()}  # fmt: skip
GPT = {"n_embd": 16, "n_layer": 1, "n_head": 2, "vocab_size": 40, "n_positions": 16}
MODELS: dict[str, dict[str, Any]] = {
    "GPT2LMHeadModel": GPT,
    "BertForMaskedLM": ENCODER,
    "RobertaForMaskedLM": ENCODER | {"pad_token_id": 1},
    "XLMRobertaForMaskedLM": ENCODER | {"pad_token_id": 1},  # registers its head before its embeddings
    "ElectraForMaskedLM": ENCODER | {"embedding_size": 16},
    "AlbertForMaskedLM": ENCODER | {"embedding_size": 16},
    "DistilBertForMaskedLM": {"dim": 16, "hidden_dim": 24, "n_layers": 1, "n_heads": 2, "vocab_size": 40},
    "DebertaV2ForMaskedLM": ENCODER,
    "OPTForCausalLM": {"hidden_size": 16, "ffn_dim": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    | {"vocab_size": 40, "word_embed_proj_dim": 16, "max_position_embeddings": 32},
    "Gemma2ForCausalLM": ENCODER | {"num_key_value_heads": 1, "head_dim": 8},
    "BloomForCausalLM": {"hidden_size": 16, "n_layer": 1, "n_head": 2, "vocab_size": 40},
    "MambaForCausalLM": {"hidden_size": 16, "num_hidden_layers": 1, "vocab_size": 40, "state_size": 4},
    "BartForConditionalGeneration": BOTH,
    "MarianMTModel": BOTH,  # does not save its tables of sines
    "M2M100ForConditionalGeneration": BOTH,
    "FunnelForMaskedLM": {"d_model": 16, "d_head": 8, "n_head": 2, "d_inner": 24, "block_sizes": [1], "vocab_size": 40},
}


def build(name: str, seed: int, *, tied: bool) -> Any:
    torch.manual_seed(seed)
    model_class = getattr(transformers, name)
    model = model_class(model_class.config_class(**MODELS[name], tie_word_embeddings=tied)).eval()
    unsaved = [re.compile(pattern) for pattern in model._keys_to_ignore_on_save or ()]
    for key, parameter in model.named_parameters():
        if not any(pattern.search(key) for pattern in unsaved):
            parameter.data += 0.05 * torch.randn_like(parameter)
    return model


def check(found: dict[str, Tensor], expected: nn.Module, message: str) -> None:
    for name, tensor in expected.state_dict().items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-6, msg=f"{message}: {name}")


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("ties", ["both", "base", "model", "neither"])
def test_the_merge_of_one_model_is_that_model(name: str, ties: str, tmp_path: Path) -> None:
    base = build(name, 0, tied=ties in ("both", "base"))
    model = build(name, 1, tied=ties in ("both", "model"))
    for each, folder in ((base, "base"), (model, "model")):
        each.save_pretrained(tmp_path / folder)
    fm.merge_checkpoints(tmp_path / "base", [tmp_path / "model"], tmp_path / "out", EXACT, progress=False)
    check(type(base).from_pretrained(tmp_path / "out").state_dict(), model, "files")
    check(fm.merge(base, [model], EXACT), model, "modules")
    check(fm.merge(base, [tmp_path / "model"], EXACT), model, "a module and a file")
    check(fm.merge(base.state_dict(), [model.state_dict()], EXACT), model, "state dicts")
    state = dict(model.state_dict())
    check(fm.merge(base, [dict(reversed(state.items()))], EXACT), model, "a state dict in another order")


WRAPPERS: dict[str, Any] = {
    "compiled": lambda module: torch.compile(module),
    "data parallel": lambda module: nn.DataParallel(module),
    "averaged": lambda module: torch.optim.swa_utils.AveragedModel(module),
    "averaged and compiled": lambda module: torch.compile(torch.optim.swa_utils.AveragedModel(module)),
}


def mixture(seed: int) -> Any:
    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "vocab_size": 40}
    config = transformers.MixtralConfig(**sizes, num_attention_heads=2, num_key_value_heads=2, num_local_experts=2)
    model = transformers.MixtralForCausalLM(config)
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    return model


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_wrapped_modules_with_another_layout_than_their_files(wrapper: str, tmp_path: Path) -> None:
    base, model = mixture(0), mixture(1)
    base.save_pretrained(tmp_path / "base")
    model.save_pretrained(tmp_path / "model")
    wrapped = WRAPPERS[wrapper](model)
    in_files = fm.merge(tmp_path / "base", [tmp_path / "model"], EXACT)
    for source in (wrapped, dict(wrapped.state_dict())):
        check(fm.merge(base, [source], EXACT), model, "a wrapped model")
        found = fm.merge(tmp_path / "base", [source], EXACT)
        assert all(torch.equal(found[name], tensor) for name, tensor in in_files.items())
    outer = WRAPPERS[wrapper](base)
    for source in (tmp_path / "model", model, wrapped):
        merged = fm.merge(outer, [source], EXACT)
        assert merged.keys() == outer.state_dict().keys()
        prefix = next(name for name in merged if name.endswith("lm_head.weight")).removesuffix("lm_head.weight")
        check({name.removeprefix(prefix): tensor for name, tensor in merged.items()}, model, "a wrapped base")
    name = next(name for name in outer.state_dict() if name.endswith("lm_head.weight"))
    kept = fm.merge(outer, [model], EXACT.replace(select=[(name, "copy"), ("*", "merge")]))
    assert torch.equal(kept[name], base.lm_head.weight)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "_forward_module.", "_module.", "module._orig_mod."])
def test_prefixes_of_wrappers_before_the_names_of_a_module(prefix: str, tmp_path: Path) -> None:
    base, model = mixture(0), mixture(1)
    base.save_pretrained(tmp_path / "base")
    model.save_pretrained(tmp_path / "model")
    state = {prefix + name: tensor for name, tensor in model.state_dict().items()}
    check(fm.merge(base, [state], EXACT), model, prefix)
    expected = fm.merge(tmp_path / "base", [tmp_path / "model"], EXACT)
    found = fm.merge(tmp_path / "base", [state], EXACT)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_another_prefix_before_the_names_of_a_module_is_told_and_the_advice_works() -> None:
    base, model = mixture(0), mixture(1)
    state = {f"net.{name}": tensor for name, tensor in model.state_dict().items()}
    with pytest.raises(fm.CheckpointError, match="the names differ by a prefix") as refusal:
        fm.merge(base, [state], EXACT)
    assert "copy" not in str(refusal.value)
    advice = re.search(r"--rename '([^=]*)=([^=]*)'", str(refusal.value))
    assert advice is not None
    check(fm.merge(base, [state], EXACT.replace(rename=[advice.groups()])), model, "renamed")


@pytest.mark.parametrize("name", ["GPT2LMHeadModel", "Gemma2ForCausalLM", "BertForMaskedLM"])
@pytest.mark.parametrize("trained_on", ["the encoder", "the whole"])
def test_adapters_trained_without_the_head_or_with_it(name: str, trained_on: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    whole = build(name, 0, tied=True)
    encoder = getattr(whole, whole.base_model_prefix)
    trained, base = (encoder, whole) if trained_on == "the encoder" else (whole, encoder)
    targets = {"GPT2LMHeadModel": "c_attn", "Gemma2ForCausalLM": "q_proj", "BertForMaskedLM": "query"}[name]
    base.save_pretrained(tmp_path / "base")
    config = peft.LoraConfig(r=2, target_modules=[targets], init_lora_weights=False)
    adapted = peft.get_peft_model(copy.deepcopy(trained), config)
    adapted.save_pretrained(tmp_path / "adapter")
    prefix = f"{whole.base_model_prefix}."
    expected = {key.removeprefix(prefix): tensor for key, tensor in adapted.merge_and_unload().state_dict().items()}
    before = {key.removeprefix(prefix): tensor for key, tensor in base.state_dict().items()}

    def check_merge(found: dict[str, Tensor]) -> None:
        found = {key.removeprefix(prefix): tensor for key, tensor in found.items()}
        assert any(not torch.equal(tensor, before[key]) for key, tensor in found.items())
        for key, tensor in found.items():
            if key in expected:
                torch.testing.assert_close(tensor, expected[key], rtol=1e-5, atol=1e-5)

    check_merge(fm.merge(base, [tmp_path / "adapter"], EXACT))
    check_merge(fm.merge(tmp_path / "base", [tmp_path / "adapter"], EXACT))
    # Nothing tells what a state dict is of; the message says how to.
    with pytest.raises(fm.CheckpointError, match=r"does not have; rename '.*' to '.*'") as refusal:
        fm.merge(base.state_dict(), [tmp_path / "adapter"], EXACT)
    advice = re.search(r"--rename '([^=]*)=([^=]*)'", str(refusal.value))
    assert advice is not None
    check_merge(fm.merge(base.state_dict(), [tmp_path / "adapter"], EXACT.replace(rename=[advice.groups()])))
