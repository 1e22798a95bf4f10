"""What transformers says while it loads: its bar becomes a report, and the towers that stay unread go unsaid."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from gemma_qat_kit.progress import Progress, Report


@contextmanager
def quiet() -> Iterator[None]:
    """Keep back transformers' table of unused tensors (the towers, on purpose); missing ones are checked here."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


@contextmanager
def reporting(report: Report | None, weight_bytes: int | None) -> Iterator[None]:
    """Send transformers' own loading bar to `report`, which may stop the load by raising."""
    from transformers.utils import logging

    if report is None:
        yield
        return
    previous = logging.set_tqdm_hook(lambda factory, args, kwargs: _Bar(report, weight_bytes, args, kwargs))
    try:
        yield
    finally:
        logging.set_tqdm_hook(previous)


class _Bar:
    """The part of tqdm that transformers uses while loading; it counts tensors, which are taken as equally large."""

    def __init__(self, report: Report, weight_bytes: int | None, args: tuple, kwargs: dict):
        self._report, self._bytes, self._last, self._done = report, weight_bytes, 0.0, 0
        self._items = args[0] if args else kwargs.get("iterable", ())
        self._total = kwargs.get("total") or (len(self._items) if hasattr(self._items, "__len__") else 0)

    def __iter__(self):
        for item in self._items:
            yield item
            self.update()

    def update(self, count: int = 1) -> None:
        self._done += count
        now = time.monotonic()
        if self._total and (now - self._last > 0.1 or self._done == self._total):
            self._last = now
            total = self._bytes or self._total
            self._report(Progress("loading", total * self._done // self._total, total))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        return None

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *args, **kwargs: None
