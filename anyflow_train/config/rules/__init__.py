"""Rules that involve several keys. Each rule is a function from a config to findings."""
