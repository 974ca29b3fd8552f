"""The arrows between modules go one way: docs/architecture.md draws them, this test walks the imports."""

from __future__ import annotations

import ast
from pathlib import Path

import freemerge

PACKAGE = Path(freemerge.__file__).parent

# A module may import from those on lower levels (and from its own folder, one way).
LEVELS = [
    {"errors", "_core", "_cuda"},
    {"responses", "native", "progress", "cuda"},
    {"accumulate", "merging", "spectral", "checkpoint"},
    {"task_vector"},
    {"recipe", "inspection"},
    {"merger", "experts"},
    {"pipeline"},
    {"evaluation", "integrations", "demo"},
    {"cli"},
]
LEVEL = {name: level for level, names in enumerate(LEVELS) for name in names}


def module_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def internal_imports(path: Path) -> set[str]:
    """Top-level names inside the package that a file imports, at any nesting depth."""
    depth = len(path.relative_to(PACKAGE).parts)
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level == depth:
            found |= {node.module.split(".")[0]} if node.module else {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "freemerge":
            found.add(node.module.split(".")[1] if "." in node.module else "")
        elif isinstance(node, ast.Import):
            assert not any(alias.name.split(".")[0] == "freemerge" for alias in node.names), (
                f"{path}: import relatively"
            )
    return found


def sources() -> list[Path]:
    return [path for path in sorted(PACKAGE.rglob("*.py")) if path.name != "__init__.py" or path.parent != PACKAGE]


def test_imports_go_one_way() -> None:
    wrong = []
    for path in sources():
        importer = module_of(path)
        for imported in internal_imports(path) - {importer, "__version__", ""}:
            if LEVEL[imported] >= LEVEL[importer]:
                wrong.append(f"{path.relative_to(PACKAGE)} imports {imported}")
    assert not wrong


def test_merging_rules_know_no_fourier_transform() -> None:
    assert internal_imports(PACKAGE / "merging.py") <= {"errors"}


def test_nothing_imports_the_integrations() -> None:
    assert not [path for path in sources() if "integrations" in internal_imports(path) and module_of(path) != "cli"]


def test_optional_frameworks_are_imported_only_where_they_are_used() -> None:
    optional = {"transformers", "peft", "mergekit", "fusion_bench", "sd_mecha", "sklearn", "matplotlib"}
    for path in sources():
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            names = {alias.name for alias in node.names} if isinstance(node, ast.Import) else set()
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                names = {node.module or ""}
            imported = {name.split(".")[0] for name in names} & optional
            assert not imported or module_of(path) == "integrations", f"{path} imports {imported} at the top"
