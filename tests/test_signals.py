"""A signal that asks the command to stop does so, wherever the program is when it arrives."""

from __future__ import annotations

import signal
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
    begin = time.monotonic()
    with stops():
        arrive()
        with pytest.raises(Stop, match="terminated") as raised:
            time.sleep(60)
        signal.raise_signal(signal.SIGINT)  # later ones do nothing
    assert time.monotonic() - begin < 50
    assert raised.value.code == 143
    assert capsys.readouterr().err == ""


def test_what_else_is_dropped_goes_where_it_went(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[object] = []
    monkeypatch.setattr("sys.unraisablehook", lambda unraisable: told.append(unraisable.exc_value))
    plain = Plain()
    weak = weakref.ref(plain, lambda _: 1 / 0)
    with stops():
        del plain
    assert weak() is None
    assert [type(error) for error in told] == [ZeroDivisionError]
