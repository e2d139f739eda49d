"""Labels and annotations by which the operator knows its children again."""

from __future__ import annotations

from finetune_trainer.contract import GROUP

OPERATOR = "finetune-operator"
CONTAINER = "trainer"

MANAGED_BY = "app.kubernetes.io/managed-by"
SELECTOR = f"{MANAGED_BY}={OPERATOR}"

# Labels
JOB = f"{GROUP}/job"  # the FineTuneJob's name, cut to a label's length: for `kubectl -l`
JOB_UID = f"{GROUP}/job-uid"
STAGE = f"{GROUP}/stage"
ATTEMPT = f"{GROUP}/attempt"

# Annotations, which may be longer
JOB_NAME = f"{GROUP}/job-name"  # the FineTuneJob's whole name
KEY = f"{GROUP}/key"  # the stage's fingerprint; for `prepare`, the generation
POD_SETTINGS = f"{GROUP}/pod-settings"  # digest of the settings that the pods are made with
