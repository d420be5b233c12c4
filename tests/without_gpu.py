"""Kernels without a GPU: run by Triton's interpreter, or compiled for a GPU that need not be here.

Triton reads TRITON_INTERPRET when it is imported, so what a test file has for the interpreter runs in a process of its
own: the file marks it `interpreted`, and calls `run_interpreted` from a test marked `starter`.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
interpreted = pytest.mark.skipif(not INTERPRETED, reason="needs TRITON_INTERPRET=1; test_in_the_interpreter runs it")
starter = pytest.mark.skipif(INTERPRETED, reason="starts the other half")
compiles = pytest.mark.skipif(INTERPRETED, reason="compiles")


def run_interpreted(file):
    """The tests of a file, in a process whose Triton interprets; at least one has to run."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist"]
    environment = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment.pop("PYTEST_XDIST_WORKER", None)
    run = subprocess.run(
        [*command, "--import-mode=importlib", file],
        env=environment,
        capture_output=True,
        text=True,
        cwd=Path(file).parent.parent,
    )
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-2000:]
    assert re.search(r"[1-9]\d* passed", run.stdout)


def stack_bytes(compiled, folder):
    """Bytes of stack a thread, which is where ptxas spills to, from the cubin's resource usage."""
    from triton.backends.nvidia import driver

    cubin = folder / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    tool = Path(driver.__file__).parent / "bin" / "cuobjdump"
    usage = subprocess.run([tool, "-res-usage", cubin], capture_output=True, text=True, check=True).stdout
    return int(re.search(r"STACK:(\d+)", usage)[1])
