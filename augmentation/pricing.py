"""Prices and estimates: what a request will cost, and what it has cost."""

import json
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .files import AugmentationError
from .journal import Request
from .prompts import approximate_tokens


PRICES = Path(__file__).with_name("prices.json")


@dataclass(frozen=True)
class Price:
    """Price of a model, in `currency` for a million tokens; `batch_factor` is what the Batch API takes of it."""

    input: float
    output: float
    currency: str = "USD"
    batch_factor: float = 0.5

    def cost(self, prompt_tokens: int, completion_tokens: int, batch: bool = False) -> float:
        """Cost of one answer in `currency`."""
        cost = (prompt_tokens * self.input + completion_tokens * self.output) / 1e6
        return cost * self.batch_factor if batch else cost


class PriceList:
    """
    Prices of the package's `prices.json`, overridden by those of the user's file of the same form.

    Raises:
        AugmentationError: if the user's file has another form.
    """

    def __init__(self, path: str | Path | None = None) -> None:
        self._table = json.loads(PRICES.read_text(encoding="utf-8"))
        if path is None:
            return
        try:
            own = json.loads(Path(path).read_text(encoding="utf-8"))
            models = own["models"]
            for price in models.values():
                if min(float(price["input"]), float(price["output"])) < 0:
                    raise ValueError("a negative price")
        except OSError as error:
            raise AugmentationError(
                f"the price file {path} cannot be read ({error.strerror}); check the path."
            ) from None
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise AugmentationError(
                f"the price file {path} is not of the needed form ({type(error).__name__}: {error}); write "
                '{"models": {"name": {"input": 1.0, "output": 2.0}}}, in units of currency for a million tokens.'
            ) from None
        # one list has one currency: the package's dollars must not be mixed with the user's own
        same = own.get("currency", self._table["currency"]) == self._table["currency"]
        self._table = {**self._table, **own, "models": {**(self._table["models"] if same else {}), **models}}

    @property
    def currency(self) -> str:
        return self._table["currency"]

    def get(self, *names: str | None) -> Price | None:
        """The price of the first of the names that is known; a dated snapshot (`gpt-4o-2024-08-06`) costs what its model costs."""
        for name in filter(None, names):
            for candidate in (name, re.sub(r"-\d{4}-\d\d-\d\d$", "", name)):
                if candidate in self._table["models"]:
                    price = self._table["models"][candidate]
                    return Price(
                        float(price["input"]), float(price["output"]), self.currency, self._table["batch_factor"]
                    )
        return None

    def cost_of(self, entry: dict[str, Any]) -> float | None:
        """What a journal entry has cost, from the provider's token counts; None where the price is unknown."""
        price = self.get(entry.get("model"), entry.get("requested_model"))
        usage = entry.get("usage") or {}
        if price is None:
            return None
        return price.cost(usage.get("prompt_tokens", 0), usage.get("completion_tokens", 0), entry.get("batch", False))


def token_counter(model: str, seconds: float = 5.0) -> tuple[Callable[[str], int], str]:
    """
    A function that counts tokens for estimates, and its name.

    `tiktoken` where it is installed and has its tables at hand or can fetch them within `seconds`; otherwise
    `approximate_tokens`. Never used for what goes into a prompt: journal keys must not depend on the machine.
    """
    found = []

    def load() -> None:
        try:
            import tiktoken

            try:
                encoding = tiktoken.encoding_for_model(model)
            except KeyError:
                encoding = tiktoken.get_encoding("o200k_base")
            found.append(lambda text: len(encoding.encode(text, disallowed_special=())))
        except Exception:  # not installed, no network, a damaged cache: an estimate is all the same possible
            pass

    thread = threading.Thread(target=load, daemon=True)
    thread.start()
    thread.join(seconds)
    return (found[0], "tiktoken") if found else (approximate_tokens, "approximation")


def prompt_tokens(request: Request, count: Callable[[str], int] = approximate_tokens) -> int:
    """Estimated tokens of the messages, with 4 for the frame of each."""
    return sum(4 + count(message["content"]) for message in request.messages) + 3
