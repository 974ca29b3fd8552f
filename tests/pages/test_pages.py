"""Every block of code in the README and in docs/ does what the page says: it runs, where the page's models are small.

Python runs as it stands, all blocks of a page one after the other. So does every `freemerge` in blocks of a shell, but
for those that name something in capitals (`-o OUT`), whose options are parsed. Recipes are read.
"""

from __future__ import annotations

import contextlib
import re
import shlex
import shutil
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import click
import pytest
import yaml

import freemerge as fm
from examples.models import build
from freemerge.cli import main
from freemerge.cli.commands import Commands
from freemerge.methods import METHODS

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]

# What a page takes for granted.
BEFORE = {
    "README.md": """
import shutil, torch
from transformers import AutoModelForCausalLM
base, models = "base", ["math", "code"]
model_a, model_b = models
base_tensor, tensors = torch.randn(9, 7), [torch.randn(9, 7), torch.randn(9, 7)]
deltas, task_vector = [torch.randn(9, 7)] * 2, torch.randn(9, 7)
model = AutoModelForCausalLM.from_pretrained("base")
model.encoder = model.model
features, task_names = torch.randn(4, 64), ["math", "code"] * 2
inputs = torch.tensor([[1, 2]])
fm.merge_checkpoints("base", ["math", "code"], "merged", progress=False)
""",
    "architecture.md": """
import torch
from dataclasses import dataclass
from freemerge.methods import Measured, Merged, Method
from freemerge.methods.parameters import number, parameter
from freemerge.methods.vectors import Sides, TaskVectors
""",
    "methods.md": """
import itertools, torch
from transformers import AutoModelForCausalLM
tasks, encoder = ["math", "code"], AutoModelForCausalLM.from_pretrained("base")
heads = {task: lambda out: out.logits[:, -1] for task in tasks}
batches = {task: itertools.repeat(torch.randint(0, 90, (2, 3))) for task in tasks}
validation, accuracy = torch.randint(0, 90, (2, 3)), lambda out: float(out.logits.mean())
""",
}


@dataclass(frozen=True)
class Block:
    """A piece of code in a page, and where it begins. Indented blocks have no language."""

    page: Path
    line: int
    language: str
    text: str


def blocks(page: Path) -> list[Block]:
    found, lines = [], page.read_text(encoding="utf-8").splitlines()
    i = 0
    while i < len(lines):
        end = i + 1
        if lines[i].startswith("```"):
            end = lines.index("```", end)
            found.append(Block(page, i + 1, lines[i][3:], "\n".join(lines[i + 1 : end]) + "\n"))
        elif lines[i].startswith("    ") and not lines[i - 1]:
            while end < len(lines) and lines[end].startswith("    "):
                end += 1
            found.append(Block(page, i, "", "\n".join(line[4:] for line in lines[i:end])))
        i = end + lines[i].startswith("```")
    return found


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    build(folder)
    return folder


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_the_code_of_a_page_runs(
    page: Path, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code = [block for block in blocks(page) if block.text.strip()]
    shutil.copytree(world, tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr("freemerge.demo.run_demo", lambda **_: {})  # a minute
    monkeypatch.setitem(METHODS, "trimmed_mean", None)  # docs/architecture.md adds it; what was there comes back
    del METHODS["trimmed_mean"]
    names: dict[str, Any] = {"fm": fm}
    exec(BEFORE.get(page.name, ""), names)
    for block in code:
        place = f"{page.relative_to(ROOT)}:{block.line}"
        if block.language == "python":
            run_python(block, names, place)
        elif block.language in ("sh", ""):
            run_shell(block, place)
        elif block.language == "yaml":
            read_yaml(block, tmp_path / "config.yml")
        elif block.language == "json":
            assert yaml.safe_load(block.text), place
        else:
            assert block.language.startswith("{"), f"{place}: a block of {block.language}"


def run_python(block: Block, names: dict[str, Any], place: str) -> None:
    """Its definitions are written into a file, too, which the page may name."""
    if "import sd_mecha" in block.text and find_spec("sd_mecha") is None:
        return  # tests/hosts
    Path("score.py").write_text(block.text)
    exec(compile("\n" * block.line + block.text, place, "exec"), names)


def run_shell(block: Block, place: str) -> None:
    for line in block.text.replace("\\\n", "").splitlines():
        if not line.startswith("freemerge "):
            continue
        words = shlex.split(re.split(r"\s#| > ", line)[0])[1:]
        if re.search(r"\b[A-Z]+\b|mergekit|\.safetensors|--help", " ".join(words)):
            parse([re.sub(r"^[A-Z]$", "1", word) for word in words])  # --rank R
        else:
            assert main([*words, "--quiet"]) == 0, f"{place}: {line}"


def parse(words: list[str]) -> None:
    """The command and its options exist."""
    commands = Commands()
    with contextlib.suppress(click.exceptions.Exit):  # --help
        context = commands.make_context("freemerge", words)
        name, command, rest = commands.resolve_command(context, words)
        assert command is not None
        command.make_context(name, rest)


def read_yaml(block: Block, file: Path) -> None:
    content = yaml.safe_load(block.text)
    if isinstance(content, dict) and "merge_method" in content:
        return  # of mergekit, with a method of ours: tests/hosts
    fm.Recipe.from_config(content)


@pytest.mark.parametrize("page", PAGES[:2], ids=lambda page: page.name)
def test_the_links_of_what_is_no_part_of_the_site_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)#]+)", page.read_text(encoding="utf-8"))
    assert [link for link in links if "://" not in link and not (ROOT / link).exists()] == []


def test_the_readme_leads_to_every_page_of_docs() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    pages = {path.relative_to(ROOT).as_posix() for path in PAGES[2:]} - {"docs/index.md", "docs/api.md"}
    assert [page for page in sorted(pages) if f"]({page})" not in text] == []
