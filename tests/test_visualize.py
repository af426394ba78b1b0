"""visualize.py in a terminal: pyte, which emulates one, says what the screen shows."""

import io
import os
import re
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import count
from types import SimpleNamespace

import pytest
import torch
from conftest import CHARS, ROOT, checkpoint, random_model

import diffusion
import gpt
import visualize

pyte = pytest.importorskip("pyte")
pty = pytest.importorskip("pty", reason="Windows has no pseudo-terminals")

PROMPT = "once upon a time"  # the toys' own
ENTER, LEAVE = "\x1b[?1049h\x1b[?25l", "\x1b[?2026l\x1b[m\x1b[?25h\x1b[?1049l"
FRAME_ENDS = "\x1b[?2026l"


# ---- toys and terminals ------------------------------------------------------------------------
@pytest.fixture
def toys(tmp_path, monkeypatch):
    """Puts small random models in place of the shipped ones."""
    for module, others in ((diffusion, "éü"), (gpt, "é")):
        path = checkpoint(random_model(module, CHARS + others), tmp_path / f"{module.name}.pt")
        monkeypatch.setattr(module, "weights_path", path)


@pytest.fixture
def columns(toys, monkeypatch):
    """For each pass of diffusion the places in its window that it writes."""
    places, surest_column = [], diffusion.surest_column

    def keep(logits, holes):
        column = surest_column(logits, holes)
        places.append(column[0].nonzero().flatten().tolist())
        return column

    monkeypatch.setattr(diffusion, "surest_column", keep)
    return places


def generated(module, prompt=None, length=240, *options, seed=1337):
    """What generate() yields in each pass; its defaults are those of the script."""
    model = module.load(module.weights_path)
    torch.manual_seed(seed)
    return list(module.generate(model, prompt, length, *options))


class Terminal(io.TextIOWrapper):
    """Standard output that says it is a terminal, and keeps what it gets."""

    def isatty(self):
        return True

    def fileno(self):
        return 1


def replay(output):
    """The frames, and what is left on the screen: it has to be given back as it was."""
    before, _, rest = output.rpartition(LEAVE)
    start, _, played = before.partition(ENTER)
    given_back = "\x1b[?" not in start + rest
    assert given_back  # pytest would compare megabytes to explain the line above
    frames = re.findall(r"\x1b\[\?2026h(.*?)\x1b\[\?2026l", played, re.S)
    return SimpleNamespace(output=output, frames=frames, rest=rest)


def play(*args, sizes=((80, 24),), encoding="utf-8", term="xterm", no_color=""):
    """Runs main() in a terminal, without its naps; each frame finds it of the next of the sizes."""
    stdout, naps = Terminal(io.BytesIO(), encoding, "replace"), []

    def size(_):
        return os.terminal_size(sizes[len(naps) % len(sizes)])

    def nap(seconds):
        assert stdout.buffer.getbuffer()[-8:] == FRAME_ENDS.encode()  # it is out, not in a buffer
        naps.append(seconds)

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TERM", term)
        patch.setenv("NO_COLOR", no_color)
        patch.setattr(sys, "stdout", stdout)
        patch.setattr(time, "sleep", nap)
        patch.setattr(os, "get_terminal_size", size)
        visualize.main(args)
    stdout.flush()
    run = replay(stdout.buffer.getvalue().decode(encoding))
    run.naps = naps
    return run


def screen(frames, columns=80, lines=24):
    """The rows of cells after frames are drawn; the last may not reach beyond the size."""
    larger = pyte.Screen(220, 160)
    pyte.Stream(larger).feed("".join(frames))
    rows = [[larger.buffer[y][x] for x in range(220)] for y in range(160)]
    beyond = [c for row in rows for c in row[columns:]] + [c for row in rows[lines:] for c in row]
    assert all(cell.data == " " and not cell.reverse for cell in beyond)
    return [row[:columns] for row in rows[:lines]]


def string(cells):
    return "".join(cell.data for cell in cells).rstrip()


# ---- a replay ----------------------------------------------------------------------------------
def test_each_pane_shows_its_pass_around_the_block_whatever_the_size(columns):
    """The size changes after each frame: columns, lines; then of a pane the columns, those of the
    table on its left, the rows of text."""
    sizes = [(120, 150, 58, 0, 147), (40, 12, 40, 0, 3), (99, 25, 99, 0, 9)]
    sizes += [(100, 12, 48, 0, 9), (200, 60, 98, 37, 57), (20, 5, 20, 0, 1)]
    run = play("--compare", "--blocks", "2", sizes=[size[:2] for size in sizes])
    assert run.naps == [1 / 20] * 481 + [1]  # GPT's passes, and a frame that says done
    steps_of = [generated(diffusion, None, 480), generated(gpt, None, 480)]
    assert run.rest == "".join(f"{steps[-1][0]}\n" for steps in steps_of)
    assert "\x1b[1;35m" in run.output and "\x1b[7;32m" in run.output
    for i in [*range(1, 37), *range(250, 256), *range(476, 482)]:
        across, lines, width, table, space = sizes[(i - 1) % 6]
        rows = screen(run.frames[max(0, i - 2) : i], across, lines)  # nothing stays of the other
        right, below = (across - width, 0) if across >= 100 else (0, lines // 2)
        assert not any(string(row[width:right]) for row in rows)
        assert string(rows[0]).startswith("diffusion")
        assert string(rows[below][right:]) == ("gpt" if i < 481 else "gpt  done")
        for steps, x, y, begin in zip(steps_of, (0, right), (0, below), (table, 0), strict=True):
            passes, done = min(i, len(steps)), i > len(steps)
            text, block_start = steps[passes - 1][0], 15 + passes
            new = [block_start]  # of a GPT's text the newest character
            if len(steps) == 32:
                start, block_start = (0, 16) if passes <= 16 else (240, 256)
                new = [start + j for j in columns[passes - 1]]
            pane = [row[x : x + width] for row in rows[y : y + (lines if right else lines // 2)]]
            spans = visualize.layout(steps[-1][0], width - begin - 2)
            block = [n for n, (a, b) in enumerate(spans) if b > block_start and a < len(text)]
            top, lit, bold = max(0, min(block[0], block[-1] + 1 - space)), [], []
            for n, row in enumerate(pane[-space:], top):
                a, b = spans[n] if n < len(spans) else (0, 0)
                margin = "│" if n in block and not done else " "
                shown = text[a:b].translate({95: "░", 10: " "})
                assert string(row[begin:]) == f"{margin} {shown}".rstrip()
                lit += [a + j for j, cell in enumerate(row[begin + 2 :]) if cell.reverse]
                bold += [a + j for j, cell in enumerate(row[begin + 2 :]) if cell.bold]
            in_view = range(spans[top][0], spans[: top + space][-1][1])
            assert lit == [j for j in new if j in in_view and not done]
            assert bold == [j for j in range(16) if j in in_view]


def test_the_table_and_the_text_show_each_block_though_the_prompt_has_holes(columns, monkeypatch):
    """Without colour. The window begins half its length before a hole or the end of the prompt,
    later 16 characters before the block. The text ends before the last window does."""
    prompt = "_nce\n_pon_a" + " time" * 200
    monkeypatch.setattr(time, "perf_counter", count(0, 0.5).__next__)  # half a second a pass
    run = play("--prompt", prompt, "--blocks", "1", "--fps", "0.5", no_color="1")
    assert run.naps == [2] * 39 + [1]
    codes = {c for codes in re.findall(r"\x1b\[([\d;]*)m", run.output) for c in codes.split(";")}
    assert codes == {"", "1", "2", "7"}  # bold, dim, reverse
    expected = []  # the status and the start of the window in each frame
    for k, start, passes in (1, 0, 3), (2, 883, 8), (3, 1123, 8):
        expected += [(f"block {k} of 3", start)] * passes
        expected += [(f"block {k} of 3, second look", start)] * passes
    expected.append(("done", 1123))
    steps = generated(diffusion, prompt)
    for i, (status, start) in enumerate(expected):
        passes = min(i + 1, 38)
        text, final = steps[passes - 1]
        written = len(text.replace("_", "")) - 1008
        figures = f"{passes:3} passes  {written:3} chars  {written / passes:5.2f} per pass"
        bar = ("━" * (80 * written // 243)).ljust(80, "─")
        rows = screen(run.frames[i : i + 1])
        header = [f"diffusion  {status}", f"{figures}  {passes / 2:4.1f} s", bar]
        assert [string(row) for row in rows[:3]] == header
        cells = [rows[3 + j // 8 % 16][19 * (j // 128) + 2 * (j % 8)] for j in range(256)]
        shown = text[start : start + 256].translate({95: "░", 10: "↵", 32: "·"}).ljust(256)
        assert "".join(cell.data for cell in cells) == shown
        assert [j for j, cell in enumerate(cells) if cell.reverse] == (columns[i] if i < 38 else [])
        given = prompt.ljust(start + 256, "_")[start:]
        bold = [j for j, c in enumerate(given[:256]) if c != "_" or start + j < final]
        assert [j for j, cell in enumerate(cells) if cell.bold] == bold
        if i < 6:  # the block is in view though screens of prompt follow it
            assert re.fullmatch(r"│ .pon.a( time){6}", string(rows[4][37:])) and string(rows[23])


def test_where_the_encoding_has_nothing_else_it_plays_in_ascii(toys):
    handler = signal.getsignal(signal.SIGTERM)
    run = play("--blocks", "1", encoding="ascii")
    assert run.naps == [1 / 5] * 17 + [1] and "_" in run.frames[0]
    assert signal.getsignal(signal.SIGTERM) is handler


def test_a_dumb_terminal_gets_the_text_alone(toys):
    run = play("--blocks", "1", term="dumb")
    assert (run.output, run.naps) == (f"{generated(diffusion)[-1][0]}\n", [])


# ---- the script as a user runs it, with the shipped weights ------------------------------------
COMMAND = [sys.executable, str(ROOT / "visualize.py"), "--blocks", "1", "--fps", "2"]
ENVIRONMENT = os.environ | {"TERM": "xterm", "OMP_NUM_THREADS": "1"}


def test_ctrl_z_and_sigterm_give_the_terminal_back():
    """A real one, which does not tell its size: it is taken for one of 40 x 40 characters."""
    outer, inner = pty.openpty()
    streams, output = dict.fromkeys(("stdin", "stdout", "stderr"), inner), b""
    # A group of its own, as a shell gives: else nothing may suspend it.
    process = subprocess.Popen(COMMAND, env=ENVIRONMENT, preexec_fn=os.setpgrp, **streams)
    os.close(inner)
    kill = threading.Timer(60, process.kill)  # if it hangs
    kill.start()
    for again in 1, 2:
        while output.count(ENTER.encode()) < again or not output.endswith(FRAME_ENDS.encode()):
            output += os.read(outer, 65536)
        process.send_signal(signal.SIGTSTP)
        assert os.WIFSTOPPED(os.waitpid(process.pid, os.WUNTRACED)[1])
        output += os.read(outer, 65536)
        assert output.endswith(LEAVE.encode())
        process.send_signal(signal.SIGCONT)
    process.terminate()
    with suppress(OSError):  # Linux: nobody has the inner end open any more
        while chunk := os.read(outer, 65536):
            output += chunk
    assert process.wait() == 143
    kill.cancel()
    os.close(outer)
    run = replay(output.decode().replace("\r\n", "\n"))
    assert "Traceback" not in run.output
    assert len(string(screen(run.frames, 40, 40)[2])) == 40  # the bar
    assert re.match(r"\ndiffusion +16 passes +240 chars.*\nFirst Citizen:\n", run.rest)
    assert "_" not in run.rest and run.rest.endswith("\n")


def test_a_pipe_that_closes_ends_it_quietly():
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    with subprocess.Popen(COMMAND, env=ENVIRONMENT, **pipes) as process:
        process.stdout.close()
        errors = process.stderr.read().decode()
    assert process.returncode == -signal.SIGPIPE and "Traceback" not in errors


# ---- without a terminal ------------------------------------------------------------------------
def test_a_pipe_gets_the_texts_that_the_flags_ask_for(toys, tmp_path, monkeypatch, capfd):
    """Each model, here of the user's own, starts from the seed."""
    monkeypatch.setattr(time, "sleep", None)
    args = ["--compare", "--blocks=2", "--seed=7", "--temp=0.5", "--looks=2", "--prompt=a fuß"]
    for module in diffusion, gpt:
        path = checkpoint(random_model(module, CHARS + "ß", seed=1), tmp_path / module.name)
        args.append(f"--{module.name}={path}")
    visualize.main(args)
    out, err = capfd.readouterr()
    monkeypatch.setattr(diffusion, "weights_path", tmp_path / "diffusion")
    monkeypatch.setattr(gpt, "weights_path", tmp_path / "gpt")
    text = generated(diffusion, "a fuß", 480, 0.5, 2, seed=7)[-1][0]
    assert out == f"{text}\n{generated(gpt, 'a fuß', 480, 0.5, seed=7)[-1][0]}\n"
    summary = re.findall(r"(\w+)  +(\d+) passes +480 chars", err)
    assert summary == [("diffusion", "48"), ("gpt", "480")] and "\x1b" not in err


@pytest.mark.parametrize("stdout", [io.StringIO(), None], ids=["notebook", "closed output"])
def test_a_standard_output_that_is_no_file(stdout, toys, monkeypatch, capsys):
    """In a thread, which may set no signals, and without docstrings, as by `python -OO`."""
    path = ROOT / "visualize.py"
    script = compile(path.read_text(encoding="utf-8"), path, "exec", optimize=2)
    monkeypatch.setattr(sys, "argv", ["visualize.py", "--blocks", "1"])
    monkeypatch.setattr(sys, "stdout", stdout)
    with ThreadPoolExecutor() as threads:
        threads.submit(exec, script, {"__name__": "__main__", "__doc__": None}).result()
    assert stdout is None or stdout.getvalue() == f"{generated(diffusion)[-1][0]}\n"
    assert "16 passes  240 chars" in capsys.readouterr().err


def test_a_recording_that_is_interrupted_leaves_the_texts_so_far(toys, monkeypatch, capfd):
    def interrupted(*_):
        yield f"{PROMPT} t", 18
        raise KeyboardInterrupt

    monkeypatch.setattr(gpt, "generate", interrupted)
    with pytest.raises(SystemExit) as ended:
        visualize.main(["--compare", "--blocks", "1"])
    assert ended.value.code == 130
    assert capfd.readouterr().out == f"{generated(diffusion)[-1][0]}\n{PROMPT} t\n"


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["--blocks=0"], "--blocks"),
        (["--blocks=101"], "--blocks"),
        (["--fps=0"], "--fps"),
        (["--temp=-1"], "--temp"),
        (["--temp=nan"], "--temp"),
        (["--looks=-1"], "--looks"),
        (["--seed=-1"], "--seed"),
        (["--prompt=ab€"], "'€'"),
        (["--prompt=ü", "--compare"], "'ü'"),
        (["--prompt=a_b", "--compare"], "--compare"),
        (["--prompt=", "--compare"], "--compare"),
        (["--gpt=nothing.pt", "--compare"], "gpt.py --train"),
        (["--diffusion=nothing.pt"], "diffusion.py --train"),
    ],
)
def test_bad_input_is_one_line_before_any_work(args, says, columns, fails):
    assert says in fails(visualize, *args) and not columns


# ---- layout ------------------------------------------------------------------------------------
def test_rows_break_at_newlines_at_spaces_and_within_long_words():
    text = "To be, or not to be,\n\nthatisthequestionwhether 'tis\n"
    rows = [text[start:end] for start, end in visualize.layout(text, 14)]
    assert rows == ["To be, or not ", "to be,\n", "\n", "thatisthequest", "ionwhether ", "'tis\n"]


def test_wide_characters_take_two_cells():
    text = "天地玄黄宇宙洪荒日月" * 10
    frames = [visualize.Frame("天", 0, 0, 0, 0.0), visualize.Frame(text, 1, 99, 1, 0.1)]
    shown = screen([visualize.pane("diffusion", frames, 1, 1, 1, 80, 24)])
    assert "".join(string(row[39:]) for row in shown[3:]) == text
    assert [string(row[:16]) for row in shown[3:16]] == re.findall(".{1,8}", text)
