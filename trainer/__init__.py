"""Training of SEP-MLDC models: losses, metrics, data, and a `Trainer` that brings them together."""

from .data_collator import SepMldcDataCollator
from .sep_mldc_trainer import SepMldcTrainer
from .training_arguments import SepMldcTrainingArguments


__all__ = ["SepMldcDataCollator", "SepMldcTrainer", "SepMldcTrainingArguments"]
