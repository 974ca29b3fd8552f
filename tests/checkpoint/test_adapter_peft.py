"""PEFT is the reference: every adapter that it can merge is merged to the same weights, or refused by name."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import freemerge as fm
from freemerge.checkpoint import Checkpoint, open_model
from freemerge.checkpoint.adapter_config import FOLLOWED, NO_EFFECT

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
from peft.tuners.lora import config as lora_options  # noqa: E402
from transformers.pytorch_utils import Conv1D  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")


class Net(nn.Module):
    """A layer of every kind that PEFT adapts; square and not square."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(11, 8)
        self.lin, self.square, self.bare = nn.Linear(8, 12), nn.Linear(8, 8), nn.Linear(8, 8, bias=False)
        self.turned, self.turned_square = Conv1D(12, 8), Conv1D(8, 8)
        self.conv1, self.conv2 = nn.Conv1d(4, 6, 3), nn.Conv2d(4, 6, (3, 2))
        self.pointwise, self.conv3, self.grouped = nn.Conv2d(4, 6, 1), nn.Conv3d(4, 6, 2), nn.Conv2d(4, 8, 3, groups=2)
        self.attention = nn.MultiheadAttention(8, 2)
        self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return x


LINEAR = ["lin", "square", "bare"]
CONVOLUTIONS = ["conv1", "conv2", "conv3", "pointwise"]
EVERYTHING = ["emb", *LINEAR, "turned", "turned_square", *CONVOLUTIONS]


def lora(*targets: str, **options: Any) -> Any:
    return peft.LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": [*targets]} | options)


def ia3(*targets: str, **options: Any) -> Any:
    return peft.IA3Config(target_modules=[*targets], **{"feedforward_modules": []} | options)


# Made when they are used: PEFT checks and changes a config as it builds a model.
MERGED: dict[str, Callable[[], Any]] = {
    "linear": lambda: lora(*LINEAR),
    "every layer": lambda: lora(*EVERYTHING),
    "rslora": lambda: lora(*LINEAR, use_rslora=True),
    "alpha and rank patterns": lambda: lora(*LINEAR, rank_pattern={"lin": 2}, alpha_pattern={"s.*e": 3, "lin": 9}),
    "patterns and rslora": lambda: lora(*LINEAR, rank_pattern={"lin": 2}, alpha_pattern={"lin": 9}, use_rslora=True),
    "a target by pattern": lambda: peft.LoraConfig(target_modules=r"(lin|square)", lora_alpha=5, lora_dropout=0.1),
    "all linear": lambda: peft.LoraConfig(target_modules="all-linear"),
    "embedding": lambda: lora("emb"),
    "convolutions": lambda: lora(*CONVOLUTIONS),
    "Conv1D": lambda: lora("turned", "turned_square", fan_in_fan_out=True),
    "Conv1D, then Linear": lambda: lora("turned_square", "head"),
    "mixed layers": lambda: lora("turned", "turned_square", "square", "lin"),
    "all biases": lambda: lora(*LINEAR, bias="all"),
    "biases of adapted layers": lambda: lora("lin", "turned", bias="lora_only"),
    "biases of its own": lambda: lora("lin", "turned", "conv2", lora_bias=True),
    "a module in full": lambda: lora("square", modules_to_save=["head", "norm"]),
    "DoRA": lambda: lora("lin", "bare", use_dora=True),
    "DoRA of every layer": lambda: lora(*EVERYTHING, use_dora=True),
    "DoRA, rslora, patterns": lambda: lora(*LINEAR, use_dora=True, use_rslora=True, rank_pattern={"lin": 3}),
    "gaussian": lambda: lora(*LINEAR, init_lora_weights="gaussian"),
    "no initialisation": lambda: lora(*LINEAR, init_lora_weights=False),
    "orthogonal": lambda: lora(*LINEAR, init_lora_weights="orthogonal"),
    "eva": lambda: lora(*LINEAR, init_lora_weights="eva"),
    "mica": lambda: lora(*LINEAR, "emb", init_lora_weights="mica"),
    "pissa": lambda: lora(*LINEAR, init_lora_weights="pissa"),
    "pissa of Conv1D": lambda: lora("turned", "turned_square", "lin", init_lora_weights="pissa"),
    "pissa beside an embedding": lambda: lora("lin", "emb", init_lora_weights="pissa"),
    "pissa, DoRA, patterns": lambda: lora(*LINEAR, init_lora_weights="pissa", use_dora=True, alpha_pattern={"lin": 2}),
    "olora": lambda: lora(*LINEAR, init_lora_weights="olora"),
    "olora and rslora": lambda: lora(*LINEAR, init_lora_weights="olora", use_rslora=True),
    "IA3": lambda: ia3(*LINEAR, "head", feedforward_modules=["square"]),
    "IA3 by pattern": lambda: ia3(*LINEAR, feedforward_modules=r"l.n"),
    "IA3 by an ending of a name": lambda: ia3("lin", "square", feedforward_modules=["square"]),
    "IA3 of Conv1D": lambda: ia3("turned", "turned_square", feedforward_modules=["turned"], fan_in_fan_out=True),
    "IA3 of mixed layers": lambda: ia3("turned", "turned_square", "square", "lin", feedforward_modules=["turned"]),
    "IA3 of convolutions": lambda: ia3("conv2", "conv3", "pointwise", feedforward_modules=["pointwise"]),
    "IA3 of groups": lambda: ia3("grouped", feedforward_modules=["grouped"]),
    "IA3 of groups, outputs": lambda: ia3("grouped"),
    "IA3 and a module in full": lambda: ia3("lin", modules_to_save=["head"]),
}

REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "aLoRA": (lambda: lora("lin", alora_invocation_tokens=[1, 2]), "alora_invocation_tokens are not merged here; PEFT"),
    "pissa by iteration": (lambda: lora("lin", init_lora_weights="pissa_niter_4"), "init_lora_weights 'pissa_niter_4'"),
    "LoRA-GA": (lambda: lora("lin", init_lora_weights="lora_ga"), "init_lora_weights 'lora_ga'"),
    "KaSA": (lambda: lora("lin", kasa_config=lora_options.KasaConfig()), "kasa_config"),
    "VeLoRA": (lambda: lora("lin", velora_config=lora_options.VeloraConfig(num_groups=2)), "velora_config"),
    "MonteCLoRA": (lambda: lora("lin", monteclora_config=lora_options.MontecloraConfig()), "monteclora_config"),
    "BD-LoRA": (
        lambda: lora("lin", use_bdlora=lora_options.BdLoraConfig(target_modules_bd_a=["lin"], nblocks=2)),
        "use_bdlora",
    ),
    "parameters": (lambda: lora(target_parameters=["lin.weight"]), "target_parameters"),
    "tokens": (lambda: lora("lin", trainable_token_indices={"emb": [1, 3]}), "trainable_token_indices"),
    "groups": (lambda: lora("grouped"), "do not make up"),
    "attention": (lambda: lora("attention"), "MultiheadAttention"),
    "LoHa": (lambda: peft.LoHaConfig(target_modules=["lin"]), "peft_type is 'LOHA'"),
    "LoKr": (lambda: peft.LoKrConfig(target_modules=["lin"]), "peft_type is 'LOKR'"),
    "OFT": (lambda: peft.OFTConfig(target_modules=["lin"], oft_block_size=4), "peft_type is 'OFT'"),
    "VeRA": (lambda: peft.VeraConfig(target_modules=["lin"], r=2), "peft_type is 'VERA'"),
    "HRA": (lambda: peft.HRAConfig(target_modules=["lin"], r=2), "peft_type is 'HRA'"),
}


def trained(config: Any, folder: Path, net: nn.Module | None = None) -> tuple[nn.Module, Any]:
    """A base, and an adapter of it with random weights, saved as PEFT saves it."""
    torch.manual_seed(0)
    net = Net() if net is None else net
    base = copy.deepcopy(net)
    adapted = peft.get_peft_model(net, config).eval()
    generator = torch.Generator().manual_seed(1)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    adapted.save_pretrained(folder)
    return base, adapted


def read(folder: Path, base: Any) -> dict[str, Tensor]:
    opened = open_model(folder, Checkpoint.open(base))
    return {name: opened.read(name) for name in opened.specs}


@pytest.mark.parametrize("case", MERGED)
def test_the_weights_that_peft_merges(case: str, tmp_path: Path) -> None:
    base, adapted = trained(MERGED[case](), tmp_path / "adapter")
    found = read(tmp_path / "adapter", base)
    reloaded = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "adapter")
    for merged in (adapted.merge_and_unload(), reloaded.merge_and_unload()):
        expected = merged.state_dict()
        assert any(not torch.equal(tensor, expected[name]) for name, tensor in base.state_dict().items())
        for name, tensor in expected.items():
            torch.testing.assert_close(found[name], tensor, rtol=2e-5, atol=2e-6, msg=f"{case}: {name}")


@pytest.mark.parametrize("case", REFUSED)
def test_what_peft_does_otherwise_is_refused_by_name(case: str, tmp_path: Path) -> None:
    config, message = REFUSED[case]
    base, adapted = trained(config(), tmp_path / "adapter")
    with pytest.raises(fm.CheckpointError, match=message) as refusal:
        open_model(tmp_path / "adapter", Checkpoint.open(base))
    advice = str(refusal.value)
    recipe = fm.Recipe(weights=(1.0,), scale=1.0, select=[fm.Rule("*", "merge")])
    if "PeftModel.from_pretrained(base, ADAPTER).merge_and_unload()" in advice:
        module = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "adapter").merge_and_unload()
    elif "in the process that trained it" in advice:
        module = adapted.merge_and_unload()
    else:
        with pytest.raises(NotImplementedError):  # PEFT refuses, too
            adapted.merge_and_unload()
        return
    merged = fm.merge(base, [module], recipe)
    for name, tensor in module.state_dict().items():
        torch.testing.assert_close(merged[name], tensor, msg=name)


@pytest.mark.parametrize(("kind", "config"), [("LORA", peft.LoraConfig), ("IA3", peft.IA3Config)])
def test_every_option_that_peft_knows_is_followed_harmless_or_refused(kind: str, config: Any, tmp_path: Path) -> None:
    """A new version of PEFT fails here until its new options are looked at."""
    decided = FOLLOWED[kind] | NO_EFFECT[kind] | REFUSED_OPTIONS[kind]
    assert {field.name for field in dataclasses.fields(config)} <= decided
    base, _ = trained(
        config(target_modules=["lin"], **({"feedforward_modules": []} if kind == "IA3" else {})), tmp_path
    )
    options = (tmp_path / "adapter_config.json").read_text()
    for option in REFUSED_OPTIONS[kind] | {"an_option_of_tomorrow"}:
        (tmp_path / "adapter_config.json").write_text(options.rstrip()[:-1] + f', "{option}": [1]}}')
        with pytest.raises(fm.CheckpointError, match=f"adapters with {option} are not merged here"):
            open_model(tmp_path, Checkpoint.open(base))


REFUSED_OPTIONS = {
    "LORA": {
        *("megatron_config", "trainable_token_indices", "velora_config", "alora_invocation_tokens", "use_qalora"),
        *("monteclora_config", "layer_replication", "target_parameters", "use_bdlora", "arrow_config", "kasa_config"),
    },
    "IA3": set(),
}


def test_a_square_conv1d_is_told_by_the_layer_by_its_neighbours_or_not_at_all(tmp_path: Path) -> None:
    base, adapted = trained(lora("turned_square", "head"), tmp_path)
    expected = adapted.merge_and_unload().state_dict()
    torch.testing.assert_close(read(tmp_path, base)["turned_square.weight"], expected["turned_square.weight"])
    with pytest.raises(fm.CheckpointError, match=r"turned_square\.weight is square.*pass the base as a module"):
        read(tmp_path, base.state_dict())


@pytest.mark.parametrize("targets", [["c_attn", "c_proj"], ["c_proj", "lm_head"], ["lm_head", "c_proj", "c_fc"]])
def test_gpt2_in_memory_as_state_dict_and_from_files(targets: list[str], tmp_path: Path) -> None:
    config = transformers.GPT2Config(
        n_layer=1, n_head=2, n_embd=16, vocab_size=40, n_positions=16, tie_word_embeddings=False
    )
    base, adapted = trained(lora(*targets), tmp_path / "adapter", transformers.GPT2LMHeadModel(config).eval())
    base.save_pretrained(tmp_path / "base")
    expected = adapted.merge_and_unload().state_dict()
    for source in (base, base.state_dict(), tmp_path / "base"):
        found = read(tmp_path / "adapter", source)
        for name, tensor in found.items():
            torch.testing.assert_close(tensor, expected[name], rtol=2e-5, atol=2e-6, msg=name)
