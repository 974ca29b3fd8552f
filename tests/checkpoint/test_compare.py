"""Preflight: models that do not fit are refused with a message that says which tensors and why."""

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from freemerge.checkpoint import MERGEABLE, Checkpoint, check_finite, compare
from freemerge.checkpoint.finite import _BLOCK
from freemerge.errors import CheckpointError

State = dict[str, torch.Tensor]


def model(**changes: torch.Tensor | None) -> State:
    state = {
        "model.embed_tokens.weight": torch.zeros(11, 4),
        "layers.0.weight": torch.zeros(4, 4),
        "layers.0.bias": torch.zeros(4),
        "position_ids": torch.arange(8),
    }
    for name, tensor in changes.items():
        name = name.replace("__", ".")
        if tensor is None:
            del state[name]
        else:
            state[name] = tensor
    return state


def compared(base: State, *models: State, **options: object):  # type: ignore[no-untyped-def]
    return compare(Checkpoint.open(base), [Checkpoint.open(state) for state in models], **options)  # type: ignore[arg-type]


def on_disk(path: Path, state: State) -> Checkpoint:
    save_file(state, path)
    return Checkpoint.open(path)


def test_equal_models() -> None:
    result = compared(model(), model(), model())
    assert result.names == tuple(sorted(model()))
    assert (result.tied, result.mixed_dtypes) == ({}, {})


def test_missing_and_unexpected_tensors_are_named(tmp_path: Path) -> None:
    base = on_disk(tmp_path / "base.safetensors", model())
    other = on_disk(tmp_path / "tuned.safetensors", model(layers__0__bias=None, adapter=torch.zeros(1)))
    with pytest.raises(CheckpointError) as caught:
        compare(base, [other])
    message = str(caught.value)
    assert "tuned.safetensors lacks 1 tensor of the base: layers.0.bias" in message
    assert "has 1 tensor that the base lacks: adapter" in message
    assert "base.safetensors" in message


def test_long_lists_are_cut() -> None:
    extra = {f"x{i:02d}": torch.zeros(1) for i in range(25)}
    with pytest.raises(CheckpointError, match=r"lacks 25 tensors of the base: x00, .*x09 and 15 more"):
        compared(model() | extra, model())


def test_tensors_that_do_not_take_part_may_differ() -> None:
    base = model(head=torch.zeros(3, 4))
    others = model(head=torch.zeros(7, 4)), model(position_ids=None), model(extra=torch.zeros(1))
    skipped = {"head", "position_ids", "extra"}
    assert compared(base, *others, merged=lambda name: name not in skipped).names == tuple(sorted({*base} - skipped))


def test_shapes() -> None:
    with pytest.raises(CheckpointError, match=r"shapes differ .*layers.0.weight \(4, 4\) and \(4, 5\)"):
        compared(model(), model(layers__0__weight=torch.zeros(4, 5)))
    with pytest.raises(CheckpointError, match=r"shapes differ .*layers.0.bias \(4,\) and \(\)"):
        compared(model(), model(layers__0__bias=torch.zeros(())))
    with pytest.raises(CheckpointError, match=r"base's with select 'head.*=copy', or leave them out with =drop"):
        compared(model(head=torch.zeros(2, 4)), model(head=torch.zeros(3, 4)))
    with pytest.raises(CheckpointError, match=r"and \(3, 4\)$"):  # all there is
        compared({"head": torch.zeros(2, 4)}, {"head": torch.zeros(3, 4)})


def test_vocabularies() -> None:
    base = model(lm_head__weight=torch.zeros(11, 4))
    other = base | {"model.embed_tokens.weight": torch.zeros(12, 4), "lm_head.weight": torch.zeros(12, 4)}
    with pytest.raises(CheckpointError, match=r"token embeddings differ: 11 rows in .* 12 in") as caught:
        compared(base, other)
    assert "lm_head.weight, model.embed_tokens.weight" in str(caught.value)
    assert "take the base's with select 'lm_head.*=copy' 'model.*=copy'" in str(caught.value)
    biased = [state | {"decoder.bias": torch.zeros(rows)} for state, rows in ((base, 11), (other, 12))]
    with pytest.raises(CheckpointError, match=r"select 'decoder\.\*=copy' 'lm_head"):
        compared(*biased)
    hidden = base | {"model.embed_tokens.weight": torch.zeros(11, 8)}
    with pytest.raises(CheckpointError, match="shapes differ"):
        compared(base, hidden)


def test_float_dtypes_may_differ_and_are_reported() -> None:
    result = compared(model(), model(layers__0__bias=torch.zeros(4).half()), model())
    assert result.mixed_dtypes == {"layers.0.bias": (torch.float32, torch.float16, torch.float32)}


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.float8_e4m3fn, torch.complex64])
def test_other_dtypes_may_not_differ(dtype: torch.dtype) -> None:
    name = str(dtype).removeprefix("torch.")
    with pytest.raises(CheckpointError, match=f"layers.0.bias float32 and {name}"):
        compared(model(), model(layers__0__bias=torch.zeros(4).to(dtype)))
    same = model(layers__0__bias=torch.zeros(4).to(dtype))
    assert "layers.0.bias" in compared(same, same).names


class TestTied:
    embed = torch.arange(44.0).reshape(11, 4)

    def absent(self, seed: int = 0) -> State:
        return model(model__embed_tokens__weight=self.embed + seed)

    def tied(self, seed: int = 0) -> State:
        state = self.absent(seed)
        return state | {"lm_head.weight": state["model.embed_tokens.weight"]}

    def reversed(self) -> State:
        state = self.absent()
        return {"lm_head.weight": state["model.embed_tokens.weight"], **state}

    def copied(self) -> State:
        state = self.tied()
        return state | {"lm_head.weight": state["model.embed_tokens.weight"].clone()}

    def untied(self) -> State:
        return self.tied() | {"lm_head.weight": self.embed + 1}

    @pytest.mark.parametrize(
        "models",
        [
            ("tied", "tied"),
            ("tied", "absent"),
            ("absent", "tied"),
            ("tied", "copied"),
            ("copied", "tied"),
            ("absent", "copied"),
            ("copied", "absent"),
            ("tied", "reversed"),
        ],
    )
    def test_second_names_copies_and_absent_heads_are_one_model(self, models: tuple[str, str]) -> None:
        base, other = (getattr(self, kind)() for kind in models)
        result = compared(base, other)
        assert result.tied == {"lm_head.weight": "model.embed_tokens.weight"}
        assert result.names == tuple(sorted(self.absent()))

    def test_the_first_source_decides_which_name_is_first(self) -> None:
        assert compared(self.reversed(), self.tied()).tied == {"model.embed_tokens.weight": "lm_head.weight"}

    def test_tied_models_that_were_tuned_differently(self) -> None:
        assert compared(self.tied(0), self.tied(5)).tied == {"lm_head.weight": "model.embed_tokens.weight"}

    def test_heads_of_their_own(self) -> None:
        result = compared(self.untied(), self.untied(), self.copied())
        assert result.tied == {}
        assert "lm_head.weight" in result.names

    @pytest.mark.parametrize("models", [("tied", "untied"), ("untied", "tied")])
    def test_tied_and_untied_do_not_mix(self, models: tuple[str, str]) -> None:
        with pytest.raises(CheckpointError, match=r"lm_head.weight is not the same as model.embed_tokens.weight"):
            compared(*(getattr(self, kind)() for kind in models))

    @pytest.mark.parametrize("models", [("absent", "untied"), ("untied", "absent")])
    def test_an_absent_head_and_one_of_its_own_do_not_mix(self, models: tuple[str, str]) -> None:
        """They have to be made separate first: freemerge.checkpoint.tied.untie."""
        with pytest.raises(CheckpointError, match=r"(lacks|has) 1 tensor .*base.*lm_head.weight"):
            compared(*(getattr(self, kind)() for kind in models))


@given(
    dtype=st.sampled_from(sorted(MERGEABLE, key=str)),
    value=st.sampled_from([float("nan"), float("inf"), -float("inf")]),
    position=st.integers(0, 59),
)
def test_one_bad_value_anywhere_is_found(dtype: torch.dtype, value: float, position: int) -> None:
    tensor = torch.linspace(-1, 1, 60).to(dtype).reshape(3, 4, 5)
    check_finite("layer.weight", tensor, "m.safetensors")
    tensor.view(-1)[position] = value
    with pytest.raises(CheckpointError, match=r"m.safetensors: tensor 'layer.weight' holds NaN or infinity"):
        check_finite("layer.weight", tensor, "m.safetensors")
    with pytest.raises(CheckpointError):
        check_finite("layer.weight", tensor.transpose(0, 2), "m.safetensors")


@pytest.mark.parametrize("position", [0, _BLOCK - 1, _BLOCK, -1])
def test_bad_values_are_found_in_every_block(position: int) -> None:
    tensor = torch.zeros(_BLOCK + 3)
    check_finite("w", tensor, "m")
    tensor[position] = float("nan")
    with pytest.raises(CheckpointError):
        check_finite("w", tensor, "m")


def test_extreme_but_finite_values_and_other_dtypes_pass() -> None:
    for dtype in MERGEABLE:
        limits = torch.finfo(dtype)
        check_finite("w", torch.tensor([limits.max, limits.min, limits.tiny], dtype=dtype), "m")
    check_finite("w", torch.tensor([2**62, -1]), "m")
    check_finite("w", torch.empty(0), "m")
    check_finite("w", torch.tensor([1.0, 448.0]).to(torch.float8_e4m3fn), "m")
    with pytest.raises(CheckpointError):
        check_finite("w", torch.tensor([1.0, float("inf")]).to(torch.float8_e5m2), "m")
