"""One folder a challenge, all with the same verbs."""
