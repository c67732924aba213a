"""Stages as Prefect tasks: cache key, retries, the child process."""
