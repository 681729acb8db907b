"""The losses of `stacked_runs.py`, one value for each of K runs."""

import torch
import torch.nn.functional as F
from stacked_encoder import WIDTH


WEIGHTINGS = {"jaccard": (0.0, 1.0), "complement": (1.0, -1.0), "uniform": (1.0, 0.0)}


class Losses:
    """Mixin for `Group`: methods return a loss for each run, (K,)."""

    def losses(self, logits, targets, embeds):
        total = torch.zeros(self.number, device=self.device)
        documents = logits.shape[1]
        if self.contrastive_only:
            return total + self.contrastive_losses(embeds, targets)
        if self.has("bce"):
            value = F.binary_cross_entropy_with_logits(logits, targets, reduction="none").sum((1, 2)) / documents
            total = total + self.vector("bce") * value
        if self.has("softmax"):
            value = -(targets * F.log_softmax(logits, dim=-1)).sum((1, 2)) / documents
            total = total + self.vector("softmax") * value
        if self.has("decoupled"):
            negatives = logits.masked_fill(targets > 0, -1e4).logsumexp(-1, keepdim=True)
            value = (targets * F.softplus(negatives - logits)).sum((1, 2)) / documents
            total = total + self.vector("decoupled") * value
        if self.has("asymmetric"):
            shifted = (torch.sigmoid(logits) - 0.05).clamp_min(0)
            terms = targets * F.logsigmoid(logits) + (1 - targets) * shifted**4 * torch.log1p(-shifted)
            total = total - self.vector("asymmetric") * terms.sum((1, 2)) / documents
        if self.has("distribution"):
            total = total + self.vector("distribution") * self.distribution_balanced(logits, targets) / documents
        return total + self.contrastive_losses(embeds, targets)

    def distribution_balanced(self, logits, targets):
        """Rebalanced weights (0.1 + sigmoid(10 (r - 0.2))) and negative-tolerant logits (factor 5, shift 0.05 times the prior)."""
        if "shares" not in self.vectors:
            counts = torch.stack([self.data.labels["train"][rows].sum(0) for rows in self.rows]).clamp_min(1)
            self.vectors["shares"] = counts
        counts = self.vectors["shares"].unsqueeze(1)
        inverse = 1 / counts
        repeated = inverse / (targets * inverse).sum(-1, keepdim=True).clamp_min(1e-12)
        weights = 0.1 + torch.sigmoid(10 * (repeated - 0.2))
        moved = logits + 0.05 * torch.log((len(self.rows[0]) / counts - 1).clamp_min(1e-6))
        terms = targets * F.softplus(-moved) + (1 - targets) * F.softplus(5 * moved) / 5
        return (weights * terms).sum((1, 2))

    def contrastive_losses(self, embeds, targets):
        total = torch.zeros(self.number, device=self.device)
        for name, function in (
            ("beta", self.label_loss),
            ("gamma", self.document_loss),
            ("prototype", self.prototype_loss),
        ):
            if self.has(name):
                total = total + self.vector(name) * function(embeds.float(), targets)
        if self.shared["queue"]:
            self.queue = [(embeds.detach().float(), targets), *self.queue]
            kept = -(-self.shared["queue"] // embeds.shape[1])
            self.queue = self.queue[:kept]
        return total

    def negative_weights(self, jaccard):
        if "weighting" not in self.vectors:
            constants = [WEIGHTINGS[run["weighting"]] for run in self.runs]
            self.vectors["weighting"] = torch.tensor(constants, device=self.device)
        constants = self.vectors["weighting"]
        return constants[:, 0].view(-1, 1, 1) + constants[:, 1].view(-1, 1, 1) * jaccard

    def contrast(self, embeds, others=None):
        embeds = F.normalize(embeds, dim=-1)
        others = embeds if others is None else F.normalize(others, dim=-1)
        return embeds @ others.transpose(1, 2) / self.vector("temperature").view(-1, 1, 1)

    def log_negatives(self, products, weights, negative):
        log_weights = (weights.clamp_min(0) * negative).log()
        some = (log_weights > -torch.inf).any(-1, keepdim=True)
        return torch.logsumexp(products + torch.where(some, log_weights, 0.0), dim=-1), some.squeeze(-1)

    @staticmethod
    def overlaps(rows, others=None):
        others = rows if others is None else others
        both = rows @ others.transpose(1, 2)
        return both, rows.sum(-1).unsqueeze(2) + others.sum(-1).unsqueeze(1) - both

    def label_loss(self, embeds, targets):
        counts = targets.sum(1)
        present = int((counts > 0).sum(1).max())
        ids = counts.topk(present, dim=1).indices
        columns = targets.gather(2, ids.unsqueeze(1).expand(-1, targets.shape[1], -1)).transpose(1, 2)
        table = self.label_embeds.gather(1, ids.unsqueeze(-1).expand(-1, -1, WIDTH))
        both, either = self.overlaps(columns)
        is_here = columns.sum(-1) > 0
        negative = is_here.unsqueeze(1) & ~torch.eye(present, dtype=torch.bool, device=self.device)
        products = self.contrast(table)
        below, some = self.log_negatives(products, self.negative_weights(both / either.clamp_min(1)), negative)
        terms = (below - products.diagonal(dim1=1, dim2=2)) * (some & is_here)
        return terms.sum(1) / (some & is_here).sum(1).clamp_min(1)

    def document_loss(self, embeds, targets):
        others = torch.cat([targets, *(past for _, past in self.queue)], dim=1)
        both, either = self.overlaps(targets, others)
        jaccard = both / either.clamp_min(1)
        itself = torch.eye(targets.shape[1], others.shape[1], dtype=torch.bool, device=self.device)
        same = both == either
        positive = same & (both > 0) & ~itself
        products = self.contrast(embeds, torch.cat([embeds, *(past for past, _ in self.queue)], dim=1))
        below, some = self.log_negatives(products, self.negative_weights(jaccard), ~same)
        printed = torch.where(positive & some.unsqueeze(-1), below.unsqueeze(-1) - products, 0.0).sum((1, 2))
        printed = printed / targets.shape[1]
        if not self.has("positives_jaccard"):
            return printed
        share = jaccard * ~itself
        others = products.masked_fill(itself, -1e4)
        log_probabilities = others - others.logsumexp(-1, keepdim=True)
        soft = -(share * log_probabilities).sum(-1) / share.sum(-1).clamp_min(1e-6)
        return torch.where(self.vector("positives_jaccard") > 0, soft.mean(1), printed)

    def prototype_loss(self, embeds, targets):
        """Contrast of each document with all label embeddings: the mean over its labels of -log softmax of cosine / tau."""
        table = F.normalize(self.label_embeds, dim=-1)
        products = F.normalize(embeds, dim=-1) @ table.transpose(1, 2) / self.vector("temperature").view(-1, 1, 1)
        negatives = products.masked_fill(targets > 0, -1e4).logsumexp(-1, keepdim=True)
        terms = (targets * F.softplus(negatives - products)).sum(-1) / targets.sum(-1).clamp_min(1)
        return terms.mean(1)
