"""Kernel generators, one file per operator family."""
