"""The contract between the operator and the trainer, and between the trainer's stages.

base            what all its types have in common; reading what another version wrote; redaction
training, dataset, output, storage  the parts of the spec; each field is bounded once
run             run.json as a whole, and what `prepare` adds to it
outcome         reasons, exit codes, and the termination message
progress        status.progress, with what a training says about itself; metrics.json
dataset_report  what `prepare` found in the dataset
artifacts       the files that come out, and manifest.json
verdict         the gate's verdict on a GGUF file, and its words in status, report and terminal
fingerprint     what a stage's result depends on

It is all that the operator knows of the trainer, and imports pydantic alone.
"""

from __future__ import annotations

from finetune_trainer.contract.artifacts import (
    VERSIONS,
    Artifact,
    Lineage,
    Manifest,
    version_folder,
)
from finetune_trainer.contract.base import (
    GROUP,
    LOCATION_RULE,
    PLURAL,
    VERSION,
    Base,
    Location,
    Stage,
    Tolerated,
    cel,
    describe,
    read_known,
    read_readable,
)
from finetune_trainer.contract.dataset import (
    HUB_DATASETS,
    Columns,
    CountOrShare,
    Csv,
    DataFormat,
    Dataset,
    Example,
    FunctionCall,
    Message,
    Tool,
    ToolCall,
    allowed,
    as_example,
)
from finetune_trainer.contract.dataset_report import (
    BadRow,
    ChatTemplate,
    Conversations,
    DatasetReport,
    DatasetSummary,
    DetectedFile,
    FileReport,
    LengthSpread,
    ListedRows,
    ShardReport,
    Split,
)
from finetune_trainer.contract.fingerprint import (
    ExampleContents,
    digest,
    later_fingerprints,
    prepare_fingerprint,
)
from finetune_trainer.contract.outcome import ExitCode, Reason, StageError, StageResult
from finetune_trainer.contract.output import (
    UNQUANTIZED,
    Export,
    Hub,
    Output,
    PrivateFile,
    QualityLimit,
    Quantization,
    Signing,
)
from finetune_trainer.contract.progress import (
    NEWS,
    LogEntry,
    Notice,
    NoticeCode,
    Progress,
    TrainingMetrics,
    TrainingRecord,
    status_path,
)
from finetune_trainer.contract.run import (
    Fingerprints,
    Hardware,
    JobReference,
    PreparedRunConfig,
    Resolved,
    RunConfig,
    TrainingPlan,
    read_run_config,
)
from finetune_trainer.contract.storage import DatasetStorage, Encryption, ModelStorage, Storage
from finetune_trainer.contract.training import (
    EarlyStopping,
    Lora,
    Model,
    TargetModule,
    Tracker,
    Training,
    display_name,
)
from finetune_trainer.contract.verdict import REJECTED, FileVerdict, GateReport, Quality, Sample

__all__ = [
    "GROUP",
    "HUB_DATASETS",
    "LOCATION_RULE",
    "NEWS",
    "PLURAL",
    "REJECTED",
    "UNQUANTIZED",
    "VERSION",
    "VERSIONS",
    "Artifact",
    "BadRow",
    "Base",
    "ChatTemplate",
    "Columns",
    "Conversations",
    "CountOrShare",
    "Csv",
    "DataFormat",
    "Dataset",
    "DatasetReport",
    "DatasetStorage",
    "DatasetSummary",
    "DetectedFile",
    "EarlyStopping",
    "Encryption",
    "Example",
    "ExampleContents",
    "ExitCode",
    "Export",
    "FileReport",
    "FileVerdict",
    "Fingerprints",
    "FunctionCall",
    "GateReport",
    "Hardware",
    "Hub",
    "JobReference",
    "LengthSpread",
    "Lineage",
    "ListedRows",
    "Location",
    "LogEntry",
    "Lora",
    "Manifest",
    "Message",
    "Model",
    "ModelStorage",
    "Notice",
    "NoticeCode",
    "Output",
    "PreparedRunConfig",
    "PrivateFile",
    "Progress",
    "Quality",
    "QualityLimit",
    "Quantization",
    "Reason",
    "Resolved",
    "RunConfig",
    "Sample",
    "ShardReport",
    "Signing",
    "Split",
    "Stage",
    "StageError",
    "StageResult",
    "Storage",
    "TargetModule",
    "Tolerated",
    "Tool",
    "ToolCall",
    "Tracker",
    "Training",
    "TrainingMetrics",
    "TrainingPlan",
    "TrainingRecord",
    "allowed",
    "as_example",
    "cel",
    "describe",
    "digest",
    "display_name",
    "later_fingerprints",
    "prepare_fingerprint",
    "read_known",
    "read_readable",
    "read_run_config",
    "status_path",
    "version_folder",
]
