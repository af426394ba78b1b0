"""The command line: what it writes where, bad input, Ctrl-C, fetching data.txt."""

import hashlib
import io
import math
import os
import runpy
import signal
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, checkpoint, mean_score, random_model

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


@pytest.mark.parametrize(
    "args, seed, asked",
    [
        (["--length", "0"], 1337, (None, 0)),
        (["--length", "300", "--prompt", "a time"], 1337, ("a time", 300)),
        (["--length", "300", "--seed", "1", "--temp", "2"], 1, (None, 300, 2)),
    ],
)
def test_prints_what_can_no_longer_change(script, here, capsys, monkeypatch, args, seed, asked):
    """Whenever the script is asked for more, all that is final is out, and nothing else is."""
    model, generate, outs = script.load(script.weights_path), script.generate, [""]

    def watched(*args):
        for step in generate(*args):
            yield step
            outs.append(outs[-1] + capsys.readouterr().out)

    monkeypatch.setattr(script, "generate", watched)
    script.main(args)
    rest = capsys.readouterr()
    torch.manual_seed(seed)
    yields = list(generate(model, *asked))
    text, length = yields[-1][0], asked[1]
    assert outs[1:] == [text[:final] for text, final in yields]
    assert outs[-1] + rest.out == f"{text}\n" and text.startswith(asked[0] or "once upon a time")
    assert (f"{length} characters, {len(yields)} passes" in rest.err) == (length > 0)


def test_holes_of_the_prompt_are_filled_with_as_many_looks_as_asked(capsys, tmp_path):
    """Seven holes that stand in six columns."""
    weights = str(checkpoint(random_model(diffusion), tmp_path / "weights.pt"))
    for looks, passes in (("0", 6), ("1", 12), ("3", 24)):
        args = ["--prompt", "to be. or ___ __ __", "--length", "0", "--looks", looks]
        diffusion.main([*args, "--weights", weights])
        output = capsys.readouterr()
        assert output.out.startswith("to be. or ") and len(output.out) == 20
        assert "_" not in output.out and output.out[13] == output.out[16] == " "
        assert f"7 characters, {passes} passes" in output.err


def test_eval_prints_nats_and_bits(script, here, capsys):
    script.data_path.write_text(TEXT * 10)
    script.main(["--eval"])
    score = mean_score(script, script.load(script.weights_path), (TEXT * 10)[31_500:])
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
        (["--length", "10000001"], "--length"),
        (["--temp", "-0.1"], "--temp"),
        (["--temp", "nan"], "--temp"),
        (["--temp", "warm"], "--temp"),
        (["--seed", "-1"], "--seed"),
        (["--seed", str(2**70)], "--seed"),
        (["--unknown"], "--unknown"),
        (["--iters", "0"], "--iters"),
        (["--prompt", "a Zebra"], "unknown character 'Z'"),
        (["--weights", "nowhere.pt"], "nowhere.pt is missing: make it with `"),
        (["--train", "--eval"], "not allowed with argument"),
        (["--train", "--weights", "."], "is a folder"),
    ],
)
def test_bad_input_gets_one_line(script, here, fails, monkeypatch, args, says):
    monkeypatch.chdir(here)
    assert says in fails(script, *args)


def test_bad_input_of_one_of_them(script, here, fails):
    if script is gpt:
        assert "prompt is empty" in fails(gpt, "--prompt", "")
        assert "'_'" in fails(gpt, "--prompt", "to be_")
    else:
        assert "--looks" in fails(diffusion, "--looks", "-1")


@pytest.mark.parametrize("fault", ["n_head", "block_size", "script", "list", "cut"])
def test_weights_that_do_not_fit(script, here, fails, monkeypatch, fault):
    """Another n_head alone would load without a complaint, and write garbage."""
    path = script.weights_path
    if fault == "script":
        checkpoint(random_model(diffusion if script is gpt else gpt), path)
    elif fault == "list":
        torch.save([1, 2], path)
    elif fault == "cut":
        path.write_bytes(path.read_bytes()[:-200])
    else:
        monkeypatch.setattr(script, fault, 2 * getattr(script, fault))
    says = f"{path} is damaged, or of another script or other sizes: make it with `{script.name}.py"
    assert says in fails(script)


def test_texts_that_cannot_be_trained_on(script, here, fails):
    path = script.data_path
    for content, says in (
        (TEXT.encode()[:2560], "too short: it needs 2561 characters"),
        (TEXT.encode() + b"_", "'_'"),
        (TEXT.encode("utf-16"), f"{path} is not UTF-8"),
    ):
        path.write_bytes(content)
        assert says in fails(script, "--train")
        assert says in fails(script, "--eval")
    path.write_text(TEXT[:2560] + "Z")  # long enough
    assert "'Z'" in fails(script, "--eval")


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


@pytest.mark.parametrize("content", [None, "<html>"])
def test_fetching_nothing_or_the_wrong_thing_leaves_nothing(script, source, fails, content):
    source.unlink()
    if content:
        source.write_text(content)
    line = fails(script, "--train")
    assert script.data_url in line and f"save it as {script.data_path}" in line


def test_own_text_is_never_fetched(script, source, fails, tmp_path):
    assert "mine.txt" in fails(script, "--eval", "--data", tmp_path / "mine.txt")


# ---- the real script: one of the two, as these lines are the same in both ----------------------
@pytest.mark.skipif(os.name == "nt", reason="links and >&- are a POSIX shell's")
def test_a_linked_script_runs_without_docstrings_and_with_its_output_closed(tmp_path):
    """It finds its weights, and sends the figures to standard error."""
    (tmp_path / "shakespeare").symlink_to(ROOT / "diffusion.py")
    command = f"{sys.executable} -OO shakespeare --length 16 >&-"
    done = subprocess.run(command, shell=True, cwd=tmp_path, stderr=-1, text=True, timeout=99)
    assert done.returncode == 0 and done.stderr.startswith("16 characters, 16 passes, ")


def test_in_a_notebook_the_signals_stay_as_they_are(monkeypatch):
    """Whose standard output is no file, and which runs a script in its own process."""
    handlers = [signal.getsignal(number) for number in signal.valid_signals()]
    monkeypatch.setattr(sys, "argv", ["gpt.py", "--length", "0"])
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    runpy.run_path(str(ROOT / "gpt.py"), run_name="__main__")
    assert sys.stdout.getvalue() == "First Citizen:\nB\n"
    assert handlers == [signal.getsignal(number) for number in signal.valid_signals()]


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGINT to send to one process")
def test_ctrl_c_while_writing_leaves_the_text_so_far(tmp_path):
    """In another folder: the weights are beside the script."""
    command = [sys.executable, str(ROOT / "diffusion.py"), "--length", "1000000"]
    with subprocess.Popen(command, cwd=tmp_path, stdout=-1, stderr=-1, text=True) as process:
        begun = process.stdout.read(200)
        process.send_signal(signal.SIGINT)
        rest, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in errors
    assert begun.startswith("First Citizen") and "_" not in begun + rest


def test_what_a_console_cannot_show_ends_nothing(tmp_path, monkeypatch):
    """A model of Greek letters on a console that has none. All of it stands before the figures."""
    for key, value in (("n_layer", 6), ("n_head", 6), ("n_embd", 384)):
        monkeypatch.setattr(gpt, key, value)
    weights = checkpoint(random_model(gpt, chars="αβγ"), tmp_path / "weights.pt")
    strict = {"PYTHONIOENCODING": "cp1252:strict", "PYTHONUTF8": "0", "PYTHONUNBUFFERED": ""}
    command = [sys.executable, ROOT / "gpt.py", "--weights", weights, "--prompt", "β"]
    command += ["--length", "2"]
    out = subprocess.check_output(command, stderr=-2, env=os.environ | strict, timeout=99)
    assert out.decode().startswith("???\n2 characters, 2 passes")


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGPIPE")
def test_a_closed_pipe_ends_the_script_quietly():
    command = f"{sys.executable} gpt.py --length 400 | head -c 20"
    done = subprocess.run(command, shell=True, cwd=ROOT, capture_output=True, text=True, timeout=99)
    assert done.stdout.startswith("First Citizen") and done.stderr == ""
