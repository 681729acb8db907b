#!/usr/bin/env python
"""
How often to encode label texts: quality of each schedule against its training time.

    python benchmarks/quality.py run --data arxiv_mlc --train-size 3000 --epochs 2 \\
        --systems sep-mldc "sep-mldc encoder 8" "sep-mldc encoder 24" "sep-mldc encoder 128" ...    # first
    python benchmarks/label_schedules.py

A schedule is `embedding` (label embeddings are parameters, initialized with the encoded texts) or `encoder N` (at most N of the
batch's labels are encoded with gradient in each step, the others come from the table). Quality and time are those of the runs in
benchmarks/results/quality/, all of the same number of steps: time is CPU seconds of training, as a ratio to `embedding`. Writes
benchmarks/results/label_schedules.json and docs/label_schedules.png.
"""

import argparse
import json
from pathlib import Path

import numpy as np
from quality_report import RESULTS as QUALITY


RESULTS = Path(__file__).parent / "results"
SCHEDULES = {"embedding": "sep-mldc", **{f"encoder {n}": f"sep-mldc encoder {n}" for n in (8, 24, 128)}}
SHOWN = ("p@1", "ndcg@5", "psp@5")


def qualities(data: str, train_size: int) -> dict[str, list[dict]]:
    """Training time and test metrics of each schedule, one `dict` per seed."""
    found: dict[str, list[dict]] = {schedule: [] for schedule in SCHEDULES}
    for path in sorted(QUALITY.glob(f"{data}_{train_size}_*.json")):
        result = json.loads(path.read_text(encoding="utf-8"))
        for schedule, system in SCHEDULES.items():
            if result["system"] == system:
                metrics = {name: result["metrics"][name] for name in SHOWN}
                seconds = result["training_cpu_seconds"]
                found[schedule].append({"seed": result["seed"], "training_cpu_seconds": seconds, **metrics})
    found = {schedule: runs for schedule, runs in found.items() if runs}
    if "embedding" not in found:
        raise SystemExit(f"{QUALITY} has no run of 'sep-mldc' on {data}. Run benchmarks/quality.py first.")
    return found


def draw(rows: list[dict], path: Path) -> None:
    from matplotlib.figure import Figure

    data = list(dict.fromkeys(row["data"] for row in rows))
    figure = Figure(figsize=(3.4 * len(SHOWN), 3 * len(data)), layout="constrained")
    grid = figure.subplots(len(data), len(SHOWN), squeeze=False)
    for name, line in zip(data, grid):
        for metric, axes in zip(SHOWN, line):
            for row in (row for row in rows if row["data"] == name):
                values = [100 * run[metric] for run in row["runs"]]
                axes.plot([row["time_ratio"]] * len(values), values, ".", color="tab:blue", alpha=0.5)
                axes.plot(row["time_ratio"], np.mean(values), "o", color="tab:blue")
                axes.annotate(
                    row["schedule"], (row["time_ratio"], np.mean(values)), (4, 4), textcoords="offset points"
                )
            axes.set_title(f"{name}: {metric.upper()}", fontsize=9)
            axes.set_xlabel("training time / that of embedding")
            axes.margins(0.2)
            axes.grid(alpha=0.3)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[1])
    parser.add_argument("--data", nargs="+", default=["arxiv_mlc", "usbills4k"])
    parser.add_argument("--train_size", type=int, default=3000)
    options = parser.parse_args()
    rows = []
    for name in options.data:
        quality = qualities(name, options.train_size)
        seconds = {key: np.mean([run["training_cpu_seconds"] for run in runs]) for key, runs in quality.items()}
        for schedule, runs in quality.items():
            ratio = float(seconds[schedule] / seconds["embedding"])
            rows.append({"data": name, "schedule": schedule, "time_ratio": ratio, "runs": runs})
            means = "".join(f"{100 * np.mean([run[metric] for run in runs]):>9.2f}" for metric in SHOWN)
            print(f"{name:<12}{schedule:<14}{ratio:>6.2f}{means}  ({len(runs)} seeds)")
    path = RESULTS / "label_schedules.json"
    path.write_text(json.dumps({"settings": vars(options), "rows": rows}, indent=1) + "\n", encoding="utf-8")
    picture = Path(__file__).resolve().parents[1] / "docs" / "label_schedules.png"
    draw(rows, picture)
    print(f"written to {path.name} and {picture.name}")


if __name__ == "__main__":
    main()
