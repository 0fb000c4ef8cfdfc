"""The Beam job: clicks in, micro-batches and remembered histories out."""
