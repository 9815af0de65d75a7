"""Text → ids: boundaries, special tokens, masks, conversations, truncation, encoder-decoder."""

from __future__ import annotations

from itertools import groupby

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_tokenizers import CHATML, ending_tokenizer, plain_tokenizer, space_adding_tokenizer
from tokenizers import normalizers

from moadapt.errors import DataError
from moadapt.train.data_config import DataConfig
from moadapt.train.encoding import NO_PROMPT_LEFT, Encoder, Example, end_token_id
from moadapt.train.sources import Table
from moadapt.train.templates import NO_PROMPT, NO_RESPONSE, TextRow

BOS, EOS = 1, 2
PLAIN, SPACED = plain_tokenizer(), space_adding_tokenizer()
TABLE = Table("data.jsonl", [], [], list(range(1, 50)))


def config(**options):
    return DataConfig.model_validate({"path": "x", "task_column": "task", **options})


def encode(tokenizer, *rows, enc_dec=False, **options):
    """Examples of (prompt, response) pairs or lists of messages."""
    texts = [
        TextRow(i, "", row[-1]["content"], row, None) if isinstance(row, list) else TextRow(i, *row, None, None)
        for i, row in enumerate(rows)
    ]
    encoder = Encoder(tokenizer, config(**options), is_encoder_decoder=enc_dec)
    results = list(encoder.encode(texts, 3, TABLE))
    return results[0] if len(results) == 1 else results


def example(tokenizer, row, **options) -> Example:
    result = encode(tokenizer, row, **options)
    assert not isinstance(result, str)
    return result[0]


def tokens(tokenizer, ids):
    return tokenizer.convert_ids_to_tokens(ids)


def chat(*contents):
    return [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]


def test_an_example_field_by_field():
    tokenizer = plain_tokenizer()
    found = example(tokenizer, ("hi:", " yo"))
    assert tokens(tokenizer, found.input_ids) == ["<s>", "h", "i", ":", " ", "y", "o", "</s>"]
    assert found.prompt_length == 4
    assert found.labels == [-100] * 4 + found.input_ids[4:]
    assert found.prompt_mask == [1] * 4 + [0] * 4
    assert (found.task_id, found.row, found.prompt_text, found.response_text) == (3, 0, "hi:", " yo")
    assert found.choices is None


def test_train_on_prompt_covers_every_token_but_keeps_the_prompt_mask():
    found = example(plain_tokenizer(), ("hi:", " yo"), train_on_prompt=True)
    assert found.labels == found.input_ids
    assert found.prompt_mask == [1] * 4 + [0] * 4


letters = st.text("ab \n:", min_size=1, max_size=8)


@settings(deadline=None)
@given(letters, letters, letters)
def test_prompt_ids_do_not_depend_on_the_response_nor_it_on_the_prompt(prompt, one, two):
    for tokenizer in (PLAIN, SPACED):
        first, second = example(tokenizer, (prompt, one)), example(tokenizer, (prompt, two))
        other = example(tokenizer, ("b" + prompt, one))
        head = first.input_ids[: first.prompt_length]
        assert head == second.input_ids[: second.prompt_length]
        assert head == Encoder(tokenizer, config()).encode_prompt(prompt) == tokenizer(prompt)["input_ids"]
        assert other.input_ids[other.prompt_length :] == first.input_ids[first.prompt_length :]


@settings(deadline=None)
@given(letters, letters)
def test_the_ids_spell_prompt_and_response_without_an_added_space(prompt, response):
    for tokenizer in (PLAIN, SPACED):
        found = example(tokenizer, (prompt, response))
        assert tokenizer.decode(found.input_ids[1:-1]) == prompt + response


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        (" ab", ["▁a", "b"]),  # and not "▁", "▁a", "b"
        ("ab", ["a", "b"]),  # and not "▁a", "b"
        ("\n\nab", ["\n\n", "a", "b"]),  # begins like the first anchor
        ("\n:=|ab", ["\n", ":", "=", "|", "a", "b"]),
    ],
)
def test_no_space_is_added_before_a_response(response, expected):
    found = example(SPACED, ("x:", response))
    assert tokens(SPACED, found.input_ids) == ["<s>", "▁", "x", ":", *expected, "</s>"]


@pytest.mark.parametrize(
    ("options", "first", "last"),
    [
        ({}, "<s>", "</s>"),
        ({"eos_token": 1}, "<s>", "<s>"),
        ({"eos_token": "<|im_end|>"}, "<s>", "<|im_end|>"),
        ({"add_eos": False}, "<s>", "o"),
        ({"add_bos": False}, "h", "</s>"),
        ({"add_bos": True}, "<s>", "</s>"),
    ],
)
def test_first_and_last_token(options, first, last):
    tokenizer = plain_tokenizer()
    found = tokens(tokenizer, example(tokenizer, ("hi", "yo"), **options).input_ids)
    assert (found[0], found[-1]) == (first, last)
    assert len(found) == 4 + (options.get("add_bos", True)) + (options.get("add_eos", True))


def test_special_tokens_are_not_doubled():
    tokenizer = plain_tokenizer()
    found = example(tokenizer, ("<s>hi", "yo</s>"))
    assert tokens(tokenizer, found.input_ids) == ["<s>", "h", "i", "y", "o", "</s>"]
    assert example(plain_tokenizer(bos=False), ("hi", "yo"), add_bos=True).input_ids[0] == BOS
    assert example(plain_tokenizer(bos=False), ("hi", "yo")).input_ids[0] != BOS


def test_an_end_token_that_the_tokenizer_adds_is_not_put_between_prompt_and_response():
    tokenizer = ending_tokenizer()
    found = example(tokenizer, ("translate this", "one"))
    assert tokens(tokenizer, found.input_ids)[:2] == ["▁translate", "▁this"]
    assert found.input_ids.count(EOS) == 1
    assert found.input_ids[-1] == EOS


def test_end_token_refusals():
    with pytest.raises(DataError, match="'<end>' is not a token"):
        end_token_id(PLAIN, config(eos_token="<end>"))
    with pytest.raises(DataError, match="id 4096 is outside the vocabulary"):
        end_token_id(PLAIN, config(eos_token=4096))
    with pytest.raises(DataError, match="has no end token"):
        end_token_id(plain_tokenizer(eos_token=None), config())
    assert end_token_id(PLAIN, config(add_eos=False)) is None
    with pytest.raises(DataError, match="no beginning token"):
        Encoder(plain_tokenizer(bos=False, bos_token=None), config(add_bos=True))


def test_conversation_has_its_loss_on_every_assistant_turn():
    tokenizer = plain_tokenizer(CHATML)
    found = example(tokenizer, chat("hi", "yo", "a", "ok"))
    pieces = [
        ("<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n", False),
        ("yo<|im_end|>", True),
        ("\n<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n", False),
        ("ok<|im_end|>", True),
    ]
    assert tokenizer.decode(found.input_ids) == "".join(text for text, _ in pieces)
    responses = "".join(text for text, is_response in pieces if is_response)
    assert tokenizer.decode([label for label in found.labels if label != -100]) == responses
    prompts = [token for token, mark in zip(found.input_ids, found.prompt_mask, strict=True) if mark]
    assert tokenizer.decode(prompts) == "".join(text for text, is_response in pieces if not is_response)
    assert tokenizer.decode(found.input_ids[: found.prompt_length]) == "".join(text for text, _ in pieces[:3])
    assert found.response_text == "ok"
    assert [label for label in found.labels if label != -100] == [
        token for token, mark in zip(found.input_ids, found.prompt_mask, strict=True) if not mark
    ]


def test_a_conversation_is_generated_from_the_ids_it_was_trained_on():
    for tokenizer in (plain_tokenizer(CHATML), space_adding_tokenizer(CHATML)):
        found = example(tokenizer, chat("hi", "\nyo"))
        prompt = Encoder(tokenizer, config()).encode_messages(chat("hi"))
        assert found.input_ids[: found.prompt_length] == prompt
        templated = tokenizer.apply_chat_template(chat("hi"), add_generation_prompt=True, return_dict=False)
        assert prompt == list(templated)


def test_a_template_without_an_end_token_gets_one_after_the_last_answer():
    tokenizer = plain_tokenizer("{% for m in messages %}{{ m.role[0] }}:{{ m.content }}\n{% endfor %}")
    found = example(tokenizer, chat("hi", "yo", "a", "ok"))
    assert tokenizer.decode(found.input_ids) == "u:hi\na:yo\nu:a\na:ok\n</s>"
    assert tokenizer.decode([label for label in found.labels if label != -100]) == "a:yo\na:ok\n</s>"


def test_conversation_refusals():
    with pytest.raises(DataError, match=r"data.jsonl:1: the tokenizer has no chat template"):
        encode(plain_tokenizer(), chat("hi", "yo"))
    forgetful = "{% for m in messages %}{% if m.role == 'user' or loop.last %}[{{ m.content }}]{% endif %}{% endfor %}"
    tokenizer = plain_tokenizer(forgetful)
    assert example(tokenizer, chat("hi", "yo")).response_text == "yo"
    with pytest.raises(DataError, match=r"data.jsonl:1: message 2: .*differently from the whole"):
        encode(tokenizer, chat("hi", "yo", "a", "ok"))
    asking = "{% for m in messages %}[{{ m.content }}]{% endfor %}{% if add_generation_prompt %}[think{% endif %}"
    with pytest.raises(DataError, match=r"message 2: .*asks for an answer with '\[hi\]\[think'"):
        encode(plain_tokenizer(asking), chat("hi", "yo"))
    assert example(plain_tokenizer(asking), chat("hi", "think yo")).response_text == "think yo"
    refusing = plain_tokenizer("{{ raise_exception('no system role') }}")
    with pytest.raises(DataError, match=r"data.jsonl:1: .*refuses these messages: no system role"):
        encode(refusing, chat("hi", "yo"))


def test_rows_longer_than_max_length_are_dropped_and_the_limit_itself_is_allowed():
    # <s> + 4 + 4 + </s> = 10 tokens
    assert encode(PLAIN, ("xxxx", "yyyy"), max_length=9) == "longer than max_length"
    found, truncated = encode(PLAIN, ("xxxx", "yyyy"), max_length=10)
    assert len(found.input_ids) == 10
    assert not truncated


@pytest.mark.parametrize(
    ("prompt", "response", "limit", "expected", "prompt_length"),
    [
        ("123456789", "xyz", 9, "<s>6789xyz</s>", 5),  # the prompt loses its left, the beginning token stays
        ("12345678", "stuvwxyz", 8, "<s>678stuv", 4),  # half stays for the prompt, then the response loses its right
        ("1", "tuvwxyz123", 8, "<s>1tuvwxy", 2),  # a short prompt stays whole
    ],
)
def test_truncation(prompt, response, limit, expected, prompt_length):
    found, truncated = encode(PLAIN, (prompt, response), max_length=limit, on_too_long="truncate")
    assert truncated
    assert PLAIN.decode(found.input_ids) == expected
    assert len(found.input_ids) == limit
    assert found.prompt_length == prompt_length
    assert found.labels == [-100] * prompt_length + found.input_ids[prompt_length:]
    assert found.prompt_mask == [1] * prompt_length + [0] * (limit - prompt_length)


@settings(deadline=None)
@given(st.text("xyz", min_size=1, max_size=30), st.text("123", min_size=1, max_size=30), st.integers(8, 20))
def test_truncated_rows_fit_and_keep_a_part_of_both(prompt, response, limit):
    found, truncated = encode(PLAIN, (prompt, response), max_length=limit, on_too_long="truncate")
    assert truncated == (len(prompt) + len(response) + 2 > limit)
    assert len(found.input_ids) == min(limit, len(prompt) + len(response) + 2)
    text = PLAIN.decode(found.input_ids[1 : found.prompt_length])
    assert text
    assert prompt.endswith(text)
    answer = PLAIN.decode(found.input_ids[found.prompt_length :])
    assert answer
    assert f"{response}</s>".startswith(answer)
    if len(response) + 1 <= limit - limit // 2:
        assert answer == f"{response}</s>"


def test_truncated_conversation_keeps_its_last_answer():
    tokenizer = plain_tokenizer(CHATML)
    found, truncated = encode(tokenizer, chat("hi", "yo", "a", "ok"), max_length=16, on_too_long="truncate")
    assert truncated
    assert tokenizer.decode(found.input_ids) == "<|im_end|>\n<|im_start|>assistant\nok<|im_end|>"
    assert len(found.input_ids) == 16
    assert tokenizer.decode(found.input_ids[found.prompt_length :]) == "ok<|im_end|>"


def turns(tokenizer, found) -> list[tuple[str, str]]:
    """Each run of prompt tokens, and the answer behind it, as text."""
    runs = [
        (is_prompt, tokenizer.decode([token for token, _ in pairs]))
        for is_prompt, pairs in groupby(zip(found.input_ids, found.prompt_mask, strict=True), key=lambda pair: pair[1])
    ]
    texts = [text for _, text in runs]
    assert [is_prompt for is_prompt, _ in runs] == [1, 0] * (len(runs) // 2)  # a prompt, an answer, and so on
    return list(zip(texts[::2], texts[1::2], strict=True))


def begin(tokenizer, bos):
    """CHATML, with a beginning token in the template."""
    tokenizer.chat_template = ("<s>" if bos else "") + CHATML
    return tokenizer


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("make", [plain_tokenizer, space_adding_tokenizer])
def test_a_turn_is_a_prompt_and_its_answer(make, bos):
    """Beginning token and system message are of the first turn; a line break behind an answer is of the next one."""
    tokenizer = begin(make(), bos)
    rows = [{"role": "system", "content": "be"}, *chat("hi", "yo", "a", "ok", "b", "no")]
    found = turns(tokenizer, example(tokenizer, rows))
    marks = "<|im_start|>{}\n{}<|im_end|>\n".format
    asks = "<|im_start|>assistant\n"
    plain = make is plain_tokenizer  # the other one has no token for the marks, and a space before a text
    start = ("<s>" if plain else "<s> ") if bos else ""
    first = start + marks("system", "be") + marks("user", "hi") + asks
    end = "<|im_end|>" if plain else "<|im_end|>\n"
    gap = "\n" if plain else ""
    assert found == [
        (first, f"yo{end}"),
        (gap + marks("user", "a") + asks, f"ok{end}"),
        (gap + marks("user", "b") + asks, f"no{end}" if plain else "no<|im_end|>\n</s>"),
    ]


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("limit", range(14, 72))
def test_a_conversation_that_is_cut_begins_with_a_prompt(limit, bos):
    """However far the cut on the left or the right goes; no answer is left without a part of its own prompt."""
    tokenizer = begin(plain_tokenizer(), bos)
    row = chat("hi", "0123456789", "a", "abcdefghijklmnop")
    whole = turns(tokenizer, example(tokenizer, row))
    found, truncated = encode(tokenizer, row, max_length=limit, on_too_long="truncate")
    cut = turns(tokenizer, found)
    assert truncated == (limit < 69 + bos)
    assert len(found.input_ids) <= limit
    assert (found.input_ids[0] == BOS) == bos
    ours, theirs = cut[0], whole[-len(cut)]
    if len(cut) == len(whole):  # a part of the first prompt is left
        assert theirs[0].endswith(ours[0].removeprefix("<s>"))
        assert len(ours[0]) > 3 * bos
    else:  # the first answer went with its prompt
        assert theirs[0].endswith(ours[0].removeprefix("<s>"))
        assert ours[0].removeprefix("<s>")
    assert all(answer == wanted for (_, answer), (_, wanted) in zip(cut[:-1], whole[-len(cut) : -1], strict=True))
    assert whole[-1][1].startswith(cut[-1][1])
    assert found.prompt_length == len(found.input_ids) - found.prompt_mask[::-1].index(1)


def test_the_rest_of_an_answer_goes_with_its_prompt():
    tokenizer = plain_tokenizer(CHATML)
    row = chat("hi", "0123456789", "a", "abc")
    # 21 tokens before the first answer, 11 in it, 21 in the second prompt, 3 in the last answer ("ab" is one)
    found, truncated = encode(tokenizer, row, max_length=30, on_too_long="truncate")
    assert truncated
    text = "\n<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nabc<|im_end|>"
    assert tokenizer.decode(found.input_ids) == text  # and not "56789<|im_end|>" before it
    assert found.labels == [
        -100 if mark else token for token, mark in zip(found.input_ids, found.prompt_mask, strict=True)
    ]


def test_a_row_that_cannot_keep_a_prompt_is_dropped():
    tokenizer = plain_tokenizer("{% for m in messages %}<{{ m.content }}>{% endfor %}")
    row = [*chat("hi", "0123456789"), {"role": "assistant", "content": "abcdefghijkl"}]
    assert encode(tokenizer, row, max_length=16, on_too_long="truncate") == NO_PROMPT_LEFT
    assert turns(tokenizer, example(tokenizer, row)) == [("<hi>", "<0123456789><abcdefghijkl></s>")]
    silent = plain_tokenizer()
    silent.backend_tokenizer.normalizer = normalizers.Replace("@", "")
    assert encode(silent, ("@@", "x")) == NO_PROMPT


@pytest.mark.parametrize("bos", [False, True])
def test_encoder_decoder(bos):
    tokenizer = ending_tokenizer(bos=bos)
    found = example(tokenizer, ("translate this", "one two"), enc_dec=True)
    assert found.input_ids == tokenizer("translate this")["input_ids"]
    assert found.labels == tokenizer("one two")["input_ids"]
    assert found.prompt_length == len(found.input_ids)
    assert found.prompt_mask == [1] * len(found.input_ids)
    assert Encoder(tokenizer, config(), is_encoder_decoder=True).encode_prompt("translate this") == found.input_ids


def test_encoder_decoder_limits_prompt_and_response_each():
    tokenizer = ending_tokenizer()
    row = ("this " * 9 + "that", "one " * 11 + "two")  # 10 + </s> and 12 + </s> tokens
    assert encode(tokenizer, row, enc_dec=True, max_length=12) == "longer than max_length"
    assert not encode(tokenizer, row, enc_dec=True, max_length=13)[1]
    found, truncated = encode(tokenizer, row, enc_dec=True, max_length=8, on_too_long="truncate")
    assert truncated
    assert tokens(tokenizer, found.input_ids) == ["▁this"] * 6 + ["▁that", "</s>"]
    assert tokens(tokenizer, found.labels) == ["▁one"] * 8


def test_encoder_decoder_has_no_loss_on_the_prompt():
    with pytest.raises(DataError, match="train_on_prompt"):
        Encoder(ending_tokenizer(), config(train_on_prompt=True), is_encoder_decoder=True)


def test_a_response_that_leaves_no_token_is_dropped():
    tokenizer = plain_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("@", "")
    assert encode(tokenizer, ("x", "@@")) == NO_RESPONSE


def test_many_rows_keep_their_order():
    rows = [(f"{index}:", f" {index}") for index in range(2500)]
    results = encode(PLAIN, *rows)
    assert [result[0].row for result in results] == list(range(2500))
    assert all(result[0].response_text == f" {index}" for index, result in enumerate(results))
    assert PLAIN.decode(results[2345][0].input_ids) == "<s>2345: 2345</s>"
