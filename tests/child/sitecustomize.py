"""What every Python process that a test starts runs first: `torch._dynamo` comes when it is needed.

It is a fourth of the seconds that a process of the kernel takes to start, and many start.
PyTorch, torchvision and timm import it only to say what is not to be compiled; nothing is.
"""

import importlib
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

PACKAGE = "torch._dynamo"
ASKED: dict[str, dict[str, Any]] = {  # what they ask of it, by module
    PACKAGE: {"__path__": [], "disable": lambda function=None, *_, **__: function},
    f"{PACKAGE}.utils": {"is_compile_supported": lambda _: False},
}


class StandIn(ModuleType):
    """One of its modules, until anything else is asked of it."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(import_real(self.__name__), name)


class Finder(MetaPathFinder, Loader):
    """Finds the stand-ins; any other module of it is the real one's."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name in ASKED:
            return ModuleSpec(name, self, is_package=name == PACKAGE)
        if name.startswith(f"{PACKAGE}."):
            return PathFinder.find_spec(name, import_real(PACKAGE).__path__, target)
        return None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return StandIn(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        module.__dict__.update(ASKED[module.__name__])


FINDER = Finder()


def import_real(name: str) -> ModuleType:
    """One of its modules as it is; from now on an import finds no other."""
    if FINDER in sys.meta_path:
        sys.meta_path.remove(FINDER)
        for stand_in in ASKED:
            sys.modules.pop(stand_in, None)
    return importlib.import_module(name)


sys.meta_path.insert(0, FINDER)
