"""Replays in the terminal how diffusion.py writes, and gpt.py beside it: a frame is a forward pass.

First it records the texts that generate() yields and the time of each, then it plays them. A
character is given (bold), hidden (shaded), new in this pass (reversed) or written earlier (plain).
Where there is room, diffusion's window is shown too, as a table to the left of the text.
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
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path

import torch
from tqdm import tqdm

import diffusion
import gpt

# After a pass: text[:final] will not change any more; written does not count the prompt
Frame = namedtuple("Frame", "text final written passes seconds")


# ---- recording ---------------------------------------------------------------------------------
def record(takes, args):
    """Fills takes with the frames of each model, by its name: the prompt, then one for each pass.
    ValueError, before any text is written: the weights or the prompt cannot be read."""
    length = args.blocks * (diffusion.block_size - diffusion.context)
    model = diffusion.load(args.diffusion)
    prompt = model.prompt if args.prompt is None else args.prompt
    model.tokenizer.encode(prompt)
    texts = {"diffusion": diffusion.generate(model, prompt, length, args.temp, args.looks)}
    if args.compare:
        if not prompt or "_" in prompt:
            raise ValueError("GPT reads no '_' and no empty prompt: change it or drop --compare")
        model = gpt.load(args.gpt)
        model.tokenizer.encode(prompt)
        texts["gpt"] = gpt.generate(model, prompt, length, args.temp)
    for name in texts:
        torch.manual_seed(args.seed)
        frames = [Frame(prompt, 0, 0, 0, 0.0)]
        takes[name] = frames
        began = time.perf_counter()
        for text, final in tqdm(texts[name], name, unit=" passes", leave=False, disable=None):
            written = len(text) - text.count("_") - len(prompt) + prompt.count("_")
            frames.append(Frame(text, final, written, len(frames), time.perf_counter() - began))
        frames.append(frames[-1])  # a replay ends with a frame in which nothing is new


# ---- what a pass does --------------------------------------------------------------------------
def window_start(frames, i):
    """Where diffusion's window starts in pass i, by the same rule as in its generate()."""
    final, given = frames[i].final, len(frames[0].text)
    return max(0, final - (diffusion.context if final > given else diffusion.block_size // 2))


def new_places(frames, i):
    """The places that pass i writes."""
    if i == len(frames) - 1:
        return []
    second_look = frames[i].written == frames[i - 1].written
    finals = [frame.final for frame in frames]
    first = finals.index(finals[i], 1) if second_look else i  # the first pass of the block
    after = frames[i].text
    before = frames[first - 1].text.ljust(len(after), "_")
    filled = [j for j in range(len(after)) if before[j] == "_" != after[j]]
    if not second_look:
        return filled
    # These are all places of the block. A second look writes one column of them, in turn as in
    # generate(). The texts do not tell which: it may write the same character again.
    start = window_start(frames, i)
    column_of = {j: (j - start) % diffusion.columns for j in filled}
    columns = sorted(set(column_of.values()))
    column = columns[(i - first) % len(columns)]
    return [j for j in filled if column_of[j] == column]


def states(frames, i):
    """The state of each character after pass i."""
    state_of = ["hidden" if c == "_" else "written" for c in frames[i].text]
    for j in new_places(frames, i):
        state_of[j] = "new"
    for j, c in enumerate(frames[0].text):
        if c != "_":
            state_of[j] = "given"
    return state_of


# ---- one frame ---------------------------------------------------------------------------------
def styled(text, state):
    """The text in the style of its state. Without colour too, no two states look alike."""
    given, new = ("1", "7") if os.environ.get("NO_COLOR") else ("1;35", "7;32")
    style = {"given": given, "hidden": "2", "new": new, "written": ""}[state]
    return f"\x1b[{style}m{text}\x1b[m"


def is_wide(c):
    return unicodedata.east_asian_width(c) in "WF"  # it takes two cells


def status(frames, i):
    """Which block pass i writes, and whether it is a second look."""
    if i == len(frames) - 1:
        return "done"
    if frames[i].final == len(frames[i].text):
        return ""  # a GPT, which writes no blocks: all of its text is final
    finals = [frame.final for frame in frames[1:]]  # one value per block
    block = f"block {len(set(finals[:i]))} of {len(set(finals))}"
    second_look = frames[i].written == frames[i - 1].written
    return f"{block}, second look" if second_look else block


def figures(frames, i):
    """Passes, characters and seconds so far. The width stays the same, so that nothing jumps."""
    _, _, written, passes, seconds = frames[i]
    digits = len(str(frames[-1].written))
    counts = f"{passes:{digits}} passes  {written:{digits}} chars"
    return f"{counts}  {written / max(passes, 1):5.2f} per pass  {seconds:4.1f} s"


def header(name, frames, i, width):
    """Three rows: the title, the figures, a progress bar."""
    title = f"{name}  {status(frames, i)}"[:width]
    done = width * frames[i].written // frames[-1].written
    bar = "━" * done + "─" * (width - done)
    return [f"\x1b[1m{title}\x1b[m", figures(frames, i)[:width], bar]


def table_rows(frames, i, state_of):
    """The window in pass i, 32 lines of 8 characters in two stacks side by side, and a legend."""
    symbol_of = {"_": "░", "\n": "↵", " ": "·"}
    start, n = window_start(frames, i), diffusion.columns
    cells = ["  "] * diffusion.block_size  # the text may end before the window does
    for j, c in enumerate(frames[i].text[start : start + diffusion.block_size]):
        state = "given" if start + j < frames[i].final else state_of[start + j]
        symbol = symbol_of.get(c, c if c.isprintable() else "·")
        cells[j] = styled(symbol, state) + ("" if is_wide(symbol) else " ")
    rows, half = [], diffusion.block_size // 2
    for j in range(0, half, n):
        rows.append("".join([*cells[j : j + n], "   ", *cells[half + j : half + j + n]]))
    legend = "  ".join(styled(state, state) for state in ("given", "new", "written"))
    return [*rows, "", legend, "░ hidden  ↵ newline  · space"]


def layout(text, width):
    """The span of each row, with the space or newline at its end: that can be a hole too."""
    n = max(1, width // 2 if any(map(is_wide, set(text))) else width)
    # A row ends at a space, a newline or the end of the text; a longer word is cut.
    rows = re.finditer(rf".{{,{n - 1}}}(?:\s|\Z)|.{{{n}}}", text)
    return [row.span() for row in rows if row[0]]


def text_rows(frames, i, state_of, width, height):
    """At most height rows of the text, around the block of pass i, with a line on its left."""
    text, final, *_ = frames[i]
    cells = ["░" if c == "_" else c if c.isprintable() else " " for c in text]
    spans = layout(frames[-1].text, width - 2)  # of the finished text, so that nothing moves
    row_ends = [row_end for _, row_end in spans]
    # The block starts where the final text ends. A GPT has none: its newest character is marked.
    first = bisect(row_ends, min(final, len(text) - 1))
    last = bisect(row_ends, min(window_start(frames, i) + diffusion.block_size, len(text)) - 1)
    top = max(0, min(first, last + 1 - height))  # a block that does not fit is cut at its end
    rows = []
    for n, (row_start, row_end) in enumerate(spans[top : top + height], top):
        in_block = first <= n <= last and i < len(frames) - 1
        row = "\x1b[2m│\x1b[m " if in_block else "  "
        for state, run in groupby(range(row_start, min(row_end, len(text))), state_of.__getitem__):
            row += styled("".join(cells[j] for j in run), state)
        rows.append(row)
    return rows


def at(x, y, rows):
    return "".join(f"\x1b[{y + n};{x}H{row}" for n, row in enumerate(rows))


def pane(name, frames, i, x, y, width, height):
    """Frame i of one model: the header and the text, to its left the table if it fits."""
    rows = header(name, frames, i, width)[: max(1, height // 2)]
    drawn = at(x, y, rows)
    y, height = y + len(rows), height - len(rows)
    state_of = states(frames, i)
    if name == "diffusion" and width >= 80 and height >= 20:
        drawn += at(x, y, table_rows(frames, i, state_of)[:height])
        taken = 4 * diffusion.columns + 5  # two cells per character, two stacks, the gaps
        x, width = x + taken, width - taken
    return drawn + at(x, y, text_rows(frames, i, state_of, width, height))


def show(takes, i):
    """Draws frame i of all takes. Synchronized output (DEC 2026) keeps it from flickering."""
    columns, lines = (n or 40 for n in os.get_terminal_size(sys.stdout.fileno()))  # 0: unknown
    stacked = len(takes) == 2 and columns < 100
    width = columns if stacked else (columns + 3) // len(takes) - 3
    height = lines // 2 if stacked else lines
    drawn, x, y = "\x1b[H\x1b[J", 1, 1
    for name, frames in takes.items():
        drawn += pane(name, frames, min(i, len(frames) - 1), x, y, width, height)
        x, y = (x, y + height) if stacked else (x + columns - width, y)
    symbols = "░│━─↵·"
    if b"?" in symbols.encode(sys.stdout.encoding, "replace"):
        drawn = drawn.translate(str.maketrans(symbols, "_|=-/~"))
    print(f"\x1b[?2026h{drawn}\x1b[?2026l", end="", flush=True)


# ---- replay ------------------------------------------------------------------------------------
@contextmanager
def alternate_screen():
    """Switches to the terminal's alternate screen and hides the cursor. Undoes both at the end, on
    an error, on SIGTERM, and while the program is suspended."""
    enter, leave = "\x1b[?1049h\x1b[?25l", "\x1b[?2026l\x1b[m\x1b[?25h\x1b[?1049l"

    def suspend(number, _):
        os.write(sys.stdout.fileno(), leave.encode())  # not print: one may be interrupted
        signal.signal(number, signal.SIG_DFL)
        signal.raise_signal(number)  # the program stops here until `fg`
        signal.signal(number, suspend)
        os.write(sys.stdout.fileno(), enter.encode())

    handlers = {signal.SIGTERM: lambda *_: sys.exit(143)}  # so that finally runs
    if hasattr(signal, "SIGTSTP"):  # Ctrl-Z; Windows has none
        handlers[signal.SIGTSTP] = suspend
    if os.name == "nt":
        os.system("")  # makes a Windows console read escape sequences
    previous = {number: signal.signal(number, handlers[number]) for number in handlers}
    try:
        print(enter, end="")
        yield
    finally:
        for number in previous:
            signal.signal(number, previous[number])
        print(leave, end="", flush=True)


def replay(takes, fps):
    with alternate_screen():
        for i in range(1, max(map(len, takes.values()))):
            show(takes, i)
            time.sleep(1 / fps)
        time.sleep(1)  # to look at the end


# ---- command line ------------------------------------------------------------------------------
def main(argv=None):
    """Records, replays, prints the texts. Bad input ends with one line and exit code 2."""
    about = "Replays in the terminal how diffusion.py writes: a frame is a forward pass."
    parser = argparse.ArgumentParser("visualize.py", "%(prog)s [options]", about)
    add = parser.add_argument
    add("--compare", action="store_true", help="show gpt.py beside diffusion.py")
    add("--blocks", type=int, default=5, help="blocks of 240 characters to write (%(default)s)")
    add("--fps", type=float, help="forward passes per second (5, with --compare 20)")
    add("--prompt", help="the text to start from; diffusion fills its holes, '_'")
    add("--temp", type=float, default=1.0, help="temperature, 0 is greedy (%(default)s)")
    add("--looks", type=int, default=1, help="second looks at each block (%(default)s)")
    add("--seed", type=int, default=1337, help="random seed (%(default)s)")
    add("--diffusion", type=Path, default=diffusion.weights_path, help="weights of your own")
    add("--gpt", type=Path, default=gpt.weights_path, help="weights of your own")
    args = parser.parse_args(argv)
    if args.fps is None:
        args.fps = 20 if args.compare else 5  # a GPT needs many passes
    # The text of each pass is kept in memory: more blocks and looks would take gigabytes.
    limits = dict(blocks=(1, 100), fps=(0.1, 1000), temp=(0, 10**7), looks=(0, 20), seed=(0, 10**7))
    for key, (least, most) in limits.items():
        if not least <= vars(args)[key] <= most:
            parser.error(f"--{key} takes a number from {least} to {most}")

    takes = {}
    try:
        record(takes, args)
        if sys.stdout and sys.stdout.isatty() and os.environ.get("TERM") != "dumb":
            replay(takes, args.fps)
    except ValueError as error:
        parser.exit(2, f"visualize.py: {error}\n")
    except KeyboardInterrupt:
        parser.exit(130)
    finally:
        for name, frames in takes.items():
            print(f"\n{name}  {figures(frames, -1)}", file=sys.stderr)
            print(frames[-1].text, flush=True)


if __name__ == "__main__":
    if hasattr(sys.stdout, "reconfigure"):  # missing in a notebook, or when closed
        sys.stdout.reconfigure(errors="replace")  # print ? for what the console lacks
        if hasattr(signal, "SIGPIPE"):  # Windows has none
            signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` ends the program quietly
    main()
