"""The time budget of a command, and its orderly stop on SIGTERM or Ctrl-C."""

import math
import signal
import sys
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass

from common import processes

LONGEST = 1e9  # seconds of a timer; systems refuse longer ones


class Stopped(KeyboardInterrupt):
    """The command stopped on purpose with everything saved; the same command continues."""


@contextmanager
def keep_handlers():
    """Within the block, a Budget may take the signals; after it, they go to the one that had them before."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            for number, handler in before.items():
                signal.signal(number, handler)


@dataclass
class Budget:
    """Stop the command after `hours` (None: never), or on SIGTERM or Ctrl-C; a second signal always stops it at once.

    During training the first signal only sets a flag; the loop then saves and stops. Elsewhere it interrupts at
    once, which is safe because files are written atomically. The end of the hours within `watching()` does the same.
    """

    hours: float | None = None

    def __post_init__(self):
        self.deadline = math.inf if self.hours is None else time.monotonic() + 3600 * self.hours
        self.reason, self.training = None, False
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, self._on_signal)

    def _on_signal(self, number, frame):
        if self.reason or not self.training:
            raise KeyboardInterrupt
        self.reason = f"{signal.Signals(number).name} received"

    @contextmanager
    def watching(self):
        """Within the block, raise Stopped as soon as the hours are over, except during a training."""
        if self.hours is None or threading.current_thread() is not threading.main_thread():
            yield
            return
        before, hook = signal.signal(signal.SIGALRM, self._on_time), sys.unraisablehook

        def once_more(ignored):  # Python ignores what is raised in a destructor
            if isinstance(ignored.exc_value, Stopped):
                signal.setitimer(signal.ITIMER_REAL, 0.01)
            else:
                hook(ignored)

        sys.unraisablehook = once_more
        signal.setitimer(signal.ITIMER_REAL, min(max(1e-3, self.deadline - time.monotonic()), LONGEST))
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
            sys.unraisablehook = hook

    def _on_time(self, number, frame):
        if self.training:  # which stops by itself; what follows it does not
            signal.setitimer(signal.ITIMER_REAL, 1)
        elif self.is_over() and processes.is_main():  # the others notice that it ends
            raise Stopped(self.reason)

    def is_over(self):
        """Return whether this process has to stop."""
        if time.monotonic() > self.deadline and not self.reason:
            self.reason = f"the {self.hours:g} hours are over"
        return self.reason is not None

    def spent(self):
        """Return True in all processes that train the same network once one of them has to stop."""
        return processes.agree(self.is_over())
