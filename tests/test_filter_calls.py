"""Repeated calls: what one call makes, others find again, and nothing of it is ever the wrong one or too much."""

from __future__ import annotations

import gc
import math
import threading
import weakref
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch

import freemerge as fm
from fallback import Elsewhere
from freemerge import filter as filtering
from freemerge.backends import base, registry
from freemerge.backends.cpu import CpuBackend
from freemerge.backends.torch import TorchBackend
from freemerge.cache import Cache, forget_all, table_bytes
from freemerge.planner.costs import Traits
from freemerge.planner.forms import candidates
from freemerge.responses import Gains
from in_memory import noise

BACKENDS = ["auto", *(name for name, info in fm.backends().items() if info.available and name != "cuda")]
AVAILABLE = pytest.mark.parametrize("backend", BACKENDS)


def exact(x: torch.Tensor, response: fm.Response) -> torch.Tensor:
    shape = tuple(x.shape[-2:])
    mask = torch.from_numpy(response.mask(shape))
    transform = torch.fft.ifft2(mask * torch.fft.fft2(x.double().reshape(*x.shape[:-2], *mask.shape)))
    return transform.real.reshape(x.shape)


def assert_filtered(y: torch.Tensor, x: torch.Tensor, response: fm.Response) -> None:
    tolerance = {torch.float64: 1e-13, torch.float32: 6e-7}.get(y.dtype, 5e-3)
    error = float((y.double() - exact(x, response)).norm())
    assert error <= tolerance * float(x.double().norm()), (tuple(x.shape), x.stride(), x.dtype, response)


@pytest.fixture
def no_routes() -> Iterator[None]:
    forget_all()
    yield
    forget_all()


@AVAILABLE
def test_calls_that_differ_in_one_thing_do_not_meet(backend: str) -> None:
    """Every layout, dtype, shape and response, twice over, each against its own mask."""
    layouts = {
        "rows": lambda x: x,
        "columns": lambda x: x.t().contiguous().t(),
        "rows apart": lambda x: torch.cat([x, x], 1)[:, : x.shape[1]],
        "neither": lambda x: torch.stack([x, x], -1)[..., 0],
    }
    responses = [fm.HighPass(0.1), fm.LowPass(0.1), fm.HighPass(0.3), fm.HighPass(0.1, metric="normalized")]
    for _ in range(2):
        for dtype in (torch.float32, torch.float64, torch.bfloat16):
            for shape in ((24, 36), (36, 24)):
                for lay_out in layouts.values():
                    for response in responses:
                        x = noise(*shape, dtype=dtype)
                        y = lay_out(x.clone())
                        fm.filter_(y, response, backend=backend)
                        assert_filtered(y, x, response)


@AVAILABLE
@pytest.mark.parametrize("count", [2, 3, 5, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_batches_of_any_count(backend: str, count: int, dtype: torch.dtype) -> None:
    for height, width in ((40, 64), (33, 21)):
        memory = noise(count, height + 2, width + 6, dtype=dtype)
        for dense in (False, True):
            for scale in (1.0, -0.5):
                written = memory.clone()
                part = written[:, :height, :width]
                y = part.contiguous() if dense else part
                fm.filter_(y, fm.Butterworth(0.4), scale=scale, backend=backend)
                assert_filtered(y / scale, memory[:, :height, :width], fm.Butterworth(0.4))
                part.copy_(memory[:, :height, :width])
                assert torch.equal(written, memory), "nothing beside the matrices was written"


@AVAILABLE
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_matrices_of_a_batch_do_not_meet(backend: str, dtype: torch.dtype) -> None:
    tolerance = {torch.float64: 1e-13, torch.float32: 1e-6}.get(dtype, 5e-3)
    for response in (fm.HighPass(0.4), fm.HighPass(0.05), fm.Butterworth(0.4)):
        alone = noise(3, 96, 96, dtype=dtype)
        alone[2] = 0.0
        want = [fm.filtered(x, response, backend=backend) for x in alone]
        for neighbour in (1e6, math.nan, math.inf):
            batch = torch.stack([x for i in range(3) for x in (alone[i] * neighbour, alone[i])])
            fm.filter_(batch, response, backend=backend)
            for got, expected in zip(batch[1::2], want, strict=True):
                assert float((got - expected).double().norm()) <= tolerance * float(expected.double().norm())
            assert not batch[5].any(), "a matrix of zeros stays one"


def test_masks_are_let_go(no_routes: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base._EXECUTABLES, "capacity", 10 << 16)
    kept = []
    for i in range(40):
        response = fm.Custom(np.full((12, 14), float(i)) + np.eye(12, 14))
        kept.append(weakref.ref(response._array))
        fm.filter_(noise(12, 14), response, backend="torch")
    del response
    gc.collect()
    assert sum(ref() is not None for ref in kept) < 20


@AVAILABLE
def test_a_custom_mask_never_goes_stale(backend: str) -> None:
    array = np.zeros((20, 30))
    x = noise(20, 30)
    response = fm.Custom(array)
    assert not fm.filtered(x, response, backend=backend).any()
    array[:] = 1.0  # the response has its own copy
    assert not fm.filtered(x, response, backend=backend).any()
    assert torch.equal(fm.filtered(x, fm.Custom(array), backend=backend), x)
    for keep in (0.0, 1.0, 2.0):  # each round makes another function in the same place of memory, perhaps
        kept = fm.filtered(x, fm.Custom(lambda ky, kx, shape, keep=keep: keep + 0 * (ky + kx)), backend=backend)
        assert torch.equal(kept, keep * x)


def test_a_method_of_an_object_that_has_changed_is_another_mask() -> None:
    class Schedule:
        keep = 1.0

        def gains(self, ky: np.ndarray, kx: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
            return self.keep + 0 * (ky + kx)

    schedule, x = Schedule(), noise(20, 30)
    for schedule.keep in (1.0, 0.0, 2.0):
        torch.testing.assert_close(fm.filtered(x, fm.Custom(schedule.gains)), schedule.keep * x)


class Undecorated(fm.Response):
    """A user's response that is no dataclass."""

    def __init__(self, gain: float) -> None:
        object.__setattr__(self, "_gain", gain)

    def gain(self, ky: Gains, kx: Gains, shape: tuple[int, ...]) -> Gains:
        return np.where(abs(ky) + abs(kx) > 2, 1.0, self.__dict__["_gain"])


def test_responses_without_fields_do_not_meet() -> None:
    x, responses = noise(20, 30), [Undecorated(gain) for gain in (0.0, 0.5)]
    assert responses[0] == responses[0]
    assert responses[0] != responses[1]
    assert fm.Response() != fm.Response()
    for response in responses:
        expected = fm.filtered(x, fm.Custom(response.mask((20, 30))))
        torch.testing.assert_close(fm.filtered(x, response), expected, rtol=0, atol=0)


def test_a_refusal_is_told_each_time_and_by_name() -> None:
    for name, x in (("x", torch.zeros(3, 1).expand(3, 4)), (r"x\[1\]", [noise(3, 4), torch.zeros(3, 1).expand(3, 4)])):
        for _ in range(2):
            with pytest.raises(fm.ArgumentError, match=rf"^{name} may overlap itself .*pass {name}\.contiguous\(\)$"):
                fm.filter_(x, fm.HighPass(0.1))
    for _ in range(2):
        with pytest.raises(fm.BackendError, match="does not run on device meta"):
            fm.explain(torch.empty(8, 8, device="meta"), fm.HighPass(0.1), backend="cpu")
        with pytest.raises(fm.ArgumentError, match="dense tensor with data"):
            fm.filter_(torch.empty(8, 8, device="meta"), fm.HighPass(0.1))


@pytest.mark.usefixtures("no_routes")
def test_routes_are_bounded_and_made_once_for_a_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[tuple[int, ...]] = []
    choose = registry.choose
    monkeypatch.setattr(filtering, "choose", lambda *args: made.append(args[1]) or choose(*args))
    for _ in range(3):
        fm.filter_([noise(8, 9), noise(8, 9, seed=1)], fm.HighPass(0.1))
        fm.filter_(noise(8, 9), fm.HighPass(0.1))
    assert made == [(8, 9)]
    limit = filtering._ROUTES.capacity
    for width in range(1, limit + 20):
        fm.filter_(torch.ones(1, width), fm.HighPass(9.0))
    assert 1 < len(filtering._ROUTES) <= limit


@AVAILABLE
@pytest.mark.usefixtures("no_routes")
def test_threads_that_call_at_once_agree(backend: str) -> None:
    kinds = [(noise(*shape, seed=seed), fm.HighPass(c)) for seed, shape in enumerate([(40, 50), (768,), (6, 32, 32)])
             for c in (0.05, 0.2, 0.4)]  # fmt: skip
    want = [fm.filtered(x, response, backend=backend) for x, response in kinds]
    forget_all()
    failures: list[str] = []
    barrier = threading.Barrier(4)

    def work() -> None:
        barrier.wait()
        for _ in range(15):
            for (x, response), y in zip(kinds, want, strict=True):
                if not torch.equal(fm.filtered(x, response, backend=backend), y):
                    failures.append(f"{tuple(x.shape)} {response}")

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_the_number_of_threads_is_asked_for_at_each_call(monkeypatch: pytest.MonkeyPatch) -> None:
    from freemerge import _core

    used: list[int] = []
    native = _core.Filter.run
    monkeypatch.setattr(_core.Filter, "run", lambda *args: (used.append(args[4]), native(*args))[1])
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 1):
            torch.set_num_threads(count)
            fm.filter_(noise(64, 64), fm.HighPass(0.1), backend="cpu")
            fm.filter_(noise(64, 64), fm.HighPass(0.1), backend="torch")
            assert torch.get_num_threads() == count
    finally:
        torch.set_num_threads(threads)
    assert used == [1, 2, 1]


@pytest.mark.parametrize("error", [MemoryError, KeyboardInterrupt])
def test_what_stops_a_filter_leaves_all_as_it_was(error: type[BaseException], monkeypatch: pytest.MonkeyPatch) -> None:
    """Of matrices with several row strides all stay, and the mean that would have been taken out, too."""
    from freemerge import _core

    plan = fm.explain((512, 512), fm.HighPass(0.02), backend="cpu")
    tensors = [noise(512, 512) + 100.0, (noise(512, 600) + 50.0)[:, :512]]
    before = [x.clone() for x in tensors]
    assert plan.centers

    def stop(*arguments: object) -> None:
        raise error

    monkeypatch.setattr(_core.Filter, "run", stop)
    with pytest.raises(error):
        CpuBackend().executable(plan).run(tensors, 1.0)
    assert all(map(torch.equal, tensors, before))


def test_what_stops_a_filter_when_it_is_done_leaves_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    from freemerge import _core

    x, response, native = noise(512, 512) + 100.0, fm.LowPass(0.02), _core.Filter.run
    expected = fm.filtered(x, response)

    def late(*arguments: object) -> None:
        native(*arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(_core.Filter, "run", late)
    with pytest.raises(KeyboardInterrupt):
        fm.filter_(x, response)
    assert torch.equal(x, expected)


@AVAILABLE
@pytest.mark.parametrize("shape", [(16, 16), (768,), (1, 768), (3, 1, 40), (4, 24, 24), (64, 64)], ids=str)
@pytest.mark.parametrize("first", ["inference", "grad"])
def test_the_mode_of_the_first_call_does_not_bind_the_next(backend: str, shape: tuple[int, ...], first: str) -> None:
    response = fm.HighPass(0.3)
    want = fm.filtered(noise(*shape), response, backend=backend)
    forget_all()

    def infer() -> None:
        with torch.inference_mode():
            x = noise(*shape)
            assert torch.equal(fm.filter_(x, response, backend=backend), want)
        assert torch.equal(fm.filter_(x, response, backend=backend), fm.filtered(want, response, backend=backend))

    def train() -> None:
        parameter = torch.nn.Parameter(noise(*shape))
        version = parameter._version
        assert fm.filter_(parameter, response, backend=backend) is parameter
        assert torch.equal(parameter.detach(), want)
        assert parameter._version > version
        assert parameter.requires_grad
        assert parameter.grad_fn is None
        parameter.square().sum().backward()
        assert torch.equal(parameter.grad, 2 * want)

    for mode in (infer, train) if first == "inference" else (train, infer):
        mode()


def test_autocast_changes_nothing() -> None:
    backend, shape = Elsewhere(), (300, 400)
    traits = backend.traits(torch.device("cpu"))
    plans = candidates(fm.HighPass(0.05), shape, torch.float32, "cpu", "torch", traits)
    assert {plan.form for plan in plans} == {"decimated", "full"}
    for plan in plans:
        want, got, executable = noise(*shape), noise(*shape), backend.prepare(plan)
        executable.run([want], 1.0)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            executable.run([got], 1.0)
        assert torch.equal(got, want)


def test_vectors_need_no_numpy_that_writes_into_given_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    from freemerge.backends import torch as backend

    x, response = noise(600), fm.Butterworth(0.2)
    monkeypatch.setattr(backend, "_NUMPY_OUT", False)
    assert fm.explain(x, response, backend="torch").library == "numpy"
    assert_filtered(fm.filtered(x, response, backend="torch"), x, response)


# --- the cache itself -------------------------------------------------------------------------------------------------


def test_a_cache_keeps_the_latest_by_weight() -> None:
    cache: Cache[str, bytes] = Cache(10, lambda key, value: len(value))
    assert cache.get("first", lambda: b"1234") == b"1234"
    for key in "abc":
        cache.get(key, lambda: b"123")
    assert cache.weight == 9
    assert len(cache) == 3
    cache.get("a", lambda: pytest.fail("still there"))
    cache.get("d", lambda: b"123")
    assert cache.get("a", lambda: pytest.fail("used after b")) == b"123"
    assert cache.get("b", lambda: b"made again") == b"made again"
    cache.get("huge", lambda: bytes(99))
    assert len(cache) == 1
    assert cache.weight == 99


def test_a_cache_does_not_keep_failures() -> None:
    cache: Cache[int, int] = Cache(2)

    def fail() -> int:
        raise fm.BackendError("no")

    for _ in range(2):
        with pytest.raises(fm.BackendError):
            cache.get(1, fail)
    assert cache.get(1, lambda: 7) == 7


def test_tables_are_weighed_once_each() -> None:
    table = torch.zeros(10)
    assert table_bytes([table, (table, np.zeros(3)), None, 5]) == 40 + 24


def test_the_tables_of_many_filters_stay_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base._EXECUTABLES, "capacity", 1 << 20)
    forget_all()
    for height in range(200, 240):
        fm.filter_(noise(height, 400), fm.Butterworth(0.4), backend="torch")
    assert 1 < len(base._EXECUTABLES) < 40
    assert base._EXECUTABLES.weight <= 1 << 20


@pytest.mark.usefixtures("no_routes")
def test_what_a_full_cache_let_go_is_prepared_again_and_what_is_used_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    prepared: list[tuple[int, ...]] = []
    prepare = TorchBackend.prepare
    monkeypatch.setattr(
        TorchBackend, "prepare", lambda self, plan: (prepared.append(plan.shape), prepare(self, plan))[1]
    )
    monkeypatch.setattr(base._EXECUTABLES, "capacity", 4 << 16)
    response, often, once = fm.Butterworth(0.4), noise(8, 9), noise(9, 8)
    want = fm.filtered(once, response, backend="torch")
    for height in range(10, 20):
        fm.filter_(often, response, backend="torch")
        fm.filter_(noise(height, 8), response, backend="torch")
    assert torch.equal(fm.filtered(once, response, backend="torch"), want)
    assert prepared.count((8, 9)) == 1
    assert prepared.count((9, 8)) == 2


@pytest.mark.usefixtures("no_routes")
def test_a_route_is_made_again_when_the_traits_of_its_backend_vary() -> None:
    fewer = [False]

    class Changing(Elsewhere):
        def traits(self, device: torch.device) -> Traits:
            full = super().traits(device)
            return narrow if fewer[0] else full

    narrow = replace(Elsewhere().traits(torch.device("cpu")), forms=frozenset(("identity", "scale")))
    x = noise(16, 16)
    with registry.using(Changing()):
        fm.filter_(x, fm.HighPass(0.3))
        fewer[0] = True
        with pytest.raises(fm.BackendError, match="has no form"):
            fm.filter_(x, fm.HighPass(0.3))
        with pytest.raises(fm.BackendError, match="has no form"):
            fm.explain(x, fm.HighPass(0.3))
        fewer[0] = False
        fm.filter_(x, fm.HighPass(0.3))
