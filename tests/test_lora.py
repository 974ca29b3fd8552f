"""LoRA adapters from models: PEFT applies them, freemerge reads them, and they are the best of their rank."""

from __future__ import annotations

import copy
import errno
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import freemerge as fm
from freemerge.checkpoint.staging import Staging
from freemerge.cli import main


def changed(state: dict[str, Tensor], rank: int, *, seed: int = 0) -> dict[str, Tensor]:
    """Matrices plus a product of that rank."""
    generator = torch.Generator().manual_seed(seed)

    def change(tensor: Tensor) -> Tensor:
        if tensor.dim() != 2:
            return tensor.clone()
        left, right = (torch.randn(side, rank, generator=generator) for side in tensor.shape)
        return tensor + 0.1 * left @ right.T

    return {name: change(tensor) for name, tensor in state.items()}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=20, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, tie_word_embeddings=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    model.save_pretrained(tmp_path_factory.mktemp("llama") / "base")
    return model


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=20, n_positions=8, n_embd=16, n_layer=1, n_head=2))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("rank", [4, 20, 1000])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_peft_and_freemerge_read_the_adapter(
    kind: str, rank: int, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    peft = pytest.importorskip("peft")
    model = request.getfixturevalue(kind)
    model.save_pretrained(tmp_path / "base")
    tuned = changed(load_file(tmp_path / "base" / "model.safetensors"), 3)
    save_file(tuned, tmp_path / "tuned.safetensors")
    made = fm.extract_lora(tmp_path / "base", tmp_path / "tuned.safetensors", tmp_path / "adapter", rank=rank)
    assert all(("embed" in name) or ("wte" in name) or ("wpe" in name) for name in made.left_out)
    assert made.left_out
    assert 0.5 < made.kept < 1
    expected = tuned | {name: load_file(tmp_path / "base" / "model.safetensors")[name] for name in made.left_out}

    adapted = peft.PeftModel.from_pretrained(type(model).from_pretrained(tmp_path / "base"), tmp_path / "adapter")
    merged = adapted.merge_and_unload().state_dict()
    read = fm.merge(tmp_path / "base", [tmp_path / "adapter"], fm.Recipe(method="average"))
    for name, tensor in expected.items():
        known = name if name in merged else f"transformer.{name}"
        torch.testing.assert_close(merged[known], tensor, atol=2e-6, rtol=1e-5)
        torch.testing.assert_close(read[name], tensor, atol=2e-6, rtol=1e-5)
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    widest = 16
    assert (config["r"], config["task_type"]) == (min(rank, widest), "CAUSAL_LM")
    for factor in load_file(tmp_path / "adapter" / "adapter_model.safetensors").values():
        assert min(factor.shape) <= rank


@pytest.mark.filterwarnings("ignore")
def test_layers_of_different_ranks_are_told_apart_by_name(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")

    class Block(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.a_b, self.ab = nn.Linear(width, width), nn.Linear(2, width)
            self.a = nn.ModuleDict({"b": nn.Linear(3, width)})

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.ab = nn.Linear(12, 4)
            self.inner, self.a_b = Block(8), nn.Linear(12, 12)

    base = Model()
    tuned = Model()
    made = fm.extract_lora(base, tuned, tmp_path / "adapter", rank=6)
    assert (made.rank, made.layers) == (6, 5)
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["rank_pattern"] == config["alpha_pattern"]
    assert {name: config["rank_pattern"][name] for name in ("ab", "inner.ab", "inner.a.b")} == {
        "ab": 4, "inner.ab": 2, "inner.a.b": 3,
    }  # fmt: skip
    adapted = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "adapter")
    merged = adapted.merge_and_unload().state_dict()
    read = fm.merge(base, [tmp_path / "adapter"], method="average")
    for name in ("ab.weight", "inner.ab.weight", "inner.a.b.weight"):
        torch.testing.assert_close(merged[name], tuned.state_dict()[name], atol=2e-6, rtol=1e-5)
    for name, tensor in merged.items():
        torch.testing.assert_close(read[name], tensor, atol=2e-6, rtol=1e-5)


@pytest.mark.filterwarnings("ignore")
def test_names_that_are_no_patterns(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")

    def model() -> nn.Module:
        return nn.ModuleDict({"a(b+c": nn.Linear(4, 3), "d": nn.Linear(9, 9)})

    base, tuned = model(), model()
    fm.extract_lora(base, tuned, tmp_path / "adapter", rank=5)
    adapted = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "adapter")
    merged, read = adapted.merge_and_unload().state_dict(), fm.merge(base, [tmp_path / "adapter"], method="average")
    name = "a(b+c.weight"
    torch.testing.assert_close(merged[name], tuned.state_dict()[name], atol=2e-6, rtol=1e-5)
    torch.testing.assert_close(read[name], tuned.state_dict()[name], atol=2e-6, rtol=1e-5)


@pytest.mark.filterwarnings("ignore")
def test_linear_layers_of_a_class_of_their_own(tmp_path: Path) -> None:
    """Falcon's: there used to be no linear layer that differed."""
    peft = pytest.importorskip("peft")
    from transformers import FalconConfig, FalconForCausalLM

    config = FalconConfig(vocab_size=40, hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
    for name in ("base", "tuned"):
        FalconForCausalLM(config).save_pretrained(tmp_path / name)
    made = fm.extract_lora(tmp_path / "base", tmp_path / "tuned", tmp_path / "adapter", rank=16)
    assert made.layers == 4
    base = FalconForCausalLM.from_pretrained(tmp_path / "base")
    merged = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").merge_and_unload().state_dict()
    tuned = load_file(tmp_path / "tuned" / "model.safetensors")
    for name in set(tuned) - set(made.left_out):
        torch.testing.assert_close(merged[name], tuned[name], atol=2e-6, rtol=1e-5)


@pytest.mark.filterwarnings("ignore")
def test_files_without_the_prefix_of_the_model_are_known(gpt2: Any, tmp_path: Path) -> None:
    """As GPT-2's own on the Hub: their layers used to be none that the model has."""
    gpt2.save_pretrained(tmp_path / "base")
    file = tmp_path / "base" / "model.safetensors"
    state = {name.removeprefix("transformer."): tensor for name, tensor in load_file(file).items()}
    save_file(state, file, metadata={"format": "pt"})
    made = fm.extract_lora(tmp_path / "base", changed(state, 2), tmp_path / "adapter", rank=2)
    assert made.layers == 4
    assert made.left_out == ("wpe.weight", "wte.weight")
    assert "base_model.model.transformer.h.0.attn.c_attn.lora_A.weight" in load_file(
        tmp_path / "adapter" / "adapter_model.safetensors"
    )


def test_a_lower_rank_is_the_best_approximation(tmp_path: Path) -> None:
    base = {"a.weight": torch.randn(9, 14), "b.weight": torch.randn(5, 5), "a.bias": torch.zeros(9)}
    tuned = changed(base, 5) | {"a.bias": torch.ones(9)}
    made = fm.extract_lora(base, tuned, tmp_path / "adapter", rank=2)
    assert made.left_out == ("a.bias",)
    factors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    total = kept = 0.0
    for name in ("a", "b"):
        change = (tuned[f"{name}.weight"] - base[f"{name}.weight"]).double()
        u, s, v = torch.linalg.svd(change, full_matrices=False)
        product = factors[f"base_model.model.{name}.lora_B.weight"] @ factors[f"base_model.model.{name}.lora_A.weight"]
        torch.testing.assert_close(product.double(), (u[:, :2] * s[:2]) @ v[:2], atol=1e-5, rtol=1e-4)
        total, kept = total + float(s.square().sum()), kept + float(s[:2].square().sum())
    assert made.kept == pytest.approx(kept / (total + 9), rel=1e-5)


def test_what_cannot_be_meant(tmp_path: Path) -> None:
    base = {"a.weight": torch.randn(4, 3), "a.bias": torch.zeros(4)}
    with pytest.raises(fm.ArgumentError, match="rank must be"):
        fm.extract_lora(base, base, tmp_path / "out", rank=0)
    with pytest.raises(fm.CheckpointError, match=r"no linear layer of .* differs"):
        fm.extract_lora(base, base | {"a.bias": torch.ones(4)}, tmp_path / "out", rank=1)
    with pytest.raises(fm.CheckpointError, match="not finite"):
        fm.extract_lora(base, base | {"a.weight": torch.full((4, 3), torch.nan)}, tmp_path / "out", rank=1)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "file").touch()
    with pytest.raises(fm.RefusedError):
        fm.extract_lora(base, base, tmp_path / "out", rank=1)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = {"a.weight": torch.randn(6, 5), "c.weight": torch.randn(4, 4), "embed.weight": torch.randn(7, 5)}
    save_file(base, tmp_path / "base.safetensors")
    save_file(changed(base, 1), tmp_path / "tuned.safetensors")
    command = ["lora", str(tmp_path / "base.safetensors"), str(tmp_path / "tuned.safetensors"), "--rank", "2"]
    assert main([*command, "-o", str(tmp_path / "adapter"), "--select", "c.*=copy"]) == 0
    captured = capsys.readouterr()
    assert captured.out.startswith(f"{tmp_path / 'adapter'}: 1 layer, ")
    assert captured.err == "left out, as no linear layers: embed.weight\n"
    assert main([*command, "-o", str(tmp_path / "json"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["layers"] == 2
    assert main([*command, "-o", str(tmp_path / "json")]) == 3
    assert "use --force" in capsys.readouterr().err
    assert main([*command, "-o", str(tmp_path / "json"), "--force"]) == 0


@pytest.mark.parametrize("foreign", ["README.md", "of PEFT", "broken", "base"])
def test_force_replaces_only_adapters_of_freemerge(foreign: str, tmp_path: Path) -> None:
    base = {"a.weight": torch.randn(6, 5)}
    out = tmp_path / "adapter"
    save_file(changed(base, 1), tmp_path / "tuned.safetensors")
    fm.extract_lora(base, tmp_path / "tuned.safetensors", out, rank=1)
    weights = out / "adapter_model.safetensors"
    if foreign == "README.md":
        (out / foreign).touch()
    elif foreign == "of PEFT":
        save_file(load_file(weights), weights, metadata={"format": "pt"})
    elif foreign == "broken":
        weights.write_bytes(b"")
    before = {file: file.read_bytes() for file in out.iterdir()}
    with pytest.raises(fm.RefusedError, match="is an input" if foreign == "base" else "even force"):
        fm.extract_lora(base, out if foreign == "base" else base, out, rank=1, force=True)
    assert {file: file.read_bytes() for file in out.iterdir()} == before
    assert sorted(file.name for file in tmp_path.iterdir()) == ["adapter", "tuned.safetensors"]


def test_force_replaces_an_adapter_at_once(tmp_path: Path) -> None:
    base = {"a.weight": torch.randn(6, 5)}
    out = tmp_path / "adapter"
    for rank in (1, 2):
        fm.extract_lora(base, changed(base, 3), out, rank=rank, force=True)
    assert load_file(out / "adapter_model.safetensors")["base_model.model.a.lora_A.weight"].shape == (2, 5)
    with pytest.raises(fm.CheckpointError, match="no linear layer"):
        fm.extract_lora(base, base, out, rank=1, force=True)
    assert [file.name for file in tmp_path.iterdir()] == ["adapter"]


def test_an_output_that_is_being_written_is_refused_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = {"layer.weight": torch.randn(8, 6)}
    other = changed(base, 2)
    living = Staging(tmp_path / "lora")
    monkeypatch.setattr("freemerge.lora.leading_triplets", lambda *args: pytest.fail("it worked for nothing"))
    with pytest.raises(fm.RefusedError, match="lora cannot be written now: another run is writing it"):
        fm.extract_lora(base, other, tmp_path / "lora", rank=2)
    living.end()
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_fills_up_leaves_the_old_adapter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = {"layer.weight": torch.randn(8, 6)}
    fm.extract_lora(base, changed(base, 2), tmp_path / "lora", rank=2)
    before = {path.name: path.read_bytes() for path in (tmp_path / "lora").iterdir()}
    flush = os.fsync
    for succeeding in (0, 1):  # then it fails for the config, or for the weights
        left = iter(range(succeeding))

        def fsync(fd: int, left: Iterator[int] = left) -> None:
            if next(left, None) is None:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            flush(fd)

        monkeypatch.setattr(os, "fsync", fsync)
        with pytest.raises(fm.CheckpointError, match="the disk is full; nothing was changed"):
            fm.extract_lora(base, changed(base, 2, seed=1), tmp_path / "lora", rank=2, force=True)
        assert {path.name: path.read_bytes() for path in (tmp_path / "lora").iterdir()} == before
        assert [path.name for path in tmp_path.iterdir()] == ["lora"]
