"""Apache Kafka on one machine: a real broker without a JDK, Maven or Docker."""
