"""Damaged inputs of every kind, made from valid ones: each is read or ends in a FreemergeError, soon, in little
memory.

    python tests/checkpoint/fuzz.py --seconds 600 --seed 1     # prints each fault with the number of its case
    python tests/checkpoint/fuzz.py --seed 1 --case 1234       # that case again

A case is made from the seed and its number alone.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import os
import pickle
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from safetensors.torch import save, save_file

import freemerge as fm

SECONDS, MEGABYTES = 30, 200  # a case that takes so long hangs
CODE_EVENTS = (
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "subprocess.Popen",
    "os.remove",
    "shutil.rmtree",
    "socket.connect",
)

WORDS: list[Any] = [
    None, True, -1, 0, 1, 2, 255, 1 << 31, 1 << 63, 10**30, 0.5, -0.0, 1e300, float("nan"), float("inf"), "", "0", "*",
    "../secret", "/etc/passwd", "a" * 5000, "\ud800", "\x1b[2J", "F32", "BF16", "I64", "F8_E4M3", "lora_A",
    "all-linear", "(a+)+$", "(", ".*", "LORA", "IA3", "LOHA", "model.safetensors", [], {}, [[]], [0, 0],
    [1 << 40, 1 << 40], {"r": 0},
]  # fmt: skip
BYTES = [
    b"\0",
    b"\xff",
    b"\0" * 8,
    b"\xff" * 8,
    b"../",
    b"PK\x03\x04",
    b"{",
    b"}",
    b"[" * 2000,
    b"cos\nsystem\n",
    b"\x80\x02]",
]

NUMBERS = [
    pickle.dumps(number, 2)[2:-1] for number in (0, 1, 2, -1, 7, 255, 20000, 2**31 - 1, 2**31, 2**62, 2**63, 2**70)
]


@dataclass
class Fault:
    """What went wrong in a case, and what was done to which input."""

    case: int
    told: str


def make_inputs(folder: Path) -> list[str]:
    """A base, and valid models and adapters of it of every kind, each in a folder; their names."""
    generator = torch.Generator().manual_seed(0)

    def state(seed: int) -> dict[str, torch.Tensor]:
        generator.manual_seed(seed)
        layers = {f"model.layers.{i}.q_proj.weight": torch.randn(8, 6, generator=generator) for i in range(2)}
        norms = {f"model.layers.{i}.norm.weight": torch.randn(6, generator=generator).bfloat16() for i in range(2)}
        return {**layers, **norms, "model.embed.weight": torch.randn(10, 6, generator=generator)}

    config = json.dumps({"model_type": "llama", "tie_word_embeddings": False, "torch_dtype": "float32"})

    def directory(name: str) -> Path:
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(config)
        return folder / name

    save_file(state(0), directory("base") / "model.safetensors")
    save_file(state(1), directory("single") / "model.safetensors")
    sharded, names = directory("sharded"), list(state(2))
    files = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    for i, file in enumerate(files):
        save_file({name: state(2)[name] for name in names[i::2]}, sharded / file, metadata={"format": "pt"})
    weight_map = {name: files[i % 2] for i, name in enumerate(names)}
    (sharded / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    torch.save(state(3), directory("pickled") / "pytorch_model.bin")
    torch.save(
        {"state_dict": state(4), "step": 3},
        directory("legacy") / "pytorch_model.bin",
        _use_new_zipfile_serialization=False,
    )
    base_8 = {"scale": torch.ones(1), "weight": torch.randn(8, 6, generator=generator).to(torch.float8_e4m3fn)}
    float8 = state(5) | {
        "model.layers.0.q_proj.weight": base_8["weight"],
        "model.layers.0.q_proj.weight_scale": base_8["scale"],
    }
    save_file(float8, directory("float8") / "model.safetensors")

    prefix = "base_model.model.model.layers"
    lora = {
        f"{prefix}.{i}.q_proj.lora_{k}.weight": torch.randn((2, 6) if k == "A" else (8, 2))
        for i in range(2)
        for k in "AB"
    }
    options = {
        "peft_type": "LORA",
        "r": 2,
        "lora_alpha": 4,
        "target_modules": ["q_proj"],
        "bias": "none",
        "use_dora": False,
        "rank_pattern": {},
        "alpha_pattern": {},
        "fan_in_fan_out": False,
        "modules_to_save": None,
    }
    for name in ("lora", "lora_bin", "dora", "ia3"):
        (folder / name).mkdir()
        tensors, chosen = dict(lora), dict(options)
        if name == "dora":
            tensors |= {f"{prefix}.{i}.q_proj.lora_magnitude_vector": torch.rand(8) for i in range(2)}
            chosen["use_dora"] = True
        if name == "ia3":
            tensors = {f"{prefix}.{i}.q_proj.ia3_l": torch.rand(8, 1) for i in range(2)}
            chosen = {
                "peft_type": "IA3",
                "target_modules": ["q_proj"],
                "feedforward_modules": [],
                "fan_in_fan_out": False,
            }
        (folder / name / "adapter_config.json").write_text(json.dumps(chosen))
        if name == "lora_bin":
            torch.save(tensors, folder / name / "adapter_model.bin")
        else:
            (folder / name / "adapter_model.safetensors").write_bytes(save(tensors))
    return sorted(path.name for path in folder.iterdir())


class Mutator:
    """Changes one thing or a few in the files of an input."""

    def __init__(self, chance: random.Random, folder: Path, secret: Path) -> None:
        self._chance, self._folder, self._secret = chance, folder, secret
        self.told: list[str] = []

    def mutate(self) -> None:
        for _ in range(self._chance.choice([1, 1, 1, 2, 4])):
            files = sorted(path for path in self._folder.iterdir() if path.is_file() and not path.is_symlink())
            if not files:
                return
            path = self._chance.choice(files)
            change = self._chance.choice([self._bytes, self._structure, self._structure, self._structure, self._file])
            self.told.append(f"{change.__name__[1:]} of {path.name}")
            change(path)

    def _structure(self, path: Path) -> None:
        data = path.read_bytes()
        if path.suffix == ".json":
            path.write_text(self._json(data.decode("utf-8", "replace")), encoding="utf-8", errors="replace")
        elif path.suffix == ".safetensors" and len(data) > 8:
            length = int.from_bytes(data[:8], "little")
            header = self._json(data[8 : 8 + length].decode("utf-8", "replace")).encode("utf-8", "replace")
            path.write_bytes(len(header).to_bytes(8, "little") + header + data[8 + length :])
        elif zipfile.is_zipfile(path):
            self._zip(path)
        else:
            path.write_bytes(self._numbers(data))

    def _json(self, text: str) -> str:
        try:
            content = json.loads(text)
        except (ValueError, RecursionError):
            return text
        places: list[tuple[Any, Any]] = []

        def walk(node: Any) -> None:
            items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
            for key, value in items:
                places.append((node, key))
                walk(value)

        walk(content)
        if not places:
            return json.dumps(self._chance.choice(WORDS))
        node, key = self._chance.choice(places)
        what = self._chance.randrange(6)
        if what == 0:
            del node[key]
        elif what == 1 and isinstance(node, dict):
            node[str(self._chance.choice(WORDS))] = node.pop(key)
        elif what == 2:
            other, place = self._chance.choice(places)
            node[key] = (
                json.loads(json.dumps(other[place])) if place in range(len(other)) or isinstance(other, dict) else 0
            )
        elif what == 3 and isinstance(node[key], int):
            node[key] += self._chance.choice([-1, 1, 8, 1 << 20, -(1 << 20)])
        else:
            node[key] = self._chance.choice(WORDS)
        return json.dumps(content)

    def _zip(self, path: Path) -> None:
        """Members changed, renamed, lost, doubled, packed or blown up; their checksums are right."""
        try:
            with zipfile.ZipFile(io.BytesIO(path.read_bytes())) as archive:
                members = [(info.filename, archive.read(info)) for info in archive.infolist() if not info.is_dir()]
        except (zipfile.BadZipFile, NotImplementedError, RuntimeError, OSError, ValueError, EOFError, zlib.error):
            return  # damaged before
        index = self._chance.randrange(len(members))
        name, data = members[index]
        what = self._chance.randrange(6)
        packing = zipfile.ZIP_STORED
        if what <= 1:
            pickles = [i for i, (member, _) in enumerate(members) if member.endswith("data.pkl")]
            index = self._chance.choice(pickles or [index])
            change = self._damaged if what else self._numbers
            members[index] = (members[index][0], change(members[index][1]))
        elif what == 2:
            members[index] = (str(self._chance.choice(["../secret", "/x", name + "x", "archive/data.pkl", ""])), data)
        elif what == 3:
            del members[index]
        elif what == 4:
            packing = zipfile.ZIP_DEFLATED
            members[index] = (name, data + bytes(self._chance.choice([0, 1, 1 << 22])))
        else:
            members.append((name + self._chance.choice(["", "2"]), data))
        with warnings.catch_warnings(), zipfile.ZipFile(path, "w", packing) as archive:
            warnings.simplefilter("ignore")
            for member, content in members:
                archive.writestr(member or "x", content)

    def _numbers(self, data: bytes) -> bytes:
        """Another number in a pickle: of a shape, a stride, an offset, a size."""
        places = [place for place in range(len(data) - 1) if data[place] == pickle.BININT1[0]]
        for place in sorted(
            self._chance.sample(places, min(len(places), self._chance.choice([1, 1, 2, 4]))), reverse=True
        ):
            data = data[:place] + self._chance.choice(NUMBERS) + data[place + 2 :]
        return data

    def _bytes(self, path: Path) -> None:
        path.write_bytes(self._damaged(path.read_bytes()))

    def _damaged(self, data: bytes) -> bytes:
        for _ in range(self._chance.choice([1, 1, 2, 8])):
            place = self._chance.randrange(len(data) + 1)
            if self._chance.random() < 0.5:  # most of what matters is at the beginning or the end
                place = (
                    min(place, self._chance.randrange(1, 400))
                    if self._chance.random() < 0.7
                    else len(data) - place % 200
                )
            place = max(0, min(place, len(data)))
            what = self._chance.randrange(5)
            if what == 0:
                data = data[:place]
            elif what == 1:
                data = data[:place] + bytes([self._chance.randrange(256)]) + data[place + 1 :]
            elif what == 2:
                data = data[:place] + self._chance.choice(BYTES) + data[place:]
            elif what == 3:
                word = self._chance.choice(BYTES)
                data = data[:place] + word + data[place + len(word) :]
            else:
                data = data[:place] + data[place + self._chance.choice([1, 2, 16]) :]
        return data

    def _file(self, path: Path) -> None:
        """A file lost, doubled under another name, or something that is no file in its place."""
        what = self._chance.randrange(6)
        if what == 0:
            path.unlink()
        elif what == 1:
            names = [
                "model.safetensors",
                "pytorch_model.bin",
                "adapter_config.json",
                "config.json",
                "model.gguf",
                "x.safetensors",
            ]
            data, copy = path.read_bytes(), self._folder / self._chance.choice(names)
            if not copy.is_dir():
                copy.unlink(missing_ok=True)
                copy.write_bytes(data)
        elif what == 2:
            path.unlink()
            path.symlink_to(self._secret)
        elif what == 3:
            path.unlink()
            os.mkfifo(path)
        elif what == 4:
            path.unlink()
            path.mkdir()
        else:
            path.write_bytes(b"")


class Watch:
    """What a case must not do: open a file elsewhere, run something, hang."""

    def __init__(self) -> None:
        self.inside: Path | None = None
        self.found: list[str] = []
        known = {
            sys.prefix,
            sys.base_prefix,
            *sys.path,
            os.path.dirname(fm.__file__),
            "/proc",
            "/sys",
            "/dev",
            "/usr",
            "/lib",
        }
        self._allowed = tuple(os.path.realpath(path) + os.sep for path in known if path)
        sys.addaudithook(self._hear)
        signal.signal(signal.SIGALRM, self._hangs)

    def _hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.inside is None:
            return
        if event in CODE_EVENTS:
            self.found.append(f"{event}{arguments!r}")
        if event == "open" and isinstance(arguments[0], str | bytes | os.PathLike):
            path = os.path.realpath(os.fsdecode(arguments[0]))
            if not (path + os.sep).startswith((os.path.realpath(self.inside) + os.sep, *self._allowed)):
                self.found.append(f"opens {path}")

    def _hangs(self, number: int, frame: FrameType | None) -> None:
        self.found.append(f"still at it after {SECONDS} s")
        raise TimeoutError(self.found[-1])


def attempt(base: Path, model: Path) -> None:
    """What users do with an input: as a model of the base, and as the base."""
    for pair in ((base, model), (model, base)):
        try:
            fm.inspect(pair[0], [pair[1]])
            fm.merge(pair[0], [pair[1]])
        except fm.FreemergeError as error:
            if not str(error):
                raise AssertionError("an error without words") from error


def cases(seed: int, numbers: Iterable[int], seconds: float = math.inf) -> Iterator[tuple[int, Fault | None]]:
    """Run cases, at most so many seconds, and give the fault of each, if it has one."""
    warnings.simplefilter("error")
    watch, end = Watch(), time.monotonic() + seconds
    with tempfile.TemporaryDirectory() as temporary:
        top = Path(temporary)
        (top / "inputs").mkdir()
        inputs = make_inputs(top / "inputs")
        secret = top / "secret"
        save_file({"model.embed.weight": torch.ones(10, 6)}, secret)
        for name in inputs:
            attempt(top / "inputs" / "base", top / "inputs" / name)  # imports, tables and caches are made
        limit = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss + MEGABYTES * 1000  # as Linux counts: in KB
        for number in numbers:
            if time.monotonic() > end:
                return
            chance = random.Random(f"{seed}:{number}")
            name = chance.choice(inputs)
            folder = top / "case"
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            shutil.copytree(top / "inputs" / "base", folder / "base")
            shutil.copytree(top / "inputs" / name, folder / "input")
            mutator = Mutator(chance, folder / "input", secret)
            mutator.mutate()
            told = _fault(watch, folder, limit)
            shutil.rmtree(folder)
            if told:
                limit = max(limit, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss + MEGABYTES * 1000)
            yield number, Fault(number, f"{name} ({', '.join(mutator.told)}): {told}") if told else None


def _fault(watch: Watch, folder: Path, limit: int) -> str:
    watch.inside, watch.found = folder, []
    signal.alarm(SECONDS)
    try:
        attempt(folder / "base", folder / "input")
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        return "".join(traceback.format_exception(error)[-6:])
    finally:
        signal.alarm(0)
        watch.inside = None
    if watch.found:
        return "; ".join(watch.found)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return f"took {(peak - limit) / 1000 + MEGABYTES:.0f} MB at its peak" if peak > limit else ""


def main() -> int:
    """Print faults until the time is up; the exit status says whether there were any."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--case", type=int)
    options = parser.parse_args()
    numbers = range(1 << 62) if options.case is None else [options.case]
    count = faults = 0
    for number, fault in cases(options.seed, numbers, options.seconds):
        count += 1
        if fault is not None:
            faults += 1
            print(f"seed {options.seed} case {number}: {fault.told}\n", flush=True)
    print(f"{count} cases, {faults} faults")
    return 1 if faults else 0


if __name__ == "__main__":
    raise SystemExit(main())
