"""Real Kubernetes clusters for tests and the demo: a control plane alone, or a whole node."""
