"""The programs in `examples/`: as modules, run in this process, and run in processes that need not import anything again."""

import contextlib
import importlib.util
import io
import multiprocessing
import os
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType


EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
CLOSED = "closed"


def load_example(name: str, module_name: str | None = None) -> ModuleType:
    """The module of `examples/{name}.py`; `module_name` keeps it apart from another copy."""
    spec = importlib.util.spec_from_file_location(module_name or name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def run_example(name: str, *arguments: object) -> subprocess.CompletedProcess:
    """What `python examples/{name}.py ARGUMENTS` prints, and its exit code, from a run in this process."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    argv, sys.argv = sys.argv, [str(EXAMPLES / f"{name}.py"), *map(str, arguments)]
    path, sys.path = sys.path, [str(EXAMPLES), *sys.path]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
        if isinstance(error.code, str):
            err.write(f"{error.code}\n")
    finally:
        sys.argv, sys.path = argv, path
    return subprocess.CompletedProcess([name, *arguments], code, out.getvalue(), err.getvalue())


def fork(
    program: Callable[..., object],
    *arguments: object,
    stdin: str | os.PathLike | int | None = None,
    stdout: str | os.PathLike | int | None = None,
    stderr: str | os.PathLike | int | None = None,
) -> multiprocessing.Process:
    """
    A copy of this process that runs `program(*arguments)` and ends as a Python program does: it can be killed, and its standard
    streams are real ones (a path, a file descriptor, or `CLOSED`; nothing to read and the output of the tests if not given).
    """
    process = multiprocessing.get_context("fork").Process(
        target=_run_with_streams, args=((os.devnull if stdin is None else stdin, stdout, stderr), program, arguments)
    )
    process.start()
    return process


def run_forked(program: Callable[..., object], *arguments: object, folder: Path, **streams) -> tuple[int, str]:
    """The exit code of `fork(...)` and what it wrote to standard error, which is kept in `folder`."""
    streams.setdefault("stderr", folder / "stderr.txt")
    process = fork(program, *arguments, **streams)
    process.join(120)
    assert process.exitcode is not None, "still running"
    kept = folder / "stderr.txt"
    return process.exitcode, kept.read_text() if kept.exists() else ""


def _run_with_streams(streams: tuple, program: Callable[..., object], arguments: tuple) -> None:
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)  # the threads of the parent do not exist here
    for number, where in enumerate(streams):
        if isinstance(where, int):
            os.dup2(where, number)
        elif where not in (None, CLOSED):
            flags = os.O_RDONLY if number == 0 else os.O_WRONLY | os.O_CREAT | os.O_TRUNC
            descriptor = os.open(where, flags, 0o600)
            os.dup2(descriptor, number)
            os.close(descriptor)
    for number, (name, where) in enumerate(zip(("stdin", "stdout", "stderr"), streams)):
        if where == CLOSED:
            os.close(number)
            setattr(sys, name, None)
        else:
            stream = open(number, "w" if number else "r", 1 if number == 2 else -1, encoding="utf-8", closefd=False)  # noqa: SIM115
            setattr(sys, name, stream)
    program(*arguments)
