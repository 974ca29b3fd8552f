"""The adapter_config.json of PEFT: which options a merge follows, which do not matter to it, which are refused."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from .adapter_patterns import Patterns
from .json_file import read_json

# Records of training and loading; what they did shows in the weights.
_RECORDS = frozenset(
    {"auto_mapping", "base_model_name_or_path", "inference_mode", "peft_type", "peft_version", "revision", "task_type"}
)
# What the names in the file tell.
_TARGETS = frozenset({"target_modules", "exclude_modules", "modules_to_save"})
NO_EFFECT = {
    "LORA": _RECORDS
    | _TARGETS
    | {
        "lora_dropout",
        "layers_to_transform",
        "layers_pattern",
        "megatron_core",
        "qalora_group_size",
        "ensure_weight_tying",
    }
    | {"runtime_config", "loftq_config", "eva_config", "corda_config", "lora_ga_config"},  # of init_lora_weights
    "IA3": _RECORDS | _TARGETS | {"init_ia3_weights"},
}
FOLLOWED = {
    "LORA": frozenset({"r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "bias"})
    | {"lora_bias", "fan_in_fan_out", "init_lora_weights"},
    "IA3": frozenset({"feedforward_modules", "fan_in_fan_out"}),
}
# Beyond these, any option that is set is refused, known or not: it may change what A and B mean.
_PEFT_CANNOT_MERGE = {
    "alora_invocation_tokens": "it acts on the tokens after its invocation only",
    "arrow_config": "it mixes adapters token by token",
    "use_qalora": "it acts on pooled inputs of quantised layers",
}
_WITHOUT_WEIGHTS = frozenset(
    {"ADAPTION_PROMPT", "CARTRIDGE", "CPT", "MULTITASK_PROMPT_TUNING", "PREFIX_TUNING", "PROMPT_TUNING", "P_TUNING"}
)
_INITIALISATIONS = frozenset({"gaussian", "eva", "orthogonal", "mica", "pissa", "olora"})
WAY_OUT = "merge it with PEFT, as in PeftModel.from_pretrained(base, ADAPTER).merge_and_unload(), and pass that module"


@dataclass(frozen=True)
class AdapterConfig:
    """The options that matter, checked. ``kind`` is LORA or IA3; ``path`` is for messages."""

    path: Path
    kind: str
    options: Mapping[str, Any]
    patterns: Patterns = field(default_factory=Patterns)

    @staticmethod
    def read(path: Path) -> AdapterConfig:
        """Raises CheckpointError, naming the option, for adapters that freemerge does not merge as PEFT does."""
        options = read_json(path)
        if not isinstance(options, dict):
            raise CheckpointError(f"{path}: not a JSON object")
        kind = options.get("peft_type")
        if not isinstance(kind, str) or kind not in FOLLOWED:
            raise CheckpointError(f"{path}: peft_type is {kind!r}; only LORA and IA3 are merged{_advice(kind)}")
        for name, value in options.items():
            if value and name not in NO_EFFECT[kind] and name not in FOLLOWED[kind]:
                reason = _PEFT_CANNOT_MERGE.get(name)
                way_out = f"PEFT cannot merge such an adapter either: {reason}" if reason else WAY_OUT
                raise CheckpointError(f"{path}: adapters with {name[:80]} are not merged here; {way_out}")
        config = AdapterConfig(path, kind, options)
        if kind == "LORA":
            config._check_initialisation()
        for option in ("rank_pattern", "alpha_pattern", "feedforward_modules"):
            config._check_patterns(option)
        return config

    def flag(self, name: str) -> bool:
        return bool(self.options.get(name))

    @property
    def initialisation(self) -> str:
        """What the initialisation took out of the base's matrices: "pissa", "olora", or "" for nothing."""
        init = self.options.get("init_lora_weights")
        return init if init in ("pissa", "olora") else ""

    def rank(self, module: str) -> int | None:
        """The rank that the config gives a module, None if it gives none."""
        rank = self._for_module("rank_pattern", "r", module)
        if rank is not None and (not isinstance(rank, int) or isinstance(rank, bool)):
            raise CheckpointError(f"{self.path}: r or rank_pattern of {module} must be an integer, not {rank!r:.50}")
        return rank

    def scale(self, module: str, rank: int) -> float:
        """lora_alpha / r of one module, or lora_alpha / sqrt(r) with rsLoRA."""
        alpha = self._for_module("alpha_pattern", "lora_alpha", module)
        try:
            number = float(alpha) if isinstance(alpha, (int, float)) and not isinstance(alpha, bool) else math.nan
        except OverflowError:
            number = math.inf
        if not math.isfinite(number):
            shown = repr(alpha) if len(repr(alpha)) < 50 else "a number out of range"
            raise CheckpointError(f"{self.path}: lora_alpha or alpha_pattern of {module} must be a number, not {shown}")
        return number / (math.sqrt(rank) if self.flag("use_rslora") else rank)

    def is_feedforward(self, module: str) -> bool:
        """A list of names holds endings of the module's path; a string is a pattern for all of it."""
        feedforward = self.options.get("feedforward_modules") or []
        if isinstance(feedforward, str):
            return self._ask("feedforward_modules", self.patterns.fits_all, feedforward, module)
        return module.endswith(tuple(map(str, feedforward)))

    def _for_module(self, patterns: str, default: str, module: str) -> object:
        for pattern, value in (self.options.get(patterns) or {}).items():
            if self._ask(patterns, self.patterns.fits, pattern, module):
                return value
        return self.options.get(default)

    def _check_initialisation(self) -> None:
        init = self.options.get("init_lora_weights")
        if isinstance(init, bool) or init is None or (isinstance(init, str) and init in _INITIALISATIONS):
            return
        raise CheckpointError(
            f"{self.path}: init_lora_weights {init!r} changed the base's weights before training, and the adapter does "
            "not hold that change; pass the full model that merge_and_unload() gives in the process that trained it"
        )

    def _check_patterns(self, name: str) -> None:
        given = self.options.get(name) or {}
        if name == "feedforward_modules":
            if not isinstance(given, (str, list, dict)) or (given and isinstance(given, dict)):
                raise CheckpointError(f"{self.path}: {name} must be a pattern or a list of names")
            given = [given] if isinstance(given, str) else []
        elif not isinstance(given, dict):
            raise CheckpointError(f"{self.path}: {name} must map patterns to numbers, got a {type(given).__name__}")
        for pattern in given:
            try:
                self.patterns.check(pattern)
            except ValueError as error:
                raise CheckpointError(f"{self.path}: {name}: {error}") from None

    def _ask(self, name: str, ask: Callable[[str, str], bool], pattern: object, module: str) -> bool:
        try:
            return ask(str(pattern), module)
        except ValueError as error:
            raise CheckpointError(f"{self.path}: {name}: {error}") from None


def _advice(kind: object) -> str:
    if not isinstance(kind, str):
        return ""
    return ", and this kind changes no weights: it cannot be merged" if kind in _WITHOUT_WEIGHTS else f"; {WAY_OUT}"
