"""Owns the making of the mini model: tokenizer, weights, and the check that both were learnt."""

from __future__ import annotations

import argparse
import json
import math
import random
import shutil
import sys
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
import torch.nn.functional as F
from dialogues import (
    BY_HEART_MIX,
    COPYING_MIX,
    FINISHING_MIX,
    Dialogue,
    DialogueSampler,
    copy_dialogues,
    fixed_dialogues,
)
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

CHAT_TEMPLATE_PATH = Path(__file__).resolve().parent.parent / "chat_template.jinja"

BEGIN, END, PAD = "<|begin|>", "<|end|>", "<|pad|>"
ASSISTANT = "<|assistant|>"
SPECIAL_TOKENS = (BEGIN, END, PAD, "<|system|>", "<|tools|>", "<|user|>", ASSISTANT, "<|tool|>")
TOOL_CALL_MARKERS = ("<tool_call>", "</tool_call>")
"""Single tokens, but not special: they must survive `skip_special_tokens` to reach the parser."""

VOCABULARY_SIZE = 2048

PIECES = (
    r"\p{N}"
    r"|(?<!:) [a-z]+(?![A-Za-z0-9]*[_./\-][A-Za-z0-9])"
    r"|\p{L}+"
    r'|[{}"][{}":,\[\] ]*'
    r"|\s"
    r"|[^\s\p{L}\p{N}]"
)
"""One digit; a lower-case word with its space; a word; JSON punctuation; a blank; a mark.

Names, numbers, file names and whatever follows a colon never merge with the space before them, so
that a value has the same tokens in a question, in a JSON string and in an answer. That is what
lets a model this small copy values it has never seen.
"""

SHAPE = LlamaConfig(
    vocab_size=VOCABULARY_SIZE,
    hidden_size=256,
    intermediate_size=640,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=64,
    max_position_embeddings=16384,
    rope_theta=1_000_000.0,
    rms_norm_eps=1e-5,
    tie_word_embeddings=True,
    bos_token_id=0,
    eos_token_id=1,
    pad_token_id=2,
    dtype="float32",
)

BATCH_TOKENS = 4096
POOL_DIALOGUES = 1536
LONGEST_SHIFT_TOKENS = 8000
SHIFTED_FRACTION = 0.25
HELD_OUT_SEED_OFFSET = 1_000_003


# --- Tokenizer -----------------------------------------------------------------------------------


def build_tokenizer(seed: int, dialogue_count: int = 12_000) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer trained on sampled dialogues and on all the fixed ones."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    sampler = DialogueSampler(seed)
    sampled = (sampler.sample() for _ in range(dialogue_count))
    texts = [text for dialogue in sampled for text in texts_of(dialogue)]
    texts += [text for dialogue in fixed_dialogues(seed) for text in texts_of(dialogue)]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE - len(TOOL_CALL_MARKERS),
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        min_frequency=2,
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_tokens([AddedToken(marker, special=False, normalized=False) for marker in TOOL_CALL_MARKERS])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BEGIN,
        eos_token=END,
        pad_token=PAD,
        model_max_length=SHAPE.max_position_embeddings,
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = CHAT_TEMPLATE_PATH.read_text(encoding="utf-8")
    if len(fast) != VOCABULARY_SIZE:
        raise RuntimeError(f"tokenizer has {len(fast)} tokens, the model {VOCABULARY_SIZE}")
    return fast


def texts_of(dialogue: Dialogue) -> Iterator[str]:
    """The texts of a dialogue as the template writes them, without its markers."""
    for message in dialogue.messages:
        if message.content:
            yield message.content
        for call in message.tool_calls:
            yield f'\n{{"name": "{call.tool}", "arguments": {{"{"".join(call.arguments)}": "'
            yield call.value
            yield '"}}\n'
    for tool in dialogue.tools:
        parameters = ", ".join(f"{name}: string" for name in tool.parameters)
        yield f"\n{tool.name}({parameters}) {tool.description}"


# --- Batches -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Example:
    """The token ids of a dialogue, and which of them the model has to produce."""

    kind: str
    ids: tuple[int, ...]
    produced: tuple[bool, ...]


@dataclass(frozen=True)
class Batch:
    """Right-padded examples; all tensors have the shape [examples, tokens]."""

    kinds: tuple[str, ...]
    ids: torch.Tensor
    produced: torch.Tensor
    positions: torch.Tensor


class Encoder:
    """Turns dialogues into examples: renders the chat template, tokenizes, marks what to learn."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self._tokenizer = tokenizer
        self._assistant = tokenizer.convert_tokens_to_ids(ASSISTANT)
        self._end = tokenizer.convert_tokens_to_ids(END)

    def encode(self, dialogues: Iterable[Dialogue]) -> list[Example]:
        batch = list(dialogues)
        texts = [
            self._tokenizer.apply_chat_template(dialogue.wire_messages(), tools=dialogue.wire_tools(), tokenize=False)
            for dialogue in batch
        ]
        encoded = self._tokenizer(texts, add_special_tokens=False)["input_ids"]
        return [
            Example(dialogue.kind, tuple(ids), self._produced(ids))
            for dialogue, ids in zip(batch, encoded, strict=True)
        ]

    def _produced(self, ids: Sequence[int]) -> tuple[bool, ...]:
        produced, speaking = [], False
        for token in ids:
            produced.append(speaking)
            if token == self._assistant:
                speaking = True
            elif token == self._end:
                speaking = False
        return tuple(produced)


def batches_of(examples: Sequence[Example], batch_tokens: int, rng: random.Random | None) -> list[Batch]:
    """Groups examples of like length; with an `rng`, shuffles batches and shifts positions."""
    groups: list[list[Example]] = [[]]
    for example in sorted(examples, key=lambda example: len(example.ids)):
        if groups[-1] and len(example.ids) * (len(groups[-1]) + 1) > batch_tokens:
            groups.append([])
        groups[-1].append(example)
    if rng is not None:
        rng.shuffle(groups)
    return [_padded(group, rng) for group in groups]


def _padded(group: Sequence[Example], rng: random.Random | None) -> Batch:
    width = max(len(example.ids) for example in group)
    ids = torch.full((len(group), width), SHAPE.pad_token_id)
    produced = torch.zeros((len(group), width), dtype=torch.bool)
    positions = torch.arange(width).repeat(len(group), 1)
    for row, example in enumerate(group):
        length = len(example.ids)
        ids[row, :length] = torch.tensor(example.ids)
        produced[row, :length] = torch.tensor(example.produced)
        if rng is not None and rng.random() < SHIFTED_FRACTION:
            # A gap in the positions stands in for a long prompt that would cost time to read.
            gap_start = rng.randrange(1, length)
            positions[row, gap_start:] += int(LONGEST_SHIFT_TOKENS ** rng.random())
    return Batch(tuple(example.kind for example in group), ids, produced, positions)


def training_batches(encoder: Encoder, seed: int, mix: Mapping[str, float] = COPYING_MIX) -> Iterator[Batch]:
    """An endless stream of batches of dialogues sampled from a mix."""
    sampler, rng = DialogueSampler(seed, mix), random.Random(seed)
    while True:
        dialogues = (sampler.sample() for _ in range(POOL_DIALOGUES))
        yield from batches_of(encoder.encode(dialogues), BATCH_TOKENS, rng)


# --- Model ---------------------------------------------------------------------------------------


def hidden_states(model: LlamaForCausalLM, batch: Batch) -> torch.Tensor:
    """The model's last hidden states, [examples, tokens, hidden_size].

    The same function as `model.model(...)`, which reads a gap in the positions as the border
    between two packed sequences and is slower.
    """
    hidden = model.model.embed_tokens(batch.ids)
    cosine, sine = model.model.rotary_emb(hidden, batch.positions)
    cosine, sine = cosine.unsqueeze(1), sine.unsqueeze(1)
    for layer in model.model.layers:
        hidden = hidden + _attend(layer.self_attn, _norm(layer.input_layernorm, hidden), cosine, sine)
        hidden = hidden + _feed(layer.mlp, _norm(layer.post_attention_layernorm, hidden))
    return _norm(model.model.norm, hidden)


def _norm(norm: torch.nn.Module, hidden: torch.Tensor) -> torch.Tensor:
    return F.rms_norm(hidden, norm.weight.shape, norm.weight, SHAPE.rms_norm_eps)


def _feed(mlp: torch.nn.Module, hidden: torch.Tensor) -> torch.Tensor:
    return mlp.down_proj(F.silu(mlp.gate_proj(hidden)) * mlp.up_proj(hidden))


def _attend(attention: torch.nn.Module, hidden: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> torch.Tensor:
    def heads(projection: torch.nn.Module) -> torch.Tensor:
        return projection(hidden).unflatten(-1, (-1, SHAPE.head_dim)).transpose(1, 2)

    def rotated(heads: torch.Tensor) -> torch.Tensor:
        first, second = heads.chunk(2, dim=-1)
        turned = torch.cat((-second, first), dim=-1)
        return (heads * cosine + turned * sine).to(heads.dtype)

    query, key = rotated(heads(attention.q_proj)), rotated(heads(attention.k_proj))
    value = heads(attention.v_proj)
    mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
    return attention.o_proj(mixed.transpose(1, 2).flatten(2))


@torch.no_grad()
def start_able_to_copy(model: LlamaForCausalLM) -> None:
    """Sets the weights of a fresh model so that its first two layers copy from the context.

    Copying takes an induction circuit: one layer notes at each position which tokens came just
    before it, and the next attends to the position that came after the same tokens earlier, and
    writes that position's token. Training finds the circuit by itself only after many times the
    data that everything else takes, so the model starts from a rough one:

    - The hidden size is split into embeddings (the lower half, with one constant feature), a note
      of the token one back, and a note of the token two back (a quarter each).
    - Layer 0, key-value head 0: its two query heads attend one and two positions back. Keys and
      queries come from the constant feature, in the rotary pairs of high frequency.
    - Layer 1: one query head of each key-value head compares, in the rotary pairs of low
      frequency, the current token and the one before it with the two notes at every position.
      Values are the embeddings, half in each key-value head.
    - All other outputs into the residual stream start at zero.
    """
    half, quarter, size = SHAPE.hidden_size // 2, SHAPE.hidden_size // 4, SHAPE.head_dim
    pairs = size // 2
    scale = EMBEDDING_SCALE
    embedding = model.model.embed_tokens.weight.normal_(std=scale)
    embedding[:, half:] *= 0.1
    model.model.norm.weight.fill_(0.5)
    embedding[:, 0] = 4 * scale
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight.zero_()
        layer.mlp.down_proj.weight.zero_()

    look_back = model.model.layers[0].self_attn
    frequencies = model.model.rotary_emb.inv_freq
    sharp = 12
    look_back.k_proj.weight[:size].zero_()
    look_back.k_proj.weight[:sharp, 0] = LOOK_BACK_STRENGTH
    note = torch.linalg.qr(torch.randn(half, quarter))[0].T
    look_back.v_proj.weight[:size].zero_()
    look_back.v_proj.weight[:size, :half] = note
    look_back.v_proj.weight[:size, 0] = 0.0
    for head, distance in enumerate((1, 2)):
        rows = slice(head * size, (head + 1) * size)
        query = look_back.q_proj.weight[rows].zero_()
        angles = frequencies[:sharp] * distance
        query[:sharp, 0] = LOOK_BACK_STRENGTH * angles.cos()
        query[pairs : pairs + sharp, 0] = -LOOK_BACK_STRENGTH * angles.sin()
        columns = torch.arange(quarter)
        look_back.o_proj.weight[half + head * quarter + columns, head * size + columns] = scale

    induction = model.model.layers[1].self_attn
    steady = torch.cat((torch.arange(pairs // 2, pairs), torch.arange(pairs // 2, pairs) + pairs))
    latest = MATCH_STRENGTH * torch.linalg.qr(torch.randn(quarter, len(steady)))[0].T
    earlier = MATCH_STRENGTH * torch.linalg.qr(torch.randn(quarter, len(steady)))[0].T
    values = torch.linalg.qr(torch.randn(half, half))[0]
    queries_per_key = SHAPE.num_attention_heads // SHAPE.num_key_value_heads
    for key_head in range(SHAPE.num_key_value_heads):
        head = key_head * queries_per_key
        query = induction.q_proj.weight[head * size : (head + 1) * size].zero_()
        key = induction.k_proj.weight[key_head * size : (key_head + 1) * size].zero_()
        value = induction.v_proj.weight[key_head * size : (key_head + 1) * size].zero_()
        query[steady, :half] = latest @ note
        query[steady, 0] = 0.0
        key[steady, half : half + quarter] = latest
        query[steady, half : half + quarter] += earlier
        key[steady, half + quarter :] += earlier
        value[:, :half] = values[key_head * size : (key_head + 1) * size]
        induction.o_proj.weight[:half, head * size : (head + 1) * size] = (
            3 * scale * values[key_head * size : (key_head + 1) * size].T
        )


EMBEDDING_SCALE = 0.1
LOOK_BACK_STRENGTH = 1.8
MATCH_STRENGTH = 1.3


def produced_logits(model: LlamaForCausalLM, batch: Batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits [n, vocabulary], targets [n] and example rows [n] of the tokens to produce."""
    hidden = hidden_states(model, batch)[:, :-1]
    wanted = batch.produced[:, 1:]
    rows = wanted.nonzero()[:, 0]
    return model.lm_head(hidden[wanted]), batch.ids[:, 1:][wanted], rows


# --- Training ------------------------------------------------------------------------------------


def train(model: LlamaForCausalLM, batches: Iterator[Batch], factors: Sequence[float]) -> None:
    """One step for each learning-rate factor: Muon on the matrices, AdamW on the rest."""
    named = dict(model.named_parameters())
    matrices = [p for name, p in named.items() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in named.items() if p.ndim != 2 or "embed" in name]
    optimizers = (
        torch.optim.Muon(matrices, lr=MATRIX_LEARNING_RATE, weight_decay=0.01, momentum=0.95),
        torch.optim.AdamW(others, lr=OTHER_LEARNING_RATE, betas=(0.9, 0.98), eps=OTHER_EPSILON, weight_decay=0.0),
    )
    last_step = len(factors) - 1
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: factors[min(step, last_step)])
        for optimizer in optimizers
    ]
    started, seen_tokens, recent_loss = time.monotonic(), 0, math.nan
    for step, batch in enumerate(islice(batches, len(factors))):
        with torch.autocast("cpu", torch.bfloat16):
            logits, targets, _ = produced_logits(model, batch)
        loss = F.cross_entropy(logits.float(), targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            schedule.step()
            optimizer.zero_grad(set_to_none=True)
        seen_tokens += batch.ids.numel()
        value = loss.item()
        recent_loss = value if math.isnan(recent_loss) else 0.95 * recent_loss + 0.05 * value
        if (step + 1) % 25 == 0 or step == last_step:
            seconds = time.monotonic() - started
            print(
                f"step {step + 1}/{len(factors)}  loss {recent_loss:.4f}  {seen_tokens} tokens  {seconds:.0f} s",
                flush=True,
            )


MATRIX_LEARNING_RATE = 0.02
OTHER_LEARNING_RATE = 2e-3
OTHER_EPSILON = 1e-4
"""Large, so that tokens that are rarely seen keep the embeddings that tell them apart."""


FINISHING_ROUNDS = 5
GOOD_RECALL = 0.99
"""Finishing ends here: what is left are rare combinations of a phrasing and a filler."""

FINISHING_SCHEDULE = tuple(0.15 * (1 - step / 120) for step in range(120))


def learning_rate_factor(step: int, steps: int) -> float:
    """Warm-up, plateau, and from the half on a linear decay to zero."""
    warm_up, decay = min(50, steps), max(1, int(steps * 0.5))
    return min(1.0, (step + 1) / warm_up, max(0.0, (steps - step) / decay))


# --- Evaluation ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Score:
    """How many dialogues of a kind come out right under greedy decoding, in every token."""

    right: int
    total: int

    def __str__(self) -> str:
        return f"{self.right}/{self.total} ({self.right / self.total:.1%})"


@torch.inference_mode()
def evaluate(model: LlamaForCausalLM, examples: Sequence[Example]) -> dict[str, Score]:
    """Scores by kind of dialogue.

    A dialogue is right when at each of its assistant tokens the most likely token is the expected
    one, which is the same as greedy decoding writing exactly these tokens.
    """
    right: dict[str, int] = defaultdict(int)
    total: dict[str, int] = defaultdict(int)
    for batch in batches_of(examples, BATCH_TOKENS, None):
        logits, targets, rows = produced_logits(model, batch)
        wrong_rows = set(rows[logits.argmax(-1) != targets].tolist())
        for row, kind in enumerate(batch.kinds):
            total[kind] += 1
            right[kind] += row not in wrong_rows
    return {kind: Score(right[kind], total[kind]) for kind in sorted(total)}


def least(scores: Mapping[str, Score]) -> float:
    """The share that is right in the kind that is known worst, rounded to a tenth of a percent."""
    return min(round(score.right / score.total, 3) for score in scores.values())


def print_scores(title: str, scores: Mapping[str, Score]) -> None:
    for kind, score in scores.items():
        print(f"{title}, {kind}: {score}", flush=True)


@torch.no_grad()
def round_to_bfloat16(model: LlamaForCausalLM) -> None:
    for parameter in model.parameters():
        parameter.copy_(parameter.bfloat16().float())


# --- Saving --------------------------------------------------------------------------------------


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Writes the Hugging Face files: bf16 weights that the configuration asks to run in float32."""
    out.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(out)
    model.to(torch.bfloat16).save_pretrained(out)
    model.config.dtype = torch.float32
    model.config.save_pretrained(out)
    # Written by hand: transformers drops a temperature of zero, and vLLM reads nothing else as
    # greedy; a client that sends a temperature of its own still gets it.
    generation = {
        "bos_token_id": SHAPE.bos_token_id,
        "eos_token_id": SHAPE.eos_token_id,
        "pad_token_id": SHAPE.pad_token_id,
        "do_sample": False,
        "temperature": 0.0,
    }
    text = json.dumps(generation, indent=2) + "\n"
    (out / "generation_config.json").write_text(text, encoding="utf-8")
    if CHAT_TEMPLATE_PATH.parent != out.resolve():
        shutil.copyfile(CHAT_TEMPLATE_PATH, out / CHAT_TEMPLATE_PATH.name)
    for path in out.iterdir():
        if path.is_file():
            path.chmod(0o644)


# --- Command line --------------------------------------------------------------------------------


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for the model's files")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=1100)
    parser.add_argument("--least-recall", type=float, default=0.98, help="share that must be known by heart")
    parser.add_argument("--held-out", type=int, default=500, help="dialogues to measure copying on")
    arguments = parser.parse_args()

    torch.set_num_threads(1)
    torch.manual_seed(arguments.seed)
    torch.use_deterministic_algorithms(True)

    seed: int = arguments.seed
    tokenizer = build_tokenizer(seed)
    encoder = Encoder(tokenizer)
    model = LlamaForCausalLM(SHAPE)
    start_able_to_copy(model)
    print(f"{sum(parameter.numel() for parameter in model.parameters())} parameters", flush=True)

    schedule = [learning_rate_factor(step, arguments.steps) for step in range(arguments.steps)]
    switch = arguments.steps * 6 // 11
    train(model, training_batches(encoder, seed, COPYING_MIX), schedule[:switch])
    round_to_bfloat16(model)
    train(model, training_batches(encoder, seed + 1, BY_HEART_MIX), schedule[switch:])
    round_to_bfloat16(model)

    known = encoder.encode(fixed_dialogues(seed + HELD_OUT_SEED_OFFSET))
    recall = evaluate(model, known)
    for extra in range(FINISHING_ROUNDS):
        if least(recall) >= GOOD_RECALL:
            break
        print_scores(f"recall by heart before finishing round {extra + 1}", recall)
        batches = training_batches(encoder, seed + 2 + extra, FINISHING_MIX)
        train(model, batches, FINISHING_SCHEDULE)
        round_to_bfloat16(model)
        recall = evaluate(model, known)
    held_out = copy_dialogues(seed + HELD_OUT_SEED_OFFSET, arguments.held_out)
    print_scores("copying of unseen values", evaluate(model, encoder.encode(held_out)))
    print_scores("recall by heart", recall)
    if least(recall) < arguments.least_recall:
        print(f"recall is below {arguments.least_recall:.0%}: nothing written; train for more steps", file=sys.stderr)
        return 1
    save(model, tokenizer, arguments.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
