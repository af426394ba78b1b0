"""The two files side by side: what differs is marked, and little does."""

import ast
import difflib
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
GPT, DIFFUSION = ((ROOT / file).read_text().splitlines() for file in ("gpt.py", "diffusion.py"))
CHANGES = difflib.SequenceMatcher(None, GPT, DIFFUSION, autojunk=False).get_opcodes()


def test_every_hunk_says_in_both_files_which_of_the_five_changes_it_is():
    """The docstrings need not; where one file has no line, the other says it alone."""
    gpt_start, diffusion_start = (
        ast.parse("\n".join(lines)).body[0].end_lineno for lines in (GPT, DIFFUSION)
    )
    for op, i, j, k, n in CHANGES:
        if op == "equal" or n <= diffusion_start:
            continue
        assert re.search(r"\[[1-5]\]", "\n".join(DIFFUSION[k:n])), DIFFUSION[k:n]
        assert j <= gpt_start or i == j or re.search(r"\[[1-5]\]", "\n".join(GPT[i:j])), GPT[i:j]


def test_both_files_have_a_place_for_each_of_the_five_changes():
    for lines in (GPT, DIFFUSION):
        marks = {mark for line in lines for mark in re.findall(r"# \[([1-5])\]", line)}
        assert marks == set("12345")


def test_nothing_is_marked_that_does_not_differ():
    equal = [line for op, i, j, _, _ in CHANGES if op == "equal" for line in GPT[i:j]]
    assert not [line for line in equal if re.search(r"#.*\[[1-5]\]", line)]


def test_most_of_gpt_stands_in_diffusion_and_both_are_short():
    same = sum(j - i for op, i, j, _, _ in CHANGES if op == "equal")
    assert same / len(GPT) >= 0.9
    assert len(GPT) <= 312
    assert len(DIFFUSION) <= 364


def test_importing_does_nothing():
    code = """
import sys, numpy, torch, tqdm, urllib.request, argparse, http.client
before, precision = torch.get_rng_state(), torch.get_float32_matmul_precision()
events = []
sys.addaudithook(lambda event, args: events.append((event, str(args[0]))) if events is not None
                 and event in ("open", "socket.connect", "os.mkdir", "os.rename") else None)
import gpt, diffusion
seen, events = events, None
assert all("gpt." in path or "diffusion." in path for _, path in seen), seen
assert all(path.endswith((".py", ".pyc")) or ".pyc." in path for _, path in seen), seen
assert torch.equal(before, torch.get_rng_state()) and not torch.cuda.is_initialized()
assert precision == torch.get_float32_matmul_precision()
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
