"""Expert files: round trips, sizes, and damage that must be noticed."""

from __future__ import annotations

import json
import math
from dataclasses import fields, replace
from fractions import Fraction
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
import torch
from position_codec import decode_positions
from safetensors import safe_open
from safetensors.torch import save_file

import freemerge.experts as fx
from freemerge.errors import ArgumentError, CheckpointError, RefusedError
from freemerge.experts.payload import numbers_to_bytes
from freemerge.experts.positions import CodedPositions
from freemerge.experts.values import CODINGS, ExpertTensor, LowRankTensor, SparseTensor
from freemerge.experts.values.gains import NO_CODES, NO_SCALE, Gains
from freemerge.experts.values.mask import Mask
from freemerge.experts.values.svd2 import Svd2
from freemerge.experts.values.svd16 import Svd16

LAYER = {"q": (384, 384), "k": (384, 384), "v": (384, 384), "o": (384, 384), "up": (1536, 384), "down": (384, 1536)}


@lru_cache(maxsize=2)
def family(layers: int, vocabulary: int) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Base and fine-tuned weights of a small encoder: matrices, biases and norms, and an embedding."""
    shapes = {"embedding.weight": (vocabulary, 384)}
    for layer in range(layers):
        for name, shape in LAYER.items():
            shapes[f"layer.{layer}.{name}.weight"] = shape
            shapes[f"layer.{layer}.{name}.bias"] = shape[:1]
        shapes[f"layer.{layer}.norm.weight"] = (384,)
    generator = torch.Generator().manual_seed(1)
    base = {name: torch.zeros(shape) for name, shape in shapes.items()}
    return base, {name: 0.01 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def extract(values: str, layers: int = 2, vocabulary: int = 3000) -> fx.Expert:
    """A one-percent expert of it."""
    base, model = family(layers, vocabulary)
    return fx.extract_experts(base, {"task": model}, density=0.01, values=values)["task"]


def dense_bytes(expert: fx.Expert) -> int:
    """Size of the bf16 model."""
    return 2 * sum(tensor.numel for tensor in expert.tensors.values())


@pytest.mark.parametrize("values", [name for name, coding in CODINGS.items() if issubclass(coding, SparseTensor)])
def test_a_saved_expert_is_loaded_as_it_was(values: str, tmp_path: Path) -> None:
    expert = extract(values)
    size = expert.save(tmp_path / "task.safetensors")
    assert size == (tmp_path / "task.safetensors").stat().st_size
    again = fx.Expert.load(tmp_path / "task.safetensors")
    assert (again.mu, again.density, again.scope, again.rescale, again.values) == (
        expert.mu,
        expert.density,
        expert.scope,
        expert.rescale,
        expert.values,
    )
    assert sorted(again.tensors) == sorted(expert.tensors)
    for name, tensor in expert.tensors.items():
        assert again.tensors[name].shape == tensor.shape
        assert torch.equal(again.tensors[name].indices, tensor.indices)
        assert torch.equal(again.tensors[name].sparse().values, tensor.sparse().values)
    again.save(tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "task.safetensors").read_bytes()


@pytest.mark.parametrize(("values", "percent"), [("bf16", 1.6), ("sign", 0.6), ("int8", 1.3), ("fp32", 2.6)])
def test_size_of_a_one_percent_expert(values: str, percent: float, tmp_path: Path) -> None:
    expert = extract(values, layers=6, vocabulary=30_522)
    assert expert.save(tmp_path / "task.safetensors") <= percent / 100 * dense_bytes(expert)


def test_an_empty_expert_is_a_file_too(tmp_path: Path) -> None:
    base = {"w": torch.ones(4, 4)}
    expert = fx.extract_experts(base, {"t": base})["t"]
    expert.save(tmp_path / "t.safetensors")
    assert fx.Expert.load(tmp_path / "t.safetensors").entries == 0


def test_the_documented_format_can_be_read_without_this_package_s_reader(tmp_path: Path) -> None:
    """docs/expert-format.md, followed literally for sign values with Rice-coded positions."""
    expert = extract("sign")
    expert.save(tmp_path / "t.safetensors")

    def take(payload: bytes, at: int) -> tuple[int, int]:
        value = shift = 0
        while True:
            byte = payload[at]
            value |= (byte & 127) << shift
            at, shift = at + 1, shift + 7
            if byte < 128:
                return value, at

    with safe_open(tmp_path / "t.safetensors", "np") as file:
        metadata = file.metadata()
        assert metadata["format"] == "freemerge-expert"
        assert metadata["version"] == "1"
        for name in file.keys():  # noqa: SIM118 (safe_open is no mapping)
            payload = file.get_tensor(name).tobytes()
            dimensions, at = take(payload, 0)
            numbers = []
            for _ in range(dimensions + 4):
                number, at = take(payload, at)
                numbers.append(number)
            *shape, count, coding, parameter, size = numbers
            positions = decode_positions(
                CodedPositions(coding, parameter, np.frombuffer(payload[at : at + size], np.uint8)), count
            )
            values = payload[at + size :]
            scale = np.frombuffer(values[:4], "<f4")[0]
            negative = np.unpackbits(np.frombuffer(values[4:], np.uint8), bitorder="little", count=count)
            flat = np.zeros(int(np.prod(shape)), np.float32)
            flat[positions] = np.where(negative, -scale, scale)
            assert np.array_equal(flat.reshape(shape), expert.tensors[name].dense().numpy())
    assert float(metadata["mu"]) == expert.mu


def rewrite(path: Path, *, metadata: dict[str, str] | None = None, payload: bytes | None = None) -> None:
    """A small expert file with its metadata replaced, or with its one tensor's payload replaced."""
    raw = path.read_bytes()
    size = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + size])
    data = raw[8 + size :]
    if metadata is not None:
        header["__metadata__"] = {**header["__metadata__"], **metadata}
    if payload is not None:
        data = payload
        header["w"].update(shape=[len(data)], data_offsets=[0, len(data)])
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def small_file(tmp_path: Path, values: str = "bf16") -> Path:
    model = torch.randn(30, 40, generator=torch.Generator().manual_seed(2))
    path = tmp_path / "small.safetensors"
    base = {"w": torch.zeros(30, 40)}
    coding = CODINGS[values]
    options = {"density": 0.1} if issubclass(coding, SparseTensor) else {"backbone": {"w": model / 2}}
    options |= {"rank": 2} if issubclass(coding, LowRankTensor) else {}
    fx.extract_experts(base, {"t": {"w": model}}, values=values, **options)["t"].save(path)  # type: ignore[arg-type]
    return path


def payload_of(path: Path) -> bytes:
    raw = path.read_bytes()
    return raw[8 + int.from_bytes(raw[:8], "little") :]


PUBLISHED = {
    "fp32": "01ac0202010603800a2100004040000080bf0203050301010203230000003f000000c00000803f",
    "bf16": "01ac0202010603800a21404080bf020305030101020323003f00c0803f",
    "fp16": "01ac0202010603800a21004200bc020305030101020323003800c0003c",
    "int8": "01ac0202010603800a21c23c7fd6020305030101020323823c023c20827e",
    "sign": "01ac0202010603800a2100000040020203050301010203235555953f02",
}
"""Both payloads, b and w, of the expert below in a file that version 0.1 wrote."""


@pytest.mark.parametrize("values", PUBLISHED)
def test_the_bytes_of_published_files(values: str, tmp_path: Path) -> None:
    base = {"w": torch.zeros(3, 5), "b": torch.zeros(300)}
    w = torch.tensor([[0, 0.5, 0, -2, 0], [0, 0, 0, 0, 0], [1, 0, 0, 0, -0.25]])
    b = torch.zeros(300).index_put((torch.tensor([0, 299]),), torch.tensor([3.0, -1.0]))
    path = tmp_path / "t.safetensors"
    fx.extract_experts(base, {"t": {"w": w, "b": b}}, density=0.25, values=values, rescale=1.5)["t"].save(path)
    raw = path.read_bytes()
    size = int.from_bytes(raw[:8], "little")
    payloads = bytes.fromhex(PUBLISHED[values])
    assert raw[8 + size :] == payloads
    cut = {"fp32": 18, "sign": 15}.get(values, 14)
    header = {
        "__metadata__": {
            "density": "0.25", "format": "freemerge-expert", "mu": "1.5", "rescale": "number", "scope": "tensor",
            "values": values, "version": "1",
        },
        "b": {"dtype": "U8", "shape": [cut], "data_offsets": [0, cut]},
        "w": {"dtype": "U8", "shape": [len(payloads) - cut], "data_offsets": [cut, len(payloads)]},
    }  # fmt: skip
    assert raw[8 : 8 + size].rstrip() == json.dumps(header, separators=(",", ":")).encode()


def codes(*rows: list[int]) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.uint8)


def floats(*values: float, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.tensor(values, dtype=dtype)


GIVEN: dict[str, dict[str, ExpertTensor]] = {
    "svd2": {
        "w": Svd2((3, 5), codes([0, 1, 2], [3, 3, 1]), codes([3, 2, 1, 0, 0], [1, 3, 0, 2, 2]),
                  floats(1.5, -0.25, dtype=torch.bfloat16)),
    },
    "svd16": {
        "w": Svd16((2, 3), floats(0.5, -2, 3, 0, dtype=torch.float16).view(2, 2),
                   floats(1, 0.25, -1, 0, -0.5, 2, dtype=torch.float16).view(2, 3)),
    },
    "mask": {"w": Mask((2, 5), torch.tensor([1, 1, 0, 1, 0, 0, 0, 1, 0, 1]).bool(), floats(0.75))},
    "gains": {
        "b": Gains((4,), NO_CODES, NO_SCALE, NO_SCALE,
                   Svd2((4,), codes([3]), codes([0, 1, 2, 3]), floats(1, dtype=torch.bfloat16))),
        "w": Gains((3, 5), torch.tensor([7, -7, 2], dtype=torch.int8), floats(0.125), floats(6.5),
                   Svd2((3, 5), codes([2, 0, 3]), codes([1, 1, 3, 2, 3]), floats(-3, dtype=torch.bfloat16))),
    },
}  # fmt: skip
PUBLISHED_2 = {
    "svd2": {"w": "02030502c03f80bee4071b340a"},
    "svd16": {"w": "02020302003800c000420000003c003400bc000000b80040"},
    "mask": {"w": "0202050000403f8b02"},
    "gains": {"b": "0104000101803f03e4", "w": "02030503010000003e0000d0400e790140c032b503"},
}
"""What docs/expert-format.md says the bytes of the tensors above are, put together by hand."""


def assert_same_parts(got: ExpertTensor, want: ExpertTensor) -> None:
    assert type(got) is type(want)
    for part in fields(want):
        there, here = getattr(got, part.name), getattr(want, part.name)
        if isinstance(here, ExpertTensor):
            assert_same_parts(there, here)
        elif isinstance(here, torch.Tensor):
            assert there.dtype == here.dtype
            assert torch.equal(there, here)
        else:
            assert there == here


@pytest.mark.parametrize("values", [name for name, coding in CODINGS.items() if not issubclass(coding, SparseTensor)])
def test_the_bytes_of_files_of_version_2(values: str, tmp_path: Path) -> None:
    statistics = {"mean": floats(0.5, 3, -0.25, dtype=torch.bfloat16)}
    expert = fx.Expert(GIVEN[values], 0.75, None, None, "number", values, 0.25, statistics)
    path = tmp_path / "t.safetensors"
    expert.save(path)
    raw = path.read_bytes()
    size = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + size])
    metadata = {"budget": "0.25", "format": "freemerge-expert", "mu": "0.75", "rescale": "number", "values": values}
    assert header.pop("__metadata__") == {**metadata, "version": "2"}
    bytes_ = {name: raw[8 + size :][slice(*entry["data_offsets"])].hex() for name, entry in header.items()}
    assert bytes_ == {"mean": "003f404080be", **PUBLISHED_2[values]}
    assert {name: (entry["dtype"], entry["shape"]) for name, entry in header.items()} == {
        "mean": ("BF16", [3]),
        **{name: ("U8", [len(payload) // 2]) for name, payload in PUBLISHED_2[values].items()},
    }
    again = fx.Expert.load(path)
    assert again.metadata == expert.metadata
    assert torch.equal(again.statistics["mean"], statistics["mean"])
    assert again.tensors.keys() == expert.tensors.keys()
    for name, tensor in again.tensors.items():
        assert_same_parts(tensor, expert.tensors[name])


@pytest.mark.parametrize("values", CODINGS)
def test_cut_and_extended_payloads_are_named(values: str, tmp_path: Path) -> None:
    path = small_file(tmp_path, values)
    payload = payload_of(path)
    for damaged in [payload[:n] for n in range(0, len(payload), 7)] + [payload + b"\0"]:
        rewrite(path, payload=damaged)
        with pytest.raises(CheckpointError, match=r"small\.safetensors: tensor 'w' is corrupted"):
            fx.Expert.load(path)


def test_flipped_bits_never_crash_and_never_leave_the_tensor(tmp_path: Path) -> None:
    path = small_file(tmp_path)
    payload = payload_of(path)
    refused = 0
    for bit in range(0, 8 * len(payload), 11):
        damaged = bytearray(payload)
        damaged[bit // 8] ^= 1 << bit % 8
        rewrite(path, payload=bytes(damaged))
        try:
            tensor = fx.Expert.load(path).tensors["w"]
        except CheckpointError:
            refused += 1
            continue
        assert int(tensor.indices.max()) < tensor.numel
        assert bool((tensor.indices.diff() > 0).all())
    assert refused > 0


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"format": "pt"}, "not an expert file"),
        ({"version": "3"}, "version '3'"),
        ({"version": "2"}, "version 2 has no values bf16"),
        ({"values": "svd2"}, "version 1 has no values svd2"),
        ({"values": "fp4"}, "values must be one of"),
        ({"mu": "nan"}, "bad expert metadata"),
        ({"mu": "much"}, "bad expert metadata"),
        ({"density": "1.5"}, "bad expert metadata"),
    ],
)
def test_bad_metadata_is_named(metadata: dict[str, str], message: str, tmp_path: Path) -> None:
    path = small_file(tmp_path)
    rewrite(path, metadata=metadata)
    with pytest.raises(CheckpointError, match=rf"small\.safetensors.*{message}"):
        fx.Expert.load(path)


@pytest.mark.parametrize(("coding", "parameter"), [(1, 1 << 31), (1 << 40, 0)])
def test_codings_of_positions_that_there_are_not_are_named(coding: int, parameter: int, tmp_path: Path) -> None:
    path = tmp_path / "expert.safetensors"
    payload = np.append(numbers_to_bytes(2, 4, 4, 1, coding, parameter, 1), np.zeros(3, np.uint8))
    metadata = {"format": "freemerge-expert", **fx.Expert({}, 1.0, 0.1, "tensor", "auto", "bf16").metadata}
    save_file({"w": torch.from_numpy(payload)}, path, metadata=metadata)
    with pytest.raises(CheckpointError, match=r"expert\.safetensors: tensor 'w' is corrupted"):
        fx.Expert.load(path)


def test_numbers_of_any_kind_are_written_as_they_are_read(tmp_path: Path) -> None:
    expert = fx.Expert.load(small_file(tmp_path))
    given = replace(expert, mu=np.float64(1.5), density=np.float32(0.25), budget=Fraction(1, 8))
    given.save(tmp_path / "given.safetensors")
    loaded = fx.Expert.load(tmp_path / "given.safetensors")
    assert (loaded.mu, loaded.density, loaded.budget) == (given.mu, given.density, given.budget) == (1.5, 0.25, 0.125)
    wrong = [("mu", math.inf), ("mu", torch.tensor(1.0)), ("mu", None), ("density", 1.0), ("budget", "1%")]
    for name, value in wrong:
        with pytest.raises(ArgumentError, match=f"{name} must be"):
            replace(expert, **{name: value})


def test_other_files_are_refused(tmp_path: Path) -> None:
    save_file({"w": torch.zeros(3)}, tmp_path / "model.safetensors")
    (tmp_path / "text.safetensors").write_text("hello")
    for name in ("model", "text", "missing"):
        with pytest.raises(CheckpointError, match=rf"{name}\.safetensors"):
            fx.Expert.load(tmp_path / f"{name}.safetensors")
    path = small_file(tmp_path)
    with pytest.raises(RefusedError, match="exists"):
        fx.Expert.load(path).save(path)
    fx.Expert.load(path).save(path, force=True)
    with pytest.raises(ArgumentError, match=r"must end in \.safetensors"):
        fx.Expert.load(path).save(tmp_path / "folder")
