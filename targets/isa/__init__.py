"""Instruction sets: what a kernel generator may emit. One per file."""
