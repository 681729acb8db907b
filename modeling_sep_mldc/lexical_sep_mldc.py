"""Lexical scores of SEP-MLDC models: a sparse linear classifier on the tokens of the document, added to the encoder's scores."""

import torch
import torch.nn.functional as F
from torch import nn


# The margin for a label without training documents.
UNSEEN_MARGIN = -1.0
# Number of documents whose terms are looked up together on a CPU.
CPU_BATCH = 64


def bigram_ids(first: torch.Tensor, second: torch.Tensor, num_bigrams: int) -> torch.Tensor:
    """Bucket, 0 to `num_bigrams` - 1, of each pair of neighboring token ids: a hash, so different pairs may share one."""
    return (first.long() * 1_000_003 + second.long()) % num_bigrams


def term_weights(
    input_ids: torch.Tensor, attention_mask: torch.Tensor | None, idf: torch.Tensor, num_bigrams: int = 0
) -> torch.Tensor:
    r"""
    TF-IDF of the terms of documents: $(1 + \ln n_t) \cdot \text{idf}_t$, L2-normalized. Terms are the tokens, followed by the hash buckets
    of pairs of neighboring tokens. Special tokens and tokens that occur in no training document have an idf of 0 and are not part of
    pairs.

    Args:
        input_ids, attention_mask (`torch.Tensor` of shape `(B, T)`): the documents.
        idf (`torch.Tensor` of shape `(V + num_bigrams,)`): inverse document frequency of each token of the vocabulary and of
            each bucket.
        num_bigrams (`int`, defaults to 0): buckets, see [`bigram_ids`].

    Returns:
        `torch.Tensor` of shape `(B, V + num_bigrams)`, float32; zeros for a document without known tokens.
    """
    terms, attended = _terms(input_ids, attention_mask, idf, num_bigrams)
    return _tf_idf(terms, attended, idf.float()).t()


def present_term_weights(
    input_ids: torch.Tensor, attention_mask: torch.Tensor | None, idf: torch.Tensor, num_bigrams: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Like [`term_weights`], but only for the K terms that occur in the documents.

    Returns:
        `tuple(torch.Tensor, torch.Tensor)`: the weights, `(K + 1, B)`, and the row of each term in it, int32 of shape
        `(V + num_bigrams,)`. Row 0, which is zero, stands for terms that do not occur.
    """
    terms, attended = _terms(input_ids, attention_mask, idf, num_bigrams)
    rows = torch.zeros(len(idf), dtype=torch.int32, device=idf.device)
    rows[terms[attended > 0]] = 1
    present = rows.nonzero().flatten()
    rows[present] = torch.arange(1, len(present) + 1, dtype=torch.int32, device=idf.device)
    return _tf_idf(rows[terms].long(), attended, F.pad(idf[present].float(), (1, 0))), rows


def _terms(
    input_ids: torch.Tensor, attention_mask: torch.Tensor | None, idf: torch.Tensor, num_bigrams: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Terms of documents, and whether they count, (B, T') each: tokens, followed by the buckets of pairs."""
    vocab_size = idf.shape[0] - num_bigrams
    terms = input_ids.clamp_max(vocab_size - 1)
    attended = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    if num_bigrams:
        known = attended * (idf[terms] > 0)
        pairs = vocab_size + bigram_ids(terms[:, :-1], terms[:, 1:], num_bigrams)
        terms = torch.cat([terms, pairs], dim=1)
        attended = torch.cat([attended, known[:, :-1] * known[:, 1:]], dim=1)
    return terms, attended


def _tf_idf(terms: torch.Tensor, attended: torch.Tensor, idf: torch.Tensor) -> torch.Tensor:
    """Weights (len(idf), B) of the terms (B, T'), see [`term_weights`]."""
    # One column per document, as `embedding_bag` needs it; logarithms are computed only for terms that occur.
    terms, attended = terms.t(), attended.t().float()
    empty = torch.zeros(idf.shape[0], terms.shape[1], device=terms.device)
    counts = empty.scatter_add(0, terms, attended).gather(0, terms)
    weights = torch.where(counts > 0, 1 + counts.clamp_min(1).log(), counts) * idf[terms]
    # A term that occurs n times is stored n times, each with 1/n of its square.
    squares = (weights.square() * attended / counts.clamp_min(1)).sum(dim=0)
    return empty.scatter(0, terms, weights / squares.sqrt().clamp_min(1e-9))


class LexicalScores(nn.Module):
    """
    Margins of one linear classifier per label on the TF-IDF of tokens and pairs of neighboring tokens, times a scale, plus a
    bonus for rare labels. Both weights are chosen on validation data.

    Only the `num_features` largest weights of each label are stored, at 8 bytes per weight, instead of a row as long as the vocabulary.
    Lexical scores use all tokens of a document, while the encoder may read only the first ones. They help most with many rare labels.
    `SepMldcTrainer.fit_lexical_scores` fits them.

    Args:
        vocab_size, num_labels, num_features (`int`): V, L, F.
        num_bigrams (`int`, defaults to 0): buckets for pairs of neighboring tokens, whose features follow those of the V tokens.
    """

    def __init__(self, vocab_size: int, num_labels: int, num_features: int, num_bigrams: int = 0):
        super().__init__()
        self.num_bigrams = num_bigrams
        self.idf: torch.Tensor
        self.feature_ids: torch.Tensor
        self.feature_weights: torch.Tensor
        self.bias: torch.Tensor
        self.scale: torch.Tensor
        self.lift: torch.Tensor
        # Buffers, because they are saved with the model but not trained by gradient descent.
        self.register_buffer("idf", torch.zeros(vocab_size + num_bigrams))
        self.register_buffer("feature_ids", torch.zeros(num_labels, num_features, dtype=torch.int32))
        self.register_buffer("feature_weights", torch.zeros(num_labels, num_features))
        self.register_buffer("bias", torch.full((num_labels,), UNSEEN_MARGIN))
        self.register_buffer("scale", torch.zeros(()))
        self.register_buffer("lift", torch.zeros(num_labels))

    @torch.no_grad()
    def margins(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, labels: slice = slice(None)
    ) -> torch.Tensor:
        """Margins (B, L) of documents (B, T), for all labels or the slice `labels`; float32, without gradient."""
        ids, weights = self.feature_ids[labels], self.feature_weights[labels].float()
        bias = self.bias[labels].float()
        if torch.compiler.is_exporting():  # ONNX has no `embedding_bag`
            terms = term_weights(input_ids, attention_mask, self.idf, self.num_bigrams)
            of_features = terms.index_select(1, ids.flatten()).unflatten(1, ids.shape)
            return (of_features * weights).sum(dim=-1) + bias
        # Each label is a bag, and the batch is the embedding table: one pass over the stored weights, and no B x L x features tensor.
        if input_ids.device.type != "cpu" or torch.compiler.is_compiling():
            terms = term_weights(input_ids, attention_mask, self.idf, self.num_bigrams)
            return F.embedding_bag(ids, terms.t().contiguous(), mode="sum", per_sample_weights=weights).t() + bias
        # Only a few terms occur in a batch, so their table fits into the CPU cache. An accelerator would have to synchronize to learn
        # their number.
        sums = []
        for start in range(0, len(input_ids), CPU_BATCH):
            rows = slice(start, start + CPU_BATCH)
            mask = None if attention_mask is None else attention_mask[rows]
            terms, row_of_term = present_term_weights(input_ids[rows], mask, self.idf, self.num_bigrams)
            features = row_of_term.index_select(0, ids.flatten()).view_as(ids)
            sums.append(F.embedding_bag(features, terms, mode="sum", per_sample_weights=weights).t())
        return torch.cat(sums) + bias

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, labels: slice = slice(None)
    ) -> torch.Tensor:
        """What is added to the logits (B, L): `scale` times the margins, plus the bonus of each label."""
        return self.scale.float() * self.margins(input_ids, attention_mask, labels) + self.lift[labels].float()

    @torch.no_grad()
    def contributions(self, input_ids: torch.Tensor, labels: list[int]) -> torch.Tensor:
        """
        What each token (T,) of one document adds to the logits of some labels, (n, T): exact, as the scores are linear. Both
        tokens of a pair get half of what it adds.
        """
        terms = term_weights(input_ids[None], None, self.idf, self.num_bigrams)[0]
        weights = torch.zeros(len(labels), len(terms), device=terms.device)
        weights.scatter_add_(1, self.feature_ids[labels].long(), self.feature_weights[labels].float())
        weights = self.scale.float() * weights * terms

        def of_occurrence(ids, present):
            counts = torch.zeros_like(terms).index_add(0, ids, present)
            return weights[:, ids] / counts[ids].clamp_min(1) * present

        parts = of_occurrence(input_ids, torch.ones_like(input_ids, dtype=terms.dtype))
        if self.num_bigrams:
            known = (self.idf[input_ids] > 0).to(terms.dtype)
            pairs = len(terms) - self.num_bigrams + bigram_ids(input_ids[:-1], input_ids[1:], self.num_bigrams)
            halves = of_occurrence(pairs, known[:-1] * known[1:]) / 2
            parts[:, :-1] += halves
            parts[:, 1:] += halves
        return parts

    @torch.no_grad()
    def change_label_rows(self, rows: torch.Tensor, num_added: int = 0) -> None:
        """
        Keep the labels `rows` (n,) in this order and append `num_added` labels without training documents. Their bonus cancels their
        margin, so that lexical scores add nothing to their logits.
        """
        width = self.feature_ids.shape[1]
        ids, weights, bias = self.feature_ids[rows], self.feature_weights[rows], self.bias[rows]
        unseen = (-UNSEEN_MARGIN * self.scale).to(self.lift).expand(num_added)
        self.lift = torch.cat([self.lift[rows], unseen])
        self.feature_ids = torch.cat([ids, ids.new_zeros(num_added, width)])
        self.feature_weights = torch.cat([weights, weights.new_zeros(num_added, width)])
        self.bias = torch.cat([bias, bias.new_full((num_added,), UNSEEN_MARGIN)])

    @torch.no_grad()
    def resize_vocabulary(self, old_size: int, new_size: int) -> None:
        """
        Adapt the tables to a vocabulary of a different size: new tokens have no weight, weights of removed ones are dropped. Ids of pairs,
        which follow the vocabulary, are shifted.
        """
        kept, added = min(old_size, new_size), max(new_size - old_size, 0)
        self.idf = torch.cat([self.idf[:kept], self.idf.new_zeros(added), self.idf[old_size:]])
        ids = self.feature_ids
        removed = (ids >= kept) & (ids < old_size)
        moved = torch.where(ids >= old_size, ids + (new_size - old_size), ids)
        self.feature_weights = self.feature_weights.masked_fill(removed, 0.0)
        self.feature_ids = moved.masked_fill(removed, 0)

    def check(self, name: str) -> None:
        """Reject features, loaded from `name`, that are outside the vocabulary."""
        ids = self.feature_ids
        if not ids.is_meta and ids.numel() and not 0 <= ids.min() <= ids.max() < len(self.idf):
            raise ValueError(
                f"`lexical.feature_ids` of {name} contains ids outside the vocabulary of {len(self.idf)} features. The file is damaged, or its "
                "lexical scores belong to a different tokenizer. Fit them again."
            )
