"""What people read of an export: report.html, and README.md, the model card.

facts      what both are written from: the values of the stages, read once
tables     the rows of every table, as text; how figures are written
summary    what came out, in sentences; how each artifact is loaded, as commands
charts     the curves and the histogram as SVG
documents  report.html, one file that asks for nothing else, and the card with the Hub's metadata
templates/ the texts, the style of the page

Both are made of values alone: nothing here reads the store or a model.
"""

from finetune_trainer.export.report.documents import license_of, write_model_card, write_report
from finetune_trainer.export.report.facts import Facts

__all__ = ["Facts", "license_of", "write_model_card", "write_report"]
