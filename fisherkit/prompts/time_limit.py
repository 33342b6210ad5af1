"""A limit on the time that foreign code may take, such as the loops of a chat template.

Works on any thread and any system, since it needs no signal: the code runs on a thread of its own, into which CPython
raises an exception when the time is up. That reaches all Python code between two of its instructions; a single call
into C is waited for no longer, but goes on until it returns.
"""

import contextvars
import ctypes
import threading
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class _TimeIsUp(BaseException):
    """Raised inside the code that ran too long; no ``except Exception`` of its holds it."""


def within(seconds: float, call: Callable[[], T]) -> T:
    """Return what ``call`` returns, or raise what it raises.

    Args:
        seconds: the time that it may take.
        call: anything that needs no particular thread.

    Raises:
        TimeoutError: it took longer; it has been stopped.
    """
    run = _Run(call)
    thread = threading.Thread(target=contextvars.copy_context().run, args=(run,), daemon=True)
    thread.start()
    try:
        if not run.done.wait(seconds):
            raise TimeoutError(f"stopped after {seconds:g} s")
    finally:
        if not run.done.is_set():  # out of time, or the caller was interrupted
            _raise_in(thread, _TimeIsUp)
    return run.result()


class _Run(Generic[T]):
    """A call with what came of it."""

    def __init__(self, call: Callable[[], T]) -> None:
        self._call = call
        self._results: list[T] = []
        self._error: BaseException | None = None
        self.done = threading.Event()

    def __call__(self) -> None:
        try:
            self._results.append(self._call())
        except BaseException as error:  # carried over to the thread that waits
            self._error = error
        finally:
            self.done.set()

    def result(self) -> T:
        """Return the value, or raise the error, of a call that is done."""
        if self._error is not None:
            raise self._error
        return self._results[0]


def _raise_in(thread: threading.Thread, error: type[BaseException]) -> None:
    if thread.ident is not None:
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident), ctypes.py_object(error))
