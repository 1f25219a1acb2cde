"""Run a module's own forward code while at most a budget of its weights is in memory. Needs PyTorch."""

from typing import TYPE_CHECKING, Any

from offramp.errors import MissingExtraError

if TYPE_CHECKING:
    from offramp.streaming.streamed import stream as stream

__all__ = ["stream"]


def __getattr__(name: str) -> Any:
    """Import the verb on first access (PEP 562). Raises MissingExtraError without PyTorch."""
    if name != "stream":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        from offramp.streaming.streamed import stream
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        raise MissingExtraError("torch", "torch") from None
    return stream
