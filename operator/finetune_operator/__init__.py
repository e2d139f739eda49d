"""The operator: makes the object store converge to each FineTuneJob's spec."""
