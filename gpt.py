"""A GPT on Tiny Shakespeare: it writes from left to right, one character per forward pass.

RoPE, RMSNorm without weights, QK-norm, ReLU^2 MLP, no biases. gpt.py and diffusion.py are one file
but for five changes, marked [1] to [5] in both: `diff gpt.py diffusion.py` is the lesson.
"""

import argparse
import math
import signal
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

# ---- hyperparameters: read when used, so that a caller may set them on the module --------------
batch_size = 64  # sequences per iteration
block_size = 256  # characters the model sees at once
n_layer, n_head, n_embd = 6, 6, 384
dropout, token_dropout, weight_decay = 0.35, 0.1, 0.6  # [4] each epoch asks the same questions:
max_iters = 800  # [4] without noise and an early end it would memorise them
learning_rate = 0.005
warmup_iters, eval_interval = 100, 250
name = Path(__file__).stem
data_path = Path(__file__).with_name("data.txt")
weights_path = Path(__file__).parent / "weights" / f"{name}.pt"
data_url = "https://github.com/nathan-barry/tiny-diffusion/releases/download/v2.0.0/data.txt"
data_sha256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"


# ---- data --------------------------------------------------------------------------------------
def read_splits(path):
    """The first 90% of a text, to train on, and the rest; fetches data.txt. OSError, ValueError."""
    if path == data_path and not path.exists():
        try:
            torch.hub.download_url_to_file(data_url, path, data_sha256, progress=False)
        except Exception as error:  # a download can fail in any way
            raise OSError(f"cannot fetch {data_url} ({error}): save it as {path}") from None
    text = path.read_text(encoding="utf-8")
    split = int(0.9 * len(text))
    if len(text) - split <= block_size:
        raise ValueError(f"{path} is too short: it needs {10 * block_size + 1} characters")
    return text[:split], text[split:]


class CharTokenizer:  # one character, one token; "_" is reserved: it stands for a hidden one
    def __init__(self, chars):
        if "_" in chars:
            raise ValueError("the text holds '_', which is reserved: replace it")
        self.chars = "".join(sorted(set(chars)))
        self.vocab = self.chars  # [1]
        self.ids = {char: i for i, char in enumerate(self.vocab)}

    def encode(self, text):
        """str of T characters -> LongTensor (T,); ValueError names a character it does not know."""
        if unknown := set(text) - self.ids.keys():
            raise ValueError(f"unknown character {min(unknown)!r}: leave it out")
        return torch.tensor([self.ids[char] for char in text], dtype=torch.long)

    def decode(self, ids):
        return "".join([self.vocab[i] for i in ids.tolist()])


# ---- model -------------------------------------------------------------------------------------
def norm(x):
    return F.rms_norm(x, (x.size(-1),))


def rotate(x, rope):  # RoPE (arXiv 2104.09864): turns pairs in x (..., T, D) by growing angles
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

    def forward(self, x, rope, cache, start):  # [2]
        B, T, _ = x.shape
        qkv = self.qkv(norm(x)).view(B, T, 3, n_head, -1).permute(2, 0, 3, 1, 4)
        q, k = rotate(norm(qkv[:2]), rope)  # each (B, n_head, T, D)
        v = qkv[2]
        if cache is not None:  # [2] the keys and values of what was read before stay as they are
            cache[..., start : start + T, :] = torch.stack((k, v))
            k, v = cache[..., : start + T, :]
        y = F.scaled_dot_product_attention(q, k, v, is_causal=T > 1)  # [2] one sees all before it
        x = x + F.dropout(self.proj(y.transpose(1, 2).flatten(2)), dropout, self.training)
        y = F.relu(self.up(norm(x))).square()
        return x + F.dropout(self.down(y), dropout, self.training)


class Model(nn.Module):  # with the tokenizer it reads by, and the prompt it starts from by default
    def __init__(self, tokenizer, prompt):
        super().__init__()
        self.tokenizer, self.prompt = tokenizer, prompt
        self.header = {"chars": tokenizer.chars, "prompt": prompt, "n_layer": n_layer}
        self.header |= {"n_head": n_head, "n_embd": n_embd, "block_size": block_size}
        self.embed = nn.Embedding(len(tokenizer.vocab), n_embd)
        self.blocks = nn.ModuleList(Block() for _ in range(n_layer))
        self.head = nn.Linear(n_embd, len(tokenizer.chars), bias=False)
        frequency = 10000 ** -torch.linspace(0, 1, n_embd // n_head // 2)
        angle = torch.outer(torch.arange(block_size), frequency)  # (T, D / 2)
        self.register_buffer("rope", torch.stack((angle.cos(), angle.sin())), persistent=False)

    def forward(self, ids, cache=None, start=0):  # [2] a cache (n_layer, 2, B, n_head, S, D)
        """ids (B, T) -> logits (B, T, V), float32."""
        rope = self.rope[:, start : start + ids.size(1)]  # [2]
        x = norm(F.dropout1d(self.embed(ids), token_dropout, self.training))  # whole characters
        for i, block in enumerate(self.blocks):  # [2]
            x = block(x, rope, None if cache is None else cache[i], start)  # [2]
        return self.head(norm(x)).float()


def best_device():
    """The fastest device here, and bfloat16 where its hardware computes in it, else float32."""
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    cuda = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    cpu = device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()
    return device, torch.bfloat16 if cuda or cpu else torch.float32


def load(path, dtype=None):
    """The Model in a checkpoint, in eval mode on the best device; ValueError says what to do."""
    device, fastest_dtype = best_device()
    problem = "damaged, of another script or of other sizes" if Path(path).exists() else "missing"
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        model = Model(CharTokenizer(checkpoint["chars"]), checkpoint["prompt"])
        if not model.header.items() <= checkpoint.items():
            raise ValueError("other sizes")
        model.load_state_dict(checkpoint["weights"])
    except Exception:  # a damaged file can fail in any way
        raise ValueError(f"{path} is {problem}: make it with `{name}.py --train`") from None
    return model.to(device, dtype or fastest_dtype).eval()


# ---- generation --------------------------------------------------------------------------------
def draw(logits, temp):
    """logits (..., V) -> characters (...), by Gumbel-max: temp scales the noise, 0 is argmax."""
    return (logits - temp * torch.empty_like(logits).exponential_().log()).argmax(-1)


@torch.inference_mode()
def generate(model, prompt=None, length=2000, temp=0.8):  # [3]
    """Writes length characters behind prompt (default: the model's); yields the whole text so far
    after every pass. ValueError if the prompt cannot be read."""
    text = model.prompt if prompt is None else prompt
    if not text:  # [3] diffusion can start from nothing
        raise ValueError("the prompt is empty: give a character to start from")
    ids = model.tokenizer.encode(text)  # [3]
    cache = model.head.weight.new_zeros(n_layer, 2, 1, n_head, block_size, n_embd // n_head)  # [2]
    start = read = 0  # [2] the cache holds the keys and values of ids[start:read]
    for _ in range(length):  # [3]
        if len(ids) - start > block_size:  # full: read the last half anew, from position 0
            start = read = len(ids) - block_size // 2
        logits = model(ids[None, read:].to(model.rope.device), cache, read - start)[0, -1].cpu()
        read, ids = len(ids), torch.cat((ids, draw(logits[None], temp)))
        yield model.tokenizer.decode(ids)


# ---- training and evaluation -------------------------------------------------------------------
def loss_fn(model, batch):
    """Nats per character of each row of batch (B, T + 1), but for its first character: (B,)."""
    inputs, targets = batch[:, :-1], batch[:, 1:]  # [4] the next character is asked for
    nats = F.cross_entropy(model(inputs).transpose(1, 2), targets, reduction="none")
    return nats.mean(1)  # [5]


@torch.no_grad()
def evaluate(model, text):  # [4]
    """Nats per character over all consecutive windows of block_size characters."""
    training = model.training
    model.eval()
    windows = model.tokenizer.encode(text).unfold(0, block_size + 1, block_size)
    nats = [loss_fn(model, batch.to(model.rope.device)).sum() for batch in windows.split(16)]
    model.train(training)
    return sum(nats).item() / len(windows)


def train(data, weights, iters=None, batch=None, resume=False):
    """Trains on the file data; weights is the file that holds what validated best so far."""
    train_text, val_text = read_splits(Path(data))
    iters, batch = iters or max_iters, batch or batch_size
    weights = Path(weights)
    weights.parent.mkdir(parents=True, exist_ok=True)
    partial, state_path = weights.with_suffix(".partial"), weights.with_suffix(".resume")
    device, dtype = best_device()
    autocast = torch.autocast(device.type, dtype, enabled=dtype == torch.bfloat16)
    model = Model(CharTokenizer(train_text + val_text), train_text[:16]).to(device)
    if resume:
        model = load(weights, torch.float32)
    ids = model.tokenizer.encode(train_text).to(device)
    matrices, others = model.blocks.parameters(), (model.embed.weight, model.head.weight)
    muon = torch.optim.Muon(matrices, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW(others, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    done, best, saved = 0, math.inf, ""
    if resume and state_path.exists():
        state = torch.load(state_path, map_location="cpu", weights_only=True)
        for part in (model, muon, adamw):
            part.load_state_dict(state.pop(0))
        random, done, iters, batch, best, saved = state
        torch.set_rng_state(random)
    compiled = torch.compile(model) if device.type == "cuda" else model
    try:
        autocast(compiled)(ids.new_zeros(batch, block_size))
    except Exception as error:  # it can fail in any way: no compiler, no Triton
        print(f"going on without torch.compile: {error!r:.100}", file=sys.stderr)
        compiled = model
    try:
        for i in (bar := tqdm(range(done + 1, iters + 1), name, initial=done, total=iters)):
            for group in muon.param_groups + adamw.param_groups:
                group["lr"] = learning_rate * min(i / warmup_iters, 1 - (i - 1) / iters)
            starts = torch.randint(len(ids) - block_size, (batch, 1))
            rows = ids[(starts + torch.arange(block_size + 1)).to(device)]  # (batch, T + 1)
            model.train().zero_grad()
            with autocast:
                loss = loss_fn(compiled, rows).mean()
            loss.backward()
            muon.step()
            adamw.step()
            if i % 10 == 0:
                bar.set_postfix(loss=f"{loss.item():.3f}", best=f"{best:.4f}")
            if i % eval_interval == 0 or i == iters:
                with autocast, torch.random.fork_rng(devices=[]):
                    val = evaluate(model, val_text)  # [4]
                    sample = list(generate(model.eval(), length=200))[-1]
                if val < best:
                    if weights.exists() and not saved:
                        weights.replace(weights.with_suffix(".old"))
                    state = {key: value.bfloat16() for key, value in model.state_dict().items()}
                    torch.save({**model.header, "weights": state}, partial)
                    partial.replace(weights)
                    saved = f"{weights} holds iteration {i}: {val:.4f} nats per character"
                    best = val
                state = [part.state_dict() for part in (model, muon, adamw)]
                state += [torch.get_rng_state(), i, iters, batch, best, saved]
                torch.save(state, partial)
                partial.replace(state_path)
                bar.write(f"{sample}\n\niteration {i}: {val:.4f} nats per character\n")
        state_path.unlink()
    finally:
        print(saved or "nothing saved", file=sys.stderr)


# ---- command line ------------------------------------------------------------------------------
def write(model, prompt, length, *sampling):
    """Prints the text as it settles; the figures go to standard error."""
    text = model.prompt if prompt is None else prompt
    total, shown, passes, start = length + text.count("_"), 0, 0, time.perf_counter()
    bar = tqdm(total=total, unit=" characters", disable=sys.stdout.isatty() or None)
    for longer in generate(model, prompt, length, *sampling):
        if len(longer) > len(text) and "_" not in text:  # all that was there is settled
            print(text[shown:], end="", flush=True)
            shown = len(text)
        bar.update(len(longer.replace("_", "")) - len(text.replace("_", "")))
        text, passes = longer, passes + 1
    bar.close()
    print(text[shown:])
    figures = f"{total} characters, {passes} passes, {total / max(passes, 1):.2f} per pass"
    print(f"{figures}, {time.perf_counter() - start:.1f} s", file=sys.stderr)


def main(argv=None):
    """Writes, trains or scores; bad input ends with one line and exit code 2, Ctrl-C with 130."""
    parser = argparse.ArgumentParser(f"{name}.py", "%(prog)s [options]", __doc__.splitlines()[0])
    add = parser.add_argument
    add("--train", action="store_true", help="train, and keep the weights that validate best")
    add("--iters", type=int, metavar="N", help=f"iterations of training ({max_iters})")
    add("--batch", type=int, metavar="N", help=f"sequences per iteration ({batch_size})")
    add("--resume", action="store_true", help="go on with the last training, or from the weights")
    add("--eval", action="store_true", help="score the weights on the validation text")
    add("--data", default=data_path, type=Path, metavar="FILE", help="your own text")
    add("--weights", default=weights_path, metavar="FILE", help=f"instead of weights/{name}.pt")
    add("--prompt", metavar="TEXT", help="the text to start from")
    add("--length", default=2000, type=int, metavar="N", help="characters to write (2000)")
    add("--temp", default=0.8, type=float, metavar="T", help="temperature, 0 = greedy (0.8)")
    add("--seed", default=1337, type=int, metavar="N", help="random seed (1337)")
    args = parser.parse_args(argv)
    for key, least in dict(iters=1, batch=1, length=0, temp=0, seed=0).items():  # [3]
        value = vars(args)[key]
        if value is not None and not least <= value < 2**31:
            parser.error(f"--{key} takes a number from {least} up, below 2**31")
    try:
        model = None if args.train else load(args.weights)
        torch.manual_seed(args.seed)
        if args.train:
            train(args.data, args.weights, args.iters, args.batch, args.resume)
        elif args.eval:
            nats = evaluate(model, read_splits(args.data)[1])
            print(f"{nats:.4f} nats per character, {nats / math.log(2):.4f} bits")
        else:
            write(model, args.prompt, args.length, args.temp)  # [3]
    except (OSError, ValueError) as error:
        parser.exit(2, f"{name}.py: {error}\n")
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # a character that the console lacks ends nothing
    if hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` ends the program quietly
    main()
