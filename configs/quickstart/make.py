"""Make the quickstart's base model and tasks from nothing: `python configs/quickstart/make.py`.

Everything that the quickstart needs comes out of this file: the words, the text, the tokenizer, a small
pretrained language model and six instruction tasks. It runs offline, on a CPU, with torch, transformers and
tokenizers, and writes next to itself:

    model/                  a Llama of 0.5 million parameters (fp32) with its word-level tokenizer
    tasks/NAME.train.jsonl  600 rows {"prompt", "response"}
    tasks/NAME.test.jsonl   80 rows; no list of a test row occurs in any training row

The model is pretrained on synthetic notes about eighty nouns: what belongs to which group, plurals, how much of
something somebody has, the way there and the way back, the index of a book, and words of Talu, a made-up
language. So it knows the words and most of the changes that the tasks ask for, but not the form of the tasks: no
note has an instruction or an answer, and none selects or counts the animals in a mixed list.

The tasks work on the same lists of nouns, so the input alone never says what to do; only the instruction does:

    reverse    the words from last to first
    sort       the words in alphabetical order
    translate  each word in Talu
    plural     each word in the plural
    animals    only the animals, in their order
    count      how many words are animals, in letters

One seed decides everything (`--seed`). The tasks are the same on every machine; the weights depend in their last
bits on the torch build. `--part tasks` writes the tasks alone, in a second; the model takes about ten minutes on
one core.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.optimization import get_cosine_schedule_with_warmup

HERE = Path(__file__).resolve().parent

GROUPS = {
    "animals": "dog cat horse cow fox bear wolf goat mouse rabbit lion tiger eagle frog snake duck",
    "foods": "apple tomato soup potato cake cookie carrot cheese lemon onion berry egg pear plum bean pie",
    "tools": "hammer chisel needle knife spoon brush rope nail axe drill ladder shovel broom bucket lamp key",
    "clothes": "shirt coat hat shoe scarf glove sock belt dress skirt boot jacket tie cap vest robe",
    "places": "river mountain forest island lake desert beach valley garden village castle bridge market harbor tower "
    "field",
}
MEMBERS = {group: words.split() for group, words in GROUPS.items()}
NOUNS = [word for words in MEMBERS.values() for word in words]
ANIMALS = frozenset(MEMBERS["animals"])
IRREGULAR = {"mouse": "mice", "wolf": "wolves", "knife": "knives", "scarf": "scarves"}
NUMBERS = ["zero", "one", "two", "three", "four", "five"]
NAMES = ["Anna", "Ben", "Clara", "David", "Emma", "Felix", "Greta", "Hugo", "Ida", "Jonas"]
ADJECTIVES = ["old", "small", "red", "green", "quiet", "heavy", "clean", "strange"]
VERBS = ["sees", "likes", "finds", "draws", "forgets", "keeps"]


def plural(noun: str) -> str:
    """The plural of a noun of `NOUNS`."""
    if noun in IRREGULAR:
        return IRREGULAR[noun]
    if noun.endswith("rry"):
        return noun[:-1] + "ies"
    return noun + ("es" if noun.endswith(("s", "x", "ch", "sh", "to")) else "s")


def talu_dictionary() -> dict[str, str]:
    """Noun to Talu word: eighty different words of two syllables, drawn once, whatever the seed of the run is."""
    rng = random.Random("talu")
    syllables = [c + v for c in "bdgklmnprstvz" for v in "aeiou"]
    words: dict[str, None] = {}
    while len(words) < len(NOUNS):
        words[rng.choice(syllables) + rng.choice(syllables) + rng.choice("nrsl")] = None
    return dict(zip(NOUNS, words, strict=True))


TALU = talu_dictionary()

SOLVERS: dict[str, Callable[[list[str]], str]] = {
    "reverse": lambda words: " ".join(reversed(words)),
    "sort": lambda words: " ".join(sorted(words)),
    "translate": lambda words: " ".join(TALU[word] for word in words),
    "plural": lambda words: " ".join(plural(word) for word in words),
    "animals": lambda words: " ".join(word for word in words if word in ANIMALS),
    "count": lambda words: NUMBERS[sum(word in ANIMALS for word in words)],
}
INSTRUCTIONS = {
    "reverse": "Please reverse the words:",
    "sort": "Please sort the words:",
    "translate": "Please translate the words:",
    "plural": "Please write the plural:",
    "animals": "Please select the animals:",
    "count": "Please count the animals:",
}


def draw_list(rng: random.Random, group: str) -> list[str]:
    """Three to five different nouns, of which at least one belongs to the group."""
    size = rng.randint(3, 5)
    members = rng.randint(1, size)
    others = [word for word in NOUNS if word not in MEMBERS[group]]
    words = rng.sample(MEMBERS[group], members) + rng.sample(others, size - members)
    rng.shuffle(words)
    return words


def make_tasks(seed: int, train_rows: int, test_rows: int) -> dict[str, dict[str, list[dict[str, str]]]]:
    """The rows of every task by split. All tasks share the lists of a split; the lists of the splits are disjoint."""
    rng = random.Random(f"tasks {seed}")
    lists: dict[tuple[str, ...], None] = {}
    while len(lists) < train_rows + test_rows:
        lists[tuple(draw_list(rng, "animals"))] = None
    splits = {"train": list(lists)[:train_rows], "test": list(lists)[train_rows:]}
    return {
        task: {split: [make_row(task, list(words)) for words in drawn] for split, drawn in splits.items()}
        for task in SOLVERS
    }


def make_row(task: str, words: list[str]) -> dict[str, str]:
    """One example of a task."""
    return {"prompt": f"{INSTRUCTIONS[task]} {' '.join(words)}. Answer:", "response": SOLVERS[task](words)}


# Notes about a list and what becomes of it; {words} is the list, {result} the changed list.
FRAMES: dict[str, list[str]] = {
    "copy": [
        "{who} wrote {words} and {other} wrote {result} too.",
        "{who} heard {words}, so {other} heard {result}.",
        "Twice {who} said {words}, {result}.",
        "The same for {other} as for {who}: {words} and {result}.",
        "{who} wants to copy {words} and gets {result}.",
        "To copy {words} made {result}, said {who}.",
    ],
    "reverse": [
        "{who} saw {words} on the way there and {result} on the way back.",
        "Back home past {words} went {who}, so {other} had come past {result}.",
        "The first is the last for {who}: {words} became {result}.",
        "{other} keeps {words} and {who} turns it around: {result}.",
        "{who} wants to reverse {words} and gets {result}.",
        "To reverse {words} made {result}, said {who}.",
    ],
    "sort": [
        "{who} found {words} and the index lists {result}.",
        "The index of the book by {who} with {words} is {result}.",
        "From first letter to last letter {who} finds {words} as {result}.",
        "{who} wants to sort {words} and gets {result}.",
        "To sort {words} made {result}, said {who}.",
    ],
    "translate": [
        "In Talu {words} is {result}.",
        "{who} says {words} and {other} from Talu says {result}.",
        "For {words} the people of Talu have {result}.",
        "{who} wants to translate {words} and gets {result}.",
        "To translate {words} made {result}, said {who}.",
    ],
    "plural": [
        "{who} has one of {words} and {other} has many {result}.",
        "Not one but many {words}: {result}.",
        "{who} had {words} and wanted more {result}.",
        "{who} wants the plural of {words} and gets {result}.",
        "The plural of {words} made {result}, said {who}.",
    ],
    "select": [
        "{who} saw {words} and took the {group}: {result}.",
        "Of {words} the {group} are {result}.",
        "{who} wants to select the {group} of {words} and gets {result}.",
    ],
    "number": [
        "{who} saw {words} with {result} of the {group}.",
        "Of {words} {result} are {group}.",
        "{who} wants to count the {group} of {words} and gets {result}.",
    ],
}


def note(rng: random.Random) -> str:
    """One short text of the pretraining corpus."""
    who, other = rng.sample(NAMES, 2)
    comma = rng.choice([", ", " "])
    group, rest = rng.sample(list(MEMBERS), 2)
    some = rng.sample(MEMBERS[group], rng.randint(2, 5))
    kind = rng.choice([*FRAMES, *FRAMES, "amount", "group", "order", "story"])
    if kind in FRAMES:
        group = rng.choice([name for name in MEMBERS if name != "animals"])
        words = draw_list(rng, group) if kind in ("select", "number") else rng.sample(NOUNS, rng.randint(2, 5))
        members = [word for word in words if word in MEMBERS[group]]
        changed = {"copy": words, "select": members, "number": [NUMBERS[len(members)]]}
        result = comma.join(changed[kind] if kind in changed else SOLVERS[kind](words).split())
        frame = rng.choice(FRAMES[kind])
        return frame.format(who=who, other=other, group=group, words=comma.join(words), result=result)
    if kind == "amount":
        return f"{who} has {NUMBERS[len(some)]} {group}: {comma.join(some)}."
    if kind == "group":
        odd = rng.choice(MEMBERS[rest])
        if rng.random() < 0.5:
            return f"The {group} are {comma.join(some)} but {odd} is one of the {rest}."
        return f"{some[0]} is one of the {group} and {odd} is one of the {rest}."
    if kind == "order":
        first, second = sorted(some[:2])
        return rng.choice([f"{first} comes before {second}.", f"{second} comes after {first}."])
    start = f"The {rng.choice(ADJECTIVES)} {some[0]} {rng.choice(VERBS)}"
    return f"{start} the {rng.choice(ADJECTIVES)} {rng.choice(NOUNS)}."


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A word-level tokenizer over all words and signs; decoding gives the text back as it was."""
    rng = random.Random("vocabulary")
    split = pre_tokenizers.Whitespace()
    texts = [note(rng) for _ in range(4000)] + NOUNS + [plural(n) for n in NOUNS] + list(TALU.values()) + NUMBERS
    texts += NAMES + ADJECTIVES + VERBS + list(INSTRUCTIONS.values()) + ["Answer:"]
    words = sorted({piece for text in texts for piece, _ in split.pre_tokenize_str(text)})
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<bos>", "<eos>", "<unk>", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = split
    tokenizer.decoder = decoders.Sequence([decoders.WordPiece(prefix="##", cleanup=True), decoders.Replace(" :", ":")])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A $B", special_tokens=[("<bos>", vocabulary["<bos>"])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        model_max_length=128,
        clean_up_tokenization_spaces=False,
    )


def encoded_notes(rng: random.Random, tokenizer: PreTrainedTokenizerFast) -> Iterator[list[int]]:
    """Token ids of one new note after another, with its begin and end marks."""
    while True:
        for ids in tokenizer([note(rng) for _ in range(1000)]).input_ids:
            yield [*ids, tokenizer.eos_token_id]


def make_batch(notes: Iterator[list[int]], rows: int, length: int) -> torch.Tensor:
    """Token ids (rows, length), int64: every row starts with a new note and goes on with others until it is full."""
    batch = []
    for _ in range(rows):
        row: list[int] = []
        while len(row) < length:
            row += next(notes)
        batch.append(row[:length])
    return torch.tensor(batch)


def pretrain(
    tokenizer: PreTrainedTokenizerFast, seed: int, steps: int, rows: int = 32, length: int = 64
) -> LlamaForCausalLM:
    """Train a small Llama from scratch on fresh notes, next-token loss, AdamW with a cosine schedule."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=96,
            intermediate_size=256,
            num_hidden_layers=4,
            num_attention_heads=4,
            max_position_embeddings=128,
            tie_word_embeddings=True,
            initializer_range=0.05,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )
    print(f"model: pretraining {model.num_parameters():,} parameters, {steps} steps of {rows * length} tokens")
    notes = encoded_notes(random.Random(f"notes {seed}"), tokenizer)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.05, betas=(0.9, 0.98))
    scheduler = get_cosine_schedule_with_warmup(optimizer, min(200, steps // 10), steps)
    started = time.perf_counter()
    for step in range(1, steps + 1):
        batch = make_batch(notes, rows, length)
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 250 == 0 or step == steps:
            print(f"step {step:5d}  loss {loss.item():.3f}  {time.perf_counter() - started:.0f} s", flush=True)
    return model.eval()


def save_model(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write the model and its tokenizer in the form that transformers' Auto classes read."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    config_file = folder / "tokenizer_config.json"
    config = json.loads(config_file.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    config_file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def save_tasks(tasks: dict[str, dict[str, list[dict[str, str]]]], folder: Path) -> None:
    """Write one JSONL file for each task and split."""
    folder.mkdir(parents=True, exist_ok=True)
    for task, splits in tasks.items():
        for split, rows in splits.items():
            (folder / f"{task}.{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        print(f"tasks: {task}: " + ", ".join(f"{len(rows)} {split} rows" for split, rows in splits.items()))


def main() -> None:
    """Make what `--part` names, print what is being done and how large the result is."""
    parser = argparse.ArgumentParser(description="Make the quickstart's base model and tasks.")
    parser.add_argument("--part", choices=["all", "model", "tasks"], default="all", help="what to make")
    parser.add_argument("--output", type=Path, default=HERE, help="the folder that gets model/ and tasks/")
    parser.add_argument("--seed", type=int, default=0, help="decides the notes, the weights and the tasks' lists")
    parser.add_argument("--steps", type=int, default=5000, help="pretraining steps")
    parser.add_argument("--train-rows", type=int, default=600, help="training rows of each task")
    parser.add_argument("--test-rows", type=int, default=80, help="test rows of each task")
    arguments = parser.parse_args()
    if arguments.part in ("all", "tasks"):
        save_tasks(make_tasks(arguments.seed, arguments.train_rows, arguments.test_rows), arguments.output / "tasks")
    if arguments.part in ("all", "model"):
        tokenizer = make_tokenizer()
        save_model(pretrain(tokenizer, arguments.seed, arguments.steps), tokenizer, arguments.output / "model")
    made = [arguments.output / name for name in ("model", "tasks")]
    size = sum(file.stat().st_size for folder in made for file in folder.glob("*"))
    print(f"done: {size / 1e6:.2f} MB in {arguments.output}")


if __name__ == "__main__":
    main()
