"""Relax operators that TVM only runs with its runtime, as TIR that needs none."""

from __future__ import annotations

from typing import Any

from tvm import te, tirx, topi


def _cumulative(function: Any) -> Any:
    def legalize(builder: Any, call: Any) -> Any:
        attributes = call.attrs
        axis = None if attributes.axis is None else int(attributes.axis)
        dtype = str(call.ty.dtype)
        return builder.call_te(function, call.args[0], axis, dtype, bool(attributes.exclusive))

    return legalize


def _top_k(builder: Any, call: Any) -> Any:
    attributes = call.attrs
    data = call.args[0]
    rank = len(data.ty.shape)
    axis, count = int(attributes.axis) % rank, int(attributes.k)
    dtype = str(attributes.dtype)

    def both(data: Any) -> list[Any]:
        return _top_k_tensors(data, axis, count, bool(attributes.largest), dtype)

    if attributes.ret_type == "both":
        return builder.call_te(both, data)
    place = 0 if attributes.ret_type == "values" else 1
    return builder.call_te(lambda data: both(data)[place], data)


def _top_k_tensors(data: Any, axis: int, count: int, largest: bool, dtype: str) -> list[Any]:
    """Rank every element by comparing it with all others; equal ones rank in their order.

    Quadratic in the length of the axis, but a plain reduction: it vectorises, and needs no
    scratch memory beyond the ranks.
    """
    shape = [int(size) for size in data.shape]
    length = shape[axis]

    def at(index: Any, place: Any) -> Any:
        return data[(*index[:axis], place, *index[axis + 1 :])]

    other = te.reduce_axis((0, length), "other")

    def before(*index: Any) -> Any:
        mine, theirs = data[index], at(index, other)
        ahead = theirs > mine if largest else theirs < mine
        tied = tirx.all(theirs.equal(mine), other < index[axis])
        return te.sum(tirx.Cast("int32", tirx.any(ahead, tied)), axis=other)

    ranks = te.compute(shape, before, "ranks")
    place = te.reduce_axis((0, length), "place")

    def chosen(*index: Any) -> Any:
        rank = ranks[(*index[:axis], place, *index[axis + 1 :])]
        hit = rank.equal(tirx.Cast("int32", index[axis]))
        return te.sum(tirx.Select(hit, tirx.Cast(dtype, place), tirx.const(0, dtype)), axis=place)

    wanted = [*shape[:axis], count, *shape[axis + 1 :]]
    indices = te.compute(wanted, chosen, "indices")
    values = te.compute(wanted, lambda *index: at(index, indices[index]), "values")
    return [values, indices]


LEGALIZATIONS = {
    "relax.cumprod": _cumulative(topi.cumprod),
    "relax.cumsum": _cumulative(topi.cumsum),
    "relax.topk": _top_k,
}
