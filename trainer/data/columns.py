"""Converts the columns of a record into a document `{"id", "text", "labels"}` or an error. Does not import torch."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from .label_names import normalize_label, split_labels
from .messages import join_names, shorten
from .text_lines import DataFileError


if TYPE_CHECKING:
    from datasets import Features


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
    "FALSE": False,
    "TRUE": True,
}


@dataclass(frozen=True)
class Columns:
    """
    The roles of columns.

    Args:
        text (`tuple[str, ...]`): joined by `text_separator`; empty ones are left out.
        labels (`str` or `tuple[str, ...]`, *optional*): one column of label lists, or (multi-hot) one column per label.
        id (`str`, *optional*): a column "id" is found by [`check`].
        label_delimiter (`str`, *optional*): separates joined label names.
        text_separator (`str`): joins several texts.
    """

    text: tuple[str, ...] = ("text",)
    labels: str | tuple[str, ...] | None = "labels"
    id: str | None = None
    label_delimiter: str | None = None
    text_separator: str = " "

    def check(self, available: Sequence[str], where: str) -> "Columns":
        """
        These columns, with `id` filled in where there is a column of that name.

        Raises:
            DataFileError: if a column is missing.
        """
        for argument, names in (
            ("text_columns", self.text),
            ("label_column", self._label_columns),
            ("id_column", (self.id,) if self.id else ()),
        ):
            missing = [name for name in names if name not in available]
            if missing:
                raise DataFileError(
                    f"{where}: no column {join_names(missing)}. The columns are {join_names(available, 20)}: specify one with "
                    f"`{argument}`."
                )
        return replace(self, id=self.id or ("id" if "id" in available else None))

    @property
    def _label_columns(self) -> tuple[str, ...]:
        return (self.labels,) if isinstance(self.labels, str) else self.labels or ()

    @property
    def used(self) -> list[str]:
        """The columns that are read."""
        return list(dict.fromkeys([*([self.id] if self.id else []), *self.text, *self._label_columns]))

    @property
    def features(self) -> "Features":
        """The types of the columns that [`normalize`] makes."""
        from datasets import Features, Value
        from datasets import List as ListFeature

        features = {"id": Value("string")} if self.id else {}
        features["text"] = Value("string")
        if self.labels is not None:
            features["labels"] = ListFeature(Value("string"))
        return Features(features)

    def normalize(self, record: Mapping[str, Any], where: str) -> dict[str, Any]:
        """
        Convert a record in any supported form to `{"id"?: str, "text": str, "labels"?: list of str}`.

        Raises:
            DataFileError: if the document has no text, or its labels are not what [`split_labels`] reads.
        """
        row: dict[str, Any] = {}
        if self.id:
            value = record.get(self.id)
            row["id"] = None if value is None else self._check_text(str(value), self.id, where)
        row["text"] = self.text_of(record, where)
        if not row["text"]:
            raise DataFileError(
                f"{where}: the document has no text in {join_names(self.text)}. Fill it in or remove the document."
            )
        labels = self.labels_of(record, where)
        return row if labels is None else {**row, "labels": labels}

    def labels_of(self, record: Mapping[str, Any], where: str) -> list[str] | None:
        """
        The label names of a record; None if no column holds labels.

        Raises:
            DataFileError: if they are not what [`split_labels`] reads, or a multi-hot value is neither 0 nor 1.
        """
        if self.labels is None:
            return None
        if isinstance(self.labels, str):
            return split_labels(record.get(self.labels), where, self.labels, self.label_delimiter)
        return [normalize_label(name) for name in self.labels if self._multi_hot(record.get(name), name, where)]

    def text_of(self, record: Mapping[str, Any], where: str) -> str:
        """
        The text of a record, "" if all its columns are empty.

        Raises:
            DataFileError: if a column is not a string.
        """
        parts = []
        for column in self.text:
            value = record.get(column)
            if value is None:
                continue
            if not isinstance(value, str):
                raise DataFileError(f"{where}: `{column}` is {shorten(value)}, but a text is needed. Write a string.")
            if value.strip():
                parts.append(self._check_text(value, column, where))
        return self.text_separator.join(parts)

    @staticmethod
    def _check_text(text: str, column: str, where: str) -> str:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise DataFileError(
                f"{where}: the text contains an unpaired surrogate ({error.object[error.start]!r}) in `{column}`, which is not a "
                "character. Remove it."
            ) from None
        return text

    @staticmethod
    def _multi_hot(value: Any, name: str, where: str) -> bool:
        try:
            return MULTI_HOT[value.strip() if isinstance(value, str) else value]
        except (KeyError, TypeError):
            raise DataFileError(
                f"{where}: label column `{name}` is {shorten(value)}, but 0 or 1 is needed. Correct it."
            ) from None
