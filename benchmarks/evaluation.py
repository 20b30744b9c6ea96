"""What draws cost in an evaluation, against single passes and against reloading adapters.

    python benchmarks/evaluation.py                 # SmolLM2-135M's shape with random weights, 64 prompts, on a CPU
    python benchmarks/evaluation.py --prompts 1 8 64 --device cuda --dtype bfloat16

Prints Markdown tables. Everything that is compared runs in turn in one process; figures are medians.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from axolotl_ivon import Posterior
from axolotl_ivon.data.encode import EncodedExample
from axolotl_ivon.evaluation.evaluate import Sampling, evaluate
from axolotl_ivon.evaluation.variants import Variant
from axolotl_ivon.models.draws import AdapterSlots
from axolotl_ivon.models.session import pick_device

MEAN, DRAWN = Variant("mean"), Variant("posterior", tau=1.0)


def build(arguments: argparse.Namespace) -> tuple[PeftModel, Posterior]:
    """Make a Llama with random weights, LoRA on q and v, and a posterior over it."""
    torch.manual_seed(0)
    heads = arguments.hidden // 64
    config = LlamaConfig(
        hidden_size=arguments.hidden,
        intermediate_size=int(arguments.hidden * 8 / 3),
        num_hidden_layers=arguments.layers,
        num_attention_heads=heads,
        num_key_value_heads=max(1, heads // 3),
        vocab_size=49152,
    )
    device = pick_device(arguments.device)
    model: Any = LlamaForCausalLM(config)
    model.to(device, getattr(torch, arguments.dtype))
    lora = LoraConfig(r=arguments.rank, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    peft_model: Any = get_peft_model(model, lora)
    mean = {key: torch.randn(value.shape) * 0.02 for key, value in AdapterSlots(peft_model).places.items()}
    sigma = {key: torch.full_like(value, 0.01) for key, value in mean.items()}
    return peft_model, Posterior(mean, sigma, {}, peft_model.peft_config["default"].to_dict())


def make_items(count: int, prefix: int, length: int) -> list[EncodedExample]:
    """Make prompts of `prefix` common tokens and `length` ± a third of their own."""
    generator = torch.Generator().manual_seed(1)
    common = torch.randint(3, 40000, (prefix,), generator=generator).tolist()
    items = []
    for _ in range(count):
        own = int(torch.randint(2 * length // 3, 4 * length // 3 + 1, (), generator=generator))
        ids = common + torch.randint(3, 40000, (own,), generator=generator).tolist()
        items.append(EncodedExample(ids, [len(ids) - 1], [0], ((5,), (6,))))
    return items


def seconds(
    *actions: Callable[[], object], repeats: int, clock: Callable[[], float] = time.perf_counter
) -> list[float]:
    """Return the median duration of each action; they take turns, after one run each that does not count."""
    times: list[list[float]] = [[] for _ in actions]
    for turn in range(repeats + 1):
        for action, found in zip(actions, times, strict=True):
            begun = clock()
            action()
            if torch.accelerator.is_available():
                torch.accelerator.synchronize()
            if turn:
                found.append(clock() - begun)
    return [statistics.median(found) for found in times]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--prefix", type=int, default=20, help="tokens that all prompts begin with")
    parser.add_argument("--length", type=int, default=25, help="tokens of a prompt beyond the prefix")
    parser.add_argument("--draws", type=int, default=10)
    parser.add_argument("--per-pass", type=int, nargs="+", default=[2, 5, 10])
    parser.add_argument("--hidden", type=int, default=576)
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    arguments = parser.parse_args()
    model, posterior = build(arguments)
    draws = arguments.draws
    weights = sum(tensor.numel() for tensor in posterior.mean.values())
    total = sum(parameter.numel() for parameter in model.parameters())
    where = torch.cuda.get_device_name() if model.device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    print(
        f"{total / 1e6:.0f} M weights ({arguments.dtype}), {weights / 1e6:.2f} M in the adapter, {where}, "
        f"torch {torch.__version__}, {platform.machine()}, prompts of {arguments.prefix} common "
        f"and about {arguments.length} own tokens, {draws} draws, medians of {arguments.repeats}\n"
    )

    def run(items: list[EncodedExample], row: Variant, per_pass: int = 1) -> Callable[[], object]:
        sampling = Sampling(draws, draws_per_pass=per_pass)
        return lambda: evaluate(model, posterior, items, [row], "choice", sampling)

    heads = [f"{k} per pass" for k in arguments.per_pass]
    print(f"| prompts | one pass (s) | {draws} draws / {draws} passes | " + " | ".join(heads) + " |")
    print("|" + "---:|" * (3 + len(heads)))
    for count in arguments.prompts:
        items = make_items(count, arguments.prefix, arguments.length)
        one, many, *stacked = seconds(
            run(items, MEAN),
            run(items, DRAWN),
            *(run(items, DRAWN, k) for k in arguments.per_pass),
            repeats=arguments.repeats,
        )
        cells = [f"{count}", f"{one:.3f}", f"{many / one / draws:.3f}", *(f"{x / one / draws:.3f}" for x in stacked)]
        print("| " + " | ".join(cells) + " |", flush=True)

    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        base = model.unload()

        def reload() -> None:
            PeftModel.from_pretrained(base, folder).unload()

        [again] = seconds(reload, repeats=arguments.repeats)
        peft_model = PeftModel.from_pretrained(base, folder)
        slots = AdapterSlots(peft_model)

        def write() -> None:
            with slots.loaded(posterior.sample(0, 1)):
                pass

        [written] = seconds(write, repeats=arguments.repeats)
    print(
        f"\nOne draw made, written in place and taken back: {1000 * written:.1f} ms; PEFT loading an adapter folder "
        f"onto the same base: {1000 * again:.1f} ms."
    )


if __name__ == "__main__":
    main()
