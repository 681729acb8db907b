#!/usr/bin/env python
"""
Label more documents than one machine can handle: `predict.py` on a Ray cluster.

    ray start --head                                   # on one machine; `ray start --address=...` on the others
    python examples/predict_ray.py --model_name_or_path outputs/aapd --input_file '/shared/new/*.jsonl.zst' --output_file /shared/labels.jsonl

The arguments, the output and `--resume` are the same as for `predict.py`. Ray Data reads files and labels documents on all machines of the
cluster; this process writes the output. The input files must have the same path on every machine, and so must
the model, unless it is loaded from the Hub; `sep-mldc` must be installed on every machine. If a worker or a machine is lost, its documents are labeled again by
another. Without a cluster, one is started on this machine. See docs/deploy.md.
"""

import dataclasses
import os
import pickle
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import predict
import torch
from tqdm import tqdm
from transformers import HfArgumentParser
from transformers.utils import logging as transformers_logging


try:
    import ray
except ImportError:
    sys.exit('predict_ray.py needs Ray, which is not installed. Install it with `pip install "sep-mldc[ray]"`.')


# Maximum number of files that are read at the same time.
MOST_READERS = 8


@dataclass
class ClusterArguments(predict.PredictArguments):
    """The arguments of `predict.py`, and the resources of each worker."""

    num_workers: int | None = field(
        default=None,
        metadata={
            "help": "Number of worker processes in the cluster, each with its own copy of the model. Defaults to as many as fit, given its "
            "CPUs (or, with `--gpus_per_worker`, its GPUs)."
        },
    )
    address: str | None = field(
        default=None,
        metadata={
            "help": "Address of the cluster. Defaults to RAY_ADDRESS, then to a cluster running on this machine."
        },
    )
    cpus_per_worker: int = field(default=1, metadata={"help": "Processors, and threads of PyTorch, per worker."})
    gpus_per_worker: float = field(
        default=0.0, metadata={"help": "GPUs per worker: 1, or a fraction of one that several workers share."}
    )

    def _check_numbers(self) -> None:
        super()._check_numbers()
        if self.cpus_per_worker < 1:
            raise ValueError(
                f"`--cpus_per_worker` is {self.cpus_per_worker}, but it must be at least 1. Choose a larger number."
            )
        if not 0 <= self.gpus_per_worker < float("inf"):
            raise ValueError(f"`--gpus_per_worker` is {self.gpus_per_worker}, but it must be at least 0. Try 1.")

    def _check_files(self) -> None:
        super()._check_files()
        if "-" in self.input_file:
            raise ValueError("`--input_file` is standard input, which other machines cannot read. Name files.")


# ---- On the workers ----

# A row of the dataset is a pickled block of documents, which one worker labels as a whole.
Rows = dict[str, list[bytes]]


def read_file(rows: dict[str, Any], args: ClusterArguments) -> Iterator[Rows]:
    """The documents of one file, in blocks, without the first `skip`. After them, the text of an error if there is one."""
    (path,), (skip,) = rows["path"], rows["skip"]
    documents = predict.read_documents([str(path)], args)
    try:
        for _ in range(skip):
            next(documents, None)
        for block in predict.blocks_of(documents, args.look_ahead):
            yield {"block": [pickle.dumps([tuple(document) for document in block])]}
    except (ValueError, OSError) as error:
        # If raised here, it would end the workers that are still labeling preceding documents.
        yield {"block": [pickle.dumps(str(error))]}


class Labeler:
    """A worker: the pipeline, and the labels of blocks of documents."""

    def __init__(self, args: ClusterArguments, fingerprint: dict[str, Any]):
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        torch.set_num_threads(args.cpus_per_worker)
        transformers_logging.disable_progress_bar()
        self.args = args
        self.classify = predict.make_pipeline(args)
        predict.check_fingerprint(self.classify, args, fingerprint)

    def __call__(self, rows: dict[str, Any]) -> Rows:
        """For each block a list of `(id, labels, digest)` of its documents; errors as they are."""
        blocks = map(pickle.loads, rows["block"])
        return {"block": [pickle.dumps(block if isinstance(block, str) else self.label(block)) for block in blocks]}

    def label(self, block: list[tuple]) -> list[tuple[Any, list[dict[str, Any]], str]]:
        documents = [predict.Document(*values) for values in block]
        answers = predict.label_texts(self.classify, [document.text for document in documents], self.args)
        return [
            (document.id, labels, predict.digest_of(document))
            for document, labels in zip(documents, answers, strict=True)
        ]


# ---- On this machine ----


def connect(args: ClusterArguments) -> int:
    """Connect to the cluster, or start one; returns the number of labeling workers."""
    # `predict` is a file next to this one, not a package that is installed on the workers.
    for module in (predict, sys.modules[__name__]):
        if module.__name__ != "__main__":
            ray.cloudpickle.register_pickle_by_value(module)
    if not ray.is_initialized():
        ray.init(address=args.address)
    resources = ray.cluster_resources()
    room = int(resources.get("CPU", 0) // args.cpus_per_worker)
    if args.gpus_per_worker:
        room = min(room, int(resources.get("GPU", 0) // args.gpus_per_worker))
    wanted = args.num_workers or max(room, 1)
    if room < wanted:
        raise ValueError(
            f"{wanted} workers of {args.cpus_per_worker} CPUs and {args.gpus_per_worker:g} GPUs were requested, but the cluster has "
            f"{resources.get('CPU', 0):g} CPUs and {resources.get('GPU', 0):g} GPUs, enough for {room}. Lower `--num_workers`, "
            "`--cpus_per_worker` or `--gpus_per_worker`."
        )
    return wanted


def files_left(paths: list[str], args: ClusterArguments, output, seen: predict.DocumentDigest) -> list[dict[str, Any]]:
    """The files whose lines are not all written yet, each with the number of documents to `skip`."""
    done = {"file": 0, "documents": 0}

    def documents() -> Iterator[predict.Document]:
        for number, path in enumerate(paths):
            for position, document in enumerate(predict.read_documents([path], args), start=1):
                done.update(file=number, documents=position)
                yield document

    rest = documents()
    predict.skip_done(rest, output, seen)
    left = [{"path": os.path.abspath(path), "skip": 0} for path in paths[done["file"] :]]
    left[0]["skip"] = done["documents"]
    if output.is_complete:
        predict.check_not_grown(rest, args)
        return []
    return left


def labeled_blocks(
    files: list[dict[str, Any]], args: ClusterArguments, fingerprint: dict[str, Any], num_workers: int
) -> Iterator[list[tuple[Any, list[dict[str, Any]], str]]]:
    """What `Labeler.label` returns, in the order of the documents."""
    context = ray.data.DataContext.get_current()
    context.execution_options.preserve_order = True
    # Send each row to a worker separately. By default, up to 128 MiB of rows are sent together.
    context.target_max_block_size = 1
    args = dataclasses.replace(args)
    if os.path.isdir(args.model_name_or_path):
        args.model_name_or_path = os.path.abspath(args.model_name_or_path)  # workers have another working directory
    blocks = ray.data.from_items(files, override_num_blocks=len(files)).map_batches(
        read_file,
        fn_args=(args,),
        batch_size=1,
        num_cpus=0,  # labelers take all processors until the last block
        concurrency=min(len(files), MOST_READERS),
    )
    labeled = blocks.map_batches(
        Labeler,
        fn_constructor_args=(args, fingerprint),
        batch_size=1,
        num_cpus=args.cpus_per_worker,
        num_gpus=args.gpus_per_worker or None,
        concurrency=num_workers,
    )
    for rows in labeled.iter_batches(batch_size=1):
        for block in map(pickle.loads, rows["block"]):
            if isinstance(block, str):
                raise ValueError(block)
            yield block


def predict_on_cluster(args: ClusterArguments) -> int:
    """Label all documents; returns how many were labeled by this run."""
    paths = predict.input_paths(args)
    total = predict.count_documents(paths, args)
    with predict.open_output(args, paths) as output:
        fingerprint = predict.fingerprint_of(predict.make_pipeline(args), args)
        output.begin(fingerprint)
        seen = predict.DocumentDigest()
        files = files_left(paths, args, output, seen)
        if output.is_complete:
            print(f"{args.output_file} is complete: nothing to resume.", file=sys.stderr)
            predict.report_abstained(args, paths)
            return 0
        num_workers = connect(args)
        index = first = output.num_done
        num_abstained = 0
        with tqdm(total=total, initial=index, desc="Labeling", unit=" documents", mininterval=1.0) as progress:
            for block in labeled_blocks(files, args, fingerprint, num_workers):
                lines = [
                    predict.line_of(predict.Document(index + number, id, ""), labels)
                    for number, (id, labels, _) in enumerate(block)
                ]
                output.write(lines, len(block), seen.add_digests(digest for _, _, digest in block))
                index += len(block)
                num_abstained += sum(1 for _ in predict.abstained_rows(lines))
                progress.update(len(block))
        output.finish()
        predict.report_abstained(args, paths, index - first, num_abstained)
    return index - first


def cause_of(error: BaseException) -> BaseException:
    """The error of a worker that Ray's errors are wrapped around."""
    while True:
        inner = getattr(error, "cause", None) or error.__cause__
        if not isinstance(inner, BaseException):
            return error
        error = inner


def main(arguments: list[str] | None = None) -> None:
    predict.open_closed_streams()
    parser = HfArgumentParser(ClusterArguments, description=__doc__.splitlines()[1])
    try:
        (args,) = parser.parse_args_into_dataclasses(args=arguments)
        predict_on_cluster(args)
    except KeyboardInterrupt:
        sys.exit("predict_ray.py: interrupted. Add `--resume` to continue.")
    except (ValueError, OSError, ImportError, ray.exceptions.RayError) as error:
        # Ray adds lines to messages.
        sys.exit(f"predict_ray.py: {(str(cause_of(error)).strip() or repr(error)).splitlines()[0]}")


if __name__ == "__main__":
    main()
