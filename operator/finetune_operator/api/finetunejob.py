"""FineTuneJob: the Kind that a user commits. Docstrings are what `kubectl explain` prints."""

from __future__ import annotations

from datetime import timedelta
from typing import Annotated, Any

from pydantic import Field

from finetune_operator.api import (
    ON_EDIT,
    CaBundle,
    DnsLabel,
    EnvVar,
    Name,
    Preserved,
    PrivateKeyReference,
    Refresh,
    ResourceClaim,
    Resources,
    SecretKeyReference,
    SecretReference,
    Toleration,
    Volume,
    Workspace,
)
from finetune_operator.api.observed import FineTuneJobStatus
from finetune_trainer import contract
from finetune_trainer.contract import Base, Stage


class StorageReferences(Base):
    """What a store's part of the spec refers to. The operator passes it on and reads none of it."""

    secret_ref: SecretReference | None = None
    """Secret with the keys AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and, if need be,
    AWS_SESSION_TOKEN and AWS_ENDPOINT_URL_S3 (used where endpoint is left out). Leave it out with
    workload identity (serviceAccountName). The operator passes it on by reference and may not read
    it."""

    ca_bundle: CaBundle | None = None
    """Certificates to trust beside the public ones, where a CA of your own signed the store's. They
    are trusted for every connection of the pods, to the Hub as well."""


class StorageSpec(contract.Storage, StorageReferences):
    """How to reach the object store of every `s3://` URI in the spec."""


class DatasetStorageSpec(contract.DatasetStorage, StorageReferences):
    """How to reach the object store of dataset.source and dataset.evalSource."""


class ModelStorageSpec(contract.ModelStorage, StorageReferences):
    """How to reach the object store of model.source."""


AnyStorageSpec = StorageSpec | DatasetStorageSpec | ModelStorageSpec


class ModelSpec(contract.Model):
    """The base model to fine-tune."""

    token_secret_ref: SecretKeyReference | None = None
    """Secret with a Hugging Face token, for gated or private models."""

    storage: ModelStorageSpec | None = None
    """How to reach the object store of source, where it is another than the one of spec.storage.
    Nothing of spec.storage holds for it then."""


class DatasetSpec(contract.Dataset):
    """The examples to learn from."""

    refresh: Refresh = ON_EDIT
    """When `prepare` looks whether dataset or model have changed where they lie. With `onEdit` it
    looks when the spec is edited; with an interval (`30m`, `6h`; 1m at least) also so long after
    its last look. What has changed becomes a new version, and the old one stays current until
    that is there. A look waits for a running stage, and there is none while rollbackTo is set."""

    storage: DatasetStorageSpec | None = None
    """How to reach the object store of source and evalSource, where it is another than the one of
    spec.storage. Nothing of spec.storage holds for it then."""


class SigningSpec(contract.Signing):
    """Sign the artifacts, offline and with a private key: model.sig, in the format of
    model-signing (OpenSSF)."""

    key_secret_ref: PrivateKeyReference
    """Secret with the private key: PEM, without a password, of curve P-256, P-384 or P-521. Only
    the pod of export gets it, as a file; the operator may not read it."""


class ExportSpec(contract.Export):
    """The artifacts to write beside the adapter."""

    signing: SigningSpec | None = None
    """Sign the artifacts; left out, they are not signed."""


class HubSpec(contract.Hub):
    """A model repository on the Hugging Face Hub that the artifacts are pushed to as well."""

    token_secret_ref: SecretKeyReference
    """Secret with a Hugging Face token that may write to the repository. Only the pod of export
    gets it, by reference; the operator may not read it."""


class OciSpec(contract.Oci):
    """A repository of a container registry that the models are pushed to as well, one image for
    each: Kubernetes mounts it as an image volume."""

    secret_ref: SecretReference | None = None
    """Secret of type kubernetes.io/dockerconfigjson with a login that may push to the repository.
    Leave it out for a registry that wants none. Only the pod of export gets it, as a file; the
    operator may not read it."""


class OutputSpec(contract.Output):
    """Where the artifacts go."""

    hub: HubSpec | None = None
    """Push the artifacts to the Hugging Face Hub, once all of them are in the folder."""

    oci: OciSpec | None = None
    """Push the models to a container registry, once all of them are in the folder."""


class PodSettings(Base):
    """How one stage's pod is run."""

    image: Annotated[str, Field(min_length=1, max_length=1024)] | None = None
    """Trainer image; left out, the one that the operator was installed with."""

    active_deadline_seconds: Annotated[int, Field(ge=1, le=2**31 - 1)] | None = None
    """Seconds that one attempt may take, from the start of its Job on, so that waiting for a node
    counts. Then it is stopped, a training after a checkpoint, and the stage has failed
    (DeadlineExceeded) without another attempt. Left out, there is no limit."""

    resources: Resources = Resources()
    """Requests and limits. Ask for a GPU here: `limits: {nvidia.com/gpu: 1}`, or a slice of one
    (MIG): `limits: {nvidia.com/mig-3g.20gb: 1}`. Memory and disk (ephemeral-storage) that neither
    are requested nor limited here are requested as predicted."""

    resource_claims: Annotated[
        tuple[ResourceClaim, ...],
        Field(
            max_length=16,
            json_schema_extra={
                "x-kubernetes-list-type": "map",
                "x-kubernetes-list-map-keys": ["name"],
            },
        ),
    ] = ()
    """Devices by dynamic resource allocation, e.g. GPUs, in place of a resource like
    nvidia.com/gpu. The trainer's container gets all of them."""

    node_selector: dict[str, str] = {}
    """Labels that a node must have."""

    tolerations: Annotated[tuple[Toleration, ...], Field(max_length=64)] = ()
    """Taints that the pod tolerates."""

    affinity: Preserved | None = None
    """Affinity rules (core/v1 Affinity)."""

    priority_class_name: Name | None = None
    """PriorityClass of the pod."""

    runtime_class_name: Name | None = None
    """RuntimeClass of the pod, e.g. `nvidia`."""

    env: Annotated[tuple[EnvVar, ...], Field(max_length=128)] = ()
    """Further environment variables, with plain values or from Secrets."""

    volumes: Annotated[tuple[Volume, ...], Field(max_length=16)] = ()
    """PersistentVolumeClaims, ConfigMaps, Secrets and images to mount."""

    workspace: Workspace = Workspace()
    """The disk that the pod works on; left out, the node's, without a limit."""

    labels: dict[str, str] = {}
    """Further labels of the pod."""

    annotations: dict[str, str] = {}
    """Further annotations of the pod."""

    @property
    def claimed_gpus(self) -> int:
        """GPUs that its resource claims come to."""
        return sum(claim.gpus for claim in self.resource_claims)


class StagesSpec(Base):
    """Pod settings per stage: prepare and export need no GPU."""

    prepare: PodSettings = PodSettings()
    """The pod that checks data and model."""

    train: PodSettings = PodSettings()
    """The pod that trains; give this one the GPU."""

    export: PodSettings = PodSettings()
    """The pod that merges, converts and quantizes."""


class FineTuneJobSpec(Base):
    """The model that should be in the bucket. Editing it reruns only what the edit touches."""

    model: ModelSpec
    dataset: DatasetSpec
    training: contract.Training = contract.Training()
    export: ExportSpec = ExportSpec()
    output: OutputSpec
    storage: StorageSpec = StorageSpec()

    rollback_to: contract.VersionName | None = None
    """Let this version be the current one: its name, as status.versions has it. As long as it is
    set, nothing is trained or exported, and neither dataset nor model is looked at. Without it the
    version of this spec is current again, and is not made anew where it is still there. A version
    that output.keepVersions has deleted can't come back."""

    queue_name: DnsLabel | None = None
    """Kueue's LocalQueue, in the FineTuneJob's namespace, in which each stage waits for its quota.
    Quota counts what stages.*.resources request, and stages.*.priorityClassName orders the queue. A
    training that has to make room saves its last step, and goes on from there when its turn comes
    again, without a failed attempt. Left out, the stages start at once."""

    service_account_name: Name | None = None
    """ServiceAccount of the pods, for workload identity. Left out, the operator makes one that may
    do nothing but report progress."""

    stages: StagesSpec = StagesSpec()

    suspend: bool = False
    """Stop what runs and start nothing until this is false again. A training saves its last step
    and goes on from there, without a failed attempt; artifacts stay as they are."""

    backoff_limit: Annotated[int, Field(ge=0, le=100)] = 2
    """Further attempts of a stage after a failure that a retry can cure. Bad data or a bad spec is
    never tried again; an evicted or preempted pod doesn't count."""

    ttl_seconds_after_finished: Annotated[int, Field(ge=0)] = 86400
    """Seconds that finished pods and their logs are kept. The result in the object store and in
    status does not depend on them."""

    def pod_settings(self, stage: Stage) -> PodSettings:
        """How a stage's pod is run."""
        settings: PodSettings = getattr(self.stages, stage)
        return settings

    def stores(self, stage: Stage) -> tuple[AnyStorageSpec, ...]:
        """The stores that a stage's pod needs access to: only `prepare` reads the dataset's."""
        own = [self.model.storage, self.dataset.storage if stage is Stage.PREPARE else None]
        return (self.storage, *(each for each in own if each is not None))

    @property
    def refresh_interval(self) -> timedelta | None:
        """How long after one look at dataset and model the next is due; None: never."""
        refresh = self.dataset.refresh
        return None if refresh == ON_EDIT else contract.parse_duration(refresh)

    @property
    def inputs_digest(self) -> str:
        """Digest of the parts that a fingerprint may depend on."""
        nobody = contract.JobReference(name="", namespace="")
        config = self.run_config(nobody, None)
        return _short_digest(config.model_dump(mode="json", exclude={"job"}, exclude_defaults=True))

    @property
    def hardware_digest(self) -> str:
        """Digest of what the training is split by."""
        train = self.stages.train
        claims = [each.model_dump(mode="json") for each in train.resource_claims]
        resources = train.resources.model_dump(mode="json")
        return _short_digest({**resources, **({"claims": claims} if claims else {})})

    def run_config(
        self,
        reference: contract.JobReference,
        resolved: contract.Resolved | None,
        hardware: contract.Hardware | None = None,
    ) -> contract.RunConfig:
        """The part of the spec that the trainer is told: no Secret names, no pod settings."""
        references = dict.fromkeys(StorageReferences.model_fields, True)
        fields = contract.RunConfig.model_fields.keys() & type(self).model_fields.keys()
        data = self.model_dump(
            by_alias=False,
            include=fields,
            exclude={
                "model": {"token_secret_ref": True, "storage": references},
                "dataset": {"storage": references, "refresh": True},
                "storage": references,
                "export": {"signing": {"key_secret_ref": True}},
                "output": {"hub": {"token_secret_ref": True}, "oci": {"secret_ref": True}},
            },
        )
        known = {"job": reference, "resolved": resolved, "hardware": hardware}
        return contract.RunConfig.model_validate({**data, **known})


def _short_digest(value: Any) -> str:
    return contract.digest(value)[:12]


class FineTuneJob(Base):
    """Fine-tunes a causal language model on a dataset and leaves adapter, merged model and GGUF
    files in an object store."""

    spec: FineTuneJobSpec
    """Desired state: base model, dataset, training and outputs."""

    status: FineTuneJobStatus = FineTuneJobStatus()
    """What is there, and what is being done about it."""
