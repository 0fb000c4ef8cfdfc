"""The stream as a job of a distributed engine (Flink, Prism): the core of the local form, one keyed step per bucket."""
