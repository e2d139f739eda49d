"""Settings from the environment."""

from __future__ import annotations

import pytest

from finetune_operator.settings import Settings, SettingsError

MINIMUM = {"FINETUNE_TRAINER_IMAGE": "trainer:1"}


def test_only_the_image_is_needed() -> None:
    settings = Settings.from_environment({**MINIMUM, "HOME": "/root"})
    assert settings == Settings(trainer_image="trainer:1")


def test_lists_are_separated_by_commas() -> None:
    settings = Settings.from_environment({**MINIMUM, "FINETUNE_NAMESPACES": "one, two,"})
    assert settings.namespaces == ("one", "two")


def test_an_empty_variable_is_as_good_as_none() -> None:
    empty = {"FINETUNE_NAMESPACES": "", "FINETUNE_WORKERS": ""}
    assert Settings.from_environment({**MINIMUM, **empty}) == Settings(trainer_image="trainer:1")


def test_settings_of_the_stages_are_json() -> None:
    text = '{"train": {"runtimeClassName": "nvidia"}}'
    settings = Settings.from_environment({**MINIMUM, "FINETUNE_STAGES": text})
    assert settings.stages == {"train": {"runtimeClassName": "nvidia"}}


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        pytest.param(
            {**MINIMUM, "FINETUNE_STAGES": "{"},
            "FINETUNE_STAGES={: Value error, it is no JSON",
            id="no JSON",
        ),
        pytest.param(
            {**MINIMUM, "FINETUNE_STAGES": '{"train": {"runtimeClass": "nvidia"}}'},
            "Value error, train.runtimeClass: ",
            id="an unknown field of a stage",
        ),
        pytest.param(
            {**MINIMUM, "FINETUNE_MODEL_CACHE": '{"image": {"reference": "a"}, "claim": "b"}'},
            "Value error, claim: ",
            id="an unknown place for models",
        ),
        pytest.param(
            {**MINIMUM, "FINETUNE_MODEL_CACHE": '{"persistentVolumeClaim": null}'},
            "must have exactly one of persistentVolumeClaim and image",
            id="no place for models",
        ),
        pytest.param({}, "FINETUNE_TRAINER_IMAGE is not set", id="no image"),
        pytest.param(
            {**MINIMUM, "FINETUNE_WORKERS": "many"},
            "FINETUNE_WORKERS=many: Input should be a valid integer",
            id="no number",
        ),
        pytest.param(
            {**MINIMUM, "FINETUNE_IMAGE_PULL_POLICY": "Sometimes"},
            "FINETUNE_IMAGE_PULL_POLICY=Sometimes: Input should be 'Always'",
            id="an unknown word",
        ),
        pytest.param(
            {**MINIMUM, "FINETUNE_LOG_FORMAT": "plain"},
            "FINETUNE_LOG_FORMAT=plain: Input should be 'human' or 'json'",
            id="an unknown format of the log",
        ),
        pytest.param(
            {**MINIMUM, "FINETUNE_WEB_PORT": "8080"},
            "FINETUNE_WEB_PORT=8080: is FINETUNE_HEALTH_PORT's as well",
            id="one port for both",
        ),
    ],
)
def test_errors_name_the_variable(environment: dict[str, str], message: str) -> None:
    with pytest.raises(SettingsError) as caught:
        Settings.from_environment(environment)
    assert message in str(caught.value)
