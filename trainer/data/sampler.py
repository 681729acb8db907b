"""The order in which training documents are used."""

from collections import defaultdict
from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import Sampler


# Documents are sorted by length within pools of this number of global batches: little padding, and still a random order.
POOL_BATCHES = 64


class DocumentSampler(Sampler[int]):
    """
    A permutation of the documents that is a pure function of (seed, epoch, global batch size).

    It does not depend on the number of processes, the state of a random generator or the position at which an interrupted epoch
    continues, so a resumed run and a run on more processes see the same batches.

    Args:
        num_documents (`int`): N.
        batch_size (`int`): documents per (micro-)step over all processes.
        lengths (`Sequence[int]`, *optional*): number of tokens per document. If given, batches contain documents of similar length,
            and the batch with the longest document of the epoch comes first, so that out-of-memory errors occur immediately.
        label_sets (`Sequence[Sequence[int]]`, *optional*): label ids per document. If given, documents with identical
            label sets are paired at random, and a pair shares a batch (so that Eq. 14 has positives).
        seed (`int`): `data_seed`.
    """

    def __init__(
        self,
        num_documents: int,
        batch_size: int,
        lengths: Sequence[int] | None = None,
        label_sets: Sequence[Sequence[int]] | None = None,
        seed: int = 0,
    ):
        for name, column in (("lengths", lengths), ("label_sets", label_sets)):
            if column is not None and len(column) != num_documents:
                raise ValueError(
                    f"`{name}` has {len(column)} entries for {num_documents} documents. Pass one per document."
                )
        if batch_size < 1:
            raise ValueError(
                f"`batch_size` is {batch_size}, but a batch has at least 1 document. Use 16, for example."
            )
        self.num_documents, self.batch_size, self.seed, self.epoch = num_documents, batch_size, seed, 0
        self.lengths = None if lengths is None else list(lengths)
        self.twins = None if label_sets is None else self._group_by_label_set(label_sets)

    @staticmethod
    def _group_by_label_set(label_sets: Sequence[Sequence[int]]) -> list[list[int]]:
        groups = defaultdict(list)
        for document, labels in enumerate(label_sets):
            if len(labels):
                groups[tuple(sorted(labels))].append(document)
        return [documents for documents in groups.values() if len(documents) > 1]

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.num_documents

    def __iter__(self) -> Iterator[int]:
        return iter(self.order(self.epoch))

    def order(self, epoch: int) -> list[int]:
        """The permutation of 0 .. N - 1 of an epoch."""
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + epoch) % 2**63)
        shuffled = torch.randperm(self.num_documents, generator=generator).tolist()
        units = self._units(shuffled, generator)
        lengths = self.lengths
        if lengths is None:
            return [document for batch in self._cut(units) for document in batch]

        pool_size = POOL_BATCHES * self.batch_size
        batches: list[list[int]] = []
        pool: list[list[int]] = []
        filled = 0
        for position, unit in enumerate(units):
            pool.append(unit)
            filled += len(unit)
            if filled >= pool_size or position == len(units) - 1:
                pool.sort(key=lambda unit: -max(lengths[document] for document in unit))
                batches.extend(self._cut(pool))
                # An incomplete batch would shift all later batches, so its documents are moved to the next pool.
                incomplete = batches.pop() if len(batches[-1]) < self.batch_size else []
                pool, filled = [[document] for document in incomplete], len(incomplete)
        return self._arrange(batches, [document for unit in pool for document in unit], lengths, generator)

    def _units(self, shuffled: list[int], generator: torch.Generator) -> list[list[int]]:
        """Single documents and pairs that stay together, in random order."""
        if self.twins is None:
            return [[document] for document in shuffled]
        partner: dict[int, int] = {}
        for documents in self.twins:
            mixed = [documents[index] for index in torch.randperm(len(documents), generator=generator).tolist()]
            lengths = self.lengths
            if lengths is not None:
                # Pairs of similar length need little padding; the shuffle above breaks ties at random.
                mixed.sort(key=lengths.__getitem__)
            start = int(torch.randint(2, (1,), generator=generator)) if len(mixed) > 2 else 0
            for first, second in zip(mixed[start::2], mixed[start + 1 :: 2]):
                partner[first], partner[second] = second, first
        units, seen = [], set()
        for document in shuffled:
            if document not in seen:
                unit = [document, partner[document]] if document in partner else [document]
                seen.update(unit)
                units.append(unit)
        return units

    def _cut(self, units: list[list[int]]) -> list[list[int]]:
        """Batches of exactly `batch_size` documents, except the last. A pair is split only if no nearby single document fills the gap."""
        units = list(units)
        batches: list[list[int]] = []
        batch: list[int] = []
        for position in range(len(units)):
            if len(batch) + len(units[position]) > self.batch_size:
                near = range(position + 1, min(position + 2 * self.batch_size, len(units)))
                single = next((index for index in near if len(units[index]) == 1), None)
                if single is not None:
                    units.insert(position, units.pop(single))
            batch.extend(units[position])
            if len(batch) >= self.batch_size:
                batches.append(batch[: self.batch_size])
                batch = batch[self.batch_size :]
        return [*batches, batch] if batch else batches

    def _arrange(
        self, batches: list[list[int]], rest: list[int], lengths: list[int], generator: torch.Generator
    ) -> list[int]:
        """The batches in random order, but the one with the longest document first; and the remaining documents."""
        order = torch.randperm(len(batches), generator=generator).tolist()
        if order:
            longest = max(order, key=lambda index: max(lengths[document] for document in batches[index]))
            order.remove(longest)
            order.insert(0, longest)
        return [document for index in order for document in batches[index]] + rest
