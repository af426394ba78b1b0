"""The command line: what it writes where, bad input, Ctrl-C, fetching data.txt."""

import hashlib
import math
import os
import signal
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, checkpoint, random_model, run

import diffusion
import gpt

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
    yields = list(script.generate(model, "a time", 300))
    assert output.out == yields[-1][0] + "\n"
    assert f"300 characters, {len(yields)} passes" in output.err
    script.main(["--length", "300", "--prompt", "a time", "--seed", "1", "--temp", "2"])
    assert capsys.readouterr().out != output.out


def test_what_is_final_is_printed_and_nothing_else(script, here, capsys, monkeypatch):
    """Whenever the script is asked for more, what is out is all that can no longer change."""
    generate, out, final = script.generate, [], []

    def watched(*args):
        for text, n in generate(*args):
            yield text, n
            out.append(capsys.readouterr().out)
            final.append(text[:n])

    monkeypatch.setattr(script, "generate", watched)
    script.main(["--length", "400"])
    assert ["".join(out[: i + 1]) for i in range(len(out))] == final


def test_length_0_prints_the_prompt(script, here, capsys):
    script.main(["--length", "0"])
    assert capsys.readouterr().out == "once upon a time\n"


def test_holes_of_the_prompt_are_filled_with_as_many_looks_as_asked(capsys, tmp_path):
    """Seven holes that stand on four combs."""
    weights = str(checkpoint(random_model(diffusion), tmp_path / "weights.pt"))
    for looks, passes in (("0", 6), ("1", 12), ("3", 24)):
        args = ["--prompt", "to be. or ___ __ __", "--length", "0", "--looks", looks]
        diffusion.main([*args, "--weights", weights])
        output = capsys.readouterr()
        assert output.out.startswith("to be. or ") and len(output.out) == 20
        assert "_" not in output.out and output.out[13] == output.out[16] == " "
        assert f"7 characters, {passes} passes" in output.err


@pytest.mark.parametrize("windows", [1, 12])
def test_eval_prints_nats_and_bits(script, here, capsys, windows):
    """Also for a text of a single window."""
    text = (TEXT * 10)[: 2561 if windows == 1 else None]
    script.data_path.write_text(text)
    script.main(["--eval"])
    score = script.evaluate(script.load(script.weights_path), text[int(0.9 * len(text)) :])
    out = capsys.readouterr().out.splitlines()
    assert out[0] == f"{score:.4f} nats per character, {score / math.log(2):.4f} bits"
    if script is diffusion:  # and what each of the eight passes pays
        passes = [float(nats) for nats in out[1].split(": ")[1].split()]
        assert len(passes) == 8 and sum(passes) / 8 == pytest.approx(score, abs=0.01)
    assert len(out) == (1 if script is gpt else 2)


@pytest.mark.parametrize(
    "args, says",
    [
        (["--length", "-1"], "--length"),
        (["--length", "many"], "--length"),
        (["--length", "2147483647"], "--length"),
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
        (["--weights", "nowhere.pt"], "cannot read nowhere.pt: No such file or directory; make it"),
        (["--weights", "."], "cannot read .: Is a directory"),
        (["--train", "--eval"], "not allowed with argument"),
        (["--resume"], "--resume goes with --train"),
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
        assert "--looks" in fails(diffusion, capsys, "--looks", "-1")
        diffusion.main(["--prompt", "", "--length", "20"])
        assert len(capsys.readouterr().out) == 21


@pytest.mark.parametrize("size", ["n_layer", "n_head", "n_embd", "block_size"])
def test_weights_of_other_sizes(script, here, capsys, monkeypatch, size):
    """Another n_head alone would load without a complaint, and write garbage."""
    monkeypatch.setattr(script, size, 2 * getattr(script, size))
    line = fails(script, capsys)
    assert f"{script.weights_path} is of another script or of other sizes" in line


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
    what = "of another script" if damage in ("other", "older") else "damaged"
    assert f"{path} is {what}" in line and "--train" in line


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
        assert says in fails(script, capsys, "--eval")
    path.write_text(TEXT + "Z")
    assert "'Z'" in fails(script, capsys, "--eval")


def test_a_byte_order_mark_is_no_character(script, here):
    script.data_path.write_text(TEXT, encoding="utf-8-sig")
    assert "".join(script.read_splits(script.data_path)) == TEXT


@pytest.fixture
def source(script, here, monkeypatch):
    """What the script fetches where there is no data.txt: a file that holds what it should."""
    source = here / "source.txt"
    source.write_bytes(script.data_path.read_bytes())
    script.data_path.unlink()
    monkeypatch.setattr(script, "data_url", source.as_uri())
    monkeypatch.setattr(script, "data_sha256", hashlib.sha256(source.read_bytes()).hexdigest())
    return source


def test_missing_data_is_fetched_once(script, source, capsys):
    script.main(["--eval"])
    assert script.data_path.read_text() == TEXT and "nats" in capsys.readouterr().out
    source.unlink()
    script.main(["--eval"])


@pytest.mark.parametrize("fault", ["wrong", "cut", "missing", "offline"])
def test_fetching_the_wrong_thing_leaves_nothing(script, source, capsys, monkeypatch, fault):
    if fault == "missing":
        source.unlink()
    elif fault == "offline":  # nobody listens there
        monkeypatch.setattr(script, "data_url", "http://127.0.0.1:1/data.txt")
    else:
        source.write_bytes(b"<html>" if fault == "wrong" else source.read_bytes()[:-1])
    line = fails(script, capsys, "--train")
    assert script.data_url in line and f"save it as {script.data_path}" in line


def test_own_text_is_never_fetched(script, source, capsys, tmp_path):
    assert "mine.txt" in fails(script, capsys, "--train", "--data", tmp_path / "mine.txt")


# ---- the real script: one of the two, as these lines are the same in both ----------------------
def test_from_another_folder_with_weights_of_the_other_script(tmp_path):
    done = run(gpt, "--weights", diffusion.weights_path, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "") and done.stderr.count("\n") == 1


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGINT to send to one process")
def test_ctrl_c_while_writing_leaves_the_text_so_far():
    command = [sys.executable, str(ROOT / "diffusion.py"), "--length", "1000000"]
    with subprocess.Popen(command, stdout=-1, stderr=-1, text=True) as process:
        begun = process.stdout.read(200)
        process.send_signal(signal.SIGINT)
        rest, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in errors
    assert begun.startswith("First Citizen") and "_" not in begun + rest


def test_what_a_console_cannot_show_ends_nothing(tmp_path, monkeypatch):
    """A model of Greek letters on a console that has none."""
    for key, value in (("n_layer", 6), ("n_head", 6), ("n_embd", 384)):
        monkeypatch.setattr(gpt, key, value)
    weights = checkpoint(random_model(gpt, chars="αβγ"), tmp_path / "weights.pt")
    strict = os.environ | {"PYTHONIOENCODING": "cp1252:strict", "PYTHONUTF8": "0"}
    done = run(gpt, "--weights", weights, "--prompt", "β", "--length", 2, env=strict)
    assert (done.returncode, done.stdout) == (0, "???\n")


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGPIPE")
def test_a_closed_pipe_ends_the_script_quietly():
    command = f"{sys.executable} gpt.py --length 400 | head -c 20"
    done = subprocess.run(command, shell=True, cwd=ROOT, capture_output=True, text=True, timeout=99)
    assert done.stdout.startswith("First Citizen") and done.stderr == ""
