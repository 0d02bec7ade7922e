"""Predicts what a run needs before it is started: operations, memory, time and cost, from a dry run on fake tensors."""
