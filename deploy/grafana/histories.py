"""What is known of users: the panels of the stream's histories and of serving's."""

from __future__ import annotations

from deploy.grafana.panel import RATE_INTERVAL, Panel, PanelQuery, rate

NO_ATTRIBUTES = "attributes have no topics ([attributes])"

STREAM = (
    Panel(
        "Users",
        (
            PanelQuery("sum(springtide_stream_history_users)", "with a stored history"),
            PanelQuery("sum(springtide_stream_cached_users)", "in memory"),
        ),
        "short",
        "Users whose histories the stream keeps.",
        "level in the long run: who was read longest ago leaves.",
        "if it grows towards the store's limit, see the storage on the overview.",
        "the-disk-is-full",
    ),
    Panel(
        "Swept",
        (
            PanelQuery(rate("springtide_stream_swept_events_total"), "events"),
            PanelQuery(
                rate("springtide_stream_swept_users_total", "reason"),
                "users, {{reason}}",
                empty="no user was swept yet",
            ),
        ),
        "cps",
        "Events and users taken out of the histories a second, by reason.",
        "as many as come, in the long run.",
        "users for `too_many`: raise storage.budget_gb where the disk has room.",
        "the-disk-is-full",
    ),
    Panel(
        "Truncated histories",
        (PanelQuery(rate("springtide_stream_truncated_histories_total"), "rows"),),
        "cps",
        "Rows a second whose longest window began before the oldest remembered event.",
        "few: users with more events than are remembered.",
        "many: windows say less than they could; raise the events that a history keeps.",
        "look-first",
    ),
    Panel(
        "Attributes known",
        (
            PanelQuery("sum by (side) (springtide_stream_attributes_known)", "{{side}}", empty=NO_ATTRIBUTES),
            PanelQuery("sum by (side) (springtide_serving_attributes_known)", "{{side}}, serving", empty=NO_ATTRIBUTES),
        ),
        "short",
        "Users and items that have attributes, for the stream and for all hosts of serving.",
        "both sides level or rising.",
        "serving behind the stream: read the applier's log.",
        "answers-do-not-see-new-clicks",
        width=12,
    ),
    Panel(
        "Records of attributes",
        (
            PanelQuery(
                "sum by (side, outcome) (springtide_stream_attribute_records)",
                "{{side}}, {{outcome}}",
                empty=NO_ATTRIBUTES,
            ),
        ),
        "short",
        "Positions of the topics of attributes read since the store began, by outcome.",
        "value and removed; dead stays at 0.",
        "dead: a producer of attributes changed a field.",
        "dead-letters",
        width=12,
    ),
)

SERVING = (
    Panel(
        "Records that wait",
        (PanelQuery("springtide_serving_microbatch_lag_records", "{{instance}}"),),
        "short",
        "Positions of the training log not yet taken into the histories, by host.",
        "near 0.",
        "the applier is slow or away: read its log.",
        "answers-do-not-see-new-clicks",
    ),
    Panel(
        "Rows into the histories",
        (
            PanelQuery(rate("springtide_serving_history_rows_total"), "taken"),
            PanelQuery(rate("springtide_serving_history_duplicates_total"), "had already"),
        ),
        "cps",
        "Rows of micro-batches a second, over all hosts.",
        "as many for each host as the stream writes; duplicates only after a restart.",
        "none: the applier does not follow the log.",
        "answers-do-not-see-new-clicks",
    ),
    Panel(
        "Trouble with the log",
        (
            PanelQuery(f"sum(increase(springtide_serving_gap_positions_total[{RATE_INTERVAL}]))", "positions missing"),
            PanelQuery(
                f"sum(increase(springtide_serving_unreadable_microbatches_total[{RATE_INTERVAL}]))",
                "records that are no micro-batch",
            ),
            PanelQuery(f"sum(increase(springtide_serving_log_failures_total[{RATE_INTERVAL}]))", "failures to read"),
        ),
        "none",
        "Positions deleted unread or covered by no micro-batch, foreign records, and times that the log could not be read.",
        "none.",
        "positions missing: raise the topic's retention. Failures to read: see whether Kafka is there.",
        "a-gap-clicks-deleted-unread",
        alarm=1,
        alerts=("SpringtideServingGap",),
    ),
    Panel(
        "Users",
        (PanelQuery("springtide_serving_history_users", "{{instance}}"),),
        "short",
        "Users who have a history, by host.",
        "level in the long run, and alike on all hosts.",
        "a host with far fewer has begun anew and reads the log again.",
        "answers-do-not-see-new-clicks",
    ),
    Panel(
        "Remembered",
        (PanelQuery("max by (kind) (springtide_serving_remembered)", "{{kind}}s"),),
        "short",
        "Items whose category is remembered, and names of categories and attribute values.",
        "level in the long run.",
        "growing without end: ids are made up by a producer; see the dead letters and the catalogue.",
        "look-first",
    ),
    Panel(
        "Swept",
        (
            PanelQuery(rate("springtide_serving_swept_events_total"), "events"),
            PanelQuery(
                rate("springtide_serving_swept_users_total", "reason"),
                "users, {{reason}}",
                empty="no user was swept yet",
            ),
            PanelQuery(rate("springtide_serving_swept_items_total"), "items and names"),
            PanelQuery(rate("springtide_serving_swept_versions_total"), "versions"),
        ),
        "cps",
        "What serving forgets a second, over all hosts.",
        "as much as comes, in the long run.",
        "users for `too_many`: raise storage.budget_gb where the disk has room.",
        "the-disk-is-full",
    ),
)
