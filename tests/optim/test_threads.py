"""Work in threads: all is done once, results come in order, and an error is raised when nobody works any more."""

from __future__ import annotations

import threading

import pytest
import torch

from axolotl_ivon.optim.threads import in_parallel


@pytest.mark.parametrize("threads", [1, 3])
def test_results_are_in_order_and_without_gradients(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    results = in_parallel(lambda i: (i * i, torch.is_grad_enabled()), range(50))
    assert results == [(i * i, False) for i in range(50)]
    assert in_parallel(lambda i: i, []) == []


def test_an_error_is_raised_when_nothing_is_worked_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    working, lock = [0], threading.Lock()

    def work(i: int) -> None:
        with lock:
            working[0] += 1
        try:
            if i == 5:
                raise KeyError(i)
        finally:
            with lock:
                working[0] -= 1

    with pytest.raises(KeyError):
        in_parallel(work, range(40))
    assert working == [0]
