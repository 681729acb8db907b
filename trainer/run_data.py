"""Read, split and check the documents and labels of a run."""

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, Features, IterableDataset, Value, concatenate_datasets
from datasets import List as ListFeature
from tqdm.auto import tqdm
from transformers.utils import logging

from .data.encoding import count_label_names, count_unknown_labels, encode_labels, label_counts, num_real_documents
from .data.label_parents import parents_of_labels, read_label_constraints, read_label_parents
from .data.loading import AnyDataset, load_splits
from .data.parent_files import is_rdf
from .data.splitting import split_documents
from .data.tokenization import tokenize
from .run_arguments import RunSettings
from .thresholds import check_guarantee, documents_needed


logger = logging.get_logger(__name__)
DEFAULT_VALIDATION_SPLIT = 0.1
# Number of documents of a stream that lexical scores are fitted on.
MAX_STREAMED_DOCUMENTS = 200_000
LEXICAL_FEATURES = Features({"input_ids": ListFeature(Value("int32")), "label_indices": ListFeature(Value("int64"))})


@dataclass
class RunData:
    """
    The data of a run.

    Attributes:
        documents (`dict[str, Dataset]`): texts and label names of each available split: `"train"`, `"validation"`, `"test"`.
        encoded (`dict[str, Dataset]`): the same documents as token ids and label ids.
        labels (`list[str]` of length `num_labels`): label names, in the order of their ids.
        counts (`np.ndarray` of shape `(num_labels,)`, *optional*): number of real training documents per label.
        num_documents (`int`): number of real training documents.
        descriptions (`dict[str, str]`): label descriptions, for the labels that have one.
        pseudo_documents (`dict`, *optional*): provenance of the pseudo-documents, for the model card.
        settings (`dict`): value and reason of each setting that the recipe covers.
        label_sets (`dict`): `label_parents`, `hierarchy` and `label_constraints` for the model's configuration.
        starts_cold (`bool`): whether there are no real training documents, only label texts.
        unlabeled (`list[str]`): documents without labels, used for the thresholds of a model without training documents.
    """

    documents: dict[str, Any]
    encoded: dict[str, Any]
    labels: list[str]
    counts: np.ndarray | None
    num_documents: int
    descriptions: dict[str, str] = field(default_factory=dict)
    pseudo_documents: dict | None = None
    settings: dict[str, dict[str, str]] = field(default_factory=dict)
    label_sets: dict[str, Any] = field(default_factory=dict)
    starts_cold: bool = False
    unlabeled: list[str] = field(default_factory=list)

    def with_validation(self) -> "RunData":
        """The same data with the validation documents added to the training documents, before the pseudo-documents."""

        def merge(train: Any, validation: Any) -> Any:
            if "is_pseudo" not in train.column_names:
                return concatenate_datasets([train, validation])
            validation = validation.add_column("is_pseudo", [False] * len(validation))
            real, pseudo = range(self.num_documents), range(self.num_documents, len(train))
            return concatenate_datasets([train.select(real), validation, train.select(pseudo)])

        documents, encoded = (
            {**of, "train": merge(of["train"], of["validation"])} for of in (self.documents, self.encoded)
        )
        counts = label_counts(encoded["train"], len(self.labels))
        number = num_real_documents(encoded["train"])
        return dataclasses.replace(self, documents=documents, encoded=encoded, counts=counts, num_documents=number)


# ---- Documents ----


def read_documents(settings: RunSettings) -> dict[str, Any]:
    """
    Read the documents given by the arguments, and set aside validation and test documents from the training documents if no files are
    given for them.

    Args:
        settings ([`RunSettings`]): of the run.

    Returns:
        `dict[str, Dataset]`: the available splits (`"train"`, `"validation"`, `"test"`), with the columns "id" (if there are ids),
        "text" and "labels" (names). With `streaming`, `"train"` is an `IterableDataset`.

    Raises:
        DataFileNotFoundError: if a file does not exist. It is a `FileNotFoundError`.
        DataFileError: if a column is missing or a row is bad. It is a `ValueError`.
        ValueError: if the run needs a split that has no documents, or if too few documents can be set aside.
    """
    args = settings.args
    with args.main_process_first(desc="reading documents"):
        documents = _load(settings)
    with args.main_process_first(desc="splitting documents"):
        _set_aside(settings, documents)
    _check_splits(settings, documents)
    return documents


def _load(settings: RunSettings) -> dict[str, Any]:
    data = settings.data
    files: dict[str, Any] = {"validation_file": data.validation_file, "test_file": data.test_file}
    if data.streaming and data.train_file:
        stream = _load_splits(settings, train_file=data.train_file, streaming=True)
        return {**stream, **(_load_splits(settings, **files) if any(files.values()) else {})}
    source: dict[str, Any] = {"dataset_name": data.dataset_name, "dataset_config_name": data.dataset_config_name}
    if not (data.train_file or data.dataset_name or any(files.values())):
        return {}
    return dict(_load_splits(settings, train_file=data.train_file, **files, **source))


def _load_splits(settings: RunSettings, streaming: bool = False, **sources: Any) -> Mapping[str, Any]:
    bad_rows = None
    if settings.data.on_bad_rows == "skip" and not streaming and not settings.run.dry_run:
        bad_rows = Path(settings.args.output_dir) / "bad_rows.jsonl" if settings.args.should_save else None
    columns = settings.labels.label_column
    return load_splits(
        **sources,
        streaming=streaming,
        on_bad_rows=settings.data.on_bad_rows,
        bad_rows_file=bad_rows,
        text_columns=settings.data.text_columns,
        label_column=columns[0] if len(columns) == 1 else columns,
        id_column=settings.data.id_column,
        label_delimiter=settings.labels.label_delimiter,
        data_format=settings.data.data_format,
        num_proc=settings.data.preprocessing_num_workers,
    )


def _set_aside(settings: RunSettings, documents: dict[str, Any]) -> None:
    """Take test and validation documents from the training documents if no files are given for them."""
    train = documents.get("train")
    if train is None or not settings.args.do_train or isinstance(train, IterableDataset):
        return
    for split, share in (("test", settings.data.test_split), ("validation", settings.data.validation_split)):
        named = share is not None
        share = DEFAULT_VALIDATION_SPLIT if share is None and split == "validation" else share
        if split in documents or not share:
            continue
        try:
            documents["train"], documents[split] = split_documents(documents["train"], share, seed=settings.args.seed)
        except ValueError as error:
            if named:
                raise
            logger.warning(f"There are no {split} documents, and none could be set aside: {error}")
            continue
        if settings.args.should_log:
            print(f"{len(documents[split])} of {len(train)} training documents are set aside for {split}.")


def _check_splits(settings: RunSettings, documents: Mapping[str, Any]) -> None:
    for flag, split in {"do_train": "train", "do_eval": "validation", "do_predict": "test"}.items():
        if split == "train" and settings.labels.pseudo_documents_file and not settings.data.train_file:
            continue  # the pseudo-documents are the training documents
        if getattr(settings.args, flag) and split not in documents:
            splits = split != "train" and settings.args.do_train and not settings.data.streaming
            raise ValueError(
                f"`--{flag}` needs {'training' if split == 'train' else split} documents. Specify them with `--{split}_file`, "
                f"{f'set some aside with `--{split}_split 0.1`, ' if splits else ''}or remove the flag."
            )
    if "validation" in documents or not settings.args.do_train:
        return
    for flag, wanted in (
        ("lexical_scores", settings.lexical.lexical_scores),
        ("eval_strategy", settings.args.eval_strategy != "no"),
        ("refit_on_all", settings.run.refit_on_all),
        ("class_weights", settings.model.class_weights == "auto"),
        ("threshold_objective", _requested_guarantee(settings) is not None),
    ):
        if wanted:
            raise ValueError(
                f"`--{flag}` needs validation documents. Specify them with `--validation_file`, or remove `--{flag}`."
            )


def _requested_guarantee(settings: RunSettings) -> tuple[str, float] | None:
    """Risk and limit of the requested guarantee, see `check_guarantee`; `None` if no guarantee is requested."""
    return check_guarantee(settings.thresholds.threshold_objective) if settings.thresholds.tune_thresholds else None


def check_guarantee_documents(settings: RunSettings, documents: Mapping[str, Any], labels: Sequence[str]) -> None:
    """
    Check before training that there are enough validation documents for the guarantee of the thresholds.

    Args:
        settings ([`RunSettings`]): of the run.
        documents (`dict[str, Dataset]`): of each split, with "labels" (names).
        labels (`list[str]` of length `num_labels`): of the model.

    Raises:
        ValueError: if there are too few.
    """
    wanted, validation = _requested_guarantee(settings), documents.get("validation")
    if wanted is None or validation is None or not settings.args.do_train:
        return
    (risk, limit), names = wanted, set(labels)
    known = sum(risk != "recall" or not names.isdisjoint(own) for own in validation["labels"])
    if known < documents_needed(limit):
        raise ValueError(
            f"`--threshold_objective` is {settings.thresholds.threshold_objective!r}, which needs at least {documents_needed(limit)} validation "
            f"documents{' with labels' if risk == 'recall' else ''}, but there are only {known}. Add some, or choose a less strict objective."
        )


def first_documents(dataset: AnyDataset, limit: int | None) -> AnyDataset:
    """The first `limit` documents of a dataset or a stream, or all of them if `limit` is `None`."""
    if limit is None:
        return dataset
    if isinstance(dataset, IterableDataset):
        return dataset.take(limit)
    return dataset.select(range(min(limit, len(dataset))))


def lexical_documents(dataset: AnyDataset, hide_progress: bool = False) -> Dataset:
    """
    The documents that lexical scores are fitted on: those of a dataset, or the first 200,000 of a stream, whose tokens are read into memory.

    Args:
        dataset (`Dataset` or `IterableDataset`): with "input_ids" and "label_indices".
        hide_progress (`bool`, defaults to `False`): no progress bar.

    Returns:
        `Dataset` with "input_ids" and "label_indices".
    """
    if not isinstance(dataset, IterableDataset):
        return dataset
    columns: dict[str, list] = {"input_ids": [], "label_indices": []}
    first = dataset.take(MAX_STREAMED_DOCUMENTS)
    for document in tqdm(first, desc="Documents for lexical scores", disable=hide_progress, leave=False):
        columns["input_ids"].append(np.asarray(document["input_ids"], dtype=np.int32))
        columns["label_indices"].append(list(document["label_indices"]))
    return Dataset.from_dict(columns, features=LEXICAL_FEATURES)


def encode_documents(settings: RunSettings, dataset: AnyDataset, labels: Sequence[str], tokenizer: Any) -> AnyDataset:
    """
    Convert documents to token ids and label ids. A stream is also shuffled, in a buffer.

    Args:
        settings ([`RunSettings`]): of the run.
        dataset (`Dataset` or `IterableDataset`): with "text" and "labels" (names).
        labels (`list[str]` of length `num_labels`): in the order of their ids.
        tokenizer (`PreTrainedTokenizerBase`): of the encoder.

    Returns:
        `Dataset` or `IterableDataset` with "input_ids", "attention_mask", "length" and "label_indices".
    """
    dataset = encode_labels(dataset, {label: index for index, label in enumerate(labels)})
    if isinstance(dataset, IterableDataset) and settings.data.shuffle_buffer_size:
        dataset = dataset.shuffle(seed=settings.args.seed, buffer_size=settings.data.shuffle_buffer_size)
    workers = settings.data.preprocessing_num_workers
    return tokenize(dataset, tokenizer, settings.data.max_length, num_proc=workers)


# ---- Labels ----


def read_hierarchy(
    settings: RunSettings, documents: Mapping[str, Any], checkpoint: Any = None
) -> tuple[dict[str, list[str]] | None, str | None]:
    """
    The label parents and the `hierarchy` setting, from the arguments or else from the trained checkpoint.

    Args:
        settings ([`RunSettings`]): of the run.
        documents (`dict[str, Dataset]`): of each split, with "labels" (names), to which SKOS concepts are matched.
        checkpoint (`SepMldcConfig`, *optional*): of the checkpoint that is trained further, evaluated or run.

    Returns:
        `tuple(dict[str, list[str]], str)`: parents by label name, and `hierarchy` of the configuration; each may be `None`.

    Raises:
        DataFileError: if the file of parents cannot be read. It is a `ValueError`.
        ValueError: if a hierarchy is requested but no label has a parent.
    """
    path, parents = settings.labels.label_parents_file, getattr(checkpoint, "label_parents", None)
    hierarchy = settings.labels.hierarchy or getattr(checkpoint, "hierarchy", None)
    if path is not None:
        names = [] if checkpoint is None else checkpoint.labels
        if checkpoint is None and is_rdf(path) and "train" in documents:
            names = list(count_label_names(first_documents(documents["train"], settings.data.max_train_samples))[0])
        parents = read_label_parents(path, names)
    if hierarchy is not None and not parents:
        raise ValueError(
            f"`--hierarchy` is {hierarchy}, but no label has a parent. Specify parents with `--label_parents_file`, or remove the argument."
        )
    return parents, hierarchy


def label_set_fields(
    settings: RunSettings,
    labels: Sequence[str],
    parents: Mapping[str, list[str]] | None,
    hierarchy: str | None,
    checkpoint: Any = None,
) -> dict[str, Any]:
    """
    The configuration fields that control label sets, for these labels.

    Args:
        settings ([`RunSettings`]): of the run.
        labels (`list[str]` of length `num_labels`): of the model.
        parents (`dict[str, list[str]]`, *optional*), hierarchy (`str`, *optional*): what [`read_hierarchy`] returned.
        checkpoint (`SepMldcConfig`, *optional*): of the checkpoint that is trained further, evaluated or run.

    Returns:
        `dict`: `label_parents`, `hierarchy` and `label_constraints`.

    Raises:
        DataFileError: if the file of constraints cannot be read. It is a `ValueError`.
        ValueError: if parents or constraints do not fit the labels.
    """
    path = settings.labels.label_parents_file
    if path is not None:
        parents = parents_of_labels(parents or {}, labels, path)
    constraints = getattr(checkpoint, "label_constraints", None)
    if settings.labels.label_constraints_file is not None:
        closed = parents if hierarchy is not None else None
        constraints = read_label_constraints(settings.labels.label_constraints_file, labels, closed)
    return {"label_parents": parents, "hierarchy": hierarchy, "label_constraints": constraints}


def check_known_labels(
    settings: RunSettings, dataset: AnyDataset, labels: Sequence[str], split: str, names: Counter | None = None
) -> None:
    """
    Report the document labels that the model cannot learn or predict. Each split needs at least one label that it can.

    Args:
        settings ([`RunSettings`]): of the run.
        dataset (`Dataset` or `IterableDataset`): with "labels" (names).
        labels (`list[str]` of length `num_labels`): of the model.
        split (`str`): `"train"`, `"validation"` or `"test"`.
        names (`Counter`, *optional*): number of training documents per label, if already counted.

    Raises:
        ValueError: if the model knows none of the labels of the documents.
    """
    known = set(labels)
    if split != "train":
        count_unknown_labels(dataset, labels, split)
        if not any(known.intersection(names) for names in dataset["labels"]):
            raise ValueError(
                f"None of the {len(dataset)} {split} documents has one of the {len(labels)} labels of the model ({labels[0]!r}, ...), "
                f"so the model cannot be evaluated on them. Check the labels of `--{split}_file`, or remove the argument"
                f"{' and label the documents with `predict.py`' if split == 'test' else ''}."
            )
        return
    counts = count_label_names(dataset)[0] if names is None else names
    unknown = {name: count for name, count in counts.most_common() if name not in known}
    if not unknown:
        return
    shown = ", ".join(f"{name!r} ({count})" for name, count in list(unknown.items())[:5])
    source = settings.labels.label_list_file or settings.model.model_name_or_path
    if len(unknown) == len(counts):
        raise ValueError(
            f"None of the {len(counts)} labels of the training documents ({shown}) is among the {len(labels)} labels of {source}. Use "
            "the same names in both."
        )
    logger.warning(
        f"train: {len(unknown)} labels are not among the {len(labels)} labels of {source}, so they are not learned and their "
        f"documents count as negatives: {shown}{' ...' if len(unknown) > 5 else ''}. Add them to the label list, or to a trained model "
        "with `model.add_labels`."
    )
