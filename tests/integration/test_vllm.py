"""vLLM itself on a CPU: it serves an exported ensemble, whose answers and figures are those of the transformers engine.

`make test-vllm` makes an environment with vLLM, names its Python in IVON_VLLM_PYTHON, and prepares SmolLM2.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from command_line import Cli
from tiny import build_lora, with_sigma

from axolotl_ivon import IVONError
from axolotl_ivon.generation.endpoint import EndpointEngine
from axolotl_ivon.generation.plan import Plan

PYTHON = os.environ.get("IVON_VLLM_PYTHON", "")
BASE = Path(__file__).resolve().parents[2] / ".demo" / "SmolLM2-135M-Instruct"
QUESTIONS = [
    "What is the capital of France?",
    "Write one sentence about the sea.",
    "Ana has 7 boxes with 6 cards in each. Ana loses 30 cards. How many are left?",
    "Is a whale a fish?",
]
START = 300  # seconds until the server must be there

pytestmark = pytest.mark.skipif(not PYTHON, reason="IVON_VLLM_PYTHON names no Python with vLLM; see `make test-vllm`")


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random adapter over SmolLM2 that changes its answers, with a σ that makes the draws differ."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("vllm") / "adapter"
    build_lora(BASE, folder, noise=0.02, r=8, lora_alpha=16, init_lora_weights=True)
    return with_sigma(folder, lambda mean: torch.full_like(mean, 0.01))


@pytest.fixture(scope="module")
def served(adapter: Path) -> Iterator[tuple[Path, str]]:
    """(folder of the ensemble, URL of vLLM that serves it, as serve.sh starts it)."""
    folder = adapter.parent / "ensemble"
    Cli()("sample", adapter, "-n", 3, "--include-mean", "--serve", "vllm", "-o", folder)
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        port = held.getsockname()[1]
    here = ["--host", "127.0.0.1", "--enforce-eager", "--dtype", "float32", "--max-model-len", "512"]
    environment = {
        **os.environ,
        "PATH": f"{Path(PYTHON).parent}:{os.environ['PATH']}",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
    }
    log = adapter.parent / "vllm.log"
    with log.open("wb") as output:
        server = subprocess.Popen(
            ["sh", folder / "serve.sh", *here, "--port", str(port)],
            env=environment, stdout=output, stderr=subprocess.STDOUT,
        )  # fmt: skip
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(START):
            try:
                EndpointEngine(url, ["mean"], Plan())
                break
            except IVONError:
                assert server.poll() is None, log.read_text()[-5000:]
                time.sleep(1)
        yield folder, url
    finally:
        server.terminate()
        server.wait(60)


@pytest.mark.parametrize("which", [(), ("--mean",)], ids=["draws", "mean"])
def test_greedy_is_the_same(served: tuple[Path, str], adapter: Path, tmp_path: Path, which: tuple[str, ...]) -> None:
    folder, url = served
    chats = tmp_path / "chats.jsonl"
    chats.write_text("".join(json.dumps({"messages": [{"role": "user", "content": q}]}) + "\n" for q in QUESTIONS))
    options = ["-p", chats, "-n", 3, "--per-model", 1, "--temperature", 0, "--max-tokens", 24, *which]
    run = Cli()
    run("generate", folder, *options, "--endpoint", url, "-o", tmp_path / "vllm.jsonl")
    run("generate", adapter, *options, "-o", tmp_path / "here.jsonl")
    theirs, ours = (
        [json.loads(line)["outputs"] for line in (tmp_path / name).read_text().splitlines()]
        for name in ("vllm.jsonl", "here.jsonl")
    )
    assert [[(o["member"], o["text"]) for o in own] for own in theirs] == [
        [(o["member"], o["text"]) for o in own] for own in ours
    ]
    for one, other in zip(theirs, ours, strict=True):
        assert [o["logprob"] for o in one] == pytest.approx([o["logprob"] for o in other], abs=0.05)
    if not which:
        assert any(len({o["text"] for o in own}) > 1 for own in ours)  # the members differ


@pytest.mark.parametrize("kind", ["choices", "text"])
def test_figures_are_those_in_memory(served: tuple[Path, str], adapter: Path, tmp_path: Path, kind: str) -> None:
    """One request at a time, as below."""
    folder, url = served
    answers = {"choices": ["yes", "no", "yes, often"], "text": ["It is Paris.", "Blue and deep.", "12"]}[kind]
    rows = [{"text": question, "label": answer} for question, answer in zip(QUESTIONS, answers, strict=False)]
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["--data", data, "--task", {"choices": "choice", "text": "generate"}[kind]]
    run = Cli()
    theirs = run.json("eval", folder, *words, "--endpoint", url, "--concurrency", 1)
    ours = run.json("eval", adapter, *words, "-n", 3)
    names = ["accuracy", "nll", *(["brier", "entropy", "mutual_information"] if kind == "choices" else [])]
    assert (
        [row["name"] for row in theirs["rows"]]
        == [row["name"] for row in ours["rows"]]
        == ["base", "mean", "posterior"]
    )
    for one, other in zip(theirs["rows"], ours["rows"], strict=True):
        assert [one[name] for name in names] == pytest.approx([other[name] for name in names], abs=1e-3)


@pytest.mark.parametrize("combine", ["exact", "rescore"])
def test_the_server_in_front_of_it(served: tuple[Path, str], combine: str) -> None:
    """The chat through `serve --endpoint`, held against what vLLM itself gives the same members.

    One request at a time: vLLM 0.32 on a CPU dies of prompt log-probabilities with LoRA beside other requests.
    """
    import openai
    from served import serving

    from axolotl_ivon.decisions.rule import DecisionRule
    from axolotl_ivon.serving.api.backend import Limits
    from axolotl_ivon.serving.proxy.proxy import Combining
    from axolotl_ivon.serving.start import proxy_backend

    folder, url = served
    asked = {"messages": [{"role": "user", "content": QUESTIONS[0]}], "max_tokens": 12, "temperature": 0}
    theirs = openai.OpenAI(base_url=f"{url}/v1", api_key="none")
    combining = Combining(combine, candidates=2, concurrency=1)
    with serving(lambda: proxy_backend(str(folder), [url], DecisionRule(), Limits(), combining)) as here:
        ours = openai.OpenAI(base_url=f"{here}/v1", api_key="none", max_retries=0)
        outputs = []
        for member in range(3):
            found = ours.chat.completions.create(model=f"ensemble:member-{member:04d}", **asked)
            expected = theirs.chat.completions.create(model=f"sample-{member:04d}", **asked, logprobs=True)
            outputs.append(expected.choices[0].message.content)
            assert found.choices[0].message.content == outputs[-1]
            streamed = ours.chat.completions.create(model=f"ensemble:member-{member:04d}", **asked, stream=True)
            assert "".join(c.choices[0].delta.content or "" for c in streamed if c.choices) == outputs[-1]
            logprobs = [token.logprob for token in expected.choices[0].logprobs.content]
            confidence = found.model_extra["ivon"]["confidence"]
            assert confidence == pytest.approx(float(torch.tensor(logprobs).mean().exp()), rel=0.05)
        chosen = ours.chat.completions.create(model="ensemble", **asked)
        assert chosen.choices[0].message.content in outputs
        facts = chosen.model_extra["ivon"]
        assert facts["members"] == 3
        assert 0 < facts["confidence"] <= 1
        assert facts["mutual_information"] >= 0
