"""The operator on a real API server, under exactly the rights that its chart grants."""
