"""A GPT on Tiny Shakespeare: it writes from left to right, one character per forward pass.

RoPE, RMSNorm without weights, QK-norm, ReLU^2 MLP, no biases. gpt.py and diffusion.py differ in
five places, so that `diff gpt.py diffusion.py` is the lesson; all else stands in both on purpose.
"""

import argparse
import hashlib
import http.client
import math
import signal
import sys
import time
import urllib.request
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

# ---- hyperparameters: read when used, so that a caller may set them on the module --------------
batch_size = 64  # sequences per iteration
block_size = 256  # characters the model sees at once
n_layer, n_head, n_embd = 6, 6, 384
dropout = 0.2
max_iters = 600
learning_rate, warmup_iters, weight_decay, eval_interval = 0.01, 100, 0.1, 250

name = Path(__file__).stem
data_path = Path(__file__).with_name("data.txt")
weights_path = Path(__file__).parent / "weights" / f"{name}.pt"
data_url = "https://github.com/nathan-barry/tiny-diffusion/releases/download/v2.0.0/data.txt"
data_sha256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"


# ---- data --------------------------------------------------------------------------------------
def read_splits(path):
    """The first 90% of a text, to train on, and the rest; fetches data.txt. OSError, ValueError."""
    path = Path(path)
    if path == data_path and not path.exists():
        try:
            content = urllib.request.urlopen(data_url, timeout=30).read()
            if hashlib.sha256(content).hexdigest() != data_sha256:
                raise OSError("not the text expected")
        except (OSError, http.client.HTTPException) as error:
            raise OSError(f"cannot fetch {data_url} ({error}): save it as {path}") from None
        (partial := path.with_suffix(".partial")).write_bytes(content)
        partial.replace(path)
    text = path.read_text(encoding="utf-8")
    split = int(0.9 * len(text))
    if len(text) - split <= block_size:
        raise ValueError(f"{path} is too short: it needs {10 * block_size + 1} characters")
    return text[:split], text[split:]


class CharTokenizer:
    """One character, one token. "_" is reserved in both scripts: it stands for a hidden one."""

    def __init__(self, chars):
        if "_" in chars:
            raise ValueError("the text holds '_', which is reserved: replace it")
        self.chars = "".join(sorted(set(chars)))
        self.vocab = self.chars
        self.table = np.full(sys.maxunicode + 1, -1, np.int64)  # code point -> id
        self.table[[ord(c) for c in self.vocab]] = range(len(self.vocab))

    def encode(self, text):
        """str of T characters -> LongTensor (T,); ValueError names a character it does not know."""
        ids = self.table[np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)]
        if (ids < 0).any():
            raise ValueError(f"unknown character {text[(ids < 0).argmax()]!r}: leave it out")
        return torch.from_numpy(ids)

    def decode(self, ids):
        return "".join(self.vocab[i] for i in ids.tolist())


# ---- model -------------------------------------------------------------------------------------
def norm(x):
    return F.rms_norm(x, (x.size(-1),))


def rotate(x, rope):
    """RoPE (arXiv 2104.09864): turns pairs in x (..., T, D) by angles that grow along T."""
    (a, b), (cos, sin) = x.chunk(2, -1), rope
    return torch.cat((a * cos - b * sin, a * sin + b * cos), -1).to(x.dtype)


class Block(nn.Module):  # attention, then the MLP: each reads the normed stream and adds to it
    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(n_embd, 3 * n_embd, bias=False)
        self.proj = nn.Linear(n_embd, n_embd, bias=False)
        self.up = nn.Linear(n_embd, 4 * n_embd, bias=False)
        self.down = nn.Linear(4 * n_embd, n_embd, bias=False)
        nn.init.zeros_(self.proj.weight)  # so that a block starts as the identity
        nn.init.zeros_(self.down.weight)

    def forward(self, x, rope, cache):
        B, T, _ = x.shape
        qkv = self.qkv(norm(x)).view(B, T, 3, n_head, -1).permute(2, 0, 3, 1, 4)
        (q, k), v = rotate(norm(qkv[:2]), rope), qkv[2]  # each (B, n_head, T, D)
        if cache is not None:
            cache[..., -T:, :] = torch.stack((k, v))
            k, v = cache
        y = F.scaled_dot_product_attention(q, k, v, is_causal=k.size(2) == T)
        x = x + F.dropout(self.proj(y.transpose(1, 2).flatten(2)), dropout, self.training)
        y = F.relu(self.up(norm(x))).square()
        return x + F.dropout(self.down(y), dropout, self.training)


class Model(nn.Module):
    """The transformer, with the tokenizer it reads by and the prompt it starts from by default."""

    def __init__(self, tokenizer, prompt):
        super().__init__()
        self.tokenizer, self.prompt = tokenizer, prompt
        self.embed = nn.Embedding(len(tokenizer.vocab), n_embd)
        self.blocks = nn.ModuleList(Block() for _ in range(n_layer))
        self.head = nn.Linear(n_embd, len(tokenizer.chars), bias=False)
        frequency = 10000 ** -torch.linspace(0, 1, n_embd // n_head // 2)
        angle = torch.outer(torch.arange(block_size), frequency)  # (T, D / 2)
        self.register_buffer("rope", torch.stack((angle.cos(), angle.sin())), persistent=False)

    def forward(self, ids, cache=None):  # cache (n_layer, 2, B, n_head, S, D), its end is for ids
        """ids (B, T) -> logits (B, T, V), float32."""
        start = 0 if cache is None else cache.size(-2) - ids.size(1)
        rope = self.rope[:, start : start + ids.size(1)]
        x = norm(self.embed(ids))
        for i, block in enumerate(self.blocks):
            x = block(x, rope, None if cache is None else cache[i])
        return self.head(norm(x)).float()


def best_device():
    """The fastest device here, and bfloat16 where its hardware computes in it, else float32."""
    device = torch.accelerator.current_accelerator(True) or torch.device("cpu")
    cpu = device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()
    return device, torch.bfloat16 if cpu or torch.cuda.is_bf16_supported(False) else torch.float32


def load(path):
    """The Model in a checkpoint, in eval mode on the best device; ValueError says what to do."""
    problem = "damaged or of another script" if Path(path).exists() else "missing"
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        model = Model(CharTokenizer(checkpoint["chars"]), checkpoint["prompt"])
        model.load_state_dict(checkpoint["weights"])
    except Exception:  # a damaged file can fail in any way
        raise ValueError(f"{path} is {problem}: make it with `{name}.py --train`") from None
    return model.to(*best_device()).eval()


# ---- generation --------------------------------------------------------------------------------
def draw(logits, temp):
    """logits (..., V) -> characters (...), by Gumbel-max: temp scales the noise, 0 is argmax."""
    return (logits - temp * torch.empty_like(logits).exponential_().log()).argmax(-1)


@torch.inference_mode()
def generate(model, prompt=None, length=2000, temp=0.8):
    """Writes length characters behind prompt (default: the model's).

    Yields the whole text so far after every pass; ValueError if the prompt cannot be read.
    """
    text = model.prompt if prompt is None else prompt
    if not text:
        raise ValueError("the prompt is empty: give a character to start from")
    ids = model.tokenizer.encode(text).to(model.rope.device)
    start = read = 0  # the cache holds the keys and values, in this order, of ids[start:read]
    cache = model.head.weight.new_zeros(n_layer, 2, 1, n_head, block_size, n_embd // n_head)
    for _ in range(length):
        if len(ids) - start > block_size:  # full: read the last half anew, from position 0
            start = read = len(ids) - block_size // 2
        logits = model(ids[None, read:], cache[..., : len(ids) - start, :])
        read, ids = len(ids), torch.cat((ids, draw(logits[:, -1], temp)))
        text += model.tokenizer.decode(ids[-1:])
        yield text


# ---- training and evaluation -------------------------------------------------------------------
def loss_fn(model, batch, given=1):
    """Nats per character of batch (B, T) behind the given first ones: mean cross-entropy."""
    inputs, targets = batch[:, :-1], batch[:, 1:]
    nats = F.cross_entropy(model(inputs).transpose(1, 2), targets, reduction="none")
    return nats[:, given - 1 :].mean()


@torch.no_grad()
def evaluate(model, text):
    """Nats per character over all consecutive windows of block_size characters."""
    training, device = model.training, model.rope.device
    model.eval()
    windows = model.tokenizer.encode(text).unfold(0, block_size + 1, block_size)
    nats = [loss_fn(model, batch.to(device)) * len(batch) for batch in windows.split(16)]
    model.train(training)
    return sum(nats).item() / len(windows)


@torch.no_grad()
def report(model, text):
    """Prints nats and bits per character: over all windows, and of writing 240 after 16 given."""
    windows = model.tokenizer.encode(text).to(model.rope.device).unfold(0, block_size, 240)
    nats = torch.stack([loss_fn(model, window[None], given=16) for window in windows])
    error = f"{nats.std() / len(nats) ** 0.5:.4f}"
    rows = ("all windows", evaluate(model, text), "", ""), ("240 after 16", nats.mean(), error, 240)
    print(f"{f'per character, {len(nats)} windows':32}    nats      +-    bits  passes")
    for label, mean, error, passes in rows:
        print(f"{label:32}{mean:8.4f}{error:>8}{mean / math.log(2):8.4f}{passes:>8}")


def train(data, weights):
    """Trains on the file data; the file weights holds the best validated so far, also on Ctrl-C."""
    train_text, val_text = read_splits(data)
    tokenizer, weights = CharTokenizer(train_text + val_text), Path(weights)
    device, dtype = best_device()
    weights.parent.mkdir(parents=True, exist_ok=True)
    model = Model(tokenizer, train_text[:16]).to(device)
    matrices, others = model.blocks.parameters(), (model.embed.weight, model.head.weight)
    muon = torch.optim.Muon(matrices, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW(others, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    autocast = torch.autocast(device.type, dtype, enabled=dtype == torch.bfloat16)
    step = torch.compile(loss_fn) if device.type == "cuda" else loss_fn
    windows = tokenizer.encode(train_text).to(device).unfold(0, block_size + 1, 1)  # a view
    best, saved = math.inf, "nothing saved"
    try:
        for i in (bar := tqdm(range(1, max_iters + 1), name)):
            for group in muon.param_groups + adamw.param_groups:
                group["lr"] = learning_rate * min(i / warmup_iters, 1 - (i - 1) / max_iters)
            batch = windows[torch.randint(len(windows), (batch_size,), device=device)]
            model.train().zero_grad()
            try:
                with autocast:
                    loss = step(model, batch)
            except torch._dynamo.exc.TorchDynamoException as error:
                bar.write(f"going on without torch.compile: {str(error)[:80]!r}")
                step = loss_fn
                continue
            loss.backward()
            muon.step()
            adamw.step()
            if i % 10 == 0:
                bar.set_postfix(loss=f"{loss.item():.3f}", best=f"{best:.4f}")
            if i % eval_interval == 0 or i == max_iters:
                model.eval()
                with autocast, torch.random.fork_rng():
                    val = evaluate(model, val_text)
                    *_, sample = generate(model, length=200)
                bar.write(f"{sample}\n\niteration {i}: {val:.4f} nats per character\n")
                if val < best:
                    best = val
                    saved = f"{weights} holds iteration {i}: {val:.4f} nats per character"
                    state = {key: value.bfloat16() for key, value in model.state_dict().items()}
                    state = {"chars": tokenizer.chars, "prompt": model.prompt, "weights": state}
                    torch.save(state, partial := weights.with_suffix(".partial"))
                    partial.replace(weights)
    finally:
        print(saved, file=sys.stderr)


# ---- command line ------------------------------------------------------------------------------
def write(model, prompt, length, *sampling):
    """Prints the text up to its first hole as it grows; the figures go to standard error."""
    text = model.prompt if prompt is None else prompt
    total, shown, passes, start = length + text.count("_"), 0, 0, time.perf_counter()
    texts = generate(model, prompt, length, *sampling)
    for text in tqdm(texts, unit=" passes", disable=sys.stdout.isatty() or None):
        done = text.partition("_")[0]
        print(done[shown:], end="", flush=True)
        shown, passes = len(done), passes + 1
    print(text[shown:])
    figures = f"{total} characters, {passes} passes, {total / max(passes, 1):.2f} per pass"
    print(f"{figures}, {time.perf_counter() - start:.1f} s", file=sys.stderr)


def main(argv=None):
    """Writes, trains or scores; bad input ends with one line and exit code 2, Ctrl-C with 130."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.error = lambda message: sys.exit(print(f"{name}.py: {message}", file=sys.stderr) or 2)
    add = parser.add_argument
    add("--train", action="store_true", help="train, and keep the weights that validate best")
    add("--eval", action="store_true", help="score the weights on the validation text")
    add("--data", default=data_path, metavar="FILE", help="your own text, instead of data.txt")
    add("--weights", default=weights_path, metavar="FILE", help=f"instead of weights/{name}.pt")
    add("--prompt", metavar="TEXT", help="the text to start from")
    add("--length", default=2000, type=int, metavar="N", help="characters to write (2000)")
    add("--temp", default=0.8, type=float, metavar="T", help="temperature, 0 = greedy (0.8)")
    add("--seed", default=1337, type=int, metavar="N", help="of the random numbers (1337)")
    args = parser.parse_args(argv)
    if not (0 <= args.length < 1e9 and 0 <= args.temp < math.inf and 0 <= args.seed < 2**63):
        parser.error("--length, --temp and --seed take numbers from 0 up")
    try:
        model = None if args.train else load(args.weights)
        torch.manual_seed(args.seed)
        if args.train:
            train(args.data, args.weights)
        elif args.eval:
            report(model, read_splits(args.data)[1])
        else:
            write(model, args.prompt, args.length, args.temp)
    except (OSError, ValueError) as error:
        parser.error(error)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    if hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` ends the program quietly
    main()
