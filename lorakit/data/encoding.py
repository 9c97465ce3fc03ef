"""Encoding: rendered text -> token ids and labels, through any tokenizer.

A trained stretch must begin at the token where generation would begin: behind the tokens of the prompt by itself. Most
texts have the same tokens whether encoded whole or cut at the edges of their turns, and are done with that. In others
each edge is placed by the tokens of what stands before it. Where these are joined with what follows (an answer that
begins with a line break below a header that ends with one), a tokenizer that treats a piece of text like the same text
in the middle of a longer one is given the two sides apart, as it is when the model answers; a row for any other
tokenizer (SentencePiece with a leading space) is refused.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from lorakit.data.formats import RowError
from lorakit.data.rendering import Rendered, Span

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


@dataclass(frozen=True)
class _Cut:
    """A text and the characters at which its turns begin and end."""

    text: str
    edges: list[int]

    def pieces(self) -> list[str]:
        return [self.text[start:end] for start, end in pairwise(sorted({0, *self.edges, len(self.text)}))]


@dataclass(frozen=True)
class _Placed:
    """The tokens of a whole text, how many stand before each edge, and the edges that are inside a token."""

    ids: list[int]
    before: dict[int, int]
    joined: list[int]


def encode(batch: Sequence[Rendered], tokenizer: Any) -> list[Encoded | RowError]:
    """Token ids and labels of each text; a row whose mask would not be exact gives its error instead."""
    cuts = [_cut(rendered) for rendered in batch]
    apart = joins_pieces(tokenizer)
    placed: list[_Placed | None] = _by_pieces(cuts, tokenizer) if apart else [None] * len(cuts)
    missing = [index for index, found in enumerate(placed) if found is None]
    for index, found in zip(missing, _by_prefixes([cuts[index] for index in missing], tokenizer), strict=True):
        placed[index] = _encoded_apart(cuts[index], found.joined, tokenizer) if apart and found.joined else found
    return [
        _labelled(rendered, found, tokenizer)
        for rendered, found in zip(batch, placed, strict=True)
        if found is not None
    ]


def joins_pieces(tokenizer: Any) -> bool:
    """Whether the tokens of a text are those of its pieces put together, wherever it is cut between words."""
    whole, *pieces = _tokens(["b a\na", "b", " a", "\n", "a"], tokenizer)
    return bool(whole) and whole == [token for piece in pieces for token in piece]


def _tokens(texts: list[str], tokenizer: Any) -> list[list[int]]:
    if not texts:
        return []
    return list(tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"])


def _cut(rendered: Rendered) -> _Cut:
    """What stands behind the last turn is left out where it is not trained: it changes nothing but the time."""
    end = len(rendered.text) if rendered.everything else rendered.spans[-1].end
    return _Cut(rendered.text[:end], sorted({edge for span in rendered.spans for edge in (span.start, span.end)}))


def _by_pieces(cuts: Sequence[_Cut], tokenizer: Any) -> list[_Placed | None]:
    """The texts whose tokens are those of their pieces; None for the others."""
    wholes = _tokens([cut.text for cut in cuts], tokenizer)
    tokens = iter(_tokens([piece for cut in cuts for piece in cut.pieces()], tokenizer))
    rows: list[_Placed | None] = []
    for cut, whole in zip(cuts, wholes, strict=True):
        ids: list[int] = []
        before, at = {0: 0}, 0
        for piece in cut.pieces():
            ids += next(tokens)
            at += len(piece)
            before[at] = len(ids)
        rows.append(_Placed(ids, before, []) if ids == whole else None)
    return rows


def _by_prefixes(cuts: Sequence[_Cut], tokenizer: Any) -> list[_Placed]:
    wholes = _tokens([cut.text for cut in cuts], tokenizer)
    prefixes = iter(_tokens([cut.text[:edge] for cut in cuts for edge in cut.edges], tokenizer))
    rows = []
    for cut, whole in zip(cuts, wholes, strict=True):
        before = {edge: next(prefixes) for edge in cut.edges}
        joined = [edge for edge, prefix in before.items() if whole[: len(prefix)] != prefix]
        rows.append(_Placed(whole, {edge: len(prefix) for edge, prefix in before.items()}, joined))
    return rows


def _encoded_apart(cut: _Cut, joined: list[int], tokenizer: Any) -> _Placed:
    """A text encoded as several, cut at the edges `joined`."""
    bounds = [0, *joined, len(cut.text)]
    parts = [
        _Cut(cut.text[start:end], [edge - start for edge in cut.edges if start < edge < end])
        for start, end in pairwise(bounds)
    ]
    ids: list[int] = []
    before: dict[int, int] = {}
    still: list[int] = []
    for start, part in zip(bounds, _by_prefixes(parts, tokenizer), strict=False):
        before |= {start: len(ids)} | {start + edge: len(ids) + count for edge, count in part.before.items()}
        still += [start + edge for edge in part.joined]
        ids += part.ids
    return _Placed(ids, {**before, len(cut.text): len(ids)}, still)


def _labelled(rendered: Rendered, placed: _Placed, tokenizer: Any) -> Encoded | RowError:
    """Labels for the trained turns, each of which must end in its stop token; one beginning of sequence at most."""
    ids, bos = placed.ids, tokenizer.bos_token_id
    if placed.joined:
        around = rendered.text[max(placed.joined[0] - 10, 0) : placed.joined[0] + 10]
        return RowError("the tokenizer joins text across the edge of an answer", f"at {around!r}")
    if bos is not None and ids[:2] == [bos, bos]:
        return RowError(f"the text begins with {tokenizer.bos_token!r} twice; the chat template should write it once")
    turns = [(placed.before[span.start], placed.before[span.end]) for span in rendered.spans]
    labels = list(ids) if rendered.everything else [IGNORED] * len(ids)
    for (start, end), span in zip(turns, rendered.spans, strict=True):
        wrong = _wrong(ids[start:end], span, tokenizer)
        if wrong:
            return wrong
        labels[start:end] = ids[start:end]
    return Encoded(ids, labels, turns)


def _wrong(turn: list[int], span: Span, tokenizer: Any) -> RowError | None:
    """Why the tokens of a turn cannot be trained."""
    stop = tokenizer.convert_tokens_to_ids(span.stop)
    if not turn or turn[-1] != stop:
        return RowError(f"{span.stop!r} ends an answer but is not one token of this tokenizer: it cannot be trained")
    if stop in turn[:-1]:
        return RowError(f"an answer contains the token {span.stop!r}, which ends a turn of this model")
    unknown = tokenizer.unk_token_id
    if unknown is not None and unknown in turn[:-1]:
        return RowError(f"an answer has characters for which the tokenizer has only {tokenizer.unk_token!r}")
    return None
