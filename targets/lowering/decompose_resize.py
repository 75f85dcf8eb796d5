"""Tmp."""
RULES = {}
