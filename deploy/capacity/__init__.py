"""`springtide capacity`: computes the size of a deployment and its first bottleneck from measured figures."""
