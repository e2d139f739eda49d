"""llama.cpp's own converter and ours on many models in one process, which imports it once.

    python -m tests.integration.trainer.convert_both '[{"plain": …, "type": …}, …]'

Each is either the plain way ({"plain", "target", "type", "name"}), or a request of convert_worker.
"""

from __future__ import annotations

import json
import sys

from finetune_trainer.model.converter import llama_folder

sys.path[:0] = [str(llama_folder()), str(llama_folder() / "gguf-py")]

import convert_hf_to_gguf  # type: ignore[import-not-found] # noqa: E402 - from there

from finetune_trainer.export.gguf import ConvertRequest, convert_worker  # noqa: E402


def plainly(folder: str, target: str, kind: str, name: str) -> None:
    """As people call it."""
    options = ["--outfile", target, "--outtype", kind.lower(), "--model-name", name]
    sys.argv = [convert_hf_to_gguf.__name__, folder, *options]
    convert_hf_to_gguf.main()


for request in json.loads(sys.argv[1]):
    if "plain" in request:
        plainly(request["plain"], request["target"], request["type"], request["name"])
    else:
        ours = {**request, "llama": str(llama_folder()), "threads": 1}
        convert_worker.write(ConvertRequest.model_validate(ours))
