"""Label hierarchy: checks of label parents, and scores and label sets that are consistent with them."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any
from unicodedata import normalize

import torch


def check_label_parents(label_parents: Any, labels: Sequence[str] | None = None) -> dict[str, list[str]]:
    """
    Check the parents of labels and return them in a normalized form.

    Args:
        label_parents (`dict[str, str | list[str]]`): the parent or parents of each label that has any, by name.
        labels (`list[str]`, *optional*): the names that may occur; any name if not given.

    Returns:
        `dict[str, list[str]]`: the distinct parents of each label that has one, with names in Unicode normalization form NFC.

    Raises:
        ValueError: it is not such a dictionary, a name is not among `labels`, a label is its own parent, or there is a cycle.

    Example:

    ```python
    >>> check_label_parents({"genetics": "biology", "biochemistry": ["biology", "chemistry"], "biology": []})
    {'genetics': ['biology'], 'biochemistry': ['biology', 'chemistry']}

    ```
    """
    if not isinstance(label_parents, Mapping):
        raise ValueError(
            f"`label_parents` is {str(label_parents)[:60]!r}, but parents by label are needed. Pass {{child: [parents]}}."
        )
    known = None if labels is None else set(labels)
    checked: dict[str, list[str]] = {}
    for name, given in label_parents.items():
        parents = [given] if isinstance(given, str) else given
        if not isinstance(parents, (list, tuple)) or not all(isinstance(parent, str) for parent in parents):
            raise ValueError(
                f"`label_parents` has {given!r} for {name!r}, but names of parents are needed. Pass a name or a list of names."
            )
        child = normalize("NFC", name)
        distinct = list(dict.fromkeys(normalize("NFC", parent) for parent in parents))
        for role, member in [("the label", child), *(("the parent", parent) for parent in distinct)]:
            if known is not None and member not in known:
                raise ValueError(
                    f"`label_parents` names {role} {member!r}, which is not among the {len(known)} labels. Add it to the labels, or "
                    "leave it out."
                )
        if child in distinct:
            raise ValueError(f"`label_parents` makes {child!r} its own parent. Remove this entry.")
        if distinct:
            checked[child] = distinct
    cycle = find_cycle(checked)
    if cycle:
        raise ValueError(f"`label_parents` has a cycle: {' > '.join(map(repr, cycle))}. Remove one of these parents.")
    return checked


def find_cycle(parents: Mapping[str, Sequence[str]]) -> list[str]:
    """Labels each of which is a parent of the next, with the first one repeated at the end; empty if there is no cycle."""
    done: set[str] = set()
    for start in parents:
        path: dict[str, Any] = {}  # in order; each with an iterator over its parents
        if start not in done:
            path[start] = iter(parents[start])
        while path:
            name = next(reversed(path))
            parent = next(path[name], None)
            if parent is None:
                done.add(name)
                del path[name]
            elif parent in path:
                names = list(path)
                return [parent, *reversed(names[names.index(parent) :])]
            elif parent not in done:
                path[parent] = iter(parents.get(parent, ()))
    return []


def ancestors_of(parents: Mapping[Any, Iterable[Any]], names: Iterable[Any]) -> dict[Any, None]:
    """The ancestors of some labels as dictionary keys, nearest first; labels of `names` only if they are ancestors of others."""
    found: dict[Any, None] = {}
    queue = list(names)
    for name in queue:  # grows during the loop
        for parent in parents.get(name, ()):
            if parent not in found:
                found[parent] = None
                queue.append(parent)
    return found


def without_labels(label_parents: Mapping[str, Sequence[str]], removed: set[str]) -> dict[str, list[str]]:
    """The parents of the remaining labels. Children of a removed label get its parents, so that they keep their other ancestors."""

    def kept(names: Iterable[str]) -> list[str]:
        found: dict[str, None] = {}
        for name in names:
            found |= dict.fromkeys(kept(label_parents.get(name, ())) if name in removed else [name])
        return list(found)

    remaining = {name: kept(parents) for name, parents in label_parents.items() if name not in removed}
    return {name: parents for name, parents in remaining.items() if parents}


class LabelHierarchy:
    """
    Label parents as edges, sorted so that scores and label sets of a batch are closed level by level. Memory is proportional to the
    number of edges; there is no labels × labels matrix.

    Args:
        labels (`list[str]` of length `num_labels`): names, in the order of the ids.
        label_parents (`dict[str, list[str]]`): parents by name, as [`check_label_parents`] returns them.

    Attributes:
        height (`torch.LongTensor` of shape `(num_labels,)`): number of levels below each label; 0 without children. An ancestor is
            higher than its descendants.

    Example:

    ```python
    >>> import torch
    >>> hierarchy = LabelHierarchy(["biology", "genetics", "physics"], {"genetics": ["biology"]})
    >>> hierarchy.close_scores(torch.tensor([[0.2, 0.9, 0.4]]))
    tensor([[0.9000, 0.9000, 0.4000]])
    >>> hierarchy.leaves(torch.tensor([[True, True, True]]))
    tensor([[False,  True,  True]])

    ```
    """

    def __init__(self, labels: Sequence[str], label_parents: Mapping[str, Sequence[str]]):
        self.num_labels = len(labels)
        ids = {name: index for index, name in enumerate(labels)}
        self.parents = {ids[name]: [ids[parent] for parent in parents] for name, parents in label_parents.items()}
        children, parents = [], []
        for child, above in self.parents.items():
            children += [child] * len(above)
            parents += above
        self.height = torch.tensor(self._heights(), dtype=torch.long)
        edges = torch.tensor([parents, children], dtype=torch.long).reshape(2, -1)
        heights = self.height[edges[0]]
        # Edges of one level have parents of the same height, so all values of their children are final.
        self._levels = [edges[:, heights == height] for height in heights.unique().tolist()]

    def _heights(self) -> list[int]:
        heights = [0] * self.num_labels
        waiting = [0] * self.num_labels  # children without a final height
        for above in self.parents.values():
            for parent in above:
                waiting[parent] += 1
        queue = [index for index in range(self.num_labels) if not waiting[index]]
        for index in queue:  # grows during the loop
            for parent in self.parents.get(index, ()):
                heights[parent] = max(heights[parent], heights[index] + 1)
                waiting[parent] -= 1
                if not waiting[parent]:
                    queue.append(parent)
        return heights

    def ancestors(self, indices: Iterable[int]) -> list[int]:
        """Ids of the ancestors of some labels, nearest first."""
        return list(ancestors_of(self.parents, indices))

    def close_scores(self, scores: torch.Tensor) -> torch.Tensor:
        """
        Scores (B, L) in which the score of a label is the maximum over itself and its descendants, so that a parent never scores lower
        than a child. Works for probabilities and for logits.
        """
        closed = scores.clone()
        for parents, children in self._on(scores.device):
            closed = self._lift(closed, parents, closed[:, children])
        return closed

    def close(self, label_sets: torch.Tensor) -> torch.Tensor:
        """Label sets (B, L) with the ancestors of all their labels."""
        return self.close_scores(label_sets.to(torch.uint8)).bool()

    def descendants(self, label_sets: torch.Tensor) -> torch.Tensor:
        """Label sets (B, L) with the descendants of all their labels."""
        spread = label_sets.to(torch.uint8, copy=True)
        for parents, children in reversed(self._on(label_sets.device)):
            spread = self._lift(spread, children, spread[:, parents])
        return spread.bool()

    def leaves(self, label_sets: torch.Tensor) -> torch.Tensor:
        """Label sets (B, L) without labels that have an assigned descendant."""
        closed, covered = self.close(label_sets).to(torch.uint8), torch.zeros_like(label_sets, dtype=torch.uint8)
        for parents, children in self._on(label_sets.device):
            covered = self._lift(covered, parents, closed[:, children])
        return label_sets & ~covered.bool()

    @staticmethod
    def _lift(values: torch.Tensor, targets: torch.Tensor, sources: torch.Tensor) -> torch.Tensor:
        """The columns `targets` raised to the values `sources`; a target may be named several times."""
        return values.scatter_reduce(1, targets.expand(len(values), -1), sources, "amax")

    def _on(self, device: torch.device) -> list[torch.Tensor]:
        if self._levels and self._levels[0].device != device:
            self._levels = [level.to(device) for level in self._levels]
        return self._levels
