"""Tests on real parts: API server, object store, model; without a node."""
