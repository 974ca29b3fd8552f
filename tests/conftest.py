"""Settings of all tests: the same examples on every run, so that a failure can be run again; and the backends."""

from __future__ import annotations

import os
from collections.abc import Iterator
from importlib.util import find_spec

import pytest
import torch
from hypothesis import HealthCheck, settings

import emulated
from freemerge.backends import registry
from freemerge.backends.torch import TorchBackend

# Tests of a host run where it is installed: ./check hosts makes an environment for each.
HOSTS = ("mergekit", "sd_mecha", "fusion_bench")
collect_ignore = [f"hosts/test_{host}.py" for host in HOSTS if find_spec(host) is None]
collect_ignore += ["hosts/test_together.py"] if collect_ignore else []

settings.register_profile(
    "reproducible", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
settings.load_profile("reproducible")


os.environ["FREEMERGE_CACHE"] = ""  # no test depends on an earlier one, or leaves something with the user


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Draws without a generator are the same, too, whatever ran before, and not those of a test's own generator."""
    torch.manual_seed(20241117)


@pytest.fixture(params=["cpu", "torch", "cuda-emulated"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """The name of each backend that takes CPU tensors. The emulation makes the CUDA backend one of them."""
    if request.param == "cuda-emulated":
        with registry.using(emulated.backend(), TorchBackend()):
            yield "cuda"
    else:
        yield request.param
