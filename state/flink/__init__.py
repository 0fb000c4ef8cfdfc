"""The door to a cluster of Apache Flink: its JobManager's REST interface."""
