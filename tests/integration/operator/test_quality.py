"""What the quality gate says of an export's files, as the user sees it."""

from __future__ import annotations

from typing import Any

from finetune_trainer.contract import Artifact, Quality, Quantization, Reason, Stage
from finetune_trainer.contract.output import MOST_FILES
from tests.integration.operator.stage import (
    EXPORTED_VERSION,
    MANIFEST_URI,
    VERSION_FOLDER,
    Namespace,
    exported,
    prepared,
    resolved,
    trained,
)

PREPARE, TRAIN, EXPORT = Stage.PREPARE, Stage.TRAIN, Stage.EXPORT
GOOD = Quality(kl_divergence=0.0313, same_top_token=0.92, perplexity=5.5, max_kl_divergence=0.08)
BAD = GOOD.model_copy(update={"kl_divergence": 0.4123, "passed": False})
MESSAGE = (
    "model-Q4_K_M.gguf: KL divergence 0.4123, limit 0.08. Drop Q4_K_M from spec.export.gguf, or "
    "raise its limit in spec.export.qualityLimits."
)


def file(path: str, quality: Quality) -> Artifact:
    return Artifact(path=path, bytes=10, sha256="a" * 64, quality=quality)


def figures(here: Namespace) -> dict[str, Any]:
    """What status says of each file's quality."""
    found = here.status().get("artifacts") or []
    return {each["uri"].removeprefix(f"{VERSION_FOLDER}/"): each.get("quality") for each in found}


def messages(here: Namespace, reason: str) -> list[tuple[str, str]]:
    """Type and words of the Events of a reason."""
    events = [each for each in here.whole_events() if each["reason"] == reason]
    return [(each["type"], each["message"]) for each in events]


def test_a_file_that_the_gate_refuses_is_named_and_a_new_limit_exports_alone(
    here: Namespace,
) -> None:
    here.apply()
    here.succeed(prepared())
    here.succeed(trained())
    files = (file("gguf/model-Q8_0.gguf", GOOD), file("rejected/model-Q4_K_M.gguf", BAD))
    here.fail(
        EXPORT,
        Reason.QUALITY_GATE_FAILED,
        MESSAGE,
        artifacts=files,
        version=EXPORTED_VERSION,
        manifest_uri=MANIFEST_URI,
    )
    status = here.wait_phase("Failed")
    assert here.condition("Ready") == ("False", "QualityGateFailed", MESSAGE)
    assert here.condition("Degraded") == ("True", "QualityGateFailed", MESSAGE)
    assert status["manifestUri"] == MANIFEST_URI
    good = {
        "klDivergence": 0.0313,
        "sameTopToken": 0.92,
        "perplexity": 5.5,
        "maxKLDivergence": 0.08,
        "judged": True,
        "passed": True,
    }
    assert figures(here) == {
        "gguf/model-Q8_0.gguf": good,
        "rejected/model-Q4_K_M.gguf": {**good, "klDivergence": 0.4123, "passed": False},
    }
    assert messages(here, "QualityGateFailed") == [
        (
            "Warning",
            "rejected/model-Q4_K_M.gguf: mean KL divergence 0.4123 nats per token, limit 0.08.",
        )
    ]
    assert here.jobs() == [("prepare", 1), ("train", 1), ("export", 1)]

    limits = [{"quantization": "Q4_K_M", "maxKLDivergence": 0.5}]
    here.apply(export={"qualityLimits": limits})
    here.succeed(prepared(PREPARE, TRAIN, found=resolved(export="export-b")))
    here.wait_phase("Exporting")
    assert figures(here)["rejected/model-Q4_K_M.gguf"], "until the new export has its own"
    here.succeed(exported())
    here.wait_phase("Succeeded")
    assert figures(here) == {"gguf/model-F16.gguf": None}
    assert here.condition("Degraded")[0] == "False"
    assert [stage for stage, _ in here.jobs()].count("train") == 1


def test_with_verify_warn_the_job_is_ready_and_says_which_file_is_over_its_limit(
    here: Namespace,
) -> None:
    here.apply(export={"verify": "warn"})
    here.succeed(prepared())
    here.succeed(trained())
    files = (file("gguf/model-Q8_0.gguf", GOOD), file("gguf/model-Q4_K_M.gguf", BAD))
    here.succeed(exported().model_copy(update={"artifacts": files}))
    here.wait_phase("Succeeded")
    state, _, words = here.condition("Ready")
    assert state == "True"
    assert "model-Q4_K_M.gguf: mean KL divergence 0.4123" in words
    assert "limit 0.08" in words
    assert "Q8_0" not in words
    said = here.wait("the event", lambda: messages(here, "QualityLimitExceeded"))
    assert [kind for kind, _ in said] == ["Warning"]


def test_all_types_of_a_large_model_arrive_with_their_figures(here: Namespace) -> None:
    """Through the real API server's limit on a container's termination message, and its schema."""
    name = "Mistral-Small-3.2-24B-Instruct-2506"
    kinds = tuple(Quantization)[:MOST_FILES]
    ggufs = tuple(file(f"gguf/{name}-{each}.gguf", GOOD) for each in kinds)
    shards = tuple(
        Artifact(
            path=f"merged/model-{n:05d}-of-00030.safetensors",
            bytes=4_900_000_000,
            sha256="b" * 64,
        )
        for n in range(1, 31)
    )
    here.apply()
    here.succeed(prepared())
    here.succeed(trained())
    here.succeed(exported().model_copy(update={"artifacts": (*ggufs, *shards)}))
    here.wait_phase("Succeeded")
    measured = {path for path, quality in figures(here).items() if quality}
    assert measured == {f"gguf/{name}-{each}.gguf" for each in kinds}
