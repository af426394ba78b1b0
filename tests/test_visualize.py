"""visualize.py, run as a user runs it: the real script in a pseudo-terminal, its models toys.

What generate() yields is logged beside the replay, and pyte, a terminal emulator, says what the
screen shows: the tests compare the two.
"""

import ast
import json
import os
import re
import select
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pyte
import pytest
import torch
from conftest import checkpoint

import diffusion
import gpt
import visualize

ROOT = Path(__file__).resolve().parents[1]
CHARS, PROMPT = "\n abcdefgH,.", "abc Hed\n"
TOY = {"block_size": 32, "n_layer": 1, "n_head": 2, "n_embd": 16}
CONTEXT = 8
BLOCK = TOY["block_size"] - CONTEXT
needs_terminal = pytest.mark.skipif(sys.platform == "win32", reason="Windows has no pty module")


# ---- toys --------------------------------------------------------------------------------------
def shrink(monkeypatch, folder):
    """Sets both modules to toy size, for this process, with their weights in folder."""
    for module in (diffusion, gpt):
        for name, value in TOY.items():
            monkeypatch.setattr(module, name, value)
        monkeypatch.setattr(module, "weights_path", folder / f"{module.name}.pt")
    monkeypatch.setattr(diffusion, "context", CONTEXT)


@pytest.fixture(scope="module")
def toys(tmp_path_factory):
    """A folder with the weights of two small random models."""
    folder = tmp_path_factory.mktemp("toys")
    with pytest.MonkeyPatch.context() as monkeypatch, torch.random.fork_rng():
        shrink(monkeypatch, folder)
        torch.manual_seed(0)
        for module in (diffusion, gpt):
            checkpoint(module.Model(module.CharTokenizer(CHARS), PROMPT), module.weights_path)
    return folder


@pytest.fixture
def toy_modules(toys, monkeypatch):
    shrink(monkeypatch, toys)
    return toys


# ---- running the script ------------------------------------------------------------------------
# Runs the script itself, its __main__ too, with toys for models whose texts are logged.
RUNNER = """
import json, os, runpy, sys
sys.path.insert(0, {root!r})
import torch, diffusion, gpt
torch.set_num_threads(1)

def logged(generate, path):
    def texts(*args, **kwargs):
        for text in generate(*args, **kwargs):
            with open(path, "a") as log:
                log.write(json.dumps(text) + chr(10))
            yield text
    return texts

for module in (diffusion, gpt):
    for name, value in {toy!r}.items():
        setattr(module, name, value)
    module.weights_path = os.path.join({toys!r}, module.name + ".pt")
    module.generate = logged(module.generate, module.name + ".log")
diffusion.context = {context}
{extra}
sys.argv[0] = {script!r}
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def command(toys, folder, extra=""):
    """The command that runs visualize.py with toys, logging in folder what they generate."""
    script = str(ROOT / "visualize.py")
    names = {"root": str(ROOT), "toy": TOY, "toys": str(toys), "context": CONTEXT}
    (folder / "run.py").write_text(RUNNER.format(**names, script=script, extra=extra))
    return [sys.executable, "run.py"]


def environment(**changes):
    plain = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "COLUMNS", "LINES")}
    plain |= {"TERM": "xterm-256color", "PYTHONUTF8": "1", "OMP_NUM_THREADS": "1"}
    return plain | changes


def set_size(terminal, columns, lines):
    import fcntl
    import struct
    import termios

    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))


def logs(folder):
    found = {m.name: folder / f"{m.name}.log" for m in (diffusion, gpt)}
    return {
        name: [json.loads(line) for line in path.read_text().splitlines()]
        for name, path in found.items()
        if path.exists()
    }


def play(toys, folder, *args, size=(80, 24), extra="", at=None, **env):
    """Runs the script in a terminal of a size until it ends; at = {frames: what to do then}.

    Returns what the terminal got, the exit code and the texts that were generated.
    """
    import pty

    terminal, inside = pty.openpty()
    set_size(terminal, *size)
    process = subprocess.Popen(
        [*command(toys, folder, extra), *args],
        cwd=folder,
        env=environment(**env),
        stdin=inside,
        stdout=inside,
        stderr=inside,
    )
    os.close(inside)
    output, todo, deadline = b"", dict(at or {}), time.monotonic() + 120
    try:
        while select.select([terminal], [], [], max(0, deadline - time.monotonic()))[0]:
            try:
                chunk = os.read(terminal, 65536)
            except OSError:  # Linux: nobody has the other end open any more
                chunk = b""
            if not chunk:
                break
            output += chunk
            for frames in [n for n in todo if n <= output.count(b"\x1b[?2026l")]:
                todo.pop(frames)(SimpleNamespace(terminal=terminal, process=process))
        code = process.wait(max(1, deadline - time.monotonic()))
    finally:
        process.kill()
        process.wait()
        os.close(terminal)
    assert not todo, f"the run ended early: {output[-2000:]}"
    encoding = env.get("PYTHONIOENCODING", "utf-8")
    return SimpleNamespace(output=output.decode(encoding), code=code, texts=logs(folder))


# ---- reading the screen ------------------------------------------------------------------------
def frames_in(output):
    return re.findall(r"\x1b\[\?2026h(.*?)\x1b\[\?2026l", output, re.S)


def screens(output, columns, lines, room=60):
    """The terminal's rows of cells after each frame, on a screen with room beyond the size."""
    screen = pyte.Screen(columns + room, lines + room)
    stream = pyte.Stream(screen)
    for frame in frames_in(output):
        stream.feed(frame)
        rows = [[screen.buffer[y][x] for x in range(columns + room)] for y in range(lines + room)]
        yield rows


def fits(rows, columns, lines):
    """Whether nothing is drawn beyond columns and lines."""
    used = [(x, y) for y, row in enumerate(rows) for x, cell in enumerate(row) if cell.data != " "]
    used += [(x, y) for y, row in enumerate(rows) for x, cell in enumerate(row) if cell.reverse]
    return all(x < columns and y < lines for x, y in used)


def string(cells):
    return "".join(cell.data for cell in cells)


def halves(rows, columns):
    """The panes of a screen with two of them side by side: rows of cells each."""
    right = next(x for x in range(1, columns) if string(rows[0][x : x + 5]) == "gpt  ")
    return [row[:right] for row in rows], [row[right:] for row in rows]


HEADER = 3  # rows: name and block, figures, progress


def content(pane):
    """The cells of a pane's text: what is right of the margin, below the header."""
    return [row[2:] for row in pane[HEADER:]]


def is_second_look(before, text):
    """Whether a pass of diffusion found no hole, and left no more text than there was."""
    return len(before) == len(text) and "_" not in before


def inked(text):
    return "".join(text.split()).replace("_", "░")


def left_for_good(run):
    """What stands on the normal screen behind the replay, if the terminal was given back as found.

    Fails unless the alternate screen and the hidden cursor were entered and left once, in order,
    and nothing but frames was drawn between.
    """
    modes = re.findall(r"\x1b\[\?(?:1049|25)[hl]", run.output)
    assert modes == ["\x1b[?1049h", "\x1b[?25l", "\x1b[?25h", "\x1b[?1049l"]
    replay, _, rest = run.output.partition("\x1b[?1049h\x1b[?25l")[2].partition("\x1b[?1049l")
    between = re.sub(r"\x1b\[\?2026h.*?\x1b\[\?2026l", "", replay, flags=re.S)
    assert between.replace("\x1b[?2026l", "") == "\x1b[m\x1b[?25h"
    assert "\x1b" not in rest
    return rest.replace("\r\n", "\n")


# ---- a replay of both, from the first frame to the last ----------------------------------------
@pytest.fixture(scope="module")
def compared(toys, tmp_path_factory):
    folder = tmp_path_factory.mktemp("compared")
    args = ("--compare", "--blocks", "2", "--fps", "1000", "--seed", "5")
    return play(toys, folder, *args, size=(120, 50))


@needs_terminal
def test_a_replay_gives_the_terminal_back_and_leaves_both_texts(compared):
    rest = left_for_good(compared)
    ours, theirs = compared.texts["diffusion"], compared.texts["gpt"]
    assert compared.code == 0
    assert rest.startswith(f"\ndiffusion\n{ours[-1]}\n\ngpt\n{theirs[-1]}\n")
    summary = rest.splitlines()[-2:]
    for line, name, texts in zip(summary, ("diffusion", "gpt"), (ours, theirs), strict=True):
        facts = (name, len(texts), 2 * BLOCK, 2 * BLOCK / len(texts))
        pattern = r"{} +{} passes +{} chars +{:.2f} per pass +\d+\.\d s".format(*facts)
        assert re.fullmatch(pattern, line)


@needs_terminal
def test_each_frame_is_one_pass_of_each_and_shows_its_text(compared):
    every = list(screens(compared.output, 120, 50))
    assert len(every) == max(map(len, compared.texts.values())) + 1  # the last: both are done
    for i, rows in enumerate(every):
        assert fits(rows, 120, 50)
        for pane, texts in zip(halves(rows, 120), compared.texts.values(), strict=True):
            shown = inked("".join(map(string, content(pane))))
            assert shown == inked(texts[min(i, len(texts) - 1)])


@needs_terminal
def test_each_header_counts_passes_and_characters_and_says_when_its_model_is_done(compared):
    seconds, looks = dict.fromkeys(compared.texts, 0.0), dict.fromkeys(compared.texts, 0)
    for i, rows in enumerate(screens(compared.output, 120, 50), 1):
        panes = zip(halves(rows, 120), compared.texts.items(), strict=True)
        for pane, (name, texts) in panes:
            head = " ".join(map(string, pane[:2]))
            passes = min(i, len(texts))
            text = texts[passes - 1]
            chars = len(text) - text.count("_") - len(PROMPT)
            assert f" {passes} passes " in head
            assert f" {chars} chars " in head
            assert f" {chars / passes:.2f} per pass " in head
            block = 2 if len(text) > len(PROMPT) + BLOCK else 1
            status = f"{name}  block {block} of 2" if i <= len(texts) else f"{name}  done "
            look = i > 1 and len(texts[i - 2 : i]) == 2 and is_second_look(*texts[i - 2 : i])
            assert head.startswith(status) and (", second look " in head) is look
            looks[name] += look
            before, seconds[name] = seconds[name], float(re.search(r"(\d+\.\d) s", head)[1])
            assert seconds[name] >= before
    assert looks == {"diffusion": 2 * 8, "gpt": 0}


@needs_terminal
def test_four_states_differ_without_colour(compared):
    for i, rows in enumerate(screens(compared.output, 120, 50)):
        for pane, texts in zip(halves(rows, 120), compared.texts.values(), strict=True):
            cells = [cell for row in content(pane) for cell in row]
            text = texts[min(i, len(texts) - 1)]
            before = text if i >= len(texts) else [PROMPT, *texts][i]
            before = before.ljust(len(text), "_")
            new = [now for now, was in zip(text, before, strict=True) if now != was and now != "_"]
            reverse = [cell.data for cell in cells if cell.reverse]
            assert sorted(reverse) == sorted("".join(new).replace("\n", " "))
            assert sum(cell.bold for cell in cells) == len(PROMPT)
            assert not any(cell.bold or cell.reverse for cell in cells if cell.data == "░")


@needs_terminal
def test_nothing_moves_but_by_scrolling(compared):
    """The rows are those of the final text from the first frame on: the screen holds all of it.
    What a second look changes stays in its cell, which is blank where it was a newline."""
    *every, _ = screens(compared.output, 120, 50)
    for half, texts in enumerate(compared.texts.values()):
        width = len(halves(every[0], 120)[0][0]) - 3  # what show() leaves between the two
        spans = visualize.layout(texts[-1], width - 2)
        for i, rows in enumerate(every):
            text = texts[min(i, len(texts) - 1)].replace("\n", " ").replace("_", "░")
            for (start, end), row in zip(spans, content(halves(rows, 120)[half]), strict=False):
                assert string(row).rstrip() == text[start:end].rstrip()


@needs_terminal
def test_the_margin_marks_the_active_block(compared):
    """It begins on the row where the block's first character is, and ends when all is done."""
    *every, last = screens(compared.output, 120, 50)
    assert not any(row[0].data == "│" for half in halves(last, 120) for row in half)
    for i, rows in enumerate(every):
        pane = halves(rows, 120)[0]
        for text in compared.texts["diffusion"][i : i + 1]:
            start = len(PROMPT) + (BLOCK if len(text) > len(PROMPT) + BLOCK else 0)
            marked = [row[2:] for row in pane[HEADER:] if row[0].data == "│"]
            active = inked("".join(map(string, marked)))
            assert active.endswith(inked(text[start:]))
            shared = len(active) - len(inked(text[start:]))  # in the row where the block begins
            assert shared <= len(inked(string(marked[0])))


# ---- one model, other terminals ----------------------------------------------------------------
@needs_terminal
def test_holes_are_filled_and_a_resize_is_followed_without_colour(toys, tmp_path):
    prompt = "_ab_\n__cHe_d_"
    run = play(
        *(toys, tmp_path, "--prompt", prompt, "--blocks", "2", "--fps", "30"),
        size=(90, 30),
        at={3: lambda process: set_size(process.terminal, 30, 12)},
        NO_COLOR="1",
    )
    rest, texts = left_for_good(run), run.texts["diffusion"]
    assert run.code == 0
    assert rest.startswith(texts[-1] + "\n")
    assert len(texts[-1]) == len(prompt) + 2 * BLOCK
    codes = {c for codes in re.findall(r"\x1b\[([\d;]*)m", run.output) for c in codes.split(";")}
    assert codes <= {"", "1", "2", "7"}  # no colour, but bold, dim and reverse
    *_, first, last = ([frames_in(run.output)[i]] for i in (0, -1))
    assert max(int(y) for y in re.findall(r"\x1b\[(\d+)H", first[0])) == 30
    assert max(int(y) for y in re.findall(r"\x1b\[(\d+)H", last[0])) == 12
    assert fits(next(screens(f"\x1b[?2026h{last[0]}\x1b[?2026l", 30, 12)), 30, 12)
    cells = [c for row in content(next(screens(run.output, 90, 30))) for c in row]
    assert "".join(c.data for c in cells if c.bold) == "".join(prompt.split("_")).replace("\n", " ")


@needs_terminal
@pytest.mark.parametrize(
    ("stop", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), ("error", 1)]
)
def test_a_replay_that_is_stopped_gives_the_terminal_back(toys, tmp_path, stop, code):
    """The text so far, as in the last frame, stays; ASCII is drawn where the encoding is ASCII."""
    if stop == "error":
        fail = "import time\nnaps = iter([None] * 2)\ntime.sleep = lambda seconds: next(naps)"
        run = play(toys, tmp_path, size=(20, 5), extra=fail, PYTHONIOENCODING="ascii")
        assert "StopIteration" in run.output
    else:
        run = play(
            *(toys, tmp_path, "--compare", "--fps", "2"),
            size=(20, 5),
            at={2: lambda run: run.process.send_signal(stop)},
            PYTHONIOENCODING="ascii",
        )
        assert "Traceback" not in run.output
    rest, n = left_for_good(run), len(frames_in(run.output))
    assert run.code == code
    assert run.output.isascii()
    assert "_" in "".join(frames_in(run.output))  # the mask; no text holds one
    for rows in screens(run.output, 20, 5):
        assert fits(rows, 20, 5)
    # A signal can find the next frame due and not yet drawn.
    ends = [[f"{texts[i]}\n" in rest for texts in run.texts.values()] for i in (n - 1, n)]
    assert all(ends[0]) or all(ends[1])


@needs_terminal
def test_an_error_in_the_generator_leaves_the_terminal_and_the_text_so_far(toys, tmp_path):
    fail = """
fine = diffusion.generate
def failing(*args):
    yield from __import__("itertools").islice(fine(*args), 3)
    raise RuntimeError("the generator fails")
diffusion.generate = failing
"""
    run = play(toys, tmp_path, extra=fail)
    assert run.code == 1
    assert "\x1b[?" not in run.output.replace("\x1b[?25h", "")
    assert "RuntimeError: the generator fails" in run.output
    assert f"{run.texts['diffusion'][-1]}\n" in run.output.replace("\r\n", "\n")
    assert len(run.texts["diffusion"]) == 3


@needs_terminal
def test_a_dumb_terminal_gets_the_text_alone(toys, tmp_path):
    run = play(toys, tmp_path, "--fps", "1", TERM="dumb")
    assert run.code == 0
    assert "\x1b" not in run.output
    assert f"{run.texts['diffusion'][-1]}\n" in run.output.replace("\r\n", "\n")


def test_a_pipe_gets_the_texts_alone(toys, tmp_path):
    run = subprocess.run(
        [*command(toys, tmp_path), "--compare", "--fps", "1", "--temp", "0"],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        encoding="utf-8",
        timeout=120,
    )
    texts = logs(tmp_path)
    assert run.returncode == 0
    assert run.stdout == f"{texts['diffusion'][-1]}\n{texts['gpt'][-1]}\n"
    assert "\x1b" not in run.stderr
    assert [line.split()[:1] for line in run.stderr.splitlines()[-2:]] == [["diffusion"], ["gpt"]]


# ---- in this process: sizes, layout, blocks, bad input -----------------------------------------
def take(*texts):
    """The frames of a recording of texts; the first is the prompt."""
    frames = [visualize.Frame(texts[0], 0.0, 0, 0, 0, False)]
    total = len(texts[-1]) - visualize.known(texts[0])
    visualize.record(frames, iter(texts[1:]), total, "toy")
    return frames


def show(takes, i, size, monkeypatch):
    """visualize.show in a terminal of a size, which pytest, that asks for one too, does not see."""
    with monkeypatch.context() as patch:
        patch.setattr(visualize.os, "get_terminal_size", lambda fd: size)
        visualize.show(takes, i)


def shown(takes, i, columns, lines, monkeypatch, capfd):
    """The screen's rows of cells that visualize.show draws at a size."""
    show(takes, i, (columns, lines), monkeypatch)
    output = capfd.readouterr().out
    drawn = [int(y) for y in re.findall(r"\x1b\[(\d+)H", output)]
    assert drawn == list(range(1, lines + 1))  # further down a terminal clears its last row
    return next(screens(output, columns, lines))


SPEECH = "First Citizen:\nBefore we proceed any further, hear me speak.\n\nAll:\nSpeak, speak. " * 9


@pytest.mark.parametrize(
    "size", [(20, 5), (21, 6), (40, 10), (80, 24), (99, 30), (100, 7), (101, 31), (300, 100)]
)
@pytest.mark.parametrize("models", [1, 2])
def test_no_frame_is_larger_than_the_terminal(size, models, monkeypatch, capfd):
    hidden = [SPEECH[:16] + "_" * 240, SPEECH[:256], SPEECH[:256] + "_" * 240, SPEECH[:496]]
    grown = [SPEECH[:n] for n in range(17, 497, 40)]
    both = {"diffusion": take(SPEECH[:16], *hidden), "gpt": take(SPEECH[:16], *grown)}
    takes = dict(list(both.items())[:models])
    for i in range(1, 14):
        rows = shown(takes, i, *size, monkeypatch, capfd)
        assert fits(rows, *size)
        everything = "\n".join(map(string, rows))
        assert everything.count("diffusion") == everything.count("diffusion  ") == 1
        assert ("gpt  " in everything) == (models == 2)
        assert ("gpt  " in string(rows[0])) == (models == 2 and size[0] >= 100)


def test_nothing_of_the_frame_before_is_left(monkeypatch, capfd):
    """Also where the text scrolls and where the terminal was larger: the same as on a clean one."""
    takes = {"gpt": take(SPEECH[:16], *(SPEECH[:n] for n in range(17, 400)))}
    output = ""
    for i, size in ((1, (90, 20)), (350, (90, 20)), (370, (30, 20)), (384, (30, 12))):
        show(takes, i, size, monkeypatch)
        output += (frame := capfd.readouterr().out)
        (clean,), (*_, drawn) = screens(frame, 30, 12), screens(output, 30, 12)
        assert [string(row) for row in drawn[: size[1]]] == [
            string(row) for row in clean[: size[1]]
        ]


def test_wide_characters_take_two_cells(monkeypatch, capfd):
    takes = {"diffusion": take("天", "天" + "_" * 99, "天地玄黄宇宙洪荒日月" * 10)}
    for i in (1, 2):
        rows = shown(takes, i, 31, 20, monkeypatch, capfd)
        assert fits(rows, 31, 20)
        text = "".join(string(row) for row in rows[HEADER + 4 :])  # each figure takes a row
        assert inked(text.replace("│", "")) == inked(takes["diffusion"][i].text)


def test_rows_break_at_newlines_and_spaces_of_the_final_text(monkeypatch, capfd):
    final = "To be, or not to be,\n\nthatisthequestionwhether 'tis\n"
    first = "To____ __ _ot _______" + "".join("t" if c == "t" else "_" for c in final[21:])
    takes = {"diffusion": take("To", first, final)}
    rows = [string(row)[:16].rstrip() for row in shown(takes, 1, 16, 20, monkeypatch, capfd)]
    body = [row[2:].replace("░", "_") for row in rows if row.startswith("│")]
    assert body == ["To____ __ _ot", "_______", "_", "t__t__t______t", "______t____", "_t___"]


@pytest.mark.parametrize("size", [(20, 5), (40, 12), (80, 24)])
def test_what_is_written_and_the_end_of_a_block_that_fits_are_in_view(size, monkeypatch, capfd):
    """Left to right in one block after another, the newest character is always on the screen."""
    grown = {"gpt": take(SPEECH[:16], *(SPEECH[:n] for n in range(17, 517)))}
    for i in range(1, 501, 7):
        rows = shown(grown, i, *size, monkeypatch, capfd)
        assert sum(cell.reverse for row in rows for cell in row) == 1
    hidden = {"diffusion": take(SPEECH[:256], SPEECH[:256] + "_" * 239 + "!")}
    rows = shown(hidden, 1, 80, 24, monkeypatch, capfd)
    assert sum(cell.reverse for row in rows for cell in row) == 1


@pytest.mark.parametrize(
    ("prompt", "length"),
    [
        (PROMPT, 2 * BLOCK),
        ("a", 3 * BLOCK),
        ("", BLOCK),
        ("abc " * 20, 2 * BLOCK),
        ("_a" * 40 + "b" * 50 + "_c", 7),
        ("a" * 100 + "_" * 50 + "b" * 60, 0),
    ],
)
def test_blocks_are_those_of_the_sampler(prompt, length, toy_modules):
    """Numbered and bounded as the windows that the generator itself holds in its local names."""
    model = diffusion.load(diffusion.weights_path)
    texts, windows, looks = diffusion.generate.__wrapped__(model, prompt, length), [], []

    def watched():
        holes = True
        for text in texts:
            names = texts.gi_frame.f_locals
            window = names["start"], names["end"]
            looks.append(window in windows[-1:] and not holes)
            holes = (names["block"] == names["mask"]).any().item()
            windows.append(window)
            yield text

    frames = [visualize.Frame(prompt, 0.0, 0, 0, 0, False)]
    visualize.record(frames, watched(), length + prompt.count("_"), "toy")
    numbers = {window: n for n, window in enumerate(dict.fromkeys(windows), 1)}
    assert [frame.block for frame in frames[1:]] == [numbers[window] for window in windows]
    assert [frame.end for frame in frames[1:]] == [end for _, end in windows]
    latest = len(prompt) + length - TOY["block_size"]  # where a window can begin
    for frame, (start, _) in zip(frames[1:], windows, strict=True):
        in_view = CONTEXT if frame.start > len(prompt) else TOY["block_size"] // 2
        assert max(0, min(frame.start - in_view, latest)) == start
    assert [frame.anew for frame in frames[1:]] == looks and any(looks)


def test_the_same_seed_starts_each_model(toy_modules, capfd):
    """Alone or beside the other, a model writes the same: both start from the seed."""
    visualize.main(["--blocks", "1", "--seed", "7"])
    alone = capfd.readouterr().out
    visualize.main(["--blocks", "1", "--seed", "7", "--compare"])
    both = capfd.readouterr().out
    model = gpt.load(gpt.weights_path)
    torch.manual_seed(7)
    *_, theirs = gpt.generate(model, PROMPT, BLOCK, 0.8)
    assert both == f"{alone}{theirs}\n"
    visualize.main(["--blocks", "1", "--seed", "8"])
    assert capfd.readouterr().out != alone


def test_an_interrupted_recording_leaves_the_text_so_far(toy_modules, monkeypatch, capfd):
    fine, seen = diffusion.generate, []

    def interrupted(*args):
        for text in fine(*args):
            seen.append(text)
            yield text
            if len(seen) == 3:
                raise KeyboardInterrupt

    monkeypatch.setattr(diffusion, "generate", interrupted)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as ended:
        visualize.main(["--compare"])
    assert (ended.value.code, capfd.readouterr().out) == (130, f"{seen[-1]}\n")
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["--blocks", "0"], "--blocks"),
        (["--blocks", "two"], "--blocks"),
        (["--fps", "0"], "--fps"),
        (["--fps", "-3"], "--fps"),
        (["--temp", "-1"], "--temp"),
        (["--temp", "nan"], "--temp"),
        (["--temp", "inf"], "--temp"),
        (["--seed", "-1"], "--seed"),
        (["--prompt", "abé"], "'é'"),
        (["--prompt", "abé", "--compare"], "'é'"),
        (["--prompt", "a_b", "--compare"], "--compare"),
        (["--prompt", "", "--compare"], "--compare"),
        (["--nonsense"], "--nonsense"),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_generated(args, says, toy_modules, refuse, capfd):
    with pytest.raises(SystemExit) as ended:
        visualize.main(args)
    out, err = capfd.readouterr()
    *usage, line = err.splitlines()
    assert (ended.value.code, out) == (2, "") and says in line
    assert usage in ([], ["usage: visualize.py [options]"])


@pytest.mark.parametrize("missing", [diffusion, gpt])
def test_missing_weights_name_the_command_before_any_work(
    missing, toy_modules, refuse, monkeypatch, capfd
):
    monkeypatch.setattr(missing, "weights_path", toy_modules / "nothing.pt")
    with pytest.raises(SystemExit) as ended:
        visualize.main(["--compare"])
    out, err = capfd.readouterr()
    assert (ended.value.code, out, err.count("\n")) == (2, "", 1)
    assert f"{missing.name}.py --train" in err


@pytest.fixture
def refuse(monkeypatch):
    """Makes generating anything an error."""

    def generate(*args, **kwargs):
        raise AssertionError("generated before everything was checked")

    monkeypatch.setattr(diffusion, "generate", generate)
    monkeypatch.setattr(gpt, "generate", generate)


def test_it_calls_no_model():
    """Of the pair it uses load, generate and plain values, and of torch the seed."""
    tree = ast.parse((ROOT / "visualize.py").read_text(encoding="utf-8"))
    used = {"torch": set(), "diffusion": set(), "gpt": set(), "module": set(), "model": set()}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            used.get(node.value.id, set()).add(node.attr)
    assert used["torch"] == {"manual_seed"}
    assert used["diffusion"] | used["gpt"] == {"block_size", "context"}
    assert used["module"] == {"load", "weights_path", "generate", "name"}
    assert used["model"] == {"tokenizer"}
    called = {
        n.func.id for n in ast.walk(tree) if isinstance(n, ast.Call) and hasattr(n.func, "id")
    }
    assert not called & {"model", "models", "getattr", "eval", "exec"}
