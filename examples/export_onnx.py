#!/usr/bin/env python
"""
Export a trained SEP-MLDC checkpoint to ONNX, in float32 or int8, and report how much the export differs from the checkpoint.

    python examples/export_onnx.py outputs/quickstart outputs/onnx
    python examples/export_onnx.py outputs/quickstart outputs/onnx-int8 --int8 --documents examples/data/test.jsonl.gz
"""

import argparse
from pathlib import Path

from tqdm.auto import tqdm

from trainer.command_line import run_program
from trainer.data import load_splits
from trainer.export import check_folder, compare_logits, export_onnx
from trainer.inference import load_trained


def texts_to_compare(options, config) -> list[str]:
    """The documents of the file or, without a file, the label texts of the checkpoint."""
    if options.documents is None:
        return config.label_texts[: options.max_documents]
    documents = load_splits(test_file=options.documents, label_column=None, text_columns=[options.text_column])["test"]
    return documents["text"][: options.max_documents]


def batches_of(texts: list[str], tokenizer, max_length: int) -> list[dict]:
    """Padded batches of 8 texts, each truncated to `max_length` tokens."""
    batches = []
    for start in range(0, len(texts), 8):
        encoded = tokenizer(
            texts[start : start + 8], padding=True, truncation=True, max_length=max_length, return_tensors="pt"
        )
        batches.append({name: encoded[name] for name in ("input_ids", "attention_mask")})
    return batches


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[1])
    parser.add_argument("checkpoint", help="folder or Hub name of a trained model")
    parser.add_argument("output_dir", help="a new folder")
    parser.add_argument("--int8", action="store_true", help="int8 weights and activations (dynamic quantization)")
    parser.add_argument(
        "--documents", help="file of documents to compare on; defaults to the label texts of the checkpoint"
    )
    parser.add_argument("--text_column", default="text", help="defaults to %(default)s")
    parser.add_argument(
        "--max_documents",
        type=int,
        default=128,
        help="maximum number of documents to compare on (default %(default)s)",
    )
    parser.add_argument("--max_length", type=int, default=128, help="tokens per document (default %(default)s)")
    options = parser.parse_args()
    for name in ("max_documents", "max_length"):
        if getattr(options, name) < 1:
            raise ValueError(f"`--{name}` is {getattr(options, name)}, but it must be at least 1. Try 128.")
    check_folder(options.output_dir)
    return options


def main() -> None:
    options = parse_arguments()
    model, tokenizer = load_trained(options.checkpoint)
    texts = texts_to_compare(options, model.config)
    batches = batches_of(texts, tokenizer, min(options.max_length, tokenizer.model_max_length))
    exported = export_onnx(model, options.output_dir, tokenizer, int8=options.int8, batches=batches)
    found = compare_logits(model.eval(), exported, tqdm(batches, desc="Comparing", unit="batch"))
    size = sum(path.stat().st_size for path in Path(options.output_dir).glob("model.onnx*"))
    sets = found["same_label_set"]
    print(
        f"{options.output_dir}: {size / 1e6:.1f} MB, {'int8' if options.int8 else 'float32'}. On {len(texts)} "
        f"{'label texts' if options.documents is None else 'documents'}: "
        + ("" if sets is None else f"{100 * sets:.1f}% have the same label set, ")
        + f"{100 * found['same_best_label']:.1f}% the same best label; logits differ by {found['mean_difference']:.1e} on average "
        f"and {found['max_difference']:.1e} at most. {options.output_dir}/README.md has the details."
    )


if __name__ == "__main__":
    run_program(main, "export_onnx.py")
