"""Label sets: the labels assigned to a document, from its scores, thresholds, the label hierarchy and constraints."""

from collections.abc import Mapping, Sequence
from typing import Any
from unicodedata import normalize

import torch

from .hierarchy_sep_mldc import LabelHierarchy, ancestors_of


DEFAULT_THRESHOLD = 0.5
BOUNDS = ("at_least", "at_most")


def expected_f1(probabilities: torch.Tensor, predicted: torch.Tensor) -> torch.Tensor:
    r"""
    Expected F1 of each document's label set S, computed from the probabilities, $2 \sum_{l \in S} p_l / (|S| + \sum_l p_l)$; 0 for an
    empty set.

    Args:
        probabilities (`torch.Tensor` of shape `(B, L)`): of the labels.
        predicted (`torch.BoolTensor` of shape `(B, L)`): the label sets.

    Returns:
        `torch.Tensor` of shape `(B,)`: float32, from 0 to 1.

    Example:

    ```python
    >>> expected_f1(torch.tensor([[1.0, 0.5, 0.5]]), torch.tensor([[True, True, False]]))
    tensor([0.7500])

    ```
    """
    probabilities = probabilities.float()
    size = predicted.sum(dim=1)
    return 2 * (probabilities * predicted).sum(dim=1) / (size + probabilities.sum(dim=1)).clamp_min(1e-12)


def check_label_constraints(
    constraints: Any, labels: Sequence[str], ancestors: Mapping[str, Sequence[str]] | None = None
) -> list[dict[str, Any]]:
    """
    Check constraints on label sets and return them in a normalized form.

    Args:
        constraints (`list[dict]`): groups of labels, `{"labels": [names], "at_least": n, "at_most": m}` with one or both bounds. For
            mutually exclusive labels, use `"at_most": 1`.
        labels (`list[str]`): the names that may occur.
        ancestors (`dict[str, list[str]]`, *optional*): the parents of labels, if label sets are closed.

    Returns:
        `list[dict]`: the same, with names in Unicode normalization form NFC.

    Raises:
        ValueError: a group is malformed, has an unknown label, no bound, or bounds that cannot be satisfied; or, with a hierarchy, a label
            could never be assigned because its ancestors are in the same group and exceed `at_most`.

    Example:

    ```python
    >>> check_label_constraints([{"labels": ["paid", "free"], "at_most": 1}], ["paid", "free", "new"])
    [{'labels': ['paid', 'free'], 'at_most': 1}]

    ```
    """
    if not isinstance(constraints, (list, tuple)):
        raise ValueError(
            f"`label_constraints` is {str(constraints)[:60]!r}, but a list of groups is needed. Pass "
            '[{"labels": ["a", "b"], "at_most": 1}].'
        )
    return [_checked_group(group, set(labels), ancestors or {}) for group in constraints]


def _checked_group(group: Any, known: set[str], parents: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    names = group.get("labels") if isinstance(group, Mapping) else None
    form = '{"labels": ["a", "b"], "at_most": 1}'
    if not isinstance(names, (list, tuple)) or not names or not all(isinstance(name, str) for name in names):
        raise ValueError(f"A label constraint is {str(group)[:80]}, but it must name labels. Write {form}.")
    extra = sorted(set(map(str, group)) - {"labels", *BOUNDS})
    if extra or not any(group.get(bound) is not None for bound in BOUNDS):
        found = f"has {extra[0]!r}" if extra else "has no bound"
        raise ValueError(
            f"The label constraint on {names[0]!r} {found}, but it needs `at_least` or `at_most`: {form}."
        )
    names = [normalize("NFC", name) for name in names]
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ValueError(
            f"A label constraint names {unknown[0]!r}, which is not among the {len(known)} labels. Correct it or leave it out."
        )
    double = next((name for name in names if names.count(name) > 1), None) if len(set(names)) < len(names) else None
    if double is not None:
        raise ValueError(f"A label constraint names {double!r} twice. Name each label once.")
    bounds = {bound: group[bound] for bound in BOUNDS if group.get(bound) is not None}
    for bound, value in bounds.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(
                f"`{bound}` is {value!r} in the label constraint on {names[0]!r}, but it must be an integer of at least 1. Correct "
                "it, or leave it out."
            )
    least, most = bounds.get("at_least", 0), bounds.get("at_most", len(names))
    if least > min(most, len(names)):
        raise ValueError(
            f"`at_least` is {least} in the label constraint on {names[0]!r}, but at most {min(most, len(names))} of its "
            f"{len(names)} labels can be assigned. Use a smaller number."
        )
    members = set(names)
    for name in names:
        together = [name, *members.intersection(ancestors_of(parents, [name]))]
        if len(together) > most:
            raise ValueError(
                f"The label constraint on {names[0]!r} allows {most} of its labels, but {together[0]!r} always comes with its ancestor "
                f"{together[1]!r} of the same group. Leave one of them out of the group."
            )
    return {"labels": names, **bounds}


def constraints_without(constraints: Sequence[Mapping[str, Any]], removed: set[str]) -> list[dict[str, Any]]:
    """The constraints on the remaining labels, without those that no longer have an effect."""
    kept = []
    for group in constraints:
        names = [name for name in group["labels"] if name not in removed]
        least = min(group.get("at_least", 0), len(names))
        most = group.get("at_most", len(names))
        bounds = {"at_least": least} if least else {}
        if most < len(names):
            bounds["at_most"] = most
        if bounds:
            kept.append({"labels": names, **bounds})
    return kept


class LabelSetsMixin:
    """Mixin that determines the label set of each document; shared by trained models and exports."""

    config: Any
    _label_hierarchy: tuple[Any, Any, LabelHierarchy | None] = (None, None, None)

    @property
    def label_hierarchy(self) -> LabelHierarchy | None:
        """`config.label_parents` as a [`LabelHierarchy`]; `None` without parents."""
        config = self.config
        names, parents, hierarchy = self._label_hierarchy
        if names is not config.id2label or parents is not config.label_parents:
            hierarchy = None
            if config.label_parents:
                hierarchy = LabelHierarchy(config.labels, config.label_parents)
            self._label_hierarchy = (config.id2label, config.label_parents, hierarchy)
        return hierarchy

    def set_hierarchy(
        self,
        label_parents: dict[str, Any] | None = None,
        hierarchy: str | None = None,
        label_constraints: list[dict[str, Any]] | None = None,
    ) -> None:
        """
        Replace `label_parents`, `hierarchy` and `label_constraints` of a trained model. This changes its decisions, but not its label texts
        and logits. Tune thresholds again afterward; a guarantee of the old thresholds is removed.

        Args:
            label_parents, hierarchy, label_constraints: as in [`SepMldcConfig`].

        Raises:
            ValueError: as [`SepMldcConfig`]; the model is unchanged.

        Example:

        ```python
        model.set_hierarchy({"genetics": ["biology"]}, "closure")
        ```
        """
        config = self.config
        names = ("label_parents", "hierarchy", "label_constraints", "parents_in_label_texts", "threshold_info")
        former = {name: getattr(config, name) for name in names}
        texts = config.label_texts
        try:
            config.label_parents, config.hierarchy = label_parents, hierarchy
            config.label_constraints = label_constraints
            config.drop_guarantee()
            config.check_values()
        except Exception:
            for name, value in former.items():
                setattr(config, name, value)
            raise
        if config.label_texts != texts:
            config.parents_in_label_texts = False

    def close_scores(self, scores: torch.Tensor) -> torch.Tensor:
        """
        Scores (B, L), probabilities or logits, made consistent with the label hierarchy: the score of a label becomes the maximum over
        itself and its descendants. Unchanged if `config.hierarchy` is `None`.
        """
        hierarchy = self.label_hierarchy if self.config.hierarchy is not None else None
        return scores if hierarchy is None else hierarchy.close_scores(scores)

    def label_sets(
        self, scores: torch.Tensor, threshold: float | None = None, leaves: bool | None = None
    ) -> torch.Tensor:
        """
        The labels of each document, decided in these steps:

        1. labels whose closed score ([`close_scores`]) reaches their threshold; with `config.hierarchy`, also their ancestors;
        2. for each group with `at_least`, the best remaining labels until there are enough, and their ancestors;
        3. for each group with `at_most`, only the best labels are kept, those of step 2 first; with `config.hierarchy`, the descendants
           of a removed label are removed, too. Thus `at_most` always holds, and `at_least` holds unless an `at_most` prevents it;
        4. with `config.hierarchy="leaves"`, labels that have an assigned descendant are removed.

        Args:
            scores (`torch.Tensor` of shape `(B, L)`): probabilities.
            threshold (`float`, *optional*): one threshold for all labels, instead of `config.thresholds` or 0.5.
            leaves (`bool`, *optional*): whether to do step 4; by default as `config.hierarchy` says.

        Returns:
            `torch.BoolTensor` of shape `(B, L)`.

        Example:

        ```python
        chosen = model.label_sets(model.probabilities(logits))
        ```
        """
        config = self.config
        hierarchy = self.label_hierarchy if config.hierarchy is not None else None
        scores = self.close_scores(scores)
        cuts: Any = threshold
        if cuts is None:
            cuts = DEFAULT_THRESHOLD
            if config.thresholds is not None:
                cuts = torch.tensor(config.thresholds, dtype=scores.dtype, device=scores.device)
        chosen = scores >= cuts
        if hierarchy is not None:
            chosen = hierarchy.close(chosen)
        if config.label_constraints:
            chosen = self._constrained(chosen, scores, hierarchy)
        if leaves is None:
            leaves = config.hierarchy == "leaves"
        return hierarchy.leaves(chosen) if leaves and hierarchy is not None else chosen

    def _constrained(
        self, chosen: torch.Tensor, scores: torch.Tensor, hierarchy: LabelHierarchy | None
    ) -> torch.Tensor:
        """Steps 2 and 3 of [`label_sets`]."""
        config = self.config
        groups = [
            (torch.tensor([config.label2id[name] for name in group["labels"]], device=scores.device), group)
            for group in config.label_constraints
        ]
        needed = torch.zeros_like(chosen)
        for columns, group in groups:
            if "at_least" in group:
                rank = _ranks(scores[:, columns], chosen[:, columns])
                needed[:, columns] |= rank < group["at_least"]
        if hierarchy is not None:
            needed = hierarchy.close(needed)
        chosen = chosen | needed
        for columns, group in groups:
            if "at_most" in group:
                members = chosen[:, columns]
                rank = _ranks(scores[:, columns], members, needed[:, columns])
                left_out = torch.zeros_like(chosen)
                left_out[:, columns] = members & (rank >= group["at_most"])
                chosen = chosen & ~(left_out if hierarchy is None else hierarchy.descendants(left_out))
        return chosen


def _ranks(scores: torch.Tensor, *first: torch.Tensor) -> torch.Tensor:
    """Rank of each column (B, n), from 0: first columns of the last mask, then those of the previous mask, then the others by score."""
    order = scores.argsort(dim=1, descending=True, stable=True)
    for mask in first:
        order = order.gather(1, mask.gather(1, order).to(torch.uint8).argsort(dim=1, descending=True, stable=True))
    return torch.zeros_like(order).scatter_(
        1, order, torch.arange(order.shape[1], device=order.device).expand_as(order)
    )
