"""Texts of plain words, the same for the same seed."""

import random

LIST = """
river lamp cloud bridge letter horse stone garden window market teacher doctor silver copper mountain valley
engine ticket summer winter morning evening paper pencil kitchen bottle carpet island harbor forest village
station museum theatre doorway blanket basket button candle feather hammer ladder needle orange pepper rocket
saddle tunnel velvet
"""
WORDS = LIST.split()


def prose(seed: int, count: int = 40) -> str:
    return " ".join(random.Random(seed).choices(WORDS, k=count))
