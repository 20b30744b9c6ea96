"""What an optimizer's step costs: IVONLoRA's sample + step beside AdamW's step and ivon-opt's sample + step.

    python benchmarks/optimizer.py                               # the adapters of a 135M, a 3B and a 7B model, on a CPU
    python benchmarks/optimizer.py --shapes 70b --device cuda    # 829 million weights: 33 GB with ivon-opt
    python benchmarks/optimizer.py --dtype bfloat16 --json
    python benchmarks/optimizer.py --threads 1 --cpu-time        # on a machine that is busy with something else

All of them run in turn in one process, on the same gradients; figures are medians, and ratios are medians of the ratios
within a turn. The floor is what an optimizer with this state cannot go below: the time to draw the normals, and
the bytes that must move (drawing reads m and p; leaving the context reads m, writes what is kept of the draw; stepping
reads that, m, g and p, and writes m, g and p; the parameters are written three times and read once, the gradient read
twice) over the bandwidth of a copy, measured here. "extra" is the
memory beyond state, parameters and gradients at its highest during sample and step.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from axolotl_ivon import IVONLoRA

Shapes = list[tuple[int, int]]


def lora(layers: int, rank: int, modules: list[tuple[int, int]]) -> Shapes:
    """Return the shapes of A and B of every module (inputs, outputs) of every layer."""
    return [shape for _ in range(layers) for n, m in modules for shape in ((rank, n), (m, rank))]


def linear(d: int, kv: int, f: int) -> list[tuple[int, int]]:
    """Return inputs and outputs of the seven linear layers of a Llama block."""
    return [(d, d), (d, kv), (d, kv), (d, d), (d, f), (d, f), (f, d)]


SHAPES: dict[str, tuple[str, Shapes]] = {
    "135m": ("r 8 on q, v of a 135M model", lora(30, 8, [(576, 576), (576, 192)])),
    "3b": ("r 8 on q, v of a 3B model", lora(28, 8, [(3072, 3072), (3072, 1024)])),
    "7b": ("r 64 on all linear layers of a 7B model", lora(32, 64, linear(4096, 4096, 11008))),
    "70b": ("r 64 on all linear layers of a 70B model", lora(80, 64, linear(8192, 1024, 28672))),
}


MAKERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "IVONLoRA": lambda p: IVONLoRA(p, lr=1e-2, ess=1e6),
    "ivon-opt": lambda p: importlib.import_module("ivon").IVON(p, lr=1e-2, ess=1e6),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=1e-4),
    "AdamW foreach": lambda p: torch.optim.AdamW(p, lr=1e-4, foreach=True),
    "AdamW fused": lambda p: torch.optim.AdamW(p, lr=1e-4, fused=True),
}
SAMPLED: dict[str, Callable[[Any], Any]] = {
    "IVONLoRA": lambda optimizer: optimizer.sampled_params(),
    "ivon-opt": lambda optimizer: optimizer.sampled_params(train=True),
}


class Contender:
    """An optimizer with parameters of its own, on gradients that all contenders share."""

    def __init__(self, name: str, shapes: Shapes, gradients: list[torch.Tensor]) -> None:
        self.gradients = gradients
        first = gradients[0]
        generator = torch.Generator().manual_seed(0)
        values = (torch.randn(shape, generator=generator) * 0.02 for shape in shapes)
        self.params = [nn.Parameter(value.to(first.device, first.dtype)) for value in values]
        self.optimizer = MAKERS[name](self.params)
        self.sampled = SAMPLED.get(name)

    def backward(self) -> None:
        """Stand in for the backward pass."""
        for param, gradient in zip(self.params, self.gradients, strict=True):
            param.grad = gradient

    def run(self) -> None:
        """Sample, where it does that, and step."""
        if self.sampled is None:
            self.backward()
        else:
            with self.sampled(self.optimizer):
                self.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def state_bytes(self) -> int:
        """Return the size of the tensors that it keeps between steps."""
        found: dict[int, int] = {}

        def look(value: Any) -> None:
            if isinstance(value, torch.Tensor) and value.dim():
                found[value.data_ptr()] = value.nbytes
            elif isinstance(value, dict):
                for item in value.values():
                    look(item)

        look(dict(self.optimizer.state))
        for group in self.optimizer.param_groups:
            look({key: value for key, value in group.items() if key != "params"})
        return sum(found.values())


def measure(action: Callable[[], object], device: torch.device, clock: Callable[[], float]) -> float:
    """Return how many milliseconds it takes, by the device's own clock where there is one."""
    if device.type != "cuda":
        started = clock()
        action()
        return 1000 * (clock() - started)
    events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
    torch.cuda.synchronize()
    events[0].record()
    action()
    events[1].record()
    torch.cuda.synchronize()
    return events[0].elapsed_time(events[1])


def count(action: Callable[[], object], device: torch.device) -> tuple[int, int]:
    """Return the launches (kernels; on a CPU torch's operations), and by how many bytes memory grows at most."""
    on_gpu = device.type == "cuda"
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the profiler sees this thread only
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU], profile_memory=True) as found:
        if on_gpu:
            torch.cuda.reset_peak_memory_stats(device)
        held = torch.cuda.memory_allocated(device) if on_gpu else 0
        action()
        peak = torch.cuda.max_memory_allocated(device) - held if on_gpu else 0
    torch.set_num_threads(threads)
    events = found.profiler.kineto_results.events()
    if on_gpu:
        wanted = torch.autograd.DeviceType.CUDA
        return sum(e.device_type() == wanted and not e.name().startswith("Mem") for e in events), peak
    for _, size in sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"):
        held += size
        peak = max(peak, held)
    return sum(e.name().startswith("aten::") for e in events), peak


def floor(weights: int, itemsize: int, device: torch.device, clock: Callable[[], float]) -> dict[str, float]:
    """Return the milliseconds that copying as many bytes takes, and drawing the normals."""
    size = min(weights * 4, 2**28) // 4
    source, target = torch.ones(size, device=device), torch.empty(size, device=device)
    noise = torch.empty(weights, device=device)
    copied, drawn = [], []
    for _ in range(7):
        copied.append(measure(lambda: target.copy_(source), device, clock))
        drawn.append(measure(noise.normal_, device, clock))
    moved = weights * (4 * (2 + 2 + 4 + 3) + itemsize * (4 + 2))
    return {
        "bytes_ms": statistics.median(copied) * moved / (8 * size),
        "normals_ms": statistics.median(drawn),
        "bytes_per_weight": moved / weights,
    }


def compare(name: str, arguments: argparse.Namespace, dtype: torch.dtype) -> dict[str, Any]:
    """Measure all contenders at one of the shapes."""
    description, shapes = SHAPES[name]
    device = torch.device(arguments.device)
    clock = time.process_time if arguments.cpu_time else time.perf_counter
    generator = torch.Generator().manual_seed(1)
    gradients = [(torch.randn(shape, generator=generator) * 1e-3).to(device, dtype) for shape in shapes]
    weights = sum(gradient.numel() for gradient in gradients)
    contenders = {}
    for each in arguments.optimizers:
        try:
            contenders[each] = Contender(each, shapes, gradients)
        except (ImportError, RuntimeError) as error:
            print(f"{each}: left out, {error}", file=sys.stderr)
    rows: dict[str, dict[str, Any]] = {}
    for each, contender in contenders.items():
        contender.run()  # makes the state, and compiles what is compiled
        contender.run()
        number, peak = count(contender.run, device)
        rows[each] = {"launches": number, "extra": peak / weights, "state": contender.state_bytes() / weights}
    times: dict[str, list[float]] = {each: [] for each in contenders}
    for _ in range(arguments.repeats):
        for each, contender in contenders.items():
            times[each].append(measure(contender.run, device, clock))
    for each, row in rows.items():
        row["ms"] = statistics.median(times[each])
        for peer in ("ivon-opt", "AdamW fused"):
            if peer in times:
                row[f"x {peer}"] = statistics.median(t / u for t, u in zip(times[each], times[peer], strict=True))
    del contenders
    gc.collect()
    return {
        "shape": name,
        "description": description,
        "tensors": len(shapes),
        "weights": weights,
        "dtype": str(dtype).removeprefix("torch."),
        "optimizers": rows,
        "floor": floor(weights, dtype.itemsize, device, clock),
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=["135m", "3b", "7b"])
    parser.add_argument("--optimizers", nargs="+", choices=list(MAKERS), default=list(MAKERS))
    parser.add_argument("--dtype", nargs="+", choices=["float32", "bfloat16"], default=["float32"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--cpu-time", action="store_true", help="count the processor's time, not the clock's")
    parser.add_argument("--repeats", type=int, default=21)
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    results = [compare(name, arguments, getattr(torch, d)) for name in arguments.shapes for d in arguments.dtype]
    on_gpu = arguments.device.startswith("cuda")
    where = torch.cuda.get_device_name(arguments.device) if on_gpu else f"{arguments.threads} CPU threads"
    machine = f"{platform.machine()}, {where}, torch {torch.__version__}, medians of {arguments.repeats}"
    if arguments.json:
        print(json.dumps({"machine": machine, "results": results}, indent=1))
        return
    print(machine)
    for result in results:
        limits = result["floor"]
        print(
            f"\n{result['description']}: {result['tensors']} tensors, {result['weights'] / 1e6:.2f} M weights, "
            f"{result['dtype']}. Floor: {limits['bytes_per_weight']:.0f} bytes a weight {limits['bytes_ms']:.2f} ms, "
            f"normals {limits['normals_ms']:.2f} ms.\n"
        )
        print(f"| | ms | × ivon-opt | × AdamW fused | {'launches' if on_gpu else 'operations'} | state, B | extra, B |")
        print("|---|" + "---:|" * 6)
        for each, row in result["optimizers"].items():
            ratios = " | ".join(f"{row[f'x {p}']:.2f}" if f"x {p}" in row else "" for p in ("ivon-opt", "AdamW fused"))
            print(
                f"| {each} | {row['ms']:.2f} | {ratios} | {row['launches']} | {row['state']:.1f} | {row['extra']:.1f} |"
            )


if __name__ == "__main__":
    main()
