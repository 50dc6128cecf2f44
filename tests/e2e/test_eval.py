# SPDX-License-Identifier: Apache-2.0
"""Defends: `strait eval` gives transformers' perplexity, and figures that the API itself confirms; every bad input ends
with an error that names the thing and the fix.

Transformers' log-probabilities come with the golden checkpoints, for prompts of random token ids. To make text that
has exactly these ids, a tokenizer is written in which every id is a token "<tN>".
"""
import contextlib
import http.server
import json
import lzma
import math
import re
import shutil
import subprocess
import threading

import pytest
from harness import BIN, ROOT, TINY, Cluster, free_port, listening, strait

GOLDEN = ROOT / "tests/golden/v3-yarn"
VOCABULARY = 640


def spelled(ids):
    return "".join(f"<t{i}>" for i in ids)


def byte_alphabet():
    """The 256 characters by which byte-level BPE writes bytes down."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    return [chr(b) for b in printable] + [chr(256 + i) for i in range(len(others))]


def write_golden_model(folder, bos):
    """The golden checkpoint with a tokenizer that spells ids; `bos`: the id put before text, or None."""
    for path in [GOLDEN / "config.json", *GOLDEN.glob("model*")]:
        shutil.copy(path, folder)
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    flags = dict(single_word=False, lstrip=False, rstrip=False, normalized=False, special=False)
    tokenizer = {
        "version": "1.0", "truncation": None, "padding": None, "normalizer": None, "pre_tokenizer": level,
        "post_processor": None, "decoder": level,
        "added_tokens": [{"id": i, "content": f"<t{i}>", **flags} for i in range(VOCABULARY)],
        "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
                  "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "merges": [],
                  "vocab": {c: VOCABULARY + i for i, c in enumerate(byte_alphabet())}}}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    config = {"add_bos_token": bos is not None, "add_eos_token": False}
    if bos is not None:
        config["bos_token"] = f"<t{bos}>"
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def write_lines(path, texts):
    path.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    return path


def run_eval(*args, code=0, **kw):
    done = strait("eval", *args, **kw)
    assert done.returncode == code, f"{done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


def refused(*args, **kw):
    """Runs an eval that must fail; its error text."""
    done = run_eval(*args, code=1, **kw)
    assert done.stdout == ""
    return done.stderr


def own_ports():
    return ["--http", f"127.0.0.1:{free_port()}", "--grpc", f"127.0.0.1:{free_port()}", "--memory", "512MiB",
            "--workers", 1, "--threads", 1]


@pytest.fixture(scope="module")
def cluster():
    with Cluster(workers=2) as c:
        yield c


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "pages.txt"
    path.write_text("".join(p.read_text() for p in sorted(ROOT.glob("*.md")) + sorted(ROOT.glob("coordinator/*/*.md"))))
    return path


# ---------------------------------------------------------------- the figures are right


@pytest.mark.parametrize("with_bos", [False, True])
def test_perplexity_is_that_of_transformers(tmp_path, with_bos):
    golden = json.loads((GOLDEN / "golden.json").read_text())
    prompts = [p for p in golden["prompts"] if len(p["tokens"]) >= 300]
    assert [len(p["tokens"]) for p in prompts] == [300, 600]
    if with_bos:  # its first token is put there by the tokenizer
        prompts = prompts[1:]
    window, edge = 300, 64
    folder = tmp_path / "golden"
    folder.mkdir()
    write_golden_model(folder, prompts[0]["tokens"][0] if with_bos else None)
    lines = write_lines(tmp_path / "golden.jsonl",
                        [spelled(p["tokens"][1 if with_bos else 0:]) for p in prompts] + [spelled(range(50))])
    path = tmp_path / "report.json"
    run_eval("--model", folder, "--text", lines, "--window", window, "--edges", f"0,{edge},{window}", "--json", path,
             *own_ports())
    target = json.loads(path.read_text())["targets"][0]
    figures = target["text"]
    assert target["special_tokens"] == int(with_bos)
    assert figures["windows"] == len(prompts)  # the short document is left out
    assert figures["tokens"] == len(prompts) * (window - 1)

    def reference(begin, end):
        values = [-v for p in prompts for v in p["logprobs"][begin:end]]
        return math.exp(sum(values) / len(values))

    for got, expected in ((figures["perplexity"]["value"], reference(1, window)),
                          (figures["buckets"][0]["perplexity"]["value"], reference(1, edge)),
                          (figures["buckets"][1]["perplexity"]["value"], reference(edge, window))):
        assert abs(got / expected - 1) < 1e-3
    num_bytes = sum(len(spelled(p["tokens"][1:window])) for p in prompts)
    assert figures["bytes"] == num_bytes
    bits = -sum(sum(p["logprobs"][1:window]) for p in prompts) / math.log(2)
    assert abs(figures["bits_per_byte"]["value"] / (bits / num_bytes) - 1) < 1e-3
    assert (figures["nll"]["low"] is None) == (len(prompts) == 1)


def test_plain_text_is_what_the_api_says(cluster, text, tmp_path):
    path = tmp_path / "report.json"
    done = run_eval("--url", cluster.base_url, "--text", text, "--window", 257, "--max-windows", 3, "--edges", "0,64,257",
                    "--recall", "64,256", "--answers", 40, "--json", path)
    report = json.loads(path.read_text())
    target = report["targets"][0]
    ids = cluster.post("/tokenize", {"prompt": text.read_text(), "add_special_tokens": False}).json()["tokens"]
    bos = cluster.post("/tokenize", {"prompt": "", "add_special_tokens": True}).json()["tokens"]
    assert len(bos) == target["special_tokens"] == 1
    losses = []
    for i in range(3):
        window = bos + ids[i * 256:(i + 1) * 256]
        reply = cluster.complete(prompt=window, max_tokens=0, echo=True, logprobs=0)
        losses.append(-sum(reply["choices"][0]["logprobs"]["token_logprobs"][1:]) / 256)
    assert target["text"]["window_nll"] == pytest.approx(losses, rel=1e-6)
    assert target["text"]["nll"]["low"] < target["text"]["nll"]["value"] < target["text"]["nll"]["high"]
    for recall, distance in zip(target["recall"], (64, 256), strict=True):
        assert recall["distance"] == distance and recall["answers"] >= 40
        assert recall["accuracy"]["value"] == recall["right"] / recall["answers"]
        assert recall["accuracy"]["low"] <= recall["accuracy"]["value"] <= recall["accuracy"]["high"]
    # Every token takes the rows that its layers' blocks have room for.
    config = json.loads((TINY / "config.json").read_text())
    layers = target["cache"]["bytes_per_token_by_layer"]
    assert len(layers) == config["num_hidden_layers"]
    row = 4 * (config["kv_lora_rank"] + config["qk_rope_head_dim"])  # fp32 on CPUs
    assert layers == [-(-row // 16) * 16] * len(layers)
    assert target["rates"]["scored_tokens_per_s"] > 0 and target["rates"]["decode_tokens_per_s"] > 0
    for word in ("perplexity", "64-257", "recall at", "accuracy", "bits per byte", "cache bytes per token"):
        assert word in done.stdout, done.stdout


def test_recall_sees_what_a_model_remembers(text):
    """A server that always repeats what stood `distance` tokens before is right at that distance alone."""
    with Fake(remembers=200) as url:
        done = run_eval("--url", url, "--text", text, "--window", 32, "--max-windows", 1, "--recall", "200,300", "--answers",
                        60, "--json", "-")
    near, far = json.loads(done.stdout)["targets"][0]["recall"]
    assert near["right"] == near["answers"] >= 60
    assert far["right"] == 0


def test_same_server_twice_differs_by_nothing(cluster, text):
    done = run_eval("--url", cluster.base_url, "--url", cluster.base_url, "--text", text, "--window", 64, "--max-windows", 4,
                    "--edges", "0,32,64", "--recall", "32", "--answers", 8, "--json", "-")
    report = json.loads(done.stdout)
    assert len(report["targets"]) == 2
    comparison = report["comparison"]
    assert comparison["same_tokens"] is True and "note" not in comparison
    for estimate in (comparison["nll"], comparison["bits_per_byte"], comparison["recall"][0]["accuracy"],
                     *(b["nll"] for b in comparison["buckets"])):
        assert estimate == {"value": 0, "low": 0, "high": 0}


def test_other_tokenizer_compares_bits_per_byte_alone(cluster, tmp_path, text):
    folder = tmp_path / "golden"
    folder.mkdir()
    write_golden_model(folder, None)
    short = write_lines(tmp_path / "short.jsonl", [spelled(range(i, i + 80)) for i in range(4)])
    done = run_eval("--url", cluster.base_url, "--model", folder, "--text", short, "--window", 64, *own_ports())
    assert "bits per byte" in done.stdout and "tokenize the text differently" in done.stdout
    assert "log-loss all" not in done.stdout


def test_xz_and_own_cluster_leave_nothing_behind(tmp_path, text):
    packed = tmp_path / "pages.jsonl.xz"
    with lzma.open(packed, "wt") as f:
        f.write(json.dumps({"text": text.read_text()}) + "\n")
    ports = own_ports()
    done = run_eval("--model", TINY, "--random-weights", 1, "--text", packed, "--window", 128, "--json", "-", *ports)
    target = json.loads(done.stdout)["targets"][0]
    assert target["text"]["windows"] == 1 and target["name"] == str(TINY)
    left = subprocess.run(["pgrep", "-f", f"{BIN}/strait-(coordinator|worker).*{ports[1]}"], capture_output=True, text=True)
    assert left.stdout == ""


def test_default_window_is_the_context_when_that_is_less(text):
    with Fake(context=500) as url:
        target = json.loads(run_eval("--url", url, "--text", text, "--json", "-").stdout)["targets"][0]
    assert target["window"] == target["max_model_len"] == 500
    assert [(b["begin"], b["end"]) for b in target["text"]["buckets"]] == [(0, 500)]


def test_server_without_status_is_told(text):
    with Fake() as url:
        done = run_eval("--url", url, "--text", text, "--window", 16, "--max-windows", 2)
    assert re.search(r"cache bytes per token: GET /strait/status does not tell", done.stdout)


# ---------------------------------------------------------------- bad input


def test_empty_text(tmp_path):
    empty = tmp_path / "empty.txt"
    empty.write_text("")
    assert f"{empty} is empty" in refused("--text", empty)


def test_text_shorter_than_a_window(cluster, tmp_path):
    short = tmp_path / "short.txt"
    short.write_text("A few words.\n")
    error = refused("--url", cluster.base_url, "--text", short)
    assert re.search(rf"{short} is shorter than a window: it has \d+ tokens, a window 8192", error)
    assert re.search(r"--window \d+ or less", error)
    lines = write_lines(tmp_path / "short.jsonl", ["A few words.", "And some more of them."])
    assert "no document as long as a window" in refused("--url", cluster.base_url, "--text", lines)


def test_malformed_line_has_its_number(tmp_path):
    lines = tmp_path / "bad.jsonl"
    lines.write_text('{"text": "good"}\n{"text": \n')
    assert f"{lines} line 2" in refused("--text", lines)


def test_text_that_is_no_utf8(tmp_path):
    latin = tmp_path / "latin.txt"
    latin.write_bytes("Überfahrt".encode("latin-1"))
    assert f"{latin} is not UTF-8 at byte 0" in refused("--text", latin)


def test_missing_text_and_missing_folder(tmp_path):
    assert str(tmp_path / "absent") in refused("--text", tmp_path / "absent")
    (tmp_path / "x").write_text("x")
    assert "is no folder" in refused("--text", tmp_path / "x", "--model", tmp_path / "absent")
    assert "config.json" in refused("--text", tmp_path / "x", "--model", tmp_path)


def test_flags_out_of_bounds(cluster, text):
    base = ["--url", cluster.base_url, "--text", text]
    assert "--answers 0: must be 1 to" in refused(*base, "--answers", 0)
    assert "--concurrency 0" in refused(*base, "--concurrency", 0)
    assert "--window 3" in refused(*base, "--window", 3)
    assert "edges must rise" in refused(*base, "--edges", "0,9,9")
    assert "beyond the window of 64" in refused(*base, "--window", 64, "--edges", "0,128")
    assert "the context of" in refused(*base, "--window", 10_000_000)
    assert "at most 2 can be compared" in refused(*base, *base[:2], *base[:2])


def test_recall_beyond_the_context_says_the_limit(cluster, text):
    context = cluster.get("/v1/models").json()["data"][0]["max_model_len"]
    error = refused("--url", cluster.base_url, "--text", text, "--window", 64, "--recall", context)
    limit = int(re.search(rf"model's context of {context} tokens: at most (\d+)", error).group(1))
    assert context - 16 < limit < context


def test_model_without_tokenizer(text):
    error = refused("--model", GOLDEN, "--text", text, "--window", 64, *own_ports())
    assert "no tokenizer.json" in error and "a model that has a tokenizer" in error


def test_unreachable_server(text):
    error = refused("--text", text, env={"STRAIT_URL": f"http://127.0.0.1:{free_port()}"})
    assert "strait up --model" in error


def test_grpc_port_is_recognized(cluster, text):
    grpc = re.search(r"workers join at (\S+);", cluster.stdout()).group(1)
    assert "gRPC port" in refused("--text", text, "--url", grpc)


@pytest.mark.parametrize("kind, expected", [
    ("html", "/v1/models"), ("no context", "max_model_len"), ("words for ids", "/tokenize"), ("short", "tokens for a prompt"),
    ("no json", "/v1/completions"), ("failing", "HTTP 500: out of order")])
def test_server_that_answers_garbage(text, kind, expected):
    with Fake(garbage=kind) as url:
        error = refused("--url", url, "--text", text, "--window", 16)
    assert expected in error and url in error, error


def test_server_that_dies_midway(text):
    with Fake(dies_after=5) as url:
        error = refused("--url", url, "--text", text, "--window", 16)
    assert re.search(rf"Perplexity, window \d+ of \d+: {url}", error), error


def test_interrupt_ends_it_at_once(text):
    with listening() as port:
        process = subprocess.Popen([str(BIN / "strait"), "eval", "--url", f"127.0.0.1:{port}", "--text", str(text)],
                                   stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        assert "Asking the server" in process.stderr.readline()
        process.terminate()
        out, error = process.communicate(timeout=30)
    assert process.returncode == 130 and out == "" and "cancelled" in error


# ---------------------------------------------------------------- a server of our own


@contextlib.contextmanager
def Fake(context=1000, remembers=None, garbage=None, dies_after=None):
    """A server whose tokens are bytes and words; gives its URL.

    garbage: what it answers wrongly; dies_after: completions that it answers before it only hangs up; remembers: a
    token is surely the one so many before, all others are unlikely.
    """
    count = [0]

    def token_ids(text):  # words with their space, else bytes
        return [hash_id(part) for part in re.findall(r" [a-z]+|[\s\S]", text)]

    def hash_id(part):
        return ord(part) if len(part) == 1 else 0x200000 + sum((ord(c) - 31) * 89**i for i, c in enumerate(part)) % (1 << 30)

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def log_message(self, *_):
            pass

        def answer(self, body, status=200):
            data = body if isinstance(body, bytes) else json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def do_GET(self):
            if self.path != "/v1/models":
                self.answer({"error": {"message": "no such route"}}, 404)
            elif garbage == "html":
                self.answer(b"<html>It works!</html>")
            else:
                self.answer({"data": [{"id": "fake", **({} if garbage == "no context" else {"max_model_len": context})}]})

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if self.path == "/tokenize":
                self.answer({"tokens": ["a"] if garbage == "words for ids" else token_ids(body["prompt"])})
            elif self.path == "/detokenize":
                self.answer({"prompt": "x" * len(body["tokens"])})
            elif body.get("stream"):
                events = [{"choices": [{"text": "x"}]}] * body["max_tokens"] + [
                    {"choices": [], "usage": {"prompt_tokens": 1, "completion_tokens": body["max_tokens"]}}]
                self.answer(b"".join(b"data: %s\n\n" % e for e in [json.dumps(e).encode() for e in events] + [b"[DONE]"]))
            else:
                self.score(body["prompt"])

        def score(self, ids):
            count[0] += 1
            if dies_after is not None and count[0] > dies_after:
                self.close_connection = True
            elif garbage == "no json":
                self.answer(b"soon")
            elif garbage == "failing":
                self.answer({"error": {"message": "out of order"}}, 500)
            else:
                known = [i >= (remembers or 0) and ids[i] == ids[i - (remembers or 0)] for i in range(len(ids))]
                values = [None] + [-0.1 if k else -5.0 for k in known[1:]]
                tops = [None] + [{"it": -0.1} if k else {"it": -5.0, "other": -0.1} for k in known[1:]]
                if garbage == "short":
                    values.pop()
                self.answer({"choices": [{"logprobs": {"token_logprobs": values, "top_logprobs": tops}}]})

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    server.handle_error = lambda *_: None  # a client that gave up
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
