"""The `EndpointHandler` with which Hugging Face Inference Endpoints run a model. Saved as `handler.py` with the weights."""

from typing import Any

import torch
from transformers import pipeline


TASK = "multi-label-document-classification"
MAX_DOCUMENTS = 1000
# The content of `requirements.txt`, which is saved next to this file: what the endpoint has to install.
REQUIREMENTS = "transformers>=5.24,<6\ntokenizers\nsafetensors\n"


class EndpointHandler:
    """
    Labels of documents, for requests such as `{"inputs": ["A document.", ...], "parameters": {"top_k": 5}}`.

    Args:
        path (`str`): folder of the checkpoint.
    """

    def __init__(self, path: str = ""):
        device = 0 if torch.cuda.is_available() else -1
        # The code in the checkpoint is that of this repository.
        self.classify = pipeline(TASK, model=path or ".", trust_remote_code=True, device=device)

    def __call__(self, data: dict[str, Any]) -> list[Any]:
        """
        Args:
            data (`dict`): `inputs`: a text, a dictionary with a `text`, or a list of up to 1,000 of them; and optionally `parameters`:
                a dictionary of parameters of the pipeline and `batch_size`.

        Returns:
            `list`: for each document, labels and scores, best first; for a single text, just its labels and scores.

        Raises:
            ValueError: the request is invalid. The endpoint responds with status 400 and this message.
        """
        if not isinstance(data, dict) or "inputs" not in data:
            raise ValueError(
                'The request has no `inputs`. Send {"inputs": "a document"} or {"inputs": ["a document", ...]}.'
            )
        inputs, parameters = data["inputs"], data.get("parameters") or {}
        if not isinstance(parameters, dict):
            raise ValueError(f'`parameters` is {parameters!r}, but it must be an object such as {{"top_k": 5}}.')
        if isinstance(inputs, list) and len(inputs) > MAX_DOCUMENTS:
            raise ValueError(
                f"The request has {len(inputs)} documents, but at most {MAX_DOCUMENTS} are allowed. Send several requests."
            )
        if not isinstance(inputs, (str, dict, list)):
            raise ValueError(f"`inputs` is {inputs!r}, but it must be a text or a list of texts.")
        batch_size = parameters.get("batch_size", 32)
        if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
            raise ValueError(
                f"`batch_size` is {batch_size!r}, but it must be an integer of at least 1. Leave it out for 32."
            )
        return self.classify(inputs, **{**parameters, "batch_size": batch_size})
