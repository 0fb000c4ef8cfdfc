"""Keeps segment memberships up to date next to serving; exports members, and finds similar users (lookalikes)."""
