"""The one training loop and what it uses: schedules, weight averaging, checkpoints, several processes."""
