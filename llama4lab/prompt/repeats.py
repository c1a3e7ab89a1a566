"""Random tokens that repeat: nothing but copying predicts the second round, which shows the heads that copy."""

from collections.abc import Sequence

import torch

from llama4lab.model.config_parts import text_part
from llama4lab.model.pretrained import HookedPreTrainedModel
from llama4lab.prompt.prompt import Prompt

LONGEST = 50  # what a round has at most, if nothing else is asked for


def repeated_tokens(
    model: HookedPreTrainedModel,
    rows: int = 8,
    *,
    length: int | None = None,
    rounds: int = 2,
    vocabulary: Sequence[int] | None = None,
    seed: int = 0,
) -> Prompt:
    """Gives rows of random tokens, each the same sequence of different tokens several times.

    A row begins with the token that begins every text, if the model has one.

    Args:
        model: The model.
        rows: How many.
        length: Tokens of a round; by default 50, or as many as let all rounds fit into one chunk.
        rounds: How often the sequence stands there.
        vocabulary: The ids to draw from; by default all but control tokens, padding and image tokens.
        seed: Of the draw.

    Raises:
        ValueError: if there are fewer ids than a round has tokens, or nothing to repeat.
    """
    ids = torch.tensor(_ordinary(model) if vocabulary is None else sorted(set(vocabulary)))
    first = model.tokenizer.bos_token_id if model.tokenizer is not None else text_part(model.config).bos_token_id
    start = [first] if isinstance(first, int) and 0 <= first < model.prompter.vocabulary.size else []
    chunk = text_part(model.config).attention_chunk_size
    if length is None:
        room = LONGEST if chunk is None else (chunk - len(start)) // max(rounds, 1)
        length = min(LONGEST, room, len(ids))
    if length < 1 or rounds < 2 or rows < 1 or length > len(ids):
        raise ValueError(
            f"{rows} rows of {rounds} rounds of {length} tokens were asked for, drawn from {len(ids)} ids.\n"
            "There are at least 1 row, 2 rounds and 1 token, and no token stands twice in a round."
        )
    generator = torch.Generator().manual_seed(seed)
    drawn = [ids[torch.randperm(len(ids), generator=generator)[:length]].tolist() for _ in range(rows)]
    return model.prompt([[*start, *(one * rounds)] for one in drawn])


def _ordinary(model: HookedPreTrainedModel) -> list[int]:
    """The ids that stand for text."""
    config, vocabulary = text_part(model.config), model.prompter.vocabulary
    ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    barred = {config.bos_token_id, config.pad_token_id, *ends, vocabulary.patch_id, vocabulary.padding}
    size = vocabulary.size if vocabulary.tokenizer is None else min(vocabulary.size, len(vocabulary.tokenizer))
    return [token for token in range(size) if token not in barred and token not in vocabulary.special]
