"""The operator as the tests start it."""

from hack.operator_process import (
    NAMESPACE,
    RELEASE,
    SECRET_GRACE_SECONDS,
    Operator,
    install,
)

__all__ = ["NAMESPACE", "RELEASE", "SECRET_GRACE_SECONDS", "Operator", "install"]
