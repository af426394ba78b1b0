"""The command line: what it writes where, bad input, Ctrl-C, fetching data.txt."""

import functools
import hashlib
import http.server
import itertools
import math
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from conftest import checkpoint, random_model

import diffusion
import gpt

ROOT = Path(__file__).parent.parent
TEXT = "once upon a time there was a text.\n" * 100


@pytest.fixture
def here(script, tmp_path, monkeypatch):
    """A folder with a text and random weights, which the script takes for its own."""
    monkeypatch.setattr(script, "data_path", tmp_path / "data.txt")
    monkeypatch.setattr(script, "weights_path", tmp_path / "weights.pt")
    script.data_path.write_text(TEXT)
    checkpoint(random_model(script), script.weights_path)
    return tmp_path


def fails(script, capsys, *args):
    """Runs main on bad input; returns the line it says, behind one of usage where the arguments are
    wrong in themselves. Nothing may be written anywhere."""
    folder = script.weights_path.parent
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with pytest.raises(SystemExit) as stop:
        script.main([str(arg) for arg in args])
    output = capsys.readouterr()
    assert stop.value.code == 2 and output.out == ""
    *usage, line = output.err.splitlines()
    assert usage in ([], [f"usage: {script.name}.py [options]"])
    assert line.startswith(f"{script.name}.py: ")
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    return line


def test_writes_the_text_to_standard_output(script, here, capsys):
    script.main(["--length", "300", "--prompt", "a time"])
    output = capsys.readouterr()
    model = script.load(script.weights_path)
    torch.manual_seed(1337)
    texts = list(script.generate(model, "a time", 300))
    assert output.out == texts[-1] + "\n"
    assert f"300 characters, {len(texts)} passes" in output.err
    script.main(["--length", "300", "--prompt", "a time", "--seed", "1", "--temp", "2"])
    assert capsys.readouterr().out != output.out


def test_a_block_is_printed_when_it_is_settled_and_not_before(script, here, capsys, monkeypatch):
    """Whenever the script is asked for more, what is out is all that can no longer change."""
    fine, out, settled = script.generate, [], []

    def watched(*args):
        texts = list(fine(*args))
        starts = [16] + [len(a) for a, b in itertools.pairwise(texts) if len(b) > len(a)]
        starts = starts if script is diffusion else range(17, 417)
        for text in texts:
            yield text
            out.append(capsys.readouterr().out)
            begun = [n for n in starts if n < len(text)]
            settled.append(texts[-1][: begun[-1]] if begun else "")

    monkeypatch.setattr(script, "generate", watched)
    script.main(["--length", "400"])
    shown = list(itertools.accumulate(out))
    if script is gpt:  # a character later than it could be
        assert [len(text) for text in shown] == list(range(16, 416))
    else:
        assert len(set(map(len, settled))) == 2 and shown == settled
    assert settled[-1].startswith(shown[-1])


def test_length_0_prints_the_prompt(script, here, capsys):
    script.main(["--length", "0"])
    assert capsys.readouterr().out == "once upon a time\n"


def test_holes_of_the_prompt_are_filled(capsys, tmp_path):
    weights = checkpoint(random_model(diffusion), tmp_path / "weights.pt")
    diffusion.main(["--prompt", "to be. or ___ __ __", "--length", "0",
                    "--weights", str(weights), "--spacing", "256"])  # fmt: skip
    output = capsys.readouterr()
    assert output.out.startswith("to be. or ") and len(output.out) == 20
    assert "_" not in output.out and output.out[13] == output.out[16] == " "
    assert "7 characters, 14 passes" in output.err


def test_spacing_trades_passes(capsys, tmp_path):
    weights = checkpoint(random_model(diffusion), tmp_path / "weights.pt")
    for spacing, count in (("256", "248 passes"), ("1", "9 passes")):
        diffusion.main(["--length", "240", "--spacing", spacing, "--weights", str(weights)])
        assert f" {count}," in capsys.readouterr().err


@pytest.mark.parametrize("windows", [1, 12])
def test_eval_prints_nats_and_bits(script, here, capsys, windows):
    """Also for a text of a single window."""
    text = (TEXT * 2)[: 2561 if windows == 1 else None]
    script.data_path.write_text(text)
    script.main(["--eval"])
    score = script.evaluate(script.load(script.weights_path), text[int(0.9 * len(text)) :])
    line = f"{score:.4f} nats per character, {score / math.log(2):.4f} bits\n"
    output = capsys.readouterr()
    assert output.out == line and output.err == ""


@pytest.mark.parametrize(
    "args, says",
    [
        (["--length", "-1"], "--length"),
        (["--length", "many"], "--length"),
        (["--length", str(10**22)], "--length"),
        (["--temp", "-0.1"], "--temp"),
        (["--temp", "nan"], "--temp"),
        (["--temp", "inf"], "--temp"),
        (["--temp", "warm"], "--temp"),
        (["--seed", "-1"], "--seed"),
        (["--seed", str(2**70)], "--seed"),
        (["--unknown"], "--unknown"),
        (["--iters", "0"], "--iters"),
        (["--batch", "-3"], "--batch"),
        (["--prompt", "a Zebra"], "'Z'"),
        (["--prompt", "\U0001f600"], "\U0001f600"),
        (["--weights", "nowhere.pt"], "nowhere.pt is missing: make it with"),
        (["--train", "--resume", "--weights", "nowhere.pt"], "nowhere.pt is missing"),
        (["--eval", "--data", "nowhere.txt"], "nowhere.txt"),
        (["--train", "--data", "nowhere.txt"], "nowhere.txt"),
        (["--eval", "--data", "."], "."),
    ],
)
def test_bad_input_gets_one_line(script, here, capsys, monkeypatch, args, says):
    monkeypatch.chdir(here)
    assert says in fails(script, capsys, *args)


def test_bad_input_of_one_of_them(here, script, capsys):
    if script is gpt:
        assert "prompt is empty" in fails(gpt, capsys, "--prompt", "")
        assert "'_'" in fails(gpt, capsys, "--prompt", "to be_")
    else:
        assert "--spacing" in fails(diffusion, capsys, "--spacing", "0")
        diffusion.main(["--prompt", "", "--length", "20"])
        assert len(capsys.readouterr().out) == 21


def test_a_distance_beyond_every_block_takes_no_longer(tmp_path):
    """A pooling kernel of twice this size would not fit into memory."""
    weights = checkpoint(random_model(diffusion), tmp_path / "weights.pt")
    diffusion.main(["--length", "5", "--spacing", "1000000000", "--weights", str(weights)])


@pytest.mark.parametrize("size", ["n_layer", "n_head", "n_embd", "block_size"])
def test_weights_of_other_sizes(script, here, capsys, monkeypatch, size):
    """Another n_head alone would load without a complaint, and write garbage."""
    monkeypatch.setattr(script, size, 2 * getattr(script, size))
    line = fails(script, capsys)
    assert f"{script.weights_path} is damaged, of another script or of other sizes" in line


@pytest.mark.parametrize("damage", ["empty", "text", "cut", "list", "other", "older"])
def test_damaged_weights_and_those_of_the_other_script(script, here, capsys, damage):
    path = script.weights_path
    if damage == "other":
        checkpoint(random_model(diffusion if script is gpt else gpt), path)
    elif damage == "list":
        torch.save([1, 2], path)
    elif damage == "older":  # before the sizes were in it
        kept = ("chars", "prompt", "weights")
        content = torch.load(path, weights_only=True)
        torch.save({key: content[key] for key in kept}, path)
    else:
        path.write_bytes({"empty": b"", "text": b"hello", "cut": path.read_bytes()[:-200]}[damage])
    line = fails(script, capsys)
    assert f"{path} is damaged, of another script" in line and "--train" in line


def test_texts_that_cannot_be_trained_on(script, here, capsys):
    path = script.data_path
    for content, says in (
        (b"too short", "too short"),
        (TEXT.encode()[:2560], "too short: it needs 2561 characters"),
        (TEXT.encode() + b"_", "'_'"),
        (TEXT.encode() + b"\xff", "utf-8"),
    ):
        path.write_bytes(content)
        assert says in fails(script, capsys, "--train")
    path.write_text(TEXT + "Z")
    assert "'Z'" in fails(script, capsys, "--eval")


class Server(http.server.BaseHTTPRequestHandler):
    """Serves CONTENT as /good, something else as /wrong, half of it as /cut, and nothing else."""

    CONTENT = 2 * TEXT.encode()

    def do_GET(self):
        body = {"/good": self.CONTENT, "/wrong": b"<html>", "/cut": self.CONTENT}.get(self.path)
        self.send_response(200 if body else 404)
        self.send_header("Content-Length", str(len(body or b"")))
        self.end_headers()
        self.wfile.write((body or b"")[: len(self.CONTENT) // (1 + (self.path == "/cut"))])

    def log_message(self, *_):
        pass


@pytest.fixture
def server(script, here, monkeypatch):
    """Lets the script fetch its data from a server on this machine; returns a switch of address."""
    script.data_path.unlink()
    monkeypatch.setattr(script, "data_sha256", hashlib.sha256(Server.CONTENT).hexdigest())
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server) as running:
        threading.Thread(target=running.serve_forever, args=(0.01,), daemon=True).start()
        address = f"http://127.0.0.1:{running.server_port}"
        yield lambda page: monkeypatch.setattr(script, "data_url", address + page)
        running.shutdown()


def test_missing_data_is_fetched(script, server, capsys):
    server("/good")
    script.main(["--eval"])
    assert script.data_path.read_text() == 2 * TEXT and "nats" in capsys.readouterr().out
    server("/wrong")
    script.main(["--eval"])  # and only once


@pytest.mark.parametrize("page", ["/wrong", "/missing", "/cut"])
def test_fetching_the_wrong_thing_leaves_nothing(script, server, capsys, page):
    server(page)
    line = fails(script, capsys, "--train")
    assert page in line and f"save it as {script.data_path}" in line


def test_no_connection_says_what_to_put_where(script, server, capsys, monkeypatch):
    monkeypatch.setattr(script, "data_url", "http://127.0.0.1:1/data.txt")  # nobody listens there
    line = fails(script, capsys, "--train")
    assert "http://127.0.0.1:1/data.txt" in line and f"save it as {script.data_path}" in line


def test_own_text_is_never_fetched(script, server, capsys, tmp_path):
    server("/good")
    assert "mine.txt" in fails(script, capsys, "--train", "--data", tmp_path / "mine.txt")


def test_the_real_script(tmp_path):
    """From another folder, with weights of the other script, one line and exit code 2."""
    weights = checkpoint(random_model(diffusion), tmp_path / "weights.pt")
    command = [sys.executable, ROOT / "gpt.py", "--weights", weights]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1


SMALL = "import {0}\n{0}.n_layer, {0}.n_head, {0}.n_embd = 2, 2, 16\n{0}.main({1!r})"


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGINT to send to one process")
def test_ctrl_c_while_writing_leaves_the_text_so_far(script, tmp_path):
    weights = checkpoint(random_model(script), tmp_path / "weights.pt")
    args = ["--length", "10000000" if script is gpt else "100000", "--weights", str(weights)]
    code = SMALL.format(script.name, args)
    start = functools.partial(subprocess.Popen, [sys.executable, "-c", code], cwd=ROOT, text=True)
    with start(stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        begun = process.stdout.read(100)
        process.send_signal(signal.SIGINT)
        rest, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in errors
    assert begun.startswith("once upon a time") and "_" not in begun + rest


def test_what_a_console_cannot_show_ends_nothing(script, tmp_path):
    """A training whose samples hold a character that the console lacks, seen to its end."""
    data, weights = tmp_path / "data.txt", tmp_path / "weights.pt"
    data.write_text("αβγ δ\n" * 500, encoding="utf-8")
    args = ["--train", "--iters", "2", "--batch", "2", "--data", data, "--weights", weights]
    code = f"""
import sys
sys.argv = [{script.__file__!r}, *{list(map(str, args))!r}]
source = open(sys.argv[0], encoding="utf-8").read().replace("= 6, 6, 384", "= 2, 2, 16")
exec(compile(source, sys.argv[0], "exec"), {{"__name__": "__main__", "__file__": sys.argv[0]}})
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=os.environ | {"PYTHONIOENCODING": "cp1252:strict", "PYTHONUTF8": "0"},
        capture_output=True,
        timeout=120,
    )
    assert done.returncode == 0 and b"?" in done.stdout and b"iteration 2" in done.stdout
    assert weights.exists() and not weights.with_suffix(".resume").exists()


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGPIPE")
def test_a_closed_pipe_ends_the_real_script_quietly(tmp_path, monkeypatch):
    for key, value in (("n_layer", 6), ("n_head", 6), ("n_embd", 384)):
        monkeypatch.setattr(diffusion, key, value)
    weights = checkpoint(random_model(diffusion), tmp_path / "weights.pt")
    command = f"{sys.executable} diffusion.py --length 400 --weights {weights} | head -c 20"
    done = subprocess.run(command, shell=True, cwd=ROOT, capture_output=True, text=True, timeout=99)
    assert done.stdout.startswith("once upon a time") and len(done.stdout) == 20
    assert done.stderr == ""
