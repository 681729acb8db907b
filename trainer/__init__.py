"""Training of SEP-MLDC models: a `Trainer`, losses, metrics, data, thresholds, export. Names are imported on first use."""

from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

from ._lazy import attach


try:
    __version__ = version("sep-mldc")
except PackageNotFoundError:  # a checkout that was not installed
    __version__ = "0+unknown"

__getattr__, __dir__ = attach(__name__)
__all__ = [
    "DataReport",
    "DistillationTrainer",
    "FastLabeler",
    "LabeledDocuments",
    "check_training_labels",
    "inspect_documents",
    "load_documents",
    "split_documents",
    "RecommendedSettings",
    "recommend_settings",
    "LogitBatch",
    "SepMldcDataCollator",
    "SepMldcTrainer",
    "SepMldcTrainingArguments",
    "StreamingMetrics",
    "add_lora_adapters",
    "audit_labels",
    "build_label_list",
    "close_labels",
    "compare_logits",
    "distill",
    "distillation_arguments",
    "document_contrastive_loss",
    "document_similarity",
    "encode_labels",
    "export_onnx",
    "fit_new_labels",
    "inverse_propensities",
    "label_contrastive_loss",
    "label_similarity",
    "load_label_descriptions",
    "load_onnx",
    "load_pipeline",
    "load_pseudo_documents",
    "load_splits",
    "quantize_int8",
    "ranking_metrics",
    "read_label_constraints",
    "read_label_parents",
    "search_space",
    "tokenize",
    "tune_thresholds",
]

if TYPE_CHECKING:
    from .adapters import add_lora_adapters
    from .audit import audit_labels
    from .data import (
        DataReport,
        LabeledDocuments,
        SepMldcDataCollator,
        build_label_list,
        check_training_labels,
        close_labels,
        encode_labels,
        inspect_documents,
        load_documents,
        load_label_descriptions,
        load_pseudo_documents,
        load_splits,
        read_label_constraints,
        read_label_parents,
        split_documents,
        tokenize,
    )
    from .distillation import DistillationTrainer, distill, distillation_arguments
    from .evaluation import LogitBatch
    from .export import compare_logits, export_onnx, load_onnx, quantize_int8
    from .hyperparameters import search_space
    from .inference import load_pipeline
    from .labeler import FastLabeler
    from .losses import document_contrastive_loss, document_similarity, label_contrastive_loss, label_similarity
    from .metrics import StreamingMetrics, inverse_propensities, ranking_metrics
    from .new_labels import fit_new_labels
    from .recipes import RecommendedSettings, recommend_settings
    from .sep_mldc_trainer import SepMldcTrainer
    from .thresholds import tune_thresholds
    from .training_arguments import SepMldcTrainingArguments
