"""What several members in one batch gain over one member at a time, and over PEFT's own ways, in tokens per second.

    python benchmarks/generation.py                 # SmolLM2-135M's shape with random weights, on a CPU
    python benchmarks/generation.py --device cuda --dtype bfloat16 --members 8 64 --prompts 4

Prints a Markdown table. Every way draws the same number of tokens after prompts of one length, and none may stop early;
they take turns in one process, and figures are medians.

    together     TransformersEngine: members, prompts and outputs in one batch
    in turn      TransformersEngine with a batch that holds one member
    PEFT mixed   transformers' generate with adapter_names: one batch, every adapter loaded into the model
    PEFT in turn transformers' generate for each adapter after set_adapter
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from evaluation import build
from peft import PeftModel

from axolotl_ivon import Posterior
from axolotl_ivon.data.encode import Prompt
from axolotl_ivon.generation.local import TransformersEngine
from axolotl_ivon.generation.plan import Plan
from axolotl_ivon.models.draws import AdapterSlots


def make_session(model: PeftModel) -> Any:
    """Return enough of a `Session` for an engine whose texts nobody reads."""
    tokenizer = SimpleNamespace(eos_token_id=None, decode=lambda *_, **__: "")
    return SimpleNamespace(
        model=model, tokenizer=tokenizer, slots=AdapterSlots(model), max_length=None, check_tokens=lambda *_: None
    )


def load_members(model: PeftModel, posterior: Posterior, count: int) -> list[str]:
    """Put `count` draws into the model as adapters of their own, as PEFT's ways need them."""
    names = [f"draw{k}" for k in range(count)]
    for k, name in enumerate(names):
        if name not in model.peft_config:
            model.add_adapter(name, model.peft_config["default"])
            AdapterSlots(model, name).write(posterior.sample(0, k))
    return names


def by_engine(engine: TransformersEngine, prompts: list[Prompt]) -> None:
    """Generate with this project's engine."""
    for _ in engine.outputs(prompts):
        pass


def by_peft(model: PeftModel, names: list[str], prompts: list[Prompt], plan: Plan, mixed: bool) -> None:
    """Generate with transformers' `generate`, for all adapters at once or for one after another."""
    ids = torch.tensor([prompt.ids for prompt in prompts], device=model.device)
    options: dict[str, Any] = {
        "do_sample": True,
        "temperature": 1.0,
        "top_k": 0,
        "min_new_tokens": plan.max_tokens,
        "max_new_tokens": plan.max_tokens,
        "pad_token_id": 0,
    }
    copies = len(prompts) * plan.per_model
    if mixed:
        rows = ids.repeat_interleave(plan.per_model, 0).repeat(len(names), 1)
        adapters = [name for name in names for _ in range(copies)]
        model.generate(input_ids=rows, attention_mask=torch.ones_like(rows), adapter_names=adapters, **options)
        return
    rows = ids.repeat_interleave(plan.per_model, 0)
    for name in names:
        model.set_adapter(name)
        model.generate(input_ids=rows, attention_mask=torch.ones_like(rows), **options)
    model.set_adapter("default")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--members", type=int, nargs="+", default=[2, 8])
    parser.add_argument("--per-model", type=int, default=8)
    parser.add_argument("--prompts", type=int, default=1, help="prompts in a batch")
    parser.add_argument("--length", type=int, default=60, help="tokens of a prompt")
    parser.add_argument("--tokens", type=int, default=32, help="tokens of an output")
    parser.add_argument("--hidden", type=int, default=576)
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    arguments = parser.parse_args()
    model, posterior = build(arguments)
    session = make_session(model.eval())
    model.get_base_model().generation_config.eos_token_id = None
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 40000, (arguments.prompts, arguments.length), generator=generator).tolist()
    prompts = [Prompt(str(own), own, None, "benchmark") for own in ids]
    where = torch.cuda.get_device_name() if model.device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    total = sum(parameter.numel() for parameter in model.parameters())
    print(
        f"{total / 1e6:.0f} M weights ({arguments.dtype}), {where}, torch {torch.__version__}, {arguments.prompts} "
        f"prompts of {arguments.length} tokens, {arguments.per_model} outputs of {arguments.tokens} tokens for each "
        f"member, tokens per second, medians of {arguments.repeats}\n"
    )
    print("| members | together | in turn | PEFT mixed | PEFT in turn |\n|---:|---:|---:|---:|---:|")
    for members in arguments.members:
        plan = Plan(n=members * arguments.per_model, per_model=arguments.per_model, max_tokens=arguments.tokens)
        names = load_members(model, posterior, members)
        rows = arguments.prompts * arguments.per_model
        engines = [TransformersEngine(session, posterior, plan, batch_size=size) for size in (rows * members, rows)]
        ways: list[Callable[[], object]] = [
            *(partial(by_engine, engine, prompts) for engine in engines),
            *(partial(by_peft, model, names, prompts, plan, mixed) for mixed in (True, False)),
        ]
        speeds: list[list[float]] = [[] for _ in ways]
        for turn in range(arguments.repeats + 1):  # the first does not count
            for way, found in zip(ways, speeds, strict=True):
                begun = time.perf_counter()
                way()
                if model.device.type == "cuda":
                    torch.cuda.synchronize()
                if turn:
                    found.append(len(prompts) * plan.n * plan.max_tokens / (time.perf_counter() - begun))
        print(f"| {members} | " + " | ".join(f"{statistics.median(found):.0f}" for found in speeds) + " |", flush=True)


if __name__ == "__main__":
    main()
