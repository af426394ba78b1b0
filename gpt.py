"""A GPT on Tiny Shakespeare: it writes from left to right, one character per forward pass.

gpt.py and diffusion.py are identical but for five changes, marked [1] to [5] in both. Run
`diff gpt.py diffusion.py`: that is the lesson.

[1] vocabulary: GPT has the characters; diffusion adds a mask, "_": read but never predicted
[2] attention: GPT looks back, so keys and values can be cached; diffusion looks both ways
[3] generation: GPT writes one character per pass; diffusion writes many, and looks a second time
[4] training: GPT learns to predict the next character; diffusion learns to restore hidden ones
[5] loss: GPT counts all characters; diffusion counts the hidden ones

The model: RoPE for positions, RMSNorm without weights, QK-norm, ReLU^2 MLP, no biases.
Shapes: B rows, T characters, D numbers per attention head, V characters to predict.
"""

import argparse
import io
import math
import os
import shutil
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

# ---- hyperparameters: looked up at call time, so that tests can set them -----------------------
block_size = 256  # characters that the model sees at once: the window
context = 16  # the first characters of a window: given, not scored
n_layer = 6  # Blocks
n_head = 6  # attention heads in each Block
n_embd = 384  # size of the vector of a character
learning_rate = 0.005  # its peak, at the end of the warm-up
warmup_iters = 100  # iterations of warm-up
eval_interval = 500  # iterations between validations
token_dropout = 0.1  # share of characters whose vector training zeroes, against memorising
weight_decay = 0.6  # of all weights, against memorising
batch_size = 32  # [4] rows of block_size characters per iteration
dropout = 0.35  # [4] share of what each Block adds that is zeroed, as the targets repeat
max_iters = 2400  # [4] iterations: more would memorise

script_path = Path(__file__).resolve()
name = script_path.stem
data_path = script_path.with_name("data.txt")
weights_path = script_path.parent / "weights" / f"{name}.pt"
data_url = "https://github.com/nathan-barry/tiny-diffusion/releases/download/v2.0.0/data.txt"
data_sha256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"


# ---- data --------------------------------------------------------------------------------------
def read_splits(path):
    """The text to train on and the text to validate on (the last tenth, at most 120,000
    characters). Fetches data.txt if it is missing. Raises OSError, ValueError."""
    if path == data_path and not path.exists():
        try:
            torch.hub.download_url_to_file(data_url, path, data_sha256, progress=False)
        except Exception as error:  # a download can fail in any way
            raise OSError(f"cannot fetch {data_url} ({error}): save it as {path}") from None
    text = path.read_text(encoding="utf-8-sig")  # -sig drops a byte-order mark
    if "_" in text:
        raise ValueError(f"{path} holds '_', which is reserved: replace it")
    split = max(int(0.9 * len(text)), len(text) - 120_000)
    if len(text) - split <= block_size:
        raise ValueError(f"{path} is too short: it needs {10 * block_size + 1} characters")
    return text[:split], text[split:]


class CharTokenizer:  # one character, one token; "_" is reserved for the mask
    def __init__(self, text):
        self.chars = "".join(sorted(set(text)))  # what is predicted
        self.vocab = self.chars  # [1] what is read
        self.ids = {char: i for i, char in enumerate(self.vocab)}

    def encode(self, text):
        """str of T characters -> LongTensor (T,). Raises ValueError on an unknown character."""
        try:
            return torch.tensor([self.ids[char] for char in text], dtype=torch.long)
        except KeyError as char:
            raise ValueError(f"unknown character {char}: leave it out") from None

    def decode(self, ids):
        """LongTensor (T,) -> str of T characters."""
        return "".join(self.vocab[i] for i in ids.tolist())


# ---- model -------------------------------------------------------------------------------------
def norm(x):
    return F.rms_norm(x, (x.size(-1),))


def rotate(x, rope):
    """RoPE (arXiv 2104.09864): rotates x (..., T, D) by place; rope (2, T, D / 2) is cos, sin."""
    a, b = x.chunk(2, -1)
    cos, sin = rope
    return torch.cat((a * cos - b * sin, a * sin + b * cos), -1).to(x.dtype)


class Block(nn.Module):  # attention, then an MLP; each adds its output to x
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
        if cache is not None:  # [2] nothing looks ahead, so past keys and values stay valid
            if self in cache:
                past_k, past_v = cache[self]
                k, v = torch.cat((past_k, k), 2), torch.cat((past_v, v), 2)
            cache[self] = k, v
        # [2] A pass without a past is causal. One with a past reads one character, which may see
        # it all. (Several would need a causal mask with an offset.)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=q.size(2) > 1)  # [2]
        y = y.transpose(1, 2).flatten(2)  # (B, T, n_embd)
        x = x + F.dropout(self.proj(y), dropout, self.training)
        y = F.relu(self.up(norm(x))).square()
        return x + F.dropout(self.down(y), dropout, self.training)


class Model(nn.Module):
    def __init__(self, tokenizer, prompt):
        super().__init__()
        self.tokenizer = tokenizer
        self.prompt = prompt  # what generate() starts from if given none
        self.sizes = dict(n_layer=n_layer, n_head=n_head, n_embd=n_embd, block_size=block_size)
        self.embed = nn.Embedding(len(tokenizer.vocab), n_embd)
        self.blocks = nn.ModuleList(Block() for _ in range(n_layer))
        self.head = nn.Linear(n_embd, len(tokenizer.chars), bias=False)
        frequency = 10000 ** -torch.linspace(0, 1, n_embd // n_head // 2)
        angle = torch.outer(torch.arange(block_size), frequency)  # (T, D / 2)
        self.register_buffer("rope", torch.stack((angle.cos(), angle.sin())), persistent=False)

    def forward(self, ids, cache=None):  # [2]
        """ids (B, T) -> logits (B, T, V), float32. The cache, {} at first, maps each Block to the
        (keys, values) of what was read so far."""
        past = cache[self.blocks[0]][0].size(2) if cache else 0  # [2] characters read so far
        rope = self.rope[:, past : past + ids.size(1)]  # [2]
        # dropout1d zeroes whole characters (dim 1, T).
        x = norm(F.dropout1d(self.embed(ids), token_dropout, self.training))
        for block in self.blocks:
            x = block(x, rope, cache)  # [2]
        return self.head(norm(x)).float()


# ---- checkpoints -------------------------------------------------------------------------------
def best_device():
    """The fastest device here, and bfloat16 where the hardware supports it, else float32."""
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    cuda_bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    # A private name, as torch 2.9 has no torch.cpu.get_capabilities.
    cpu_bf16 = device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()
    return device, (torch.bfloat16 if cuda_bf16 or cpu_bf16 else torch.float32)


def save(contents, path):
    """Writes a file beside path, then renames it: path is never half written. Raises OSError."""
    buffer = io.BytesIO()  # torch.save to a path raises RuntimeError, not OSError
    torch.save(contents, buffer)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(f"{path}.partial")
    partial.write_bytes(buffer.getbuffer())
    partial.replace(path)


def load(path, dtype=None):
    """The Model in a checkpoint, in eval mode on the best device. Raises ValueError."""
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        model = Model(CharTokenizer(checkpoint["chars"]), checkpoint["prompt"])
        model.load_state_dict(checkpoint["weights"])
        if not model.sizes.items() <= checkpoint.items():  # shapes of weights do not tell n_head
            raise ValueError
    except Exception:  # a damaged file can fail in any way
        faults = "missing, damaged, or made by another script or with other sizes"
        raise ValueError(f"{path} is {faults}: make it with `{name}.py --train`") from None
    device, default_dtype = best_device()
    return model.to(device, dtype or default_dtype).eval()


# ---- generation --------------------------------------------------------------------------------
def draw(logits, temp):
    """logits (..., V) -> ids (...) drawn from softmax(logits / temp) by Gumbel-max; 0 is argmax."""
    return (logits - temp * torch.empty_like(logits).exponential_().log()).argmax(-1)


@torch.inference_mode()
def generate(model, prompt=None, length=2000, temp=1.0):  # [3]
    """Continues prompt (default: the model's) by length characters. Yields after each pass the text
    so far, and how many of its characters are final: here all. Raises ValueError."""
    text = model.prompt if prompt is None else prompt
    if not text:  # [3]
        raise ValueError("the prompt is empty: give a character to start from")
    window, cache = model.tokenizer.encode(text), {}  # [2]
    if not length:  # the caller needs one yield
        yield text, len(text)
    for _ in range(length):
        if len(window) > block_size:  # full: restart from its last half
            window, cache = window[-(block_size // 2) :], {}
        unread = window[-1:] if cache else window  # [2] not yet in the cache
        logits = model(unread[None].to(model.rope.device), cache)[0, -1:].cpu()
        window = torch.cat((window, draw(logits, temp)))
        text += model.tokenizer.decode(window[-1:])
        yield text, len(text)


# ---- evaluation --------------------------------------------------------------------------------
@torch.no_grad()
def score(model, text):
    """Exact negative log-likelihood of text at temperature 1, in nats per character for each
    pass: a tensor (windows, passes). Leaves the model in eval mode."""
    model.eval()
    # Windows overlap by the context, which is given, so no character is scored twice.
    windows = model.tokenizer.encode(text).unfold(0, block_size, block_size - context)
    nats = []
    for rows in windows.to(model.rope.device).split(64):
        logits = model(rows[:, :-1])[:, context - 1 :]  # [3] causal: all passes in one
        nats.append(F.cross_entropy(logits.transpose(1, 2), rows[:, context:], reduction="none"))
    return torch.cat(nats)


# ---- training ----------------------------------------------------------------------------------
def loss_fn(model, rows):
    """Mean nats per predicted character of rows (B, T + 1)."""
    inputs, targets = rows[:, :-1], rows[:, 1:]  # [4]
    return F.cross_entropy(model(inputs).transpose(1, 2), targets)  # [5]


def rate(i, iters):
    """The learning rate for iteration i in 1..iters: a line up to the peak, then a line down."""
    return learning_rate * min(i / warmup_iters, (iters + 1 - i) / max(1, iters - warmup_iters))


def compiled(model):
    if model.rope.device.type != "cuda" or not find_spec("triton"):
        return model
    print("compiling; where that fails, training goes on uncompiled", file=sys.stderr)
    torch._dynamo.config.suppress_errors = True
    torch._logging.set_logs(dynamo=50)  # CRITICAL: hides the thousand lines of a failure
    return torch.compile(model)


def train(data, weights, iters, seed=1337):
    """Trains on the file data. At the end the file weights gets the best weights; until then the
    same call resumes from <weights>.<checksum>.resume. Raises OSError, ValueError."""
    if weights.is_dir():
        raise ValueError(f"{weights} is a folder: name a file")
    torch.manual_seed(seed)
    device, dtype = best_device()
    autocast = torch.autocast(device.type, dtype, enabled=dtype == torch.bfloat16)
    train_text, val_text = read_splits(data)

    model = Model(CharTokenizer(train_text + val_text), prompt=train_text[:context]).to(device)
    inner, outer = model.blocks.parameters(), (model.embed.weight, model.head.weight)
    # Muon makes the updates of the Blocks' matrices nearly orthogonal, AdamW has the rest.
    # match_rms_adamw scales Muon's updates so that both can share a learning rate.
    muon = torch.optim.Muon(inner, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW(outer, betas=(0.9, 0.95), weight_decay=weight_decay, fused=True)

    # Other settings, texts or code give another checksum, so another file.
    run = iters, seed, model.sizes, script_path.read_bytes(), train_text, val_text
    checksum = zlib.crc32(repr(run).encode())
    state_path = Path(f"{weights}.{checksum:08x}.resume")
    checkpoint = dict(model.sizes, chars=model.tokenizer.chars, prompt=model.prompt)
    state = dict(checkpoint, done=0, best=math.inf)  # with weights, load() can read it
    if state_path.exists():
        state = torch.load(state_path, map_location="cpu", weights_only=True)
    if state["done"]:  # else it holds no model yet
        model.load_state_dict(state["model"])
        muon.load_state_dict(state["muon"])
        adamw.load_state_dict(state["adamw"])
    save(state, state_path)  # a folder that cannot be written ends the run now, not after hours
    print(f"state in {state_path}, {state['done']} of {iters} iterations done", file=sys.stderr)

    compiled_model = compiled(model)
    ids = model.tokenizer.encode(train_text).to(device)
    bar = tqdm(range(state["done"] + 1, iters + 1), name, initial=state["done"], total=iters)
    for i in bar:
        # Each iteration of each run has a seed of its own: no random state has to be saved.
        torch.manual_seed(seed * iters + i)
        for group in muon.param_groups + adamw.param_groups:
            group["lr"] = rate(i, iters)
        starts = torch.randint(len(ids) - block_size, (batch_size, 1))
        rows = ids[(starts + torch.arange(block_size + 1)).to(device)]  # (B, T + 1)

        model.train().zero_grad()
        with autocast:
            loss = loss_fn(compiled_model, rows)
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
            raise ValueError("the run has diverged: set a smaller learning_rate")
        if nats < state["best"]:
            rounded = {key: weight.bfloat16() for key, weight in model.state_dict().items()}
            state.update(best=nats, weights=rounded)
        state.update(done=i, model=model.state_dict())
        state.update(muon=muon.state_dict(), adamw=adamw.state_dict())
        save(state, state_path)
        bar.write(f"iteration {i}: {nats:.4f} nats per character", sys.stderr)

    if weights.exists():
        shutil.copyfile(weights, f"{weights}.old")  # not moved, so that weights always exists
    save(dict(checkpoint, weights=state["weights"]), weights)
    state_path.unlink()
    print(f"{weights}: {state['best']:.4f} nats per character", file=sys.stderr)


# ---- command line ------------------------------------------------------------------------------
def write(texts):
    """Prints what generate() yields as it becomes final; passes and time go to standard error."""
    began = time.perf_counter()
    shown = passes = 0
    # True: no bar beside text in a terminal. None: a bar if standard error is a terminal.
    for text, final in tqdm(texts, unit=" passes", disable=os.isatty(1) or None):
        print(text[shown:final], end="", flush=True)
        shown, passes = final, passes + 1
    print(text[shown:], flush=True)
    print(f"{passes} passes, {time.perf_counter() - began:.1f} s", file=sys.stderr)


def main(argv=None):
    """The command line. Bad input ends with one line and exit code 2, Ctrl-C with 130."""
    parser = argparse.ArgumentParser(f"{name}.py", "%(prog)s [options]", "Writes text by default.")
    add = parser.add_argument
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--train", action="store_true", help="train and keep the best weights")
    mode.add_argument("--eval", action="store_true", help="score weights on the validation text")
    add("--iters", type=int, default=max_iters, help="iterations of training (%(default)s)")
    add("--data", type=Path, default=data_path, help="a text of your own")
    add("--weights", type=Path, default=weights_path, help="the file to read or write")
    add("--prompt", help="the text to start from")
    add("--length", type=int, default=2000, help="characters to write (%(default)s)")
    add("--seed", type=int, default=1337, help="random seed (%(default)s)")
    add("--temp", type=float, default=1.0, help="temperature, 0 is greedy (%(default)s)")
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
            write(generate(model, args.prompt, args.length, args.temp))  # [3]
    except (OSError, ValueError) as error:
        parser.exit(2, f"{name}.py: {error}\n")
    except KeyboardInterrupt:
        parser.exit(130, f"\n{name}.py: stopped; a training goes on with the same command\n")


if __name__ == "__main__":
    if hasattr(sys.stdout, "reconfigure"):  # missing in a notebook, or when closed
        sys.stdout.reconfigure(errors="replace")  # print ? for what the console lacks
        if hasattr(signal, "SIGPIPE"):  # Windows has none
            signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` ends the program quietly
    main()
