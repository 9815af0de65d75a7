"""Tokenizers of a few characters, built in memory, one for each way of treating spaces and special tokens."""

from __future__ import annotations

import string

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

CHARACTERS = string.ascii_letters + string.digits + " .,:;!?#|=+-*/()<>'\"_\n"
SPECIAL = ["<unk>", "<s>", "</s>"]

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def _wrap(tokenizer: Tokenizer, **options: object) -> PreTrainedTokenizerFast:
    defaults = {"unk_token": "<unk>", "pad_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **{**defaults, **options})


def _bos(tokenizer: Tokenizer) -> None:
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])


def plain_tokenizer(chat: str | None = None, *, bos: bool = True, **options: object) -> PreTrainedTokenizerFast:
    """One token a character, `\\n` with a following `\\n` merged, `<s>` in front."""
    vocabulary = {token: index for index, token in enumerate([*SPECIAL, *CHARACTERS, "\n\n", "ab"])}
    tokenizer = Tokenizer(models.BPE(vocabulary, [("\n", "\n"), ("a", "b")], unk_token="<unk>"))
    tokenizer.decoder = decoders.Fuse()
    if bos:
        _bos(tokenizer)
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in (*SPECIAL, "<|im_start|>", "<|im_end|>")])
    wrapped = _wrap(tokenizer, **options)
    wrapped.chat_template = chat
    return wrapped


def space_adding_tokenizer(chat: str | None = None) -> PreTrainedTokenizerFast:
    """As Llama 2's: `▁` before every text, spaces are `▁`, `▁a` and `▁b` are tokens."""
    letters = [character for character in CHARACTERS if character != " "]
    vocabulary = {token: index for index, token in enumerate([*SPECIAL, "▁", *letters, "▁a", "▁b", "\n\n"])}
    tokenizer = Tokenizer(models.BPE(vocabulary, [("▁", "a"), ("▁", "b"), ("\n", "\n")], unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    _bos(tokenizer)
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in SPECIAL])
    wrapped = _wrap(tokenizer)
    wrapped.chat_template = chat
    return wrapped


def ending_tokenizer(*, bos: bool = False) -> PreTrainedTokenizerFast:
    """As T5's: words with `▁`, the end token behind every text (and, as BART's, a beginning token before it)."""
    words = ["translate", "this", "that", "one", "two", "three"]
    vocabulary = {token: index for index, token in enumerate([*SPECIAL, *(f"▁{word}" for word in words)])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    single = "<s> $A </s>" if bos else "$A </s>"
    tokenizer.post_processor = processors.TemplateProcessing(single=single, special_tokens=[("<s>", 1), ("</s>", 2)])
    return _wrap(tokenizer, **({} if bos else {"bos_token": None}))
