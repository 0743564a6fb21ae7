"""Sentences of made-up words about one of four topics: token numbers with padding, as a tokenizer would give them."""

from __future__ import annotations

import numpy as np

TOPICS, LENGTH = 4, 16
PADDING, START, FIRST_WORD, WORDS = 0, 1, 2, 998
TOPIC_WORDS = 25  # of each topic; the words after these are anybody's


def load(rows: int = 800, test_rows: int = 200, seed: int = 0) -> dict[str, dict[str, np.ndarray]]:
    random = np.random.default_rng(seed)
    return {"train": _sentences(rows, random), "test": _sentences(test_rows, random)}


def _sentences(rows: int, random: np.random.Generator) -> dict[str, np.ndarray]:
    """A third of the words of a sentence are its topic's."""
    topic = random.integers(0, TOPICS, rows)
    own = topic[:, None] * TOPIC_WORDS + random.integers(0, TOPIC_WORDS, (rows, LENGTH))
    other = random.integers(TOPICS * TOPIC_WORDS, WORDS, (rows, LENGTH))
    words = FIRST_WORD + np.where(random.random((rows, LENGTH)) < 1 / 3, own, other)
    words[:, 0] = START
    mask = np.arange(LENGTH) < random.integers(LENGTH // 2, LENGTH + 1, rows)[:, None]
    return {
        "input_ids": np.where(mask, words, PADDING).astype(np.int64),
        "attention_mask": mask.astype(np.int64),
        "label": topic.astype(np.int64),
    }
