"""The module `label_descriptions` under its name of version 0.1."""

from .deprecated import expand_labels


__all__ = ["expand_labels"]
