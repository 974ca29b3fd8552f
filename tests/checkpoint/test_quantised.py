"""Quantised weights: float8 with scales merges as the floats it stands for; packed formats say what to do."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

import freemerge as fm
from freemerge.checkpoint import Checkpoint
from freemerge.checkpoint.quantised import FLOAT8, dequantised

EXACT = fm.Recipe(weights=(1.0,), scale=1.0, select=[fm.Rule("*", "merge")])
E4M3 = torch.float8_e4m3fn


def floats(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def quantise(weight: Tensor, block: tuple[int, int], dtype: torch.dtype = E4M3) -> tuple[Tensor, Tensor]:
    """Float8 values and the scale of each block, by the definition."""
    rows, columns = (-(-size // b) for size, b in zip(weight.shape, block, strict=True))
    scale, stored = torch.empty(rows, columns), torch.empty(weight.shape, dtype=dtype)
    for i in range(rows):
        for j in range(columns):
            box = slice(i * block[0], (i + 1) * block[0]), slice(j * block[1], (j + 1) * block[1])
            scale[i, j] = weight[box].abs().max() / torch.finfo(dtype).max
            stored[box] = (weight[box] / scale[i, j]).to(dtype)
    return stored, scale


def restored(stored: Tensor, scale: Tensor, block: tuple[int, int]) -> Tensor:
    whole = scale.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)
    return stored.float() * whole[: stored.shape[0], : stored.shape[1]]


def opened(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    checkpoint = dequantised(Checkpoint.open(tensors))
    read = {name: checkpoint.read(name) for name in checkpoint.specs}
    for name, tensor in read.items():
        if not tensor.ndim:
            continue
        third = len(tensor) // 3
        assert torch.equal(checkpoint.read_rows(name, third, 2 * third + 1), tensor[third : 2 * third + 1])
    return read


@given(
    height=st.integers(1, 300),
    width=st.integers(1, 300),
    dtype=st.sampled_from(sorted(FLOAT8, key=str)),
    name=st.sampled_from(["weight_scale_inv", "weight_scale", "scale_weight"]),
)
def test_blocks_of_128(height: int, width: int, dtype: torch.dtype, name: str) -> None:
    stored, scale = quantise(floats(0, height, width), (128, 128), dtype)
    found = opened({"a.weight": stored, f"a.{name}": scale, "norm": torch.ones(3)})
    assert found.keys() == {"a.weight", "norm"}
    torch.testing.assert_close(found["a.weight"], restored(stored, scale, (128, 128)), rtol=0, atol=0)


@pytest.mark.parametrize("shape", [(), (1,), (1, 1), (24,), (24, 1)])
def test_scales_of_tensors_and_rows(shape: tuple[int, ...]) -> None:
    stored, scale = floats(0, 24, 16).to(E4M3), floats(1, *shape).abs()
    found = opened({"a.weight": stored, "a.weight_scale": scale, "a.input_scale": torch.tensor(2.0)})
    expected = stored.float() * (scale.reshape(-1, 1) if scale.numel() > 1 else scale.reshape(()))
    assert found.keys() == {"a.weight"}
    assert torch.equal(found["a.weight"], expected)


def test_stacks_of_matrices_and_exponent_scales() -> None:
    parts = [quantise(floats(seed, 200, 130), (128, 128)) for seed in range(3)]
    stored, scale = (torch.stack(tensors) for tensors in zip(*parts, strict=True))
    found = opened({"experts": stored, "experts_scale_inv": scale})["experts"]
    for i, part in enumerate(parts):
        assert torch.equal(found[i], restored(*part, (128, 128)))
    exponents = torch.tensor([[126], [129]], dtype=torch.uint8)
    found = opened({"a.weight": torch.ones(256, 16).to(E4M3), "a.weight_scale": exponents})["a.weight"]
    assert found.unique().tolist() == [0.5, 4.0]
    if hasattr(torch, "float8_e8m0fnu"):
        powers = torch.tensor([[0.5], [4.0]]).to(torch.float8_e8m0fnu)
        found = opened({"a.weight": torch.ones(256, 16).to(E4M3), "a.weight_scale_inv": powers})["a.weight"]
        assert found.unique().tolist() == [0.5, 4.0]


def test_a_block_size_from_the_config(tmp_path: Path) -> None:
    stored, scale = quantise(floats(0, 100, 90), (32, 64))
    save_file({"a.weight": stored, "a.weight_scale_inv": scale}, tmp_path / "model.safetensors")
    config = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [32, 64]}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    checkpoint = dequantised(Checkpoint.open(tmp_path))
    assert torch.equal(checkpoint.read("a.weight"), restored(stored, scale, (32, 64)))


def test_a_scale_that_does_not_fit_is_refused() -> None:
    with pytest.raises(fm.CheckpointError, match=r"a\.weight_scale \(7, 3\) does not scale a\.weight \(24, 16\)"):
        opened({"a.weight": torch.ones(24, 16).to(E4M3), "a.weight_scale": torch.ones(7, 3)})
    with pytest.raises(fm.CheckpointError, match=r"a\.weight_scale scales a\.weight and is int32"):
        opened({"a.weight": torch.ones(24, 16).to(E4M3), "a.weight_scale": torch.ones(24, 1, dtype=torch.int32)})


def test_float8_checkpoints_merge_in_float(tmp_path: Path) -> None:
    folders = []
    for seed in range(2):
        stored, scale = quantise(floats(seed, 200, 140), (128, 128))
        folders.append(tmp_path / str(seed))
        folders[seed].mkdir()
        tensors = {"a.weight": stored, "a.weight_scale_inv": scale, "norm": torch.full((8,), 1.0 + seed)}
        save_file(tensors, folders[seed] / "model.safetensors", metadata={"format": "pt"})
        config = {"torch_dtype": "bfloat16", "quantization_config": {"quant_method": "fp8"}}
        (folders[seed] / "config.json").write_text(json.dumps(config))
    fm.merge_checkpoints(folders[0], folders[1:], tmp_path / "out", EXACT, progress=False)
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert written.keys() == {"a.weight", "norm"}
    torch.testing.assert_close(written["a.weight"], restored(stored, scale, (128, 128)))
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == {"torch_dtype": "float32"}
    fm.merge_checkpoints(
        folders[0], folders[1:], tmp_path / "half", EXACT.replace(out_dtype="bfloat16"), progress=False
    )
    assert load_file(tmp_path / "half" / "model.safetensors")["a.weight"].dtype == torch.bfloat16
    # A float model merges with a float8 base, and the other way round.
    plain = {"a.weight": restored(stored, scale, (128, 128)), "norm": torch.full((8,), 2.0)}
    assert torch.equal(fm.merge(folders[0], [plain], EXACT)["a.weight"], written["a.weight"])
    assert torch.equal(fm.merge(plain, [folders[1]], EXACT)["a.weight"], plain["a.weight"])


def test_what_is_left_out_is_told(tmp_path: Path) -> None:
    stored, scale = quantise(floats(0, 8, 8), (128, 128))
    state = {"a.weight": stored, "a.weight_scale_inv": scale, "a._extra_state": None}
    torch.save(state, tmp_path / "m.pt")
    for source in (state, tmp_path / "m.pt"):
        warnings = fm.inspect({"a.weight": floats(1, 8, 8)}, [source]).warnings
        assert any("a._extra_state is no weight and left out" in line for line in warnings)


def test_metadata_is_kept_but_for_that_of_the_quantisation(tmp_path: Path) -> None:
    stored, scale = quantise(floats(0, 20, 14), (128, 128))
    tensors = {"a.weight": stored, "a.weight_scale_inv": scale}
    said = {"format": "pt", "modelspec.title": "Base", "_quantization_metadata": "{}"}
    save_file(tensors, tmp_path / "base.safetensors", metadata=said)
    with Checkpoint.open(tmp_path / "base.safetensors") as base:
        assert dequantised(base).metadata == {"modelspec.title": "Base"}


def test_float8_without_scales_is_copied_where_it_is_equal_and_the_advice_works_where_not() -> None:
    base = {"a.weight": floats(0, 8, 8).to(E4M3), "norm": torch.ones(4)}
    tuned = {"a.weight": floats(1, 8, 8).to(E4M3), "norm": torch.ones(4) + 1}
    same = fm.merge(base, [{**base, "norm": tuned["norm"]}], EXACT)
    assert torch.equal(same["a.weight"].view(torch.uint8), base["a.weight"].view(torch.uint8))
    assert torch.equal(same["norm"], tuned["norm"])
    with pytest.raises(fm.CheckpointError, match=r"^models\[0\] .*a\.weight .*float8 without a scale") as refusal:
        fm.merge(base, [tuned], EXACT)
    assert "copy" not in str(refusal.value)
    assert "{name: tensor.to(torch.bfloat16) for name, tensor in state.items()}" in str(refusal.value)
    converted = [{name: tensor.to(torch.bfloat16) for name, tensor in state.items()} for state in (base, tuned)]
    merged = fm.merge(converted[0], converted[1:], EXACT)
    assert all(torch.equal(merged[name], tensor) for name, tensor in converted[1].items())


BYTES = torch.zeros(8, dtype=torch.uint8)
PACKED: dict[str, tuple[dict[str, Tensor], str, str]] = {
    "nf4": ({"a.weight": BYTES, "a.weight.absmax": BYTES, "a.weight.quant_map": BYTES}, "bitsandbytes", "dequantise"),
    "fp4": ({"a.weight": BYTES, "a.weight.quant_state.bitsandbytes__fp4": BYTES}, "bitsandbytes", "dequantise"),
    "int8": ({"a.weight": BYTES.view(torch.int8), "a.SCB": torch.ones(8)}, "bitsandbytes, 8 bit", "dequantise"),
    "gptq": ({"a.qweight": BYTES, "a.qzeros": BYTES, "a.scales": BYTES, "a.g_idx": BYTES}, "GPTQ", "quantised from"),
    "awq": ({"a.qweight": BYTES, "a.qzeros": BYTES, "a.scales": BYTES}, "AWQ or GPTQ", "quantised from"),
    "compressed": ({"a.weight_packed": BYTES, "a.weight_scale": BYTES}, "compressed-tensors", "quantised from"),
    "w8a8": ({"a.weight": BYTES.view(torch.int8), "a.weight_scale": torch.ones(1)}, "int8", "quantised from"),
    "mxfp4": ({"experts.up_blocks": BYTES, "experts.up_scales": BYTES}, "MXFP4", "dequantise"),
    "hqq": ({"a.W_q": BYTES}, "HQQ", "quantised from"),
}


@pytest.mark.parametrize("kind", PACKED)
def test_packed_formats_are_recognised_by_their_tensors(kind: str) -> None:
    tensors, named, advice = PACKED[kind]
    for base, models in ((tensors, [tensors]), ({"x": torch.ones(1)}, [tensors])):
        with pytest.raises(fm.CheckpointError, match=rf"is quantised \({re.escape(named)}") as refusal:
            fm.merge(base, models)
        assert advice in str(refusal.value)
        assert "copy" not in str(refusal.value)


def test_the_config_names_the_method(tmp_path: Path) -> None:
    save_file({"a.qweight": BYTES, "a.qzeros": BYTES + 1}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": "autoround"}}))
    with pytest.raises(fm.CheckpointError, match=r"is quantised \(autoround: a\.qweight\)"):
        fm.merge({"x": torch.ones(1)}, [tmp_path])


def test_plain_names_that_look_alike_are_no_quantisation() -> None:
    state = {
        "mid_blocks": torch.ones(3),
        "a.scales": torch.ones(3),
        "scale": torch.ones(1),
        "norm_scale": torch.ones(2),
    }
    assert opened(state).keys() == state.keys()


FLOATS = ("q.codebooks", "q.SCB", "q.centroids.weight", "q.absmax", "q.weight_scales", "q.row_offsets", "q.W_q")


@pytest.mark.parametrize("name", FLOATS)
def test_a_name_alone_is_no_quantisation(name: str, tmp_path: Path) -> None:
    state = {name: floats(0, 8, 8), "q.num": torch.tensor(3), "other.ids": torch.arange(4)}
    assert opened(state).keys() == state.keys()
    assert fm.merge_tensors(floats(0, 4, 4), [floats(1, 4, 4)], name=name).shape == (4, 4)
    save_file(state, tmp_path / "model.safetensors")
    codes = {"q.codes": torch.tensor([0, 1, 2, 3], dtype=torch.uint16)}
    with pytest.raises(fm.CheckpointError, match=rf"is quantised .*{re.escape(name)}\)"):
        opened(state | codes)
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": "aqlm"}}))
    with pytest.raises(fm.CheckpointError, match=rf"is quantised \(aqlm: {re.escape(name)}\)"):
        fm.merge({"x": torch.ones(1)}, [tmp_path])


@pytest.mark.parametrize("name", ["m.gguf", "m.bin", "m.ckpt"])
def test_gguf_files_are_told_by_name_or_beginning(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(fm.CheckpointError, match=r"a GGUF file.*gguf_file=NAME"):
        fm.merge({"x": torch.ones(1)}, [tmp_path / name])


@pytest.mark.filterwarnings("ignore")
def test_the_dequantised_weights_are_those_of_transformers(tmp_path: Path) -> None:
    fine_grained: Any = pytest.importorskip("transformers.integrations.finegrained_fp8")
    stored, scale = quantise(floats(0, 256, 384), (128, 128))
    if not hasattr(fine_grained, "Fp8Dequantize"):
        pytest.skip("this version of transformers has no such operation")
    convert = fine_grained.Fp8Dequantize.__new__(fine_grained.Fp8Dequantize)
    expected = convert._dequantize_one(stored, scale)
    found = opened({"a.weight": stored, "a.weight_scale_inv": scale})["a.weight"]
    torch.testing.assert_close(found, expected.float())


INT8, INT32, ONES = torch.ones(8, 8, dtype=torch.int8), torch.ones(8, dtype=torch.int32), torch.ones(8)
MORE_PACKED: dict[str, tuple[dict[str, Tensor], str]] = {
    "torchao": ({"l.weight_qdata": INT8, "l.weight_scale_and_zero": ONES}, "torchao"),
    "torchao, flattened": ({"l._weight_qdata": INT8, "l._weight_scale": ONES}, "torchao"),
    "EETQ": ({"l.weight": INT8, "l.weight_scales": ONES}, "EETQ"),
    "HIGGS": ({"l.weight": BYTES, "l.scales": ONES, "l.tables": ONES}, "uint8"),
    "SpQR": ({"l.dense_weights": BYTES, "l.row_offsets": BYTES}, "SpQR"),
    "VPTQ": ({"l.indices": INT32, "l.centroids.weight": ONES}, "VPTQ"),
    "BitNet": ({"l.weight": BYTES, "l.weight_scale": torch.ones(1)}, "uint8"),
    "NVFP4": ({"l.weight": BYTES, "l.weight_scale": ONES.to(E4M3), "l.weight_scale_2": torch.ones(1)}, "uint8"),
    "Marlin": ({"l.B": INT32, "l.s": ONES}, "int32"),
    "SmoothQuant": ({"l.weight": INT8, "l.deq_scale": ONES}, "SmoothQuant"),
    "an unknown one": ({"l.codes": INT8, "l.factors": ONES}, "int8"),
    "integers": ({"l.weight": INT8, "norm.weight": ONES}, "int8"),
}


@pytest.mark.parametrize("kind", MORE_PACKED)
def test_more_packed_formats(kind: str) -> None:
    tensors, named = MORE_PACKED[kind]
    for base, models in ((tensors, [tensors]), ({"l.weight": torch.ones(8, 8)}, [tensors])):
        with pytest.raises(fm.CheckpointError, match=rf"is quantised \({re.escape(named)}: ") as refusal:
            fm.merge(base, models)
        assert "copy" not in str(refusal.value)


def test_integers_beside_the_weights_are_no_quantisation() -> None:
    state = {
        "w.weight": torch.ones(4, 4),
        "attn.bias": torch.ones(1, 1, 64, 64, dtype=torch.uint8),
        "attn.mask": torch.ones(64, 64, dtype=torch.int8),
        "relative_position_index": torch.ones(64, 64, dtype=torch.int32),
        "num_batches_tracked": torch.tensor(3, dtype=torch.int32),
    }
    assert opened(state).keys() == state.keys()


def test_the_scale_of_a_float8_weight_beside_it_and_those_of_a_cache() -> None:
    stored, scale = quantise(floats(0, 200, 130), (128, 128))
    found = opened(
        {
            "attn.k.weight": stored, "attn.k.scale": scale, "norm.weight": torch.ones(4), "norm.scale": torch.ones(4),
            "attn.k_scale": torch.ones(1), "attn.v_scale": torch.ones(1),
        }
    )  # fmt: skip
    assert found.keys() == {"attn.k.weight", "norm.weight", "norm.scale"}
    assert torch.equal(found["attn.k.weight"], restored(stored, scale, (128, 128)))


def test_many_experts_open_in_no_time() -> None:
    one = {"weight": torch.zeros(1, 1).to(E4M3), "weight_scale_inv": torch.ones(1, 1)}
    state = {f"l.{i // 100}.experts.{i % 100}.{name}": tensor for i in range(4000) for name, tensor in one.items()}
    checkpoint, begin = Checkpoint.open(state), time.process_time()
    assert len(dequantised(checkpoint).specs) == 4000
    assert time.process_time() - begin < 2, "it was 14 s when each name was looked for among all weights"


@pytest.mark.parametrize("place", ["config", "a part of it"])
def test_a_config_that_says_quantised_of_floats_is_told_and_mended(place: str, tmp_path: Path) -> None:
    """As fp8 models that were converted without their config: transformers would not load the merged model."""
    quantisation = {"quantization_config": {"quant_method": "fp8"}}
    config: dict[str, Any] = {"model_type": "x"}
    config |= quantisation if place == "config" else {"text_config": quantisation | {"a": 1}}
    for name in ("base", "model"):
        (tmp_path / name).mkdir()
        save_file({"w": floats(len(name), 8, 8)}, tmp_path / name / "model.safetensors")
        (tmp_path / name / "config.json").write_text(json.dumps(config))
    warnings = fm.inspect(tmp_path / "base", [tmp_path / "model"]).warnings
    assert any("config.json says that weights are quantised (fp8), but they are floats" in line for line in warnings)
    fm.merge_checkpoints(tmp_path / "base", [tmp_path / "model"], tmp_path / "out", EXACT, progress=False)
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written == ({"model_type": "x"} if place == "config" else {"model_type": "x", "text_config": {"a": 1}})
