"""What a run needs before it is started: operations, memory, time and cost, from its config alone, without torch."""
