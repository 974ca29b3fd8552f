"""The rules of docs/architecture.md that a program can check: which way imports go, and that there is one of each."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import freemerge
from cases import RESPONSES
from freemerge import _core
from freemerge.backends.registry import BACKENDS
from freemerge.responses import RESPONSES as REGISTERED

PACKAGE = Path(freemerge.__file__).parent
ROOT = Path(__file__).resolve().parents[1]

# A module or folder may import from those on lower levels, and a folder from itself.
LEVELS = [
    {"errors", "lazy", "signals", "_core", "_cuda"},
    {"arguments"},
    {"responses", "overlap", "workers"},
    {"cache", "dense"},
    {"planner"},
    {"backends"},
    {"ops"},
    {"accumulate", "filter", "checkpoint"},
    {"methods"},
    {"merging"},
    {"experts"},
    {"analysis", "evaluation", "demo", "integrations", "lora", "tuning"},
    {"cli"},
    {"__main__"},
]
LEVEL = {name: level for level, names in enumerate(LEVELS) for name in names}
# Modules of backends/ that belong to no single backend.
NEUTRAL = {"registry", "base", "memory", "result_memory", "sparse"}
OPTIONAL = {"transformers", "peft", "mergekit", "fusion_bench", "omegaconf", "sd_mecha", "sklearn", "matplotlib"}


def sources(*folders: str) -> list[Path]:
    """The package's Python files, or those of some of its folders; not the front door, which imports everything."""
    found = [path for path in sorted(PACKAGE.rglob("*.py")) if path != PACKAGE / "__init__.py"]
    return [path for path in found if not folders or room_of(path) in folders]


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def internal_imports(path: Path) -> Iterator[tuple[str, ...]]:
    """Modules inside the package that a file imports, at any depth of nesting, as paths from the package."""
    folder = path.relative_to(PACKAGE).parts[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            origin = folder[: len(folder) + 1 - node.level] + tuple(
                (node.module or "").split(".") if node.module else ()
            )
            yield from [origin] if origin else [(alias.name,) for alias in node.names]
        else:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not any(name.split(".")[0] == "freemerge" for name in names), f"{path}: import relatively"


def test_imports_go_one_way() -> None:
    wrong = []
    for path in sources():
        importer = room_of(path)
        for imported in {target[0] for target in internal_imports(path)} - {importer, "__version__"}:
            if LEVEL[imported] >= LEVEL[importer]:
                wrong.append(f"{path.relative_to(PACKAGE)} imports {imported}")
    assert not wrong


def test_every_room_is_on_the_map() -> None:
    rooms = {room_of(path) for path in sources()}
    assert rooms <= set(LEVEL), "put it into LEVELS and docs/architecture.md"
    described = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    assert not [room for room in rooms if f" {room}" not in described]


def test_methods_know_no_files_and_one_knows_the_filter() -> None:
    for path in sources("methods"):
        rooms = {target[0] for target in internal_imports(path)} - {"methods"}
        allowed = {"arguments", "errors", "lazy", "accumulate", "responses"}
        allowed |= {"filter"} if path.stem == "filtered" else set()
        assert rooms <= allowed, f"{path.name} imports {rooms - allowed}"


def test_there_is_one_list_of_backends() -> None:
    """Only the registry imports them, by looking into the folder; nothing else asks what a device is."""
    names = {backend.name for backend in BACKENDS}
    for path in sources():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        inside = room_of(path) == "backends"
        for target in internal_imports(path):
            single = target[0] == "backends" and len(target) > 1 and target[1] not in NEUTRAL
            assert inside or not single, f"{path} imports {'.'.join(target)}"
        for node in ast.walk(tree):
            if isinstance(node, ast.Tuple | ast.List | ast.Set):
                held = {item.value for item in node.elts if isinstance(item, ast.Constant)}
                assert len(held & names) < 2, f"{path}:{node.lineno} lists backends"
            compared = isinstance(node, ast.Compare) and {
                item.value for item in (node.left, *node.comparators) if isinstance(item, ast.Constant)
            }
            assert inside or not compared or not compared & names, f"{path}:{node.lineno} branches on a backend"
            asks = isinstance(node, ast.Attribute) and node.attr == "is_cuda"
            assert inside or not asks, f"{path}:{node.lineno} branches on a device"


def test_every_response_has_its_cpp_twin_and_the_other_way_round() -> None:
    """That their gains agree bin by bin is the matter of tests/responses/test_cpp_twin.py."""
    examples = [response for response in RESPONSES if type(response).__name__ in REGISTERED]
    assert {type(response).__name__ for response in examples} == set(REGISTERED)
    assert {response.params((48, 40)).kind for response in examples} | {"table"} == set(_core.MASK_KINDS)


def test_optional_frameworks_are_imported_only_where_they_are_used() -> None:
    for path in sources():
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            names = {alias.name for alias in node.names} if isinstance(node, ast.Import) else set()
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                names = {node.module or ""}
            imported = {name.split(".")[0] for name in names} & OPTIONAL
            assert not imported or room_of(path) == "integrations", f"{path} imports {imported} at the top"


def test_native_siblings_do_not_include_each_other() -> None:
    """csrc: cpu/ and cuda/ know common/ and themselves; only bindings/ knows Python."""
    for path in sorted((ROOT / "csrc").rglob("*")):
        if path.suffix not in (".h", ".cpp", ".cu", ".cuh", ".inl"):
            continue
        room = path.relative_to(ROOT / "csrc").parts[0]
        text = path.read_text(encoding="utf-8")
        for other in {"common", "cpu", "cuda", "bindings"} - {room, "common"}:
            assert room == "bindings" or f'#include "{other}/' not in text, f"{path} includes {other}/"
        assert room == "bindings" or "pybind11" not in text, f"{path} knows Python"


# Functions of torch that make tensors where the caller's default device is, of the caller's default dtype.
FACTORIES = {"arange", "as_tensor", "empty", "eye", "full", "linspace", "ones", "rand", "randint", "randn", "randperm"}
FACTORIES |= {"sparse_coo_tensor", "tensor", "zeros"}
OF_INTEGERS = {"arange", "randint", "randperm", "tensor", "as_tensor", "full", "sparse_coo_tensor"}


def test_tensors_are_made_on_a_device_and_of_a_dtype_that_are_named() -> None:
    """A script's torch.set_default_device("cuda") must not reach native code for the CPU, nor its dtype a result."""
    for path in sources():
        if room_of(path) == "demo":
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
                continue
            if node.func.attr in FACTORIES and isinstance(node.func.value, ast.Name) and node.func.value.id == "torch":
                named = {keyword.arg for keyword in node.keywords}
                assert "device" in named, f"{path}:{node.lineno} makes a tensor on the default device"
                kind = "dtype" in named or node.func.attr in OF_INTEGERS
                assert kind, f"{path}:{node.lineno} makes a tensor of the default dtype"


def test_kept_properties_have_no_lock_that_a_fork_takes_over() -> None:
    wrong = [
        str(path)
        for path in sources()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ImportFrom) and node.module == "functools" and path.stem != "lazy"
        if any(alias.name == "cached_property" for alias in node.names)
    ]
    assert not wrong, "import it from freemerge.lazy"
