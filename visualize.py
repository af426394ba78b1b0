"""Replays in the terminal how diffusion.py writes, and gpt.py beside it: a frame is a forward pass.

It calls no model. It records the texts that their generate() yields, and the time of each, then
plays them. Four states: prompt (bold), hidden (shaded), just written (reversed), written (plain).
"""

import argparse
import math
import os
import re
import signal
import sys
import time
import unicodedata
from bisect import bisect
from collections import namedtuple
from contextlib import contextmanager
from itertools import chain, groupby

import torch
from tqdm import tqdm

import diffusion
import gpt

# One pass: its text, the seconds until then, the number and span of its block, a second look or not
Frame = namedtuple("Frame", "text seconds block start end anew")


# ---- recording ---------------------------------------------------------------------------------
def known(text):
    return len(text) - text.count("_")


def record(frames, texts, total, name):
    """Appends a Frame for each of texts to frames, whose first one holds the prompt. A pass that
    writes behind a block begins the next, at the first hole: a GPT's is the end of its text."""
    begin, block, start, end = time.perf_counter(), 0, 0, 0
    length = known(frames[0].text) + total
    with tqdm(total=total, desc=name, unit=" characters", leave=False, disable=None) as bar:
        for text in texts:
            before = frames[-1].text
            if text[end:] != before[end:]:
                block, start = block + 1, f"{before}_".index("_")
                given = start <= len(frames[0].text)
                in_view = diffusion.block_size // 2 if given else diffusion.context
                end = max(0, min(start - in_view, length - diffusion.block_size))
                end += diffusion.block_size
            anew = len(before) >= min(end, length) and "_" not in before[start:end]
            frames.append(Frame(text, time.perf_counter() - begin, block, start, end, anew))
            bar.update(known(text) - known(before))


# ---- one frame ---------------------------------------------------------------------------------
def look():
    """The glyphs and styles, without what the encoding lacks and what NO_COLOR forbids."""
    replaced = b"?" in "░│━─".encode(sys.stdout.encoding, "replace")
    prompt, new = ("1", "7") if os.environ.get("NO_COLOR") else ("1;35", "7;32")
    styles = {"prompt": prompt, "hidden": "2", "new": new, "written": ""}
    return "_|=-" if replaced else "░│━─", styles


def figures(frames, i):
    """What can be counted at frame i; each figure has the same width in all frames."""
    passes, blocks = min(i, len(frames) - 1), frames[-1].block
    frame = frames[passes]
    written, total = (known(f.text) - known(frames[0].text) for f in (frame, frames[-1]))
    phase = ", second look" if frame.anew else ""
    status = f"block {frame.block:{len(str(blocks))}} of {blocks}{phase:13}"
    return [
        status if i == passes else f"{'done':{len(status)}}",
        f"{passes:{len(str(total))}} passes",
        f"{written:{len(str(total))}} chars",
        f"{written / max(passes, 1):5.2f} per pass",
        f"{frame.seconds:4.1f} s",
    ]


def layout(text, width):
    """The span of each row, with the newline or the space it ends at: they can be hidden too."""
    wide = any(unicodedata.east_asian_width(c) in "WF" for c in set(text))  # two cells each
    n = max(1, width // 2 if wide else width)
    rows = re.finditer(rf".{{,{n - 1}}}(?:\s|\Z)|.{{{n}}}", text)
    return [row.span() for row in rows if row[0]]


def pane(name, frames, i, width, height):
    """Frame i of one model, in at most height rows: the figures, then the text around its block."""
    done = i >= len(frames)
    frame, before = (frames[-1], frames[-1]) if done else (frames[i], frames[i - 1])
    text, prompt, final = frame.text, frames[0].text, frames[-1].text
    before = before.text.ljust(len(text), "_")
    (mask, margin, full, rest), styles = look()
    cells = [mask if c == "_" else c if c.isprintable() else " " for c in text]
    states = [
        "hidden" if now == "_" else "prompt" if given != "_" else "new" if now != was else "written"
        for now, given, was in zip(text, prompt.ljust(len(text), "_"), before, strict=True)
    ]

    parts = [name, *figures(frames, i)]
    lines = ["  ".join(parts[:2]), "  ".join(parts[2:])]
    rows = lines if max(map(len, lines)) <= width else [part[:width] for part in parts]
    rows = [rows[0].replace(name, f"\x1b[1m{name}\x1b[m"), *rows[1:]][: max(1, height // 2)]
    if height > 9:
        share = width * (known(text) - known(prompt)) // (known(final) - known(prompt))
        rows.append(f"{full * share}\x1b[2m{rest * (width - share)}\x1b[m")

    spans, space = layout(final, width - 2), height - len(rows) - (height > 9)
    ends, hole = [end for _, end in spans[:-1]], f"{before}_".index("_")
    # The block's end stays in view; where that would push out the first hole, the hole does.
    top = max(0, min(bisect(ends, frame.end - 1) - space + 1, bisect(ends, hole)))
    for start, end in spans[top : top + space]:
        active = start < min(len(text), frame.end) and frame.start < end and not done
        row = f"\x1b[2m{margin}\x1b[m " if active else "  "
        for state, run in groupby(range(start, min(end, len(text))), states.__getitem__):
            row += f"\x1b[{styles[state]}m{''.join(cells[j] for j in run)}\x1b[m"
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


@contextmanager
def stage():
    """The alternate screen without a cursor, left again however the block ends."""
    try:
        print("\x1b[?1049h\x1b[?25l", end="", flush=True)
        yield
    finally:
        print("\x1b[?2026l\x1b[m\x1b[?25h\x1b[?1049l", end="", flush=True)


# ---- command line ------------------------------------------------------------------------------
def main(argv=None):
    """Records, replays, prints the texts; bad input ends with one line and exit code 2."""
    parser = argparse.ArgumentParser("visualize.py", "%(prog)s [options]", __doc__.splitlines()[0])
    add = parser.add_argument
    add("--compare", action="store_true", help="show gpt.py beside diffusion.py")
    add("--blocks", default=5, type=int, metavar="N", help="blocks to write (5)")
    add("--fps", default=20, type=int, metavar="N", help="forward passes per second (20)")
    add("--prompt", metavar="TEXT", help="the text to start from; diffusion fills its holes, '_'")
    add("--temp", default=0.8, type=float, metavar="T", help="temperature, 0 = greedy (0.8)")
    add("--seed", default=1337, type=int, metavar="N", help="random seed (1337)")
    args = parser.parse_args(argv)
    for key, least in dict(blocks=1, fps=1, temp=0, seed=0).items():
        if not least <= vars(args)[key] < 2**31:
            parser.error(f"--{key} takes a number from {least} up, below 2**31")
    if os.name == "nt":
        os.system("")  # from now on a Windows console takes escape sequences
    sys.stdout.reconfigure(encoding="utf-8" if os.name == "nt" else None, errors="replace")
    length = args.blocks * (diffusion.block_size - diffusion.context)
    modules = (diffusion, gpt) if args.compare else (diffusion,)
    takes, i = {}, math.inf  # the frames of each model, and the one shown: the last, if none is
    handler = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so each finally runs
    try:
        models = [module.load(module.weights_path) for module in modules]
        prompt = models[0].prompt if args.prompt is None else args.prompt
        if args.compare and (not prompt or "_" in prompt):
            raise ValueError("GPT reads no '_' and no empty prompt: change it or drop --compare")
        for model in models:
            model.tokenizer.encode(prompt)
        for module, model in zip(modules, models, strict=True):
            frames = takes[module.name] = [Frame(prompt, 0.0, 0, 0, 0, False)]
            torch.manual_seed(args.seed)
            texts = module.generate(model, prompt, length, args.temp)
            record(frames, texts, length + prompt.count("_"), module.name)
        if sys.stdout.isatty() and os.environ.get("TERM") != "dumb":
            with stage():
                for i in range(1, max(map(len, takes.values())) + 1):
                    show(takes, i)
                    time.sleep(1 / args.fps)
                time.sleep(1)  # to look at the end
    except ValueError as error:
        parser.exit(2, f"visualize.py: {error}\n")
    except KeyboardInterrupt:
        sys.exit(130)
    finally:
        for name, frames in takes.items():
            print(f"\n{name}\n" * args.compare, end="", file=sys.stderr)
            print(frames[min(i, len(frames) - 1)].text, flush=True)
        for name, frames in takes.items():
            print(f"{name:9}  {'  '.join(figures(frames, i)[1:])}", file=sys.stderr)
        signal.signal(signal.SIGTERM, handler)


if __name__ == "__main__":
    if hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` ends the program quietly
    main()
