"""Prices, cost estimates and spending limits."""

import json
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .checks import check_number
from .errors import AugmentationError
from .journal import Journal
from .request import Request
from .settings import RequestSettings
from .tokens import approximate_tokens


PRICES = Path(__file__).with_name("prices.json")
FRAME_TOKENS = 64  # maximum number of tokens that a chat template and the JSON schema add to a prompt


@dataclass(frozen=True)
class Price:
    """Price of a model, in `currency` per million tokens; `batch_factor` is the Batch API's fraction of the price."""

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
        AugmentationError: if the user's file is malformed, or has a price that is negative or not a number.
    """

    def __init__(self, path: str | Path | None = None) -> None:
        self._table = json.loads(PRICES.read_text(encoding="utf-8"))
        if path is None:
            return
        try:
            own = json.loads(Path(path).read_text(encoding="utf-8"))
            _check_prices(own)
        except OSError as error:
            raise AugmentationError(
                f"the price file {path} cannot be read ({error.strerror}); check the path."
            ) from None
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError, AugmentationError) as error:
            raise AugmentationError(
                f"the price file {path} is malformed ({type(error).__name__}: {error}); write "
                '{"models": {"name": {"input": 1.0, "output": 2.0}}}, in units of currency per million tokens.'
            ) from None
        # a list has a single currency, so the package's dollars must not be mixed with the user's currency
        same = own.get("currency", self._table["currency"]) == self._table["currency"]
        models = {**(self._table["models"] if same else {}), **own["models"]}
        self._table = {**self._table, **own, "models": models}

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
        """The cost of a journal entry, from the provider's token counts; None if the price is unknown."""
        price = self.get(entry.get("requested_model"), entry.get("model"))
        if price is None:
            return None
        usage = entry["usage"]
        return price.cost(usage["prompt_tokens"], usage["completion_tokens"], entry["batch"])


def _check_prices(own: Any) -> None:
    for price in own["models"].values():
        for name in ("input", "output"):
            check_number(name, price[name])
    check_number("batch_factor", own.get("batch_factor", 0.5), maximum=1)
    if not isinstance(own.get("currency", ""), str):
        raise ValueError("`currency` must be a string")


class Budget:
    """
    Tracks spending, and enforces `max_cost` and `max_requests`.

    Args:
        settings (`RequestSettings`): Contains the limits.
        journal (`Journal`): Every answer in it counts as paid for, and so does every answer that may have been paid for and lost.

    Raises:
        AugmentationError: if `max_cost` is given for a model without a price.
    """

    def __init__(self, settings: RequestSettings, journal: Journal) -> None:
        self.settings = settings
        self.prices = PriceList(settings.prices)
        self.price = self.prices.get(settings.model)
        self.notes: list[str] = []
        self.sent = 0
        self.spent = 0.0
        self._reserved = 0.0
        self._before = self._paid_before(journal) if settings.max_cost is not None else 0.0

    def _paid_before(self, journal: Journal) -> float:
        if self.price is None:
            raise AugmentationError(
                f"the price of {self.settings.model!r} is unknown, so `max_cost` cannot be kept; specify it in a file given with "
                "`prices`, or use `max_requests`."
            )
        total, unknown = 0.0, set()
        for entry in journal.entries():
            cost = self.prices.cost_of(entry)
            if cost is None:
                unknown.add(entry["requested_model"])
            total += cost or 0.0
        if unknown:
            self.notes.append(
                f"`max_cost` does not count earlier answers of {', '.join(sorted(unknown)[:5])}, whose prices are unknown."
            )
        for note in journal.notes:
            price = self.prices.get(note["model"]) if note["note"] == "lost_answer" else None
            if price is not None:
                total += price.cost(note["prompt_tokens"], note["completion_tokens"])
        return total

    def highest_cost(self, request: Request, batch: bool = False) -> float:
        """The cost of a request with the longest possible answer; 0 if the price is unknown."""
        if self.price is None:
            return 0.0
        return self.price.cost(most_prompt_tokens(request), most_completion_tokens(request), batch)

    def exceeds(self, cost: float) -> bool:
        """Whether `max_cost` could be exceeded by this cost, on top of what is spent and reserved."""
        limit = self.settings.max_cost
        return limit is not None and self._before + self.spent + self._reserved + cost > limit

    def refusal(self, cost: float) -> str | None:
        """Why a request of this cost must not be sent, or None."""
        if self.exceeds(cost):
            return f"the next request could exceed the limit of {self.settings.max_cost:g} {self.prices.currency} (`max_cost`)"
        if self.settings.max_requests is not None and self.sent >= self.settings.max_requests:
            return f"the limit of {self.settings.max_requests} requests is reached (`max_requests`)"
        return None

    def reserve(self, cost: float, requests: int = 1) -> None:
        """Reserves the cost of a request that is about to be sent (`requests=0` for one sent by an earlier run)."""
        self._reserved += cost
        self.sent += requests

    def release(self, cost: float) -> None:
        """Releases the reserved cost of a request that is no longer in progress."""
        self._reserved -= cost

    def pay(self, entry: dict[str, Any]) -> None:
        """Counts an answer."""
        if self.price is not None:
            usage = entry["usage"]
            self.spent += self.price.cost(usage["prompt_tokens"], usage["completion_tokens"], entry["batch"])

    def lose(self, request: Request) -> dict[str, Any]:
        """Counts an answer that may have been paid for but did not arrive, at its maximum cost; returns a note for the journal."""
        self.spent += self.highest_cost(request)
        return {
            "note": "lost_answer",
            "model": request.model,
            "prompt_tokens": most_prompt_tokens(request),
            "completion_tokens": most_completion_tokens(request),
        }


def prompt_tokens(request: Request, count: Callable[[str], int] = approximate_tokens) -> int:
    """Estimated number of tokens of the messages, including 4 tokens of overhead per message."""
    return sum(4 + count(message["content"]) for message in request.messages) + 3


def most_prompt_tokens(request: Request) -> int:
    """An upper bound on the number of prompt tokens: no tokenizer makes more than one token per byte."""
    return FRAME_TOKENS + prompt_tokens(request, lambda text: len(text.encode("utf-8", "backslashreplace")))


def most_completion_tokens(request: Request) -> int:
    """The maximum number of answer tokens."""
    return request.parameters.get("max_tokens") or request.expected_tokens


def token_counter(model: str, seconds: float = 5.0) -> tuple[Callable[[str], int], str]:
    """
    A function that counts tokens for estimates, and its name.

    `tiktoken`, if it is installed and has its encoding in its cache or can download it within `seconds`; otherwise `approximate_tokens`.
    Never used for the content of a prompt, because journal keys must not depend on the machine.
    """
    found: list[Callable[[str], int]] = []

    def load() -> None:
        try:
            import tiktoken

            try:
                encoding = tiktoken.encoding_for_model(model)
            except KeyError:
                encoding = tiktoken.get_encoding("o200k_base")
            found.append(lambda text: len(encoding.encode(text, disallowed_special=())))
        except Exception:  # not installed, no network, a damaged cache: an estimate is still possible
            pass

    thread = threading.Thread(target=load, daemon=True)
    thread.start()
    thread.join(seconds)
    return (found[0], "tiktoken") if found else (approximate_tokens, "approximation")
