"""Two source trees side by side: is one slower than the other?

    python -m benchmarks.compare BEFORE_TREE AFTER_TREE [--suite filter merge experts calls] [--report FILE]

Both trees have their extensions built beside the Python files, in ``TREE/python/freemerge``. Three processes on one
core and one thread each, one for each tree and a second one for the tree before, run the same rows in turns, through
the public API. Of each row: the least CPU time before and after, the median of their ratio over all turns, and the same
median for the tree before against itself; together with the scatter of both this is the noise. A row is slower if its
ratio is beyond the noise twice, the second time in new processes; then the exit status is 1.

The suite "filter" takes up to eight minutes and 15 GB, "merge" and "experts" three minutes, "calls" one.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

Row = dict[str, Any]

SECONDS = {"filter": 430.0, "merge": 165.0, "experts": 165.0, "calls": 55.0}
FIRST_PASS = 0.85  # of the seconds; the rest is for rows that look slower
TURN_MS = 20.0
ROUNDS = (5, 61)
SAME = 0.01  # two processes may differ by so much for good, by the places of their memory


class Worker:
    """A process that runs rows of the suites on one tree."""

    def __init__(self, tree: Path) -> None:
        here = Path(__file__).resolve().parents[1]
        paths = os.pathsep.join([os.path.abspath(tree / "python"), str(here)])
        environment = {
            **os.environ,
            "PYTHONPATH": paths,
            "OMP_NUM_THREADS": "1",
            "OMP_WAIT_POLICY": "passive",
            "FREEMERGE_CACHE": "",
        }
        command = [sys.executable, "-m", "benchmarks.suites", os.path.abspath(tree)]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment, cwd=here
        )

    def ask(self, do: str, **about: object) -> Any:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        with suppress(BrokenPipeError):  # the answer, or that there is none, says why
            print(json.dumps({"do": do, **about}), file=self.process.stdin, flush=True)
        line = self.process.stdout.readline()
        answer = json.loads(line) if line else {"failed": "the process ended"}
        if answer and "failed" in answer:
            sys.exit(f"{' '.join(self.process.args)}: {do} {about}\n{answer['failed']}")
        return answer

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


@contextmanager
def workers(before: Path, after: Path) -> Iterator[dict[str, Worker]]:
    with ExitStack() as stack:
        started = {name: Worker(tree) for name, tree in (("before", before), ("control", before), ("after", after))}
        for worker in started.values():
            stack.callback(worker.close)
        yield started


def judge(before: Sequence[float], control: Sequence[float], after: Sequence[float]) -> Row:
    """From times of the same rounds: the median of after / before, the noise, and the verdict."""
    ratio, scatter = median_and_error([a / b for a, b in zip(after, before, strict=True)])
    itself, its_scatter = median_and_error([c / b for c, b in zip(control, before, strict=True)])
    noise = max(SAME, abs(itself - 1) + 3 * max(scatter, its_scatter))
    verdict = "slower" if ratio > 1 + noise else "faster" if ratio < 1 - noise else "same"
    return {"ratio": ratio, "spread": scatter, "control": itself, "noise": noise, "verdict": verdict}


def median_and_error(values: Sequence[float]) -> tuple[float, float]:
    """The median and its standard error, from the median absolute deviation."""
    median = statistics.median(values)
    deviation = statistics.median(abs(value - median) for value in values)
    return median, 1.25 * 1.48 * deviation / math.sqrt(len(values))


def measure(processes: dict[str, Worker], suite: str, row: str, folder: str, seconds: float) -> list[Row]:
    """Every step of one row; the results are compared, and those that differ held against float64."""
    deadline = time.perf_counter() + seconds
    prepared = {name: worker.ask("prepare", suite=suite, row=row, folder=folder) for name, worker in processes.items()}
    same = prepared["before"]["result"] == prepared["after"]["result"]
    for name in ["before"] if same else ["before", "after"]:
        processes[name].ask("check")
    calls = 1
    for _ in range(2):  # the second time warm
        first = {name: worker.ask("turn", calls=calls) for name, worker in processes.items()}
        calls = math.ceil(TURN_MS / max(1e-3, *(cpu for cpu, _ in first["before"].values())))
    rounds: list[dict[str, Row]] = []
    order = list(processes)
    while len(rounds) < ROUNDS[0] or (len(rounds) < ROUNDS[1] and time.perf_counter() < deadline):
        rounds.append({name: processes[name].ask("turn", calls=calls) for name in order})
        order = [*order[1:], order[0]]
    found = []
    for step in (name for name in first["before"] if name in first["after"]):
        cpu, wall = ({name: [r[name][step][clock] for r in rounds] for name in processes} for clock in (0, 1))
        found.append(
            {
                "suite": suite, "row": row, "step": step, "plan": prepared["after"]["plan"],
                "plan_before": prepared["before"]["plan"], "same_result": same,
                **{f"{name}_ms": min(cpu[name]) for name in ("before", "after")},
                **{f"{name}_wall_ms": min(wall[name]) for name in ("before", "after")},
                **judge(cpu["before"], cpu["control"], cpu["after"]), "rounds": len(rounds), "calls": calls,
            }
        )  # fmt: skip
    return found


def show(row: Row) -> None:
    name = f"{row['row']} {row['step']}".strip()
    notes = [row["verdict"]] if row["verdict"] != "same" else []
    notes += [f"{row['plan_before']} -> {row['plan']}"] if row["plan"] != row["plan_before"] else []
    notes += [] if row["same_result"] else ["other bytes"]
    print(
        f"{name:52}{row['before_ms']:11.4f}{row['after_ms']:11.4f}{row['ratio']:8.3f} ±{row['spread']:.3f}"
        f"{row['control']:9.3f}{100 * row['noise']:7.1f} %  {', '.join(notes)}",
        flush=True,
    )


def run(processes: dict[str, Worker], suite: str, names: Sequence[str], folder: str, end: float) -> list[Row]:
    """Some rows of a suite, each with an equal share of the time that is left."""
    rows: list[Row] = []
    for index, name in enumerate(names):
        share = (end - time.perf_counter()) / (len(names) - index)
        steps = measure(processes, suite, name, folder, share)
        rows += steps
        for step in steps:
            show(step)
    return rows


def compare(before: Path, after: Path, suites: Sequence[str], only: str, seconds: float | None) -> Row:
    """The report: the records of both trees and all rows."""
    report: Row = {"rows": []}
    print(f"{'CPU ms':52}{'before':>11}{'after':>11}{'after / before':>15}{'control':>9}{'noise':>9}")
    for suite in suites:
        start, limit = time.perf_counter(), SECONDS[suite] if seconds is None else seconds
        with tempfile.TemporaryDirectory() as folder:
            with workers(before, after) as processes:
                records = {name: processes[name].ask("describe") for name in ("before", "after")}
                report |= {name: record["machine"] for name, record in records.items()}
                names = [name for name in records["after"]["rows"][suite] if only in name]
                rows = run(processes, suite, names, folder, start + FIRST_PASS * limit)
            suspects = list(dict.fromkeys(row["row"] for row in rows if row["verdict"] == "slower"))
            if suspects:
                print("again, in new processes:")
                with workers(before, after) as processes:
                    rows = settle(rows, run(processes, suite, suspects, folder, start + limit))
        report["rows"] += rows
    return report


def settle(first: list[Row], again: list[Row]) -> list[Row]:
    """Rows that looked slower are so only if they were so again."""
    second = {(row["row"], row["step"]): row for row in again}
    settled = []
    for row in first:
        other = second.get((row["row"], row["step"]))
        if other is not None:
            both = row["verdict"] if row["verdict"] == other["verdict"] else "same"
            row = {**row, "verdict": both, "again": other}
        settled.append(row)
    return settled


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path, metavar="BEFORE_TREE")
    parser.add_argument("after", type=Path, metavar="AFTER_TREE")
    parser.add_argument("--suite", nargs="+", choices=SECONDS, default=["filter"])
    parser.add_argument("--only", default="", metavar="TEXT", help="rows with this text in their names")
    parser.add_argument("--seconds", type=float, help="for each suite, instead of its own number")
    parser.add_argument("--report", type=Path, help="write the rows to this JSON file")
    options = parser.parse_args()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})  # the workers inherit it
    report = compare(options.before, options.after, options.suite, options.only, options.seconds)
    if options.report is not None:
        options.report.parent.mkdir(parents=True, exist_ok=True)
        options.report.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    slower = [f"{row['row']} {row['step']}".strip() for row in report["rows"] if row["verdict"] == "slower"]
    other = sorted({row["row"] for row in report["rows"] if not row["same_result"]})
    print(f"slower beyond noise: {'; '.join(slower) or 'none'}")
    print(f"other bytes than before: {'; '.join(other) or 'none'}")
    return 1 if slower else 0


if __name__ == "__main__":
    sys.exit(main())
