"""Stages as Prefect tasks: cache key, retries, GPU slot, progress, the child process."""
