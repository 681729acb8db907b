"""SEP-MLDC for Hugging Face Transformers. Importing this package registers the model with the Auto classes."""

from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification

from .configuration_sep_mldc import SepMldcConfig
from .modeling_sep_mldc import SepMldcForMultiLabelClassification, SepMldcOutput


AutoConfig.register(SepMldcConfig.model_type, SepMldcConfig, exist_ok=True)
AutoModel.register(SepMldcConfig, SepMldcForMultiLabelClassification, exist_ok=True)
AutoModelForSequenceClassification.register(SepMldcConfig, SepMldcForMultiLabelClassification, exist_ok=True)

__all__ = ["SepMldcConfig", "SepMldcForMultiLabelClassification", "SepMldcOutput"]
