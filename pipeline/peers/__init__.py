"""Other runtimes that bundles are raced against. One per file."""
