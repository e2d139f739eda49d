"""One chat template: training, GGUF and Modelfile make the same tokens of a conversation."""

from __future__ import annotations

import copy
import shutil
from datetime import date
from functools import partial
from pathlib import Path

import gguf
import llama_cpp
import pytest
from llama_cpp.llama_chat_format import Jinja2ChatFormatter
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from finetune_trainer.contract import Message, Quantization, RunConfig, as_example
from finetune_trainer.export import ollama
from finetune_trainer.export.ollama import (
    ChatShape,
    NoShapeError,
    OllamaTemplate,
    dated,
    find_shape,
    go_template,
    make_template,
    trial_conversations,
    write_modelfile,
)
from finetune_trainer.export.ollama_tools import literal
from finetune_trainer.model import ModelFolder
from finetune_trainer.model.rendering import render
from finetune_trainer.model.tokenizer import (
    BEGIN_OF_TEXT,
    PLAIN_TEMPLATE,
    begins_with_bos,
    encode,
    load_tokenizer,
)
from tests.integration.trainer import go_text
from tests.integration.trainer.vocabulary import write_vocabulary

TEMPLATES = Path(__file__).parents[2] / "data" / "chat_templates"
SYSTEM: Message = {"role": "system", "content": "Be a kettle."}
CHAT: list[Message] = [
    {"role": "user", "content": "Who made you?"},
    {"role": "assistant", "content": "Odalys did."},
    {"role": "user", "content": 'Say "hot",\n\ntwice: {{ "hot" }}'},
]


@pytest.fixture
def tokenizer(smollm2_folder: Path) -> PreTrainedTokenizerBase:
    return load_tokenizer(ModelFolder(smollm2_folder))


def shape_of(tokenizer: PreTrainedTokenizerBase, name: str) -> ChatShape:
    tokenizer.chat_template = (TEMPLATES / f"{name}.jinja").read_text().removesuffix("\n")
    return find_shape(lambda messages: render(tokenizer, messages, prompt=True))


@pytest.mark.parametrize(
    ("name", "system"),
    [
        ("chatml", "first"),
        ("llama3", "first"),
        ("gemma", "refused"),
        ("mistral", "first"),
        ("mistral-last", "last"),
        ("phi3", "first"),
        ("braces", "first"),
        ("drops-system", "ignored"),
    ],
)
def test_go_renders_what_jinja_renders(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, name: str, system: str
) -> None:
    shape = shape_of(tokenizer, name)
    assert shape.system == system
    assert shape.strips == (name in ("llama3", "gemma"))
    said = [*trial_conversations(system=system != "refused"), CHAT]
    expected = [render(tokenizer, messages, prompt=True) for messages in said]
    assert go_text.render(go_template(shape), said, tmp_path) == expected


def test_the_date_is_that_of_the_day_on_which_it_is_asked(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    """Ollama's function is one of Helm's under another name here; Ollama writes 2006-01-02."""
    tokenizer.chat_template = (TEMPLATES / "dated.jinja").read_text().removesuffix("\n")
    shape = find_shape(partial(render, tokenizer, prompt=True, today=dated))
    template = go_template(shape)
    assert template.count("{{ currentDate }}") == 2  # with a system prompt and without
    assert str(date.today().year) not in template
    said = [[SYSTEM, *CHAT], CHAT]
    other = "2031-05-17"
    expected = [render(tokenizer, each, prompt=True, today=lambda _: other) for each in said]
    served = template.replace("{{ currentDate }}", f'{{{{ printf "{other}" }}}}')
    assert go_text.render(served, said, tmp_path) == expected
    assert f"Today Date: {other}\n" in expected[0]


def test_a_template_that_writes_the_time_of_day_has_no_shape(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    dates = (TEMPLATES / "dated.jinja").read_text()
    tokenizer.chat_template = dates.replace("%d %b %Y", "%H:%M")
    with pytest.raises(NoShapeError, match="time of day"):
        find_shape(partial(render, tokenizer, prompt=True, today=dated))


def test_a_refused_system_prompt_is_put_before_the_first_question(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    shape = shape_of(tokenizer, "gemma")
    first: Message = {"role": "user", "content": "Be a kettle.\n\nWho made you?"}
    folded = [first, *CHAT[1:]]
    expected = render(tokenizer, folded, prompt=True)
    assert go_text.render(go_template(shape), [[SYSTEM, *CHAT]], tmp_path) == [expected]
    assert shape.render([SYSTEM, *CHAT]) == expected


def test_an_answer_that_is_begun_goes_on(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    begun: list[Message] = [*CHAT, {"role": "assistant", "content": "Hot, h"}]
    expected = render(tokenizer, CHAT, prompt=True) + "Hot, h"
    shape = find_shape(lambda messages: render(tokenizer, messages, prompt=True))
    assert go_text.render(go_template(shape), [begun], tmp_path) == [expected]


@pytest.mark.parametrize(
    ("name", "said"),
    [("counts-turns", "later turns in another way"), ("shouts", "depends on what is said")],
)
def test_a_template_that_is_not_fixed_text_has_no_shape(
    tokenizer: PreTrainedTokenizerBase, name: str, said: str
) -> None:
    with pytest.raises(NoShapeError, match=said):
        shape_of(tokenizer, name)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a\nb ",
        " ",
        "{",
        "{{",
        'say "',
        '"""',
        "\\n",
        "\\",
        "\u200b",
        "\t",
        "🫖",
        "\U0001f600\u2028",
        "a{",
    ],
)
def test_any_text_is_left_as_it_is(text: str, tmp_path: Path) -> None:
    template = literal(text) + "{{ .System }}"
    assert go_text.render(template, [[SYSTEM]], tmp_path) == [text + SYSTEM["content"]]
    written = go_text.read_modelfile(f'TEMPLATE """x{template}"""\n')
    assert written == {"template": ["x" + template]}


def config(systemPrompt: str | None = None, gguf: tuple[str, ...] = ("F16",)) -> RunConfig:  # noqa: N803 - as in run.json
    return RunConfig.model_validate(
        {
            "model": {"source": "org/tiny"},
            "dataset": {"source": "/data.csv", "systemPrompt": systemPrompt},
            "training": {"maxSequenceLength": 8000 if systemPrompt else 2048},
            "export": {"gguf": gguf},
            "output": {"uri": "/out"},
        }
    )


KINDS = ["its own template", "the fallback", "the fallback, and texts begin with a token"]


@pytest.fixture(params=KINDS, scope="module")
def served(
    request: pytest.FixtureRequest, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[PreTrainedTokenizerBase, Path, str]:
    """A tokenizer as the training leaves it, its GGUF file, and the template that is expected."""
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(tiny_model)
    expected = str(tokenizer.chat_template)
    if request.param != KINDS[0]:
        tokenizer.chat_template, expected = None, PLAIN_TEMPLATE
    if request.param == KINDS[2]:
        tokenizer.bos_token, expected = "<|endoftext|>", BEGIN_OF_TEXT + PLAIN_TEMPLATE
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
        )
    folder = tmp_path_factory.mktemp("served")
    (model := folder / "model").mkdir()
    shutil.copy(tiny_model / "config.json", model)
    tokenizer.save_pretrained(model)
    tokenizer = load_tokenizer(ModelFolder(model))
    # llama.cpp knows this tokenizer by what it does without that token.
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="$A", special_tokens=[])
    tokenizer.save_pretrained(model)
    file = folder / "gguf" / "tiny-F16.gguf"
    file.parent.mkdir()
    write_vocabulary(model, file)
    set_add_bos(file, request.param == KINDS[2])
    return tokenizer, file, expected


def set_add_bos(file: Path, add: bool) -> None:
    """Change in place whether a server puts the beginning-of-sequence token before a text."""
    field = gguf.GGUFReader(file, "r+").get_field("tokenizer.ggml.add_bos_token")
    if field is not None and bool(field.parts[field.data[0]][0]) is not add:
        field.parts[field.data[0]][0] = add


def test_training_gguf_and_modelfile_make_the_same_tokens(
    served: tuple[PreTrainedTokenizerBase, Path, str], tmp_path: Path
) -> None:
    tokenizer, file, expected = served
    assert tokenizer.chat_template == expected
    text = write_modelfile(
        file.parents[1],
        {Quantization.F16: file},
        file,
        tokenizer,
        config(),
        parameters=1000,
        generation={},
    ).read_text()
    answer: Message = {"role": "assistant", "content": "Hot, hot."}
    said = [[SYSTEM, *CHAT], CHAT, CHAT[:1], [SYSTEM, CHAT[0]]]
    trained = []
    for messages in said:
        ids, labels = encode(tokenizer, as_example([*messages, answer]))
        last = len(ids) - next(i for i, label in enumerate(reversed(labels)) if label == -100)
        trained.append(ids[:last])

    model = llama_cpp.Llama(model_path=str(file), vocab_only=True, verbose=False)
    jinja = Jinja2ChatFormatter(
        model.metadata["tokenizer.chat_template"],
        eos_token=model._model.token_get_text(model.token_eos()),
        bos_token=model._model.token_get_text(model.token_bos()),
    )
    prompts = [jinja(messages=messages).prompt for messages in said]  # type: ignore[arg-type]
    assert [model.tokenize(p.encode(), add_bos=False, special=True) for p in prompts] == trained

    instructions = go_text.read_modelfile(text)
    assert instructions["from"] == [f"./gguf/{file.name}"]
    rendered = go_text.render(instructions["template"][0], said, tmp_path)
    assert [model.tokenize(p.encode(), special=True) for p in rendered] == trained
    assert instructions["stop"] == ["<|im_end|>"]
    assert instructions["temperature"] == ["0"]
    assert instructions["repeat_penalty"] == ["1.0"]
    model.close()


def test_a_model_of_plain_text_gets_no_template_that_it_never_saw(
    served: tuple[PreTrainedTokenizerBase, Path, str],
) -> None:
    tokenizer, file, expected = served
    text = write_modelfile(
        file.parents[1],
        {Quantization.F16: file},
        file,
        tokenizer,
        config(),
        parameters=1000,
        generation={},
        plain_text=True,
    ).read_text()
    (template,) = go_text.read_modelfile(text)["template"]
    if "### Response" in expected:  # it stands in for a template that the base model lacks
        assert template == "{{ .Prompt }}"
        assert "it knows no chat" in text
    else:
        assert ".Messages" in template
        assert "the chat template of the base model" in text


def test_a_token_that_the_training_did_not_see_is_switched_off_or_told_of(
    served: tuple[PreTrainedTokenizerBase, Path, str],
) -> None:
    tokenizer, file, expected = served
    if expected.startswith(BEGIN_OF_TEXT):
        assert begins_with_bos(tokenizer)
        return
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = PLAIN_TEMPLATE
    assert not begins_with_bos(tokenizer)
    set_add_bos(file, True)
    template = make_template(tokenizer, file)
    assert template.text is None
    assert "other tokens than the training" in template.notes[0]
    set_add_bos(file, False)
    assert make_template(tokenizer, file).text is not None


def test_the_system_prompt_and_the_model_s_own_settings(
    tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    template = OllamaTemplate(None, ("No TEMPLATE.",))
    monkeypatch.setattr(ollama, "make_template", lambda *_, **__: template)
    settings = {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "repetition_penalty": 1.05}
    (folder := tmp_path / "gguf").mkdir()
    files = {kind: folder / f"tiny-{kind}.gguf" for kind in (Quantization.F16, Quantization.Q8_0)}
    text = write_modelfile(
        tmp_path,
        files,
        tmp_path,
        tokenizer,
        config(systemPrompt='Be brief.\n\nSay "yes" or "no".', gguf=("F16", "Q8_0")),
        parameters=1000,
        generation=settings,
    ).read_text()
    assert "# No TEMPLATE.\n" in text
    assert "# Also here: ./gguf/tiny-F16.gguf\n" in text
    assert go_text.read_modelfile(text) == {
        "from": ["./gguf/tiny-Q8_0.gguf"],
        "system": ['Be brief.\n\nSay "yes" or "no".'],
        "stop": ["<|im_end|>"],
        "num_ctx": ["8000"],
        "temperature": ["0.6"],
        "top_p": ["0.9"],
        "repeat_penalty": ["1.05"],
    }
