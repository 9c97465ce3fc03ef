"""Encoding: rendered text -> token ids and labels, through any tokenizer.

A trained stretch must begin at the token where generation would begin: behind the tokens of the prompt by itself. Each
edge is placed by the tokens of what stands before it. Where these are joined with what follows (an answer that begins
with a line break below a header that ends with one), a tokenizer that treats a piece of text like the same text in the
middle of a longer one is given the two sides apart, as it is when the model answers; a row for any other tokenizer
(SentencePiece with a leading space) is refused.

A fast tokenizer cuts a text at its added tokens before it does anything else, and encodes each segment by itself
(tokenizers, added_vocabulary.rs). So are they here: segments that rows share are encoded once.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate, pairwise
from typing import Any

from lorakit.data.rendering import Rendered, Span
from lorakit.data.rows import RowError

IGNORED = -100

# What is kept of earlier batches, in segments and characters: headers and system prompts come back, answers seldom.
_KEPT, _LONGEST_KEPT = 10_000, 2_000


@dataclass(frozen=True)
class Encoded:
    """Token ids, labels of the same length (-100 where not trained), and the token range of each trained turn."""

    input_ids: list[int]
    labels: list[int]
    turns: list[tuple[int, int]]

    def truncated(self, limit: int) -> "Encoded | None":
        """The longest beginning that ends with a whole turn within `limit` tokens; None when not even the first fits.

        A turn that is cut in the middle would be trained without the token that ends it. A text has no turns: it is cut
        anywhere.
        """
        if not self.turns:
            return Encoded(self.input_ids[:limit], self.labels[:limit], [])
        turns = [turn for turn in self.turns if turn[1] <= limit]
        if not turns:
            return None
        return Encoded(self.input_ids[: turns[-1][1]], self.labels[: turns[-1][1]], turns)

    def pieces(self, limit: int) -> list["Encoded"]:
        """A text in as few pieces of at most `limit` tokens as will do, of about equal length."""
        length = len(self.input_ids)
        count = -(-length // limit)
        bounds = [length * number // count for number in range(count + 1)]
        return [Encoded(self.input_ids[start:end], self.labels[start:end], []) for start, end in pairwise(bounds)]


@dataclass(frozen=True)
class _Cut:
    """A text and the characters at which its turns begin and end."""

    text: str
    edges: list[int]


@dataclass(frozen=True)
class _Placed:
    """The tokens of a whole text, how many stand before each edge, and the edges that are inside a token."""

    ids: list[int]
    before: dict[int, int]
    joined: list[int]


@dataclass
class Encoder:
    """A tokenizer with what it has encoded already."""

    tokenizer: Any
    _segments: dict[str, list[int]] = field(default_factory=dict)

    def encode(self, batch: Sequence[Rendered]) -> list[Encoded | RowError]:
        """Token ids and labels of each text; a row whose mask would not be exact gives its error instead."""
        cuts = [_cut(rendered) for rendered in batch]
        placed = self._by_segments(cuts) if self._splits else self._by_prefixes(cuts)
        found = (
            self._encoded_apart(cut, one.joined) if one.joined and self._joins_pieces else one
            for cut, one in zip(cuts, placed, strict=True)
        )
        return [_labelled(rendered, one, self) for rendered, one in zip(batch, found, strict=True)]

    @cached_property
    def _joins_pieces(self) -> bool:
        """Whether the tokens of a text are those of its pieces put together, wherever it is cut between words."""
        whole, *pieces = self._tokens(["b a\na", "b", " a", "\n", "a"])
        return bool(whole) and whole == [token for piece in pieces for token in piece]

    @cached_property
    def _added(self) -> dict[str, int]:
        """The added tokens at which a text is cut before anything else is done to it, with their ids."""
        added = self.tokenizer.added_tokens_decoder.items()
        return {token.content: number for number, token in added if not token.normalized}

    @cached_property
    def _edge_pattern(self) -> re.Pattern[str]:
        longest_first = sorted(self._added, key=lambda word: (-len(word), word))
        return re.compile("(" + "|".join(map(re.escape, longest_first)) + ")")

    @cached_property
    def _splits(self) -> bool:
        """Whether segments between added tokens can be encoded one by one.

        Not where an added token takes white space beside it, or must stand apart from words; nor where the tokenizer
        treats the beginning of a whole text in a way of its own.
        """
        if not self.tokenizer.is_fast or not self._added or getattr(self.tokenizer, "split_special_tokens", False):
            return False
        tokens = self.tokenizer.added_tokens_decoder.values()
        if any(token.lstrip or token.rstrip or token.single_word for token in tokens):
            return False
        words = self.tokenizer.backend_tokenizer.pre_tokenizer
        return words is None or b'"prepend_scheme":"first"' not in words.__getstate__()

    def stop_id(self, word: str) -> int | None:
        """The id of a token; None or the unknown token's where there is none."""
        found = self._added.get(word)
        return self.tokenizer.convert_tokens_to_ids(word) if found is None else found

    def _tokens(self, texts: list[str]) -> list[list[int]]:
        if not texts:
            return []
        if self.tokenizer.is_fast:
            backend = self.tokenizer.backend_tokenizer
            backend.no_padding()
            backend.no_truncation()
            return [encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)]
        encoded = self.tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)
        return list(encoded["input_ids"])

    def _by_segments(self, cuts: Sequence[_Cut]) -> list[_Placed]:
        split = [_split(cut, self._edge_pattern) for cut in cuts]
        prefixes = [prefix for _, inner in split for _, prefix, _ in inner]
        new = self._learn([*(segment for parts, _ in split for segment in parts[::2]), *prefixes])
        rows = [self._placed(parts, inner) for parts, inner in split]
        if len(self._segments) > _KEPT:
            self._segments.clear()
        for segment in new:
            if len(segment) > _LONGEST_KEPT:
                self._segments.pop(segment, None)
        return rows

    def _learn(self, segments: Iterable[str]) -> list[str]:
        """Encode the segments that are not known yet; gives these."""
        new = [segment for segment in dict.fromkeys(segments) if segment not in self._segments]
        self._segments.update(zip(new, self._tokens(new), strict=True))
        return new

    def _placed(self, parts: list[str], inner: list[tuple[int, str, int]]) -> _Placed:
        """The tokens of a text from those of its segments. `inner`: see `_split`."""
        known, added = self._segments, self._added
        tokens = [[added[part]] if index % 2 else known[part] for index, part in enumerate(parts)]
        counts = list(accumulate(map(len, tokens), initial=0))
        before = dict(zip(accumulate(map(len, parts), initial=0), counts, strict=True))
        joined = []
        for edge, text, part in inner:
            prefix = known[text]
            before[edge] = counts[part] + len(prefix)
            if tokens[part][: len(prefix)] != prefix:
                joined.append(edge)
        return _Placed([token for piece in tokens for token in piece], before, joined)

    def _by_prefixes(self, cuts: Sequence[_Cut]) -> list[_Placed]:
        wholes = self._tokens([cut.text for cut in cuts])
        prefixes = iter(self._tokens([cut.text[:edge] for cut in cuts for edge in cut.edges]))
        rows = []
        for cut, whole in zip(cuts, wholes, strict=True):
            before = {edge: next(prefixes) for edge in cut.edges}
            joined = [edge for edge, prefix in before.items() if whole[: len(prefix)] != prefix]
            rows.append(_Placed(whole, {edge: len(prefix) for edge, prefix in before.items()}, joined))
        return rows

    def _encoded_apart(self, cut: _Cut, joined: list[int]) -> _Placed:
        """A text encoded as several, cut at the edges `joined`."""
        bounds = [0, *joined, len(cut.text)]
        parts = [
            _Cut(cut.text[start:end], [edge - start for edge in cut.edges if start < edge < end])
            for start, end in pairwise(bounds)
        ]
        ids: list[int] = []
        before: dict[int, int] = {}
        still: list[int] = []
        for start, part in zip(bounds, self._by_prefixes(parts), strict=False):
            before |= {start: len(ids)} | {start + edge: len(ids) + count for edge, count in part.before.items()}
            still += [start + edge for edge in part.joined]
            ids += part.ids
        return _Placed(ids, {**before, len(cut.text): len(ids)}, still)


def encode(batch: Sequence[Rendered], tokenizer: Any) -> list[Encoded | RowError]:
    """Token ids and labels of each text; a row whose mask would not be exact gives its error instead."""
    return Encoder(tokenizer).encode(batch)


def _cut(rendered: Rendered) -> _Cut:
    """What stands behind the last turn is left out where it is not trained: it changes nothing but the time."""
    end = len(rendered.text) if rendered.everything else rendered.spans[-1].end
    edges = {edge for span in rendered.spans for edge in (span.start, span.end)}
    if rendered.skipped:
        edges |= {edge for stretch in rendered.skipped for edge in stretch}
    return _Cut(rendered.text[:end], sorted(edges))


def _split(cut: _Cut, pattern: re.Pattern[str]) -> tuple[list[str], list[tuple[int, str, int]]]:
    """A text's segments and, at the odd places, the added tokens between them; of each edge inside a segment the
    character, what stands before it in its segment, and which part that is."""
    parts = pattern.split(cut.text)
    inner = []
    start, part = 0, 0
    for edge in cut.edges:
        while start + len(parts[part]) < edge:
            start += len(parts[part])
            part += 1
        if start < edge < start + len(parts[part]):
            inner.append((edge, parts[part][: edge - start], part))
    return parts, inner


def _labelled(rendered: Rendered, placed: _Placed, encoder: Encoder) -> Encoded | RowError:
    """Labels for the trained turns, each of which must end in its stop token; one beginning of sequence at most."""
    tokenizer = encoder.tokenizer
    ids, bos = placed.ids, tokenizer.bos_token_id
    if placed.joined:
        around = rendered.text[max(placed.joined[0] - 10, 0) : placed.joined[0] + 10]
        return RowError("the tokenizer joins text across the edge of an answer", f"at {around!r}")
    if bos is not None and ids[:2] == [bos, bos]:
        return RowError(f"the text begins with {tokenizer.bos_token!r} twice; the chat template should write it once")
    turns = [(placed.before[span.start], placed.before[span.end]) for span in rendered.spans]
    labels = list(ids) if rendered.everything else [IGNORED] * len(ids)
    for begin, stop in rendered.skipped:
        start, end = placed.before[begin], placed.before[stop]
        labels[start:end] = [IGNORED] * (end - start)
    for (start, end), span in zip(turns, rendered.spans, strict=True):
        wrong = _wrong(ids[start:end], span, encoder)
        if wrong:
            return wrong
        labels[start:end] = ids[start:end]
    if rendered.opening:
        return _behind(list(rendered.opening), Encoded(ids, labels, turns))
    return Encoded(ids, labels, turns)


def _behind(opening: list[int], encoded: Encoded) -> Encoded:
    """The same behind some tokens that are not trained."""
    turns = [(start + len(opening), end + len(opening)) for start, end in encoded.turns]
    return Encoded([*opening, *encoded.input_ids], [IGNORED] * len(opening) + encoded.labels, turns)


def _wrong(turn: list[int], span: Span, encoder: Encoder) -> RowError | None:
    """Why the tokens of a turn cannot be trained."""
    stop, tokenizer = encoder.stop_id(span.stop), encoder.tokenizer
    if not turn or turn[-1] != stop:
        return RowError(f"{span.stop!r} ends an answer but is not one token of this tokenizer: it cannot be trained")
    if stop in turn[:-1]:
        return RowError(f"an answer contains the token {span.stop!r}, which ends a turn of this model")
    unknown = tokenizer.unk_token_id
    if unknown is not None and unknown in turn[:-1]:
        return RowError(f"an answer has characters for which the tokenizer has only {tokenizer.unk_token!r}")
    return None
