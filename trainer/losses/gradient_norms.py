"""Gradient norms of the terms of a loss, which show how strongly each term affects each group of parameters."""

from collections.abc import Mapping, Sequence

import torch
from torch import nn


def parameter_groups(model: nn.Module) -> dict[str, list[nn.Parameter]]:
    """The trained parameters of a SEP-MLDC model: `"encoder"`, `"label_embeddings"` and `"head"` (all others); no empty group."""
    groups: dict[str, list[nn.Parameter]] = {"encoder": [], "label_embeddings": [], "head": []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            own = name.split(".")[-1] == "label_embeddings"
            groups["encoder" if "backbone." in name else "label_embeddings" if own else "head"].append(parameter)
    return {name: group for name, group in groups.items() if group}


def gradient_norms(
    terms: Mapping[str, torch.Tensor], groups: Mapping[str, Sequence[nn.Parameter]]
) -> dict[str, torch.Tensor]:
    """
    L2 norm of the gradient of each loss term with respect to each group of parameters. The graph is retained, and no `.grad` is changed.

    Args:
        terms (`dict[str, torch.Tensor]`): scalars, already multiplied by their weights in the loss.
        groups (`dict[str, list[nn.Parameter]]`): see [`parameter_groups`].

    Returns:
        `dict[str, torch.Tensor]`: `"gradient_norm_{group}_{term}"`, scalars without gradient; 0 where a term does not depend on
        the group.
    """
    norms = {}
    for name, term in terms.items():
        parameters = [parameter for group in groups.values() for parameter in group]
        found: tuple[torch.Tensor | None, ...] = (None,) * len(parameters)
        if term.requires_grad:
            found = torch.autograd.grad(term, parameters, retain_graph=True, allow_unused=True)
        rest = iter(found)
        for group, members in groups.items():
            own = [gradient for gradient in (next(rest) for _ in members) if gradient is not None]
            squares = [gradient.detach().float().square().sum() for gradient in own]
            norms[f"gradient_norm_{group}_{name}"] = (
                torch.stack(squares).sum().sqrt() if squares else term.new_zeros(())
            )
    return norms
