"""What depends on the number of labels, in chunks of labels: products with the label table, classification loss, best labels."""

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable
from torch.func import functional_call


# A loss over more scores than this goes through them in chunks of so many (4 MiB in float32).
LOSS_CHUNK_SIZE = 2**20
# The gradient of a label table with more numbers than this (16 MiB in float32) is added up in one tensor.
TABLE_GRADIENT_SIZE = 2**22
# Attention weights end here, relative to the largest: far below what a float32 sum of a million of them notices, and far
# above subnormal numbers, with which a CPU multiplies ten times slower.
SMALLEST_LOG_WEIGHT = -60.0


class LabelTable:
    """
    The label embeddings of one forward: the stored rows, some of them replaced out of place by fresh ones.

    Replaced columns are swapped in the (B, L) products, not in the (L, d) table: nothing of the table's size is copied,
    and no gradient of its size is made when the stored rows are constants.
    """

    def __init__(self, stored: torch.Tensor, fresh: torch.Tensor | None = None, indices: torch.Tensor | None = None):
        self.stored, self.fresh, self.indices = stored, fresh, indices
        self.gradient = None
        # Each use of a trained table has a gradient of its size: added up in place, they cost one tensor instead of ten.
        if stored.requires_grad and torch.is_grad_enabled() and stored.numel() > TABLE_GRADIENT_SIZE:
            if not torch.compiler.is_compiling() and not torch.is_autocast_enabled(stored.device.type):
                self.gradient = _TableGradient()
                self.stored = _Collect.apply(stored, self.gradient)

    def products(self, queries: torch.Tensor, cosine: bool = False) -> torch.Tensor:
        """Inner products (B, L) of queries (B, d) with each label embedding, or with its direction (`cosine=True`)."""
        if self.gradient is not None and queries.dtype == self.stored.dtype:
            scores = _Products.apply(queries, self.stored, self.gradient, cosine)
        else:
            scores = queries @ self.stored.t().to(queries.dtype)
            if cosine:
                scores = scores * self.stored.norm(dim=-1).clamp_min(1e-6).reciprocal()
        if self.fresh is not None:
            fresh = F.normalize(self.fresh, dim=-1, eps=1e-6) if cosine else self.fresh
            fresh_scores = queries @ fresh.t().to(queries.dtype)
            scores = scores.index_copy(1, self.indices, fresh_scores.to(scores.dtype))
        return scores

    def mix(self, weights: torch.Tensor) -> torch.Tensor:
        """Weighted sums (B, d) of the label embeddings for weights (B, L), Eq. 17."""
        if self.fresh is None:
            if self.gradient is not None and weights.dtype == self.stored.dtype:
                return _Mix.apply(weights, self.stored, self.gradient)
            return weights @ self.stored.to(weights.dtype)
        constant = weights.index_fill(1, self.indices, 0.0)
        return constant @ self.stored.to(weights.dtype) + weights.index_select(1, self.indices) @ self.fresh.to(
            weights.dtype
        )

    def dense(self) -> torch.Tensor:
        """The (L, d) matrix; a new tensor or a view, never the stored leaf."""
        if self.fresh is None:
            return self.stored.view_as(self.stored)
        return self.stored.index_copy(0, self.indices, self.fresh.to(self.stored.dtype))


def attention_weights(scores: torch.Tensor) -> torch.Tensor:
    """The softmax over labels of scores (B, L), Eq. 16, in float32."""
    scores = scores.float()
    floor = scores.detach().amax(dim=-1, keepdim=True) + SMALLEST_LOG_WEIGHT
    return torch.softmax(torch.maximum(scores, floor), dim=-1)


class _TableGradient:
    """The gradient (L, d) that the uses of a label table add up during one backward."""

    def __init__(self):
        self.total, self.backward_id = None, None

    def add(self, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        """Add left^T right, (B, L) and (B, d), in place."""
        current = torch._C._current_graph_task_id()
        # What another backward has left here (one that asked for other gradients only) is not part of this one.
        if self.total is None or self.backward_id != current:
            self.total, self.backward_id = left.t() @ right, current
        else:
            self.total.addmm_(left.t(), right)
        return self.total

    def take(self) -> torch.Tensor | None:
        total = self.total if self.backward_id == torch._C._current_graph_task_id() else None
        self.total = self.backward_id = None
        return total


class _Collect(torch.autograd.Function):
    """The table itself; its gradient is what its uses have added up, and what came by other ways."""

    @staticmethod
    def forward(ctx, stored: torch.Tensor, gradient: _TableGradient) -> torch.Tensor:
        ctx.gradient = gradient
        ctx.set_materialize_grads(False)  # the uses below return none, and run before this
        return stored.view_as(stored)

    @staticmethod
    @once_differentiable
    def backward(ctx, other: torch.Tensor | None):
        total = ctx.gradient.take()
        if total is None:
            return other, None
        return total if other is None else total.add_(other), None


class _Products(torch.autograd.Function):
    @staticmethod
    def forward(ctx, queries, table, gradient: _TableGradient, cosine: bool) -> torch.Tensor:
        scores, inverse = queries @ table.t(), None
        if cosine:
            inverse = table.norm(dim=-1).clamp_min(1e-6).reciprocal()
            scores *= inverse
        ctx.gradient = gradient
        ctx.save_for_backward(queries, table, inverse, scores if cosine else None)
        return scores

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output: torch.Tensor):
        queries, table, inverse, scores = ctx.saved_tensors
        scaled = grad_output if inverse is None else grad_output * inverse
        total = ctx.gradient.add(scaled, queries)
        if inverse is not None:
            # The length of a label embedding changes nothing; one shorter than 1e-6 is not divided by its length.
            along = (grad_output * scores).sum(dim=0) * inverse**2
            total.addcmul_(table, along.masked_fill(inverse >= 1e6, 0.0).unsqueeze(-1), value=-1.0)
        return scaled @ table, None, None, None


class _Mix(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weights, table, gradient: _TableGradient) -> torch.Tensor:
        ctx.gradient = gradient
        ctx.save_for_backward(weights, table)
        return weights @ table

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output: torch.Tensor):
        weights, table = ctx.saved_tensors
        ctx.gradient.add(weights, grad_output)
        return grad_output @ table.t(), None, None


def multi_label_loss(logits: torch.Tensor, labels: torch.Tensor, kind: str) -> torch.Tensor:
    r"""
    Classification loss of Eq. 19, read as binary or as softmax cross-entropy, in float32.

    $$\text{bce}: -\frac1B \sum_{i,l} y_{il}\log\sigma(z_{il}) + (1-y_{il})\log(1-\sigma(z_{il})) \qquad
      \text{softmax}: -\frac1B \sum_{i,l} y_{il} \log \text{softmax}(z_i)_l$$

    More than `LOSS_CHUNK_SIZE` scores are read in chunks of labels, which keeps the logits themselves for backward and
    writes one tensor of their size, the gradient. Value and gradient are the same.

    Args:
        logits (`torch.Tensor` of shape `(B, L)`): scores.
        labels (`torch.Tensor` of shape `(B, L)`): multi-hot targets, of any dtype; a byte a label is the smallest.
        kind (`str`): `"bce"`, `"softmax"` or `"bce+softmax"`, their sum.

    Returns:
        `torch.Tensor`: a float32 scalar; 0 for a batch without documents.
    """
    # A compiler fuses the casts, so it gets the formula as it stands.
    if logits.numel() > LOSS_CHUNK_SIZE and not torch.compiler.is_compiling():
        return _ChunkedLoss.apply(logits, labels.to(logits.device), kind)
    logits, labels = logits.float(), labels.to(device=logits.device, dtype=torch.float32)
    loss = logits.new_zeros(())
    if "bce" in kind:
        loss = loss + F.binary_cross_entropy_with_logits(logits, labels, reduction="sum")
    if "softmax" in kind:
        loss = loss - (labels * F.log_softmax(logits, dim=-1)).sum()
    return loss / max(len(logits), 1)


class _ChunkedLoss(torch.autograd.Function):
    """[`multi_label_loss`] whose temporaries are `LOSS_CHUNK_SIZE` scores large, forward and backward."""

    @staticmethod
    def forward(ctx, logits: torch.Tensor, labels: torch.Tensor, kind: str) -> torch.Tensor:
        loss = torch.zeros((), device=logits.device)
        if "softmax" in kind:
            # Shifted by each document's largest score: exponentials cannot overflow, and nothing large is cancelled below.
            largest = logits.amax(dim=-1, keepdim=True).float()
            total, count = torch.zeros_like(largest), torch.zeros_like(largest)
        for columns in _chunks(logits):
            scores, targets = logits[:, columns].float(), labels[:, columns].float()
            if "bce" in kind:
                loss += F.binary_cross_entropy_with_logits(scores, targets, reduction="sum")
            if "softmax" in kind:
                shifted = scores - largest
                loss -= (targets * shifted).sum()
                count += targets.sum(dim=-1, keepdim=True)
                total += shifted.exp_().sum(dim=-1, keepdim=True)
        saved = [logits, labels]
        if "softmax" in kind:
            loss += (count * total.log()).sum()
            saved += [largest + total.log(), count]
        ctx.save_for_backward(*saved)
        ctx.kind = kind
        return loss / len(logits)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        logits, labels, *normaliser = ctx.saved_tensors
        scale = grad_output / len(logits)
        gradient = torch.empty_like(logits)
        for columns in _chunks(logits):
            scores, targets = logits[:, columns].float(), labels[:, columns].float()
            if normaliser:
                log_total, count = normaliser
                rest = (scores - log_total).exp_().mul_(count).sub_(targets)
                if "bce" in ctx.kind:
                    rest += scores.sigmoid().sub_(targets)
            else:
                rest = scores.sigmoid().sub_(targets)
            gradient[:, columns] = rest.mul_(scale)
        return gradient, None, None


def _chunks(logits: torch.Tensor):
    width = max(LOSS_CHUNK_SIZE // len(logits), 1)
    return (slice(start, start + width) for start in range(0, logits.shape[1], width))


class LargeLabelSetsMixin:
    """Prediction of [`SepMldcForMultiLabelClassification`] that never holds the scores of all labels."""

    @torch.no_grad()
    def predict_top_k(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        k: int = 10,
        chunk_size: int = 16_384,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        r"""
        The best `k` labels of each document, `forward(...).logits.topk(k)`, from `chunk_size` labels at a time.

        For label sets so large that the logits (B, L) and α (B, L) of a batch do not fit. Label attention (Eq. 16-17) is
        summed up over a first pass through the labels with a running maximum, the logits are ranked in a second one.
        Without gradient and without dropout.

        Args:
            input_ids, attention_mask, token_type_ids, inputs_embeds: the documents, as in `forward`.
            k (`int`, defaults to 10): labels a document, from 1 to the number of labels.
            chunk_size (`int`, defaults to 16,384): labels that are scored together.

        Returns:
            `tuple(torch.Tensor, torch.Tensor)`: logits and label ids, both of shape `(B, k)`, best first. Of labels with
            equal logits any may come first.

        Raises:
            ValueError: `k` or `chunk_size` out of range.

        Example:

        ```python
        scores, indices = model.predict_top_k(**tokenizer(texts, padding=True, return_tensors="pt"), k=5)
        probabilities = scores.sigmoid()
        ```
        """
        num_labels = self.config.num_labels
        if isinstance(k, bool) or not isinstance(k, int) or not 1 <= k <= num_labels:
            raise ValueError(
                f"`k` is {k!r}, but it must be a whole number from 1 to {num_labels}, the number of labels."
            )
        if isinstance(chunk_size, bool) or not isinstance(chunk_size, int) or chunk_size < 1:
            raise ValueError(
                f"`chunk_size` is {chunk_size!r}, but a whole number of labels from 1 on is needed. Use the default, or less "
                "where memory is short."
            )
        chunks = [slice(start, min(start + chunk_size, num_labels)) for start in range(0, num_labels, chunk_size)]
        training = self.training
        self.eval()
        try:
            seen = self.cut_for_encoder(input_ids, attention_mask, token_type_ids, inputs_embeds)
            features = self.encode(**seen)[0]
            if self.config.label_attention:
                features = torch.cat([self._attended_in_chunks(features, chunks), features], dim=-1)
            features = features.to(self.classifier.bias.dtype)
            best = None
            for chunk in chunks:
                logits = self._logits_of(chunk, features)
                if self.lexical is not None and input_ids is not None:
                    logits = logits + self.lexical(input_ids, attention_mask, chunk).to(logits.dtype)
                scores, indices = logits.topk(min(k, logits.shape[1]), dim=-1)
                indices = indices + chunk.start
                if best is not None:
                    scores, indices = torch.cat([best[0], scores], dim=-1), torch.cat([best[1], indices], dim=-1)
                    scores, order = scores.topk(min(k, scores.shape[1]), dim=-1)
                    indices = indices.gather(1, order)
                best = scores, indices
        finally:
            self.train(training)
        return best

    def _attended_in_chunks(self, document_embeds: torch.Tensor, chunks: list[slice]) -> torch.Tensor:
        """Σ α e_y (B, d) of Eq. 16-17 with one chunk of α at a time: a softmax whose maximum and sum are running ones."""
        largest = document_embeds.new_full((len(document_embeds), 1), -torch.inf)
        total, mixed = torch.zeros_like(largest), torch.zeros_like(document_embeds)
        for chunk in chunks:
            table = LabelTable(self.label_embeddings[chunk])
            scores = table.products(document_embeds).float()
            new_largest = torch.maximum(largest, scores.amax(dim=-1, keepdim=True))
            weights = (scores - new_largest).clamp_(min=SMALLEST_LOG_WEIGHT).exp_()
            kept = (largest - new_largest).exp()
            total = total * kept + weights.sum(dim=-1, keepdim=True)
            mixed = mixed * kept + table.mix(weights)
            largest = new_largest
        return mixed / total

    def _logits_of(self, chunk: slice, features: torch.Tensor) -> torch.Tensor:
        """The classifier's logits (B, n) of the n labels of a chunk: its own forward with these rows for weights."""
        classifier = self.classifier
        rows = {"bias": classifier.bias[chunk]}
        if hasattr(classifier, "out_proj"):
            rows["out_proj.weight"] = classifier.out_proj.weight[chunk]
        return functional_call(classifier, rows, (features, LabelTable(self.label_embeddings[chunk]).products))
