"""Unit tests of the trainer: no network, no cluster, no weights."""
