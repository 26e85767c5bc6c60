"""Quality of a model, compiled or not: tasks, one runner, and a check of what really ran.

A task (:class:`~adaskip_fx.evaluation.task.Task`) makes examples of one of four kinds
(:mod:`~adaskip_fx.evaluation.examples`); :func:`~adaskip_fx.evaluation.evaluate.evaluate` puts
them to a model. All of it works offline: texts are read from paths, or are drawn with a seed.

    from adaskip_fx.evaluation.evaluate import evaluate
    from adaskip_fx.evaluation.tasks import Passkey, Perplexity

    found = evaluate(fast, tokenizer, [Perplexity(), Passkey(length=3500)], reference=model)
"""
