"""Turns: the blocks of one context nest, those of others wait, whichever bank they belong to."""

from __future__ import annotations

import asyncio
import contextvars
import copy
import itertools
import random
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as StillWaiting
from contextlib import AbstractAsyncContextManager, nullcontext
from dataclasses import replace
from functools import partial
from types import FrameType

import pytest
import torch
from expert_models import TASKS, Text, assert_same, make, snapshot
from torch import Tensor, nn

import freemerge.experts as fx
from freemerge.errors import ArgumentError
from freemerge.experts import turns

TraceFunction = Callable[[FrameType, str, object], object]


def test_threads_take_turns() -> None:
    model, experts, _ = make(Text)
    bank = fx.ExpertBank(model, experts)
    before = snapshot(model)
    ids = torch.arange(20).view(2, 10)
    expected = {}
    with torch.no_grad():
        for task in TASKS:
            with bank.active(task):
                expected[task] = model(ids)
    wrong: list[str] = []

    def serve(seed: int) -> None:
        picks = random.Random(seed)
        with torch.no_grad():
            for _ in range(30):
                task = picks.choice(TASKS)
                with bank.active(task):
                    out = model(ids)
                if not torch.equal(out, expected[task]):
                    wrong.append(task)

    threads = [threading.Thread(target=serve, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert_same(model, before)


def test_blocks_that_are_left_in_another_order_lose_nothing() -> None:
    model, experts, _ = make(Text)
    bank = fx.ExpertBank(model, experts)
    before = snapshot(model)

    def stream(task: str) -> Iterator[None]:
        with bank.active(task):
            yield

    first, second = stream("task0"), stream("task1")  # such as two answers that are generated in turns
    next(first)
    next(second)
    with pytest.raises(ArgumentError, match="left before one inside of it"):
        next(first)
    assert_same(model, before)
    with pytest.raises(ArgumentError, match="left before one inside of it"):
        next(second)
    assert_same(model, before)
    with bank.active("task0"), bank.active("task1"):
        pass
    assert_same(model, before)


def test_a_block_may_be_left_by_another_thread() -> None:
    """As servers do that go on with an answer in whichever thread is free, and as garbage is collected."""
    model, experts, _ = make(Text)
    bank = fx.ExpertBank(model, experts)
    before = snapshot(model)

    def stream() -> Iterator[None]:
        with bank.active("task0"):
            yield

    def use(task: str) -> str:
        with bank.active(task), bank.active(task):
            return task

    with ThreadPoolExecutor(1) as one, ThreadPoolExecutor(1) as other:
        for leave in (lambda answer: list(answer), lambda answer: answer.close()):
            answer = stream()
            one.submit(next, answer).result()
            waiting = other.submit(use, "task2")
            leave(answer)
            assert waiting.result(timeout=30) == "task2"
            assert one.submit(use, "task3").result(timeout=30) == "task3"
    assert_same(model, before)


def test_a_thread_whose_blocks_others_leave_does_not_keep_them() -> None:
    model, experts, _ = make(Text)
    bank = fx.ExpertBank(model, experts)
    with ThreadPoolExecutor(1) as pool:
        for _ in range(5):
            block = bank.active("task0")
            pool.submit(block.__enter__).result()
            block.__exit__(None, None, None)
        assert len(pool.submit(turns._entered.get).result()) == 1


def enter(bank: fx.ExpertBank, task: str) -> None:
    with bank.active(task):
        pass


def waiting(pool: ThreadPoolExecutor, bank: fx.ExpertBank, task: str) -> Future[None]:
    """A thread of the pool, which waits for its turn."""
    future = pool.submit(enter, bank, task)
    with pytest.raises(StillWaiting):
        future.result(timeout=0.1)
    return future


def same_weights(model: nn.Module) -> Iterator[tuple[str, nn.Module | Mapping[str, Tensor]]]:
    """Models that share the weights of one, and what the names begin with there."""
    yield "", model
    yield "", model.state_dict()
    yield "inner.", nn.ModuleDict({"inner": model})
    other = Text()
    other.load_state_dict(model.state_dict(), assign=True)
    yield "", other


@pytest.mark.parametrize("form", range(4))
def test_banks_of_the_same_weights_take_turns(form: int) -> None:
    model, experts, _ = make(Text)
    prefix, shared = [*same_weights(model)][form]
    names = {prefix + name: tensor for name, tensor in experts["task1"].tensors.items()}
    first, second = (
        fx.ExpertBank(model, experts),
        fx.ExpertBank(shared, {"b": replace(experts["task1"], tensors=names)}),
    )
    before = snapshot(model)
    outer, inner = first.active("task0"), second.active("b")
    outer.__enter__()
    inner.__enter__()
    for block in (outer, inner):
        with pytest.raises(ArgumentError, match="left before one inside of it"):
            block.__exit__(None, None, None)
        assert_same(model, before)
    with ThreadPoolExecutor(1) as pool:
        with first.active("task0"):
            future = waiting(pool, second, "b")
        future.result(timeout=30)
    assert_same(model, before)


def test_banks_of_one_module_take_turns_wherever_it_has_been_moved() -> None:
    model, experts, _ = make(Text)
    first = fx.ExpertBank(model, experts)
    model.double()
    second = fx.ExpertBank(model, experts)
    with ThreadPoolExecutor(1) as pool:
        with first.active("task0"):
            future = waiting(pool, second, "task1")
        future.result(timeout=30)


def test_banks_of_different_models_do_not_wait() -> None:
    model, experts, _ = make(Text)
    other = fx.ExpertBank(copy.deepcopy(model), experts)
    with ThreadPoolExecutor(1) as pool, fx.ExpertBank(model, experts).active("task0"):
        pool.submit(enter, other, "task0").result(timeout=30)


def test_a_part_that_is_left_ends_the_whole_inside_of_it_and_the_other_part_inside_of_that() -> None:
    whole = nn.ModuleDict({name: nn.Linear(3, 3) for name in ("a", "b")})
    before = snapshot(whole)
    blocks = []
    for model in (whole["a"], whole, whole["b"]):
        state = model.state_dict()
        tuned = {"t": {name: value + 1 for name, value in state.items()}}
        blocks.append(fx.ExpertBank(model, fx.extract_experts(state, tuned, density=0.5)).active("t"))
        blocks[-1].__enter__()
    for block in blocks:
        with pytest.raises(ArgumentError, match="left before one inside of it"):
            block.__exit__(None, None, None)
        assert_same(whole, before)


def test_requests_that_a_pool_of_threads_serves_wait_for_each_other() -> None:
    """One thread enters the blocks of both, each in the context of its request, as web frameworks let it."""
    model, experts, _ = make(Text)
    bank = fx.ExpertBank(model, experts)
    requests = [(contextvars.copy_context(), bank.active(task)) for task in TASKS[:2]]
    with ThreadPoolExecutor(1) as pool, ThreadPoolExecutor(1) as other:
        entered = [pool.submit(context.run, block.__enter__) for context, block in requests]
        entered[0].result(timeout=30)
        with pytest.raises(StillWaiting):
            entered[1].result(timeout=0.1)
        for (_, block), future in zip(requests, entered, strict=True):
            future.result(timeout=30)
            other.submit(block.__exit__, None, None, None).result(timeout=30)


def test_a_thread_waits_for_the_block_of_one_that_has_ended() -> None:
    """It may have got its number."""
    model, experts, _ = make(Text)
    bank = fx.ExpertBank(model, experts)
    block = bank.active("task0")
    with ThreadPoolExecutor(1) as pool:
        pool.submit(block.__enter__).result()
    second = threading.Thread(target=enter, args=(bank, "task1"), daemon=True)
    second.start()
    second.join(0.1)
    assert second.is_alive()
    block.__exit__(None, None, None)
    second.join(30)
    assert not second.is_alive()


def test_tasks_that_meet_are_told_to_take_turns() -> None:
    """Even where their blocks would end in order: each computed with the experts of both."""
    model, experts, _ = make(Text)
    bank = fx.ExpertBank(model, experts)
    before = snapshot(model)

    async def serve(task: str, seconds: float, turns: AbstractAsyncContextManager[None]) -> None:
        async with turns:
            with bank.active(task):
                await asyncio.sleep(seconds)

    async def both(turns: AbstractAsyncContextManager[None]) -> list[BaseException | None]:
        return await asyncio.gather(serve("task0", 0.05, turns), serve("task1", 0.01, turns), return_exceptions=True)

    first, second = asyncio.run(both(nullcontext()))
    assert first is None
    assert isinstance(second, ArgumentError)
    assert "asyncio.Lock" in str(second)
    assert asyncio.run(both(asyncio.Lock())) == [None, None]
    assert_same(model, before)


def test_what_begins_in_a_block_is_inside_of_it() -> None:
    """Tasks, and threads that copy the context; but not inside of each other."""
    model, experts, _ = make(Text)
    bank = fx.ExpertBank(model, experts)
    before = snapshot(model)

    async def inside(task: str, within: asyncio.Event, done: asyncio.Event) -> None:
        with bank.active(task):
            within.set()
            await done.wait()

    async def main() -> None:
        with bank.active("task0"):
            await asyncio.to_thread(enter, bank, "task1")
            within, done = asyncio.Event(), asyncio.Event()
            child = asyncio.create_task(inside("task2", within, done))
            await within.wait()
            with pytest.raises(ArgumentError, match="take turns"):
                enter(bank, "task3")
            done.set()
            await child
            enter(bank, "task3")

    asyncio.run(main())
    assert_same(model, before)


@pytest.mark.parametrize("error", [None, ValueError("of the body")])
def test_an_interrupt_keeps_nobody_waiting(monkeypatch: pytest.MonkeyPatch, error: Exception | None) -> None:
    """It may come while a block waits, or between the steps of leaving one, for an error, too."""
    model, experts, _ = make(Text)
    bank = fx.ExpertBank(model, experts)
    before = snapshot(model)

    def interrupt(*args: object) -> None:
        monkeypatch.undo()
        raise KeyboardInterrupt

    with ThreadPoolExecutor(1) as pool:
        block = bank.active("task0")
        pool.submit(block.__enter__).result()
        monkeypatch.setattr(turns._changed, "wait", interrupt)
        with pytest.raises(KeyboardInterrupt):
            enter(bank, "task1")
        monkeypatch.setattr(turns, "_remove", interrupt)
        with pytest.raises(KeyboardInterrupt):
            block.__exit__(error and type(error), error, None)
        pool.submit(enter, bank, "task1").result(timeout=30)
    assert_same(model, before)


def test_a_block_that_ends_on_the_way_to_the_wait_for_it_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """As garbage that is collected there: nobody is told yet, and nobody will be."""
    model, experts, _ = make(Text)
    bank = fx.ExpertBank(model, experts)
    block = bank.active("task0")
    wait = turns._changed.wait

    def wait_too_late(*args: float) -> None:
        monkeypatch.undo()
        block.__exit__(None, None, None)
        wait(*args)

    with ThreadPoolExecutor(1) as pool:
        pool.submit(block.__enter__).result()
    monkeypatch.setattr(turns._changed, "wait", wait_too_late)
    second = threading.Thread(target=enter, args=(bank, "task1"), daemon=True)
    second.start()
    second.join(30)
    assert not second.is_alive()


class Interposed:
    """In the block, something is done before the instruction of turns.py with this number."""

    def __init__(self, number: int, action: Callable[[], object]) -> None:
        self.number, self.action, self.counted = number, action, 0

    def __enter__(self) -> Interposed:
        self._before = sys.gettrace()
        sys.settrace(self._trace)
        return self

    def __exit__(self, *exception: object) -> None:
        sys.settrace(self._before)

    def _trace(self, frame: FrameType, event: str, arg: object) -> TraceFunction | None:
        if frame.f_code.co_filename != turns.__file__:
            return None
        frame.f_trace_opcodes = True
        if event == "opcode":
            if self.counted == self.number:
                self.action()
            self.counted += 1
        return self._trace


def test_garbage_may_end_a_block_between_any_two_instructions() -> None:
    """At each step of entering and leaving blocks, that of another model is left in the same thread."""
    blocks = []
    for _ in range(3):
        model, experts, _ = make(Text)
        blocks.append((model, snapshot(model), fx.ExpertBank(model, experts)))
    garbage, outer, inner = (bank for _, _, bank in blocks)
    for number in itertools.count():
        dropped = garbage.active("task0")
        dropped.__enter__()
        leave = partial(dropped.__exit__, None, None, None)
        with Interposed(number, leave) as done, outer.active("task0"), inner.active("task0"):
            pass
        if done.counted <= number:
            break
        assert not turns._open
    leave()
    assert number > 100
    for model, weights, _ in blocks:
        assert_same(model, weights)
