"""The private parts of transformers that the trainer overrides are those of the installed version."""

import ast
import inspect
from pathlib import Path

import pytest
from transformers import Trainer

import trainer
from trainer.transformers_internals import OVERRIDDEN, changed_internals


def test_the_installed_transformers_has_what_is_overridden():
    assert changed_internals() == [], "transformers has changed; adapt trainer/transformers_internals.py"


@pytest.mark.parametrize("name", OVERRIDDEN)
def test_a_missing_or_changed_part_is_reported(monkeypatch, name):
    monkeypatch.setattr(Trainer, name, lambda self, other: None)
    assert changed_internals() == [f"`Trainer.{name}` takes (self, other), not ({', '.join(OVERRIDDEN[name])})."]
    monkeypatch.delattr(Trainer, name)
    assert changed_internals() == [f"`Trainer.{name}` is gone."]


def test_no_other_module_overrides_or_reads_a_private_part():
    private = {name for name in dir(Trainer) if name.startswith("_") and not name.startswith("__")}
    private |= {
        node.attr
        for node in ast.walk(ast.parse(inspect.getsource(inspect.getmodule(Trainer))))
        if isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.startswith("__")
    }
    root = Path(trainer.__file__).parent
    found = []
    for path in root.rglob("*.py"):
        if path.name == "transformers_internals.py":
            continue
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef) and any(
                "Trainer" in ast.unparse(base) or "Internals" in ast.unparse(base) for base in node.bases
            ):
                for inner in ast.walk(node):
                    name = getattr(inner, "attr", None) or (inner.name if isinstance(inner, ast.FunctionDef) else "")
                    if name in private:
                        found.append(f"{path.name}: {name}")
    assert found == []
