"""The compiled CUDA module ``_cuda``: whether it can run on this machine, and on which stream."""

from __future__ import annotations

import atexit
import importlib
import re
import sysconfig
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import torch

from ..errors import CudaError
from ..lazy import cached_property

#: Storage dtypes of the device kernels; arithmetic is float32.
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

Capability = tuple[int, int]
"""The compute capability of a GPU: major and minor version."""

_EMULATED: Capability = (9, 0)


class Stream(NamedTuple):
    """Where a call works: a device index, the handle of its current stream, and whether that records a graph."""

    device: int
    handle: int
    capturing: bool


class Runtime:
    """The module, loaded when first asked for. ``module`` and ``device_type`` exist for tests, which run the same
    sources on CPU tensors."""

    def __init__(self, module: ModuleType | None = None, device_type: str = "cuda") -> None:
        self._given = module
        self.device_type = device_type

    @cached_property
    def module(self) -> ModuleType:
        """The compiled module; ImportError if there is none."""
        return self._given if self._given is not None else importlib.import_module("freemerge._cuda")

    @cached_property
    def state(self) -> tuple[str, dict[str, str]]:
        """Why CUDA cannot be used here and what would help, or an empty string; and details if it can."""
        details: dict[str, str] = {}
        return self._unavailable(details), details

    def covers(self, device: torch.device) -> bool:
        """Whether the module has code for a GPU."""
        return covers(self.module.ARCHITECTURES, self.capability(device))

    def capability(self, device: torch.device) -> Capability:
        """What torch says of a GPU."""
        return torch.cuda.get_device_capability(device) if self.device_type == "cuda" else _EMULATED

    def stream(self, device: torch.device) -> Stream:
        """torch's current stream on a device."""
        index, handle = self.place(device)
        if self.device_type != "cuda":
            return Stream(index, handle, False)
        with torch.cuda.device(index) if index != torch.cuda.current_device() else nullcontext():
            return Stream(index, handle, torch.cuda.is_current_stream_capturing())

    def place(self, device: torch.device) -> tuple[int, int]:
        """A device's index and the handle of torch's current stream on it: what :meth:`stream` says at a third of its
        cost, for calls that are as quick as a lookup."""
        if self.device_type != "cuda":
            return 0, 0
        index = torch.cuda.current_device() if device.index is None else device.index
        return index, torch.cuda.current_stream(index).cuda_stream

    def _unavailable(self, details: dict[str, str]) -> str:
        try:
            module = self.module
        except ModuleNotFoundError:
            return (
                "this freemerge was built without CUDA; install the CUDA toolkit (nvcc), then reinstall freemerge from "
                "source with FREEMERGE_CUDA=ON in the environment"
            )
        except ImportError as error:
            return f"its extension module cannot be loaded: {error}"
        on_gpu = self.device_type == "cuda"
        if on_gpu and torch.version.cuda is None:
            return f"torch {torch.__version__} was built without CUDA; install a CUDA build of torch"
        try:
            count = module.device_count()
        except CudaError as error:
            return f"no usable GPU or driver: {error}"
        if on_gpu and not torch.cuda.is_available():
            return "torch.cuda.is_available() is False although the driver reports a GPU; torch may need a newer driver"
        devices = [torch.device(self.device_type, i) for i in range(torch.cuda.device_count() if on_gpu else 1)]
        if not any(map(self.covers, devices)):
            found = ", ".join(dict.fromkeys("{}.{}".format(*self.capability(device)) for device in devices))
            return (
                f"it has no code for a GPU of compute capability {found}, only for {module.ARCHITECTURES}; reinstall "
                "freemerge from source on this machine, or name the architecture in CUDAARCHS"
            )
        try:
            path, version = module.open_cufft([str(file) for file in _cufft_candidates()])
        except CudaError as error:
            wheel = "nvidia-cufft-cu12" if (torch.version.cuda or "13").startswith("12") else "nvidia-cufft"
            return f"cuFFT is missing: pip install {wheel}, or name the library in FREEMERGE_CUFFT ({error})"
        details |= {"devices": str(count), "cufft": path, "cufft version": str(version)}
        if on_gpu:
            details["device 0"] = torch.cuda.get_device_name(0)
        atexit.register(module.clear_fft_cache)  # while the driver is still there
        return ""


def covers(architectures: str, capability: Capability) -> bool:
    """Whether code for some architectures, as CMake names them, runs on GPUs of a compute capability.

    Real code runs on the same major version from its own minor on, virtual code (PTX) on all that are later; a number
    alone is both. With an f (100f) PTX runs where real code does, with an a (90a) both run on exactly that. Names such
    as ``native`` say nothing, so they cover all.
    """
    return any(_covers(name, capability) for name in architectures.split())


def _covers(name: str, capability: Capability) -> bool:
    parts = re.fullmatch(r"(\d+)(\d)([af]?)(?:-(real|virtual))?", name)
    if parts is None:
        return True
    own, letter, kind = (int(parts[1]), int(parts[2])), parts[3], parts[4]
    if letter == "a":
        return capability == own
    within = letter == "f" or kind == "real"
    return capability >= own and (capability[0] == own[0] or not within)


def _cufft_candidates() -> list[Path]:
    """cuFFT as the wheels of NVIDIA install it: for CUDA 13, and for CUDA 12."""
    roots = dict.fromkeys(Path(sysconfig.get_path(name)) for name in ("purelib", "platlib"))
    folders = [root / "nvidia" / folder / "lib" for root in roots for folder in ("cu13", "cufft")]
    return [file for folder in folders for file in sorted(folder.glob("libcufft.so.*"))]
