"""Files are hashed beside other work, two at a time where the processor can; hashlib says what is right."""

from __future__ import annotations

import hashlib
import os
import random
import threading
from pathlib import Path

import pytest

from freemerge import _core
from freemerge.checkpoint.hashing import Hasher
from freemerge.errors import CheckpointError

CHUNK = 1 << 19
SIZES = (0, 1, 55, 56, 63, 64, 65, CHUNK - 9, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK, 3 * CHUNK + 777, 5 * CHUNK)


@pytest.mark.parametrize("pairs", [True, False])
def test_digests_are_those_of_hashlib(pairs: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not pairs:
        monkeypatch.setattr(_core, "has_sha256", lambda: False)
    bytes_of = random.Random(0).randbytes
    files = {tmp_path / f"{i}": bytes_of(size) for i, size in enumerate((*SIZES, CHUNK, 777))}
    for path, content in files.items():
        path.write_bytes(content)
    expected = {path: hashlib.sha256(content).hexdigest() for path, content in files.items()}
    with Hasher() as hasher:
        assert {path: digest() for path, digest in hasher.submit_all(files).items()} == expected
        for path in files:  # and each with one much longer
            both = hasher.submit_all([path, tmp_path / "13"])
            assert {other: digest() for other, digest in both.items()} == {p: expected[p] for p in both}
            three = hasher.submit_all([path, *(tmp_path / name for name in ("11", "13"))])  # which take turns
            assert {other: digest() for other, digest in three.items()} == {p: expected[p] for p in three}
            assert hasher.submit(path).result() == expected[path]
        assert hasher.seconds > 0
        assert hasher.submit_all([]) == {}
        with pytest.raises(CheckpointError, match=r"cannot hash .*absent"):
            hasher.submit_all([tmp_path / "absent"])[tmp_path / "absent"]()


@pytest.mark.skipif(not _core.has_sha256(), reason="this processor has no instructions for SHA-256")
def test_native_code_refuses_what_it_cannot_do() -> None:
    with pytest.raises(ValueError, match="two streams at most"):
        _core.sha256([1, 1, 1], [1, 1, 1], 0)
    with pytest.raises(ValueError, match="one address per state"):
        _core.sha256([1, 1], [1], 1)
    with pytest.raises(ValueError, match="its address is null"):
        _core.sha256([0], [1], 1)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "open").write_bytes(b"1")
    (tmp_path / "shut").write_bytes(b"2")
    (tmp_path / "shut").chmod(0)
    with Hasher() as hasher, pytest.raises(CheckpointError, match="shut"):
        [digest() for digest in hasher.submit_all([tmp_path / "open", tmp_path / "shut"]).values()]


def test_a_file_that_is_gone_is_named(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).write_bytes(bytes(CHUNK))
    removed = threading.Event()
    with Hasher() as hasher:
        for _ in range(4):  # as many as it has threads at most
            hasher._pool.submit(removed.wait, 60)
        digests = hasher.submit_all([tmp_path / "a", tmp_path / "b"])
        (tmp_path / "b").unlink()
        removed.set()
        with pytest.raises(CheckpointError, match=r"cannot hash .*b: No such file"):
            [digest() for digest in digests.values()]


def test_leaving_the_block_ends_the_work(tmp_path: Path) -> None:
    for name in ("a", "b"):
        with open(tmp_path / name, "wb") as file:
            file.truncate(1 << 40)  # sparse files that would take minutes
    with Hasher() as hasher:
        digests = hasher.submit_all([tmp_path / "a", tmp_path / "b"])
    for digest in digests.values():
        with pytest.raises(CheckpointError, match="cancelled"):
            digest()
