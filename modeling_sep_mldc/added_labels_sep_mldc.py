"""Scores of labels that were added to a trained model, before the model is trained again."""

import torch
import torch.nn.functional as F
from torch import nn


# Normal priors (mean, standard deviation) of the scale and the bias of a calibrated cosine. They are wide, and matter only for samples
# that determine neither.
SCALE_PRIOR, BIAS_PRIOR = (10.0, 10.0), (-4.0, 10.0)
# A label never scores lower the closer its text is to the document.
SMALLEST_SCALE = 1.0
NEWTON_STEPS = 50


@torch.no_grad()
def fit_cosine_calibration(cosines: torch.Tensor, targets: torch.Tensor) -> dict[str, float]:
    r"""
    Fit scale a and bias b by logistic regression (Platt, 1999), so that $\sigma(a \cos + b)$ is the probability of a label.

    Args:
        cosines (`torch.Tensor`): cosine similarities, one per pair of a document and a label text.
        targets (`torch.Tensor` of the same shape): 1 if the document has the label, else 0; or the probability of it.

    Returns:
        `dict[str, float]`: `{"scale": a, "bias": b}`, with a scale of at least 1.

    Example:

    ```python
    >>> cosines = torch.linspace(-1, 1, 2001)
    >>> calibration = fit_cosine_calibration(cosines, torch.sigmoid(8 * cosines - 5))
    >>> round(calibration["scale"], 1), round(calibration["bias"], 1)
    (8.0, -5.0)

    ```
    """
    cosines, targets = cosines.flatten().double(), targets.flatten().double()
    ones = torch.ones_like(cosines)
    priors = torch.tensor([SCALE_PRIOR, BIAS_PRIOR], dtype=torch.float64, device=cosines.device)
    scale, bias = _logistic_weights(torch.stack([cosines, ones], dim=1), targets, 0 * ones, priors).tolist()
    if scale < SMALLEST_SCALE:
        scale = SMALLEST_SCALE
        bias = _logistic_weights(ones.unsqueeze(1), targets, scale * cosines, priors[1:]).item()
    return {"scale": scale, "bias": bias}


def _logistic_weights(
    features: torch.Tensor, targets: torch.Tensor, offsets: torch.Tensor, priors: torch.Tensor
) -> torch.Tensor:
    """Weights (k,) of a logistic regression on features (n, k) with normal priors (k, 2), by Newton's method."""
    center, precision = priors[:, 0], priors[:, 1].pow(-2)

    def loss(weights: torch.Tensor) -> torch.Tensor:
        logits = features @ weights + offsets
        return (F.softplus(logits) - targets * logits).sum() + (precision * (weights - center).square()).sum() / 2

    weights = center
    for _ in range(NEWTON_STEPS):
        rates = torch.sigmoid(features @ weights + offsets)
        slope = features.t() @ (rates - targets) + precision * (weights - center)
        curvature = features.t() @ ((rates * (1 - rates)).unsqueeze(1) * features) + torch.diag(precision)
        step = torch.linalg.solve(curvature, slope)
        # The loss is convex: a step that is halved often enough lowers it.
        while step.abs().max() > 1e-9 and not loss(weights - step) <= loss(weights):
            step = step / 2
        weights = weights - step
        if step.abs().max() <= 1e-9:
            break
    return weights


class AddedLabelScores(nn.Module):
    r"""
    Logits of the labels that were added to a trained model, which are its last n: one linear classifier per label on the normalized
    document embedding,

    $$z_l = w_l \cdot \frac{e_x}{\lVert e_x \rVert} + b_l$$

    `add_labels` sets $w_l$ to a multiple of the direction of the label text's embedding, so that the logit is a calibrated cosine.
    `fit_new_labels` of `trainer` moves it toward the first documents that have the label.

    The scale and bias of the calibrated cosine are kept in `prior`, of shape `(n, 2)`, so that it can be recomputed.

    Args:
        num_labels (`int`): n.
        hidden_size (`int`): d.
    """

    def __init__(self, num_labels: int, hidden_size: int):
        super().__init__()
        self.prior: torch.Tensor
        self.register_buffer("prior", torch.zeros(num_labels, 2))
        self.weights = nn.Parameter(torch.zeros(num_labels, hidden_size))
        self.bias = nn.Parameter(torch.zeros(num_labels))

    def __len__(self) -> int:
        return len(self.bias)

    def forward(
        self, logits: torch.Tensor, document_embeds: torch.Tensor, labels: slice = slice(None)
    ) -> torch.Tensor:
        """
        The logits (B, L') with the columns of the added labels, the last ones, filled in.

        Args:
            logits (`torch.Tensor` of shape `(B, L')`): of all labels, or of a slice of them.
            document_embeds (`torch.Tensor` of shape `(B, d)`): e_x.
            labels (`slice`, *optional*): which of the added labels are the last columns of `logits`. All by default.
        """
        weights, bias = self.weights[labels], self.bias[labels]
        directions = F.normalize(document_embeds.float(), dim=-1, eps=1e-6).to(weights.dtype)
        own = directions @ weights.t() + bias
        return torch.cat([logits[:, : logits.shape[1] - len(bias)], own.to(logits.dtype)], dim=1)

    @torch.no_grad()
    def change_label_rows(self, kept: list[int], added: int = 0) -> None:
        """Keep the added labels `kept` in this order, and append `added` labels with scores of 0."""
        index = torch.tensor(kept, dtype=torch.long, device=self.bias.device)
        for name in ("weights", "bias", "prior"):
            former = getattr(self, name)
            rows = former.detach().index_select(0, index)
            rows = torch.cat([rows, rows.new_zeros(added, *rows.shape[1:])])
            is_parameter = isinstance(former, nn.Parameter)
            setattr(self, name, nn.Parameter(rows, requires_grad=former.requires_grad) if is_parameter else rows)

    @torch.no_grad()
    def start_from_cosines(self, labels: list[int], text_embeds: torch.Tensor) -> None:
        """Score the added labels `labels` (m) by the cosine to the embeddings (m, d) of their texts, with their `prior`."""
        scale, bias = self.prior[labels].unbind(dim=1)
        self.weights[labels] = (scale.unsqueeze(1) * F.normalize(text_embeds, dim=-1, eps=1e-6)).to(self.weights)
        self.bias[labels] = bias.to(self.bias)
