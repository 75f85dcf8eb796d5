"""The C that runs on the board."""
