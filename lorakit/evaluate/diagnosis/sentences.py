"""A finding as one sentence, with the figures and the answers that its remedy is about."""

from collections.abc import Callable

from lorakit.amounts import percent
from lorakit.evaluate.diagnosis.finding import Finding
from lorakit.recipe.problem import one_line


def describe_finding(finding: Finding) -> str:
    """What was found and what to do about it."""
    found = _SENTENCES.get(finding.name, _plain)(finding)
    return f"{found}. {finding.remedy}"


def format_number(value: float) -> str:
    """Three digits that count; nothing smaller than a thousandth."""
    return f"{value:.3g}" if abs(value) >= 0.001 else f"{value:.3f}".replace("-0.000", "0.000")


def _plain(finding: Finding) -> str:
    assert finding.value is not None
    return f"{finding.name}: {format_number(finding.value)} {finding.unit} (expected at most {finding.threshold:g})"


def _length(finding: Finding) -> str:
    assert finding.value is not None
    shorter = finding.details["answers over references"] < 1
    return (
        f"the answers are {format_number(finding.value)} times {'shorter' if shorter else 'longer'} than the references"
    )


def _unfinished(finding: Finding) -> str:
    cut, longer = finding.details["answers cut"], finding.details["references longer"]
    return f"{percent(cut)} of the answers hit max_new_tokens, and {percent(longer)} of the references are longer"


def _variety(finding: Finding) -> str:
    assert finding.value is not None
    most = finding.details["most frequent answers"]
    answers = ", ".join(f"'{one_line(one['text'])}' ({percent(one['share'])})" for one in most)
    return (
        f"the answers are nearly all the same (variety {abs(finding.value):.2f}, expected at least "
        f"{finding.threshold:g}); the most frequent: {answers}"
    )


def _vocabulary(finding: Finding) -> str:
    assert finding.value is not None
    return f"vocabulary: {format_number(finding.value)} {finding.unit} (expected at least {finding.threshold:g})"


def _format(finding: Finding) -> str:
    ours, theirs = (finding.details[f"formats of {name}"] for name in ("answers", "references"))
    shown = [", ".join(f"{name} ({percent(share)})" for name, share in one.items()) for one in (ours, theirs)]
    return f"the answers begin with {shown[0]}, the references with {shown[1]}"


_SENTENCES: dict[str, Callable[[Finding], str]] = {
    "answer length": _length,
    "unfinished answers": _unfinished,
    "variety of answers": _variety,
    "vocabulary": _vocabulary,
    "format": _format,
}
