"""Quantised weights: float8 with its scales is read as float32; packed formats are recognised and refused."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from itertools import accumulate

import torch

from ..errors import CheckpointError
from .architecture import read_config
from .reader import Checkpoint
from .spec import TensorSpec
from .views import Wrapped

FLOAT8 = frozenset(
    getattr(torch, name)
    for name in ("float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz")
    if hasattr(torch, name)
)
QUANTISATION = ("quantization_config", "compression_config")  # entries of config.json
# What scales of activations are called.
_OF_LAYERS = ("input_scale", "activation_scale", "output_scale", "scale_input", "input_scale_ub", "input_scale_inv")
_OF_CACHES = ("q_scale", "k_scale", "v_scale", "kv_scale", "prob_scale", "prob_output_scale")
_BLOCK = 128  # of DeepSeek's format, where the config does not say

_WITH_TRANSFORMERS = "dequantise it first, for instance with transformers: torch.save({}.state_dict(), 'NEW.bin')"
_BITSANDBYTES = _WITH_TRANSFORMERS.format("AutoModelForCausalLM.from_pretrained(PATH).dequantize()")
_MXFP4 = _WITH_TRANSFORMERS.format(
    "AutoModelForCausalLM.from_pretrained(PATH, quantization_config=Mxfp4Config(dequantize=True))"
)
_ORIGINAL = (
    "its weights cannot be restored exactly; merge the model that it was quantised from, and quantise the result"
)
# What marks a format among the names of tensors, and the way out.
_PACKED = {
    "bitsandbytes, 4 bit": (
        re.compile(r"\.(quant_state\.bitsandbytes__\w+|nested_absmax|absmax|quant_map)$"),
        _BITSANDBYTES,
    ),
    "bitsandbytes, 8 bit": (re.compile(r"\.SCB$"), _BITSANDBYTES),
    "GPTQ": (re.compile(r"\.(g_idx|qweight_type)$"), _ORIGINAL),
    "AWQ or GPTQ": (re.compile(r"\.(qweight|qzeros)$"), _ORIGINAL),
    "compressed-tensors": (re.compile(r"\.(weight_packed|weight_zero_point|weight_global_scale)$"), _ORIGINAL),
    "torchao": (re.compile(r"[._](weight_qdata|weight_scale_and_zero)$"), _ORIGINAL),
    "HQQ": (re.compile(r"\.W_q$"), _ORIGINAL),
    "AQLM": (re.compile(r"\.codebooks$"), _ORIGINAL),
    "quanto": (re.compile(r"\.weight\._data$"), _ORIGINAL),
    "EETQ": (re.compile(r"\.weight_scales$"), _ORIGINAL),
    "SpQR": (re.compile(r"\.(dense_weights|row_offsets)$"), _ORIGINAL),
    "VPTQ": (re.compile(r"\.(res_)?centroids\.weight$"), _ORIGINAL),
    "SmoothQuant": (re.compile(r"\.(deq_scale|quant_bias)$"), _ORIGINAL),
}
_ANY_PACKED = re.compile("|".join(pattern.pattern for pattern, _ in _PACKED.values()))
_INTEGERS = frozenset({torch.int8, torch.uint8, torch.int16, torch.int32})
_NO_WEIGHT = re.compile(r"mask|bias|ids|index|position|token|offset|count|step|stat", re.IGNORECASE)


FLOAT8_ADVICE = (
    "float8 without a scale, which cannot be merged as it is; if its values are the weights themselves, convert all "
    "models first, as in {name: tensor.to(torch.bfloat16) for name, tensor in state.items()}"
)


def dequantised(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint in floating point: itself, or a view that multiplies float8 by its scales.

    Raises CheckpointError, saying what to do, for weights that are packed. Float8 without a scale stays what it is: it
    can be copied, but not merged.
    """
    config = _quantisation(checkpoint)
    packed = _packed(checkpoint, "quant_method" in config)
    if packed is not None:
        kind, name, advice = packed
        raise CheckpointError(f"{checkpoint.label} is quantised ({config.get('quant_method', kind)}: {name}); {advice}")
    specs = checkpoint.specs
    scales = {name: _scale_of(name, specs) for name, spec in specs.items() if spec.dtype in FLOAT8}
    weights = {name: scale for name, scale in scales.items() if scale}
    return Dequantised(checkpoint, weights, config.get("weight_block_size")) if weights else checkpoint


def _packed(checkpoint: Checkpoint, declared: bool) -> tuple[str, str, str] | None:
    """The format, a tensor that shows it, and the way out, of weights that are integers with scales.

    A name says so only where the config does, too, or its module holds integers.
    """
    # A name is searched once for the endings of all formats, as hardly ever there is one.
    suspects = {name: end.start() for name in checkpoint.specs if (end := _ANY_PACKED.search(name))}
    if suspects and not declared:
        stored = [name for name, spec in checkpoint.specs.items() if spec.ndim and _holds_codes(spec.dtype)]
        modules = {module for name in stored for module in accumulate(name.split("."), "{}.{}".format)}
        suspects = {name: begin for name, begin in suspects.items() if name[:begin].rstrip(".") in modules}
    for kind, (pattern, advice) in _PACKED.items():
        found = next((name for name in suspects if pattern.search(name)), None)
        if found is not None:
            return kind, found, advice
    for name, spec in checkpoint.specs.items():
        if spec.dtype == torch.uint8 and name.endswith("_blocks") and f"{name[:-7]}_scales" in checkpoint.specs:
            return "MXFP4", name, _MXFP4
        if not spec.dtype.is_floating_point and _scale_of(name, checkpoint.specs):
            return spec.dtype_name, name, _ORIGINAL
    return _mostly_integers(checkpoint)


def _holds_codes(dtype: torch.dtype) -> bool:
    return dtype in FLOAT8 or not (dtype.is_floating_point or dtype.is_complex or dtype == torch.bool)


def _mostly_integers(checkpoint: Checkpoint) -> tuple[str, str, str] | None:
    """A format that is not known by name: weights that are integers, or integers that fill most of the checkpoint."""
    packed = [s for n, s in checkpoint.specs.items() if s.dtype in _INTEGERS and s.ndim and not _NO_WEIGHT.search(n)]
    weights = [spec for spec in packed if spec.name.endswith(".weight")]
    if not packed:
        return None
    if not weights and 2 * sum(spec.nbytes for spec in packed) < sum(s.nbytes for s in checkpoint.specs.values()):
        return None
    largest = max(weights or packed, key=lambda spec: spec.nbytes)
    return largest.dtype_name, largest.name, _ORIGINAL


class Dequantised(Wrapped):
    """Float8 weights times their scales, in float32; the scales, and those of activations, are no tensors any more."""

    def __init__(self, inner: Checkpoint, scales: Mapping[str, str], block: object) -> None:
        super().__init__(inner, {name: (name, scale) for name, scale in scales.items()}, scales)
        self.dequantised = self.widened = True
        self.metadata = {key: said for key, said in inner.metadata.items() if "quant" not in key}  # no longer true
        self._scales = scales
        gone = {*scales.values(), *_activation_scales(inner.specs, scales), "scaled_fp8"}
        self.specs = {
            name: spec.with_dtype(torch.float32) if name in scales else spec
            for name, spec in inner.specs.items()
            if name not in gone
        }
        self.tied = {name: first for name, first in inner.tied.items() if name in self.specs and first in self.specs}
        self.made = {name: self.specs[name].nbytes for name in scales}
        self._blocks = {
            name: self._block(inner.specs[name], inner.specs[scale], block) for name, scale in scales.items()
        }

    def read(self, name: str) -> torch.Tensor:
        return self._scaled(name, self.inner.read(name))

    def read_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        return self._scaled(name, self.inner.read_rows(name, start, stop), start)

    def _scaled(self, name: str, stored: torch.Tensor, first: int = 0) -> torch.Tensor:
        """Rows of a tensor from the ``first`` on, times their scales."""
        if name not in self._scales:
            return stored
        scale = _factors(self.inner.read(self._scales[name])).to(stored.device)
        values = stored.float()
        if scale.numel() == 1:
            return values.mul_(scale.reshape(()))
        block = self._blocks[name]
        if not block or values.ndim > 2:  # otherwise the rows that share a scale are those of the first dimension
            scale, first = scale[first : first + len(values)], 0
        if not block:
            return values.mul_(scale.reshape(scale.shape + (1,) * (values.ndim - scale.ndim)))
        height, width = block
        scale = scale.repeat_interleave(width, -1).narrow(-1, 0, values.shape[-1])
        for i in range(first // height, -(-(first + values.shape[-2]) // height)):
            begin = i * height - first
            values[..., max(0, begin) : begin + height, :].mul_(scale[..., i : i + 1, :])
        return values

    def _block(self, weight: TensorSpec, scale: TensorSpec, configured: object) -> tuple[int, int] | None:
        """How many rows and columns of a matrix share each scale; None where the scale broadcasts."""
        if scale.dtype != torch.uint8 and not scale.dtype.is_floating_point:
            raise CheckpointError(f"{self.label}: {scale.name} scales {weight.name} and is {scale.dtype_name}")
        if scale.numel == 1 or scale.shape in (weight.shape[:1], (*weight.shape[:-1], 1)):
            return None
        known = (_BLOCK, _BLOCK)
        if (
            isinstance(configured, list)
            and len(configured) == 2
            and all(isinstance(n, int) and n > 0 for n in configured)
        ):
            known = (configured[0], configured[1])
        if weight.ndim == scale.ndim >= 2:
            sides = weight.shape[-2:]
            even = tuple(max(1, -(-size // max(1, count))) for size, count in zip(sides, scale.shape[-2:], strict=True))
            for height, width in (known, even):
                expected = tuple(-(-size // block) for size, block in zip(sides, (height, width), strict=True))
                if scale.shape == (*weight.shape[:-2], *expected):
                    return height, width
        raise CheckpointError(
            f"{self.label}: {scale.name} {scale.shape} does not scale {weight.name} {weight.shape} by rows or blocks"
        )


def _factors(scale: torch.Tensor) -> torch.Tensor:
    """Scales as numbers: bytes are exponents of two, as in the OCP formats."""
    return torch.exp2(scale.float() - 127) if scale.dtype == torch.uint8 else scale.float()


def needless_quantisation(checkpoint: Checkpoint) -> str | None:
    """The method by which a config says that weights are quantised which are all floats; None for others."""
    if checkpoint.dequantised or any(spec.dtype in FLOAT8 for spec in checkpoint.specs.values()):
        return None
    config = read_config(checkpoint.directory)
    return None if without_quantisation(config) == config else str(_quantisation(checkpoint).get("quant_method"))


def without_quantisation(config: Mapping[str, object]) -> dict[str, object]:
    """A config, and those inside of it, that says nothing about quantised weights."""
    return {
        name: without_quantisation(value) if isinstance(value, dict) else value
        for name, value in config.items()
        if name not in QUANTISATION
    }


def _quantisation(checkpoint: Checkpoint) -> dict[str, object]:
    config = read_config(checkpoint.directory)
    for part in (config, *(value for value in config.values() if isinstance(value, dict))):
        for name in QUANTISATION:
            found = part.get(name)
            if isinstance(found, dict):
                return found
    return {}


def _scale_of(name: str, specs: Mapping[str, TensorSpec]) -> str | None:
    """The tensor that scales a quantised one."""
    stem, _, last = name.rpartition(".")
    dot = f"{stem}." if stem else ""
    named = [f"{name}_scale_inv", f"{name}_scale", f"{dot}scale_{last}"]
    if last == "weight" and specs[name].dtype in FLOAT8:  # any other layer may have a scale of its own
        named.append(f"{dot}scale")
    return next((scale for scale in named if scale in specs), None)


def _activation_scales(names: Iterable[str], weights: Iterable[str]) -> set[str]:
    """The scales of activations that belong to these weights: of a layer, or of the cache of an attention above it."""
    layers = {weight.removesuffix(".weight") for weight in weights if weight.endswith(".weight")}
    above = {stem for weight in weights for stem in accumulate(weight.split(".")[:-1], "{}.{}".format)} | {""}
    found = set()
    for name in names:
        stem, _, last = name.rpartition(".")
        if (last in _OF_LAYERS and stem in layers) or (last in _OF_CACHES and stem in above):
            found.add(name)
    return found
