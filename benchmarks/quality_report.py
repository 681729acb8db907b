"""Tables, intervals and the plot of the results of `quality.py`."""

import json
from pathlib import Path

import numpy as np

from trainer.metrics.ranking import inverse_propensities


RESULTS = Path(__file__).parent / "results" / "quality"
TOP = 10
SHOWN = ["p@1", "p@3", "p@5", "ndcg@3", "ndcg@5", "psp@1", "psp@3", "psp@5", "recall@10", "f1_micro", "f1_macro"]
COMPARED = ("p@1", "p@3", "p@5", "ndcg@5", "psp@1", "psp@3", "psp@5")


def per_document(result: dict) -> dict[str, np.ndarray]:
    """Numerators and denominators of the ranking metrics, one row per document, from the first ten labels."""
    top, gold = np.array(result["top"]), result["gold"]
    weights = inverse_propensities(np.array(result["label_counts"]), result["num_documents"])
    hits = np.array([np.isin(row, ids) for row, ids in zip(top, gold)])
    gains = np.where(hits, weights[top], 0.0)
    best = np.zeros((len(gold), TOP))
    sizes = np.array([len(ids) for ids in gold])
    for row, ids in enumerate(gold):
        ordered = np.sort(weights[np.asarray(ids, dtype=int)])[::-1][:TOP]
        best[row, : len(ordered)] = ordered
    discounts = 1 / np.log2(np.arange(TOP) + 2)
    columns = {}
    for k in (1, 3, 5):
        columns[f"p@{k}"] = (hits[:, :k].mean(1), np.ones(len(gold)))
        ideal = np.concatenate([[1.0], discounts.cumsum()])[np.minimum(sizes, k)]
        columns[f"ndcg@{k}"] = ((hits[:, :k] * discounts[:k]).sum(1) / ideal, np.ones(len(gold)))
        columns[f"psp@{k}"] = (gains[:, :k].sum(1), best[:, :k].sum(1))
    return columns


def bootstrap(first: list[dict], second: list[dict], metric: str, rounds: int = 1000) -> tuple[float, float]:
    """95% interval of first - second, in points, over resampled test documents; seeds are averaged."""
    rng = np.random.default_rng(0)
    pairs = [[per_document(result)[metric] for result in results] for results in (first, second)]
    differences = []
    for _ in range(rounds):
        rows = rng.integers(len(pairs[0][0][0]), size=len(pairs[0][0][0]))
        a, b = (np.mean([n[rows].sum() / d[rows].sum() for n, d in side]) for side in pairs)
        differences.append(100 * (a - b))
    low, high = np.percentile(differences, [2.5, 97.5])
    return float(low), float(high)


def report(options, systems_in_order: list[str]) -> None:
    """Tables of all finished runs; systems in this order."""
    groups = read_results()
    lines: list[str] = []
    place = {name: at for at, name in enumerate(systems_in_order)}
    for (data, size), systems in groups.items():
        order = sorted(systems, key=lambda name: (place.get(name.removesuffix(" + lexical"), 99), name))
        ordered = {name: systems[name] for name in order}
        lines += [f"### {data}, {size:,} training documents", ""]
        lines += [*metrics_table(ordered), *differences_table(ordered), "", *groups_table(ordered), ""]
    text = "\n".join(lines)
    print(text)
    if options.output:
        write_tables(Path(options.output), text)
    if options.picture:
        draw(groups, Path(options.picture))


def read_results() -> dict[tuple, dict[str, list[dict]]]:
    """All finished runs, by (data set, number of training documents) and system."""
    groups: dict[tuple, dict[str, list[dict]]] = {}
    for path in sorted(RESULTS.glob("*.json")):
        result = json.loads(path.read_text(encoding="utf-8"))
        shared = RESULTS / "documents" / f"{result['data']}_{result['train_size']}.json"
        result.update(json.loads(shared.read_text(encoding="utf-8")))
        groups.setdefault((result["data"], result["train_size"]), {}).setdefault(result["system"], []).append(result)
    return groups


def metrics_table(systems: dict[str, list[dict]]) -> list[str]:
    lines = [
        f"| system | seeds | {' | '.join(SHOWN)} | training, CPU s | inference, ms per document | memory, GiB |",
        "|---" * (len(SHOWN) + 5) + "|",
    ]
    for system, results in systems.items():
        cells = []
        for name in SHOWN:
            values = [100 * result["metrics"][name] for result in results if name in result["metrics"]]
            spread = f" ± {np.std(values, ddof=1):.2f}" if len(values) > 1 else ""
            cells.append(f"{np.mean(values):.2f}{spread}" if values else "-")
        cells += [
            f"{np.mean([r['training_cpu_seconds'] for r in results]):.0f}",
            f"{1000 * np.mean([r['inference_cpu_seconds'] / r['num_test_documents'] for r in results]):.1f}",
            f"{np.mean([r['peak_rss_mib'] for r in results]) / 1024:.1f}",
        ]
        lines.append(f"| {system} | {len(results)} | {' | '.join(cells)} |")
    return lines


def differences_table(systems: dict[str, list[dict]]) -> list[str]:
    """Differences from the best system that is not SEP-MLDC; empty without systems of both kinds."""
    others = [name for name in systems if not name.startswith("sep-mldc")]
    ours = [name for name in systems if name == "sep-mldc" or (name.startswith("sep-mldc") and "lexical" in name)]
    if not others or not ours:
        return []
    strongest = max(others, key=lambda name: np.mean([r["metrics"]["ndcg@5"] for r in systems[name]]))
    lines = [
        "",
        f"Difference from {strongest}, the other system with the best nDCG@5. In points, with 95% intervals of a paired "
        "bootstrap over the test documents:",
        "",
        f"| system | {' | '.join(COMPARED)} |",
        "|---" * (len(COMPARED) + 1) + "|",
    ]
    for name in ours:
        cells = [bootstrap(systems[name], systems[strongest], metric) for metric in COMPARED]
        lines.append(f"| {name} | {' | '.join(f'{low:+.1f} to {high:+.1f}' for low, high in cells)} |")
    return lines


def groups_table(systems: dict[str, list[dict]]) -> list[str]:
    """Metrics of head, body and tail labels."""
    groups = ("head", "body", "tail")
    keys = [f"{group}_recall@5" for group in groups] + [f"{group}_f1_macro" for group in groups]
    lines = [
        "| system | head R@5 | body R@5 | tail R@5 | head F1 | body F1 | tail F1 |",
        "|---|---|---|---|---|---|---|",
    ]
    for system, results in systems.items():
        values = [[100 * r["metrics"][key] for r in results if key in r["metrics"]] for key in keys]
        lines.append(f"| {system} | {' | '.join(f'{np.mean(found):.2f}' if found else '-' for found in values)} |")
    return lines


def write_tables(path: Path, text: str) -> None:
    """Put the tables between their marks in a markdown file."""
    before, start, rest = path.read_text(encoding="utf-8").partition("<!-- tables -->\n")
    _, end, after = rest.partition("<!-- end of tables -->")
    if not end:
        raise SystemExit(f"{path} has no lines `<!-- tables -->` and `<!-- end of tables -->`. Add them.")
    path.write_text(f"{before}{start}\n{text}\n{end}{after}", encoding="utf-8")


def draw(groups: dict, path: Path) -> None:
    """One row of panels per comparison, one panel per metric: a dot per run, the mean as a bar."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    metrics = ("p@1", "p@5", "ndcg@5", "psp@1", "psp@5", "tail_recall@5")
    shown = ("linear", "linear + pseudo", "encoder + mlp", "sep-mldc", "sep-mldc bce", "encoder + mlp + lexical")
    shown += ("sep-mldc + lexical", "sep-mldc bce + lexical")
    figure, rows = plt.subplots(len(groups), len(metrics), figsize=(15, 2.4 * len(groups)), squeeze=False)
    for ((data, size), systems), panels in zip(groups.items(), rows):
        names = [name for name in shown if name in systems]
        for metric, panel in zip(metrics, panels):
            for at, name in enumerate(reversed(names)):
                values = [100 * result["metrics"][metric] for result in systems[name]]
                color = "#c44e52" if name.startswith("sep-mldc") else "#8c8c8c"
                panel.barh(at, np.mean(values), color=color, alpha=0.6, height=0.7)
                panel.plot(values, [at] * len(values), "k.", markersize=4)
            means = [100 * np.mean([r["metrics"][metric] for r in systems[name]]) for name in names]
            span = max(max(means) - min(means), 1.0)
            panel.set_xlim(max(min(means) - 0.3 * span, 0), max(means) + 0.15 * span)
            panel.set_yticks(
                range(len(names)), reversed(names) if panel is panels[0] else [""] * len(names), fontsize=8
            )
            panel.tick_params(axis="x", labelsize=7)
            panel.set_title(f"{data}, {size:,}: {metric}" if panel is panels[0] else metric, fontsize=9)
            panel.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
