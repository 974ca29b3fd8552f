"""LoRA and IA3 adapters as models: against PEFT's own merge where it is installed, and against the formula."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

import freemerge as fm
from freemerge.checkpoint import Checkpoint, open_model
from freemerge.experts import extract_experts


def base_weights(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"up.weight": (24, 16), "up.bias": (24,), "down.weight": (16, 24), "down.bias": (16,), "norm": (16,)}
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}


def write(folder: Path, tensors: dict[str, Tensor], **config: Any) -> Path:
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(
        {f"base_model.model.{name}": tensor for name, tensor in tensors.items()}, folder / "adapter_model.safetensors"
    )
    return folder


def lora(folder: Path, seed: int = 1, **config: Any) -> Path:
    generator = torch.Generator().manual_seed(seed)
    a, b = (0.1 * torch.randn(shape, generator=generator) for shape in ((4, 16), (24, 4)))
    options = {"peft_type": "LORA", "r": 4, "lora_alpha": 8} | config
    return write(folder, {"up.lora_A.weight": a, "up.lora_B.weight": b}, **options)


def factors(folder: Path) -> tuple[Tensor, Tensor]:
    tensors = load_file(folder / "adapter_model.safetensors")
    return tensors["base_model.model.up.lora_A.weight"].double(), tensors["base_model.model.up.lora_B.weight"].double()


def read(folder: Path, base: dict[str, Tensor]) -> dict[str, Tensor]:
    opened = open_model(folder, Checkpoint.open(base))
    return {name: opened.read(name) for name in opened.specs}


@pytest.mark.parametrize(
    ("config", "scale"),
    [
        ({}, 2.0),
        ({"use_rslora": True}, 4.0),
        ({"alpha_pattern": {"up": 2}}, 0.5),
        ({"alpha_pattern": {"own": 2, r".*\.up": 3}}, 2.0),
        ({"r": 64, "rank_pattern": {"up": 4}}, 2.0),
    ],
)
def test_lora_by_the_formula(config: dict[str, Any], scale: float, tmp_path: Path) -> None:
    base = base_weights()
    folder = lora(tmp_path / "adapter", **config)
    a, b = factors(folder)
    model = read(folder, base)
    torch.testing.assert_close(
        model["up.weight"].double(), base["up.weight"].double() + scale * b @ a, rtol=0, atol=1e-6
    )
    assert all(torch.equal(model[name], base[name]) for name in base if name != "up.weight")


@pytest.mark.parametrize("config", [{}, {"init_lora_weights": "pissa"}, {"use_dora": True}], ids=str)
def test_a_float64_base_stays_as_it_is(config: dict[str, Any], tmp_path: Path) -> None:
    base = {name: tensor.double() for name, tensor in base_weights().items()}
    before = {name: tensor.clone() for name, tensor in base.items()}
    folder = lora(tmp_path / "adapter", **config)
    if "use_dora" in config:
        a, b = (factor.float() for factor in factors(folder))
        tensors = {"up.lora_A.weight": a, "up.lora_B.weight": b, "up.lora_magnitude_vector": torch.ones(len(b))}
        folder = write(tmp_path / "decomposed", tensors, peft_type="LORA", r=4, lora_alpha=8, **config)
    first, second = (read(folder, base)["up.weight"] for _ in range(2))
    assert torch.equal(first, second)
    assert not torch.equal(first, before["up.weight"])
    assert all(torch.equal(base[name], before[name]) for name in base)


def test_lowered_precision_does_not_reach_adapters(tmp_path: Path) -> None:
    base, folder = base_weights(), lora(tmp_path / "adapter")
    expected, precision = read(folder, base), torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        with torch.autocast("cpu"):
            assert torch.equal(read(folder, base)["up.weight"], expected["up.weight"])
    finally:
        torch.set_float32_matmul_precision(precision)


def test_a_task_vector_survives_a_bfloat16_base(tmp_path: Path) -> None:
    base = base_weights(torch.bfloat16)
    folder = lora(tmp_path / "adapter")
    a, b = factors(folder)
    model = read(folder, base)
    assert model["up.weight"].dtype == torch.float32
    task_vector = model["up.weight"].double() - base["up.weight"].double()
    assert (task_vector - 2 * b @ a).norm() < 1e-5 * (2 * b @ a).norm()


def test_adapters_merge_as_the_models_they_make(tmp_path: Path) -> None:
    base = base_weights()
    folders = [lora(tmp_path / f"adapter{seed}", seed) for seed in range(3)]
    models = [read(folder, base) for folder in folders]
    merged = fm.merge(base, folders, fm.Recipe.preset("paper"))
    expected = fm.merge(base, models, fm.Recipe.preset("paper"))
    assert all(torch.equal(merged[name], tensor) for name, tensor in expected.items())
    assert not torch.equal(merged["up.weight"], base["up.weight"])
    assert torch.equal(merged["down.weight"], base["down.weight"])


def test_an_adapter_merges_with_a_full_model_on_disk(tmp_path: Path) -> None:
    base, model = base_weights(), {name: 1.1 * tensor for name, tensor in base_weights().items()}
    for name, weights in (("base", base), ("model", model)):
        save_file(weights, tmp_path / f"{name}.safetensors")
    folder = lora(tmp_path / "adapter")
    paths = [tmp_path / "model.safetensors", folder]
    fm.merge_checkpoints(tmp_path / "base.safetensors", paths, tmp_path / "out.safetensors", progress=False)
    expected = fm.merge(base, [model, read(folder, base)])
    assert all(torch.equal(tensor, expected[name]) for name, tensor in load_file(tmp_path / "out.safetensors").items())


def test_experts_of_adapters(tmp_path: Path) -> None:
    base, folder = base_weights(), lora(tmp_path / "adapter")
    from_folder = extract_experts(base, {"a": folder}, density=0.1)["a"]
    from_model = extract_experts(base, {"a": read(folder, base)}, density=0.1)["a"]
    assert from_folder.mu == from_model.mu
    assert all(torch.equal(tensor, from_model.dense()[name]) for name, tensor in from_folder.dense().items())


def test_ia3_scales_outputs_and_feed_forward_inputs(tmp_path: Path) -> None:
    base = base_weights()
    generator = torch.Generator().manual_seed(2)
    out, into = torch.rand(24, 1, generator=generator), torch.rand(1, 24, generator=generator)
    config = {"peft_type": "IA3", "feedforward_modules": ["down"]}
    folder = write(tmp_path / "adapter", {"up.ia3_l": out, "down.ia3_l": into}, **config)
    model = read(folder, base)
    torch.testing.assert_close(model["up.weight"], base["up.weight"] * out)
    torch.testing.assert_close(model["up.bias"], base["up.bias"] * out.flatten())
    torch.testing.assert_close(model["down.weight"], base["down.weight"] * into)
    assert torch.equal(model["down.bias"], base["down.bias"])


def test_tensors_that_an_adapter_holds_in_full_replace_the_base(tmp_path: Path) -> None:
    new = torch.arange(16.0)
    folder = write(tmp_path / "adapter", {"norm": new}, peft_type="LORA", lora_alpha=1)
    assert torch.equal(read(folder, base_weights())["norm"], new)


def test_what_does_not_fit_is_named(tmp_path: Path) -> None:
    base = Checkpoint.open(base_weights())
    a, b = torch.zeros(4, 16), torch.zeros(24, 4)
    cases: list[tuple[dict[str, Tensor], dict[str, Any], str]] = [
        ({}, {"peft_type": "LOHA"}, "peft_type is 'LOHA'"),
        ({"up.lora_A.weight": a, "up.lora_B.weight": b}, {"use_dora": True}, "up has no lora_magnitude_vector"),
        ({"side.lora_A.weight": a, "side.lora_B.weight": b}, {}, "side.weight"),
        ({"up.lora_A.weight": a}, {}, "only one of lora_A and lora_B"),
        ({"up.lora_A.weight": a, "up.lora_B.weight": b.T.contiguous()}, {}, "do not make up"),
        ({"down.lora_A.weight": a, "down.lora_B.weight": b}, {}, r"down.weight \(16, 24\)"),
        ({"norm": torch.zeros(3)}, {}, r"has shape \(3,\)"),
        ({"up.ia3_l": torch.zeros(16, 1)}, {"peft_type": "IA3", "lora_alpha": 0}, "does not scale"),
    ]
    for number, (tensors, config, message) in enumerate(cases):
        folder = write(tmp_path / str(number), tensors, **{"peft_type": "LORA", "lora_alpha": 8} | config)
        with pytest.raises(fm.CheckpointError, match=message):
            open_model(folder, base)
    for config in ({"lora_alpha": None}, {"lora_alpha": "high"}, {"alpha_pattern": {"up": [1]}}):
        tensors = {"up.lora_A.weight": a, "up.lora_B.weight": b}
        folder = write(tmp_path / f"{config}", tensors, peft_type="LORA", **config)
        with pytest.raises(fm.CheckpointError, match=r"adapter_config\.json: lora_alpha or alpha_pattern of up"):
            open_model(folder, base)
    (folder / "adapter_config.json").write_text("{")
    with pytest.raises(fm.CheckpointError, match=r"adapter_config\.json"):
        open_model(folder, base)


UP = {"up.lora_A.weight": torch.ones(4, 16), "up.lora_B.weight": torch.ones(24, 4)}
MALFORMED: dict[str, tuple[dict[str, Tensor], dict[str, Any], str]] = {
    "no tensors": ({}, {}, "the adapter holds no tensors"),
    "rank 0": ({"up.lora_A.weight": torch.ones(0, 16), "up.lora_B.weight": torch.ones(24, 0)}, {}, "up has rank 0"),
    "scalar A": ({**UP, "up.lora_A.weight": torch.tensor(1.0)}, {}, "do not make up"),
    "scalar B": ({**UP, "up.lora_B.weight": torch.tensor(1.0)}, {}, "do not make up"),
    "integer A": ({**UP, "up.lora_A.weight": torch.ones(4, 16, dtype=torch.int32)}, {}, "is int32, not floating"),
    "a rank that the config denies": (UP, {"r": 8}, "up has rank 4, but adapter_config.json gives it rank 8"),
    "alpha out of range": (UP, {"lora_alpha": 10**400}, "must be a number, not a number out of range"),
    "alpha is infinite": (UP, {"lora_alpha": float("inf")}, "lora_alpha"),
    "alpha is true": (UP, {"lora_alpha": True}, "lora_alpha"),
    "a list of patterns": (UP, {"alpha_pattern": ["up"]}, "alpha_pattern must map patterns to numbers, got a list"),
    "no pattern": (UP, {"rank_pattern": {"(": 4}}, "rank_pattern: '\\(' is no valid pattern"),
    "an exponential pattern": (UP, {"alpha_pattern": {"(.*)*x": 1}}, "too complex"),
    "another exponential pattern": (UP, {"alpha_pattern": {"(u|u)+x": 1}}, "too complex"),
    "a polynomial pattern": (UP, {"alpha_pattern": {".*.*.*.*.*.*x": 1}}, "too complex"),
    "two for one layer": ({**UP, "up.base_layer.lora_A.weight": torch.ones(4, 16)}, {}, "are for the same layer"),
    "in full and changed": ({**UP, "up.weight": torch.ones(24, 16)}, {}, "replaces up.weight, which the adapter also"),
    "in full twice": (
        {"x.norm": torch.ones(16), "x.modules_to_save.norm": torch.zeros(16)},
        {},
        "both replace x.norm",
    ),
    "bytes for floats": ({"norm": torch.ones(16, dtype=torch.uint8)}, {}, "is uint8, not floating"),
    "a bias of another shape": (
        {**UP, "up.lora_B.bias": torch.ones(3)},
        {"lora_bias": True},
        "does not have the shape",
    ),
    "a bias that the config denies": (
        {**UP, "up.lora_B.bias": torch.ones(24)},
        {},
        "adapter_config.json has no lora_bias",
    ),
    "magnitudes without DoRA": ({**UP, "up.lora_magnitude_vector": torch.ones(24)}, {}, "has no use_dora"),
    "a rank in words": (UP, {"r": "4"}, "r or rank_pattern of up must be an integer, not '4'"),
    "a rank that is no integer": (UP, {"rank_pattern": {"up": 4.0}}, "must be an integer, not 4.0"),
    "a magnitude of another shape": (
        {**UP, "up.lora_magnitude_vector": torch.ones(3)},
        {"use_dora": True},
        "one value for each output",
    ),
    "unknown weights": ({**UP, "up.lora_C.weight": torch.ones(3)}, {}, "not merged here"),
    "a list as kind": (UP, {"peft_type": ["LORA"]}, "peft_type"),
    "a list as initialisation": (UP, {"init_lora_weights": ["pissa"]}, "init_lora_weights"),
    "feed-forward modules by number": (
        {"up.ia3_l": torch.ones(24, 1)},
        {"peft_type": "IA3", "feedforward_modules": 3},
        "feedforward_modules must be",
    ),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_adapters_are_refused_with_a_message(case: str, tmp_path: Path) -> None:
    tensors, config, message = MALFORMED[case]
    defaults = {"peft_type": "LORA"} | ({} if config.get("peft_type") == "IA3" else {"lora_alpha": 8})
    folder = write(tmp_path / "adapter", tensors, **defaults | config)
    base = base_weights() | {"x.norm": torch.ones(16)}
    with pytest.raises(fm.CheckpointError, match=message):
        open_model(folder, Checkpoint.open(base))


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_no_adapter_ends_in_another_error(tmp_path: Path, data: st.DataObject) -> None:
    """Configs and tensors at random: read, or refused with a message."""
    values = st.one_of(
        st.none(), st.booleans(), st.integers(-2, 9), st.floats(), st.text(max_size=4), st.lists(st.integers())
    )
    options = st.sampled_from(["r", "lora_alpha", "use_rslora", "alpha_pattern", "rank_pattern", "init_lora_weights"])
    patterns = st.dictionaries(st.text(max_size=4), values, max_size=2)
    config = data.draw(st.dictionaries(options, st.one_of(values, patterns), max_size=4))
    shapes = st.lists(st.sampled_from([0, 1, 4, 16, 24]), max_size=3).map(tuple)
    names = st.sampled_from([*UP, "up.ia3_l", "up.bias", "up.lora_B.bias", "norm", "up.lora_embedding_A", "other"])
    dtypes = st.sampled_from([torch.float32, torch.bfloat16, torch.int64, torch.bool])
    drawn = data.draw(st.dictionaries(names, st.tuples(shapes, dtypes), max_size=4))
    tensors = {name: torch.ones(shape).to(dtype) for name, (shape, dtype) in drawn.items()}
    folder = tmp_path / "adapter"
    shutil.rmtree(folder, ignore_errors=True)
    write(folder, tensors, peft_type=data.draw(st.sampled_from(["LORA", "IA3"])), **config)
    try:
        read(folder, base_weights())
    except fm.CheckpointError as error:
        refusal = str(error)
    else:
        return
    assert str(folder) in refusal


def test_an_adapter_saved_by_torch_is_read(tmp_path: Path) -> None:
    folder = lora(tmp_path / "adapter")
    expected = read(folder, base_weights())
    torch.save(load_file(folder / "adapter_model.safetensors"), folder / "adapter_model.bin")
    (folder / "adapter_model.safetensors").unlink()
    found = read(folder, base_weights())
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def models() -> dict[str, Any]:
    transformers = pytest.importorskip("transformers")
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 16, "vocab_size": 40}
    return {
        "bert": lambda: transformers.BertForSequenceClassification(
            transformers.BertConfig(intermediate_size=24, **sizes)
        ),
        "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(intermediate_size=24, **sizes)),
        "gpt2": lambda: transformers.GPT2LMHeadModel(
            transformers.GPT2Config(n_layer=2, n_head=2, n_embd=16, vocab_size=40, n_positions=16)
        ),
    }


CASES = {
    "bert lora": ("bert", "LoraConfig", {"target_modules": ["query", "dense"], "rank_pattern": {"query": 3}}),
    "bert lora and head": ("bert", "LoraConfig", {"target_modules": ["query"], "modules_to_save": ["classifier"]}),
    "bert ia3": (
        "bert",
        "IA3Config",
        {"target_modules": ["key", "output.dense"], "feedforward_modules": ["output.dense"]},
    ),
    "llama embeddings": ("llama", "LoraConfig", {"target_modules": ["embed_tokens", "q_proj"], "use_rslora": True}),
    "gpt2 turned": ("gpt2", "LoraConfig", {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True}),
    "gpt2 ia3 turned": (
        "gpt2",
        "IA3Config",
        {"target_modules": ["c_attn", "mlp.c_proj"], "feedforward_modules": ["mlp.c_proj"], "fan_in_fan_out": True},
    ),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.filterwarnings("ignore")
def test_the_same_weights_as_peft_merges(case: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    kind, config_class, options = CASES[case]
    torch.manual_seed(0)
    model = models()[kind]()
    base = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    adapted = peft.get_peft_model(model, getattr(peft, config_class)(**options))
    generator = torch.Generator().manual_seed(1)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3
    adapted.save_pretrained(tmp_path / "adapter")
    expected = adapted.merge_and_unload().state_dict()
    found = read(tmp_path / "adapter", base)
    changed = [name for name in base if not torch.equal(base[name], expected[name])]
    assert len(changed) >= 2
    for name in base:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-5, atol=1e-6, msg=name)


def test_keys_of_a_whole_peft_model_have_the_adapter_s_name(tmp_path: Path) -> None:
    """As ``model.state_dict()`` gives them, compiled or not; save_pretrained() leaves the name out."""
    expected = read(lora(tmp_path / "plain"), base_weights())
    tensors = load_file(tmp_path / "plain" / "adapter_model.safetensors")
    for number, prefix in enumerate(("", "_orig_mod.", "module.")):
        folder = tmp_path / str(number)
        shutil.copytree(tmp_path / "plain", folder)
        named = {prefix + key.replace(".weight", ".default.weight"): tensor for key, tensor in tensors.items()}
        save_file(named, folder / "adapter_model.safetensors")
        found = read(folder, base_weights())
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


@pytest.mark.filterwarnings("ignore")
def test_several_adapters_in_one_file_are_refused_and_save_pretrained_takes_them_apart(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    net = torch.nn.Sequential()
    net.add_module("up", torch.nn.Linear(16, 24))
    base = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    model = peft.get_peft_model(net, peft.LoraConfig(r=2, target_modules=["up"], init_lora_weights=False))
    model.add_adapter("other", peft.LoraConfig(r=2, target_modules=["up"], init_lora_weights=False))
    folder = write(tmp_path / "both", {}, peft_type="LORA", r=2, lora_alpha=8)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items() if "lora" in name}
    save_file(state, folder / "adapter_model.safetensors")
    with pytest.raises(fm.CheckpointError, match=r"several adapters \(default, other\).*save_pretrained\(NEW\)"):
        read(folder, base)
    model.save_pretrained(tmp_path / "new")
    found = read(tmp_path / "new" / "other", base)
    model.set_adapter("other")
    torch.testing.assert_close(found["up.weight"], model.merge_and_unload().up.weight.data)


OTHER_LIBRARIES = {
    "kohya": "lora_unet_down_blocks_0_to_q.lora_down.weight",
    "diffusers": "unet.down_blocks.0.to_q.lora.up.weight",
    "older diffusers": "down_blocks.0.processor.to_q_lora.down.weight",
    "diffusers as PEFT": "unet.down_blocks.0.to_q.lora_A.weight",
    "MLX": "model.layers.0.q_proj.lora_a",
    "loralib": "layers.0.q_proj.lora_A",
    "LyCORIS, LoHa": "lycoris_q.hada_w1_a",
    "LyCORIS, LoKr": "lycoris_q.lokr_w1",
    "DoRA of ComfyUI": "lora_unet_q.dora_scale",
    "OFT": "model.layers.0.q_proj.oft_R",
    "BOFT": "model.layers.0.q_proj.boft_R",
    "VeRA": "base_model.model.q_proj.vera_lambda_d",
}


@pytest.mark.parametrize("library", OTHER_LIBRARIES)
def test_adapters_of_other_libraries_are_named_and_get_no_advice_that_gives_the_base(library: str) -> None:
    base = base_weights()
    name = OTHER_LIBRARIES[library]
    for model in ({name: torch.ones(4, 4)}, base | {name: torch.ones(4, 4)}):
        with pytest.raises(fm.CheckpointError, match="holds an adapter that is not merged") as refusal:
            fm.merge(base, [model])
        assert name in str(refusal.value)
        assert "copy" not in str(refusal.value)
        assert "drop" not in str(refusal.value)
    # A base that has such a tensor itself, without the other half, is a model like any other.
    both = base | {name: torch.ones(4, 4)}
    fm.merge(both, [{key: tensor + 1 for key, tensor in both.items()}])


HALVES = {
    "PEFT": "base_model.model.up.lora_A.weight base_model.model.up.lora_B.weight",
    "PEFT in memory": "base_model.model.up.lora_A.default.weight base_model.model.up.lora_B.default.weight",
    "PEFT, embeddings": "e.lora_embedding_A e.lora_embedding_B",
    "kohya": "lora_unet_up.lora_down.weight lora_unet_up.lora_up.weight",
    "diffusers": "up.lora.down.weight up.lora.up.weight",
    "older diffusers": "up_lora.down.weight up_lora.up.weight",
    "diffusers, layers": "up.lora_linear_layer.down.weight up.lora_linear_layer.up.weight",
    "MLX": "up.lora_a up.lora_b",
}


@pytest.mark.parametrize("library", HALVES)
def test_halves_of_adapters_are_not_merged_apart(library: str) -> None:
    first, second = HALVES[library].split()
    base = base_weights() | {first: torch.ones(2, 4), second: torch.ones(4, 2)}
    models = [{name: tensor + i for name, tensor in base.items()} for i in (1, 2)]
    with pytest.raises(fm.CheckpointError, match=r"^base .* holds an adapter that is not merged") as refusal:
        fm.merge(base, models)
    assert first in str(refusal.value)
    for rules in ([fm.Rule(first, "copy")], [fm.Rule(second, "copy")]):  # B A is linear in either
        fm.merge(base, models, fm.Recipe(select=rules))


BOMBS = [
    *("(a+)+$", "(a|aa)*b", "(.*)*x", "a?" * 30 + "a" * 30 + "b", "(a|a)" * 30 + "b", "(x+x+)+y", "a*a*a*a*a*b"),
    *(r"\w*\w*\w*\w*\w*!", "(?:(?:a{0,50}){0,50}){0,50}b", "(" * 300, "[", "a**", "\\", "x" * 1000),
    *("[]]*[^]]*[a]*[a]*[a]*z", r"(\(|a)" * 25, "(a{1,9}){1,9}", "((a|b)|(a|b))" * 12),
]


@pytest.mark.parametrize("pattern", BOMBS)
@pytest.mark.parametrize("option", ["alpha_pattern", "rank_pattern", "feedforward_modules"])
def test_patterns_that_could_take_for_ever_are_refused(option: str, pattern: str, tmp_path: Path) -> None:
    name = "m." + "a" * 60
    base = {f"{name}.weight": torch.ones(4, 4)}
    if option == "feedforward_modules":
        folder = write(
            tmp_path / "a", {f"{name}.ia3_l": torch.ones(4, 1)}, peft_type="IA3", feedforward_modules=pattern
        )
    else:
        tensors = {f"{name}.lora_A.weight": torch.ones(1, 4), f"{name}.lora_B.weight": torch.ones(4, 1)}
        folder = write(tmp_path / "a", tensors, peft_type="LORA", r=1, lora_alpha=1, **{option: {pattern: 1}})
    with pytest.raises(fm.CheckpointError, match=rf"adapter_config\.json: {option}: .*(too complex|no valid pattern)"):
        read(folder, base)


PATTERNS = [
    *(
        "up",
        "q_proj|up",
        r".*\.layers\.[0-9]+\..*(q_proj|k_proj|v_proj|o_proj|gate_proj|up)",
        "^model.layers.7.mlp.up$",
    ),
    *(r"model\.layers\.(0|1|2|3|4|5|6|7)\.mlp\.up", "(self_)?mlp.up", r"layers\.\d+\.mlp\.up", "[^.]+.up", "no"),
]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_patterns_that_people_write_match_as_peft_matches_them(pattern: str) -> None:
    from freemerge.checkpoint.adapter_patterns import Patterns

    helpers = pytest.importorskip("peft.utils.other")
    patterns = Patterns()
    patterns.check(pattern)
    for name in ("model.layers.7.mlp.up", "base.model.layers.7.mlp.up", "x.up", "model.layers.7.mlp.up.x"):
        assert patterns.fits(pattern, name) == (helpers.get_pattern_key([pattern], name) == pattern)


def test_all_matches_of_a_config_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    from freemerge.checkpoint import adapter_patterns

    monkeypatch.setattr(adapter_patterns, "_ALL_STEPS", 10**5)
    patterns = adapter_patterns.Patterns()
    for number in range(4):
        patterns.fits("a*b*", "a" * 50 + str(number))
    with pytest.raises(ValueError, match="too long to match"):
        patterns.fits("a*b*", "a" * 50)


def test_an_adapter_is_read_where_the_base_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The meta device stands for a GPU: what is computed there cannot be mixed with tensors of the CPU either."""
    base = Checkpoint.open(base_weights())
    kept = {"up.lora_magnitude_vector": torch.ones(24), "norm": torch.ones(16)}
    tensors = {"up.lora_A.weight": torch.ones(4, 16), "up.lora_B.weight": torch.ones(24, 4), **kept}
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "use_dora": True}
    scaled = {"peft_type": "IA3", "feedforward_modules": ["down"]}
    folders = (
        write(tmp_path / "dora", tensors, **config),
        write(tmp_path / "ia3", {"up.ia3_l": torch.ones(24, 1), "down.ia3_l": torch.ones(1, 24)}, **scaled),
    )
    opened = [open_model(folder, base) for folder in folders]
    there, read = torch.device("meta"), base.read
    monkeypatch.setattr(base, "read", lambda name: read(name).to(there))
    monkeypatch.setattr(base, "device", lambda name: there)
    for adapted in opened:
        for name, spec in adapted.specs.items():
            assert (adapted.read(name).device, adapted.device(name)) == (there, there)
            assert tuple(adapted.read(name).shape) == spec.shape
