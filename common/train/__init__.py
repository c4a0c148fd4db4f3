"""The training loop and its parts: schedules, weight averaging, checkpoints, several processes."""
