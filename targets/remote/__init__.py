"""Boards and other places where bundles run: shells there, versions of bundles, what a board is."""
