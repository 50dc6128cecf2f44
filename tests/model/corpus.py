#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Makes the reference model's corpus from freely licensed Debian packages.

  corpus.py --out DIR

Downloads the packages below with apt-get (nothing is installed), takes their text and source files, removes
markup and duplicates, and writes DIR/train.jsonl.xz and DIR/heldout.jsonl.xz: one JSON object a line with
"source" (package), "name" and "text". Which documents are held out depends only on a hash of their text, so the
split is the same for the same package versions, and no held-out text is in the training file.
"""
import argparse
import hashlib
import html
import json
import lzma
import os
import pathlib
import re
import subprocess
import sys
import tempfile

# package -> (licence, file name pattern, cap in bytes of text, kind)
SOURCES = {
    "bible-kjv-text": ("public domain", r"", 0, "bible"),
    "anarchism": ("GFDL-1.1+ / GPL-2+", r"\.html$", 14_000_000, "html"),
    "debian-handbook": ("GPL-2+ / CC-BY-SA-3.0", r"/en-US/.*\.html$", 6_000_000, "html"),
    "debian-policy": ("GPL-2+", r"\.html$", 2_000_000, "html"),
    "debian-reference-en": ("GPL-2+", r"\.html$", 3_000_000, "html"),
    "developers-reference": ("GPL-2+", r"developers-reference/.*\.html$", 2_000_000, "html"),
    "perl-doc": ("GPL-1+ / Artistic", r"\.pod$", 10_000_000, "text"),
    "git-doc": ("GPL-2", r"\.txt$", 5_000_000, "text"),
    "postgresql-doc-15": ("PostgreSQL", r"\.html$", 10_000_000, "html"),
    "sqlite3-doc": ("public domain", r"\.html$", 8_000_000, "html"),
    "libpython3.11-stdlib": ("PSF-2", r"\.py$", 12_000_000, "text"),
    "golang-1.19-src": ("BSD-3-Clause", r"/src/.*\.go$", 16_000_000, "text"),
    "rust-src": ("MIT / Apache-2.0", r"/library/(core|alloc|std)/src/.*\.rs$", 12_000_000, "text"),
    "octave-doc": ("GPL-3+", r"\.html$", 4_000_000, "html"),
}
MIN_BYTES = 1_500          # shorter texts teach little
LONG_BYTES = 36_000        # long enough for 8,192 tokens of this tokenizer
HELDOUT_LONG = 64          # long documents held out
HELDOUT_BYTES = 48_000     # a held-out document is cut here: 8,192 tokens and some are all that is scored


def fetch(package: str, into: pathlib.Path) -> pathlib.Path:
    subprocess.run(["apt-get", "download", "-q", package], cwd=into, check=True, stdout=subprocess.DEVNULL)
    deb = next(into.glob(package + "_*.deb"))
    root = into / package
    subprocess.run(["dpkg-deb", "-x", str(deb), str(root)], check=True)
    return root


TAG_BLOCK = re.compile(r"<(script|style|head|nav)\b.*?</\1>", re.S | re.I)
BREAK = re.compile(r"</?(p|div|br|li|tr|h[1-6]|pre|dt|dd|table|ul|ol|section)\b[^>]*>", re.I)
TAG = re.compile(r"<[^>]+>", re.S)


def strip_html(text: str) -> str:
    text = TAG_BLOCK.sub(" ", text)
    text = BREAK.sub("\n", text)
    text = html.unescape(TAG.sub("", text))
    text = re.sub(r"[ \t\u00a0]+", " ", text)
    text = re.sub(r" ?\n ?", "\n", text)
    return re.sub(r"\n{3,}", "\n\n", text)


def read_text(path: pathlib.Path) -> str | None:
    data = path.read_bytes()
    if path.suffix == ".gz":
        import gzip
        data = gzip.decompress(data)
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return None


def bible(root: pathlib.Path):
    """The package holds one compressed text in a format of its own; bible-kjv prints it. Read from the raw
    file when it is plain text, otherwise leave it out."""
    for path in sorted(root.rglob("*")):
        if path.is_file() and path.stat().st_size > 1_000_000:
            try:
                text = path.read_bytes().decode("utf-8")
            except UnicodeDecodeError:
                continue
            yield "bible.txt", text


def documents(package: str, root: pathlib.Path):
    _, pattern, cap, kind = SOURCES[package]
    if kind == "bible":
        yield from bible(root)
        return
    total = 0
    wanted = re.compile(pattern)
    paths = [p for p in sorted(root.rglob("*")) if p.is_file() and not p.is_symlink()
             and wanted.search(re.sub(r"\.gz$", "", str(p)))]
    # Spread the cap over the whole package instead of its first folders.
    paths.sort(key=lambda p: hashlib.sha256(str(p.relative_to(root)).encode()).digest())
    for path in paths:
        text = read_text(path)
        if text is None:
            continue
        if kind == "html":
            text = strip_html(text)
        text = text.replace("\r\n", "\n").strip() + "\n"
        if len(text) < MIN_BYTES:
            continue
        total += len(text)
        if total > cap:
            return
        yield str(path.relative_to(root)), text


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", required=True, type=pathlib.Path)
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    seen, docs = set(), []
    with tempfile.TemporaryDirectory() as tmp:
        os.chmod(tmp, 0o755)
        for package in SOURCES:
            root = fetch(package, pathlib.Path(tmp))
            count = size = 0
            for name, text in documents(package, root):
                # Paragraph-level fingerprints would be better; whole-text ones remove exact copies.
                digest = hashlib.sha256(text.encode()).hexdigest()
                if digest in seen:
                    continue
                seen.add(digest)
                docs.append({"source": package, "name": name, "text": text, "digest": digest})
                count, size = count + 1, size + len(text)
            print(f"{package}: {count} documents, {size / 1e6:.1f} MB", file=sys.stderr)
    long_docs = sorted((d for d in docs if len(d["text"].encode()) >= LONG_BYTES), key=lambda d: d["digest"])
    held = {d["digest"] for d in long_docs[:HELDOUT_LONG]}
    counts = {}
    for name in ("train", "heldout"):
        with lzma.open(out / f"{name}.jsonl.xz", "wt", preset=6) as f:
            for d in docs:
                if (d["digest"] in held) != (name == "heldout"):
                    continue
                text = d["text"]
                if name == "heldout":
                    text = text.encode()[:HELDOUT_BYTES].decode("utf-8", "ignore")
                f.write(json.dumps({"source": d["source"], "name": d["name"], "text": text}, ensure_ascii=False))
                f.write("\n")
                counts[name] = counts.get(name, 0) + 1
    print(counts, file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
