"""What it means when the Hugging Face Hub doesn't give what is read from it.

The Hub's client reads HF_TOKEN and HF_ENDPOINT from the environment. The token is in no message.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import httpx
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from finetune_trainer.contract import Reason, StageError

LIST_SECONDS = 20.0  # for the list of a repository's files


@dataclass(frozen=True)
class HubRead:
    """What is read, as messages name it, and the reasons of its errors."""

    noun: str
    source: str
    """The field that names the repository."""

    revision: str
    """Where a user writes the revision."""

    missing: Reason
    denied: Reason


MODEL = HubRead(
    noun="model",
    source="spec.model.source",
    revision="spec.model.revision",
    missing=Reason.MODEL_NOT_FOUND,
    denied=Reason.MODEL_ACCESS_DENIED,
)
INITIAL_ADAPTER = HubRead(
    noun="adapter",
    source="spec.training.initFrom.source",
    revision="spec.training.initFrom.revision",
    missing=Reason.MODEL_NOT_FOUND,
    denied=Reason.MODEL_ACCESS_DENIED,
)
DATASET = HubRead(
    noun="dataset",
    source="spec.dataset.source",
    revision="what follows the @",
    missing=Reason.DATASET_NOT_FOUND,
    denied=Reason.STORAGE_ACCESS_DENIED,
)


@contextmanager
def hub_errors(read: HubRead, repository: str, revision: str) -> Iterator[None]:
    """Turn the client's errors into StageErrors."""
    named = f"The {read.noun} {repository}"
    try:
        yield
    except GatedRepoError as error:
        raise StageError(
            read.denied,
            f"{named} is gated: accept its licence on its page on the Hub, and name a Secret with "
            "that account's token in spec.model.tokenSecretRef.",
        ) from error
    except RevisionNotFoundError as error:
        raise StageError(
            read.missing, f"{named} has no revision {revision!r}: correct {read.revision}."
        ) from error
    except RepositoryNotFoundError as error:
        raise not_found(read, repository, revision) from error
    except HFValidationError as error:
        raise StageError(
            Reason.INVALID_CONFIG, f"{repository!r} is no name of a Hub repository: write org/name."
        ) from error
    except (LocalEntryNotFoundError, OfflineModeIsEnabled, httpx.TransportError) as error:
        raise _unavailable(read, repository, type(error).__name__) from error
    except EntryNotFoundError as error:
        raise StageError(
            read.missing, f"A file of {repository} is missing at {revision}: {error}"
        ) from error
    except HfHubHTTPError as error:
        status = error.response.status_code
        if status not in (401, 403):
            raise _unavailable(read, repository, f"HTTP {status}") from error
        raise StageError(
            read.denied,
            f"The Hub refuses the {read.noun} {repository} (HTTP {status}): check the token in the "
            "Secret of spec.model.tokenSecretRef, and that its account may read it.",
        ) from error


def not_found(read: HubRead, repository: str, revision: str) -> StageError:
    """There is no such repository, as far as this token can tell."""
    return StageError(
        read.missing,
        f"The {read.noun} {repository} ({revision}) does not exist on the Hub, or it is private: "
        f"correct {read.source}, or name a Secret with a token that may read it in "
        "spec.model.tokenSecretRef.",
    )


def _unavailable(read: HubRead, repository: str, cause: str) -> StageError:
    return StageError(
        Reason.MODEL_HUB_UNAVAILABLE,
        f"The Hub can't be reached for the {read.noun} {repository} ({cause}): check the network "
        f"and HF_ENDPOINT, or put it into a bucket and name that in {read.source}.",
    )
