"""visualize.py in a terminal: pyte, which emulates one, says what the screen shows."""

import io
import os
import re
import signal
import struct
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import islice
from types import SimpleNamespace

import pytest
import torch
from conftest import CHARS, ROOT, checkpoint, random_model

import diffusion
import gpt
import visualize

fcntl = pytest.importorskip("fcntl", reason="Windows has no pseudo-terminals")
pyte, pty, termios = map(pytest.importorskip, ("pyte", "pty", "termios"))

PROMPT = "once upon a time"  # the toys' own
ENTER, LEAVE = "\x1b[?1049h\x1b[?25l", "\x1b[?2026l\x1b[m\x1b[?25h\x1b[?1049l"
FRAME_ENDS = b"\x1b[?2026l"


# ---- toys and terminals ------------------------------------------------------------------------
@pytest.fixture
def toys(tmp_path, monkeypatch):
    """Puts small random models in place of the shipped ones; {name: what its generate() yielded}"""
    yielded = {}

    def keep(name, generate):
        def steps(*args):
            for step in generate(*args):
                yielded.setdefault(name, []).append(step)
                yield step

        return steps

    for module, others in ((diffusion, "éü"), (gpt, "é")):
        path = checkpoint(random_model(module, CHARS + others), tmp_path / f"{module.name}.pt")
        monkeypatch.setattr(module, "weights_path", path)
        monkeypatch.setattr(module, "generate", keep(module.name, module.generate))
    return yielded


@pytest.fixture
def columns(monkeypatch):
    """For each pass of diffusion the places in its window that it writes."""
    places, surest_column = [], diffusion.surest_column

    def keep(logits, holes):
        column = surest_column(logits, holes)
        places.append(column[0].nonzero().flatten().tolist())
        return column

    monkeypatch.setattr(diffusion, "surest_column", keep)
    return places


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


def play(*args, sizes=((80, 24),), after=lambda n: None, encoding="utf-8", **env):
    """Runs main() in a terminal, without its naps; each frame finds it of the next of the sizes,
    and after(n) follows frame n."""
    stdout, naps, code = Terminal(io.BytesIO(), encoding, "replace"), [], 0

    def size(_):
        return os.terminal_size(sizes[len(naps) % len(sizes)])

    def nap(seconds):
        assert stdout.buffer.getbuffer()[-8:] == FRAME_ENDS  # is out, not waiting to be flushed
        naps.append(seconds)
        after(len(naps))

    with pytest.MonkeyPatch.context() as patch:
        for name, value in ({"TERM": "xterm", "NO_COLOR": ""} | env).items():
            patch.setenv(name, value)
        patch.setattr(sys, "stdout", stdout)
        patch.setattr(time, "sleep", nap)
        patch.setattr(os, "get_terminal_size", size)
        try:
            visualize.main(args)
        except (SystemExit, ZeroDivisionError) as error:
            code = getattr(error, "code", "error")
    stdout.flush()
    run = replay(stdout.buffer.getvalue().decode(encoding))
    run.naps, run.code = naps, code
    return run


def screen(frames, columns, lines):
    """The rows of cells after frames are drawn; nothing may reach beyond the size."""
    larger = pyte.Screen(columns + 9, lines + 9)
    pyte.Stream(larger).feed("".join(frames))
    rows = [[larger.buffer[y][x] for x in range(columns + 9)] for y in range(lines + 9)]
    beyond = [c for row in rows for c in row[columns:]] + [c for row in rows[lines:] for c in row]
    assert all(cell.data == " " and not cell.reverse for cell in beyond)
    return [row[:columns] for row in rows[:lines]]


def string(cells):
    return "".join(cell.data for cell in cells).rstrip()


def marked(text, begin, final_text, width):
    """(row of text as it is shown, if the margin marks it): what of it is after begin"""
    return [
        (text[start:end].translate({95: "░", 10: " "}).rstrip(), start < len(text) and end > begin)
        for start, end in visualize.layout(final_text, width - 2)
    ]


# ---- a replay ----------------------------------------------------------------------------------
def test_both_panes_show_each_pass_where_the_final_text_has_it(toys, columns, monkeypatch):
    monkeypatch.setattr(time, "perf_counter", lambda: sum(map(len, toys.values())) / 2)
    run = play("--compare", "--blocks", "2", "--fps", "50", sizes=[(120, 150)])
    assert (run.code, len(run.frames)) == (0, 481)  # GPT's passes, and one that says done
    assert run.naps == [1 / 50] * 481 + [1]
    assert run.rest == "".join(f"{steps[-1][0]}\n" for steps in toys.values())
    assert "\x1b[1;35m" in run.output and "\x1b[7;32m" in run.output
    statuses = ["block 1 of 2", "block 1 of 2, second look"]  # eight passes each
    statuses += ["block 2 of 2", "block 2 of 2, second look"]
    for i in (1, 4, 8, 9, 16, 17, 24, 25, 32, 33, 480, 481):
        rows = screen(run.frames[max(0, i - 2) : i], 120, 150)  # nothing stays of the one before
        assert not any(string(row[58:62]) for row in rows)
        for name, left in (("diffusion", 0), ("gpt", 62)):
            steps, pane = toys[name], [row[left : left + 58] for row in rows]
            done, passes = i > len(steps), min(i, len(steps))
            text = steps[passes - 1][0]
            written = len(text) - text.count("_") - len(PROMPT) if name == "diffusion" else passes

            status = "done" if done else statuses[(i - 1) // 8] if name == "diffusion" else ""
            assert string(pane[0]) == f"{name}  {status}".rstrip()
            figures = f"{passes} passes {written} chars {written / passes:.2f} per pass"
            assert string(pane[1]).split() == f"{figures} {passes / 2:.1f} s".split()
            assert string(pane[2]).count("━") == 58 * written // 480

            begin, new = len(text) - 1, text[-1]  # the block, and what the pass wrote of it
            if name == "diffusion":
                start, begin = (0, 16) if i <= 16 else (240, 256)
                new = "".join(text[start + j] for j in columns[passes - 1])
            expected = marked(text, begin, steps[-1][0], 58)
            for (shown, active), row in zip(expected, pane[3:], strict=False):
                assert string(row) == f"{'│' if active and not done else ' '} {shown}".rstrip()

            cells = [cell for row in pane[3:] for cell in row[2:]]
            reverse = "".join(cell.data for cell in cells if cell.reverse)
            assert sorted(reverse) == sorted("" if done else new.replace("\n", " "))
            assert "".join(cell.data for cell in cells if cell.bold) == PROMPT


def test_a_frame_follows_the_size_and_keeps_the_block_in_view(toys):
    """The size changes after each frame: columns, lines, columns of a pane, its rows of text. There
    is room for the table in the fourth."""
    sizes = [(40, 12, 40, 3), (99, 25, 99, 9), (100, 12, 48, 9), (200, 60, 98, 57), (20, 5, 20, 1)]
    run = play("--compare", "--blocks", "2", sizes=[size[:2] for size in sizes])
    for i in [*range(35), *range(250, 255), *range(475, 480)]:
        columns, lines, width, space = sizes[i % 5]
        rows, beside = screen(run.frames[i : i + 1], columns, lines), columns >= 100
        height = lines if beside else lines // 2
        right, below = (columns - width, 0) if beside else (0, height)
        for name, left, top in (("diffusion", 0, 0), ("gpt", right, below)):
            pane = [row[left : left + width] for row in rows[top : top + height]]
            steps = toys[name]
            text, final = steps[min(i, len(steps) - 1)]
            table = 37 if name == "diffusion" and width == 98 else 0
            expected = marked(text, min(final, len(text) - 1), steps[-1][0], width - table)
            block = [shown for shown, active in expected if active and i < len(steps)]
            assert string(pane[0]).startswith(name)
            pane = [row[table:] for row in pane]
            assert [string(row)[2:] for row in pane if row[0].data == "│"] == block[:space]


@pytest.mark.parametrize(
    ("prompt", "starts"),
    [
        ("abcd" + " time" * 60 + "\n_ po_", [177] * 16 + [417] * 17),
        ("abc" + " time" * 60, [175] * 16 + [415] * 17),
        ("_b", [0] * 17),
    ],
)
def test_the_table_shows_the_window_and_lights_the_column_of_the_pass(
    prompt, starts, toys, columns
):
    """It begins half a window before the prompt's hole or end, later 16 characters before the
    block. The last one goes on after the text ends."""
    run = play("--prompt", prompt, "--blocks", "1", "--fps", "0.5")
    assert run.naps == [2] * len(starts) + [1]
    passes = len(toys["diffusion"])
    for i, (frame, start) in enumerate(zip(run.frames, starts, strict=True)):
        text, final = toys["diffusion"][min(i, passes - 1)]
        rows = screen([frame], 80, 24)
        cells = [rows[3 + j // 8 % 16][19 * (j // 128) + 2 * (j % 8)] for j in range(256)]
        shown = text[start : start + 256].translate({95: "░", 10: "↵", 32: "·"}).ljust(256)
        assert "".join(cell.data for cell in cells) == shown
        new = [j for j, cell in enumerate(cells) if cell.reverse]
        assert new == (columns[i] if i < passes else [])
        bold = {start + j for j, cell in enumerate(cells) if cell.bold}
        prompted = {j for j, c in enumerate(prompt) if c != "_" and j >= start}
        assert bold == prompted | set(range(start, final))
        gaps = [row[x] for row in rows[3:19] for x in (*range(1, 18, 2), 16, 18, *range(20, 37, 2))]
        assert string(gaps) == ""


def test_holes_of_the_prompt_are_filled_without_colour(toys):
    """The first block is in view though screens of prompt follow it, and has its second look though
    there are holes after it."""
    prompt = "once\n_pon_a" + " time" * 200 + "_e_nd_"
    run = play("--prompt", prompt, "--blocks", "1", sizes=[(80, 22)], NO_COLOR="1")
    assert re.fullmatch(prompt.replace("_", "[^_]") + "[^_]{240}\n", run.rest)
    codes = {c for codes in re.findall(r"\x1b\[([\d;]*)m", run.output) for c in codes.split(";")}
    assert codes == {"", "1", "2", "7"}  # bold, dim, reverse
    screens = [screen([frame], 80, 22) for frame in run.frames[:5]]
    statuses = ["block 1 of 3"] * 2 + ["block 1 of 3, second look"] * 2 + ["block 2 of 3"]
    assert [string(rows[0]) for rows in screens] == [f"diffusion  {status}" for status in statuses]
    for rows in screens[:4]:
        assert re.fullmatch(r"│ .pon.a( time){14}", string(rows[4])) and string(rows[14])
    assert [cell.bold for cell in screens[3][4][2:8]] == [False, True, True, True, False, True]


@pytest.mark.parametrize(
    ("code", "stop"),
    [(143, lambda: signal.raise_signal(signal.SIGTERM)), ("error", lambda: 1 / 0)],
)
def test_a_replay_that_is_stopped_leaves_the_texts(code, stop, toys):
    """And writes ASCII where the encoding has nothing else."""
    handler = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        args = ("--compare", "--blocks", "1", "--prompt", "é once")
        run = play(*args, after=lambda n: n == 3 and stop(), encoding="ascii")
        assert signal.getsignal(signal.SIGTERM) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGTERM, handler)
    assert (run.code, len(run.frames)) == (code, 3)
    assert "_" in run.frames[0]
    assert run.rest == "".join(f"{steps[-1][0]}\n" for steps in toys.values()).replace("é", "?")


def test_a_dumb_terminal_gets_the_text_alone_by_the_defaults_of_the_script(toys):
    run = play("--blocks", "1", TERM="dumb")
    model = diffusion.load(diffusion.weights_path)
    torch.manual_seed(1337)
    *_, (text, _) = diffusion.generate(model, None, 240)
    assert (run.output, run.naps) == (f"{text}\n", [])


# ---- the script as a user runs it, with the shipped weights ------------------------------------
COMMAND = [sys.executable, str(ROOT / "visualize.py"), "--blocks", "1", "--fps", "2"]
ENVIRONMENT = os.environ | {"TERM": "xterm", "OMP_NUM_THREADS": "1"}


def test_ctrl_z_and_ctrl_c_give_the_terminal_back():
    """A real one, of 70 x 20 characters."""
    outer, inner = pty.openpty()
    fcntl.ioctl(outer, termios.TIOCSWINSZ, struct.pack("HHHH", 20, 70, 0, 0))
    streams, output = dict.fromkeys(("stdin", "stdout", "stderr"), inner), b""
    previous = signal.signal(signal.SIGALRM, lambda *_: pytest.fail("it hangs"))
    signal.alarm(60)
    # A group of its own, as a shell gives: else nothing may suspend it.
    process = subprocess.Popen(COMMAND, env=ENVIRONMENT, preexec_fn=os.setpgrp, **streams)
    os.close(inner)
    try:
        for again in range(1, 3):
            while output.count(FRAME_ENDS) < 3 * again:
                output += os.read(outer, 65536)
            process.send_signal(signal.SIGTSTP)
            assert os.WIFSTOPPED(os.waitpid(process.pid, os.WUNTRACED)[1])
            output += os.read(outer, 65536)
            assert output.endswith(LEAVE.encode())
            process.send_signal(signal.SIGCONT)
            while output.count(ENTER.encode()) <= again:
                output += os.read(outer, 65536)
        process.send_signal(signal.SIGINT)
        with suppress(OSError):  # Linux: nobody has the inner end open any more
            while chunk := os.read(outer, 65536):
                output += chunk
        assert process.wait() == 130
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)
        process.kill()
        os.close(outer)
    run = replay(output.decode().replace("\r\n", "\n"))
    assert "Traceback" not in run.output
    assert len(string(screen(run.frames, 70, 20)[2])) == 70  # the bar
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
    args, texts = ["--compare", "--blocks=2", "--seed=7", "--temp=0.5", "--looks=2"], []
    for module, looks in ((diffusion, (2,)), (gpt, ())):
        path = checkpoint(random_model(module, CHARS + "ß", seed=1), tmp_path / module.name)
        args += [f"--{module.name}", str(path)]
        model = module.load(path)
        torch.manual_seed(7)
        *_, (text, _) = module.generate(model, "a fuß", 480, 0.5, *looks)
        texts.append(f"{text}\n")
    visualize.main([*args, "--prompt", "a fuß"])
    out, err = capfd.readouterr()
    assert out == "".join(texts) and "\x1b" not in err
    summary = re.findall(r"(\w+)  +(\d+) passes +480 chars", err)
    assert summary == [("diffusion", "48"), ("gpt", "480")]


@pytest.mark.parametrize("stdout", [io.StringIO(), None], ids=["notebook", "closed output"])
def test_a_standard_output_that_is_no_file(stdout, toys, monkeypatch, capsys):
    """In a thread, which may set no signals, and without docstrings, as by `python -OO`."""
    path = ROOT / "visualize.py"
    script = compile(path.read_text(encoding="utf-8"), path, "exec", optimize=2)
    monkeypatch.setattr(sys, "argv", ["visualize.py", "--blocks", "1"])
    monkeypatch.setattr(sys, "stdout", stdout)
    with ThreadPoolExecutor() as threads:
        threads.submit(exec, script, {"__name__": "__main__", "__doc__": None}).result()
    assert stdout is None or stdout.getvalue() == f"{toys['diffusion'][-1][0]}\n"
    assert "16 passes  240 chars" in capsys.readouterr().err


def test_a_recording_that_is_interrupted_leaves_the_text_so_far(toys, monkeypatch, capfd):
    whole = diffusion.generate

    def interrupted(*args):
        yield from islice(whole(*args), 3)
        raise KeyboardInterrupt

    monkeypatch.setattr(diffusion, "generate", interrupted)
    with pytest.raises(SystemExit) as ended:
        visualize.main(["--compare"])
    assert (ended.value.code, capfd.readouterr().out) == (130, f"{toys['diffusion'][2][0]}\n")


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["--blocks", "0"], "--blocks"),
        (["--blocks", "101"], "--blocks"),
        (["--fps", "0"], "--fps"),
        (["--temp", "-1"], "--temp"),
        (["--temp", "nan"], "--temp"),
        (["--looks", "-1"], "--looks"),
        (["--seed", "-1"], "--seed"),
        (["--prompt", "ab€"], "'€'"),
        (["--prompt", "ü", "--compare"], "'ü'"),
        (["--prompt", "a_b", "--compare"], "--compare"),
        (["--prompt", "", "--compare"], "--compare"),
        (["--gpt", "nothing.pt", "--compare"], "gpt.py --train"),
        (["--diffusion", "nothing.pt"], "diffusion.py --train"),
        (["--nonsense"], "--nonsense"),
    ],
)
def test_bad_input_is_one_line_before_any_work(args, says, toys, fails):
    assert says in fails(visualize, *args) and toys == {}


# ---- layout ------------------------------------------------------------------------------------
def test_rows_break_at_newlines_at_spaces_and_within_long_words():
    text = "To be, or not to be,\n\nthatisthequestionwhether 'tis\n"
    rows = [text[start:end] for start, end in visualize.layout(text, 14)]
    assert rows == ["To be, or not ", "to be,\n", "\n", "thatisthequest", "ionwhether ", "'tis\n"]


def test_wide_characters_take_two_cells():
    text = "天地玄黄宇宙洪荒日月" * 10
    frames = [visualize.Frame("天", 0, 0, 0, 0.0), visualize.Frame(text, 1, 99, 1, 0.1)]
    shown = screen([visualize.pane("diffusion", frames, 1, 1, 1, 80, 24)], 80, 24)
    assert "".join(string(row[39:]) for row in shown[3:]) == text
    assert [string(row[:16]) for row in shown[3:16]] == re.findall(".{1,8}", text)
