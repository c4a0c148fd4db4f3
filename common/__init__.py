"""What two or more solutions share: data, networks, training, inference, post-processing, metrics, submissions."""
