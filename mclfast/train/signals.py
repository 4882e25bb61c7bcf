"""Signals that ask a run to end: it saves, says how to go on, and leaves with a status of its own.

They are SIGINT (Ctrl-C), SIGTERM, SIGHUP and SIGUSR1, which schedulers send before they kill.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

_NAMES = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1")


class Interrupted(KeyboardInterrupt):
    """A run has ended early because it was asked to.

    Args:
        number: number of the signal that asked.
    """

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number

    @property
    def status(self) -> int:
        """Exit status: 128 and the number of the signal, as shells count."""
        return 128 + self.number


def status_of(error: KeyboardInterrupt) -> int:
    """The exit status of a command that an interruption has ended; 130 for Ctrl-C."""
    return error.status if isinstance(error, Interrupted) else 128 + signal.SIGINT


def described(error: KeyboardInterrupt) -> str:
    """What has ended a command, for a message."""
    if isinstance(error, Interrupted) and error.number != signal.SIGINT:
        return f"ended by {signal.Signals(error.number).name}"
    return "interrupted"


@contextmanager
def heeded(stop: Callable[[], None]) -> Iterator[None]:
    """Calls a function at the first of these signals in the block; a second one ends it at once.

    Signals that are ignored, as after ``nohup``, stay ignored. Outside of the main thread, which
    alone gets signals, nothing is changed.

    Args:
        stop: asks the block to end soon, or raises.

    Raises:
        Interrupted: the block was left by a KeyboardInterrupt; the first signal is the reason.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    received: list[int] = []

    def handle(number: int, _: FrameType | None) -> None:
        received.append(number)
        if len(received) > 1:
            raise Interrupted(number)
        stop()

    numbers = [getattr(signal, name) for name in _NAMES if hasattr(signal, name)]
    before = {n: signal.getsignal(n) for n in numbers if signal.getsignal(n) != signal.SIG_IGN}
    for number in before:
        signal.signal(number, handle)
    try:
        yield
    except KeyboardInterrupt as error:
        raise Interrupted(received[0] if received else signal.SIGINT) from error
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
