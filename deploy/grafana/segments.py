"""Segments: how many users are in each, and whether somebody keeps that up."""

from __future__ import annotations

from deploy.grafana.panel import Panel, PanelQuery

NONE = "[segments] names none"

SEGMENTS = (
    Panel(
        "Users in segments",
        (PanelQuery("max by (segment) (springtide_segments_members)", "{{segment}}", empty=NONE),),
        "short",
        "Users who are in a segment now.",
        "a level of its own for each.",
        "a jump of one follows a change of its expression or of what it reads; a jump of all, a rollback or a pin.",
        "segments-are-not-kept",
        width=12,
    ),
    Panel(
        "Segments behind the clicks",
        (
            PanelQuery("max(springtide_segments_lag_records)", "records not read", empty=NONE),
            PanelQuery("max(springtide_segments_waiting)", "users not judged", empty=NONE),
            PanelQuery("max(springtide_segments_failures_in_a_row)", "failures in a row", empty=NONE, dashed=True),
        ),
        "short",
        "Records of the training log and users that are not yet held against the expressions; dashed: rounds that failed.",
        "near 0, after a rollback or a pin for as long as a look at all users takes.",
        "nothing at all: nobody keeps them. It grows: more users click than are judged.",
        "segments-are-not-kept",
        alerts=("SpringtideSegmentsBehind", "SpringtideSegmentsFailing", "SpringtideSegmentsAway"),
        width=12,
    ),
)
