"""Unit tests of the operator: no cluster, no clock, no network."""
