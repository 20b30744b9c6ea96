"""The gradient of every example's own loss, exact, from one backward pass over a batch.

For a linear layer y = W·x the gradient of example n's loss is Σ_t g_nt ⊗ x_nt, over its positions t, with what the
layer got (x) and the gradient of what it gave (g): both are there in any backward pass. So it is for LoRA's A and B,
for saved heads and embeddings, for LoRA on embeddings and the magnitudes of DoRA. A parameter is handed over as soon as
the backward pass is done with it, so that no more than one parameter's gradients are in memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..reporter import SILENT, Reporter
from .batching import collate
from .draws import AdapterSlots
from .forward import forward_parameters, logits_at

if TYPE_CHECKING:
    from peft import PeftModel

    from ..data.encode import EncodedExample

_T = TypeVar("_T")
_MOST = 2**26  # numbers in the gradients that are handed over at once: 256 MiB
_DISAGREES = 0.05  # relative; rounding in bfloat16 is far below, another layout of the batch far above

# It gets the gradients of one parameter: its name, the number of the first example, and [k, *shape] in float32.
Consume = Callable[[str, int, Tensor], None]
# From the gradient of what a module gave, [examples, …], and some of the examples, their gradients of a parameter.
_Rule = Callable[[Tensor, slice], Tensor]


def label_logits(model: PeftModel, items: Sequence[EncodedExample]) -> tuple[Tensor, Tensor, Tensor]:
    """Run the model, as it is and with gradients where they are on, over `items` as one batch padded on the right.

    Returns:
        Of the m scored positions of the examples, in their order: float32 logits [m, classes] (of all tokens, or of the
        labels), the class that is right [m], and the number of the example [m].
    """
    batch = collate(items, model)
    targets = torch.tensor([target for item in items for target in item.targets], device=model.device)
    inputs = {"input_ids": batch.ids, "attention_mask": batch.mask}
    logits = logits_at(model, forward_parameters(model), inputs, batch.row, batch.column)[0]
    return logits.float(), targets, batch.row


# From logits [m, classes] and the classes that are right [m], what is differentiated at each position, [m].
PositionLoss = Callable[[Tensor, Tensor], Tensor]


def negative_log_likelihood(logits: Tensor, targets: Tensor) -> Tensor:
    """Return −log p of each target, in nats."""
    return F.cross_entropy(logits, targets, reduction="none")


def exact_negative_log_likelihood(logits: Tensor, targets: Tensor) -> Tensor:
    """Return −log p of each target, in nats, as softplus(−log-odds).

    A loss of 1e-6, and its gradient, then have all their digits; `softmax − 1` has none there.
    """
    target = targets[:, None]
    others = logits - logits.gather(1, target)
    return F.softplus(others.scatter(1, target, -math.inf).logsumexp(1))


def example_losses(
    model: PeftModel, items: Sequence[EncodedExample], loss: PositionLoss = negative_log_likelihood
) -> Tensor:
    """Return the loss of each example, float32 [examples]: the sum of `loss` over its scored positions.

    Those are the label tokens of a chat, or the one label of a classifier.
    """
    logits, targets, row = label_logits(model, items)
    losses = loss(logits, targets)
    return losses.new_zeros(len(items)).index_add(0, row, losses)


def adapter_parameters(model: PeftModel) -> dict[str, nn.Parameter]:
    """Return the parameters that PEFT trains, by the keys under which it saves them; one that is shared only once."""
    by_parameter: dict[nn.Parameter, str] = {}
    for key, place in AdapterSlots(model).places.items():
        if isinstance(place, nn.Parameter) and place.is_floating_point():
            by_parameter.setdefault(place, key)
    return {key: parameter for parameter, key in by_parameter.items()}


def make_differentiable(model: nn.Module) -> None:
    """Keep nf4 layers on a CPU differentiable; for a model that has not run yet.

    In the first pass without gradients bitsandbytes silently packs their weights for a product that has none.
    Unpacking does not restore the weights.

    Raises:
        RuntimeError: they are packed already.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            if getattr(getattr(module.weight, "quant_state", None), "packing_format_for_cpu", False):
                raise RuntimeError("the model has run without gradients, which packed its nf4 weights: load it anew")
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]


class ExampleGradients(Generic[_T]):
    """Gives the gradients of each example's loss; a context manager, in which the model has hooks.

        with ExampleGradients(model, adapter_parameters(model), functools.partial(example_losses, model)) as gradients:
            for batch in batches:
                losses = gradients(batch, consume)

    The first batch of more than one example tries the hooks on two examples, against autograd. Where a parameter is
    used in a way that the hooks do not know (convolutions, experts, norms), every example is a batch of its own from
    then on, whose gradient is autograd's.

    Args:
        model: it should be in evaluation mode: dropout would differ between the examples.
        parameters: those to differentiate by, by name; inside the context they alone require gradients.
        loss: the loss of each of some examples, [examples], with its graph; `example_losses` is one.
        reporter: notified when examples go one at a time.
    """

    def __init__(
        self,
        model: nn.Module,
        parameters: Mapping[str, nn.Parameter],
        loss: Callable[[Sequence[_T]], Tensor],
        reporter: Reporter = SILENT,
    ) -> None:
        self._model, self._loss, self._reporter = model, loss, reporter
        self._names = {parameter: name for name, parameter in parameters.items()}
        self._hooks: list[Any] = []
        self._required: dict[nn.Parameter, bool] = {}
        self._uses: dict[nn.Parameter, list[tuple[Tensor, _Rule]]] = {}
        self._count = 0  # examples in the batch that runs
        self._finish: Callable[[nn.Parameter], None] = lambda parameter: None
        self._tried = False
        self.one_at_a_time = False

    def __enter__(self) -> ExampleGradients[_T]:
        make_differentiable(self._model)
        self._required = {parameter: parameter.requires_grad for parameter in self._model.parameters()}
        for parameter in self._required:
            parameter.requires_grad_(parameter in self._names)
        for parameter in self._names:
            parameter.grad = None
            self._hooks.append(parameter.register_post_accumulate_grad_hook(lambda p: self._finish(p)))
        for module in self._model.modules():
            # A and B of LoRA on an embedding lie in dictionaries below the module.
            tables = [getattr(module, f"lora_embedding_{letter}", {}) for letter in "AB"]
            own = [*module.parameters(recurse=False), *(p for table in tables for p in table.values())]
            if any(parameter in self._names for parameter in own):
                self._hooks.append(module.register_forward_hook(self._on_forward, with_kwargs=True))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        for parameter, required in self._required.items():
            parameter.requires_grad_(required)

    def __call__(self, examples: Sequence[_T], consume: Consume) -> Tensor:
        """Hand over the gradients of the losses of `examples`, and return the losses, [examples].

        `consume(name, first, gradients)` gets the gradients [k, *shape] of examples first, first + 1, …, float32 on the
        parameter's device. It is called for one parameter after the other, with all examples unless they are very
        large, and may change them. It is not called for a parameter that the loss does not depend on.
        """
        if len(examples) > 1 and not self._tried:
            self.try_on(examples)
        if len(examples) > 1 and not self.one_at_a_time:

            def hand_over(parameter: nn.Parameter) -> None:
                for first, gradients in self._gradients(parameter):
                    consume(self._names[parameter], first, gradients)

            return self._backward(examples, hand_over)

        def alone(first: int) -> Callable[[nn.Parameter], None]:
            def finish(parameter: nn.Parameter) -> None:
                assert parameter.grad is not None
                consume(self._names[parameter], first, parameter.grad[None].float())

            return finish

        return torch.cat([self._backward([example], alone(first)) for first, example in enumerate(examples)])

    def _backward(
        self,
        examples: Sequence[_T],
        finish: Callable[[nn.Parameter], None],
        first: Callable[[Tensor], None] = lambda losses: None,
    ) -> Tensor:
        def finish_and_drop(parameter: nn.Parameter) -> None:
            finish(parameter)
            parameter.grad = None
            self._uses.pop(parameter, None)

        self._count, self._finish = len(examples), finish_and_drop
        try:
            with torch.enable_grad():
                losses = self._loss(examples)
                first(losses)
                losses.sum().backward()
        finally:
            self._uses.clear()
            self._finish = lambda parameter: None
            for parameter in self._names:
                parameter.grad = None
        return losses.detach()

    def _gradients(self, parameter: nn.Parameter) -> Iterator[tuple[int, Tensor]]:
        size = max(1, _MOST // parameter.numel())
        for first in range(0, self._count, size):
            part = slice(first, min(first + size, self._count))
            (gradient, rule), *more = self._uses[parameter]
            total = rule(gradient, part)
            for gradient, rule in more:
                total += rule(gradient, part)
            yield first, total.view(-1, *parameter.shape)

    def _on_forward(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if self._count < 2 or not isinstance(output, Tensor) or not output.requires_grad:
            return
        if len(output) != self._count:
            return  # not one row an example: the trial finds that a use is missing
        rules = _rules(module, args or tuple(kwargs.values()), kwargs, output.detach())

        def on_backward(gradient: Tensor) -> None:
            for parameter, rule in rules.items():
                if parameter in self._names:
                    self._uses.setdefault(parameter, []).append((gradient, rule))

        output.register_hook(on_backward)

    def try_on(self, examples: Sequence[_T]) -> None:
        """Compare the hooks with autograd on two examples: the gradient of the second, and the sum of both.

        The first batch of several examples does it by itself; it calls the loss once more.
        """
        wrong: list[str] = []
        expected: dict[nn.Parameter, Tensor | None] = {}

        def differentiate(losses: Tensor) -> None:
            parameters = list(self._names)
            second = torch.autograd.grad(losses[1], parameters, retain_graph=True, allow_unused=True)
            expected.update(zip(parameters, second, strict=True))
            self._uses.clear()  # of this pass

        def compare(parameter: nn.Parameter) -> None:
            if parameter in self._uses:
                mine, second = torch.cat([some for _, some in self._gradients(parameter)]), expected[parameter]
                assert parameter.grad is not None
                pairs = [
                    (mine.sum(0), parameter.grad),
                    (mine[1], torch.zeros_like(mine[1]) if second is None else second),
                ]
                if all((one - other).norm() <= _DISAGREES * other.float().norm() for one, other in pairs):
                    return
            wrong.append(self._names[parameter])

        self._backward([examples[0], examples[-1]], compare, differentiate)
        self._tried = True  # unless the memory ran out
        if wrong:
            self.one_at_a_time = True
            self._reporter.notify(f"one example at a time: {min(wrong)} is used in a way that needs it")


def _rules(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Tensor) -> dict[Any, _Rule]:
    """Return how the gradients of a module's parameters follow from that of its output; nothing of an unknown one."""
    from peft.tuners.lora import Embedding
    from peft.tuners.lora.dora import DoraLinearLayer

    x = args[0].detach()
    if isinstance(module, nn.Linear):
        rules: dict[Any, _Rule] = {module.weight: lambda g, part: _flat(g, part).transpose(1, 2) @ _flat(x, part)}
        if module.bias is not None:
            rules[module.bias] = lambda g, part: _flat(g, part).sum(1)
        return rules
    if isinstance(module, nn.Embedding):
        return {module.weight: lambda g, part: _scatter(_flat(g, part), x[part], module)}
    if type(module) is DoraLinearLayer and kwargs.get("base_result") is not None:
        # The output is (m/c − 1)·W·x + m/c·s·B·A·x, c being held: its derivative by m is (output + W·x)/m.
        bias, magnitude = kwargs["base_layer"].bias, module.weight
        plain = kwargs["base_result"].detach() - (0 if bias is None else bias.detach())
        return {magnitude: lambda g, part: (_flat(g, part) * _flat(output + plain, part)).sum(1) / magnitude.detach()}
    if isinstance(module, Embedding) and not module.lora_variant and len(module.active_adapters) == 1:
        [name] = module.active_adapters
        a, b = module.lora_embedding_A[name], module.lora_embedding_B[name]
        embed_scale = module._get_embed_scale()
        scale = module.scaling[name] * (1 if embed_scale is None else embed_scale)
        table: Any = module.get_base_layer()
        return {
            a: lambda g, part: _scatter(_flat(g, part) * scale @ b.detach().float(), x[part], table).transpose(1, 2),
            b: lambda g, part: (_flat(g, part) * scale).transpose(1, 2) @ a.detach().float().T[x[part]].flatten(1, -2),
        }
    return {}


def _flat(values: Tensor, part: slice) -> Tensor:
    """Return some examples' values, float32 [k, positions, features]."""
    some = values[part].float()
    return some.reshape(len(some), -1, some.shape[-1])


def _scatter(gradients: Tensor, ids: Tensor, table: nn.Embedding) -> Tensor:
    """Add `gradients` [k, positions, features] up by token: [k, tokens, features]."""
    total = gradients.new_zeros(len(ids), table.num_embeddings, gradients.shape[-1])
    total.scatter_add_(1, ids.flatten(1)[..., None].expand_as(gradients), gradients)
    if table.padding_idx is not None:
        total[:, table.padding_idx] = 0
    return total
