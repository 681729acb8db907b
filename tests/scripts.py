"""The programs in `examples/` as modules, for tests that call their functions."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType


EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


def load_example(name: str, module_name: str | None = None) -> ModuleType:
    """The module of `examples/{name}.py`; `module_name` keeps it apart from another copy."""
    spec = importlib.util.spec_from_file_location(module_name or name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module
