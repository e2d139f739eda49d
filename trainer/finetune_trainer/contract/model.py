"""spec.model."""

from __future__ import annotations

from pathlib import PurePosixPath
from typing import Annotated

from pydantic import Field

from finetune_trainer.contract.base import Base, cel
from finetune_trainer.contract.storage import ModelStorage


class Model(Base):
    """The base model to fine-tune."""

    source: Annotated[
        str,
        Field(
            min_length=1,
            max_length=1024,
            json_schema_extra=cel(
                "self.startsWith('s3://') || self.startsWith('/')"
                " || self.matches('^[A-Za-z0-9_.-]+/[A-Za-z0-9_.-]+$')",
                "must be org/name on the Hugging Face Hub, s3://bucket/folder, "
                "or the absolute path of a mounted folder",
            ),
        ),
    ]
    """Where the base model is: `org/name` on the Hugging Face Hub, `s3://bucket/folder`, or the
    absolute path of a folder that is mounted into the pods. It must hold safetensors weights."""

    revision: Annotated[str, Field(min_length=1, max_length=256)] = "main"
    """Branch, tag or commit of a Hub model. It is resolved to a commit, which status.lineage
    names. A moving branch retrains when the spec changes next, never by itself, and only where
    files that are used have changed."""

    trust_remote_code: bool = False
    """Run Python code that comes with the model. Leave it off unless you have read that code."""

    storage: ModelStorage | None = None
    """How to reach the object store of source, where it is another than the one of spec.storage.
    Nothing of spec.storage holds for it then."""


def display_name(source: str) -> str:
    """The model's short name, for file names: the last part of its source."""
    name = PurePosixPath(source.removeprefix("s3://").rstrip("/")).name
    return "".join(c if c.isalnum() or c in "._-" else "-" for c in name) or "model"
