"""Tokenizer, attention, cache."""

import pytest
import torch
from conftest import CHARS, checkpoint, random_model

import diffusion
import gpt


def test_decoding_undoes_encoding(script):
    text = "naïve 日本\n𝄞 text"
    tokenizer = script.CharTokenizer(text)
    ids = tokenizer.encode(text)
    assert ids.dtype == torch.int64 and ids.shape == (len(text),)
    assert ids.max() == len(set(text)) - 1 and tokenizer.decode(ids) == text


@pytest.mark.parametrize("unknown", ["Z", "é", "\ud800", "\U0010ffff"])
def test_an_unknown_character_is_named(script, unknown):
    with pytest.raises(ValueError, match="unknown character") as error:
        script.CharTokenizer(CHARS).encode(f"ab{unknown}c")
    assert repr(unknown) in str(error.value)


def test_the_mask_is_read_but_never_predicted():
    with pytest.raises(ValueError, match="_"):
        gpt.CharTokenizer(CHARS).encode("a_b")
    tokenizer = diffusion.CharTokenizer(CHARS)
    assert tokenizer.decode(tokenizer.encode("a_b")) == "a_b"
    logits = random_model(diffusion)(tokenizer.encode("a_b")[None])
    assert logits.shape == (1, 3, len(CHARS)) and tokenizer.mask == len(CHARS)


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


def test_token_dropout_hides_whole_characters_and_in_training_alone(script, monkeypatch):
    """What the first block reads: a quarter of the characters as zeros, others in each row, and
    the rest as they are when the model writes."""
    monkeypatch.setattr(script, "token_dropout", 0.25)
    model, inputs = random_model(script), []
    model.blocks[0].register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    ids = torch.randint(len(CHARS), (16, 256))
    model(ids)
    model.train()(ids)
    writing, training = inputs
    hidden = (training == 0).all(-1)
    assert 0.2 < hidden.float().mean() < 0.3 and not (hidden == hidden[0]).all()
    assert torch.allclose(training[~hidden], writing[~hidden], atol=1e-5)
    assert not (writing == 0).all(-1).any()


def test_order_matters(script):
    """Without positions a reversed past would give the last place the same logits."""
    model = random_model(script)
    ids = torch.randint(len(CHARS), (1, 64))
    shuffled = torch.cat((ids[:, :-1].flip(1), ids[:, -1:]), 1)
    assert (model(ids) - model(shuffled))[0, -1].abs().max() > 1e-3


@pytest.mark.parametrize("given", [1, 100, 255, 256, 257, 700])
def test_cached_logits_equal_uncached_ones(given):
    """Also where the full window gives way to its last half, which happens twice here."""
    model, reads = random_model(gpt), []
    model.register_forward_hook(lambda _, args, logits: reads.append((args[0], logits[0, -1])))
    prompt = "".join(CHARS[i] for i in torch.randint(len(CHARS), (given,)))
    *_, text = gpt.generate(model, prompt, length=400)
    ids = model.tokenizer.encode(text)
    assert len(reads) == 400
    window, fresh = given if given <= 256 else 128, True
    for end, (read, logits) in enumerate(list(reads), given):
        assert read.size(1) == (window if fresh else 1)
        uncached = model(ids[None, end - window : end])[0, -1]
        assert torch.allclose(logits, uncached, atol=1e-3), (end, window)
        fresh = window == 256
        window = 128 if fresh else window + 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.skipif(torch.accelerator.is_available(), reason="is about the processor")
def test_a_processor_without_bfloat16_writes_in_float32(script, dtype, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: dtype == torch.bfloat16)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: True)  # as ROCm without a GPU
    original = random_model(script)
    model = script.load(checkpoint(original, tmp_path / "weights.pt"))
    assert {weight.dtype for weight in model.parameters()} == {dtype}
    ids = torch.randint(len(CHARS), (4, 256))
    logits = model(ids)
    assert logits.dtype == torch.float32
    assert torch.corrcoef(torch.stack((logits, original(ids))).flatten(1))[0, 1] > 0.97
    *_, text = script.generate(model, length=400)
    assert len(text) == 16 + 400
