"""Reads what a model writes in its answer besides text: its reasoning, and calls of tools."""
