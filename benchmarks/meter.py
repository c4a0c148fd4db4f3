"""Time and memory of the steps of one benchmark, as a table."""

import contextlib
import io
import resource
import threading
import time
from pathlib import Path

import psutil


class Meter:
    """Runs steps and prints wall seconds, CPU seconds (workers included) and peak resident memory of each.

    rows: {step: (wall seconds, CPU seconds, peak in GB)} so far.
    """

    def __init__(self):
        self.peak, self.workers, self.rows = 0.0, 0, {}

    def __call__(self, name, work, say=lambda result, seconds: ""):
        """Return what `work()` returns; `say(result, wall seconds)` is printed beside the figures."""
        self._reset()
        over = threading.Event()
        watch = threading.Thread(target=self._watch, args=(over,), daemon=True)
        watch.start()
        wall, cpu = time.perf_counter(), cpu_seconds()
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):  # bars
            result = work()
        wall, cpu = time.perf_counter() - wall, cpu_seconds() - cpu
        over.set()
        watch.join()
        peak = (own_peak() + self.workers) / 2**30
        self.peak, self.rows[name] = max(self.peak, peak), (wall, cpu, peak)
        print(f"{name:<54}{wall:>8.2f}{cpu:>8.2f}{peak:>7.2f}  {say(result, wall)}".rstrip(), flush=True)
        return result

    def _reset(self):
        self.workers = 0
        clear = Path("/proc/self/clear_refs")
        if clear.exists():
            clear.write_text("5")  # Linux: resets the peak

    def _watch(self, over):
        """Keep the peak memory of all worker processes, a page shared by n processes counting 1/n."""
        me = psutil.Process()
        while not over.wait(0.2):
            with contextlib.suppress(psutil.Error):
                held = sum(child.memory_full_info().pss for child in me.children(recursive=True))
                self.workers = max(self.workers, held)


def own_peak():
    """Return the peak resident bytes of this process: on Linux since the last reset, else since its start."""
    status = Path("/proc/self/status")
    if status.exists():
        return 1024 * next(int(line.split()[1]) for line in status.open() if line.startswith("VmHWM"))
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def cpu_seconds():
    """Return the CPU seconds of this process and of its finished children."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime
