"""Speed and correctness against the peers, side by side in one process."""
