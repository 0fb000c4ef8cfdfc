"""`springtide jumps`: the users whose share of the clicks jumped, without the clicks that masks leave out."""

from __future__ import annotations

import json
from typing import Any

from tests.deploy.operating import BOT, Operator


def found(operator: Operator, *words: str) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(operator("jumps", *words, "-o", "json"))
    return document


def test_a_bot_is_the_only_user_whose_share_jumped_and_is_gone_once_it_is_masked(operator: Operator) -> None:
    # The bot has every fifth row since 6.4 minutes; the log begins ten minutes ago.
    listed = found(operator, "--minutes", "7")
    (bot,) = listed["users"]
    assert (bot["id"], bot["users"]) == (f"{BOT:016x}", [f"{BOT:016x}"])
    assert (bot["before"], bot["name"]) == (0.0, None)
    assert 0.14 < bot["share"] < 0.25 and bot["clicks"] == round(bot["share"] * listed["clicks"])
    assert listed["categories"] == []
    (bait,) = listed["items"]
    assert (bait["users"], bait["covered"], bait["clicks"]) == (bot["users"], 1.0, bot["clicks"])
    operator("rollback", "--skip-pseudonym", bot["id"], "--reason", "a bot")
    (mask,) = operator.registry.controls()[-1].masks
    assert [*mask.mask.users] == [BOT]
    after = found(operator, "--minutes", "7")
    assert after["users"] == [] and after["clicks"] == listed["clicks"] - bot["clicks"]
    assert "no share jumped" in operator("jumps", "--minutes", "7")


def test_without_earlier_clicks_nothing_is_compared_and_it_is_said(operator: Operator) -> None:
    assert found(operator, "--minutes", "60")["users"] == []
    assert "no earlier clicks to compare with" in operator("jumps", "--minutes", "60")
