"""Tokenizing: rendered text -> token ids and labels, through any tokenizer. A trained stretch must begin at the token
where generation would begin: each edge is placed by the tokens of what stands before it. Where these are joined with
what follows (an answer that begins with a line break below a header that ends with one), a tokenizer that treats a
piece of text like the same text in the middle of a longer one is given the two sides apart, as when the model answers;
a row for any other tokenizer (SentencePiece with a leading space) is refused. A fast tokenizer cuts a text at its added
tokens first, and encodes each segment by itself (tokenizers, added_vocabulary.rs). So do we: segments that rows share
are encoded once, and so are words."""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, chain, pairwise
from typing import Any

from lorakit.data.chat_template import RenderedText, TurnSpan
from lorakit.data.chat_template.template_probe import compile_alternation
from lorakit.data.rows import IGNORED, Encoded, RowError
from lorakit.data.words import WordCache

_MAX_SEGMENTS, _MAX_SEGMENT_LENGTH = 10_000, 2_000  # are remembered: headers and system prompts recur, answers seldom


@dataclass(frozen=True)
class _Cut:
    """A text, the characters at which its turns begin and end, and those of them at which its tokens are cut too."""

    text: str
    edges: list[int]
    apart: Sequence[int] = ()


@dataclass(frozen=True)
class _CutTokens:
    """The tokens of a text, how many stand before each edge, and the edges that are inside a token."""

    ids: list[int]
    before: dict[int, int]
    joined: list[int]


class Encoder:
    """A tokenizer, what is the same for all its texts, and the segments that it has encoded. `bos`: the id of the
    beginning of sequence. `vocabulary`: how many tokens there are."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.bos: int | None = tokenizer.bos_token_id
        self.vocabulary = len(tokenizer)
        self._unknown_id: int | None = tokenizer.unk_token_id
        # A text is cut at these added tokens before anything else is done to it.
        added = tokenizer.added_tokens_decoder.items()
        self._added: dict[str, int] = {token.content: number for number, token in added if not token.normalized}
        self._separators = self._added if _can_split(tokenizer) else {}
        self._separator = compile_alternation(self._separators)
        # Whether the tokens of a text are those of its pieces put together, wherever it is cut between words.
        whole, *pieces = self._tokens(["b a\na", "b", " a", "\n", "a"])
        self._joins_pieces = bool(whole) and whole == list(chain.from_iterable(pieces))
        self._segments: dict[str, list[int]] = {}
        self._encode_texts = WordCache(tokenizer, self._tokens).tokens if _can_split(tokenizer) else self._tokens

    def encode(self, batch: Sequence[RenderedText]) -> list[Encoded | RowError]:
        """Token ids and labels of each text; a row whose mask would not be exact gives its error instead."""
        cuts = []
        for rendered in batch:
            # What stands after the last turn is left out where it is not trained: it changes nothing but the time.
            end = len(rendered.text) if rendered.everything else rendered.spans[-1].end
            edges = {edge for span in rendered.spans for edge in (span.start, span.end)}
            cuts.append(_Cut(rendered.text[:end], sorted(edges)))
        encoded = self._encode_cuts(cuts)
        if self._joins_pieces:
            for at, tokens in enumerate(encoded):
                if tokens.joined:
                    encoded[at : at + 1] = self._encode_cuts([replace(cuts[at], apart=tokens.joined)])
        return [self._label(rendered, tokens) for rendered, tokens in zip(batch, encoded, strict=True)]

    def stop_id(self, word: str) -> int | None:
        """The id of a token; None where there is none."""
        if word in self._added:
            return self._added[word]
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

    def _encode_cuts(self, cuts: Sequence[_Cut]) -> list[_CutTokens]:
        known = self._segments
        if not known or len(known) > _MAX_SEGMENTS:
            known.clear()
            known.update({word: [number] for word, number in self._separators.items()}, **{"": []})
        split = [self._split(cut) for cut in cuts]
        wanted = set(chain.from_iterable(parts for parts, _ in split))
        wanted.update(prefix for _, edges in split for _, _, prefix in edges)
        new = sorted(wanted - known.keys())  # sorted, so that equal runs do equal work
        known.update(zip(new, self._encode_texts(new), strict=True))
        encoded = []
        for parts, edges in split:
            tokens = [known[part] for part in parts]
            counts = [0, *accumulate(map(len, tokens))]
            before, joined = {}, []
            for edge, part, text in edges:
                prefix = known[text]
                before[edge] = counts[part] + len(prefix)
                if text and tokens[part][: len(prefix)] != prefix:
                    joined.append(edge)
            encoded.append(_CutTokens(list(chain.from_iterable(tokens)), before, joined))
        for segment in new:
            if len(segment) > _MAX_SEGMENT_LENGTH:
                del known[segment]
        return encoded

    def _split(self, cut: _Cut) -> tuple[list[str], list[tuple[int, int, str]]]:
        """A text's segments and the separators between them; of each edge the character, the part in which it stands
        or which begins there, and what of that part stands before it."""
        parts = []
        for start, end in pairwise([0, *cut.apart, len(cut.text)]):
            parts += self._separator.split(cut.text[start:end])
        starts = [0, *accumulate(map(len, parts))]
        edges = []
        for edge in cut.edges:
            part = bisect_right(starts, edge) - 1
            start = starts[part]
            edges.append((edge, part, parts[part][: edge - start] if edge > start else ""))
        return parts, edges

    def _label(self, rendered: RenderedText, tokens: _CutTokens) -> Encoded | RowError:
        """Labels for the trained turns, each of which must end in its stop token; one beginning of sequence at most."""
        if tokens.joined:
            around = rendered.text[max(tokens.joined[0] - 10, 0) : tokens.joined[0] + 10]
            return RowError("the tokenizer joins text across the edge of an answer", f"at {around!r}")
        opening = len(rendered.opening)
        ids = [*rendered.opening, *tokens.ids] if opening else tokens.ids
        if self.bos is not None and ids[:2] == [self.bos, self.bos]:
            word = self.tokenizer.bos_token
            return RowError(f"the text begins with {word!r} twice; the chat template should write it once")
        before = {edge: count + opening for edge, count in tokens.before.items()} if opening else tokens.before
        labels = [IGNORED] * opening + tokens.ids if rendered.everything else [IGNORED] * len(ids)
        turns = []
        for span in rendered.spans:
            start, end = before[span.start], before[span.end]
            if not span.trained:
                labels[start:end] = [IGNORED] * (end - start)
                continue
            error = self._turn_error(ids[start:end], rendered.text[span.start : span.end], span)
            if error:
                return error
            labels[start:end] = ids[start:end]
            turns.append((start, end))
        if rendered.everything and not turns and tokens.ids[-1:] != [self.tokenizer.eos_token_id]:
            return RowError("the tokenizer does not end the text in one token, its end token: it cannot be trained")
        error = self._unknown_error("the text", tokens.ids, rendered.text) if rendered.everything else None
        return error or Encoded(ids, labels, turns)

    def _turn_error(self, ids: list[int], text: str, span: TurnSpan) -> RowError | None:
        stop = self.stop_id(span.stop)
        if not ids or ids[-1] != stop:
            return RowError(
                f"{span.stop!r} ends an answer but is not one token of this tokenizer: it cannot be trained"
            )
        error = self._unknown_error("an answer", ids, text)
        if error is None and stop in ids[:-1]:
            return RowError(f"an answer contains the token {span.stop!r}, which ends a turn of this model")
        return error

    def _unknown_error(self, what: str, ids: list[int], text: str) -> RowError | None:
        """Why a text cannot be trained that has the unknown token more often than it spells it (GPT-2 ends texts with
        it)."""
        unknown, word = self._unknown_id, str(self.tokenizer.unk_token)
        if unknown is None or ids.count(unknown) <= text.count(word):
            return None
        case = ""
        if self.tokenizer.is_fast:  # a slow one does not say where its tokens stand
            text = text.replace(word, " ")
            encoding = self.tokenizer.backend_tokenizer.encode(text, add_special_tokens=False)
            offsets = zip(encoding.ids, encoding.offsets, strict=True)
            case = next((repr(text[start:end]) for one, (start, end) in offsets if one == unknown and end > start), "")
        return RowError(f"{what} has characters for which the tokenizer has only {word!r}, its unknown token", case)


def _can_split(tokenizer: Any) -> bool:
    """Whether segments between added tokens can be encoded one by one: not where an added token takes white space next
    to it or must stand apart from words, nor where the tokenizer treats the beginning of a text differently."""
    if not tokenizer.is_fast or getattr(tokenizer, "split_special_tokens", False):
        return False
    added = tokenizer.added_tokens_decoder.values()
    if any(token.lstrip or token.rstrip or token.single_word for token in added):
        return False
    words = tokenizer.backend_tokenizer.pre_tokenizer
    return words is None or b'"prepend_scheme":"first"' not in words.__getstate__()
