"""Replays in the terminal how diffusion.py writes, and gpt.py beside it: a frame is a forward pass.

It calls no model. It records the texts that their generate() yields, and the time of each, then
plays them. Four states: prompt (bold), hidden (shaded), just written (reversed), written (plain).
"""

import argparse
import os
import re
import signal
import sys
import time
import unicodedata
from bisect import bisect
from collections import namedtuple
from itertools import chain, groupby

import torch
from tqdm import tqdm

import diffusion
import gpt

# One pass: the text, how much of it is final, characters and seconds since the prompt
Frame = namedtuple("Frame", "text final written seconds")


# ---- recording ---------------------------------------------------------------------------------
def record(frames, texts, total, name):
    """Appends a Frame for each pass to frames, whose first one holds the prompt."""
    begin, prompt = time.perf_counter(), frames[0].text
    with tqdm(total=total, desc=name, unit=" characters", leave=False, disable=None) as bar:
        for text, final in texts:
            written = len(text) - text.count("_") - len(prompt) + prompt.count("_")
            bar.update(written - frames[-1].written)
            frames.append(Frame(text, final, written, time.perf_counter() - begin))


# ---- one frame ---------------------------------------------------------------------------------
def palette():
    """Glyphs: hidden, margin, bar, rest of the bar. Styles, which differ without colour too."""
    lacking = b"?" in "░│━─".encode(sys.stdout.encoding, "replace")
    prompt, new = ("1", "7") if os.environ.get("NO_COLOR") else ("1;35", "7;32")
    styles = {"prompt": prompt, "hidden": "2", "new": new, "written": ""}
    return "_|=-" if lacking else "░│━─", styles


def state(now, given, before):
    """Of a character: what it is, what the prompt had there and what the pass before."""
    if now == "_":
        return "hidden"
    if given != "_":
        return "prompt"
    return "written" if now == before else "new"


def status(frames, i):
    """What pass i does. A GPT writes no blocks: all of its text is final."""
    if i >= len(frames):
        return "done"
    if frames[i].final == len(frames[i].text):
        return ""
    finals = [frame.final for frame in frames[1:]]  # each block has its own
    block = f"block {len(set(finals[:i]))} of {len(set(finals))}"
    return block + ", second look" * (frames[i].written == frames[i - 1].written)


def figures(frames, i):
    """What can be counted after pass i; each figure has the same width in all frames."""
    passes = min(i, len(frames) - 1)
    frame, digits = frames[passes], len(str(frames[-1].written))
    return [
        f"{passes:{digits}} passes",
        f"{frame.written:{digits}} chars",
        f"{frame.written / max(passes, 1):5.2f} per pass",
        f"{frame.seconds:4.1f} s",
    ]


def header(name, frames, i, width):
    """The rows above the text; the last is a bar, as long as the share that is written."""
    parts, (_, _, bar, rest) = figures(frames, i), palette()[0]
    rows = [f"{name}  {status(frames, i)}", "  ".join(parts)]
    if len(rows[1]) > width:
        rows[1:] = "  ".join(parts[:2]), "  ".join(parts[2:])
    done = width * frames[min(i, len(frames) - 1)].written // frames[-1].written
    top, *others = (row[:width] for row in rows)
    return [f"\x1b[1m{top}\x1b[m", *others, bar * done + rest * (width - done)]


def layout(text, width):
    """The span of each row, with the newline or the space it ends at: they can be hidden too."""
    wide = any(unicodedata.east_asian_width(c) in "WF" for c in set(text))  # two cells each
    n = max(1, width // 2 if wide else width)
    rows = re.finditer(rf".{{,{n - 1}}}(?:\s|\Z)|.{{{n}}}", text)
    return [row.span() for row in rows if row[0]]


def pane(name, frames, i, width, height):
    """Frame i of one model, in at most height rows: the header, then the text around its block."""
    frame, before = (frames[min(n, len(frames) - 1)] for n in (i, i - 1))
    text, end = frame.text, len(frame.text)
    given, old = (other.text.ljust(end, "_") for other in (frames[0], before))
    states = [*map(state, text, given, old)]
    (hidden, margin, _, _), styles = palette()
    cells = [hidden if c == "_" else c if c.isprintable() else " " for c in text]

    rows = header(name, frames, i, width)[: max(1, height // 2)]
    spans, space = layout(frames[-1].text, width - 2), height - len(rows)
    row_ends = [row_end for _, row_end in spans]
    # The block is what is not final; of a GPT's text the newest character.
    first, last = bisect(row_ends, min(frame.final, end - 1)), bisect(row_ends, end - 1)
    top = max(0, min(first, last + 1 - space))  # if the block is too high, its end is left out
    for n, (row_start, row_end) in enumerate(spans[top : top + space], top):
        row = f"\x1b[2m{margin}\x1b[m " if first <= n <= last and i < len(frames) else "  "
        for kind, run in groupby(range(row_start, min(row_end, end)), states.__getitem__):
            row += f"\x1b[{styles[kind]}m{''.join(cells[j] for j in run)}\x1b[m"
        rows.append(row)
    return rows + [""] * (height - len(rows))


def show(takes, i):
    """Draws frame i of all takes at once: a terminal that knows DEC 2026 shows no half of it."""
    columns, lines = (n or 40 for n in os.get_terminal_size(sys.stdout.fileno()))  # 0: unknown
    beside = columns >= 100 or len(takes) == 1
    width = (columns + 3) // len(takes) - 3 if beside else columns
    height = lines if beside else lines // len(takes)
    panes = [pane(name, frames, i, width, height) for name, frames in takes.items()]
    right = f"\x1b[{columns - width + 1}G"  # to the first column of the pane on the right
    rows = [*map(right.join, zip(*panes, strict=True))] if beside else [*chain(*panes), ""]
    rows = "".join(f"\x1b[{y}H\x1b[K{row}" for y, row in enumerate(rows[:lines], 1))
    print(f"\x1b[?2026h{rows}\x1b[?2026l", end="", flush=True)


# ---- command line ------------------------------------------------------------------------------
def main(argv=None):
    """Records, replays, prints the texts; bad input ends with one line and exit code 2."""
    parser = argparse.ArgumentParser("visualize.py", "%(prog)s [options]", __doc__.splitlines()[0])
    add = parser.add_argument
    add("--compare", action="store_true", help="show gpt.py beside diffusion.py")
    add("--blocks", default=5, type=int, metavar="N", help="blocks of 240 characters to write (5)")
    add("--fps", default=20, type=int, metavar="N", help="forward passes per second (20)")
    add("--prompt", metavar="TEXT", help="the text to start from; diffusion fills its holes, '_'")
    add("--temp", default=0.7, type=float, metavar="T", help="temperature, 0 = greedy (0.7)")
    add("--seed", default=1337, type=int, metavar="N", help="random seed (1337)")
    args = parser.parse_args(argv)
    # A replay keeps the text of each pass: many more blocks would take gigabytes.
    limits = dict(blocks=(1, 100), fps=(1, 1000), temp=(0, 10**7), seed=(0, 10**7))
    for key, (least, most) in limits.items():
        if not least <= vars(args)[key] <= most:
            parser.error(f"--{key} takes a number from {least} to {most}")
    if os.name == "nt":
        os.system("")  # from now on a Windows console takes escape sequences
    sys.stdout.reconfigure(encoding="utf-8" if os.name == "nt" else None, errors="replace")
    length = args.blocks * (diffusion.block_size - diffusion.context)
    modules = (diffusion, gpt) if args.compare else (diffusion,)
    takes, i = {}, sys.maxsize  # the frames of each model, and the one shown: the last, if none is
    handler = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so each finally runs
    try:
        models = [module.load(module.weights_path) for module in modules]
        prompt = models[0].prompt if args.prompt is None else args.prompt
        if args.compare and (not prompt or "_" in prompt):
            raise ValueError("GPT reads no '_' and no empty prompt: change it or drop --compare")
        for model in models:
            model.tokenizer.encode(prompt)
        for module, model in zip(modules, models, strict=True):
            frames = takes[module.name] = [Frame(prompt, 0, 0, 0.0)]
            torch.manual_seed(args.seed)
            texts = module.generate(model, prompt, length, args.temp)
            record(frames, texts, length + prompt.count("_"), module.name)
        if sys.stdout.isatty() and os.environ.get("TERM") != "dumb":
            try:
                print("\x1b[?1049h\x1b[?25l", end="")  # the alternate screen, without a cursor
                for i in range(1, max(map(len, takes.values())) + 1):
                    show(takes, i)
                    time.sleep(1 / args.fps)
                time.sleep(1)  # to look at the end
            finally:
                print("\x1b[?2026l\x1b[m\x1b[?25h\x1b[?1049l", end="", flush=True)
    except ValueError as error:
        parser.exit(2, f"visualize.py: {error}\n")
    except KeyboardInterrupt:
        sys.exit(130)
    finally:
        for name, frames in takes.items():
            print(f"\n{name}  {'  '.join(figures(frames, i))}", file=sys.stderr)
            print(frames[min(i, len(frames) - 1)].text, flush=True)
        signal.signal(signal.SIGTERM, handler)


if __name__ == "__main__":
    if hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` ends the program quietly
    main()
