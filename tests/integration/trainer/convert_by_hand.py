"""llama.cpp's own converter on some models in one process, which imports it once.

python -m tests.integration.trainer.convert_by_hand '[{"folder": …, "target": …, "type": …}, …]'
"""

from __future__ import annotations

import json
import sys

from finetune_trainer.model.converter import llama_folder

sys.path[:0] = [str(llama_folder()), str(llama_folder() / "gguf-py")]

import convert_hf_to_gguf  # type: ignore[import-not-found] # noqa: E402 - from there

for request in json.loads(sys.argv[1]):
    options = ["--outfile", request["target"], "--outtype", request["type"]]
    options += ["--model-name", "tiny"]
    sys.argv = [convert_hf_to_gguf.__name__, request["folder"], *options]
    convert_hf_to_gguf.main()
