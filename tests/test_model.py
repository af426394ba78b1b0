"""Tokenizer, attention, cache, and the file that a model is loaded from."""

from pathlib import Path

import pytest
import torch
from conftest import CHARS, checkpoint, random_model

import diffusion
import gpt


def test_the_mask_is_read_but_never_predicted():
    tokenizer = diffusion.CharTokenizer(CHARS)
    ids = tokenizer.encode("a_b")
    assert tokenizer.decode(ids) == "a_b" and ids[1] == tokenizer.mask
    assert random_model(diffusion)(ids[None]).shape == (1, 3, len(CHARS))


def test_only_diffusion_sees_what_comes_later(script):
    model = random_model(script)
    ids = torch.randint(len(CHARS), (1, 256))
    for t in (0, 1, 100, 254):
        changed = ids.clone()
        changed[0, t + 1] = (ids[0, t + 1] + 1) % len(CHARS)
        difference = (model(changed) - model(ids))[0].abs().amax(-1)
        assert difference[t + 1] > 1e-3
        before = difference[: t + 1]
        assert (before == 0).all() if script is gpt else (before > 1e-5).all()


def test_the_distance_between_characters_matters_and_nothing_else_of_their_places(script):
    """A reversed past is another one; what rotated queries and keys say of each other depends on
    how far apart they are, and on which is first."""
    model = random_model(script)
    ids = torch.randint(len(CHARS), (1, 64))
    shuffled = torch.cat((ids[:, :-1].flip(1), ids[:, -1:]), 1)
    assert (model(ids) - model(shuffled))[0, -1].abs().max() > 1e-3
    q, k = torch.randn(2, 256, 8)
    rope = model.rope
    scores = script.rotate(q[:1].expand(256, 8), rope) @ script.rotate(k[:1].expand(256, 8), rope).T
    assert torch.allclose(scores.diagonal(3), scores.diagonal(3)[:1].expand(253), atol=1e-4)
    assert scores.diagonal(3)[0] != pytest.approx(scores.diagonal(-3)[0].item(), abs=1e-3)


def test_token_dropout_blanks_whole_characters_and_in_training_alone(script, monkeypatch):
    """What the first block reads: a quarter of the characters as zeros, others in each row, and
    the rest as they are when the model writes."""
    monkeypatch.setattr(script, "token_dropout", 0.25)
    model, inputs = random_model(script), []
    model.blocks[0].register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    ids = torch.randint(len(CHARS), (16, 256))
    model(ids)
    model.train()(ids)
    writing, training = inputs
    blank = (training == 0).all(-1)
    assert 0.2 < blank.float().mean() < 0.3 and not (blank == blank[0]).all()
    assert torch.allclose(training[~blank], writing[~blank], atol=1e-5)
    assert not (writing == 0).all(-1).any()


@pytest.mark.parametrize("branch", ["proj", "down"])
def test_a_fresh_block_adds_nothing_and_dropout_zeroes_half(script, branch, monkeypatch):
    """Half of what one branch adds; the other one is fresh."""
    monkeypatch.setattr(script, "dropout", 0.5)
    model = script.Model(script.CharTokenizer(CHARS), "")
    block, x, rope = model.blocks[0].train(), torch.randn(8, 64, 16), model.rope[:, :64]
    args = (x, rope, None) if script is gpt else (x, rope)
    assert torch.equal(block(*args), x)
    torch.nn.init.normal_(getattr(block, branch).weight)
    assert 0.4 < (block(*args) == x).float().mean() < 0.6
    assert (block.eval()(*args) == x).float().mean() < 0.2  # of ReLU's zeros at most


@pytest.mark.parametrize("given", [1, 256, 700])
def test_gpt_writes_by_cached_logits_that_equal_uncached_ones(given):
    """The most likely character at temperature 0; also where the full window gives way to its last
    half."""
    model, reads = random_model(gpt), []
    model.register_forward_hook(lambda _, args, logits: reads.append((args[0], logits[0, -1])))
    prompt = "".join(CHARS[i] for i in torch.randint(len(CHARS), (given,)))
    yields = list(gpt.generate(model, prompt, length=300, temp=0))
    assert [len(text) for text, _ in yields] == [final for _, final in yields]
    ids = model.tokenizer.encode(yields[-1][0])
    assert len(reads) == len(yields) == 300 and len(ids) == given + 300
    window, fresh = given if given <= 256 else 128, True
    for end, (read, logits) in enumerate(list(reads), given):
        assert read.size(1) == (window if fresh else 1)
        uncached = model(ids[None, end - window : end])[0, -1]
        assert torch.allclose(logits, uncached, atol=1e-3), (end, window)
        assert ids[end] == logits.argmax()
        fresh = window == 256
        window = 128 if fresh else window + 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.skipif(torch.accelerator.is_available(), reason="is about the processor")
def test_a_model_is_loaded_in_what_the_processor_computes_in(script, dtype, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: dtype == torch.bfloat16)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: True)  # as ROCm without a GPU
    original = random_model(script)
    path = checkpoint(original, tmp_path / "weights.pt")
    model, exact = script.load(path), script.load(path, torch.float32)
    dtypes = [{weight.dtype for weight in m.parameters()} for m in (model, exact)]
    assert dtypes == [{dtype}, {torch.float32}] and not model.training
    assert model.prompt == original.prompt and model.tokenizer.chars == original.tokenizer.chars
    ids = torch.randint(len(CHARS), (4, 256))
    logits = model(ids)
    assert logits.dtype == torch.float32
    assert torch.corrcoef(torch.stack((logits, original(ids))).flatten(1))[0, 1] > 0.97


def test_a_save_that_fails_half_way_leaves_what_was_there(script, tmp_path, monkeypatch):
    path, write_bytes = tmp_path / "weights.pt", Path.write_bytes
    script.save({"a": 1}, path)

    def full(path, contents):
        write_bytes(path, contents[: len(contents) // 2])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space left on device"):
        script.save({"a": 2}, path)
    assert torch.load(path, weights_only=True) == {"a": 1}
