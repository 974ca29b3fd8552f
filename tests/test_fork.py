"""A process that was forked after native threads had run computes the same, and does not wait for lost threads."""

from __future__ import annotations

import subprocess
import sys

import pytest

# What another thread is in the middle of while a process forks.
BUSY = """
import os, signal, sys, threading, torch, freemerge as fm
from contextlib import ExitStack
from dataclasses import replace
from freemerge import cache
from freemerge.backends import result_memory

inside, done = threading.Event(), threading.Event()
def wait():
    inside.set()
    done.wait()
class Slow(fm.Response):
    def box(self, shape, tolerance):
        wait()
    def gain(self, ky, kx, shape):
        return 0 * (ky + kx) + 1
class SlowHash(Slow):
    def __hash__(self):
        wait()
        return 1
plan = fm.explain((4, 4), fm.HighPass(0.1))
def locks():
    with ExitStack() as stack:
        for lock in (result_memory._pieces.lock, *(cache._lock for cache in cache._ALL)):
            stack.enter_context(lock)
        wait()
busy = {"planning": lambda: fm.explain((4, 4), Slow()), "hashing": lambda: hash(replace(plan, response=SlowHash())),
        "holding every lock": locks}[sys.argv[1]]
thread = threading.Thread(target=busy)
thread.start()
inside.wait()
child = os.fork()
if child == 0:
    signal.alarm(60)
    with result_memory.reusing():
        large = fm.filtered(torch.randn(600, 500), fm.HighPass(0.3))
    os._exit(0)
done.set()
status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
sys.exit(status if status >= 0 else 100 - status)
"""

PROGRAM = """
import os, signal, sys, torch, freemerge as fm
torch.set_num_threads(2)
x, response = torch.randn(600, 500), fm.HighPass(0.3)
parts = [torch.randn(100_000) for _ in range(3)]
tuned = x + torch.sin(x)  # once: its last bits may depend on where in memory it is
def work():
    merged = fm.merge_tensors(parts[0], parts[1:], method="task_arithmetic")
    experts = fm.extract_experts({"w": x}, {"task": {"w": tuned}})
    weights = {"w": x.clone()}
    with fm.ExpertBank(weights, experts).active("task"):
        switched = weights["w"].clone()
    return fm.filtered(x, response), merged, switched
expected = work()
child = os.fork()
if child == 0:
    signal.alarm(60)
    os._exit(0 if all(map(torch.equal, work(), expected)) else 3)
status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
sys.exit(status if status >= 0 else 100 - status)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="it does not fork")
def test_a_forked_process_filters_merges_and_switches() -> None:
    run = subprocess.run([sys.executable, "-W", "ignore", "-c", PROGRAM], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr


@pytest.mark.skipif(sys.platform == "win32", reason="it does not fork")
@pytest.mark.parametrize("doing", ["planning", "hashing", "holding every lock"])
def test_a_forked_process_does_not_wait_for_what_another_thread_was_doing(doing: str) -> None:
    command = [sys.executable, "-W", "ignore", "-c", BUSY, doing]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
