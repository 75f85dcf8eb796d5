"""What the answers of a bundle are held against, computed once for all devices."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar, cast

from edgepress.calibration.base import Array, Samples
from edgepress.pipeline.bundle import Bundle
from edgepress.pipeline.feeds import SEED, input_shapes, random_samples
from edgepress.pipeline.golden import Golden, make_golden
from edgepress.pipeline.oracle import Oracle, Outputs
from edgepress.pipeline.snapshot import Snapshot

OUTPUT_SAMPLES = 4

_T = TypeVar("_T")


def bundle_graph(bundle: Bundle) -> Snapshot:
    """Return the compressed graph of a bundle."""
    return Snapshot((bundle.folder / "graph.onnx").read_bytes())


class ExpectedAnswers:
    """What every device is asked about a bundle, and what it should answer.

    Answers are computed when first wanted. Any thread may want them: others wait for the first.

    Attributes:
        bundle: what is verified.
        samples: evaluation samples, or None.
        feeds: what devices are asked: the samples, or a few random ones.
    """

    def __init__(
        self, bundle: Bundle, *, original: Snapshot | None = None, samples: Samples | None = None
    ) -> None:
        """Prepare the questions.

        Args:
            bundle: what is verified.
            original: the model before its passes, for float outputs and accuracy; None where it is
                not here: then float outputs are held to the bundle's own graph, and the loss of
                accuracy is known only as far as older evidence tells.
            samples: evaluation samples, or None.
        """
        self.bundle, self.samples = bundle, samples
        self._original, self._graph = original, bundle_graph(bundle)
        model = self._graph.load()
        asked = samples or random_samples(model, OUTPUT_SAMPLES, SEED + 1)
        self.feeds: list[Mapping[str, Array]] = list(asked.feeds(input_shapes(model) or {}))
        self._lock = threading.Lock()
        self._known: dict[str, Any] = {}

    @property
    def compared(self) -> Sequence[Mapping[str, Array]]:
        """The first feeds, whose answers are compared number by number."""
        return self.feeds[:OUTPUT_SAMPLES]

    def golden(self) -> Golden:
        """Answers to `compared` of the reference of the bundle's arithmetic."""
        steps = self.bundle.manifest.steps
        lossless = all(step["lossless"] or not step["modified"] for step in steps)
        original = self._original if lossless else None
        return self._once("golden", lambda: make_golden(self._graph, original, self.compared))

    def of_onnxruntime(self) -> Outputs:
        """Answers to `compared` of onnxruntime on the bundle's own graph."""
        return self._once("onnxruntime", lambda: _answers(self._graph, self.compared))

    def of_original(self) -> tuple[Outputs | None, float | None]:
        """Answers of the original model to all samples, or its top-1 as older evidence has it."""
        original, samples = self._original, self.samples
        if original is not None:
            return self._once("original", lambda: _answers(original, self.feeds)), None
        older = (self.bundle.evidence or {}).get("accuracy") or {}
        if samples is not None and older.get("samples_sha256") == samples.sha256():
            return None, older.get("reference_top1")
        return None, None

    def _once(self, name: str, compute: Callable[[], _T]) -> _T:
        with self._lock:
            if name not in self._known:
                self._known[name] = compute()
            return cast(_T, self._known[name])


def _answers(model: Snapshot, feeds: Sequence[Mapping[str, Array]]) -> Outputs:
    oracle = Oracle(model.model)
    return [oracle.run(feed) for feed in feeds]
