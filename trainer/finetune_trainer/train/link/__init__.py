"""What passes between the supervisor and the worker.

work        the request, and what the worker leaves: JSON files
channel     progress, notices and checkpoints on their way up: JSON lines through a FIFO
upload_lag  how far a training may run ahead of its checkpoints in the store
"""
