"""Apache Flink for the stream: a session cluster on one machine without a JDK, and the configuration for one's own."""
