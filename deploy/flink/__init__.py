"""Apache Flink for the stream: a session cluster on one machine without a JDK, and configuration for other clusters."""
