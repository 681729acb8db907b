"""Exceptions, by how the program reacts to them."""


class AugmentationError(Exception):
    """A problem that the user can solve; its message is one sentence with the value, the rule and the remedy."""


class FatalError(AugmentationError):
    """Every further request would fail in the same way."""


class ItemError(Exception):
    """This request failed permanently; others may succeed."""


class TryAgain(Exception):
    """
    This attempt failed, another may succeed.

    Args:
        reason (`str`): For the message, if all attempts fail.
        retry_after (`float`, *optional*): Seconds that the endpoint asks to wait.
        maybe_paid (`bool`): Whether the endpoint may have processed, and charged for, the request.
        reached (`bool`): Whether the endpoint responded at all.
    """

    def __init__(
        self, reason: str, retry_after: float | None = None, maybe_paid: bool = False, reached: bool = True
    ) -> None:
        super().__init__(reason)
        self.retry_after = retry_after
        self.maybe_paid = maybe_paid
        self.reached = reached


class Adapted(TryAgain):
    """The endpoint refused a part of the request, which is omitted from now on. The next attempt can be made immediately."""


class NotFound(FatalError):
    """The endpoint does not know the address or the requested object."""
