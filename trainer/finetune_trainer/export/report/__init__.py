"""What people read of an export: report.html, and README.md, the model card.

facts      what both are written from: the values of the stages, read once
numbers    how figures are written
verdict    what came out, in a sentence
tables     the rows of every table, as text
loading    how each artifact is loaded, as commands
charts     the curves and the histogram as SVG
page       report.html: one file that asks for nothing else
card       README.md with the Hub's metadata
templates/ the texts, the style of the page

Both are made of values alone: nothing here reads the store or a model.
"""

from finetune_trainer.export.report.card import license_of, write_model_card
from finetune_trainer.export.report.facts import Facts
from finetune_trainer.export.report.page import write_report

__all__ = ["Facts", "license_of", "write_model_card", "write_report"]
