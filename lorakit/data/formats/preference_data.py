"""Columns that say of an answer whether it should be given: preference pairs, KTO rows, rewards and ranks.

lorakit trains on what should be said. A column that reverses or qualifies that is never passed over: pairs, ranks and
rewards are refused with what they are, and of rows with a flag those that it speaks against.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from lorakit.data.formats.columns import is_empty
from lorakit.data.rows import RowError
from lorakit.errors import UserError

Record = Mapping[str, Any]
CanBeRead = Callable[[Mapping[str, str], str], bool]
"""Whether rows are of a format with these columns (ours -> theirs), which reads the one of ours that is named, if
any."""

# What the better and the worse side of a pair are called, as a whole name or as a part of one (rejected_response). All
# but chosen are words of games and applications too.
_SIDES = (
    ("chosen", "rejected"),
    ("chosen", "reject"),
    ("accepted", "rejected"),
    ("preferred", "rejected"),
    ("preferred", "dispreferred"),
    ("preferred", "non_preferred"),
    ("winner", "loser"),
    ("winning", "losing"),
    ("better", "worse"),
)
_REJECTED = ("rejected", "dispreferred", "non_preferred")
_VERDICTS = (
    *("winner", "preference", "preferred", "label", "choice", "chosen"),
    *("better_response_id", "safer_response_id"),
)
_ANSWER = re.compile(r"(?:\w+_)?(?:response|answer|output|completion|conversation|generation|reply|candidate)s?")
_NUMBERED = (("_a", "_b"), ("_0", "_1"), ("_1", "_2"))
_LISTS = ("answers", "completions", "responses", "outputs", "candidates", "generations")
_RATINGS = ("scores", "score", "ranks", "rank", "ranking", "rankings", "rewards", "ratings", "labels", "votes")
_RATING = re.compile(r"(?:^|_)(?:score|rank|rating|reward|votes?|selected)s?(?:_|$)")
_REWARDS = ("reward", "rewards", "rank")
# A rank alone may be that of anything; among several answers to one of these it is the answers'.
_QUESTIONS = ("prompt", "question", "instruction", "query")

# Flags that speak for an answer where they are true, and those that speak against it.
_FOR = (
    *("label", "kto_tag", "desirable", "is_desirable", "preferred", "is_preferred", "accepted", "is_accepted"),
    *("approved", "is_approved", "good", "is_good", "correct", "is_correct", "chosen", "is_chosen", "selected"),
    *("is_selected", "liked", "thumbs_up", "train", "loss", "weight", "acceptable", "is_acceptable", "feedback"),
)
_AGAINST = (
    *("rejected", "is_rejected", "undesirable", "bad", "is_bad", "wrong", "is_wrong", "incorrect", "is_incorrect"),
    *("disliked", "thumbs_down", "deleted", "is_deleted"),
)
_FLAGS = dict.fromkeys(_FOR, False) | dict.fromkeys(_AGAINST, True)
# What a flag may be written as besides true and false. Of a label, 0 and 1, yes and no are classes more often than
# judgements.
_WRITTEN = {
    **dict.fromkeys(("true", "desirable", "chosen", "preferred", "thumbs_up", "thumbs up"), True),
    **dict.fromkeys(("false", "undesirable", "rejected", "dispreferred", "thumbs_down", "thumbs down"), False),
}
_WRITTEN_BUT_IN_LABELS = {"yes": True, "no": False, "1": True, "0": False}
_CLASSES = ("label",)
# The columns of ours that a chosen answer may stand in, the first that the rows can be read with.
_WHOLE, _ASKING = ("messages", "conversations"), ("user", "human", "system")
_ANSWERS = ("completion", "messages", "output", "answer", "conversations", "text")
_ANSWERED = {*_ANSWERS, "answers", "conversation"} - {"text"}


def refuse_preference_data(
    where: str, records: Sequence[Record], columns: Mapping[str, str], can_be_read: CanBeRead
) -> None:
    """Refuse rows of which some column says that an answer is the worse one, or how good it is.

    `columns` are the recipe's (ours -> theirs).

    Raises:
        UserError: they are such rows. It says how to train on what should be said.
    """
    filled = {name for record in records for name, value in record.items() if not is_empty(value)}
    texts = {name for name in filled if any(isinstance(record.get(name), (str, list, Mapping)) for record in records)}
    taken = set(columns.values())
    _refuse_rejected(where, columns, texts)
    for better, worse in preference_pairs(texts):
        if better not in taken and not (_stands_beside(better, worse, records) and can_be_read(columns, "")):
            remedy = _remedy(better, columns, [record.get(better) for record in records], can_be_read)
            raise UserError(
                f"{where}: these are preference pairs ({better!r} and {worse!r}, as for DPO). lorakit trains on what "
                f"should be said: {remedy}."
            )
    verdict = next((name for name in _VERDICTS if name in filled), None)
    for pair in _numbered(texts | taken) if verdict else ():
        if not taken.isdisjoint(pair) or not can_be_read(columns, ""):  # else they stand beside what is trained
            raise UserError(
                f"{where}: these are pairs of answers ({pair[0]!r} and {pair[1]!r}) of which {verdict!r} says which is "
                "better. lorakit trains on what should be said: write the better answer of each row into a column of "
                "its own."
            )
    _refuse_ranked(where, records, "question" in filled or not can_be_read(columns, ""))
    _refuse_rewarded(where, records, filled)


def preference_pairs(columns: set[str]) -> Iterator[tuple[str, str]]:
    """The columns that are the two sides of a pair, the better one first."""
    plain = {_plain(name): name for name in sorted(columns)}
    for worse, written in plain.items():
        for better_word, worse_word in _SIDES:
            if f"_{worse_word}_" in f"_{worse}_":
                better = f"_{worse}_".replace(f"_{worse_word}_", f"_{better_word}_").strip("_")
                if better in plain and better != worse:
                    yield plain[better], written


def _plain(name: str) -> str:
    """A column's name in one way of writing: is_correct for isCorrect, Is-Correct and the like."""
    return re.sub(r"[\s-]+|(?<=[a-z])(?=[A-Z])", "_", name.strip()).lower()


def _stands_beside(better: str, worse: str, records: Sequence[Record]) -> bool:
    """Whether what may be the sides of a pair is something else: not called chosen, and never what another column
    says."""
    return "chosen" not in _plain(better).split("_") and not any(
        record[worse] == value
        for record in records
        if not is_empty(record.get(worse))
        for name, value in record.items()
        if name != worse
    )


def rejection_flags(records: Sequence[Record], read: set[str]) -> dict[str, bool]:
    """The columns that are flags in rows like these, with what they say of an answer that should not be given. Those
    that the rows' format reads itself (`read`) are none."""
    names = {*_FLAGS, *(name for record in records for name in record if _plain(name) in _FLAGS)}
    return {
        name: _FLAGS[_plain(name)]
        for name in names - read
        if all(_flag(name, value) is not None for value in _values(records, name))
    }


def refuse_rejected_answer(record: Record, flags: Mapping[str, bool]) -> None:
    """Refuse a row of which a flag says that its answer should not be given.

    Raises:
        RowError: it does.
    """
    for name in flags.keys() & record.keys():
        if _flag(name, record[name]) is flags[name]:
            raise RowError(
                f"the column {name!r} says that this answer should not be given, as in data for KTO, and lorakit "
                "trains on what should be said (leave such rows out; where the column means something else, leave the "
                "column out)",
                f"it is {record[name]!r}",
            )


def _refuse_rejected(where: str, columns: Mapping[str, str], texts: set[str]) -> None:
    for our, their in columns.items():
        worse = any(f"_{word}_" in f"_{their}_" for word in _REJECTED)
        better = next((one for one, other in preference_pairs(texts | {their}) if other == their), None)
        if worse or better:
            raise UserError(
                f"{where}: data.columns takes {our!r} from {their!r}, the side of a preference pair that should not be "
                f"said. lorakit trains on what should be said: columns: {{{our}: {better or 'chosen'}}}."
            )


def _remedy(better: str, columns: Mapping[str, str], answers: list[Any], can_be_read: CanBeRead) -> str:
    for our in sorted(_ANSWERS, key=lambda our: our not in _WHOLE) if any(map(_is_whole, answers)) else _ANSWERS:
        tried = {**columns, our: better}
        if can_be_read(tried, our) and (our not in _WHOLE or any(map(_is_whole, answers))):
            written = ", ".join(f"{one}: {other}" for one, other in tried.items())
            whole = ", which trains its texts whole, as documents" if our == "text" else ""
            return f"keep the chosen side with columns: {{{written}}}{whole}"
    return (
        f"write the messages before the answer and those of {better!r} into one column, messages, and leave the other "
        "side out"
    )


def _is_whole(answer: Any) -> bool:
    """Whether an answer is a whole conversation, its question too."""
    first = answer[0] if isinstance(answer, list) and answer else None
    return isinstance(first, Mapping) and not {first.get("role"), first.get("from")}.isdisjoint(_ASKING)


def _numbered(texts: set[str]) -> Iterator[tuple[str, str]]:
    """Columns that are two answers to one prompt."""
    for one, other in _NUMBERED:
        for name in sorted(texts):
            stem = name.removesuffix(one)
            if stem != name and _ANSWER.fullmatch(stem) and stem + other in texts:
                yield name, stem + other


def _refuse_ranked(where: str, records: Sequence[Record], used: bool) -> None:
    """`used`: the lists do not stand beside an answer that is trained."""
    for name in _LISTS if used else ():
        for record in records:
            answers = record.get(name)
            if not isinstance(answers, list) or not answers:
                continue
            parallel = [rating for rating in _RATINGS if _is_parallel(record.get(rating), answers)]
            parts = answers[0] if isinstance(answers[0], Mapping) else {}
            inside = [part for part in parts if _RATING.search(str(part)) and _is_number(parts[part])]
            if parallel or inside:
                raise UserError(
                    f"{where}: these are ranked answers: {(parallel or inside)[0]!r} says how good each of {name!r} "
                    "is. lorakit trains on what should be said: write the best answer of each row into a column of its "
                    "own."
                )


def _refuse_rewarded(where: str, records: Sequence[Record], filled: set[str]) -> None:
    for name in _REWARDS if not filled.isdisjoint(_ANSWERED) else ():
        values = _values(records, name)
        if values and all(_is_number(value) for value in values) and (name != "rank" or _several_ranks(records)):
            raise UserError(
                f"{where}: these are answers with rewards: {name!r} says how good each is. lorakit trains on what "
                f"should be said: keep the rows that should be, without the column {name!r}."
            )


def _several_ranks(records: Sequence[Record]) -> bool:
    """Whether answers to one question have different ranks."""
    ranks: dict[str, Any] = {}
    for record in records:
        for name in _QUESTIONS:
            if not is_empty(record.get(name)) and ranks.setdefault(
                repr(record[name]), record.get("rank")
            ) != record.get("rank"):
                return True
    return False


def _is_parallel(ratings: Any, answers: list[Any]) -> bool:
    return isinstance(ratings, list) and len(ratings) == len(answers) and all(map(_is_number, ratings))


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float))


def _values(records: Sequence[Record], name: str) -> list[Any]:
    return [value for record in records if (value := record.get(name)) is not None]


def _flag(name: str, value: Any) -> bool | None:
    """What a flag says; None where it is none."""
    if isinstance(value, bool):
        return value
    is_class = _plain(name) in _CLASSES
    if isinstance(value, str):
        word = value.strip().lower()
        return _WRITTEN.get(word, None if is_class else _WRITTEN_BUT_IN_LABELS.get(word))
    return bool(value) if isinstance(value, (int, float)) and value in (0, 1) and not is_class else None
