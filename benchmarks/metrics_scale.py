#!/usr/bin/env python
"""
Time and peak memory of the metrics at the size of RCV1's test set (781,265 x 103) and of 100,000 x 3,956.

    python benchmarks/metrics_scale.py
    python benchmarks/metrics_scale.py --reference_python /tmp/reference/bin/python   # also LibMultiLabel and napkinXC
    python benchmarks/metrics_scale.py --smoke                                         # tiny; checks that it runs and the values agree

The other libraries need a separate environment: `pip install libmultilabel --no-deps`, `pip install napkinxc`.

Every system gets the same batches of scores and multi-hot labels, generated from a seed and discarded after use; each run is a
separate process, the systems alternate, and only the time inside the metrics counts: CPU seconds on one thread (the others
use only one), which is least affected by other load, and wall seconds. Memory is the peak of the whole process
and what the run added to it after its imports, one batch included. All systems compute P, R and nDCG at 1, 3 and 5;
"ours" and LibMultiLabel also micro and macro F1, napkinXC PSP and PSnDCG, "ours, all" all metrics: propensities,
head / body / tail, sample F1, histograms. napkinXC gets rankings of five labels from numpy's argpartition, which is
faster than its own full sort.
"""

import argparse
import importlib.util
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np


KS = (1, 3, 5)
BATCH_SIZE = 2048
SYSTEMS = ("ours", "ours, all", "LibMultiLabel", "napkinXC")
SIZES = {"RCV1 test set": (781_265, 103, 3.2), "EUR-Lex labels": (100_000, 3_956, 5.3)}
SMOKE_SIZES = {"small": (5_000, 20, 3.0)}
SINGLE_BATCHES = (76, 3_201, 100_000)


def batches(num_documents: int, num_labels: int, labels_per_document: float):
    """Scores (B, L) float32 and labels (B, L) int64 with a long tail; positives score higher."""
    for start in range(0, num_documents, BATCH_SIZE):
        rng = np.random.default_rng([0, start])
        size = min(BATCH_SIZE, num_documents - start)
        scores = rng.standard_normal((size, num_labels), dtype=np.float32) - 1
        labels = np.zeros((size, num_labels), dtype=np.int64)
        sizes = 1 + rng.poisson(labels_per_document - 1, size)
        rows = np.repeat(np.arange(size), sizes)
        labels[rows, (num_labels * rng.random(sizes.sum()) ** 3).astype(np.int64)] = 1
        scores += 2 * labels
        yield scores, labels


class Ours:
    def __init__(self, num_documents: int, num_labels: int, everything: bool):
        import torch

        from trainer.metrics import StreamingMetrics

        torch.set_num_threads(1)
        settings = {}
        if everything:
            counts = (num_documents / (1 + np.arange(num_labels))).astype(np.int64)
            settings = {"label_counts": counts, "num_documents": num_documents, "histograms": True}
        self.metrics = StreamingMetrics(num_labels, KS, **settings)

    def update(self, scores, labels):
        import torch

        self.metrics.update(torch.from_numpy(scores), torch.from_numpy(labels))

    def compute(self) -> dict[str, float]:
        return self.metrics.compute()


class LibMultiLabel:
    def __init__(self, num_labels: int):
        # Its module of metrics alone: the package also imports its solvers.
        path = Path(importlib.util.find_spec("libmultilabel").submodule_search_locations[0]) / "linear" / "metrics.py"
        spec = importlib.util.spec_from_file_location("libmultilabel_metrics", path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        names = [f"{name}@{k}" for name in ("P", "R", "NDCG") for k in KS]
        self.metrics = module.get_metrics([*names, "Micro-F1", "Macro-F1"], num_labels)
        self.update = self.metrics.update

    def compute(self) -> dict[str, float]:
        renamed = {"Micro-F1": "f1_micro", "Macro-F1": "f1_macro"}
        return {renamed.get(name, name.lower()): float(value) for name, value in self.metrics.compute().items()}


class NapkinXC:
    def __init__(self, num_documents: int, num_labels: int):
        from napkinxc import metrics

        counts = (num_documents / (1 + np.arange(num_labels))).astype(np.int64)
        weights = 1 + (np.log(num_documents) - 1) * 2.5**0.55 * (counts + 1.5) ** -0.55
        self.metrics = {
            "p": metrics.PrecisionAtK(k=5),
            "recall": metrics.RecallAtK(k=5),
            "ndcg": metrics.NDCGAtK(k=5),
            "psp": metrics.PSPrecisionAtK(weights, k=5),
            "psndcg": metrics.PSNDCGAtK(weights, k=5),
        }

    def update(self, scores, labels):
        top = np.argpartition(scores, -5)[:, -5:]
        order = np.argsort(-np.take_along_axis(scores, top, axis=1))
        rankings = np.take_along_axis(top, order, axis=1).tolist()
        positives = [row.nonzero()[0].tolist() for row in labels]
        for metric in self.metrics.values():
            metric.accumulate(positives, rankings)

    def compute(self) -> dict[str, float]:
        values = {name: metric.summarize() for name, metric in self.metrics.items()}
        return {f"{name}@{k}": float(value[k - 1]) for name, value in values.items() for k in KS}


def run(system: str, num_documents: int, num_labels: int, labels_per_document: float) -> dict:
    if system == "LibMultiLabel":
        metrics = LibMultiLabel(num_labels)
    elif system == "napkinXC":
        metrics = NapkinXC(num_documents, num_labels)
    else:
        metrics = Ours(num_documents, num_labels, everything=system == "ours, all")
    before = peak_memory()
    clock = Stopwatch()
    for scores, labels in batches(num_documents, num_labels, labels_per_document):
        with clock:
            metrics.update(scores, labels)
    with clock:
        values = metrics.compute()
    times = {"cpu_seconds": clock.cpu, "wall_seconds": clock.wall}
    return times | {"peak_mb": peak_memory(), "added_mb": peak_memory() - before, "values": values}


class Stopwatch:
    """CPU and wall seconds spent inside its `with` blocks."""

    cpu = wall = 0.0

    def __enter__(self):
        self.cpu -= time.process_time()
        self.wall -= time.perf_counter()

    def __exit__(self, *exception):
        self.cpu += time.process_time()
        self.wall += time.perf_counter()


def run_single_batch(num_labels: int, repeats: int) -> dict:
    """CPU milliseconds of one update with 32 documents, median."""
    import torch

    scores = torch.randn(32, num_labels, generator=torch.Generator().manual_seed(0)) - 3
    labels = (torch.rand(32, num_labels, generator=torch.Generator().manual_seed(1)) < 5 / num_labels).float()
    result = {}
    for name, everything in (("ours", False), ("ours, all", True)):
        metrics, times = Ours(10_000, num_labels, everything).metrics, []
        for _ in range(repeats + 2):
            clock = Stopwatch()
            with clock:
                metrics.update(scores, labels)
            times.append(1000 * clock.cpu)
        result[name] = statistics.median(times[2:])
    return result


def peak_memory() -> float:
    """MB of the process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e6 if sys.platform == "darwin" else 1e3)


def in_fresh_process(python: str, call: list) -> dict:
    answer = subprocess.run([python, __file__, "--child", json.dumps(call)], capture_output=True, text=True)
    if answer.returncode:
        raise RuntimeError(f"{call[0]} failed: {answer.stderr.strip().splitlines()[-1]}")
    return json.loads(answer.stdout)


def check_agreement(runs: dict[str, list[dict]]) -> float:
    """Largest difference of a metric that two systems share."""
    values = [results[0]["values"] for results in runs.values()]
    differences = [
        abs(a[name] - b[name]) for i, a in enumerate(values) for b in values[i + 1 :] for name in a.keys() & b.keys()
    ]
    return max(differences, default=0.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reference_python", help="interpreter that has libmultilabel and napkinxc")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--output", help="JSON file (default: benchmarks/results/metrics_scale.json, not with --smoke)"
    )
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        name, *arguments = json.loads(options.child)
        print(json.dumps(run_single_batch(*arguments) if name == "single" else run(name, *arguments)))
        return

    repeats = 1 if options.smoke else options.repeats
    systems = SYSTEMS if options.reference_python else SYSTEMS[:2]
    result = {"machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores", "repeats": repeats}
    result |= {"batch_size": BATCH_SIZE, "sizes": {}, "update_of_32_documents_cpu_ms": {}}
    for title, size in (SMOKE_SIZES if options.smoke else SIZES).items():
        runs = {system: [] for system in systems}
        for _ in range(repeats):
            for system, results in runs.items():
                python = sys.executable if system.startswith("ours") else options.reference_python
                results.append(in_fresh_process(python, [system, *size]))
        difference = check_agreement(runs)
        if difference > 1e-6:
            raise RuntimeError(f"{title}: two systems differ by {difference} in a metric they share")
        print(
            f"\n{title}: {size[0]:,} documents x {size[1]:,} labels; largest difference of a shared metric {difference:.1e}"
        )
        print(f"{'':15}{'CPU s':>10}{'(all runs)':>24}{'wall s':>10}{'peak MB':>10}{'added MB':>10}")
        rows = {}
        for system, results in runs.items():
            row = {key: statistics.median(r[key] for r in results) for key in ("cpu_seconds", "wall_seconds")}
            row |= {key: max(r[key] for r in results) for key in ("peak_mb", "added_mb")}
            row["all_cpu_seconds"] = [r["cpu_seconds"] for r in results]
            rows[system], spread = row, " ".join(f"{t:.1f}" for t in row["all_cpu_seconds"])
            numbers = f"{row['wall_seconds']:10.2f}{row['peak_mb']:10.0f}{row['added_mb']:10.0f}"
            print(f"{system:15}{row['cpu_seconds']:10.2f}{spread:>24}{numbers}", flush=True)
        result["sizes"][title] = {
            "documents": size[0],
            "labels": size[1],
            "largest_difference": difference,
            "systems": rows,
        }
    print("\nCPU milliseconds of an update with 32 documents")
    for num_labels in SINGLE_BATCHES[: 1 if options.smoke else None]:
        times = in_fresh_process(sys.executable, ["single", num_labels, 30 if num_labels < 10_000 else 5])
        result["update_of_32_documents_cpu_ms"][num_labels] = times
        print(f"{num_labels:>9,} labels" + "".join(f"   {name} {value:.2f}" for name, value in times.items()))
    if options.smoke and options.output is None:
        return
    path = Path(options.output or Path(__file__).parent / "results" / "metrics_scale.json")
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, path)


if __name__ == "__main__":
    main()
