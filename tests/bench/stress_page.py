#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Writes tests/reports/stress.md, with its plots, from reports of `strait stress --json`.

  python3 tests/bench/stress_page.py                  # anew, of the reports that are kept beside the page
  python3 tests/bench/stress_page.py NAME FILE [NOTE] # keeps FILE as tests/reports/stress_NAME.json before, with a line about the run
"""
import json
import pathlib
import sys

import stress_plots

REPORTS = pathlib.Path(__file__).resolve().parents[1] / "reports"
FAULTS = [("migrations", "moves of every row"), ("worker_deaths", "SIGKILL of a worker"), ("worker_stops", "SIGSTOP of a worker, up to 8 s"),
          ("coordinator_stops", "SIGSTOP of the coordinator, 20 s"), ("reshapes", "other numbers of stages"), ("drains", "drains of a worker"),
          ("partitions", "partitions of a worker's links, up to 10 s"), ("bandwidth_limits", "slow links of a worker, up to 10 s"),
          ("joins", "workers that came new"), ("leaves", "workers that left for good")]
HEAD = """# Under stress

For whoever asks whether tokens stay the same while a cluster moves, loses and regains its parts. This page shows runs of
`strait stress`: what was done to the cluster, how many streams were not what they are undisturbed, and what clients felt.
[coordinator/cli](../../coordinator/cli/README.md#stress) says what each figure means.
"""


def table(head, rows):
    return ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)] + ["| " + " | ".join(map(str, r)) + " |" for r in rows]


def percent(share):
    return "none" if share is None else f"{100 * share:.1f} %"


def size(count):
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            return f"{count:.3g} {unit}"
        count /= 1000


def judged(r):
    moves = max(1, r["migrations"])
    rows = [["streams compared", f"{r['streams']:,}, {r['sequences']:,} sequences"],
            ["**violations**", f"**{r['violations']}**"],
            ["moves of 1,000 rows and more", f"{r['migrations_of_1000_rows']:,}, {percent(r['migrations_of_1000_rows'] / moves)}"],
            ["moves of 4,000 rows and more", f"{r['migrations_of_4000_rows']:,}, {percent(r['migrations_of_4000_rows'] / moves)}"],
            ["sequences that went on after a failure", f"{r['recovered_sequences']:,} of {r['interrupted_sequences']:,}"],
            ["tokens computed again", f"{r['recomputed_tokens']:,}"],
            ["decode time protected by copies", percent(r.get("protected_share"))],
            ["moved", f"{size(r['moved_bytes'])}, at {r['gb_per_s']:.3f} GB/s while a move lasted"],
            ["rows that copies gave back to stages", f"{r['restored_rows']:,}"],
            ["skipped faults", ", ".join(r["skipped_faults"]) or "none"]]
    lines = table(["", ""], rows)
    if "missed" in r:
        lines += ["", "Of the goals of an acceptance run, it missed" + (":" if r["missed"] else " none.")]
        lines += [""] * bool(r["missed"]) + [f"- {text}" for text in r["missed"]]
    return lines


def spreads(r):
    kinds = [("pause_ms", "pause at the client, ms"), ("pause_told_ms", "pause as the coordinator tells, ms"), ("move_ms", "whole move, ms"),
             ("move_rows", "rows moved")]
    return table(["", "p50", "p99", "max", "of"],
                 [[what] + [f"{r[key][part]:,.1f}" for part in ("p50", "p99", "max")] + [r[key]["count"]] for key, what in kinds])


def section(name, r, plots):
    """The lines of one run; `plots` gives each plot's file name."""
    lines = ["", f"## Run `{name}`", "",
             f"{r['seconds']:.0f} s, {r['clients']} clients, {r['requests']} requests of {r['min_rows']:,} to {r['max_rows']:,} rows, seed "
             f"{r['seed']}; {r['program']}.", ""]
    lines += [r["note"], ""] if "note" in r else []
    lines += judged(r) + [""] + table(["fault", "times"], [[what, f"{r[key]:,}"] for key, what in FAULTS]) + [""] + spreads(r)
    for plot, caption in (("time", "Tokens a second at all clients, and below what was done when."),
                          ("pauses", "Pause at the client by length, a dot a move."),
                          ("rows", "Moves by rows.")):
        lines += ["", caption, "", f"![{caption}]({plots[plot]})"]
    return lines


def page(runs):
    """The page's text and the plots' texts by file name, of reports by name."""
    lines, plots = HEAD.rstrip("\n").split("\n"), {}
    for name, report in sorted(runs.items()):
        names = {plot: f"stress_{name}_{plot}.svg" for plot in ("time", "pauses", "rows")}
        plots[names["time"]] = stress_plots.over_time(report)
        plots[names["pauses"]] = stress_plots.pauses(report)
        plots[names["rows"]] = stress_plots.rows(report)
        lines += section(name, report, names)
    return "\n".join(lines) + "\n", plots


def main(args):
    if len(args) not in (0, 2, 3):
        sys.exit(__doc__)
    if args:
        report = json.loads(pathlib.Path(args[1]).read_text())
        if len(args) > 2:
            report["note"] = args[2]
        (REPORTS / f"stress_{args[0]}.json").write_text(json.dumps(report) + "\n")
    runs = {path.stem[len("stress_"):]: json.loads(path.read_text()) for path in REPORTS.glob("stress_*.json")}
    if not runs:
        sys.exit(f"no stress_*.json in {REPORTS}: give a report of strait stress --json, as NAME FILE")
    text, plots = page(runs)
    (REPORTS / "stress.md").write_text(text)
    for name, svg in plots.items():
        (REPORTS / name).write_text(svg)


if __name__ == "__main__":
    main(sys.argv[1:])
