"""Words in any script: where one begins and ends, and the tokens that ROUGE counts."""

import re
import unicodedata

# Scripts that put no space between words: a word's edge cannot be seen, and characters are counted one by one.
_UNSPACED = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
    "\U00020000-\U0003ffff"
)
_TOKEN = re.compile(f"[{_UNSPACED}]|(?:(?![{_UNSPACED}])[^\\W_])+")
_EDGED = re.compile(f"(?![{_UNSPACED}])[^\\W_]")


def folded(text: str) -> str:
    """The text with letter case, the forms of one character (NFKC) and the kind and number of spaces folded."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def stands_in(wanted: str, text: str) -> bool:
    """Whether `wanted` is in `text` and cuts no word or number in two: not `cat` in `concatenate`, nor `5` in `15`."""
    start = text.find(wanted)
    while start >= 0:
        end = start + len(wanted)
        if not _joined(text[start - 1 : start], wanted[0]) and not _joined(wanted[-1], text[end : end + 1]):
            return True
        start = text.find(wanted, start + 1)
    return False


def _joined(left: str, right: str) -> bool:
    return bool(_EDGED.match(left) and _EDGED.match(right))


def tokens(text: str) -> list[str]:
    """Lower-case runs of letters and digits; of scripts without spaces, each character.

    On ASCII text these are the tokens of rouge-score's own tokenizer, which drops every other letter.
    """
    return _TOKEN.findall(text.lower())
