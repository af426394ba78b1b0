"""Diffusion on Tiny Shakespeare: it fills in hidden characters, many of them per forward pass.

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
import math
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

# ---- hyperparameters: read when used, so that a caller may set them on the module --------------
block_size = 256  # characters in view
context = 16  # characters before a block that is written or scored
n_layer = 6  # layers
n_head = 6  # attention heads in each
n_embd = 384  # numbers per character between layers
learning_rate = 0.005  # at the peak
warmup_iters = 100  # iterations to the peak
eval_interval = 250  # iterations between validations
token_dropout = 0.1  # share of the characters it reads that are blanked, against memorising
weight_decay = 0.6  # of the matrices, against memorising
batch_size = 64  # [4] rows of block_size characters per iteration
dropout = 0.0  # [4] share of a layer's output that is zeroed: each epoch asks anew
max_iters = 6000  # [4] iterations: it learns for longer
stride = 8  # [3] from one place of a comb to the next; divides block_size - context

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
    text = path.read_text(encoding="utf-8-sig")  # -sig: without a byte-order mark
    if "_" in text:
        raise ValueError(f"{path} holds '_', which is reserved: replace it")
    split = int(0.9 * len(text))
    if len(text) - split <= block_size:
        raise ValueError(f"{path} is too short: it needs {10 * block_size + 1} characters")
    return text[:split], text[split:]


class CharTokenizer:  # one character, one token; "_" is reserved for the mask
    def __init__(self, text):
        self.chars = "".join(sorted(set(text)))
        self.vocab = self.chars + "_"  # [1]
        self.mask = len(self.chars)  # [1] its id
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

    def forward(self, x, rope):  # [2]
        B, T, _ = x.shape
        q, k, v = self.qkv(norm(x)).view(B, T, 3 * n_head, -1).transpose(1, 2).chunk(3, 1)
        q, k = rotate(norm(q), rope), rotate(norm(k), rope)  # each (B, n_head, T, D)
        # [2] no cache: each character that is written changes the keys and values of all others
        y = F.scaled_dot_product_attention(q, k, v, is_causal=False)  # [2]
        x = x + F.dropout(self.proj(y.transpose(1, 2).flatten(2)), dropout, self.training)
        y = F.relu(self.up(norm(x))).square()
        return x + F.dropout(self.down(y), dropout, self.training)


class Model(nn.Module):  # with the tokenizer it reads by, and the prompt it starts from by default
    def __init__(self, tokenizer, prompt):
        super().__init__()
        self.tokenizer, self.prompt = tokenizer, prompt
        self.header = dict(chars=tokenizer.chars, prompt=prompt, n_layer=n_layer, n_head=n_head)
        self.header.update(n_embd=n_embd, block_size=block_size)
        self.embed = nn.Embedding(len(tokenizer.vocab), n_embd)
        self.blocks = nn.ModuleList(Block() for _ in range(n_layer))
        self.head = nn.Linear(n_embd, len(tokenizer.chars), bias=False)
        frequency = 10000 ** -torch.linspace(0, 1, n_embd // n_head // 2)
        angle = torch.outer(torch.arange(block_size), frequency)  # (T, D / 2)
        self.register_buffer("rope", torch.stack((angle.cos(), angle.sin())), persistent=False)

    def forward(self, ids):  # [2]
        """ids (B, T) -> logits (B, T, V), float32."""
        rope = self.rope[:, : ids.size(1)]  # [2]
        x = norm(F.dropout1d(self.embed(ids), token_dropout, self.training))  # blanks characters
        for block in self.blocks:
            x = block(x, rope)  # [2]
        return self.head(norm(x)).float()


# ---- checkpoints -------------------------------------------------------------------------------
def best_device():
    """The fastest device here, and bfloat16 where its hardware computes in it, else float32."""
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    cuda = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    # Torch 2.9 has no public name for this yet: torch.cpu.get_capabilities came later.
    cpu = device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()
    return device, torch.bfloat16 if cuda or cpu else torch.float32


def save(contents, path):
    """Writes to a temporary name first, so that path holds the old or the new, and never half."""
    partial = path.with_suffix(".partial")
    torch.save(contents, partial)
    partial.replace(path)


def read_checkpoint(path, remedy):
    """The dict in a file; ValueError says what is wrong with it and how to mend that."""
    try:
        return dict(torch.load(path, map_location="cpu", weights_only=True))
    except (FileNotFoundError, IsADirectoryError, PermissionError) as error:
        raise ValueError(f"cannot read {path}: {error.strerror}; {remedy}") from None
    except Exception:  # a damaged file can fail in any way
        raise ValueError(f"{path} is damaged: {remedy}") from None


def load(path, dtype=None):
    """The Model in a checkpoint, in eval mode on the best device; ValueError says what to do."""
    checkpoint = read_checkpoint(path, remedy := f"make it with `{name}.py --train`")
    try:
        model = Model(CharTokenizer(checkpoint["chars"]), checkpoint["prompt"])
        model.load_state_dict(checkpoint["weights"])
        fits = model.header.items() <= checkpoint.items()
    except Exception:  # other contents can fail in any way
        fits = False
    if not fits:
        raise ValueError(f"{path} is of another script or of other sizes: {remedy}")
    device, fastest_dtype = best_device()
    return model.to(device, dtype or fastest_dtype).eval()


# ---- generation --------------------------------------------------------------------------------
def draw(logits, temp):
    """logits (..., V) -> characters (...), by Gumbel-max: temp scales the noise, 0 is argmax."""
    return (logits - temp * torch.empty_like(logits).exponential_().log()).argmax(-1)


@torch.inference_mode()
def generate(model, prompt=None, length=2000, temp=0.7, looks=1):  # [3]
    """Fills the holes of prompt (default: the model's), then writes length characters behind it.
    After each pass it yields the text so far, holes as "_", and how much of it is final: what is
    before the block. ValueError: the prompt cannot be read. A draft, passes 1, 2, 3, 4 and 8:

        ____s_______p_______r___
        ____s ______pe______re__
        ___is _____spe_____ore__
        __ is ____ spe____more__
        It is this speak; more t
    """
    text = model.prompt if prompt is None else prompt
    given = len(text)  # [3]
    ids, mask = model.tokenizer.encode(text + "_" * length), model.tokenizer.mask
    if mask not in ids:
        yield text, given
    while mask in ids:
        first = (ids == mask).nonzero()[0].item()
        start = max(0, first - (context if first > given else block_size // 2))
        end = start + block_size
        window = ids[start:end]  # a view: what is written in it is written in ids
        block = window == mask  # (T,) what is to be written
        if (ids[end:] != mask).any():  # the prompt goes on: the next window shows more of it
            block[-context:] = False

        comb_of = (torch.arange(start, start + len(window)) - first) % stride
        combs = [block & (comb_of == i) for i in comb_of[block].unique()]
        draft, second_look = [torch.zeros_like(block)] * len(combs), combs * looks
        for hidden in draft + second_look:
            window[hidden] = mask  # nothing in the draft, one comb in a second look
            padded = F.pad(window, (0, block_size - len(window)), value=mask)  # the length it knows
            logits = model(padded[None].to(model.rope.device))[:, : len(window)].cpu()
            comb = surest_comb(logits, (block & (window == mask))[None])[0]
            window[comb] = draw(logits[0, comb], temp)
            text = text[:start] + model.tokenizer.decode(window) + text[end:]
            yield text, first


def surest_comb(logits, holes):
    """The holes (B, T) of the comb whose top probabilities in logits (B, T, V) are highest in the
    mean. A comb is every stride-th place: characters that far apart hardly depend on each other."""
    comb_of = torch.arange(holes.size(1), device=holes.device) % stride
    combs = holes[:, None] & (comb_of == comb_of[:stride, None])  # (B, stride, T)
    certainty = logits.softmax(-1).amax(-1)[:, None]  # (B, 1, T)
    means = torch.where(combs.any(2), (combs * certainty).sum(2) / combs.sum(2), -1)  # (B, stride)
    return holes & (comb_of == means.argmax(1, keepdim=True))


# ---- evaluation --------------------------------------------------------------------------------
@torch.no_grad()
def score(model, text):
    """Exact nats per character that each pass pays to write text in blocks behind their context, at
    temperature 1: (blocks, passes). Leaves the model in eval mode."""
    model.eval()
    blocks = model.tokenizer.encode(text).unfold(0, block_size, block_size - context)  # (B, T)
    nats = []
    for rows in blocks.to(model.rope.device).split(16):
        # [3] Exact, as the choice of a comb depends on the text so far alone (arXiv 2603.01367).
        ids, passes = rows.clone(), []
        ids[:, context:] = model.tokenizer.mask
        while (holes := ids == model.tokenizer.mask).any():
            logits = model(ids)
            comb = surest_comb(logits, holes)
            paid = F.cross_entropy(logits.transpose(1, 2), rows, reduction="none")
            passes.append((paid * comb).sum(1) / comb.sum(1))
            ids = torch.where(comb, rows, ids)
        nats.append(torch.stack(passes, 1))
    return torch.cat(nats)


def evaluate(model, text):
    """Exact nats per character of text."""
    return score(model, text).mean().item()


# ---- training ----------------------------------------------------------------------------------
def loss_fn(model, rows):
    """Nats per character of rows (B, T + 1) but for their first ones, a mean."""
    targets = rows[:, 1:]
    inputs = hide(targets, model.tokenizer.mask)  # [4]
    nats = F.cross_entropy(model(inputs).transpose(1, 2), targets, reduction="none")  # (B, T)
    hidden = inputs == model.tokenizer.mask
    return ((nats * hidden).sum(1) / hidden.sum(1)).mean()  # [5] each row counts alike


def hide(ids, mask):
    """ids (B, T) with neighbours of every stride characters replaced by mask, but for the context:
    all of them as when a draft begins, one as in a second look, and as often any number between."""
    B, T = ids.shape
    neighbours = 1 + (torch.arange(B) + torch.randint(stride, (1,))) % stride
    places = torch.arange(T) + torch.randint(stride, (B, 1))  # drawn on the CPU: a seed hides alike
    hidden = places % stride < neighbours[:, None]  # (B, T)
    hidden[:, :context] = False
    return torch.where(hidden.to(ids.device), mask, ids)


def rate(i, iters):
    """The learning rate of iteration i of 1 to iters: up to the peak, then down towards zero."""
    return learning_rate * min(i / warmup_iters, (iters + 1 - i) / max(1, iters - warmup_iters))


def begin_run(weights, state_path):
    """The state of a new run; keeps the weights that are there. ValueError: one is unfinished."""
    if state_path.exists():
        raise ValueError(f"{state_path} is of an unfinished run: add --resume, or delete it")
    weights.parent.mkdir(parents=True, exist_ok=True)
    if weights.exists():
        shutil.copy(weights, weights.with_suffix(".old"))
    return dict(done=0, best=math.inf)


def resume_run(run, state_path):
    """The state that a run has left. ValueError: there is none, or it is of another run."""
    state = read_checkpoint(state_path, "begin a run without --resume")
    if other := {key: state.get(key) for key in run if state.get(key) != run[key]}:
        raise ValueError(f"{state_path} is of a run with {other}: repeat its command, or delete it")
    return state


def train(data, weights, iters, batch, resume=False, seed=1337):
    """Trains on the file data; the file weights gets what scores best on the last tenth of it."""
    torch.manual_seed(seed)
    device, dtype = best_device()
    autocast = torch.autocast(device.type, dtype, enabled=dtype == torch.bfloat16)
    train_text, val_text = read_splits(data)
    model = Model(CharTokenizer(train_text + val_text), train_text[:context]).to(device)
    compiled = torch.compile(model) if device.type == "cuda" and find_spec("triton") else model
    ids = model.tokenizer.encode(train_text).to(device)
    matrices, others = model.blocks.parameters(), (model.embed.weight, model.head.weight)
    muon = torch.optim.Muon(matrices, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW(others, betas=(0.9, 0.95), weight_decay=0.0, fused=True)

    run = dict(model.header, script=name, iters=iters, batch=batch, seed=seed)
    run["checksum"] = zlib.crc32((train_text + val_text).encode())
    state_path = weights.with_suffix(".resume")
    state = resume_run(run, state_path) if resume else begin_run(weights, state_path)
    done, best = state["done"], state["best"]
    parts = dict(model=model, muon=muon, adamw=adamw)
    for key in parts.keys() & state.keys():
        parts[key].load_state_dict(state[key])

    for i in (bar := tqdm(range(done + 1, iters + 1), name, initial=done, total=iters)):
        torch.manual_seed(seed * iters + i)  # so that nothing random has to be saved
        for group in muon.param_groups + adamw.param_groups:
            group["lr"] = rate(i, iters)
        starts = torch.randint(len(ids) - block_size, (batch, 1))
        rows = ids[(starts + torch.arange(block_size + 1)).to(device)]  # (batch, T + 1)
        model.train().zero_grad()
        with autocast:
            loss = loss_fn(compiled, rows)
        loss.backward()
        muon.step()
        adamw.step()
        if i % 10 == 0:
            bar.set_postfix(loss=f"{loss.item():.3f}", best=f"{best:.4f}")
        if i % eval_interval == 0 or i == iters:
            with autocast:
                nats = evaluate(model, val_text)
                *_, (sample, _) = generate(model, length=200)
            if nats < best:
                best = nats
                rounded = {key: weight.bfloat16() for key, weight in model.state_dict().items()}
                save(dict(model.header, weights=rounded), weights)
            states = {key: part.state_dict() for key, part in parts.items()}
            save(dict(run, done=i, best=best, **states), state_path)
            bar.write(f"{sample}\n\niteration {i}: {nats:.4f} nats per character, saved\n")
    state_path.unlink()
    print(f"{weights}: {best:.4f} nats per character", file=sys.stderr)


# ---- command line ------------------------------------------------------------------------------
def write(model, prompt, length, *sampling):
    """Prints the text as it becomes final; the figures go to standard error."""
    began, shown, passes = time.perf_counter(), 0, 0
    texts = generate(model, prompt, length, *sampling)
    for text, final in tqdm(texts, unit=" passes", disable=sys.stdout.isatty() or None):
        print(text[shown:final], end="", flush=True)
        shown, passes = final, passes + 1
    print(text[shown:])
    if total := length + (prompt or "").count("_"):
        figures = f"{total} characters, {passes} passes, {total / passes:.2f} per pass"
        print(f"{figures}, {time.perf_counter() - began:.1f} s", file=sys.stderr)


def main(argv=None):
    """Writes, trains or scores; bad input ends with one line and exit code 2, Ctrl-C with 130."""
    parser = argparse.ArgumentParser(f"{name}.py", "%(prog)s [options]", __doc__.splitlines()[0])
    add, either = parser.add_argument, parser.add_mutually_exclusive_group().add_argument
    either("--train", action="store_true", help="train, and keep the weights that score best")
    either("--eval", action="store_true", help="score the weights on the validation text")
    add("--iters", type=int, default=max_iters, help="iterations of training (%(default)s)")
    add("--batch", type=int, default=batch_size, help="rows per iteration (%(default)s)")
    add("--resume", action="store_true", help="go on with a training that was interrupted")
    add("--data", type=Path, default=data_path, help="a text of your own")
    add("--weights", type=Path, default=weights_path, help="weights of your own")
    add("--prompt", help="the text to start from")
    add("--length", type=int, default=2000, help="characters to write (%(default)s)")
    add("--temp", type=float, default=0.7, help="temperature, 0 is greedy (%(default)s)")
    add("--seed", type=int, default=1337, help="of all that is random (%(default)s)")
    add("--looks", type=int, default=1, help="second looks at each block (%(default)s)")  # [3]
    least = dict(iters=1, batch=1, length=0, temp=0, seed=0, looks=0)  # [3]
    args = parser.parse_args(argv)
    for key in least:
        if not least[key] <= vars(args)[key] <= 10**7:
            parser.error(f"--{key} takes a number from {least[key]} to {10**7}")
    if args.resume and not args.train:
        parser.error("--resume goes with --train")
    try:
        if args.train:
            train(args.data, args.weights, args.iters, args.batch, args.resume, args.seed)
        elif args.eval:
            nats = score(load(args.weights), read_splits(args.data)[1])
            print(f"{nats.mean():.4f} nats per character, {nats.mean() / math.log(2):.4f} bits")
            print("pass by pass:", *(f"{pass_nats:.2f}" for pass_nats in nats.mean(0)))  # [3]
        else:
            model = load(args.weights)
            torch.manual_seed(args.seed)
            write(model, args.prompt, args.length, args.temp, args.looks)  # [3]
    except (OSError, ValueError) as error:
        parser.exit(2, f"{name}.py: {error}\n")
    except KeyboardInterrupt:
        hint = "; --resume goes on from the last iteration that was saved" * args.train
        parser.exit(130, f"\n{name}.py: stopped{hint}\n")


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # a character that the console lacks ends nothing
    if hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` ends the program quietly
    main()
