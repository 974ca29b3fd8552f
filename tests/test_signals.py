"""A signal that asks the command to stop does so, wherever the program is when it arrives."""

from __future__ import annotations

import signal
import threading
import time
import weakref

import pytest

from freemerge.signals import Stop, stops


class Freed:
    """Raises a signal when it goes."""

    def __del__(self) -> None:
        signal.raise_signal(signal.SIGTERM)


class Plain:
    pass


def free_it() -> None:
    Freed()


def call_back() -> None:
    plain = Plain()
    weak = weakref.ref(plain, lambda _: signal.raise_signal(signal.SIGTERM))
    del plain
    assert weak() is None


@pytest.mark.parametrize("arrive", [free_it, call_back])
def test_while_memory_is_freed(arrive: object, capsys: pytest.CaptureFixture[str]) -> None:
    assert callable(arrive)
    with stops():
        with pytest.raises(Stop, match="terminated") as raised:  # noqa: PT012
            arrive()
            time.sleep(60)
            pytest.fail("it was lost")
        signal.raise_signal(signal.SIGINT)  # later ones do nothing
    assert raised.value.code == 143
    assert capsys.readouterr().err == ""


def test_while_memory_is_freed_and_other_threads_are_busy() -> None:
    """Which delays whatever sends it again."""
    ended = False

    def work() -> None:
        while not ended:
            sum(range(1000))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(10):
            with stops(), pytest.raises(Stop):  # noqa: PT012
                free_it()
                time.sleep(60)
                pytest.fail("it was lost")
    finally:
        ended = True
        for thread in threads:
            thread.join()


def test_once_the_work_is_done_nothing_is_sent_again() -> None:
    with stops():
        free_it()
    time.sleep(0.1)  # would end this process


def test_what_else_is_dropped_goes_where_it_went(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[object] = []
    monkeypatch.setattr("sys.unraisablehook", lambda unraisable: told.append(unraisable.exc_value))
    plain = Plain()
    weak = weakref.ref(plain, lambda _: 1 / 0)
    with stops():
        del plain
    assert weak() is None
    assert [type(error) for error in told] == [ZeroDivisionError]
