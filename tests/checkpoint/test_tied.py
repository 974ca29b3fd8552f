"""Tied heads: found by storage, by declaration or by value; written on their own where one model has its own."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

import freemerge as fm

EXACT = fm.Recipe(weights=(1.0,), scale=1.0, select=[fm.Rule("*", "merge")])  # base + task vector
HALF = fm.Recipe(weights="uniform", scale=1.0, select=[fm.Rule("*", "merge")])
EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
Kinds = st.lists(st.sampled_from(["absent", "tied", "copied", "own"]), min_size=2, max_size=4)


def state(kind: str, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tensors = {EMBED: torch.randn(11, 4, generator=generator), "model.norm.weight": torch.ones(4)}
    embeddings = tensors[EMBED]
    heads = {"tied": embeddings, "copied": embeddings.clone(), "own": torch.randn(11, 4, generator=generator)}
    return tensors | ({HEAD: heads[kind]} if kind != "absent" else {})


@given(kinds=Kinds.filter(lambda kinds: kinds[0] != "own" or "absent" not in kinds))
def test_any_mixture_of_state_dicts_merges_with_the_embeddings_as_the_head_where_there_is_none(
    kinds: list[str],
) -> None:
    states = [state(kind, seed) for seed, kind in enumerate(kinds)]
    merged = fm.merge(states[0], states[1:], HALF)
    for name in (EMBED, HEAD):
        values = [tensors.get(name, tensors[EMBED]) for tensors in states]
        if name in merged:
            torch.testing.assert_close(merged[name], sum(values[1:]) / (len(values) - 1))  # type: ignore[arg-type]
    assert (HEAD in merged) == ("own" in kinds or kinds[0] != "absent")


@pytest.mark.parametrize("order", [False, True])
def test_the_order_of_the_names_in_a_tied_state_dict_does_not_matter(order: bool) -> None:
    tied, own = state("tied", 0), state("own", 1)
    if order:
        tied = dict(reversed(tied.items()))
    expected = fm.merge({**state("absent", 0)}, [own], HALF)
    merged = fm.merge(tied, [own], HALF)
    assert merged.keys() == expected.keys()
    assert all(torch.equal(merged[name], tensor) for name, tensor in expected.items())
    back = fm.merge(own, [tied], EXACT)
    for name, tensor in back.items():
        torch.testing.assert_close(tensor, tied[name])


@pytest.mark.parametrize("stored", [("lm_head", "lm_head"), ("lm_head", "embed"), ("encoder", "lm_head"), ("encoder",)])
def test_a_file_may_store_a_tied_tensor_under_any_of_its_names(stored: tuple[str, ...], tmp_path: Path) -> None:
    """safetensors' save_model keeps the name that is first by alphabet, transformers the first in the module."""
    tensor = torch.randn(9, 4)
    base = dict.fromkeys(("embed", "encoder", "lm_head"), tensor)
    for i, name in enumerate(stored):
        save_file({name: tensor + i + 1}, tmp_path / f"{i}.safetensors")
    models = [tmp_path / f"{i}.safetensors" for i in range(len(stored))]
    merged = fm.merge(base, models, method="average")
    assert merged.keys() == base.keys()
    assert all(value is merged["embed"] for value in merged.values())
    torch.testing.assert_close(merged["embed"], tensor + (len(stored) + 1) / 2)
    save_file({"lm_head": tensor}, tmp_path / "base.safetensors")
    merged = fm.merge(tmp_path / "base.safetensors", [*models, base], method="average")  # where a model tells the names
    assert merged.keys() == {"lm_head"}


def test_a_head_that_only_a_model_lacks_is_not_made_up() -> None:
    """It may be a model without any head, such as a classifier: nothing says that it was tied."""
    with pytest.raises(fm.CheckpointError, match=r"models\[0\] .*lacks 1 tensor of the base: lm_head\.weight"):
        fm.merge(state("own", 0), [state("absent", 1)])


def test_a_constant_is_no_copy_of_another_constant() -> None:
    base = {"a.weight": torch.randn(4, 4), "norm.weight": torch.ones(4)}
    with pytest.raises(fm.CheckpointError, match=r"norm2\.weight"):
        fm.merge(base, [base | {"norm2.weight": torch.ones(4)}])


@pytest.mark.parametrize("other", ["decoder.weight", "x.y.z", "generator", "output.projection", "h.0.t"])
def test_copies_are_found_under_any_name(other: str) -> None:
    base = {"a.weight": torch.randn(9, 4), "b.weight": torch.randn(4, 4)}
    tuned = {name: tensor + 1 for name, tensor in base.items()}
    copied = tuned | {other: tuned["a.weight"].clone()}
    for pair in ((base, copied), (base | {other: base["a.weight"].clone()}, tuned)):
        merged = fm.merge(pair[0], [pair[1]], EXACT)
        assert merged.keys() == pair[0].keys()
        assert all(torch.equal(merged[name], tensor) for name, tensor in tuned.items())


@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")
@pytest.mark.parametrize("name", ["complex32", "float4_e2m1fn_x2", "float8_e4m3fn"])
def test_copies_are_found_in_any_dtype(name: str) -> None:
    dtype = getattr(torch, name, None)
    if dtype is None:
        pytest.skip(f"this torch has no {name}")
    raw = torch.arange(64, dtype=torch.uint8).view(4, 16).view(dtype)
    base = {"w": torch.randn(4, 4), "codes": raw}
    copied, other = (base | {"second": second.view(dtype)} for second in (raw.clone(), raw.view(torch.uint8) ^ 1))
    assert fm.merge(base, [copied]).keys() == base.keys()
    assert fm.merge(copied, [base]).keys() == copied.keys()
    with pytest.raises(fm.CheckpointError, match="second"):
        fm.merge(base, [other])


def test_a_copy_is_one_bit_for_bit() -> None:
    first = torch.randn(9, 4)
    first[8, 0], first[8, 1] = torch.nan, 0.0  # behind the bytes that are looked at first
    negated = first.clone()
    negated[8, 1] = -0.0
    base = {"w": torch.randn(4, 4), "a": first}
    drop = fm.Recipe(select=[fm.Rule("a", "copy")])
    assert fm.merge(base, [base | {"b": first.clone()}], drop).keys() == base.keys()
    with pytest.raises(fm.CheckpointError, match=r"\bb\b"):
        fm.merge(base, [base | {"b": negated}], drop)


# Models of transformers

SMALL = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24, "vocab_size": 40}
TIED_MODELS = {
    "LlamaForCausalLM": ("LlamaConfig", SMALL | {"tie_word_embeddings": True}),
    "GemmaForCausalLM": ("GemmaConfig", SMALL | {"head_dim": 8, "num_key_value_heads": 1}),
    "GPT2LMHeadModel": ("GPT2Config", {"n_layer": 1, "n_head": 2, "n_embd": 16, "vocab_size": 40, "n_positions": 16}),
    "BertForMaskedLM": ("BertConfig", SMALL),
    "RobertaForMaskedLM": ("RobertaConfig", SMALL | {"max_position_embeddings": 20}),
    "AlbertForMaskedLM": ("AlbertConfig", SMALL | {"embedding_size": 16}),
    "ElectraForMaskedLM": ("ElectraConfig", SMALL | {"embedding_size": 16}),
    "OpenAIGPTLMHeadModel": ("OpenAIGPTConfig", {"n_layer": 1, "n_head": 2, "n_embd": 16, "vocab_size": 40}),
}
TOKENS = torch.arange(5, 13)[None]


def build(name: str, seed: int = 0, **changes: Any) -> Any:
    transformers = pytest.importorskip("transformers")
    config, sizes = TIED_MODELS[name]
    torch.manual_seed(seed)
    model = getattr(transformers, name)(getattr(transformers, config)(**sizes | changes)).eval()
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    return model


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        output: Tensor = model(TOKENS).logits
    return output


def loaded(name: str, folder: Path) -> Any:
    transformers = pytest.importorskip("transformers")
    model, info = getattr(transformers, name).from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    return model.eval()


@pytest.mark.parametrize("name", TIED_MODELS)
@pytest.mark.filterwarnings("ignore")
def test_a_model_with_a_head_of_its_own_on_a_tied_base(name: str, tmp_path: Path) -> None:
    build(name).save_pretrained(tmp_path / "base")
    untied = build(name, 1, tie_word_embeddings=False)
    untied.save_pretrained(tmp_path / "model")
    fm.merge_checkpoints(tmp_path / "base", [tmp_path / "model"], tmp_path / "out", EXACT, progress=False)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False
    torch.testing.assert_close(logits(loaded(name, tmp_path / "out")), logits(untied), rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", TIED_MODELS)
@pytest.mark.filterwarnings("ignore")
def test_tied_models_stay_tied_stored_with_or_without_copies(name: str, tmp_path: Path) -> None:
    base, tuned = build(name), build(name, 1)
    base.save_pretrained(tmp_path / "base")
    tuned.save_pretrained(tmp_path / "model")
    copied = {key: tensor.clone() for key, tensor in tuned.state_dict().items()}
    (tmp_path / "copied").mkdir()
    save_file(copied, tmp_path / "copied" / "model.safetensors", metadata={"format": "pt"})
    sources: list[Any] = [tmp_path / "model", tmp_path / "copied", tuned, tuned.state_dict(), copied]
    results = []
    for i, source in enumerate(sources):
        fm.merge_checkpoints(tmp_path / "base", [source], tmp_path / f"out{i}", progress=False)
        results.append(load_file(tmp_path / f"out{i}" / "model.safetensors"))
        assert json.loads((tmp_path / f"out{i}" / "config.json").read_text()) == json.loads(
            (tmp_path / "base" / "config.json").read_text()
        )
    assert results[0].keys() == load_file(tmp_path / "base" / "model.safetensors").keys()
    for result in results[1:]:
        assert all(torch.equal(tensor, results[0][key]) for key, tensor in result.items())


@pytest.mark.filterwarnings("ignore")
def test_a_base_that_stores_copies_which_its_config_ties(tmp_path: Path) -> None:
    """Equal in all: one tensor, and copies of it in the output. Different in one model: a head of its own."""
    models = [build("LlamaForCausalLM", seed) for seed in range(3)]
    folders = []
    for i, model in enumerate(models):
        folders.append(tmp_path / str(i))
        model.save_pretrained(folders[i])
        stored = load_file(folders[i] / "model.safetensors")
        head = stored[EMBED] + (1.0 if i == 2 else 0.0)
        save_file(stored | {HEAD: head}, folders[i] / "model.safetensors", metadata={"format": "pt"})
    fm.merge_checkpoints(folders[0], [folders[1]], tmp_path / "tied", progress=False)
    tied = load_file(tmp_path / "tied" / "model.safetensors")
    assert torch.equal(tied[HEAD], tied[EMBED])
    assert json.loads((tmp_path / "tied" / "config.json").read_text())["tie_word_embeddings"] is True
    fm.merge_checkpoints(folders[0], folders[1:], tmp_path / "own", HALF, progress=False)
    own = load_file(tmp_path / "own" / "model.safetensors")
    torch.testing.assert_close(own[HEAD], own[EMBED] + 0.5)
    assert json.loads((tmp_path / "own" / "config.json").read_text())["tie_word_embeddings"] is False


ADAPTERS: dict[str, dict[str, Any]] = {
    "embeddings in full": {"target_modules": ["X"], "modules_to_save": ["EMBED"]},
    "head in full": {"target_modules": ["X"], "modules_to_save": ["HEAD"]},
    "embeddings and head in full": {"target_modules": ["X"], "modules_to_save": ["EMBED", "HEAD"]},
    "embeddings, tied, in full": {"target_modules": ["X"], "modules_to_save": ["EMBED"], "ensure_weight_tying": True},
    "LoRA of embeddings, tied": {"target_modules": ["X", "EMBED"], "ensure_weight_tying": True},
    "LoRA of embeddings": {"target_modules": ["X", "EMBED"]},
    "LoRA of the head": {"target_modules": ["X", "HEAD"]},
    "LoRA of embeddings and head": {"target_modules": ["X", "EMBED", "HEAD"]},
    "LoRA of neither": {"target_modules": ["X"]},
}


@pytest.mark.parametrize("case", ADAPTERS)
@pytest.mark.parametrize("name", ["LlamaForCausalLM", "GPT2LMHeadModel"])
@pytest.mark.filterwarnings("ignore")
def test_an_adapter_of_a_tied_base_gives_the_logits_it_was_trained_to(case: str, name: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    modules = {"X": "q_proj", "EMBED": "embed_tokens", "HEAD": "lm_head"}
    if name == "GPT2LMHeadModel":
        modules |= {"X": "c_attn", "EMBED": "wte"}
    options = {
        key: [modules[item] for item in value] if isinstance(value, list) else value
        for key, value in ADAPTERS[case].items()
    }
    base = build(name)
    base.save_pretrained(tmp_path / "base")
    adapted = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(r=4, **options)).eval()
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn_like(parameter)
    adapted.save_pretrained(tmp_path / "adapter")
    expected = logits(adapted)
    fm.merge_checkpoints(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "out", EXACT, progress=False)
    found = logits(loaded(name, tmp_path / "out"))
    assert (found - expected).abs().max() < 1e-4 < (logits(base) - expected).abs().max()


@pytest.mark.filterwarnings("ignore")
def test_a_model_whose_arithmetic_changes_with_the_tie_is_refused(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.T5Config(d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2, vocab_size=40)
    model = transformers.T5ForConditionalGeneration(config)
    model.save_pretrained(tmp_path / "base")
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state["lm_head.weight"] += 1
    with pytest.raises(fm.CheckpointError, match=r"a t5 model computes otherwise"):
        fm.merge_checkpoints(tmp_path / "base", [state], tmp_path / "out", progress=False)
