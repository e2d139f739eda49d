"""Signed artifacts, checked by model-signing's own program on a downloaded folder."""

from __future__ import annotations

import json
import subprocess
import sys
from base64 import b64decode
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)

from finetune_trainer.contract import Export, Hub, Reason, Signing, StageError
from finetune_trainer.export.publish.hub_push import public_files
from finetune_trainer.export.publish.signing import FORMER_VARIABLE, Signer, signer_for
from finetune_trainer.store import LocalFolder
from finetune_trainer.store.versions import current
from tests.publishing import folder, publish

FILES = {
    "adapter/weights": b"weights",
    "gguf/model-Q8_0.gguf": b"GGUF" * 1000,
    "README.md": b"card",
    "rejected/model-Q3_K_M.gguf": b"bad",
}
SIGNED = Export(signing=Signing())
ENCODED = (Encoding.PEM, PrivateFormat.PKCS8)


def pem(key: ec.EllipticCurvePrivateKey) -> str:
    return key.private_bytes(*ENCODED, NoEncryption()).decode()


@pytest.fixture
def key() -> ec.EllipticCurvePrivateKey:
    return ec.generate_private_key(ec.SECP256R1())


@pytest.fixture
def private(key: ec.EllipticCurvePrivateKey, tmp_path: Path) -> Path:
    folder = tmp_path / "mounted"
    folder.mkdir()
    file = folder / "private-key.pem"
    file.write_text(pem(key))
    return file


@pytest.fixture
def public(key: ec.EllipticCurvePrivateKey, tmp_path: Path) -> Path:
    file = tmp_path / "key.pub"
    encoded = key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    file.write_bytes(encoded)
    return file


@pytest.fixture
def downloaded(private: Path, tmp_path: Path) -> Path:
    """The folder of a signed version."""
    output = LocalFolder(tmp_path / "tuned")
    publish(output, tmp_path / "workspace", "fp", FILES, Signer("tuned", private))
    return output.root / folder("fp")


def verify(folder: Path, public: Path) -> subprocess.CompletedProcess[str]:
    program = Path(sys.executable).with_name("model_signing")
    command: list[str | Path] = [program, "verify", "key", folder]
    command += ["--signature", folder / "model.sig", "--public_key", public]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_the_tool_s_own_verifier_accepts_the_set(downloaded: Path, public: Path) -> None:
    checked = verify(downloaded, public)
    assert checked.returncode == 0, checked.stderr
    listed = [
        item["path"] for item in json.loads((downloaded / "manifest.json").read_bytes())["files"]
    ]
    assert listed == [*FILES, "SHA256SUMS", "provenance.json", "model.sig"]
    bundle = json.loads((downloaded / "model.sig").read_bytes())
    statement = json.loads(b64decode(bundle["dsseEnvelope"]["payload"]))
    assert statement["_type"] == "https://in-toto.io/Statement/v1"
    assert statement["subject"][0]["name"] == "tuned"
    named = {item["name"] for item in statement["predicate"]["resources"]}
    assert named == {*FILES, "SHA256SUMS", "provenance.json"} - {"rejected/model-Q3_K_M.gguf"}
    provenance = json.loads((downloaded / "provenance.json").read_bytes())
    assert [item["path"] for item in provenance["files"]] == [*FILES, "SHA256SUMS"]


@pytest.mark.parametrize("path", ["gguf/model-Q8_0.gguf", "README.md", "provenance.json"])
def test_a_flipped_bit_is_found(downloaded: Path, public: Path, path: str) -> None:
    data = bytearray((downloaded / path).read_bytes())
    data[1] ^= 1
    (downloaded / path).write_bytes(data)
    checked = verify(downloaded, public)
    assert checked.returncode != 0
    assert "Hash mismatch" in checked.stderr
    assert path in checked.stderr


def test_a_missing_an_added_and_another_s_file_are_found(downloaded: Path, public: Path) -> None:
    (downloaded / "extra.bin").write_bytes(b"x")
    assert "Extra files" in verify(downloaded, public).stderr
    (downloaded / "extra.bin").unlink()
    (downloaded / "README.md").unlink()
    assert "Missing files" in verify(downloaded, public).stderr


def test_what_goes_to_a_hub_has_a_signature_of_its_own(
    downloaded: Path, private: Path, public: Path, tmp_path: Path
) -> None:
    version = current(LocalFolder(downloaded.parents[1]))
    assert version is not None
    signer = Signer("tuned", private)
    found = public_files(Hub(repo="org/tuned"), version, None, signer)
    repository = tmp_path / "repository"
    for item in found.stored:
        file = repository / item.path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes((downloaded / item.path).read_bytes())
    for path, data in found.written.items():
        (repository / path).write_bytes(data)
    assert "provenance.json" not in found.paths
    checked = verify(repository, public)
    assert checked.returncode == 0, checked.stderr


def test_another_key_is_refused(downloaded: Path, tmp_path: Path) -> None:
    other = ec.generate_private_key(ec.SECP384R1()).public_key()
    file = tmp_path / "other.pub"
    file.write_bytes(other.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    checked = verify(downloaded, file)
    assert checked.returncode != 0
    assert "Key mismatch" in checked.stderr


def test_without_a_key_or_with_a_wrong_one_it_says_what_to_do(tmp_path: Path) -> None:
    file = tmp_path / "private-key.pem"
    with pytest.raises(StageError, match=r"private-key\.pem can't.*keySecretRef") as caught:
        signer_for(SIGNED, "tuned", file, {})
    assert caught.value.reason is Reason.INVALID_CONFIG
    wrong: dict[str, str | bytes] = {
        "no PEM": "secret-words",
        "RSA": rsa.generate_private_key(public_exponent=65537, key_size=2048).private_bytes(
            *ENCODED, NoEncryption()
        ),
        "another curve": ec.generate_private_key(ec.SECP256K1()).private_bytes(
            *ENCODED, NoEncryption()
        ),
        "a password": ec.generate_private_key(ec.SECP256R1()).private_bytes(
            *ENCODED, BestAvailableEncryption(b"secret-words")
        ),
    }
    for text in wrong.values():
        file.write_bytes(text if isinstance(text, bytes) else text.encode())
        with pytest.raises(StageError, match=r"not a private key of curve P-256") as caught:
            signer_for(SIGNED, "tuned", file, {})
        assert "secret-words" not in caught.value.message
    assert signer_for(Export(), "tuned", file, {}) is None


def test_the_variable_of_an_older_operator_is_read_and_taken_away(
    key: ec.EllipticCurvePrivateKey, tmp_path: Path
) -> None:
    environment = {FORMER_VARIABLE: pem(key)}
    assert signer_for(SIGNED, "tuned", tmp_path / "none", environment) is not None
    assert environment == {}, "child processes get no key"


SIGN_AND_LOOK = """
import subprocess, sys
from pathlib import Path
from finetune_trainer.contract import Artifact, Export, Signing
from finetune_trainer.export.publish.signing import signer_for

key = Path(sys.argv[1])
signer = signer_for(Export(signing=Signing()), "tuned", key)
made = signer([Artifact(path="weights", bytes=1, sha256="ab" * 32)])
print(len(made["model.sig"]) > 0)
for file in (key, sys.argv[2]):
    print(subprocess.run(["cat", file], capture_output=True).stderr.decode().strip())
"""


def test_no_process_that_the_signing_one_starts_can_read_the_key(private: Path) -> None:
    other = private.parent.parent / "weights"
    other.write_bytes(b"w")
    done = subprocess.run(
        [sys.executable, "-c", SIGN_AND_LOOK, private, other],
        capture_output=True,
        text=True,
        check=True,
    )
    if "no Landlock" in done.stderr:
        pytest.skip("this kernel has no Landlock")
    assert done.stdout.splitlines() == ["True", f"cat: {private}: Permission denied", ""]


def test_an_image_without_the_package_is_named(
    private: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "model_signing", None)
    with pytest.raises(StageError, match="EXTRAS that contain `signing`") as caught:
        Signer("tuned", private)
    assert caught.value.reason is Reason.INVALID_CONFIG
