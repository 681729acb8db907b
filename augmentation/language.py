"""Checks whether a text is in the expected language."""

from functools import lru_cache


CERTAINTY = 0.9  # shorter texts are accepted: names and formulas have no language
MIN_LETTERS = 20


@lru_cache(maxsize=1)
def _identifier():
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)


@lru_cache(maxsize=256)  # each answer is checked twice: for a follow-up request and for the row
def is_language(text: str, language: str) -> bool:
    """
    Returns False if a text is in a language other than `language` (ISO 639-1) with a probability of at least 0.9.

    Example:

    ```python
    >>> is_language("Wir zeigen, dass die Methode besser ist als andere Verfahren.", "en")
    False
    >>> is_language("K-theory and homology", "en")
    True

    ```
    """
    if sum(character.isalpha() for character in text) < MIN_LETTERS:
        return True
    found, probability = _identifier().classify(text)
    return found == language or probability < CERTAINTY
