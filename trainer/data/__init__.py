"""Documents, labels and label descriptions: reading files, inspection, splits, encoding, batches."""

from typing import TYPE_CHECKING

from .._lazy import attach


__getattr__, __dir__ = attach(__name__)
__all__ = [
    "DataFileError",
    "DataFileNotFoundError",
    "DataReport",
    "DocumentSampler",
    "DocumentSplit",
    "LabeledDocuments",
    "SepMldcDataCollator",
    "SplitReport",
    "add_pseudo_documents",
    "build_label_list",
    "check_training_labels",
    "close_labels",
    "count_label_names",
    "count_unknown_labels",
    "encode_labels",
    "inspect_documents",
    "label_counts",
    "load_documents",
    "load_label_descriptions",
    "load_pseudo_documents",
    "load_splits",
    "num_real_documents",
    "parents_of_labels",
    "read_label_constraints",
    "read_label_descriptions",
    "read_label_parents",
    "read_labels",
    "read_records",
    "split_documents",
    "tokenize",
]

if TYPE_CHECKING:
    from .collator import SepMldcDataCollator
    from .documents import LabeledDocuments, load_documents
    from .encoding import (
        build_label_list,
        check_training_labels,
        count_label_names,
        count_unknown_labels,
        encode_labels,
        label_counts,
        num_real_documents,
    )
    from .inspection import DataReport, SplitReport, inspect_documents
    from .label_descriptions import load_label_descriptions
    from .label_files import read_label_descriptions, read_labels
    from .label_parents import close_labels, parents_of_labels, read_label_constraints, read_label_parents
    from .loading import load_splits
    from .pseudo_documents import add_pseudo_documents, load_pseudo_documents
    from .readers import read_records
    from .sampler import DocumentSampler
    from .splitting import DocumentSplit, split_documents
    from .text_lines import DataFileError, DataFileNotFoundError
    from .tokenization import tokenize
