"""Tokenizers small enough that a test knows every id."""

from pathlib import Path

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

BOS, EOS = "<s>", "</s>"  # ids 0 and 1
WORDS = tuple(f"w{number}" for number in range(100))  # ids 3 to 102, after the unknown word, id 2


def word_id(word: str) -> int:
    """Id of one of WORDS."""
    return 3 + WORDS.index(word)


def words(directory: Path, *, bos: bool = False, eos: bool = False, pad_to: int | None = None):
    """A tokenizer of whole small-letter words, read back with AutoTokenizer from the files it was saved to.

    `pad_to` stores a padding and truncation length in tokenizer.json, which nothing here must obey.
    """
    vocabulary = {word: place for place, word in enumerate((BOS, EOS, "<unk>", *WORDS))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return _saved(tokenizer, directory, bos, eos, pad_to)


def letters(directory: Path, *, bos: bool = False):
    """A byte-level BPE tokenizer like GPT-2's, with the merges `Ġ`+`P`, `ĠP`+`a` and `o`+`f` only."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("Ġ", "P"), ("ĠP", "a"), ("o", "f")]
    pieces = [BOS, EOS, *alphabet, *("".join(pair) for pair in merges)]
    vocabulary = {piece: place for place, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges))
    # Without its regular expression, so that merges reach across the seam of two texts.
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return _saved(tokenizer, directory, bos, False, None)


def _saved(tokenizer: Tokenizer, directory: Path, bos: bool, eos: bool, pad_to: int | None):
    single = f"{BOS} $A" if bos else "$A"
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{single} {EOS}" if eos else single, special_tokens=[(BOS, 0), (EOS, 1)]
    )
    if pad_to is not None:
        tokenizer.enable_padding(length=pad_to, pad_id=1, pad_token=EOS)
        tokenizer.enable_truncation(pad_to)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS).save_pretrained(
        directory
    )
    return AutoTokenizer.from_pretrained(directory)
