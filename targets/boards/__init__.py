"""Board descriptions: one TOML file per board."""
