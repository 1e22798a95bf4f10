"""Run long work beside a notebook while its widgets keep moving.

The work goes to a thread and only changes plain Python state. What people see is updated from the kernel's own event
loop, because Colab does not show updates that come from another thread. Outside a kernel there is nobody to freeze, so
there a plain thread does the updates.
"""

import asyncio
import logging
import sys
import threading
from collections.abc import Callable

INTERVAL_SECONDS = 0.1

_log = logging.getLogger(__name__)


def start(work: Callable[[], None], refresh: Callable[[], None]) -> threading.Event:
    """Start `work` in a thread, call `refresh` about ten times a second until it is over, then once more.

    Args:
        work: The long job; keeps its own errors.
        refresh: Shows the state that `work` changes; quick, and safe to call at any time. What it raises is logged
            once and the next call is made all the same: a panel that stood still would seem to work for ever.

    Returns:
        An event that is set when `work` is over (the last `refresh` may still be to come).
    """
    done, refresh = threading.Event(), _lasting(refresh)

    def run() -> None:
        try:
            work()
        finally:
            done.set()

    threading.Thread(target=run, daemon=True).start()
    loop = kernel_loop()
    if loop is None:
        threading.Thread(target=refresh_until, args=(done, refresh), daemon=True).start()
    else:
        asyncio.run_coroutine_threadsafe(_refresh_on_loop(done, refresh), loop)
    return done


def refresh_until(done: threading.Event, refresh: Callable[[], None]) -> None:
    """Call `refresh` from this thread until `done` is set, then once more."""
    while not done.wait(INTERVAL_SECONDS):
        refresh()
    refresh()


def wait(done: threading.Event, refresh: Callable[[], None], cancel: Callable[[], None]) -> None:
    """Block a cell until the work is over, refreshing meanwhile; Ctrl-C cancels it first and goes on when it ended."""
    try:
        refresh_until(done, refresh)
    except KeyboardInterrupt:
        cancel()
        done.wait()
        refresh()
        raise


def kernel_loop() -> asyncio.AbstractEventLoop | None:
    """Event loop of the notebook kernel that runs this code, or None outside of one."""
    ipython = sys.modules.get("IPython")
    kernel = getattr(ipython and ipython.get_ipython(), "kernel", None)
    loop = getattr(getattr(kernel, "io_loop", None), "asyncio_loop", None)
    return loop if loop is not None and loop.is_running() else None


async def _refresh_on_loop(done: threading.Event, refresh: Callable[[], None]) -> None:
    while not done.is_set():
        refresh()
        await asyncio.sleep(INTERVAL_SECONDS)
    refresh()


def _lasting(refresh: Callable[[], None]) -> Callable[[], None]:
    """Return `refresh` as a call that outlives its errors; the first of them is logged."""
    has_failed = False

    def attempt() -> None:
        nonlocal has_failed
        try:
            refresh()
        except Exception:
            if not has_failed:
                _log.exception("A panel could not be redrawn; the work behind it goes on.")
            has_failed = True

    return attempt
