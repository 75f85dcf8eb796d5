"""Importances of channels: one per file, found by file name."""
