"""A GPT on Tiny Shakespeare: it writes from left to right, one character per forward pass.

gpt.py and diffusion.py are one file but for five changes, marked [1] to [5] in both. Run
`diff gpt.py diffusion.py`: that is the lesson.

[1] vocabulary: GPT has the characters; diffusion adds a mask, "_", that is read, never predicted
[2] attention: GPT looks back, so that keys and values can be cached; diffusion looks both ways
[3] generation: GPT writes one character per pass; diffusion writes many, and looks a second time
[4] training: GPT learns to predict the next character; diffusion learns to restore hidden ones
[5] loss: GPT counts all characters; diffusion counts the hidden ones

The model: RoPE, RMSNorm without weights, QK-norm, ReLU^2 MLP, no biases.
"""

import argparse
import io
import math
import os
import signal
import sys
import time
import zlib
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

# ---- hyperparameters: read when used, so that a caller may set them on the module --------------
block_size = 256  # characters in the window, which is all that the model sees
context = 16  # characters of it that are given when the others are scored
n_layer = 6  # layers
n_head = 6  # attention heads in each
n_embd = 384  # numbers per character between layers
learning_rate = 0.005  # at the peak
warmup_iters = 100  # iterations to the peak
eval_interval = 500  # iterations between validations
token_dropout = 0.1  # share of the characters it reads that are blanked, against memorising
weight_decay = 0.6  # of all weights, against memorising
batch_size = 32  # [4] rows of block_size characters per iteration
dropout = 0.35  # [4] share of a layer's output that is zeroed: each epoch asks the same again
max_iters = 2400  # [4] iterations: with more it memorises

script_path = Path(__file__).resolve()
name = script_path.stem
data_path = script_path.with_name("data.txt")
weights_path = script_path.parent / "weights" / f"{name}.pt"
data_url = "https://github.com/nathan-barry/tiny-diffusion/releases/download/v2.0.0/data.txt"
data_sha256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"


# ---- data --------------------------------------------------------------------------------------
def read_splits(path):
    """A text to train on, and the rest to validate on: its last tenth, or its last 120,000
    characters if that is less. Fetches data.txt. OSError, ValueError."""
    if path == data_path and not path.exists():
        try:
            torch.hub.download_url_to_file(data_url, path, data_sha256, progress=False)
        except Exception as error:  # a download can fail in any way
            raise OSError(f"cannot fetch {data_url} ({error}): save it as {path}") from None
    try:
        text = path.read_text(encoding="utf-8-sig")  # -sig: without a byte-order mark
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not UTF-8: save it in that encoding") from None
    if "_" in text:
        raise ValueError(f"{path} holds '_', which is reserved: replace it")
    split = max(int(0.9 * len(text)), len(text) - 120_000)
    if len(text) - split <= block_size:
        raise ValueError(f"{path} is too short: it needs {10 * block_size + 1} characters")
    return text[:split], text[split:]


class CharTokenizer:  # one character, one token; "_" is reserved for the mask
    def __init__(self, text):
        self.chars = "".join(sorted(set(text)))
        self.vocab = self.chars  # [1]
        self.ids = {char: i for i, char in enumerate(self.vocab)}

    def encode(self, text):
        """str of T characters -> LongTensor (T,); ValueError names a character it does not know."""
        try:
            return torch.tensor([self.ids[char] for char in text], dtype=torch.long)
        except KeyError as unknown:
            raise ValueError(f"unknown character {unknown}: leave it out") from None

    def decode(self, ids):
        """LongTensor (T,) -> str of T characters."""
        return "".join([self.vocab[i] for i in ids.tolist()])


# ---- model -------------------------------------------------------------------------------------
def norm(x):
    return F.rms_norm(x, (x.size(-1),))


def rotate(x, rope):
    """RoPE (arXiv 2104.09864): turns pairs in x (..., T, D) by angles that grow with the place."""
    a, b = x.chunk(2, -1)
    cos, sin = rope
    return torch.cat((a * cos - b * sin, a * sin + b * cos), -1).to(x.dtype)


class Block(nn.Module):  # attention, then the MLP: each reads the normed stream and adds to it
    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(n_embd, 3 * n_embd, bias=False)
        self.proj = nn.Linear(n_embd, n_embd, bias=False)
        self.up = nn.Linear(n_embd, 4 * n_embd, bias=False)
        self.down = nn.Linear(4 * n_embd, n_embd, bias=False)
        nn.init.zeros_(self.proj.weight)  # so that a Block starts as the identity
        nn.init.zeros_(self.down.weight)

    def forward(self, x, rope, cache):  # [2]
        qkv = self.qkv(norm(x)).unflatten(2, (3 * n_head, -1))  # (B, T, 3 * n_head, D)
        q, k, v = qkv.transpose(1, 2).chunk(3, 1)  # each (B, n_head, T, D)
        q = rotate(norm(q), rope)
        k = rotate(norm(k), rope)
        if cache is not None:  # [2] the keys and values of characters before stay what they are
            if self in cache:
                past_k, past_v = cache[self]
                k, v = torch.cat((past_k, k), 2), torch.cat((past_v, v), 2)
            cache[self] = k, v
        # [2] causal where several characters are read, from position 0; a single one sees all
        y = F.scaled_dot_product_attention(q, k, v, is_causal=q.size(2) > 1)  # [2]
        y = y.transpose(1, 2).flatten(2)  # (B, T, n_embd)
        x = x + F.dropout(self.proj(y), dropout, self.training)
        y = F.relu(self.up(norm(x))).square()
        return x + F.dropout(self.down(y), dropout, self.training)


class Model(nn.Module):
    def __init__(self, tokenizer, prompt):
        super().__init__()
        self.tokenizer = tokenizer
        self.prompt = prompt  # what it starts from where none is given
        self.embed = nn.Embedding(len(tokenizer.vocab), n_embd)
        self.blocks = nn.ModuleList(Block() for _ in range(n_layer))
        self.head = nn.Linear(n_embd, len(tokenizer.chars), bias=False)
        frequency = 10000 ** -torch.linspace(0, 1, n_embd // n_head // 2)
        angle = torch.outer(torch.arange(block_size), frequency)  # (T, D / 2)
        self.register_buffer("rope", torch.stack((angle.cos(), angle.sin())), persistent=False)

    def forward(self, ids, cache=None):  # [2]
        """ids (B, T) -> logits (B, T, V), float32. A cache, {} at first, keeps what was read."""
        past = cache[self.blocks[0]][0].size(2) if cache else 0  # [2] characters it holds
        rope = self.rope[:, past : past + ids.size(1)]  # [2]
        x = norm(F.dropout1d(self.embed(ids), token_dropout, self.training))  # blanks characters
        for block in self.blocks:
            x = block(x, rope, cache)  # [2]
        return self.head(norm(x)).float()


# ---- checkpoints -------------------------------------------------------------------------------
def best_device():
    """The fastest device here, and bfloat16 where its hardware computes in it, else float32."""
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    cuda = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    # Torch 2.9 has no public name for this yet: torch.cpu.get_capabilities came later.
    cpu = device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()
    return device, torch.bfloat16 if cuda or cpu else torch.float32


def sizes():
    return dict(n_layer=n_layer, n_head=n_head, n_embd=n_embd, block_size=block_size)


def save(contents, path):
    """Writes beside path, then renames: path holds the old or the new, never half. OSError."""
    buffer = io.BytesIO()
    torch.save(contents, buffer)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(f"{path}.{os.getpid()}.partial")
    try:
        with partial.open("wb") as file:
            file.write(buffer.getbuffer())
            os.fsync(file.fileno())  # a power cut leaves the old or the new too
        partial.replace(path)
    except OSError as error:
        raise OSError(f"cannot write {path} ({error.strerror}): name other --weights") from None
    finally:
        partial.unlink(missing_ok=True)


def load(path, dtype=None):
    """The Model in a checkpoint, in eval mode on the best device. ValueError says what to do."""
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        model = Model(CharTokenizer(checkpoint["chars"]), checkpoint["prompt"])
        model.load_state_dict(checkpoint["weights"])
        fits = all(checkpoint[key] == size for key, size in sizes().items())
    except Exception:  # a damaged file can fail in any way
        fits = False
    if not fits:
        fault = "damaged, or of another script or other sizes" if path.exists() else "missing"
        raise ValueError(f"{path} is {fault}: make it with `{name}.py --train`")
    device, fastest_dtype = best_device()
    return model.to(device, dtype or fastest_dtype).eval()


# ---- generation --------------------------------------------------------------------------------
def draw(logits, temp):
    """logits (..., V) -> characters (...), by Gumbel-max: temp scales the noise, 0 is argmax."""
    return (logits - temp * torch.empty_like(logits).exponential_().log()).argmax(-1)


@torch.inference_mode()
def generate(model, prompt=None, length=2000, temp=0.75):  # [3]
    """Writes length characters after prompt (default: the model's). After each pass it yields the
    text so far and how much of it is final: all. ValueError: the prompt cannot be read."""
    text = model.prompt if prompt is None else prompt
    if not text:  # [3]
        raise ValueError("the prompt is empty: give a character to start from")
    window, cache = model.tokenizer.encode(text), {}  # [2]
    if not length:
        yield text, len(text)
    for _ in range(length):
        if len(window) > block_size:  # it is full: read its last half anew, from position 0
            window, cache = window[-(block_size // 2) :], {}
        unread = window[-1:] if cache else window  # [2] what the cache does not hold
        logits = model(unread[None].to(model.rope.device), cache)[0, -1:].cpu()
        window = torch.cat((window, draw(logits, temp)))
        text += model.tokenizer.decode(window[-1:])
        yield text, len(text)


# ---- evaluation --------------------------------------------------------------------------------
@torch.no_grad()
def score(model, text):
    """Exact negative log-likelihood of text at temperature 1, in nats per character: (windows,
    passes), for each pass that writes a window after its context. Leaves the model in eval mode."""
    model.eval()
    windows = model.tokenizer.encode(text).unfold(0, block_size, block_size - context)  # (B, T)
    nats = []
    for rows in windows.to(model.rope.device).split(64):
        logits = model(rows[:, :-1])[:, context - 1 :]  # [3] all passes at once
        nats.append(F.cross_entropy(logits.transpose(1, 2), rows[:, context:], reduction="none"))
    return torch.cat(nats)


# ---- training ----------------------------------------------------------------------------------
def loss_fn(model, rows):
    """Nats per character that is asked for in rows (B, T + 1), a mean."""
    inputs, targets = rows[:, :-1], rows[:, 1:]  # [4]
    return F.cross_entropy(model(inputs).transpose(1, 2), targets)  # [5]


def rate(i, iters):
    """The learning rate of iteration i of 1 to iters: up to the peak, then down towards zero."""
    return learning_rate * min(i / warmup_iters, (iters + 1 - i) / max(1, iters - warmup_iters))


def calibrate(model, text):
    """Shrinks the head, and so all logits, to where text scores best, and returns that score. A
    model that knows its training text by heart is too sure of any other (arXiv 1706.04599)."""
    best = math.inf
    while (nats := score(model, text).mean().item()) < best:
        best, weight = nats, model.head.weight
        model.head.weight = nn.Parameter(0.95 * weight)  # not in place: autocast keeps what it cast
    model.head.weight = weight
    return best


def read_state(path, run):
    """What a run has left in a file, {} if nothing. ValueError: damaged, or of another run."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True) if path.exists() else {}
        other = [key for key in run if state and state[key] != run[key]]
    except Exception:  # a damaged file can fail in any way
        other = run
    if other:
        remedy = "repeat its command, delete the file, or name other --weights"
        fault = f"damaged or of another run (other {', '.join(other)})"
        raise ValueError(f"{path} is {fault}: {remedy}")
    return state


def train(data, weights, iters, seed=1337):
    """Trains on the file data. The file weights gets what scores best on the validation text, when
    the run ends, with its head calibrated; until then that is in FILE.resume, beside all that the
    same call needs to go on. OSError, ValueError."""
    if weights.is_dir():
        raise ValueError(f"{weights} is a folder: name a file")
    torch.manual_seed(seed)
    device, dtype = best_device()
    autocast = torch.autocast(device.type, dtype, enabled=dtype == torch.bfloat16)
    train_text, val_text = read_splits(data)

    model = Model(CharTokenizer(train_text + val_text), train_text[:context]).to(device)
    compiled = torch.compile(model) if device.type == "cuda" and find_spec("triton") else model
    ids = model.tokenizer.encode(train_text).to(device)

    matrices, others = model.blocks.parameters(), (model.embed.weight, model.head.weight)
    muon = torch.optim.Muon(matrices, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW(others, betas=(0.9, 0.95), weight_decay=weight_decay, fused=True)

    run = dict(sizes(), iters=iters, seed=seed, chars=model.tokenizer.chars, prompt=model.prompt)
    run["text"] = zlib.crc32((train_text + val_text).encode())
    run["script"] = zlib.crc32(script_path.read_bytes())
    state_path = Path(f"{weights}.resume")
    state = dict(run, done=0, best=math.inf) | read_state(state_path, run)
    if state["done"]:
        model.load_state_dict(state["model"])
        muon.load_state_dict(state["muon"])
        adamw.load_state_dict(state["adamw"])
        print(f"{state_path}: goes on after iteration {state['done']}", file=sys.stderr)
    # A folder that cannot be written ends the run here, before any work is done.
    save(state if state["done"] else {}, state_path)

    bar = tqdm(range(state["done"] + 1, iters + 1), name, initial=state["done"], total=iters)
    try:
        for i in bar:
            torch.manual_seed(seed * iters + i)  # so that nothing random has to be saved
            for group in muon.param_groups + adamw.param_groups:
                group["lr"] = rate(i, iters)
            starts = torch.randint(len(ids) - block_size, (batch_size, 1))
            rows = ids[(starts + torch.arange(block_size + 1)).to(device)]  # (batch_size, T + 1)

            model.train().zero_grad()
            with autocast:
                loss = loss_fn(compiled, rows)
            loss.backward()
            muon.step()
            adamw.step()
            if i % 10 == 0:
                bar.set_postfix(loss=loss.item(), best=state["best"])
            if i % eval_interval and i < iters:
                continue

            with autocast:
                nats = score(model, val_text).mean().item()
            if not math.isfinite(nats):
                state_path.unlink(missing_ok=True)
                raise ValueError("the run has diverged: give it a smaller learning_rate")
            if nats < state["best"]:
                rounded = {key: weight.bfloat16() for key, weight in model.state_dict().items()}
                state.update(best=nats, weights=rounded)
            state.update(model=model.state_dict(), muon=muon.state_dict(), adamw=adamw.state_dict())
            save(dict(state, done=i), state_path)
            state["done"] = i  # not before, as an interrupt names what was saved
            bar.write(f"iteration {i}: {nats:.4f} nats per character", sys.stderr)

        print("calibrating", file=sys.stderr)
        model.load_state_dict(state["weights"])
        with autocast:
            best = calibrate(model, val_text)
        if weights.exists():
            weights.replace(f"{weights}.old")
        save(dict(run, weights=model.bfloat16().state_dict()), weights)
    except KeyboardInterrupt:
        then = f"; the same command goes on after iteration {state['done']}"
        raise KeyboardInterrupt(then) from None
    state_path.unlink(missing_ok=True)
    print(f"{weights}: {best:.4f} nats per character", file=sys.stderr)


# ---- command line ------------------------------------------------------------------------------
def write(texts, characters):
    """Prints what generate() yields as it becomes final; the figures go to standard error."""
    began, shown, passes = time.perf_counter(), 0, 0
    for text, final in tqdm(texts, unit=" passes", disable=os.isatty(1) or None):
        print(text[shown:final], end="", flush=True)
        shown, passes = final, passes + 1
    print(text[shown:], flush=True)
    if characters:
        seconds = time.perf_counter() - began
        print(f"{characters} characters, {passes} passes, {seconds:.1f} s", file=sys.stderr)


def main(argv=None):
    """The command line. Bad input ends with one line and exit code 2, Ctrl-C with 130."""
    parser = argparse.ArgumentParser(f"{name}.py", "%(prog)s [options]", "Writes, by default.")
    add, mode = parser.add_argument, parser.add_mutually_exclusive_group()
    mode.add_argument("--train", action="store_true", help="keep the weights that score best")
    mode.add_argument("--eval", action="store_true", help="score weights on the validation text")
    add("--iters", type=int, default=max_iters, help="iterations of training (%(default)s)")
    add("--data", type=Path, default=data_path, help="a text of your own")
    add("--weights", type=Path, default=weights_path, help="weights of your own")
    add("--prompt", help="the text to start from")
    add("--length", type=int, default=2000, help="characters to write (%(default)s)")
    add("--seed", type=int, default=1337, help="of all that is random (%(default)s)")
    add("--temp", type=float, default=0.75, help="temperature, 0 is greedy (%(default)s)")  # [3]
    args = parser.parse_args(argv)

    for key, value in vars(args).items():
        least = 1 if key == "iters" else 0
        if isinstance(value, (int, float)) and not least <= value <= 10**7:
            parser.error(f"--{key} takes a number from {least} to {10**7}")

    try:
        if args.train:
            train(args.data, args.weights, args.iters, args.seed)
        elif args.eval:
            nats = score(load(args.weights), read_splits(args.data)[1])
            print(f"{nats.mean():.4f} nats per character, {nats.mean() / math.log(2):.4f} bits")
        else:
            model = load(args.weights)
            torch.manual_seed(args.seed)
            texts = generate(model, args.prompt, args.length, args.temp)  # [3]
            write(texts, args.length + (args.prompt or "").count("_"))
    except (OSError, ValueError) as error:
        parser.exit(2, f"{name}.py: {error}\n")
    except RuntimeError as error:
        if not any(words in str(error) for words in ("out of memory", "to allocate")):
            raise
        parser.exit(2, f"{name}.py: out of memory: training needs less by a smaller batch_size\n")
    except KeyboardInterrupt as stop:
        parser.exit(130, f"\n{name}.py: stopped{stop}\n")


if __name__ == "__main__":
    if hasattr(sys.stdout, "reconfigure"):  # a notebook's has not, nor one that is closed
        sys.stdout.reconfigure(errors="replace")  # a character that the console lacks ends nothing
        if hasattr(signal, "SIGPIPE"):  # Windows has none
            signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` ends the program quietly
    main()
