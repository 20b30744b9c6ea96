"""A reward, and prompts, for `rl: grpo`; a YAML names them by this module."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from typing import Any

TOKEN = 44


def share(prompts: Any, completions: Any, completion_ids: Any, **_: Any) -> list[float]:
    """Return the share of one token in each completion."""
    return [ids.count(TOKEN) / len(ids) for ids in completion_ids]


def interrupting(prompts: Any, completions: Any, trainer_state: Any, **others: Any) -> list[float]:
    """Send SIGINT while the completions of the third step are scored."""
    if trainer_state.global_step == 2:
        os.kill(os.getpid(), signal.SIGINT)
    return share(prompts, completions, **others)


def prompts(cfg: Any, *args: Any, **kwargs: Any) -> tuple[Callable[..., Any], dict[str, Any]]:
    """Take the question of a chat as the prompt."""

    def transform(row: Any, tokenizer: Any = None) -> dict[str, Any]:
        return {"prompt": row["messages"][:1]}

    return transform, {"remove_columns": ["messages"]}
