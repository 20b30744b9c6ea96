"""Answers from OpenAI-compatible servers that serve the members of an ensemble: vLLM, which scales past one machine.

Every server has every member. A request for one member is passed on; for the answer of all members each is asked, and
`mixture` chooses.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import secrets
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ...decisions.rule import DecisionRule
from ...generation.endpoint import together
from ...generation.scoring import TOP, Row, label_logprobs, read_rows, scoring_request
from ...generation.utilities import UTILITIES, AnswerExtractor
from ...noise import generator
from ..api.answers import AnswerDelta, Token, certainty, certainty_of
from ..api.backend import AnswerStream, Backend, Deltas, Limits, queue_full
from ..api.prompts import PromptReader, TokenizedPrompt
from ..api.protocol import ApiError, ChatRequest, Request
from .mixture import Candidate, by_risk, by_score, unique
from .responses import read_candidates, read_prompt_ids, read_text, read_tokens
from .upstream import UpstreamPool, broken_off, malformed_as_502


@dataclass(frozen=True)
class Combining:
    """How the members are asked, and how one of their answers is chosen."""

    combine: str = "exact"  # "rescore" (`mixture.by_score`), or the utility of `mixture.by_risk`
    answer_regex: str | None = None  # of that utility (`generation.utilities`)
    candidates: int = 4  # the number of answers of each member
    concurrency: int = 256  # requests at a time to each server


class Proxy(Backend):
    """Answers from the servers of a pool; `name` is that of the answer of all members, or of the mean.

    Args:
        members: the names of the members there: "mean" for the mean, the others are draws.
        rule: the softmax temperature of the draws' agreement, or of choices, and the threshold of the confidence.
        mean_rule: that of the mean, if it answers as `name`. Texts have the probabilities of the servers there, at a
            softmax temperature of 1.
    """

    def __init__(
        self,
        pool: UpstreamPool,
        name: str,
        members: Sequence[str],
        combining: Combining,
        rule: DecisionRule,
        limits: Limits,
        prompts: PromptReader,
        mean_rule: DecisionRule | None = None,
    ) -> None:
        super().__init__(prompts, limits)
        self._pool = pool
        self._candidates, self._threshold = combining.candidates, rule.threshold
        # Chooses n of the candidates of all members; None: by their scores.
        self._choose: Callable[[Sequence[Candidate], int], list[AnswerDelta]] | None = None
        if combining.combine != "rescore":
            answers = AnswerExtractor(combining.answer_regex)
            utility = UTILITIES[combining.combine](answers)
            self._choose = functools.partial(by_risk, utility=utility, answers=answers, rule=rule)
        self._draws = [member for member in members if member != "mean"]
        # By served name the member; None: all draws.
        self.models: dict[str, str | None] = {name: None if mean_rule is None else "mean"}
        if "mean" in members:
            self.models[f"{name}:mean"] = "mean"
        self.models[f"{name}:posterior"] = None
        self.models |= {f"{name}:member-{number:04d}": member for number, member in enumerate(self._draws)}
        over_draws = rule if rule.score == "probability" else DecisionRule()  # of choices
        self._plain = DecisionRule(by_length=over_draws.by_length)
        self._rules = {name: mean_rule or over_draws, f"{name}:posterior": over_draws}
        expected = self._rules[name].mean_confidence
        self._expected = {} if expected is None else {"confidence_expected": expected}
        if mean_rule is not None:
            self._rules[f"{name}:mean"] = mean_rule
        self._running = 0

    def gauges(self) -> Mapping[str, float]:
        return {"running": self._running, "upstreams_well": self._pool.well, **self._expected}

    async def close(self) -> None:
        await self._pool.close()

    async def answer(self, request: Request) -> AnswerStream:
        if self._running >= self.limits.max_queue:
            raise queue_full(f"{self._running} requests are running")
        self.limits.check(request)
        if request.fields:
            message = "this is not supported in front of other servers; serve the adapter from memory"
            raise ApiError(400, message, param="response_format", code="unsupported_parameter")
        answers = AnswerStream(0, len(request.prompts) * request.n)
        seed = secrets.randbits(31) if request.seed is None else request.seed
        if request.labels:
            prompts = await self.prompts.read(request)
            answers.prompt_tokens = sum(len(prompt.ids) for prompt in prompts)
            parts = [self._choice(request, prompt, seed + number) for number, prompt in enumerate(prompts)]
        else:
            asked = enumerate(request.prompts)
            parts = [self._text(request, prompt, seed + number, answers) for number, prompt in asked]
        answers.deltas = self._in_turn(parts, request.n)
        return answers

    async def _in_turn(self, parts: Sequence[Deltas], n: int) -> Deltas:
        """Yield the n answers to each prompt, one prompt after the other."""
        self._running += 1
        try:
            for number, deltas in enumerate(parts):
                async with contextlib.aclosing(deltas):
                    async for delta in deltas:
                        yield delta._replace(number=number * n + delta.number)
        finally:
            self._running -= 1

    def _text(self, request: Request, prompt: Any, seed: int, answers: AnswerStream) -> Deltas:
        """Return the answers to one prompt without choices."""
        member = self.models[request.model]
        top = 1 if member is None else TOP
        body = {"temperature": request.temperature, "top_p": request.top_p, request.prompt_field: prompt}
        body |= {"max_tokens": self.limits.most_tokens(request), "stop": request.stop or None}
        if isinstance(request, ChatRequest):
            body |= {"logprobs": True, "top_logprobs": top, "chat_template_kwargs": request.chat_template_kwargs}
        else:
            body["logprobs"] = top
        body = {name: value for name, value in body.items() if value is not None}
        if member is None:
            return self._mixture(request, body, seed, answers)
        body |= {"model": member, "n": request.n, "seed": seed, "stream": request.stream}
        return self._member(request, body, answers)

    async def _choice(self, request: Request, prompt: TokenizedPrompt, seed: int) -> Deltas:
        """Yield the answers to a prompt with choices, from the probability of every choice under each member."""
        member = self.models[request.model]
        rule = self._rules.get(request.model, self._plain)
        models = self._draws if member is None else [member]
        asks = [functools.partial(self._rows, model) for model in models]
        scores = await together([label_logprobs(ask, *prompt, by_length=rule.by_length) for ask in asks])
        for delta in await asyncio.to_thread(_chosen, scores, request, prompt, seed, rule):
            yield delta

    async def _rows(self, model: str, ids: Sequence[int]) -> list[Row]:
        response = await self._pool.post("completions", scoring_request(model, ids))
        with malformed_as_502():
            if (rows := response["choices"][0].get("prompt_logprobs")) is None:
                raise ApiError(502, "the servers behind this one return no prompt_logprobs; use vLLM")
            return read_rows(rows, ids)

    async def _member(self, request: Request, body: dict[str, Any], answers: AnswerStream) -> Deltas:
        answered: list[list[Token]] = [[] for _ in range(request.n)]
        unfinished = request.n
        threshold = self._rules.get(request.model, self._plain).threshold

        def read_delta(choice: Mapping[str, Any]) -> AnswerDelta:
            index, tokens = int(choice["index"]), read_tokens(choice.get("logprobs"), request.top or 0)
            answered[index] += tokens
            finish, ivon = choice.get("finish_reason"), None
            if finish is not None:
                known = certainty_of(answered[index], 1, threshold) if answered[index] else None
                ivon = known or certainty(None, None, 0.0, 1)
            return AnswerDelta(index, read_text(choice), tuple(tokens), finish, ivon, len(tokens))

        async with contextlib.aclosing(self._events(request, body)) as events:
            async for event in events:
                with malformed_as_502():
                    if not request.stream or (event.get("usage") and not event["choices"]):
                        answers.prompt_tokens += int(event["usage"]["prompt_tokens"])
                        answers.generated = (answers.generated or 0) + int(event["usage"]["completion_tokens"])
                    deltas = [read_delta(choice) for choice in event["choices"]]
                    unfinished -= sum(delta.finish is not None for delta in deltas)
                for delta in deltas:
                    yield delta
        if unfinished > 0:
            raise broken_off()

    async def _events(self, request: Request, body: dict[str, Any]) -> AsyncGenerator[dict[str, Any], None]:
        """Yield the events of a stream, or the one response without.

        vLLM refuses a max_tokens that does not fit beside the prompt. Where a chat names none, it is asked again
        without: then the answer ends where the model does, and that is before the limit of this server.
        """
        try:
            async with contextlib.aclosing(self._sent(request.path, body)) as events:
                async for event in events:
                    yield event
        except ApiError as refusal:
            if refusal.status != 400 or request.max_tokens is not None or not isinstance(request, ChatRequest):
                raise
            body = {name: value for name, value in body.items() if name != "max_tokens"}
            async with contextlib.aclosing(self._sent(request.path, body)) as events:
                async for event in events:
                    yield event

    async def _sent(self, path: str, body: dict[str, Any]) -> AsyncGenerator[dict[str, Any], None]:
        if not body.get("stream"):
            yield await self._pool.post(path, body)
            return
        body = {**body, "stream_options": {"include_usage": True}}
        async with contextlib.aclosing(self._pool.events(path, body)) as events:
            async for event in events:
                yield event

    async def _response(self, request: Request, body: dict[str, Any]) -> dict[str, Any]:
        """Return the one response to a body without a stream."""
        [response] = [event async for event in self._events(request, body)]
        return response

    async def _mixture(self, request: Request, body: dict[str, Any], seed: int, answers: AnswerStream) -> Deltas:
        """Yield the chosen answers, whole."""
        body["n"] = self._candidates if request.temperature else 1
        if not self._choose:
            body["return_token_ids"] = True
        posts = []
        for number, member in enumerate(self._draws):
            own = int(generator("serve", seed, number).bit_generator.random_raw() >> 33)
            posts.append(self._response(request, {**body, "model": member, "seed": own}))
        responses = await together(posts)
        with malformed_as_502():
            answers.prompt_tokens += int(responses[0]["usage"]["prompt_tokens"])
            candidates = [own for number, told in enumerate(responses) for own in read_candidates(told, number)]
            prompt = None if self._choose else read_prompt_ids(responses[0])
        if self._choose:
            # Comparing texts may take a while.
            chosen = await asyncio.to_thread(self._choose, candidates, request.n)
        elif prompt is None or any(candidate.ids is None for candidate in candidates):
            raise ApiError(502, "the servers behind this one return no token ids (return_token_ids); use vLLM ≥ 0.10.2")
        else:
            different = unique(candidates)
            rows = await together([self._rows_of_all(prompt, candidate) for candidate in different])
            chosen = by_score(different, rows, request.n, threshold=self._threshold)
        for delta in chosen:
            yield delta

    async def _rows_of_all(self, prompt: Sequence[int], candidate: Candidate) -> list[list[Row]]:
        """Return of each member the rows in the places of a candidate's tokens."""
        ids = [*prompt, *(candidate.ids or ())]
        return [rows[len(prompt) - 1 :] for rows in await together([self._rows(draw, ids) for draw in self._draws])]


def _chosen(
    scores: Sequence[Sequence[float]], request: Request, prompt: TokenizedPrompt, seed: int, rule: DecisionRule
) -> list[AnswerDelta]:
    """Return the answers to one prompt with choices, of which each member has given log-likelihoods."""
    import torch

    from ..local.engine import GenerationRequest, choose_labels

    drawn = torch.tensor(scores, dtype=torch.float64).softmax(-1)
    own = GenerationRequest(
        request.model, prompt.ids, request.n, temperature=request.temperature, top_p=request.top_p, seed=seed,
        labels=tuple(request.labels), candidates=prompt.candidates,
    )  # fmt: skip
    return choose_labels(drawn, own, rule)
