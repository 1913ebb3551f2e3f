"""Imports go in one direction, as docs/architecture.md says."""

import ast
import re
from graphlib import TopologicalSorter

from tests.conftest import ROOT


def imports():
    """Of each module of the package, the modules (or packages) of it that it imports when it is imported."""
    found = {}
    for file in (ROOT / "bundle").rglob("*.py"):
        module = file.relative_to(ROOT).with_suffix("").parts
        found[module] = set()
        for node in ast.parse(file.read_text()).body:
            if isinstance(node, ast.ImportFrom):
                base = module[: -node.level] if node.level else ()
                source = (*base, *(node.module or "").split(".")) if node.module else base
                if source[0] == "bundle":
                    found[module].add(source)
    return found


def test_no_module_imports_itself_by_way_of_others():
    graph = {m: sources for m, sources in imports().items() if m[-1] != "__init__"}
    list(TopologicalSorter(graph).static_order())  # raises CycleError


def test_packages_import_from_left_to_right():
    text = (ROOT / "docs/architecture.md").read_text()
    told = re.search(r"Imports go from left to right only: (.*?)\. `errors", text, re.S)[1]
    rank = {name: k for k, part in enumerate(told.split("->")) for name in re.findall(r"`(\w+)`", part)}
    assert set(rank) == {folder.parent.name for folder in (ROOT / "bundle").glob("*/__init__.py")}
    for module, sources in imports().items():
        for source in sources:
            if len(source) > 1 and module[1] in rank and source[1] in rank:
                assert rank[source[1]] <= rank[module[1]], f"{'.'.join(module)} imports {'.'.join(source)}"
