"""Merge fine-tuned models in the frequency domain: FR-Merging and FREE-Merging.

What most people need is listed in ``__all__``. Families have modules of their own: :mod:`freemerge.responses`,
:mod:`freemerge.errors` and :mod:`freemerge.methods`, of which all but the methods can be imported from here, too.
"""

__version__: str

from . import errors as errors
from . import methods as methods
from . import responses as responses
from .analysis import Analysis as Analysis
from .analysis import analyze
from .backends.registry import backends
from .checkpoint import Difference as Difference
from .checkpoint import diff as diff
from .checkpoint import verify
from .errors import ArgumentError as ArgumentError
from .errors import BackendError as BackendError
from .errors import CheckpointError as CheckpointError
from .errors import CudaError as CudaError
from .errors import FreemergeError as FreemergeError
from .errors import RefusedError as RefusedError
from .errors import WorkerError as WorkerError
from .evaluation import Evaluation as Evaluation
from .evaluation import Sweep as Sweep
from .evaluation import evaluate
from .evaluation import evaluate_experts as evaluate_experts
from .evaluation import sweep as sweep
from .experts import Expert as Expert
from .experts import ExpertBank, RoutedModel, Router, extract_experts
from .experts import Routed as Routed
from .experts import SavedExpert as SavedExpert
from .experts import iter_experts as iter_experts
from .experts import save_experts as save_experts
from .filter import explain, filter_, filtered
from .lora import Lora as Lora
from .lora import extract_lora as extract_lora
from .merging.inspection import Decision as Decision
from .merging.inspection import Inspection as Inspection
from .merging.recipe import Recipe
from .merging.run import Report as Report
from .merging.run import inspect, merge, merge_checkpoints, task_weights
from .merging.selection import Rule as Rule
from .merging.selection import Split as Split
from .merging.selection import Stack as Stack
from .merging.stages import Stage as Stage
from .merging.tensors import merge_deltas, merge_tensors
from .responses import BandGain as BandGain
from .responses import BandPass as BandPass
from .responses import BandStop as BandStop
from .responses import Butterworth as Butterworth
from .responses import Center as Center
from .responses import Custom as Custom
from .responses import Gaussian as Gaussian
from .responses import HighPass
from .responses import LowPass as LowPass
from .responses import Official as Official
from .responses import Response as Response
from .tuning import Tuned as Tuned
from .tuning import tune as tune

__all__ = [
    "ExpertBank",
    "HighPass",
    "Recipe",
    "RoutedModel",
    "Router",
    "analyze",
    "backends",
    "evaluate",
    "explain",
    "extract_experts",
    "filter_",
    "filtered",
    "inspect",
    "merge",
    "merge_checkpoints",
    "merge_deltas",
    "merge_tensors",
    "task_weights",
    "verify",
]
