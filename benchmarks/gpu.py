#!/usr/bin/env python
"""
Documents per second and model FLOP utilization on a GPU, in one call of under eight minutes.

    python benchmarks/gpu.py                 # writes benchmarks/results/gpu.json
    python benchmarks/gpu.py --smoke         # a few steps of a tiny encoder on any device

MiniLM (6 layers, 384 wide) and a RoBERTa-base-sized random encoder, 128 and 512 tokens, bf16, eager and compiled, bare
against SEP-MLDC with 76, 3,201 and 100,000 labels. Utilization counts 6 FLOP per parameter and token (2 in inference) plus
attention, over the peak given with --peak-tflops (dense bf16: 989 for H100 SXM, 312 for A100, 165 for RTX 4090).
"""

import argparse
import json
import time
from functools import partial
from pathlib import Path

import torch
from training_speed import BareEncoder, make_batches
from transformers import BertConfig

from modeling_sep_mldc import SepMldcConfig, SepMldcForMultiLabelClassification
from trainer.losses import document_contrastive_loss, label_contrastive_loss


ENCODERS = {
    "minilm": {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536},
    "base": {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072},
}
TINY = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}


def encoder_flops(config, batch_size: int, length: int, training: bool) -> float:
    d, width = config.hidden_size, config.intermediate_size
    parameters = config.num_hidden_layers * (4 * d * d + 2 * d * width)
    attention = config.num_hidden_layers * 2 * length * d
    return (6 if training else 2) * batch_size * length * (parameters + attention)


def build(kind: str, config, num_labels: int, device: str):
    if kind == "bare":
        return BareEncoder(config, num_labels).to(device)
    model = SepMldcForMultiLabelClassification(
        SepMldcConfig(backbone_config=config, num_labels=num_labels, classifier="mlp+similarity")
    ).to(device)
    model.label_embeddings.requires_grad_(True)
    torch.nn.init.normal_(model.label_embeddings)
    return model


def training_step(model, optimizer, batch, device: str) -> None:
    with torch.autocast(device, torch.bfloat16):
        output = model(**batch)
    loss = output["loss"]
    if "document_embeds" in output:
        loss = loss + 0.01 * label_contrastive_loss(output["label_embeds"], batch["labels"])
        loss = loss + 0.01 * document_contrastive_loss(output["document_embeds"], batch["labels"])
    loss.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def inference_step(model, batch, device: str) -> None:
    with torch.inference_mode(), torch.autocast(device, torch.bfloat16):
        model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])


def seconds_per_step(function, seconds: float, minimum: int = 5) -> float:
    for _ in range(3):
        function()
    synchronize()
    start, count = time.perf_counter(), 0
    while count < minimum or time.perf_counter() - start < seconds:
        function()
        count += 1
    synchronize()
    return (time.perf_counter() - start) / count


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[1])
    parser.add_argument("--labels", type=int, nargs="+", default=[76, 3201, 100_000])
    parser.add_argument("--lengths", type=int, nargs="+", default=[128, 512])
    parser.add_argument("--encoders", nargs="+", default=list(ENCODERS))
    parser.add_argument("--batch-tokens", type=int, default=32_768, dest="batch_tokens")
    parser.add_argument("--seconds", type=float, default=1.5, help="seconds per measurement")
    parser.add_argument("--peak-tflops", type=float, default=989.0, dest="peak_tflops")
    parser.add_argument("--no-compile", action="store_false", dest="compile")
    parser.add_argument("--smoke", action="store_true")
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if options.smoke:
        options.labels, options.lengths, options.encoders = [20], [16], ["minilm"]
        options.batch_tokens, options.seconds, options.compile = 64, 0.0, False
    rows = []
    print(
        f"{'encoder':<8}{'tokens':>7}{'labels':>8} {'system':<9}{'mode':<9}{'train doc/s':>12}{'MFU':>7}{'infer doc/s':>12}{'MFU':>7}"
    )
    for encoder in options.encoders:
        sizes = TINY if options.smoke else ENCODERS[encoder]
        config = BertConfig(vocab_size=30522, max_position_embeddings=512, **sizes)
        for length in options.lengths:
            options.batch_size, options.length = max(options.batch_tokens // length, 1), length
            for num_labels in options.labels:
                batch = {k: v.to(device) for k, v in make_batches(options, num_labels, 1)[0].items()}
                for kind in ("bare", "sep-mldc"):
                    for mode in ["eager", "compiled"] if options.compile else ["eager"]:
                        torch.manual_seed(0)
                        plain = build(kind, config, num_labels, device)
                        model = torch.compile(plain) if mode == "compiled" else plain
                        optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-5, fused=device == "cuda")
                        plain.train()
                        step = seconds_per_step(
                            partial(training_step, model, optimizer, batch, device), options.seconds
                        )
                        plain.eval()
                        infer = seconds_per_step(partial(inference_step, model, batch, device), options.seconds)
                        peak = options.peak_tflops * 1e12
                        flops = [
                            encoder_flops(config, options.batch_size, length, training) for training in (True, False)
                        ]
                        row = {
                            "encoder": encoder,
                            "tokens": length,
                            "labels": num_labels,
                            "system": kind,
                            "mode": mode,
                            "train_documents_per_second": options.batch_size / step,
                            "train_utilization": flops[0] / step / peak,
                            "inference_documents_per_second": options.batch_size / infer,
                            "inference_utilization": flops[1] / infer / peak,
                            "peak_memory_gib": torch.cuda.max_memory_allocated() / 2**30 if device == "cuda" else None,
                        }
                        rows.append(row)
                        print(
                            f"{encoder:<8}{length:>7}{num_labels:>8} {kind:<9}{mode:<9}{row['train_documents_per_second']:>12.0f}"
                            f"{100 * row['train_utilization']:>6.1f}%{row['inference_documents_per_second']:>12.0f}"
                            f"{100 * row['inference_utilization']:>6.1f}%",
                            flush=True,
                        )
                        del plain, model, optimizer
                        if device == "cuda":
                            torch.cuda.empty_cache()
                            torch.cuda.reset_peak_memory_stats()
    if options.smoke:
        assert len(rows) == 2 and all(row["train_documents_per_second"] > 0 for row in rows)
        return
    path = Path(__file__).parent / "results" / "gpu.json"
    name = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    path.write_text(
        json.dumps({"device": name, "torch": torch.__version__, "rows": rows}, indent=1) + "\n", encoding="utf-8"
    )
    print(f"written to {path}")


if __name__ == "__main__":
    main()
