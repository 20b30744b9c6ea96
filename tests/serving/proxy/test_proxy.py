"""The server in front of others: what it makes of their answers, and what becomes of one that fails."""

from __future__ import annotations

import contextlib
import functools
import json
import math
import operator
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
from openai_server import Server
from openai_server import serving as upstream_serving
from served import ask, official, serving, until

from axolotl_ivon import IVONError, Posterior
from axolotl_ivon.data.encode import ChatFormat
from axolotl_ivon.decisions.rule import DecisionRule
from axolotl_ivon.models.session import Loading
from axolotl_ivon.posterior.sample import EnsemblePlan, sample
from axolotl_ivon.serving.api.backend import Limits
from axolotl_ivon.serving.api.prompts import PromptReader
from axolotl_ivon.serving.proxy import upstream
from axolotl_ivon.serving.proxy.proxy import Combining, Proxy
from axolotl_ivon.serving.proxy.upstream import UpstreamPool
from axolotl_ivon.serving.start import Drawing, local_backend, proxy_backend

MESSAGES: Any = [{"role": "user", "content": "red dog"}]
MEAN: Any = {"model": "ours:mean", "prompt": "red", "max_tokens": 1}
MEMBERS = ["sample-0000", "sample-0001"]
LABELS = ["yes no", "A", "yes"]  # one begins another
Begin = Callable[..., contextlib.AbstractContextManager[str]]


@pytest.fixture(scope="module")
def trained(make_adapter: Callable[..., Path]) -> Path:
    """The tiny adapter, with labels and a system prompt of training in its header."""
    return make_adapter(facts={"choices": json.dumps(LABELS), "system_prompt": "good or bad"})


@pytest.fixture(scope="module")
def ensemble(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("upstream") / "ensemble"
    sample(Posterior.from_pretrained(trained).temper(0.002), folder, EnsemblePlan(2, include_mean=True))
    return folder


@pytest.fixture(scope="module")
def loaded(ensemble: Path, tiny_llama: Path) -> list[Server]:
    return [Server(ensemble, tiny_llama, ["mean", *MEMBERS]) for _ in range(2)]


@pytest.fixture
def upstreams(loaded: list[Server], monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Server]]:
    """Two servers of the same members; slowness is no failure, and one that failed is not looked at again."""
    for name in ("PROBE_INTERVAL", "_CONNECT_TIMEOUT"):
        monkeypatch.setattr(upstream, name, 999.0)
    with contextlib.ExitStack() as stack:
        for server in loaded:
            server.reset()
            stack.enter_context(upstream_serving(server))
        yield loaded


@pytest.fixture
def begin(upstreams: list[Server]) -> Begin:
    """A function that serves the first servers, and chooses by minimum Bayes risk by default."""

    def start(count: int = 2, combine: str = "exact", concurrency: int = 256, limits: Any = None, **rule: Any) -> Any:
        def backend() -> Proxy:
            pool = UpstreamPool([server.url for server in upstreams[:count]], concurrency, timeout=999.0)
            combining, decided = Combining(combine), DecisionRule(**rule)
            prompts = PromptReader(lambda: None, ChatFormat())
            return Proxy(pool, "ours", ["mean", *MEMBERS], combining, decided, limits or Limits(100), prompts)

        return serving(backend)

    return start


@contextlib.contextmanager
def at_once(url: str, count: int, held: Sequence[Server] = (), **body: Any) -> Iterator[None]:
    """Ask for completions in as many threads, let `held` answer nothing inside the block, and wait for the answers."""
    with ThreadPoolExecutor(count) as pool, contextlib.ExitStack() as stack:
        for server in held:
            stack.enter_context(server._one)
        asked = [pool.submit(lambda: list(official(url).completions.create(**body))) for _ in range(count)]
        yield
    for one in asked:
        one.result()


@pytest.mark.parametrize("chat", [True, False])
@pytest.mark.parametrize("model", ["ours:mean", "ours:member-0001"])
def test_a_member_answers_as_it_does_there(begin: Begin, upstreams: list[Server], model: str, chat: bool) -> None:
    there = {"ours:mean": "mean", "ours:member-0001": "sample-0001"}[model]
    asked: Any = {"max_tokens": 6, "n": 2, "seed": 5}
    prompt: Any = {"messages": MESSAGES} if chat else {"prompt": "red"}
    told: Any = prompt | ({"logprobs": True, "top_logprobs": 1} if chat else {"logprobs": 1})
    with begin() as url, official(url) as ours, official(upstreams[0].url) as theirs:
        create = [(own.chat.completions if chat else own.completions).create for own in (ours, theirs)]
        found = create[0](model=model, **told, **asked)
        expected = create[1](model=there, **told, **asked, temperature=1.0)
        chunks = list(create[0](model=model, **told, **asked, stream=True, stream_options={"include_usage": True}))
        bare = create[0](model=model, **prompt, **asked)

    text = operator.attrgetter("message.content" if chat else "text")
    assert [text(c) for c in found.choices] == [text(c) for c in expected.choices] == [text(c) for c in bare.choices]
    assert found.usage == expected.usage == chunks[-1].usage
    assert found.model == chunks[0].model == model
    for number, choice in enumerate(found.choices):
        own = [c.choices[0] for c in chunks if c.choices and c.choices[0].index == number]
        assert "".join((c.delta.content if chat else c.text) or "" for c in own) == text(choice)
        if chat:
            values = [token.logprob for token in expected.choices[number].logprobs.content]
            assert [token.logprob for token in choice.logprobs.content] == pytest.approx(values)
            assert len(choice.logprobs.content[0].top_logprobs) == 1
        else:
            values = expected.choices[number].logprobs.token_logprobs
            assert choice.logprobs.token_logprobs == pytest.approx(values)
        facts = choice.model_extra["ivon"]
        assert facts["confidence"] == pytest.approx(math.exp(sum(values) / len(values)))
        assert (facts["members"], facts["mutual_information"]) == (1, 0)
        assert facts["expected_entropy"] > 0
        assert bare.choices[number].logprobs is None
        assert bare.choices[number].model_extra["ivon"]["confidence"] == pytest.approx(facts["confidence"])


@pytest.mark.parametrize("stream", [False, True])
def test_the_choice_is_among_the_answers_of_all_members(begin: Begin, upstreams: list[Server], stream: bool) -> None:
    with begin() as url:
        body: Any = {"model": "ours", "messages": MESSAGES, "max_tokens": 2, "seed": 3, "stream": stream}
        found = official(url).chat.completions.create(**body)
        chunks = list(found) if stream else []
    asked = [body for server in upstreams for body in server.requests]
    assert sorted(body["model"] for body in asked) == MEMBERS
    assert {body["n"] for body in asked} == {4}
    assert len({body["seed"] for body in asked}) == 2
    answers = [upstreams[0].complete({**body, "stream": False}, True) for body in asked]
    outputs = {choice["message"]["content"] for answer in answers for choice in answer["choices"]}
    text = "".join(c.choices[0].delta.content or "" for c in chunks) if stream else found.choices[0].message.content
    assert text in outputs
    facts = (chunks[-1] if stream else found).model_extra["ivon"]
    assert facts["members"] == 2
    assert 1 / 8 <= facts["confidence"] <= 1


def test_greedy_members_are_asked_for_one_answer(begin: Begin, upstreams: list[Server]) -> None:
    with begin() as url:
        official(url).completions.create(model="ours", prompt=["red", "blue"], max_tokens=2, temperature=0)
    asked = [body for server in upstreams for body in server.requests]
    assert [body["n"] for body in asked] == [1] * 4
    assert sorted(body["prompt"] for body in asked) == ["blue", "blue", "red", "red"]


def test_an_answer_ends_at_the_limit_of_this_server(begin: Begin, upstreams: list[Server]) -> None:
    """Also where the request names none; a text has 16 tokens then, or the limit if that is less."""
    with begin(limits=Limits(max_tokens=8)) as url:
        for model in ("ours", "ours:mean"):
            official(url).chat.completions.create(model=model, messages=MESSAGES)
            official(url).completions.create(model=model, prompt="red")
            official(url).completions.create(model=model, prompt="red", max_tokens=3)
    asked = [body["max_tokens"] for server in upstreams for body in server.requests]
    assert sorted(asked) == [3] * 3 + [8] * 6


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("model", ["ours", "ours:mean"])
def test_a_limit_that_does_not_fit_is_left_to_the_server(
    begin: Begin, upstreams: list[Server], model: str, stream: bool
) -> None:
    """vLLM refuses a prompt whose max_tokens is more than the room that is left; nobody has asked for that number."""
    for server in upstreams:
        server.failures = [400]
    servers = 2 if model == "ours" else 1
    with begin(servers) as url:
        assert list(official(url).chat.completions.create(model=model, messages=MESSAGES, stream=stream))
        asked = [body.get("max_tokens") for server in upstreams for body in server.requests]
        assert (asked.count(2048), asked.count(None)) == (servers, servers)
        for server in upstreams:
            server.failures = [400]
        with pytest.raises(openai.BadRequestError, match="not now"):
            official(url).chat.completions.create(model=model, messages=MESSAGES, max_tokens=4)


def test_the_confidence_to_expect_is_that_of_who_answers(ensemble: Path, upstreams: list[Server]) -> None:
    own = functools.partial(proxy_backend, str(ensemble), [upstreams[0].url])
    drawn, mean = DecisionRule(mean_confidence=0.8), DecisionRule(mean_confidence=0.9)
    agreed = DecisionRule(mean_confidence=0.8, score="agreement")
    for rule, mean_rule, expected in ((drawn, None, 0.8), (drawn, mean, 0.9), (agreed, None, None)):
        gauges = own(rule, Limits(), Combining(), mean_rule=mean_rule).gauges()
        assert gauges.get("confidence_expected") == expected


def test_a_schema_is_refused(begin: Begin) -> None:
    schema: Any = {"name": "x", "schema": {"type": "object", "properties": {"urgent": {"type": "boolean"}}}}
    asked: Any = {"messages": MESSAGES, "response_format": {"type": "json_schema", "json_schema": schema}}
    with begin() as url, pytest.raises(openai.BadRequestError, match="serve the adapter from memory"):
        official(url).chat.completions.create(model="ours", **asked)


@pytest.mark.parametrize("mean_rule", [None, DecisionRule(temperature=0.7, threshold=0.9)])
def test_choices_are_those_of_the_members_in_memory(
    ensemble: Path, upstreams: list[Server], tiny_llama: Path, trained: Path, mean_rule: DecisionRule | None
) -> None:
    """Held against the probabilities that the local server gives, draw by draw; the mean answers by a rule of its own.

    There draws abstain by no threshold, as it is the mean's.
    """
    rule = DecisionRule(temperature=1.5, threshold=None if mean_rule else 0.4)
    names: Any = {"name": "x", "mean_rule": mean_rule}
    urls = [server.url for server in upstreams]
    drawing = Drawing(str(trained), 2, tau=0.002)
    chat: Any = {"messages": MESSAGES, "temperature": 0, "extra_body": {"structured_outputs": {"choice": LABELS}}}
    text: Any = {"prompt": "red dog ", "seed": 3, "n": 2, "extra_body": {"guided_choice": LABELS}}
    classify: Any = {"model": "x", "input": ["red dog", "sun"]}
    documents = []
    with (
        serving(lambda: proxy_backend(str(ensemble), urls, rule, Limits(), Combining(), **names)) as one,
        serving(lambda: local_backend(drawing, rule, Limits(), Loading(), **names)) as other,
    ):
        for url in (one, other):
            own = official(url)
            models = ("x", "x:mean", "x:posterior", "x:member-0001")
            answers = [own.chat.completions.create(model=model, **chat) for model in models]
            texts = own.completions.create(model="x", **text)
            chosen = [answer.choices[0].message.content for answer in answers] + [c.text for c in texts.choices]
            told: list[Any] = [answer.model_extra["ivon"] for answer in answers]
            told += [choice.model_extra["ivon"] for choice in texts.choices]
            classified = ask(url, "/classify", classify)[2]
            assert [row["labels"] for row in classified["data"]] == [LABELS] * 2
            assert [*told[0]["choices"].values()] == pytest.approx(classified["data"][0]["probs"])
            told += [row["ivon"] | {"choices": row["probs"]} for row in classified["data"]]
            documents.append((chosen, told, [row["label"] for row in classified["data"]], classified["usage"]))
    (chosen, told, labels, usage), (chosen_here, told_here, labels_here, usage_here) = documents
    assert (chosen, labels, usage) == (chosen_here, labels_here, usage_here)
    for over, here in zip(told, told_here, strict=True):
        pairs = [value.pop("choices") for value in (over, here)]
        values = [pair if isinstance(pair, list) else [pair[label] for label in LABELS] for pair in pairs]
        assert values[0] == pytest.approx(values[1], abs=1e-3)
        assert over == pytest.approx(here, abs=1e-3)


def test_choices_take_prompt_logprobs(ensemble: Path, upstreams: list[Server]) -> None:
    upstreams[0].spoil = lambda answer: {"choices": [{"text": ""}], "usage": answer["usage"]}
    asked: Any = {"messages": MESSAGES, "extra_body": {"guided_choice": LABELS}}
    start = functools.partial(proxy_backend, str(ensemble), [upstreams[0].url], DecisionRule(), Limits(), Combining())
    with serving(start) as url, pytest.raises(openai.InternalServerError, match="return no prompt_logprobs; use vLLM"):
        official(url).chat.completions.create(model="ensemble", **asked)


@pytest.mark.parametrize("chat", [True, False])
def test_rescoring_chooses_by_the_average_probability(begin: Begin, upstreams: list[Server], chat: bool) -> None:
    with begin(combine="rescore", threshold=0.5) as url:
        asked: Any = {"model": "ours", "max_tokens": 3, "seed": 3}
        if chat:
            found: Any = official(url).chat.completions.create(messages=MESSAGES, logprobs=True, **asked)
        else:
            found = official(url).completions.create(prompt="red", **asked)
        text = found.choices[0].message.content if chat else found.choices[0].text
    server = upstreams[0]
    bodies = [body for own in upstreams for body in own.requests]
    outputs = [
        (tuple(c["token_ids"]), c["message"]["content"] if chat else c["text"])
        for body in bodies
        if "prompt_logprobs" not in body
        for c in server.complete({**body}, chat)["choices"]
    ]
    prompt = server._rendered(MESSAGES) if chat else server.tokenizer("red")["input_ids"]

    def average(ids: tuple[int, ...]) -> float:
        """The average probability, one whole pass for each member."""
        values = []
        for member in MEMBERS:
            server.model.set_adapter(member)
            with torch.no_grad():
                rows = server.model(input_ids=torch.tensor([[*prompt, *ids]])).logits[0].double().log_softmax(-1)
            values.append(math.exp(sum(float(rows[len(prompt) + k - 1, id]) for k, id in enumerate(ids))))
        return sum(values) / len(values)

    best = max(outputs, key=lambda output: average(output[0]))
    assert text == best[1]
    facts = found.model_extra["ivon"]
    assert (facts["members"], facts["abstain"]) == (2, True)
    if server.tokenizer.eos_token_id not in best[0]:
        assert facts["confidence"] == pytest.approx(average(best[0]) ** (1 / len(best[0])), rel=1e-3)
    if chat:
        tokens = found.choices[0].logprobs.content
        shown = best[0][:-1] if best[0][-1] == server.tokenizer.eos_token_id else best[0]
        assert len(tokens) == len(facts["tokens"]) == len(shown)
        firsts = [average(shown[:1]), math.exp(tokens[0].logprob), facts["tokens"][0]["probability"]]
        assert firsts == pytest.approx([firsts[0]] * 3, rel=1e-3)
    assert 0 <= facts["mutual_information"] < 0.1
    assert facts["expected_entropy"] > 0
    assert sum("prompt_logprobs" in body for body in bodies) == 2 * len({ids for ids, _ in outputs})


@pytest.mark.parametrize(
    ("failure", "stream"), [(0, False), (-1, False), (500, False), (503, False), (0, True), (500, True)]
)
def test_another_takes_over(begin: Begin, upstreams: list[Server], failure: int, stream: bool) -> None:
    asked: Any = {**MEAN, "max_tokens": 3, "seed": 1}
    with begin() as url:
        expected = official(url).completions.create(**asked).choices[0].text
        for server in upstreams:
            server.requests.clear()
        upstreams[0].failures = [failure] * 9
        for _ in range(3):
            found = official(url).completions.create(**asked, stream=stream)
            assert "".join(part.choices[0].text for part in (found if stream else [found])) == expected
        assert len(upstreams[0].requests) == (1 if failure else 2)  # it is left out from then on
        assert "ivon_upstreams_well 1.0" in ask(url, "/metrics")[2]


def test_one_that_recovers_is_asked(begin: Begin, upstreams: list[Server], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upstream, "PROBE_INTERVAL", 0.05)
    with begin() as url:
        upstreams[0].failures = [500]
        official(url).completions.create(**MEAN)
        until(lambda: "ivon_upstreams_well 2.0" in ask(url, "/metrics")[2])
        official(url).completions.create(**MEAN)
        assert len(upstreams[0].requests) == 2


def test_a_kept_connection_that_was_closed_is_no_failure(begin: Begin, upstreams: list[Server]) -> None:
    with begin(1) as url:
        official(url).completions.create(**MEAN)
        upstreams[0].failures = [0]
        assert official(url).completions.create(**MEAN).choices
        assert "ivon_upstreams_well 1.0" in ask(url, "/metrics")[2]


def test_when_all_fail_there_is_one_clear_error(begin: Begin, upstreams: list[Server]) -> None:
    with begin() as url:
        for server in upstreams:
            server.failures = [0] * 20
        for model in ("ours", "ours:mean"):
            with pytest.raises(openai.InternalServerError, match="none of the servers behind this one ans") as raised:
                official(url).chat.completions.create(model=model, messages=MESSAGES)
            assert raised.value.status_code == 502
        for server in upstreams:
            server.failures = []
        assert official(url).chat.completions.create(model="ours", messages=MESSAGES, max_tokens=2).choices  # at once


def test_a_stream_that_breaks_says_so(begin: Begin, upstreams: list[Server]) -> None:
    for server in upstreams:
        server.dies_after = 1
    with begin() as url, pytest.raises(openai.APIError, match="stopped in the middle of its answer"):
        list(official(url).completions.create(**{**MEAN, "max_tokens": 4, "stream": True}))


def test_a_request_goes_to_the_one_with_the_fewest(begin: Begin, upstreams: list[Server]) -> None:
    with begin() as url, at_once(url, 2, upstreams[:1], **MEAN):
        until(lambda: len(upstreams[1].requests) == len(upstreams[0].requests) == 1)
        official(url).completions.create(**MEAN)
        assert len(upstreams[1].requests) == 2


@pytest.mark.parametrize("stream", [False, True])
def test_a_server_gets_no_more_requests_than_it_takes(begin: Begin, upstreams: list[Server], stream: bool) -> None:
    with begin(combine="rescore", concurrency=1) as url:
        for server in upstreams:
            server.most = 0
        for model in ("ours", "ours:mean"):
            with at_once(url, 3, model=model, prompt="red", max_tokens=2, stream=stream):
                pass
        assert [server.most for server in upstreams] == [1, 1]


@pytest.mark.parametrize(
    ("status", "kind", "message", "requests"),
    [
        (400, openai.BadRequestError, "not now", 1),
        (429, openai.RateLimitError, "the servers behind this one are busy", 2),  # both are tried
        (401, openai.InternalServerError, r"refuses the request \(status 401\)", 1),
    ],
)
def test_what_the_upstream_refuses_is_told(
    begin: Begin, upstreams: list[Server], status: int, kind: Any, message: str, requests: int
) -> None:
    for server in upstreams:
        server.failures = [status]
    with begin() as url:
        with pytest.raises(kind, match=message):
            official(url).completions.create(**MEAN)
        assert sum(len(server.requests) for server in upstreams) == requests
        assert "ivon_upstreams_well 2.0" in ask(url, "/metrics")[2]


@pytest.mark.parametrize("spoilt", [[], {}, {"choices": 5, "usage": {}}, {"choices": [{"text": 5}]}, "no"])
def test_nonsense_is_one_clear_error(begin: Begin, upstreams: list[Server], spoilt: Any) -> None:
    for server in upstreams:
        server.spoil = lambda answer: spoilt
    for combine in ("exact", "rescore"):
        with begin(combine=combine) as url:
            for model in ("ours", "ours:mean"):
                with pytest.raises(openai.InternalServerError, match="does not answer as OpenAI's interface does"):
                    official(url).completions.create(**{**MEAN, "model": model})


def test_rescoring_needs_token_ids(begin: Begin, upstreams: list[Server]) -> None:
    for server in upstreams:
        server.spoil = lambda answer: json.loads(json.dumps(answer).replace("token_ids", "ids"))
    with begin(combine="rescore") as url, pytest.raises(openai.InternalServerError, match="return no token ids"):
        official(url).completions.create(model="ours", prompt="red", max_tokens=1)


def test_too_many_requests_are_refused(begin: Begin, upstreams: list[Server]) -> None:
    with begin(limits=Limits(1)) as url:
        with at_once(url, 1, upstreams, **MEAN):
            until(lambda: "ivon_running 1.0" in ask(url, "/metrics")[2])
            with pytest.raises(openai.RateLimitError, match="1 requests are running already"):
                official(url).completions.create(**MEAN)
        with pytest.raises(openai.BadRequestError, match="at most 2048"):
            official(url).completions.create(**{**MEAN, "max_tokens": 5000})


def test_the_ensemble_names_members(ensemble: Path, upstreams: list[Server], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "theirs")
    folder, urls = str(ensemble), [upstreams[0].url, f"{upstreams[1].url}/v1/"]
    with serving(lambda: proxy_backend(folder, urls, DecisionRule(), Limits(), Combining(candidates=2))) as url:
        names = [model.id for model in official(url).models.list()]
        assert names == [f"ensemble{of}" for of in ("", ":mean", ":posterior", ":member-0000", ":member-0001")]
        official(url).completions.create(model="ensemble", prompt="red", max_tokens=1)
    assert {headers["Authorization"] for server in upstreams for headers in server.headers} == {"Bearer theirs"}
    assert [len(server.requests) for server in upstreams] == [1, 1]
    one = proxy_backend(folder, urls, DecisionRule(), Limits(), Combining("rescore"), samples=1, name="x")
    assert list(one.models) == ["x", "x:mean", "x:posterior", "x:member-0000"]


def test_a_server_lacking_a_member(ensemble: Path, upstreams: list[Server], monkeypatch: pytest.MonkeyPatch) -> None:
    def start(*urls: str, **options: Any) -> None:
        proxy_backend(str(ensemble), urls, DecisionRule(), Limits(), Combining(), **options)

    monkeypatch.setattr(upstreams[1], "members", ["mean", "sample-0000"])
    with pytest.raises(IVONError, match=rf"endpoint {upstreams[1].url} does not serve sample-0001"):
        start(upstreams[0].url, upstreams[1].url)
    with pytest.raises(IVONError, match=r"endpoint http://127\.0\.0\.1:9: no server answers there"):
        start("http://127.0.0.1:9")
    with pytest.raises(IVONError, match="takes 3 draws of 1 outputs"):
        start(upstreams[0].url, samples=3)


def test_a_mean_that_is_not_there_cannot_answer(trained: Path, tmp_path: Path) -> None:
    sample(Posterior.from_pretrained(trained), tmp_path / "draws", EnsemblePlan(1))
    told: Any = (str(tmp_path / "draws"), ["http://127.0.0.1:9"], DecisionRule(), Limits(), Combining())
    with pytest.raises(IVONError, match=r"the mean is recommended, and .*draws has none; .*, or .*samples"):
        proxy_backend(*told, mean_rule=DecisionRule())


def test_a_recommended_mean_answers_in_one_pass(ensemble: Path, upstreams: list[Server]) -> None:
    asked: Any = {"prompt": "red", "max_tokens": 2, "seed": 1}
    own = functools.partial(proxy_backend, str(ensemble), [upstreams[0].url], DecisionRule(), Limits(), Combining())
    with serving(functools.partial(own, name="x", mean_rule=DecisionRule(threshold=1.0))) as url:
        named, draw = (official(url).completions.create(model=model, **asked) for model in ("x", "x:member-0000"))
    assert [body["model"] for body in upstreams[0].requests] == ["mean", "sample-0000"]
    assert named.model_extra["ivon"]["abstain"] is True  # type: ignore[index]
    assert "abstain" not in draw.model_extra["ivon"]  # type: ignore[index]
