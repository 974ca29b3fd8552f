"""What training programs save: unwrapped where there is one state dict, refused in our own words otherwise."""

from __future__ import annotations

import argparse
import collections
import json
import re
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import freemerge as fm
from freemerge.checkpoint import Checkpoint
from freemerge.errors import CheckpointError
from in_memory import same

BASE = {"layer.weight": torch.arange(32.0).reshape(4, 8), "layer.bias": torch.ones(4)}


def tuned(change: float = 1.0) -> dict[str, Tensor]:
    return {name: tensor + change for name, tensor in BASE.items()}


def read(source: Any) -> dict[str, Tensor]:
    opened = Checkpoint.open(source)
    return {name: opened.read(name) for name in opened.specs}


def optimizer_state() -> dict[str, Any]:
    model = nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    return optimizer.state_dict()


CONTAINERS: dict[str, Any] = {
    **{
        name: (lambda state, name=name: {name: state, "epoch": 3, "optimizer": optimizer_state()})
        for name in ("state_dict", "model", "model_state_dict", "module", "net", "params_ema", "generator", "weights")
    },
    "lightning": lambda state: {
        "state_dict": collections.OrderedDict(state),
        "hyper_parameters": {"lr": 1e-3},
        "optimizer_states": [optimizer_state()],
        "callbacks": {"x": {"best": torch.ones(1)}},
        "pytorch-lightning_version": "2.0",
    },
    "nested": lambda state: {"checkpoint": {"model": {"state_dict": state}, "step": 1}, "scheduler": {"last": 0}},
    "beside random states": lambda state: {
        "model": state,
        "rng_state": {"torch": torch.ones(3), "cuda": torch.ones(3)},
    },
}


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".bin", ".ckpt"])
@pytest.mark.parametrize("container", CONTAINERS)
def test_the_only_state_dict_is_found(container: str, suffix: str, tmp_path: Path) -> None:
    torch.save(CONTAINERS[container](tuned()), tmp_path / f"m{suffix}")
    assert same(read(tmp_path / f"m{suffix}"), tuned())
    assert same(read(CONTAINERS[container](tuned())), tuned())


@pytest.mark.parametrize("zipped", [True, False])
def test_one_of_several_is_named_behind_the_path(zipped: bool, tmp_path: Path) -> None:
    content = {"model": tuned(1), "ema": {"shadow": tuned(2)}, "epoch": 1}
    path = tmp_path / "m.pt"
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(CheckpointError, match="several state dicts; say which by") as refusal:
        fm.merge(BASE, [path])
    for advice, change in zip(re.findall(r"(\S+m\.pt::\S+)", str(refusal.value)), (1, 2), strict=True):
        assert same(read(advice), tuned(change))
        assert same(read(Path(advice)), tuned(change))
        fm.merge(BASE, [advice])
    with pytest.raises(CheckpointError, match=r"m\.pt::emma: there is no 'emma', only 'model', 'ema', 'epoch'"):
        read(f"{path}::emma")
    with pytest.raises(CheckpointError, match=r"models\[0\] \(in-memory state dict\): holds several state dicts"):
        fm.merge(BASE, [content])  # type: ignore[list-item]


def test_messages_and_manifest_tell_two_of_one_file_apart(tmp_path: Path) -> None:
    path = tmp_path / "m.pt"
    torch.save({"model": tuned(1), "ema": {"shadow": {**tuned(2), "layer.bias": torch.full((4,), torch.nan)}}}, path)
    with pytest.raises(CheckpointError, match=r"m\.pt::ema::shadow: tensor 'layer\.bias' holds NaN"):
        fm.merge(f"{path}::model", [f"{path}::ema::shadow"])
    torch.save({"model": tuned(1), "ema": {"shadow": tuned(2)}}, path)
    fm.merge_checkpoints(f"{path}::model", [f"{path}::ema::shadow"], tmp_path / "out", progress=False)
    manifest = json.loads((tmp_path / "out" / "freemerge.json").read_text())
    names = [f"{tmp_path.name}/m.pt::model", f"{tmp_path.name}/m.pt::ema::shadow"]
    assert [manifest["base"]["name"], manifest["models"][0]["name"]] == names
    card = (tmp_path / "out" / "README.md").read_text()
    assert all(f"`{name}`" in card for name in names)


def test_a_key_is_for_torch_files(tmp_path: Path) -> None:
    fm.merge_checkpoints(BASE, [tuned()], tmp_path / "m.safetensors", progress=False)
    with pytest.raises(CheckpointError, match="is no torch file, so there is no 'model' in it"):
        read(f"{tmp_path / 'm.safetensors'}::model")


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 4)


def test_objects_are_refused_in_our_own_words_and_the_way_out_works(tmp_path: Path) -> None:
    model = Model()
    path, new = tmp_path / "m.pt", tmp_path / "new.pt"
    contents = {"Model": model, "argparse.Namespace": {"model": model.state_dict(), "args": argparse.Namespace(lr=1)}}
    for kind, content in contents.items():
        torch.save(content, path)
        with pytest.raises(CheckpointError, match=rf"m\.pt: refused, it holds objects of [\w.]*{kind}, not") as refusal:
            read(path)
        words = str(refusal.value)
        assert "\x1b" not in words
        assert "PyTorch 2.6" not in words
        assert "torch.load(PATH, weights_only=False) and save the state dict alone with torch.save" in words
        opened = torch.load(path, weights_only=False)
        torch.save(opened.state_dict() if isinstance(opened, nn.Module) else opened["model"], new)
        fm.merge(BASE, [new])


@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_a_torchscript_program_is_refused_and_the_way_out_works(tmp_path: Path) -> None:
    path = tmp_path / "m.pt"
    torch.jit.trace(nn.Sequential(nn.Linear(8, 4)), torch.ones(1, 8)).save(path)
    with pytest.raises(CheckpointError, match=r"torch\.save\(torch\.jit\.load\(PATH\)\.state_dict\(\), NEW\)"):
        read(path)
    torch.save(torch.jit.load(path).state_dict(), tmp_path / "new.pt")
    assert set(read(tmp_path / "new.pt")) == {"0.weight", "0.bias"}


def packed(path: Path, **options: Any) -> None:
    """A file of torch, packed again with other settings of the archive."""
    with zipfile.ZipFile(path) as archive:
        records = {record.filename: archive.read(record) for record in archive.infolist()}
    with zipfile.ZipFile(path, "w", **options) as archive:
        for name, data in records.items():
            archive.writestr(name, data)


def test_a_compressed_file_is_not_taken_for_weights_and_the_way_out_works(tmp_path: Path) -> None:
    path = tmp_path / "m.bin"
    torch.save({"a": torch.zeros(1 << 20)}, path)
    packed(path, compression=zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 100_000
    with pytest.raises(CheckpointError, match="its records are compressed") as refusal:
        read(path)
    assert "torch.save(torch.load(PATH, weights_only=True), NEW)" in str(refusal.value)
    torch.save(torch.load(path, weights_only=True), tmp_path / "new.bin")
    assert torch.equal(read(tmp_path / "new.bin")["a"], torch.zeros(1 << 20))


@pytest.mark.parametrize("compression", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_a_bomb_is_refused_before_it_is_expanded(compression: int, tmp_path: Path) -> None:
    path = tmp_path / "m.bin"
    torch.save(BASE, path)
    packed(path)
    with zipfile.ZipFile(path, "a", compression=compression) as archive, archive.open("m/data/9", "w") as record:
        for _ in range(256):
            record.write(bytes(1 << 20))
    with pytest.raises(CheckpointError, match="its records are compressed"):
        read(path)


@pytest.mark.parametrize("shape", [(20000, 20000), (1 << 40,), (1 << 20, 3, 7)])
def test_a_tensor_larger_than_its_file_is_refused(shape: tuple[int, ...], tmp_path: Path) -> None:
    path = tmp_path / "m.pt"
    torch.save({"a": torch.zeros(1).expand(shape)}, path)
    with pytest.raises(CheckpointError, match=r"m\.pt: tensor 'a' would take \d+ bytes, the whole file has"):
        read(path)


def test_a_small_expanded_buffer_is_read(tmp_path: Path) -> None:
    torch.save({"a": torch.arange(4)[None].expand(3, 4)}, tmp_path / "m.pt")
    assert torch.equal(read(tmp_path / "m.pt")["a"], torch.arange(4).expand(3, 4))


BESIDE: dict[str, dict[str, Any]] = {
    "a best score": {"best_acc": torch.tensor(0.5), "epoch": 3},
    "a scaler of gradients": {"grad_scaler": {"scale": torch.tensor(2.0), "growth": torch.ones(2)}},
    "a schedule": {"lr_scheduler": {"base_lrs": torch.ones(2)}, "warmup_sched": {"x": torch.ones(2)}},
    "scores": {"results": {"acc": torch.tensor(0.5), "f1": torch.tensor(0.4)}},
    "a loss": {"criterion": {"weight": torch.ones(5)}, "loss": {"weight": torch.ones(5)}},
    "an optimizer": {"opt": {"exp_avg": torch.ones(5)}, "optimizer_g": {"exp_avg": torch.ones(5)}},
}


@pytest.mark.parametrize("kind", BESIDE)
def test_what_trainers_keep_beside_the_model(kind: str, tmp_path: Path) -> None:
    content = {"state_dict": tuned(), **BESIDE[kind]}
    torch.save(content, tmp_path / "m.pth.tar")
    assert same(read(tmp_path / "m.pth.tar"), tuned())
    assert same(read(content), tuned())


def test_extra_states_of_modules_are_left_out_and_told(tmp_path: Path) -> None:
    content = {**tuned(), "layer._extra_state": None}
    nested = {"model": content, "ema": {"step": 3}, "epoch": 1}
    torch.save(content, tmp_path / "m.pt")
    torch.save(nested, tmp_path / "nested.pt")
    for source in (content, nested, tmp_path / "m.pt", tmp_path / "nested.pt"):
        assert same(read(source), tuned())
        warnings = fm.inspect(BASE, [source]).warnings
        assert any("layer._extra_state is no weight and left out (1 such entry)" in warning for warning in warnings)


@pytest.mark.filterwarnings("ignore")
def test_modules_that_torch_quantised_are_told(tmp_path: Path) -> None:
    quantised = torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.Linear(8, 8)), {nn.Linear})
    torch.save(quantised.state_dict(), tmp_path / "m.pt")
    for source in (quantised, quantised.state_dict(), tmp_path / "m.pt"):
        with pytest.raises(CheckpointError, match=r"is quantised by torch \(0\._packed_params"):
            fm.merge(nn.Sequential(nn.Linear(8, 8)), [source])
