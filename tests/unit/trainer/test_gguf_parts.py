"""A GGUF file that is too large for one is published in parts, and told of as one."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import gguf
import numpy as np

from finetune_trainer.contract import (
    Export,
    FileVerdict,
    GateReport,
    Quality,
    Quantization,
    Training,
)
from finetune_trainer.contract.artifacts import PART_BYTES, Artifact
from finetune_trainer.contract.verdict import explain_failures
from finetune_trainer.export.gguf.files import file_name
from finetune_trainer.export.inputs import ExportContext, publish_file
from finetune_trainer.export.publish import Publication
from finetune_trainer.memory.forecast import export_disk, gguf_bytes
from finetune_trainer.runtime.reporter import Reporter
from finetune_trainer.store import LocalFolder
from finetune_trainer.store.versions import Version, current, image_files
from tests import report_facts
from tests.publishing import fingerprint, manifest
from tests.unit.trainer.test_memory_shape import shape

Q = Quantization
FIGURES = Quality(kl_divergence=0.001, same_top_token=0.99, perplexity=5.0)


def write_gguf(file: Path) -> None:
    writer = gguf.GGUFWriter(file, "llama")
    for number in range(6):
        writer.add_tensor(f"blk.{number}.w", np.full((16, 16), number, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_file_above_the_limit_is_published_in_parts_that_leave_the_disk(tmp_path: Path) -> None:
    output = LocalFolder(tmp_path / "output")
    file = tmp_path / "result" / "gguf" / file_name("model", Q.Q8_0)
    file.parent.mkdir(parents=True)
    write_gguf(file)
    nothing = cast("Any", None)
    with Publication(output, fingerprint("fp"), Reporter()) as publication:
        context = ExportContext(
            config=report_facts.config(),
            model=nothing,
            examples=nothing,
            result=file.parents[1],
            workspace=tmp_path,
            add_file=publication.add,
            reporter=nothing,
            discard=publication.discard,
            part_bytes=2 * 16 * 16 * 4,
        )
        verdict = FileVerdict(file=file.name, quantization=Q.Q8_0, quality=FIGURES)
        publish_file(context, file, verdict, f"gguf/{file.name}")
        publication.commit(lambda files: manifest("fp", files))
    assert context.first_parts[file].name == "model-Q8_0-00001-of-00003.gguf"
    version = cast("Version", current(output))
    parts = image_files(version, "Q8_0")
    assert [path for _, path in parts] == [f"model-Q8_0-0000{n}-of-00003.gguf" for n in (1, 2, 3)]
    assert [item.quality is not None for item, _ in parts] == [True, False, False]
    assert [item.follows for item, _ in parts] == [False, True, True]
    assert {item.whole for item, _ in parts} == {"gguf/model-Q8_0.gguf"}
    sums = output.read(version.path("SHA256SUMS"))
    assert sums is not None
    assert sums.count(b"model-Q8_0-0000") == 3
    assert list(file.parent.iterdir()) == [file]


def test_the_parts_of_a_file_count_as_one_in_message_and_report() -> None:
    name = file_name("model", Q.Q8_0)
    bad = FileVerdict(file=name, quantization=Q.Q8_0, problems=("it rambles",), quality=FIGURES)
    paths = [f"rejected/model-Q8_0-0000{n}-of-00003.gguf" for n in (1, 2, 3)]
    parts = tuple(Artifact(path=path, bytes=7, sha256="0") for path in paths)
    gate = GateReport(files=(bad,))
    said = explain_failures(gate, parts, Export())
    assert said.startswith("1 of 1 GGUF files falls short and is kept apart")
    (shown,) = report_facts.facts(gate=gate, files=parts).ggufs
    assert shown.artifact is not None
    assert (shown.artifact.path, shown.artifact.bytes) == (paths[0], 21)


def test_parts_lie_on_the_disk_beside_the_whole() -> None:
    large, small = shape("llama-3.3-70b"), shape("llama-3.1-8b")
    assert gguf_bytes(large, Q.Q8_0) > PART_BYTES > gguf_bytes(large, Q.Q4_K_M)
    others = (Q.BF16, Q.Q6_K, Q.Q5_K_M, Q.Q4_K_M)  # so many that they outweigh the merged model
    for model, times in ((large, 2), (small, 1)):
        less, more = (
            export_disk(model, Training(), Export(merged=False, gguf=kinds), 0).work
            for kinds in (others, (*others, Q.Q8_0))
        )
        assert more - less == times * gguf_bytes(model, Q.Q8_0)
