# SPDX-License-Identifier: Apache-2.0
"""A sequence goes to another pipeline while its client reads: the same tokens and log-probabilities, to the last bit,
as undisturbed, and no row is computed again. What cannot be is refused with the reason and changes nothing; a client
that hangs up stops nothing. Runs on GPU workers with STRAIT_TEST_BACKEND=cuda.
"""
import json
import pathlib
import re
import threading

import pytest
from harness import BACKEND, ROOT, Daemons, expect_rows_went, strait, wait_until

SHAPE = "v2-lite"
MODEL = ROOT / "tests/golden" / SHAPE
FIXED = [] if BACKEND == "cpu" else ["--deterministic"]
FORMAT = [] if BACKEND == "cpu" else ["--cache-format", "bf16"]
TOKENS = 1900  # long enough for two moves, and what is checked between them
MEMORY = "256MiB" if BACKEND == "cpu" else "1GiB"
KEY = "operator-key-of-the-tests"


class Pair(Daemons):
    """Two pipelines, and workers beyond what they need; the operator key is in a file of the test's."""

    def __init__(self, stages, spares, key_file):
        key_file.write_text(KEY + "\n")
        key_file.chmod(0o600)
        self.key, self.spares = key_file, spares
        super().__init__(MODEL, pipelines=2, stages=stages, random_weights=None, memory=MEMORY, worker_args=FIXED,
                         coordinator_args=["--operator-key-file", str(key_file), *FORMAT])

    def __enter__(self):
        super().__enter__()
        for _ in range(self.spares):
            self.start_worker()
        return self

    def migrate(self, sequence, to, *args):
        return strait("migrate", sequence, "--to", to, "--coordinator", self.base_url, "--operator-key-file", self.key,
                      *args)

    def ask(self, key=KEY, **body):
        return self.post("/strait/migrate", body, headers={"Authorization": f"Bearer {key}"} if key else {})

    def sequence(self, name, choice=0):
        """What status tells of one; None when it is not there."""
        found = [s for s in self.status()["sequences"] if s["request"] == name and s["choice"] == choice]
        return found[0] if found else None

    def known(self, name, choice=0):
        """The same, once status tells of it: what it tells is of a moment ago."""
        wait_until(lambda: self.sequence(name, choice) is not None, what=f"status to tell of {name}")
        return self.sequence(name, choice)

    def wait_there(self, name, pipeline, choice=0):
        # What status tells is of a moment ago.
        wait_until(lambda: (self.sequence(name, choice) or {}).get("pipeline_id") == pipeline, what=f"{name} in {pipeline}")

    def pipeline_ids(self):
        return [p["id"] for p in self.status()["pipelines"]]

    def other_than(self, pipeline):
        return next(p for p in self.pipeline_ids() if p != pipeline)


@pytest.fixture(scope="module", params=[(1, 1), (2, 0)], ids=["1_stage_and_a_spare", "2_stages"])
def pair(request, tmp_path_factory):
    with Pair(*request.param, tmp_path_factory.mktemp("key") / "key") as daemons:
        yield daemons


def body(**more):
    prompt = max((p["tokens"] for p in json.loads((MODEL / "golden.json").read_text())["prompts"]), key=len)
    return dict(prompt=prompt, max_tokens=TOKENS, temperature=0.9, seed=11, logprobs=1, ignore_eos=True,
                return_token_ids=True, **more)


class Stream:
    """A stream that a thread reads; `ids` and `logprobs` by choice grow meanwhile."""

    def __init__(self, cluster, name, **request):
        self.cluster, self.name, self.request = cluster, name, request
        self.ids, self.logprobs, self.failure = {}, {}, None
        self.thread = threading.Thread(target=self.read)
        self.thread.start()

    def read(self):
        try:
            with self.cluster.client(headers={"X-Request-Id": self.name}) as c, c.stream(
                    "POST", "/v1/completions", json={**self.request, "stream": True}) as reply:
                assert reply.status_code == 200
                lines = [line for line in map(self.take, reply.iter_lines()) if line]
            assert lines[-1] == "data: [DONE]", lines[-1]
        except BaseException as e:  # told by whoever waits
            self.failure = e

    def take(self, line):
        if line.startswith("data: {"):
            event = json.loads(line[6:])
            assert "error" not in event, event
            for choice in event["choices"]:
                self.ids.setdefault(choice["index"], []).extend(choice.get("token_ids") or [])
                logprobs = (choice.get("logprobs") or {}).get("token_logprobs") or []
                self.logprobs.setdefault(choice["index"], []).extend(logprobs)
        return line

    def tokens(self, choice=0):
        assert self.failure is None, self.failure
        return len(self.ids.get(choice, []))

    def wait(self, count, choice=0):
        wait_until(lambda: self.tokens(choice) >= count, what=f"{count} tokens of {self.name}")

    def end(self):
        self.thread.join(300)
        assert not self.thread.is_alive() and self.failure is None, self.failure
        return self.ids, self.logprobs


@pytest.fixture(scope="module")
def undisturbed(pair):
    """By number of choices: ids and log-probabilities of each."""
    expected = {}
    for n in (1, 2):
        choices = pair.complete(**body(n=n))["choices"]
        expected[n] = ({c["index"]: c["token_ids"] for c in choices},
                       {c["index"]: c["logprobs"]["token_logprobs"] for c in choices})
    return expected


def told(done):
    """The figures of the line that a move ends with."""
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 1, done.stdout
    line = re.match(r"sequence (\d+) from pipeline (\d+) to (\d+): (\d+) rows, \S+ \S*B in (\d+) rounds?, pause ([\d.]+) ms, "
                    r"total ([\d.]+) s, [\d.]+ GB/s$", done.stdout)
    assert line, done.stdout
    return [float(x) for x in line.groups()]


def test_the_same_tokens_when_a_sequence_moves_twice(pair, undisturbed):
    before = pair.fresh_status()["stats"]
    stream = Stream(pair, "moved", **body())
    for wanted in (50, 400):
        stream.wait(wanted)
        was = pair.known("cmpl-moved")
        to = pair.other_than(was["pipeline_id"])
        # By its request's name, then by its id.
        sequence, begin, end, rows, rounds, pause_ms, total_s = told(
            pair.migrate("cmpl-moved" if wanted == 50 else was["id"], to))
        assert (sequence, begin, end) == (was["id"], was["pipeline_id"], to)
        assert rows >= was["rows"] > 600 and rounds >= 1 and pause_ms / 1000 <= total_s
        pair.wait_there("cmpl-moved", to)
    assert stream.end() == undisturbed[1]
    after = pair.fresh_status()["stats"]
    for count in ("recomputed_rows", "replayed_tokens", "recoveries", "workers_lost"):
        assert after[count] == before[count], count
    expect_rows_went(after, before, "migrated")
    wait_until(lambda: pair.bytes_in_use() == 0, what="both ends to have let go of it")
    assert not pair.status()["migrations"]


def test_one_choice_of_several_moves(pair, undisturbed):
    stream = Stream(pair, "both", **body(n=2))
    stream.wait(50, choice=1)
    was = [pair.known("cmpl-both", choice) for choice in (0, 1)]
    to = pair.other_than(was[1]["pipeline_id"])
    ambiguous = pair.migrate("cmpl-both", to)
    assert ambiguous.returncode == 1 and "/" in ambiguous.stderr, ambiguous.stderr
    assert told(pair.migrate("cmpl-both/1", to))[0] == was[1]["id"]
    assert pair.sequence("cmpl-both", 0)["pipeline_id"] == was[0]["pipeline_id"]
    pair.wait_there("cmpl-both", to, choice=1)
    assert "cmpl-both/1" in strait("status", "--url", pair.base_url).stdout
    assert stream.end() == undisturbed[2]


def test_a_dry_run_says_what_could_be_and_moves_nothing(pair, undisturbed):
    stream = Stream(pair, "dry", **body())
    stream.wait(50)
    was = pair.known("cmpl-dry")
    done = pair.migrate("cmpl-dry", pair.other_than(was["pipeline_id"]), "--dry-run")
    assert done.returncode == 0, done.stderr
    assert re.match(rf"sequence {was['id']} from pipeline {was['pipeline_id']} to \d+ could move: \d+ rows$", done.stdout)
    now = pair.sequence("cmpl-dry")
    assert now["pipeline_id"] == was["pipeline_id"] and now["placement"] == was["placement"]
    assert stream.end() == undisturbed[1]


def test_a_client_that_hangs_up_stops_no_move(pair, undisturbed):
    stream = Stream(pair, "alone", **body())
    stream.wait(50)
    was = pair.known("cmpl-alone")
    to = pair.other_than(was["pipeline_id"])
    ask = json.dumps({"sequence": was["id"], "to": to}).encode()
    with pair.socket() as s:
        s.sendall(b"POST /strait/migrate HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer %s\r\nContent-Length: %d\r\n\r\n%s" %
                  (KEY.encode(), len(ask), ask))
        # Begun: then it is the server's.
        wait_until(lambda: pair.status()["migrations"] or pair.sequence("cmpl-alone")["pipeline_id"] == to, what="the move")
    wait_until(lambda: pair.sequence("cmpl-alone")["pipeline_id"] == to, what="the move's end")
    assert stream.end() == undisturbed[1]


def test_reports_are_lines_of_json(pair, undisturbed):
    stream = Stream(pair, "lines", **body())
    stream.wait(50)
    was = pair.known("cmpl-lines")
    reply = pair.ask(sequence="cmpl-lines", to=pair.other_than(was["pipeline_id"]), timeout=60)
    assert reply.status_code == 200 and reply.headers["content-type"] == "application/x-ndjson", reply.text
    lines = [json.loads(line) for line in reply.text.splitlines()]
    assert [line["event"] for line in lines[:-1]] == ["progress"] * (len(lines) - 1)
    last = lines[-1]
    assert last["event"] == "done" and last["phase"] == "done", last
    assert last["sequence"] == was["id"] and last["rows"] == last["rows_total"] and last["recomputed_rows"] == 0
    assert last["moved_bytes"] > 0 and 0 < last["pause_ms"] <= last["total_ms"]
    assert stream.end() == undisturbed[1]


def test_what_cannot_be_is_refused_with_the_reason_and_changes_nothing(pair, undisturbed):
    stream = Stream(pair, "stays", **body())
    stream.wait(50)
    was = pair.known("cmpl-stays")
    to = pair.other_than(was["pipeline_id"])
    for sequence, pipeline, status in (("cmpl-nobody", to, 404), ("999999", to, 404), ("cmpl-stays/7", to, 404),
                                       ("cmpl-stays", 77, 404), ("cmpl-stays", was["pipeline_id"], (400, 409))):
        reply = pair.ask(sequence=sequence, to=pipeline)
        assert reply.status_code in (status if isinstance(status, tuple) else (status,)), reply.text
        assert reply.json()["error"]["message"]
        done = pair.migrate(sequence, pipeline)
        assert done.returncode == 1 and done.stdout == "", done.stdout
        assert reply.json()["error"]["message"] in done.stderr
    for change, param in (({"to": "2"}, "to"), ({"dry-run": True}, "dry-run"), ({"timeout": 0}, "timeout")):
        reply = pair.ask(**{"sequence": "cmpl-stays", "to": to, **change})
        assert reply.status_code == 400 and reply.json()["error"]["param"] == param, reply.text
    now = pair.sequence("cmpl-stays")
    assert now["pipeline_id"] == was["pipeline_id"] and now["placement"] == was["placement"]
    assert stream.end() == undisturbed[1]


def test_nobody_without_the_operator_key_moves_anything(pair, tmp_path):
    for key, status in ((None, 403), ("guessed-by-somebody", 401)):
        reply = pair.ask(key=key, sequence="1", to=1)
        assert reply.status_code == status, reply.text
    wrong = tmp_path / "wrong"
    wrong.write_text("another-operators-key")
    wrong.chmod(0o600)
    for args, says in (([], "needs the operator key"), (["--operator-key-file", wrong], "not the operator key"),
                       (["--operator-key-file", tmp_path / "none"], str(tmp_path / "none"))):
        done = strait("migrate", 1, "--to", 1, "--coordinator", pair.base_url, *args)
        assert done.returncode == 1 and says in done.stderr, done.stderr
    pathlib.Path(wrong).chmod(0o644)
    open_to_all = strait("migrate", 1, "--to", 1, "--coordinator", pair.base_url, "--operator-key-file", wrong)
    assert open_to_all.returncode == 1 and f"chmod 600 {wrong}" in open_to_all.stderr
