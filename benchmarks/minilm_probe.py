"""Measure what MiniLM's sentence embeddings still know about mood, for any of its builds.

    python benchmarks/minilm_probe.py models/minilm.onnx BUNDLE OTHER.onnx …

3,000 sentences about films become embeddings (the mean over real tokens, normalised). A logistic
regression learns from 2,000 of them whether people found the mood good, and is asked about the
other 1,000. The first model is the reference: "its probe" is learned on its embeddings and asked
about the others' as they are. Bundles run through `edgepress infer`, models in onnxruntime. Needs
the package tokenizers.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import click
import numpy as np
import onnxruntime
from models import MINILM_INPUTS, Array, minilm_tokens
from samples import scored_snippets

SENTENCES, LEARNED = 3000, 2000
CLEAR = 0.5  # scores nearer to 0 are no verdict
_STEPS = 30  # of Newton's method; 10 are enough


def sentences() -> tuple[dict[str, Array], Array]:
    """Return tokens `[3000, 64]` by input, and whether the mood is good `[3000]`."""
    rows = [row for row in scored_snippets() if abs(row[0]) > CLEAR]
    order = np.arange(len(rows))
    np.random.RandomState(0).shuffle(order)
    chosen = [rows[i] for i in order[:SENTENCES]]
    return minilm_tokens([text for _, text in chosen]), np.array([s > 0 for s, _ in chosen])


def hidden_states(path: Path, tokens: dict[str, Array]) -> Array:
    """Return what a model or bundle answers, float32 `[texts, 64, 384]`."""
    if path.is_dir():
        return _of_bundle(path, tokens)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    count = len(tokens[MINILM_INPUTS[0]])
    feeds = ({name: tokens[name][i : i + 1] for name in MINILM_INPUTS} for i in range(count))
    return np.concatenate([np.asarray(session.run(None, feed)[0]) for feed in feeds])


def _of_bundle(path: Path, tokens: dict[str, Array]) -> Array:
    with tempfile.TemporaryDirectory() as folder:
        data, out = Path(folder) / "tokens.npz", Path(folder) / "answers.npz"
        np.savez(data, allow_pickle=False, **tokens)
        tool = Path(sys.executable).with_name("edgepress")
        command = [tool, "infer", path, "--data", data, "-o", out]
        subprocess.run([str(part) for part in command], check=True)
        with np.load(out) as answers:
            (name,) = answers.files
            found: Array = answers[name]
    return found.reshape(len(found), *found.shape[-2:])


def embeddings(hidden: Array, mask: Array) -> Array:
    """Mean over real tokens, of length 1: float64 `[texts, 384]`."""
    weights = mask[..., None].astype(np.float64)
    means = (hidden * weights).sum(axis=1) / weights.sum(axis=1)
    return np.asarray(means / np.linalg.norm(means, axis=1, keepdims=True))


def learn(x: Array, good: Array) -> Array:
    """Fit a logistic regression by Newton's method; its last coefficient is the intercept.

    The penalty is half the squared length of all coefficients but the intercept, which is what
    scikit-learn takes by default.
    """
    x = np.hstack([x, np.ones((len(x), 1))])
    penalty = np.append(np.ones(x.shape[1] - 1), 0.0)
    coefficients = np.zeros(x.shape[1])
    for _ in range(_STEPS):
        share = 1 / (1 + np.exp(-(x @ coefficients)))
        gradient = x.T @ (share - good) + penalty * coefficients
        curvature = (x * (share * (1 - share))[:, None]).T @ x + np.diag(penalty)
        coefficients -= np.linalg.solve(curvature, gradient)
    return coefficients


def right(coefficients: Array, x: Array, good: Array) -> float:
    """Return how many verdicts are right, in percent."""
    verdicts = x @ coefficients[:-1] + coefficients[-1] > 0
    return 100 * float((verdicts == good).mean())


@click.command(help=(__doc__ or "").partition("\n")[0])
@click.argument("models", nargs=-1, required=True, type=click.Path(exists=True, path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def main(models: tuple[Path, ...], as_json: bool) -> None:
    """Print one line per model."""
    tokens, good = sentences()
    mask = tokens["attention_mask"]
    reference: Array | None = None
    results: list[dict[str, Any]] = []
    for path in models:
        x = embeddings(hidden_states(path, tokens), mask)
        own = learn(x[:LEARNED], good[:LEARNED])
        reference = own if reference is None else reference
        results.append(
            {
                "model": str(path),
                "right_percent": right(own, x[LEARNED:], good[LEARNED:]),
                "right_percent_first_probe": right(reference, x[LEARNED:], good[LEARNED:]),
            }
        )
        if not as_json:
            click.echo("{model}: {right_percent:.1f} % with a probe of its own, "
                       "{right_percent_first_probe:.1f} % with the first one's"
                       .format_map(results[-1]))  # fmt: skip
    if as_json:
        click.echo(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
