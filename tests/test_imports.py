"""The import contract: which package may import which, who wraps which library, and what the light commands load."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
STAGES = {"ingest", "retriever", "updater", "inference"}
ALLOWED = {
    "oppu": {"oppu"},
    "retriever": {"oppu", "retriever"},
    "ingest": {"oppu", "ingest"},
    "updater": {"oppu", "retriever", "updater"},
    "inference": {"oppu", "retriever", "inference"},
}
WRAPPERS = {
    "torch": {"oppu/lm", "oppu/embedder.py"},
    "transformers": {"oppu/lm", "oppu/embedder.py"},
    "peft": {"oppu/lm"},
    "sentence_transformers": {"oppu/embedder.py"},
    "faiss": {"retriever/dense.py"},
    "bm25s": {"retriever/lexical.py"},
    "kafka": {"oppu/kafka/client"},
    "sqlalchemy": {"oppu/store"},
    "alembic": {"oppu/store"},
    "apscheduler": {"updater/runner.py"},
    "fsspec": {"oppu/registry"},
}


def _modules() -> Iterator[tuple[str, ast.Module]]:
    for package in ("oppu", *sorted(STAGES)):
        for path in sorted((ROOT / package).rglob("*.py")):
            yield str(path.relative_to(ROOT)), ast.parse(path.read_text(encoding="utf-8"))


def _imported(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module


def test_stages_import_only_what_they_may() -> None:
    wrong = [
        f"{name} imports {module}"
        for name, tree in _modules()
        if not name.startswith("oppu/cli/")
        for module in _imported(tree)
        if module.split(".")[0] in {"oppu", *STAGES} - ALLOWED[name.split("/")[0]]
    ]
    assert not wrong


def test_only_the_composition_root_imports_the_command_line() -> None:
    wrong = [
        f"{name} imports {module}"
        for name, tree in _modules()
        if not name.startswith("oppu/cli/") and name != "oppu/__main__.py"
        for module in _imported(tree)
        if module.startswith("oppu.cli")
    ]
    assert not wrong


@pytest.mark.parametrize("library", sorted(WRAPPERS))
def test_each_library_is_imported_by_its_wrapper_alone(library: str) -> None:
    importers = {name for name, tree in _modules() for module in _imported(tree) if module.split(".")[0] == library}
    assert importers, f"{library}: nobody imports it, so this test guards nothing"
    assert not [n for n in importers if not any(n.startswith(allowed) for allowed in WRAPPERS[library])]


LIGHT = ["--help", "history", "user", "adapters", "topics", "store", "dead-letters", "produce", "ask", "up", "erase"]


@pytest.mark.parametrize("command", LIGHT)
def test_light_commands_load_no_heavy_library(command: str) -> None:
    arguments = [command] if command == "--help" else [command, "--help"]
    code = (
        "import sys, click\n"
        "from oppu.cli import cli\n"
        f"try: cli({arguments!r}, standalone_mode=False)\n"
        "except click.exceptions.Exit: pass\n"
        "print('HEAVY', sorted({m.split('.')[0] for m in sys.modules} & "
        "{'torch', 'transformers', 'peft', 'faiss', 'sentence_transformers', 'scipy', 'matplotlib'}))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert "HEAVY []" in done.stdout
    assert "Usage:" in done.stdout
