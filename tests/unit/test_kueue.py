"""Kueue's own manifests, with its webhooks at an address outside of the cluster."""

from __future__ import annotations

from typing import Any

from hack.kueue import reached_by

HERE = {"url": "https://127.0.0.1:9443/mutate", "caBundle": "Q0E="}


def test_a_service_becomes_an_address() -> None:
    service = {"name": "kueue-webhook-service", "namespace": "kueue-system", "path": "/mutate"}
    hook: dict[str, Any] = {"name": "mjob.kb.io", "clientConfig": {"service": service}}
    given = {"kind": "MutatingWebhookConfiguration", "webhooks": [hook]}
    found = reached_by(given, "https://127.0.0.1:9443", "Q0E=")
    assert found["webhooks"] == [{"name": "mjob.kb.io", "clientConfig": HERE}]
    assert hook["clientConfig"] == {"service": service}, "the given object stays as it is"


def test_what_has_an_address_keeps_it() -> None:
    given = {"spec": {"conversion": {"webhook": {"clientConfig": HERE}}}}
    assert reached_by(given, "https://elsewhere", "") == given
