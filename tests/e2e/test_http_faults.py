# SPDX-License-Identifier: Apache-2.0
"""Defends: whatever a client sends, or stops sending, it gets a clear error in OpenAI's shape (or is cut off), and
everybody else is served on. Without a replacement for a dead worker: 503 with Retry-After, while pipelines that
live keep serving."""
import json
import socket
import threading
import time

import pytest

from harness import Cluster, Daemons, wait_until

PROMPT = list(range(10, 30))


@pytest.fixture(scope="module")
def cluster():
    with Cluster(workers=2) as c:
        yield c


@pytest.fixture(autouse=True)
def still_serves(request):
    yield
    if "cluster" in request.fixturenames:
        c = request.getfixturevalue("cluster")
        assert c.process.poll() is None, c.logs()
        assert len(c.complete(prompt=PROMPT, max_tokens=2, ignore_eos=True)["choices"]) == 1


def error_of(reply, status):
    assert reply.status_code == status, f"{reply.status_code}: {reply.text[:300]}"
    error = reply.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    return error


def raw(cluster, data, timeout_s=60):
    """Sends bytes, returns all that comes until the server closes."""
    with cluster.socket() as s:
        s.settimeout(timeout_s)
        s.sendall(data)
        got = b""
        while chunk := s.recv(65536):
            got += chunk
        return got


# ---------------------------------------------------------------- malformed


@pytest.mark.parametrize("body", [b"", b"{", b"[1,2]", b"null", b'"text"', b'{"prompt": "x",}', b"\x00\x01\xff",
                                  b'{"prompt": "\xff\xfe"}', b'{"a":' * 5000, b"[" * 100_000])
def test_bodies_that_are_no_json_object(cluster, body):
    error = error_of(cluster.post("/v1/completions", body), 400)
    assert error["type"] == "invalid_request_error"


@pytest.mark.parametrize("body, param", [
    ({}, "prompt"),
    ({"prompt": 5}, "prompt"),
    ({"prompt": [1, "x"]}, "prompt"),
    ({"prompt": [-1]}, "prompt"),
    ({"prompt": [640]}, "prompt"),
    ({"prompt": [1.5]}, "prompt"),
    ({"prompt": [2 ** 63]}, "prompt"),
    ({"prompt": ""}, "prompt"),
    ({"prompt": "x", "max_tokens": "ten"}, "max_tokens"),
    ({"prompt": "x", "temperature": -1}, "temperature"),
    ({"prompt": "x", "stream": "yes"}, "stream"),
    ({"prompt": "x", "stop": ["a"] * 1000}, "stop"),
    ({"prompt": "x", "logit_bias": {"99999999": 1}}, "logit_bias"),
    ({"prompt": "x", "n": 100000}, "n"),
])
def test_bad_fields_are_named(cluster, body, param):
    assert error_of(cluster.post("/v1/completions", body), 400)["param"] == param


@pytest.mark.parametrize("messages", [None, [], "hi", [{"role": "user"}], [{"content": "x"}], [5]])
def test_bad_messages(cluster, messages):
    assert error_of(cluster.post("/v1/chat/completions", {"messages": messages}), 400)["param"].startswith("messages")


def test_routes_and_methods(cluster):
    error_of(cluster.get("/nowhere"), 404)
    reply = cluster.get("/v1/completions")
    error_of(reply, 405)
    assert reply.headers["allow"] == "POST"


@pytest.mark.parametrize("data, status", [
    (b"nonsense\r\n\r\n", b"400"),
    (b"GET / HTTP/9.9\r\n\r\n", b"400"),
    (b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: -5\r\n\r\n", b"400"),
    (b"POST /v1/completions HTTP/1.1\r\nHost: x\r\n\r\n", b"411"),
])
def test_bytes_that_are_no_http(cluster, data, status):
    reply = raw(cluster, data)
    assert reply.startswith(b"HTTP/1.1 " + status), reply[:200]
    assert b'"error"' in reply


# ---------------------------------------------------------------- oversized


def test_oversized_body_is_refused_before_it_is_read(cluster):
    reply = raw(cluster, b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 10000000000\r\n\r\n")
    assert reply.startswith(b"HTTP/1.1 413"), reply[:200]


def test_oversized_chunked_body(cluster):
    with cluster.socket() as s:
        s.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n")
        chunk = b"100000\r\n" + b"x" * (1 << 20) + b"\r\n"
        try:
            for _ in range(64):
                s.sendall(chunk)
        except OSError:
            pass  # cut off while sending: refused
        try:
            reply = s.recv(65536)
        except ConnectionResetError:
            reply = b"HTTP/1.1 413"
        assert reply.startswith(b"HTTP/1.1 413"), reply[:200]


def test_oversized_headers(cluster):
    with cluster.socket() as s:
        try:
            s.sendall(b"GET /health HTTP/1.1\r\n" + b"".join(b"X-%d: %s\r\n" % (i, b"y" * 100) for i in range(5000)))
            reply = s.recv(65536)
        except ConnectionError:
            reply = b"HTTP/1.1 431"
        assert reply.startswith(b"HTTP/1.1 431"), reply[:200]


def test_prompt_beyond_the_context(cluster):
    error = error_of(cluster.post("/v1/completions", {"prompt": [5] * 20_000}), 400)
    assert error["code"] == "context_length_exceeded"
    assert "20000" in error["message"] and "16384" in error["message"]


# ---------------------------------------------------------------- stalled, gone


def test_client_that_stalls_in_its_body_is_told_and_others_are_served(cluster):
    with cluster.socket() as s:
        s.settimeout(90)
        s.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{\"pro")
        assert cluster.complete(prompt=PROMPT, max_tokens=1, ignore_eos=True)
        reply = s.recv(65536)
        assert reply.startswith(b"HTTP/1.1 408"), reply[:200]


def test_client_that_leaves_a_stream_is_cancelled(cluster):
    with cluster.client() as c:
        with c.stream("POST", "/v1/completions", json={"prompt": PROMPT, "max_tokens": 15_000, "stream": True,
                                                       "ignore_eos": True}) as reply:
            lines = reply.iter_lines()  # kept: dropping it would close the stream already
            next(lines)
            wait_until(lambda: cluster.status()["running"] == 1, timeout_s=30, what="the request to run")
    wait_until(lambda: cluster.status()["running"] == 0, timeout_s=30, what="the left request's end")
    assert cluster.bytes_in_use() == 0, "blocks leaked"


def test_client_that_leaves_before_its_answer_is_cancelled(cluster):
    body = json.dumps({"prompt": PROMPT, "max_tokens": 15_000, "ignore_eos": True}).encode()
    with cluster.socket() as s:
        s.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
        wait_until(lambda: cluster.status()["running"] == 1, timeout_s=30, what="the request to run")
    wait_until(lambda: cluster.status()["running"] == 0, timeout_s=30, what="the left request's end")


def test_client_that_reads_nothing_stops_nobody(cluster):
    body = json.dumps({"prompt": PROMPT, "max_tokens": 2_000, "stream": True, "ignore_eos": True}).encode()
    with cluster.socket() as s:
        s.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        s.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
        wait_until(lambda: cluster.status()["running"] >= 1, timeout_s=30, what="the request to run")
        for _ in range(3):
            assert cluster.complete(prompt=PROMPT, max_tokens=4, ignore_eos=True)
    wait_until(lambda: cluster.status()["running"] == 0, timeout_s=60, what="the left request's end")


def test_deadline_of_a_request(cluster):
    reply = cluster.post("/v1/completions", {"prompt": PROMPT, "max_tokens": 15_000, "ignore_eos": True},
                         headers={"x-request-timeout-ms": "300"})
    assert error_of(reply, 504)["type"] == "server_error"


def test_full_queue_is_429_with_retry_after():
    with Daemons(pipelines=1, stages=1, coordinator_args=["--max-running", "1", "--max-waiting", "2"]) as d:
        replies = []

        def ask():
            with d.client() as c:
                replies.append(c.post("/v1/completions", json={"prompt": PROMPT, "max_tokens": 600,
                                                               "ignore_eos": True}))

        threads = [threading.Thread(target=ask) for _ in range(12)]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
        codes = sorted(r.status_code for r in replies)
        assert set(codes) == {200, 429}, codes
        for r in replies:
            if r.status_code == 429:
                assert error_of(r, 429)["type"] == "rate_limit_exceeded"
                assert int(r.headers["retry-after"]) >= 1


# ---------------------------------------------------------------- dead workers, nobody to replace them


def test_living_pipeline_serves_on_and_without_any_it_is_503():
    with Daemons(pipelines=2, stages=1, coordinator_args=["--no-pipeline-grace", "2"]) as d:
        expected = d.complete(prompt=PROMPT, max_tokens=300, temperature=0, ignore_eos=True,
                              return_token_ids=True)["choices"][0]["token_ids"]
        # Streams on both pipelines; one pipeline dies: every stream ends well, replayed where it must be.
        results = []

        def stream():
            got = []
            for event in d.stream(prompt=PROMPT, max_tokens=300, temperature=0, ignore_eos=True,
                                  return_token_ids=True):
                for choice in event["choices"]:
                    got += choice.get("token_ids") or []
            results.append(got)

        threads = [threading.Thread(target=stream) for _ in range(4)]
        for t in threads:
            t.start()
        wait_until(lambda: d.status()["running"] == 4, timeout_s=30, what="four streams")
        d.kill_worker(0)
        for t in threads:
            t.join()
        assert results == [expected] * 4
        d.wait_pipelines(1)
        assert d.complete(prompt=PROMPT, max_tokens=300, temperature=0, ignore_eos=True,
                          return_token_ids=True)["choices"][0]["token_ids"] == expected
        assert d.get("/health").status_code == 200

        # The last one dies too.
        d.kill_worker(1)
        wait_until(lambda: d.get("/health").status_code == 503, timeout_s=30, what="/health to say 503")
        reply = d.post("/v1/completions", {"prompt": PROMPT, "max_tokens": 2})
        error = error_of(reply, 503)
        assert int(reply.headers["retry-after"]) >= 1
        assert "pipeline" in error["message"]

        # A new worker comes: served again.
        d.start_worker()
        wait_until(d.ready, what="service on the new worker")
        assert d.complete(prompt=PROMPT, max_tokens=300, temperature=0, ignore_eos=True,
                          return_token_ids=True)["choices"][0]["token_ids"] == expected


def test_stream_that_loses_its_pipeline_for_good_ends_with_an_error_event():
    with Daemons(pipelines=1, stages=2, coordinator_args=["--no-pipeline-grace", "1"]) as d:
        with d.client() as c, c.stream("POST", "/v1/completions", json={
                "prompt": PROMPT, "max_tokens": 15_000, "stream": True, "ignore_eos": True}) as reply:
            lines = reply.iter_lines()
            next(lines)
            d.kill_worker(1)
            events = [line[6:] for line in lines if line.startswith("data: ")]
        error = json.loads([e for e in events if e != "[DONE]"][-1])["error"]
        assert error["type"] == "server_error"
