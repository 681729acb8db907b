#!/usr/bin/env python
"""
The plans of `recipe_sweep.py`: which groups of runs are trained, the most informative first.

    python benchmarks/recipe_plans.py screening > plan.json
    python benchmarks/recipe_plans.py second > plan.json
    python benchmarks/recipe_plans.py core > plan.json
    python benchmarks/recipe_plans.py tokens > plan.json
    python benchmarks/recipe_plans.py proof > plan.json
    python benchmarks/recipe_plans.py finalists second.json second_runs.jsonl > plan.json     # of the best variant of `second`
"""

import argparse
import itertools
import json
import sys


DATA = {"arxiv_mlc": (230, 76), "usbills4k": (123, 3201), "debtags": (100, 427)}  # mean tokens of 256, labels
EPOCHS = {300: 20, 1000: 12, 3000: 6, 6000: 5}
BATCH = {300: 16, 1000: 16, 3000: 32, 6000: 32}


def group(title: str, data: str, size: int, runs: list[dict], **shared) -> dict:
    shared = {
        "epochs": EPOCHS.get(size, 5),
        "batch": BATCH.get(size, 32),
        "max_length": 256,
        "evaluations": 6,
        **shared,
    }
    return {"name": title, "group": {"data": data, "size": size, **shared}, "runs": runs}


def rates(encoder, head=(3e-3,), **others) -> list[dict]:
    return [{"lr": lr, "head_lr": rate, **others} for lr, rate in itertools.product(encoder, head)]


def kinds() -> list[dict]:
    """Losses and heads, one change each."""
    return [
        {"softmax": 0.0},
        {"bce": 0.0},
        {"softmax": 0.0, "decoupled": 1.0},
        {"similarity": 0.0},
        {"mlp": 0.0},
        {"attention": 0.0},
    ]


def contrastive(labels: int) -> list[dict]:
    unit = 0.01 * labels
    runs = [{"seed": 0}, {"seed": 1}]
    for weight in (0.01, 0.1, unit / 3, unit):
        runs += [{"beta": weight}, {"gamma": weight}, {"beta": weight, "gamma": weight}]
    runs += [{"gamma": unit, "weighting": weighting} for weighting in ("complement", "uniform")]
    runs += [{"beta": unit, "weighting": weighting} for weighting in ("complement", "uniform")]
    runs += [{"gamma": weight, "positives_jaccard": 1.0} for weight in (0.1, 1.0, unit)]
    runs += [{"prototype": weight} for weight in (0.1, 1.0, unit)]
    return runs


def attentions() -> list[dict]:
    return [
        {"attention": 0.0},
        {"attention_raw": 384**-0.5},
        {"attention_raw": 0.0, "attention_cosine": 5.0},
        {"attention_raw": 0.0, "attention_cosine": 20.0},
        {"attention_learnt": 1.0},
        {"attention_raw": 384**-0.5, "attention_learnt": 1.0},
        {"attention_raw": 0.0, "attention_cosine": 10.0, "attention_learnt": 1.0},
        {},
    ]


def screening() -> list[dict]:
    plan = []

    def each(name, runs, sizes=(3000, 1000, 300), data=tuple(DATA), **shared):
        for size, one in itertools.product(sizes, data):
            more = {key: value[size] if isinstance(value, dict) else value for key, value in shared.items()}
            chosen = runs(DATA[one][1]) if callable(runs) else runs
            plan.append(group(name, one, size, chosen, **more))

    grid = rates((3e-5, 1e-4, 2e-4), (1e-3, 5e-3))
    few = rates((3e-5, 1e-4, 2e-4, 4e-4))
    probe = [
        {"head_lr": rate, "dropout": dropout, **kind}
        for rate in (1e-3, 3e-3, 1e-2)
        for dropout in (0.2, 0.5)
        for kind in ({}, {"softmax": 0.0})
    ] + [{"similarity": 0.0}, {"mlp": 0.0}, {"attention": 0.0}, {"head_lr": 3e-2}]
    each("rates", grid + kinds())
    each("probe", probe, epochs={300: 60, 1000: 40, 3000: 25}, freeze=6)
    each("freeze4", rates((1e-4, 3e-4, 1e-3), (1e-3, 5e-3)) + kinds(), freeze=4)
    plan.append(group("contrastive", "arxiv_mlc", 3000, contrastive(76)[:14]))
    plan.append(group("contrastive", "arxiv_mlc", 3000, contrastive(76)[14:]))
    plan.append(group("contrastive", "usbills4k", 3000, contrastive(3201)[:14]))
    plan.append(group("contrastive", "usbills4k", 3000, contrastive(3201)[14:]))
    each("short", few, epochs={300: 6, 1000: 4, 3000: 2.5})
    each("long", few, epochs={300: 60, 1000: 30, 3000: 15})
    each("large", rates((5e-5, 1e-4, 2e-4)), sizes=(6000,), epochs=3)
    each("large", rates((5e-5, 1e-4, 2e-4)), sizes=(6000,), epochs=8)
    each("length128", rates((5e-5, 1e-4, 2e-4)), sizes=(3000, 1000), max_length=128)
    each("length512", rates((5e-5, 1e-4, 2e-4)), sizes=(3000, 1000), max_length=512)
    each("attention", attentions(), sizes=(3000,), data=("arxiv_mlc", "usbills4k"))
    each("head first", rates((3e-5, 1e-4, 2e-4), (1e-3, 3e-3)), head_epochs={300: 20, 1000: 10, 3000: 6})
    each(
        "laat",
        [{"laat_weight": 1.0}, {"laat_weight": 1.0, "mlp": 0.0}],
        (3000,),
        ("arxiv_mlc", "usbills4k"),
        laat=True,
    )
    each("batch64", few, sizes=(3000, 1000), batch=64)
    each("batch8", few, sizes=(3000, 1000), batch=8)
    each("encoder dropout", few, sizes=(3000, 300), encoder_dropout=0.1)
    each("freeze2", few, sizes=(3000, 300), freeze=2)
    return plan


METRICS = ("p@1", "p@5", "ndcg@5", "psp@1", "psp@5", "f1_micro", "f1_macro")
SECOND = {"softmax": 0.0, "mlp": 0.0, "dropout": 0.5, "head_lr": 1e-3}


def variants(labels: int) -> dict[str, dict]:
    """Questions that the screening left open: losses and rates of a head of label similarities alone."""
    second = {**SECOND, "decoupled": 1.0}
    return {
        "bce": SECOND,
        "bce+decoupled": second,
        "bce+softmax": {**SECOND, "softmax": 1.0},
        "decoupled": {**second, "bce": 0.0},
        "prototype": {**second, "prototype": 0.01 * labels},
        "both heads": {**second, "mlp": 1.0},
        "dropout 0.2": {**second, "dropout": 0.2},
        "lr 5e-5": {**second, "lr": 5e-5},
    }


def heads(labels: int) -> list[dict]:
    """Of a frozen encoder."""
    both = {"softmax": 0.0, "dropout": 0.5, "head_lr": 1e-3}
    return [
        both,
        {**both, "decoupled": 1.0},
        {**both, "mlp": 0.0},
        {**both, "mlp": 0.0, "decoupled": 1.0},
        {**both, "similarity": 0.0},
        {**both, "dropout": 0.7},
        {**both, "attention": 0.0},
        {**both, "prototype": 0.01 * labels},
    ]


def second() -> list[dict]:
    plan = []
    epochs = {300: 15, 1000: 10, 3000: 5}
    for size, data in itertools.product((3000, 1000, 300), DATA):
        runs = list(variants(DATA[data][1]).values())
        plan.append(group("variants", data, size, runs, epochs=epochs[size], evaluations=5))
    best = {**SECOND, "decoupled": 1.0}
    for data in ("usbills4k", "debtags"):
        runs = [{**best, "lr": 1e-4}, {**best, "lr": 2e-4}, {**SECOND, "lr": 1e-4}]
        plan.append(group("longer", data, 3000, runs, epochs=12))
    for data, (_, labels) in DATA.items():
        plan.append(group("probe heads", data, 3000, heads(labels), epochs=15, freeze=6, evaluations=5))
    pair = [{**best, "lr": 5e-5}, {**best, "lr": 1e-4}]
    for data in DATA:
        plan.append(group("encoder dropout", data, 1000, pair, epochs=10, encoder_dropout=0.1, evaluations=5))
        plan.append(group("head first", data, 1000, pair, epochs=10, head_epochs=10, evaluations=5))
    for length, data in itertools.product((512, 128), ("usbills4k", "arxiv_mlc")):
        plan.append(group(f"length {length}", data, 3000, pair[1:], epochs=5, max_length=length, evaluations=5))
    plan.append(group("encoder dropout", "arxiv_mlc", 3000, pair[1:], epochs=5, encoder_dropout=0.1, evaluations=5))
    return plan


def finalists(name: str) -> list[dict]:
    """The chosen variant at all sizes, with test metrics and logits; then out-of-fold logits of training documents."""
    plan = []
    epochs = {300: 15, 1000: 10, 3000: 10, 6000: 8}
    seeds = {300: 3, 1000: 3, 3000: 2, 6000: 1}
    for size, data in itertools.product((1000, 300, 6000, 3000), DATA):
        runs = [{**variants(DATA[data][1])[name], "seed": seed} for seed in range(seeds[size])]
        more = {"epochs": epochs[size], "evaluations": 5, "test": True, "export": True, "name": "recipe"}
        if data == "arxiv_mlc" and size >= 3000:
            more["epochs"] = 4
        plan.append(group("finalists", data, size, runs, **more))
    for size, data in itertools.product((1000, 3000), DATA):
        runs = [variants(DATA[data][1])[name]] * 5
        more = {"epochs": min(epochs[size], 10 if size == 1000 else 5), "evaluations": 1, "folds": 5}
        plan.append(group("folds", data, size, runs, export=True, name="folds", **more))
        if size == 1000 and data == "debtags":
            for other in ("usbills4k", "arxiv_mlc"):
                plan.append(group("printed head", other, 3000, printed(DATA[other][1]), evaluations=3))
    return plan


def printed(labels: int) -> list[dict]:
    """The paper's head and loss, without and with the contrastive losses."""
    head = {"softmax": 0.0, "similarity": 0.0}
    unit = 0.01 * labels
    return [
        head,
        {**head, "seed": 1},
        {**head, "beta": unit, "gamma": unit},
        {**head, "beta": unit, "weighting": "complement"},
        {**head, "prototype": unit},
    ]


def choose(files: list[str], plan: str) -> str:
    """The variant with the best mean of all validation metrics, alone and fused, over datasets and sizes."""
    with open(plan, encoding="utf-8") as file:
        items = json.load(file)
    scores: dict[str, list[float]] = {}
    for name in files:
        with open(name, encoding="utf-8") as file:
            rows = [json.loads(line) for line in file]
        for item in {row["item"] for row in rows}:
            if items[item]["name"] != "variants":
                continue
            labels = DATA[items[item]["group"]["data"]][1]
            for variant, row in zip(variants(labels), (row for row in rows if row["item"] == item), strict=True):
                last = row["curve"][-1]
                values = [point[metric] for point in (last, last["fused"]) for metric in METRICS]
                scores.setdefault(variant, []).append(sum(values) / len(values))
    means = {variant: sum(values) / len(values) for variant, values in scores.items()}
    print({variant: round(mean, 2) for variant, mean in means.items()}, file=sys.stderr)
    return max(means, key=means.get)


def paper() -> dict:
    """The paper's classifier, loss and learning rate."""
    return {"softmax": 0.0, "similarity": 0.0, "dropout": 0.5, "lr": 5e-5, "head_lr": 5e-5}


def core() -> list[dict]:
    """The paper's core: contrastive losses and label attention, at the paper's size and in forms that `screening` left out."""
    plan = []

    def add(title, data, size, runs, epochs, rate=0.5e6, **shared):
        tokens = size * DATA[data][0] * epochs * len(runs) * (1.4 if shared.get("label_encoder") else 1.0)
        one = group(title, data, size, runs, epochs=epochs, **shared)
        plan.append({**one, "seconds": round(tokens / rate) + 10})

    printed, both = paper(), {"beta": 0.76, "gamma": 0.76}
    as_printed = {"label_encoder": True, "encoder_dropout": 0.1}
    arms = [both, {}, {**both, "attention": 0.0}]
    whole = {"evaluations": 5, "test": True, **as_printed}
    runs = [{**printed, **arm, "seed": seed} for arm in arms for seed in (0, 1)]
    add("paper, all documents", "arxiv_mlc", 22713, runs, 5, **whole)
    runs = [{**printed, **arm, "seed": 2} for arm in arms]
    runs += [{**printed, "beta": 0.01, "gamma": 0.01}, {**printed, "attention": 0.0}]
    add("paper, all documents", "arxiv_mlc", 22713, runs, 5, **whole)
    default = {"softmax": 0.0, "decoupled": 1.0, "dropout": 0.5, "head_lr": 1e-3}
    heads = {"arxiv_mlc": default, "usbills4k": {**default, "mlp": 0.0}, "debtags": default}
    forms = [
        {},
        {"attention": 0.0},
        {"attention_raw": 384**-0.5},
        {"attention_raw": 0.0, "attention_cosine": 20.0},
        {"attention_raw": 0.0, "attention_cosine": 10.0, "attention_learnt": 1.0},
    ]
    for data, head in heads.items():
        runs = [{**head, **form, "seed": seed} for form in forms for seed in (0, 1)]
        add("attention", data, 3000, runs, 5, evaluations=2)
        runs = [
            {**head, "laat_weight": 1.0, "mlp": mlp, "seed": seed}
            for mlp in (head.get("mlp", 1.0), 0.0)
            for seed in (0, 1)
        ]
        add("laat", data, 3000, runs if data != "usbills4k" else runs[:2], 5, rate=0.3e6, laat=True, evaluations=2)
    jaccard = {"gamma": 0.76, "positives_jaccard": 1.0}
    runs = [{}, {"seed": 1}, both, {**both, "seed": 1}, {"gamma": 0.76}, {"beta": 0.76}, jaccard, {"prototype": 0.76}]
    add("paper", "arxiv_mlc", 3000, [{**printed, **run} for run in runs], 8, evaluations=2, **as_printed)
    runs = [{**heads["usbills4k"], "attention": on, "seed": seed} for on in (1.0, 0.0) for seed in (0, 1)]
    add("default, all documents", "usbills4k", 13768, runs, 6, evaluations=3, test=True)
    runs = [{"gamma": 0.76}, {"gamma": 0.76, "seed": 1}, jaccard]
    add(
        "paper, queue",
        "arxiv_mlc",
        3000,
        [{**printed, **run} for run in runs],
        8,
        queue=1024,
        evaluations=2,
        **as_printed,
    )
    runs = [both, {"prototype": 0.76}, jaccard]
    add(
        "paper, contrastive first", "arxiv_mlc", 3000, [{**printed, **run} for run in runs], 8,
        contrastive_epochs=2, evaluations=2, **as_printed,
    )  # fmt: skip
    runs = [{**default, **arm, "seed": seed} for arm in ({}, {"attention": 0.0}, both) for seed in (0, 1)]
    add("default, all documents", "arxiv_mlc", 22713, runs, 4, evaluations=2, test=True)
    runs = [{**default, **run} for run in ({}, both, {"prototype": 0.76})]
    add("default, label encoder", "arxiv_mlc", 3000, runs, 5, evaluations=2, label_encoder=True)
    runs = [{**printed, "lr": 1e-4, "head_lr": 1e-4, **run} for run in ({}, both, {"gamma": 0.76})]
    add("paper, batch 128", "arxiv_mlc", 3000, runs, 8, batch=128, evaluations=2, **as_printed)
    return plan


def tokens() -> list[dict]:
    """Label-wise attention over tokens, without and with it, for as many epochs as the recipe trains."""
    plan = []
    head = {"softmax": 0.0, "decoupled": 1.0, "dropout": 0.5, "head_lr": 1e-3, "mlp": 0.0}
    for size, epochs in ((3000, 11), (13768, 6)):
        shared = {"epochs": epochs, "evaluations": 2, "test": size > 3000}
        runs = [{**head, "laat_weight": 1.0}, {**head, "laat_weight": 1.0, "similarity": 0.0}]
        plan.append(group("laat", "usbills4k", size, runs[: 2 if size == 3000 else 1], laat=True, **shared))
        runs = [head, {**head, "attention": 0.0}]
        plan.append(group("no laat", "usbills4k", size, runs[: 2 if size == 3000 else 1], **shared))
    return plan


def proof() -> list[dict]:
    """Three seeds, paired: token attention and the paper's losses; and what no earlier plan tried."""
    plan = []
    default = {"softmax": 0.0, "decoupled": 1.0, "dropout": 0.5, "head_lr": 1e-3}
    heads = {"usbills4k": {**default, "mlp": 0.0}, "debtags": default, "arxiv_mlc": default}

    def add(title, data, size, runs, epochs, rate=0.5e6, adapted=0, **shared):
        tokens = (size * DATA[data][0] * epochs * (1.4 if shared.get("label_encoder") else 1.0) + adapted) * len(runs)
        one = group(title, data, size, runs, epochs=epochs, **shared)
        plan.append({**one, "seconds": round(tokens / rate) + 10})

    def three(*variants):
        return [{**variant, "seed": seed} for variant in variants for seed in range(3)]

    whole = {"evaluations": 4, "test": True, "top": True}
    for data, epochs in (("usbills4k", 8), ("debtags", 8)):
        runs = three(heads[data], {**heads[data], "laat_weight": 1.0})
        add("token attention", data, 6000, runs, epochs, rate=0.4e6, laat=True, **whole)
    printed = {**paper(), "lr": 1e-4, "head_lr": 1e-4}
    for data, epochs in (("usbills4k", 12), ("debtags", 10)):
        unit = 0.01 * DATA[data][1]
        runs = three(printed, {**printed, "beta": unit, "gamma": unit})
        runs += [{**printed, "beta": unit}, {**printed, "gamma": unit}]
        add("paper's classifier", data, 6000, runs, epochs, **whole)
    runs = three(default, {**default, "laat_weight": 1.0})
    add("token attention", "arxiv_mlc", 6000, runs, 5, laat=True, **whole)
    printed = paper()
    variants = [{}, {"seed": 1}, {"gamma": 0.76}, {"gamma": 0.76, "seed": 1}, {"beta": 0.76, "gamma": 0.76}]
    variants += [{"prototype": 0.76}, {"gamma": 0.76, "positives_jaccard": 1.0}]
    runs = [{**printed, **variant} for variant in variants]
    add("paper", "arxiv_mlc", 3000, runs, 8, evaluations=2, label_encoder=True, encoder_dropout=0.1)
    for data, head in heads.items():
        runs = [{**head, "seed": seed} for seed in (0, 1)]
        for steps, kind in ((0, "mlm"), (500, "mlm"), (500, "simcse")):
            adapted = steps * 64 * 100
            shared = {"evaluations": 3, "adapt_steps": steps, "adapt": kind}
            add("continued pretraining", data, 1000, runs, 10, adapted=adapted, **shared)
    tail = [{}, {"decoupled": 0.0}, {"bce": 0.0, "decoupled": 0.0, "asymmetric": 1.0}]
    tail += [{"bce": 0.0, "asymmetric": 1.0}, {"bce": 0.0, "distribution": 1.0}]
    tail += [{"bce": 0.0, "decoupled": 0.0, "distribution": 1.0}]
    for data, head in heads.items():
        runs = [{**head, **variant, "seed": seed} for variant in tail for seed in (0, 1)]
        add("losses for rare labels", data, 3000, runs, 5, evaluations=2)
    for batch, rate in ((32, 5e-5), (256, 2e-4)):
        runs = [{**printed, "lr": rate, "head_lr": rate, "seed": seed} for seed in (0, 1)]
        runs += [{**run, "beta": 0.76, "gamma": 0.76} for run in runs]
        add("paper, batch", "arxiv_mlc", 6000, runs, 8, batch=batch, evaluations=2, encoder_dropout=0.1)
    return plan


PLANS = {"proof": proof, "screening": screening, "second": second, "core": core, "tokens": tokens}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("plan", choices=[*PLANS, "finalists"])
    parser.add_argument("files", nargs="*", help="of finalists: the plan `second`, and its runs")
    options = parser.parse_args()
    if options.plan == "finalists":
        plan = finalists(choose(options.files[1:], options.files[0]))
    else:
        plan = PLANS[options.plan]()
    json.dump(plan, sys.stdout, indent=0)


if __name__ == "__main__":
    main()
