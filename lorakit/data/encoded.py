"""An encoded text: token ids, and which of them are trained."""

from dataclasses import dataclass
from itertools import pairwise

IGNORED = -100  # torch's ignore_index: the label of a token that is not trained


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
