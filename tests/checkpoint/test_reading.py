"""Reading: every kind of source gives the tensors that were saved; tied names; rows; changes underneath."""

import json
import os
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from freemerge.checkpoint import Checkpoint, TensorSpec
from freemerge.checkpoint.pickled import PickledFile
from freemerge.checkpoint.safetensors_file import SafetensorsFile
from freemerge.checkpoint.spec import TORCH_DTYPES
from freemerge.errors import ArgumentError, CheckpointError


def some_state(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "z.weight": torch.randn(7, 5, generator=generator),
        "a.weight": torch.randn(33, 9, generator=generator).bfloat16(),
        "a.bias": torch.randn(33, generator=generator).half(),
        "steps": torch.tensor(12),
        "mask": torch.tensor([True, False, True]),
        "empty": torch.empty(0, 4),
        "big": torch.randn(700, 512, generator=generator),  # above the size from which files are mapped
    }


def same(checkpoint: Checkpoint, state: dict[str, torch.Tensor]) -> None:
    assert list(checkpoint.specs) == sorted(state)
    for name, tensor in state.items():
        assert checkpoint.specs[name] == TensorSpec(name, tuple(tensor.shape), tensor.dtype)
        assert checkpoint.specs[name].nbytes == tensor.nbytes
        assert torch.equal(checkpoint.read(name), tensor)


def write_sharded(directory: Path, state: dict[str, torch.Tensor]) -> None:
    names = sorted(state)
    shards = {"model-1.safetensors": names[::2], "model-2.safetensors": names[1::2]}
    for file, held in shards.items():
        save_file({name: state[name] for name in held}, directory / file, {"format": "pt"})
    weight_map = {name: file for file, held in shards.items() for name in held}
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def test_single_safetensors_file_and_directory(tmp_path: Path) -> None:
    state = some_state()
    save_file(state, tmp_path / "model.safetensors")
    for source in (tmp_path, tmp_path / "model.safetensors", str(tmp_path)):
        with Checkpoint.open(source) as checkpoint:
            same(checkpoint, state)
            assert checkpoint.files == (tmp_path / "model.safetensors",)
    assert Checkpoint.open(tmp_path).directory == tmp_path
    assert Checkpoint.open(tmp_path / "model.safetensors").directory is None


def test_sharded_directory_and_index(tmp_path: Path) -> None:
    state = some_state()
    write_sharded(tmp_path, state)
    for source in (tmp_path, tmp_path / "model.safetensors.index.json"):
        with Checkpoint.open(source) as checkpoint:
            same(checkpoint, state)
            assert [file.name for file in checkpoint.files] == ["model-1.safetensors", "model-2.safetensors"]
            assert checkpoint.origin("a.bias") == str(tmp_path / "model-1.safetensors")


@pytest.mark.parametrize("suffix", [".bin", ".pt", ".pth"])
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_torch_files(tmp_path: Path, suffix: str, zipped: bool) -> None:
    state = some_state()
    state["transposed"] = state["z.weight"].T
    torch.save(state, tmp_path / f"m{suffix}", _use_new_zipfile_serialization=zipped)
    with Checkpoint.open(tmp_path / f"m{suffix}") as checkpoint:
        same(checkpoint, state)


def test_sharded_torch_files(tmp_path: Path) -> None:
    state = some_state()
    names = list(state)
    for number, held in enumerate((names[::2], names[1::2])):
        torch.save({name: state[name] for name in held}, tmp_path / f"part{number}.bin")
    weight_map = {name: f"part{number}.bin" for number in (0, 1) for name in names[number::2]}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with Checkpoint.open(tmp_path) as checkpoint:
        same(checkpoint, state)
        same(checkpoint, state)  # after files were released and mapped again


def test_in_memory_state_is_not_copied() -> None:
    state = some_state()
    with Checkpoint.open(state) as checkpoint:
        same(checkpoint, state)
        assert checkpoint.read("big").data_ptr() == state["big"].data_ptr()
        assert (checkpoint.path, checkpoint.directory, checkpoint.files) == (None, None, ())


def test_module_parameters_are_detached() -> None:
    module = torch.nn.Linear(3, 2)
    with Checkpoint.open(module) as checkpoint:
        assert not checkpoint.read("weight").requires_grad
        assert checkpoint.label == "in-memory Linear"


def test_an_open_checkpoint_opens_as_itself() -> None:
    checkpoint = Checkpoint.open(some_state())
    assert Checkpoint.open(checkpoint) is checkpoint


@pytest.mark.parametrize("source", [3, None, [torch.zeros(1)]])
def test_other_sources_are_refused(source: object) -> None:
    with pytest.raises(ArgumentError, match="path, a state dict or a module"):
        Checkpoint.open(source)  # type: ignore[arg-type]


def test_tied_names_follow_the_state_dicts_order(tmp_path: Path) -> None:
    embeddings = torch.randn(5, 3)
    state = {"model.embed": embeddings, "x": embeddings[1:], "a_head": embeddings, "empty1": torch.empty(0)}
    torch.save(state, tmp_path / "m.bin")
    for source in (state, tmp_path / "m.bin"):
        with Checkpoint.open(source) as checkpoint:
            assert checkpoint.tied == {"a_head": "model.embed"}
            same(checkpoint, state)


@pytest.mark.parametrize("code", sorted(TORCH_DTYPES))
def test_every_dtype_reads_as_the_library_wrote_it(tmp_path: Path, code: str) -> None:
    dtype = TORCH_DTYPES[code]
    raw = torch.arange(48, dtype=torch.uint8) % 2
    tensor = raw.view(dtype).reshape(2, -1)
    header = json.dumps({"t": {"dtype": code, "shape": list(tensor.shape), "data_offsets": [0, 48]}}).encode()
    (tmp_path / "t.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(raw.tolist()))
    read = Checkpoint.open(tmp_path / "t.safetensors").read("t")
    assert (read.dtype, read.shape) == (dtype, tensor.shape)
    assert torch.equal(read.view(torch.uint8).reshape(-1), raw)


def test_header_without_padding_gives_aligned_tensors(tmp_path: Path) -> None:
    values = torch.randn(600, 512)
    for pad in range(8):
        header = json.dumps({"t": {"dtype": "F32", "shape": [600, 512], "data_offsets": [0, values.nbytes]}}).encode()
        header += b" " * pad
        path = tmp_path / f"{pad}.safetensors"
        path.write_bytes(len(header).to_bytes(8, "little") + header + values.numpy().tobytes())
        read = Checkpoint.open(path).read("t")
        assert torch.equal(read, values)
        assert read.data_ptr() % 4 == 0


@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), name=st.sampled_from(["big", "a.weight", "empty"]))
def test_rows_are_slices(tmp_path: Path, data: st.DataObject, name: str) -> None:
    state = some_state()
    save_file(state, tmp_path / "m.safetensors")
    stop = data.draw(st.integers(0, len(state[name])))
    start = data.draw(st.integers(0, stop))
    for source in (state, tmp_path / "m.safetensors"):
        assert torch.equal(Checkpoint.open(source).read_rows(name, start, stop), state[name][start:stop])


@pytest.mark.parametrize(("name", "start", "stop"), [("big", 0, 701), ("big", -1, 3), ("big", 5, 4), ("steps", 0, 1)])
def test_rows_outside_the_tensor_are_refused(tmp_path: Path, name: str, start: int, stop: int) -> None:
    save_file(some_state(), tmp_path / "m.safetensors")
    for source in (some_state(), tmp_path / "m.safetensors"):
        with pytest.raises(ArgumentError, match=f"{name} has shape"):
            Checkpoint.open(source).read_rows(name, start, stop)


def test_writing_to_a_read_tensor_never_reaches_the_file(tmp_path: Path) -> None:
    state = some_state()
    path = tmp_path / "m.safetensors"
    save_file(state, path)
    before = path.read_bytes()
    checkpoint = Checkpoint.open(path)
    checkpoint.read("big").zero_()
    checkpoint.read("a.bias").zero_()
    assert path.read_bytes() == before
    assert torch.equal(checkpoint.read("big"), state["big"])


def test_read_tensors_outlive_the_checkpoint(tmp_path: Path) -> None:
    state = some_state()
    save_file(state, tmp_path / "m.safetensors")
    torch.save(state, tmp_path / "m.pt")
    for file in ("m.safetensors", "m.pt"):
        with Checkpoint.open(tmp_path / file) as checkpoint:
            tensor = checkpoint.read("big")
        (tmp_path / file).unlink()
        assert torch.equal(tensor, state["big"])


def test_a_file_that_changes_while_open_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    save_file(some_state(), path)
    checkpoint = Checkpoint.open(path)
    save_file(some_state(seed=1), tmp_path / "new")
    os.replace(tmp_path / "new", path)
    with pytest.raises(CheckpointError, match="changed while it was being read"):
        checkpoint.read("big")


def test_a_file_is_where_it_was_when_the_working_directory_is_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = some_state()
    save_file(state, tmp_path / "model.safetensors")
    (tmp_path / "elsewhere").mkdir()
    torch.save(state, tmp_path / "model.bin")
    monkeypatch.chdir(tmp_path)
    checkpoint, pickled = Checkpoint.open("model.safetensors"), PickledFile(Path("model.bin"))
    monkeypatch.chdir("elsewhere")
    same(checkpoint, state)
    checkpoint.will_need(["big"])
    pickled.release()
    assert torch.equal(pickled.read("big"), state["big"])


def test_reading_goes_on_without_mappings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = some_state()
    path = tmp_path / "m.safetensors"
    save_file(state, path)

    def no_mapping(*args: object, **options: object) -> None:
        raise OSError(19, "No such device")

    monkeypatch.setattr("freemerge.checkpoint.safetensors_file.mmap.mmap", no_mapping)
    assert torch.equal(SafetensorsFile(path).read("big"), state["big"])


def test_no_descriptor_stays_open(tmp_path: Path) -> None:
    write_sharded(tmp_path, some_state())
    before = len(os.listdir("/proc/self/fd"))
    checkpoint = Checkpoint.open(tmp_path)
    for name in checkpoint.specs:
        checkpoint.read(name)
    assert len(os.listdir("/proc/self/fd")) == before


def test_names_for_manifests_hold_no_local_path(tmp_path: Path) -> None:
    snapshot = tmp_path / "models--org--model" / "snapshots" / "abc"
    plain = tmp_path / "plain"
    for directory in (snapshot, plain):
        directory.mkdir(parents=True)
        save_file(some_state(), directory / "model.safetensors")
    assert Checkpoint.open(snapshot).name == "org/model"
    assert Checkpoint.open(plain).name == "plain"
    assert Checkpoint.open(plain / "model.safetensors").name == "plain/model.safetensors"


def test_a_header_is_shared_by_open_files_and_checked_against_each(tmp_path: Path) -> None:
    state = some_state()
    first, second, short = (tmp_path / f"{name}.safetensors" for name in ("first", "second", "short"))
    save_file(state, first)
    save_file({name: tensor + 1 if name == "big" else tensor for name, tensor in state.items()}, second)
    short.write_bytes(first.read_bytes()[:-1])
    one, other = SafetensorsFile(first), SafetensorsFile(second)
    assert one.slots is other.slots
    assert torch.equal(one.read("big") + 1, other.read("big"))
    with pytest.raises(CheckpointError, match=r"short\.safetensors: truncated"):
        SafetensorsFile(short)


@pytest.mark.parametrize("legacy", [False, True], ids=["archive", "legacy"])
def test_a_torch_file_that_changes_while_open_is_refused(legacy: bool, tmp_path: Path) -> None:
    path = tmp_path / "m.pt"
    torch.save(some_state(), path, _use_new_zipfile_serialization=not legacy)
    checkpoint = Checkpoint.open(path)
    assert torch.equal(checkpoint.read("big"), some_state()["big"])
    torch.save(some_state(seed=1), tmp_path / "new")
    os.replace(tmp_path / "new", path)
    with pytest.raises(CheckpointError, match=r"m\.pt changed while it was being read"):
        checkpoint.read("big")


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="descriptors are counted on Linux")
def test_who_holds_many_tensors_can_still_open_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = {f"{i}": torch.full((1 << 18,), float(i)) for i in range(8)}
    save_file(state, tmp_path / "m.safetensors")
    monkeypatch.setattr("freemerge.checkpoint.safetensors_file._MOST_MAPPED", 3)
    before = len(os.listdir("/proc/self/fd"))
    with Checkpoint.open(tmp_path / "m.safetensors") as checkpoint:
        held = {name: checkpoint.read(name) for name in state}
        assert len(os.listdir("/proc/self/fd")) <= before + 3
        assert all(torch.equal(held[name], tensor) for name, tensor in state.items())
        held.clear()
        again = checkpoint.read("7")
        assert len(os.listdir("/proc/self/fd")) == before + 1
        assert torch.equal(again, state["7"])
