"""What is generated for every prompt: several outputs from draws of the posterior (arXiv 2506.14280, section 4.2).

An engine turns prompts into outputs. `local.TransformersEngine` runs here: one base model in memory, several draws in
one batch over its weights. `endpoint.EndpointEngine` asks an OpenAI-compatible server that serves the draws.
`nbest.NBestFile` holds the results, a line of JSON for each prompt, and goes on where an interrupted run stopped.

An output is determined by the seed, the prompt, the member and the output's number, up to rounding in the model.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from ..data.encode import Prompt
from ..errors import IVONError, param_ref
from ..noise import generator


@dataclass(frozen=True)
class Plan:
    """What is generated for every prompt: `n` outputs, `per_model` from each draw, or all from the mean.

    A value out of range, or an `n` that is no multiple of `per_model` (which the mean ignores), is an IVONError.
    """

    n: int = 32
    per_model: int = 8
    mean: bool = False
    temperature: float = 1.0  # at 0 the most probable token is taken, so all outputs of a member are the same
    top_p: float = 1.0  # tokens are drawn from the smallest set that has this probability
    max_tokens: int = 256  # per output, the one that ends it included
    stop: tuple[str, ...] = ()  # an output ends before the first of these strings
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("n", "per_model", "max_tokens"):
            if getattr(self, name) < 1:
                raise IVONError(f"{param_ref(name)} {getattr(self, name)}: must be at least 1")
        n, per_model, rest = param_ref("n"), param_ref("per_model"), self.n % self.per_model
        if rest and not self.mean:
            fix = f"say {n} {self.n - rest or self.per_model}, or another {per_model}"
            raise IVONError(f"{n} {self.n} is not a multiple of {per_model} {self.per_model}; {fix}")
        if not 0 <= self.temperature < float("inf"):
            given = f"{param_ref('temperature')} {self.temperature}"
            raise IVONError(f"{given}: must be at least 0; 0 is greedy, 1 the model itself")
        if not 0 < self.top_p <= 1:
            given = f"{param_ref('top_p')} {self.top_p}"
            raise IVONError(f"{given}: must be above 0 and at most 1; 1 draws from all tokens")
        if "" in self.stop:
            raise IVONError(f"{param_ref('stop')} '': an empty string would stop every output at once; leave it out")

    @property
    def members(self) -> int:
        """How many models generate."""
        return 1 if self.mean else self.n // self.per_model

    @property
    def per_member(self) -> int:
        """How many outputs each of them gives."""
        return self.n if self.mean else self.per_model

    @property
    def distinct(self) -> int:
        """How many outputs of one member have to be generated: greedy ones are all the same."""
        return self.per_member if self.temperature else 1


class Output(NamedTuple):
    """One generated text.

    Its log-probability is the sum, in nats, over all generated tokens, the one that ended the output included, under
    its member: at temperature 1 and without top-p, whatever they were drawn with. None if a server does not return it.
    """

    text: str
    member: int  # the number of the draw; 0 for the mean
    logprob: float | None
    tokens: int  # the number of generated tokens


class Engine(Protocol):
    """Generates the outputs of a plan."""

    def outputs(self, prompts: Sequence[Prompt], start: int = 0) -> Iterator[list[Output]]:
        """Yield the plan's n outputs, member by member, for each of `prompts[start:]`, in their order."""


def random_bits(plan: Plan, prompt: Prompt, member: int, *more: object) -> Any:
    """Return numpy's bit generator for one prompt and member (and output, say)."""
    return generator("generate", plan.seed, prompt.text, member, *more).bit_generator
