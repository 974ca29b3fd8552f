"""Every conversion that transformers knows is followed: layouts say what its own saving makes of a model."""

from __future__ import annotations

import math
import re
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import freemerge as fm
from freemerge.checkpoint.conversion import Layout, layout_of

transformers = pytest.importorskip("transformers", minversion="5.0")
pytestmark = pytest.mark.filterwarnings("ignore")
conversion_mapping = pytest.importorskip("transformers.conversion_mapping")

_COUNTED = re.compile(r"(layers|depth|depths|blocks|n_layer|num_experts|routed_experts|local_experts)$")
_TRIED = 3
_LARGEST = 1 << 24  # entries of a tensor that is converted with values
# What a default config lacks.
OPTIONS: dict[str, dict[str, Any]] = {
    "lfm2_moe": {"layer_types": ["full_attention", "conv"], "num_hidden_layers": 2},
    "hunyuan_v1_moe": {"head_dim": 64},
    "hunyuan_v1_dense": {"head_dim": 64},
    "esm": {"vocab_size": 33, "pad_token_id": 1},
}
# Kinds whose files hold tensors in other pieces or another order, of those that transformers 5.23 has.
FOLLOWED = {
    "afmoe", "axk2", "bailing_hybrid", "ernie4_5_moe", "ernie4_5_vl_moe", "glm4_moe_lite", "glm5_next", "kimi_k25",
    "kimi_linear", "laguna", "mellum", "mistral_large4", "olmo_hybrid", "qwen2_moe", "qwen3_5_moe_text", "qwen3_moe",
    "qwen3_next", "qwen3_omni_moe_thinker", "step3p7", "unlimited_ocr",
}  # fmt: skip


def classes() -> dict[str, str]:
    """A model class for each model type, or class, that has a conversion of its own: with a head where there is one."""
    modeling_auto = transformers.models.auto.modeling_auto
    mappings = [m for name, m in vars(modeling_auto).items() if re.fullmatch(r"MODEL_\w+MAPPING_NAMES", name)]
    found = {}
    for kind in conversion_mapping._build_checkpoint_conversion_mapping():
        names = {name for m in mappings for name in ([m[kind]] if isinstance(m.get(kind), str) else m.get(kind, ()))}
        names |= {kind} if hasattr(transformers, kind) else set()
        if names:
            found[kind] = min(names, key=lambda name: (not name.endswith(("ForCausalLM", "Generation")), name))
    return found


def smaller(config: Any) -> Any:
    for name, value in list(vars(config).items()):
        if isinstance(value, transformers.PretrainedConfig):
            smaller(value)
        elif isinstance(value, int) and _COUNTED.search(name) and value > 4:
            setattr(config, name, 4 if "expert" in name else 2)
    return config


def built(kind: str, name: str) -> nn.Module | None:
    """The model without values, with few layers and experts if its config allows that."""
    model_class: Any = getattr(transformers, name)
    for change in (smaller, lambda config: config):
        try:
            with torch.device("meta"):
                return model_class(change(model_class.config_class(**OPTIONS.get(kind, {}))))  # type: ignore[no-any-return]
        except Exception:  # the default config of some describes no model, and some need other packages
            continue
    return None


def involved(layout: Layout) -> list[tuple[str, ...]]:
    """Tensors that a conversion takes apart or reorders, one of a kind; those in strangest order first."""
    kinds: dict[str, tuple[bool, tuple[str, ...]]] = {}
    for pieces in layout.module.values():
        files = {piece.file for piece in pieces}
        names = [piece.module for file in files for piece in layout.pieces[file]]
        names += [twin for name in names if (twin := name.replace("text_moe", "vision_moe")) in layout.module]
        plain = len(pieces) == 1 and pieces[0].strides == pieces[0].file_strides
        in_order = all(list(piece.strides) == sorted(piece.strides, reverse=True) for piece in pieces)
        if not plain and all(math.prod(layout.shapes[name]) < _LARGEST for name in names):
            kinds.setdefault(re.sub(r"\d+", "0", names[0]), (in_order, tuple(dict.fromkeys(names))))
    return [names for _, names in sorted(kinds.values(), key=lambda found: found[0])][:_TRIED]


def saved(module: Any, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """What transformers writes for a part of a model's tensors, if it was not loaded from a file with a prefix."""
    prefixes = getattr(transformers.core_model_loading, "PrefixChange", ())
    conversions = [
        conversion
        for conversion in conversion_mapping.get_model_conversion_mapping(module, add_legacy=False)
        if not isinstance(conversion, prefixes)
    ]
    model: Any = SimpleNamespace(
        config=module.config, get_parameter=module.get_parameter, _weight_conversions=conversions
    )
    return transformers.core_model_loading.revert_weight_conversion(model, state)  # type: ignore[no-any-return]


@pytest.mark.parametrize(("kind", "name"), classes().items())
def test_a_layout_is_what_transformers_saves(kind: str, name: str) -> None:
    module = built(kind, name)
    if module is None:
        assert kind not in FOLLOWED
        pytest.skip(f"{name} cannot be built from its default config")
    layout = layout_of(module)  # raises where a conversion cannot be followed
    whole = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    files = {name: tuple(tensor.shape) for name, tensor in saved(module, dict(module.state_dict())).items()}
    assert files == (whole if layout is None else layout.files)
    found = [] if layout is None else involved(layout)
    assert found or kind not in FOLLOWED
    for number, names in enumerate(found):
        assert layout is not None
        torch.manual_seed(number)
        state = {n: torch.randint(-1000, 1000, layout.shapes[n], dtype=torch.int16) for n in names}
        written = saved(module, dict(state))
        for file, tensor in written.items():
            assert torch.equal(layout.file_tensor(file, state.__getitem__), tensor), file
        for n, tensor in state.items():
            assert torch.equal(layout.module_tensor(n, written.__getitem__), tensor), n


def test_kinds_that_have_to_be_followed_are_among_those_that_were() -> None:
    assert len(FOLLOWED & classes().keys()) >= 8, "versions before 5.23 lack some"


def test_a_conversion_that_cannot_be_followed_is_refused_and_state_dicts_are_merged(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "vocab_size": 32}
    config = transformers.MixtralConfig(**sizes, num_attention_heads=2, num_key_value_heads=2, num_local_experts=2)
    models = [transformers.MixtralForCausalLM(config) for _ in range(2)]
    operations = transformers.core_model_loading

    def negated(self: Any, input_dict: Any, *args: Any, **kwargs: Any) -> Any:
        return {name: -(t[0] if isinstance(t, list) else t) for name, t in input_dict.items()}

    def fails(*args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError("no reverse")

    for change, reason in ((negated, "more than parts of the module's tensors"), (fails, "NotImplementedError")):
        monkeypatch.setattr(operations.SplitModulelist, "convert", change)
        with pytest.raises(fm.CheckpointError, match=rf"a MixtralForCausalLM cannot be told.*{reason}") as refusal:
            fm.merge(models[0], models[1:])
        assert "pass state dicts of all models, as model.state_dict() returns them" in str(refusal.value)
        merged = fm.merge(models[0].state_dict(), [model.state_dict() for model in models[1:]])
        assert merged.keys() == models[0].state_dict().keys()
