"""The public names: few in front, families in modules of their own, and every name of earlier versions."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

import freemerge as fm
from freemerge.backends.base import BackendInfo
from freemerge.merging.selection import LayerWeights
from freemerge.methods import METHODS
from freemerge.methods.filtered import Filter
from freemerge.planner.plan import Plan
from freemerge.workers import Workers, joined

# What `freemerge.__all__` of version 0.1.0 listed.
EARLIER = [
    "ArgumentError", "BackendError", "BandGain", "BandPass", "BandStop", "Butterworth", "Center", "CheckpointError",
    "Custom", "Decision", "Expert", "ExpertBank", "FreemergeError", "Gaussian", "HighPass", "Inspection", "LowPass",
    "Official", "Recipe", "RefusedError", "Report", "Response", "Routed", "RoutedModel", "Router", "Rule",
    "SavedExpert", "Split", "Stack", "backends", "explain", "extract_experts", "filter_", "filtered", "inspect",
    "iter_experts", "merge", "merge_checkpoints", "save_experts",
]  # fmt: skip


@pytest.mark.parametrize("name", EARLIER)
def test_earlier_names_are_still_here(name: str) -> None:
    value = getattr(fm, name)
    assert inspect.isclass(value) or inspect.isfunction(value) or name == "backends"
    assert value.__name__.rpartition(".")[2] == name


REFERENCE = (Path(__file__).parents[1] / "docs" / "api.md").read_text(encoding="utf-8")


def test_the_reference_has_every_method() -> None:
    assert all(f".. autoclass:: freemerge.methods.{method.__name__}\n" in REFERENCE for method in METHODS.values())


@pytest.mark.parametrize(
    "name", ["Difference", "Evaluation", "Lora", "Report", "Routed", "SavedExpert", "Stage", "Sweep", "Tuned"]
)
def test_what_functions_return_has_a_name(name: str) -> None:
    assert inspect.isclass(getattr(fm, name))
    assert f".. autoclass:: {name}\n" in REFERENCE


@pytest.mark.parametrize(
    "value",
    [BackendInfo, Filter, LayerWeights, Plan, Workers, joined],
    ids=lambda value: value.__name__,
)
def test_the_reference_has_what_is_taken_and_returned_under_no_name_of_the_front(value: Any) -> None:
    kind = "class" if inspect.isclass(value) else "function"
    assert f".. auto{kind}:: {value.__module__}.{value.__name__}\n" in REFERENCE


def test_the_reference_promises_nothing_but_errors_of_their_module() -> None:
    helpers = [name for name, value in vars(fm.errors).items() if inspect.isfunction(value)]
    assert f":exclude-members: {', '.join(sorted(helpers))}\n" in REFERENCE


def test_the_front_is_small_and_complete() -> None:
    assert set(fm.__all__) == {
        "ExpertBank", "HighPass", "Recipe", "RoutedModel", "Router", "analyze", "backends", "evaluate", "explain",
        "extract_experts", "filter_", "filtered", "inspect", "merge", "merge_checkpoints", "merge_deltas",
        "merge_tensors", "task_weights", "verify",
    }  # fmt: skip
    for name in fm.__all__:
        value = getattr(fm, name)
        assert callable(value), f"{name} must not be hidden by the module of this name"
        assert value.__doc__


@pytest.mark.parametrize(
    "name",
    ["analyze", "evaluate", "explain", "extract_experts", "filter_", "filtered", "inspect", "merge",
     "merge_checkpoints", "merge_tensors", "verify"],
)  # fmt: skip
def test_functions_of_the_front_say_what_they_raise(name: str) -> None:
    doc = inspect.getdoc(getattr(fm, name))
    assert doc is not None
    errors = doc.partition("\nRaises:\n")[2]
    assert errors
    assert all(hasattr(fm.errors, error) for error in re.findall(r"\w+Error", errors))


def test_families_have_modules_of_their_own() -> None:
    assert fm.responses.LowPass is fm.LowPass
    for family in (fm.errors, fm.responses):
        kinds = {name: kind for name, kind in vars(family).items() if inspect.isclass(kind) and name[0] != "_"}
        public = {name: kind for name, kind in kinds.items() if issubclass(kind, fm.FreemergeError | fm.Response)}
        assert len(public) > 5
        assert all(getattr(fm, name, None) is kind for name, kind in public.items())
    assert fm.methods.FR is type(fm.Recipe().method)
    assert {cls.__name__ for cls in fm.methods.METHODS.values()} <= set(fm.methods.__all__)
    assert all(getattr(fm.methods, name) is not None for name in fm.methods.__all__)
    with pytest.raises(AttributeError, match="Nothing"):
        fm.methods.Nothing  # noqa: B018


@pytest.mark.parametrize("first", ["import freemerge.backends.torch", "import freemerge", "import freemerge.filter"])
def test_backends_is_a_function_and_a_package(first: str) -> None:
    script = f"""
        {first}
        import freemerge as fm
        assert set(fm.backends()) >= {{"cpu", "torch"}}
        import freemerge.backends.cpu as x
        import freemerge.backends
        from freemerge import backends
        assert freemerge.backends is fm.backends is backends
        assert x is freemerge.backends.cpu and x.__name__ == "freemerge.backends.cpu"
        assert list(freemerge.backends()) == ["cuda", "cpu", "torch"]
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=True)


def test_names_come_when_they_are_used() -> None:
    script = """
        import sys
        import freemerge as fm
        assert "torch" not in sys.modules
        assert "ExpertBank" in dir(fm)
        fm.ArgumentError
        assert "torch" not in sys.modules
        import freemerge.backends.base
        fm.backends()
        assert "torch" in sys.modules
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=True)
    with pytest.raises(AttributeError, match="module 'freemerge' has no attribute 'nothing'"):
        fm.nothing  # noqa: B018
