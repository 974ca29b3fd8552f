"""FR-Merging, FREE-Merging and every other method of freemerge as algorithms of FusionBench.

``conf/method/freemerge`` beside this file holds their configurations: ``fusion_bench --config-dir CONF
method=freemerge/fr method.recipe.cutoff=0.2``. ``recipe`` is a recipe of freemerge, of any method, as plain data.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from contextlib import ExitStack
from copy import deepcopy
from typing import Any

from fusion_bench import BaseAlgorithm, BaseModelPool, auto_register_config
from fusion_bench.models.modulator import ModulatedModel, TaskModulator
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from ..dense import overwrite
from ..errors import ArgumentError, CheckpointError
from ..experts import Expert, ExpertBank, extract_experts
from ..experts.values import LowRankTensor, SparseTensor, coding_of
from ..merging.recipe import Recipe
from ..merging.run import merge


@auto_register_config
class Merging(BaseAlgorithm):  # type: ignore[misc]
    """Merges the models of a pool into its ``_pretrained_`` model, by a recipe.

    Args:
        recipe: fields of a :class:`freemerge.Recipe`; nothing is FR-Merging.
        inplace: write into the pretrained model of the pool, instead of a copy of it. Lazy state dicts are read tensor
            by tensor and become a new module.
    """

    recipe: Any
    inplace: bool

    def __init__(self, recipe: Mapping[str, Any] | None = None, inplace: bool = True, **kwargs: Any) -> None:
        super().__init__(**kwargs)

    def run(self, modelpool: BaseModelPool | dict[str, nn.Module]) -> nn.Module:
        """The merged model."""
        base, models = _models(modelpool)
        return self.merged(base, models)

    def checked_recipe(self) -> Recipe:
        """The recipe of the configuration."""
        return Recipe.from_config(_plain("recipe", self.recipe))

    def merged(self, base: Any, models: Mapping[str, Any]) -> nn.Module:
        """The merged model of modules or lazy state dicts."""
        recipe = self.checked_recipe()
        if isinstance(base, nn.Module):
            model = base if self.inplace else deepcopy(base)
            merge(base, [*models.values()], recipe, into=model)
            return model
        model = deepcopy(base.meta_module)  # without weights, but with buffers that no file holds
        dtypes = {name: tensor.dtype for name, tensor in model.state_dict().items()}
        state = merge(base, [*models.values()], recipe)
        state = {name: tensor.to(dtypes.get(name, tensor.dtype)) for name, tensor in state.items()}
        unknown = model.load_state_dict(state, strict=False, assign=True).unexpected_keys
        if unknown:
            raise CheckpointError(f"{type(model).__name__} has no tensors {', '.join(unknown[:5])}")
        if hasattr(model, "tie_weights"):
            model.tie_weights()
        left = [name for name, tensor in (*model.named_parameters(), *model.named_buffers()) if tensor.is_meta]
        if left:
            raise CheckpointError(f"{type(model).__name__} needs {', '.join(left[:5])}, which the merged model lacks")
        return model.to(base._device)  # type: ignore[no-any-return]


@auto_register_config
class FREEMerging(Merging):
    """FREE-Merging: the merged model, with a light expert for each model of the pool as a task modulator.

    Args:
        recipe, inplace: as of :class:`Merging`.
        experts: arguments of :func:`freemerge.extract_experts` such as ``density``, ``values`` and ``rescale``; masks
            and gains are refused. ``select`` and ``rename`` are those of the recipe unless they are given.
    """

    experts: Any

    def __init__(
        self,
        recipe: Mapping[str, Any] | None = None,
        experts: Mapping[str, Any] | None = None,
        inplace: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(recipe=recipe, inplace=inplace, **kwargs)

    def run(self, modelpool: BaseModelPool | dict[str, nn.Module]) -> ModulatedModel[nn.Module]:
        """The merged model; ``set_task(name)`` switches the expert of a task on, and that of the former one off."""
        recipe = self.checked_recipe()
        options = {"select": recipe.select, "rename": recipe.rename} | _plain("experts", self.experts)
        values = options.get("values")
        if values is not None and not issubclass(coding_of(values), SparseTensor | LowRankTensor):
            raise ArgumentError(f"experts: values {values} need the pretrained model, which is not kept")
        base, models = _models(modelpool)
        experts = extract_experts(base, models, **options)
        modulators = {name: ExpertModulator(expert) for name, expert in experts.items()}
        return ModulatedModel(self.merged(base, models), modulators)


class ExpertModulator(TaskModulator[nn.Module]):  # type: ignore[misc]
    """An expert of one task: added to the weights of the backbone, and taken away bit for bit, if it was moved, too."""

    def __init__(self, expert: Expert) -> None:
        super().__init__()
        self.expert = expert
        self._on = ExitStack()
        weakref.finalize(self, self._on.close)  # at the end of the process, while torch can still do it

    def apply(self, modulated_model: ModulatedModel[nn.Module]) -> None:
        """Add the expert."""
        backbone = modulated_model.backbone
        bank = ExpertBank(backbone, {"expert": self.expert})
        with ExitStack() as on:
            former = {name: tensor for name, tensor in _tensors(backbone).items() if self._changes(name)}
            on.callback(_follow, backbone, former)  # after the expert was taken away
            on.enter_context(bank.active("expert"))
            self._on.push(on.pop_all())

    def _changes(self, name: str) -> bool:
        return name in self.expert.tensors or name in self.expert.statistics

    def remove(self, modulated_model: ModulatedModel[nn.Module]) -> None:
        """Take it away."""
        self._on.close()
        modulated_model._current_task = None  # set_task checks it


def _models(modelpool: BaseModelPool | dict[str, nn.Module]) -> tuple[Any, dict[str, Any]]:
    """The pretrained model and the others by name."""
    pool = modelpool if isinstance(modelpool, BaseModelPool) else BaseModelPool(modelpool)
    return pool.load_pretrained_model(), {name: pool.load_model(name) for name in pool.model_names}


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    """What a module holds now, by all names: a conversion gives it other memory, and leaves this as it is."""
    everything = *module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)
    return {name: tensor.detach() for name, tensor in everything}


def _follow(module: nn.Module, former: Mapping[str, Tensor]) -> None:
    """Write the former tensors to where a module has been moved, or converted, since."""
    for name, tensor in _tensors(module).items():
        if name in former and tensor.data_ptr() != former[name].data_ptr():
            overwrite(tensor, former[name])


def _plain(argument: str, config: Any) -> dict[str, Any]:
    if isinstance(config, DictConfig):
        config = OmegaConf.to_container(config, resolve=True)
    if not isinstance(config, Mapping | None):
        raise ArgumentError(f"{argument} must be a mapping of fields, got {type(config).__name__}")
    return dict(config or {})
