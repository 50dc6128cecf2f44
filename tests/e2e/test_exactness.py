# SPDX-License-Identifier: Apache-2.0
"""The API gives the numbers of Hugging Face's own implementation.

For every golden checkpoint (tests/golden, made by generate.py with transformers in fp32) and 1, 2 and 3 stages, and
for the trained reference model with prompts of up to 8,192 tokens (tests/model/reference.py): each prompt token's
log-probability is within 1e-3 of the reference, and a greedy token, given the reference's tokens before it, equals the
reference's wherever its two best tokens are further apart than 2e-3.
"""
import json

import pytest
from harness import ROOT, Cluster

GOLDEN = ROOT / "tests/golden"
SHAPES = ["v3-yarn", "v3-odd", "v2-lite", "v2", "v3-fp8"]
LOGPROB_TOLERANCE = 1e-3
GREEDY_GAP = 2e-3
LONG = 600  # tokens; prompts beyond take too long to be prefilled again for each token behind them


@pytest.fixture(scope="module", params=[(s, n) for s in SHAPES for n in (1, 2, 3)] + [("reference", 2)],
                ids=lambda p: f"{p[0]}-{p[1]}")
def served(request):
    shape, stages = request.param
    golden = json.loads((GOLDEN / shape / "golden.json").read_text())
    model = ROOT / "deploy/models/reference" if shape == "reference" else GOLDEN / shape
    with Cluster(model, workers=stages, random_weights=None, memory="256MiB") as cluster:
        assert sorted((s["layer_begin"], s["layer_end"]) for w in cluster.status()["workers"] for s in w["stages"])[0][0] == 0
        assert sum(len(w["stages"]) for w in cluster.status()["workers"]) == stages
        yield cluster, shape, golden


def test_golden_files_are_the_reference_of_the_issue():
    for shape in SHAPES:
        golden = json.loads((GOLDEN / shape / "golden.json").read_text())
        assert golden["reference"].startswith("transformers 5."), shape
        assert golden["reference_error_max"] < LOGPROB_TOLERANCE / 10, shape
        lengths = sorted(len(p["tokens"]) for p in golden["prompts"])
        assert lengths[0] == 1 and lengths[-1] == 600, shape
        size = sum(f.stat().st_size for f in (GOLDEN / shape).iterdir())
        assert size < 1_500_000, f"{shape}: {size} bytes"


def test_every_prompt_token(served):
    cluster, shape, golden = served
    worst, count = 0.0, 0
    for prompt in golden["prompts"]:
        tokens, expected, greedy = prompt["tokens"], prompt["logprobs"], prompt["greedy"]
        if len(tokens) > LONG:  # the continuation is scored with it: one pass instead of one a token
            tokens, expected = tokens + greedy["tokens"], expected + greedy["logprobs"]
        reply = cluster.complete(model=shape, prompt=tokens, max_tokens=0, echo=True, logprobs=1)
        logprobs = reply["choices"][0]["logprobs"]
        got = logprobs["token_logprobs"]
        assert len(got) == len(tokens) and got[0] is None
        for position in range(len(prompt["tokens"]), len(tokens)):
            if greedy["gap"][position - len(prompt["tokens"])] > GREEDY_GAP:
                best = max(logprobs["top_logprobs"][position].values())
                assert got[position] == best, f"position {position}: the greedy token is not the likeliest"
        for position, (a, b) in enumerate(zip(got[1:], expected[1:]), 1):
            assert abs(a - b) <= LOGPROB_TOLERANCE, f"{len(got)} tokens, position {position}: {a}, reference {b}"
            worst, count = max(worst, abs(a - b)), count + 1
    print(f"{shape}: {count} log-probabilities, largest difference {worst:.2e}")
    assert count > 1000


def test_greedy_teacher_forced(served):
    cluster, shape, golden = served
    compared = 0
    for prompt in golden["prompts"]:
        greedy = prompt["greedy"]
        if len(prompt["tokens"]) > LONG:
            continue  # scored in test_every_prompt_token
        prefixes = [prompt["tokens"] + greedy["tokens"][:i] for i in range(len(greedy["tokens"]))]
        reply = cluster.complete(model=shape, prompt=prefixes, max_tokens=1, temperature=0, logprobs=0, ignore_eos=True,
                                 return_token_ids=True)
        choices = sorted(reply["choices"], key=lambda c: c["index"])
        assert len(choices) == len(prefixes)
        for i, choice in enumerate(choices):
            if greedy["gap"][i] <= GREEDY_GAP:
                continue
            compared += 1
            assert choice["token_ids"] == [greedy["tokens"][i]], f"prompt of {len(prompt['tokens'])}, token {i}"
            assert abs(choice["logprobs"]["token_logprobs"][0] - greedy["logprobs"][i]) <= LOGPROB_TOLERANCE
    assert compared > (60 if shape == "reference" else 150)
