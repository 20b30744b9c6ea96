"""The Triton kernels, in a process whose Triton interprets them: no GPU is needed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent


@pytest.mark.skipif(sys.platform != "linux", reason="Triton is for Linux")
def test_the_kernels_in_triton_s_interpreter() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(HERE / "gpu_in_interpreter.py")]
    done = subprocess.run(
        command, cwd=HERE.parents[2], env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-5000:]
    assert " skipped" not in done.stdout


@pytest.mark.skipif(sys.platform != "linux", reason="Triton is for Linux")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_kernels_compile_for_a_gpu_that_is_not_there(dtype: torch.dtype) -> None:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from axolotl_ivon.optim.kernels import gpu

    integers = {"programs", "parts", "thetas", "gradients", "numbers", "report"}
    scalars = {"ess", "scale", "one_minus_beta1", "per_h_hat", "bound"}
    scalars |= {"max_step", "floor", "ceiling"}
    variants = [("_draw", {}), ("_squares", {}), ("_sum", {}), ("_judge", {})]
    variants += [("_collect", {"ADD": add, "SQUARED": squared}) for add in (True, False) for squared in (True, False)]
    variants += [("_update", {"FIXED": fixed, "SQUARED": not fixed, "OWN": False}) for fixed in (True, False)]
    variants += [("_update", {"FIXED": False, "SQUARED": False, "OWN": False})]
    variants += [("_update", {"FIXED": True, "SQUARED": squared, "OWN": True}) for squared in (True, False)]
    for name, constants in variants:
        kernel = getattr(gpu, name)
        known = {**constants, "TYPE": gpu._TYPES[dtype], "BLOCK": gpu._BLOCK}
        known = {key: value for key, value in known.items() if key in kernel.arg_names}
        kinds = {
            key: "constexpr"
            if key in known
            else "i32"
            if key == "tensors"
            else "fp32"
            if key in scalars
            else "*i64"
            if key in integers
            else "*fp32"
            for key in kernel.arg_names
        }
        built = triton.compile(ASTSource(kernel, kinds, constexprs=known), target=GPUTarget("cuda", 90, 32))
        assert built.asm["cubin"]
