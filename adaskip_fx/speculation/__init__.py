"""Drafts: cheap proposals of the next tokens, which the full program verifies several at once.

What decides here knows no model: which tokens are proposed, which of them are accepted, how many
are worth proposing. The loop that reads and verifies them is `adaskip_fx.model.drafted`. May import
plans.
"""
