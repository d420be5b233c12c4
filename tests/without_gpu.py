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
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
interpreted = pytest.mark.skipif(not INTERPRETED, reason="needs TRITON_INTERPRET=1; test_in_the_interpreter runs it")
starter = pytest.mark.skipif(INTERPRETED, reason="starts the other half")
compiles = pytest.mark.skipif(INTERPRETED, reason="compiles")
DEVICES = [pytest.param("cpu", marks=interpreted), pytest.param("cuda", marks=pytest.mark.gpu)]
# the interpreter cuts bfloat16 off where a GPU rounds, and cannot multiply it
DEVICES_AND_DTYPES = [
    *[pytest.param("cpu", dtype, marks=interpreted) for dtype in (torch.float32, torch.float16)],
    *[pytest.param("cuda", dtype, marks=pytest.mark.gpu) for dtype in (torch.float32, torch.float16, torch.bfloat16)],
]
GPUS = [("cuda", 80), ("cuda", 90), ("cuda", 100), ("hip", "gfx942")]


def interpret_faster():
    """Have Triton's interpreter patch its language once a launch, not in every call of a device function: much faster.

    It looks through hundreds of names for what is not patched yet, and finds nothing where `load` is patched.
    """
    import triton.language as tl
    from triton.runtime import interpreter

    if not hasattr(interpreter, "_LangPatchScope"):
        return
    patch = interpreter._patch_lang

    def patch_once(function):
        languages = [value for value in function.__globals__.values() if value is tl or value is tl.core]
        if any(tl.core.is_builtin(language.load) for language in languages):
            return patch(function)
        return interpreter._LangPatchScope()

    interpreter._patch_lang = patch_once


def run_interpreted(file, *options):
    """The tests of a file, in a process whose Triton interprets; at least one has to run. `options` are pytest's."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist"]
    environment = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment.pop("PYTEST_XDIST_WORKER", None)
    run = subprocess.run(
        [*command, "--import-mode=importlib", *options, file],
        env=environment,
        capture_output=True,
        text=True,
        cwd=Path(file).parent.parent,
    )
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-2000:]
    assert re.search(r"[1-9]\d* passed", run.stdout)


def compiled_for(gpu, kernel, variant, types, other):
    """The kernel as `launch` would compile it; `types` of arguments by name, `other` of those not in it."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    backend, arch = gpu
    names = kernel.arg_names
    signature = {n: "constexpr" if n in variant.constants else types.get(n, other) for n in names}
    attributes = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if n.endswith("_ptr")}
    source = ASTSource(fn=kernel, signature=signature, constexprs=variant.constants, attrs=attributes)
    target = GPUTarget(backend, arch, 64 if backend == "hip" else 32)
    return triton.compile(source, target=target, options={"enable_fp_fusion": True} | variant.options)


def stack_bytes(compiled, folder):
    """Bytes of stack a thread, which is where ptxas spills to, from the cubin's resource usage."""
    from triton.backends.nvidia import driver

    cubin = folder / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    tool = Path(driver.__file__).parent / "bin" / "cuobjdump"
    usage = subprocess.run([tool, "-res-usage", cubin], capture_output=True, text=True, check=True).stdout
    return int(re.search(r"STACK:(\d+)", usage)[1])
