"""The contract of a pass, and the registry that finds passes by file name.

A pass is one file in this folder: a frozen dataclass whose fields are its options. The file's stem,
with dashes for underscores, is its name in recipes and on the command line. The driver
(`edgepress.pipeline.driver`) calls `requires`, `call` and `ensures`, refreshes shapes, checks the
model and compares outputs; a pass only rewrites.

Errors::

    PassError             what went wrong in a pass; never raised itself
     ├─ PassRefused       the model or the options cannot be handled: which pass, where, why
     └─ NotEquivalent     the rewritten model does not compute what it must
    UnknownPass           no such pass; carries the near names
"""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Protocol

import onnx_ir as ir

import edgepress.passes
from edgepress.calibration.base import Samples, sole_subclass

_NO_PASSES = ("analysis", "base")


class PassError(Exception):
    """What went wrong in a pass."""


class PassRefused(PassError):
    """The model or the options cannot be handled.

    Attributes:
        pass_name: the pass, as in recipes.
        where: the node, value or option it is about.
        why: one sentence, ending with what to do next.
    """

    def __init__(self, pass_name: str, where: str, why: str) -> None:
        self.pass_name, self.where, self.why = pass_name, where, why
        super().__init__(f"{pass_name}: {where}: {why}")


class NotEquivalent(PassError):
    """The rewritten model does not compute what it must.

    Attributes:
        pass_name: the pass, as in recipes.
        metric: what was compared, with its unit.
        got: the measured figure.
        limit: the figure that was allowed.
    """

    def __init__(self, pass_name: str, metric: str, got: float, limit: float) -> None:
        self.pass_name, self.metric, self.got, self.limit = pass_name, metric, got, limit
        super().__init__(f"{pass_name}: {metric} is {got:.4g}, the limit is {limit:.4g}")


class UnknownPass(Exception):
    """No pass has this name."""

    def __init__(self, name: str) -> None:
        self.name, self.near = name, difflib.get_close_matches(name, pass_names(), 3, 0.4)
        hint = f" Did you mean {' or '.join(self.near)}?" if self.near else ""
        super().__init__(f"no pass is called {name!r}.{hint} `edgepress passes` lists them all.")


def _silent(_what: str, _done: int, _total: int) -> None:
    """Report no progress."""


class LayerTimer(Protocol):
    """Measures layers on the target's device, each as a model of its own."""

    @property
    def unit(self) -> str:
        """What is measured: "ms", or "instructions" under an emulator."""
        ...

    @property
    def key(self) -> str:
        """What a measurement depends on beside the layer: target, device, precision."""
        ...

    def __call__(self, layers: Sequence[ir.Model]) -> list[float]:
        """Return the cost of one inference of every model, in `unit`, in order.

        All of them are measured under the same conditions, interleaved, so that they compare.
        Raises PassRefused where the target cannot run one of them; what the compiler and the
        device raise when they fail comes through.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class Context:
    """What a pass may use beside the model.

    Attributes:
        samples: calibration samples, or None where the user gave none.
        training: training samples, or None where the user gave none.
        original: the model before the first pass of the recipe, canonical, or None; passes that
            train can teach a model to answer as it does. It is not to be changed.
        input_shapes: shapes that the user fixed on the command line, by input name.
        simd_bytes: the vector width of the target in bytes, 16 where no target is known.
        timer: measures layers on the target, or None where no target is known.
        progress: called as `progress(what, done, total)` during work that may take over 2 seconds.
    """

    samples: Samples | None = None
    training: Samples | None = None
    original: ir.Model | None = None
    input_shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    simd_bytes: int = 16
    timer: LayerTimer | None = None
    progress: Callable[[str, int, int], None] = _silent


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a pass did.

    Attributes:
        model: the rewritten model; it may be the model that was passed in.
        modified: whether anything changed.
        stats: figures for the report, such as `{"folded": 12}`; units in the names.
        skipped: what was left alone and why, as `[("conv_3", "weights are shared")]`.
        notes: sentences that the user should read, such as a default that was chosen.
    """

    model: ir.Model
    modified: bool
    stats: dict[str, int | float] = field(default_factory=dict)
    skipped: list[tuple[str, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Pass(ABC):
    """A rewrite of a model. Options are the dataclass fields of the subclass.

    Class attributes:
        lossless: whether outputs must stay equal to rounding (the driver then demands allclose);
            a lossy pass is judged by its SQNR.
    """

    lossless: ClassVar[bool] = True

    @property
    def needs_samples(self) -> bool:
        """Whether `Context.samples` must be there, which may depend on the options."""
        return False

    @property
    def needs_training(self) -> bool:
        """Whether `Context.training` must be there, which may depend on the options."""
        return False

    @property
    def needs_timer(self) -> bool:
        """Whether `Context.timer` must be there, which may depend on the options."""
        return False

    @property
    def name(self) -> str:
        """The name in recipes: the file's stem with dashes."""
        return type(self).__module__.rpartition(".")[2].replace("_", "-")

    def requires(self, model: ir.Model, context: Context) -> None:  # noqa: B027 - optional hook
        """Raise PassRefused where the model or the context does not allow this pass."""

    @abstractmethod
    def call(self, model: ir.Model, context: Context) -> Outcome:
        """Rewrite the model (in place or not) and say what changed."""

    def ensures(self, model: ir.Model) -> None:  # noqa: B027 - optional hook
        """Raise PassRefused where the result breaks a promise of this pass."""


def pass_names() -> list[str]:
    """Every pass, by file name, sorted.

    >>> "fold-batch-norm" in pass_names()
    True
    """
    modules = (module.name for module in pkgutil.iter_modules(edgepress.passes.__path__))
    return sorted(n.replace("_", "-") for n in modules if n not in _NO_PASSES and n[0] != "_")


def pass_class(name: str) -> type[Pass]:
    """Import and return the pass of this name. Raises UnknownPass."""
    if name not in pass_names():
        raise UnknownPass(name)
    module = importlib.import_module(f"edgepress.passes.{name.replace('-', '_')}")
    return sole_subclass(module, Pass)  # type: ignore[type-abstract]


def refresh_shapes(model: ir.Model, pass_name: str) -> None:
    """Infer every shape anew after a rewrite by this pass. Raises PassRefused."""
    from edgepress.passes._shapes import refresh_shapes as refresh  # it imports this module

    refresh(model, pass_name)
