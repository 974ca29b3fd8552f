"""Pieces of files, written past the system's cache or through it: the same bytes, whatever the file system refuses."""

import errno
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from freemerge.checkpoint import disk
from freemerge.checkpoint.disk import Disk

pytestmark = pytest.mark.skipif(not hasattr(os, "O_DIRECT"), reason="no direct writes on this system")
BLOCK = 4096


def unchecked() -> None:
    """No abort."""


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Direct writes of four blocks a call, of any file and of pieces of two blocks or more."""
    monkeypatch.setattr(disk, "_LEAST_FILE", 0)
    monkeypatch.setattr(disk, "_LEAST_PIECE", 2 * BLOCK)
    monkeypatch.setattr(disk, "_CALL_BYTES", 4 * BLOCK)


@pytest.fixture
def direct(tmp_path: Path) -> None:
    """Only where the file system of the tests takes direct writes."""
    path = tmp_path / "probe"
    path.touch()
    if os.major(path.stat().st_dev) == 0:
        pytest.skip("this file system is on no block device")
    try:
        os.close(os.open(path, os.O_WRONLY | os.O_DIRECT))
    except OSError:
        pytest.skip("this file system takes no direct writes")


def content_of(nbytes: int) -> bytes:
    return np.random.default_rng(nbytes).bytes(nbytes)


def written(path: Path, content: bytes, cuts: list[int], order: list[int], check: Callable[[], None]) -> bytes:
    """What a file holds after its pieces were written in an order."""
    path.write_bytes(bytes(len(content)))
    ends = [*sorted(cuts), len(content)]
    pieces = list(zip([0, *ends], ends, strict=False))
    target = Disk(check)
    for i in order:
        begin, end = pieces[i]
        target.write(path, begin, memoryview(content)[begin:end])
    return path.read_bytes()


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    nbytes=st.integers(1, 40 * BLOCK),
    places=st.lists(st.floats(0, 1), max_size=6),
    shuffle=st.randoms(use_true_random=False),
)
def test_any_pieces_in_any_order_make_the_file(
    tmp_path: Path, small: None, nbytes: int, places: list[float], shuffle: object
) -> None:
    content = content_of(nbytes)
    order = list(range(len(places) + 1))
    shuffle.shuffle(order)  # type: ignore[attr-defined]
    cuts = [int(place * nbytes) for place in places]
    assert written(tmp_path / "file", content, cuts, order, unchecked) == content


def test_whole_blocks_are_written_directly_and_the_rest_through_the_cache(
    tmp_path: Path, small: None, direct: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    places: list[tuple[int, int]] = []
    cached: list[int] = []
    pwrite, write = os.pwrite, os.write

    def noted(fd: int, data: memoryview, place: int) -> int:
        import fcntl

        assert fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT
        places.append((place, len(data)))
        return pwrite(fd, data, place)

    def noted_write(fd: int, data: memoryview) -> int:
        cached.append(len(data))
        return write(fd, data)

    monkeypatch.setattr(os, "pwrite", noted)
    monkeypatch.setattr(os, "write", noted_write)
    content = content_of(11 * BLOCK + 5)
    assert written(tmp_path / "file", content, [100], [1, 0], unchecked) == content
    assert places == [(BLOCK, 4 * BLOCK), (5 * BLOCK, 4 * BLOCK), (9 * BLOCK, 2 * BLOCK)]
    assert cached == [BLOCK - 100, 5, 100]  # the head and the tail of the second piece, the first piece


def test_small_files_stay_in_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "pwrite")  # would be an AttributeError
    content = content_of(4 << 20)
    assert written(tmp_path / "file", content, [], [0], unchecked) == content


@pytest.mark.parametrize("calls", [0, 1, 2])
def test_a_file_system_that_refuses_gets_everything_through_the_cache(
    tmp_path: Path, small: None, direct: None, monkeypatch: pytest.MonkeyPatch, calls: int
) -> None:
    """At the first call, or where its blocks turn out to be larger."""
    pwrite, places = os.pwrite, list[int]()

    def refusing(fd: int, data: memoryview, place: int) -> int:
        places.append(place)
        if len(places) > calls:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return pwrite(fd, data, place)

    monkeypatch.setattr(os, "pwrite", refusing)
    content = content_of(30 * BLOCK + 1)
    assert written(tmp_path / "file", content, [15 * BLOCK], [0, 1], unchecked) == content
    assert len(places) == calls + 1  # and is not asked again


def test_files_of_networks_are_left_to_the_system(tmp_path: Path, small: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "major", lambda device: 0)
    monkeypatch.delattr(os, "pwrite")
    content = content_of(9 * BLOCK)
    assert written(tmp_path / "file", content, [], [0], unchecked) == content


def test_a_file_system_that_opens_no_file_directly(
    tmp_path: Path, small: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, asked = os.open, list[int]()
    monkeypatch.setattr(os, "major", lambda device: 8)

    def refusing(path: Path, flags: int, mode: int = 0o777) -> int:
        if flags & os.O_DIRECT:
            asked.append(flags)
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return real(path, flags, mode)

    monkeypatch.setattr(os, "open", refusing)
    content = content_of(30 * BLOCK)
    assert written(tmp_path / "file", content, [15 * BLOCK], [0, 1], unchecked) == content
    assert len(asked) == 1


@pytest.mark.parametrize("short", [BLOCK, BLOCK + 512, 100, 0])
def test_short_direct_writes_are_continued(
    tmp_path: Path, small: None, direct: None, monkeypatch: pytest.MonkeyPatch, short: int
) -> None:
    pwrite = os.pwrite

    def stopping(fd: int, data: memoryview, place: int) -> int:
        pwrite(fd, data[: short // BLOCK * BLOCK], place)
        return short

    monkeypatch.setattr(os, "pwrite", stopping)
    content = content_of(9 * BLOCK)
    assert written(tmp_path / "file", content, [], [0], unchecked) == content


def test_a_full_disk_is_an_error(tmp_path: Path, small: None, direct: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(fd: int, data: memoryview, place: int) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(OSError, match="No space left"):
        written(tmp_path / "file", content_of(9 * BLOCK), [], [0], unchecked)


def test_an_abort_is_noticed_between_calls(tmp_path: Path, small: None, direct: None) -> None:
    calls = list[int]()

    def stop() -> None:
        calls.append(1)
        if len(calls) == 3:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        written(tmp_path / "file", content_of(40 * BLOCK), [], [0], stop)
    assert np.count_nonzero(np.frombuffer((tmp_path / "file").read_bytes(), np.uint8)[8 * BLOCK :]) == 0
