"""What trainer and serving agree on of churn: at which moments it is asked, by which inputs, and how a version tells it."""
