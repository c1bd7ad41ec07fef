"""Measure what takes time and memory: alternating rounds, matrix products, operations, separate processes.

    rounds = alternate({"a": work_a, "b": work_b}, rounds=5)      # a, b, a, b, ...: name -> seconds of each round
    median_ratio(rounds["a"], rounds["b"])

A machine that does other work, or gets warm, slows down everything of a round alike. So what is compared alternates,
the ratio is taken within each round, and the median over the rounds is what is reported.
"""

import contextlib
import functools
import json
import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

PROJECT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Measure:
    """A figure, and the bar that it should reach, if there is one.

    Args:
        what: what was measured, in words.
        unit: 'x' for a factor, '%' for a share (of which `value` is the fraction), or a unit of measurement.
        bar: in the same unit.
        at_most: whether the bar is a limit from above.
    """

    what: str
    value: float
    unit: str
    bar: float | None = None
    at_most: bool = False

    @property
    def holds(self) -> bool | None:
        """Tell whether the figure reaches its bar; None without one."""
        if self.bar is None:
            return None
        return self.value <= self.bar if self.at_most else self.value >= self.bar

    @property
    def verdict(self) -> str:
        """Return the verdict in words, empty without a bar."""
        return {None: "", True: "holds", False: "falls short"}[self.holds]

    def shown(self, value: float) -> str:
        """Return a number with the unit.

        >>> [Measure("", 0, unit).shown(value) for unit, value in (("x", 5.126), ("%", 0.7349), ("s", 1234.5))]
        ['5.13x', '73.5 %', '1234 s']
        """
        if self.unit == "%":
            return f"{value:.1%}".replace("%", " %")
        number = f"{value:.0f}" if value >= 100 else f"{value:.3g}"
        return f"{number}{'' if self.unit == 'x' else ' '}{self.unit}"

    @property
    def limit(self) -> str:
        """Return the bar in words, empty without one."""
        return "" if self.bar is None else f"{'at most' if self.at_most else 'at least'} {self.shown(self.bar)}"

    def __str__(self) -> str:
        bar = f"   (bar {self.limit}: {self.verdict})" if self.limit else ""
        return f"{self.what}: {self.shown(self.value)}{bar}"


def timed(work: Callable[[], object], device: torch.device) -> float:
    """Return the seconds that `work` takes, until the device has finished all of it."""
    finish = {"cuda": torch.cuda.synchronize, "mps": torch.mps.synchronize}.get(device.type, lambda: None)
    finish()
    start = time.perf_counter()
    work()
    finish()
    return time.perf_counter() - start


def alternate(contenders: dict[str, Callable[[], float]], rounds: int, warm_up: int = 1) -> dict[str, list[float]]:
    """Let everything that is compared take its turn, round after round.

    Args:
        contenders: name -> what does its work once and returns the seconds (or another cost) of it.
        warm_up: rounds that are run first and not counted.
    Returns:
        name -> cost of each counted round.
    """
    costs = {name: [] for name in contenders}
    for i in range(warm_up + rounds):
        for name, work in contenders.items():
            cost = work()
            if i >= warm_up:
                costs[name].append(cost)
    return costs


def median(values: Sequence[float]) -> float:
    """Return the median as a plain number."""
    return float(np.median(values))


def median_ratio(above: Sequence[float], below: Sequence[float]) -> float:
    """Return the median over the rounds of the ratio within a round."""
    return median([a / b for a, b in zip(above, below, strict=True)])


def power(sizes: Sequence[float], costs: Sequence[float]) -> float:
    """Return the exponent p of costs ~ sizes ** p: the slope of a straight line through the logarithms.

    >>> round(power([1, 2, 4], [3, 12, 48]), 6)
    2.0
    """
    return float(np.polyfit(np.log(sizes), np.log(costs), 1)[0])


def matrix_product(device: torch.device, precision: str, side: int = 2048) -> tuple[Callable[[], float], float]:
    """Return what multiplies two square matrices a few times and gives the seconds, and its operations in all."""
    kind = getattr(torch, precision)
    a, b = (torch.rand(side, side, device=device).sub_(0.5).to(kind) for _ in range(2))
    result = torch.empty_like(a)
    times = 500 if device.type == "cuda" else 10

    def products() -> None:
        for _ in range(times):
            torch.mm(a, b, out=result)

    def seconds() -> float:
        products()  # what ran before leaves other contents in the caches and threads that are not yet at rest
        return timed(products, device)

    return seconds, times * 2.0 * side ** 3


def training_operations(model: torch.nn.Module, shape: Sequence[int]) -> float:
    """Count the floating point operations an image of a forward and backward pass, as torch counts them.

    Only convolutions and matrix products count, a multiplication and an addition as two. They are counted in float32,
    whatever the training computes in.

    Args:
        shape: (N, C, H, W) of the input.
    """
    device = next(model.parameters()).device
    scales = {"return_all_scales": True} if hasattr(model, "model_args") else {}
    with FlopCounterMode(display=False) as counter:
        out = model(torch.rand(tuple(shape), device=device), **scales)
        sum(logits.sum() for logits in (out if isinstance(out, list) else [out])).backward()
    model.zero_grad(set_to_none=True)
    return counter.get_total_flops() / shape[0]


@contextlib.contextmanager
def separate_process(make: Callable[..., dict[str, Callable[[], float]]], *args) -> Iterator[dict[str, Callable]]:
    """Run contenders in a separate process, so that nothing that was set or is kept here helps or hinders them.

    Args:
        make: a function of a module, called there with `args`; returns name -> contender (see `alternate`).
    Yields:
        name -> what asks that process for a round.
    Raises:
        ChildProcessError: when it has ended by an error, which stands on stderr, or for want of memory.
    """
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_serve, args=(there, make, args))
    process.start()
    there.close()  # the only other end is then that of the process, whose death is noticed

    def ask(name: str | None):
        try:
            here.send(name)
            return here.recv()
        except (EOFError, OSError):
            process.join()
            raise ChildProcessError(f"the process of {make.__name__} has ended with code {process.exitcode}; its error "
                                    f"stands above, if it was not the memory (code -9)") from None

    try:
        yield {name: functools.partial(ask, name) for name in ask(None)}
    finally:
        here.close()
        process.join()


def _serve(pipe, make: Callable, args: tuple) -> None:
    """Answer None with the names of the contenders and a name with the seconds of a round, until the pipe closes."""
    contenders = make(*args)
    with contextlib.suppress(EOFError, KeyboardInterrupt):
        while True:
            name = pipe.recv()
            pipe.send(list(contenders) if name is None else contenders[name]())


def run_python(*arguments, environment: dict[str, str] | None = None) -> tuple[float, str]:
    """Run `python ARGUMENTS` in the project's folder; return the seconds and what it printed.

    Raises ChildProcessError with the last lines of stderr when it fails.
    """
    command = [sys.executable, *map(str, arguments)]
    start = time.perf_counter()
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, env=os.environ | (environment or {}))
    seconds = time.perf_counter() - start
    if done.returncode:
        raise ChildProcessError(f"{' '.join(command)[:200]} ended with code {done.returncode}: {done.stderr[-2000:]}")
    return seconds, done.stdout


def call_in_processes(function: str, *args, processes: int | None = None, threads: int | None = None):
    """Call `MODULE.FUNCTION(*args)` in a fresh process, or by torchrun in several, and return what it returned.

    Args:
        function: 'MODULE.FUNCTION' of this project; returns plain data (JSON), and None in all but one process.
        args: plain data.
        processes: how many torchrun starts; None is one without torchrun.
        threads: OMP_NUM_THREADS of each.
    """
    code = (f"import json, sys, {function.rpartition('.')[0]}; found = {function}(*json.loads(sys.argv[1])); "
            f"found is None or print(json.dumps(found))")
    start = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", "--no-python",
             sys.executable] if processes else []
    environment = {"OMP_NUM_THREADS": str(threads)} if threads else {}
    _, printed = run_python(*start, "-c", code, json.dumps(args), environment=environment)
    return json.loads(printed.strip().splitlines()[-1])
