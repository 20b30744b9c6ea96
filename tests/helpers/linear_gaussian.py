"""A linear model with Gaussian noise of variance 1, whose posterior is known."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from axolotl_ivon.fitting.fisher import Squarer
from axolotl_ivon.models.gradients import ExampleGradients


class Toy:
    """y = W·x + noise: inputs of different sizes, and W that is off its optimum or on it.

    The loss of an example is ½·|y − W·x|², whose Hessian for every row of W is x·xᵀ.
    """

    def __init__(self, examples: int = 200, inputs: int = 6, outputs: int = 3, seed: int = 0) -> None:
        draw = torch.Generator().manual_seed(seed)
        self.x = torch.randn(examples, inputs, generator=draw) * torch.linspace(0.1, 2, inputs)
        self.y = torch.randn(examples, outputs, generator=draw)
        self.model = nn.Linear(inputs, outputs, bias=False)
        self.model.weight.data = torch.randn(outputs, inputs, generator=draw)
        self.parameters = {"w": self.model.weight}
        self.examples = list(range(examples))
        self.hessian = self.x.double().square().mean(0).expand(outputs, -1)  # of the mean loss, diagonal

    def losses(self, signs: torch.Generator | None = None) -> Callable[[Sequence[int]], Tensor]:
        """Return the losses of some examples; with `signs` at labels W·x ± 1, of the model's variance."""

        def losses(some: Sequence[int]) -> Tensor:
            found = self.model(self.x[list(some)])
            if signs is None:
                target = self.y[list(some)]
            else:
                target = found.detach() + 2.0 * torch.randint(0, 2, found.shape, generator=signs) - 1
            return (target - found).square().sum(1) / 2

        return losses

    def squarer(self, gradients: ExampleGradients[int]) -> Squarer[int]:
        return Squarer(gradients, lambda example: 1)
