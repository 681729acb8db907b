"""Clean shutdown of several processes on CPUs."""

import atexit
import ctypes
import time
from pathlib import Path

import torch.distributed as dist


_kept: set[int] = set()


def keep_process_group() -> None:
    """
    Keep the gloo process group alive until the process ends, and wait for its worker threads before that. Call it in each training
    process; repeated calls have no effect.

    The destructor of `ProcessGroupGloo` joins its worker threads. Python runs it while holding the GIL (when the last model that
    communicates through the group is freed), but a worker that has just finished its last collective may need the GIL to free a tensor.
    On a busy machine, the process can then deadlock at exit. A group that is never freed does not join its threads. A worker that needs the
    GIL after the interpreter has ended would abort the process, hence the wait.
    """
    if not (dist.is_available() and dist.is_initialized()) or "gloo" not in dist.get_backend():
        return
    group = dist.group.WORLD
    if id(group) not in _kept:
        _kept.add(id(group))
        # A reference from this module would be dropped before the threads end.
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(group))
        atexit.register(wait_for_workers)


def wait_for_workers(timeout: float = 60.0) -> None:
    """
    Wait until all worker threads of gloo are idle, for at most `timeout` seconds.

    PyTorch does not report this. On Linux, thread states are read from the kernel; elsewhere, this is just a short pause.
    """
    end, at_rest = time.monotonic() + timeout, 0
    while at_rest < 3 and time.monotonic() < end:
        time.sleep(0.01)  # releases the GIL
        at_rest = 0 if _a_worker_runs() else at_rest + 1


def _a_worker_runs() -> bool:
    for task in Path("/proc/self/task").glob("*"):
        try:
            name, _, rest = (task / "stat").read_text().partition("(")[2].rpartition(")")
        except OSError:  # it has ended
            continue
        if "gloo" in name and rest.split()[0] == "R":
            return True
    return False
