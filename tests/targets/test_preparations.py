"""Weights that are brought into another form once, when the model is opened."""

from __future__ import annotations

import dataclasses
import json
import subprocess
from pathlib import Path

import numpy as np
import pytest

from edgepress.targets.base import Artifact
from edgepress.targets.export import export
from edgepress.targets.memory import plan
from edgepress.targets.program import Call, Program, Tensor
from tests.targets.tiny import HOST, compile_c, run

_LARGE = 1 << 20  # elements, so that whole pages can be given back
_KERNELS = r"""
#include <stdint.h>
#include <stddef.h>
extern void TVMFFIErrorSetRaisedFromCStrParts(const char *, const char **, int32_t);
int32_t twice(const float *w, float *prepared)
{
    if (w[0] < 0) {
        const char *parts[] = {"the first ", "weight is negative"};
        TVMFFIErrorSetRaisedFromCStrParts("ValueError", parts, 2);
        return -3;
    }
    for (int i = 0; i < 1 << 20; i++) prepared[i] = 2 * w[i];
    return 0;
}
int32_t more(const float *a, const float *w, float *b)
{
    b[0] = a[0] + w[0];
    return 0;
}
int32_t apply(const float *x, const float *a, const float *b, float *y)
{
    y[0] = x[0] * a[(1 << 20) - 1] + b[0];
    return 0;
}
"""


def _program(first: float = 1.0) -> Program:
    """y = x * 2 w[-1] + (2 w[0] + w[0])."""
    weights = np.full(_LARGE, 3, np.float32)
    weights[0] = first
    tensors = [
        Tensor("x", "float32", (1,)),
        Tensor("y", "float32", (1,)),
        Tensor("a", "float32", (_LARGE,)),
        Tensor("b", "float32", (1,)),
    ]
    return Program(
        inputs=("x",),
        outputs=("y",),
        tensors={tensor.name: tensor for tensor in tensors},
        constants={"w": weights},
        calls=[Call("apply", ("x", "a", "b", "y"), ("y",), "product")],
        kernels={"twice": None, "more": None, "apply": None},
        preparations=[
            Call("twice", ("w", "a"), ("a",), "a"),
            Call("more", ("a", "w", "b"), ("b",), "b"),
        ],
    )


def _export(program: Program, folder: Path) -> Artifact:
    code = compile_c(HOST, _KERNELS)
    return export(program, code, HOST, folder, name="prepared", tolerances=(0.0,))


def _infer(folder: Path, *options: str) -> subprocess.CompletedProcess[bytes]:
    command = [str(folder / "model"), "--run", *options, "-", "-"]
    return subprocess.run(command, input=np.float32(5).tobytes(), capture_output=True, check=False)


def test_prepared_tensors_have_memory_of_their_own() -> None:
    made = plan(_program())
    assert made.prepared == {"a": 0, "b": 4 * _LARGE}
    assert made.prepared_bytes == 4 * _LARGE + 64
    assert made.offsets == {}
    assert made.arena_bytes == 0


def test_a_model_is_prepared_once_and_computes_with_what_was_prepared(tmp_path: Path) -> None:
    artifact = _export(_program(), tmp_path)
    assert artifact.prepared_bytes == 4 * _LARGE + 64
    for threads in ("1", "2"):
        done = _infer(tmp_path, "--threads", threads)
        assert done.returncode == 0, done.stderr
        assert np.frombuffer(done.stdout, np.float32).tolist() == [5 * 6 + 3]
    facts = json.loads(run([str(tmp_path / "model"), "--info"]))
    assert (facts["prepared_bytes"], facts["calls"]) == (artifact.prepared_bytes, 1)


def test_weights_that_only_preparations_read_are_not_kept_in_memory(tmp_path: Path) -> None:
    _export(_program(), tmp_path)
    kept = _program()
    kept.calls = [dataclasses.replace(kept.calls[0], arguments=("x", "w", "b", "y"))]
    folder = tmp_path / "kept"
    _export(kept, folder)
    source = r"""
#include "model.h"
#include <stdio.h>
#include <string.h>
int main(int count, char **arguments)
{
    if (count != 2 || model_open(arguments[1]) != 0) return 1;
    char line[512];
    int inside = 0;
    FILE *maps = fopen("/proc/self/smaps", "r");
    while (fgets(line, sizeof line, maps) != NULL) {
        if (strstr(line, "weights.epw") != NULL) inside = 1;
        if (inside && sscanf(line, "Rss: %d kB", &inside) == 1) { printf("%d", inside); break; }
    }
    fclose(maps);
    return 0;
}
"""
    resident_kb = []
    for bundle in (tmp_path, folder):
        (bundle / "main.c").write_text(source)
        run(["gcc", "-I.", "main.c", "libmodel.so", "-Wl,-rpath,.", "-o", "main"], str(bundle))
        done = subprocess.run(
            ["./main", "weights.epw"], cwd=bundle, capture_output=True, check=True, text=True
        )
        resident_kb.append(int(done.stdout))
    assert resident_kb[0] <= 64
    assert resident_kb[1] >= 4 * _LARGE // 1024


def test_a_preparation_that_fails_says_why(tmp_path: Path) -> None:
    _export(_program(first=-1.0), tmp_path)
    done = _infer(tmp_path)
    assert done.returncode != 0
    assert b"preparing the weights failed with code -3" in done.stderr
    assert b"the first weight is negative" in done.stderr


@pytest.mark.parametrize(
    ("preparation", "says"),
    [
        (Call("twice", ("x", "a"), ("a",)), "'x' is read before it is written"),
        (Call("twice", ("w", "y"), ("y",)), "y: neither an input nor an output is prepared"),
        (Call("none", ("w", "a"), ("a",)), "no kernel is called 'none'"),
    ],
)
def test_preparations_that_cannot_be(preparation: Call, says: str) -> None:
    program = _program()
    program.preparations = [preparation]
    with pytest.raises(ValueError, match=says):
        program.validate()


def test_calls_cannot_write_what_was_prepared() -> None:
    program = _program()
    program.calls.append(Call("more", ("x", "w", "b"), ("b",)))
    with pytest.raises(ValueError, match="'b' is written twice"):
        program.validate()
