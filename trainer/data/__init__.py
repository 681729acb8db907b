"""Documents, labels and label descriptions: reading files, encoding, batches."""

from typing import TYPE_CHECKING

from .._lazy import attach


_MODULES = {
    "SepMldcDataCollator": ".collator",
    "DocumentSampler": ".sampler",
    "load_label_descriptions": ".label_descriptions",
    "add_pseudo_documents": ".loading",
    "build_label_list": ".loading",
    "count_label_names": ".loading",
    "count_unknown_labels": ".loading",
    "encode_labels": ".loading",
    "label_counts": ".loading",
    "load_pseudo_documents": ".loading",
    "load_splits": ".loading",
    "num_real_documents": ".loading",
    "tokenize": ".loading",
}
__getattr__, __dir__ = attach(__name__, _MODULES)
__all__ = [
    "DocumentSampler",
    "SepMldcDataCollator",
    "add_pseudo_documents",
    "build_label_list",
    "count_label_names",
    "count_unknown_labels",
    "encode_labels",
    "label_counts",
    "load_label_descriptions",
    "load_pseudo_documents",
    "load_splits",
    "num_real_documents",
    "tokenize",
]

if TYPE_CHECKING:
    from .collator import SepMldcDataCollator
    from .label_descriptions import load_label_descriptions
    from .loading import (
        add_pseudo_documents,
        build_label_list,
        count_label_names,
        count_unknown_labels,
        encode_labels,
        label_counts,
        load_pseudo_documents,
        load_splits,
        num_real_documents,
        tokenize,
    )
    from .sampler import DocumentSampler
