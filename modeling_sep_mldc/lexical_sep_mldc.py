"""Lexical scores of SEP-MLDC models: a sparse linear classifier over the document's own tokens, beside the encoder's scores."""

import torch
import torch.nn.functional as F
from torch import nn


# The margin of a linear classifier for a label that it has never seen.
UNSEEN_MARGIN = -1.0


def term_weights(input_ids: torch.Tensor, attention_mask: torch.Tensor | None, idf: torch.Tensor) -> torch.Tensor:
    r"""
    TF-IDF of the tokens of documents: $(1 + \ln n_t) \cdot \text{idf}_t$, scaled to length 1. A token that was in no
    training document, and every special token, has an idf of 0.

    Args:
        input_ids, attention_mask (`torch.Tensor` of shape `(B, T)`): the documents.
        idf (`torch.Tensor` of shape `(V,)`): inverse document frequency of each token of the vocabulary.

    Returns:
        `torch.Tensor` of shape `(B, V)`, float32; zeros for a document without known tokens.
    """
    idf = idf.float()
    attended = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    counts = torch.zeros(input_ids.shape[0], idf.shape[0], device=input_ids.device)
    counts = counts.scatter_add(1, input_ids.clamp_max(idf.shape[0] - 1), attended.to(counts.dtype))
    weights = torch.where(counts > 0, 1 + counts.clamp_min(1).log(), counts) * idf
    return F.normalize(weights, dim=-1, eps=1e-9)


class LexicalScores(nn.Module):
    """
    Margins of one linear classifier a label on the TF-IDF of tokens, times a scale, plus a lift of rare labels; how much both
    count was chosen on validation documents.

    Of each label only the largest weights are stored, `num_lexical_features` of them: a label costs 8 bytes a weight, not a row
    as long as the vocabulary. An encoder sees the meaning of the first tokens; this sees the words of all of them, which
    tells thousands of rare labels apart. `SepMldcTrainer.fit_lexical_scores` fits it.
    """

    def __init__(self, vocab_size: int, num_labels: int, num_features: int):
        super().__init__()
        # Buffers: constants of the model, saved with it, and no affair of an optimiser.
        self.register_buffer("idf", torch.zeros(vocab_size))
        self.register_buffer("feature_ids", torch.zeros(num_labels, num_features, dtype=torch.int32))
        self.register_buffer("feature_weights", torch.zeros(num_labels, num_features))
        self.register_buffer("bias", torch.full((num_labels,), UNSEEN_MARGIN))
        self.register_buffer("scale", torch.zeros(()))
        self.register_buffer("lift", torch.zeros(num_labels))

    @torch.no_grad()
    def margins(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, labels=slice(None)):
        """Margins (B, L) of documents (B, T), or of the `labels` of a slice; float32, without gradient."""
        terms = term_weights(input_ids, attention_mask, self.idf)
        ids, weights = self.feature_ids[labels], self.feature_weights[labels].float()
        if torch.compiler.is_exporting():  # ONNX has no bags
            of_features = terms.index_select(1, ids.flatten()).unflatten(1, ids.shape)
            return (of_features * weights).sum(dim=-1) + self.bias[labels].float()
        # Bags are labels and the table is the batch: one pass over the stored weights, nothing of B x L x features.
        sums = F.embedding_bag(ids, terms.t().contiguous(), mode="sum", per_sample_weights=weights)
        return sums.t() + self.bias[labels].float()

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, labels=slice(None)):
        """What is added to the logits (B, L): `scale` times the margins, plus the lift of each label."""
        return self.scale.float() * self.margins(input_ids, attention_mask, labels) + self.lift[labels].float()

    @torch.no_grad()
    def contributions(self, input_ids: torch.Tensor, labels: list[int]) -> torch.Tensor:
        """What each token (T,) of one document adds to the logits of some labels, (n, T): exact, as the scores are linear."""
        terms = term_weights(input_ids[None], None, self.idf)[0]
        of_token = terms / torch.zeros_like(terms).index_add(0, input_ids, terms.new_ones(len(input_ids))).clamp_min(1)
        weights = torch.zeros(len(labels), len(terms), device=terms.device)
        weights.scatter_add_(1, self.feature_ids[labels].long(), self.feature_weights[labels].float())
        return self.scale.float() * weights[:, input_ids] * of_token[input_ids]

    @torch.no_grad()
    def change_label_rows(self, rows: torch.Tensor, num_added: int = 0) -> None:
        """Keep the labels `rows` (n,) in this order and append `num_added` labels that no training document had."""
        width = self.feature_ids.shape[1]
        ids, weights, bias = self.feature_ids[rows], self.feature_weights[rows], self.bias[rows]
        self.lift = torch.cat([self.lift[rows], self.lift.new_zeros(num_added)])
        self.feature_ids = torch.cat([ids, ids.new_zeros(num_added, width)])
        self.feature_weights = torch.cat([weights, weights.new_zeros(num_added, width)])
        self.bias = torch.cat([bias, bias.new_full((num_added,), UNSEEN_MARGIN)])

    @torch.no_grad()
    def resize_vocabulary(self, old_size: int, new_size: int) -> None:
        """
        Fit the tables to a vocabulary of another size: new tokens have no weight, weights of removed ones are dropped. What lies
        beyond the vocabulary in the tables of features moves along.
        """
        kept, added = min(old_size, new_size), max(new_size - old_size, 0)
        self.idf = torch.cat([self.idf[:kept], self.idf.new_zeros(added), self.idf[old_size:]])
        ids = self.feature_ids
        removed = (ids >= kept) & (ids < old_size)
        moved = torch.where(ids >= old_size, ids + (new_size - old_size), ids)
        self.feature_weights = self.feature_weights.masked_fill(removed, 0.0)
        self.feature_ids = moved.masked_fill(removed, 0)

    def check(self, name: str) -> None:
        """Refuse features, loaded from `name`, that are outside the vocabulary."""
        ids = self.feature_ids
        if not ids.is_meta and ids.numel() and not 0 <= ids.min() <= ids.max() < len(self.idf):
            raise ValueError(
                f"`lexical.feature_ids` of {name} names features outside a vocabulary of {len(self.idf)}. The file is damaged, or its "
                "lexical scores belong to another tokenizer. Fit them again."
            )
