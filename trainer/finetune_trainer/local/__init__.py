"""finetune-trainer local: train, merge and convert on one machine; what `make train` calls.

The stages are those of the cluster, with the folder `models/.finetune` as their object store, and
the results laid out where people look for them:

    models/lora_adapter/    adapter and tokenizer      (local train)
    models/tuned/           in its place: the whole model in float32, with training.method full
    models/merged/          16-bit safetensors         (local merge)
    models/gguf/            GGUF files                 (local gguf)
    models/report.html      what came out, with README.md, the model card

Messages are put into words of flags and environment variables (local/fields).
"""

from __future__ import annotations

import logging
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path, PurePosixPath
from typing import Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.filesize import decimal
from rich.table import Table

from finetune_trainer.contract import (
    ADAPTER,
    HUB_DATASETS,
    REJECTED,
    WHOLE_MODEL,
    Artifact,
    Export,
    PreparedRunConfig,
    Quality,
    Reason,
    RunConfig,
    Stage,
    StageError,
    StageResult,
)
from finetune_trainer.contract.verdict import Statement, Tone, explain_failures, word_for
from finetune_trainer.export.gguf import MODELFILE
from finetune_trainer.local.fields import apply_settings, in_local_words, settable_fields
from finetune_trainer.memory.machine import this_machine
from finetune_trainer.model import prequantized
from finetune_trainer.prepare.dataset_files import find_data_files
from finetune_trainer.runtime.lifecycle import set_up_libraries
from finetune_trainer.runtime.reporter import Reporter
from finetune_trainer.stage_runner import as_prepared, guarded, perform, stop_on_signal
from finetune_trainer.store import LocalFolder
from finetune_trainer.store.marker import describe_file, open_stage

# In a checkout, the examples are the defaults.
EXAMPLES = Path(__file__).resolve().parents[3] / "examples"
SAMPLE = EXAMPLES / "data" / "lumora-nest.csv"
SAMPLE_EVAL = EXAMPLES / "data" / "lumora-nest-eval.csv"

RESULTS = {ADAPTER: "lora_adapter", WHOLE_MODEL: "tuned"}
"""What the folders of a training's result are called here."""

TITLE = "GGUF files against what they were made of"
WIDTH = 120  # of a log, which has none of its own
_MARKS = {Tone.GOOD: ("✓ ", "green"), Tone.BAD: ("✗ ", "red")}

log = logging.getLogger(__name__)

app = typer.Typer(help="Train, merge and convert on one machine.", no_args_is_help=True)

OutputOption = Annotated[Path, typer.Option(help="Folder for the results.")]
DEFAULT_OUTPUT = Path("models")


@app.command()
def train(
    *,
    dataset: Annotated[
        str | None,
        typer.Option(help="CSV, JSON lines or Parquet; default: the sample."),
    ] = None,
    base_model: Annotated[
        str | None,
        typer.Option(
            help="org/name or a folder; default: the sample's small model. HF_TOKEN is a "
            "token of the Hub."
        ),
    ] = None,
    eval_dataset: Annotated[
        str | None, typer.Option(help="Held-out examples; default: some of the dataset's.")
    ] = None,
    method: Annotated[str | None, typer.Option(help="lora (default), qlora or full.")] = None,
    objective: Annotated[
        str | None, typer.Option(help="sft (default), dpo, orpo or kto, by the dataset's columns.")
    ] = None,
    epochs: Annotated[str | None, typer.Option(help="Passes over the data, or auto.")] = None,
    learning_rate: Annotated[
        str | None, typer.Option(help="The optimizer's; default: 2e-4.")
    ] = None,
    batch_size: Annotated[
        str | None, typer.Option(help="Examples a pass, at most; default: 2.")
    ] = None,
    max_sequence_length: Annotated[
        str | None, typer.Option(help="Tokens at which examples are cut; default: 2048.")
    ] = None,
    output: OutputOption = DEFAULT_OUTPUT,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="PATH=VALUE",
            help="Any field, e.g. training.learningRate=1e-3 or "
            "training.lora.targetModules=q_proj,v_proj (repeatable); "
            "`finetune-trainer local fields` lists them.",
        ),
    ] = None,
) -> None:
    """Fine-tune: leaves OUTPUT/lora_adapter, or OUTPUT/tuned with the method full."""
    flags = {
        "--dataset": dataset,
        "--eval-dataset": eval_dataset,
        "--base-model": base_model,
        "--method": method,
        "--objective": objective,
        "--epochs": epochs,
        "--learning-rate": learning_rate,
        "--batch-size": batch_size,
        "--max-sequence-length": max_sequence_length,
    }
    given = [f"{flag}={value}" for flag, value in flags.items() if value is not None]
    given += settings or []
    _finish(Stage.TRAIN, lambda reporter: train_adapter(given, output.resolve(), reporter))


@app.command()
def merge(output: OutputOption = DEFAULT_OUTPUT) -> None:
    """Merge the adapter into its base model, or round the whole model that was trained to 16 bits:
    leaves OUTPUT/merged."""
    _finish(Stage.EXPORT, lambda reporter: merge_adapter(output.resolve(), reporter))


@app.command()
def gguf(
    types: Annotated[
        str | None,
        typer.Option("--gguf", help="Types, e.g. Q8_0,Q4_K_M; default: F16,Q8_0,Q4_K_M."),
    ] = None,
    output: OutputOption = DEFAULT_OUTPUT,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="PATH=VALUE",
            help="Any field of export, e.g. export.importanceMatrix=true (repeatable).",
        ),
    ] = None,
) -> None:
    """Convert the merged model to GGUF files, and measure each: leaves OUTPUT/gguf, a Modelfile,
    a report and a model card."""
    given = ([f"--gguf={types}"] if types else []) + (settings or [])
    _finish(Stage.EXPORT, lambda reporter: convert_to_gguf(given, output.resolve(), reporter))


@app.command()
def fields() -> None:
    """List all fields that --set takes, with defaults and what they mean."""
    console = Console(highlight=False, soft_wrap=True)
    for field in settable_fields().values():
        console.print(f"[bold]{field.path}[/]={field.default}", markup=True)
        console.print(f"    {field.description}", markup=False)


class LocalWords(logging.Filter):
    """Puts what is logged into the words of one machine."""

    def __init__(self, words: Callable[[str], str]) -> None:
        super().__init__()
        self._words = words

    def filter(self, record: logging.LogRecord) -> bool:
        """Change the record; it is always logged."""
        record.msg, record.args = self._words(record.getMessage()), ()
        return True


def log_in_words(words: Callable[[str], str]) -> None:
    """Have all that is logged from now on pass through `words`."""
    for handler in logging.getLogger().handlers:
        handler.addFilter(LocalWords(words))


def _finish(stage: Stage, work: Callable[[Reporter], StageResult]) -> None:
    set_up_libraries()
    log_in_words(in_local_words)
    with Reporter() as reporter:
        stop_on_signal(lambda: stage, None, reporter)
        result = guarded(stage, lambda: work(reporter))
    show_quality(result.artifacts)
    sys.exit(result.reason.exit_code)


def train_adapter(settings: Sequence[str], folder: Path, reporter: Reporter) -> StageResult:
    """Prepare and train, and lay out the adapter as `lora_adapter` or the model as `tuned`."""
    given = run_config(settings, folder)
    prepared = perform(Stage.PREPARE, given, _workspace(folder), reporter)
    log.info("Dataset: %s: %s", given.dataset.source, prepared.message)
    config = as_prepared(given.model_copy(update={"resolved": prepared.resolved}))
    if Stage.TRAIN in prepared.complete:
        log.info("Nothing changed since this training; its result is taken as it is")
    else:
        perform(Stage.TRAIN, config, _workspace(folder), reporter)
    _run_file(folder).write_text(config.model_dump_json(indent=2))
    for former in RESULTS.values():
        shutil.rmtree(folder / former, ignore_errors=True)
    target = _result(config, folder)
    store = LocalFolder(_store_folder(folder))
    trained = open_stage(store, Stage.TRAIN, config.resolved.fingerprints.train)
    trained.fetch_folder(config.training.result_folder, target)
    return _done(Stage.TRAIN, f"the {_result_noun(config)} is in {target}", "merge", folder)


def merge_adapter(folder: Path, reporter: Reporter) -> StageResult:
    """Merge `lora_adapter` into its base model, as `merged`; or copy `tuned` in 16 bits."""
    config = _last_run(folder)
    from finetune_trainer.export.merge.model_folder import write_model  # noqa: PLC0415 - imports torch

    base = prequantized.fetch_whole(config, _workspace(folder) / "model", reporter)
    target = folder / "merged"
    shutil.rmtree(target, ignore_errors=True)
    reporter.message(f"Merging the {_result_noun(config)} into {config.model.source}")
    write_model(base, _result(config, folder), target)
    return _done(Stage.EXPORT, f"the merged model is in {target}", "gguf", folder)


def convert_to_gguf(settings: Sequence[str], folder: Path, reporter: Reporter) -> StageResult:
    """Convert `merged` to GGUF files in `gguf`, and check each one on held-out rows."""
    config = _last_run(folder)
    fields = apply_settings(
        {"export": config.export.model_dump(exclude_defaults=True)}, settings, ["export"]
    )
    export = Export.model_validate(fields["export"])
    if not export.gguf:
        export = export.model_copy(update={"gguf": Export().gguf})
    config = config.model_copy(update={"export": export})
    merged = folder / "merged"
    if not merged.is_dir():
        raise StageError(
            Reason.INVALID_CONFIG, f"{merged} does not exist: run `make merge` before `make gguf`."
        )
    from finetune_trainer.export import export_stage  # noqa: PLC0415 - imports torch

    for former in ("gguf", REJECTED):
        shutil.rmtree(folder / former, ignore_errors=True)
    (folder / MODELFILE).unlink(missing_ok=True)  # none is written where no file may be used
    files: list[Artifact] = []

    def add(file: Path, path: str, quality: Quality | None = None) -> None:
        files.append(describe_file(file, path).model_copy(update={"quality": quality}))

    store = LocalFolder(_store_folder(folder))
    gate = export_stage.convert_merged(config, folder, store, add, reporter)
    for item in files:
        if item.rejected:  # not before all are made, since some are made of it
            (folder / REJECTED).mkdir(exist_ok=True)
            (folder / "gguf" / Path(item.path).name).rename(folder / item.path)
    export_stage.describe_converted(config, folder, store, gate, files)
    modelfile = shlex.quote(str(folder / MODELFILE))
    done = (
        f"{len(export.gguf)} GGUF files are in {folder / 'gguf'}, and a Modelfile beside. Next: "
        f"look at {folder / export_stage.REPORT}, then `ollama create NAME -f {modelfile}`"
    )
    return StageResult(
        stage=Stage.EXPORT,
        reason=export_stage.reason_of(files),
        message=explain_failures(gate, files, export) or done,
        artifacts=tuple(files),
    )


def run_config(settings: Sequence[str], folder: Path) -> RunConfig:
    """run.json of a training whose store is in `folder`; raises StageError for a bad setting."""
    fields: dict[str, Any] = {
        "model": {},
        "dataset": {},
        # The training alone; `make merge` and `make gguf` come afterwards.
        "export": {"merged": False, "gguf": []},
        "output": {"uri": str(_store_folder(folder))},
    }
    apply_settings(fields, settings)
    if fields.get("training", {}).get("method") == "full":
        fields["export"]["merged"] = True  # what it leaves is no result by itself
    model, dataset = fields["model"], fields["dataset"]
    if "source" not in dataset:
        if not SAMPLE.is_file():
            raise StageError(Reason.INVALID_CONFIG, "Name a file of examples with --dataset.")
        dataset["source"] = str(SAMPLE)
        dataset.setdefault("evalSource", str(SAMPLE_EVAL))
    for key in ("source", "evalSource"):
        if (path := dataset.get(key)) and not path.startswith(("s3://", HUB_DATASETS)):
            dataset[key] = str(Path(path).resolve()) + ("/" if path.endswith("/") else "")
    if "source" not in model:
        before = RunConfig.model_validate(fields | {"model": {"source": "later"}})
        find_data_files(before.dataset, before.storage)  # a wrong name shows first
        model["source"] = make_base_model()
    elif Path(model["source"]).is_dir():
        model["source"] = str(Path(model["source"]).resolve())
    fields.setdefault("hardware", this_machine(folder))
    return RunConfig.model_validate(fields)


def make_base_model() -> str:
    """The folder of the examples' small model, made on first use."""
    script = EXAMPLES / "base_model.py"
    if not script.is_file():
        raise StageError(Reason.INVALID_CONFIG, "Name a base model with --base-model.")
    log.info("Base model: the small one of the examples, made on first use")
    made = subprocess.run([sys.executable, script], capture_output=True, text=True, check=False)
    if made.returncode != 0:
        raise StageError(
            Reason.MODEL_NOT_FOUND,
            f"The examples' base model could not be made: {made.stderr.strip()[-300:]} Run `make "
            "build`, or name another with --base-model.",
        )
    return made.stdout.strip()


def _store_folder(folder: Path) -> Path:
    return folder / ".finetune" / "store"


def _workspace(folder: Path) -> Path:
    return folder / ".finetune" / "workspace"


def _run_file(folder: Path) -> Path:
    return folder / ".finetune" / "run.json"


def _last_run(folder: Path) -> PreparedRunConfig:
    if _run_file(folder).is_file():
        config = PreparedRunConfig.model_validate_json(_run_file(folder).read_bytes())
        if _result(config, folder).is_dir():
            return config
    raise StageError(
        Reason.INVALID_CONFIG, f"There is no adapter in {folder}: run `make train` first."
    )


def _result(config: RunConfig, folder: Path) -> Path:
    """Where the training's result is laid out."""
    return folder / RESULTS[config.training.result_folder]


def _result_noun(config: RunConfig) -> str:
    return "tuned model" if config.training.method == "full" else "adapter"


def _done(stage: Stage, message: str, then: str, folder: Path) -> StageResult:
    """`then` is the command that goes on from here."""
    elsewhere = folder != DEFAULT_OUTPUT.resolve()
    command = ["finetune-trainer", "local", then, *(["--output", str(folder)] if elsewhere else [])]
    make = ["make", then, *([f"OUTPUT={folder}"] if elsewhere else [])]
    following = f"Next: `{shlex.join(command)}` (`{shlex.join(make)}`)"
    return StageResult(stage=stage, reason=Reason.SUCCEEDED, message=f"{message}. {following}")


def show_quality(artifacts: Sequence[Artifact]) -> None:
    """Print the table, where there is something to show."""
    table = quality_table(artifacts)
    if table is not None:
        Console(width=None if sys.stdout.isatty() else WIDTH).print(table)


def quality_table(artifacts: Sequence[Artifact]) -> Table | None:
    """One row for each GGUF file, the largest first; None where there is none."""
    files = [each for each in artifacts if each.path.endswith(".gguf")]
    if not files:
        return None
    table = Table(title=TITLE, title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("File", overflow="fold")
    for heading in ("Size", "KL (limit)", "Same top token", "Perplexity"):
        table.add_column(heading, justify="right")
    table.add_column("Verdict")
    for file in sorted(files, key=lambda each: -each.bytes):
        name = PurePosixPath(file.path).name
        table.add_row(name, decimal(file.bytes), *_figures(file.quality), _marked(word_for(file)))
    return table


def _figures(quality: Quality | None) -> tuple[str, str, str]:
    if quality is None:
        return "", "", ""
    limit = quality.max_kl_divergence
    return (
        f"{quality.kl_divergence:.3g} ({'none' if limit is None else f'{limit:.3g}'})",
        f"{quality.same_top_token:.1%}",
        f"{quality.perplexity:.4g}",
    )


def _marked(verdict: Statement) -> str:
    mark, colour = _MARKS.get(verdict.tone, ("", "none"))
    return f"[{colour}]{mark}{verdict.text}[/]"
