#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Style rules that a machine can hold; an ordinary test (ctest -R style).

  style_check.py [ROOT]

Prints each breach as path:line: what, and fails if there is any.
"""
import pathlib
import re
import subprocess
import sys

ROOT = pathlib.Path(sys.argv[1] if len(sys.argv) > 1 else __file__).resolve()
ROOT = ROOT if ROOT.is_dir() else ROOT.parents[1]
PAGE = ".md"
CODE = {".h", ".cc", ".cu", ".cuh", ".py", ".sh", ".proto", ".cmake"}
MAX_LINES = 500
# Longer on purpose, each with its reason.
LONGER = {
    "tests/kernels/cuda/attention/mla_test.cc": "one kernel under test, one fixture that makes its caches",
    "kernels/cuda/attention/mla_hopper.cu": "one kernel: its roles share one layout of shared memory",
    "coordinator/text/jinja_parser.cc": "one grammar, read from top to bottom",
    "coordinator/text/jinja_renderer.cc": "one evaluator, a case for each node",
    "coordinator/http/connection.cc": "one state machine of one connection",
    "tests/coordinator/http/server_test.cc": "one behaviour of the server a test, one fixture",
    "tests/coordinator/core/harness.h": "one stand-in for a cluster: its workers answer each other",
    "tests/worker/transfer/importer_test.cc": "one behaviour of the importer a test, one fixture",
    "tests/golden/generate.py": "a self-contained oracle beside the generator",
}
LABELS = ("Owns", "Borrows", "Thread", "Shapes", "Stream", "Errors", "Limits", "Why")
# Pages that a newcomer reads from end to end.
PAGE_LINES = {"README.md": 120, "ARCHITECTURE.md": 200}
MAX_CELL = 200
# folder -> folders whose headers it may include ("kernels <- worker -> proto <- coordinator").
MAY_INCLUDE = {"proto": {"proto"}, "kernels": {"kernels"}, "worker": {"worker", "kernels", "proto"},
               "coordinator": {"coordinator", "proto"}}
# Beyond that, headers that need only the standard library.
KERNELS_MAY_INCLUDE = {"proto/base/check.h", "proto/latent_block.h"}


def files():
    try:
        listed = subprocess.run(["git", "-C", str(ROOT), "ls-files", "-co", "--exclude-standard"], capture_output=True, text=True,
                                check=True).stdout.split("\n")
        paths = [ROOT / name for name in listed if name]
    except (OSError, subprocess.CalledProcessError):  # an unpacked archive
        paths = [p for p in ROOT.rglob("*") if not {"build", ".venv"} & set(p.relative_to(ROOT).parts)]
    return sorted(p for p in paths if p.is_file() and p.suffix in CODE | {PAGE})


def check(path):
    name = str(path.relative_to(ROOT))
    lines = path.read_text().splitlines()
    if not any("SPDX-License-Identifier: Apache-2.0" in line for line in lines[:2]):
        yield 1, "no SPDX-License-Identifier in the first two lines"
    if len(lines) > MAX_LINES and name not in LONGER:
        yield len(lines), f"more than {MAX_LINES} lines: split it, or name the reason in tests/style_check.py"
    folder = name.split("/")[0]
    for number, line in enumerate(lines, 1):
        if line.rstrip() != line:
            yield number, "white space at the end of the line"
        include = re.match(r'\s*#\s*include\s*["<]((\w+)/[^">]*)[">]', line)
        if include and path.suffix in (".h", ".cc", ".cu", ".cuh"):
            allowed = MAY_INCLUDE.get(folder)
            if allowed and include[2] in MAY_INCLUDE and include[2] not in allowed:
                if not (folder == "kernels" and include[1] in KERNELS_MAY_INCLUDE):
                    yield number, f"{folder} may not include {include[1]}"
        if path.suffix in (".h", ".cc"):
            swallowed = re.match(r"//.*\S (%s):  " % "|".join(LABELS), line)
            if swallowed:
                yield number, f"the label {swallowed[1]}: must begin its line"
            if re.search(r"\babsl::(Mutex|CondVar)\b", line) and not line.lstrip().startswith("//"):
                yield number, "absl::Mutex is not instrumented for ThreadSanitizer: use std::mutex"
    if path.suffix == ".h" and "#pragma once" not in lines:
        yield 1, "no #pragma once"


def prose(path):
    """A page's lines with their numbers, without what stands between fences."""
    fenced = False
    for number, line in enumerate(path.read_text().splitlines(), 1):
        if line.lstrip().startswith("```"):
            fenced = not fenced
        elif not fenced:
            yield number, line


def anchors(path):
    """The names by which a page's headings can be linked to, as GitHub makes them."""
    found = set()
    for _, line in prose(path):
        heading = re.match(r"#+ (.*)", line)
        if heading:
            text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading[1]).strip().lower()
            base = name = re.sub(r"[^\w\- ]", "", text).replace(" ", "-")
            again = 0
            while name in found:
                again += 1
                name = f"{base}-{again}"
            found.add(name)
    return found


def check_page(path):
    name = str(path.relative_to(ROOT))
    lines = path.read_text().count("\n")
    if lines >= PAGE_LINES.get(name, lines + 1):
        yield lines, f"not under {PAGE_LINES[name]} lines: move detail to the page beside the code"
    for number, line in prose(path):
        for cell in re.split(r"(?<!\\)\|", line)[1:-1] if line.startswith("|") else ():
            if len(cell.strip()) > MAX_CELL:
                yield number, f"a table cell of {len(cell.strip())} characters: at most {MAX_CELL}"
        for target in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"`[^`]*`", "", line)):
            if re.match(r"[a-z]+:", target):
                continue
            file, _, anchor = target.partition("#")
            linked = (path.parent / file).resolve() if file else path
            if not linked.exists():
                yield number, f"a link to {file}, which is not there"
            elif anchor and linked.suffix == PAGE and anchor not in anchors(linked):
                yield number, f"a link to a heading that {linked.name} does not have: #{anchor}"


def main():
    count = breaches = 0
    for path in files():
        count += 1
        for number, what in (check_page if path.suffix == PAGE else check)(path):
            print(f"{path.relative_to(ROOT)}:{number}: {what}")
            breaches += 1
    print(f"{count} files, {breaches} breaches")
    return 1 if breaches or not count else 0


if __name__ == "__main__":
    sys.exit(main())
