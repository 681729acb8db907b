#!/usr/bin/env python
"""
`run_mldc.py` with a different classification loss, designed for rare labels and not part of the package.

    python benchmarks/tail_losses.py distribution+decoupled --train_file train.jsonl --do_train --do_predict --output_dir OUT ...

The loss is a sum of terms, joined by "+": `decoupled`, the decoupled softmax of the package; `asymmetric` (Ridnik et al. 2021, Asymmetric loss
for multi-label classification; exponents 0 and 4, margin 0.05); `distribution`, the distribution-balanced loss (Wu et al. 2020; weights 0.1 +
sigmoid(10 (r - 0.2)), negative-tolerant logits with factor 5 and shift 0.05). All further arguments are those of `run_mldc.py`.
"""

import runpy
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

from modeling_sep_mldc import SepMldcForMultiLabelClassification


def decoupled(logits, targets, config):
    negatives = logits.masked_fill(targets > 0, torch.finfo(logits.dtype).min).logsumexp(-1, keepdim=True)
    return (targets * F.softplus(negatives - logits)).sum()


def asymmetric(logits, targets, config):
    shifted = (torch.sigmoid(logits) - 0.05).clamp_min(0)
    return -(targets * F.logsigmoid(logits) + (1 - targets) * shifted**4 * torch.log1p(-shifted)).sum()


def distribution(logits, targets, config):
    counts = torch.tensor(config.label_counts, device=logits.device, dtype=torch.float32).clamp_min(1)
    repeated = (1 / counts) / (targets / counts).sum(-1, keepdim=True).clamp_min(1e-12)
    weights = 0.1 + torch.sigmoid(10 * (repeated - 0.2))
    moved = logits + 0.05 * torch.log((config.num_train_documents / counts - 1).clamp_min(1e-6))
    return (weights * (targets * F.softplus(-moved) + (1 - targets) * F.softplus(5 * moved) / 5)).sum()


TERMS = {"decoupled": decoupled, "asymmetric": asymmetric, "distribution": distribution}


def main() -> None:
    if len(sys.argv) < 2 or not set(sys.argv[1].split("+")) <= set(TERMS):
        raise SystemExit(f"The first argument is the loss: terms among {', '.join(TERMS)}, joined by '+'.")
    terms = [TERMS[name] for name in sys.argv.pop(1).split("+")]

    def loss(model, logits, labels):
        logits, labels = logits.float(), labels.to(logits.device).float()
        return sum(term(logits, labels, model.config) for term in terms) / max(len(logits), 1)

    SepMldcForMultiLabelClassification.classification_loss = loss
    command = Path(__file__).resolve().parents[1] / "examples" / "run_mldc.py"
    sys.argv[0] = str(command)
    sys.path.insert(0, str(command.parent))
    runpy.run_path(str(command), run_name="__main__")


if __name__ == "__main__":
    main()
