"""Encoding: rendered text -> token ids and labels, through any tokenizer.

A trained stretch must begin at the token where generation would begin. Tokenizers that treat a piece of text like the
same text in the middle of a longer one are given the pieces one by one. Others (SentencePiece with a leading space) are
given the whole, and each stretch is placed by the tokens of what stands before it, which must agree.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lorakit.data.formats import RowError
from lorakit.data.rendering import Rendered

IGNORED = -100


@dataclass(frozen=True)
class Encoded:
    """Token ids, labels of the same length (-100 where not trained), and the token range of each trained turn."""

    input_ids: list[int]
    labels: list[int]
    turns: list[tuple[int, int]]

    def truncated(self, limit: int) -> "Encoded | None":
        """The longest beginning that ends with a whole turn within `limit` tokens; None when not even the first fits.

        A turn that is cut in the middle would be trained without the token that ends it.
        """
        turns = [turn for turn in self.turns if turn[1] <= limit]
        if not turns:
            return None
        return Encoded(self.input_ids[: turns[-1][1]], self.labels[: turns[-1][1]], turns)


def encode(batch: Sequence[Rendered], tokenizer: Any) -> list[Encoded | RowError]:
    """Token ids and labels of each text; a row whose mask would not be exact gives its error instead."""
    place = _by_pieces if joins_pieces(tokenizer) else _by_prefixes
    return [
        _labelled(rendered, *placed, tokenizer) if isinstance(placed, tuple) else placed
        for rendered, placed in zip(batch, place(batch, tokenizer), strict=True)
    ]


def joins_pieces(tokenizer: Any) -> bool:
    """Whether the tokens of a text are those of its pieces put together, wherever it is cut between words."""
    whole, *pieces = _tokens(["b a\na", "b", " a", "\n", "a"], tokenizer)
    return bool(whole) and whole == [token for piece in pieces for token in piece]


def _tokens(texts: list[str], tokenizer: Any) -> list[list[int]]:
    if not texts:
        return []
    return list(tokenizer(texts, add_special_tokens=False, return_attention_mask=False)["input_ids"])


def _cuts(rendered: Rendered) -> list[int]:
    """The ends of all pieces: before a turn, the turn, between turns, ... to the end of the text."""
    edges = {edge for span in rendered.spans for edge in (span.start, span.end)}
    return sorted({*edges, len(rendered.text)} - {0})


# The tokens of a whole text, and for each place where it is cut how many tokens stand before.
_Placed = tuple[list[int], dict[int, int]]


def _by_pieces(batch: Sequence[Rendered], tokenizer: Any) -> list[_Placed | RowError]:
    cuts = [_cuts(rendered) for rendered in batch]
    pieces = [
        rendered.text[start:end]
        for rendered, ends in zip(batch, cuts, strict=True)
        for start, end in zip([0, *ends], ends, strict=False)
    ]
    tokens = iter(_tokens(pieces, tokenizer))
    rows: list[_Placed | RowError] = []
    for ends in cuts:
        ids: list[int] = []
        positions = {0: 0}
        for end in ends:
            ids.extend(next(tokens))
            positions[end] = len(ids)
        rows.append((ids, positions))
    return rows


def _by_prefixes(batch: Sequence[Rendered], tokenizer: Any) -> list[_Placed | RowError]:
    wholes = _tokens([rendered.text for rendered in batch], tokenizer)
    cuts = [_cuts(rendered) for rendered in batch]
    prefixes = iter(_tokens([row.text[:end] for row, ends in zip(batch, cuts, strict=True) for end in ends], tokenizer))
    rows: list[_Placed | RowError] = []
    for rendered, ids, ends in zip(batch, wholes, cuts, strict=True):
        before = {end: next(prefixes) for end in ends}
        joined = next((end for end, prefix in before.items() if ids[: len(prefix)] != prefix), None)
        if joined is None:
            rows.append((ids, {0: 0} | {end: len(prefix) for end, prefix in before.items()}))
        else:
            around = rendered.text[max(joined - 10, 0) : joined + 10]
            rows.append(RowError(f"the tokenizer joins text across the edge of an answer, at {around!r}"))
    return rows


def _labelled(rendered: Rendered, ids: list[int], positions: dict[int, int], tokenizer: Any) -> Encoded | RowError:
    """Labels for the trained stretches, each of which must end in its stop token; one beginning of sequence at most."""
    bos = tokenizer.bos_token_id
    if bos is not None and ids[:2] == [bos, bos]:
        return RowError(f"the text begins with {tokenizer.bos_token!r} twice; the chat template should write it once")
    turns = [(positions[span.start], positions[span.end]) for span in rendered.spans]
    labels = list(ids) if rendered.everything else [IGNORED] * len(ids)
    for (start, end), span in zip(turns, rendered.spans, strict=True):
        if end == start or ids[end - 1] != tokenizer.convert_tokens_to_ids(span.stop):
            return RowError(
                f"{span.stop!r} ends an answer but is not one token of this tokenizer: it cannot be trained"
            )
        labels[start:end] = ids[start:end]
    if rendered.everything:
        return Encoded(ids, labels, turns)
    end = turns[-1][1]  # what stands behind the last trained token changes nothing but the time
    return Encoded(ids[:end], labels[:end], turns)
