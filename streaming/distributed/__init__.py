"""The stream as a job of a distributed engine (Flink, Prism): the core of the local form in one keyed step per bucket."""
