"""chat: talk to the smallest GGUF file that passed, in llama.cpp on this machine."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer

from finetune_cli.cluster import Cluster
from finetune_cli.commands.results import Endpoint, VersionOption
from finetune_cli.exits import CliError, ExitCode
from finetune_cli.job import Job
from finetune_cli.options import Name, on_cluster
from finetune_cli.output import bytes_in_words, note
from finetune_cli.version import Version

MODELFILE = "Modelfile"
CONTEXT = 4096  # tokens, where the Modelfile names none
INSTALL = "pip install 'finetune-operator[cli,gguf]'"

# What a Modelfile may set, by the names that llama-cpp-python has.
_NUMBERS = {"temperature": "temperature", "top_p": "top_p", "min_p": "min_p"}
_NUMBERS |= {"repeat_penalty": "repeat_penalty"}
_PARAMETER = re.compile(r"^PARAMETER (\S+) (.+)$", re.MULTILINE)
_SYSTEM = re.compile(r'^SYSTEM (?:"""(.*?)"""|(.+?))$', re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Manner:
    """How the model is asked: what its Modelfile says."""

    context: int = CONTEXT
    system: str | None = None
    options: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, modelfile: str) -> Manner:
        """Read a Modelfile; what llama.cpp doesn't know is left out."""
        options: dict[str, Any] = {}
        context, stops = CONTEXT, []
        for name, text in _PARAMETER.findall(modelfile):
            value = text.strip().strip('"')
            if name == "stop":
                stops.append(value)
            elif name == "num_ctx":
                context = int(value)
            elif name == "top_k":
                options["top_k"] = int(value)
            elif name in _NUMBERS:
                options[_NUMBERS[name]] = float(value)
        if stops:
            options["stop"] = stops
        system = _SYSTEM.search(modelfile)
        said = (system[1] if system[1] is not None else system[2]) if system else None
        return cls(context, said, options)


@on_cluster
def chat(
    cluster: Cluster,
    name: Name,
    *,
    prompt: Annotated[
        str | None, typer.Option("--prompt", "-p", help="Ask this, print the answer, and end.")
    ] = None,
    file: Annotated[str | None, typer.Option(help="Another GGUF file, e.g. '*Q8_0.gguf'.")] = None,
    tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 512,
    version: VersionOption = None,
    endpoint: Endpoint = None,
) -> None:
    """Talk to the tuned model, on this machine.

    It fetches the smallest GGUF file that passed its checks, once, and asks it with the settings of
    its Modelfile and the chat template that it was trained with.
    """
    llama_cpp = _llama_cpp()
    found = Version.read(Job(cluster.job(name)), version, endpoint)
    chosen = found.chosen([f"gguf/{file}"]) if file else found.smallest_model()
    folder = _cache() / name / (found.name or "first")
    size = bytes_in_words(sum(each.bytes for each in chosen))
    note(f"{chosen[0].path} of version {found.name}, {size}, in {folder}")
    extra = tuple(each for each in found.files if each.path == MODELFILE)
    model, *_ = found.download([*sorted(chosen, key=lambda each: each.path), *extra], folder)
    modelfile = folder / MODELFILE
    manner = Manner.of(modelfile.read_text(encoding="utf-8")) if extra else Manner()
    loaded = _load(llama_cpp, model, manner.context)
    try:
        for question in [prompt] if prompt is not None else _questions():
            _answer(loaded, manner, question, tokens)
    finally:
        loaded.close()


def _llama_cpp() -> Any:
    try:
        import llama_cpp
    except ImportError as error:
        raise CliError(
            ExitCode.FAILED,
            f"llama.cpp is not installed here: {INSTALL} (it compiles for some minutes where no "
            "wheel fits), or download the file with `finetune artifacts` and use Ollama.",
        ) from error
    return llama_cpp


def _load(llama_cpp: Any, model: Path, context: int) -> Any:
    try:
        return llama_cpp.Llama(str(model), n_ctx=context, verbose=False)
    except ValueError as error:
        raise CliError(ExitCode.FAILED, f"llama.cpp can't load {model}: {error}.") from error


def _cache() -> Path:
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "finetune" / "models"


def _questions() -> Iterator[str]:
    """What a person types, until the end of input."""
    if sys.stdin.isatty():
        note("Each question stands alone. Ctrl-D ends.")
    while True:
        try:
            question = input("> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            return
        if question:
            yield question


def _answer(model: Any, manner: Manner, question: str, tokens: int) -> None:
    """Print the answer as it comes."""
    messages: Sequence[dict[str, str]] = [
        *([{"role": "system", "content": manner.system}] if manner.system else []),
        {"role": "user", "content": question},
    ]
    try:
        pieces = model.create_chat_completion(
            messages=messages, max_tokens=tokens, stream=True, **manner.options
        )
        for piece in pieces:
            typer.echo(piece["choices"][0]["delta"].get("content") or "", nl=False)
    except ValueError as error:  # e.g. a question that is longer than the context
        raise CliError(ExitCode.FAILED, f"llama.cpp can't answer: {error}.") from error
    typer.echo("")
