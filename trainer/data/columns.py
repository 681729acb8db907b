"""
What the columns of a data set mean: makes a document `{"id", "text", "labels"}` of a record, or says what is wrong
with it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from datasets import Features, Value
from datasets import List as ListFeature

from .document_files import decode_class_labels, join_names, shorten


MULTI_HOT = {
    0: False,
    1: True,
    "0": False,
    "1": True,
    "0.0": False,
    "1.0": True,
    "false": False,
    "true": True,
    "False": False,
    "True": True,
}


@dataclass(frozen=True)
class Columns:
    """Which columns hold what. `labels` is one column of label lists, or (multi-hot) one column for each label."""

    text: tuple[str, ...] = ("text",)
    labels: str | tuple[str, ...] | None = "labels"
    id: str | None = None
    label_delimiter: str | None = None
    text_separator: str = " "

    def check(self, available: Sequence[str], where: str) -> "Columns":
        """
        Raises if a column is not there; returns these columns with `id` filled in where there is a column of that
        name.
        """
        labels = (self.labels,) if isinstance(self.labels, str) else self.labels or ()
        for kind, names in (("text", self.text), ("label", labels), ("id", (self.id,) if self.id else ())):
            missing = [name for name in names if name not in available]
            if missing:
                raise ValueError(
                    f"{where}: no column {join_names(missing)}. The columns are {join_names(available, 20)}: name one "
                    "with "
                    f"`--{kind}_column{'s' if kind == 'text' else ''}`."
                )
        return replace(self, id=self.id or ("id" if "id" in available else None))

    @property
    def features(self) -> Features:
        features = {"id": Value("string")} if self.id else {}
        features["text"] = Value("string")
        if self.labels is not None:
            features["labels"] = ListFeature(Value("string"))
        return Features(features)

    def normalize(self, record: Mapping[str, Any], where: str) -> dict[str, Any]:
        """One record of any form → `{"id"?: str, "text": str, "labels"?: list of str}`."""
        row: dict[str, Any] = {}
        if self.id:
            value = record.get(self.id)
            row["id"] = None if value is None else str(value)
        row["text"] = self._text(record, where)
        if isinstance(self.labels, str):
            row["labels"] = self._labels(record.get(self.labels), where)
        elif self.labels is not None:
            row["labels"] = [name for name in self.labels if self._multi_hot(record.get(name), name, where)]
        return row

    def normalize_batch(
        self, batch: dict[str, list], indices: list[int], names: dict[str, list[str]], where: str
    ) -> dict[str, list]:
        """`normalize` for `Dataset.map`; `names` are those of the ClassLabel columns."""
        rows = []
        for index, values in zip(indices, zip(*batch.values())):
            position = f"{where}, row {index + 1}"
            rows.append(self.normalize(decode_class_labels(dict(zip(batch, values)), names, position), position))
        return {name: [row[name] for row in rows] for name in self.features}

    def _text(self, record: Mapping[str, Any], where: str) -> str:
        parts = []
        for column in self.text:
            value = record.get(column)
            if value is None:
                continue
            if not isinstance(value, str):
                raise ValueError(f"{where}: `{column}` is {shorten(value)}, but a text is needed. Write a string.")
            if value.strip():
                parts.append(value)
        text = self.text_separator.join(parts)
        if not text:
            raise ValueError(
                f"{where}: the document has no text in {join_names(self.text)}. Fill it in or remove the document."
            )
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"{where}: the text holds half a surrogate pair ({error.object[error.start]!r}). Remove it."
            ) from None
        return text

    def _labels(self, value: Any, where: str) -> list[str]:
        if isinstance(value, str) and self.label_delimiter is not None:
            names = [name for name in map(str.strip, value.split(self.label_delimiter)) if name]
        elif isinstance(value, (list, tuple)) and all(isinstance(name, str) and name.strip() for name in value):
            names = [name.strip() for name in value]
        else:
            raise ValueError(
                f'{where}: `{self.labels}` is {shorten(value)}, but a list of label names is needed. Write ["a", "b"] '
                "(or [] for a "
                "document without labels), or name the separator of joined labels with `--label_delimiter`."
            )
        return list(dict.fromkeys(names))

    @staticmethod
    def _multi_hot(value: Any, name: str, where: str) -> bool:
        try:
            return MULTI_HOT[value.strip() if isinstance(value, str) else value]
        except (KeyError, TypeError):
            raise ValueError(
                f"{where}: label column `{name}` is {shorten(value)}, but 0 or 1 is needed. Correct it."
            ) from None
