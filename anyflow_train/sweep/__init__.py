"""`anyflow sweep`: train variants of a run, each in its own process and directory, and compare them."""
