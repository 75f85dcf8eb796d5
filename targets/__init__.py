"""From a model to an artefact for a board, and the boards themselves."""
