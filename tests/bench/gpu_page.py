#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Writes tests/reports/gpu.md from what tests/gpu.sh measured.

  python3 tests/bench/gpu_page.py FOLDER     # its --out: gpu.json, mla.json; both are kept beside the page
"""
import json
import pathlib
import shutil
import sys

REPORTS = pathlib.Path(__file__).resolve().parents[1] / "reports"


def table(head, rows):
    return ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)] + ["| " + " | ".join(map(str, r)) + " |" for r in rows]


def main():
    folder = pathlib.Path(sys.argv[1])
    if folder.resolve() != REPORTS:
        shutil.copy(folder / "gpu.json", REPORTS / "gpu.json")
        shutil.copy(folder / "mla.json", REPORTS / "gpu_mla.jsonl")
    data = json.loads((REPORTS / "gpu.json").read_text())
    attention = [json.loads(line) for line in (REPORTS / "gpu_mla.jsonl").read_text().splitlines()]
    by = lambda name: [r for r in data["results"] if r["bench"] == name]
    read = by("limits")[0]["read_gb_s"]
    out = ["# Measured on a GPU", "",
           f"By `tests/gpu.sh`, written by `tests/bench/gpu_page.py`, one run. {data['gpu']}; read-only streaming "
           f"{read / 1000:.2f} TB/s by the program of the same run. Medians of graph replays over more than twice the L2.", "",
           "## A stage's step", "",
           "The floor is the time to read the weights that the step touches and the cache rows once, at that rate. Random "
           "weights and tokens.", ""]
    rows = []
    for r in by("decode"):
        rows.append([f"{pathlib.Path(r['config']).name}, {r['layers']} layers", r["batch"], r["context"],
                     f"{r['us'] / 1000:.2f}", f"{r['floor_us'] / 1000:.2f}", f"{100 * r['floor_us'] / r['us']:.0f} %",
                     f"{1e6 * r['batch'] / r['us']:.0f}"])
    out += table(["model", "batch", "context", "ms", "floor, ms", "share of floor", "tokens/s"], rows)
    for r in by("prefill"):
        out += ["", f"Prefill of {r['tokens']} tokens, {pathlib.Path(r['config']).name}: {r['us'] / 1000:.0f} ms, {1e6 * r['tokens'] / r['us']:.0f} "
                "tokens/s."]
    out += ["", "## Multi-head latent attention", "",
            "TFLOP/s: 2 · heads · rows · (576 + 512) a new token. GB/s: cache, queries and outputs once.", ""]
    out += table(["heads", "batch × length", "µs", "TFLOP/s", "GB/s", "share of read rate"],
                 [[r["heads"], f"{r['batch']} × {r['length']:,}" + (" prefill" if r["new_tokens"] > 1 else ""), f"{r['us']:.1f}",
                   f"{r['tflops']:.0f}", f"{r['gb_per_s']:.0f}", f"{100 * r['gb_per_s'] / r['read_gb_per_s']:.0f} %"]
                  for r in attention])
    out += ["", "## Products", ""]
    out += table(["product", "rows × n × k", "weights", "µs", "GB/s", "share of read rate", "TFLOP/s", "share of matrix rate"],
                 [[r["name"], f"{r['rows']} × {r['n']} × {r['k']}", "fp8" if r["fp8"] else "bf16", f"{r['us']:.1f}",
                   f"{r['gb_s']:.0f}", f"{100 * r['read_share']:.0f} %", f"{r['tflops']:.0f}",
                   f"{100 * r['matrix_share']:.0f} %"] for r in by("gemm")])
    (REPORTS / "gpu.md").write_text("\n".join(out) + "\n")


if __name__ == "__main__":
    main()
