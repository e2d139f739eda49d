"""How a process of the trainer lives and ends: log, progress, signals, errors, child processes."""
