"""The one file that Kaggle runs: the modules of kernel/, whole, in an order that works."""

import ast
import os
from collections import defaultdict
from pathlib import Path
from typing import Any

from helpers import ROOT, run_script

from packing.joining import GUARD, join_modules, module_dependencies
from packing.paths import SCRIPT

TREE = ast.parse(join_modules(SCRIPT))


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


def statements(tree: ast.Module) -> list[str]:
    """All but imports and docstrings."""
    left_out = (ast.Import, ast.ImportFrom, ast.Expr)
    return [ast.dump(node) for node in tree.body if not isinstance(node, left_out)]


def test_no_module_takes_another_ones_name() -> None:
    names = origins(TREE)
    assert len(names) > 100
    assert {name: places for name, places in names.items() if len(places) > 1} == {}


def test_every_statement_of_every_module_is_there_once() -> None:
    modules = module_dependencies(SCRIPT)
    texts = [path.read_text(encoding="utf-8") for path in modules]
    expected = [statement for text in texts for statement in statements(ast.parse(text))]
    guard = statements(ast.parse(GUARD))
    assert [s for s in expected if s in guard] == guard  # one module is run as a script
    assert statements(TREE) == expected
    assert len(modules) == len(set(modules)) > 3


def test_all_of_the_room_is_joined_but_its_docstring() -> None:
    room = set((ROOT / "kernel").glob("*.py")) - {ROOT / "kernel" / "__init__.py"}
    assert set(module_dependencies(SCRIPT)) == room


def test_a_module_stands_once_and_after_those_that_it_imports(tmp_path: Path) -> None:
    modules = {
        "base": "BASE = 1\n",
        "left": "import os\n\nfrom kernel.base import BASE\n\nLEFT = BASE, os\n",
        "right": "from kernel.base import (\n    BASE,\n)\nfrom kernel.left import LEFT\n\n"
        "RIGHT = LEFT, BASE\n",
        "script": '"""What it does."""\n\nfrom kernel.right import RIGHT\n'
        "from kernel.left import LEFT\n\nCHECK = LEFT, RIGHT\n",
    }
    for name, code in modules.items():
        (tmp_path / f"{name}.py").write_text(code)
    joined = join_modules(tmp_path / "script.py")
    headers = [line for line in joined.splitlines() if line.startswith("# --- ")]
    assert [line.split()[2] for line in headers] == ["base.py", "left.py", "right.py", "script.py"]
    assert {len(line) for line in headers} == {100}
    assert joined.startswith('"""What it does."""\n\n# --- base.py ---')
    assert "kernel." not in joined
    assert [joined.count(f"{name} =") for name in ("BASE", "LEFT", "RIGHT")] == [1, 1, 1]
    assert joined.endswith("\n\nCHECK = LEFT, RIGHT\n")
    names: dict[str, Any] = {}
    exec(joined, names)
    assert names["CHECK"] == ((1, os), ((1, os), 1))


def test_it_needs_nothing_of_the_project(tmp_path: Path) -> None:
    path = tmp_path / "inference.py"
    path.write_text(join_modules(SCRIPT), encoding="utf-8")
    watch = tmp_path / "watch.py"
    watch.write_text("import runpy, sys; runpy.run_path(sys.argv[1]); print(sorted(sys.modules))")
    done = run_script(watch, path, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for room in ("kernel", "packing", "training", "evaluation"):
        assert f"'{room}" not in done.stdout
    assert "'numpy'" in done.stdout


def test_the_files_own_docstring_is_the_scripts() -> None:
    script = ast.parse(SCRIPT.read_text(encoding="utf-8"))
    assert ast.get_docstring(TREE) == ast.get_docstring(script)
