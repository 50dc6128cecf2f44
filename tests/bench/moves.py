#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""What a client feels when its sequence moves to another pipeline, and when a worker under it dies.

  moves.py --bin build/release/bin [--model DIR] [--lengths 1024,8192,16000] [--moves 6] [--load 0,8] [--threads 1]
           [--stages 1,2,4,2] [--beside 4] [--replication] [--crash] [--replica-memory 2GiB] [--warm-spares 0,1] [--deaths 2]
           [--arg=--backend --arg=cuda …] [--json FILE]

Two pipelines of one worker each. A sequence of each length decodes and moves back and forth; with --load others decode
beside it, half of them in each pipeline. The pause is the gap at the client between the last token of the old pipeline and the
first of the new one, less the median of the 50 gaps before it. With --crash one pipeline of two stages, and a spare: the
worker of each stage is killed in turn while a sequence decodes; once with copies of rows on the other workers, once without,
and each with every number of --warm-spares. The gap of a death runs from the kill's moment to the next token. With --stages one
pipeline on as many workers as the most stages of the list gets these numbers of stages, one after the other, while one sequence
decodes. With --beside so many sequences decode in each pipeline while one moves to and fro: their gaps while it moves, and while it does
not, by turns; first at any rate, then at a quarter of the rate that was seen. With --replication a pipeline with copies of rows on
another worker and one without decode by turns. Random weights.
"""
import argparse
import json
import os
import pathlib
import random
import signal
import statistics
import threading
import time
import urllib.request

from report import MODELS, Server

GAPS = 50


def tokens(seed, count):
    # The smallest bundled vocabulary has 640 ids.
    return random.Random(seed).choices(range(10, 610), k=count)


class Stream:
    """Decodes until it is closed, and notes when each token came."""

    def __init__(self, server, prompt, max_tokens, seed=0):
        self.server, self.length, self.times, self.ids = server, len(prompt), [], []
        self.closed, self.failure = False, None
        room = server.get("/strait/status")["max_positions"] - len(prompt)
        body = {"prompt": prompt, "max_tokens": min(max_tokens, room), "temperature": 0.8, "seed": seed, "ignore_eos": True, "stream": True,
                "return_token_ids": True}
        request = urllib.request.Request(server.url + "/v1/completions", json.dumps(body).encode(),
                                         {"Content-Type": "application/json"})
        self.reply = urllib.request.urlopen(request, timeout=1200)
        self.name = None
        self.thread = threading.Thread(target=self.read, daemon=True)
        self.thread.start()

    def read(self):
        try:
            for line in self.reply:
                if self.closed:
                    return
                if not line.startswith(b"data: {"):
                    continue
                now, event = time.perf_counter(), json.loads(line[6:])
                if "error" in event:
                    raise RuntimeError(event["error"])
                self.name = event["id"]
                for choice in event["choices"]:
                    ids = choice.get("token_ids") or []
                    self.ids += ids
                    self.times += [now] * len(ids)
        except Exception as e:
            if not self.closed:
                self.failure = e

    def wait(self, count, timeout=1200):
        end = time.monotonic() + timeout
        while len(self.times) < count:
            if self.failure or time.monotonic() > end:
                raise RuntimeError(f"{len(self.times)} of {count} tokens came: {self.failure}")
            time.sleep(0.002)

    def close(self):
        self.closed = True
        try:
            self.reply.close()
        except Exception:
            pass

    def gaps_before(self, index):
        """Of the tokens up to this one."""
        first = max(0, index - GAPS)
        return [b - a for a, b in zip(self.times[first:index], self.times[first + 1:index + 1])]


def operator_key(server):
    port = server.url.rsplit(":", 1)[1]
    for folder in (os.environ.get("XDG_RUNTIME_DIR"), os.environ.get("XDG_STATE_HOME"),
                   os.path.expanduser("~/.local/state")):
        path = pathlib.Path(folder or "/nowhere") / "strait" / f"operator-key-{port}"
        if path.exists():
            return path.read_text().strip()
    raise RuntimeError("strait up left no operator key")


def migrate(server, key, sequence, to):
    request = urllib.request.Request(server.url + "/strait/migrate", json.dumps({"sequence": sequence, "to": to}).encode(),
                                     {"Content-Type": "application/json", "Authorization": f"Bearer {key}"})
    with urllib.request.urlopen(request, timeout=600) as reply:
        last = json.loads(reply.read().splitlines()[-1])
    if last["event"] != "done":
        raise RuntimeError(last)
    return last


def place(server, name):
    for sequence in server.get("/strait/status")["sequences"]:
        if sequence["request"] == name:
            return sequence.get("pipeline_id")
    return None


def moves(server, length, count, load, seed):
    key = operator_key(server)
    pipelines = [p["id"] for p in server.get("/strait/status")["pipelines"]]
    others = [Stream(server, tokens(f"load {seed} {i}", 256), 100_000 if load else 1, i) for i in range(load)]
    for other in others:
        other.wait(5)
    stream = Stream(server, tokens(f"{length} {seed}", length), 10**6)
    stream.wait(GAPS + 5)
    time.sleep(1.2)  # status is published now and then
    here = place(server, stream.name)
    rows = []
    for _ in range(count):
        to = next(p for p in pipelines if p != here)
        done = migrate(server, key, stream.name, to)
        index = done["rows"] - length  # of the source's last token
        stream.wait(index + GAPS)
        before = statistics.median(stream.gaps_before(index))
        after = statistics.median([b - a for a, b in zip(stream.times[index + 1:index + GAPS - 1], stream.times[index + 2:index + GAPS])])
        gap = stream.times[index + 1] - stream.times[index]
        rows.append({"tokens": length, "load": load, "pause_ms": (gap - before) * 1e3, "gap_ms": gap * 1e3,
                     "gap_before_ms": before * 1e3, "gap_after_ms": after * 1e3, "told_pause_ms": done["pause_ms"],
                     "rows": done["rows"], "rounds": done["rounds"], "bytes": done["moved_bytes"], "total_ms": done["total_ms"],
                     "shared_bytes": done["shared_bytes"], "nccl_bytes": done["nccl_bytes"]})
        assert done["recomputed_rows"] == 0
        here = to
    stream.close()
    for other in others:
        other.close()
    time.sleep(0.5)
    return rows


def told(rows):
    pauses = sorted(r["pause_ms"] for r in rows)
    middle = {k: statistics.median(r[k] for r in rows) for k in rows[0]}
    rate = statistics.median(r["bytes"] / r["total_ms"] / 1e6 for r in rows)
    return (f"{middle['tokens']:.0f} tokens, load {middle['load']:.0f}: pause {middle['pause_ms']:.1f} ms (most {pauses[-1]:.1f}), a gap "
            f"{middle['gap_before_ms']:.1f} ms before, {middle['gap_after_ms']:.1f} after; {middle['bytes'] / 2**20:.1f} MiB in "
            f"{middle['total_ms']:.0f} ms, {rate:.2f} GB/s, {middle['rounds']:.0f} rounds; "
            f"{100 * middle['nccl_bytes'] / middle['bytes']:.0f} % by NCCL, {100 * middle['shared_bytes'] / middle['bytes']:.0f} % by shared memory")


def gaps_between(streams, begin, end):
    return [b - a for s in streams for a, b in zip(s.times, s.times[1:]) if begin <= a and b <= end]


def share(values, part):
    values = sorted(values)
    return values[min(len(values) - 1, int(part * len(values)))]


def beside(programs, model, threads, length, count, seconds, args):
    """What others feel while one moves: by turns it moves all the time, and not at all."""
    rows, rate = [], 0
    for part in (1, 4):
        os.environ["STRAIT_MIGRATE_RATE"] = str(rate / part / 1e9)  # GB/s; 0: any
        with Server(programs, model, 2, threads, ["--pipelines", "2", *args]) as server:
            key = operator_key(server)
            pipelines = [p["id"] for p in server.get("/strait/status")["pipelines"]]
            others = [Stream(server, tokens(f"beside {i}", 512), 10**6, i) for i in range(2 * count)]
            stream = Stream(server, tokens(f"mover {length}", length), 10**6)
            for s in [*others, stream]:
                s.wait(GAPS)
            time.sleep(1.2)
            here = place(server, stream.name)
            gaps, moved, moving = {True: [], False: []}, 0, 0
            until = time.perf_counter() + seconds
            moves_now = False
            while time.perf_counter() < until:
                moves_now = not moves_now
                begin = time.perf_counter()
                while time.perf_counter() < begin + 1.5:
                    if not moves_now:
                        time.sleep(0.01)
                        continue
                    to = next(p for p in pipelines if p != here)
                    done = migrate(server, key, stream.name, to)
                    here, moved, moving = to, moved + done["moved_bytes"], moving + done["total_ms"] / 1e3
                gaps[moves_now] += gaps_between(others, begin, time.perf_counter())
            for s in [*others, stream]:
                s.close()
        seen = moved / moving
        rows.append({"tokens": length, "others": 2 * count, "share_of_rate": 1 / part, "bytes_per_s": seen,
                     **{f"{name}_gap_ms_p{p}": share(gaps[now], p / 100) * 1e3
                        for name, now in (("moving", True), ("still", False)) for p in (50, 99, 100)}})
        r = rows[-1]
        print(f"{2 * count} others beside one of {length} tokens that moves at {seen / 1e9:.2f} GB/s ({'any rate' if part == 1 else '1/4 of it'}): gap p50 "
              f"{r['moving_gap_ms_p50']:.2f} ms, p99 {r['moving_gap_ms_p99']:.2f}, most {r['moving_gap_ms_p100']:.2f}; while nothing moves {r['still_gap_ms_p50']:.2f}, {r['still_gap_ms_p99']:.2f}, {r['still_gap_ms_p100']:.2f}", flush=True)
        rate = rate or seen
    del os.environ["STRAIT_MIGRATE_RATE"]
    return rows


def replication(programs, model, threads, length, count, memory, turns, args):
    """Decoding with copies and without, by turns: two clusters, one of which stands still."""
    rows = []
    options = ["--pipelines", "1", "--spares", "1", *args]
    with Server(programs, model, 1, threads, [*options, "--replica-memory", memory]) as copies, \
            Server(programs, model, 1, threads, [*options, "--replica-memory", "0"]) as plain:
        rates = {copies: [], plain: []}
        for turn in range(turns):
            for server in (copies, plain):
                streams = [Stream(server, tokens(f"{turn} {i}", length), 600, i) for i in range(count)]
                for s in streams:
                    s.wait(100)
                begin, at = time.perf_counter(), [len(s.times) for s in streams]
                for s in streams:
                    s.wait(590)
                rates[server].append(sum(len(s.times) - n for s, n in zip(streams, at)) / (max(s.times[-1] for s in streams) - begin))
                for s in streams:
                    s.close()
                time.sleep(1.0)
        stats = copies.get("/strait/status")["stats"]
        with_copies, without = (statistics.median(rates[s]) for s in (copies, plain))
        rows.append({"tokens": length, "sequences": count, "turns": turns, "tokens_per_s_with": rates[copies], "tokens_per_s_without": rates[plain],
                     "replicated_bytes": stats["replicated_bytes"], "protected_share": stats["protected_us"] / max(1, stats["decoding_us"])})
        print(f"{count} sequences of {length} tokens: {with_copies:.1f} tokens/s with copies, {without:.1f} without, {100 * (1 - with_copies / without):.1f} % "
              f"less; {stats['replicated_bytes'] / 2**20:.0f} MiB copied, protected {100 * rows[-1]['protected_share']:.2f} % of the time", flush=True)
    return rows


def deaths(programs, model, threads, length, memory, warm, count, args):
    """One stage after the other dies; strait up starts it anew, the spare takes its place."""
    rows = []
    with Server(programs, model, 2, threads, ["--pipelines", "1", "--spares", "1", "--replica-memory", memory,
                                                "--warm-spares", str(warm), *args]) as server:
        stream = Stream(server, tokens(f"crash {length}", length), 10**6)
        stream.wait(200)
        for n in range(count):
            until = time.monotonic() + 60
            while memory != "0" and time.monotonic() < until:
                time.sleep(0.3)
                if all(not s.get("unprotected", True) for s in server.get("/strait/status")["sequences"]):
                    break
            stage = n % 2
            while warm and time.monotonic() < until:  # the stage that is to die
                status = server.get("/strait/status")
                lost = next(s for w in status["workers"] for s in w["stages"] if s.get("stage_index") == stage)
                warm_ranges = [r for w in status["workers"] for r in w.get("warm", [])]
                # One that loads another range waits for its end.
                if all(r["state"] == "warm" for r in warm_ranges) and any(r["layer_begin"] == lost["layer_begin"] for r in warm_ranges):
                    break
                time.sleep(0.3)
            status = server.get("/strait/status")
            victim = next(w for w in status["workers"] if any(s.get("stage_index") == stage for s in w["stages"]))
            before, at = status["stats"], len(stream.times)
            killed = time.perf_counter()
            os.kill(victim["process_id"], signal.SIGKILL)
            stream.wait(at + 100)
            index = next(i for i, t in enumerate(stream.times) if t > killed and t - stream.times[i - 1] > 0.0
                         and max(b - a for a, b in zip(stream.times[at - 1:], stream.times[at:])) == t - stream.times[i - 1])
            time.sleep(1.5)
            after = server.get("/strait/status")["stats"]
            rows.append({"tokens": length, "copies": memory != "0", "warm_spares": warm,
                         "took_warm": after["warm_stages_taken"] - before["warm_stages_taken"], "stage": stage, "gap_ms": (stream.times[index] - killed) * 1e3,
                         "restored_rows": after["restored_rows"] - before["restored_rows"],
                         "recomputed_rows": after["recomputed_rows"] - before["recomputed_rows"]})
            print(f"{length} tokens, stage {stage} killed, copies {'on' if memory != '0' else 'off'}, {warm} warm, {rows[-1]['took_warm']} taken: {rows[-1]['gap_ms']:.0f} ms to the "
                  f"next token; {rows[-1]['restored_rows']} rows restored, {rows[-1]['recomputed_rows']} computed again", flush=True)
            stream.wait(len(stream.times) + 64)
        stream.close()
    return rows


def scale(server, key, stages):
    request = urllib.request.Request(server.url + "/strait/scale", json.dumps({"stages": stages}).encode(),
                                     {"Content-Type": "application/json", "Authorization": f"Bearer {key}"})
    with urllib.request.urlopen(request, timeout=1800) as reply:
        return json.loads(reply.read())


def changes(programs, model, threads, length, stages, args):
    """One long sequence, while its pipeline gets other numbers of stages."""
    rows = []
    with Server(programs, model, max(stages), threads, ["--pipelines", "1", *args]) as server:
        key = operator_key(server)
        scale(server, key, stages[0])
        stream = Stream(server, tokens(f"stages {length}", length), 12_000)  # what one stage has room for
        stream.wait(GAPS + 5)
        for before, after in zip(stages, stages[1:]):
            stats, at = server.get("/strait/status")["stats"], len(stream.times)
            begin = time.perf_counter()
            done = scale(server, key, after)
            total = time.perf_counter() - begin
            stream.wait(len(stream.times) + GAPS)
            gap = max(b - a for a, b in zip(stream.times[at - 1:], stream.times[at:]))
            time.sleep(1.2)  # status is published now and then
            status = server.get("/strait/status")
            rows.append({"tokens": length, "from": before, "to": after, "total_ms": total * 1e3,
                         "pause_ms": (gap - statistics.median(stream.gaps_before(at - 1))) * 1e3, "told_pause_ms": done["pause_ms"],
                         "gap_before_ms": statistics.median(stream.gaps_before(at - 1)) * 1e3, "bytes": done["moved_bytes"],
                         "rows_lost": done["rows_lost"], "tokens_max": status["pipelines"][0]["tokens_max"],
                         "recomputed_rows": status["stats"]["recomputed_rows"] - stats["recomputed_rows"]})
            r = rows[-1]
            print(f"{length} tokens, {before} -> {after} stages: pause {r['pause_ms']:.1f} ms at a gap of {r['gap_before_ms']:.1f}, "
                  f"{r['bytes'] / 2**20:.1f} MiB moved, {r['recomputed_rows']} rows computed again, {r['total_ms']:.0f} ms in all; "
                  f"then room for {r['tokens_max']} tokens", flush=True)
        stream.close()
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bin", type=pathlib.Path, required=True, help="folder of the programs")
    parser.add_argument("--model", type=pathlib.Path, default=MODELS / "long-context")
    parser.add_argument("--lengths", default="1024,8192,16000", help="of prompts, in tokens")
    parser.add_argument("--moves", type=int, default=6, help="of each length and load; 0: none")
    parser.add_argument("--load", default="0,8", help="sequences that decode beside it")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--crash", action="store_true", help="workers die, too")
    parser.add_argument("--deaths", type=int, default=2, help="of each length, with copies and without")
    parser.add_argument("--replica-memory", default="2GiB", help="of each worker, for --crash")
    parser.add_argument("--stages", default="", help="numbers of stages, one after the other")
    parser.add_argument("--beside", type=int, default=0, help="sequences that decode in each pipeline while one moves to and fro")
    parser.add_argument("--seconds", type=float, default=24, help="of each measurement of --beside")
    parser.add_argument("--replication", action="store_true", help="decode with copies of rows and without")
    parser.add_argument("--sequences", type=int, default=4, help="that decode in each turn of --replication")
    parser.add_argument("--turns", type=int, default=5, help="of --replication")
    parser.add_argument("--warm-spares", default="0", help="for --crash: spares that hold weights ready, several by commas")
    parser.add_argument("--arg", action="append", default=[], help="one more argument of strait up; repeat it")
    parser.add_argument("--json", type=pathlib.Path)
    o = parser.parse_args()
    lengths = [int(n) for n in o.lengths.split(",")]
    results = {"model": o.model.name, "threads": o.threads, "moves": [], "deaths": [], "changes": [], "beside": [], "replication": []}
    if o.moves > 0:
        with Server(o.bin, o.model, 2, o.threads, ["--pipelines", "2", *o.arg]) as server:
            for length in lengths:
                for load in (int(n) for n in o.load.split(",")):
                    rows = moves(server, length, o.moves, load, f"{length} {load}")
                    results["moves"] += rows
                    print(told(rows), flush=True)
    if o.stages:
        for length in lengths:
            results["changes"] += changes(o.bin, o.model, o.threads, length, [int(n) for n in o.stages.split(",")], o.arg)
    for length in lengths:
        if o.beside:
            results["beside"] += beside(o.bin, o.model, o.threads, length, o.beside, o.seconds, o.arg)
        if o.replication:
            results["replication"] += replication(o.bin, o.model, o.threads, length, o.sequences, o.replica_memory, o.turns, o.arg)
    if o.crash:
        for length in lengths:
            for memory in (o.replica_memory, "0"):
                for warm in (int(n) for n in o.warm_spares.split(",")):
                    results["deaths"] += deaths(o.bin, o.model, o.threads, length, memory, warm, o.deaths, o.arg)
    if o.json:
        o.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
