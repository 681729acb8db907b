"""SEP-MLDC for Hugging Face Transformers. Importing this package registers the model with the Auto classes."""

from importlib.metadata import PackageNotFoundError, version

from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification
from transformers.pipelines import PIPELINE_REGISTRY

from .configuration_sep_mldc import SepMldcConfig
from .modeling_sep_mldc import SepMldcForMultiLabelClassification, SepMldcOutput
from .pipeline_sep_mldc import TASK, MultiLabelDocumentClassificationPipeline, is_abstained


try:
    __version__ = version("sep-mldc")
except PackageNotFoundError:  # a checkout that was not installed
    __version__ = "0+unknown"

AutoConfig.register(SepMldcConfig.model_type, SepMldcConfig, exist_ok=True)
AutoModel.register(SepMldcConfig, SepMldcForMultiLabelClassification, exist_ok=True)
AutoModelForSequenceClassification.register(SepMldcConfig, SepMldcForMultiLabelClassification, exist_ok=True)
PIPELINE_REGISTRY.register_pipeline(
    TASK,
    pipeline_class=MultiLabelDocumentClassificationPipeline,
    pt_model=AutoModelForSequenceClassification,
    type="text",
)

__all__ = [
    "MultiLabelDocumentClassificationPipeline",
    "SepMldcConfig",
    "SepMldcForMultiLabelClassification",
    "SepMldcOutput",
    "is_abstained",
]
