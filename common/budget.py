"""The time budget of a training, and its orderly stop on SIGTERM or Ctrl-C."""

import math
import signal
import threading
import time
from dataclasses import dataclass

from common import processes


class Stopped(Exception):
    """Training stopped on purpose with everything saved; the same command continues."""


@dataclass
class Budget:
    """Stop after `hours` from now (None: never), or when SIGTERM or Ctrl-C arrives.

    During training the first signal only sets a flag; the loop then saves and stops. Elsewhere it interrupts at once,
    which is safe because files are written atomically. A second signal always interrupts.
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

    def is_over(self):
        """Return whether this process has to stop."""
        if time.monotonic() > self.deadline and not self.reason:
            self.reason = f"the {self.hours:g} hours are over"
        return self.reason is not None

    def spent(self):
        """Return True in every process that trains the same network as soon as one of them has to stop."""
        return processes.agree(self.is_over())
