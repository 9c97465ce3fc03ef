"""Near-duplicates: rows that share most of their words, found by MinHash among a million rows in a few hundred MB.
Compared are the sets of three words in a row, letters and digits only, case aside (of four characters in a text of
fewer words, or in a script without spaces). Digits stay: sums that differ in their numbers are different rows. Two rows
are near-duplicates when the estimated share that their sets have in common (Jaccard) reaches THRESHOLD. The signatures
are datasketch's (`MinHash(num_perm=64)`, scheme affine32), computed for a batch of rows at once, and of each value the
lower 16 bits are kept (b-bit minwise hashing, Li and König 2010). datasketch's own index takes several GB for a million
rows; here a band is one 64-bit number, and sorted arrays find equal ones."""

import functools
import re
import zlib
from collections.abc import Iterator, Sequence

import numpy as np

SIZE = 64  # values in a signature: the estimate's standard deviation at 0.8 is 0.05
BANDS = 16  # of four values each: rows that share 0.8 meet in one of them with a probability of 0.9998
THRESHOLD = 0.8
_MOST_CHARACTERS = 50_000
_WORD = re.compile(r"\w+")
_UNSPACED = re.compile("[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]")
_MOST_IN_BUCKET = 8
# More similar rows than this number and this share are made from one template, where that holds in 4 bands. (Rows that
# share 0.8 meet in 6 of 16 bands.)
_TEMPLATE_ROWS, _TEMPLATE_SHARE, _TEMPLATE_BANDS = 20, 0.05, 4


@functools.cache
def _permutations() -> np.ndarray:
    from datasketch import MinHash

    return np.asarray(MinHash(num_perm=SIZE, scheme="affine32").permutations, np.uint32)


def shingles(text: str) -> np.ndarray:
    """Hashes (uint32) of the pieces that a text is compared by; at least one."""
    low = text[:_MOST_CHARACTERS].lower()
    words = _WORD.findall(low)
    if len(words) < 6 or (not low.isascii() and 3 * len(_UNSPACED.findall(low)) > len(low)):
        joined = "".join(words) or "".join(low.split())
        codes = np.frombuffer(joined.ljust(4, "\0").encode("utf-32-le", "surrogatepass"), "<u4").astype(np.uint32)
        return _rolled(_mixed(codes), 4)
    hashes = np.array([zlib.crc32(word.encode("utf-8", "surrogatepass")) for word in words], np.uint32)
    return _rolled(hashes, 3)


def _rolled(hashes: np.ndarray, width: int) -> np.ndarray:
    """One hash for each `width` pieces in a row; the factor is XXH32's second prime."""
    last = len(hashes) - width + 1
    rolled = hashes[:last]
    for place in range(1, width):
        rolled = rolled * np.uint32(0x85EBCA77) + hashes[place : last + place]
    return rolled


def signatures(texts: Sequence[str]) -> np.ndarray:
    """The signatures of texts: uint16 [n, SIZE]."""
    rows = [shingles(text) for text in texts]
    made = np.empty((len(rows), SIZE), np.uint16)
    if not rows:
        return made
    starts = np.cumsum([0] + [len(row) for row in rows[:-1]])
    mixed = _mixed(np.concatenate(rows))
    for place, (factor, term) in enumerate(_permutations().T):
        made[:, place] = np.minimum.reduceat(mixed * factor + term, starts)
    return made


def _mixed(hashes: np.ndarray) -> np.ndarray:
    """MurmurHash3's 32-bit finalizer, as datasketch applies it before its permutations."""
    hashes = (hashes ^ (hashes >> np.uint32(16))) * np.uint32(0x85EBCA6B)
    hashes = (hashes ^ (hashes >> np.uint32(13))) * np.uint32(0xC2B2AE35)
    return hashes ^ (hashes >> np.uint32(16))


def _find_shared_buckets(made: np.ndarray) -> tuple[int, Iterator[tuple[int, np.ndarray]]]:
    """How many buckets of a band hold several rows, and for each row in some, in order, the numbers of these."""
    bands = np.ascontiguousarray(made).view(np.uint64)
    buckets, count = np.empty(bands.shape, np.int32), 0
    for band in range(BANDS):
        _, key, rows = np.unique(bands[:, band], return_inverse=True, return_counts=True)
        numbers = np.where(rows > 1, np.cumsum(rows > 1) - 1 + count, -1)
        buckets[:, band] = numbers[key]
        count += int((rows > 1).sum())
    shared = np.flatnonzero((buckets >= 0).any(1)).tolist()
    return count, ((row, buckets[row][buckets[row] >= 0]) for row in shared)


def _similar(made: np.ndarray, row: int, candidates: np.ndarray) -> np.ndarray:
    """The candidates (-1 is none) that are near-duplicates of `row`, in order."""
    candidates = np.unique(candidates[candidates >= 0])
    return candidates[(made[candidates] == made[row]).sum(1) >= THRESHOLD * SIZE]


def group_near_duplicates(made: np.ndarray) -> np.ndarray:
    """The row that each row is a near-duplicate of: int32 [n], its own number where it is the first of its kind. A row
    joins the earliest leader of a group that it resembles: rows appended later change nothing before them."""
    group = np.arange(len(made), dtype=np.int32)
    count, rows = _find_shared_buckets(made)
    leaders = np.full(count, -1, np.int32)
    for row, mine in rows:
        first = leaders[mine]
        similar = _similar(made, row, first)
        if similar.size:
            group[row] = similar[0]
        else:
            leaders[mine[first < 0]] = row
    return group


def split_sides(made: np.ndarray, own: np.ndarray) -> np.ndarray:
    """Which side of a split each row goes to, near-duplicates on one: int8 [n], 1 or 0 as `own`, -1 for neither. A row
    that resembles earlier rows goes where they went, or to neither where they are on both sides; any other goes to its
    `own` side (bool [n]), and so does a row made from one template with many others. Rows appended later change nothing
    before them."""
    side = own.astype(np.int8)
    count, rows = _find_shared_buckets(made)
    crowd = np.zeros(count, np.int32)  # earlier rows in each bucket
    seen = np.full((count, 4), -1, np.int32)  # the first and the latest row of side 0, and those of side 1
    for row, mine in rows:
        before = seen[mine]
        from_template = (crowd[mine] > max(_TEMPLATE_ROWS, _TEMPLATE_SHARE * row)).sum() >= _TEMPLATE_BANDS
        crowd[mine] += 1
        sides = side[:0] if from_template else side[_similar(made, row, before)]
        if sides.size:
            side[row] = sides[0] if (sides == sides[0]).all() else -1
            if side[row] < 0:
                continue
        first = 2 * int(side[row])
        seen[mine, first] = np.where(before[:, first] < 0, row, before[:, first])
        seen[mine, first + 1] = row
    return side


def find_leaks(train: np.ndarray, held_out: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The training rows that resemble held-out rows, and for each of them such a held-out row: int64 [n] each, from the
    signatures of both."""
    match = np.full(len(train), -1, np.int64)
    ours, theirs = (np.ascontiguousarray(made).view(np.uint64) for made in (train, held_out))
    for band in range(BANDS if len(held_out) else 0):
        order = np.argsort(theirs[:, band], kind="stable")
        keys = theirs[order, band]
        open_rows = np.flatnonzero(match < 0)
        place = np.searchsorted(keys, ours[open_rows, band])
        for step in range(_MOST_IN_BUCKET):
            at = np.minimum(place + step, len(keys) - 1)
            meets = (place + step < len(keys)) & (keys[at] == ours[open_rows, band]) & (match[open_rows] < 0)
            if not meets.any():
                break
            for some in np.array_split(np.flatnonzero(meets), 1 + int(meets.sum()) // 100_000):
                rows, others = open_rows[some], order[at[some]]
                alike = (train[rows] == held_out[others]).sum(1) >= THRESHOLD * SIZE
                match[rows[alike]] = others[alike]
    return np.flatnonzero(match >= 0), match[match >= 0]
