"""Rules between keys, which no single field's type can express. Each is a function from a config to findings."""
