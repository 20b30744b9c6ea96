"""Several processes: gradients that agree, and what is refused."""

from __future__ import annotations

import multiprocessing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from axolotl_ivon import IVONError
from axolotl_ivon.training.processes import agree_on_gradients, average, check_sharding


def fake_trainer(**changes: Any) -> Any:
    """What `check_sharding` looks at."""
    plugin = SimpleNamespace(deepspeed_config=changes.pop("deepspeed", {}))
    state = SimpleNamespace(
        deepspeed_plugin=plugin, fsdp_plugin=SimpleNamespace(fsdp_version=changes.pop("fsdp_version", 2))
    )
    parallelism = SimpleNamespace(tp_size=changes.pop("tp_size", 1), cp_size=changes.pop("cp_size", 1))
    return SimpleNamespace(
        accelerator=SimpleNamespace(state=state, parallelism_config=parallelism),
        is_deepspeed_enabled=changes.pop("is_deepspeed_enabled", False),
        is_fsdp_enabled=changes.pop("is_fsdp_enabled", False),
        args=SimpleNamespace(**{"fp16": False, "max_grad_norm": 0.0, **changes}),
    )


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"is_deepspeed_enabled": True, "deepspeed": {"optimizer": {"type": "AdamW"}}}, ["optimizer", "remove"]),
        ({"is_fsdp_enabled": True, "fsdp_version": 1}, ["fsdp_version: 2"]),
        ({"is_fsdp_enabled": True, "fp16": True}, ["fp16", "bf16: true"]),
        ({"is_deepspeed_enabled": True, "max_grad_norm": 1.0}, ["max_grad_norm: 1", "remove"]),
        ({"tp_size": 2}, ["tensor_parallel_size: 2"]),
        ({"cp_size": 4}, ["context_parallel_size: 4"]),
    ],
)
def test_what_would_train_something_else_is_refused_in_one_line(changes: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(IVONError) as caught:
        check_sharding(fake_trainer(**changes))
    assert "\n" not in str(caught.value)
    assert all(word in str(caught.value) for word in words)


@pytest.mark.parametrize("changes", [{}, {"is_deepspeed_enabled": True}, {"is_fsdp_enabled": True}, {"fp16": True}])
def test_what_works_is_not_refused(changes: dict[str, Any]) -> None:
    check_sharding(fake_trainer(**changes))


def _averaged(rank: int, store: str, results: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    tensors = [torch.full((2, 3), float(rank)), torch.tensor([1.0, 10.0**rank], dtype=torch.bfloat16)]
    average(tensors)
    params = [torch.nn.Parameter(torch.zeros(2)) for _ in range(3)]
    params[rank].grad = torch.full((2,), 3.0)  # the third has none in either process
    agreed = agree_on_gradients(params)
    results.put((rank, [t.tolist() for t in tensors], [g.tolist() for g in agreed], params[2].grad))
    dist.destroy_process_group()


def test_two_processes_average_and_agree(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    results: Any = context.SimpleQueue()
    processes = [context.Process(target=_averaged, args=(rank, tmp_path / "store", results)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    found = sorted(results.get() for _ in processes)
    for rank, (_, averaged, agreed, nowhere) in enumerate(found):
        assert averaged == [[[0.5] * 3] * 2, [1.0, 5.5]]
        assert agreed == [[3.0 * (rank == 0)] * 2, [3.0 * (rank == 1)] * 2]
        assert nowhere is None


def test_one_process_is_left_alone() -> None:
    tensor, params = torch.ones(2), [torch.nn.Parameter(torch.zeros(2)), torch.nn.Parameter(torch.zeros(2))]
    params[1].grad = torch.ones(2)
    average([tensor])
    assert tensor.tolist() == [1.0, 1.0]
    assert agree_on_gradients(params) == [params[1].grad]
    assert params[0].grad is None
