"""What tests of routers and of routed models share."""

from __future__ import annotations

import pytest
import torch
from routing import Sequences, fitted_router

from freemerge.experts import Router


@pytest.fixture(scope="module")
def router() -> Router:
    return fitted_router()


@pytest.fixture
def sequences() -> Sequences:
    torch.manual_seed(3)
    return Sequences().eval()
