"""
A disk cache of the hidden states after the frozen lower layers of an encoder.

Frozen layers without dropout compute the same hidden states for a document in every epoch. They are computed once and read from disk
afterward, so that each step computes only the upper layers.
"""

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from tqdm.auto import tqdm
from transformers.utils import logging

from modeling_sep_mldc.encoder_sep_mldc import possible_autocast

from .backbones import encoder_layers, states_after_layers


logger = logging.get_logger(__name__)

# Name of the cache in the output folder. Because of the underscore, it is not pushed to the Hub.
FOLDER = "_frozen_layers"
# Disk space in bytes to leave free.
SPARE_BYTES = 2**30
KEY_SIZE = 16
# Maximum relative difference of an encoder's states with and without reading the states of frozen layers.
PRECISION = 1e-3
INDEX_ENTRY = np.dtype([("key", f"V{KEY_SIZE}"), ("start", "<i8"), ("length", "<i4")])


def num_frozen_layers(backbone: nn.Module) -> int:
    """
    The number of lowest layers of an encoder whose hidden states cannot change in training, because they do not depend on any trainable
    parameter. 0 if the embeddings are trained or the encoder has no stack of layers.
    """
    return sum(not states.requires_grad for states in states_after_layers(backbone))


class FrozenLayersCache:
    """
    A file with the hidden states of documents after the first `num_layers` layers of an encoder.

    `fill` computes and stores the states of documents that are not stored yet. Within `attached`, the encoder reads the states of stored
    documents instead of computing them. Batches that contain a document that is not stored (such as label texts) are computed as usual, so
    results do not depend on what is stored, up to the rounding of `dtype`. Documents are identified by their token ids.

    `fill` is resumable: after a kill, a new cache in the same folder continues after the last complete batch. The cache is valid only for
    the weights of the frozen layers; a folder written with other weights is emptied.

    Args:
        folder (path): where the states are stored. Created if missing.
        backbone (`torch.nn.Module`): the encoder. Its modules stay registered, so saving during training works as usual.
        num_layers (`int`, *optional*): the number of layers. Defaults to [`num_frozen_layers`].
        dtype (`str`, defaults to `"float32"`): `"float32"`, or `"float16"`, which needs half the space and rounds states to
            11 bits.

    Raises:
        ValueError: `num_layers` is below 1 or above the number of layers.
    """

    def __init__(
        self, folder: str | os.PathLike, backbone: nn.Module, num_layers: int | None = None, dtype: str = "float32"
    ):
        self.backbone, self.folder = backbone, Path(folder)
        self.layers = list(encoder_layers(backbone))
        self.num_layers = num_frozen_layers(backbone) if num_layers is None else num_layers
        if not 1 <= self.num_layers <= len(self.layers):
            raise ValueError(
                f"`num_layers` is {self.num_layers}, but the encoder has {len(self.layers)} layers. Freeze 1 to {len(self.layers)} "
                "layers to cache their states."
            )
        self.dtype = np.dtype(dtype)
        self.hidden_size = backbone.config.hidden_size
        self.states_path, self.index_path = self.folder / "states.bin", self.folder / "index.bin"
        self._rows: dict[bytes, tuple[int, int]] = {}
        # States of the current batch, if all of its documents are stored.
        self._stored: torch.Tensor | None = None
        # Number of values that a layer returns as a tuple; 0 if it returns a tensor.
        self._tuple_size = 0
        self._embeddings = _embeddings(backbone, self.layers[0])

    # ---- Writing ----

    def bytes_needed(self, documents: Iterable[Sequence[int]]) -> int:
        """Disk space of the states of documents (lists of token ids), in bytes."""
        return sum(map(len, documents)) * self.hidden_size * self.dtype.itemsize

    def has_space_for(self, documents: Iterable[Sequence[int]], reserved_bytes: int = 0) -> bool:
        """
        Whether the disk has room for the states of documents (lists of token ids) plus `reserved_bytes` plus 1 GiB. Space that the folder
        already uses counts as free.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(self.folder).free
        if self.states_path.exists():
            free += self.states_path.stat().st_size
        return self.bytes_needed(documents) + reserved_bytes + SPARE_BYTES <= free

    @torch.no_grad()
    def fill(
        self, documents: Iterable[Sequence[int]], batch_size: int = 32, hide_progress: bool = False
    ) -> "FrozenLayersCache":
        """
        Compute and store the states of the documents (lists of token ids) that are not stored yet. Call it in one process only; the others
        call `load` afterward.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        self._drop_states_of_other_weights()
        self.load()
        missing = {self.key(ids): ids for ids in documents}
        missing = {key: ids for key, ids in missing.items() if key not in self._rows and len(ids)}
        order = sorted(missing.items(), key=lambda pair: len(pair[1]))
        end = sum(length for _, length in self._rows.values())
        training = self.backbone.training
        self.backbone.eval()
        bar = tqdm(total=len(order), desc="Frozen layers", disable=hide_progress or not order, leave=False)
        try:
            with open(self.states_path, "ab") as states, open(self.index_path, "ab") as index, bar:
                states.truncate(end * self.hidden_size * self.dtype.itemsize)
                for at in range(0, len(order), batch_size):
                    batch = order[at : at + batch_size]
                    entries: np.ndarray = np.zeros(len(batch), INDEX_ENTRY)
                    for row, ((key, ids), found) in enumerate(zip(batch, self._compute([ids for _, ids in batch]))):
                        states.write(found.astype(self.dtype).tobytes())
                        entries[row] = (np.void(key), end, len(ids))
                        end += len(ids)
                    states.flush()
                    index.write(entries.tobytes())  # after the states, so that every entry has its states
                    index.flush()
                    bar.update(len(batch))
        finally:
            self.backbone.train(training)
        return self.load()

    def _compute(self, documents: list[Sequence[int]]) -> Iterator[np.ndarray]:
        device = next(self.backbone.parameters()).device
        length = max(map(len, documents))
        input_ids = torch.full((len(documents), length), self.backbone.config.pad_token_id or 0)
        mask = torch.zeros_like(input_ids)
        for row, ids in enumerate(documents):
            input_ids[row, : len(ids)], mask[row, : len(ids)] = torch.as_tensor(ids), 1
        seen: list[torch.Tensor] = []

        def stop(module: nn.Module, arguments: tuple, output: Any) -> None:
            seen.append(output[0] if isinstance(output, tuple) else output)
            self._describe(len(output) if isinstance(output, tuple) else 0)
            raise _Reached

        handle = self.layers[self.num_layers - 1].register_forward_hook(stop)
        try:
            with contextlib.suppress(_Reached), possible_autocast(self.backbone):
                self.backbone(input_ids=input_ids.to(device), attention_mask=mask.to(device))
        finally:
            handle.remove()
        for row, ids in enumerate(documents):
            yield seen[0][row, : len(ids)].float().cpu().numpy()

    def _weights(self) -> str:
        """A digest of everything that the stored states depend on."""
        digest = hashlib.blake2b(f"{self.num_layers} {self.dtype.name}".encode(), digest_size=KEY_SIZE)
        above = {id(parameter) for layer in self.layers[self.num_layers :] for parameter in layer.parameters()}
        for name, parameter in self.backbone.named_parameters():
            if id(parameter) not in above:
                digest.update(name.encode())
                digest.update(parameter.detach().float().cpu().numpy().tobytes())
        return digest.hexdigest()

    def _description(self) -> dict[str, Any]:
        try:
            return json.loads((self.folder / "cache.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}

    def _describe(self, tuple_size: int) -> None:
        description = {"weights": self._weights_digest, "tuple_size": tuple_size}
        if description != self._description():
            (self.folder / "cache.json").write_text(json.dumps(description), encoding="utf-8")

    def _drop_states_of_other_weights(self) -> None:
        self._weights_digest = self._weights()
        if self._description().get("weights") != self._weights_digest:
            for stale in (self.states_path, self.index_path):
                stale.unlink(missing_ok=True)

    # ---- Reading ----

    @staticmethod
    def key(token_ids: Sequence[int] | np.ndarray) -> bytes:
        return hashlib.blake2b(np.asarray(token_ids, dtype=np.int32).tobytes(), digest_size=KEY_SIZE).digest()

    def __len__(self) -> int:
        return len(self._rows)

    def load(self) -> "FrozenLayersCache":
        """Read the index of stored documents that another process wrote."""
        content = self.index_path.read_bytes() if self.index_path.exists() else b""
        entries = np.frombuffer(content[: len(content) // INDEX_ENTRY.itemsize * INDEX_ENTRY.itemsize], INDEX_ENTRY)
        self._rows = {bytes(entry["key"]): (int(entry["start"]), int(entry["length"])) for entry in entries}
        self._tuple_size = self._description().get("tuple_size", 0)
        return self

    @contextlib.contextmanager
    def attached(self) -> Iterator[None]:
        """Within this context, the encoder reads the states of stored documents instead of computing them."""
        handle = self.backbone.register_forward_pre_hook(self._remember_batch, with_kwargs=True)
        frozen = self.layers[: self.num_layers]
        # `forward` is replaced on the instances, so that modules and weights stay where saving and DDP look for them.
        for position, layer in enumerate(frozen):
            layer.forward = self._reader(layer, layer.forward, last=position == len(frozen) - 1)
        self._embeddings.forward = self._skipped(self._embeddings.forward)
        try:
            yield
        finally:
            handle.remove()
            for module in (*frozen, self._embeddings):
                del module.forward

    def _remember_batch(self, module: nn.Module, arguments: tuple, kwargs: dict[str, Any]) -> None:
        self._stored = None
        input_ids, mask = kwargs.get("input_ids"), kwargs.get("attention_mask")
        wanted = kwargs.get("output_hidden_states") or kwargs.get("output_attentions")
        if not self._rows or input_ids is None or mask is None or mask.dim() != 2 or wanted:
            return
        token_types = kwargs.get("token_type_ids")
        if token_types is not None and token_types.any():
            return
        ids, attended = input_ids.cpu().numpy(), mask.bool().cpu().numpy()
        keys = [self.key(row[kept]) for row, kept in zip(ids, attended)]
        if any(key not in self._rows for key in keys):
            return
        states = np.zeros((*ids.shape, self.hidden_size), self.dtype)
        # Read instead of memory-mapped, because the pages of a mapping count toward the memory of the process.
        with self.states_path.open("rb", buffering=0) as file:
            for position, key in enumerate(keys):
                start, length = self._rows[key]
                file.seek(start * self.hidden_size * self.dtype.itemsize)
                values = np.fromfile(file, self.dtype, length * self.hidden_size)
                states[position, attended[position]] = values.reshape(length, self.hidden_size)
        self._stored = torch.from_numpy(states).to(input_ids.device, torch.float32)

    def _reader(self, layer: nn.Module, forward: Any, last: bool) -> Any:
        def read(*args: Any, **kwargs: Any) -> Any:
            states = args[0] if args else kwargs["hidden_states"]
            if self._stored is None or self._stored.shape != states.shape:
                # Frozen layers run without dropout, whether or not their states are stored.
                training = layer.training
                layer.eval()
                try:
                    with torch.no_grad():
                        return forward(*args, **kwargs)
                finally:
                    layer.train(training)
            states = self._stored.to(states.dtype) if last else states
            return (states, *[None] * (self._tuple_size - 1)) if self._tuple_size else states

        return read

    def _skipped(self, forward: Any) -> Any:
        """Zeros in place of embeddings, because frozen layers are skipped; the shape is known from the first batch."""
        like: list[torch.Tensor] = []

        def skip(*args: Any, **kwargs: Any) -> Any:
            ids = kwargs["input_ids"] if "input_ids" in kwargs else args[0] if args else None
            # If an encoder changes the padding itself, the layers are computed.
            if self._stored is None or not like or ids is None or ids.shape != self._stored.shape[:2]:
                found = forward(*args, **kwargs)
                like[:] = [found.new_empty(0, found.shape[-1])] if isinstance(found, torch.Tensor) else []
                return found
            return like[0].new_zeros(*ids.shape, like[0].shape[-1])

        return skip

    def delete(self) -> None:
        """Remove the files of the cache."""
        self._rows = {}
        shutil.rmtree(self.folder, ignore_errors=True)


def _embeddings(backbone: nn.Module, first_layer: nn.Module) -> nn.Module:
    """The module that computes the input of the layers: the largest one that contains the word embeddings but no layer."""
    words = backbone.get_input_embeddings()
    (path,) = (name for name, module in backbone.named_modules() if module is words)
    parts = path.split(".")
    around = [backbone.get_submodule(".".join(parts[:end])) for end in range(1, len(parts) + 1)]
    return next(module for module in around if all(inner is not first_layer for inner in module.modules()))


class _Reached(Exception):
    """Raised when the forward pass has reached the last frozen layer."""


@torch.no_grad()
def can_store_states(backbone: nn.Module) -> bool:
    """
    Whether an encoder gives the same result if the states of its frozen layers are read instead of computed. Not true for T5, whose first
    layer computes the position biases of all layers, and for XLNet, whose states have a different order of dimensions.
    """
    documents = (torch.arange(16).view(2, 8) % backbone.config.vocab_size).to(next(backbone.parameters()).device)
    inputs = {"input_ids": documents, "attention_mask": torch.ones_like(documents)}
    training = backbone.training
    backbone.eval()
    try:
        expected = backbone(**inputs)[0]
        with tempfile.TemporaryDirectory() as folder:
            cache = FrozenLayersCache(folder, backbone).fill(documents.tolist(), hide_progress=True)
            with cache.attached():
                found = backbone(**inputs)[0]
            cache.delete()
    except ValueError:  # the states do not have the shape of the documents
        return False
    finally:
        backbone.train(training)
    return bool((found - expected).abs().max() <= PRECISION * expected.abs().max())


def caches_states(args: Any) -> bool:
    """
    Whether to cache the states of frozen layers, according to [`SepMldcTrainingArguments`]: `cache_frozen_layers` if it is set, else if
    documents are read repeatedly. Never with `torch_compile`, which cannot read them.
    """
    if args.cache_frozen_layers is False or args.torch_compile:
        return False
    return bool(args.cache_frozen_layers) or args.num_train_epochs > 1 or args.max_steps > 0


@contextlib.contextmanager
def cached_frozen_layers(
    backbone: nn.Module,
    datasets: Iterable[Any],
    args: Any,
    max_length: int | None = None,
    reserved_bytes: int = 0,
) -> Iterator[FrozenLayersCache | None]:
    """
    Within this context, training reads the states of frozen layers from a cache in the output folder, if `args.cache_frozen_layers`
    allows it and it saves time. The cache is deleted at the end of training. After a kill or an error, it is kept for the resumed run.

    Args:
        backbone (`torch.nn.Module`): the encoder.
        datasets (iterable of `Dataset`): tokenized documents that are read repeatedly. Those without a column `input_ids` are skipped.
        args ([`SepMldcTrainingArguments`]): `cache_frozen_layers`, output folder, precision, number of epochs.
        max_length (`int`, *optional*): the number of tokens that the encoder reads of each document.
        reserved_bytes (`int`, defaults to 0): disk space to leave for checkpoints and the model.

    Raises:
        ValueError: `args.cache_frozen_layers=True`, but the disk has no room for the states, or the upper layers need more than these states.
    """
    if not caches_states(args) or not num_frozen_layers(backbone):
        yield None
        return
    if not can_store_states(backbone):
        kind = backbone.config.model_type
        if args.cache_frozen_layers:
            raise ValueError(
                f"The states of frozen layers of {kind!r} cannot be stored: its upper layers need more than these states. Leave out "
                "`cache_frozen_layers`."
            )
        logger.warning(f"The states of frozen layers of {kind!r} cannot be stored: they are computed in each step.")
        yield None
        return
    documents = [
        ids[:max_length]
        for dataset in datasets
        if hasattr(dataset, "__len__") and "input_ids" in (getattr(dataset, "column_names", None) or ())
        for ids in dataset["input_ids"]
    ]
    dtype = "float16" if args.bf16 or args.fp16 else "float32"
    cache = FrozenLayersCache(Path(args.output_dir, FOLDER), backbone, dtype=dtype)
    size = f"{cache.bytes_needed(documents) / 2**30:.1f} GiB"
    if not cache.has_space_for(documents, reserved_bytes):
        if args.cache_frozen_layers:
            raise ValueError(
                f"The states of the frozen layers need {size} in {args.output_dir!r}, but the disk does not have that much space left. Free "
                "some, specify another `output_dir`, or set `cache_frozen_layers=False`."
            )
        logger.warning(
            f"The states of the frozen layers need {size} of disk space, which is not available: they are not cached."
        )
        yield None
        return
    logger.info(f"The states of {cache.num_layers} frozen layers are computed once and take {size} of disk space.")
    with args.main_process_first(local=True, desc="frozen layers"):
        if args.local_process_index == 0:
            # In the precision of training: with bfloat16 on a CPU, this takes less than half the time.
            half = torch.bfloat16 if args.bf16 else torch.float16
            with torch.autocast(args.device.type, half, enabled=args.bf16 or args.fp16):
                cache.fill(documents, args.eval_batch_size, hide_progress=args.disable_tqdm)
    with cache.load().attached():
        yield cache
    if args.local_process_index == 0:
        cache.delete()
