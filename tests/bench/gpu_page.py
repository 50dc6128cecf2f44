#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Writes tests/reports/gpu.md from what tests/gpu.sh measured.

  python3 tests/bench/gpu_page.py FOLDER     # its --out: gpu.json, mla.json, serve.json; they are kept beside the page
"""
import json
import math
import pathlib
import shutil
import sys

V3_LAYERS = 61
REPORTS = pathlib.Path(__file__).resolve().parents[1] / "reports"


def table(head, rows):
    return ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)] + ["| " + " | ".join(map(str, r)) + " |" for r in rows]


def name(r):
    return pathlib.Path(r["config"]).name


def projection(decode):
    """What the steps of V3 layers measured say of the whole model, a GPU a stage."""
    rows = []
    for r in decode:
        layer_ms = r["us"] / 1000 / r["layers"]
        gpus = math.ceil(V3_LAYERS / r["layers"])
        rows.append([r["batch"], f"{r['context']:,}", r["layers"], f"{layer_ms:.3f}", gpus,
                     f"{V3_LAYERS * layer_ms:.1f}", f"{1000 * r['batch'] / (V3_LAYERS * layer_ms):.0f}",
                     f"{1e6 * r['batch'] / r['us']:.0f}"])
    if not rows:
        return []
    return ["", "## DeepSeek-V3 from its layers", "",
            f"A layer takes the step's time over the layers measured, as many as fit beside the cache of the case; {V3_LAYERS} "
            f"layers take {V3_LAYERS} times that (the three dense ones less, the head more) on ceil({V3_LAYERS} / layers) GPUs, one "
            "stage each, without the time of hops. One batch on its way: batch / (61 x layer time) tokens/s. A batch on every "
            "stage: batch / step time, with as many sequences as batch x GPUs.", ""] + table(
                ["batch", "context", "layers", "ms a layer", "GPUs", "ms a token", "tokens/s, one batch", "tokens/s, full"], rows)


def plain(r):
    """Neither --deterministic nor anything in fp8 but weights."""
    return not r.get("deterministic") and r.get("rows", "bf16") == "bf16" and not r.get("fp8_activations")


def pairs(steps, special):
    """Equal cases, plain and special, side by side: [case, the plain one]."""
    key = ("bench", "config", "layers", "batch", "context", "tokens")
    found = []
    for r in filter(special, steps):
        alike = [p for p in steps if plain(p) and all(p.get(k) == r.get(k) for k in key)]
        found += [(r, alike[-1])] if alike else []
    return found


def side_by_side(found):
    what = lambda r: f"prefill of {r['tokens']:,}" if r["bench"] == "prefill" else f"decode {r['batch']} × {r['context']:,}"
    both = lambda r: ", deterministic" if r.get("deterministic") and r.get("fp8_activations") else ""
    return table(["model", "step", "ms without", "ms with", "times"],
                 [[f"{name(r)}, {r['layers']} layers" + both(r), what(r), f"{p['us'] / 1000:.2f}", f"{r['us'] / 1000:.2f}",
                   f"{r['us'] / p['us']:.2f}"] for r, p in found])


def price(steps):
    found = pairs(steps, lambda r: r.get("deterministic") and plain(dict(r, deterministic=False)))
    return ["", "## What --deterministic costs", ""] + side_by_side(found) if found else []


def fp8_rows(steps):
    found = pairs(steps, lambda r: r.get("rows") == "fp8" and plain(dict(r, rows="bf16")))
    return ["", "## fp8 cache rows", "", "The same stage with --cache-format fp8, and without: bf16 rows.",
            ""] + side_by_side(found) if found else []


def fp8_activations(steps):
    found = pairs(steps, lambda r: r.get("fp8_activations") and r.get("rows", "bf16") == "bf16")
    return ["", "## fp8 activations", "", "The same stage with --fp8-activations, and with neither it nor --deterministic.",
            ""] + side_by_side(found) if found else []


def hops(measured):
    """Hidden states from one NCCL rank to another, by tests/gpu_nccl.sh."""
    if not measured:
        return []
    how = lambda r: "a GPU each" if r.get("gpus", 1) > 1 else "MPS" if r["mps"] else "taking turns"
    rows = [[f"{r['bytes']:,}", how(r), r["nccl"], f"{r['bare_us']:.1f}",
             f"{r['transport_us']:.1f}", f"{r['ratio']:.2f}"] + ([f"{r[k] / 2**20:.0f}" for k in ("taken", "stated")] if "taken" in r
                                                       else ["", ""]) for r in measured]
    return ["", "## A hop over NCCL", "",
            "What counts is the ratio of a hop through `NcclTransport` to bare sends and receives, measured in turns. Two ranks on one "
            "GPU, which is not how they are meant to run, are side by side with MPS, and take turns without; NCCL goes by a socket "
            "between them. Memory: of the ends of edges on a GPU, two if it has one rank, else four.", ""] + table(
                ["bytes", "ranks", "NCCL", "bare, µs", "NcclTransport, µs", "times", "GPU memory, MiB", "stated"], rows)


def served(pipelines):
    one = pipelines[0]["output_tokens_per_s"]
    return table(["ranks", "prompt tokens/s", "output tokens/s", "of one rank's", "a token p50, ms", "failed"],
                 [[r["ranks"], f"{r['prompt_tokens_per_s']:.0f}", f"{r['output_tokens_per_s']:.0f}",
                   f"{100 * r['output_tokens_per_s'] / one:.0f} %", f"{r['tpot_p50_ms']:.1f}", r["failed"]] for r in pipelines])


def ranks(pipelines, quarters):
    """What pipelines of several NCCL ranks on one GPU serve, and what of that bare stages lose by sharing it."""
    if not pipelines:
        return []
    out = ["", "## Ranks that share the GPU", "",
           f"`strait bench`, V2-Lite shape, {pipelines[0]['concurrency']} clients, with MPS: pipelines whose stages take turns on the "
           "same multiprocessors, and whose hops go by a socket.", ""] + served(pipelines)

    def mean(at_once, batch):
        us = [r["us"] for r in quarters if r["at_once"] == at_once and r["batch"] == batch]
        return sum(us) / len(us) / 1000 if us else None

    whole, alone, shared = mean(1, 64), mean(1, 16), mean(4, 16)
    if whole and alone and shared:
        out += ["", f"Bare steps of a quarter of the layers: {whole:.2f} ms for 64 sequences, as one rank makes them; {alone:.2f} ms for the "
                f"16 that each of four ranks has at a time, as many weights being read for them; {shared:.2f} ms for 16 when four processes "
                f"make one at once. So bare stages decode {100 * 16 / shared / (64 / (4 * whole)):.0f} % of one rank's tokens: that much is "
                "lost to sharing the GPU; the rest to hops, prompts and what they wait for each other."]
    return out


def gpu_ranks(pipelines):
    """The same with a GPU for each rank."""
    return ["", "## Ranks on GPUs of their own", "",
            f"`strait bench`, V2-Lite shape, {pipelines[0]['concurrency']} clients, a rank a GPU of one host.", ""] + served(
                pipelines) if pipelines else []


def memory(measured):
    if not measured:
        return []
    gib = lambda r, k: f"{r[k] / 2**30:.2f}"
    return ["", "## A stage's memory", "",
            "As the stage states it before it loads, and what the GPU then missed, all steps behind it.", ""] + table(
                ["model", "weights, GiB", "cache", "workspace", "stated", "taken", "taken of stated"],
                [[f"{name(r)}, {r['layers']} layers" + (", deterministic" if r["deterministic"] else "") +
                  (f", {r['rows']} rows" if r.get("rows", "bf16") != "bf16" else "") +
                  (", fp8 activations" if r.get("fp8_activations") else ""), gib(r, "weights"),
                  gib(r, "cache"), gib(r, "workspace"), gib(r, "stated"), gib(r, "taken"),
                  f"{100 * r['taken'] / r['stated']:.1f} %"] for r in measured])


def serving(data, decode):
    """What strait bench measured of a whole cluster, beside the bare steps of as many sequences at the mean context."""
    if not data:
        return []
    context = data["prompt_tokens"] + data["output_tokens"] // 2
    steps = {r["batch"]: r for r in decode if r["context"] == context and name(r) == pathlib.Path(data["model"]).name}
    bare = lambda r, key: f"{steps[r['concurrency']][key] / 1000:.2f}" if key in steps.get(r["concurrency"], {}) else ""
    rows = [[r["concurrency"], f"{r['prompt_tokens_per_s']:.0f}", f"{r['output_tokens_per_s']:.0f}", f"{r['ttft_ms']['p50']:.0f}",
             f"{r['tpot_ms']['p50']:.2f}", f"{r['tpot_ms']['p99']:.2f}", bare(r, "us"), bare(r, "ahead_us"), r["failed"]]
            for r in data["runs"]]
    return ["", "## Serving", "",
            f"`strait bench`, a worker on one GPU, {data['model']} shape with random weights, prompts of {data['prompt_tokens']:,} "
            f"tokens, {data['output_tokens']} generated.", ""] + table(
                ["clients", "prompt tokens/s", "output tokens/s", "first token p50, ms", "a token p50, ms", "p99", "a step alone, ms",
                 "begun ahead", "failed"], rows)


def page(data, attention, serve):
    """The page's text from gpu.json, the lines of mla.json, and serve.json or None."""
    by = lambda bench: [r for r in data["results"] if r["bench"] == bench]
    steps = by("decode") + by("prefill")
    read = by("limits")[0]["read_gb_s"]
    out = ["# Measured on a GPU", "",
           f"By `tests/gpu.sh`, written by `tests/bench/gpu_page.py`. {data['gpu']}; read-only streaming "
           f"{read / 1000:.2f} TB/s; each program measures the limits that its shares are of. Medians of graph replays over more than "
           "twice the L2.", "",
           "## A stage's step", "",
           "The floor is the time to read the weights that the step touches and the cache rows once, at that rate. Random "
           "weights and tokens. Layers that do not begin or end the model are timed with their hidden states' way through host "
           "memory, in and out.", ""]
    decode = list(filter(plain, by("decode")))
    out += table(["model", "batch", "context", "ms", "floor, ms", "share of floor", "tokens/s"],
                 [[f"{name(r)}, {r['layers']} layers", r["batch"], r["context"], f"{r['us'] / 1000:.2f}",
                   f"{r['floor_us'] / 1000:.2f}", f"{100 * r['floor_us'] / r['us']:.0f} %",
                   f"{1e6 * r['batch'] / r['us']:.0f}"] for r in decode])
    for r in filter(plain, by("prefill")):
        out += ["", f"Prefill of {r['tokens']} tokens, {name(r)}, {r['layers']} layers: {r['us'] / 1000:.0f} ms, "
                f"{1e6 * r['tokens'] / r['us']:.0f} tokens/s" + (
                    f"; {r['tflops']:.0f} TFLOP/s as done, attention in the {'expanded' if r.get('expanded') else 'absorbed'} form, "
                    f"{100 * r['matrix_share']:.0f} % of what the tensor cores do with operands in shared memory, in the same run." if "tflops" in r else ".")]
    out += serving(serve, decode)
    out += projection([r for r in decode if name(r) == "v3"])
    out += price(steps)
    out += fp8_rows(steps)
    out += fp8_activations(steps)
    out += memory(by("memory"))
    out += hops(by("nccl_hop"))
    out += ranks(by("ranks"), by("quarter"))
    out += gpu_ranks(by("gpu_ranks"))
    expanded = [r for r in attention if r.get("form") == "expanded"]
    attention = [r for r in attention if "form" not in r]
    out += ["", "## Multi-head latent attention", "",
            "In the absorbed form. TFLOP/s: 2 · heads · rows · (576 + 512) a new token. GB/s: cache, queries and outputs once.", ""]
    out += table(["heads", "batch × length", "µs", "TFLOP/s", "GB/s", "share of read rate"],
                 [[r["heads"], f"{r['batch']} × {r['length']:,}" + (f", {r['new_tokens']:,} new" if r["new_tokens"] > 1 else ""), f"{r['us']:.1f}",
                   f"{r['tflops']:.0f}", f"{r['gb_per_s']:.0f}", f"{100 * r['gb_per_s'] / r['read_gb_per_s']:.0f} %"]
                  for r in attention])
    if expanded:
        out += ["", "Prompts in the expanded form, alone and with the keys and values made from the cache. TFLOP/s: 2 · heads · pairs · "
                "(192 + 128), and 2 · 512 · 256 a head and key.", ""] + table(
                    ["heads", "length", "µs", "TFLOP/s", "with keys, µs", "TFLOP/s"],
                    [[r["heads"], f"{r['length']:,}, {r['new_tokens']:,} new", f"{r['us']:.1f}", f"{r['tflops']:.0f}",
                      f"{r['with_keys_us']:.1f}", f"{r['with_keys_tflops']:.0f}"] for r in expanded])
    out += ["", "## Products", ""]
    out += table(["product", "rows × n × k", "weights", "µs", "GB/s", "share of read rate", "TFLOP/s", "share of matrix rate"],
                 [[r["name"], f"{r['rows']} × {r['n']} × {r['k']}", "fp8" if r["fp8"] else "bf16", f"{r['us']:.1f}",
                   f"{r['gb_s']:.0f}", f"{100 * r['read_share']:.0f} %", f"{r['tflops']:.0f}",
                   f"{100 * r['matrix_share']:.0f} %"] for r in by("gemm")])
    return "\n".join(out) + "\n"


def main():
    folder = pathlib.Path(sys.argv[1])
    serve = REPORTS / "gpu_serve.json"
    if folder.resolve() != REPORTS:
        shutil.copy(folder / "gpu.json", REPORTS / "gpu.json")
        shutil.copy(folder / "mla.json", REPORTS / "gpu_mla.jsonl")
        serve.unlink(missing_ok=True)  # of another run
        if (folder / "serve.json").exists():
            shutil.copy(folder / "serve.json", serve)
    (REPORTS / "gpu.md").write_text(page(
        json.loads((REPORTS / "gpu.json").read_text()),
        [json.loads(line) for line in (REPORTS / "gpu_mla.jsonl").read_text().splitlines()],
        json.loads(serve.read_text()) if serve.exists() else None))


if __name__ == "__main__":
    main()
