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
    text = yields[-1][0]
    assert outs[1:] == [text[:final] for text, final in yields]
    assert outs[-1] + rest.out == f"{text}\n" and text.startswith(asked[0] or "once upon a time")
    assert rest.err.startswith(f"{len(yields)} passes")


def test_holes_of_the_prompt_are_filled_with_as_many_looks_as_asked(capsys, tmp_path):
    """Seven holes that stand in six columns."""
    weights = str(checkpoint(random_model(diffusion), tmp_path / "weights.pt"))
    for looks, passes in (("0", 6), ("1", 12), ("3", 24)):
        args = ["--prompt", "to be. or ___ __ __", "--length", "0", "--looks", looks]
        diffusion.main([*args, "--weights", weights])
        output = capsys.readouterr()
        assert output.out.startswith("to be. or ") and len(output.out) == 20
        assert "_" not in output.out and output.out[13] == output.out[16] == " "
        assert output.err.startswith(f"{passes} passes")


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
        (["--temp", "nan"], "--temp"),
        (["--iters", "0"], "--iters"),
        (["--prompt", "a Zebra"], "unknown character 'Z'"),
        (["--weights", "nowhere.pt"], "nowhere.pt is missing"),
        (["--eval", "--data", "mine.txt"], "mine.txt"),
        (["--train", "--weights", "."], "is a folder"),
        (["--train", "--weights", "data.txt/weights.pt"], "data.txt"),
    ],
)
def test_bad_input_gets_one_line(script, here, fails, monkeypatch, args, says):
    monkeypatch.chdir(here)
    monkeypatch.setattr(script, "loss_fn", None)  # it ends before the first iteration
    assert says in fails(script, *args)


def test_bad_input_of_one_of_them(script, here, fails):
    if script is gpt:
        assert "prompt is empty" in fails(gpt, "--prompt", "")
        assert "'_'" in fails(gpt, "--prompt", "to be_")
    else:
        assert "--looks" in fails(diffusion, "--looks", "-1")


@pytest.mark.parametrize("fault", ["n_head", "block_size", "script", "cut"])
def test_weights_that_do_not_fit(script, here, fails, monkeypatch, fault):
    """Another n_head alone would load without a complaint, and write garbage."""
    path = script.weights_path
    if fault == "script":
        checkpoint(random_model(diffusion if script is gpt else gpt), path)
    elif fault == "cut":
        path.write_bytes(path.read_bytes()[:-200])
    else:
        monkeypatch.setattr(script, fault, 2 * getattr(script, fault))
    assert f"with other sizes: make it with `{script.name}.py --train`" in fails(script)


def test_texts_that_cannot_be_trained_on(script, here, fails):
    for content, says in (
        (TEXT.encode()[:2560], "too short: it needs 2561 characters"),
        (TEXT.encode() + b"_", "'_'"),
        (TEXT.encode("utf-16"), "utf-8"),
    ):
        script.data_path.write_bytes(content)
        assert says in fails(script, "--train")
    script.data_path.write_text(TEXT[:2560] + "Z")  # long enough
    assert "'Z'" in fails(script, "--eval")


def test_missing_data_is_fetched_once_and_only_the_right_one(
    script, here, fails, monkeypatch, capsys
):
    """A fetch that fails leaves nothing."""
    source = here / "source.txt"
    source.write_bytes(script.data_path.read_bytes())
    script.data_path.unlink()
    monkeypatch.setattr(script, "data_url", source.as_uri())
    monkeypatch.setattr(script, "data_sha256", hashlib.sha256(b"another").hexdigest())
    assert f"save it as {script.data_path}" in fails(script, "--train")
    monkeypatch.setattr(script, "data_sha256", hashlib.sha256(source.read_bytes()).hexdigest())
    script.main(["--eval"])
    assert script.data_path.read_text() == TEXT and "nats" in capsys.readouterr().out
    source.unlink()
    script.main(["--eval"])
    script.data_path.unlink()
    assert source.as_uri() in fails(script, "--eval")


def test_ctrl_c_while_writing_leaves_the_text_so_far(script, here, monkeypatch, capsys):
    def interrupted(*_):
        yield "once upon a time_", 16
        raise KeyboardInterrupt

    monkeypatch.setattr(script, "generate", interrupted)
    with pytest.raises(SystemExit) as stop:
        script.main([])
    output = capsys.readouterr()
    assert (stop.value.code, output.out) == (130, "once upon a time")
    assert output.err.endswith(
        f"\n{script.name}.py: stopped; a training goes on with the same command\n"
    )


# ---- the real script, with the shipped weights -------------------------------------------------
@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGPIPE")
def test_a_linked_script_runs_without_docstrings_and_ends_quietly_in_a_closed_pipe(tmp_path):
    (tmp_path / "shakespeare").symlink_to(ROOT / "gpt.py")
    command = f"{sys.executable} -OO shakespeare --length 400 | head -c 20"
    done = subprocess.run(command, shell=True, cwd=tmp_path, capture_output=True, timeout=99)
    assert done.stdout.startswith(b"First Citizen") and done.stderr == b""


@pytest.mark.parametrize("stdout", [io.StringIO(), None], ids=["notebook", "closed output"])
def test_where_standard_output_is_no_file_the_signals_stay_as_they_are(stdout, monkeypatch, capsys):
    """A notebook runs a script in its own process."""
    handlers = [signal.getsignal(number) for number in signal.valid_signals()]
    monkeypatch.setattr(sys, "argv", ["diffusion.py", "--length", "1"])
    monkeypatch.setattr(sys, "stdout", stdout)
    runpy.run_path(str(ROOT / "diffusion.py"), run_name="__main__")
    assert stdout is None or stdout.getvalue().startswith("First Citizen:\nB")
    assert capsys.readouterr().err.startswith("2 passes")
    assert handlers == [signal.getsignal(number) for number in signal.valid_signals()]
