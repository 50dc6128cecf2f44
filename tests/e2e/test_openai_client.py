# SPDX-License-Identifier: Apache-2.0
"""Defends: the official `openai` client works unchanged: completions, chat, streaming, logprobs, n, stop, usage,
and errors as its own exception types."""
import math

import openai
import pytest

from harness import Cluster


@pytest.fixture(scope="module")
def cluster():
    with Cluster(workers=2) as c:
        yield c


@pytest.fixture(scope="module")
def model(cluster):
    return cluster.model_name()


@pytest.fixture(scope="module")
def client(cluster):
    with openai.OpenAI(base_url=cluster.base_url + "/v1", api_key="unused", max_retries=0, timeout=120) as c:
        yield c


def test_models(client):
    models = client.models.list().data
    assert len(models) == 1
    assert models[0].object == "model"


def test_completion_and_usage(client, model):
    r = client.completions.create(model=model, prompt="The strait between", max_tokens=9, temperature=0,
                                  extra_body={"ignore_eos": True})
    assert r.object == "text_completion"
    assert r.choices[0].finish_reason == "length"
    assert r.usage.completion_tokens == 9
    assert r.usage.total_tokens == r.usage.prompt_tokens + 9
    again = client.completions.create(model=model, prompt="The strait between", max_tokens=9, temperature=0,
                                      extra_body={"ignore_eos": True})
    assert again.choices[0].text == r.choices[0].text


def test_prompts_as_ids_and_lists(client, model):
    def text(prompt):
        r = client.completions.create(model=model, prompt=prompt, max_tokens=4, temperature=0)
        return [c.text for c in sorted(r.choices, key=lambda c: c.index)]

    ids = text([5, 6, 7])
    assert len(ids) == 1
    assert text([[5, 6, 7], [9, 10]]) == ids + text([9, 10])
    assert text(["one two", "three"]) == text("one two") + text("three")


def test_seed_makes_sampling_repeatable(client, model):
    def once(seed):
        return client.completions.create(model=model, prompt="A", max_tokens=16, temperature=1, seed=seed,
                                         extra_body={"ignore_eos": True}).choices[0].text

    assert once(5) == once(5)
    assert len({once(s) for s in range(4)}) > 1


def test_n_gives_different_choices(client, model):
    r = client.completions.create(model=model, prompt="A", max_tokens=16, temperature=1, seed=1, n=4,
                                  extra_body={"ignore_eos": True})
    assert sorted(c.index for c in r.choices) == [0, 1, 2, 3]
    assert len({c.text for c in r.choices}) > 1
    assert r.usage.completion_tokens == 64


def test_stream_equals_whole(client, model):
    ask = dict(model=model, prompt="Stream me", max_tokens=24, temperature=1, seed=11,
               extra_body={"ignore_eos": True})
    whole = client.completions.create(**ask)
    pieces, finish, usage = [], None, None
    for chunk in client.completions.create(**ask, stream=True, stream_options={"include_usage": True}):
        if chunk.choices:
            pieces.append(chunk.choices[0].text)
            finish = chunk.choices[0].finish_reason or finish
        else:
            usage = chunk.usage
    assert "".join(pieces) == whole.choices[0].text
    assert finish == "length"
    assert usage.completion_tokens == 24
    assert usage.prompt_tokens == whole.usage.prompt_tokens


def test_echo_and_logprobs(client, model):
    r = client.completions.create(model=model, prompt=[5, 6, 7, 8], max_tokens=3, temperature=0, echo=True,
                                  logprobs=2, extra_body={"ignore_eos": True})
    lp = r.choices[0].logprobs
    assert len(lp.token_logprobs) == len(lp.tokens) == len(lp.top_logprobs) == 7
    assert lp.token_logprobs[0] is None
    assert all(math.isfinite(x) and x <= 0 for x in lp.token_logprobs[1:])
    # Greedy: the chosen token is the likeliest one.
    for value, top in list(zip(lp.token_logprobs, lp.top_logprobs))[4:]:
        assert value == max(top.values())


def test_stop_string_cuts_before_it(client, model):
    ask = dict(model=model, prompt="Find a stop", max_tokens=40, temperature=1, seed=2,
               extra_body={"ignore_eos": True})
    text = client.completions.create(**ask).choices[0].text
    stop = next(text[i:i + 2] for i in range(4, len(text) - 2) if "\ufffd" not in text[i:i + 2])
    r = client.completions.create(**ask, stop=[stop])
    assert r.choices[0].finish_reason == "stop"
    assert r.choices[0].text == text[:text.index(stop)]
    streamed = "".join(c.choices[0].text for c in client.completions.create(**ask, stop=stop, stream=True)
                       if c.choices)
    assert streamed == r.choices[0].text


def test_chat(client, model):
    r = client.chat.completions.create(model=model, messages=[
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "Hello"}]}],
        max_completion_tokens=8, temperature=0, logprobs=True, top_logprobs=3, extra_body={"ignore_eos": True})
    choice = r.choices[0]
    assert choice.message.role == "assistant"
    assert choice.finish_reason == "length"
    assert len(choice.logprobs.content) == 8
    assert all(len(t.top_logprobs) == 3 for t in choice.logprobs.content)
    assert r.usage.completion_tokens == 8


def test_chat_stream(client, model):
    ask = dict(model=model, messages=[{"role": "user", "content": "Hi"}], max_tokens=12, temperature=1, seed=4,
               extra_body={"ignore_eos": True})
    whole = client.chat.completions.create(**ask).choices[0].message.content
    text, roles, finish = "", [], None
    for chunk in client.chat.completions.create(**ask, stream=True):
        if chunk.choices:
            delta = chunk.choices[0].delta
            text += delta.content or ""
            roles += [delta.role] if delta.role else []
            finish = chunk.choices[0].finish_reason or finish
    assert (text, roles, finish) == (whole, ["assistant"], "length")


def test_concurrent_streams_do_not_mix(cluster, model):
    import asyncio

    async def go():
        async with openai.AsyncOpenAI(base_url=cluster.base_url + "/v1", api_key="x", max_retries=0,
                                      timeout=120) as c:
            async def one(i):
                stream = await c.completions.create(model=model, prompt=[i + 3] * (i + 1), max_tokens=12,
                                                    temperature=0, stream=True, extra_body={"ignore_eos": True})
                return "".join([e.choices[0].text async for e in stream if e.choices])

            return await asyncio.gather(*map(one, range(8))), [await one(i) for i in range(8)]

    together, alone = asyncio.run(go())
    assert together == alone


# ---------------------------------------------------------------- errors


def test_unknown_model_is_not_found(client):
    with pytest.raises(openai.NotFoundError) as e:
        client.completions.create(model="no-such-model", prompt="x")
    assert "no-such-model" in str(e.value)


@pytest.mark.parametrize("bad, where", [
    (dict(temperature=9), "temperature"),
    (dict(n=0), "n"),
    (dict(max_tokens=-1), "max_tokens"),
    (dict(prompt=[10_000_000]), "prompt"),
    (dict(prompt=[]), "prompt"),
    (dict(top_p=0), "top_p"),
    (dict(max_tokens=1_000_000), "max_tokens"),
    (dict(logprobs=1000), "logprobs"),
])
def test_bad_parameter_is_a_bad_request_that_names_it(client, model, bad, where):
    with pytest.raises(openai.BadRequestError) as e:
        client.completions.create(**{"model": model, "prompt": "x", **bad})
    assert e.value.param == where, e.value.body
    assert e.value.type == "invalid_request_error"


def test_prompt_beyond_the_context(client, model):
    with pytest.raises(openai.BadRequestError) as e:
        client.completions.create(model=model, prompt=[5] * 20_000)
    assert e.value.code == "context_length_exceeded"
    assert "20000" in str(e.value) and "16384" in str(e.value)


def test_tools_are_refused_not_ignored(client, model):
    with pytest.raises(openai.BadRequestError):
        client.chat.completions.create(model=model, messages=[{"role": "user", "content": "x"}], tools=[
            {"type": "function", "function": {"name": "f", "parameters": {}}}])


def test_api_key_is_enforced_when_set():
    with Cluster(workers=1, args=["--api-key", "sesame"]) as c:
        assert c.ready()  # /health needs no key
        with openai.OpenAI(base_url=c.base_url + "/v1", api_key="wrong", max_retries=0) as wrong:
            with pytest.raises(openai.AuthenticationError):
                wrong.models.list()
        with openai.OpenAI(base_url=c.base_url + "/v1", api_key="sesame", max_retries=0) as right:
            assert right.models.list().data
