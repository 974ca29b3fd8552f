"""Checkpoints in and out: lazy reading, preflight comparison, streaming and atomic writing, provenance."""

from .carry import carry_over
from .compare import compare
from .differences import Difference, diff
from .finite import check_finite
from .manifest import InputHashes, build_manifest, verify
from .model_card import model_card
from .opening import Inputs, open_inputs, open_model
from .reader import Checkpoint, Source
from .spec import MERGEABLE, TensorSpec
from .writer import DEFAULT_MEMORY, DEFAULT_SHARD_BYTES, CheckpointWriter

__all__ = [
    "DEFAULT_MEMORY",
    "DEFAULT_SHARD_BYTES",
    "MERGEABLE",
    "Checkpoint",
    "CheckpointWriter",
    "Difference",
    "InputHashes",
    "Inputs",
    "Source",
    "TensorSpec",
    "build_manifest",
    "carry_over",
    "check_finite",
    "compare",
    "diff",
    "model_card",
    "open_inputs",
    "open_model",
    "verify",
]
