"""Pushing models to a container registry, and reading them as a container runtime does."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from finetune_trainer.contract import (
    Export,
    ImageReference,
    Oci,
    Output,
    Quantization,
    Reason,
    Stage,
    StageError,
)
from finetune_trainer.export.publish import oci_push
from finetune_trainer.export.publish.oci_push import TarLayer, push_images, read_login
from finetune_trainer.prepare.stored import images_of, without_push
from finetune_trainer.runtime.reporter import Reporter
from finetune_trainer.store import LocalFolder
from finetune_trainer.store.marker import find_complete
from finetune_trainer.store.versions import Version, current
from tests.integration.trainer.registry import (
    PASSWORD,
    RunningRegistry,
    docker_config,
    running_registry,
)
from tests.integration.trainer.tls import make_authority
from tests.publishing import fingerprint, publish

EXPORT = Export(gguf=(Quantization.F16, Quantization.Q8_0))
FILES = {
    "adapter/adapter_model.safetensors": b"adapter",
    "merged/config.json": b"{}",
    "merged/model-00001-of-00002.safetensors": b"first" * 1000,
    "merged/model-00002-of-00002.safetensors": b"second" * 1000,
    "gguf/tuned-F16.gguf": b"GGUF16" * 1000,
    "gguf/tuned-Q8_0-00001-of-00002.gguf": b"GGUF8" * 1000,
    "gguf/tuned-Q8_0-00002-of-00002.gguf": b"GGUF8 too" * 1000,
    "gguf/tuned-LoRA-F32.gguf": b"adapter",
    "README.md": b"# tuned",
    "report.html": b"the first row",
}
LARGE = 1000  # bytes, from which on these files are layers of their own


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningRegistry]:
    """A registry without TLS and without a login."""
    with running_registry(tmp_path_factory.mktemp("registry") / "it") as running:
        yield running


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningRegistry]:
    """A registry with TLS by a CA of its own, and a login."""
    folder = tmp_path_factory.mktemp("guarded")
    with running_registry(folder / "it", make_authority(folder / "ca")) as running:
        yield running


@pytest.fixture
def output(tmp_path: Path) -> LocalFolder:
    folder = LocalFolder(tmp_path / "output")
    publish(folder, tmp_path / "workspace", "fp", FILES)
    return folder


@pytest.fixture(autouse=True)
def _small_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(oci_push, "LARGE", LARGE)


def now(output: LocalFolder) -> Version:
    version = current(output)
    assert version is not None
    return version


def push(oci: Oci, output: LocalFolder, workspace: Path, **more: Any) -> dict[str, str]:
    """Push as the stage does; the references by name."""
    images = push_images(
        oci,
        EXPORT,
        output,
        now(output),
        workspace=workspace / "push",
        reporter=Reporter(),
        **more,
    )
    return {image.name: image.reference for image in images}


def unpack(
    registry: RunningRegistry, repository: str, manifest: dict[str, Any]
) -> dict[str, bytes]:
    """The files of an image, each layer compared with its digests."""
    config = registry.json(repository, f"blobs/{manifest['config']['digest']}")
    found: dict[str, bytes] = {}
    for layer, diff_id in zip(manifest["layers"], config["rootfs"]["diff_ids"], strict=True):
        data = registry.get(repository, f"blobs/{layer['digest']}").content
        assert f"sha256:{hashlib.sha256(data).hexdigest()}" == layer["digest"] == diff_id
        assert len(data) == layer["size"]
        with tarfile.open(fileobj=io.BytesIO(data)) as archive:
            for member in archive:
                assert (member.mtime, member.uid, member.gid) == (0, 0, 0)
                if member.isfile():
                    stream = archive.extractfile(member)
                    assert stream is not None
                    found[member.name] = stream.read()
    return found


def test_each_model_is_an_image_for_every_architecture(
    plain: RunningRegistry, output: LocalFolder, tmp_path: Path
) -> None:
    found = push(Oci(repository=f"{plain.host}/team/model", insecure=True), output, tmp_path)
    version = now(output).name
    assert set(found) == {"merged", "F16", "Q8_0"}
    for name, reference in found.items():
        place, _, digest = reference.partition("@")
        assert place == f"{plain.host}/team/model:{version}-{name}"
        answer = plain.get("team/model", f"manifests/{version}-{name}")
        assert f"sha256:{hashlib.sha256(answer.content).hexdigest()}" == digest
        platforms = [each["platform"]["architecture"] for each in answer.json()["manifests"]]
        assert platforms == ["amd64", "arm64"]
    index = plain.json("team/model", f"manifests/{version}-merged")
    for each in index["manifests"]:
        manifest = plain.json("team/model", f"manifests/{each['digest']}")
        expected = {
            f"models/{p.removeprefix('merged/')}": d for p, d in FILES.items() if "merged" in p
        }
        assert unpack(plain, "team/model", manifest) == expected
    assert len(manifest["layers"]) == 3  # of the small file, and of each large one
    index = plain.json("team/model", f"manifests/{version}-Q8_0")
    manifest = plain.json("team/model", f"manifests/{index['manifests'][0]['digest']}")
    names = set(unpack(plain, "team/model", manifest))
    assert names == {f"models/tuned-Q8_0-0000{n}-of-00002.gguf" for n in (1, 2)}
    # Nothing stays on the disk.
    assert not [file for file in (tmp_path / "push").rglob("*") if file.is_file()]


def test_the_digest_depends_on_the_content_alone(
    plain: RunningRegistry, output: LocalFolder, tmp_path: Path
) -> None:
    """Another version with the same file, under another tag, in another repository."""
    first = Oci(repository=f"{plain.host}/one", tag="v1", include=("F16",), insecure=True)
    second = Oci(repository=f"{plain.host}/two", tag="v2", include=("F16",), insecure=True)
    before = push(first, output, tmp_path)["F16"]
    publish(output, tmp_path / "workspace", "other", FILES)
    assert now(output).name != before
    after = push(second, output, tmp_path)["F16"]
    assert before.partition("@")[2] == after.partition("@")[2]
    assert (before.partition("@")[0], after.partition("@")[0]) == (
        f"{plain.host}/one:v1-F16",
        f"{plain.host}/two:v2-F16",
    )


def test_what_is_pushed_is_not_pushed_again(
    plain: RunningRegistry, output: LocalFolder, tmp_path: Path
) -> None:
    oci = Oci(repository=f"{plain.host}/again", include=("merged",), insecure=True)
    marker = find_complete(output, Stage.EXPORT, fingerprint("fp"))
    assert marker is not None

    def held(asked: Oci) -> set[Stage]:
        spec = Output(uri=output.uri, oci=asked)
        return set(without_push({Stage.EXPORT: marker}, output, spec, EXPORT))

    assert held(oci) == {Stage.TRAIN}
    first = push(oci, output, tmp_path)
    assert held(oci) == {Stage.EXPORT}
    assert images_of(output, now(output)) == (
        ImageReference(name="merged", reference=first["merged"]),
    )
    moved = oci.model_copy(update={"tag": "v2"})
    assert held(moved) == {Stage.TRAIN}
    sent = plain.requests("PUT")
    assert push(oci, output, tmp_path) == first
    assert plain.requests("PUT") == sent
    assert push(moved, output, tmp_path)["merged"].endswith(first["merged"].partition("@")[2])
    assert plain.requests("PUT") == sent + 3  # two manifests and the index, and no layer


def test_a_modelpack_has_the_same_layers(
    plain: RunningRegistry, output: LocalFolder, tmp_path: Path
) -> None:
    repository = f"{plain.host}/pack"
    pack = Oci(repository=repository, format="modelPack", tag="p", include=("F16",), insecure=True)
    image = Oci(repository=repository, tag="i", include=("F16",), insecure=True)
    push(image, output, tmp_path)
    push(pack, output, tmp_path)
    found = plain.json("pack", "manifests/p-F16")
    assert found["artifactType"] == "application/vnd.cncf.model.manifest.v1+json"
    assert found["config"]["mediaType"] == "application/vnd.cncf.model.config.v1+json"
    (layer,) = found["layers"]
    assert layer["mediaType"] == "application/vnd.cncf.model.weight.v1.tar"
    assert layer["annotations"] == {"org.cncf.model.filepath": "models/tuned-F16.gguf"}
    config = plain.json("pack", f"blobs/{found['config']['digest']}")
    assert config["modelfs"] == {"type": "layers", "diffIds": [layer["digest"]]}
    assert config["config"] == {"format": "gguf", "quantization": "F16"}
    index = plain.json("pack", "manifests/i-F16")
    manifest = plain.json("pack", f"manifests/{index['manifests'][0]['digest']}")
    assert [each["digest"] for each in manifest["layers"]] == [layer["digest"]]


def test_a_login_goes_to_the_registry_alone(
    guarded: RunningRegistry,
    output: LocalFolder,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    assert guarded.authority
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(guarded.authority.bundle))
    oci = Oci(repository=f"{guarded.host}/team/model", include=("F16",))
    # What the next line forbids to read stays forbidden for the whole process.
    monkeypatch.setattr("finetune_trainer.runtime.child.deny_reading", lambda _: True)
    file = tmp_path / "config.json"

    for password, allowed in (("wrong" * 3, False), (PASSWORD, True)):
        file.write_text(docker_config(guarded.host, password))
        login = read_login(oci, file)
        if allowed:
            assert push(oci, output, tmp_path, login=login)["F16"].startswith(oci.repository)
            continue
        with pytest.raises(StageError, match=r"HTTP 401.*spec.output.oci.secretRef") as caught:
            push(oci, output, tmp_path, login=login)
        assert caught.value.reason is Reason.STORAGE_ACCESS_DENIED
        assert password not in str(caught.value)
    with pytest.raises(StageError, match="HTTP 401"):
        push(oci.model_copy(update={"tag": "v2"}), output, tmp_path)
    assert PASSWORD not in caplog.text


def test_a_certificate_that_nobody_vouches_for_is_refused(
    guarded: RunningRegistry, output: LocalFolder, tmp_path: Path
) -> None:
    with pytest.raises(StageError, match=r"certificate that is trusted.*caBundle") as caught:
        push(Oci(repository=f"{guarded.host}/x"), output, tmp_path)
    assert caught.value.reason is Reason.INVALID_CONFIG


def test_http_only_where_it_is_asked_for(
    plain: RunningRegistry, output: LocalFolder, tmp_path: Path
) -> None:
    with pytest.raises(StageError) as caught:
        push(Oci(repository=f"{plain.host}/x", include=("F16",)), output, tmp_path)
    assert caught.value.reason is Reason.INVALID_CONFIG
    assert plain.host in caught.value.message


def test_a_registry_that_is_away_is_tried_again(output: LocalFolder, tmp_path: Path) -> None:
    with pytest.raises(StageError, match="next attempt sends what is missing") as caught:
        push(Oci(repository="127.0.0.1:1/x", insecure=True), output, tmp_path)
    assert caught.value.reason is Reason.STORAGE_UNAVAILABLE
    assert caught.value.reason.retryable


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ("{", "no registry's login"),
        ('{"auths": {"registry.example.com": {}}}', "no registry's login"),
        (json.dumps({"auths": {"other.example.com": {"auth": "dTpw"}}}), "other.example.com"),
    ],
)
def test_a_secret_without_this_login_is_refused(tmp_path: Path, content: str, match: str) -> None:
    (tmp_path / "config.json").write_text(content)
    oci = Oci(repository="registry.example.com/team/model")
    with pytest.raises(StageError, match=match) as caught:
        read_login(oci, tmp_path / "config.json")
    assert caught.value.reason is Reason.INVALID_CONFIG


@pytest.mark.parametrize(
    ("entry", "repository"),
    [
        ("registry.example.com", "registry.example.com/team/model"),
        ("https://registry.example.com/v2/", "registry.example.com/team/model"),
        ("registry.example.com/team", "registry.example.com/team/model"),
        ("https://index.docker.io/v1/", "docker.io/team/model"),
    ],
)
def test_the_login_is_found_by_the_registry(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, entry: str, repository: str
) -> None:
    monkeypatch.setattr("finetune_trainer.runtime.child.deny_reading", lambda _: True)
    content = {"auths": {entry: {"username": "user", "password": "a:b"}, "x.io": {"auth": "eDp5"}}}
    (tmp_path / "config.json").write_text(json.dumps(content))
    assert read_login(Oci(repository=repository), tmp_path / "config.json") == ("user", "a:b")
    assert read_login(Oci(repository=repository), tmp_path / "none.json") is None


def test_a_layer_is_the_archive_that_it_says(tmp_path: Path) -> None:
    """One of more than 8 GiB has its length in a header of its own; the file is sparse."""
    file = tmp_path / "large"
    with file.open("wb") as stream:
        stream.truncate((8 << 30) + 1)
    layer = TarLayer([("models/large.gguf", file)])
    parts = iter(layer)
    head = b"".join(next(parts) for _ in range(3))
    assert len(layer) > 8 << 30
    with tarfile.open(fileobj=io.BytesIO(head), mode="r|") as archive:
        folder, member = archive.next(), archive.next()
    assert folder is not None
    assert member is not None
    assert (folder.name, folder.isdir(), member.size) == ("models", True, (8 << 30) + 1)
