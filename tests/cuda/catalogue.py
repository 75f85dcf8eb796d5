"""Every kernel that the zoo, and some graphs more, need on a GPU, in each number format."""

from __future__ import annotations

import dataclasses
import re
from functools import cache

import onnx_ir as ir

from edgepress.targets.base import Target
from edgepress.targets.cuda.kernel import CudaKernel
from edgepress.targets.float_format import FORMATS, KEY
from edgepress.targets.lowering.build import lower
from tests.graphs import net, random
from tests.targets import dynamic
from tests.targets.qdq import shaped
from tests.targets.test_coverage import QUANTIZED, quantized
from tests.targets.zoo import FAMILIES, IMAGE, graph

WITH_PRODUCTS = ("convolutions", "transformers")
NETS = {
    "stem": "a = Conv <pads=[1,1,1,1], strides=[2,2]> (x, w) y = HardSwish (a)",
    "squeeze and excite": "a = Conv (x, w) b = GlobalAveragePool (a) c = Conv (b, v) "
    "d = Sigmoid (c) e = Mul (a, d) y = Conv (e, u)",
    "concat": "a = Conv (x, w) b = Conv (a, v) c = Concat <axis=1> (a, b) y = Conv (c, t)",
    "residual": "a = Conv (x, w) b = Conv (a, v) c = Add (a, b) d = Relu (c) y = Conv (d, u)",
    "activation": "a = Conv (x, w) b = Add (a, s) c = Conv (b, v) d = Mul (c, b) y = Gelu (d)",
}
"""Of an image of three channels: what the zoo has not."""
CONSTANTS = {
    "w": random(16, 3, 3, 3),
    "v": random(16, 16, 1, 1),
    "u": random(8, 16, 3, 3),
    "t": random(8, 32, 1, 1),
    "s": random(16, 1, 1),
}


@cache
def models() -> dict[str, ir.Model]:
    """Graphs by family, name and format; TF32 only where something is multiplied."""
    found = {}
    for family, (signature, graphs) in FAMILIES.items():
        formats = FORMATS if family in WITH_PRODUCTS else ("float32", "float16")
        for name, body in graphs.items():
            for form in formats:
                found[f"{family}, {name}, {form}"] = _marked(graph(signature, body), form)
    for family, name in QUANTIZED:
        signature, graphs = FAMILIES[family]
        body = graphs[name]
        if signature == IMAGE:  # behind a convolution, so that it reads integers
            body = "q = Conv <pads=[1,1,1,1]> (x, w3) " + re.sub(r"\bx\b", "q", body)
        found[f"{family}, {name}, int8"] = quantized(graph(signature, body))
    for name, body in NETS.items():
        for form in FORMATS:
            found[f"nets, {name}, {form}"] = _marked(_net(body), form)
        found[f"nets, {name}, int8"] = quantized(_net(body))
    for rows in (1, 128):
        product = dynamic.quantized(dynamic.product_net((rows, 256), 512, clamp="Relu"))
        found[f"nets, {rows} rows, dynamic int8"] = product
    return found


@dataclasses.dataclass(frozen=True)
class Listed:
    """A kernel, and the first graph that needs it."""

    kernel: CudaKernel
    graph: str


def catalogue(target: Target) -> dict[str, Listed]:
    """Return the kernels of all graphs, under names of their own; equal ones once."""
    found: dict[tuple[str, tuple[str, ...]], Listed] = {}
    for label, model in models().items():
        for kernel in lower(model, target).kernels.values():
            pattern = re.compile(rf"\b{kernel.name}")
            key = pattern.sub("", kernel.source), kernel.headers
            kind = re.sub(r"_?\d+$", "", kernel.name)
            name = f"{kind}_{len(found)}"
            source = pattern.sub(name, kernel.source)
            renamed = dataclasses.replace(kernel, name=name, source=source)
            found.setdefault(key, Listed(renamed, label))
    return {one.kernel.name: one for one in found.values()}


def _net(body: str) -> ir.Model:
    used = {name: array for name, array in CONSTANTS.items() if f" {name})" in body}
    opset = 20 if "Gelu" in body else 17
    return shaped(net("(float[1,3,64,64] x) => (float y)", body, used, opset=opset))


def _marked(model: ir.Model, form: str) -> ir.Model:
    model.metadata_props[KEY] = form
    return model
