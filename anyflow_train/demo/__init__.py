"""`anyflow demo`: a local page that makes clips with a model, next to its teacher."""
