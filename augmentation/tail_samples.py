"""The module `pseudo_documents` under its name of version 0.1."""

from .deprecated import generate_tail_samples, old_name


__all__ = ["generate_tail_samples"]


def __getattr__(name: str) -> object:
    return old_name(name, __name__)
