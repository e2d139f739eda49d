"""The Hugging Face Hub: listing and downloading a repository, and what its errors mean.

The client reads HF_TOKEN and HF_ENDPOINT from the environment.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import httpx
from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    SafetensorsParsingError,
)

from finetune_trainer.contract import Reason, StageError
from finetune_trainer.store import OnBytes

LIST_SECONDS = 20.0


def list_files(repository: str, revision: str) -> tuple[str, dict[str, int]]:
    """The commit that a branch, tag or commit stands for, and the size of each file."""
    with _errors(repository, revision):
        info = HfApi().model_info(
            repository, revision=revision, files_metadata=True, timeout=LIST_SECONDS
        )
    if info.sha is None:
        raise _not_found(repository, revision)
    return info.sha, {file.rfilename: file.size or 0 for file in info.siblings or []}


def download(repository: str, commit: str, names: list[str], on_bytes: OnBytes) -> Path:
    """Download files of a commit into the Hub client's cache; returns the folder they are in."""
    folder = Path()
    for name in names:
        with _errors(repository, commit):
            file = Path(hf_hub_download(repository, name, revision=commit))
        on_bytes(file.stat().st_size)
        folder = file.parent
    return folder


def read_header(repository: str, commit: str, name: str) -> dict[str, Any]:
    """The header of a safetensors file; raises ValueError where it is none."""
    with _errors(repository, commit):
        try:
            found = HfApi().parse_safetensors_file_metadata(repository, name, revision=commit)
        except SafetensorsParsingError as error:
            raise ValueError(str(error)) from error
    return {tensor: asdict(info) for tensor, info in found.tensors.items()}


@contextmanager
def _errors(repository: str, revision: str) -> Iterator[None]:
    try:
        yield
    except GatedRepoError as error:
        raise StageError(
            Reason.MODEL_ACCESS_DENIED,
            f"The model {repository} is gated: accept its licence on its page on the Hub, and name "
            "a Secret with that account's token in spec.model.tokenSecretRef.",
        ) from error
    except RevisionNotFoundError as error:
        raise StageError(
            Reason.MODEL_NOT_FOUND,
            f"The model {repository} has no revision {revision!r}: correct spec.model.revision.",
        ) from error
    except RepositoryNotFoundError as error:
        raise _not_found(repository, revision) from error
    except HFValidationError as error:
        raise StageError(
            Reason.INVALID_CONFIG, f"{repository!r} is no name of a Hub repository: write org/name."
        ) from error
    except (LocalEntryNotFoundError, OfflineModeIsEnabled, httpx.TransportError) as error:
        raise _unavailable(repository, type(error).__name__) from error
    except EntryNotFoundError as error:
        raise StageError(
            Reason.MODEL_NOT_FOUND, f"A file of {repository} is missing at {revision}: {error}"
        ) from error
    except HfHubHTTPError as error:
        status = error.response.status_code
        if status in (401, 403):
            raise _denied(repository, status) from error
        raise _unavailable(repository, f"HTTP {status}") from error


def _not_found(repository: str, revision: str) -> StageError:
    return StageError(
        Reason.MODEL_NOT_FOUND,
        f"The model {repository} ({revision}) does not exist on the Hub, or it is private: correct "
        "spec.model.source, or name a Secret with a token that may read it in "
        "spec.model.tokenSecretRef.",
    )


def _denied(repository: str, status: Any) -> StageError:
    return StageError(
        Reason.MODEL_ACCESS_DENIED,
        f"The Hub refuses the model {repository} (HTTP {status}): check the token in the Secret of "
        "spec.model.tokenSecretRef, and that its account may read the model.",
    )


def _unavailable(repository: str, cause: str) -> StageError:
    return StageError(
        Reason.MODEL_HUB_UNAVAILABLE,
        f"The Hub can't be reached for the model {repository} ({cause}): check the network and "
        "HF_ENDPOINT, or put the model into a bucket and name that in spec.model.source.",
    )
