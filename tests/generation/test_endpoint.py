"""An ensemble's folder, the command line that serves it, and generation on a real HTTP server that does."""

from __future__ import annotations

import asyncio
import gc
import json
import shlex
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import Cli
from openai_server import MEMBERS, Server
from peft import PeftModel
from pipeline import Pipeline
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from axolotl_ivon import IVONError, Posterior
from axolotl_ivon.data.chats import read_chats
from axolotl_ivon.data.encode import Prompt, render
from axolotl_ivon.generation import endpoint
from axolotl_ivon.generation.endpoint import EndpointEngine
from axolotl_ivon.generation.ensemble import Ensemble, served_rank
from axolotl_ivon.generation.local import TransformersEngine
from axolotl_ivon.generation.plan import Output, Plan
from axolotl_ivon.models.session import Session, load_tokenizer
from axolotl_ivon.posterior.sample import EnsemblePlan, sample

GREEDY = Plan(n=6, per_model=2, temperature=0, max_tokens=8)
SAMPLED = Plan(n=6, per_model=2, max_tokens=8)


@pytest.fixture(scope="module")
def ensemble(tiny_adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("served") / "ensemble"
    posterior = Posterior.from_pretrained(tiny_adapter)
    assert sample(posterior, folder, EnsemblePlan(3, include_mean=True)) == MEMBERS
    return folder


@pytest.fixture(scope="module")
def prompts(pipeline: Pipeline, tiny_llama: Path) -> list[Prompt]:
    return render(load_tokenizer(pipeline.adapter, str(tiny_llama)), read_chats(pipeline.chats, 4))


def engine(server: Server, plan: Plan, **options: Any) -> EndpointEngine:
    return EndpointEngine(server.url, MEMBERS[1 : 1 + plan.members], plan, **options)


def test_an_ensemble_with_too_few_members(tiny_adapter: Path, tmp_path: Path) -> None:
    sample(Posterior.from_pretrained(tiny_adapter), tmp_path / "e", EnsemblePlan(3))
    with pytest.raises(IVONError, match="--include-mean"):
        Ensemble(tmp_path / "e").members(Plan(mean=True))
    with pytest.raises(IVONError, match=r"n 32 takes 4 draws of 8 outputs; .* say n 24, or draw more"):
        Ensemble(tmp_path / "e").members(Plan())


def test_sample_writes_serve_sh(ivon_post: Cli, tiny_adapter: Path, tiny_llama: Path, tmp_path: Path) -> None:
    folder = tmp_path / "en semble"
    options = ["-n", 2, "--include-mean", "--serve", "vllm", "-o", folder]
    found = ivon_post.json("sample", tiny_adapter, *options)
    words = shlex.split(found["serve"])
    assert words == [
        *("vllm", "serve", str(tiny_llama.resolve()), "--enable-lora", "--max-lora-rank", "8", "--max-loras", "3"),
        *("--generation-config", "vllm", "--lora-modules"),
        *(f"{name}={folder.resolve() / name}" for name in MEMBERS[:3]),
    ]
    # Run with a `vllm` that prints its arguments.
    fake = tmp_path / "bin" / "vllm"
    fake.parent.mkdir()
    fake.write_text('#!/bin/sh\nprintf "%s\\n" vllm "$@"\n')
    fake.chmod(0o755)
    environment = {"PATH": f"{fake.parent}:{Path(shutil.which('sh') or '/bin/sh').parent}:/usr/bin:/bin"}
    printed = subprocess.run(
        ["sh", found["serve_script"], "--port", "8001"], env=environment, capture_output=True, text=True, check=True
    )
    assert printed.stdout.splitlines() == [*words, "--port", "8001"]
    lines = ivon_post("sample", tiny_adapter, *options, "--overwrite")
    assert lines.splitlines() == ["3 adapters, seed 0", str(folder), found["serve"], str(folder / "serve.sh")]


def test_what_vllm_does_not_serve_is_refused(ivon_post: Cli, make_adapter: Callable[..., Path], tmp_path: Path) -> None:
    adapter = make_adapter(use_dora=True)
    assert "no adapters with use_dora" in ivon_post.error("sample", adapter, "--serve", "vllm", "-o", tmp_path / "e")
    assert not list(tmp_path.iterdir())


def test_the_rank_is_one_that_vllm_takes() -> None:
    base = {"base_model_name_or_path": "x"}
    ranks = [served_rank({**base, "r": r}) for r in (1, 2, 8, 9, 64, 65, 512)]
    assert ranks == [1, 8, 8, 16, 64, 128, 512]
    for wrong, message in (
        ({"r": 513}, "up to rank 512; this one has 513"),
        ({"bias": "all"}, "bias 'all'"),
        ({"modules_to_save": ["lm_head"]}, "serves no adapters with modules_to_save"),
        ({"layer_replication": [[0, 2]]}, "serves no adapters with layer_replication"),
        ({"trainable_token_indices": [1]}, "serves no adapters with trainable_token_indices"),
        ({"target_parameters": ["experts.down_proj"]}, "serves no adapters with target_parameters"),
        ({"init_lora_weights": "pissa_niter_4"}, "'pissa_niter_4', which changes the base model; `ivon-post merge`"),
        ({"init_lora_weights": "olora"}, "'olora', which changes the base model"),
        ({"alpha_pattern": {"q_proj": 4}}, "leaves out alpha_pattern; draw with `ivon-post sample --serve vllm`"),
        ({"base_model_name_or_path": None}, "names no base model"),
    ):
        with pytest.raises(IVONError, match=message):
            served_rank({**base, "r": 8, **wrong})
    with pytest.raises(IVONError, match=r"the tensor model\.embed_tokens\.weight"):  # of a resized vocabulary
        served_rank({**base, "r": 8}, ["x.lora_A.weight", "model.embed_tokens.weight"])


@pytest.mark.parametrize("rslora", [False, True])
def test_what_vllm_scales_by_one_number_is_the_update_that_peft_makes(
    rslora: bool, ivon_post: Cli, make_adapter: Callable[..., Path], tiny_llama: Path, tmp_path: Path
) -> None:
    patterns = {"rank_pattern": {"layers.1.self_attn.q_proj": 6, "v_proj": 2}, "alpha_pattern": {"v_proj": 3}}
    adapter, folder = make_adapter(use_rslora=rslora, **patterns), tmp_path / "e"
    ivon_post("sample", adapter, "-n", 1, "--include-mean", "--serve", "vllm", "-o", folder)
    ivon_post("sample", adapter, "-n", 1, "--include-mean", "-o", tmp_path / "as peft")
    base = AutoModelForCausalLM.from_pretrained(tiny_llama).state_dict()
    for name in ("mean", "sample-0000"):
        config = json.loads((folder / name / "adapter_config.json").read_text())
        tensors = load_file(folder / name / "adapter_model.safetensors")
        # As vLLM computes it: one scaling of the configuration, whatever the module.
        assert not any(config[key] for key in ("rank_pattern", "alpha_pattern", "use_rslora"))
        for parent in (folder, tmp_path / "as peft"):
            model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_llama), parent / name)
            merged = model.merge_and_unload().state_dict()
            for key in (key for key in tensors if "lora_A" in key):
                delta = config["lora_alpha"] / config["r"] * tensors[key.replace("lora_A", "lora_B")] @ tensors[key]
                own = key.removeprefix("base_model.model.").replace("lora_A.", "")
                torch.testing.assert_close(merged[own] - base[own], delta, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("plan", [GREEDY, replace(GREEDY, mean=True)], ids=["draws", "mean"])
def test_greedy_equals_the_transformers_engine(
    server: Server, tiny_adapter: Path, tiny_llama: Path, ensemble: Path, prompts: list[Prompt], plan: Plan
) -> None:
    found = list(EndpointEngine(f"{server.url}/v1/", Ensemble(ensemble).members(plan), plan).outputs(prompts))
    posterior = Posterior.from_pretrained(tiny_adapter)
    local = TransformersEngine(Session.open(posterior), posterior, plan)
    for one, other in zip(found, local.outputs(prompts), strict=True):
        assert [(o.text, o.member, o.tokens) for o in one] == [(o.text, o.member, o.tokens) for o in other]
        assert [o.logprob for o in one] == pytest.approx([o.logprob for o in other], abs=1e-3)


def test_a_request_asks_one_member_for_all_its_outputs(server: Server, prompts: list[Prompt]) -> None:
    plan = replace(SAMPLED, temperature=0.5, top_p=0.9, stop=("x",))
    list(engine(server, plan).outputs(prompts))
    assert len(server.requests) == len(prompts) * plan.members
    for request in server.requests:
        wanted = {"n": 2, "temperature": 0.5, "top_p": 0.9, "max_tokens": 8, "stop": ["x"], "logprobs": 1}
        assert {key: request[key] for key in wanted} == wanted
    asked = {(request["model"], tuple(request["prompt"])) for request in server.requests}
    assert asked == {(name, tuple(prompt.ids)) for name in MEMBERS[1:] for prompt in prompts}
    assert len({request["seed"] for request in server.requests}) == len(server.requests)


def test_the_same_seed_gives_the_same_whatever_ran_at_a_time(server: Server, prompts: list[Prompt]) -> None:
    whole = list(engine(server, SAMPLED, concurrency=8).outputs(prompts))
    assert server.most > 1
    server.most = 0
    assert list(engine(server, SAMPLED, concurrency=1).outputs(prompts, 2)) == whole[2:]
    assert server.most == 1
    assert list(engine(server, replace(SAMPLED, seed=1)).outputs(prompts)) != whole


def test_passing_failures_are_repeated(server: Server, prompts: list[Prompt]) -> None:
    whole = list(engine(server, SAMPLED).outputs(prompts[:1]))
    server.requests.clear()
    server.failures = [503, 429, 0, 500]
    assert list(engine(server, SAMPLED).outputs(prompts[:1])) == whole
    assert len(server.requests) == 3 + 4


def test_lasting_failures_end_the_run(server: Server, prompts: list[Prompt], caplog: pytest.LogCaptureFixture) -> None:
    server.failures = [400] * 99
    with pytest.raises(IVONError, match=r"/v1/completions answers 400: not now") as error:
        list(engine(server, SAMPLED).outputs(prompts))
    assert "\n" not in str(error.value)
    gc.collect()
    assert "never retrieved" not in caplog.text  # of the others that failed at the same time
    server.requests.clear()
    server.failures = [503] * 99
    with pytest.raises(IVONError, match=r"6 attempts failed, the last with .* answers 503: not now; what is done"):
        list(engine(server, SAMPLED, concurrency=1).outputs(prompts))
    assert len(server.requests) < 30  # the others were called off


def test_requests_left_are_cancelled(server: Server, prompts: list[Prompt], monkeypatch: pytest.MonkeyPatch) -> None:
    cancelled: list[tuple[Prompt, int]] = []

    async def ask(self: EndpointEngine, client: Any, gate: Any, prompt: Prompt, member: int) -> list[Output]:
        try:
            await asyncio.sleep(0 if prompt is prompts[0] else 60)
        except asyncio.CancelledError:
            cancelled.append((prompt, member))
            raise
        return [Output("", member, None, 0)]

    monkeypatch.setattr(EndpointEngine, "_ask", ask)
    outputs = engine(server, SAMPLED).outputs(prompts)
    next(outputs)
    outputs.close()
    assert cancelled == [(prompt, member) for prompt in prompts[1:] for member in range(3)]


def test_a_slow_server_is_timed_out(server: Server, prompts: list[Prompt], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoint, "_RETRIES", 1)
    server.spoil = lambda answer: time.sleep(0.4) or answer
    with pytest.raises(IVONError, match="attempts failed"):
        next(engine(server, SAMPLED, timeout=0.1).outputs(prompts[:1]))


@pytest.mark.parametrize("answer", [[], {}, {"data": None}, {"data": 7}, {"data": [7]}])
def test_a_malformed_list_of_models_is_refused(server: Server, monkeypatch: pytest.MonkeyPatch, answer: Any) -> None:
    monkeypatch.setattr(server, "models", lambda: answer)
    with pytest.raises(IVONError, match="/v1/models does not answer as OpenAI's interface does"):
        engine(server, SAMPLED)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda answer: [], "does not answer as OpenAI's interface does"),
        (lambda answer: {"choices": [{"text": 1}]}, "does not answer as OpenAI's interface does"),
        (lambda answer: {"choices": [{"text": "", "logprobs": {"token_logprobs": ["x"]}}]}, "does not answer as"),
        (lambda answer: {"choices": answer["choices"][:1]}, "1 outputs where 2 were asked for"),
    ],
)
def test_a_strange_answer_is_told(server: Server, prompts: list[Prompt], spoil: Any, message: str) -> None:
    server.spoil = spoil
    with pytest.raises(IVONError, match=message):
        list(engine(server, SAMPLED).outputs(prompts))


def test_key_sent_and_logprobs_optional(server: Server, prompts: list[Prompt], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "abc")
    server.spoil = lambda answer: {"choices": [{"text": choice["text"]} for choice in answer["choices"]]}
    [found] = engine(server, SAMPLED).outputs(prompts[:1])
    assert [output.logprob for output in found] == [None] * 6
    assert {headers["Authorization"] for headers in server.headers} == {"Bearer abc"}


def test_a_member_that_is_not_served_is_named(server: Server) -> None:
    with pytest.raises(IVONError, match=r"does not serve sample-0009, but base, mean, sample-0000, .* serve\.sh"):
        EndpointEngine(server.url, ["sample-0000", "sample-0009"], SAMPLED)
    with pytest.raises(IVONError, match=r"/nothing/v1/models answers 404"):
        EndpointEngine(f"{server.url}/nothing", ["mean"], SAMPLED)


@pytest.mark.parametrize("url", ["http://127.0.0.1:{port}", "127.0.0.1:{port}", "http://[bad", ""])
def test_an_endpoint_that_does_not_answer_is_one_line(url: str) -> None:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))  # and nobody listens
        with pytest.raises(IVONError, match="no server answers there") as error:
            EndpointEngine(url.format(port=bound.getsockname()[1]), ["mean"], SAMPLED)
    assert error.value.parameter == "endpoint"
    assert "\n" not in str(error.value)


def test_a_missing_package_is_named(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(IVONError, match=r"pip install 'axolotl-ivon\[serve\]'"):
        engine(server, SAMPLED)


def test_generate_asks_it(server: Server, ensemble: Path, pipeline: Pipeline, tmp_path: Path, ivon_post: Cli) -> None:
    options = ["-p", pipeline.chats, "--limit", 4, "-n", 6, "--per-model", 2, "--max-tokens", 8]
    command = ["generate", ensemble, *options, "--endpoint", server.url]
    document = ivon_post.json(*command, "-o", tmp_path / "out.jsonl")
    assert (document["prompts"], document["members"]) == (4, 3)
    line = json.loads((tmp_path / "out.jsonl").read_text().splitlines()[0])
    assert [output["member"] for output in line["outputs"]] == [0, 0, 1, 1, 2, 2]
    mean = ivon_post.json(*command, "--mean", "-o", tmp_path / "mean.jsonl")
    assert mean["members"] == 1
    assert server.requests[-1]["model"] == "mean"
