"""Does the loss avoid memory for the logits, and at what cost? Ours against plain softmax cross-entropy.

    python benchmarks/loss.py --output_dir loss
    python benchmarks/loss.py --output_dir loss --long true      # also 65,536 queries x 65,536 documents

Times forward and backward passes of N random unit queries against N documents in float32, in processes that take turns;
then the difference of both from the plain loss in float64; then, with --long, the peak increase of private memory
during the call (including the returned gradient, which is as large as the table of vectors).
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from contest import Goal, Spread, in_process, play, print_goals, print_table, ratio, spread, write_results

from ds_embed.settings import parse_arguments
from ds_embed.settings.fields import Settings, setting

OURS, PLAIN = "ds_embed", "plain"
TEMPERATURE = 0.05
LARGEST_RATIO, LARGEST_DIFFERENCE, LARGEST_GB = 1.3, 1e-6, 1.5


@dataclass
class LossArguments(Settings):
    output_dir: str = setting("folder for loss.json")
    rounds: int = setting("times that either contestant runs", default=3, above=0)
    repeats: int = setting("calls within a process, of which the fastest counts", default=3, above=0)
    num_queries: list[int] = setting("queries, and as many documents", default_factory=lambda: [1024, 2048, 4096, 8192])
    dimensions: list[int] = setting("dimensions of the vectors", default_factory=lambda: [384, 1024])
    exact_queries: int = setting("queries of the comparison with float64", default=4096, above=0)
    long: bool = setting("also measure the memory of one very large loss", default=False)
    long_queries: int = setting("queries, and as many documents, of that one", default=65_536, above=0)
    long_dimensions: int = setting("dimensions of that one", default=1024, above=0)


def random_table(num_queries: int, dimensions: int) -> Any:
    """Unit vectors (2 N, D) of queries and documents, each document near its query."""
    import torch

    torch.manual_seed(0)
    table = torch.randn(2 * num_queries, dimensions)
    table[num_queries:] += 0.5 * table[:num_queries]
    return torch.nn.functional.normalize(table, dim=1)


def ours(table: Any) -> tuple[Any, Any]:
    """The loss and its gradient with respect to the table."""
    import torch

    from ds_embed.losses import contrastive_loss

    num_queries = len(table) // 2
    keys, own = torch.arange(num_queries)[:, None].repeat(1, 2), torch.empty(num_queries, 0, dtype=torch.int64)
    result = contrastive_loss(
        table, keys, own, num_queries=num_queries, first_query=0, last_query=num_queries, temperature=TEMPERATURE
    )
    return result.sums.loss, result.gradient


def plain(table: Any) -> tuple[Any, Any]:
    """The same by autograd, with all N x N logits."""
    import torch

    table = table.detach().requires_grad_()
    queries, documents = table.chunk(2)
    loss = torch.nn.functional.cross_entropy(queries @ documents.T / TEMPERATURE, torch.arange(len(queries)))
    loss.backward()
    return loss.detach(), table.grad


LOSSES: dict[str, Callable] = {OURS: ours, PLAIN: plain}


def seconds_of(name: str, cases: list[list[int]], repeats: int) -> dict:
    """The fastest call for each case (queries, dimensions), after one that is not timed."""
    result = {}
    for num_queries, dimensions in cases:
        table, times = random_table(num_queries, dimensions), []
        for _ in range(repeats + 1):
            started = time.perf_counter()
            LOSSES[name](table)
            times.append(time.perf_counter() - started)
        result[case_name(num_queries, dimensions)] = min(times[1:])
    return result


def differences(num_queries: int, dimensions: int) -> dict:
    """Relative differences of the loss and of the gradient (in norm) from the plain loss in float64."""
    table = random_table(num_queries, dimensions)
    exact_loss, exact_gradient = plain(table.double())
    result = {}
    for name, function in LOSSES.items():
        loss, gradient = function(table)
        result[f"{name} loss"] = abs(float(loss) - float(exact_loss)) / float(exact_loss)
        result[f"{name} gradient"] = float((gradient - exact_gradient).norm() / exact_gradient.norm())
    return result


def extra_memory(name: str, num_queries: int, dimensions: int) -> dict:
    """Memory in addition to what the process had with the table in place, and seconds."""
    from search import PeakMemory

    table = random_table(num_queries, dimensions)
    LOSSES[name](table[:: len(table) // 4])  # so that one-time allocations of libraries don't count
    with PeakMemory() as memory:
        started = time.perf_counter()
        LOSSES[name](table)
        seconds = time.perf_counter() - started
    return {"extra_gb": memory.peak / 1e9, "seconds": seconds, "logits_gb": 4 * num_queries**2 / 1e9}


def case_name(num_queries: int, dimensions: int) -> str:
    return f"{num_queries} x {num_queries} x {dimensions}"


def main() -> None:
    (settings,) = parse_arguments(LossArguments)
    cases = [(n, d) for d in settings.dimensions for n in settings.num_queries]
    playing = {
        name: lambda _, name=name: in_process("loss:seconds_of", name=name, cases=cases, repeats=settings.repeats)
        for name in LOSSES
    }
    results: dict[str, Any] = play(playing, settings.rounds)
    rows, reached = [], []
    for case in cases:
        name = case_name(*case)
        times = ratio(results, OURS, PLAIN, key=name)
        rows.append([name, *(f"{1000 * spread(results, who, name).median:,.1f}" for who in (OURS, PLAIN)), times])
        reached.append(Goal(f"time, {name}", times, LARGEST_RATIO, False))
    print_table(["queries x documents x dimensions", "ours, ms", "plain, ms", "ratio: median (range)"], rows)
    for dimensions in settings.dimensions:
        found = in_process("loss:differences", num_queries=settings.exact_queries, dimensions=dimensions)
        results[f"differences, {dimensions} dimensions"] = found
        what = f"difference from float64, {case_name(settings.exact_queries, dimensions)} (plain: {found[f'{PLAIN} loss']:.1e})"
        reached.append(Goal(what, Spread.of([found[f"{OURS} loss"]]), LARGEST_DIFFERENCE, False))
    if settings.long:
        found = in_process(
            "loss:extra_memory", name=OURS, num_queries=settings.long_queries, dimensions=settings.long_dimensions
        )
        results["long"] = found
        name = case_name(settings.long_queries, settings.long_dimensions)
        what = f"GB of memory, {name} ({found['seconds']:.0f} s; the logits: {found['logits_gb']:.1f} GB)"
        reached.append(Goal(what, Spread.of([found["extra_gb"]]), LARGEST_GB, False))
    print_goals(reached)
    write_results(Path(settings.output_dir) / "loss.json", settings, results, reached)


if __name__ == "__main__":
    main()
