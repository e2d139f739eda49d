"""owner.json: the FineTuneJob that an output folder belongs to.

The first FineTuneJob to come writes it, on the condition that there is none, so that of two at the
same time one loses. A FineTuneJob that is deleted and made again under its name is the same owner.
Outputs of 0.1.0 have none, and belong to the first to come.
"""

from __future__ import annotations

import logging

from pydantic import ConfigDict, ValidationError

from finetune_trainer.contract import Base, JobReference, Output, Reason, StageError
from finetune_trainer.runtime import timestamp
from finetune_trainer.store import Folder

OWNER = "owner.json"
_ATTEMPTS = 3  # to read what somebody else wrote and may have deleted again

log = logging.getLogger(__name__)


class Owner(Base):
    """What owner.json holds."""

    model_config = ConfigDict(extra="ignore")

    namespace: str
    name: str
    since: str
    """RFC 3339."""

    @property
    def job(self) -> str:
        """As a person names it, and as `takeOverFrom` does."""
        return f"{self.namespace}/{self.name}"


def claim(output: Folder, settings: Output, job: JobReference | None) -> None:
    """Make sure that the folder belongs to this FineTuneJob, before anything is written to it.

    A run without a FineTuneJob claims nothing, and may not write to what belongs to one. Raises
    StageError(OutputInUse) for the folder of another FineTuneJob, unless `takeOverFrom` names it.
    """
    for _ in range(_ATTEMPTS):
        owner = read_owner(output)
        if owner is None and job is not None:
            if output.create(OWNER, _encoded(job)):
                return
            continue  # somebody was faster
        if owner is None or _is(owner, job):
            return
        if job is not None and settings.take_over_from == owner.job:
            output.write(OWNER, _encoded(job))
            log.warning("%s was %s's and now belongs to this job", output.uri, owner.job)
            return
        raise _in_use(output, owner, settings, job)
    raise StageError(
        Reason.STORAGE_UNAVAILABLE,
        f"{output.uri_of(OWNER)} comes and goes: see who else writes to the folder.",
    )


def check_owner(output: Folder, settings: Output, job: JobReference | None) -> None:
    """Make sure that the folder still belongs to this FineTuneJob. Raises StageError."""
    owner = read_owner(output)
    if owner is not None and not _is(owner, job):
        raise _in_use(output, owner, settings, job)


def read_owner(output: Folder) -> Owner | None:
    """Whom the folder belongs to, if to anybody; StageError if that can't be told."""
    data = output.read(OWNER)
    if data is None:
        return None
    try:
        return Owner.model_validate_json(data)
    except ValidationError as error:
        raise StageError(
            Reason.INVALID_CONFIG,
            f"{output.uri_of(OWNER)} doesn't say which FineTuneJob the folder belongs to: name "
            "another spec.output.uri, or delete that object if the folder is this job's.",
        ) from error


def _is(owner: Owner, job: JobReference | None) -> bool:
    return job is not None and (owner.namespace, owner.name) == (job.namespace, job.name)


def _encoded(job: JobReference) -> bytes:
    owner = Owner(namespace=job.namespace, name=job.name, since=timestamp())
    return owner.model_dump_json(indent=2).encode() + b"\n"


def _in_use(output: Folder, owner: Owner, settings: Output, job: JobReference | None) -> StageError:
    belongs = f"{output.uri} belongs to the FineTuneJob {owner.job} since {owner.since}"
    if job is None:
        remedy = "a run without a FineTuneJob may not write to it; name another output.uri"
    else:
        remedy = (
            "give each its own spec.output.uri, or take the folder over with "
            f"spec.output.takeOverFrom: {owner.job}"
        )
        if settings.take_over_from:
            belongs += f"; spec.output.takeOverFrom names {settings.take_over_from}"
    return StageError(Reason.OUTPUT_IN_USE, f"{belongs}: {remedy}.")
