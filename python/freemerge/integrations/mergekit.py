"""Merging methods of freemerge for mergekit: importing this module registers them as ``freemerge_fr`` and so on.

``freemerge mergekit-yaml`` is mergekit's own command with them. The ``base_model`` of a configuration is theta_0. Its
parameters are those of the method, and ``scale``; ``weight``, of each model, stands for the list of weights. mergekit
merges tensor by tensor: what a method measures is measured over each tensor, not over the model. Both interfaces of
mergekit are served, that of 0.1.4, whose configurations have numbers and flags only, and that of 0.1.5.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any, Optional

from click import Context
from mergekit import merge_methods
from torch import Tensor

from ..errors import ArgumentError
from ..merging.recipe import Recipe
from ..merging.tensors import merge_tensors, parameters_for_hosts
from ..methods import METHODS, Method
from ..methods.parameters import FLAG, WHOLE_NUMBER, Parameter

PREFIX = "freemerge_"
WEIGHT = "weight"  # of one model, as mergekit's own methods call it


def merge(
    method: type[Method],
    base: Tensor,
    tensors: Sequence[Tensor],
    parameters: Mapping[str, Any],
    weights: Sequence[float | None],
    name: str | None,
) -> Tensor:
    """One tensor, from parameters of a configuration, where None stands for the default."""
    known = parameters_for_hosts(method)
    given_parameters = {key: _typed(known[key], key, value) for key, value in parameters.items() if value is not None}
    recipe = Recipe(method=method.name, **given_parameters)
    given = [weight for weight in weights if weight is not None]
    if given and len(given) < len(tensors):
        raise ArgumentError(f"{WEIGHT}: {len(given)} of {len(tensors)} models have one; give it to all or to none")
    return merge_tensors(base, tensors, recipe=recipe, weights=given or None, name=name)


def _typed(parameter: Parameter, name: str, value: object) -> Any:
    """A value as the parameter has it: None is written "none", as mergekit's configurations hold no null, and mergekit
    0.1.4 makes floats of all numbers, and of true and false."""
    if isinstance(value, str):
        return parameter.parse(name, value)
    if parameter.kind is FLAG and value in (0, 1):
        return bool(value)
    return int(value) if parameter.kind is WHOLE_NUMBER and isinstance(value, float) and value.is_integer() else value


def _reference(method: type[Method]) -> str | None:
    return None if method.paper is None else f"https://arxiv.org/abs/{method.paper}"


def _register_kernels() -> None:
    """For mergekit 0.1.5 and later: functions of a group of tensors, whose parameters their signature declares."""
    from mergekit.merge_methods import BasePolicy, InputContract, PerNonBase, TensorGroup, merge_method, register

    def kernel(method: type[Method]) -> Any:
        def merged(group: Any, weight: Any, **parameters: Any) -> Tensor:
            models = [entry.tensor for entry in group.non_base]
            return merge(
                method, group.base.tensor, models, parameters, weight.values_for(group.non_base), group.metadata.name
            )

        kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
        annotations: dict[str, Any] = {"group": TensorGroup, WEIGHT: PerNonBase[Optional[float]]}  # noqa: UP045
        annotations |= dict.fromkeys(parameters_for_hosts(method), Any)
        merged.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
            [
                inspect.Parameter(name, kind, default=inspect.Parameter.empty if name == "group" else None)
                for name in annotations
            ]
        )
        merged.__annotations__ = {**annotations, "return": Tensor}
        return merged

    for method in METHODS.values():
        register(
            merge_method(
                kernel(method),
                name=PREFIX + method.name,
                pretty_name=f"{method.title} (freemerge)",
                reference_url=_reference(method),
                contract=InputContract(base=BasePolicy.REQUIRED, min_non_base=1),
            )
        )


def _register_tasks() -> None:
    """For mergekit 0.1.4: tasks of its graph."""
    from mergekit.architecture import WeightInfo
    from mergekit.common import ImmutableMap, ModelReference
    from mergekit.graph import Task
    from mergekit.merge_methods.base import ConfigParameterDef, MergeMethod, MergeTensorInput
    from mergekit.merge_methods.registry import REGISTERED_MERGE_METHODS

    class Merge(Task[Tensor]):  # type: ignore[misc]
        method: str
        gather_tensors: MergeTensorInput
        base_model: Optional[ModelReference]  # noqa: UP045
        parameters: ImmutableMap[str, Any]
        tensor_parameters: ImmutableMap[ModelReference, ImmutableMap[str, Any]]
        weight_info: WeightInfo

        def uses_accelerator(self) -> bool:
            return True

        def arguments(self) -> dict[str, Task[Any]]:
            return {"tensors": self.gather_tensors}

        def group_label(self) -> str | None:
            return self.gather_tensors.group_label()  # type: ignore[no-any-return]

        def execute(self, tensors: dict[Any, Tensor], **_: Any) -> Tensor:
            if self.base_model not in tensors:
                raise ArgumentError(f"base_model must be given, and have a tensor {self.weight_info.name}")
            # In the order of the configuration: it decides what DARE drops of which model.
            models = [model for model in self.tensor_parameters if model in tensors and model != self.base_model]
            if not models:
                raise ArgumentError(f"no model but the base has a tensor {self.weight_info.name}")
            weights = [self.tensor_parameters[model][WEIGHT] for model in models]
            parameters = {name: self.parameters[name] for name in self.parameters}
            each = [tensors[model] for model in models]
            return merge(
                METHODS[self.method], tensors[self.base_model], each, parameters, weights, self.weight_info.name
            )

    class Registered(MergeMethod):  # type: ignore[misc]
        def __init__(self, method: type[Method]) -> None:
            self.method = method

        def name(self) -> str:
            return PREFIX + self.method.name

        def pretty_name(self) -> str:
            return f"{self.method.title} (freemerge)"

        def reference_url(self) -> str | None:
            return _reference(self.method)

        def parameters(self) -> list[Any]:
            return [ConfigParameterDef(name=name) for name in parameters_for_hosts(self.method)]

        def tensor_parameters(self) -> list[Any]:
            return [ConfigParameterDef(name=WEIGHT)]

        def make_task(
            self,
            *,
            output_weight: Any,
            tensors: Any,
            parameters: Any,
            tensor_parameters: Any,
            base_model: Any,
            **_: Any,
        ) -> Any:
            return Merge(
                method=self.method.name,
                gather_tensors=tensors,
                base_model=base_model,
                parameters=parameters,
                tensor_parameters=tensor_parameters,
                weight_info=output_weight,
            )

    for method in METHODS.values():
        REGISTERED_MERGE_METHODS[PREFIX + method.name] = Registered(method)


if hasattr(merge_methods, "register"):
    _register_kernels()
else:
    _register_tasks()


def run_yaml(arguments: Sequence[str], parent: Context) -> None:
    """mergekit's command ``mergekit-yaml`` with freemerge's methods, as one of another command."""
    from mergekit.scripts.run_yaml import main

    with main.make_context("mergekit-yaml", list(arguments), parent=parent) as context:
        main.invoke(context)
