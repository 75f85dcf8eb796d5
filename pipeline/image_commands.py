"""`edgepress image`: find stage, engine and checkout, then print the command or run it."""

from __future__ import annotations

import dataclasses
import shlex
import sys
from pathlib import Path

from edgepress.pipeline.image import (
    Image,
    ImageFailed,
    PassedOver,
    broken,
    build,
    find_context,
    find_engine,
    size_bytes,
    stage_of,
)
from edgepress.pipeline.json_document import print_json


def image(
    name: str,
    *,
    engine: str | None,
    base: str | None,
    tag: str | None,
    context: Path | None,
    print_only: bool,
    as_json: bool,
) -> int:
    """Build the image for a target or a stage, or only print the command.

    Args:
        name: a target, or a stage of the Dockerfile.
        engine: `docker`, `podman` or `buildah`; None takes the first that works.
        base: image to start from instead of the Dockerfile's.
        tag: name of the result; None: `edgepress:STAGE`.
        context: the checkout; None looks for it.
        print_only: print the command on one line, as a shell takes it, and build nothing.
        as_json: print one JSON document instead.
    """
    stage, target = stage_of(name)
    folder = find_context(context, stage)
    passed_over: list[PassedOver] = []
    if engine is None:
        engine, passed_over = find_engine()
        for other in passed_over:
            if other.why != "not installed":
                print(f"{other.engine} is passed over: {other.why}", file=sys.stderr)
    elif not print_only and (why := broken(engine)):
        raise ImageFailed(f"{engine} cannot be used here: {why}")
    wanted = Image(
        engine=engine,
        stage=stage,
        target=target,
        tag=tag or f"edgepress:{stage}",
        base=base or "",
        context=folder,
    )
    if not print_only:
        build(wanted)
    size = None if print_only else size_bytes(wanted)
    if as_json:
        document = {
            "engine": wanted.engine,
            "passed_over": [dataclasses.asdict(other) for other in passed_over],
            "stage": stage,
            "tag": wanted.tag,
            "base": wanted.base or None,
            "context": str(folder),
            "command": wanted.command,
            "built": not print_only,
            "size_bytes": size,
            "use": wanted.use,
        }
        print_json(document)
    elif print_only:
        print(shlex.join(wanted.command))
    else:
        weighs = "" if size is None else f", {size / 1e6:.0f} MB"
        print(f"{wanted.tag}{weighs}. To use it:\n\n  {wanted.use}")
    return 0
