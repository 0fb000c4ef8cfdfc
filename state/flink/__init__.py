"""Access to an Apache Flink cluster through its JobManager's REST interface."""
