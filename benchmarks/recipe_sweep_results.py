"""Results of the runs of `recipe_sweep.py`: a short line for each run, and intervals of differences on test documents."""

import json
from pathlib import Path

import numpy as np
import torch
from stacked_encoder import Data
from stacked_runs import RUN


METRICS = ("p@1", "p@5", "ndcg@5", "psp@1", "psp@5", "f1_micro", "f1_macro")
RESULTS = Path(__file__).parent / "results" / "recipe_sweep.jsonl"
INTERVALS = RESULTS.with_name("recipe_sweep_intervals.json")


def pack(options) -> None:
    """Add the runs of a plan to the results, a short line each."""
    plan = json.loads(Path(options.plan).read_text(encoding="utf-8"))

    def values(point):
        return [round(point[metric], 2) for metric in METRICS]

    lines = []
    for name in options.runs:
        for line in Path(name).read_text(encoding="utf-8").splitlines():
            run = json.loads(line)
            curve, item, test = run.pop("curve"), run.pop("item"), run.pop("test_metrics", None)
            run.pop("test_top", None)
            settings = {key: value for key, value in run.items() if key not in ("test", "top", "export", "name")}
            row = {
                "plan": options.name,
                "group": plan[item]["name"],
                **settings,
                "epochs_scored": [point["epoch"] for point in curve],
                "ndcg@5": [round(point["ndcg@5"], 2) for point in curve],
                "few": [[round(value, 1) for value in point["few"]] for point in curve],
                "loss": [round(point["loss"], 2) for point in curve],
                "last": values(curve[-1]),
                "best": values(max(curve, key=lambda point: point["ndcg@5"])),
            }
            if "fused" in curve[-1]:
                row["fused_last"] = [curve[-1]["fused"]["scale"], *values(curve[-1]["fused"])]
                row["fused_ndcg@5"] = [round(point["fused"]["ndcg@5"], 2) for point in curve]
            if test:
                row["test_of_best"] = values(test)
            lines.append(json.dumps(row, separators=(",", ":")) + "\n")
    with open(RESULTS, "a", encoding="utf-8") as file:
        file.writelines(lines)


def intervals(options) -> None:
    """
    Differences from the first variant of each group of a plan, on test documents: mean over seeds, 95% interval of a bootstrap.

    Variants are paired by seed and document; documents are resampled 1,000 times.
    """
    plan = json.loads(Path(options.plan).read_text(encoding="utf-8"))
    groups: dict[tuple, dict[str, dict[int, list]]] = {}
    for name in options.runs:
        for line in Path(name).read_text(encoding="utf-8").splitlines():
            run = json.loads(line)
            if "test_top" not in run:
                continue
            shared = plan[run["item"]]["group"]
            variant = ", ".join(f"{key} {run[key]}" for key in RUN if key in run and key != "seed")
            key = (plan[run["item"]]["name"], shared["data"], shared["size"])
            groups.setdefault(key, {}).setdefault(variant, {})[run.get("seed", 0)] = run
    results, folder = [], Path(options.prepared)
    for (title, name, size), variants in groups.items():
        data = Data(folder, name, torch.device("cpu"))
        gold, weights = data.labels["test"], data.propensities(np.arange(size))
        first, *others = variants
        values = {
            variant: {seed: per_document(torch.tensor(run["test_top"]), gold, weights) for seed, run in runs.items()}
            for variant, runs in variants.items()
        }
        for other in others:
            seeds = sorted(set(values[first]) & set(values[other]))
            drawn = []
            rng = np.random.default_rng(0)
            for _ in range(1001):
                rows = rng.integers(len(gold), size=len(gold)) if drawn else np.arange(len(gold))
                pairs = [(averages(values[other][seed], rows), averages(values[first][seed], rows)) for seed in seeds]
                drawn.append(np.mean([ours - theirs for ours, theirs in pairs], axis=0))
            low, high = np.percentile(drawn[1:], [2.5, 97.5], axis=0)
            row = {"group": title, "data": name, "size": size, "than": first, "variant": other, "seeds": len(seeds)}
            for position, metric in enumerate(METRICS[:5]):
                row[metric] = [round(100 * float(value[position]), 2) for value in (drawn[0], low, high)]
            results.append(row)
            print(json.dumps(row))
    former = json.loads(INTERVALS.read_text(encoding="utf-8")) if INTERVALS.exists() else []
    new = {(row["group"], row["data"], row["size"]) for row in results}
    kept = [row for row in former if (row["group"], row["data"], row["size"]) not in new]
    INTERVALS.write_text(json.dumps([*kept, *results], indent=1) + "\n", encoding="utf-8")


def per_document(top, gold, weights) -> np.ndarray:
    """(N, 7): hit at 1, share of 5, nDCG@5, and gains and best gains of PSP at 1 and at 5."""
    found = gold.gather(1, top)
    discounts = 1 / torch.log2(torch.arange(2, 7).float())
    ideal = torch.cumsum(discounts, 0)[gold.sum(1).long().clamp(1, 5) - 1]
    gains, best = found * weights[top], (gold * weights).topk(5, dim=1).values
    columns = [found[:, 0], found.mean(1), (found * discounts).sum(1) / ideal]
    return torch.stack([*columns, gains[:, 0], best[:, 0], gains.sum(1), best.sum(1)], dim=1).numpy()


def averages(values: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """P@1, P@5, nDCG@5, PSP@1 and PSP@5 of the documents `rows` of `per_document`."""
    sums = values[rows].sum(0)
    return np.array([*(sums[:3] / len(rows)), sums[3] / sums[4], sums[5] / sums[6]])
