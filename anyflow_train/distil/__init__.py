"""`anyflow distil`: the whole way from clips to an exported student."""
