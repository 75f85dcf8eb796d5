"""Tmp."""

RULES = {}
