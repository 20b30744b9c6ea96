"""Outputs that mean the same, by the cosine of their embeddings under a sentence-transformers model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import IVONError, one_line, param_ref
from ..storage.format import read_json

SIMILARITY = 0.8
_BATCH = 64


class Embedder:
    """Maps texts to unit vectors, as sentence-transformers would with the model in a folder.

    transformers alone runs it: its last hidden states, averaged over a text's tokens or those of the first token, as
    `1_Pooling/config.json` says. A folder without `modules.json` is averaged.

    Raises:
        IVONError: there is no such folder, it holds no encoder, or a kind of one that this does not run.
    """

    def __init__(self, folder: str | Path) -> None:
        self._named = f"{param_ref('embedding_model')} {folder}"
        self.folder = Path(folder)
        if not (self.folder / "config.json").is_file():
            raise IVONError(
                f"{self._named}: no folder with a config.json; give one that sentence-transformers saved, "
                "all-MiniLM-L6-v2 say"
            )
        self._cls = self._pools_cls()
        bert = self.folder / "sentence_bert_config.json"
        self._length = read_json(bert).get("max_seq_length") if bert.is_file() else None
        self._known: dict[str, np.ndarray] = {}
        self._loaded: tuple[Any, Any] | None = None

    def _pools_cls(self) -> bool:
        import json

        path = self.folder / "modules.json"
        if not path.is_file():
            return False
        try:
            modules = json.loads(path.read_text(encoding="utf-8"))
            kinds = {str(module["type"]).rpartition(".")[2]: str(module.get("path", "")) for module in modules}
        except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
            raise IVONError(f"{self._named}: modules.json cannot be read ({one_line(error)})") from None
        strange = kinds.keys() - {"Transformer", "Pooling", "Normalize"}
        pooling = read_json(self.folder / kinds["Pooling"] / "config.json") if "Pooling" in kinds else {}
        modes = {key.removeprefix("pooling_mode_") for key, value in pooling.items() if value is True}
        modes = (modes | {str(pooling.get("pooling_mode", ""))}) - {"include_prompt", ""} or {"mean_tokens"}
        if strange or len(modes) > 1 or not modes <= {"mean", "mean_tokens", "cls", "cls_token"}:
            told = ", ".join(sorted(strange or modes))
            raise IVONError(f"{self._named}: {told} is not supported; give a model that averages its tokens")
        return modes <= {"cls", "cls_token"}

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        """Return the embeddings, float64, shape (n, size), each of length 1; a text is embedded once."""
        new = [text for text in dict.fromkeys(texts) if text not in self._known]
        for start in range(0, len(new), _BATCH):
            part = new[start : start + _BATCH]
            self._known.update(zip(part, self._embed(part), strict=True))
        return np.stack([self._known[text] for text in texts])

    def _embed(self, texts: list[str]) -> np.ndarray:
        import torch

        if self._loaded is None:
            from transformers import AutoModel, AutoTokenizer

            try:
                tokenizer = AutoTokenizer.from_pretrained(self.folder, local_files_only=True)
                model = AutoModel.from_pretrained(self.folder, local_files_only=True, use_safetensors=True).eval()
            except (OSError, ValueError, ImportError, KeyError) as error:
                raise IVONError(f"{self._named}: cannot be loaded ({one_line(error)})") from None
            self._loaded = tokenizer, model
        tokenizer, model = self._loaded
        # Half a surrogate pair, which a model may write, is no text.
        clean = [text.encode("utf-8", "replace").decode() for text in texts]
        inputs = tokenizer(clean, padding=True, truncation=True, max_length=self._length, return_tensors="pt")
        with torch.inference_mode():
            states = model(**inputs).last_hidden_state.double()
        mask = inputs["attention_mask"][..., None].double()
        pooled = states[:, 0] if self._cls else (states * mask).sum(1) / mask.sum(1).clamp_min(1e-9)
        return torch.nn.functional.normalize(pooled, dim=1).numpy()


def by_meaning(answers: Sequence[str | None], embed: Embedder, similarity: float = SIMILARITY) -> list[int]:
    """Return the cluster of each answer.

    From the most frequent answer on, each joins the cluster whose first answer is the most like it, if their cosine is
    at least `similarity`, or else begins a cluster. The order of the outputs does not matter. No answer agrees with
    nothing.
    """
    texts = [answer for answer in answers if answer is not None]
    if not texts:
        return list(range(len(answers)))
    count = Counter(texts)
    unique = sorted(count, key=lambda text: (-count[text], text))
    vectors = embed(unique)
    leaders: list[int] = []
    cluster: dict[str, int] = {}
    for place, text in enumerate(unique):
        cosines = vectors[leaders] @ vectors[place]
        if leaders and cosines.max() >= similarity:
            cluster[text] = leaders[int(cosines.argmax())]
        else:
            leaders.append(place)
            cluster[text] = place
    return [len(unique) + i if answer is None else cluster[answer] for i, answer in enumerate(answers)]
