"""Orchestration: from a model to a verified bundle."""
