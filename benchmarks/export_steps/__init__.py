"""What benchmarks.export runs in processes of its own, which are measured with what they import.

python -m benchmarks.export_steps.make FOLDER SHAPE        base/ and adapter/, random
python -m benchmarks.export_steps.merge FOLDER             plain: PEFT's merge, saved as merged/
python -m benchmarks.export_steps.quantize FROM TO TYPE    plain: as llama-quantize does
python -m benchmarks.export_steps.ours FOLDER TYPE…        ours: FOLDER/ours/
python -m benchmarks.export_steps.rows FOLDER              rows.jsonl, and rows.txt for the plain
python -m benchmarks.export_steps.gated FOLDER TYPE…       ours with the gate: FOLDER/ours/
python -m benchmarks.export_steps.check FOLDER FILE        what the gate reads of a file
"""
