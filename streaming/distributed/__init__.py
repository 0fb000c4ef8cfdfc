"""The stream as a job of a distributed engine (Flink, Prism): the cores of the local form, a keyed step for each bucket of users."""
