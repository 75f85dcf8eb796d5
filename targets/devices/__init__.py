"""Where a bundle runs: local, qemu, ssh. One device kind per file."""
