"""What was hashed once is not hashed again while it does not change, and is when it might have."""

from __future__ import annotations

import hashlib
import os
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import freemerge as fm
from freemerge.checkpoint import Checkpoint, InputHashes, known_hashes
from freemerge.checkpoint.manifest import unknown_bytes
from freemerge.merging.estimate import Pace

MINUTE = 60 * 10**9


@pytest.fixture(autouse=True)
def later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the test's own, some minutes after its files are written; the folder of the digests."""
    monkeypatch.setenv("FREEMERGE_CACHE", str(tmp_path / "cache"))
    now = time.time_ns
    monkeypatch.setattr(time, "time_ns", lambda: now() + 5 * MINUTE)
    return tmp_path / "cache" / "freemerge" / "sha256"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    save_file({"a": torch.arange(1000.0)}, tmp_path / "model.safetensors")
    time.sleep(0.02)  # the next change gets another time, however coarse the system's are
    return tmp_path / "model.safetensors"


def hashed(file: Path) -> tuple[object, int]:
    """The digest in a file's record, and how many bytes were hashed for it."""
    with InputHashes([Checkpoint.open(file)]) as hashes:
        ((record,),) = [entry["files"] for entry in hashes.records()]
        return record["sha256"], hashes.nbytes


def sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def test_a_file_is_hashed_once(file: Path, later: Path) -> None:
    size = file.stat().st_size
    assert hashed(file) == (sha256(file), size)
    assert hashed(file) == (sha256(file), 0)
    assert later.stat().st_mode & 0o777 == 0o700
    assert [entry.read_text() for entry in later.iterdir()] == [sha256(file)]


@pytest.mark.parametrize("change", ["rewritten", "same times", "replaced", "mode"])
def test_a_file_that_changed_is_hashed_again(file: Path, change: str) -> None:
    hashed(file)
    before, content = file.stat(), bytearray(file.read_bytes())
    content[-1] ^= 1
    if change == "replaced":
        (file.parent / "new").write_bytes(content)
        os.replace(file.parent / "new", file)
    elif change == "mode":  # its time of change cannot say what changed
        file.chmod(0o640)
    else:
        file.write_bytes(content)
    if change == "same times":
        os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
        assert file.stat().st_mtime_ns == before.st_mtime_ns
    assert hashed(file) == (sha256(file), file.stat().st_size)


def test_a_file_that_changed_a_moment_ago_is_neither_kept_nor_recalled(
    file: Path, later: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known_by = known_hashes.key(file)
    monkeypatch.undo()
    monkeypatch.setenv("FREEMERGE_CACHE", str(later.parents[1]))
    assert known_by is not None
    assert known_hashes.key(file) is None
    for _ in range(2):
        assert hashed(file) == (sha256(file), file.stat().st_size)
    assert not later.exists()


@pytest.mark.parametrize("time_of", ["content", "status"])
def test_a_minute_has_to_pass_since_either_time(file: Path, time_of: str, monkeypatch: pytest.MonkeyPatch) -> None:
    changed = file.stat().st_ctime_ns
    if time_of == "status":  # unpacked a moment ago, with the time it had
        os.utime(file, ns=(10**18, 10**18))
        changed = file.stat().st_ctime_ns
    for seconds, known in ((59, False), (61, True)):
        monkeypatch.setattr(time, "time_ns", lambda after=seconds: changed + after * 10**9)
        assert (known_hashes.key(file) is not None) == known


def test_where_no_time_of_change_is_kept_nothing_is(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stat = os.stat

    class WholeSeconds:
        def __init__(self, path: Path) -> None:
            self._status = stat(path)
            self.st_ctime_ns = self._status.st_ctime_ns // 10**9 * 10**9

        def __getattr__(self, name: str) -> int:
            return int(getattr(self._status, name))

    with monkeypatch.context() as patch:
        patch.setattr(os, "stat", WholeSeconds)
        assert known_hashes.key(file) is None
    assert known_hashes.key(file) is not None
    monkeypatch.setattr(os, "name", "nt")
    assert known_hashes.key(file) is None


def test_a_known_file_that_is_rewritten_during_the_merge_is_hashed(file: Path) -> None:
    hashed(file)
    before, content = file.stat(), bytearray(file.read_bytes())
    content[-1] ^= 1
    with InputHashes([Checkpoint.open(file)]) as hashes:
        assert hashes.nbytes == 0
        file.write_bytes(content)
        os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
        ((record,),) = [entry["files"] for entry in hashes.records()]
    assert record["sha256"] == sha256(file)


def test_a_file_that_changes_while_it_is_hashed_is_not_kept(file: Path, later: Path) -> None:
    with InputHashes([Checkpoint.open(file)]) as hashes:
        assert hashes.nbytes
        os.link(file, file.parent / "second name")  # its time of change moves, its content does not
        hashes.records()
    assert not later.exists()


@pytest.mark.parametrize("entry", [b"", b"0" * 63, b"0" * 65, b"X" * 64, b"\xff" * 64, None])
def test_a_broken_entry_is_as_none(file: Path, later: Path, entry: bytes | None) -> None:
    hashed(file)
    (known,) = later.iterdir()
    known.unlink()
    if entry is None:
        known.mkdir()
    else:
        known.write_bytes(entry)
    assert hashed(file) == (sha256(file), file.stat().st_size)


def test_what_cannot_be_written_or_forgotten_does_not_keep_the_rest_from_it(
    later: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = [f"{i}" * 64 for i in range(3)]
    (later / keys[1]).mkdir(parents=True)
    os.symlink(tmp_path / "nowhere", later / "link")
    known_hashes.remember({known_by: known_by for known_by in keys})
    assert [known_hashes.recall(known_by) for known_by in keys] == [keys[0], None, keys[2]]
    assert {entry.name for entry in later.iterdir()} == {*keys, "link"}
    monkeypatch.setattr(known_hashes, "_MOST", 1)
    os.utime(later / keys[1], ns=(0, 0))  # a folder, and the oldest
    known_hashes.remember({keys[2]: keys[2]})
    assert {entry.name for entry in later.iterdir()} == {keys[1], keys[2], "link"}


def test_a_cache_that_cannot_be_written_is_as_none(file: Path, later: Path) -> None:
    later.parents[1].write_text("a file where the folder should be")
    for _ in range(2):
        assert hashed(file) == (sha256(file), file.stat().st_size)


def test_nothing_is_kept_where_the_user_wants_none(file: Path, later: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(file.parent / "home"))
    monkeypatch.setenv("FREEMERGE_CACHE", "")
    for _ in range(2):
        assert hashed(file) == (sha256(file), file.stat().st_size)
    assert not later.exists()
    assert not (file.parent / "home").exists()


def test_it_is_where_the_users_caches_are(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FREEMERGE_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", lambda: file.parent / "home")
    hashed(file)
    assert len(list((file.parent / "home" / ".cache" / "freemerge" / "sha256").iterdir())) == 1
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # which the standard says to ignore
    assert hashed(file)[1] == 0
    monkeypatch.setenv("XDG_CACHE_HOME", str(file.parent / "caches"))
    hashed(file)
    assert len(list((file.parent / "caches" / "freemerge" / "sha256").iterdir())) == 1
    monkeypatch.setenv("HOME", str(file.parent / "home"))
    monkeypatch.setenv("FREEMERGE_CACHE", "~/own")
    hashed(file)
    assert len(list((file.parent / "home" / "own" / "freemerge" / "sha256").iterdir())) == 1


def test_the_oldest_are_forgotten(file: Path, later: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(known_hashes, "_MOST", 3)
    later.mkdir(parents=True)
    for i in range(3):
        (later / (f"{i}" * 64)).write_text(f"{i}" * 64)
        os.utime(later / (f"{i}" * 64), ns=(i, i))
    (later / "somebody's").touch()
    os.utime(later / "somebody's", ns=(0, 0))
    hashed(file)
    names = {entry.name for entry in later.iterdir()}
    assert names == {"1" * 64, "2" * 64, known_hashes.key(file), "somebody's"}


def test_a_dry_run_counts_what_is_yet_to_be_hashed(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("freemerge.merging.run.pace", lambda *arguments: Pace(0.0, 0.0, float(os.cpu_count() or 1)))
    model = file.parent / "other.safetensors"
    save_file({"a": torch.arange(1000.0) ** 2}, model)
    size = file.stat().st_size + model.stat().st_size

    def seconds() -> float:
        found = fm.inspect(file, [model], method="average", out=file.parent / "out").seconds
        assert found is not None
        return found

    before = seconds()
    hashed(file)
    hashed(model)
    assert before - seconds() == pytest.approx(size)
    assert seconds() >= 4000


def test_a_second_merge_gives_the_same_bytes_and_hashes_its_output_alone(tmp_path: Path) -> None:
    for i in range(3):
        weight = torch.randn(64, 48, generator=torch.Generator().manual_seed(i))
        save_file({"a.weight": weight}, tmp_path / f"{i}.safetensors")
    base, *models = (tmp_path / f"{i}.safetensors" for i in range(3))
    inputs = sum(path.stat().st_size for path in (base, *models))
    opened = [Checkpoint.open(path) for path in (base, *models)]
    assert unknown_bytes(opened) == inputs
    outputs, hashes = [], []
    for name in ("first", "second"):
        report = fm.merge_checkpoints(base, models, tmp_path / name, progress=False)
        (stage,) = (stage for stage in report.stages if stage.name == "hash")
        hashes.append(stage.nbytes)
        outputs.append({path.name: path.read_bytes() for path in (tmp_path / name).iterdir()})
    assert outputs[0] == outputs[1]
    assert hashes[0] - hashes[1] == inputs
    assert unknown_bytes(opened) == 0  # which is what --dry-run counts on
