"""Continued pretraining of the encoders of `stacked_runs.py`."""

import numpy as np
import torch
import torch.nn.functional as F
from stacked_encoder import LAYERS, MASK, WIDTH, embed, pooled, run_layer


class Pretraining:
    """Mixin for `Group`."""

    def adapt(self) -> None:
        """
        Continued pretraining of the encoder on training documents and label texts.

        Masked language modeling (15% of the tokens, output weights tied to the word embeddings, a new transform that starts as
        the identity), or SimCSE (a document and itself under other dropout are a pair; temperature 0.05). Learning rate 5e-5, linear decay.
        """
        shared, limit = self.shared, min(self.shared["max_length"], 128)
        width, total = 64, shared["adapt_steps"]
        generator, rng = torch.Generator(self.device).manual_seed(0), np.random.default_rng(99)
        transform = torch.eye(WIDTH, device=self.device).expand(self.number, -1, -1).clone().requires_grad_()
        bias = torch.zeros(self.number, 1, len(self.data.vocabulary), device=self.device, requires_grad=True)
        extra = torch.optim.AdamW([transform, bias], lr=1e-3)
        mask_id = int(np.searchsorted(self.data.vocabulary, MASK))
        vectors, self.vectors = self.vectors, {"lr": torch.full((self.number,), 5e-5, device=self.device)}
        share = self.size / (self.size + self.data.num_labels)
        for step in range(total):
            part = "train" if rng.random() < max(share, 0.5) else "label"
            count = self.size if part == "train" else self.data.num_labels
            places = rng.integers(count, size=(1, width))
            lengths = torch.from_numpy(np.minimum(self.data.lengths[part][places[0]], limit)).to(self.device)
            ids = self.data.tokens[part][torch.from_numpy(places[0]).to(self.device), : int(lengths.max())]
            mask = (torch.arange(ids.shape[1], device=self.device) < lengths[:, None]).unsqueeze(0)
            weights = self.weights()
            if shared["adapt"] == "mlm":
                chosen = (torch.rand(ids.shape, generator=generator, device=self.device) < 0.15) & mask[0]
                x = self.adapted_states(weights, ids.masked_fill(chosen, mask_id), mask, 0.1)
                where = chosen.flatten().nonzero().squeeze(1)
                hidden = F.layer_norm(x[:, where].float() @ transform, (WIDTH,)).to(self.dtype)
                scores = (hidden @ weights["words"].transpose(1, 2)).float() + bias
                gold = ids.flatten()[where].expand(self.number, -1)
                losses = F.cross_entropy(scores.transpose(1, 2), gold, reduction="none").mean(1)
            else:
                first, second = (
                    F.normalize(pooled(self.adapted_states(weights, ids, mask, 0.1), mask), dim=-1) for _ in range(2)
                )
                gold = torch.arange(width, device=self.device).expand(self.number, -1)
                losses = F.cross_entropy(first @ second.transpose(1, 2) / 0.05, gold, reduction="none").mean(1)
            losses.sum().backward()
            factor = min((step + 1) / max(total // 20, 1), 1 - step / total)
            self.update(torch.full((self.number,), factor, device=self.device), True)
            extra.step()
            extra.zero_grad()
            if step in (0, total // 2, total - 1):
                print(f"adapt {shared['adapt']} {step}: loss {losses.mean().item():.3f}", flush=True)
        self.vectors = vectors
        for state in (self.first, self.second, self.gradient):
            state.zero_()
        self.steps = {"body": 0, "head": 0}
        with torch.no_grad():
            weights, table = self.weights(), []
            for rows in np.array_split(np.arange(self.data.num_labels), max(self.data.num_labels // 128, 1)):
                table.append(self.encode(weights, "label", rows[None])[0])
            for name in ("table", "laat_q"):
                if name in self.leaves:
                    self.leaves[name].copy_(torch.cat(table, dim=1))

    def adapted_states(self, weights, ids, mask, dropout):
        x = F.dropout(embed(weights, ids.expand(self.number, -1, -1)), dropout)
        for layer in range(LAYERS):
            x = run_layer(weights, layer, x, mask, dropout)
        return x
