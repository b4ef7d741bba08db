"""One training over several nodes: which hosts, which commands, what to check first, how to stop."""
