"""The one file that Kaggle runs: the modules of kernel/, whole, in an order that works."""

import ast
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest

from build_kernel import BESIDE, CODE, join_modules, needed

SCRIPTS = pytest.mark.parametrize("script", [CODE, *BESIDE], ids=lambda path: path.name)


def origins(tree: ast.Module) -> dict[str, set[str]]:
    """Every name that a module binds at its top, and what it is bound to."""
    found = defaultdict[str, set[str]](set)
    for node in tree.body:
        if isinstance(node, ast.Import):
            for alias in node.names:
                found[alias.asname or alias.name.split(".")[0]].add(alias.name)
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                found[alias.asname or alias.name].add(f"{node.module}.{alias.name}")
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            found[node.name].add(f"line {node.lineno}")
        else:
            for name in ast.walk(node):
                if isinstance(name, ast.Name) and isinstance(name.ctx, ast.Store):
                    found[name.id].add(f"line {node.lineno}")
    return found


@SCRIPTS
def test_no_module_takes_another_ones_name(script: Path) -> None:
    names = origins(ast.parse(join_modules(script)))
    assert {name: places for name, places in names.items() if len(places) > 1} == {}


@SCRIPTS
def test_every_statement_of_every_module_is_there_once(script: Path) -> None:
    def statements(code: str) -> list[str]:
        nodes = ast.parse(code).body
        imports = (ast.Import, ast.ImportFrom)
        return [ast.dump(n) for n in nodes if not isinstance(n, (*imports, ast.Expr))]

    modules = needed(script)
    expected = [s for path in modules for s in statements(path.read_text(encoding="utf-8"))]
    guard = statements('if __name__ == "__main__":\n    main()\n')
    ends = [*guard] if script.read_text(encoding="utf-8").endswith("    main()\n") else []
    assert statements(join_modules(script)) == [s for s in expected if s not in guard] + ends
    assert len(modules) == len(set(modules)) > 3


@SCRIPTS
def test_it_needs_nothing_of_the_project(script: Path, tmp_path: Path) -> None:
    path = tmp_path / script.name
    path.write_text(join_modules(script), encoding="utf-8")
    watch = "import runpy, sys; runpy.run_path(sys.argv[1]); print(sorted(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", watch, path], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "'kernel" not in done.stdout and "'weights" not in done.stdout
    assert "'numpy'" in done.stdout


def test_the_files_own_docstring_is_the_scripts() -> None:
    assert ast.get_docstring(ast.parse(join_modules(CODE))) == ast.get_docstring(
        ast.parse(CODE.read_text(encoding="utf-8"))
    )
