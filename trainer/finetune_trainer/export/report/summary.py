"""What came out, in a few sentences, and how each artifact is loaded, as commands."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator
from typing import NamedTuple

from finetune_trainer.contract.verdict import (
    REJECTED,
    Statement,
    Tone,
    summary_of,
    verdict_on_merged,
)
from finetune_trainer.export.gguf import MODELFILE
from finetune_trainer.export.gguf.files import preferred
from finetune_trainer.export.report import tables
from finetune_trainer.export.report.facts import Facts, Preferences
from finetune_trainer.model.base_model import is_hub

VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""The values of vLLM's --max-lora-rank (vllm.config.lora.MaxLoRARanks)."""


def statements(facts: Facts) -> tuple[Statement, ...]:
    """What was learnt, which files may be used, and what the training noticed."""
    found = [compared_with_base(facts)]
    published = [each for each in facts.ggufs if each.artifact]
    if published:
        rejected = any(each.artifact and each.artifact.rejected for each in published)
        found.append(summary_of([each.verdict for each in published], some_rejected=rejected))
    if facts.gate.merged:
        rejected = facts.has(f"{REJECTED}/{facts.gate.merged.file}")
        found.append(verdict_on_merged(facts.gate.merged, rejected=rejected))
    found += [Statement(Tone.WARNING, notice) for notice in facts.gate.notices]
    codes = dict.fromkeys(str(each.code) for each in facts.notices if each.warning)
    if codes:
        found.append(Statement(Tone.WARNING, f"The training noticed: {', '.join(codes)}."))
    return tuple(found)


def overall(facts: Facts) -> Statement:
    """The worst of the statements in a few words."""
    tones = [each.tone for each in statements(facts)]
    if Tone.BAD in tones:
        return Statement(Tone.BAD, "Don't use it as it is")
    if Tone.WARNING in tones:
        return Statement(Tone.WARNING, "Usable, with warnings")
    if Tone.PLAIN in tones:
        return Statement(Tone.PLAIN, "Not measured in full")
    return Statement(Tone.GOOD, "Ready for use")


def compared_with_base(facts: Facts) -> Statement:
    """Whether the tuned model is better than its base on rows that it never saw."""
    if preferences := facts.preferences:
        return what_is_preferred(preferences)
    change = facts.change
    if change is None and facts.lineage.init_from:
        return Statement(
            Tone.PLAIN,
            "It was not compared with its base model: the training went on from an adapter, and "
            "the gate measured no held-out rows.",
        )
    if change is None:
        return Statement(
            Tone.PLAIN,
            "What was learnt is not measured: there were no held-out rows "
            "(dataset.evalFraction or evalSource).",
        )
    before, after = map(tables.perplexity, (change.base_perplexity, change.tuned_perplexity))
    if not change.better:
        return Statement(
            Tone.BAD,
            f"Worse than its base model: perplexity on held-out answers {before} before the "
            f"training, {after} after it.",
        )
    return Statement(
        Tone.GOOD,
        f"Better than its base model: perplexity on held-out answers fell from {before} to "
        f"{after}.",
    )


def what_is_preferred(found: Preferences) -> Statement:
    """Whether the tuned model prefers the better answers on rows that it never saw."""
    share = f"{found.accuracy:.0%}"
    what = (
        f"Judges {share} of the held-out answers as their labels do"
        if found.labelled
        else f"Prefers the better answer in {share} of the held-out pairs"
    )
    before = "" if found.base_accuracy is None else f", the base model in {found.base_accuracy:.0%}"
    text = f"{what}{before}; the mean reward margin is {found.margin:.3g}."
    if found.better:
        return Statement(Tone.GOOD, text)
    return Statement(Tone.BAD, f"{text} That is no better than before the training.")


class LoadingCommand(NamedTuple):
    """One way to load one artifact."""

    title: str
    text: str
    language: str
    """Of the command, by the name that Markdown knows."""

    command: str


def loading_commands(facts: Facts) -> tuple[LoadingCommand, ...]:
    """Every way that the artifacts of this export can be loaded, the simplest first."""
    return (
        *_llama_cpp(facts),
        *_ollama(facts),
        *_merged(facts),
        *_merged_fp8(facts),
        *_adapter(facts),
        *_adapter_gguf(facts),
    )


def served_file(facts: Facts) -> str | None:
    """Path of the GGUF file that commands and Modelfile name; None where none may be used."""
    good = {
        each.verdict.quantization: each.artifact.path
        for each in facts.ggufs
        if each.artifact and each.verdict.passed
    }
    return good[preferred(good, facts.parameters)] if good else None


def _llama_cpp(facts: Facts) -> Iterator[LoadingCommand]:
    file = served_file(facts)
    if file is None:
        return
    name = shlex.quote(file)
    what, mode = "A chat in the terminal", "-cnv"
    more = " The chat template is in the file."
    if facts.plain_text:
        what, mode, more = "Text that it goes on from", "-no-cnv -p '…'", ""
    yield LoadingCommand(
        "llama.cpp",
        f"{what}, or an OpenAI-compatible server.{more}",
        "sh",
        f"llama-cli -m {name} {mode}\nllama-server -m {name} --port 8080",
    )


def _ollama(facts: Facts) -> Iterator[LoadingCommand]:
    if not facts.has(MODELFILE):
        return
    name = shlex.quote(facts.name.lower())
    yield LoadingCommand(
        "Ollama",
        "The Modelfile brings template, stop tokens and parameters; run it beside the gguf folder.",
        "sh",
        f"ollama create {name} -f {MODELFILE}\nollama run {name}",
    )


_CHAT = (
    "from transformers import pipeline\n\n"
    'chat = pipeline("text-generation", model="merged", dtype="auto", device_map="auto")\n'
    'messages = [{"role": "user", "content": "…"}]\n'
    'print(chat(messages, max_new_tokens=256)[0]["generated_text"][-1]["content"])'
)
_WRITE = (
    "from transformers import pipeline\n\n"
    'write = pipeline("text-generation", model="merged", dtype="auto", device_map="auto")\n'
    'print(write("…", max_new_tokens=256)[0]["generated_text"])'
)


def _merged(facts: Facts) -> Iterator[LoadingCommand]:
    if not facts.has("merged"):
        return
    yield LoadingCommand(
        "transformers",
        "The merged model in 16 bits, as a folder of safetensors.",
        "python",
        _WRITE if facts.plain_text else _CHAT,
    )
    yield LoadingCommand(
        "vLLM, merged model",
        "An OpenAI-compatible server on a GPU.",
        "sh",
        f"vllm serve ./merged --served-model-name {shlex.quote(facts.name)}",
    )


def _merged_fp8(facts: Facts) -> Iterator[LoadingCommand]:
    if not facts.has("merged-fp8"):
        return
    yield LoadingCommand(
        "vLLM, merged model in FP8",
        "Half the memory of 16 bits, on a GPU since Ada and Hopper.",
        "sh",
        f"vllm serve ./merged-fp8 --served-model-name {shlex.quote(facts.name)}",
    )


def _adapter(facts: Facts) -> Iterator[LoadingCommand]:
    if not facts.has("adapter"):
        return
    base = _base_name(facts)
    yield LoadingCommand(
        "PEFT adapter",
        f"The adapter on its base model ({base}), which is loaded in 16 bits.",
        "python",
        "from peft import PeftModel\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        "base = AutoModelForCausalLM.from_pretrained(\n"
        f'    {json.dumps(base)}, dtype="auto", device_map="auto"\n)\n'
        'model = PeftModel.from_pretrained(base, "adapter")\n'
        'tokenizer = AutoTokenizer.from_pretrained("adapter")',
    )
    lora = facts.config.training.lora
    rank = next((rank for rank in VLLM_RANKS if rank >= lora.r), None)
    if rank is None or lora.use_dora or lora.modules_to_save or lora.target_parameters:
        return
    name = shlex.quote(f"{facts.name}=./adapter")
    yield LoadingCommand(
        "vLLM, adapter on its base model",
        "One base model in memory can serve several adapters.",
        "sh",
        f"vllm serve {shlex.quote(base)} --enable-lora --max-lora-rank {rank} \\\n"
        f"  --lora-modules {name} --tokenizer ./adapter",
    )


def _adapter_gguf(facts: Facts) -> Iterator[LoadingCommand]:
    file = next((each.path for each in facts.files if each.path.endswith("-LoRA-F32.gguf")), None)
    if file is None:
        return
    yield LoadingCommand(
        "llama.cpp, adapter on its base model",
        "The adapter alone, applied to a GGUF file of the base model that you have.",
        "sh",
        f"llama-server -m {shlex.quote(f'{facts.base_name}.gguf')} --lora {shlex.quote(file)}",
    )


def _base_name(facts: Facts) -> str:
    """What the base model is called where it is loaded: its Hub name, or a folder to fill in."""
    source = facts.config.model.source
    return source if is_hub(source) else f"./{facts.base_name}"
