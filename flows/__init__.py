"""What runs in which order: the flow, the command line, and what a terminal shows of a run."""
