"""What scripts set for all of torch, a default device or dtype, changes no result."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import freemerge as fm

GENERATOR = torch.Generator().manual_seed(0)
BASE = {
    "a.weight": torch.randn(40, 36, generator=GENERATOR),
    "conv.weight": torch.randn(4, 3, 3, 3, generator=GENERATOR),
    "norm.running_mean": torch.randn(4, generator=GENERATOR),
    "bias": torch.randn(7, generator=GENERATOR),
}
MODELS = [{n: t + 0.1 * torch.randn(t.shape, generator=GENERATOR) for n, t in BASE.items()} for _ in range(3)]
MERGED = fm.merge(BASE, MODELS)
TASKS = dict(zip("xyz", MODELS, strict=True))
X = torch.randn(4, 36, generator=GENERATOR)


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    former = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(former)


DEFAULTS = {  # what is made on the meta device by mistake cannot be used
    "device": lambda: torch.device("meta"),
    "float64": lambda: default_dtype(torch.float64),
    "bfloat16": lambda: default_dtype(torch.bfloat16),
}
EXPERTS: dict[str, dict[str, Any]] = {
    **{values: {"values": values} for values in ("bf16", "fp32", "int8", "sign")},
    "released": {"rescale": "released"},
    "auto": {"rescale": "auto"},
    "model": {"scope": "model"},
    "svd2": {"budget": 0.5, "backbone": MERGED},
    "svd16": {"values": "svd16", "rank": 2, "backbone": MERGED},
    "mask": {"values": "mask", "backbone": MERGED},
    "gains": {"values": "gains", "backbone": MERGED},
    "more gains": {"values": "gains", "backbone": MERGED, "budget": 0.5},
}


@pytest.mark.parametrize("method", sorted(fm.methods.METHODS))
@pytest.mark.parametrize("defaults", DEFAULTS)
def test_merges(method: str, defaults: str, tmp_path: Path) -> None:
    for recipe in (fm.Recipe(method=method), fm.Recipe(method=method, scale="interference")):
        expected = fm.merge(BASE, MODELS, recipe)
        with DEFAULTS[defaults]():
            merged = fm.merge(BASE, MODELS, recipe)
        assert all(torch.equal(merged[name], tensor) for name, tensor in expected.items())
    with DEFAULTS[defaults]():
        fm.merge_checkpoints(BASE, MODELS, tmp_path / "out.safetensors", recipe, progress=False)
    written = load_file(tmp_path / "out.safetensors")
    assert all(torch.equal(written[name], tensor) for name, tensor in expected.items())
    with DEFAULTS[defaults]():
        read = fm.merge(tmp_path / "out.safetensors", [tmp_path / "out.safetensors"] * 2, method="average")
    assert all(torch.equal(read[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("options", EXPERTS.values(), ids=EXPERTS)
@pytest.mark.parametrize("defaults", DEFAULTS)
def test_experts(options: dict[str, Any], defaults: str, tmp_path: Path) -> None:
    def switched(folder: Path) -> dict[str, Tensor]:
        fm.save_experts(fm.extract_experts(BASE, TASKS, **options), folder)
        model = {name: tensor.clone() for name, tensor in MERGED.items()}
        with fm.ExpertBank.load(model, folder, base=BASE).active({"x": 1.0, "y": 0.5}):
            return {name: tensor.clone() for name, tensor in model.items()}

    expected = switched(tmp_path / "plain")
    with DEFAULTS[defaults]():
        found = switched(tmp_path / "changed")
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    for file in (tmp_path / "plain").iterdir():
        assert (tmp_path / "changed" / file.name).read_bytes() == file.read_bytes()


@pytest.mark.parametrize("defaults", DEFAULTS)
@pytest.mark.parametrize("options", [{}, {"values": "svd16", "rank": 2, "backbone": BASE}], ids=["entries", "low rank"])
def test_experts_in_the_forward_pass_and_routers(options: dict[str, Any], defaults: str, tmp_path: Path) -> None:
    model = torch.nn.Linear(36, 40, bias=False, dtype=torch.float32)
    base = {"weight": BASE["a.weight"]}
    options = options | ({"backbone": base} if options else {})
    experts = fm.extract_experts(base, {t: {"weight": m["a.weight"]} for t, m in TASKS.items()}, **options)
    bank = fm.ExpertBank(model, experts)

    def outputs() -> list[Tensor]:
        router = fm.Router.fit(X, ["x", "y", "x", "z"], hidden=4, steps=3)
        router.save(tmp_path / "router.safetensors")
        weights = fm.Router.load(tmp_path / "router.safetensors")(X)
        routed = fm.RoutedModel(model, bank, lambda x: weights.roll(1, 1) + 0.1 * X[:, :3], features=lambda x: x)
        with torch.no_grad():
            answers = routed(X).output
            with bank.deltas(["x", None, {"y": 0.5, "z": 1.0}, "x"]):
                return [model(X), answers, weights]

    expected = outputs()
    with DEFAULTS[defaults]():
        found = outputs()
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


@pytest.mark.parametrize("defaults", DEFAULTS)
@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_filters(backend: str, defaults: str) -> None:
    for response in (fm.HighPass(0.37), fm.Custom(torch.eye(40, 36).numpy()), fm.Gaussian(0.21)):
        expected = fm.filtered(BASE["a.weight"], response, backend=backend)
        with DEFAULTS[defaults]():
            other = type(response)(response._array) if isinstance(response, fm.Custom) else response
            assert torch.equal(fm.filtered(BASE["a.weight"], other, backend=backend), expected)


def test_an_analysis() -> None:
    expected = fm.analyze(BASE, MODELS)
    for defaults in DEFAULTS.values():
        with defaults():
            assert fm.analyze(BASE, MODELS).to_html() == expected.to_html()
