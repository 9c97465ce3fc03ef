"""Preference data: columns that tell how good an answer is. lorakit trains on every answer as the right one: so pairs,
ranks and rewards are refused as a whole, and of rows with a flag (as for KTO) those that the flag rejects."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from lorakit.data.formats.columns import is_empty
from lorakit.data.rows import RowError
from lorakit.errors import UserError

Record = Mapping[str, Any]
CanRead = Callable[[Mapping[str, str], str], bool]
"""Whether some format reads the rows with these columns (ours -> theirs), and reads the one of ours that is named."""

# Names of the worse side of a pair -> those of the better one, whole or parts of them (rejected_response). All but
# chosen are also words of games and applications.
_SIDES = {
    "rejected": ("chosen", "accepted", "preferred"), "reject": ("chosen",), "dispreferred": ("preferred",),
    "non_preferred": ("preferred",), "loser": ("winner",), "losing": ("winning",), "worse": ("better",),
}  # fmt: skip
_REJECTED = ("rejected", "dispreferred", "non_preferred")
_VERDICT_WORDS = "winner preference preferred label choice chosen better_response_id safer_response_id"
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
    "label kto_tag desirable is_desirable preferred is_preferred accepted is_accepted approved is_approved good "
    "is_good correct is_correct chosen is_chosen selected is_selected liked thumbs_up train loss weight acceptable "
    "is_acceptable feedback"
)
_AGAINST = (
    "rejected is_rejected undesirable bad is_bad wrong is_wrong incorrect is_incorrect disliked thumbs_down deleted "
    "is_deleted"
)
_FLAGS = dict.fromkeys(_FOR.split(), False) | dict.fromkeys(_AGAINST.split(), True)
# What a flag may be written as. Of a label, 0 and 1, yes and no are classes more often than judgements.
_WORDS = {
    **dict.fromkeys(("true", "desirable", "chosen", "preferred", "thumbs_up", "thumbs up"), True),
    **dict.fromkeys(("false", "undesirable", "rejected", "dispreferred", "thumbs_down", "thumbs down"), False),
}
_WORDS_EXCEPT_IN_LABELS = {"yes": True, "no": False, "1": True, "0": False}
# Our columns for a chosen answer, or a whole conversation; the first that the rows can be read with is named.
_ANSWERS, _WHOLE = ("completion", "output", "answer", "text"), ("messages", "conversations")
_ANSWERED = {"completion", "messages", "output", "answer", "answers", "conversation", "conversations"}
_ASKING_ROLES = ("user", "human", "system")


def refuse_preference_data(
    where: str, records: Sequence[Record], columns: Mapping[str, str], can_read: CanRead
) -> None:
    """Refuse, as a `UserError`, rows in which a column says which answer is the worse one, or how good each is.
    `columns` are the recipe's (ours -> theirs), and those that its texts answer with, under their own names."""
    for what, remedy in _findings(records, columns, can_read):
        raise UserError(f"{where}: {what}. lorakit trains on what should be said: {remedy}.")


def _findings(records: Sequence[Record], columns: Mapping[str, str], can_read: CanRead) -> Iterator[tuple[str, str]]:
    """What the rows are, and how to train on the good answers."""
    filled = {name for record in records for name, value in record.items() if not is_empty(value)}
    texts = {name for name in filled if any(isinstance(record.get(name), (str, list, Mapping)) for record in records)}
    mapped = set(columns.values())
    for our, their in columns.items():
        better = next((one for one, other in preference_pairs(texts | {their}) if other == their), None)
        if better or any(f"_{word}_" in f"_{their}_" for word in _REJECTED):
            side = "the side of a preference pair that should not be said"
            if our == their:  # as an answer of the format template names it
                yield f"data.format answers with {their!r}, {side}", f"write {{{better or 'chosen'}}}"
            yield f"data.columns takes {our!r} from {their!r}, {side}", f"columns: {{{our}: {better or 'chosen'}}}"
    for better, worse in preference_pairs(texts):
        if better not in mapped and not (_is_another_column(better, worse, records) and can_read(columns, "")):
            remedy = _remedy(better, columns, [record.get(better) for record in records], can_read)
            yield f"these are preference pairs ({better!r} and {worse!r}, as for DPO)", remedy
    verdict = next((name for name in _VERDICT_WORDS.split() if name in filled), None)
    for one, other in _numbered_answers(texts | mapped) if verdict else ():
        if not mapped.isdisjoint((one, other)) or not can_read(columns, ""):  # else what is trained is another column
            what = f"these are pairs of answers ({one!r} and {other!r}) of which {verdict!r} says which is better"
            yield what, "write the better answer of each row into a column of its own"
    if "question" in filled or not can_read(columns, ""):  # else what is trained is another column
        for rating, name in _ratings(records):
            what = f"these are ranked answers: {rating!r} says how good each of {name!r} is"
            yield what, "write the best answer of each row into a column of its own"
    for name in _REWARDS if not filled.isdisjoint(_ANSWERED) else ():
        values = [value for record in records if (value := record.get(name)) is not None]
        if values and all(map(_is_number, values)) and (name != "rank" or _has_several_ranks(records)):
            what = f"these are answers with rewards: {name!r} says how good each is"
            yield what, f"keep the rows that should be, without the column {name!r}"


def preference_pairs(columns: set[str]) -> Iterator[tuple[str, str]]:
    """The columns that are the two sides of a pair, the better one first."""
    plain = {_plain(name): name for name in sorted(columns)}
    for worse, written in plain.items():
        for word in _SIDES:
            sides = (f"_{worse}_".replace(f"_{word}_", f"_{other}_").strip("_") for other in _SIDES[word])
            yield from ((plain[better], written) for better in sides if better in plain and better != worse)


def _plain(name: str) -> str:
    """A column's name in one way of writing: is_correct for isCorrect, Is-Correct and the like."""
    return re.sub(r"[\s-]+|(?<=[a-z])(?=[A-Z])", "_", name.strip()).lower()


def _is_another_column(better: str, worse: str, records: Sequence[Record]) -> bool:
    """Whether a seeming pair is something else: not called chosen, and no other column ever equals the worse side."""
    if "chosen" in _plain(better).split("_"):
        return False
    answers = ((record[worse], record.items()) for record in records if not is_empty(record.get(worse)))
    return not any(value == answer and name != worse for answer, items in answers for name, value in items)


def _remedy(better: str, columns: Mapping[str, str], answers: list[Any], can_read: CanRead) -> str:
    for our in (*(_WHOLE if any(map(_is_conversation, answers)) else ()), *_ANSWERS):
        tried = {**columns, our: better}
        if can_read(tried, our):
            mapping = ", ".join(f"{one}: {other}" for one, other in tried.items())
            note = ", which trains its texts whole, as documents" if our == "text" else ""
            return f"keep the chosen side with columns: {{{mapping}}}{note}"
    return f"write the messages before the answer and those of {better!r} into one column, messages, without the others"


def _is_conversation(answer: Any) -> bool:
    first = answer[0] if isinstance(answer, list) and answer else None
    return isinstance(first, Mapping) and not {first.get("role"), first.get("from")}.isdisjoint(_ASKING_ROLES)


def _numbered_answers(texts: set[str]) -> Iterator[tuple[str, str]]:
    """Columns that are two answers to one prompt."""
    for one, other in _NUMBERED:
        stems = (name.removesuffix(one) for name in sorted(texts) if name.endswith(one))
        yield from ((stem + one, stem + other) for stem in stems if stem + other in texts and _ANSWER.fullmatch(stem))


def _ratings(records: Sequence[Record]) -> Iterator[tuple[str, str]]:
    """Columns, or parts of the answers, that rate each answer in a list, and the column of that list."""
    for name in _LISTS:
        for record in records:
            answers = record.get(name)
            if not isinstance(answers, list) or not answers:
                continue
            for rating in _RATINGS:
                values = record.get(rating)
                if isinstance(values, list) and len(values) == len(answers) and all(map(_is_number, values)):
                    yield rating, name
            parts = answers[0] if isinstance(answers[0], Mapping) else {}
            yield from ((part, name) for part in parts if _RATING.search(str(part)) and _is_number(parts[part]))


def _has_several_ranks(records: Sequence[Record]) -> bool:
    """Whether answers to one question have different ranks."""
    questions = ((record, record.get(name)) for record in records for name in _QUESTIONS)
    pairs = {(repr(question), record.get("rank")) for record, question in questions if not is_empty(question)}
    return len(pairs) > len({question for question, _ in pairs})


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float))


def rejection_flags(records: Sequence[Record], read: set[str]) -> dict[str, bool]:
    """The columns that are flags in rows like these, with their value for an answer that should not be given. Columns
    that the rows' format reads itself (`read`) are left out."""
    names = {*_FLAGS, *(name for record in records for name in record if _plain(name) in _FLAGS)}
    return {
        name: _FLAGS[_plain(name)]
        for name in names - read
        if all(_flag(name, value) is not None for record in records if (value := record.get(name)) is not None)
    }


def refuse_rejected_answer(record: Record, flags: Mapping[str, bool]) -> None:
    """Refuse, as a `RowError`, a row of which a flag says that its answer should not be given."""
    for name in flags.keys() & record.keys():
        if _flag(name, record[name]) is flags[name]:
            what = f"the column {name!r} says that this answer should not be given, as in data for KTO"
            remedy = "leave such rows out, or the column where it means something else"
            raise RowError(f"{what}, and lorakit trains on what should be said ({remedy})", f"it is {record[name]!r}")


def _flag(name: str, value: Any) -> bool | None:
    """A flag's value; None for what is not a flag."""
    if isinstance(value, bool):
        return value
    is_label = _plain(name) == "label"
    if isinstance(value, str):
        word = value.strip().lower()
        return _WORDS.get(word, None if is_label else _WORDS_EXCEPT_IN_LABELS.get(word))
    return bool(value) if isinstance(value, (int, float)) and value in (0, 1) and not is_label else None
