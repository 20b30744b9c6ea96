"""What a served answer costs: members in-process against transformers' own server, and the proxy in front of others.

    python example_configs/smollm2/prepare_demo.py
    python benchmarks/serving.py engine                  # tokens per second and time to first token, SmolLM2-135M
    python benchmarks/serving.py proxy                   # cost of a request, and memory over 10,000 of them
    python benchmarks/serving.py memory ADAPTER          # memory over 10,000 answers in-process; a small model will do

Prints Markdown tables. `engine` starts every server once, on random LoRA weights over the model, and asks them in turn,
one streamed greedy chat at a time. `proxy` starts a server that answers at once and `ivon-post serve --endpoint` in
front of it, each a process of its own, and asks with as many clients as wanted, over sockets and without a library.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import platform
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
IVON_POST = [sys.executable, "-c", "import ivon_post; ivon_post.main()"]
SERVE = [*IVON_POST, "serve"]
CHAT = {"role": "user", "content": "Write a long story about a lighthouse keeper, a storm and a ship that is late."}
_ANSWER = {
    "id": "x",
    "object": "chat.completion",
    "model": "sample-0000",
    "choices": [
        {
            "index": 0,
            "message": {"role": "assistant", "content": "Forty-two."},
            "finish_reason": "stop",
            "logprobs": {
                "content": [{"token": t, "logprob": -0.1, "top_logprobs": []} for t in ("Forty", "-", "two", ".")]
            },
        }
    ],
    "usage": {"prompt_tokens": 9, "completion_tokens": 5, "total_tokens": 14},
}


def free_port() -> int:
    """Return a port that nobody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as held:
        return int(held.getsockname()[1])


@contextlib.contextmanager
def running(words: list[str], port: int, log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Run a server until the block ends, which begins when it is healthy."""
    with log.open("wb") as output:
        process = subprocess.Popen(words, stdout=output, stderr=subprocess.STDOUT, cwd=ROOT)
    try:
        for _ in range(1200):
            with contextlib.suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/health"):
                break
            if process.poll() is not None:
                raise SystemExit(log.read_text()[-3000:])
            time.sleep(0.25)
        yield process
    finally:
        process.terminate()
        process.wait(60)


def where() -> str:
    """Return the machine, in words."""
    load = os.getloadavg()[0]
    return f"{platform.machine()}, {os.cpu_count()} processors, load {load:.1f}, Python {platform.python_version()}"


# --- members in-process --------------------------------------------------------------------------------------------


def write_adapter(base: Path, folder: Path) -> None:
    """Write random LoRA (r 8 on q and v) over the model with a σ beside it."""
    import torch
    from peft import LoraConfig, get_peft_model
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    from axolotl_ivon.posterior.adapter import save_sigma

    torch.manual_seed(0)
    lora = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    get_peft_model(AutoModelForCausalLM.from_pretrained(base), lora).save_pretrained(str(folder))
    mean = load_file(folder / "adapter_model.safetensors")
    save_sigma(folder, {key: torch.full_like(value, 0.005) for key, value in mean.items()}, {})


def one_chat(port: int, model: str, tokens: int) -> tuple[float, float]:
    """Return (seconds to the first token, tokens per second after it) of a streamed chat."""
    body = {"model": model, "messages": [CHAT], "max_tokens": tokens, "temperature": 0, "stream": True}
    url, headers = f"http://127.0.0.1:{port}/v1/chat/completions", {"Content-Type": "application/json"}
    times = []
    begun = time.perf_counter()
    with urllib.request.urlopen(urllib.request.Request(url, json.dumps(body).encode(), headers), timeout=600) as lines:
        for line in lines:
            if line.startswith(b"data: {"):
                choices = json.loads(line[6:])["choices"]
                if choices and choices[0]["delta"].get("content"):
                    times.append(time.perf_counter())
    return times[0] - begun, (len(times) - 1) / (times[-1] - times[0])


def engine(arguments: argparse.Namespace) -> None:
    """Compare members in-process with transformers' server."""
    with tempfile.TemporaryDirectory() as place, contextlib.ExitStack() as stack:
        adapter = Path(place) / "adapter"
        write_adapter(arguments.model, adapter)
        servers: dict[str, tuple[int, str]] = {}
        port = free_port()
        own = [str(Path(sys.executable).with_name("transformers")), "serve", str(arguments.model), "--port", str(port)]
        stack.enter_context(running([*own, "--device", "cpu", "--dtype", "float32"], port, Path(place) / "theirs.log"))
        servers["transformers serve, one model"] = port, str(arguments.model)
        for members in arguments.members:
            port = free_port()
            words = [
                *SERVE,
                str(adapter),
                "-n",
                str(members),
                "--port",
                str(port),
                "--base-model",
                str(arguments.model),
            ]
            stack.enter_context(running(words, port, Path(place) / f"{members}.log"))
            servers[f"ivon-post serve, {members} members"] = port, "adapter"
            if members == arguments.members[0]:
                servers["ivon-post serve, the mean"] = port, "adapter:mean"
        found: dict[str, list[tuple[float, float]]] = {name: [] for name in servers}
        for turn in range(arguments.repeats + 1):  # the first does not count
            for name, (at, model) in servers.items():
                measured = one_chat(at, model, arguments.tokens)
                if turn:
                    found[name].append(measured)
    threads = os.environ.get("OMP_NUM_THREADS", "all")
    print(f"{where()}, {threads} threads, {arguments.tokens} tokens, medians of {arguments.repeats}\n")
    print("| | first token, s | tokens per second | × one member |\n|---|---:|---:|---:|")
    speeds = {name: statistics.median(speed for _, speed in own) for name, own in found.items()}
    one = speeds[f"ivon-post serve, {arguments.members[0]} members"]
    for name, chats in found.items():
        first = statistics.median(seconds for seconds, _ in chats)
        print(f"| {name} | {first:.2f} | {speeds[name]:.1f} | {one / speeds[name]:.2f} |")


# --- the proxy -----------------------------------------------------------------------------------------------------


async def answer_at_once(port: int, members: int) -> None:
    """Serve /v1/models, and the same answer to everything else."""
    names = [{"id": f"sample-{k:04d}"} for k in range(members)]

    def bytes_of(document: Any) -> bytes:
        body = json.dumps(document).encode()
        return b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body) + body

    models, answer = bytes_of({"data": names}), bytes_of(_ANSWER)

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).lower()
                if b"content-length:" in head:
                    await reader.readexactly(int(head.split(b"content-length:")[1].split(b"\r\n")[0]))
                writer.write(models if head.startswith(b"get") else answer)
        writer.close()

    server = await asyncio.start_server(connected, "127.0.0.1", port, backlog=1024)
    await server.serve_forever()


async def load(port: int, model: str, clients: int, requests: int, pause: float = 0.0) -> list[float]:
    """Return the seconds of every request, from clients that ask one after the other, `pause` seconds apart."""
    body = json.dumps({"model": model, "messages": [CHAT], "max_tokens": 8, "temperature": 0}).encode()
    message = (
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        b"Content-Length: %d\r\n\r\n" % len(body) + body
    )
    times: list[float] = []
    left = requests

    async def client(number: int) -> None:
        nonlocal left
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        await asyncio.sleep(pause * number / clients)
        while left > 0:
            left -= 1
            begun = time.perf_counter()
            writer.write(message)
            head = await reader.readuntil(b"\r\n\r\n")
            if b" 200 " not in head.split(b"\r\n")[0]:
                raise SystemExit(head.decode())
            await reader.readexactly(int(head.lower().split(b"content-length:")[1].split(b"\r\n")[0]))
            times.append(time.perf_counter() - begun)
            await asyncio.sleep(max(0.0, pause - times[-1]))
        writer.close()

    await asyncio.gather(*map(client, range(clients)))
    return times


def cpu_seconds(pid: int) -> float:
    """Return the processor time that a process has taken."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def memory(pid: int) -> float:
    """Return the resident memory of a process, in MB."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


def write_ensemble(folder: Path, members: int) -> None:
    """Write as much of an ensemble as names its members."""
    names = [f"sample-{k:04d}" for k in range(members)]
    (folder / names[0]).mkdir(parents=True)
    (folder / "ensemble.json").write_text(json.dumps({"members": names}))
    (folder / names[0] / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "none"}))


def proxy(arguments: argparse.Namespace) -> None:
    """Measure what the proxy adds to a request."""
    with tempfile.TemporaryDirectory() as place, contextlib.ExitStack() as stack:
        folder = Path(place) / "ensemble"
        write_ensemble(folder, arguments.upstream_members)
        behind, port = free_port(), free_port()
        own = [sys.executable, __file__, "upstream", str(behind), str(arguments.upstream_members)]
        stack.enter_context(running(own, behind, Path(place) / "behind.log"))
        words = [*SERVE, str(folder), "--endpoint", f"http://127.0.0.1:{behind}", "--port", str(port)]
        server = stack.enter_context(running(words, port, Path(place) / "proxy.log"))
        print(f"{where()}, {arguments.clients} clients, milliseconds\n")
        print("| | requests | median | 95 % | processor time of the proxy per request |\n|---|---:|---:|---:|---:|")
        member = "ensemble:member-0000"
        for name, at, model, count, pause in (
            ("directly, one after the other", behind, "sample-0000", arguments.requests // 5, 0.0),
            ("a member, one after the other", port, member, arguments.requests // 5, 0.0),
            ("directly, one request a second from each", behind, "sample-0000", arguments.requests // 5, 1.0),
            ("a member, one request a second from each", port, member, arguments.requests // 5, 1.0),
            (f"all {arguments.upstream_members} members", port, "ensemble", arguments.requests // 10, 0.0),
        ):
            asyncio.run(load(at, model, arguments.clients, 2 * arguments.clients))
            before = cpu_seconds(server.pid)
            begun = time.perf_counter()
            times = sorted(asyncio.run(load(at, model, arguments.clients, count, pause)))
            took, spent = time.perf_counter() - begun, cpu_seconds(server.pid) - before
            cost = f"{1000 * spent / len(times):.2f}" if at == port else ""
            middle, late = statistics.median(times), times[int(0.95 * len(times))]
            per = f", {len(times) / took:.0f} a second"
            print(f"| {name}{per} | {len(times)} | {1000 * middle:.2f} | {1000 * late:.2f} | {cost} |", flush=True)
        watch(server.pid, port, member, arguments.clients, arguments.requests)


def watch(pid: int, port: int, model: str, clients: int, requests: int) -> None:
    """Print the memory of a server before, in the course of and after requests."""
    marks = []
    for turn in range(11):
        marks.append(f"{memory(pid):.1f}")
        if turn < 10:
            asyncio.run(load(port, model, clients, requests // 10))
    print(f"\nMemory over {requests} requests, MB: {', '.join(marks)}")


def in_process(arguments: argparse.Namespace) -> None:
    """Watch the memory of a server that has the model itself."""
    port = free_port()
    words = [*SERVE, arguments.adapter, "--name", "own", "--port", str(port)]
    with tempfile.TemporaryDirectory() as place, running(words, port, Path(place) / "log") as server:
        asyncio.run(load(port, "own", arguments.clients, 10 * arguments.clients))
        watch(server.pid, port, "own", arguments.clients, arguments.requests)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = parser.add_subparsers(required=True)
    part = parts.add_parser("engine")
    part.add_argument("--model", type=Path, default=ROOT / ".demo" / "SmolLM2-135M-Instruct")
    part.add_argument("--members", type=int, nargs="+", default=[1, 4, 8])
    part.add_argument("--tokens", type=int, default=48)
    part.add_argument("--repeats", type=int, default=5)
    part.set_defaults(run=engine)
    part = parts.add_parser("proxy")
    part.add_argument("--clients", type=int, default=64)
    part.add_argument("--requests", type=int, default=10_000)
    part.add_argument("--upstream-members", type=int, default=8)
    part.set_defaults(run=proxy)
    part = parts.add_parser("memory")
    part.add_argument("adapter")
    part.add_argument("--clients", type=int, default=8)
    part.add_argument("--requests", type=int, default=10_000)
    part.set_defaults(run=in_process)
    part = parts.add_parser("upstream")
    part.add_argument("port", type=int)
    part.add_argument("count", type=int)
    part.set_defaults(run=lambda own: asyncio.run(answer_at_once(own.port, own.count)))
    arguments = parser.parse_args()
    arguments.run(arguments)


if __name__ == "__main__":
    main()
