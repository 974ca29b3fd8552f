"""Writing: the bytes are right and deterministic; nothing is lost or half-written, whatever goes wrong and when."""

import errno
import json
import os
import random
import resource
import subprocess
import sys
import textwrap
import time
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file

from freemerge.checkpoint import Checkpoint, CheckpointWriter, TensorSpec, leftovers, staging, target, verify
from freemerge.checkpoint.journal import Journal
from freemerge.checkpoint.json_file import _indented
from freemerge.checkpoint.shard_file import Background
from freemerge.checkpoint.spec import TORCH_DTYPES
from freemerge.errors import ArgumentError, CheckpointError, RefusedError


def state_of(value: float = 1.0) -> dict[str, torch.Tensor]:
    return {
        "b": torch.full((3,), int(value), dtype=torch.int8),
        "a": torch.full((4, 5), float(value)),
        "c": torch.full((2, 2), value, dtype=torch.bfloat16),
        "d": torch.full((), value, dtype=torch.float64),
        "e": torch.empty(0, 7),
    }


def specs_of(state: dict[str, torch.Tensor]) -> list[TensorSpec]:
    return [TensorSpec(name, tuple(tensor.shape), tensor.dtype) for name, tensor in state.items()]


def write(out: Path, state: dict[str, torch.Tensor], *, shard: int = 10**9, force: bool = False) -> None:
    with CheckpointWriter(out, specs_of(state), max_shard_bytes=shard, force=force) as writer:
        for name, tensor in state.items():
            writer.write(name, tensor)


def contents(directory: Path) -> dict[str, bytes]:
    return {
        path.relative_to(directory).as_posix(): path.read_bytes() for path in directory.rglob("*") if path.is_file()
    }


def assert_only(parent: Path, *names: str) -> None:
    assert sorted(path.name for path in parent.iterdir()) == sorted(names)


def test_single_shard(tmp_path: Path) -> None:
    state = state_of()
    write(tmp_path / "out", state)
    assert_only(tmp_path, "out")
    assert_only(tmp_path / "out", "freemerge.json", "model.safetensors")
    loaded = load_file(tmp_path / "out" / "model.safetensors")
    assert loaded.keys() == state.keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in state.items())
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_shards_and_index(tmp_path: Path) -> None:
    state = {f"t{i}": torch.full((10,), float(i)) for i in range(5)} | {"wide": torch.ones(100)}
    write(tmp_path / "out", state, shard=80)
    files = [f"model-0000{i}-of-00004.safetensors" for i in range(1, 5)]
    assert_only(tmp_path / "out", *files, "freemerge.json", "model.safetensors.index.json")
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_size": 600}
    assert [index["weight_map"][name] for name in state] == [files[0]] * 2 + [files[1]] * 2 + [files[2], files[3]]
    with Checkpoint.open(tmp_path / "out") as checkpoint:
        assert all(torch.equal(checkpoint.read(name), tensor) for name, tensor in state.items())
    assert verify(tmp_path / "out") == []


def test_single_file_output(tmp_path: Path) -> None:
    write(tmp_path / "merged.safetensors", state_of(), shard=8)
    assert_only(tmp_path, "merged.safetensors")
    with pytest.raises(RefusedError, match=r"merged.safetensors exists"):
        write(tmp_path / "merged.safetensors", state_of(2))
    write(tmp_path / "merged.safetensors", state_of(2), force=True)
    assert_only(tmp_path, "merged.safetensors")
    assert load_file(tmp_path / "merged.safetensors")["d"].item() == 2


shapes = st.lists(st.integers(0, 5), max_size=4)
dtypes = st.sampled_from(sorted(TORCH_DTYPES))


@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    tensors=st.lists(st.tuples(shapes, dtypes), min_size=1, max_size=8),
    shard=st.integers(1, 400),
    seed=st.integers(0, 99),
)
def test_any_tensors_come_back_and_bytes_do_not_depend_on_the_order_of_writes(
    tmp_path: Path, tensors: list[tuple[list[int], str]], shard: int, seed: int
) -> None:
    state = {}
    for number, (shape, code) in enumerate(tensors):
        raw = torch.zeros(shape, dtype=TORCH_DTYPES[code])
        raw.reshape(-1).view(torch.uint8).fill_(number % 2)
        state[f"tensor.{number}\u00e9"] = raw
    for run in (1, 2):
        names = list(state)
        random.Random(seed + run).shuffle(names)
        with CheckpointWriter(tmp_path / f"out{run}", specs_of(state), max_shard_bytes=shard, force=True) as writer:
            for name in names:
                writer.write(name, state[name])
    assert contents(tmp_path / "out1") == contents(tmp_path / "out2")
    with Checkpoint.open(tmp_path / "out1") as checkpoint:
        for name, tensor in state.items():
            read = checkpoint.read(name)
            assert (read.dtype, read.shape) == (tensor.dtype, tensor.shape)
            assert read.data_ptr() % tensor.dtype.itemsize == 0
            assert torch.equal(read.reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8))


def test_many_threads_write_the_same_bytes(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    state = {f"t{i:02d}": torch.randn(50, i + 1, generator=generator) for i in range(40)}
    write(tmp_path / "one", state, shard=20_000)
    with (
        ThreadPoolExecutor(8) as pool,
        CheckpointWriter(tmp_path / "many", specs_of(state), max_shard_bytes=20_000) as writer,
    ):
        for future in [pool.submit(writer.write, name, tensor) for name, tensor in state.items()]:
            future.result()
    assert contents(tmp_path / "one") == contents(tmp_path / "many")


def test_what_exceeds_the_memory_is_let_go_of_when_it_is_written(tmp_path: Path) -> None:
    with CheckpointWriter(tmp_path / "out", [TensorSpec("a", (1 << 20,), torch.float32)], memory=1 << 20) as writer:
        values = np.ones(1 << 20, dtype=np.float32)
        alive = weakref.ref(values)
        writer.write("a", torch.from_numpy(values))
        del values
        writer.settle()
        assert writer._background._waiting == 0
        for _ in range(1000):  # the thread that wrote it may not have been woken since
            if alive() is None:
                break
            time.sleep(0.01)
        assert alive() is None


def test_non_contiguous_and_grad_tensors(tmp_path: Path) -> None:
    state = {
        "t": torch.arange(6.0).reshape(2, 3).T,
        "p": torch.nn.Parameter(torch.ones(2)),
        "x": torch.ones(1).expand(5),
    }
    write(tmp_path / "out", state)
    loaded = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(loaded[name], tensor) for name, tensor in state.items())


def test_other_files_are_published_and_hashed(tmp_path: Path) -> None:
    with CheckpointWriter(tmp_path / "out", specs_of(state_of())) as writer:
        assert writer.directory is not None
        (writer.directory / "sub").mkdir()
        (writer.directory / "sub" / "config.json").write_text("{}")
        writer.manifest = {"recipe": {"x": 1}}
        for name, tensor in state_of().items():
            writer.write(name, tensor)
    manifest = json.loads((tmp_path / "out" / "freemerge.json").read_text())
    assert manifest["recipe"] == {"x": 1}
    assert sorted(manifest["files"]) == ["model.safetensors", "sub/config.json"]
    assert manifest["files"]["sub/config.json"] == {
        "bytes": 2,
        "sha256": "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a",
    }


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("nope", torch.ones(3), "not among the specs"),
        ("a", torch.ones(5, 4), r"a must be torch.float32 \(4, 5\), got torch.float32 \(5, 4\)"),
        ("a", torch.ones(4, 5).half(), "got torch.float16"),
    ],
)
def test_wrong_tensors_are_refused(tmp_path: Path, name: str, tensor: torch.Tensor, message: str) -> None:
    with (
        pytest.raises(ArgumentError, match=message),
        CheckpointWriter(tmp_path / "out", specs_of(state_of())) as writer,
    ):
        writer.write(name, tensor)
    assert_only(tmp_path)


def test_a_tensor_is_written_once(tmp_path: Path) -> None:
    state = {"a": torch.ones(2), "b": torch.ones(2)}
    with CheckpointWriter(tmp_path / "out", specs_of(state)) as writer:
        writer.write("a", state["a"])
        with pytest.raises(ArgumentError, match="a was already written"):
            writer.write("a", state["a"])
        writer.write("b", state["b"])
        with pytest.raises(ArgumentError, match="b was already written"):
            writer.write("b", state["b"])


def test_no_tensor_is_forgotten(tmp_path: Path) -> None:
    specs = specs_of({name: torch.ones(1) for name in "abcd"})
    with (
        pytest.raises(ArgumentError, match="3 tensors were never written: b, c, d"),
        CheckpointWriter(tmp_path / "out", specs) as writer,
    ):
        writer.write("a", torch.ones(1))
    assert_only(tmp_path)
    with (
        pytest.raises(ArgumentError, match="4 tensors were never written: a, b, c, d"),
        CheckpointWriter(tmp_path / "out", specs) as writer,
    ):
        writer.finish()  # does not wait for them
    assert_only(tmp_path)


def test_impossible_specs_are_refused(tmp_path: Path) -> None:
    one = TensorSpec("a", (1,), torch.float32)
    for specs, options, message in (
        ([one, one], {}, "'a' appears twice"),
        ([TensorSpec("__metadata__", (1,), torch.float32)], {}, "reserved name"),
        ([TensorSpec("q", (1,), torch.complex128)], {}, "q: safetensors cannot store complex128"),
        ([one], {"max_shard_bytes": 0}, "max_shard_bytes"),
    ):
        with pytest.raises(ArgumentError, match=message):
            CheckpointWriter(tmp_path / "out", specs, **options)
    assert_only(tmp_path)


class TestTarget:
    @pytest.mark.parametrize("name", ["m.bin", "m.pt", "m.pth", "m.ckpt", "m.gguf", "m.onnx", "M.BIN", "m.SafeTensors"])
    def test_a_directory_does_not_get_the_name_of_a_weight_file(self, name: str, tmp_path: Path) -> None:
        with pytest.raises(ArgumentError, match=f"{name} has .* an output is a directory or a .safetensors file"):
            write(tmp_path / name, state_of())
        for file in (name, "m.safetensors"):  # nor do directories of experts and adapters
            with pytest.raises(ArgumentError, match=r"an output is a directory$"):
                target.target(tmp_path / file)
        assert_only(tmp_path)

    def test_existing_output_needs_force(self, tmp_path: Path) -> None:
        write(tmp_path / "out", state_of(1))
        before = contents(tmp_path / "out")
        with pytest.raises(RefusedError, match="not empty; use --force"):
            CheckpointWriter(tmp_path / "out", specs_of(state_of()))
        assert contents(tmp_path / "out") == before

    @pytest.mark.parametrize("exchange", [True, False], ids=["exchange", "two-steps"])
    def test_force_replaces_everything(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exchange: bool) -> None:
        if not exchange:
            monkeypatch.setattr(staging, "_exchange", lambda first, second: False)
        write(tmp_path / "out", state_of(1), shard=1)
        write(tmp_path / "out", state_of(2), force=True)
        assert_only(tmp_path, "out")
        assert_only(tmp_path / "out", "freemerge.json", "model.safetensors")  # no shard of the first is left
        assert Checkpoint.open(tmp_path / "out").read("d").item() == 2

    def test_force_does_not_delete_what_freemerge_did_not_write(self, tmp_path: Path) -> None:
        (tmp_path / "home").mkdir()
        (tmp_path / "home" / "thesis.txt").write_text("years of work")
        with pytest.raises(RefusedError, match=r"something else than this writes \(no freemerge\.json\)"):
            CheckpointWriter(tmp_path / "home", specs_of(state_of()), force=True)
        assert_only(tmp_path / "home", "thesis.txt")

    def test_force_does_not_delete_what_was_put_beside_a_merged_model(self, tmp_path: Path) -> None:
        out = tmp_path / "out"
        write(out, state_of(1))
        kept = {"notes.md": "of a week", "checkpoint-10/model.safetensors": "trained", ".git/HEAD": "x", "run/a/b": "y"}
        for name, text in kept.items():
            (out / name).parent.mkdir(parents=True, exist_ok=True)
            (out / name).write_text(text)
        found = r"\(\.git, checkpoint-10, notes\.md and 1 more, which freemerge\.json does not list\)"
        with pytest.raises(RefusedError, match=found):
            CheckpointWriter(out, specs_of(state_of()), force=True)
        assert {name: (out / name).read_text() for name in kept} == kept
        assert Checkpoint.open(out).read("d").item() == 1

    def test_what_appears_meanwhile_is_not_deleted(self, tmp_path: Path) -> None:
        out = tmp_path / "out"
        write(out, state_of(1))

        def replace() -> None:
            with CheckpointWriter(out, specs_of(state_of()), force=True) as writer:
                for name, tensor in state_of(2).items():
                    writer.write(name, tensor)
                (out / "notes").touch()

        with pytest.raises(RefusedError, match=r"\(notes, which freemerge\.json does not list\)"):
            replace()
        assert_only(tmp_path, "out")
        assert Checkpoint.open(out).read("d").item() == 1

    @pytest.mark.parametrize("force", [True, False])
    def test_file_and_directory_do_not_replace_each_other(self, tmp_path: Path, force: bool) -> None:
        (tmp_path / "file").touch()
        (tmp_path / "dir.safetensors").mkdir()
        with pytest.raises(RefusedError, match="not a directory"):
            CheckpointWriter(tmp_path / "file", specs_of(state_of()), force=force)
        with pytest.raises(RefusedError, match="not a file"):
            CheckpointWriter(tmp_path / "dir.safetensors", specs_of(state_of()), force=force)

    def test_empty_directory_and_missing_parents(self, tmp_path: Path) -> None:
        (tmp_path / "empty").mkdir()
        write(tmp_path / "empty", state_of())
        write(tmp_path / "x" / "y" / "out", state_of())
        assert verify(tmp_path / "empty") == verify(tmp_path / "x" / "y" / "out") == []

    def test_link_to_an_output_stays_a_link(self, tmp_path: Path) -> None:
        (tmp_path / "real").mkdir()
        (tmp_path / "link").symlink_to("real")
        write(tmp_path / "link", state_of())
        assert (tmp_path / "link").is_symlink()
        assert verify(tmp_path / "real") == []

    def test_output_that_appears_meanwhile_is_not_replaced(self, tmp_path: Path) -> None:
        writer = CheckpointWriter(tmp_path / "out", specs_of(state_of()))
        write(tmp_path / "out", state_of(7))

        def finish() -> None:
            with writer:
                for name, tensor in state_of().items():
                    writer.write(name, tensor)

        with pytest.raises(RefusedError, match="not empty"):
            finish()
        assert_only(tmp_path, "out")
        assert Checkpoint.open(tmp_path / "out").read("d").item() == 7

    def test_merging_into_an_input_keeps_what_was_read(self, tmp_path: Path) -> None:
        write(tmp_path / "out", {"a": torch.full((700, 512), 3.0)})
        with Checkpoint.open(tmp_path / "out") as checkpoint:
            mapped = checkpoint.read("a")
            write(tmp_path / "out", {"a": mapped + 1}, force=True)
            assert mapped.min().item() == mapped.max().item() == 3
        assert Checkpoint.open(tmp_path / "out").read("a").max().item() == 4


class TestMounts:
    """No rename takes the place of a mount point, and to delete a directory would delete what is mounted in it."""

    @pytest.fixture
    def mounted(self, monkeypatch: pytest.MonkeyPatch) -> set[Path]:
        points: set[Path] = set()
        monkeypatch.setattr(target, "_mount_points", lambda: points)
        return points

    @pytest.mark.parametrize("force", [True, False])
    def test_an_output_that_is_a_mount_point(self, tmp_path: Path, mounted: set[Path], force: bool) -> None:
        (tmp_path / "out").mkdir()
        mounted.add(tmp_path / "out")
        advice = r"out is a mount point, .*; name a directory inside of it, such as .*out/merged"
        with pytest.raises(RefusedError, match=advice):
            CheckpointWriter(tmp_path / "out", specs_of(state_of()), force=force)
        write(tmp_path / "out" / "merged", state_of())
        (tmp_path / "file.safetensors").touch()
        mounted.add(tmp_path / "file.safetensors")
        with pytest.raises(RefusedError, match=r"is a mount point, .*; name another file"):
            CheckpointWriter(tmp_path / "file.safetensors", specs_of(state_of()), force=force)

    def test_another_file_system(self, tmp_path: Path, mounted: set[Path], monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "out").mkdir()
        stat = Path.stat

        def elsewhere(path: Path, **options: bool) -> os.stat_result:
            status = stat(path, **options)
            if path != tmp_path / "out":
                return status
            return os.stat_result((*status[:2], status.st_dev + 1, *status[3:10]))

        monkeypatch.setattr(Path, "stat", elsewhere)
        with pytest.raises(RefusedError, match="out is a mount point"):
            CheckpointWriter(tmp_path / "out", specs_of(state_of()))

    def test_an_old_output_that_holds_a_mounted_directory(self, tmp_path: Path, mounted: set[Path]) -> None:
        write(tmp_path / "out", state_of(1))
        before = contents(tmp_path / "out")
        (tmp_path / "out" / "a" / "data").mkdir(parents=True)
        mounted |= {tmp_path / "out" / "a" / "data", tmp_path / "outer", tmp_path}
        with pytest.raises(RefusedError, match=r"out/a/data is mounted inside of .*out, so even force does not delete"):
            CheckpointWriter(tmp_path / "out", specs_of(state_of()), force=True)
        assert contents(tmp_path / "out") == before

    @pytest.mark.skipif(sys.platform != "linux", reason="asks Linux for its mounts")
    def test_mount_points(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        points = target._mount_points()
        assert points is not None
        assert Path("/proc") in points
        assert all(point.is_absolute() for point in points)
        line = b"36 35 98:0 /mnt1 /mnt/a\\040b\\134 rw,noatime master:1 - ext3 /dev/root rw\n"
        monkeypatch.setattr(Path, "read_bytes", lambda path: line)
        assert target._mount_points() == {Path("/mnt/a b\\")}

    def test_where_the_system_lists_none(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "out" / "a" / "data").mkdir(parents=True)
        monkeypatch.setattr(target, "_mount_points", lambda: None)
        assert target._mounted(tmp_path / "out") == []
        monkeypatch.setattr(os.path, "ismount", lambda path: Path(path).name == "data")
        assert target._mounted(tmp_path / "out") == [tmp_path / "out" / "a" / "data"]


class TestFailures:
    @pytest.fixture
    def old(self, tmp_path: Path) -> dict[str, bytes]:
        write(tmp_path / "out", state_of(1))
        return contents(tmp_path / "out")

    @pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError, SystemExit])
    def test_exceptions_leave_the_old_output(
        self, tmp_path: Path, old: dict[str, bytes], error: type[BaseException]
    ) -> None:
        def fail() -> None:
            with CheckpointWriter(tmp_path / "out", specs_of(state_of()), force=True) as writer:
                writer.write("a", state_of(2)["a"])
                raise error

        with pytest.raises(error):
            fail()
        assert_only(tmp_path, "out")
        assert contents(tmp_path / "out") == old

    def test_made_parents_are_removed_again(self, tmp_path: Path) -> None:
        with pytest.raises(KeyboardInterrupt), CheckpointWriter(tmp_path / "x" / "y" / "out", specs_of(state_of())):
            raise KeyboardInterrupt
        assert_only(tmp_path)

    def test_too_little_disk_is_found_before_anything_is_written(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        usage = type("Usage", (), {"free": 100})
        monkeypatch.setattr("freemerge.checkpoint.writer.shutil.disk_usage", lambda path: usage)
        with pytest.raises(CheckpointError, match=r"out needs 0.00 GB, .* has 0.00 GB free"):
            CheckpointWriter(tmp_path / "x" / "out", specs_of(state_of()))
        assert_only(tmp_path)

    @pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
    def test_a_disk_that_fills_up(
        self, tmp_path: Path, old: dict[str, bytes], monkeypatch: pytest.MonkeyPatch, code: int
    ) -> None:
        real = os.write

        def full(fd: int, data: bytes) -> int:
            if len(data) > 10:
                raise OSError(code, os.strerror(code))
            return real(fd, data)

        monkeypatch.setattr(os, "write", full)
        with pytest.raises(CheckpointError, match=r"cannot write .*out: .*nothing was changed") as caught:
            write(tmp_path / "out", state_of(2), force=True)
        assert ("disk is full" in str(caught.value)) == (code != errno.EIO)
        assert_only(tmp_path, "out")
        assert contents(tmp_path / "out") == old

    def test_a_journal_for_which_there_is_no_room(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        real, noted = os.write, 0

        def full(fd: int, data: bytes) -> int:
            nonlocal noted
            noted += b'"sha256"' in bytes(data) or noted > 0
            if noted:
                raise OSError(errno.ENOSPC, "No space left on device")
            return real(fd, data)

        def merge() -> None:
            with CheckpointWriter(tmp_path / "out", specs_of(state_of()), identity={}) as writer:
                for name, tensor in state_of().items():
                    writer.write(name, tensor)

        monkeypatch.setattr(os, "write", full)
        before = set(os.listdir("/proc/self/fd")) if sys.platform == "linux" else set()
        with pytest.raises(CheckpointError, match=r"cannot write .*out: .*the disk is full; nothing was changed"):
            merge()
        assert noted
        assert_only(tmp_path)
        assert sys.platform != "linux" or set(os.listdir("/proc/self/fd")) == before
        monkeypatch.setattr(os, "write", lambda fd, data: (_ for _ in ()).throw(OSError(errno.EROFS, "Read-only")))
        with (
            pytest.raises(CheckpointError, match=r"cannot write .*out: Read-only"),
            CheckpointWriter(tmp_path / "out", specs_of(state_of()), identity={}) as writer,
        ):
            writer.measure({"scale": 1.0})
        assert_only(tmp_path)

    def test_the_hidden_directory_goes_whatever_else_fails(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def failing(self: Background) -> None:
            raise RuntimeError("late")

        close = Background.close
        monkeypatch.setattr(Background, "close", lambda self: close(self) or failing(self))
        with pytest.raises(RuntimeError, match="late"), CheckpointWriter(tmp_path / "out", specs_of(state_of())):
            raise ValueError
        assert_only(tmp_path)

    def test_a_file_that_is_cut_short_while_it_is_written(self, tmp_path: Path) -> None:
        state = {name: torch.ones(1 << 20) for name in "ab"}

        def merge() -> None:
            with CheckpointWriter(tmp_path / "out", specs_of(state)) as writer:
                writer.write("b", state["b"])  # is read back when its turn to be hashed has come
                (file,) = writer._files.values()
                file.hand_over()
                for stage in ("write", "hash"):
                    writer._background._threads[stage].submit(lambda: None).result()
                os.truncate(file.path, 100)
                writer.write("a", state["a"])

        with pytest.raises(CheckpointError, match="the file is shorter than what was written to it"):
            merge()
        assert_only(tmp_path)

    def test_every_directory_is_flushed_and_those_that_were_made(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        flushed = list[Path]()
        for module, name in ((staging, "flush_directory"), (target, "flush_directory"), (target, "flush_file")):
            monkeypatch.setattr(module, name, flushed.append)
        with CheckpointWriter(tmp_path / "x" / "y" / "out", specs_of(state_of())) as writer:
            assert writer.directory is not None
            left = writer.directory
            (left / "sub" / "deep").mkdir(parents=True)
            for name, tensor in state_of().items():
                writer.write(name, tensor)
        assert {left, left / "sub", left / "sub" / "deep", tmp_path / "x" / "y", tmp_path / "x", tmp_path} == set(
            flushed
        )
        flushed.clear()
        target.write_file(tmp_path / "file", "text")
        assert flushed[0].parent == tmp_path
        assert flushed[0].name.endswith(".part")
        assert flushed[1:] == [tmp_path]

    def test_a_flush_that_fails(self, tmp_path: Path, old: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> None:
        def fail(fd: int) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(os, "fsync", fail)
        with pytest.raises(CheckpointError, match="the disk is full"):
            write(tmp_path / "out", state_of(2), force=True)
        assert_only(tmp_path, "out")
        assert contents(tmp_path / "out") == old

    def test_a_file_size_limit(self, tmp_path: Path, old: dict[str, bytes]) -> None:
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
        try:
            with pytest.raises(CheckpointError, match="File too large"):
                write(tmp_path / "out", {"big": torch.ones(5000)}, force=True)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert_only(tmp_path, "out")
        assert contents(tmp_path / "out") == old

    def test_short_writes_are_continued(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        real = os.write
        monkeypatch.setattr(os, "write", lambda fd, data: real(fd, data[:7]))
        write(tmp_path / "out", state_of(3))
        assert load_file(tmp_path / "out" / "model.safetensors")["a"].eq(3).all()

    def test_what_a_killed_run_left_counts_as_room(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        left = staging.hidden(tmp_path / "out")
        left.mkdir()
        (left / "model.safetensors").write_bytes(bytes(1 << 16))
        usage = type("Usage", (), {"free": 100})
        monkeypatch.setattr("freemerge.checkpoint.writer.shutil.disk_usage", lambda path: usage)
        write(tmp_path / "out", state_of())
        assert verify(tmp_path / "out") == []
        assert_only(tmp_path, "out")

    def test_what_a_killed_run_left_and_cannot_be_removed_is_named(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        left = staging.hidden(tmp_path / "out")
        left.mkdir()

        def refused(path: Path, ignore_errors: bool = False) -> None:
            if not ignore_errors:
                raise PermissionError(errno.EACCES, "Permission denied", str(path))

        monkeypatch.setattr(staging.shutil, "rmtree", refused)
        with pytest.raises(RefusedError, match=r"-tmp, which a killed run left, cannot be removed \(Perm"):
            write(tmp_path / "out", state_of())
        (found,) = leftovers.clean(tmp_path)
        assert (found.path, found.alive, found.removed) == (left, False, False)
        monkeypatch.undo()
        (found,) = leftovers.clean(tmp_path)
        assert found.removed
        assert_only(tmp_path)

    def test_a_disk_that_is_full_for_other_files(self, tmp_path: Path, old: dict[str, bytes]) -> None:
        def fail(code: int) -> None:
            with CheckpointWriter(tmp_path / "out", specs_of(state_of()), force=True):
                raise OSError(code, os.strerror(code), "config.json")

        with pytest.raises(CheckpointError, match=r"cannot write .*out: .*the disk is full; nothing was changed"):
            fail(errno.ENOSPC)
        with pytest.raises(CheckpointError, match=r"cannot write .*out: Read-only file system"):
            fail(errno.EROFS)
        with pytest.raises(FileNotFoundError):
            fail(errno.ENOENT)

        def fail_inside() -> None:
            with CheckpointWriter(tmp_path / "out", specs_of(state_of()), force=True) as writer:
                assert writer.directory is not None
                (writer.directory / "no" / "config.json").write_text("{}")

        with pytest.raises(CheckpointError, match=r"cannot write .*out: No such file"):
            fail_inside()
        assert contents(tmp_path / "out") == old

    def test_an_output_whose_place_is_not_flushed_is_there(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        flush = target.flush_directory

        def failing(path: Path) -> None:
            if path == tmp_path:
                raise OSError(errno.EIO, "Input/output error")
            flush(path)

        monkeypatch.setattr(target, "flush_directory", failing)
        with pytest.raises(CheckpointError, match="out is written, but the directory that it is in cannot be flushed"):
            write(tmp_path / "out", state_of())
        assert verify(tmp_path / "out") == []
        assert_only(tmp_path, "out")

    def test_a_read_only_target(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("freemerge.checkpoint.writer.os.access", lambda path, mode: False)
        with pytest.raises(CheckpointError, match="is not writable"):
            CheckpointWriter(tmp_path / "out", specs_of(state_of()))

    def test_a_file_system_that_turned_read_only(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        writer = CheckpointWriter(tmp_path / "x" / "out", specs_of(state_of()))
        real = os.mkdir

        def read_only(path: str, mode: int = 0o777) -> None:
            if "freemerge-tmp" in str(path):
                raise OSError(errno.EROFS, "Read-only file system")
            real(path, mode)

        monkeypatch.setattr(os, "mkdir", read_only)
        with pytest.raises(CheckpointError, match=r"cannot write .*Read-only file system"):
            writer.__enter__()
        assert_only(tmp_path)

    def test_a_file_where_a_directory_should_be(self, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        with pytest.raises(CheckpointError, match=r"cannot write|not writable"):
            write(tmp_path / "file" / "out", state_of())


KILLED_AT_EVERY_STEP = """
    import os, signal, sys
    from pathlib import Path
    import torch
    from freemerge.checkpoint import CheckpointWriter, Checkpoint, TensorSpec, verify

    parent = Path(sys.argv[1])
    specs = [TensorSpec(name, (64,), torch.float32) for name in "abcd"]

    def write(value):
        with CheckpointWriter(parent / "out", specs, max_shard_bytes=512, force=True) as writer:
            (writer.directory / "config.json").write_text(str(value))
            for spec in specs:
                writer.write(spec.name, torch.full(spec.shape, float(value)))

    def die_at(step):
        count = 0

        def hook(event, arguments):
            nonlocal count
            if event.split(".")[0] in ("open", "os", "shutil", "ctypes", "fcntl") and "import" not in event:
                count += 1
                if count == step:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(hook)

    write(0)
    old, values, step = 0, [], 0
    while True:
        step += 1
        child = os.fork()
        if child == 0:
            die_at(step)
            write(step)
            os._exit(0)
        status = os.waitpid(child, 0)[1]
        assert verify(parent / "out") == [], step
        with Checkpoint.open(parent / "out") as checkpoint:
            found = {float(value) for name in checkpoint.specs for value in checkpoint.read(name)}
        found.add(float((parent / "out" / "config.json").read_text()))
        assert found in ({float(old)}, {float(step)}), (step, old, found)
        values.append(found == {float(step)})
        old = int(found.pop())
        if os.WIFEXITED(status):
            break
    left = [path.name for path in parent.iterdir() if path.name != "out"]
    assert not left, left  # the last run was not killed and removed what the earlier ones left
    print(step, values.count(True))
"""


def test_killed_at_any_step_the_output_is_the_old_or_the_new_one(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(KILLED_AT_EVERY_STEP))
    (tmp_path / "work").mkdir()
    run = subprocess.run([sys.executable, script, tmp_path / "work"], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    steps, published = map(int, run.stdout.split())
    assert steps > 30
    assert 2 <= published < steps / 2  # killed after publication but during clean-up, and the run that went through


def test_a_second_writer_of_the_same_output_is_refused_while_the_first_lives(tmp_path: Path) -> None:
    with CheckpointWriter(tmp_path / "out", specs_of(state_of(1))) as first:
        write(tmp_path / "other", state_of())
        with (
            pytest.raises(RefusedError, match="out cannot be written now: another run is writing it"),
            CheckpointWriter(tmp_path / "out", specs_of(state_of(2))),
        ):
            pass
        for name, tensor in state_of(1).items():
            first.write(name, tensor)
    assert_only(tmp_path, "other", "out")
    assert Checkpoint.open(tmp_path / "out").read("d").item() == 1


def test_tensors_end_to_end(tmp_path: Path) -> None:
    state = {
        name: torch.randn(shape).bfloat16() for name, shape in {"a": (2, 3), "b": (), "c": (0,), "d": (5,)}.items()
    }
    flat = torch.cat([tensor.reshape(-1) for tensor in state.values()])
    with CheckpointWriter(tmp_path / "out", specs_of(state), max_shard_bytes=12) as writer:
        for wrong, message in ((flat[:-1], "do not have 11 entries"), (flat.float(), "a vector of their dtype")):
            with pytest.raises(ArgumentError, match=f"a to d .*{message}"):
                writer.write_flat(list(state), wrong)
        writer.write_flat(list(state), flat)
        with pytest.raises(ArgumentError, match="a was already written"):
            writer.write_flat(list(state), flat)
    with Checkpoint.open(tmp_path / "out") as written:
        assert len(written.files) == 2
        assert all(torch.equal(written.read(name), tensor) for name, tensor in state.items())


def test_a_note_is_in_the_journal_however_fast_its_tensor_is_hashed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, told = Background.run, []

    def at_once(self: Background, stage: str, work: Callable[[], None]) -> None:
        run(self, stage, work)
        if stage == "write":
            for later in ("write", "hash"):
                self._threads[later].submit(lambda: None).result()

    monkeypatch.setattr(Background, "run", at_once)
    monkeypatch.setattr(Journal, "add", lambda self, entry: told.append(entry))
    large = torch.zeros(2 << 20)
    with CheckpointWriter(tmp_path / "out", specs_of({"large": large}), identity={}) as writer:
        writer.write("large", large, {"factor": 1.5})
    assert [entry["notes"] for entry in told if "notes" in entry] == [{"large": {"factor": 1.5}}]


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
        lambda inner: st.lists(inner) | st.lists(inner).map(tuple) | st.dictionaries(st.text(), inner),
    )
)
def test_json_is_indented_as_the_json_module_does(value: object) -> None:
    assert _indented(value) == json.dumps(value, indent=2, ensure_ascii=False)
