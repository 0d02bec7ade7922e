"""`anyflow watch` and `anyflow report`: runs as a page."""
