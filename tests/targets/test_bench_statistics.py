"""The statistics of `model --bench` against exact arithmetic with Python's integers."""

import itertools
import math
import struct
import subprocess
from collections.abc import Iterator
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgepress.targets.base import Target
from edgepress.targets.export import copy_runtime
from edgepress.targets.program import Array
from tests.targets.test_runtime_c import SANITIZERS, WARNINGS
from tests.targets.tiny import ARMV7, HOST, need, run

MAIN = r"""
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include "statistics.h"

/* Requests with their numbers as text, one line each; `series` with the raw doubles behind it. */
static void answer_series(long count)
{
    static const double PARTS[] = {0.5, 0.9, 0.99};
    double *values = malloc((size_t)count * sizeof *values), medians[WINDOWS];
    double *sorted = malloc((size_t)count * sizeof *values);
    if (values == NULL || sorted == NULL ||
        fread(values, sizeof *values, (size_t)count, stdin) != (size_t)count)
        exit(1);
    memcpy(sorted, values, (size_t)count * sizeof *values);
    sort_ascending(sorted, (size_t)count);
    for (int i = 0; i < 3; i++) {
        double at = quantile(sorted, (size_t)count, PARTS[i]);
        double dispersion = quantile_dispersion(values, (size_t)count, PARTS[i], at);
        struct ranks ranks = quantile_ranks(count, PARTS[i], dispersion);
        printf("%.17g %.17g %ld %ld ", at, dispersion, ranks.low, ranks.high);
    }
    if (window_medians(values, (size_t)count, medians) == 0) {
        for (int i = 0; i < WINDOWS; i++)
            printf("%.17g ", medians[i]);
        printf("%.17g %.17g", trend_probability(medians), trend_change(medians));
    }
    puts("");
    free(values);
    free(sorted);
}

int main(void)
{
    char line[128];
    long n, k;
    double p, limit;
    while (fgets(line, sizeof line, stdin) != NULL) {
        if (sscanf(line, "most %ld %ld %lf", &k, &n, &p) == 3)
            printf("%.17g\n", binomial_at_most(k, n, p));
        else if (sscanf(line, "low %ld %lf %lf", &n, &p, &limit) == 3)
            printf("%ld\n", binomial_low(n, p, limit));
        else if (sscanf(line, "ranks %ld %lf %lf", &n, &p, &limit) == 3) {
            struct ranks ranks = quantile_ranks(n, p, limit);
            printf("%ld %ld\n", ranks.low, ranks.high);
        } else if (sscanf(line, "over %ld %lf", &n, &p) == 2)
            printf("%ld\n", early_stopping(n, p, 0.99));
        else if (sscanf(line, "series %ld", &n) == 1)
            answer_series(n);
        fflush(stdout);
    }
    return 0;
}
"""


class Program:
    """The C program above, which answers requests as long as it runs."""

    def __init__(self, command: list[str]) -> None:
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def ask(self, request: str, data: bytes = b"") -> list[float]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(request.encode() + b"\n" + data)
        self.process.stdin.flush()
        return [float(word) for word in self.process.stdout.readline().split()]

    def series(self, values: Array) -> tuple[list[list[float]], list[float]]:
        """Per quantile: value, dispersion, ranks. Then windows, trend's probability and change."""
        data = struct.pack(f"<{len(values)}d", *values)
        said = self.ask(f"series {len(values)}", data)
        return [said[at : at + 4] for at in (0, 4, 8)], said[12:]

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        assert self.process.wait(60) == 0
        assert self.process.stdout is not None
        self.process.stdout.close()


@pytest.fixture(scope="module", params=[HOST, ARMV7], ids=lambda target: target.name)
def program(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Program]:
    """Compiled for this machine, with sanitizers; and for one of 32 bits."""
    target: Target = request.param
    folder = tmp_path_factory.mktemp(target.name)
    copy_runtime(folder)
    (folder / "main.c").write_text(MAIN)
    need(target.compiler, target.compiler_package)
    flags = SANITIZERS if target is HOST else []
    files = ["main.c", "statistics.c", "-lm", "-o", "program"]
    run([target.compiler, *WARNINGS, *flags, *files], folder)
    prefix: list[str] = []
    if target is not HOST:
        need(target.emulator, "qemu-user")
        prefix = [target.emulator, "-cpu", target.emulator_cpu, "-L", target.sysroot]
    made = Program([*prefix, str(folder / "program")])
    yield made
    made.close()


def at_most(k: int, n: int, p: Fraction) -> Fraction:
    """P(X <= k) of a binomial X, exactly."""
    a, b = p.numerator, p.denominator
    ways = (math.comb(n, i) * a**i * (b - a) ** (n - i) for i in range(k + 1))
    return Fraction(sum(ways), b**n)


def low(n: int, p: Fraction, limit: Fraction) -> int:
    """The largest k with P(X <= k) <= limit, or -1."""
    a, b = p.numerator, p.denominator
    total, term, most = 0, (b - a) ** n, limit * b**n
    for k in range(n + 1):
        total += term
        if total > most:
            return k - 1
        term = term * (n - k) * a // ((k + 1) * (b - a))
    return n


parts = st.sampled_from([Fraction(1, 2), Fraction(9, 10), Fraction(99, 100), Fraction(1, 10)])


@settings(deadline=None, max_examples=150)
@given(n=st.integers(1, 1500), share=st.floats(-0.05, 1.05), p=parts)
def test_binomial_probabilities(program: Program, n: int, share: float, p: Fraction) -> None:
    k = round(share * n)
    (said,) = program.ask(f"most {k} {n} {float(p)}")
    exact = float(at_most(min(k, n), n, p)) if k >= 0 else 0.0
    assert said == pytest.approx(exact, rel=1e-9, abs=1e-13)


@settings(deadline=None, max_examples=150)
@given(n=st.integers(1, 3000), p=parts)
def test_ranks_of_an_interval_hold_95_per_cent_and_are_the_closest(
    program: Program, n: int, p: Fraction
) -> None:
    first, last = program.ask(f"ranks {n} {float(p)} 1")
    limit = Fraction(25, 1000)
    assert first == low(n, p, limit) + 1
    assert last == n - low(n, 1 - p, limit)


def test_ranks_that_no_run_bounds(program: Program) -> None:
    assert program.ask("ranks 5 0.5 1") == [0, 6]
    assert program.ask("ranks 6 0.5 1") == [1, 6]
    assert program.ask("ranks 100 0.99 1")[1] == 101
    assert program.ask("ranks 367 0.99 1")[1] == 368
    assert program.ask("ranks 368 0.99 1")[1] == 368
    assert program.ask("ranks 100 0.5 1000") == [0, 101]


def test_dependent_values_count_as_fewer(program: Program) -> None:
    first, last = program.ask("ranks 100 0.5 1")
    assert program.ask("ranks 1000 0.5 10") == [10 * first, 1001 - 10 * (101 - last)]


def test_many_values(program: Program) -> None:
    """Ten minutes of 10 µs: the normal distribution knows the answer well enough."""
    n = 60_000_000
    for p in (0.5, 0.9, 0.99):
        first, last = program.ask(f"ranks {n} {p} 1")
        spread = 1.959964 * math.sqrt(n * p * (1 - p))
        assert first == pytest.approx(n * p - spread, abs=5)
        assert last == pytest.approx(n * p + spread, abs=5)


@settings(deadline=None, max_examples=100)
@given(n=st.integers(1, 3000), p=parts)
def test_early_stopping(program: Program, n: int, p: Fraction) -> None:
    (said,) = program.ask(f"over {n} {float(p)}")
    assert said == max(0, low(n, 1 - p, Fraction(1, 100)))


def test_early_stopping_as_in_published_results(program: Program) -> None:
    """LoadGen's logs: at least 64 queries, 662 for the 99th; of 201 queries 9 are discarded."""
    assert [program.ask(f"over {n} 0.9") for n in (63, 64, 201)] == [[0], [1], [10]]
    assert [program.ask(f"over {n} 0.99") for n in (661, 662)] == [[0], [1]]


@settings(deadline=None, max_examples=60)
@given(
    count=st.integers(1, 400),
    seed=st.integers(0, 2**32 - 1),
    slope=st.sampled_from([0.0, 0.001, -0.002]),
    digits=st.sampled_from([1, 6]),
)
def test_quantiles_windows_and_trends(
    program: Program, count: int, seed: int, slope: float, digits: int
) -> None:
    noise = np.random.default_rng(seed).exponential(0.1, count)
    values = np.round(1 + noise + slope * np.arange(count), digits)
    figures, rest = program.series(values)
    wanted = np.quantile(values, [0.5, 0.9, 0.99])
    assert [figure[0] for figure in figures] == pytest.approx(wanted, rel=1e-12)
    if count < 10:
        assert rest == []
        return
    cuts = [count * i // 10 for i in range(11)]
    medians = [float(np.median(values[a:b])) for a, b in itertools.pairwise(cuts)]
    assert rest[:10] == pytest.approx(medians, rel=1e-12)
    assert rest[10:] == pytest.approx([probability(medians), change(medians)], rel=1e-9, abs=1e-12)


def probability(values: list[float]) -> float:
    """Mann and Kendall's exact test, of both sides."""
    pairs = list(itertools.combinations(values, 2))
    score = sum((b > a) - (b < a) for a, b in pairs)
    orders = [1]  # of so many values, how many have 0, 1, 2, … pairs in the wrong order
    for count in range(2, len(values) + 1):
        longer = [0] * (len(orders) + count - 1)
        for inversions, ways in enumerate(orders):
            for moved in range(count):
                longer[inversions + moved] += ways
        orders = longer
    at_least_as_steady = sum(orders[: (len(pairs) - abs(score)) // 2 + 1])
    return min(1.0, 2 * at_least_as_steady / math.factorial(len(values)))


def change(values: list[float]) -> float:
    """Theil and Sen's slope over the whole length, as a share of the median."""
    ends = itertools.combinations(range(len(values)), 2)
    slopes = [(values[j] - values[i]) / (j - i) for i, j in ends]
    return float((len(values) - 1) * np.median(slopes) / np.median(values))


@pytest.mark.parametrize(("repeats", "least"), [(1, 0.93), (10, 0.85)])
def test_intervals_hold_the_quantile(program: Program, repeats: int, least: float) -> None:
    """Of 200 series nineteen in twenty should; of runs that come ten alike, almost as many."""
    random = np.random.default_rng(5)
    held = np.zeros(2)
    dispersions = []
    plain = np.zeros(2)
    for _ in range(200):
        values = np.repeat(random.exponential(1, 2000 // repeats), repeats)
        figures, _rest = program.series(values)
        ordered = np.sort(values)
        for index, part in enumerate((0.5, 0.9)):
            true = -math.log(1 - part)
            dispersions.append(figures[index][1])
            first, last = (int(rank) for rank in figures[index][2:])
            held[index] += ordered[first - 1] <= true <= ordered[last - 1]
            first, last = (int(rank) for rank in program.ask(f"ranks 2000 {part} 1"))
            plain[index] += ordered[first - 1] <= true <= ordered[last - 1]
    assert (held / 200 >= least).all()
    assert 0.8 < np.mean(dispersions) / repeats < 1.3
    if repeats > 1:
        assert (plain / 200 < 0.7).all(), "ranks for independent runs would not do"
