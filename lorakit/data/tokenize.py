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
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate, chain, pairwise
from typing import Any

from lorakit.data.chat_template import Rendered, Span
from lorakit.data.chat_template.template_probe import alternation
from lorakit.data.conversations import IGNORED, Encoded
from lorakit.data.rows import RowError

# What is kept of earlier batches, in segments and characters: headers and system prompts come back, answers seldom.
_KEPT, _LONGEST_KEPT = 10_000, 2_000


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
        return re.compile(f"({alternation(self._added)})")

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

    @cached_property
    def bos(self) -> int | None:
        """The id of the beginning of sequence."""
        number: int | None = self.tokenizer.bos_token_id
        return number

    @cached_property
    def vocabulary(self) -> int:
        """How many tokens there are."""
        return len(self.tokenizer)

    @cached_property
    def unknown(self) -> int | None:
        """The id of what stands for characters that the tokenizer does not know."""
        number: int | None = self.tokenizer.unk_token_id
        return number

    def get_ready(self) -> None:
        """Find out about the tokenizer what is the same for all rows, so that forked processes know it already."""
        _ = self._splits, self._joins_pieces, self.bos, self.unknown

    def unknown_in(self, text: str) -> str:
        """The first piece of a text that the tokenizer does not know; empty where it does not say."""
        if not self.tokenizer.is_fast:
            return ""
        encoding = self.tokenizer.backend_tokenizer.encode(text, add_special_tokens=False)
        found = zip(encoding.ids, encoding.offsets, strict=True)
        return next((text[start:end] for number, (start, end) in found if number == self.unknown), "")

    def stop_id(self, word: str) -> int | None:
        """The id of a token; None where there is none."""
        found = self._added.get(word)
        if found is not None:
            return found
        number: int | None = self.tokenizer.convert_tokens_to_ids(word)
        return number if number is not None and self.tokenizer.convert_ids_to_tokens(number) == word else None

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
        known = self._segments
        if not known or len(known) > _KEPT:
            known.clear()
            known.update({word: [number] for word, number in self._added.items()}, **{"": []})
        split = [_split(cut, self._edge_pattern) for cut in cuts]
        wanted = set(chain.from_iterable(parts for parts, _ in split))
        wanted.update(prefix for _, edges in split for _, _, prefix in edges)
        new = sorted(wanted - known.keys())  # in an order of their own, so that equal runs do equal work
        known.update(zip(new, self._tokens(new), strict=True))
        rows = [self._placed(parts, edges) for parts, edges in split]
        for segment in new:
            if len(segment) > _LONGEST_KEPT:
                del known[segment]
        return rows

    def _placed(self, parts: list[str], edges: list[tuple[int, int, str]]) -> _Placed:
        """The tokens of a text from those of its segments. `edges`: see `_split`."""
        known = self._segments
        tokens = [known[part] for part in parts]
        counts = [0, *accumulate(map(len, tokens))]
        before, joined = {}, []
        for edge, part, text in edges:
            before[edge] = counts[part]
            if text:
                prefix = known[text]
                before[edge] += len(prefix)
                if tokens[part][: len(prefix)] != prefix:
                    joined.append(edge)
        return _Placed(list(chain.from_iterable(tokens)), before, joined)

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


def _split(cut: _Cut, pattern: re.Pattern[str]) -> tuple[list[str], list[tuple[int, int, str]]]:
    """A text's segments and the added tokens between them; of each edge the character, the part in which it stands or
    which begins there, and what of that part stands before it."""
    parts = pattern.split(cut.text)
    starts = [0, *accumulate(map(len, parts))]
    edges = []
    for edge in cut.edges:
        part = bisect_right(starts, edge) - 1
        start = starts[part]
        edges.append((edge, part, parts[part][: edge - start] if edge > start else ""))
    return parts, edges


def _labelled(rendered: Rendered, placed: _Placed, encoder: Encoder) -> Encoded | RowError:
    """Labels for the trained turns, each of which must end in its stop token; one beginning of sequence at most."""
    opening, bos = len(rendered.opening), encoder.bos
    ids = [*rendered.opening, *placed.ids] if opening else placed.ids
    if placed.joined:
        around = rendered.text[max(placed.joined[0] - 10, 0) : placed.joined[0] + 10]
        return RowError("the tokenizer joins text across the edge of an answer", f"at {around!r}")
    if bos is not None and ids[:2] == [bos, bos]:
        word = encoder.tokenizer.bos_token
        return RowError(f"the text begins with {word!r} twice; the chat template should write it once")
    before = {edge: count + opening for edge, count in placed.before.items()} if opening else placed.before
    labels = [IGNORED] * opening + placed.ids if rendered.everything else [IGNORED] * len(ids)
    for begin, stop in rendered.skipped:
        start, end = before[begin], before[stop]
        labels[start:end] = [IGNORED] * (end - start)
    turns = [(before[span.start], before[span.end]) for span in rendered.spans]
    for (start, end), span in zip(turns, rendered.spans, strict=True):
        wrong = _wrong(ids[start:end], rendered.text[span.start : span.end], span, encoder)
        if wrong:
            return wrong
        labels[start:end] = ids[start:end]
    wrong = _wrong_outside(rendered.text, placed.ids, bool(turns), encoder) if rendered.everything else None
    return wrong or Encoded(ids, labels, turns)


def _wrong_outside(text: str, ids: list[int], turns: bool, encoder: Encoder) -> RowError | None:
    """Why a text of which everything is trained cannot be: a document must end in the end token, and be known."""
    if not turns and (not ids or ids[-1] != encoder.tokenizer.eos_token_id):
        return RowError("the tokenizer does not end the text in one token, its end token: it cannot be trained")
    return _unknown("the text", ids, text, encoder)


def _wrong(turn: list[int], text: str, span: Span, encoder: Encoder) -> RowError | None:
    """Why the tokens of a turn cannot be trained."""
    stop = encoder.stop_id(span.stop)
    if not turn or turn[-1] != stop:
        return RowError(f"{span.stop!r} ends an answer but is not one token of this tokenizer: it cannot be trained")
    unknown = _unknown("an answer", turn, text, encoder)
    if unknown is None and stop in turn[:-1]:
        return RowError(f"an answer contains the token {span.stop!r}, which ends a turn of this model")
    return unknown


def _unknown(what: str, ids: list[int], text: str, encoder: Encoder) -> RowError | None:
    """Why a text cannot be trained that has the unknown token more often than it spells it. That may be a token with
    another meaning besides: GPT-2 ends texts with it."""
    if encoder.unknown is None or encoder.unknown not in ids:
        return None
    word = str(encoder.tokenizer.unk_token)
    if ids.count(encoder.unknown) <= text.count(word):
        return None
    characters = encoder.unknown_in(text.replace(word, " "))
    return RowError(
        f"{what} has characters for which the tokenizer has only {word!r}, its token for the unknown",
        characters and f"{characters!r}",
    )
