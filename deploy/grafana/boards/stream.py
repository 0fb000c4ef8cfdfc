"""The stream: are clicks read in time, is each of them accounted for, and which ones are refused."""

from __future__ import annotations

from deploy.grafana import headlines, histories
from deploy.grafana.panel import RATE_INTERVAL, Board, Panel, PanelKind, PanelQuery, PanelRow, both, rate

NO_CLOCK = "no clock is off"

CLICKS = (
    Panel(
        "Clicks by outcome",
        (PanelQuery(rate("springtide_stream_events_total", "outcome"), "{{outcome}}"),),
        "cps",
        "Positions of the clicks topic taken up a second, by what became of them.",
        "rows for the most part; opened and feedback where labels come later; masked after a rollback.",
        "dead: see the dead letters below. None at all: see whether Kafka and the applications are there.",
        "kafka-is-away",
    ),
    headlines.LAG,
    Panel(
        "What waits, in seconds",
        (
            PanelQuery("max(springtide_stream_lag_seconds)", "clicks, for the stream"),
            PanelQuery("max(springtide_trainer_lag_seconds)", "training log, for the trainer"),
        ),
        "s",
        "Wall time since the newest record that each has taken was appended to Kafka; 0 when none wait.",
        "a fraction of a second.",
        "if it grows, take a faster machine; nothing is lost while Kafka keeps the clicks.",
        "clicks-wait",
        goal=1,
    ),
)

MICROBATCHES = (
    Panel(
        "Micro-batches",
        (PanelQuery(rate("springtide_stream_microbatches_total"), "micro-batches"),),
        "cps",
        "Micro-batches written a second.",
        "about five for each partition that has clicks, cut by time (stream.cut_ms).",
        "none: the stream is away, waits for room, or Kafka refuses it; read its log.",
        "a-part-cannot-run",
        width=6,
    ),
    Panel(
        "Busy",
        (PanelQuery(f"rate(springtide_stream_busy_seconds_total[{RATE_INTERVAL}])", "{{instance}}"),),
        "percentunit",
        "Share of the time that the thread which reads clicks works on what it read, commits included.",
        "well below 100 %.",
        "at 100 % clicks wait: give the stream a core of its own or a faster machine.",
        "clicks-wait",
        width=6,
    ),
    Panel(
        "Rows of a micro-batch",
        both("springtide_stream_microbatch_rows"),
        "short",
        "How many rows one micro-batch has.",
        "few while traffic is low, up to stream.microbatch_rows when clicks wait.",
        "always at the limit: more clicks come than are read.",
        "clicks-wait",
        width=6,
    ),
    Panel(
        "Time of a commit",
        both("springtide_stream_commit_seconds"),
        "s",
        "From the end of a micro-batch to its commit: the Kafka transaction, then the histories.",
        "around ten milliseconds.",
        "see the machine's disk and Kafka's; a full disk makes it wait.",
        "the-disk-is-full",
        width=6,
    ),
)

REFUSED = (
    Panel(
        "Dead letters by reason",
        (
            PanelQuery(
                rate("springtide_stream_dead_letters_total", "reason"), "{{reason}}", empty="no click was refused"
            ),
        ),
        "cps",
        "Records refused a second.",
        "none.",
        "read the headers of the dead-letter topic (reason, partition, offset); usually a producer changed a field.",
        "dead-letters",
    ),
    Panel(
        "Share of dead letters",
        (
            PanelQuery(
                headlines.DEAD_SHARE,
                "dead",
            ),
        ),
        "percentunit",
        "Refused records among all positions taken up.",
        "0.",
        "correct the producer, or the names of its fields in [events].",
        "dead-letters",
        alarm=0.01,
        alerts=("SpringtideDeadLetters",),
    ),
    Panel(
        "Clocks that are off",
        (PanelQuery(rate("springtide_stream_clocks_off_total", "direction"), "{{direction}}", empty=NO_CLOCK),),
        "cps",
        "Clicks a second whose time is not what the clicks around them say, by direction.",
        "none. A replayed file is behind, as it should be.",
        "find the producer by the record below and set its clock; nobody else's answers are changed by it.",
        "a-clock-is-wrong",
        alerts=("SpringtideClockOff",),
    ),
    Panel(
        "Partition of the newest wrong clock",
        (PanelQuery("max by (direction) (springtide_stream_clock_off_partition)", "{{direction}}", empty=NO_CLOCK),),
        "none",
        "Where the newest click of a wrong clock lies.",
        "nothing.",
        "read the record there: it names the producer.",
        "a-clock-is-wrong",
        kind=PanelKind.STAT,
        width=6,
    ),
    Panel(
        "Offset of the newest wrong clock",
        (PanelQuery("max by (direction) (springtide_stream_clock_off_offset)", "{{direction}}", empty=NO_CLOCK),),
        "none",
        "The offset of that click in its partition.",
        "nothing.",
        "`--skip PARTITION:A-B` takes clicks back by it.",
        "a-clock-is-wrong",
        kind=PanelKind.STAT,
        width=6,
    ),
    Panel(
        "How far that clock is off",
        (PanelQuery("max by (direction) (springtide_stream_clock_off_seconds)", "{{direction}}", empty=NO_CLOCK),),
        "s",
        "How far its time is from what the clicks around it say; 0 for a refused one.",
        "nothing.",
        "whole hours are a time zone, more is a clock that was never set.",
        "a-clock-is-wrong",
        kind=PanelKind.STAT,
        width=6,
    ),
    Panel(
        "When that click was read",
        (
            PanelQuery(
                "max by (direction) (springtide_stream_clock_off_time_seconds) * 1000", "{{direction}}", empty=NO_CLOCK
            ),
        ),
        "dateTimeFromNow",
        "When the stream read it.",
        "nothing, or long ago.",
        "if it is now, the producer is still at it.",
        "a-clock-is-wrong",
        kind=PanelKind.STAT,
        width=6,
    ),
)

ACCOUNTS = (
    Panel(
        "Positions by outcome",
        (PanelQuery("sum by (outcome) (springtide_accounting_positions)", "{{outcome}}"),),
        "short",
        "Positions of the clicks topic since the store began; `positions` is all of them.",
        "the other lines add up to `positions`.",
        "`springtide status` says which account is wrong and by how many.",
        "an-account-is-wrong",
    ),
    Panel(
        "Labels that arrive later",
        (
            PanelQuery('sum by (outcome) (springtide_accounting_labels{outcome!="waiting"})', "{{outcome}}"),
            PanelQuery('sum(springtide_accounting_labels{outcome="waiting"})', "waiting"),
        ),
        "short",
        "Impressions since the store began, by what became of them; unmatched: outcomes without an impression that waited.",
        "joined and expired rise, dropped stays, waiting is level.",
        "dropped rises: raise labels.max_waiting or labels.wait_s.",
        "impressions-are-dropped",
        alerts=("SpringtideImpressionsDropped",),
    ),
    Panel(
        "Stream faults",
        (PanelQuery("sum(springtide_accounting_stream_faults)", "accounts"),),
        "none",
        "Accounts of the stream that do not balance.",
        "0, always.",
        "`springtide status` says which one and by how many.",
        "an-account-is-wrong",
        kind=PanelKind.STAT,
        alarm=1,
        alerts=("SpringtideAccountWrong",),
        width=4,
    ),
    Panel(
        "Gaps accepted",
        (PanelQuery("sum(increase(springtide_stream_gaps_accepted_total[1d]))", "gaps"),),
        "none",
        "Gaps in the clicks topic that operators said are lost, in the last day.",
        "0.",
        "the topic's retention is shorter than the stream was away: raise it.",
        "a-gap-clicks-deleted-unread",
        alerts=("SpringtideGap",),
        kind=PanelKind.STAT,
        goal=1,
        width=4,
    ),
)

BOARD = Board(
    "springtide-stream",
    "Springtide: stream",
    "Are clicks read in time, is each accounted for, and which are refused?",
    (
        PanelRow("Clicks", CLICKS),
        PanelRow("Micro-batches", MICROBATCHES),
        PanelRow("Refused clicks and wrong clocks", REFUSED),
        PanelRow("Accounts", ACCOUNTS),
        PanelRow("Histories and attributes", histories.STREAM),
    ),
)
