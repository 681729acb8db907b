"""Lazy imports (PEP 562): the names of a package are imported on first use, so that importing the package stays fast."""

import ast
import importlib
import sys
from collections.abc import Callable
from typing import Any


def attach(package: str) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """
    `__getattr__` and `__dir__` of a package, from the imports that its `__init__.py` has for type checkers:

    ```python
    __getattr__, __dir__ = attach(__name__)

    if TYPE_CHECKING:
        from .streaming import StreamingMetrics
    ```

    Thus each name is listed only once, where linters and type checkers see it.

    Args:
        package (`str`): `__name__` of the package.
    """
    module = sys.modules[package]
    blocks = [node.body for node in ast.parse(_source(module)).body if isinstance(node, ast.If)]
    modules = {
        alias.asname or alias.name: (f"{'.' * node.level}{node.module}", alias.name)
        for body in blocks
        for node in body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }

    def get(name: str) -> Any:
        if name not in modules:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        source, own_name = modules[name]
        value = getattr(importlib.import_module(source, package), own_name)
        setattr(module, name, value)
        return value

    return get, lambda: sorted({*vars(module), *modules})


def _source(module: Any) -> str:
    source = module.__spec__.loader.get_source(module.__name__)
    if source is None:
        raise ImportError(
            f"The source file of {module.__name__}, which lists its names, is missing. Install the package again."
        )
    return str(source)
