"""A request to the model, and the key of its answer."""

import dataclasses
import hashlib
import json
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any


@dataclass(frozen=True)
class Request:
    """
    A request to the model.

    Args:
        messages (`list[dict[str, str]]`): Chat messages, `{"role", "content"}`.
        model (`str`): Name that the endpoint knows.
        parameters (`dict`): Sampling parameters, such as `temperature` and `max_tokens`.
        field (`str`): Name of the JSON field that contains the text of the answer.
        variation (`int`): Distinguishes equal prompts.
        expected_tokens (`int`): Typical length of an answer, for estimates.
        origin (`dict`): Provenance that does not change the answer (template name and hash); not part of the key.
        old_field (`str`, *optional*): Name of the field in journals of version 0.1, whose answers still count.
    """

    messages: list[dict[str, str]]
    model: str
    parameters: dict[str, Any]
    field: str
    variation: int = 0
    expected_tokens: int = 64
    origin: dict[str, Any] = dataclasses.field(default_factory=dict)
    old_field: str | None = None

    @cached_property
    def key(self) -> str:
        """SHA-256 of prompt, model, parameters, field and variation, in hexadecimal."""
        return self._digest(self.field)

    @cached_property
    def old_key(self) -> str | None:
        """The key in journals of version 0.1, if it was different."""
        return None if self.old_field is None else self._digest(self.old_field)

    @property
    def keys(self) -> tuple[str, ...]:
        """`key`, and `old_key` if there is one."""
        return (self.key,) if self.old_key is None else (self.key, self.old_key)

    def _digest(self, field_name: str) -> str:
        identity = [self.messages, self.model, self.parameters, field_name, self.variation]
        text = json.dumps(identity, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
        return hashlib.sha256(text.encode("utf-8", "backslashreplace")).hexdigest()

    def again(self, answer: str, complaint: str) -> "Request":
        """The same conversation, extended by the answer and by what is wrong with it."""
        if answer:
            further = [{"role": "assistant", "content": answer}, {"role": "user", "content": complaint}]
            return replace(self, messages=[*self.messages, *further])
        # two user turns in a row are an error for many chat templates
        last = {"role": "user", "content": f"{self.messages[-1]['content']}\n\n{complaint}"}
        return replace(self, messages=[*self.messages[:-1], last])
