"""Errors a user meets: each says what is wrong, what is allowed, and what to do next."""

from collections.abc import Iterable


class KitError(Exception):
    """Carry a message in three parts, so that a widget can lay them out and a traceback reads as one sentence.

    Args:
        wrong: The value or event that is wrong, with the value in it.
        allowed: What would have been right.
        next_step: What to do now, as a command or a call where there is one.
    """

    def __init__(self, wrong: str, allowed: str, next_step: str):
        super().__init__(wrong, allowed, next_step)
        self.wrong, self.allowed, self.next_step = wrong, allowed, next_step

    def __str__(self) -> str:
        return f"{self.wrong} {self.allowed} {self.next_step}"


class UnknownNameError(KitError, ValueError):
    """A size, format, role or option that the kit does not know."""


class NotPublishedError(KitError, ValueError):
    """A combination of size and format that nobody has published."""


class BrokenCheckpointError(KitError, ValueError):
    """A checkpoint that is truncated, corrupt, incomplete or of another architecture."""


class BrokenFileError(KitError, ValueError):
    """A student's file or a file of a bundle that is damaged, changed or of another version."""


class UnsafeCheckpointError(KitError, ValueError):
    """A checkpoint that could run code when opened (pickle)."""


class NotEnoughMemoryError(KitError, MemoryError):
    """The model does not fit in the memory of this machine."""


class NotEnoughDiskError(KitError, OSError):
    """What is to be downloaded or written does not fit on the disk."""


class ExportError(KitError, OSError):
    """A file that cannot be written, would replace another, or does not come back from the disk as it was written."""


class DownloadError(KitError, OSError):
    """A download that failed: no network, refused, missing file, wrong bytes."""


class CancelledError(KitError, RuntimeError):
    """Somebody pressed Cancel; nothing half-done was left behind."""


class EndpointError(KitError, ConnectionError):
    """A server that is down, refuses the key or answers nonsense."""


class ModelClosedError(KitError, RuntimeError):
    """A model that was closed and is used again."""


class MissingLibraryError(KitError, ImportError):
    """A library that this call needs and that is not installed, or not in a usable version."""


class BadTensorError(KitError, ValueError):
    """A tensor that no format can hold: NaN, infinite, empty, of another dtype, or rows that do not divide."""


class BadSettingError(KitError, ValueError):
    """A setting whose value cannot be used."""


class BadOutputError(KitError, ArithmeticError):
    """A model whose logits are not finite."""


def unknown_name(kind: str, value: object, known: Iterable[str]) -> UnknownNameError:
    """Build the error for a name that is not in `known`, with the nearest name as the suggestion.

    Args:
        kind: What the name stands for, as in "size".
        value: What the user wrote.
        known: Every name that is right, in the order to show them.
    """
    known = list(known)
    import difflib

    lowered, wanted = {name.lower(): name for name in known}, str(value).lower()
    near = [name for name in lowered if wanted and name.startswith(wanted)]
    near = near or difflib.get_close_matches(wanted, lowered, n=1, cutoff=0.3)
    suggestion = lowered[near[0]] if near else known[0]
    return UnknownNameError(
        f"Unknown {kind} {value!r}.", f"Known: {', '.join(known)}.", f"Did you mean {suggestion!r}?"
    )
