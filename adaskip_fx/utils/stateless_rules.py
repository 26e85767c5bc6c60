"""Which logits processors and stopping criteria may be asked about tokens that do not stand."""

from __future__ import annotations

from collections.abc import Iterable

#: Processors and criteria of transformers' that answer by their arguments alone, and so may be
#: asked about tokens that are not accepted in the end.
_REMEMBER_NOTHING = frozenset(
    {
        *("TemperatureLogitsWarper", "TopKLogitsWarper", "TopPLogitsWarper", "MinPLogitsWarper"),
        *("TopHLogitsWarper", "TypicalLogitsWarper", "EpsilonLogitsWarper", "EtaLogitsWarper"),
        *("RepetitionPenaltyLogitsProcessor", "EncoderRepetitionPenaltyLogitsProcessor"),
        *("NoRepeatNGramLogitsProcessor", "EncoderNoRepeatNGramLogitsProcessor"),
        *("MinLengthLogitsProcessor", "MinNewTokensLengthLogitsProcessor"),
        *("NoBadWordsLogitsProcessor", "SequenceBiasLogitsProcessor"),
        *("SuppressTokensLogitsProcessor", "SuppressTokensAtBeginLogitsProcessor"),
        *("ForcedBOSTokenLogitsProcessor", "ForcedEOSTokenLogitsProcessor"),
        *("InfNanRemoveLogitsProcessor", "LogitNormalization", "ExponentialDecayLengthPenalty"),
        *("MaxLengthCriteria", "MaxTimeCriteria", "EosTokenCriteria", "StopStringCriteria"),
    }
)


def remember_nothing(rules: Iterable[object]) -> bool:
    """Return whether logits processors and stopping criteria are known to keep no state."""
    kinds = [type(rule) for rule in rules]
    ours = all(kind.__module__.startswith("transformers.generation.") for kind in kinds)
    return ours and all(kind.__name__ in _REMEMBER_NOTHING for kind in kinds)


def ending_tokens(criteria: Iterable[object]) -> frozenset[int] | None:
    """Return the tokens that end a row, where it ends by these or by one length; else None."""
    rules = list(criteria)
    lengths = sum(hasattr(rule, "max_length") for rule in rules)
    if lengths > 1 or not ends_by_token(rules, 0):
        return None
    ids = [getattr(rule, "eos_token_id", None) for rule in rules]
    return frozenset(int(token) for of_rule in ids if of_rule is not None for token in of_rule)


def ends_by_token(criteria: Iterable[object], length: int) -> bool:
    """Return whether a row ends, up to a length in tokens, by a token of the config alone."""
    for rule in criteria:
        kind, ours = type(rule), type(rule).__module__.startswith("transformers.generation.")
        longest = getattr(rule, "max_length", 0) if kind.__name__ == "MaxLengthCriteria" else 0
        if not ours or not (kind.__name__ == "EosTokenCriteria" or longest > length):
            return False
    return True
