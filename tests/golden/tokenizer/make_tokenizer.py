#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Makes this folder's files: a small tokenizer in DeepSeek-V3's form, and what it must answer.

    python3 -m venv /tmp/venv && /tmp/venv/bin/pip install tokenizers jinja2
    /tmp/venv/bin/python make_tokenizer.py

Writes tokenizer.json, tokenizer_config.json, hard_strings.json (ids and texts by Hugging Face `tokenizers`)
and chat_cases.json (prompts by jinja2, set up as transformers does). The tokenizer is trained on LICENSE and
on the text below; the same versions give the same files.
"""

import copy
import json
import pathlib

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

import chat_cases
import corpus
import hard_strings

HERE = pathlib.Path(__file__).resolve().parent
VOCAB_SIZE = 640
BOS, EOS, PAD = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>"

# The pre-tokenizer of DeepSeek-V3's file: digits by threes, runs of Han and kana, then the rest.
V3_SPLITS = [
    r"\p{N}{1,3}",
    "[一-龥\u3040-ゟ゠-ヿ]+",
    "[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+|[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+"
    "| ?[\\p{P}\\p{S}]+[\r\n]*|\\s*[\r\n]+|\\s+(?!\\S)|\\s+",
]
# The older sequence has more and simpler splits, and digits one by one. The character ranges here are a
# part of those in DeepSeek-V2's file: the constructs are the same.
V2_SPLITS = [
    "[\r\n]",
    "\\s?[A-Za-zµÀ-ÖØ-öø-ƺΆΈ-ΊΌΎ-ΡΣ-ϵА-ҁҊ-ԯԱ-Ֆა-ჺḀ-ἕﬀ-ﬆＡ-Ｚａ-ｚ𐐀-𐑏𞤀-𞥃]+",
    "\\s?[!-/:-~！-／：-～‘-‟\u3000-。]+",
    "\\s+$",
    "[一-龥ࠀ-一가-\ud7ff]+",
]


def flags(token, **given):
    base = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": True, "special": False}
    return {"content": token, **base, **given}


# Like DeepSeek's: control tokens special, roles and tools not. The last ones are for tests of the flags.
FIRST = [flags(t, special=True, normalized=False) for t in (BOS, EOS, PAD)]
LAST = [
    flags("<｜User｜>"), flags("<｜Assistant｜>"), flags("<think>"), flags("</think>"),
    flags("<｜tool▁calls▁begin｜>"), flags("<｜tool▁calls▁end｜>"),
    flags("<｜tool▁call▁begin｜>"), flags("<｜tool▁call▁end｜>"),
    flags("<｜tool▁outputs▁begin｜>"), flags("<｜tool▁outputs▁end｜>"),
    flags("<｜tool▁output▁begin｜>"), flags("<｜tool▁output▁end｜>"), flags("<｜tool▁sep｜>"),
    flags("<|EOT|>", special=True), flags("<｜place▁holder▁no▁0｜>", special=True, normalized=False),
    flags("<|left|>", special=True, normalized=False, lstrip=True),
    flags("<|right|>", normalized=False, rstrip=True),
    flags("<|both|>", lstrip=True, rstrip=True),
    flags("strait", single_word=True),
    flags("<｜", normalized=False), flags("<｜<｜"), flags("õü"), flags("  \n"),
]


def split(pattern, behavior="Isolated", invert=False, kind="Regex"):
    return {"type": "Split", "pattern": {kind: pattern}, "behavior": behavior, "invert": invert}


def byte_level(add_prefix_space=False, use_regex=False):
    return {"type": "ByteLevel", "add_prefix_space": add_prefix_space, "trim_offsets": True, "use_regex": use_regex}


def sequence(*steps):
    return {"type": "Sequence", "pretokenizers": list(steps)}


def train():
    base = Tokenizer(models.BPE())
    spec = {"version": "1.0", "pre_tokenizer": sequence(*map(split, V3_SPLITS), byte_level())}
    whole = json.loads(base.to_str())
    whole["pre_tokenizer"] = spec["pre_tokenizer"]
    base = Tokenizer.from_str(json.dumps(whole))
    base.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE - len(LAST), special_tokens=[BOS, EOS, PAD], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), max_token_length=16)
    texts = [(HERE.parents[2] / "LICENSE").read_text(encoding="utf-8")] + corpus.TEXTS
    base.train_from_iterator(texts, trainer)
    trained = json.loads(base.to_str())

    ids = trained["model"]["vocab"]
    assert len(ids) == VOCAB_SIZE - len(LAST), len(ids)
    added = [{"id": i, **f} for i, f in enumerate(FIRST)]
    added += [{"id": len(ids) + i, **f} for i, f in enumerate(LAST)]
    return {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": added,
        "normalizer": {"type": "Sequence", "normalizers": []},
        "pre_tokenizer": spec["pre_tokenizer"],
        "post_processor": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False, "use_regex": True},
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
            "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False,
            "vocab": dict(sorted(ids.items(), key=lambda item: item[1])),
            "merges": [m if isinstance(m, str) else " ".join(m) for m in trained["model"]["merges"]],
        },
    }


def variants(tokenizer):
    """Other files of the same format, as patches: (name, JSON pointer to new value), which strings."""
    merges = [m.split(" ") for m in tokenizer["model"]["merges"]]
    template = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": BOS, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}},
                   {"SpecialToken": {"id": EOS, "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {BOS: {"id": BOS, "ids": [0], "tokens": [BOS]}, EOS: {"id": EOS, "ids": [1], "tokens": [EOS]}},
    }
    # Three bytes lose their token; the ids stay without a gap, which Hugging Face would close.
    holes = {"hole" + str(i) if t in ("Ã", "a", "Ċ") else t: i for t, i in tokenizer["model"]["vocab"].items()}
    yield "v2", {"pre_tokenizer": sequence(*map(split, V2_SPLITS), {"type": "Digits", "individual_digits": True}, byte_level())}
    yield "gpt2", {"pre_tokenizer": byte_level(use_regex=True), "normalizer": None}
    yield "prefix_space", {"pre_tokenizer": byte_level(add_prefix_space=True, use_regex=True)}
    yield "digits_grouped", {"pre_tokenizer": sequence({"type": "Digits", "individual_digits": False}, byte_level(use_regex=True))}
    yield "caseless", {"pre_tokenizer": sequence(split("(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}{1,3}| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+"), byte_level())}
    yield "word_class", {"pre_tokenizer": sequence(split("\\w+|\\d|\\S"), byte_level())}
    for behavior in ("Removed", "MergedWithPrevious", "MergedWithNext", "Contiguous"):
        yield "split_" + behavior, {"pre_tokenizer": sequence(split("[\\p{P}\\p{S}]", behavior), byte_level())}
    for behavior in ("Removed", "Isolated", "MergedWithPrevious", "MergedWithNext", "Contiguous"):
        yield "invert_" + behavior, {"pre_tokenizer": sequence(split("\\p{L}+", behavior, invert=True), byte_level())}
    yield "literal", {"pre_tokenizer": sequence(split(".", "MergedWithPrevious", kind="String"), split("a ", kind="String"), byte_level())}
    yield "lookbehind", {"pre_tokenizer": sequence(split("(?<=[a-z])(?=[A-Z])|(?<!\\s)\\p{Lu}"), byte_level())}
    yield "no_split", {"pre_tokenizer": byte_level()}
    yield "template", {"post_processor": template}
    yield "template_sequence", {"post_processor": {"type": "Sequence", "processors": [byte_level(), template]}}
    yield "pairs", {"model": {"merges": merges}}
    yield "ignore_merges", {"model": {"ignore_merges": True, "merges": tokenizer["model"]["merges"][:40]}}
    yield "missing_bytes", {"model": {"vocab": holes, "merges": []}}
    for flag in ("lstrip", "rstrip", "single_word", "normalized"):
        patched = copy.deepcopy(tokenizer["added_tokens"])
        for token in patched:
            token[flag] = not token[flag]
        yield "flip_" + flag, {"added_tokens": patched}


def patch(tokenizer, changes):
    """`model` is merged one level deep, every other member is replaced."""
    patched = copy.deepcopy(tokenizer)
    for key, value in changes.items():
        if key == "model":
            patched["model"].update(value)
        else:
            patched[key] = value
    return patched


def run_lengths(ids):
    """[id, times, id, times, …]: a thousand equal ids in two numbers."""
    out = []
    for i in ids:
        if out and out[-2] == i:
            out[-1] += 1
        else:
            out += [i, 1]
    return out


def compact_ids(ids):
    runs = run_lengths(ids)
    return {"ids": ids} if len(ids) <= len(runs) else {"runs": runs}


def cases(spec, strings):
    reference = Tokenizer.from_str(json.dumps(spec))
    out = []
    for entry in strings:
        text = hard_strings.expand(entry)
        ids = reference.encode(text, add_special_tokens=True).ids
        case = {"text": entry, **compact_ids(ids)}
        decoded = reference.decode(ids, skip_special_tokens=False)
        plain = reference.decode(ids, skip_special_tokens=True)
        if decoded != text:
            case["decoded"] = decoded
        if plain != decoded:
            case["plain"] = plain
        out.append(case)
    return out


def dump_lines(name, groups):
    """One case a line: small, and readable in a diff."""
    lines = []
    for group in groups:
        head = {k: v for k, v in group.items() if k != "cases"}
        body = ",\n".join(json.dumps(c, ensure_ascii=True, separators=(",", ":")) for c in group["cases"])
        lines.append(json.dumps(head, ensure_ascii=True, separators=(",", ":"))[:-1] + (", " if head else "") + '"cases": [\n' + body + "\n]}")
    (HERE / name).write_text("[\n" + ",\n".join(lines) + "\n]\n", encoding="utf-8")


def main():
    tokenizer = train()
    (HERE / "tokenizer.json").write_text(json.dumps(tokenizer, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    config = {
        "add_bos_token": True, "add_eos_token": False,
        "bos_token": {"__type": "AddedToken", **{k: v for k, v in FIRST[0].items() if k != "special"}},
        "clean_up_tokenization_spaces": False, "eos_token": {"__type": "AddedToken", **{k: v for k, v in FIRST[1].items() if k != "special"}},
        "legacy": True, "model_max_length": 4096, "pad_token": EOS, "unk_token": None,
        "tokenizer_class": "LlamaTokenizerFast", "chat_template": chat_cases.TEMPLATE,
    }
    (HERE / "tokenizer_config.json").write_text(json.dumps(config, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")

    tokens = [t["content"] for t in tokenizer["added_tokens"]]
    strings = hard_strings.all_strings(tokens)
    assert len(strings) >= 250 and len(json.dumps(strings)) < 100_000
    everything = strings + hard_strings.fuzz(1, 300, tokens) + hard_strings.wild(2, 60)
    groups = [{"name": "v3", "patch": {}, "cases": cases(tokenizer, everything)}]
    # The variants repeat a part, by its place in the list above.
    short = [i for i, s in enumerate(everything) if isinstance(s, str) and len(s) < 40]
    for number, (name, changes) in enumerate(variants(tokenizer)):
        # One string in eight, each variant its own; the random mixtures are where they differ most.
        chosen = short[number % 8 :: 8]
        answers = cases(patch(tokenizer, changes), [everything[i] for i in chosen])
        for i, answer in zip(chosen, answers):
            answer["text"] = i
        groups.append({"name": name, "patch": changes, "cases": answers})
    dump_lines("hard_strings.json", groups)
    dump_lines("chat_cases.json", chat_cases.groups(config))
    print(f"{sum(len(g['cases']) for g in groups)} strings, {len(tokenizer['model']['vocab'])} + {len(LAST)} tokens")


if __name__ == "__main__":
    main()
