"""Make the bundles of the race on a GPU, and pack them to be carried there.

    python benchmarks/models.py resnet18 mobilenetv2 efficientnet-lite0 minilm -o models
    python benchmarks/cuda/build.py models -o build/cuda -t cuda-sm90

Models in every precision and with batches of 1 and 32; needs no GPU. Weights are rounded to a few
values per tensor first, so that they take three bits each in `weights.epw`: the speed does not
depend on them, their size on the way does. Bundles that are there already are kept.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import click
import numpy as np
import numpy.typing as npt
import onnx
from onnx import numpy_helper
from pack import pack

from edgepress.pipeline.bundle import read_bundle
from edgepress.pipeline.cache import Cache
from edgepress.pipeline.prepare import prepare
from edgepress.pipeline.recipe import load_recipe, parse_recipe
from edgepress.pipeline.run import Request, run
from edgepress.targets.base import Target
from edgepress.targets.load import load_target

Array = npt.NDArray[Any]

PRECISIONS = ("float16", "int8", "float32", "tf32")
BATCHES = (1, 32)
CACHE_BYTES = 4 << 30
SMALLEST_ROUNDED = 1024  # elements: what is smaller weighs nothing

CODED = '[[pass]]\nname = "encode-huffman"\n'
FORMAT = '[[pass]]\nname = "float-format"\nformat = "{}"\n'
# As the recipes that ship, without what only changes the values of weights.
STATIC = (
    '[[pass]]\nname = "calibrate"\nmethod = "min_max"\n'
    '[[pass]]\nname = "quantize-int8"\nint16_outputs = true\n'
)
DYNAMIC = '[[pass]]\nname = "quantize-dynamic"\nrounding = "nearest"\n'


@dataclass(frozen=True)
class Network:
    """A model: its inputs without the batch, and how it is quantized."""

    name: str
    inputs: dict[str, tuple[int, ...]]
    int8: str = STATIC


IMAGE = {"input": (3, 224, 224)}
TOKENS = dict.fromkeys(("input_ids", "attention_mask", "token_type_ids"), (64,))
NETWORKS = (
    Network("resnet18", IMAGE),
    Network("mobilenetv2", IMAGE),
    Network("efficientnet-lite0", IMAGE),
    Network("minilm", TOKENS, DYNAMIC),
)


@dataclass(frozen=True)
class Configuration:
    """One row of the table."""

    network: Network
    precision: str
    batch: int

    @property
    def name(self) -> str:
        return f"{self.network.name}-{self.precision}-b{self.batch}"

    @property
    def recipe(self) -> str:
        passes = {"float32": "", "int8": self.network.int8}
        return "schema = 1\n" + passes.get(self.precision, FORMAT.format(self.precision)) + CODED


def configurations(only: Sequence[str] = ()) -> list[Configuration]:
    """Return all rows, the important first, of those that match one of the patterns."""
    found = [
        Configuration(network, precision, batch)
        for batch in BATCHES
        for precision in PRECISIONS
        for network in NETWORKS
    ]
    return [row for row in found if not only or any(fnmatch(row.name, p) for p in only)]


def rounded(model: onnx.ModelProto, levels: int) -> onnx.ModelProto:
    """Round weights, in place: so many values per tensor, two in tables that are only looked up."""
    tables = {node.input[0] for node in model.graph.node if node.op_type == "Gather"}
    for tensor in model.graph.initializer:
        array = numpy_helper.to_array(tensor)
        if array.dtype == np.float32 and array.size >= SMALLEST_ROUNDED:
            count = 2 if tensor.name in tables else levels
            tensor.CopyFrom(numpy_helper.from_array(few_values(array, count), tensor.name))
    return model


def few_values(array: Array, levels: int) -> Array:
    """Give every element the mean of its bin: `levels` bins of one standard deviation each."""
    spread = float(array.std()) or 1.0
    steps = np.floor((array - array.mean()) / spread + levels / 2)
    bins = np.clip(steps, 0, levels - 1).astype(np.int64)
    sums = np.bincount(bins.ravel(), array.ravel().astype(np.float64), levels)
    counts = np.bincount(bins.ravel(), minlength=levels)
    return (sums / np.maximum(counts, 1)).astype(np.float32)[bins]


def samples(network: Network, models: Path, batch: int) -> dict[str, Array]:
    """Return calibration samples `[n, *input]`, the model's own, in batches where there are any."""
    with np.load(models / f"{network.name}_calib.npz") as data:
        arrays = {name: data[name] for name in network.inputs}
    if batch == 1:
        return arrays
    return {
        name: np.resize(array, (max(len(array) // batch, 1), batch, *array.shape[1:]))
        for name, array in arrays.items()
    }


def prepared(network: Network, batch: int, models: Path, out: Path, levels: int) -> Path:
    """Write the canonical model with rounded weights, and its data; return the model's path."""
    path = out / "models" / f"{network.name}-b{batch}.onnx"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        data = samples(network, models, batch)
        np.savez(path.with_suffix(".calib.npz"), **data)
        np.savez(path.with_suffix(".golden.npz"), **{name: a[:1] for name, a in data.items()})
        shapes = {name: (batch, *shape) for name, shape in network.inputs.items()}
        source = models / f"{network.name}.onnx"
        canonical = prepare(source, load_recipe("none"), input_shapes=shapes).compressed
        model = rounded(onnx.load_model_from_string(canonical.model), levels)
        path.write_bytes(model.SerializeToString())
    return path


def build(row: Configuration, target: Target, model: Path, folder: Path, cache: Cache) -> None:
    """Compress, compile and bundle one row; nothing is verified here."""
    request = Request(
        model=model,
        target=target,
        recipe=parse_recipe(row.recipe, row.precision),
        output=folder,
        calib=model.with_suffix(".calib.npz") if row.precision == "int8" else None,
        eval=model.with_suffix(".golden.npz"),
        overwrite=True,
        check=False,
    )
    run(request, cache=cache)


def facts(row: Configuration, folder: Path) -> dict[str, Any]:
    """Return what the race must know of a bundle."""
    manifest = read_bundle(folder).manifest
    ends = {
        key: [{part: end[part] for part in ("name", "dtype", "shape")} for end in found]
        for key, found in (("inputs", manifest.inputs), ("outputs", manifest.outputs))
    }
    return {
        "name": row.name,
        "model": row.network.name,
        "precision": row.precision,
        "batch": row.batch,
        "macs": manifest.source["macs"],
        "target": manifest.target["name"],
        "arithmetic": manifest.arithmetic,
        "memory": manifest.memory,
        **ends,
    }


def made(
    rows: Sequence[Configuration],
    target: Target,
    models: Path,
    out: Path,
    levels: int,
    *,
    rebuild: bool,
) -> Iterator[dict[str, Any]]:
    """Build what is missing, or all; yield the facts of every row, and say which rows failed."""
    cache = Cache(out / "cache", CACHE_BYTES)
    for row in rows:
        folder = out / "bundles" / row.name
        if rebuild or not folder.exists():
            click.echo(f"{row.name} …", err=True)
            try:
                model = prepared(row.network, row.batch, models, out, levels)
                build(row, target, model, folder, cache)
            except Exception as error:  # one row must not cost the others
                click.echo(f"{row.name} FAILED: {type(error).__name__}: {error}", err=True)
                continue
        yield facts(row, folder)


@click.command(help=str(__doc__).partition("\n")[0])
@click.argument("models", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("-o", "--out", required=True, type=click.Path(path_type=Path))
@click.option("-t", "--target", default="cuda-sm90", show_default=True)
@click.option("--only", multiple=True, help="Only rows like 'resnet18-*-b1'.")
@click.option("--levels", default=8, show_default=True, help="Values per tensor of weights.")
@click.option("--rebuild", is_flag=True, help="Build bundles that are there already, too.")
def main(
    models: Path, out: Path, target: str, only: tuple[str, ...], levels: int, rebuild: bool
) -> None:
    """Build, and write OUT/pack.tar.xz."""
    out.mkdir(parents=True, exist_ok=True)
    rows = configurations(only)
    found = list(made(rows, load_target(target), models, out, levels, rebuild=rebuild))
    if not found:
        raise click.ClickException("no bundle was made")
    size = pack(out / "bundles", found, out / "pack.tar.xz")
    click.echo(json.dumps({"rows": len(found), "of": len(rows), "pack_bytes": size}))
    if len(found) < len(rows):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
