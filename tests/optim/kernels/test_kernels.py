"""The kernels against the float64 formulas, which of them are chosen, and what becomes of those that fail.

The fused kernels for a GPU are run in a process whose Triton interprets them, and compiled for a GPU that is not there.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from reference import ReferenceIVON
from torch import nn
from toy import chunk_of

import axolotl_ivon
from axolotl_ivon import IVONLoRA
from axolotl_ivon.errors import IVONError
from axolotl_ivon.optim import kernels as chosen
from axolotl_ivon.optim.kernels import agree, cpu, plain
from axolotl_ivon.optim.kernels.base import MAX_STEP, Constants, Terms

NameOf = Callable[[int], str]
RATES, ESS, BETA1, BETA2, BOUND = (1e-2, 3e-2, 0.2), 1e3, 0.9, (0.99, 0.9, 0.81), 1e-2
STEPS = (5, 1, 20)


@pytest.fixture(params=["plain", "cpu"])
def kernels(request: pytest.FixtureRequest) -> Any:
    return importlib.import_module(f"axolotl_ivon.optim.kernels.{request.param}")


def test_they_agree(kernels: Any) -> None:
    agree(kernels, plain, torch.device("cpu"))
    for name in ("noise", "draw", "squares", "collect"):
        with pytest.raises(AssertionError):
            right = getattr(kernels, name)
            wrong = SimpleNamespace(**vars(kernels))
            setattr(wrong, name, lambda *args, right=right, **kwargs: right(*args, **kwargs) * 1.01)
            agree(wrong, plain, torch.device("cpu"))


@pytest.mark.parametrize(
    ("prior", "squared"), [("empirical", False), (0.3, False), (0.3, True), ("own", False), ("own", True)]
)
@torch.no_grad()
def test_one_step_is_that_of_the_reference(kernels: Any, prior: Any, squared: bool) -> None:
    hessian = "squared_gradients" if squared else "reparameterized"
    sizes = [37, 5, 1]
    chunk = chunk_of(sizes)
    references = []
    center, sigma = chunk.mean.sin(), chunk.mean.abs() * 0.1 + 0.05
    if prior == "own":
        chunk.prior = (center, sigma**-2)
    yesterday = zip(*(x.double().split(sizes) for x in (center, sigma)), strict=True)
    states = zip(*(flat.split(sizes) for flat in (chunk.mean, chunk.momentum, chunk.precision)), strict=True)
    for (m, g, p), beta2, step in zip(states, BETA2, STEPS, strict=True):
        numbers = (ESS, BETA1, beta2, 0.1, BOUND, "empirical" if prior == "own" else prior)
        reference = ReferenceIVON(m.double().numpy(), *numbers, hessian=hessian, batch_size=4)
        if prior == "own":
            reference.prior = tuple(x.numpy() for x in next(yesterday))
        reference.t, reference.g, reference.p = step - 1, g.double().numpy(), p.double().numpy()
        references.append(reference)
    moments = kernels.draw(chunk, kernels.noise(chunk, chunk.streams), ESS)
    thetas = [param.double().numpy().copy() for param in chunk.params]
    for param in chunk.params:
        param.grad = param.sin()
    gradients = [param.grad.double().numpy().copy() for param in chunk.params]
    h_hat = torch.empty_like(chunk.mean)
    squares = kernels.collect(chunk, h_hat, add=False, squared=squared)
    assert torch.equal(squares, kernels.squares(chunk))
    expected = [(gradient**2).sum() for gradient in gradients]
    np.testing.assert_allclose(kernels.squares(chunk).numpy(), expected, rtol=1e-5)
    sized = torch.tensor([float(size) for size in sizes])
    if prior == "own":
        deltas = torch.full_like(sized, 1 / ESS)
    else:
        deltas = sized / moments if prior == "empirical" else torch.full_like(sized, prior)
        np.testing.assert_allclose(deltas.numpy(), [reference.delta() for reference in references], rtol=1e-5)
    debias = 1 - BETA1 ** torch.tensor(STEPS)
    constants = Constants(ESS, BETA1, BOUND, fixed=prior != "empirical", batch=4.0 if squared else None)
    terms = Terms(deltas, debias, torch.tensor(RATES), 1 - torch.tensor(BETA2), *torch.ones(2, len(sizes)))
    before = [flat.clone() for flat in (chunk.mean, chunk.momentum, chunk.precision)]
    kernels.update(chunk, h_hat, terms, (0.0, 1.0), constants)  # a skipped step writes nothing
    assert all(map(torch.equal, (chunk.mean, chunk.momentum, chunk.precision), before))
    kernels.update(chunk, h_hat, terms, (1.0, 1.0), constants)
    for reference, theta, gradient, rate in zip(references, thetas, gradients, RATES, strict=True):
        reference.step([theta], [gradient], rate)
    for name, flat in (("m", chunk.mean), ("g", chunk.momentum), ("p", chunk.precision)):
        expected = np.concatenate([getattr(reference, name) for reference in references])
        np.testing.assert_allclose(flat.double().numpy(), expected, rtol=2e-5, atol=1e-7)
    assert torch.equal(torch.cat([*chunk.params]), chunk.mean)


@pytest.mark.parametrize(("bad", "expected"), [(3e38, np.inf), (np.inf, np.nan), (np.nan, np.nan)])
@torch.no_grad()
def test_squares_tell_an_overflow_from_a_gradient_that_is_not_finite(kernels: Any, bad: float, expected: float) -> None:
    chunk = chunk_of([9, 20])
    for param in chunk.params:
        param.grad = torch.ones_like(param)
    chunk.params[1].grad[7] = bad
    np.testing.assert_array_equal(kernels.squares(chunk).numpy(), [9, expected])
    squares = kernels.collect(chunk, torch.empty_like(chunk.mean), add=False)
    np.testing.assert_array_equal(squares.numpy(), [9, expected])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("squared", [False, True])
@torch.no_grad()
def test_a_second_draw_is_added_and_theta_is_what_was_rounded(kernels: Any, dtype: torch.dtype, squared: bool) -> None:
    chunk = chunk_of([50, 3], dtype)
    h_hat, total = torch.empty_like(chunk.mean), torch.zeros_like(chunk.mean)
    for draw in range(2):
        kernels.draw(chunk, kernels.noise(chunk, chunk.streams + np.uint64(draw)), ESS)
        for param in chunk.params:
            param.grad = param.cos()
        theta, gradient = (torch.cat(list(x)).float() for x in (chunk.params, (p.grad for p in chunk.params)))
        total += (gradient if squared else theta - chunk.mean) * gradient
        kernels.collect(chunk, h_hat, add=draw > 0, squared=squared)
    torch.testing.assert_close(h_hat, total, rtol=1e-5, atol=1e-7)


BAD = math.nan


@pytest.mark.parametrize(
    ("at_draw", "now", "decision", "report"),
    [
        ([1.0, 3.0, 0.0], [4.0, 12.0, 0.0], (1, 2), (4, 0, 1)),  # the norm is the root of the sum
        ([0.0, 0.0, 0.0], [0.0, 0.0, 0.0], (1, 1), (4, 0, 1)),
        ([1e-38, 0.0, 0.0], [1e38, 0.0, 0.0], (1, MAX_STEP), (4, 0, 1)),
        ([1.0, BAD, BAD], [BAD, BAD, BAD], None, (5, 4, 5)),  # the smallest number of those that were bad at the draw
        ([1.0, 1.0, 1.0], [BAD, 1.0, 1.0], None, (5, 4, 9)),
        ([1.0, math.inf, 1.0], [BAD, BAD, BAD], None, (5, 4, 3)),  # of no tensor alone
        ([1.0, 3e38, 3e38], [1.0, 1.0, 1.0], None, (5, 4, 3)),
    ],
)
def test_a_finite_gradient_is_taken_with_the_ratio_of_its_norms_and_another_is_counted_and_named(
    at_draw: list[float], now: list[float], decision: tuple[float, float] | None, report: tuple[int, int, int]
) -> None:
    found, told = plain.judge(torch.tensor(at_draw), torch.tensor(now), torch.tensor([9, 7, 5]), (4, 3, 1))
    assert told == report
    assert found == pytest.approx(decision) if decision else not found[0]


def test_the_size_chooses_unless_the_variable_does(monkeypatch: pytest.MonkeyPatch, name_of: NameOf) -> None:
    assert (name_of(2**18 - 1), name_of(2**18)) == ("plain", "cpu")
    for name in ("plain", "cpu"):
        monkeypatch.setenv("IVON_KERNELS", name)
        assert name_of(3) == name_of(2**18) == name
    monkeypatch.setenv("IVON_KERNELS", "cuda")
    with pytest.raises(IVONError, match=r"^IVON_KERNELS=cuda: must be plain, cpu or gpu$"):
        IVONLoRA([nn.Parameter(torch.ones(3))], ess=1.0)


def test_what_cannot_be_used_says_so_in_one_line(monkeypatch: pytest.MonkeyPatch, name_of: NameOf) -> None:
    monkeypatch.setenv("IVON_KERNELS", "gpu")
    with pytest.raises(IVONError, match=r"=gpu cannot be used for torch.float32 parameters on cpu: ") as error:
        name_of(3)
    assert "\n" not in str(error.value)
    monkeypatch.setenv("IVON_KERNELS", "cpu")
    with pytest.raises(IVONError, match=r"on meta: they are for a CPU"):
        chosen.choose([nn.Parameter(torch.ones(3, device="meta"))])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(IVONError, match="on cpu: numba is not installed"):
        name_of(3)


def test_the_noise_is_that_of_the_plain_kernels() -> None:
    chunk = chunk_of([7, 200_001, 15])
    assert torch.equal(plain.noise(chunk, chunk.streams), cpu.noise(chunk, chunk.streams))


def test_without_kernels_that_work_the_plain_operations_do(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, name_of: NameOf
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(cpu, "squares", lambda chunk: torch.zeros(len(chunk.sizes)))
        assert name_of(2**18) == "plain"
    assert "costs time only" in caplog.text
    caplog.clear()
    with monkeypatch.context() as patch:
        patch.setattr(importlib.util, "find_spec", lambda name: None)
        assert name_of(2**18) == "plain"
        assert not caplog.records
    monkeypatch.setattr("numba.njit", lambda **_: 1 / 0)
    monkeypatch.delitem(sys.modules, "axolotl_ivon.optim.kernels.cpu", raising=False)
    assert name_of(2**18) == "plain"
    assert "costs time only" in caplog.text


def test_importing_the_optimizer_imports_no_numba() -> None:
    code = "import sys, axolotl_ivon.optim.ivon; sys.exit('numba' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_with_a_cache_that_is_really_unwritable_the_kernels_are_compiled_without(tmp_path: Path) -> None:
    """All places that numba would keep it in lie below a file, which stops even root."""
    package = Path(axolotl_ivon.__file__).parent
    shutil.copytree(package, tmp_path / package.name, ignore=shutil.ignore_patterns("__pycache__"))
    file = tmp_path / package.name / "optim" / "kernels" / "__pycache__"
    file.touch()
    code = """if True:
        import numba, torch, axolotl_ivon.optim.kernels as kernels
        try:
            numba.njit(cache=True)(kernels.choose)
        except RuntimeError as error:
            assert "cannot cache" in str(error)
        else:
            raise AssertionError("numba found a place to write in")
        print(kernels.choose([torch.ones(2**18)]).__file__)
    """
    below = str(file / "cache")
    env = {**os.environ, "PYTHONPATH": str(tmp_path), "PYTHONDONTWRITEBYTECODE": "1"}
    env |= dict.fromkeys(("NUMBA_CACHE_DIR", "XDG_CACHE_HOME", "HOME"), below)
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(file.with_name("cpu.py"))
    assert not done.stderr


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

    kinds = dict.fromkeys(("programs", "parts", "thetas", "gradients", "numbers", "report"), "*i64")
    scalars = ("ess", "scale", "one_minus_beta1", "per_h_hat", "bound", "max_step", "floor", "ceiling", "rounding")
    kinds |= {**dict.fromkeys(scalars, "fp32"), "tensors": "i32"}
    variants = [("_draw", {}), ("_squares", {}), ("_sum", {}), ("_judge", {})]
    variants += [("_collect", {"ADD": add, "SQUARED": squared}) for add in (True, False) for squared in (True, False)]
    kinds_of_step = [(0, 0, 0, 0), (0, 1, 0, 0), (1, 0, 0, 0), (1, 0, 1, 0), (1, 1, 1, 0), (0, 1, 0, 1)]
    flags = ("FIXED", "SQUARED", "OWN", "ADAM")
    variants += [("_update", dict(zip(flags, map(bool, kind), strict=True))) for kind in kinds_of_step]
    for name, constants in variants:
        kernel = getattr(gpu, name)
        known = {**constants, "TYPE": gpu._TYPES[dtype], "BLOCK": gpu._BLOCK}
        known = {key: value for key, value in known.items() if key in kernel.arg_names}
        signature = {key: "constexpr" if key in known else kinds.get(key, "*fp32") for key in kernel.arg_names}
        built = triton.compile(ASTSource(kernel, signature, constexprs=known), target=GPUTarget("cuda", 90, 32))
        assert built.asm["cubin"]
