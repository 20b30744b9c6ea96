"""Rows a second of decisions among labels of several tokens, against a plain transformers loop.

    python -m benchmarks.decisions                     # SmolLM2-135M's shape with random weights, on a CPU
    python -m benchmarks.decisions --labels 77 --tokens 4 --prompts 256 --device cuda --dtype bfloat16

The plain loop runs, for one prompt after the other, all labels in one batch behind the prompt. Both give the same
probabilities, which is checked. Everything runs in turn in one process; figures are medians, on a CPU of its own time,
in which other programs on a busy machine have no part.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from types import SimpleNamespace

import torch
from torch import Tensor

from axolotl_ivon.data.encode import EncodedExample
from axolotl_ivon.evaluation.evaluate import Sampling, evaluate
from axolotl_ivon.metrics.scores import Scores
from axolotl_ivon.models.draws import AdapterSlots

from .evaluation import DRAWN, MEAN, build, make_items, seconds


def make_labels(count: int, tokens: int) -> tuple[tuple[int, ...], ...]:
    """Return labels of up to `tokens` tokens; about three share each beginning."""
    generator = torch.Generator().manual_seed(2)
    if tokens == 1:
        return tuple((5 + number,) for number in range(count))
    labels = []
    for number in range(count):
        begun = [10 + number // 3 + 100 * place for place in range(tokens - 1)]
        keep = int(torch.randint(1, tokens, (), generator=generator))
        labels.append((*begun[:keep], 1000 + number))
    return tuple(labels)


@torch.no_grad()
def plain_loop(model: torch.nn.Module, items: list[EncodedExample], labels: tuple[tuple[int, ...], ...]) -> Tensor:
    """Return the probabilities [prompts, labels] of the weights as they are, one prompt at a time."""
    longest, rows = max(map(len, labels)), []
    tails = torch.tensor([[*label, *[0] * (longest - len(label))] for label in labels])
    real = torch.tensor([[place < len(label) for place in range(longest)] for label in labels])
    for item in items:
        ids = torch.cat([torch.tensor(item.ids).expand(len(labels), -1), tails], 1)
        logits = model(input_ids=ids.to(model.device)).logits[:, len(item.ids) - 1 : -1].float().cpu()  # type: ignore[operator,arg-type,call-overload]
        logs = logits.log_softmax(-1).gather(2, tails[:, :, None])[:, :, 0]
        rows.append((logs * real).sum(1).double().softmax(0))
    return torch.stack(rows)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--labels", type=int, nargs="+", default=[2, 10, 77])
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--draws", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    arguments = parser.parse_args()
    shape = SimpleNamespace(**vars(arguments), hidden=576, layers=30, rank=8)
    model, posterior = build(shape)  # type: ignore[arg-type]
    model.eval()

    def decide(items: list[EncodedExample], draws: int, per_pass: int = 1) -> Callable[[], list[Scores]]:
        sampling = Sampling(draws, draws_per_pass=per_pass, keep=True)
        return lambda: evaluate(model, posterior, items, [DRAWN if draws > 1 else MEAN], "choice", sampling)

    many = arguments.draws
    print(f"| labels | tokens | plain loop (rows/s) | mean | {many} draws | {many} draws in one pass | × mean |")
    print("|---:|---:|---:|---:|---:|---:|---:|")
    for count in arguments.labels:
        for tokens in arguments.tokens:
            labels = make_labels(count, tokens)
            prompts = make_items(arguments.prompts, 20, 25)
            items = [EncodedExample(item.ids, item.positions, [0], labels) for item in prompts]
            [scores] = decide(items, 1)()
            assert scores.probabilities is not None
            with AdapterSlots(model).loaded(dict(posterior.mean)):
                expected = plain_loop(model, items[:2], labels)
                torch.testing.assert_close(
                    scores.probabilities[scores.group.argsort()][:2], expected, rtol=0.05, atol=1e-4
                )
                times = seconds(
                    lambda items=items, labels=labels: plain_loop(model, items, labels),  # type: ignore[misc]
                    decide(items, 1),
                    decide(items, many),
                    decide(items, many, many),
                    repeats=arguments.repeats,
                    clock=time.process_time if model.device.type == "cpu" else time.perf_counter,
                )
            cells = [*(f"{arguments.prompts / each:.2g}" for each in times), f"{times[3] / times[1]:.1f}"]
            print(f"| {count} | {tokens} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
