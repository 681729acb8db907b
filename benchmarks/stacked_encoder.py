"""The documents of `recipe_sweep.py`, and K stacked copies of a MiniLM encoder. Uses only PyTorch and NumPy."""

import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F


HEADS, LAYERS, WIDTH = 12, 6, 384
MASK = 103  # the mask token of BERT's vocabulary


def ragged(arrays, name) -> list[np.ndarray]:
    ends = np.cumsum(arrays[f"{name}_sizes"].astype(np.int64))
    return np.split(arrays[f"{name}_values"], ends[:-1])


class Data:
    """The documents of one dataset as tensors; token ids are those of the words that occur."""

    def __init__(self, folder: Path, name: str, device):
        arrays = dict(np.load(folder / f"{name}.npz"))
        self.name, self.folder, self.device = name, folder, device
        tokens = {part: ragged(arrays, f"{part}_tokens") for part in ("train", "validation", "test")}
        tokens["label"] = ragged(arrays, "label_tokens")
        self.vocabulary = np.unique(np.concatenate([*(row for rows in tokens.values() for row in rows), [0, MASK]]))
        self.num_labels = len(arrays["labels"])
        self.lengths = {part: np.asarray([len(row) for row in rows]) for part, rows in tokens.items()}
        self.tokens = {}
        for part, rows in tokens.items():
            padded = np.zeros((len(rows), -(-int(self.lengths[part].max()) // 16) * 16), np.int64)
            for position, row in enumerate(rows):
                padded[position, : len(row)] = np.searchsorted(self.vocabulary, row)
            self.tokens[part] = torch.from_numpy(padded).to(device)
        self.labels = {}
        for part in ("train", "validation", "test"):
            rows = ragged(arrays, f"{part}_labels")
            hot = np.zeros((len(rows), self.num_labels), np.float32)
            for position, row in enumerate(rows):
                hot[position, row.astype(np.int64)] = 1
            self.labels[part] = torch.from_numpy(hot).to(device)
        self.states = {}

    def margins(self, size: int) -> torch.Tensor:
        short = np.load(self.folder / f"{self.name}_{size}_margins.npz")["validation"]
        return torch.from_numpy(short).to(self.device).float() / 50

    def propensities(self, rows) -> torch.Tensor:
        counts, number = self.labels["train"][rows].sum(0).double(), len(rows)
        c = max(math.log(number) - 1, 0.0) * 2.5**0.55
        return (1 + c * (counts + 1.5) ** -0.55).float()


def pretrained(folder: Path, vocabulary: np.ndarray) -> dict[str, torch.Tensor]:
    """Weights of the encoder under short names, matrices as (in, out), query, key and value as one."""
    raw = {name: torch.from_numpy(value.astype(np.float32)) for name, value in np.load(folder / "encoder.npz").items()}
    rows = vocabulary.astype(np.int64)
    if "kept" in raw:  # a file without the words that no dataset has
        rows = np.searchsorted(raw["kept"].numpy().astype(np.int64), rows)
    weights = {
        "words": raw["embeddings.word_embeddings.weight"][torch.from_numpy(rows)],
        "positions": raw["embeddings.position_embeddings.weight"] + raw["embeddings.token_type_embeddings.weight"][:1],
        "embed_norm_w": raw["embeddings.LayerNorm.weight"],
        "embed_norm_b": raw["embeddings.LayerNorm.bias"],
    }
    for layer in range(LAYERS):
        name = f"encoder.layer.{layer}."
        attention = [f"{name}attention.self.{part}" for part in ("query", "key", "value")]
        weights[f"{layer}.qkv_w"] = torch.cat([raw[f"{part}.weight"].t() for part in attention], dim=1)
        weights[f"{layer}.qkv_b"] = torch.cat([raw[f"{part}.bias"] for part in attention])
        for short, part in (("out", "attention.output.dense"), ("up", "intermediate.dense"), ("down", "output.dense")):
            weights[f"{layer}.{short}_w"] = raw[f"{name}{part}.weight"].t()
            weights[f"{layer}.{short}_b"] = raw[f"{name}{part}.bias"]
        for short, part in (("norm1", "attention.output.LayerNorm"), ("norm2", "output.LayerNorm")):
            weights[f"{layer}.{short}_w"] = raw[f"{name}{part}.weight"]
            weights[f"{layer}.{short}_b"] = raw[f"{name}{part}.bias"]
    return {name: value.contiguous() for name, value in weights.items()}


def affine(x, weight, bias):
    """(K, M, in) by (K, in, out) plus (K, out)."""
    return torch.baddbmm(bias.unsqueeze(1), x, weight)


def normalized(x, weight, bias):
    return torch.addcmul(bias.unsqueeze(1), F.layer_norm(x, x.shape[-1:], eps=1e-12), weight.unsqueeze(1))


def embed(weights, tokens):
    """(K, B, T) tokens to (K, B*T, d)."""
    runs, batch, length = tokens.shape
    words = weights["words"]
    stacked, size = words.shape[0], words.shape[1]
    flat = words.reshape(stacked * size, WIDTH)
    if stacked > 1:
        tokens = tokens + (torch.arange(stacked, device=tokens.device) * size).view(-1, 1, 1)
    x = F.embedding(tokens, flat) + weights["positions"][:, :length].unsqueeze(1)
    x = x.reshape(x.shape[0], batch * length, WIDTH)
    return normalized(x, weights["embed_norm_w"], weights["embed_norm_b"])


def run_layer(weights, layer, x, mask, dropout=0.0):
    """x (K, B*T, d), mask (K or 1, B, T) of the real tokens."""
    runs, (batch, length) = x.shape[0], mask.shape[1:]
    qkv = affine(x, weights[f"{layer}.qkv_w"], weights[f"{layer}.qkv_b"])
    qkv = qkv.view(runs * batch, length, 3, HEADS, WIDTH // HEADS).permute(2, 0, 3, 1, 4)
    bias = torch.zeros(mask.shape, dtype=x.dtype, device=x.device).masked_fill_(~mask, -1e4)
    bias = bias.expand(runs, batch, length).reshape(runs * batch, 1, 1, length).expand(-1, HEADS, length, -1)
    mixed = F.scaled_dot_product_attention(qkv[0], qkv[1], qkv[2], attn_mask=bias, dropout_p=dropout)
    mixed = mixed.transpose(1, 2).reshape(runs, batch * length, WIDTH)
    out = affine(mixed, weights[f"{layer}.out_w"], weights[f"{layer}.out_b"])
    x = normalized(x + F.dropout(out, dropout), weights[f"{layer}.norm1_w"], weights[f"{layer}.norm1_b"])
    inner = F.gelu(affine(x, weights[f"{layer}.up_w"], weights[f"{layer}.up_b"]))
    out = affine(inner, weights[f"{layer}.down_w"], weights[f"{layer}.down_b"])
    return normalized(x + F.dropout(out, dropout), weights[f"{layer}.norm2_w"], weights[f"{layer}.norm2_b"])


def pooled(x, mask):
    runs, (batch, length) = x.shape[0], mask.shape[1:]
    mask = mask.unsqueeze(-1)
    total = (x.view(runs, batch, length, WIDTH).float() * mask).sum(2)
    return total / mask.sum(2).clamp_min(1)
