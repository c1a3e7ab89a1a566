"""The tokenizer that a GGUF file carries: its vocabulary, its merges, its control tokens and its chat template."""

from tokenizers import AddedToken, Regex, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from llama4lab.checkpoint.gguf.header import Header
from llama4lab.prompt.tiktoken_file import WORD_PATTERN

# How llama.cpp calls the rule by which Llama 4 cuts text into words; it is that of GPT-4o.
WORD_RULES = ("llama4", "gpt-4o")
CONTROL, USER_DEFINED = 3, 4  # types of tokens; all others are words or parts of them
SPECIAL = {"bos_token": "bos", "eos_token": "eos", "pad_token": "padding"}
PREFIX = "tokenizer.ggml."
WHOLE_FILE = "tokenizer.huggingface.json"  # a whole tokenizer.json, in files whose writers put it in


def gguf_tokenizer(header: Header) -> PreTrainedTokenizerFast | None:
    """Gives the tokenizer of a GGUF file; None if the file has no vocabulary.

    Raises:
        ValueError: if it is not one of Llama 4, or its parts do not fit each other.
    """
    tokens = header.metadata.get(f"{PREFIX}tokens")
    if tokens is None:
        return None
    if not isinstance(tokens, list) or not all(isinstance(token, str) for token in tokens):
        raise ValueError(f"{header.file}: {PREFIX}tokens is no list of strings.")
    backend = _from_json(header) if WHOLE_FILE in header.metadata else _backend(header, tokens)
    names = {name: _named(header, tokens, key) for name, key in SPECIAL.items()}
    template = header.metadata.get("tokenizer.chat_template")
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        **{name: token for name, token in names.items() if token is not None},
        chat_template=template if isinstance(template, str) else None,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def _named(header: Header, tokens: list[str], key: str) -> str | None:
    key = f"{PREFIX}{key}_token_id"
    if key not in header.metadata:
        return None
    number = header.get(key, int)
    if not 0 <= number < len(tokens):
        raise ValueError(f"{header.file}: {key} is {number}; ids are 0 to {len(tokens) - 1}.")
    return tokens[number]


def _from_json(header: Header) -> Tokenizer:
    try:
        return Tokenizer.from_str(header.get(WHOLE_FILE, str))
    except Exception as error:  # the tokenizers library raises bare Exception
        raise ValueError(f"{header.file}: {WHOLE_FILE} cannot be read as a tokenizer.\n{error}") from error


def _backend(header: Header, tokens: list[str]) -> Tokenizer:
    kinds, merges = _checked(header, tokens)
    control = [token for token, kind in zip(tokens, kinds, strict=True) if kind == CONTROL]
    added = [token for token, kind in zip(tokens, kinds, strict=True) if kind == USER_DEFINED]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    try:
        # A word that is a token as a whole is never built from merges, which may not lead there.
        model = BPE(
            vocabulary,
            [(left, right) for left, _, right in (merge.partition(" ") for merge in merges)],
            ignore_merges=True,
        )
    except Exception as error:  # the tokenizers library raises bare Exception
        raise ValueError(f"{header.file}: {PREFIX}merges do not fit the vocabulary: {error}") from error
    backend = Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.Sequence(  # pyright: ignore[reportAttributeAccessIssue]
        [
            pre_tokenizers.Split(Regex(WORD_PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    backend.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in control])
    backend.add_tokens([AddedToken(token, normalized=False, special=False) for token in added])
    begin = _named(header, tokens, "bos")
    # Where the file does not say, a text begins with the token for it, as every Llama 4 was trained.
    if begin is not None and header.get(f"{PREFIX}add_bos_token", bool, True):
        backend.post_processor = TemplateProcessing(  # pyright: ignore[reportAttributeAccessIssue]
            single=f"{begin} $A", pair=f"{begin} $A {begin} $B", special_tokens=[(begin, vocabulary[begin])]
        )
    return backend


def _checked(header: Header, tokens: list[str]) -> tuple[list[int], list[str]]:
    """Gives the kinds of the tokens, and the merges, of a vocabulary that is one of Llama 4."""
    file, model, rule = header.file, header.get(f"{PREFIX}model", str), header.get(f"{PREFIX}pre", str, "llama4")
    if model != "gpt2" or rule not in WORD_RULES:
        raise ValueError(
            f"{file}: the tokenizer is of kind {model!r} with words cut as for {rule!r}.\n"
            "That of Llama 4 is 'gpt2' with 'llama4'. Put the model's tokenizer.json beside the file; it is used then."
        )
    kinds, merges = header.metadata.get(f"{PREFIX}token_type"), header.metadata.get(f"{PREFIX}merges", [])
    for name, values, kind in (("token_type", kinds, int), ("merges", merges, str)):
        if not isinstance(values, list) or not all(type(value) is kind for value in values):
            raise ValueError(f"{file}: {PREFIX}{name} is no list of {kind.__name__}.")
    assert isinstance(kinds, list)
    if len(kinds) != len(tokens) or len(set(tokens)) != len(tokens):
        raise ValueError(
            f"{file}: {len(tokens)} tokens, {len(set(tokens))} of them different, have {len(kinds)} types."
        )
    odd = next((merge for merge in merges if merge.count(" ") != 1), None)
    if odd is not None:
        raise ValueError(f"{file}: {PREFIX}merges has {odd!r:.80}; a merge is two tokens and a space between them.")
    return kinds, merges
