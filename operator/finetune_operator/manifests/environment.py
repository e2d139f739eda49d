"""The environment variables of a stage's container."""

from __future__ import annotations

from typing import Any

from finetune_operator.api.base import EnvVar
from finetune_operator.api.finetunejob import FineTuneJobSpec, PodSettings
from finetune_operator.settings import Settings
from finetune_trainer.contract import Stage

Variable = dict[str, Any]


def environment(
    spec: FineTuneJobSpec,
    stage: Stage,
    pod: PodSettings,
    settings: Settings,
    told: dict[str, str],
) -> list[Variable]:
    """All variables: those of the user, those in `told`, and the credentials by reference."""
    own = [{"name": name, "value": value} for name, value in told.items()]
    own += _credentials(spec)
    own += _credentials_of_export(spec) if stage is Stage.EXPORT else []
    # The last of two variables with one name wins: the user's stand first, so as not to break the
    # contract between operator and trainer.
    taken = {each["name"] for each in own}
    users = [_variable(each) for each in pod.env if each.name not in taken]
    return [*_defaults(settings, users), *users, *own]


def _defaults(settings: Settings, users: list[Variable]) -> list[Variable]:
    """What the user may set otherwise."""
    defaults = {"FINETUNE_LOG_FORMAT": settings.trainer_log_format}
    given = {each["name"] for each in users}
    return [{"name": name, "value": text} for name, text in defaults.items() if name not in given]


def _credentials(spec: FineTuneJobSpec) -> list[Variable]:
    found: list[Variable] = []
    if spec.storage.secret_ref is not None:
        secret = spec.storage.secret_ref.name
        found += [
            _from_secret("AWS_ACCESS_KEY_ID", secret, "AWS_ACCESS_KEY_ID"),
            _from_secret("AWS_SECRET_ACCESS_KEY", secret, "AWS_SECRET_ACCESS_KEY"),
            _from_secret("AWS_SESSION_TOKEN", secret, "AWS_SESSION_TOKEN", optional=True),
            # boto3 reads it where spec.storage.endpoint says nothing: manifests in Git then fit
            # every cluster.
            _from_secret("AWS_ENDPOINT_URL_S3", secret, "AWS_ENDPOINT_URL_S3", optional=True),
        ]
    if spec.model.token_secret_ref is not None:
        token = spec.model.token_secret_ref
        found.append(_from_secret("HF_TOKEN", token.name, token.key))
    return found


def _credentials_of_export(spec: FineTuneJobSpec) -> list[Variable]:
    """What no other stage has a use for."""
    found: list[Variable] = []
    if spec.export.signing is not None:
        key = spec.export.signing.key_secret_ref
        found.append(_from_secret("FINETUNE_SIGNING_KEY", key.name, key.key))
    if spec.output.hub is not None:
        token = spec.output.hub.token_secret_ref
        found.append(_from_secret("FINETUNE_HUB_TOKEN", token.name, token.key))
    return found


def _variable(given: EnvVar) -> Variable:
    if given.value_from is None:
        return {"name": given.name, "value": given.value}
    secret = given.value_from.secret_key_ref
    return _from_secret(given.name, secret.name, secret.key, optional=secret.optional)


def _from_secret(name: str, secret: str, key: str, *, optional: bool = False) -> Variable:
    reference: dict[str, Any] = {"name": secret, "key": key}
    if optional:
        reference["optional"] = True
    return {"name": name, "valueFrom": {"secretKeyRef": reference}}
