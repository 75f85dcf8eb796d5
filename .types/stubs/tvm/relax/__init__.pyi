"""TVM annotates its own API wrongly; to the type checkers all of it is Any."""

from typing import Any

def __getattr__(name: str) -> Any: ...
