"""`edgepress explain`: load what was named, call, print the answer."""

from __future__ import annotations

from pathlib import Path

from edgepress.pipeline.cache import Cache, cache_folder
from edgepress.pipeline.json_document import print_json
from edgepress.pipeline.progress import Progress


def explain(
    folder: Path,
    *,
    calib: Path | None,
    model: Path | None,
    device: str | None,
    no_cache: bool,
    as_json: bool,
) -> int:
    """Explain a bundle; prints tables, or one JSON document with `as_json`."""
    from edgepress.pipeline.explain import explain as find_out
    from edgepress.pipeline.explain_table import show_explanation
    from edgepress.pipeline.report import console

    found = find_out(
        folder,
        calib=calib,
        original=model,
        device=device,
        cache=None if no_cache else Cache(cache_folder()),
        progress=Progress(),
    )
    if as_json:
        print_json(found.to_json())
    else:
        show_explanation(found, console())
    return 0
