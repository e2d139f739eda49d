"""What can go wrong at the edges, without the words of any client library.

`cluster` converts the Kubernetes client's exceptions to these, so that `reconcile` decides by type
whether to wait, to look again or to tell the user.
"""

from __future__ import annotations


class OperatorError(Exception):
    """Anything that the operator reports by its message alone."""


class ClusterError(OperatorError):
    """The API server refused a request or couldn't be asked."""

    def __init__(self, message: str, detail: str = "") -> None:
        super().__init__(message)
        self.detail = detail or message
        """The API server's own words, without the request."""


class NotFoundError(ClusterError):
    """The object isn't there."""


class AlreadyExistsError(ClusterError):
    """An object of that name is there already."""


class ConflictError(ClusterError):
    """The object changed since it was read."""


class InvalidError(ClusterError):
    """The API server calls the object invalid; sending it again can't help."""


class ForbiddenError(ClusterError):
    """RBAC, a quota or an admission rule says no."""


class UnavailableError(ClusterError):
    """The API server can't be reached, is overloaded or failed."""
