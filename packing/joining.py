"""The modules of kernel/ as the one file that Kaggle runs."""

import re
from pathlib import Path

GUARD = """

if __name__ == "__main__":
    main()
    if is_scored_run():
        end_process()
"""  # the end of what is run as a script
KERNEL_IMPORT = re.compile(r"^from kernel\.(\w+) import (?:\([^)]*\)|.+)\n", re.MULTILINE)


def module_dependencies(module: Path) -> list[Path]:
    """Return the modules of kernel/ that a module needs, each after its own needs, then itself."""
    found: dict[Path, None] = {}  # an ordered set

    def add(path: Path) -> None:
        if path not in found:
            for name in KERNEL_IMPORT.findall(path.read_text(encoding="utf-8")):
                add(path.with_name(f"{name}.py"))
            found[path] = None

    add(module)
    return [*found]


def join_modules(script: Path) -> str:
    """Return a script of kernel/ and all that it imports from there as one file.

    A section a module, its code as it stands, without the imports of what stands above it. The
    script's docstring comes first: it is the file's.
    """
    *others, _ = module_dependencies(script)
    docstring, end, code = script.read_text(encoding="utf-8").partition('"""\n')
    sections = [_section(path, path.read_text(encoding="utf-8")) for path in others]
    return docstring + end + "\n" + "\n\n\n".join([*sections, _section(script, code)]) + "\n"


def _section(path: Path, code: str) -> str:
    return f"# --- {path.name} ".ljust(100, "-") + "\n\n" + KERNEL_IMPORT.sub("", code).strip("\n")
