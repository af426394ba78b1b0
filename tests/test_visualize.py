"""visualize.py in a terminal: pyte, which emulates one, says what the screen shows."""

import itertools
import os
import re
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress

import pytest
import torch
from conftest import CHARS, ROOT, checkpoint, random_model

import diffusion
import gpt
import visualize

pyte = pytest.importorskip("pyte")
pty = pytest.importorskip("pty", reason="Windows has no pseudo-terminals")

ENTER, LEAVE = "\x1b[?1049h\x1b[?25l", "\x1b[?2026l\x1b[m\x1b[?25h\x1b[?1049l"
FRAME_ENDS = b"\x1b[?2026l"


# ---- toys and terminals ------------------------------------------------------------------------
@pytest.fixture
def toys(tmp_path, monkeypatch):
    """Puts small random models in place of the shipped ones."""
    for module, others in ((diffusion, "0123456789ü"), (gpt, "0123456789")):
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


def generated(module, path, *options, seed=1337):
    """The text after each pass."""
    model = module.load(path)
    torch.manual_seed(seed)
    return [text for text, _ in module.generate(model, *options)]


def frames_and_rest(output):
    """The frames, and what stays on the screen after them, which is given back as it was."""
    before, _, rest = output.rpartition(LEAVE)
    start, _, played = before.partition(ENTER)
    given_back = "\x1b[?" not in start + rest
    assert given_back  # pytest would compare megabytes to explain the line above
    return re.findall(r"\x1b\[\?2026h(.*?)\x1b\[\?2026l", played, re.S), rest


@pytest.fixture
def play(toys, monkeypatch, capsys):
    """Runs main() in a terminal that has the next of the sizes for each frame. Gives back the
    frames, what stays on the screen after them, and the seconds that it sleeps after each."""

    def play(*args, sizes=((80, 24),), no_color=""):
        naps = []

        def nap(seconds):
            assert sys.stdout.buffer.getvalue().endswith(FRAME_ENDS)  # it is out, not in a buffer
            naps.append(seconds)

        sys.stdout.reconfigure(write_through=False)
        next_size = itertools.cycle(map(os.terminal_size, sizes))
        with monkeypatch.context() as patch:
            patch.setattr(os, "get_terminal_size", lambda _: next(next_size))
            patch.setattr(sys.stdout, "isatty", lambda: True)
            patch.setattr(sys.stdout, "fileno", lambda: 1)
            patch.setattr(time, "sleep", nap)
            patch.setenv("TERM", "xterm")
            patch.setenv("NO_COLOR", no_color)
            visualize.main(args)
        return *frames_and_rest(capsys.readouterr().out), naps

    return play


def screen(frames, columns=80, lines=24):
    """The rows of cells after frames are drawn."""
    terminal = pyte.Screen(columns, lines)
    pyte.Stream(terminal).feed("".join(frames))
    return [[terminal.buffer[y][x] for x in range(columns)] for y in range(lines)]


def string(cells):
    return "".join(cell.data for cell in cells).rstrip()


# ---- a replay ----------------------------------------------------------------------------------
def test_the_panes_scroll_to_the_block_whatever_the_size(play, monkeypatch):
    """124 numbered lines: 4 of prompt, then two blocks of 60. Two passes write the first block, one
    the second; GPT makes four. Each frame finds a terminal of another size."""
    text = "".join(f"{n:03}\n" for n in range(124))
    texts = {"diffusion": [text[:248] + "________", text[:256], text, text, text]}
    texts["gpt"] = [text[:17], text[:18], text[:19], text[:20], text[:20]]
    passes = list(zip(texts["diffusion"], (16, 16, 256), strict=False))
    monkeypatch.setattr(diffusion, "generate", lambda *_: passes)
    monkeypatch.setattr(gpt, "generate", lambda *_: [(t, len(t)) for t in texts["gpt"][:4]])
    sizes = (200, 80), (100, 12), (40, 150), (99, 25), (20, 5)
    frames, rest, naps = play("--compare", "--prompt", text[:16], sizes=sizes)
    assert naps == [1 / 20] * 5 + [1]  # a frame for each of GPT's passes, and one at the end
    assert rest == f"{text}\n{text[:20]}\n"
    assert "\x1b[1;35m" in frames[0] and "\x1b[7;32m" in frames[0]
    # x, y: where the text begins; the lines in view, those with a margin, the new characters
    for i, name, x, y, shown, marked, new in [
        (0, "diffusion", 37, 3, range(64), range(4, 64), text[16:248]),  # the table is on its left
        (1, "diffusion", 0, 3, range(4, 13), range(4, 13), ""),
        (1, "gpt", 52, 3, range(5), [4], "0"),  # side by side
        (2, "diffusion", 0, 3, range(52, 124), range(64, 124), text[256:]),
        (2, "gpt", 0, 78, range(5), [4], "4"),  # stacked
        (3, "diffusion", 0, 3, range(64, 73), [], ""),  # done
        (3, "gpt", 0, 15, range(5), [4], "\n"),
        (4, "diffusion", 0, 1, [64], [], ""),
        (4, "gpt", 0, 3, [4], [], ""),
    ]:
        rows = screen(frames[max(0, i - 1) : i + 1], *sizes[i])  # nothing stays of the frame before
        written = texts[name][i].translate({95: "░", 10: " "})
        cells = [row[x : x + 8] for row in rows[y : y + len(shown)]]
        expected = [f"{'│' if n in marked else ' '} {written[4 * n :][:4]}".rstrip() for n in shown]
        assert [string(row) for row in cells] == expected
        reversed_cells = [cell.data for row in cells for cell in row if cell.reverse]
        assert "".join(reversed_cells) == new.replace("\n", " ")
    rows = screen(frames[1:2], 100, 12)
    assert string(rows[0]) == f"{'diffusion  block 1 of 2':52}gpt"
    assert string(rows[2]) == "    ".join([24 * "━" + 24 * "─"] * 2)


def test_the_table_shows_each_pass_though_the_prompt_has_holes(columns, play, monkeypatch):
    """Without colour. The window begins half its length before a hole or the end of the prompt,
    later 16 characters before the block. The text ends before the last window does."""
    prompt = "_nce\n_pon_a" + " time" * 200
    monkeypatch.setattr(time, "perf_counter", itertools.count(0, 0.5).__next__)  # 0.5 s a pass
    frames, _, naps = play("--prompt", prompt, "--blocks=1", "--fps=0.5", no_color="1")
    assert naps == [2] * 39 + [1]
    codes = set(re.findall(r"\x1b\[([\d;]*)m", "".join(frames)))
    assert codes == {"", "1", "2", "7"}  # bold, dim, reverse
    texts = [prompt, *generated(diffusion, diffusion.weights_path, prompt, 240)]
    for k, start, first, end in (1, 0, 0, 6), (2, 883, 6, 22), (3, 1123, 22, 38):
        given = [c != "_" for c in texts[first][start : start + 256].ljust(256, "_")]
        for i in range(first, end):
            rows = screen(frames[i : i + 1])
            look = ", second look" if 2 * i >= first + end else ""
            assert string(rows[0]) == f"diffusion  block {k} of 3{look}"
            cells = [rows[3 + j // 8 % 16][19 * (j // 128) + 2 * (j % 8)] for j in range(256)]
            window = texts[i + 1][start : start + 256]
            assert string(cells) == window.translate({95: "░", 10: "↵", 32: "·"})
            assert [j for j, cell in enumerate(cells) if cell.reverse] == columns[i]
            assert [cell.bold for cell in cells] == given
    # The text shows the first block though screens of prompt follow it.
    assert re.fullmatch(r"│ .pon.a( time){6}", string(screen(frames[:1])[4][37:]))
    rows = screen(frames[13:14])
    assert string(rows[1]) == " 14 passes  131 chars   9.36 per pass   7.0 s"
    assert string(rows[2]) == "━" * 43 + "─" * 37
    assert string(screen(frames[38:])[0]) == "diffusion  done"


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
        while output.count(ENTER.encode()) < again or not output.endswith(FRAME_ENDS):
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
    frames, rest = frames_and_rest(output.decode().replace("\r\n", "\n"))
    assert len(string(screen(frames, 40, 40)[2])) == 40  # the bar
    assert re.match(r"\ndiffusion +16 passes +240 chars.*\nFirst Citizen:\n", rest)
    assert "_" not in rest and "Traceback" not in rest


# ---- without a terminal ------------------------------------------------------------------------
def test_a_pipe_gets_the_texts_that_the_flags_ask_for(tmp_path, capfd):
    """Each model, here of the user's own, starts from the seed."""
    args = ["--compare", "--blocks=2", "--seed=7", "--temp=0.5", "--looks=2", "--prompt=a fuß"]
    for module in diffusion, gpt:
        path = checkpoint(random_model(module, CHARS + "ß"), tmp_path / module.name)
        args.append(f"--{module.name}={path}")
    visualize.main(args)
    out, err = capfd.readouterr()
    text = generated(diffusion, tmp_path / "diffusion", "a fuß", 480, 0.5, 2, seed=7)[-1]
    gpt_text = generated(gpt, tmp_path / "gpt", "a fuß", 480, 0.5, seed=7)[-1]
    assert out == f"{text}\n{gpt_text}\n"
    summary = re.findall(r"(\w+)  +(\d+) passes +480 chars", err)
    assert summary == [("diffusion", "48"), ("gpt", "480")] and "\x1b" not in err


def test_a_recording_that_is_interrupted_leaves_the_texts_so_far(toys, monkeypatch, capfd):
    def interrupted(*_):
        yield "once upon a time t", 18
        raise KeyboardInterrupt

    monkeypatch.setattr(diffusion, "generate", lambda *_: [("once upon a time.", 16)])
    monkeypatch.setattr(gpt, "generate", interrupted)
    with pytest.raises(SystemExit) as ended:
        visualize.main(["--compare"])
    assert ended.value.code == 130
    assert capfd.readouterr().out == "once upon a time.\nonce upon a time t\n"


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["--blocks=101"], "--blocks"),
        (["--fps=0"], "--fps"),
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
